# SPDX-License-Identifier: Apache-2.0
"""Measures of a placement under a load. A rank's load is the sum of its slots'; replicas of an expert share its load
evenly.

Legend: L layers, E logical experts, R ranks, K slots per rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ascend_eplb.limits import MOST_LOADS, check_limit
from ascend_eplb.placement import Placement

__all__ = [
    "FloatArray",
    "as_load",
    "balance_of",
    "balancedness",
    "checked_numbers",
    "kept_slots",
    "moved_slots",
    "peak_to_mean",
    "rank_loads",
    "sum_slots",
]

FloatArray = NDArray[np.float64]
_WIDE = 48  # slots a rank from which numpy's own sum is as fast
MOST_LOAD = 1e30  # leaves room for sums in the float32 of the published algorithm


def as_load(load: ArrayLike, *, num_experts: int | None = None, layers: int | None = None) -> FloatArray:
    """Check a load and return it as float64 `[L, E]`; `[E]` is one layer.

    Raises:
        TypeError: not numbers.
        ValueError: wrong axes or sizes, or a value that is NaN, negative or above 1e30 (named by layer and expert).

    Complexity: O(L * E).
    """
    load_LE = checked_numbers(load, "load", ("layer", "expert"))
    if num_experts is not None and load_LE.shape[1] != num_experts:
        raise ValueError(f"load has {load_LE.shape[1]} experts, the placement {num_experts}")
    if layers is not None and load_LE.shape[0] != layers:
        raise ValueError(f"load has {load_LE.shape[0]} layers, the placement {layers}")
    return load_LE


def checked_numbers(value: ArrayLike, name: str, axes: tuple[str, ...]) -> FloatArray:
    """A float64 copy with these axes (missing leading ones have length 1) of numbers from 0 to 1e30.

    Raises:
        TypeError: not numbers.
        ValueError: wrong axes, more than 2**28 numbers, or a value that is NaN, negative or too large; names its place.
    """
    wanted = f"[{', '.join(axis + 's' for axis in axes)}]"
    try:
        array = np.array(value, ndmin=len(axes))
    except ValueError as error:
        raise TypeError(f"{name} must be numbers with the axes {wanted}: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be numbers with the axes {wanted}, not {array.dtype}")
    if array.ndim != len(axes) or 0 in array.shape:
        raise ValueError(f"{name} must have the axes {wanted}, not shape {array.shape}")
    check_limit(f"{name} of shape {array.shape}", array.size, MOST_LOADS, "numbers")
    with np.errstate(over="ignore"):  # of a longer type than float64: infinite, and so refused
        numbers = array.astype(np.float64)
    wrong = ~((numbers >= 0) & (numbers <= MOST_LOAD))
    if wrong.any():
        index = tuple(np.argwhere(wrong)[0])
        place = ", ".join(f"{axis} {number}" for axis, number in zip(axes, index, strict=True))
        raise ValueError(f"load of {place} is {array[index]}; it must be from 0 to {MOST_LOAD:g}")
    return numbers


def rank_loads(placement: Placement, load: ArrayLike) -> FloatArray:
    """float64 `[L, R]`: the load of each rank under `load` `[L, E]`, in the load's unit (tokens, as a rule).

    Errors as `as_load`. O(L * S).

    Source: the definition; a router that spreads tokens evenly over replicas.
    """
    load_LE = as_load(load, num_experts=placement.num_experts, layers=placement.layers)
    share_LE: FloatArray = load_LE / placement.replicas
    row_L11 = np.arange(placement.layers)[:, None, None]
    return sum_slots(share_LE.ravel()[placement.physical_to_logical + row_L11 * placement.num_experts])


def sum_slots(value_BRK: FloatArray) -> FloatArray:
    """float64 `[B, R]`: the sum over the slots of each rank. O(L * S).

    numpy's own sum is slow over a short last axis.
    """
    if value_BRK.shape[2] > _WIDE:
        return np.asarray(value_BRK.sum(axis=2))
    total_BR = value_BRK[:, :, 0].copy()
    for slot in range(1, value_BRK.shape[2]):
        total_BR += value_BRK[:, :, slot]
    return total_BR


def balancedness(placement: Placement, load: ArrayLike) -> FloatArray:
    """float64 `[L]`: mean rank load / greatest rank load, 1.0 being perfect (also without any load). O(L * S).

    Errors: TypeError, ValueError as `rank_loads`.
    Source: the balancedness that vLLM logs (mean / greatest).
    """
    loads_LR = rank_loads(placement, load)
    return np.asarray(balance_of(loads_LR))


def peak_to_mean(placement: Placement, load: ArrayLike) -> FloatArray:
    """float64 `[L]`: greatest rank load / mean rank load, 1.0 being perfect. The hottest rank takes this many times as
    long as the mean one. O(L * S).

    Errors: TypeError, ValueError as `rank_loads`.
    Source: 1 / `balancedness`.
    """
    return np.asarray(1.0 / balancedness(placement, load))


def balance_of(loads_LR: FloatArray) -> FloatArray:
    """Balancedness `[L]` of rank loads `[L, R]`."""
    peak_L = loads_LR.max(axis=1)
    ones_L = np.ones_like(peak_L)
    ratio_L = np.divide(loads_LR.mean(axis=1), peak_L, out=ones_L, where=peak_L > 0)
    return np.asarray(np.minimum(ratio_L, 1.0))


def kept_slots(old: Placement, new: Placement) -> NDArray[np.bool_]:
    """bool `[L, R, K]`: slots of `new` whose expert was on the same rank in `old`, so that no weight has to travel.

    Raises:
        ValueError: the placements differ in layers, experts or ranks.

    Complexity: O(L * R * E).
    """
    for name in ("layers", "num_experts", "ranks"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise ValueError(f"old and new placement differ in {name}: {before} and {after}")
    held_LRE = np.zeros((old.layers, old.ranks, old.num_experts), dtype=bool)
    np.put_along_axis(held_LRE, old.physical_to_logical, True, axis=2)
    return np.take_along_axis(held_LRE, new.physical_to_logical, axis=2)


def moved_slots(old: Placement, new: Placement) -> NDArray[np.int64]:
    """int64 `[L]`: slots of `new` whose weights have to come from another rank of `old`. Errors as `kept_slots`.

    O(L * R * E).
    Source: the definition.
    """
    return np.asarray((~kept_slots(old, new)).sum(axis=(1, 2)), dtype=np.int64)
