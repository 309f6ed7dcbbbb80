# SPDX-License-Identifier: Apache-2.0
"""The loads of the benchmark: seeded, synthetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A load shape and what is asked of `balanced`: least balancedness (of the bound where `of_bound`), most
    milliseconds, and how many times as fast as the published algorithm and as vLLM's policy."""

    layers: int
    experts: int
    slots: int
    ranks: int
    load: str
    nodes: int = 1
    groups: int = 1
    least: float | None = None
    of_bound: bool = False
    milliseconds: float | None = None
    times_published: float | None = None
    times_vllm: float = 2.0

    @property
    def name(self) -> str:
        """As the table says it."""
        by_node = f" {self.groups} groups {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.layers}x{self.experts} {self.slots}/{self.ranks}{by_node} {self.load}"

    def make(self, seed: int) -> np.ndarray:
        """float64 [layers, experts], 4096 tokens an expert on average."""
        generator = np.random.default_rng(seed)
        if self.load == "zipf":
            rows = np.tile(1.0 / np.arange(1, self.experts + 1), (self.layers, 1))
            load = generator.permuted(rows, axis=1)
        else:
            load = generator.lognormal(0, 1, (self.layers, self.experts))
        return load / load.mean() * 4096


WORKLOADS = (
    Workload(
        layers=58, experts=256, slots=288, ranks=32, load="zipf", least=0.999, milliseconds=20, times_published=50
    ),
    Workload(
        layers=58, experts=256, slots=288, ranks=32, load="lognormal", least=0.999, milliseconds=20, times_published=50
    ),
    Workload(layers=58, experts=256, slots=288, ranks=32, load="zipf", nodes=4, groups=8, least=0.95, of_bound=True),
    Workload(
        layers=58, experts=256, slots=288, ranks=32, load="lognormal", nodes=4, groups=8, least=0.999, of_bound=True
    ),
    Workload(layers=94, experts=128, slots=144, ranks=16, load="zipf", least=0.999, milliseconds=12),
    Workload(layers=94, experts=128, slots=144, ranks=16, load="lognormal", least=0.999, milliseconds=12),
    Workload(layers=58, experts=256, slots=256, ranks=32, load="lognormal"),
    Workload(layers=58, experts=256, slots=640, ranks=320, load="lognormal", least=0.95, milliseconds=500),
)
