# SPDX-License-Identifier: Apache-2.0
"""``ascend-comm show``: the groups that a set of sizes gives, as a table or as JSON."""

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ascend_comm.config import GroupConfig, memory_by_rank, plan
from ascend_comm.hccl import options_for
from ascend_comm.topology import Groups, Topology

__all__ = ["run"]

_PLAIN = ("tp", "pcp", "pp", "dp")
_MB = 2**20


def run(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; returns the exit status."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
    app.callback()(ascend_comm)
    app.command()(show)
    try:
        status = app(list(arguments), prog_name="ascend-comm", standalone_mode=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return int(status or 0)


def ascend_comm() -> None:
    """Who talks to whom in distributed inference."""


def show(
    world: Annotated[int, typer.Option(help="Ranks in all.", metavar="N")],
    dp: Annotated[int, typer.Option(help="Data parallel size.", metavar="N")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallel size.", metavar="N")] = 1,
    pcp: Annotated[int, typer.Option(help="Prefill context parallel size.", metavar="N")] = 1,
    tp: Annotated[int, typer.Option(help="Tensor parallel size.", metavar="N")] = 1,
    flashcomm2: Annotated[int, typer.Option(help="FlashComm2 size; 0 is off.", metavar="N")] = 0,
    otp: Annotated[int, typer.Option(help="o_proj TP size along DP; 0 is off.", metavar="N")] = 0,
    lmhead_tp: Annotated[int, typer.Option(help="LM head TP size along DP.", metavar="N")] = 0,
    embed_tp: Annotated[int, typer.Option(help="Embedding TP size along DP.", metavar="N")] = 0,
    mlp_tp: Annotated[int, typer.Option(help="MLP TP size along DP.", metavar="N")] = 0,
    dynamic_eplb: Annotated[bool, typer.Option("--dynamic-eplb", help="Dynamic EPLB is on.")] = False,
    layer_sharding: Annotated[list[str] | None, typer.Option(help="Module to spread over ranks; repeatable.")] = None,
    weight_shards: Annotated[int | None, typer.Option(help="Pieces TP cuts it into.", metavar="N")] = None,
    pd_tp_ratio: Annotated[int, typer.Option(help="Prefill TP over decode TP.", metavar="N")] = 1,
    pd_head_replicas: Annotated[int, typer.Option(help="Prefill ranks with the same KV head.", metavar="N")] = 1,
    hccl_buffsize: Annotated[int, typer.Option(help="HCCL_BUFFSIZE in MB.", metavar="MB")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which ranks form which group, and the HCCL buffers that costs."""
    try:
        config = GroupConfig(
            topology=Topology(world, dp, pp, pcp, tp),
            parallel=_PLAIN,
            dynamic_eplb=dynamic_eplb,
            otp=otp,
            lmhead_tp=lmhead_tp,
            embed_tp=embed_tp,
            mlp_tp=mlp_tp,
            flashcomm2=flashcomm2,
            layer_sharding=tuple(layer_sharding or ()),
            weight_shards=weight_shards,
            pd_tp_ratio=pd_tp_ratio,
            pd_head_replicas=pd_head_replicas,
            kv_role="producer" if pd_tp_ratio > 1 else "both",
            hccl_buffsize_mb=hccl_buffsize,
        )
    except ValueError as error:
        print(f"ascend-comm: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(_describe(config), indent=2))
    else:
        _draw(config)


def _describe(config: GroupConfig) -> dict[str, Any]:
    """What ``--json`` prints."""
    topology = config.topology
    sizes = dict(zip(("xdp", "dp", "pp", "pcp", "tp"), topology.shape, strict=True))
    return {
        "world": topology.world_size,
        "sizes": sizes,
        "groups": config.families(),
        "communicators": [
            {"names": list(h.names), "ranks": list(h.ranks), "buffer_mb": h.options.buffer_mb} for h in plan(config)
        ],
        "hccl_bytes_per_rank": memory_by_rank(config),
    }


def _draw(config: GroupConfig) -> None:
    topology = config.topology
    title = "  ".join(
        f"{name} {size}" for name, size in zip(("XDP", "DP", "PP", "PCP", "TP"), topology.shape, strict=True)
    )
    table = Table(title=f"{topology.world_size} ranks: {title}", title_justify="left")
    table.add_column("group", no_wrap=True)
    table.add_column("ranks", justify="right")
    table.add_column("buffer", justify="right", no_wrap=True)
    table.add_column("members")
    for name, groups in config.families().items():
        options = options_for(name, topology.data_parallel)
        buffer = config.hccl_buffsize_mb if options.buffer_mb is None else options.buffer_mb
        size = len(groups[0])
        table.add_row(name, str(size), f"{buffer} MB" if size > 1 else "-", _members(groups))
    console = Console()
    console.print(table)
    most = max(memory_by_rank(config))
    console.print(
        f"HCCL buffers: {most // _MB} MB a rank, two for each communicator; groups of equal ranks share one.",
        soft_wrap=True,
    )


def _members(groups: Groups) -> str:
    """``0-3 4-7`` for two groups of consecutive ranks, ``0,8 1,9`` for others."""
    if len(groups[0]) == 1:
        return "each rank alone"

    def short(ranks: list[int]) -> str:
        consecutive = len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1))
        return f"{ranks[0]}-{ranks[-1]}" if consecutive else ",".join(map(str, ranks))

    return "  ".join(short(ranks) for ranks in groups)
