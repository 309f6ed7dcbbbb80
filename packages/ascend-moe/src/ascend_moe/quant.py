# SPDX-License-Identifier: Apache-2.0
"""W8A8 dynamic: int8 weights with a scale for each output channel, int8 rows with a scale for each row.

Legend: A rows sorted by slot, L slots of this rank, H hidden, I intermediate.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ascend_moe import kernels
from ascend_moe.dispatch import Dispatched
from ascend_moe.experts import Activation, activate, check_experts

__all__ = ["W8A8Experts", "quantise_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class W8A8Experts:
    """Experts with int8 weights and activations.

    Args:
        w13: int8 `[L, H, 2I]`.
        w13_scale: float32 `[L, 2I]`.
        w2: int8 `[L, I, H]`.
        w2_scale: `[L, H]`, bfloat16 for a layer in bfloat16, else float32: what the kernel takes.
        activation: between the products. All but plain SwiGLU take two more kernels.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """

    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    activation: Activation = field(default_factory=Activation)
    quantised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the weights and scales."""
        check_experts(self.w13, self.w2)
        if self.w13.dtype != torch.int8:
            raise ValueError(f"w13 of {self.w13.dtype} must be torch.int8")
        wanted = (("w13", self.w13, (torch.float32,)), ("w2", self.w2, (torch.float32, torch.bfloat16)))
        for name, weight, dtypes in wanted:
            scale = getattr(self, f"{name}_scale")
            shape = (weight.shape[0], weight.shape[2])
            if scale.shape != shape or scale.dtype not in dtypes or scale.device != weight.device:
                raise ValueError(
                    f"{name}_scale of {scale.dtype} {list(scale.shape)} on {scale.device} must be "
                    f"{' or '.join(map(str, dtypes))} {list(shape)} on {weight.device}"
                )

    @property
    def num_slots(self) -> int:
        """L."""
        return len(self.w13)

    def forward(self, dispatched: Dispatched, dtype: torch.dtype) -> Tensor:
        """See `Experts`.

        Raises:
            ValueError: rows that are not quantised, or a `w2_scale` that does not suit `dtype`.
        """
        rows, scales, counts = dispatched.rows, dispatched.scales, dispatched.counts
        if scales is None:
            raise ValueError("dispatched.scales=None must be the rows' scales: dispatch with quantise=True")
        self._check_dtype(dtype)
        if not len(rows):
            return rows.to(dtype)
        if self.activation.is_swiglu:
            summed = kernels.grouped_matmul_int32(rows, self.w13, counts)
            hidden, hidden_scales = kernels.dequant_swiglu_quant(summed, self.w13_scale, scales, counts)
        else:
            w13_scale = self.w13_scale.to(self.w2_scale.dtype)
            wide = kernels.grouped_matmul_dequantised(
                rows, self.w13, counts, weight_scale=w13_scale, row_scale=scales, dtype=dtype
            )
            hidden, hidden_scales = kernels.dynamic_quant(activate(wide, self.activation))
        return kernels.grouped_matmul_dequantised(
            hidden, self.w2, counts, weight_scale=self.w2_scale, row_scale=hidden_scales, dtype=dtype
        )

    def _check_dtype(self, dtype: torch.dtype) -> None:
        wanted = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        if self.w2_scale.dtype != wanted:
            raise ValueError(f"w2_scale of {self.w2_scale.dtype} must be {wanted} for a layer in {dtype}")


def quantise_weights(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with a scale for each output channel.

    Args:
        weights: float `[L, in, out]`.

    The vLLM plugin does not use this function: its checkpoints are quantised already.

    Returns:
        int8 `[L, in, out]` and float32 `[L, out]`: weight times scale is the original, within half a scale. A channel
        of zeros has scale 1.
    """
    wide = weights.float()
    scale = wide.abs().amax(dim=1) / 127.0
    scale = torch.where(scale == 0.0, 1.0, scale)
    return (wide / scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale
