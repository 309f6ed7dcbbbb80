# SPDX-License-Identifier: Apache-2.0
"""The peers: the algorithm DeepSeek published, on torch scalars as the published code has it, and vLLM's own policy.

Both are optional: torch and vLLM need not be installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

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


def vllm_policy() -> tuple[str, Callable[..., np.ndarray]] | None:
    """vLLM's version and default policy, from the installed vLLM. Its two files are loaded as they are, without the rest
    of vLLM, which would look for a device."""
    found = importlib.util.find_spec("vllm")
    if found is None or importlib.util.find_spec("torch") is None:
        return None
    folder = Path(str(found.origin)).parent / "distributed" / "eplb" / "policy"
    package = importlib.util.module_from_spec(ModuleSpec("vllm_eplb_policy", None, is_package=True))
    package.__path__ = [str(folder)]
    sys.modules["vllm_eplb_policy"] = package
    try:
        policy = importlib.import_module("vllm_eplb_policy.default").DefaultEplbPolicy
    except (ImportError, AttributeError):
        return None
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    version = metadata.version(metadata.packages_distributions()["vllm"][0])

    def run(load, slots, ranks, nodes, groups, old=None):
        """Slots `[L, S]`; with the `old` ones, experts that stay on a rank keep their slot."""
        before = () if old is None else (torch.from_numpy(old),)
        return np.asarray(policy.rebalance_experts(torch.from_numpy(load), slots, groups, nodes, ranks, *before))

    return version.split("+")[0], run
