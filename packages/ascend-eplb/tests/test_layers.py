# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model the layers of a file are."""

import re

import numpy as np
import pytest

import ascend_eplb as eplb
from ascend_eplb import Numbering, Placement
from ascend_eplb.ranges import as_ranges, parse_ranges

R1 = tuple(range(3, 61))  # the MoE layers of DeepSeek-R1; layer 61 is its draft
EVERY_OTHER = (0, 2, 4, 6)
DECODER, POSITION = Numbering.DECODER, Numbering.POSITION


@pytest.mark.parametrize(
    ("file", "model", "read_as", "lacking", "unused"),
    [
        (range(58), R1, POSITION, "", ""),
        (range(3, 61), R1, DECODER, "", ""),
        (range(3, 62), R1, DECODER, "", "61"),  # with the draft
        (range(59), R1, POSITION, "", "58"),
        (range(50), R1, POSITION, "53-60", ""),
        (range(40, 61), R1, DECODER, "3-39", ""),
        (range(58, 61), R1, DECODER, "3-57", ""),
        ((0, 1, 2, 3), EVERY_OTHER, POSITION, "", ""),
        ((0, 2, 4, 6), EVERY_OTHER, DECODER, "", ""),
        ((0, 2, 4, 6, 8), EVERY_OTHER, DECODER, "", "8"),
        ((4, 6), EVERY_OTHER, DECODER, "0, 2", ""),
        (range(4), range(4), None, "", ""),  # both are the same
        # Both readings fit equally: as the format usually is, and as decoder layers where there is no layer 0.
        (range(61), R1, None, "", {DECODER: "0-2", POSITION: "58-60"}),
        ((0, 2), EVERY_OTHER, None, {DECODER: "4, 6", POSITION: "2, 6"}, ""),
        (range(3, 50), R1, DECODER, "50-60", ""),
        ((2,), EVERY_OTHER, DECODER, "0, 4, 6", ""),
    ],
)
@pytest.mark.parametrize("usual", list(Numbering))
def test_how_layer_numbers_are_read(file, model, read_as, lacking, unused, usual):
    match = eplb.match_layers(tuple(file), tuple(model), usual=usual)
    read_as = read_as or usual
    assert match.numbering is read_as
    assert as_ranges(match.lacking) == (lacking[read_as] if isinstance(lacking, dict) else lacking)
    assert as_ranges(match.unused) == (unused[read_as] if isinstance(unused, dict) else unused)


@pytest.mark.parametrize(
    ("file", "model", "words"),
    [
        (
            range(5, 63),
            R1,
            "its layers 5-62 are neither among the model's MoE layers, which are decoder layers 3-60, nor",
        ),
        ((100,), R1, "its layers 100 are neither"),
        ((0, 1, 5), EVERY_OTHER, "nor among their positions 0-3, and do not include all of either"),
        ((0,), (), "none of the model's layers is a MoE layer"),
    ],
)
def test_layers_that_fit_neither_reading_are_refused(file, model, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        eplb.match_layers(tuple(file), tuple(model), usual=POSITION)


def different_layers(layer_ids):
    """A placement no layer of which is like another or like the default."""
    base = eplb.spread(num_experts=8, ranks=2, redundant=2, layers=len(layer_ids)).physical_to_logical
    generator = np.random.default_rng(0)
    return Placement(np.stack([generator.permutation(8)[layer] for layer in base]), 8, tuple(layer_ids))


@pytest.mark.parametrize("first", [0, 3])
def test_every_layer_is_found(first):
    file = different_layers(range(first, first + 58))
    fitted, match = eplb.fit_layers(file, R1, usual=POSITION)
    assert fitted.layer_ids == R1
    assert np.array_equal(fitted.physical_to_logical, file.physical_to_logical)
    assert not match.lacking
    assert not match.unused


def test_layers_that_the_file_lacks_are_spread_and_named():
    file = different_layers((2, 6, 7))
    fitted, match = eplb.fit_layers(file, (2, 6), usual=DECODER)
    assert np.array_equal(fitted.physical_to_logical, file.physical_to_logical[:2])
    assert (
        str(match)
        == "its layer numbers 2, 6-7 are read as numbers of decoder layers; its layers 7 are not in the model and are not used"
    )
    fitted, match = eplb.fit_layers(different_layers((2, 6)), EVERY_OTHER, usual=DECODER)
    default = eplb.spread(num_experts=8, ranks=2, redundant=2)
    assert np.array_equal(fitted.layer(0), default.layer(0))
    assert np.array_equal(fitted.layer(6), different_layers((2, 6)).layer(6))
    assert str(match).endswith("it lacks decoder layers 0, 4 of the model, which take the default placement")


@pytest.mark.parametrize(
    ("name", "usual"),
    [("a.json", POSITION), ("a.npz", POSITION), ("a.npy", POSITION), ("a.yaml", DECODER), ("a.YML", DECODER)],
)
def test_how_formats_number_layers(name, usual):
    assert eplb.usual_numbering(name) is usual


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("3-60", range(3, 61)), ("5", [5]), ("0-2, 5, 7-8", [0, 1, 2, 5, 7, 8]), ("4,2,2-3", [2, 3, 4])],
)
def test_ranges(text, numbers):
    assert parse_ranges(text) == tuple(numbers)
    assert parse_ranges(as_ranges(numbers)) == tuple(numbers)


def test_many_ranges_are_cut_in_the_middle():
    assert as_ranges(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, ..., 38"


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "5-3", "1,,2", "1.5", "9" * 5000])
def test_other_texts_are_no_ranges(text):
    with pytest.raises(ValueError, match="must be whole numbers and ranges of them, as 3-60 or 1,3,5"):
        parse_ranges(text)


def test_a_range_of_absurd_length_is_not_counted_out():
    with pytest.raises(ValueError, match="10000000000 numbers are more than the 4194304 allowed"):
        parse_ranges("0-9999999999")
