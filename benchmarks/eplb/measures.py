# SPDX-License-Identifier: Apache-2.0
"""The figures beside the policies' own: moving from one placement to the next, maps, known optima."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import ascend_eplb as eplb
import numpy as np
from workloads import SEEDS, WORKLOADS, Workload

Timed = Callable[..., tuple[object, float]]
LIMITS = ((288, 32, 0.12), (272, 16, 0.06))  # slots, ranks, part of the slots that may move
LEAST = 0.98
README = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
FEW_LARGE = [[600, 560, 120, 120, 20, 10, 10, 10]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A figure, and where it has one, its target; `smaller` says which side of it is good."""

    name: str
    found: float
    unit: str
    target: float | None = None
    smaller: bool = False

    @property
    def met(self) -> bool:
        """Whether the target is reached; peaks may be off in the third decimal, as targets are written down so."""
        if self.target is None:
            return True
        slack = 0.005 if self.unit == "peak" else 0.0
        return self.found <= self.target + slack if self.smaller else self.found >= self.target

    @property
    def wanted(self) -> str:
        """The target in words."""
        return "" if self.target is None else f"{'<=' if self.smaller else '>='} {self.target:g}"

    @property
    def figure(self) -> str:
        """The figure with its unit."""
        return f"{self.found:.4g} {self.unit}"

    def as_dict(self) -> dict:
        """For JSON."""
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One way to follow a drifted load: the worst seed's balancedness and part of the slots moved, median milliseconds."""

    workload: str
    way: str
    balancedness: float
    moved: float
    milliseconds: float
    most_moved: float | None = None  # where there is a target: 0.98 within this part

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.most_moved is None or (self.balancedness >= LEAST and self.moved <= self.most_moved)

    def as_dict(self) -> dict:
        """For JSON."""
        return {**asdict(self), "met": self.met}


def measures(timed: Timed) -> list[Measure]:
    """Maps, transfers and known optima."""
    return [*_maps(timed), *_optima()]


def migrations(timed: Timed, vllm: tuple[str, Callable] | None) -> Iterator[Migration]:
    """From the best placement for a load to one for the load drifted by lognormal(0.3)."""
    for slots, ranks, limit in LIMITS:
        for kind in ("lognormal", "zipf"):
            workload = Workload(layers=58, experts=256, slots=slots, ranks=ranks, load=kind)
            runs = [_drifted(workload, seed, limit, timed, vllm) for seed in SEEDS]
            for way in runs[0]:
                balance, moved, spent = (np.array([run[way][index] for run in runs]) for index in range(3))
                yield Migration(
                    workload=workload.name, way=way, balancedness=float(balance.min()), moved=float(moved.max()),
                    milliseconds=float(np.median(spent)), most_moved=limit if "within" in way else None,
                )  # fmt: skip


def moved_of_slots(old: np.ndarray, new: np.ndarray, ranks: int) -> float:
    """The part of flat slots whose expert was on no slot of the same rank."""
    before, after = (ids.reshape(len(ids), ranks, -1) for ids in (old, new))
    stays = (after[:, :, :, None] == before[:, :, None, :]).any(axis=3)
    return float((~stays).mean())


def _drifted(
    workload: Workload, seed: int, limit: float, timed: Timed, vllm: tuple[str, Callable] | None
) -> dict[str, tuple[float, float, float]]:
    """Balancedness, part of the slots moved and milliseconds of each way to follow the drift."""
    load = workload.make(seed)
    drift = load * np.random.default_rng(7 + seed).lognormal(0, 0.3, load.shape)
    sizes = {"ranks": workload.ranks, "slots": workload.slots}
    old = eplb.rebalance(load, **sizes).placement
    most = int(limit * workload.layers * workload.slots)
    found = {"keep": (float(eplb.balancedness(old, drift).mean()), 0.0, 0.0)}
    ways = {
        f"incremental within {limit:.0%}": {"policy": "incremental", "max_moves": most},
        "incremental": {"policy": "incremental"},
        "swift": {"policy": "swift"},
        "balanced, relabelled": {"policy": "balanced"},
    }
    for name, options in ways.items():
        plan, spent = timed(lambda options=options: eplb.rebalance(drift, previous=old, **sizes, **options), 3)
        found[name] = (plan.balancedness, plan.moved_fraction, spent)
    if vllm:
        flat = old.physical_to_logical.reshape(workload.layers, -1).astype(np.int64)
        ids, spent = timed(lambda: vllm[1](drift, workload.slots, workload.ranks, 1, 1, flat), 3)
        share = drift / np.stack([np.bincount(row, minlength=workload.experts) for row in ids])
        sums = np.take_along_axis(share, ids, axis=1).reshape(workload.layers, workload.ranks, -1).sum(axis=2)
        balance = float((sums.mean(axis=1) / sums.max(axis=1)).mean())
        found[f"vLLM {vllm[0]}"] = (balance, moved_of_slots(flat, ids, workload.ranks), spent)
    return found


def _maps(timed: Timed) -> Iterator[Measure]:
    load = WORKLOADS[1].make(0)
    old = eplb.rebalance(load, ranks=32, slots=288).placement
    new = eplb.rebalance(WORKLOADS[1].make(1), ranks=32, slots=288).placement
    cluster = eplb.Cluster(ranks=32, nodes=4)
    classic, spent = timed(lambda: eplb.log2phy_all(old))
    yield Measure(name="log2phy, 32 ranks of 58 layers", found=spent, unit="ms", target=10, smaller=True)
    plan, spent = timed(lambda: eplb.transfer_plan(old, new, nodes=4))
    name = f"transfer plan, full reshuffle ({len(plan)} transfers)"
    yield Measure(name=name, found=spent, unit="ms", target=50, smaller=True)
    batches, spent = timed(lambda: eplb.transfer_batches(plan, send=8, receive=8), 3)
    eplb.verify_transfers(old, new, batches)
    name = f"its {len(batches)} batches of at most 8 sent and 8 received, verified"
    yield Measure(name=name, found=spent, unit="ms", smaller=True)
    balanced, spent = timed(lambda: eplb.log2phy_balanced(old, load, cluster))
    yield Measure(name="log2phy_balanced, 32 ranks of 58 layers", found=spent, unit="ms", smaller=True)
    for name, table in (("classic", classic), ("balanced", balanced)):
        received = eplb.received_loads(old, table, load)
        kept = float((received.mean(axis=1) / received.max(axis=1)).mean())
        yield Measure(name=f"what is left of 0.999 with the {name} map", found=kept, unit="balancedness")


def _optima() -> Iterator[Measure]:
    for name, case, options, optima in (
        ("README example, global", README, {}, (136, 172)),
        ("README example, by node", README, {"nodes": 2, "groups": 4}, (151, 179.5)),
        ("few large experts", FEW_LARGE, {}, (196.67,)),
    ):
        peaks = eplb.rank_loads(eplb.rebalance(case, ranks=8, slots=16, **options).placement, case).max(axis=1)
        for layer, optimum in enumerate(optima):
            yield Measure(
                name=f"{name}, layer {layer}", found=float(peaks[layer]), unit="peak", target=optimum, smaller=True
            )
