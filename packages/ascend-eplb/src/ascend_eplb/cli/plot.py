# SPDX-License-Identifier: Apache-2.0
"""The optional pictures: a replay over time, and rank loads before and after. Needs `ascend-eplb[plot]`."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from ascend_eplb.formats.atomic import write_atomically
from ascend_eplb.metrics import FloatArray, balance_of
from ascend_eplb.simulate import Score

__all__ = ["check_plot", "plot_rank_loads", "plot_scores"]


def check_plot(path: Path) -> None:
    """Check, before a plan is computed, that a picture can be drawn and written.

    Raises:
        RuntimeError: matplotlib is not installed.
        OSError: the folder is missing.
    """
    _figure(1, 1)
    if not Path(os.path.realpath(path)).parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def plot_scores(scores: list[Score], path: Path) -> None:
    """Balancedness of every window, kept and reached, as a PNG."""
    figure = _figure(9, 4)
    axes = figure.add_subplot()
    windows = [score.window for score in scores]
    axes.plot(windows, [score.kept for score in scores], color="#c44", label="kept as it was")
    axes.plot(windows, [score.planned for score in scores], color="#aaa", ls="--", label="promised")
    axes.plot(windows, [score.reached for score in scores], color="#284", label="reached on the next window")
    axes.set(xlabel="window", ylabel="balancedness", ylim=(None, 1.0))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_rank_loads(before: FloatArray, after: FloatArray, path: Path) -> None:
    """Rank loads `[L, R]` before and after as two heat maps on one scale (1 = the layer's mean), as a PNG.

    A layer without load is drawn as even.
    """
    figure = _figure(10, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, loads_LR, name in zip(axes, (before, after), ("before", "after"), strict=True):
        mean_L1 = loads_LR.mean(axis=1, keepdims=True)
        part_LR = np.divide(loads_LR, mean_L1, out=np.ones_like(loads_LR), where=mean_L1 > 0)
        image = ax.imshow(part_LR, aspect="auto", cmap="coolwarm", vmin=0.0, vmax=2.0, interpolation="nearest")
        ax.set(title=f"{name}: balancedness {balance_of(loads_LR).mean():.4f}", xlabel="rank")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="rank load / mean", extend="max")
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("pictures need matplotlib: pip install 'ascend-eplb[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
