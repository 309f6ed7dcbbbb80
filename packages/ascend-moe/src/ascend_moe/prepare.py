# SPDX-License-Identifier: Apache-2.0
"""Which tokens a dispatcher sees on each rank (`prepare`), and how its result becomes that of the layer's own tokens (`finalize`).

| layout | prepare | finalize | result |
|---|---|---|---|
| `GatherOverDp` | pad to the most tokens of a DP rank, all-gather over DP | reduce-scatter over DP, cut | a partial sum over TP |
| `GatherSequence` | all-gather over EP, unpad | pad, reduce-scatter over EP, cut | reduced |
| `SliceOverTp` | pad to a multiple of TP, take the own slice | all-gather over TP, cut | reduced |
| `EqualSlices` | the same of the most tokens of any rank, at least one | the same | reduced |

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

__all__ = ["EqualSlices", "GatherOverDp", "GatherSequence", "Layout", "Prepared", "SliceOverTp", "make_layout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a dispatcher gets, and what `finalize` needs to undo it.

    Attributes:
        hidden: `[T, H]`.
        routed: what belongs to each token: logits, or weights and ids; each `[T, ...]`.
        mask: bool `[T]`, False for padding; None: no padding.
        own: the part of the layer's n tokens that no other rank has, or that this rank takes of those it shares.
        counts: real tokens of each rank that was gathered from.
        tokens: n.
    """

    hidden: Tensor
    routed: tuple[Tensor, ...]
    mask: Tensor | None
    own: slice
    counts: tuple[int, ...]
    tokens: int


class Layout(ABC):
    """How tokens lie on the ranks while a dispatcher has them."""

    output_is_reduced: ClassVar[bool]
    """Whether `finalize` gives the whole sum. If not, the caller sums over TP."""

    @abstractmethod
    def prepare(
        self, hidden: Tensor, routed: Sequence[Tensor], *, tokens: Sequence[int] | None, mask: Tensor | None
    ) -> Prepared:
        """Lay the tokens out. All ranks call it together, and agree on `tokens` and on whether there is a mask.

        Args:
            hidden: `[n, H]`.
            routed: what goes with each token, `[n, ...]` each.
            tokens: n of every DP rank, or under sequence parallelism of every EP rank. None: as many everywhere.
            mask: bool `[n]`, False for padding that the caller has made. Real tokens come first.

        Raises:
            ValueError: token counts that do not fit.
        """

    @abstractmethod
    def finalize(self, out: Tensor, prepared: Prepared, own_part: Tensor | None = None) -> Tensor:
        """From the dispatcher's result `[T, H]` that of the layer's tokens, `[n, H]`.

        Args:
            out: as `Dispatcher.combine` returns it. It may be overwritten.
            prepared: what `prepare` returned.
            own_part: `[len(own), H]` to add to the tokens `prepared.own`: a shared expert's complete result.
        """


class GatherOverDp(Layout):
    """Every rank gets the tokens of all DP ranks."""

    output_is_reduced = False

    def __init__(self, dp: CommGroup, tp: CommGroup) -> None:
        """Note the groups."""
        self._dp, self._tp = dp, tp

    def prepare(
        self, hidden: Tensor, routed: Sequence[Tensor], *, tokens: Sequence[int] | None, mask: Tensor | None
    ) -> Prepared:
        """See `Layout`. T is DP ranks times the most tokens of one."""
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
        """See `Layout`. `own_part` is added on one TP rank for each token, so that the sum over TP has it once."""
        if self._dp.world_size > 1 and len(out):
            out = self._dp.reduce_scatter(out, 0)
        out = out[: prepared.tokens]
        if own_part is not None:
            out[prepared.own] += own_part
        return out


class GatherSequence(Layout):
    """Under sequence parallelism: every rank gets the tokens of all EP ranks."""

    output_is_reduced = True

    def __init__(self, ep: CommGroup) -> None:
        """Note the group."""
        self._ep = ep

    def prepare(
        self, hidden: Tensor, routed: Sequence[Tensor], *, tokens: Sequence[int] | None, mask: Tensor | None
    ) -> Prepared:
        """See `Layout`. T is the tokens of all EP ranks."""
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
        """See `Layout`."""
        most = max(prepared.counts)
        if len(out) != most * len(prepared.counts):
            out = torch.cat([_pad(part, most) for part in out.split_with_sizes(prepared.counts)])
        if len(out):
            out = self._ep.reduce_scatter(out, 0)
        out = out[: prepared.tokens]
        return out if own_part is None else out.add_(own_part)


class SliceOverTp(Layout):
    """Each TP rank takes its slice of the tokens that they share; DP ranks may have different numbers."""

    output_is_reduced = True

    def __init__(self, tp: CommGroup) -> None:
        """Note the group."""
        self._tp = tp

    def prepare(
        self, hidden: Tensor, routed: Sequence[Tensor], *, tokens: Sequence[int] | None, mask: Tensor | None
    ) -> Prepared:
        """See `Layout`. T is the padded number of tokens over TP ranks."""
        rows = _share(len(hidden), self._tp)
        return _sliced(self._tp, hidden, routed, mask, rows, masked=False)

    def finalize(self, out: Tensor, prepared: Prepared, own_part: Tensor | None = None) -> Tensor:
        """See `Layout`."""
        if own_part is not None:
            out[: len(own_part)] += own_part
        if self._tp.world_size > 1 and len(out):
            out = self._tp.all_gather(out, 0)
        return out[: prepared.tokens]


class EqualSlices(SliceOverTp):
    """`SliceOverTp` with slices of one size on all ranks, for kernels that need it."""

    def prepare(
        self, hidden: Tensor, routed: Sequence[Tensor], *, tokens: Sequence[int] | None, mask: Tensor | None
    ) -> Prepared:
        """See `Layout`. T is at least 1. There is a mask on all ranks or on none."""
        counts = tuple(tokens) if tokens is not None else (len(hidden),)
        if max(counts) < len(hidden) or min(counts) < 0:
            raise ValueError(f"tokens={list(counts)} must be counts of at least 0, the {len(hidden)} here among them")
        rows = max(1, _share(max(counts), self._tp))
        padded = min(counts) < rows * self._tp.world_size
        return _sliced(self._tp, hidden, routed, mask, rows, masked=padded)


def make_layout(method: CommMethod, env: MoeEnv) -> Layout:
    """The layout that a method's dispatcher needs, over the groups of `env`."""
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
    """Tokens of a TP rank when `count` are padded to a multiple of TP."""
    return -(-count // tp.world_size)


def _slice_of(tp: CommGroup, count: int, rows: int) -> slice:
    """The real tokens among the `rows` that are this TP rank's."""
    start = min(count, tp.rank_in_group * rows)
    return slice(start, min(count, start + rows))


def _sliced(
    tp: CommGroup, hidden: Tensor, routed: Sequence[Tensor], mask: Tensor | None, rows: int, *, masked: bool
) -> Prepared:
    """This TP rank's `rows` tokens, padded with zeros; with a mask where they are, or where `masked` asks for one."""
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
    """`x` with zeros behind it, `rows` in all."""
    return x if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def _gather(group: CommGroup, x: Tensor, rows: int) -> Tensor:
    """The ranks' tensors, each padded to `rows`, behind each other. Nothing is sent where there are none."""
    return group.all_gather(_pad(x, rows), 0) if rows else x


def _unpad(x: Tensor, counts: Sequence[int], most: int) -> Tensor:
    """The first `counts[i]` of the i-th `most` rows."""
    if min(counts) == most:
        return x
    return torch.cat([x[start * most : start * most + count] for start, count in enumerate(counts)])
