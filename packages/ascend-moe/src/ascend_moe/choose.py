# SPDX-License-Identifier: Apache-2.0
"""The choice of a communication method for a step: a table over the chip, the parallel sizes and the step's tokens."""

from dataclasses import dataclass
from enum import Enum

__all__ = ["CommMethod", "DispatchConfig", "Soc", "choose_method", "mc2_buffer_bytes"]

# Limits of MC2's kernels: the first on every chip, the other two on A2 only.
_MC2_TOKENS_PER_RANK = 512
_A2_MC2_EXPERTS_PER_RANK = 24
_A2_MC2_LEAST_EP = 16


class Soc(Enum):
    """Families of Ascend chips between which communication differs."""

    A2 = "A2"
    A3 = "A3"
    A5 = "A5"
    P310 = "310P"

    @classmethod
    def of(cls, device_name: str) -> "Soc":
        """The family of a device as torch_npu names it, such as Ascend910B3 (A2) or Ascend910_9391 (A3).

        Raises:
            ValueError: another name.
        """
        for prefix, soc in _DEVICE_NAMES.items():
            if device_name.startswith(prefix):
                return soc
        raise ValueError(
            f"device_name={device_name!r} is of no known family: it must start with one of {', '.join(_DEVICE_NAMES)}"
        )


_DEVICE_NAMES = {"Ascend910B": Soc.A2, "Ascend910_93": Soc.A3, "Ascend950": Soc.A5, "Ascend310P": Soc.P310}


class CommMethod(Enum):
    """How tokens reach their experts.

    ALL_GATHER: every rank receives all tokens and computes its own experts' share of each. ALL_TO_ALL_V: tokens are sent
    to the ranks of their experts; the host waits once for the sizes. MC2: fused kernels that communicate and compute, with
    buffers of a fixed size.
    """

    ALL_GATHER = "all-gather"
    ALL_TO_ALL_V = "all-to-all-v"
    MC2 = "mc2"


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig:
    """What the choice of a communication method depends on, except the tokens of the step.

    Args:
        soc: the chip.
        ep_size: ranks that share the experts of a layer. 1: no expert parallelism.
        tp_size: tensor parallel ranks, over which MC2 slices tokens.
        world_size: all ranks of the run, a multiple of ep_size and of tp_size.
        experts_per_rank: physical slots of a rank, replicas included.
        top_k: experts per token.
        max_captured_tokens: tokens of the largest batch that is captured as a graph. 0: none is captured, so MC2 has no capacity.

    Raises:
        ValueError: a size below what is allowed, or a world that is no multiple of the others.
    """

    soc: Soc
    ep_size: int
    tp_size: int
    world_size: int
    experts_per_rank: int
    top_k: int
    max_captured_tokens: int

    def __post_init__(self) -> None:
        """Check the sizes."""
        if not isinstance(self.soc, Soc):
            raise ValueError(f"soc={self.soc!r} must be one of {', '.join(str(soc) for soc in Soc)}")
        for name in ("ep_size", "tp_size", "world_size", "experts_per_rank", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_captured_tokens < 0:
            raise ValueError(f"max_captured_tokens={self.max_captured_tokens} must be at least 0")
        for name in ("ep_size", "tp_size"):
            if self.world_size % getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} must divide world_size={self.world_size}")

    @property
    def mc2_capacity(self) -> int:
        """The most tokens of a step for which MC2's buffers suffice: at most 512 for each rank of the TP group."""
        per_rank = -(-self.max_captured_tokens // self.tp_size)
        return min(per_rank, _MC2_TOKENS_PER_RANK) * self.tp_size


def choose_method(config: DispatchConfig, tokens: int) -> CommMethod:
    """The communication method of a step.

    All ranks of the expert parallel group must call it with the same `tokens`; otherwise they may choose different methods and
    wait for each other forever.

    Args:
        config: the chip and the sizes, which do not change between steps.
        tokens: tokens of the step before they are sliced over TP; the largest count among DP ranks.

    Raises:
        ValueError: `tokens` is below 0.

    Source: the public vLLM Ascend plugin's choice for each SoC.
    """
    if tokens < 0:
        raise ValueError(f"tokens={tokens} must be at least 0")
    if config.ep_size == 1 or config.soc is Soc.P310:
        return CommMethod.ALL_GATHER
    fits_mc2 = tokens <= config.mc2_capacity
    if config.soc is Soc.A2:
        few_experts = config.experts_per_rank <= _A2_MC2_EXPERTS_PER_RANK
        big_enough = config.ep_size >= _A2_MC2_LEAST_EP
        return CommMethod.MC2 if few_experts and big_enough and fits_mc2 else CommMethod.ALL_GATHER
    if fits_mc2:  # A5 also requires a world of more than one rank, which an EP size above 1 implies
        return CommMethod.MC2
    if config.soc is Soc.A5 and config.world_size <= config.top_k:
        return CommMethod.ALL_GATHER
    return CommMethod.ALL_TO_ALL_V


def mc2_buffer_bytes(config: DispatchConfig, hidden: int, tokens: int | None = None) -> int:
    """The bytes that an HCCL buffer must have for MC2's kernels; `HCCL_BUFFSIZE`, in MB, must be at least that.

    Args:
        config: the sizes.
        hidden: H.
        tokens: the most tokens of a rank. None: those of `mc2_capacity`.

    Source: CANN's documentation of `aclnnMoeDistributeDispatchV2`, on HCCL_BUFFSIZE.
    """
    if tokens is None:
        tokens = config.mc2_capacity // config.tp_size
    sent = config.experts_per_rank * config.ep_size * _aligned(_aligned(2 * hidden, 32) + 64, 512)
    returned = config.top_k * _aligned(2 * hidden, 512)
    return 2 * tokens * (sent + returned)


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
