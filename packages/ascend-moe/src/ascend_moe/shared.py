# SPDX-License-Identifier: Apache-2.0
"""Shared experts: an MLP that every token passes beside its routed experts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

__all__ = ["SharedExperts", "SharedMode", "start_beside"]

SharedMode: TypeAlias = Literal["tensor_parallel", "replicated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExperts:
    """A shared MLP and how it lies on the ranks.

    `tensor_parallel`: each TP rank has a shard, gets all tokens and gives a partial sum over TP. `replicated`: each has
    the whole MLP and gets its own part of the tokens; their results travel with the routed experts' and cost no
    communication of their own.

    Args:
        mlp: `[n, H]` -> `[n, H]`. A gate on it, as Qwen2-MoE has one, is part of it.
        mode: as above.
        stream: where to run it beside dispatch and routed experts; None: before them, on the current stream.

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


def start_beside(stream: torch.Stream | None, work: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Run ``work(x)`` on a second stream from here on, and return the function that waits for its result.

    What the current stream has been given so far comes before it; what it is given before the wait runs beside it.
    `x` must not be written to until then. Without a stream the work is done at once.
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
