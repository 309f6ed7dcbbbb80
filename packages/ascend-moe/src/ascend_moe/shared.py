# SPDX-License-Identifier: Apache-2.0
"""Shared experts: an MLP that every token passes in addition to its routed experts.

The vLLM plugin does not use this module: vLLM runs its models' shared experts itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

__all__ = ["SharedExperts", "SharedMode", "start_on"]

SharedMode: TypeAlias = Literal["tensor_parallel", "replicated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExperts:
    """A shared MLP and how the ranks divide its work.

    `tensor_parallel`: each TP rank has a shard of the weights, computes all tokens and returns a partial sum over TP.
    `replicated`: each TP rank has all weights and computes its slice of the tokens; the results are added to the routed
    experts' before these are communicated, so that they need no communication of their own.

    Args:
        mlp: `[n, H]` -> `[n, H]`. A gate on it, as Qwen2-MoE has one, is part of it.
        mode: how the TP ranks divide the work.
        stream: the stream on which it runs concurrently with dispatch and routed experts; None: before them, on the
            current stream.

    Raises:
        ValueError: an unknown mode.
    """

    mlp: Callable[[Tensor], Tensor]
    mode: SharedMode
    stream: torch.Stream | None = None

    def __post_init__(self) -> None:
        """Check the mode."""
        if self.mode not in get_args(SharedMode):
            raise ValueError(f"mode={self.mode!r} must be one of {', '.join(get_args(SharedMode))}")


def start_on(stream: torch.Stream | None, work: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Start ``work(x)`` on `stream`, and return the function that waits for its result.

    The work starts after what the current stream has queued so far, and runs concurrently with what is queued there from
    now until the wait. Until then `x` must not be written to. Without a stream the work is done at once.
    """
    if stream is None:
        done = work(x)
        return lambda: done
    current = torch.accelerator.current_stream(x.device)
    stream.wait_stream(current)
    with stream:
        result = work(x)
    x.record_stream(stream)

    def wait() -> Tensor:
        current.wait_stream(stream)
        result.record_stream(current)
        return result

    return wait
