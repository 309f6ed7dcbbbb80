# SPDX-License-Identifier: Apache-2.0
"""What ranks tell each other about a rebalance: small messages over a group on the hosts, begun in one step and read in a later one.

Every rank begins and reads them in the same steps, which each message proves: it carries the sender's step number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from ascend_comm import CommGroup
from torch import Tensor

__all__ = ["NOTHING", "NOT_YET", "Agreement", "Control", "Waits"]

NOT_YET = -1
NOTHING = 0
_FROM_RANK_0 = 2**62  # what the others put in its place: the least value of all ranks is then that of rank 0
_SECONDS_BETWEEN_LOOKS = 20e-6


def _begun(work: Any) -> dist.Work:
    """What torch.distributed returns of a call that does not wait, of which torch's types do not tell."""
    assert isinstance(work, dist.Work)
    return work


class Waits:
    """Waits of the steps, each with a limit and a name.

    Args:
        seconds: the limit of each.
    """

    def __init__(self, seconds: float) -> None:
        """Begin with no time waited."""
        self._seconds = seconds
        self.waited = 0.0
        """Seconds waited since somebody set it to 0."""

    def until(self, is_done: Callable[[], bool], what: str) -> None:
        """Return when `is_done` says so.

        Raises:
            TimeoutError: it does not within the limit; names what was waited for.
        """
        if is_done():
            return
        began = time.perf_counter()
        while not is_done():
            if time.perf_counter() - began > self._seconds:
                raise TimeoutError(
                    f"dynamic EPLB has waited {self._seconds:.0f} seconds for {what}; a rank has stopped, or is no longer in step with the others"
                )
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        self.waited += time.perf_counter() - began

    def work(self, work: dist.Work, what: str) -> None:
        """Wait for a collective on the hosts.

        Raises:
            TimeoutError: as of `until`.
            RuntimeError: it has failed, for example because a rank has ended; names it.
        """
        self.until(work.is_completed, what)
        try:
            work.wait(timedelta(seconds=self._seconds))
        except RuntimeError as error:
            raise RuntimeError(f"dynamic EPLB: {what} has failed, because a rank has ended: {error}") from error


class Agreement:
    """One exchange of which all ranks read the same result: the least of what they gave.

    Args:
        ready: whether every rank is ready.
        word: what rank 0 said.
    """

    def __init__(self, *, ready: bool, word: int) -> None:
        """Store the result."""
        self.ready = ready
        self.word = word


class Control:
    """The messages of one rank.

    Args:
        group: the ranks, with a group on the hosts; one rank alone needs none.
        waits: for the answers.
    """

    def __init__(self, group: CommGroup, waits: Waits) -> None:
        """Store the arguments."""
        self._group, self._waits = group, waits
        self._pending: tuple[int, str, Tensor, dist.Work | None] | None = None

    def begin(self, step: int, what: str, *, ready: bool = True, word: int = NOT_YET) -> None:
        """Begin an exchange; all ranks do, in the same step.

        Args:
            step: the number of this step.
            what: is exchanged, for messages of errors.
            ready: whether this rank is.
            word: what rank 0 says; the others' is not used.
        """
        assert self._pending is None  # `result` comes between two exchanges
        said = word if self._group.rank_in_group == 0 else _FROM_RANK_0
        values = torch.tensor([step, -step, int(ready), said], dtype=torch.int64)
        self._pending = step, what, values, self._reduced(values)

    def result(self) -> Agreement:
        """The result of the exchange that was begun, in a later step.

        Raises:
            TimeoutError, RuntimeError: as of `Waits.work`, or ranks that are not in the same step.
        """
        assert self._pending is not None
        (step, what, values, work), self._pending = self._pending, None
        if work is not None:
            self._waits.work(work, f"{what}, which was begun in step {step}")
        least, greatest, ready, word = values.tolist()
        if (least, -greatest) != (step, step):
            raise RuntimeError(
                f"dynamic EPLB: ranks are not in the same step: this one began {what} in step {step}, others in steps {least} to {-greatest}"
            )
        return Agreement(ready=bool(ready), word=word)

    def _reduced(self, values: Tensor) -> dist.Work | None:
        """Start the minimum over ranks, in place."""
        if self._group.world_size == 1:
            return None
        return _begun(dist.all_reduce(values, dist.ReduceOp.MIN, group=self._group.cpu_group, async_op=True))

    def broadcast(self, values: Tensor) -> dist.Work | None:
        """Start to bring rank 0's tensor on the host to all ranks, in place; None where there is one rank."""
        if self._group.world_size == 1:
            return None
        return _begun(dist.broadcast(values, self._group.ranks[0], group=self._group.cpu_group, async_op=True))

    def sum(self, values: Tensor) -> dist.Work | None:
        """Start the sum of tensors on the hosts over all ranks, in place; None where there is one rank."""
        if self._group.world_size == 1:
            return None
        return _begun(dist.all_reduce(values, group=self._group.cpu_group, async_op=True))
