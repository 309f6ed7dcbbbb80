# SPDX-License-Identifier: Apache-2.0
"""Ranks on the simulated NPU that run one case of dynamic EPLB without an engine: python eplb_world.py FOLDER CASE RANKS OPTIONS.

One process imports torch and torch_npu and forks. Each rank writes what came of it as JSON; after a failure it ends.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from ascend_comm import TorchGroup
from ascend_eplb import expert_map, routing_table, spread
from ascend_moe import (
    CommMethod,
    FloatExperts,
    MoeEnv,
    Soc,
    W8A8Experts,
    forward_selected,
    make_comm,
    quantise_weights,
    to_physical,
)
from vllm_ascend.eplb import rebalance
from vllm_ascend.eplb.client import Planner
from vllm_ascend.eplb.move import MovableLayer
from vllm_ascend.eplb.options import EplbConfig

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, CHOSEN, ROWS = 3, 16, 64, 64, 24, 2, 12
LIMIT = 300  # seconds: a safety net


class Layer:
    """A MoE layer of one rank: its experts' tensors, its maps, and its tokens, which are the same in every step."""

    def __init__(self, number, group, placed, quantised, method):
        generator = torch.Generator().manual_seed(number)
        self.rank, self.group = group.rank_in_group, group
        w13 = torch.randn(EXPERTS, HIDDEN, 2 * INTERMEDIATE, generator=generator)
        w2 = torch.randn(EXPERTS, INTERMEDIATE, HIDDEN, generator=generator)
        here = torch.from_numpy(placed.physical_to_logical[0, self.rank].astype(np.int64))
        if quantised:
            (w13, scale13), (w2, scale2) = quantise_weights(w13), quantise_weights(w2)
            weights = {"w13": w13, "w13_scale": scale13, "w2": w2, "w2_scale": scale2.bfloat16()}
            self.kind = W8A8Experts
        else:
            weights, self.kind = {"w13": w13, "w2": w2}, FloatExperts
        self.bound = 0.0 if quantised else _bound(w13, w2)
        self.tensors = {name: values[here].contiguous().npu() for name, values in weights.items()}
        mine = torch.Generator().manual_seed(100 + 10 * number + self.rank)
        self.quantised = quantised
        self.x = torch.randn(TOKENS, HIDDEN, generator=mine).to(torch.bfloat16 if quantised else torch.float32).npu()
        self.ids = torch.stack([torch.randperm(EXPERTS, generator=mine)[:CHOSEN] for _ in range(TOKENS)]).int().npu()
        weights = torch.rand(TOKENS, CHOSEN, generator=mine) if method is CommMethod.MC2 else torch.tensor([0.5, 0.25]).repeat(TOKENS, 1)  # fmt: skip
        self.weights = weights.npu()
        self.heat = torch.zeros(EXPERTS, dtype=torch.int32, device="npu")
        self.table = torch.zeros(ROWS, EXPERTS, dtype=torch.int32, device="npu")
        self.place(placed)
        mc2 = {"mc2": _another(group), "soc": Soc.A3} if method is CommMethod.MC2 else {}
        env = MoeEnv(ep=group, tp=_solo(), dp=group, num_slots=placed.slots, **mc2)
        self.comm = make_comm(method, env)

    def place(self, placed):
        self.table.copy_(torch.from_numpy(routing_table(placed, ROWS)[0]))
        self.slots = placed.physical_to_logical[0, self.rank].tolist()
        assert (expert_map(placed, self.rank)[0] >= 0).sum() == len(self.slots)

    def forward(self):
        self.heat.index_add_(0, self.ids.flatten(), torch.ones_like(self.ids).flatten())
        return forward_selected(
            self.x, self.weights, to_physical(self.ids, routing_table=self.table), experts=self.kind(**self.tensors), comm=self.comm
        ).hidden.cpu()  # fmt: skip


def _bound(w13, w2):
    """How far outputs in float32 may be apart. A kernel may add up the terms of a row in another order when an expert has more rows or fewer, in each of
    two products after one another of which one is of two factors: four times 64 terms, each rounded, of the greatest sum of magnitudes. int8 products are
    exact; MC2 adds up a token's experts one by one, and elsewhere a sum of two products by powers of two is rounded once."""
    largest = 6.0  # of a normal sample
    gate_up = largest * w13.abs().sum(dim=1)
    magnitudes = torch.bmm((gate_up[:, :INTERMEDIATE] * gate_up[:, INTERMEDIATE:])[:, None], w2.abs())
    return 4 * 64 * 2.0**-24 * float(magnitudes.max())


@cache
def _another(group):
    """A communicator over the ranks of a group."""
    return TorchGroup(dist.new_group(list(group.ranks)), dist.new_group(list(group.ranks), backend="gloo"))


def _solo():
    from ascend_comm import Solo

    return Solo(dist.get_rank())


def build(group, options):
    method = CommMethod(options.get("method", "all-gather"))
    placed = spread(num_experts=EXPERTS, ranks=group.world_size, redundant=options.get("redundant", group.world_size))
    layers = [Layer(number, group, placed, options.get("quantised", False), method) for number in range(LAYERS)]
    movable = [
        MovableLayer(
            name=f"layer {number}", placed=placed, number=number + 5, tensors=layer.tensors, heat=layer.heat, place=layer.place
        )
        for number, layer in enumerate(layers)
    ]  # fmt: skip
    config = EplbConfig(**{"dynamic_eplb": True, "verify_moves": True, **options["config"]})
    command = options.get("planner")
    planner = None
    if group.rank_in_group == 0:
        given = {"command": [sys.executable, "-c", command]} if command else {}
        planner = Planner(window=config.load_window, seconds=options.get("plan_seconds", 120.0), **given)
    return layers, rebalance.Rebalancer(config, movable, group, planner)


def steps(group, options):
    """Steps until so many rebalances, or intervals, were completed; every output is compared with the first."""
    layers, rebalancer = build(group, options)
    first = [layer.forward() for layer in layers]
    wanted, counted = options.get("rebalances", 0), options.get("failures", 0)
    pauses = np.random.default_rng(group.rank_in_group)
    placements, number, addresses = set(), 0, [one.data_ptr() for layer in layers for one in layer.tensors.values()]
    while True:
        rebalancer.step()
        number += 1
        placements.add(rebalancer.placed.physical_to_logical.tobytes())
        for layer, expected in zip(layers, first, strict=True):
            assert (layer.forward() - expected).abs().max() <= layer.bound, number
        if options.get("slow"):
            time.sleep(float(pauses.random()) * 0.02)
        # Whether a rank is done must be known to all in the same step: only rank 0 knows of failures.
        done = torch.tensor(
            [int(rebalancer.status.rebalances < wanted or sum(rebalancer.status.dropped.values()) < counted)]
        )
        dist.broadcast(done, 0, group=group.cpu_group)
        if not done:
            break
    for layer, (one, movable) in enumerate(zip(layers, rebalancer._layers, strict=True)):
        assert one.slots == rebalancer.placed.physical_to_logical[layer, group.rank_in_group].tolist(), movable.name
    assert addresses == [one.data_ptr() for layer in layers for one in layer.tensors.values()]
    rebalancer.close()
    rebalancer.close()
    status = rebalancer.status
    return {
        "steps": number, "rebalances": status.rebalances, "moves": status.moves, "bytes": status.bytes_moved, "placements": len(placements),
        "dropped": dict(status.dropped), "failures": status.failures, "intervals": status.intervals, "heat": status.heat,
        "final": rebalancer.placed.physical_to_logical.tolist(),
    }  # fmt: skip


def half_moved(group, options):
    """A slot that is overwritten from elsewhere is found after the next change of its layer."""
    layers, rebalancer = build(group, options)
    for layer in layers:
        layer.tensors["w2"][0, 0, 0] += 1
    try:
        for _ in range(1000):
            for layer in layers:
                layer.forward()
            rebalancer.step()
    except RuntimeError as error:
        return {"said": str(error)}
    finally:
        rebalancer.close()


def lost(group, options):
    """One rank is killed while weights are on their way, or stops: the others end with an error."""
    rebalance._WAIT_SECONDS = options["limit"]
    layers, rebalancer = build(group, options)
    try:
        while True:
            for layer in layers:
                layer.heat += group.rank_in_group + torch.arange(EXPERTS, device="npu", dtype=torch.int32)
            rebalancer.step()
            if rebalancer._batches and group.rank_in_group == 1:
                if options["how"] == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(LIMIT)
    except (RuntimeError, TimeoutError) as error:
        return {"said": f"{type(error).__name__}: {error}"}
    finally:
        rebalancer.close()


def pauses(group, options):
    """Between two steps there are no requests for a quarter of an hour, while weights are on their way and while they are not. The clock is put forward."""
    layers, rebalancer = build(group, options)
    ahead, on_the_way, others = 0.0, 0, 0
    rebalance.time = SimpleNamespace(perf_counter=lambda: time.perf_counter() + ahead)
    while rebalancer.status.rebalances < 3:
        for layer in layers:
            layer.heat += group.rank_in_group + torch.arange(EXPERTS, device="npu", dtype=torch.int32)
        rebalancer.step()
        ahead += 900
        moving = rebalancer._mover._on_the_way is not None
        on_the_way, others = on_the_way + moving, others + (not moving)
    rebalancer.close()
    return {"on_the_way": on_the_way, "others": others}


def never_arrives(group, options):
    """The ranks go on, and one batch does not arrive: after the limit all ranks end."""
    layers, rebalancer = build(group, options)
    ahead = 0.0
    rebalance.time = SimpleNamespace(perf_counter=lambda: time.perf_counter() + ahead)
    if group.rank_in_group == 1:
        rebalancer._mover.is_complete = lambda: False
    try:
        while True:
            for layer in layers:
                layer.heat += group.rank_in_group + torch.arange(EXPERTS, device="npu", dtype=torch.int32)
            rebalancer.step()
            ahead += 1.0
    except TimeoutError as error:
        return {"said": str(error)}
    finally:
        rebalancer.close()


def apart(group, options):
    """A rank that is a step ahead of the others is noticed."""
    _, rebalancer = build(group, options)
    rebalancer._step = group.rank_in_group
    try:
        for _ in range(20):
            rebalancer._control.begin(rebalancer._step, "a question")
            rebalancer._control.result()
    except RuntimeError as error:
        return {"said": str(error)}
    finally:
        rebalancer.close()


def no_memory(group, options):
    """The buffers do not fit on one rank: all are told."""
    if group.rank_in_group == 1:
        options = options | {"config": options["config"] | {"move_buffer_experts": 1 << 30}}
    layers, _ = [], None
    try:
        build(group, options)
    except RuntimeError as error:
        return {"said": f"{type(error).__name__}: {error}", "layers": layers}


CASES = {
    "steps": steps,
    "pauses": pauses,
    "never_arrives": never_arrives,
    "half_moved": half_moved,
    "lost": lost,
    "apart": apart,
    "no_memory": no_memory,
}


def work(rank, ranks, folder, case, options):
    torch.set_num_threads(1)
    torch.npu.set_device(rank)
    limit = timedelta(seconds=LIMIT)
    dist.init_process_group("hccl", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=limit)
    group = TorchGroup(dist.new_group(list(range(ranks))), dist.new_group(list(range(ranks)), backend="gloo"))
    try:
        outcome = CASES[case](group, options)
    except Exception:
        outcome = {"error": traceback.format_exc()}
    Path(folder, f"{rank}.json").write_text(json.dumps(outcome))
    os._exit("error" in (outcome or {}))


def main(folder, case, ranks, options):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, ranks, folder, case, options)) for rank in range(ranks)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LIMIT
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        ended = [process.exitcode is not None for process in processes]
        if options.get("how") and all(end or rank == 1 for rank, end in enumerate(ended)):
            break
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.join()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
