# SPDX-License-Identifier: Apache-2.0
"""What vLLM asks of a hardware platform, answered for Ascend NPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.platforms.interface import Platform, PlatformEnum

from vllm_ascend import compat, start, transfer
from vllm_ascend.attention import BACKENDS, COMPOSED, CROSS, ENCODER, PAIRED, PAIRED_COMPOSED, SINKS, kinds
from vllm_ascend.eplb import front_end
from vllm_ascend.sleep import limits as sleep

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
    from vllm.v1.attention.backends.mla.prefill.selector import MLAPrefillSelectorConfig
    from vllm.v1.attention.selector import AttentionSelectorConfig

__all__ = ["AscendPlatform"]

logger = init_logger("vllm.vllm_ascend")  # a child of vLLM's logger, whose handler and level the user sets


class AscendPlatform(Platform):
    """Ascend NPU. Nothing is compiled; decoding steps can be captured in graphs (`graphs_config.py`)."""

    _enum = PlatformEnum.OOT
    device_name = "npu"
    device_type = "npu"
    dispatch_key = "PrivateUse1"
    ray_device_key = "NPU"
    device_control_env_var = "ASCEND_RT_VISIBLE_DEVICES"
    ray_noset_device_env_vars = ["RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"]  # noqa: RUF012
    simple_compile_backend = "eager"
    dist_backend = "hccl"
    lmhead_is_shared = False
    """Whether data parallel ranks share the LM head in any engine that was configured in this process. vLLM asks `validate_request` without saying for
    which engine; of several, one that shares it must not be given what would end it."""

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        """What the attention kernels take; vLLM serves a checkpoint of another dtype in the first of these. float32 is for the simulator's relaxed mode."""
        return [torch.bfloat16, torch.float32]

    @classmethod
    def import_kernels(cls) -> None:
        """vLLM's compiled operators do not exist for this platform."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        """Offer this platform's kernels for vLLM's intermediate operators."""
        import vllm_ascend.layers.norm  # noqa: F401

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        """Replace the Triton kernels of the V1 path."""
        from vllm_ascend.triton_kernels import REPLACEMENTS

        compat.replace_triton_kernels(REPLACEMENTS)

    @classmethod
    def get_default_ir_op_priority(cls, vllm_config: VllmConfig) -> IrOpPriorityConfig:
        """NPU kernels before vLLM's own, for the operators that have one."""
        from vllm.config.kernel import IrOpPriorityConfig

        ours = ["ascend", "native"]
        return IrOpPriorityConfig.with_default(["native"], rms_norm=ours, fused_add_rms_norm=ours)

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: AttentionSelectorConfig, num_heads: int | None = None
    ) -> str:
        """Qualified name of the attention backend.

        Raises:
            ValueError: what none of them can do, and the start could not see in the model's configuration; a backend of another platform.
        """
        from vllm.config import get_current_vllm_config_or_none

        from vllm_ascend.attention.limits import composed

        asked = attn_selector_config
        if asked.use_sparse:
            raise ValueError(
                f"vllm-ascend has no attention backend for sparse attention (head size {asked.head_size}, {asked.dtype})"
            )
        name, path = BACKENDS[asked.use_mla]
        if selected_backend is not None and selected_backend.name != name:
            raise ValueError(f"attention backend {selected_backend.name!r}: vllm-ascend has {name!r} for this layer")
        if asked.attn_type in ("encoder_only", "encoder"):
            return ENCODER
        if asked.attn_type == "encoder_decoder":
            return CROSS
        if asked.has_sink:
            return SINKS
        config = get_current_vllm_config_or_none()
        model = None if config is None else config.model_config
        if asked.use_mla or model is None:
            return path
        in_pairs = model.is_hybrid or kinds.differ(model)
        if composed(model):
            return PAIRED_COMPOSED if in_pairs else COMPOSED
        return PAIRED if in_pairs else path

    @classmethod
    def get_mla_prefill_backend_cls(cls, mla_selector_config: MLAPrefillSelectorConfig) -> type[MLAPrefillBackend]:
        """A class that computes nothing: `attention/mla.py` calls the kernels for prompts itself."""
        from vllm_ascend.attention.mla import NoMLAPrefill

        return NoMLAPrefill

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: VllmConfig) -> None:
        """Turn compilation off and choose what is captured, before vLLM decides about it; choose the attention backend, what a KV connector needs, and the quantisation
        method by the checkpoint's folder."""
        from vllm.config.compilation import CompilationMode

        from vllm_ascend import graphs_config
        from vllm_ascend.quantization.config import choose_by_folder

        choose_by_folder(vllm_config)
        transfer.choose(vllm_config)
        kinds.choose_backend(vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.NONE
        if notice := graphs_config.choose(vllm_config):
            logger.warning_once(notice)

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check the configuration, and set what this plugin decides in it.

        Raises:
            ValueError: everything that this plugin cannot do.
        """
        host = start.Host(devices=torch.npu.device_count(), chip=torch.npu.get_device_name(0))
        config = start.check(vllm_config, host)
        for notice in start.notices(vllm_config):
            logger.warning_once(notice)
        cls.lmhead_is_shared |= config.finegrained_tp_config.lmhead_tensor_parallel_size > 0
        if vllm_config.model_config is not None:
            vllm_config.model_config.sleep_mode_backend = sleep.BACKEND
            if vllm_config.model_config.is_mm_prefix_lm:
                from vllm_ascend.scheduler import keep_pictures_whole

                keep_pictures_whole(vllm_config.scheduler_config)
        parallel = vllm_config.parallel_config
        if parallel.worker_cls == "auto":
            parallel.worker_cls = "vllm_ascend.worker.AscendWorker"
        if config.eplb_config.dynamic_eplb:
            front_end.serve_metrics(vllm_config)

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: SamplingParams | PoolingParams) -> None:
        """Refuse a request whose logits would be computed apart from the step in which other ranks wait for them.

        Raises:
            VLLMValidationError: the request cannot be served; the server answers 400 with the message, and 500 without one for any other error.
        """
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import SamplingParams

        if cls.lmhead_is_shared and isinstance(params, SamplingParams) and params.prompt_logprobs is not None:
            raise VLLMValidationError(
                "log-probabilities of the prompt (prompt_logprobs, or echo with logprobs) are not available with "
                "finegrained_tp_config.lmhead_tensor_parallel_size: the ranks that share the LM head compute it once a step",
                parameter="prompt_logprobs",
                value=params.prompt_logprobs,
            )

    @classmethod
    def set_additional_forward_context(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The state of the step that begins, for the linear layers."""
        from vllm_ascend import parallel

        step = (kwargs.get(name) for name in ("num_tokens", "num_tokens_across_dp", "attn_metadata"))
        return parallel.forward_context(*step)

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """Make `device` the current one."""
        torch.npu.set_device(device)

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        """Seed the generators of all devices."""
        torch.npu.manual_seed_all(seed)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """Name of the chip, such as Ascend910B3."""
        return str(torch.npu.get_device_name(device_id))

    @classmethod
    def get_device_uuid(cls, device_id: int = 0) -> str:
        """A name that no other device of this host has."""
        return f"npu-{device_id}"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Raise NotImplementedError, which vLLM allows for: it asks in the parent process, where initialising a device would break forked workers."""
        raise NotImplementedError

    @classmethod
    def get_current_memory_usage(cls, device: torch.types.Device | None = None) -> float:
        """Bytes that tensors occupy now: vLLM's DeviceMemoryProfiler takes the difference before and after loading a model."""
        return float(torch.npu.memory_allocated(device))

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        """Number of AI cores."""
        return int(torch.npu.get_device_properties(device_id).cube_core_num)

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        """Accept every type here; `attention/probe.py` finds what the kernels refuse."""

    @classmethod
    def support_static_graph_mode(cls) -> bool:
        """Steps can be captured in graphs."""
        return True

    @classmethod
    def graph_pool_handle(cls) -> Any:
        """A new pool of memory for graphs."""
        return torch.npu.graph_pool_handle()

    def is_sleep_mode_available(self) -> bool:
        """The memory of weights and caches can be given back."""
        return True

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        """Host memory can be pinned."""
        return True

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        """Layers may differ in their KV-cache shapes."""
        return True

    @classmethod
    def check_runner_kv_caches_multi_layer(cls) -> None:
        """Several caches in one layer are fine."""

    @classmethod
    def get_nixl_supported_devices(cls) -> dict[str, tuple[str, ...]]:
        """Where NIXL's connector may have what it sends: in host memory, to which `swap_out_blocks_to_host` copies it."""
        return {cls.device_type: ("cpu",)}

    @classmethod
    def swap_out_blocks_to_host(
        cls, src_cache: Tensor, dst_cache: Tensor, src_block_indices: Tensor, dst_block_indices: Tensor
    ) -> None:
        """Copy blocks of a layer's cache `[blocks, 2, ...]`, whose keys and values may lie apart, to a buffer of the same shape on the host, and wait."""
        for source, target in zip(src_cache.unbind(1), dst_cache.unbind(1), strict=True):
            target[dst_block_indices] = source.index_select(0, src_block_indices).cpu()

    @classmethod
    def insert_blocks_to_device(
        cls, src_cache: Tensor, dst_cache: Tensor, src_block_indices: Tensor, dst_block_indices: Tensor
    ) -> None:
        """Copy blocks back, as they came from `swap_out_blocks_to_host` of another engine."""
        for source, target in zip(src_cache.unbind(1), dst_cache.unbind(1), strict=True):
            target.index_copy_(0, dst_block_indices, source[src_block_indices].to(target.device))

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """vLLM's base class over HCCL."""
        return "vllm_ascend.communicator.AscendCommunicator"

    @classmethod
    def get_punica_wrapper(cls) -> str:
        """The products of LoRA layers."""
        return "vllm_ascend.lora.punica.AscendPunicaWrapper"
