# SPDX-License-Identifier: Apache-2.0
"""Which slot holds which expert: the `Placement`, and the two layouts that need no load to be built.

Legend: L layers, E logical experts, R ranks, K slots per rank, S = R * K physical slots, n = S - E redundant experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ascend_eplb.limits import MOST_LAYER_ID, MOST_SLOTS, check_limit
from ascend_eplb.ranges import as_ranges

__all__ = ["IntArray", "Placement", "checkpoint", "from_physical_to_logical", "spread"]

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """A valid assignment of logical experts to the slots of all ranks, layer by layer; everything else derives from it.

    Args:
        physical_to_logical: int `[L, R, K]`, the logical expert in each slot. Kept as a read-only int32 copy.
        num_experts: E. 0, the default, takes the highest id + 1.
        layer_ids: the number of each layer, ascending. Empty, the default, means 0..L-1. Files number layers in one of
            two ways, which `match_layers` tells apart.

    Raises:
        TypeError: `physical_to_logical`, `num_experts` or `layer_ids` do not hold integers.
        ValueError: not three axes or an empty one, ranks with unequal numbers of slots, an id outside 0..E-1, an expert
            twice on a rank or on no rank, more than 2**22 slots over all layers, or `layer_ids` that do not number the
            layers. The message names layer, rank, slot and value.

    Complexity: O(L * S log K).
    """

    physical_to_logical: IntArray
    num_experts: int = 0
    layer_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Keep a checked, read-only copy of the arguments."""
        ids = _as_ids(self.physical_to_logical)
        experts = _check_int("num_experts", self.num_experts, 0) or int(ids.max()) + 1
        layer_ids = tuple(_check_int("layer_ids", layer, 0) for layer in self.layer_ids) or tuple(range(ids.shape[0]))
        _check_layer_ids(layer_ids, ids.shape[0])
        _check_range(ids, experts, layer_ids)
        _check_duplicates(ids, layer_ids)
        _check_presence(ids, experts, layer_ids)
        ids.flags.writeable = False
        object.__setattr__(self, "physical_to_logical", ids)
        object.__setattr__(self, "num_experts", experts)
        object.__setattr__(self, "layer_ids", layer_ids)

    @property
    def layers(self) -> int:
        """L, the number of layers."""
        return int(self.physical_to_logical.shape[0])

    @property
    def ranks(self) -> int:
        """R, the number of ranks."""
        return int(self.physical_to_logical.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """K, the slots of one rank."""
        return int(self.physical_to_logical.shape[2])

    @property
    def slots(self) -> int:
        """S = R * K, the physical slots of one layer."""
        return self.ranks * self.slots_per_rank

    @property
    def redundant(self) -> int:
        """n = S - E, the redundant experts of one layer."""
        return self.slots - self.num_experts

    @property
    def replicas(self) -> IntArray:
        """int32 `[L, E]`: how many slots hold each expert, at least 1. O(L * S)."""
        return replica_counts(self.physical_to_logical.reshape(self.layers, -1), self.num_experts)

    def layer(self, layer_id: int) -> IntArray:
        """The `[R, K]` slots of the layer with this number.

        Raises:
            KeyError: there is no such layer.
        """
        if layer_id not in self.layer_ids:
            raise KeyError(
                f"layer_id={layer_id} is not in this placement, which has layers {as_ranges(self.layer_ids)}"
            )
        return np.asarray(self.physical_to_logical[self.layer_ids.index(layer_id)])

    def __eq__(self, other: object) -> bool:
        """Equal where experts, layer numbers and every slot are."""
        if not isinstance(other, Placement):
            return NotImplemented
        return (
            self.num_experts == other.num_experts
            and self.layer_ids == other.layer_ids
            and np.array_equal(self.physical_to_logical, other.physical_to_logical)
        )

    def __hash__(self) -> int:
        """Hash of what `==` compares."""
        return hash((self.num_experts, self.layer_ids, self.physical_to_logical.tobytes()))

    def __repr__(self) -> str:
        """Sizes, not slots."""
        return (
            f"Placement(layers={self.layers}, experts={self.num_experts}, ranks={self.ranks}, "
            f"slots={self.slots}, redundant={self.redundant})"
        )


def spread(*, num_experts: int, ranks: int, redundant: int = 0, layers: int = 1) -> Placement:
    """Contiguous experts per rank, each redundant one continuing its rank's run: the default layout.

    0..E-1 are split over the ranks as `numpy.array_split` does; then, for i in 0..n-1, rank `R-1-(i % R)` also gets
    (its last id + 1) mod E. So every rank holds one run of K ids. E=8, R=2, n=2 gives `[0,1,2,3,4]` and `[4,5,6,7,0]`.

    Args:
        num_experts: E >= 1.
        ranks: R >= 1.
        redundant: n >= 0, where R divides E + n and (E + n) / R <= E.
        layers: L >= 1, all alike.

    Raises:
        TypeError, ValueError: an argument outside of that.

    Complexity: O(L * S).

    Source: the layout this project was asked for; the fixture `seed_maps.npz` holds it for 256 experts on 16 ranks.
    """
    slots = _check_shape(num_experts, ranks, redundant, layers)
    sizes, larger = divmod(num_experts, ranks)
    rank_R = np.arange(ranks)
    first_R = rank_R * sizes + np.minimum(rank_R, larger)
    ids_RK = (first_R[:, None] + np.arange(slots)) % num_experts
    return Placement(np.broadcast_to(ids_RK, (layers, ranks, slots)), num_experts)


def checkpoint(*, num_experts: int, ranks: int, redundant: int = 0, layers: int = 1) -> Placement:
    """The order in which vLLM fills slots while loading a checkpoint: 0..E-1, then 0..n-1 (mod E), cut into ranks.

    E=8, R=2, n=2 gives `[0,1,2,3,4]` and `[5,6,7,0,1]`. Arguments, errors and complexity as for `spread`.

    Source: how vLLM numbers physical experts at the start (`build_initial_global_physical_to_logical_map`).
    """
    slots = _check_shape(num_experts, ranks, redundant, layers)
    ids_RK = (np.arange(ranks * slots) % num_experts).reshape(ranks, slots)
    return Placement(np.broadcast_to(ids_RK, (layers, ranks, slots)), num_experts)


def from_physical_to_logical(
    physical_to_logical: ArrayLike, *, ranks: int, num_experts: int = 0, layer_ids: Sequence[int] = ()
) -> Placement:
    """A placement from flat per-layer slots, as DeepSeek's `phy2log` and TensorRT-LLM's assignments hold them.

    Args:
        physical_to_logical: int `[L, S]` or `[S]` (one layer): the logical expert of each physical slot, rank by rank.
        ranks: R, which divides S.
        num_experts: E. 0 takes the highest id + 1.
        layer_ids: as for `Placement`.

    Raises:
        TypeError, ValueError: wrong axes, R does not divide S, or whatever `Placement` refuses.

    Complexity: O(L * S log K).

    Source: `phy2log` of DeepSeek's EPLB (2025).
    """
    ids = np.asarray(physical_to_logical)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2:
        raise ValueError(f"physical_to_logical must have the axes [layers, slots], not shape {ids.shape}")
    _check_int("ranks", ranks, 1)
    if ids.shape[1] % ranks:
        raise ValueError(f"ranks={ranks} does not divide the {ids.shape[1]} slots of a layer")
    return Placement(ids.reshape(ids.shape[0], ranks, -1), num_experts, tuple(layer_ids))


def replica_counts(ids_LS: NDArray[Any], num_experts: int) -> IntArray:
    """int32 `[L, E]`: how often each id is in each row of `[L, S]` ids within 0..E-1. O(L * (S + E))."""
    layers = ids_LS.shape[0]
    keys = ids_LS.astype(np.int64) + np.arange(layers)[:, None] * num_experts
    return np.bincount(keys.ravel(), minlength=layers * num_experts).reshape(layers, num_experts).astype(np.int32)


def _check_int(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    return int(value)


def _check_shape(num_experts: int, ranks: int, redundant: int, layers: int) -> int:
    """Check the arguments of a layout and return the slots per rank."""
    _check_int("num_experts", num_experts, 1)
    _check_int("ranks", ranks, 1)
    _check_int("redundant", redundant, 0)
    _check_int("layers", layers, 1)
    total = num_experts + redundant
    given = f"num_experts={num_experts}, redundant={redundant}, ranks={ranks}, layers={layers}"
    check_limit(given, max(total, ranks) * layers, MOST_SLOTS, "slots over all layers")
    if total % ranks:
        more = -total % ranks
        raise ValueError(
            f"num_experts={num_experts} + redundant={redundant} = {total} slots do not divide over ranks={ranks}; "
            f"redundant={redundant + more} would"
        )
    if total // ranks > num_experts:
        most = ranks * num_experts - num_experts
        raise ValueError(
            f"redundant={redundant} gives each of ranks={ranks} {total // ranks} slots for num_experts={num_experts}, "
            f"which forces two replicas of an expert on one rank; at most redundant={most} is possible"
        )
    return total // ranks


def _as_ids(array: Any) -> IntArray:
    try:
        ids = np.asarray(array)
    except ValueError as error:  # lists of unequal lengths
        raise ValueError(_where_unequal(array) or f"physical_to_logical is no array: {error}") from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"physical_to_logical must hold integers, not {ids.dtype}")
    if ids.ndim != 3:
        raise ValueError(f"physical_to_logical must have the axes [layers, ranks, slots], not shape {ids.shape}")
    if 0 in ids.shape:
        raise ValueError(f"physical_to_logical of shape {ids.shape} has an empty axis")
    check_limit(f"physical_to_logical of shape {ids.shape}", ids.size, MOST_SLOTS, "slots over all layers")
    for value in (ids.min(), ids.max()):
        if not -(2**31) <= value < 2**31:
            raise ValueError(f"physical_to_logical holds {value}, which is no expert id")
    return np.array(ids, dtype=np.int32, order="C")


def _where_unequal(layers: Any) -> str:
    """The first rank of nested lists with another number of slots than the very first, or the first such layer."""
    try:
        ranks, slots = len(layers[0]), len(layers[0][0])
        for layer, row in enumerate(layers):
            if len(row) != ranks:
                return f"layer {layer} has {len(row)} ranks, but layer 0 has {ranks}"
            for rank, ids in enumerate(row):
                if len(ids) != slots:
                    return f"layer {layer}, rank {rank} has {len(ids)} slots, but layer 0, rank 0 has {slots}"
    except (TypeError, LookupError):
        pass
    return ""


def _check_layer_ids(layer_ids: tuple[int, ...], layers: int) -> None:
    if len(layer_ids) != layers:
        raise ValueError(f"layer_ids names {len(layer_ids)} layers, physical_to_logical has {layers}")
    for before, after in pairwise(layer_ids):
        if before >= after:
            raise ValueError(f"layer_ids must be ascending, but {after} follows {before}")
    if layer_ids[-1] > MOST_LAYER_ID:
        raise ValueError(f"layer_ids holds {layer_ids[-1]}; a layer number is at most {MOST_LAYER_ID}")


def _check_range(ids: IntArray, experts: int, layer_ids: tuple[int, ...]) -> None:
    if int(ids.min()) >= 0 and int(ids.max()) < experts:
        return
    layer, rank, slot = np.argwhere((ids < 0) | (ids >= experts))[0]
    raise ValueError(
        f"layer {layer_ids[layer]}, rank {rank}, slot {slot}: "
        f"expert {ids[layer, rank, slot]} is not in 0..{experts - 1}"
    )


def _check_duplicates(ids: IntArray, layer_ids: tuple[int, ...]) -> None:
    ordered = np.sort(ids, axis=2)
    twice = ordered[:, :, 1:] == ordered[:, :, :-1]
    if not twice.any():
        return
    layer, rank, index = np.argwhere(twice)[0]
    expert = ordered[layer, rank, index]
    first, second = np.flatnonzero(ids[layer, rank] == expert)[:2]
    raise ValueError(
        f"layer {layer_ids[layer]}, rank {rank}, slot {second}: expert {expert} is already in slot {first} of this rank"
    )


def _check_presence(ids: IntArray, experts: int, layer_ids: tuple[int, ...]) -> None:
    slots = ids.shape[1] * ids.shape[2]
    if experts > slots:  # checked before counting, which takes memory for each expert
        raise ValueError(
            f"num_experts={experts} (or the highest id + 1) is more than the {slots} slots of a layer hold"
        )
    counts = replica_counts(ids.reshape(ids.shape[0], -1), experts)
    if counts.all():
        return
    layer, expert = np.argwhere(counts == 0)[0]
    missing = int((counts[layer] == 0).sum())
    more = f" and {missing - 1} more" if missing > 1 else ""
    raise ValueError(f"layer {layer_ids[layer]}: expert {expert}{more} of 0..{experts - 1} is on no rank")
