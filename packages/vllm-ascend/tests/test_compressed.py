# SPDX-License-Identifier: Apache-2.0
"""Products of compressed-tensors' int8 layers beside whole numbers: scales are powers of two, so that nothing but the result is rounded."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig
from vllm_ascend.quantization.compressed import AscendInt8Kernel

WIDTHS, INPUTS = (16, 8), 32


def layer(generator, *, channels, static, zero_point):
    """Two layers that are fused; and the weights as numbers."""
    weight = torch.randint(-128, 128, (sum(WIDTHS), INPUTS), generator=generator, dtype=torch.int8)
    scale = 2.0 ** -torch.randint(3, 6, (sum(WIDTHS), 1) if channels else (2,), generator=generator).float()
    each = scale if channels else torch.cat([one.expand(width, 1) for one, width in zip(scale, WIDTHS, strict=True)])
    made = {
        "weight": weight, "weight_scale": scale, "input_scale": torch.tensor([0.25]) if static else None,
        "input_zero_point": torch.tensor([zero_point], dtype=torch.int8) if zero_point is not None else None,
    }  # fmt: skip
    on_device = {name: None if value is None else Parameter(value.npu(), requires_grad=False) for name, value in made.items()}  # fmt: skip
    return SimpleNamespace(
        prefix="a.layer", params_dtype=torch.bfloat16, logical_widths=WIDTHS, **on_device
    ), weight * each


def kernel(*, channels, static, symmetric):
    config = Int8ScaledMMLinearLayerConfig(is_channelwise=channels, is_static_input_scheme=static, input_symmetric=symmetric)  # fmt: skip
    return AscendInt8Kernel(config, ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"])


@pytest.mark.parametrize("channels", [True, False], ids=["scale for each channel", "scale for each tensor"])
@pytest.mark.parametrize("zero_point", [None, -3], ids=["symmetric", "zero point"])
def test_static_activations(channels, zero_point):
    """Inputs are multiples of the scale, and one of them is beyond what int8 holds."""
    generator = torch.Generator().manual_seed(1)
    one, weight = layer(generator, channels=channels, static=True, zero_point=zero_point)
    product = kernel(channels=channels, static=True, symmetric=zero_point is None)
    product.process_weights_after_loading(one)
    steps = torch.randint(-90, 90, (5, INPUTS), generator=generator).float()
    steps[2, 3] = 1000
    bias = torch.arange(float(sum(WIDTHS)))
    seen = (steps + (zero_point or 0)).clamp(-128, 127) - (zero_point or 0)
    expected = ((seen * 0.25) @ weight.T).bfloat16()
    x = (steps * 0.25).bfloat16().npu()
    assert torch.equal(product.apply_weights(one, x).cpu(), expected)
    bias = bias.bfloat16()
    assert torch.equal(product.apply_weights(one, x, bias.npu()).cpu(), expected + bias)


@pytest.mark.parametrize("channels", [True, False], ids=["scale for each channel", "scale for each tensor"])
def test_dynamic_activations(channels):
    """The largest input of each token is 127 times a power of two, and so its scale that power."""
    generator = torch.Generator().manual_seed(2)
    one, weight = layer(generator, channels=channels, static=False, zero_point=None)
    product = kernel(channels=channels, static=False, symmetric=True)
    product.process_weights_after_loading(one)
    tokens = torch.randint(-120, 120, (3, INPUTS), generator=generator).float()
    tokens[:, 0] = 127
    tokens *= torch.tensor([[0.5], [1.0], [4.0]])
    x = tokens.bfloat16().npu()
    assert torch.equal(product.apply_weights(one, x).cpu(), (tokens @ weight.T).bfloat16())

    anew, other = layer(generator, channels=channels, static=False, zero_point=None)
    one.weight.data, one.weight_scale.data = anew.weight.data, anew.weight_scale.data
    product.process_weights_after_loading(one)  # weights that are loaded anew
    assert torch.equal(product.apply_weights(one, x).cpu(), (tokens @ other.T).bfloat16())


def test_what_has_no_kernel():
    assert AscendInt8Kernel.can_implement(SimpleNamespace(is_static_input_scheme=False, input_symmetric=False)) == (False, "dynamic activations with a zero point have no kernel on an NPU")  # fmt: skip


def test_a_scale_that_is_no_number():
    one, _ = layer(torch.Generator().manual_seed(3), channels=True, static=False, zero_point=None)
    one.weight_scale.data[4] = torch.nan
    with pytest.raises(ValueError, match=r"'a\.layer'.*weight_scale"):
        kernel(channels=True, static=False, symmetric=True).process_weights_after_loading(one)
