# SPDX-License-Identifier: Apache-2.0
"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ascend_eplb.policies.registry import policy_names

__all__ = [
    "AsJson",
    "Experts",
    "File",
    "From",
    "Groups",
    "HalfLife",
    "LayerMoves",
    "Load",
    "MoeLayers",
    "Moves",
    "Nodes",
    "Policy",
    "Ranks",
    "RanksOfFile",
    "Replicas",
    "Risk",
    "Slots",
    "Target",
    "Weighting",
]

_POLICIES = ", ".join(policy_names())

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Experts = Annotated[int, typer.Option("--experts", help="Logical experts; 0 takes the highest id + 1.")]
File = Annotated[Path, typer.Argument(help="Placement: .json, .npz, .npy, .yaml.", show_default=False)]
From = Annotated[Path | None, typer.Option("--from", help="Placement in force; spread by default.")]
Groups = Annotated[int, typer.Option(help="Expert groups, bound to nodes where nodes > 1 divides them.")]
HalfLife = Annotated[float | None, typer.Option(help="Steps for --weighting decayed; a quarter of all by default.")]
LayerMoves = Annotated[int | None, typer.Option("--max-moves-per-layer", help="Most slots that may move in a layer.")]
Load = Annotated[Path, typer.Option(help="Load dump: .npy, .npz, .jsonl or load_history .json.", show_default=False)]
MoeLayers = Annotated[
    str,
    typer.Option(
        "--moe-layers",
        help="The model's MoE layers, as 3-60: finds them in the file by decoder layer number or by position.",
    ),
]
Moves = Annotated[int | None, typer.Option("--max-moves", help="Most slots that may move, over all layers.")]
Nodes = Annotated[int, typer.Option(help="Nodes of equally many ranks.")]
Policy = Annotated[str, typer.Option(help=f"One of {_POLICIES}; balanced, or incremental under a move limit.")]
Ranks = Annotated[int, typer.Option(help="Ranks.", show_default=False)]
RanksOfFile = Annotated[
    int | None, typer.Option("--ranks", help="Ranks, where the file does not say it (YAML, arrays).")
]
Replicas = Annotated[int, typer.Option("--max-replicas", help="Most replicas of one expert; 0 is no limit.")]
Risk = Annotated[float, typer.Option(help="Standard deviations that --weighting peak adds to the mean.")]
Slots = Annotated[int, typer.Option(help="Physical slots over all ranks.", show_default=False)]
Target = Annotated[float, typer.Option(help="Part of the bound at which incremental and swift stop.")]
Weighting = Annotated[str, typer.Option(help="How steps become one load: mean, decayed, peak.")]
