# SPDX-License-Identifier: Apache-2.0
"""W8A8 and prefetch on one rank: exact integer arithmetic, shapes, checks. Ops over ranks: quant_cases.py."""

import os
import subprocess
import sys

import ascend_linear as al
import pytest
import torch
from linear_bounds import assert_close, gamma
from spawned import NO_NPU

IN, OUT = 40, 12


def layer(**changes):
    generator = torch.Generator().manual_seed(0)
    options = {
        "input_scale": torch.tensor([0.03125]),  # its reciprocal is exact in bfloat16
        "input_offset": torch.tensor([-20.0]),
        "deq_scale": torch.rand(OUT, generator=generator) / 1000,
        "quant_bias": torch.randint(-9999, 9999, (OUT,), dtype=torch.int32, generator=generator),
    }
    return al.W8A8Static(**{name: on_npu(value) for name, value in (options | changes).items()})


def on_npu(value):
    return value.npu() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("shape", [(7, IN), (2, 3, IN), (0, IN)])
@pytest.mark.parametrize("once", [True, False])
def test_static(shape, once):
    quant = layer()
    x = torch.randn(shape, dtype=torch.bfloat16) * 2
    weight = torch.randint(-128, 128, (OUT, IN), dtype=torch.int8)
    bias = torch.randn(OUT).bfloat16()
    y = quant.product(x.npu(), weight.npu(), bias.npu(), once=once)
    eight = (x.float() * 32 - 20).round().clamp(-128, 127).long()
    sums = eight @ weight.long().T + (quant.quant_bias.cpu().long() if once else 0)
    scaled = sums.double() * quant.deq_scale.cpu().double()
    assert y.dtype == torch.bfloat16
    assert_close(y, *with_bias(scaled, gamma(3) * scaled.abs(), bias))
    if x.numel():
        for wrong in (scaled.roll(1, -1), scaled - 2 * bias.double()):
            with pytest.raises(AssertionError, match="beyond its bound"):
                assert_close(y, *with_bias(wrong, gamma(3) * wrong.abs(), bias))
    if x.numel():
        assert torch.equal(quant.quantise(x.npu()).cpu().long(), eight)
        assert torch.equal(quant.product(quant.quantise(x.npu()), weight.npu(), bias.npu(), once=once), y)


@pytest.mark.parametrize("shape", [(7, IN), (2, 3, IN), (0, IN)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dynamic(shape, dtype):
    scale = torch.rand(OUT) / 1000
    quant = al.W8A8Dynamic(weight_scale=scale.npu(), output_dtype=dtype)
    x, weight = torch.randn(shape, dtype=dtype), torch.randint(-128, 128, (OUT, IN), dtype=torch.int8)
    bias = torch.randn(OUT).to(dtype)
    y = quant.product(x.npu(), weight.npu(), bias.npu())
    step = x.double().abs().amax(-1, keepdim=True) / 127
    quotient = x.double() / step
    scaled = (quotient.round() @ weight.double().T) * step * scale.double()
    # A quotient so near the middle of two whole numbers that float32 may round it either way is off by one.
    either = ((quotient - quotient.floor() - 0.5).abs() <= 127 * gamma(3)).double()
    error = gamma(5) * scaled.abs() + (either @ weight.double().abs().T) * step * scale.double()
    assert y.dtype == dtype
    assert_close(y, *with_bias(scaled, error, bias))
    if x.numel():
        for wrong in (scaled.roll(1, -1), scaled - 2 * bias.double()):
            with pytest.raises(AssertionError, match="beyond its bound"):
                assert_close(y, *with_bias(wrong, error, bias))


def with_bias(scaled, error, bias):
    """The result of a product that is known within `error`, stored before and after the bias is added, and how far it may be off."""
    expected = scaled + bias.double()
    error = error + gamma(1, bias.dtype) * (scaled.abs() + error)
    return expected, error + gamma(1, bias.dtype) * (expected.abs() + error)


def test_an_op_that_holds_a_product_computes_with_the_one_that_replaces_it():
    held, other = (
        layer(),
        layer(input_scale=torch.tensor([0.0625]), input_offset=torch.tensor([3.0]), deq_scale=torch.ones(OUT)),
    )
    x, weight = torch.randn(7, IN, dtype=torch.bfloat16).npu(), torch.randint(-128, 128, (OUT, IN), dtype=torch.int8)
    before = held.product(x, weight.npu(), None)
    held.replace(other)
    assert torch.equal(held.product(x, weight.npu(), None), other.product(x, weight.npu(), None))
    assert torch.equal(held._dequantised_bias, other._dequantised_bias)  # which only the fused kernel reads
    assert not torch.equal(held.product(x, weight.npu(), None), before)
    dynamic = al.W8A8Dynamic(weight_scale=torch.ones(OUT).npu())
    dynamic.replace(al.W8A8Dynamic(weight_scale=torch.full((OUT,), 2.0).npu()))
    assert torch.equal(dynamic.weight_scale.cpu(), torch.full((OUT,), 2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_bias": None}, r"quant_bias of shape None: must be of shape \(12,\), as before"),
        (
            {"deq_scale": torch.ones(3), "quant_bias": torch.ones(3, dtype=torch.int32)},
            r"deq_scale of shape \(3,\): must be of shape \(12,\), as before",
        ),
    ],
)
def test_a_product_of_another_layer_replaces_nothing(change, message):
    held, before = layer(), layer()
    with pytest.raises(ValueError, match=message):
        held.replace(layer(input_scale=torch.tensor([0.5]), **change))
    assert torch.equal(held.input_scale, before.input_scale)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layer(output_dtype=torch.int8), "output_dtype=torch.int8: must be torch.float16 or torch.bfloat16"),
        (lambda: layer(input_scale=torch.ones(2)), r"input_scale of shape \(2,\): must be one number"),
        (lambda: layer(input_offset=torch.ones(2)), r"input_offset of shape \(2,\): must be one number"),
        (lambda: layer(deq_scale=torch.ones(OUT).half()), r"deq_scale of torch.float16 .* must be float32 \[out\]"),
        (lambda: layer(quant_bias=torch.ones(OUT)), "quant_bias of torch.float32 .* must be int32"),
        (lambda: layer(quant_bias=torch.ones(3, dtype=torch.int32)), r"quant_bias .* of deq_scale's shape \(12,\)"),
        (lambda: al.W8A8Dynamic(weight_scale=torch.ones(1, OUT)), r"weight_scale .* must be float32 \[out\]"),
        (lambda: al.PrefetchConfig(ratios={"q": 1.0}), "'q' is unknown; allowed are qkv, o, gate_up, down"),
        (lambda: al.PrefetchConfig(ratios={"o": 1.5}), r"ratios\['o'\]=1.5: must be 0 to 1"),
        (lambda: al.PrefetchConfig(max_tokens=-1), "max_tokens=-1: must be at least 0"),
        (lambda: al.PrefetchConfig(max_bytes=-1), "max_bytes=-1: must be at least 0"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("module", "tokens", "expected"),
    [("qkv", 4, 400), ("o", 4, 200), ("gate_up", 4, 0), ("qkv", 5, 0), ("down", 4, 450), ("qkv", 0, 400)],
)
def test_bytes_to_prefetch(module, tokens, expected):
    config = al.PrefetchConfig(ratios={"qkv": 1.0, "o": 0.5, "down": 1.0}, max_tokens=4, max_bytes=450)
    weight = torch.zeros(10, 50 if module == "down" else 20, dtype=torch.bfloat16)
    assert config.bytes_of(module, weight, tokens) == expected


def test_without_torch_npu_the_remedy_is_named(tmp_path):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libascendcl.so: cannot open shared object file')")
    code = "import torch, ascend_linear.kernels as k; k.dynamic_quant(torch.ones(1, 2))"
    environment = os.environ | NO_NPU | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "RuntimeError: this layer's kernels need torch_npu: pip install torch-npu==2.13.0" in done.stderr
    assert "libascendcl.so: cannot open" in done.stderr
