# SPDX-License-Identifier: Apache-2.0
"""Activations against their formulas, weights to int8, and what experts refuse. On one simulated NPU."""

import pytest
import torch
from ascend_comm import Solo
from moe_bounds import FUNCTION, assert_close, gamma
from moe_oracle import act, normal

from ascend_moe import Activation, Dispatched, FloatExperts, MoeEnv, W8A8Experts, make_dispatcher, quantise_weights
from ascend_moe.choose import CommMethod
from ascend_moe.experts import activate

ACTIVATIONS = [
    Activation(),
    Activation(gate="gelu"),
    Activation(gate="gelu_tanh"),
    Activation(limit=0.8),
    Activation(limit=0.8, alpha=1.702, up_bias=1.0, interleaved=True),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    x = normal(7, 128, seed=1)
    got = activate(x.to("npu"), activation).cpu()
    # 1 + erf, 1 + tanh and up + 1 may cancel; an argument has at most 12 roundings, and each changes exp by its size.
    gate, up = (x[:, ::2], x[:, 1::2]) if activation.interleaved else x.double().chunk(2, 1)
    allowed = gamma(FUNCTION + 12 + 4 * gate.abs()) * gate.abs() * (up.abs() + activation.up_bias)
    assert_close(got, act(x.double(), activation), allowed)
    for other in ACTIVATIONS:
        if other != activation:
            with pytest.raises(AssertionError, match="beyond their bound"):
                assert_close(got, act(x.double(), other), allowed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "relu"}, "gate='relu' must be one of silu, gelu, gelu_tanh"),
        ({"limit": 0.0}, "limit=0.0 must be above 0"),
        ({"limit": 1.0, "gate": "gelu"}, "limit=1.0 must be None where gate='gelu'"),
        ({"alpha": 1.7}, "alpha=1.7 must be 1.0 where limit=None"),
        ({"up_bias": 1.0}, "up_bias=1.0 must be 0.0 where limit=None"),
        ({"interleaved": True}, "interleaved=True must be False where limit=None"),
    ],
)
def test_an_activation_that_no_kernel_computes(options, message):
    with pytest.raises(ValueError, match=message):
        Activation(**options)


def test_weights_to_int8():
    weights = normal(3, 16, 10, seed=2)
    weights[1, :, 4] = 0.0
    weights[2, :, 5] *= 1000
    quantised, scale = quantise_weights(weights)
    assert (quantised.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (3, 10))
    back = quantised.float() * scale.unsqueeze(1)
    assert_close(back, weights.double(), scale.double().unsqueeze(1) * (0.5 + 127 * gamma(3)))
    assert (quantised.abs().amax(dim=1)[scale != 1.0] == 127).all(), "the whole range is used"
    assert scale[1, 4] == 1.0
    assert (quantised[1, :, 4] == 0).all()


def test_rows_after_the_counted_ones_change_nothing():
    """Five rows, of which three are counted, all of slot 0, beside those three alone. One slot too: the kernel takes no list of a single count."""
    w13, w2 = normal(2, 64, 64, seed=3).bfloat16().npu(), normal(2, 32, 64, seed=4).bfloat16().npu()
    rows = normal(5, 64, seed=5).bfloat16()
    rows[3:] = torch.nan

    def forward(slots, count):
        counts = torch.tensor([3, 0][:slots]).npu()
        dispatched = Dispatched(rows=rows[:count].npu(), counts=counts, scales=None)
        return FloatExperts(w13=w13[:slots], w2=w2[:slots]).forward(dispatched, torch.bfloat16)[:3]

    expected = forward(2, 3)
    assert expected.isfinite().all()
    assert torch.equal(forward(2, 5), expected)
    assert torch.equal(forward(1, 5), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_and_clipped_swiglu(dtype):
    """Experts as GPT-OSS has them, of whole numbers, of which every product and sum is exact: each row after the expert of its slot."""
    w13, w2 = (
        torch.tensor([[[1.0, -1.0, 2.0, 0.0]], [[0.0, 1.0, 1.0, -2.0]]]),
        torch.tensor([[[2.0], [1.0]], [[1.0], [-1.0]]]),
    )
    first, second = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-1.0, -2.0, -3.0, -4.0]]), torch.tensor([[5.0], [6.0]])
    rows = torch.tensor([[1.0], [4.0], [2.0]])
    activation = Activation(limit=7.0, alpha=1.702, up_bias=1.0, interleaved=True)
    placed = {"w13": w13.to(dtype).npu(), "w2": w2.to(dtype).npu(), "activation": activation}
    biased = {
        "w13_bias": first.npu(),
        "w2_bias": second.npu(),
    }  # float32 beside bfloat16 weights, as the kernel takes it

    def forward(**options):
        dispatched = Dispatched(rows=rows.to(dtype).npu(), counts=torch.tensor([2, 1]).npu(), scales=None)
        return FloatExperts(**placed, **options).forward(dispatched, dtype).cpu()

    expected = []
    for row, slot in zip(rows.double(), (0, 0, 1), strict=True):
        gate, up = (row @ w13[slot].double() + first[slot].double()).view(2, 2).unbind(1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        expected.append(gate * torch.sigmoid(1.702 * gate) * (up + 1) @ w2[slot].double() + second[slot].double())
    size = torch.stack(expected).abs() + 8 * 7 * 3  # of the two terms of each sum, at most
    assert ((forward(**biased).double() - torch.stack(expected)).abs() <= 4 * torch.finfo(dtype).eps * size).all()
    for left_out in biased:
        others = {name: bias for name, bias in biased.items() if name != left_out}
        assert not torch.equal(forward(**others), forward(**biased))


FLOAT = {"w13": torch.zeros(2, 8, 12), "w2": torch.zeros(2, 6, 8)}
INT8 = {
    "w13": FLOAT["w13"].to(torch.int8),
    "w13_scale": torch.ones(2, 12),
    "w2": FLOAT["w2"].to(torch.int8),
    "w2_scale": torch.ones(2, 8),
}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            FloatExperts,
            {"w13_bias": torch.zeros(2, 8)},
            r"w13_bias of \[2, 8\], torch.float32 on cpu must be \[2, 12\], torch.float32",
        ),
        (
            FloatExperts,
            {"w2_bias": torch.zeros(2, 8).half()},
            r"w2_bias of \[2, 8\], torch.float16 on cpu must be \[2, 8\], torch.float32",
        ),
        (FloatExperts, {"w13": torch.zeros(2, 12, 8)}, r"w13 of \[2, 12, 8\] and w2 of \[2, 6, 8\] must be \[slots"),
        (FloatExperts, {"w13": torch.zeros(3, 8, 12)}, r"w13 of \[3, 8, 12\]"),
        (FloatExperts, {"w2": torch.zeros(6, 8)}, r"w2 of \[6, 8\]"),
        (FloatExperts, {"w2": torch.zeros(2, 6, 8).half()}, "w2 of torch.float16 on cpu must be as w13, torch.float32"),
        (FloatExperts, {"w13": INT8["w13"], "w2": INT8["w2"]}, "w13 of torch.int8 must be a float tensor"),
        (W8A8Experts, FLOAT, "w13 of torch.float32 must be torch.int8"),
        (
            W8A8Experts,
            {"w13_scale": torch.ones(2, 6)},
            r"w13_scale of torch.float32 \[2, 6\] on cpu must be .* \[2, 12\]",
        ),
        (W8A8Experts, {"w13_scale": torch.ones(2, 12).bfloat16()}, "w13_scale of torch.bfloat16"),
        (W8A8Experts, {"w2_scale": torch.ones(2, 8).half()}, "must be torch.float32 or torch.bfloat16"),
    ],
)
def test_weights_that_do_not_fit(kind, change, message):
    fits = FLOAT if kind is FloatExperts else INT8
    assert kind(**fits).num_slots == 2
    with pytest.raises(ValueError, match=message):
        kind(**fits | change)


def dispatched(scales):
    return Dispatched(rows=torch.zeros(0, 8), counts=torch.zeros(2, dtype=torch.int64), scales=scales)


def test_int8_experts_need_scales_that_suit():
    experts = W8A8Experts(**INT8)
    with pytest.raises(ValueError, match="scales=None must be the rows' scales: dispatch with quantise=True"):
        experts.forward(dispatched(None), torch.float16)
    with pytest.raises(
        ValueError, match=r"w2_scale of torch.float32 must be torch.bfloat16 for a layer in torch.bfloat16"
    ):
        experts.forward(dispatched(torch.zeros(0)), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, dtype=torch.int8)}, r"x of torch.int8 \[3, 8\] must be a float tensor"),
        ({"ids": torch.zeros(3, 2)}, r"ids of torch.float32 \[3, 2\] on cpu must be torch.int32 \[3, top_k\]"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int32)}, r"ids of torch.int32 \[2, 2\]"),
        ({"weights": torch.zeros(3, 1)}, r"weights of torch.float32 \[3, 1\] on cpu must be torch.float32 \[3, 2\]"),
        ({"weights": torch.zeros(3, 2).half()}, "weights of torch.float16"),
        ({"mask": torch.zeros(3)}, r"mask of torch.float32 \[3\] on cpu must be torch.bool \[3\]"),
        ({"mask": torch.zeros(2, dtype=torch.bool)}, r"mask of torch.bool \[2\]"),
    ],
)
@pytest.mark.parametrize("method", [CommMethod.ALL_GATHER, CommMethod.ALL_TO_ALL_V])
def test_what_a_dispatcher_refuses(method, change, message):
    fits = {"x": torch.zeros(3, 8), "weights": torch.zeros(3, 2), "ids": torch.zeros(3, 2, dtype=torch.int32)}
    dispatcher = make_dispatcher(method, MoeEnv(ep=Solo(), num_slots=4))
    given = fits | change
    with pytest.raises(ValueError, match=message):
        dispatcher.dispatch(given["x"], given["weights"], given["ids"], mask=given.get("mask"))
    with pytest.raises(TypeError, match=f"dispatched is a Dispatched, not from {type(dispatcher).__name__}.dispatch"):
        dispatcher.combine(torch.zeros(0, 8), dispatched(None))
