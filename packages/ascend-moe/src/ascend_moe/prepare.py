# SPDX-License-Identifier: Apache-2.0
"""Which tokens a dispatcher sees on each rank (`prepare`), and how its result becomes that of the layer's own tokens (`finalize`).

Each class is one distribution of tokens over ranks, as a dispatcher needs it:

| token distribution | prepare | finalize | result |
|---|---|---|---|
| `GatherOverDp` | pad to the most tokens of a DP rank, all-gather over DP | reduce-scatter over DP, remove padding | a partial sum over TP |
| `GatherSequence` | pad, all-gather over EP, remove padding | pad, reduce-scatter over EP, remove padding | reduced |
| `SliceOverTp` | pad to a multiple of TP, take this rank's slice | all-gather over TP, remove padding | reduced |
| `EqualSlices` | as `SliceOverTp`, but slices of one size on all ranks and at least one token | as `SliceOverTp` | reduced |

Legend: n tokens of the layer on this rank, T tokens of the dispatcher, H hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from ascend_comm import CommGroup
from torch import Tensor

from ascend_moe.choose import CommMethod
from ascend_moe.env import MoeEnv

__all__ = [
    "EqualSlices",
    "GatherOverDp",
    "GatherSequence",
    "Prepared",
    "SliceOverTp",
    "TokenDistribution",
    "make_token_distribution",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a dispatcher gets, and what `finalize` needs to undo it.

    Attributes:
        hidden: `[T, H]`.
        routed: what belongs to each token: logits, or weights and ids; each `[T, ...]`.
        mask: bool `[T]`, False for padding; None: no padding.
        own: the range of the layer's n tokens that this rank alone is responsible for: its slice of the tokens that TP ranks share.
        counts: real tokens of each rank whose tokens were gathered; where nothing was gathered, n alone.
        tokens: n.
    """

    hidden: Tensor
    routed: tuple[Tensor, ...]
    mask: Tensor | None
    own: slice
    counts: tuple[int, ...]
    tokens: int


class TokenDistribution(ABC):
    """Which tokens each rank passes to its dispatcher, and the way back to the layer's own tokens."""

    output_is_reduced: ClassVar[bool]
    """Whether `finalize` returns the complete sum. If not, the caller sums over TP."""

    @abstractmethod
    def prepare(
        self, hidden: Tensor, routed: Sequence[Tensor], *, tokens: Sequence[int] | None, mask: Tensor | None
    ) -> Prepared:
        """Bring the tokens to the ranks that dispatch them. All ranks call it together, with the same `tokens`, and all with a mask or all without.

        Args:
            hidden: `[n, H]`.
            routed: the tensors that belong to the tokens, `[n, ...]` each: logits, or weights and ids.
            tokens: n of every DP rank, or under sequence parallelism of every EP rank. None: all have n.
            mask: bool `[n]`, False for padding that the caller has made. Real tokens come first.

        Raises:
            ValueError: token counts that do not fit.
        """

    @abstractmethod
    def finalize(self, out: Tensor, prepared: Prepared, own_part: Tensor | None = None) -> Tensor:
        """Turn the dispatcher's result `[T, H]` into that of the layer's own tokens, `[n, H]`.

        Args:
            out: as `Dispatcher.combine` returns it. It may be overwritten.
            prepared: what `prepare` returned.
            own_part: `[len(own), H]` to add to the tokens `prepared.own`: a shared expert's complete result.
        """


class GatherOverDp(TokenDistribution):
    """Every rank gets the tokens of all DP ranks."""

    output_is_reduced = False

    def __init__(self, dp: CommGroup, tp: CommGroup) -> None:
        """Store the groups."""
        self._dp, self._tp = dp, tp

    def prepare(
        self, hidden: Tensor, routed: Sequence[Tensor], *, tokens: Sequence[int] | None, mask: Tensor | None
    ) -> Prepared:
        """See `TokenDistribution`. T is DP ranks times the most tokens of one."""
        own = _slice_of(self._tp, len(hidden), _share(len(hidden), self._tp))
        counts = _counts(self._dp, len(hidden), tokens)
        given = (hidden, *routed)
        if self._dp.world_size > 1:
            if mask is None and min(counts) < max(counts):
                mask = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
            given = tuple(_gather(self._dp, each, max(counts)) for each in given)
            mask = None if mask is None else _gather(self._dp, mask.to(torch.uint8), max(counts)).bool()
        return Prepared(hidden=given[0], routed=given[1:], mask=mask, own=own, counts=counts, tokens=len(hidden))

    def finalize(self, out: Tensor, prepared: Prepared, own_part: Tensor | None = None) -> Tensor:
        """See `TokenDistribution`. `own_part` is added on one TP rank for each token, so that the sum over TP has it once."""
        if self._dp.world_size > 1 and len(out):
            out = self._dp.reduce_scatter(out, 0)
        out = out[: prepared.tokens]
        if own_part is not None:
            out[prepared.own] += own_part
        return out


class GatherSequence(TokenDistribution):
    """Under sequence parallelism: every rank gets the tokens of all EP ranks."""

    output_is_reduced = True

    def __init__(self, ep: CommGroup) -> None:
        """Store the group."""
        self._ep = ep

    def prepare(
        self, hidden: Tensor, routed: Sequence[Tensor], *, tokens: Sequence[int] | None, mask: Tensor | None
    ) -> Prepared:
        """See `TokenDistribution`. T is the tokens of all EP ranks."""
        counts = _counts(self._ep, len(hidden), tokens)
        most = max(counts)
        gathered = [_unpad(_gather(self._ep, each, most), counts, most) for each in (hidden, *routed)]
        if mask is not None:
            mask = _unpad(_gather(self._ep, mask.to(torch.uint8), most), counts, most).bool()
        return Prepared(
            hidden=gathered[0],
            routed=tuple(gathered[1:]),
            mask=mask,
            own=slice(0, len(hidden)),
            counts=counts,
            tokens=len(hidden),
        )

    def finalize(self, out: Tensor, prepared: Prepared, own_part: Tensor | None = None) -> Tensor:
        """See `TokenDistribution`."""
        most = max(prepared.counts)
        if len(out) != most * len(prepared.counts):
            out = torch.cat([_pad(part, most) for part in out.split_with_sizes(prepared.counts)])
        if len(out):
            out = self._ep.reduce_scatter(out, 0)
        out = out[: prepared.tokens]
        return out if own_part is None else out.add_(own_part)


class SliceOverTp(TokenDistribution):
    """Each TP rank takes its slice of the tokens that they share; DP ranks may have different numbers."""

    output_is_reduced = True

    def __init__(self, tp: CommGroup) -> None:
        """Store the group."""
        self._tp = tp

    def prepare(
        self, hidden: Tensor, routed: Sequence[Tensor], *, tokens: Sequence[int] | None, mask: Tensor | None
    ) -> Prepared:
        """See `TokenDistribution`. T is the padded number of tokens over TP ranks."""
        rows = _share(len(hidden), self._tp)
        return _sliced(self._tp, hidden, routed, mask, rows, masked=False)

    def finalize(self, out: Tensor, prepared: Prepared, own_part: Tensor | None = None) -> Tensor:
        """See `TokenDistribution`."""
        if own_part is not None:
            out[: len(own_part)] += own_part
        if self._tp.world_size > 1 and len(out):
            out = self._tp.all_gather(out, 0)
        return out[: prepared.tokens]


class EqualSlices(SliceOverTp):
    """`SliceOverTp` with slices of one size on all ranks, which MC2's kernels need."""

    def prepare(
        self, hidden: Tensor, routed: Sequence[Tensor], *, tokens: Sequence[int] | None, mask: Tensor | None
    ) -> Prepared:
        """See `TokenDistribution`. T is at least 1. There is a mask on all ranks or on none."""
        counts = tuple(tokens) if tokens is not None else (len(hidden),)
        if max(counts) < len(hidden) or min(counts) < 0:
            raise ValueError(
                f"tokens={list(counts)} must be counts of at least 0, and include the {len(hidden)} tokens of this rank"
            )
        rows = max(1, _share(max(counts), self._tp))
        padded = min(counts) < rows * self._tp.world_size
        return _sliced(self._tp, hidden, routed, mask, rows, masked=padded)


def make_token_distribution(method: CommMethod, env: MoeEnv) -> TokenDistribution:
    """The distribution of tokens that a method's dispatcher needs, over the groups of `env`."""
    if method is CommMethod.ALL_GATHER:
        return GatherSequence(env.ep) if env.sequence_parallel else GatherOverDp(env.dp, env.tp)
    slices = EqualSlices if method is CommMethod.MC2 else SliceOverTp
    return slices(env.token_sharing_group)


def _counts(group: CommGroup, here: int, tokens: Sequence[int] | None) -> tuple[int, ...]:
    """The token counts of a group's ranks."""
    if tokens is None:
        return (here,) * group.world_size
    if len(tokens) != group.world_size or min(tokens) < 0 or tokens[group.rank_in_group] != here:
        raise ValueError(
            f"tokens={list(tokens)} must be counts of at least 0 for the {group.world_size} ranks {list(group.ranks)}, "
            f"{here} of them on rank {group.rank_in_group} of the group"
        )
    return tuple(tokens)


def _share(count: int, tp: CommGroup) -> int:
    """Tokens of each TP rank when `count` tokens are padded to a multiple of TP."""
    return -(-count // tp.world_size)


def _slice_of(tp: CommGroup, count: int, rows: int) -> slice:
    """The range of the `count` tokens that this TP rank has, at most `rows` of them."""
    start = min(count, tp.rank_in_group * rows)
    return slice(start, min(count, start + rows))


def _sliced(
    tp: CommGroup, hidden: Tensor, routed: Sequence[Tensor], mask: Tensor | None, rows: int, *, masked: bool
) -> Prepared:
    """This TP rank's `rows` tokens, padded with zeros; with a mask if any is padding, or if `masked`."""
    own = _slice_of(tp, len(hidden), rows)
    real = own.stop - own.start
    if mask is not None:
        mask = _pad(mask[own], rows)
    elif masked or real < rows:
        mask = torch.arange(rows, device=hidden.device) < real
    return Prepared(
        hidden=_pad(hidden[own], rows),
        routed=tuple(_pad(each[own], rows) for each in routed),
        mask=mask,
        own=own,
        counts=(len(hidden),),
        tokens=len(hidden),
    )


def _pad(x: Tensor, rows: int) -> Tensor:
    """`x` padded with rows of zeros to `rows` rows."""
    return x if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def _gather(group: CommGroup, x: Tensor, rows: int) -> Tensor:
    """The ranks' tensors, each padded to `rows` rows, concatenated in rank order. With `rows` 0 nothing is sent."""
    return group.all_gather(_pad(x, rows), 0) if rows else x


def _unpad(x: Tensor, counts: Sequence[int], most: int) -> Tensor:
    """Remove the padding of `_gather`: of rank i's `most` rows, keep the first `counts[i]`."""
    if min(counts) == most:
        return x
    return torch.cat([x[start * most : start * most + count] for start, count in enumerate(counts)])
