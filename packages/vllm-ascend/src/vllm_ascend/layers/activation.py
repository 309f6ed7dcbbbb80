# SPDX-License-Identifier: Apache-2.0
"""SwiGLU."""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.layers.activation import SiluAndMul

from vllm_ascend import kernels

__all__ = ["AscendSiluAndMul", "register"]


class AscendSiluAndMul(SiluAndMul):
    """`silu(gate) * up` in one kernel."""

    def forward_oot(self, x: Tensor) -> Tensor:
        """X `[..., 2I]` -> `[..., I]`."""
        return kernels.swiglu(x)


def register() -> None:
    """Replace vLLM's layer."""
    SiluAndMul.register_oot(AscendSiluAndMul)
