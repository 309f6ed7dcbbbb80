# SPDX-License-Identifier: Apache-2.0
"""Host time of a linear call, ours beside a peer's, on a product that is next to nothing."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import ascend_linear as al
import torch
import torch.distributed as dist
from ascend_comm import TorchGroup
from torch.nn.functional import linear

IN, OUT, CALLS, ROUNDS = 32, 32, 500, 15


class Overhead(NamedTuple):
    """Microseconds of host time per call."""

    peer: str
    ours_us: float
    peer_us: float

    @property
    def ratio(self) -> float:
        """Ours over the peer's."""
        return self.ours_us / self.peer_us


class OneOfTwo(TorchGroup):
    """A process group of one that says it is two, so that the collective is called and nothing has to be waited for."""

    def __init__(self) -> None:
        super().__init__(dist.group.WORLD)
        self.world_size = 2


def measure() -> list[Overhead]:
    """Beside torch's own linear and all_reduce, and beside vLLM's RowParallelLinear where vLLM is installed."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'torch'}", rank=0, world_size=1)
        try:
            found = [beside_torch()]
        finally:
            dist.destroy_process_group()
        if find_spec("vllm"):
            found.append(beside_vllm(f"file://{Path(folder) / 'vllm'}"))
    return found


def beside_torch() -> Overhead:
    x, weight, bias = torch.ones(1, IN), torch.ones(OUT, IN), torch.ones(OUT)
    group = OneOfTwo()
    op = al.CustomRowParallelOp(al.LinearEnv(tp=group))
    op.update_attrs(al.LinearParams(weight=weight, bias=bias))

    def by_hand() -> tuple[torch.Tensor, None]:
        output = linear(x, weight, bias)
        dist.all_reduce(output, group=group.device_group)
        return output, None

    return Overhead("torch's linear + all_reduce", *side_by_side(lambda: op.apply(x), by_hand))


def beside_vllm(init: str) -> Overhead:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        get_tp_group,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.model_executor.layers.linear import RowParallelLinear

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, init, 0, "gloo")
        initialize_model_parallel(1)
        try:
            layer = RowParallelLinear(
                IN, OUT, bias=True, params_dtype=torch.float32, prefix="model.layers.0.mlp.down_proj"
            )
            for parameter in layer.parameters():
                parameter.requires_grad_(False)
            x = torch.ones(1, IN, device=layer.weight.device)
            op = al.CustomRowParallelOp(al.LinearEnv(tp=get_tp_group()), prefix=layer.prefix)
            op.update_attrs(al.LinearParams(weight=layer.weight, bias=layer.bias))
            # Both as vLLM's models call them: a module, whose forward is the layer's own or the op's.
            ours = Wrapped(op)
            return Overhead("vLLM's RowParallelLinear", *side_by_side(lambda: ours(x), lambda: layer(x)))
        finally:
            cleanup_dist_env_and_memory()


class Wrapped(torch.nn.Module):
    """A layer that hands its forward to an op."""

    def __init__(self, op: al.CustomLinearOp) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: torch.Tensor) -> al.LinearResult:
        return self.op.apply(x)


def side_by_side(ours: Callable[[], object], peer: Callable[[], object]) -> tuple[float, float]:
    """Medians of CPU microseconds per call, in turns, so that both see the same machine."""
    spent: dict[str, list[float]] = {"ours": [], "peer": []}
    with torch.inference_mode():
        for call in (ours, peer):
            call()
        for _ in range(ROUNDS):
            for name, call in (("ours", ours), ("peer", peer)):
                start = time.thread_time()
                for _ in range(CALLS):
                    call()
                spent[name].append((time.thread_time() - start) / CALLS * 1e6)
    return statistics.median(spent["ours"]), statistics.median(spent["peer"])
