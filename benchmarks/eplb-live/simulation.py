# SPDX-License-Identifier: Apache-2.0
"""Dynamic EPLB at scale without an engine: 58 MoE layers of 256 experts over 32, 64 and 320 ranks, with a load that drifts and once shifts.

A plan is made after each interval from the loads before it, and serves loads that it has not seen. It is in force after the steps that its transfers
take: this plugin carries out one batch of one layer in two steps (`eplb/rebalance.py`), vLLM moves one layer a step. What an expert weighs, how long a
step takes and how fast a link is are assumptions, the same for all (`EXPERT_BYTES`, `STEP_SECONDS`, `SECONDS_PER_BYTE`).

Legend: T intervals, L layers, E experts, R ranks.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import ascend_eplb as eplb
import numpy as np
from vllm_ascend.eplb.decide import Rules, decide, placement_after

sys.path.insert(0, str(Path(__file__).parents[1] / "eplb"))
from measures import moved_of_slots
from published import vllm_policy

LAYERS, EXPERTS = 58, 256
SIZES = ((32, 288), (64, 320), (320, 640))  # ranks, slots
INTERVALS, SHIFT = 30, 10  # intervals, and the one in which half of the load goes to other experts
STEPS = 400  # of an interval, the plugin's default
EXPERT_BYTES = 3 * 7168 * 2048  # DeepSeek-V3's, W8A8
STEP_SECONDS, SECONDS_PER_BYTE = 0.05, 1e-10
DRIFT = 0.05  # of the logarithm of an expert's load, each interval
WINDOW, BUDGET, BUFFER = 4, 0.15, 2  # the plugin's defaults
WIDE = 0.3  # a budget for comparison
STEPS_OF_A_BATCH = 2
HALF_LIFE = 1.0  # intervals, as `eplb/decide.py` weighs them
NEAR = 0.03  # of the balancedness of an offline plan of each window


@dataclass(kw_only=True)
class Followed:
    """How one way has followed the load.

    Args:
        ranks: R.
        way: its name.
        balancedness: of each interval, averaged over layers and steps.
        moved: slots that got other weights in each rebalance, as a part of all.
        steps: that each rebalance has taken, beside the steps.
        milliseconds: of each plan, CPU time of one thread.
        to_follow: intervals after the one of the shift, which nobody knows before, until the balancedness is near to that of the offline plan of each
            window; None: never.
        near: part of the intervals in which it is.
    """

    ranks: int
    way: str
    balancedness: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    to_follow: int | None = None
    near: float = 0.0

    @property
    def gigabytes(self) -> float:
        """Of weights that were sent over all ranks."""
        slots = dict(SIZES)[self.ranks]
        return sum(self.moved) * LAYERS * slots * EXPERT_BYTES / 2**30

    def summary(self) -> dict:
        """Figures for the table and JSON."""
        return {
            "ranks": self.ranks, "way": self.way, "balancedness": statistics.mean(self.balancedness[1:]), "worst": min(self.balancedness[1:]),
            "to_follow": self.to_follow, "near": self.near, "rebalances": len(self.moved), "moved": statistics.mean(self.moved) if self.moved else 0.0,
            "most_moved": max(self.moved, default=0.0), "gigabytes": self.gigabytes, "steps": statistics.median(self.steps) if self.steps else 0,
            "milliseconds": statistics.median(self.milliseconds) if self.milliseconds else 0.0,
        }  # fmt: skip

    def as_dict(self) -> dict:
        """All of it."""
        return asdict(self)


def loads(seed: int = 0) -> np.ndarray:
    """float64 `[T, L, E]`: lognormal(1), each expert with a walk of its own (`DRIFT`); from `SHIFT` on half of the tokens are of another kind."""
    generator = np.random.default_rng(seed)
    shape = (INTERVALS, LAYERS, EXPERTS)
    walk = np.exp(generator.normal(0, DRIFT, shape).cumsum(axis=0))
    one, other = generator.lognormal(0, 1, (2, LAYERS, EXPERTS))
    later = (np.arange(INTERVALS) >= SHIFT)[:, None, None]
    load = walk * np.where(later, 0.5 * one + 0.5 * other, one)
    return load / load.mean(axis=2, keepdims=True) * 4096


def balance(placed: eplb.Placement, load: np.ndarray) -> float:
    return float(eplb.balancedness(placed, load).mean())


def in_force(before: float, after: float, steps: int, load_left: int = STEPS) -> float:
    """The balancedness of an interval in which a rebalance of so many steps is carried out; layer by layer, so half of its gain comes on the way."""
    part = min(steps / load_left, 1.0)
    return part * (before + after) / 2 + (1 - part) * after


def follow(way: str, policy: str, load: np.ndarray, ranks: int, slots: int, budget: float = BUDGET) -> Followed:
    """Plans of this plugin; `budget` is the part of all slots that may move in one."""
    found, placed = Followed(ranks=ranks, way=way), eplb.spread(num_experts=EXPERTS, ranks=ranks, redundant=slots - EXPERTS, layers=LAYERS)  # fmt: skip
    rules = Rules(
        policy=policy, weighting="decayed", max_moves=int(budget * LAYERS * slots), buffer_experts=BUFFER, expert_bytes=EXPERT_BYTES, horizon_steps=STEPS
    )  # fmt: skip
    free = 0  # the interval from which on another plan may be asked for
    found.balancedness.append(balance(placed, load[0]))
    for interval in range(1, len(load)):
        if interval < free:
            found.balancedness.append(balance(placed, load[interval]))
            continue
        history = load[max(interval - WINDOW, 0) : interval]
        began = time.thread_time()
        decision = decide(placed, history, rules, step_seconds=STEP_SECONDS, seconds_per_byte=SECONDS_PER_BYTE)
        found.milliseconds.append((time.thread_time() - began) * 1e3)
        before = balance(placed, load[interval])
        if not len(decision.transfers):
            found.balancedness.append(before)
            continue
        placed = placement_after(placed, decision.transfers)
        steps = STEPS_OF_A_BATCH * (int(decision.transfers[:, 0].max()) + 1)
        found.moved.append(len(decision.transfers) / (LAYERS * slots))
        found.steps.append(steps)
        found.balancedness.append(in_force(before, balance(placed, load[interval]), steps))
        free = interval + -(-steps // STEPS)
    return found


def kept(way: str, placed: eplb.Placement, load: np.ndarray) -> Followed:
    """A placement that stays."""
    return Followed(ranks=placed.ranks, way=way, balancedness=[balance(placed, one) for one in load])


def known(load: np.ndarray, ranks: int, slots: int) -> Followed:
    """For each interval the best plan for its own load, which nobody knows before."""
    plans = [eplb.rebalance(one, ranks=ranks, slots=slots) for one in load]
    return Followed(
        ranks=ranks, way="best plan for the load itself", balancedness=[plan.balancedness for plan in plans]
    )


def offline(load: np.ndarray, ranks: int, slots: int) -> Followed:
    """For each interval the best plan for the window before it, in force at once and at no cost: what following could give."""
    found = Followed(ranks=ranks, way="offline plan of each window")
    for interval, one in enumerate(load):
        window = load[max(interval - WINDOW, 0) : interval] if interval else load[:1]
        plan = eplb.rebalance(eplb.decayed_load(window, HALF_LIFE), ranks=ranks, slots=slots)
        found.balancedness.append(balance(plan.placement, one))
    return found


def vllm(named: tuple[str, Callable], load: np.ndarray, ranks: int, slots: int) -> Followed:
    """vLLM's policy and its full reshuffles; one layer moves a step."""
    version, policy = named
    found = Followed(ranks=ranks, way=f"vLLM {version}'s policy")
    ids = np.arange(slots)[None].repeat(LAYERS, axis=0) % EXPERTS
    score = lambda ids, one: _balance_of_slots(ids, one, ranks)  # noqa: E731
    found.balancedness.append(score(ids, load[0]))
    for interval in range(1, len(load)):
        mean = load[max(interval - WINDOW, 0) : interval].mean(axis=0)
        began = time.thread_time()
        new = policy(mean, slots, ranks, 1, 1, ids.astype(np.int64))
        found.milliseconds.append((time.thread_time() - began) * 1e3)
        found.moved.append(moved_of_slots(ids, np.asarray(new), ranks))
        before = score(ids, load[interval])
        ids = np.asarray(new)
        found.steps.append(LAYERS)
        found.balancedness.append(in_force(before, score(ids, load[interval]), LAYERS))
    return found


def _balance_of_slots(ids: np.ndarray, load: np.ndarray, ranks: int) -> float:
    """Balancedness of flat slots, which may hold an expert twice on a rank."""
    counts = np.stack([np.bincount(row, minlength=load.shape[1]) for row in ids])
    sums = np.take_along_axis(load / counts, ids, axis=1).reshape(len(ids), ranks, -1).sum(axis=2)
    return float((sums.mean(axis=1) / sums.max(axis=1)).mean())


def compare(found: Followed, best: Followed) -> None:
    """Set how a way compares with the offline plans of each window."""
    near = [mine >= other - NEAR for mine, other in zip(found.balancedness, best.balancedness, strict=True)]
    found.to_follow = next((t for t in range(1, INTERVALS - SHIFT) if near[SHIFT + t]), None)
    found.near = sum(near[1:]) / (INTERVALS - 1)


def run(sizes: tuple[tuple[int, int], ...] = SIZES) -> Iterator[list[Followed]]:
    """All ways for each number of ranks, the two that no engine can carry out first."""
    load, named = loads(), vllm_policy()
    for ranks, slots in sizes:
        best = offline(load, ranks, slots)
        first = eplb.rebalance(load[0], ranks=ranks, slots=slots).placement
        ways = [
            known(load, ranks, slots),
            best,
            kept("off", eplb.spread(num_experts=EXPERTS, ranks=ranks, redundant=slots - EXPERTS, layers=LAYERS), load),
            kept("static, from the first interval", first, load),
            *(follow(f"dynamic, {policy}", policy, load, ranks, slots) for policy in ("incremental", "swift", "balanced")),
            follow(f"dynamic, incremental, budget {WIDE:.0%}", "incremental", load, ranks, slots, WIDE),
            *([vllm(named, load, ranks, slots)] if named else []),
        ]  # fmt: skip
        for way in ways:
            compare(way, best)
        yield ways


if __name__ == "__main__":
    for ways in run():
        for way in ways:
            print(
                {name: round(value, 4) if isinstance(value, float) else value for name, value in way.summary().items()}
            )
