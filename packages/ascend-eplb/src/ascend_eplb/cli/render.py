# SPDX-License-Identifier: Apache-2.0
"""Tables and bars: what the commands print."""

from __future__ import annotations

import numpy as np
from rich.table import Table
from rich.text import Text

from ascend_eplb.maps import expert_map
from ascend_eplb.metrics import FloatArray, balance_of, rank_loads
from ascend_eplb.migrate import TransferPlan
from ascend_eplb.placement import Placement
from ascend_eplb.plan import Plan
from ascend_eplb.simulate import Score

__all__ = ["heat_bar", "placement_table", "plan_table", "rank_table", "score_table", "summary_table"]

_BAR = 28


def heat_bar(value: float, most: float, mean: float) -> Text:
    """A bar as long as `value` is of `most`; green up to 2 % above the mean, then yellow, red from 20 % on."""
    length = round(_BAR * value / most) if most > 0 else 0
    ratio = value / mean if mean > 0 else 1.0
    colour = "red" if ratio >= 1.2 else "yellow" if ratio > 1.02 else "green"
    return Text.assemble(("█" * length, colour), ("·" * (_BAR - length), "dim"))


def summary_table(placement: Placement, name: str) -> Table:
    """Sizes and replica counts of a placement."""
    table = Table(title=Text(name), title_justify="left", show_header=False, title_style="bold")
    counts = placement.replicas
    layers = f"{placement.layers}  (numbers {placement.layer_ids[0]}..{placement.layer_ids[-1]})"
    for label, value in (
        ("layers", layers),
        ("logical experts", str(placement.num_experts)),
        ("ranks", str(placement.ranks)),
        ("slots per rank", str(placement.slots_per_rank)),
        ("physical slots", f"{placement.slots}  ({placement.redundant} redundant)"),
        ("replicas per expert", f"{counts.min()}..{counts.max()}"),
    ):
        table.add_row(label, Text(value, style="bold"))
    return table


def placement_table(placement: Placement, layer_id: int, load: FloatArray | None) -> Table:
    """All ranks of one layer: their experts (replicated ones marked) and, with a load, heat bars."""
    ids = placement.layer(layer_id)
    row = placement.layer_ids.index(layer_id)
    replicas = placement.replicas[row]
    table = Table(title=f"layer {layer_id}", title_justify="left", title_style="bold", row_styles=["", "on grey7"])
    table.add_column("rank", justify="right")
    table.add_column("experts by slot (replicated in cyan)", overflow="fold")
    loads = None
    if load is not None:
        loads = rank_loads(placement, load)[row]
        table.add_column("load", justify="right")
        table.add_column("against the mean", no_wrap=True)
        table.caption = f"balancedness {balance_of(loads[None])[0]:.4f}"
    for rank, slots in enumerate(ids):
        text = Text()
        for start, stop in _runs(slots, replicas):
            word = str(slots[start]) if stop - start < 3 else f"{slots[start]}–{slots[stop - 1]}"
            if stop - start == 2:
                word = f"{slots[start]} {slots[start + 1]}"
            text.append(word, style="bold cyan" if replicas[slots[start]] > 1 else "")
            text.append(" ")
        cells: list[str | Text] = [str(rank), text]
        if loads is not None:
            cells += [f"{loads[rank]:,.0f}", heat_bar(loads[rank], loads.max(), loads.mean())]
        table.add_row(*cells)
    return table


def rank_table(placement: Placement, layer_id: int, rank: int) -> Table:
    """One rank of one layer: slot, logical expert, physical id, and the other ranks that hold it."""
    ids = placement.layer(layer_id)
    local = expert_map(placement, rank)[placement.layer_ids.index(layer_id)]
    table = Table(title=f"layer {layer_id}, rank {rank}", title_justify="left", title_style="bold")
    for heading in ("local slot", "logical expert", "physical id", "also on rank"):
        table.add_column(heading, justify="right")
    for expert in np.flatnonzero(local >= 0):
        slot = int(local[expert])
        others = [str(other) for other in np.flatnonzero((ids == expert).any(axis=1)) if other != rank]
        physical = rank * placement.slots_per_rank + slot
        table.add_row(str(slot), str(expert), str(physical), " ".join(others) or "—")
    held = int((local >= 0).sum())
    table.caption = f"expert_map: {placement.num_experts} entries, {held} here, {placement.num_experts - held} are -1"
    return table


def plan_table(
    plan: Plan, before: tuple[str, float], transfers: TransferPlan | None, expert_bytes: int, lost: int
) -> Table:
    """The balancedness of a plan, and the cost of its `transfers` if any; `before` is a name and its balancedness."""
    table = Table(title="plan", title_justify="left", show_header=False, title_style="bold")

    def row(label: str, value: str, style: str = "bold") -> None:
        table.add_row(label, Text(value, style=style))

    row("balancedness before", f"{before[1]:.4f}  ({before[0]})")
    row("balancedness after", f"{plan.balancedness:.4f}", "bold green")
    row("worst layer", f"{plan.layer_balancedness.min():.4f}")
    row("bound", f"{plan.bound:.4f}")
    row("of the bound", f"{float((plan.layer_balancedness / plan.layer_bound).mean()):.2%}")
    if transfers is not None:
        slots = plan.placement.layers * plan.placement.slots
        row("moves", f"{plan.moved:,} of {slots:,} slots ({plan.moved_fraction:.1%})")
        row("bytes", f"{transfers.bytes_moved(expert_bytes) / 1e9:,.1f} GB at {expert_bytes / 1e6:g} MB an expert")
        between = transfers.bytes_between_nodes(1)
        row("between nodes", f"{between:,} moves, {between * expert_bytes / 1e9:,.1f} GB")
    if lost:
        row("to be loaded", f"{lost:,} experts whose replicas were all on failed ranks", "bold red")
    return table


def score_table(scores: list[Score], slots: int, policy: str) -> Table:
    """The windows of a replay and their mean; a long replay is cut in the middle."""
    title = Text(f"{policy}: plan on one window, score on the next")
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("window", "kept", "promised", "reached", "moved"):
        table.add_column(heading, justify="right")
    table.add_column("reached", no_wrap=True)
    shown = scores if len(scores) <= 40 else [*scores[:20], *scores[-20:]]
    for index, score in enumerate(shown):
        if index == 20 and len(shown) < len(scores):
            table.add_row("…", "…", "…", "…", "…", f"({len(scores) - len(shown)} more)")
        table.add_row(
            str(score.window), f"{score.kept:.4f}", f"{score.planned:.4f}", f"{score.reached:.4f}",
            f"{score.moved / slots:.1%}", heat_bar(score.reached, 1.0, score.reached),
        )  # fmt: skip
    mean = [
        float(np.mean([getattr(score, name) for score in scores])) for name in ("kept", "planned", "reached", "moved")
    ]
    table.add_section()
    table.add_row(
        "mean", f"{mean[0]:.4f}", f"{mean[1]:.4f}", f"{mean[2]:.4f}", f"{mean[3] / slots:.1%}", "", style="bold"
    )
    return table


def _runs(
    slots: np.ndarray[tuple[int, ...], np.dtype[np.int32]], replicas: np.ndarray[tuple[int, ...], np.dtype[np.int32]]
) -> list[tuple[int, int]]:
    """Start and end of each run of consecutive ids that are all replicated or all not."""
    hot = replicas[slots] > 1
    breaks = np.flatnonzero((np.diff(slots) != 1) | (hot[1:] != hot[:-1])) + 1
    edges = [0, *breaks.tolist(), len(slots)]
    return [(edges[i], edges[i + 1]) for i in range(len(edges) - 1)]
