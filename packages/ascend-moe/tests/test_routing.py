# SPDX-License-Identifier: Apache-2.0
"""Routing against an oracle that goes token by token in Python floats, written from the formulas."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_bounds import gamma, routing_steps
from torch._subclasses.fake_tensor import FakeTensorMode

from ascend_moe import RoutingSpec, Scoring, select_experts, to_physical

PLAIN = RoutingSpec(top_k=2, scoring="softmax", renormalise=False)
V3 = RoutingSpec(
    top_k=3, scoring="sigmoid", renormalise=True, groups=4, top_groups=2, group_score="top2_sum", bias=True
)


@dataclass(frozen=True)
class Routed:
    """One token. `margin` is how far the closest decision was from going the other way."""

    weights: list[float]
    ids: list[int]
    margin: float


def scores_of(logits: list[float], scoring: str) -> list[float]:
    if scoring == "softmax":
        top = max(logits)
        powers = [math.exp(value - top) for value in logits]
        return [power / sum(powers) for power in powers]
    if scoring == "sigmoid":
        return [1 / (1 + math.exp(-value)) for value in logits]
    return [math.sqrt(math.log1p(math.exp(value))) for value in logits]


def best(values: dict[int, float], count: int) -> tuple[list[int], float]:
    """The keys of the `count` largest values, in falling order, and the gap to the next one."""
    order = sorted(values, key=lambda key: -values[key])
    gaps = [values[a] - values[b] for a, b in pairwise(order[: count + 1])]
    return order[:count], min(gaps, default=math.inf)


def group_scores(choice: list[float], spec: RoutingSpec) -> dict[int, float]:
    size = len(choice) // spec.groups
    best_of = 2 if spec.group_score == "top2_sum" else 1
    members = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(spec.groups)]
    return {g: sum(members[g][:best_of]) for g in range(spec.groups)}


def route(logits: list[float], spec: RoutingSpec, bias: list[float] | None) -> Routed:
    scores = scores_of(logits, spec.scoring)
    choice = [score + (bias[e] if bias else 0.0) for e, score in enumerate(scores)]
    allowed = dict(enumerate(choice))
    margin = math.inf
    if spec.top_groups < spec.groups:
        opened, margin = best(group_scores(choice, spec), spec.top_groups)
        allowed = {e: value for e, value in allowed.items() if e // (len(choice) // spec.groups) in opened}
    ids, gap = best(allowed, spec.top_k)
    weights = [scores[e] for e in ids]
    if spec.renormalise:
        total = sum(weights) + 1e-20
        weights = [weight / total for weight in weights]
    weights = [weight * spec.routed_scaling_factor for weight in weights]
    return Routed(weights=weights, ids=ids, margin=min(margin, gap))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def cases(draw):
    """A spec, logits [T, E] and a bias: any shape that fits, including one expert, no token and top k = all."""
    groups = draw(st.integers(1, 5))
    per_group = draw(st.integers(1, 6))
    top_groups = draw(st.integers(1, groups))
    spec = RoutingSpec(
        top_k=draw(st.integers(1, per_group * top_groups)),
        scoring=draw(st.sampled_from(get_args(Scoring))),
        renormalise=draw(st.booleans()),
        groups=groups,
        top_groups=top_groups,
        group_score=draw(st.sampled_from(["max", "top2_sum"] if per_group > 1 else ["max"])),
        bias=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5, 0.1])),
    )
    seed = draw(st.integers(0, 2**31))
    experts = groups * per_group
    logits = normal(draw(st.integers(0, 9)), experts, seed=seed) * draw(st.sampled_from([0.3, 3.0]))
    return spec, logits, normal(experts, seed=seed + 1) if spec.bias else None


def compare(spec, logits, bias):
    """Compare with the oracle and return how many rows were clear: rounding may decide the others either way."""
    weights, ids = select_experts(logits, spec, bias)
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32
    assert weights.shape == ids.shape == (logits.shape[0], spec.top_k)
    clear = 0
    for row, row_weights, row_ids in zip(logits.tolist(), weights.tolist(), ids.tolist(), strict=True):
        want = route(row, spec, None if bias is None else bias.tolist())
        assert len(set(row_ids)) == spec.top_k
        if want.margin > least_margin(row, spec, bias):
            clear += 1
            assert row_ids == want.ids
            assert row_weights == pytest.approx(want.weights, rel=weight_error(row, spec))
    return clear


def score_error(row: list[float]) -> float:
    """The relative error of a score in float32."""
    return gamma(routing_steps(len(row), max(row) - min(row))).item()


def weight_error(row: list[float], spec: RoutingSpec) -> float:
    """The relative error of a weight: a score, divided by the sum of K and scaled."""
    return 2 * score_error(row) + gamma(spec.top_k + 4).item()


def least_margin(row: list[float], spec: RoutingSpec, bias: torch.Tensor | None) -> float:
    """What float32 cannot decide: two biased scores, or sums of two of them, each with its error."""
    score = max(scores_of(row, spec.scoring))
    biased = score + (0.0 if bias is None else bias.abs().max().item())
    return 4 * (score * score_error(row) + gamma(2).item() * biased)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_the_oracle_on_any_shape(case):
    compare(*case)


@pytest.mark.parametrize("scoring", get_args(Scoring))
@pytest.mark.parametrize("group_score", [None, "max", "top2_sum"])
def test_equals_the_oracle_at_size(scoring, group_score):
    groups = {} if group_score is None else {"groups": 8, "top_groups": 4, "group_score": group_score}
    spec = RoutingSpec(top_k=8, scoring=scoring, renormalise=True, bias=True, routed_scaling_factor=2.5, **groups)
    assert compare(spec, normal(40, 64), normal(64, seed=1)) > 36


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31), st.data())
def test_ties_take_experts_that_are_as_good(experts, seed, data):
    """Which of equal experts are taken is torch's choice; how good they are is not."""
    top_k = data.draw(st.integers(1, experts))
    logits = normal(6, experts, seed=seed).round()
    weights, ids = select_experts(logits, replace(PLAIN, top_k=top_k))
    assert all(len(set(row)) == top_k for row in ids.tolist())
    best_first = logits.softmax(dim=-1).sort(dim=-1, descending=True).values
    assert torch.equal(weights, best_first[:, :top_k])


def test_the_bias_steers_the_choice_and_not_the_weights():
    spec = replace(PLAIN, scoring="sigmoid", bias=True)
    weights, ids = select_experts(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), spec, torch.tensor([0.0, -9.0, 0.0, 9.0]))
    assert ids.tolist() == [[3, 0]]
    exact = [1 / (1 + math.e), 1 / (1 + math.exp(-2))]
    assert weights.tolist()[0] == pytest.approx(exact, rel=gamma(routing_steps(4, 0)).item())


def test_closed_groups_stay_closed_where_biased_scores_are_negative():
    """With 0.0 in place of -inf, experts of the closed group would win."""
    spec = replace(V3, top_k=2, groups=2, top_groups=1)
    _, ids = select_experts(torch.zeros(1, 4), spec, torch.tensor([-3.0, -2.0, -9.0, -9.0]))
    assert ids.tolist() == [[1, 0]]


def test_groups_compete_by_their_own_rule():
    logits = torch.tensor([[0.9, 0.0, 0.6, 0.6]]).logit(1e-6)
    spec = RoutingSpec(top_k=1, scoring="sigmoid", renormalise=False, groups=2, top_groups=1, group_score="top2_sum")
    assert select_experts(logits, spec)[1].item() in (2, 3)
    assert select_experts(logits, replace(spec, group_score="max"))[1].item() == 0


def test_scaling_is_applied_once_and_after_renormalising():
    for factor in (0.5, 1.0, 2.5):
        spec = replace(V3, routed_scaling_factor=factor)
        weights, _ = select_experts(normal(20, 16), spec, normal(16, seed=1))
        rounding = gamma(2 * spec.top_k + 2).item()
        torch.testing.assert_close(weights.sum(dim=1), torch.full((20,), factor), rtol=rounding, atol=0)


def test_scores_that_all_underflow_give_no_nan():
    spec = replace(PLAIN, scoring="sigmoid", renormalise=True)
    weights, _ = select_experts(torch.full((2, 4), -200.0), spec)
    assert weights.tolist() == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_is_scored_in_float32(dtype):
    logits, bias = normal(10, 16).to(dtype), normal(16, seed=1).to(dtype)
    got, want = select_experts(logits, V3, bias), select_experts(logits.float(), V3, bias.float())
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert got[0].dtype == torch.float32


def test_strides_do_not_matter():
    logits, bias = normal(10, 16), normal(16, seed=1)
    weights, ids = select_experts(logits.T.contiguous().T, V3, bias)
    want, want_ids = select_experts(logits, V3, bias)
    torch.testing.assert_close(weights, want, rtol=2 * gamma(2 * routing_steps(16, 0) + V3.top_k + 4).item(), atol=0)
    assert torch.equal(ids, want_ids)


def test_inputs_are_left_as_they_were():
    logits, bias = normal(10, 16), normal(16, seed=1)
    before = logits.clone(), bias.clone()
    select_experts(logits, V3, bias)
    assert torch.equal(logits, before[0])
    assert torch.equal(bias, before[1])


def test_log2phy_names_the_slot_of_each_expert():
    table = torch.tensor([9, 3, 5, 0], dtype=torch.int32)
    logits = normal(12, 4)
    weights, logical = select_experts(logits, PLAIN)
    same_weights, physical = select_experts(logits, PLAIN, log2phy=table)
    assert physical.dtype == torch.int32
    assert physical.tolist() == [[table[e].item() for e in row] for row in logical.tolist()]
    assert torch.equal(weights, same_weights)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_routing_table_names_slots_by_token_position(rows):
    table = torch.arange(rows * 4, dtype=torch.int32).reshape(rows, 4)
    logits = normal(12, 4)
    weights, logical = select_experts(logits, PLAIN)
    same_weights, physical = select_experts(logits, PLAIN, routing_table=table)
    assert physical.dtype == torch.int32
    assert physical.tolist() == [[(t % rows) * 4 + e for e in row] for t, row in enumerate(logical.tolist())]
    assert torch.equal(weights, same_weights)


def test_ids_from_elsewhere_are_mapped_alike():
    logits = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    spec = RoutingSpec(top_k=3, scoring="softmax", renormalise=True)
    log2phy, table = torch.randperm(8).int(), torch.randint(0, 12, (5, 8), dtype=torch.int32)
    for maps in ({}, {"log2phy": log2phy}, {"routing_table": table}):
        ids = select_experts(logits, spec)[1]
        for chosen in (ids, ids.long()):
            mapped = to_physical(chosen, **maps)
            assert mapped.dtype == torch.int32
            assert torch.equal(mapped, select_experts(logits, spec, **maps)[1])
    with pytest.raises(ValueError, match=r"log2phy of torch.int32 .* must be None where routing_table is given"):
        to_physical(ids, log2phy=log2phy, routing_table=table)
    with pytest.raises(ValueError, match=r"log2phy of torch.int64 .* must be torch.int32 \[8\]"):
        to_physical(ids, log2phy=log2phy.long())


@pytest.mark.parametrize("scoring", get_args(Scoring))
def test_nothing_waits_for_values(scoring):
    """A fake tensor has no values: reading one, or a shape that depends on one, raises."""
    with FakeTensorMode():
        table = torch.zeros(2, 16, dtype=torch.int32)
        weights, ids = select_experts(
            torch.zeros(5, 16), replace(V3, scoring=scoring), torch.zeros(16), routing_table=table
        )
        assert weights.shape == ids.shape == (5, 3)


INT = torch.int32
BAD_SPECS = {
    "top_k=0": {"top_k": 0},
    "groups=0": {"groups": 0},
    "top_groups=0": {"top_groups": 0},
    "top_groups=3 must be at most groups=2": {"groups": 2, "top_groups": 3, "group_score": "max"},
    "scoring='tanh'": {"scoring": "tanh"},
    "group_score='mean'": {"group_score": "mean"},
    "group_score=None": {"groups": 4, "top_groups": 2},
    "routed_scaling_factor=0.0": {"routed_scaling_factor": 0.0},
    "routed_scaling_factor=nan": {"routed_scaling_factor": math.nan},
    "routed_scaling_factor=inf": {"routed_scaling_factor": math.inf},
}
BAD_CALLS = {
    "logits of torch.float32 .4.": (PLAIN, (4,), {}),
    "logits of torch.int32": (PLAIN, torch.zeros(2, 4, dtype=INT), {}),
    "top_k=2 must be at most 1": (PLAIN, (2, 1), {}),
    "top_k=3 must be at most 2": (replace(PLAIN, top_k=3, groups=4, group_score="max"), (2, 8), {}),
    "groups=4 must divide the 6 experts": (V3, (2, 6), {"bias": torch.zeros(6)}),
    "must hold at least 2 each": (replace(V3, top_k=1), (2, 4), {"bias": torch.zeros(4)}),
    "bias=None must be a float tensor .16.": (V3, (2, 16), {}),
    "must be None where spec.bias=False": (PLAIN, (2, 4), {"bias": torch.zeros(4)}),
    "bias of torch.float32 .15.": (V3, (2, 16), {"bias": torch.zeros(15)}),
    "bias of torch.int32": (V3, (2, 16), {"bias": torch.zeros(16, dtype=INT)}),
    "bias of .* on meta": (V3, (2, 16), {"bias": torch.zeros(16, device="meta")}),
    "log2phy of torch.int32 .5.": (PLAIN, (2, 4), {"log2phy": torch.zeros(5, dtype=INT)}),
    "log2phy of torch.int64": (PLAIN, (2, 4), {"log2phy": torch.zeros(4, dtype=torch.int64)}),
    "log2phy of torch.int32 .1, 4.": (PLAIN, (2, 4), {"log2phy": torch.zeros(1, 4, dtype=INT)}),
    "log2phy of .* on meta": (PLAIN, (2, 4), {"log2phy": torch.zeros(4, dtype=INT, device="meta")}),
    "routing_table of torch.int32 .0, 4.": (PLAIN, (2, 4), {"routing_table": torch.zeros(0, 4, dtype=INT)}),
    "routing_table of torch.int32 .2, 5.": (PLAIN, (2, 4), {"routing_table": torch.zeros(2, 5, dtype=INT)}),
    "routing_table of torch.int32 .4.": (PLAIN, (2, 4), {"routing_table": torch.zeros(4, dtype=INT)}),
    "log2phy of .* must be None where routing_table is given": (
        PLAIN,
        (2, 4),
        {"log2phy": torch.zeros(4, dtype=INT), "routing_table": torch.zeros(1, 4, dtype=INT)},
    ),
}


@pytest.mark.parametrize("message", BAD_SPECS)
def test_a_spec_says_what_is_wrong_with_it(message):
    fields = {"top_k": 2, "scoring": "softmax", "renormalise": True} | BAD_SPECS[message]
    with pytest.raises(ValueError, match=message):
        RoutingSpec(**fields)


@pytest.mark.parametrize("message", BAD_CALLS)
def test_a_call_says_what_is_wrong_with_it(message):
    spec, logits, more = BAD_CALLS[message]
    with pytest.raises(ValueError, match=message):
        select_experts(logits if isinstance(logits, torch.Tensor) else torch.zeros(logits), spec, **more)


def test_a_group_rule_that_closes_nothing_is_not_applied():
    spec = replace(V3, top_k=4, groups=4, top_groups=4)
    weights, ids = select_experts(normal(6, 4), spec, torch.zeros(4))
    plain, plain_ids = select_experts(normal(6, 4), replace(spec, groups=1, top_groups=1), torch.zeros(4))
    assert torch.equal(weights, plain)
    assert torch.equal(ids, plain_ids)


KERNEL_SPECS = [
    RoutingSpec(top_k=2, scoring="softmax", renormalise=False),
    RoutingSpec(top_k=3, scoring="softmax", renormalise=True, routed_scaling_factor=1.5),
    RoutingSpec(top_k=3, scoring="softmax", renormalise=False, groups=4, top_groups=2, group_score="max"),
    RoutingSpec(top_k=1, scoring="sigmoid", renormalise=True, bias=True),
    replace(V3, routed_scaling_factor=2.5),
    replace(V3, top_groups=4, routed_scaling_factor=2.5),
]
OPERATOR_SPECS = [
    RoutingSpec(top_k=2, scoring="sqrtsoftplus", renormalise=True, bias=True),
    RoutingSpec(top_k=2, scoring="sigmoid", renormalise=False),
    replace(V3, groups=8, top_k=2),  # groups of 2
]


@pytest.mark.parametrize("spec", KERNEL_SPECS + OPERATOR_SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_an_npu_equals_the_cpu(spec, dtype):
    counters = pytest.importorskip("ascend_sim.counters")
    logits, bias = normal(40, 16, seed=8).to(dtype), normal(16, seed=9) if spec.bias else None
    with counters.counting() as work:
        weights, ids = select_experts(logits.to("npu"), spec, None if bias is None else bias.to("npu"))
    used = "npu::npu_moe_gating_top_k" in work.delta.operators
    assert used is (spec in KERNEL_SPECS)
    want_weights, want_ids = select_experts(logits, spec, bias)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    rows = logits.float().tolist()
    margins = [
        route(row, spec, None if bias is None else bias.tolist()).margin - least_margin(row, spec, bias) for row in rows
    ]
    clear = torch.tensor(margins) > 0
    assert clear.sum() > 30
    assert torch.equal(ids.cpu()[clear], want_ids[clear])
    rounding = 2 * max(weight_error(row, spec) for row in rows)
    torch.testing.assert_close(weights.cpu()[clear], want_weights[clear], rtol=rounding, atol=0)


def test_on_an_npu_no_token_is_nothing():
    weights, ids = select_experts(torch.zeros(0, 16, device="npu"), KERNEL_SPECS[0])
    assert weights.shape == ids.shape == (0, 2)
