# SPDX-License-Identifier: Apache-2.0
"""vLLM on Huawei Ascend NPUs.

vLLM finds this package by its two entry points; importing it touches neither torch nor torch_npu nor vLLM.
"""

from functools import cache

__version__ = "0.32.0"
__all__ = ["__version__", "register", "register_general"]


def register() -> str | None:
    """vLLM's `vllm.platform_plugins` entry point: the platform's class, or None where it is inactive (with the reason in the log)."""
    from vllm_ascend import doctor, envs

    if reason := doctor.inactive_because():
        doctor.log_inactive(reason)
        return None
    envs.set_defaults_for_vllm()
    return "vllm_ascend.platform.AscendPlatform"


@cache
def register_general() -> None:
    """vLLM's `vllm.general_plugins` entry point: runs in every process. A second call does nothing."""
    from vllm_ascend import doctor

    if doctor.inactive_because():
        return
    from vllm.v1.attention.backends.registry import register_backend

    from vllm_ascend import compat, multimodal, quantization, weight_transfer
    from vllm_ascend.attention import BACKENDS

    for name, path in BACKENDS.values():
        register_backend(name, path)
    compat.drop_late_answers()
    quantization.register()
    weight_transfer.register()
    if multimodal.missing():
        compat.name_missing_libraries()
