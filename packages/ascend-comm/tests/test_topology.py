# SPDX-License-Identifier: Apache-2.0
"""Layouts: the worked vectors, a naive oracle by coordinates, vLLM's formula, and every size rule."""

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Hashable
from types import SimpleNamespace

import numpy as np
import pytest
from ascend_comm.topology import Coordinates, Groups, Topology, group_of
from hypothesis import given, settings
from hypothesis import strategies as st

TP_8 = Topology(8, tensor_parallel=8)
DP_2_PP_2_TP_4 = Topology(16, data_parallel=2, pipeline_parallel=2, tensor_parallel=4)


def consecutive(*blocks):
    return [list(range(first, last + 1)) for first, last in blocks]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (DP_2_PP_2_TP_4.expert_parallel(), [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]),
        (Topology(4, data_parallel=4).fine_grained(2), [[0, 1], [2, 3]]),
        (Topology(8, data_parallel=4, tensor_parallel=2).fine_grained(2), [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (DP_2_PP_2_TP_4.fine_grained(2), [[i, i + 8] for i in range(8)]),
        (Topology(16, tensor_parallel=16).flashcomm2(2)[0], [[i, i + 8] for i in range(8)]),
        (Topology(16, tensor_parallel=16).flashcomm2(2)[1], consecutive((0, 7), (8, 15))),
        (TP_8.flashcomm2(4)[0], [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (TP_8.flashcomm2(4)[1], [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (TP_8.flashcomm2(1)[0], []),
        (TP_8.flashcomm2(1)[1], consecutive((0, 7))),
        (TP_8.shard_weight(), consecutive((0, 7))),
        (Topology(8, data_parallel=2, tensor_parallel=4).shard_weight(4), [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (TP_8.shard_weight(2), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (DP_2_PP_2_TP_4.shard_weight(2)[:2], [[0, 1, 8, 9], [2, 3, 10, 11]]),
        (DP_2_PP_2_TP_4.shard_weight(2)[2:], [[4, 5, 12, 13], [6, 7, 14, 15]]),
        (TP_8.prefill_tp(4), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (TP_8.prefill_tp(4, head_replicas=2), [[0, 2], [4, 6], [1, 3], [5, 7]]),
        (Topology(16, tensor_parallel=16).flashcomm2_token_order(2), [[i, i + 8] for i in range(8)]),
        (TP_8.flashcomm2_token_order(1), [[i] for i in range(8)]),
    ],
)
def test_groups_worked_out_by_hand(groups, expected):
    assert groups == expected


@st.composite
def topologies(draw):
    size = st.sampled_from([1, 2, 3, 4])
    xdp, dp, pp, pcp = (draw(size) for _ in range(4))
    tp = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    return Topology(xdp * dp * pp * pcp * tp, dp, pp, pcp, tp)


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


def rank_array(top: Topology):
    """Facts: R = arange(W).reshape(-1, DP, PP, PCP, TP)."""
    return np.arange(top.world_size).reshape(
        -1, top.data_parallel, top.pipeline_parallel, top.prefill_context_parallel, top.tensor_parallel
    )


def together(top: Topology, key: Callable[..., Hashable]) -> set[tuple[int, ...]]:
    """The naive oracle: ranks whose coordinates (x, d, p, c, t) have the same key form a group."""
    found = defaultdict(list)
    for where, rank in np.ndenumerate(rank_array(top)):
        found[key(*where)].append(int(rank))
    return {tuple(ranks) for ranks in found.values()}


def as_set(groups: Groups) -> set[tuple[int, ...]]:
    assert all(type(rank) is int for ranks in groups for rank in ranks)
    assert len({tuple(ranks) for ranks in groups}) == len(groups)
    return {tuple(ranks) for ranks in groups}


def every_family(top: Topology, data) -> dict[str, tuple[Groups, set[tuple[int, ...]]]]:
    """Each family with random arguments, beside the oracle's."""
    tp = top.tensor_parallel
    k = data.draw(st.sampled_from(divisors(top.data_parallel)), label="k")
    shards = data.draw(st.sampled_from(divisors(tp)), label="shards")
    block = tp // shards
    found = {
        "tp": (top.tensor_parallel_groups(), together(top, lambda x, d, p, c, t: (x, d, p, c))),
        "pcp": (top.prefill_context_parallel_groups(), together(top, lambda x, d, p, c, t: (x, d, p, t))),
        "dp": (top.data_parallel_groups(), together(top, lambda x, d, p, c, t: (x, p, c, t))),
        "ep": (top.expert_parallel(), together(top, lambda x, d, p, c, t: (x, p))),
        "fine": (top.fine_grained(k), together(top, lambda x, d, p, c, t: (x, d // k, p, c, t))),
        "shard": (top.shard_weight(shards), together(top, lambda x, d, p, c, t: (x, p, t // block))),
    }
    if tp > 1:
        fc = data.draw(st.sampled_from(divisors(tp)[:-1]), label="flashcomm2")
        g = tp // fc
        otp, odp = top.flashcomm2(fc)
        found["odp"] = (odp, together(top, lambda x, d, p, c, t: (x, d, p, c, t // g)))
        if fc > 1:
            found["otp"] = (otp, together(top, lambda x, d, p, c, t: (x, d, p, c, t % g)))
    ratio = data.draw(st.sampled_from(divisors(tp)), label="ratio")
    replicas = data.draw(st.sampled_from(divisors(ratio)), label="replicas")
    found["p_tp"] = (top.prefill_tp(ratio, replicas), prefill_oracle(top, ratio, replicas))
    return found


def prefill_oracle(top: Topology, ratio: int, replicas: int) -> set[tuple[int, ...]]:
    """Facts: view as [heads, replica], transpose, chunk by heads // (TP // ratio)."""
    heads = top.tensor_parallel // replicas
    chunk = heads // (top.tensor_parallel // ratio)
    found = set()
    for ranks in rank_array(top).reshape(-1, top.tensor_parallel):
        for part in ranks.reshape(heads, replicas).T.reshape(-1, chunk):
            found.add(tuple(part.tolist()))
    return found


@given(topologies(), st.data())
@settings(deadline=None, max_examples=60)
def test_families_partition_the_world_within_a_stage(top, data):
    for name, (groups, expected) in every_family(top, data).items():
        assert as_set(groups) == expected, name
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(top.world_size)), name
        assert all(ranks == sorted(ranks) for ranks in groups), name
        for ranks in groups:
            places = [top.coordinates(rank) for rank in ranks]
            assert len({(place.external_data, place.pipeline) for place in places}) == 1, name
    stages = top.pipeline_parallel_groups()
    assert as_set(stages) == together(top, lambda x, d, p, c, t: (x, d, c, t))
    assert [top.coordinates(rank).pipeline for rank in stages[0]] == list(range(top.pipeline_parallel))


@given(topologies())
@settings(deadline=None, max_examples=60)
def test_token_order_of_flashcomm2_sends_every_chunk_to_its_owner(top):
    for k in divisors(top.tensor_parallel)[:-1]:
        order = top.flashcomm2_token_order(k)
        block = top.tensor_parallel // k
        otp, odp = top.flashcomm2(k)
        assert np.array_equal(order, np.arange(top.tensor_parallel).reshape(k, block).T)
        # Row i lands on the i-th peer of an ODP block; its column j ends with the j-th rank of that peer's OTP group.
        for i, peer in enumerate(odp[0]):
            holders = group_of(otp, peer) if otp else [peer]
            assert order[i] == [top.coordinates(rank).tensor for rank in holders]


def by_vllm_formula(top: Topology) -> dict[str, list[list[int]]]:
    """The reshapes of vllm/distributed/parallel_state.py, initialize_model_parallel (0.32.0), said again in numpy."""
    ranks = rank_array(top)
    pcp, ep = top.prefill_context_parallel, top.data_parallel * top.prefill_context_parallel * top.tensor_parallel
    return {
        "tp": ranks.reshape(-1, top.tensor_parallel).tolist(),
        "pcp": ranks.swapaxes(3, 4).reshape(-1, pcp).tolist(),
        "pp": ranks.swapaxes(2, 4).reshape(-1, top.pipeline_parallel).tolist(),
        "dp": ranks.swapaxes(1, 4).reshape(-1, top.data_parallel).tolist(),
        "ep": ranks.swapaxes(1, 2).reshape(-1, ep).tolist(),
    }


def by_vllm_itself(top: Topology) -> dict[str, list[list[int]]]:
    """The lists that vLLM's initialize_model_parallel hands to init_model_parallel_group."""
    import torch
    from vllm.distributed import parallel_state

    parallel = SimpleNamespace(
        data_parallel_size=top.data_parallel, enable_elastic_ep=False, use_all2all=False, enable_eplb=False
    )
    config = SimpleNamespace(parallel_config=parallel, model_config=None, engram_config=None)
    found: dict[str, list[list[int]]] = {}

    def record(group_ranks, *_args, group_name, **_kwargs):
        found[group_name] = group_ranks
        return SimpleNamespace(rank_in_group=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: top.world_size)
        patch.setattr(torch.distributed, "get_rank", lambda: 0)
        patch.setattr("vllm.config.get_current_vllm_config", lambda: config)
        patch.setattr(parallel_state, "get_world_group", lambda: SimpleNamespace(local_rank=0, device_group=None))
        patch.setattr(parallel_state, "init_model_parallel_group", record)
        for name in ("_TP", "_ETP", "_ENGRAM_DP", "_DCP", "_PCP", "_PP", "_DP", "_EP", "_EPLB"):
            patch.setattr(parallel_state, name, None)
        parallel_state.initialize_model_parallel(
            top.tensor_parallel, top.pipeline_parallel, top.prefill_context_parallel, 1, "gloo"
        )
    return found


SOURCES = [by_vllm_formula]
if importlib.util.find_spec("vllm"):
    SOURCES.append(pytest.param(by_vllm_itself, marks=pytest.mark.filterwarnings("default")))


@pytest.mark.parametrize("source", SOURCES)
@given(top=topologies())
@settings(deadline=None, max_examples=60)
def test_vllm_makes_the_same_groups(source, top):
    theirs = source(top)
    ours = {
        "tp": top.tensor_parallel_groups(),
        "pcp": top.prefill_context_parallel_groups(),
        "pp": top.pipeline_parallel_groups(),
        "dp": top.data_parallel_groups(),
        "ep": top.expert_parallel(),
    }
    for name, groups in ours.items():
        assert sorted(groups) == sorted(theirs[name]), name


@given(topologies(), st.data())
@settings(deadline=None, max_examples=40)
def test_coordinates_and_global_ranks_are_positions_in_the_rank_array(top, data):
    rank = data.draw(st.integers(0, top.world_size - 1))
    where = [int(axis[0]) for axis in np.nonzero(rank_array(top) == rank)]
    assert top.coordinates(rank) == Coordinates(
        external_data=where[0], data=where[1], pipeline=where[2], prefill_context=where[3], tensor=where[4]
    )
    replica = rank // top.replica_size
    assert top.global_rank(replica, rank % top.replica_size) == rank
    assert top.global_rank(replica, rank) == rank


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Topology(0), "world_size=0: must be at least 1"),
        (lambda: Topology(4, tensor_parallel=0), "tensor_parallel=0"),
        (lambda: Topology(4, pipeline_parallel=-1), "pipeline_parallel=-1"),
        (
            lambda: Topology(12, 2, 2, 1, 2),
            "world_size=12: must be a multiple of 8, the product of data_parallel=2, pipeline_parallel=2",
        ),
        (lambda: Topology(4, data_parallel=4).fine_grained(3), r"k=3: .*data_parallel=4.*\[1, 2, 4\]"),
        (lambda: Topology(4, data_parallel=4).fine_grained(0), "k=0: must be at least 1"),
        (lambda: TP_8.flashcomm2(3), r"k=3: .*tensor_parallel=8.*\[1, 2, 4\]"),
        (lambda: TP_8.flashcomm2(8), r"k=8: .*\[1, 2, 4\]"),
        (lambda: TP_8.flashcomm2(0), "k=0: must be at least 1"),
        (lambda: Topology(2).flashcomm2(1), "k=1: needs tensor_parallel=1 to be larger than 1"),
        (lambda: TP_8.flashcomm2_token_order(16), r"k=16: .*\[1, 2, 4\]"),
        (lambda: TP_8.shard_weight(3), r"shards=3: must divide tensor_parallel=8.*\[1, 2, 4, 8\]"),
        (lambda: TP_8.prefill_tp(3), r"ratio=3: must divide tensor_parallel=8"),
        (lambda: TP_8.prefill_tp(4, 8), r"head_replicas=8: must divide ratio=4.*\[1, 2, 4\]"),
        (lambda: TP_8.coordinates(8), "rank=8: must be 0 to 7"),
        (lambda: TP_8.coordinates(-1), "rank=-1: must be 0 to 7"),
        (lambda: TP_8.global_rank(1, 0), "data_parallel_index=1: must be 0 to 0"),
        (lambda: TP_8.global_rank(0, -1), "rank=-1"),
        (lambda: group_of([[0, 1], [2, 3]], 4), "rank=4 is in none of the 2 groups"),
    ],
)
def test_size_rules(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [2.0, "2", True, None])
def test_sizes_are_ints(value):
    with pytest.raises(TypeError, match="tensor_parallel must be an int"):
        Topology(8, tensor_parallel=value)


def test_group_of_finds_by_global_rank():
    assert group_of(DP_2_PP_2_TP_4.expert_parallel(), 13) == [4, 5, 6, 7, 12, 13, 14, 15]
