# SPDX-License-Identifier: Apache-2.0
"""The experts of a rank: two grouped matrix products with a gated activation between them.

Legend: A rows sorted by slot, L slots of this rank, H hidden, I intermediate.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ascend_moe import kernels
from ascend_moe.dispatch import Dispatched

__all__ = ["Activation", "Experts", "FloatExperts", "Gate", "activate", "check_experts"]

Gate: TypeAlias = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """The activation between the two products: `gate(g) * u`, g the left half of the columns and u the right one.

    With a limit (clipped SwiGLU) it is `g * sigmoid(alpha * g) * (u + up_bias)`, after g was clipped to at most `limit` and
    u to -limit .. limit. GPT-OSS: `limit=7.0, alpha=1.702, up_bias=1.0, interleaved=True`. DeepSeek-V4: `limit=10.0`.
    The vLLM plugin uses it for GPT-OSS alone.

    Args:
        gate: the function of g: SiLU, or GELU by the error function or by tanh.
        limit: the bound of clipped SwiGLU. None: nothing is clipped.
        alpha: the factor of g in its sigmoid, of clipped SwiGLU.
        up_bias: what is added to u, of clipped SwiGLU.
        interleaved: g is the even columns and u the odd ones. Only with a limit.

    Raises:
        ValueError: an unknown gate, `alpha`, `up_bias` or `interleaved` without a limit, or a limit with another gate than SiLU.
    """

    gate: Gate = "silu"
    limit: float | None = None
    alpha: float = 1.0
    up_bias: float = 0.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        """Check that there is a kernel for this combination."""
        if self.gate not in get_args(Gate):
            raise ValueError(f"gate={self.gate!r} must be one of {', '.join(get_args(Gate))}")
        if self.limit is None:
            changed = {
                "alpha": (self.alpha, 1.0),
                "up_bias": (self.up_bias, 0.0),
                "interleaved": (self.interleaved, False),
            }
            for name, (value, only) in changed.items():
                if value != only:
                    raise ValueError(f"{name}={value} must be {only} where limit=None")
            return
        if self.gate != "silu":
            raise ValueError(f"limit={self.limit} must be None where gate={self.gate!r}")
        if not self.limit > 0:
            raise ValueError(f"limit={self.limit} must be above 0")

    @property
    def is_swiglu(self) -> bool:
        """Whether it is plain SwiGLU, for which there are fused kernels."""
        return self.gate == "silu" and self.limit is None


class Experts(Protocol):
    """A rank's experts, in whatever number format."""

    quantised: ClassVar[bool]
    """Whether `forward` takes int8 rows with scales."""

    @property
    def num_slots(self) -> int:
        """L."""

    def forward(self, dispatched: Dispatched, dtype: torch.dtype) -> Tensor:
        """`[A, H]` of `dtype`: each row after the expert of its slot. Rows after the last counted one are undefined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatExperts:
    """Experts in the layer's own dtype.

    Args:
        w13: `[L, H, 2I]`: gate and up projections, concatenated along the last axis.
        w2: `[L, I, H]`: down projections.
        activation: between them.
        w13_bias: `[L, 2I]`, added after the first product; float32 for bfloat16 weights, else of their dtype. None: nothing is added.
        w2_bias: `[L, H]`, likewise after the second. Of ranks that each return a partial sum of the same experts, one has it and the others zeros.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """

    w13: Tensor
    w2: Tensor
    activation: Activation = field(default_factory=Activation)
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    quantised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the weights."""
        check_experts(self.w13, self.w2)
        if not self.w13.is_floating_point():
            raise ValueError(f"w13 of {self.w13.dtype} must be a float tensor")
        wanted = torch.float32 if self.w13.dtype == torch.bfloat16 else self.w13.dtype
        for name, weight, bias in (("w13_bias", self.w13, self.w13_bias), ("w2_bias", self.w2, self.w2_bias)):
            shape = [len(weight), weight.shape[2]]
            if bias is not None and (list(bias.shape), bias.dtype, bias.device) != (shape, wanted, weight.device):
                raise ValueError(
                    f"{name} of {list(bias.shape)}, {bias.dtype} on {bias.device} must be {shape}, {wanted} on {weight.device}"
                )

    @property
    def num_slots(self) -> int:
        """L."""
        return len(self.w13)

    def forward(self, dispatched: Dispatched, dtype: torch.dtype) -> Tensor:
        """See `Experts`."""
        if not len(dispatched.rows):
            return dispatched.rows
        hidden = kernels.grouped_matmul(dispatched.rows, self.w13, dispatched.counts, self.w13_bias)
        return kernels.grouped_matmul(activate(hidden, self.activation), self.w2, dispatched.counts, self.w2_bias)


def activate(hidden: Tensor, activation: Activation) -> Tensor:
    """The activation of rows `[A, 2I]`: `[A, I]`."""
    if activation.is_swiglu:
        return kernels.swiglu(hidden)
    if activation.limit is not None:
        return kernels.clipped_swiglu(
            hidden,
            limit=activation.limit,
            alpha=activation.alpha,
            up_bias=activation.up_bias,
            interleaved=activation.interleaved,
        )
    gate, up = hidden.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh" if activation.gate == "gelu_tanh" else "none") * up


def check_experts(w13: Tensor, w2: Tensor) -> None:
    """Raise ValueError unless w13 is `[L, H, 2I]` and w2 `[L, I, H]`, of one dtype and on one device."""
    fits = w13.dim() == w2.dim() == 3 and w13.shape[0] == w2.shape[0] > 0
    if not fits or w13.shape[1] != w2.shape[2] or w13.shape[2] != 2 * w2.shape[1]:
        raise ValueError(
            f"w13 of {list(w13.shape)} and w2 of {list(w2.shape)} must be [slots, hidden, 2 * intermediate] and "
            "[slots, intermediate, hidden]"
        )
    if w13.dtype != w2.dtype or w13.device != w2.device:
        raise ValueError(f"w2 of {w2.dtype} on {w2.device} must be as w13, {w13.dtype} on {w13.device}")
