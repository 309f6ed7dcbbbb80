# SPDX-License-Identifier: Apache-2.0
"""The peers: the algorithm DeepSeek published, on torch scalars as the published code has it, and vLLM's own policy.

Both are optional: torch and vLLM need not be installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
from ascend_eplb import deepseek_assignment

Peer = Callable[[np.ndarray, int, int, int, int], np.ndarray]


def plain_numpy() -> Peer:
    """The package's own plain version, duplicates left in."""

    def run(load, slots, ranks, nodes, groups):
        return deepseek_assignment(load, slots=slots, ranks=ranks, nodes=nodes, groups=groups)

    return run


def torch_scalars() -> Peer | None:
    """The same with the packing loop on zero-dimensional torch tensors, where the published code spends its time."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    torch.set_num_threads(1)

    def pack(weights, packs):
        weight = torch.from_numpy(np.ascontiguousarray(weights))
        rows, items = weight.shape
        room = items // packs
        if room == 1:
            return np.tile(np.arange(items), (rows, 1)), np.zeros((rows, items), dtype=np.int64)
        order = weight.sort(-1, descending=True).indices
        pack_of = torch.full(weight.shape, -1, dtype=torch.int64)
        place = torch.full_like(pack_of, -1)
        for row in range(rows):
            total, filled = [0] * packs, [0] * packs
            for item in order[row]:
                lightest = min((p for p in range(packs) if filled[p] < room), key=total.__getitem__)
                pack_of[row, item], place[row, item] = lightest, filled[lightest]
                total[lightest] += weight[row, item]
                filled[lightest] += 1
        return pack_of.numpy(), place.numpy()

    def run(load, slots, ranks, nodes, groups):
        return deepseek_assignment(load, slots=slots, ranks=ranks, nodes=nodes, groups=groups, pack=pack)

    return run


def vllm_policy() -> tuple[str, Peer] | None:
    """vLLM's default policy and its version, from the installed vLLM."""
    try:
        version = importlib.import_module("vllm.version").__version__
        policy = importlib.import_module("vllm.distributed.eplb.policy.default").DefaultEplbPolicy
        torch = importlib.import_module("torch")
    except (ImportError, AttributeError):
        return None
    torch.set_num_threads(1)

    def run(load, slots, ranks, nodes, groups):
        found = policy.rebalance_experts(torch.from_numpy(load), slots, groups, nodes, ranks)
        return np.asarray(found[0] if isinstance(found, tuple) else found)

    return version, run
