# SPDX-License-Identifier: Apache-2.0
"""The choice of method against the table of its documentation, over all combinations of sizes around its limits."""

from dataclasses import replace
from itertools import product

import pytest

from ascend_moe import CommMethod, DispatchConfig, Soc, choose_method, mc2_buffer_bytes

GATHER, ALL_TO_ALL, MC2 = CommMethod.ALL_GATHER, CommMethod.ALL_TO_ALL_V, CommMethod.MC2
BASE = DispatchConfig(
    soc=Soc.A3, ep_size=16, tp_size=4, world_size=16, experts_per_rank=16, top_k=8, max_captured_tokens=256
)

# (soc, EP, experts a rank, world, top k, tokens against the capacity of 256) -> method, each row by hand
TABLE = [
    ("A2", 1, 8, 16, 8, 1, GATHER),
    ("A3", 1, 8, 16, 8, 1, GATHER),
    ("A5", 1, 8, 16, 8, 1, GATHER),
    ("A5", 1, 8, 1, 8, 257, GATHER),
    ("310P", 1, 8, 16, 8, 1, GATHER),
    ("310P", 16, 8, 16, 8, 1, GATHER),
    ("310P", 16, 8, 16, 8, 257, GATHER),
    ("A2", 16, 24, 16, 8, 256, MC2),
    ("A2", 16, 24, 16, 8, 257, GATHER),
    ("A2", 16, 25, 16, 8, 256, GATHER),
    ("A2", 8, 24, 16, 8, 256, GATHER),
    ("A2", 32, 1, 32, 8, 0, MC2),
    ("A3", 2, 128, 2, 8, 256, MC2),
    ("A3", 2, 128, 2, 8, 257, ALL_TO_ALL),
    ("A3", 16, 16, 16, 16, 257, ALL_TO_ALL),
    ("A5", 2, 128, 2, 8, 256, MC2),
    ("A5", 8, 16, 8, 8, 256, MC2),
    ("A5", 8, 16, 8, 8, 257, GATHER),
    ("A5", 8, 16, 8, 7, 257, ALL_TO_ALL),
    ("A5", 8, 16, 16, 8, 257, ALL_TO_ALL),
]


@pytest.mark.parametrize(("soc", "ep", "experts", "world", "top_k", "tokens", "method"), TABLE)
def test_rows_of_the_table(soc, ep, experts, world, top_k, tokens, method):
    config = DispatchConfig(
        soc=Soc(soc),
        ep_size=ep,
        tp_size=1,
        world_size=world,
        experts_per_rank=experts,
        top_k=top_k,
        max_captured_tokens=256,
    )
    assert choose_method(config, tokens) is method


def by_the_table(soc, ep, experts, world, top_k, within):
    """The documented table, each method of a chip as one condition."""
    mc2 = ep > 1 and within
    mc2 = mc2 and {"A2": experts <= 24 and ep >= 16, "A3": True, "A5": world > 1, "310P": False}[soc]
    exchange = ep > 1 and not within and {"A2": False, "A3": True, "A5": world > top_k, "310P": False}[soc]
    return MC2 if mc2 else ALL_TO_ALL if exchange else GATHER


def test_every_combination_around_the_limits():
    sizes = product(Soc, (1, 2, 8, 16, 32), (1, 2), (1, 8, 23, 24, 25), (1, 2, 8, 16, 64), (1, 2, 4))
    seen = set()
    for soc, ep, replicas, experts, top_k, tp in sizes:
        world = max(ep * replicas, tp)
        config = DispatchConfig(
            soc=soc,
            ep_size=ep,
            tp_size=tp,
            world_size=world,
            experts_per_rank=experts,
            top_k=top_k,
            max_captured_tokens=101,
        )
        capacity = {1: 101, 2: 102, 4: 104}[tp]
        for tokens in (0, 1, capacity - 1, capacity, capacity + 1, 10 * capacity):
            want = by_the_table(soc.value, ep, experts, world, top_k, tokens <= capacity)
            assert choose_method(config, tokens) is want, (config, tokens)
            seen.add((soc, want))
    # All that a chip can be given, and nothing else.
    assert seen == {
        (Soc.A2, GATHER),
        (Soc.A2, MC2),
        (Soc.P310, GATHER),
        *((Soc.A3, method) for method in CommMethod),
        *((Soc.A5, method) for method in CommMethod),
    }


@pytest.mark.parametrize(
    ("captured", "tp", "capacity"),
    [(0, 1, 0), (1, 1, 1), (1, 4, 4), (256, 4, 256), (257, 4, 260), (512, 1, 512), (513, 1, 512), (4096, 4, 2048)],
)
def test_capacity(captured, tp, capacity):
    assert replace(BASE, tp_size=tp, max_captured_tokens=captured).mc2_capacity == capacity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"soc": "A3"}, "soc='A3' must be one of"),
        ({"ep_size": 0}, "ep_size=0 must be at least 1"),
        ({"tp_size": 0}, "tp_size=0 must be at least 1"),
        ({"world_size": -16}, "world_size=-16 must be at least 1"),
        ({"experts_per_rank": 0}, "experts_per_rank=0 must be at least 1"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"max_captured_tokens": -1}, "max_captured_tokens=-1 must be at least 0"),
        ({"ep_size": 3}, "ep_size=3 must divide world_size=16"),
        ({"ep_size": 32}, "ep_size=32 must divide world_size=16"),
        ({"tp_size": 5}, "tp_size=5 must divide world_size=16"),
    ],
)
def test_a_config_says_what_is_wrong_with_it(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **change)


def test_tokens_cannot_be_negative():
    with pytest.raises(ValueError, match="tokens=-1 must be at least 0"):
        choose_method(BASE, -1)


@pytest.mark.parametrize(
    ("name", "soc"),
    [("Ascend910B3", Soc.A2), ("Ascend910B2C", Soc.A2), ("Ascend910_9391", Soc.A3), ("Ascend950PR_9589", Soc.A5), ("Ascend310P3", Soc.P310)],
)  # fmt: skip
def test_the_family_of_a_device(name, soc):
    assert Soc.of(name) is soc


def test_an_unknown_device_is_named():
    with pytest.raises(
        ValueError,
        match="device_name='Ascend910A' is of no known family: it must start with one of Ascend910B, Ascend910_93",
    ):
        Soc.of("Ascend910A")


def test_mc2_buffer_of_deepseek_v3():
    """Worked by hand: H 7168, 256 experts on 32 ranks, 128 tokens a rank: rows of 14848 bytes there, 14336 back, both twice."""
    config = DispatchConfig(
        soc=Soc.A3, ep_size=32, tp_size=1, world_size=32, experts_per_rank=8, top_k=8, max_captured_tokens=128
    )
    assert mc2_buffer_bytes(config, 7168) == 2 * 128 * (8 * 32 * 14848 + 8 * 14336)
    assert mc2_buffer_bytes(config, 7168, tokens=1) == 2 * (8 * 32 * 14848 + 8 * 14336)
