# SPDX-License-Identifier: Apache-2.0
"""What each linear arrangement costs: bytes sent, kernel launches, memory of o_proj, and host time per call.

Run: python benchmarks/linear/run.py. It writes RESULTS.md beside itself and needs ascend-sim. Bytes, launches and
memory are counted, so they are the same on every machine; the host time is measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import ascend_linear as al
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from arrangements import ARRANGEMENTS, HEADS, HIDDEN, INTERMEDIATE, LAYERS, QKV, TOKENS, WORLD, Arrangement, build
from ascend_comm import GroupSet

HERE = Path(__file__).parent
TIMEOUT = timedelta(seconds=120)
MARK = "-- host time --"  # what torch and vLLM print comes before it
# They make a view or ask for memory; nothing runs on the device.
NO_LAUNCH = ("as_strided", "chunk", "detach", "empty", "expand", "narrow", "permute", "reshape", "select", "slice", "split",
             "squeeze", "t", "transpose", "unsqueeze", "view")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one layer on one rank."""

    sent: float
    launches: float
    o_proj: int


def is_launch(operator: str) -> bool:
    name = operator.partition("::")[2]
    return not any(name == metadata or name.startswith(f"{metadata}_") for metadata in NO_LAUNCH)


def one_step(
    arrangement: Arrangement, env: al.LinearEnv, layers: list[dict[str, al.CustomLinearOp]]
) -> list[tuple[float, int]]:
    """Bytes sent and kernels launched by the ops of each layer; what lies between them is not counted."""
    from ascend_sim.counters import counting

    state = al.plan_step(arrangement.tokens, env, threshold=0)
    tokens, tp = arrangement.tokens, env.tp.world_size
    rows = (tokens + state.pad_size) // tp if state.flashcomm1 else tokens
    found = []
    for ops in layers:
        hidden = torch.ones(rows, HIDDEN, dtype=torch.bfloat16)
        heads = torch.ones(tokens, HEADS // tp, dtype=torch.bfloat16)
        with counting() as work:
            ops["qkv_proj"].apply(hidden, state)
            ops["o_proj"].apply(heads, state)
            up = ops["gate_up_proj"].apply(hidden, state)
        gated = up[:, : up.shape[1] // 2].contiguous()
        with counting() as rest:
            ops["down_proj"].apply(gated, state)
        sent = work.delta.bytes + rest.delta.bytes
        launches = 0
        for part in (work.delta, rest.delta):
            launches += sum(count.calls for name, count in part.operators.items() if is_launch(name))
            # A fused kernel is counted as an operator already.
            launches += sum(count.calls for (name, _), count in part.collectives.items() if not name.startswith("npu_"))
        found.append((sent, launches))
    return found


def on_rank(rank: int, folder: str) -> None:
    """Every arrangement; rank 0 keeps what came of all ranks."""
    torch.set_num_threads(1)
    torch.npu.set_device(rank)
    torch.set_default_device(f"npu:{rank}")
    dist.init_process_group("hccl", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=TIMEOUT)
    costs: dict[str, Cost] = {}
    for arrangement in ARRANGEMENTS:
        with GroupSet(arrangement.config, timeout=TIMEOUT) as groups:
            env, layers, o_proj = build(arrangement, groups)
            one_step(arrangement, env, layers)
            steps = one_step(arrangement, env, layers)
        mine = (sum(sent for sent, _ in steps), sum(launches for _, launches in steps), o_proj)
        everyone: list[tuple[float, int, int]] = [mine] * WORLD
        dist.all_gather_object(everyone, mine)
        sent, launches, held = (max(column) for column in zip(*everyone, strict=True))
        costs[arrangement.name] = Cost(sent=sent / LAYERS, launches=launches / LAYERS, o_proj=held)
    if rank == 0:
        torch.save(costs, f"{folder}/costs")
    dist.destroy_process_group()


def counted() -> dict[str, Cost]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (folder,), nprocs=WORLD)
        costs: dict[str, Cost] = torch.load(f"{folder}/costs", weights_only=False)
    return costs


def table(costs: dict[str, Cost]) -> list[str]:
    lines = [
        "| arrangement | bytes sent | least | more | launches | o_proj bytes | the least, by formula |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for arrangement in ARRANGEMENTS:
        cost, least = costs[arrangement.name], arrangement.least()
        more = f"{cost.sent / least - 1:.1%}"
        lines.append(
            f"| {arrangement.name} | {cost.sent:,.0f} | {least:,.0f} | {more} | {cost.launches:.4g} "
            f"| {cost.o_proj:,} | {arrangement.formula} |"
        )
    return lines


def report(costs: dict[str, Cost], host: list[str]) -> str:
    intro = f"""<!-- written by benchmarks/linear/run.py -->
# ascend-linear: what each arrangement costs

Of one layer on the rank that sends most: {WORLD} ranks (TP {WORLD}, or DP {WORLD} where the name says so), N = {TOKENS} tokens
(DP: {TOKENS // WORLD} a rank), H = hidden size {HIDDEN}, A = heads {HEADS}, qkv {QKV}, MLP {INTERMEDIATE}, bfloat16, over {LAYERS} layers. Counted on
the simulated NPU, so the same everywhere. Nothing here is a time on hardware.

`rs(n, w; r) = ag(n, w; r) = a2a(n, w; r) = n w b (r - 1) / r` bytes with b bytes a number and r = W = {WORLD} ranks if not given; an all-reduce
is two of them. G = W / k. Bytes beyond the least are padding to a multiple of {WORLD} tokens. A launch is a kernel or a collective; views are none,
and a fused kernel is one. Only the four linear layers are counted: under FlashComm1 norms and residuals run on 1/{WORLD} of the tokens besides.
"""
    return "\n".join([intro, *table(costs), HOST, *host, ""])


HOST = """
## Host time

CPU microseconds of one call of a row op on one token, ours and the peer's in turns in one process, medians. Beside torch both call an
all-reduce of one rank; beside vLLM both are a module on one rank, which communicates nothing. The target is for vLLM where it is installed.
"""


def host_time() -> list[str]:
    """Measured in a process of its own, which has neither threads nor groups of the other part."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), "--overhead"], check=True, stdout=subprocess.PIPE, text=True, timeout=600
    )
    return done.stdout.partition(MARK)[2].strip().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--overhead", action="store_true", help="only measure host time, and print it")
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md")
    arguments = parser.parse_args()
    if arguments.overhead:
        from overhead import measure

        print(MARK)
        print("| peer | ours, us | peer, us | ratio | target |")
        print("|---|--:|--:|--:|---|")
        *others, judged = measure()
        for found in others:
            print(f"| {found.peer} | {found.ours_us:.1f} | {found.peer_us:.1f} | {found.ratio:.2f} | |")
        verdict = "met" if judged.ratio <= 1.1 else "MISSED"
        print(
            f"| {judged.peer} | {judged.ours_us:.1f} | {judged.peer_us:.1f} | {judged.ratio:.2f} | <= 1.1 {verdict} |"
        )
        return
    text = report(counted(), host_time())
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
