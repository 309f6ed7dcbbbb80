# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model the layers of a placement file are.

Two numberings are in use: the numbers of the decoder layers, in which the MoE layers of DeepSeek-R1 are 3 to 60, and
the positions among the MoE layers, in which they are 0 to 57. No format says which of them a file uses.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ascend_eplb.limits import MOST_SLOTS, check_limit
from ascend_eplb.placement import Placement, spread
from ascend_eplb.ranges import as_ranges

__all__ = ["LayerMatch", "Numbering", "fit_layers", "match_layers", "select_layers"]


class Numbering(enum.Enum):
    """What the layer numbers of a file count."""

    DECODER = "numbers of decoder layers"
    POSITION = "positions among the MoE layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMatch:
    """The layers of a file beside the MoE layers of a model.

    Args:
        numbering: how the file's numbers were read.
        file_layers: the file's layer numbers, ascending.
        model_layers: the decoder layer numbers of the model's MoE layers, ascending.
    """

    numbering: Numbering
    file_layers: tuple[int, ...]
    model_layers: tuple[int, ...]

    @property
    def wanted(self) -> tuple[int, ...]:
        """The number that each MoE layer of the model has in the file, if it is there."""
        return _numbers_of(self.numbering, self.model_layers)

    @property
    def lacking(self) -> tuple[int, ...]:
        """Decoder layer numbers of the MoE layers that the file lacks."""
        present = set(self.file_layers)
        return tuple(
            layer for layer, number in zip(self.model_layers, self.wanted, strict=True) if number not in present
        )

    @property
    def unused(self) -> tuple[int, ...]:
        """Layers of the file that the model lacks, as the file numbers them."""
        wanted = set(self.wanted)
        return tuple(number for number in self.file_layers if number not in wanted)

    def __str__(self) -> str:
        """One line: how the file was read, and what file and model lack of each other."""
        model = f" {as_ranges(self.model_layers)}" if self.numbering is Numbering.POSITION else ""
        parts = [f"its layer numbers {as_ranges(self.file_layers)} are read as {self.numbering.value}{model}"]
        if self.unused:
            parts.append(f"its layers {as_ranges(self.unused)} are not in the model and are not used")
        if self.lacking:
            parts.append(
                f"it lacks decoder layers {as_ranges(self.lacking)} of the model, which take the default placement"
            )
        return "; ".join(parts)


def match_layers(file_layers: Sequence[int], model_layers: Sequence[int], *, usual: Numbering) -> LayerMatch:
    """Read a file's layer numbers as decoder layers or as positions, whichever fits the model's MoE layers.

    A reading fits where file and model have the same layers, where the file has more (of drafts, for example), or where
    it has fewer; in this order of preference. Where both readings fit equally well, a file without a layer 0 is taken to
    have decoder layer numbers, because positions begin at 0; any other file is read as files of its format usually are.

    Args:
        file_layers: the layer numbers of the file, ascending.
        model_layers: the decoder layer numbers of the model's MoE layers, ascending.
        usual: the numbering of the file's format, from `usual_numbering`.

    Raises:
        ValueError: neither reading fits, or a model without MoE layers; names the layers of both.

    Complexity: O(L).

    Source: this project.
    """
    found = tuple(file_layers)
    model = tuple(model_layers)
    if not model:
        raise ValueError(
            f"its layers {as_ranges(found)} are layers of no model: none of the model's layers is a MoE layer"
        )
    fits = {numbering: _fit(set(found), set(_numbers_of(numbering, model))) for numbering in Numbering}
    best = max(fits.values())
    if not best:
        positions = as_ranges(range(len(model)))
        raise ValueError(
            f"its layers {as_ranges(found)} are neither among the model's MoE layers, which are decoder layers "
            f"{as_ranges(model)}, nor among their positions {positions}, and do not include all of either"
        )
    fitting = [numbering for numbering, fit in fits.items() if fit == best]
    if len(fitting) > 1:
        fitting = [usual if 0 in found else Numbering.DECODER]
    return LayerMatch(numbering=fitting[0], file_layers=found, model_layers=model)


def fit_layers(placement: Placement, model_layers: Sequence[int], *, usual: Numbering) -> tuple[Placement, LayerMatch]:
    """The placement of a model's MoE layers, numbered as decoder layers, from that of a file.

    Layers that the file lacks get the default placement, `spread`.

    Args:
        placement: the file's, as `load_placement` returns it.
        model_layers: the decoder layer numbers of the model's MoE layers, ascending.
        usual: as for `match_layers`.

    Returns:
        The placement, and how the file was read.

    Raises:
        ValueError: as `match_layers`, or more layers than a placement may have.

    Complexity: O(L * S).

    Source: this project.
    """
    _check_count(placement, f"{len(model_layers)} MoE layers", len(model_layers))
    match = match_layers(placement.layer_ids, model_layers, usual=usual)
    return _pick(placement, match.wanted, tuple(model_layers)), match


def select_layers(placement: Placement, layers: int | Sequence[int]) -> Placement:
    """The layers with these numbers; those that the placement lacks are `spread`, with a notice in the log.

    Args:
        placement: any.
        layers: ascending numbers, or how many (0..layers-1).

    Raises:
        ValueError: `layers` is empty, not ascending, or more than a placement may have.

    Complexity: O(L * S).

    Source: this project; draft layers (MTP) come after the model's own.
    """
    count = layers if isinstance(layers, int) else len(layers)
    given = f"layers={layers}" if isinstance(layers, int) else f"{count} layers"
    if count < 1:
        raise ValueError(f"{given} must be at least one layer")
    _check_count(placement, given, count)
    wanted = tuple(range(count)) if isinstance(layers, int) else tuple(layers)
    present = set(placement.layer_ids)
    missing = [layer for layer in wanted if layer not in present]
    unused = sorted(present.difference(wanted))
    if missing:
        logging.getLogger("ascend_eplb").warning(
            "The placement lacks layers %s, which take the default placement (spread)%s.",
            as_ranges(missing), f"; its layers {as_ranges(unused)} are left out" if unused else "",
        )  # fmt: skip
    return _pick(placement, wanted, wanted)


def _check_count(placement: Placement, given: str, count: int) -> None:
    check_limit(given, count * placement.slots, MOST_SLOTS, f"slots over all layers, at {placement.slots} a layer,")


def _pick(placement: Placement, numbers: tuple[int, ...], layer_ids: tuple[int, ...]) -> Placement:
    """The layers with these numbers under other ones; `spread` for those that are not there."""
    default = spread(num_experts=placement.num_experts, ranks=placement.ranks, redundant=placement.redundant)
    row = {layer: index for index, layer in enumerate(placement.layer_ids)}
    ids = [
        placement.physical_to_logical[row[number]] if number in row else default.physical_to_logical[0]
        for number in numbers
    ]
    return Placement(np.stack(ids), placement.num_experts, layer_ids)


def _numbers_of(numbering: Numbering, model_layers: tuple[int, ...]) -> tuple[int, ...]:
    return model_layers if numbering is Numbering.DECODER else tuple(range(len(model_layers)))


def _fit(found: set[int], wanted: set[int]) -> int:
    """3: the same layers; 2: the file has more; 1: the file has fewer; 0: no fit."""
    if found == wanted:
        return 3
    return 2 if found > wanted else 1 if found < wanted else 0
