# SPDX-License-Identifier: Apache-2.0
"""The products of LoRA layers beside a loop over rows, on whole numbers, of which every sum is exact. Engines with adapters are in test_adapters.py."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm_ascend.lora import products

ADAPTERS, RANK, INPUTS, OUTPUTS = 3, 8, 24, 20
# The slot of each row; -1 is the base model. Among them a batch of the base model alone, and one whose last slot is used.
BATCHES = {"mixed": [0, -1, 2, 2, -1, 1, 0], "base": [-1, -1], "one": [2], "empty slots": [1, 1, -1]}


@pytest.fixture
def whole_numbers():
    generator = torch.Generator().manual_seed(5)
    return lambda *shape: torch.randint(-3, 4, shape, generator=generator).float()


def row_by_row(y, x, a, b, slots, scale=1.0):
    y = y.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            y[row] += scale * (b[slot, 0] @ (a[slot, 0] @ x[row]))
    return y


def wrapper(slots, samples=(), max_tokens=16):
    """A wrapper in whose slots lie the adapters 11, 12, ..."""
    from vllm.lora.layers import LoRAMapping
    from vllm_ascend.lora.punica import AscendPunicaWrapper

    made = AscendPunicaWrapper(max_tokens, 4, torch.device("npu"), lora_config=SimpleNamespace(max_loras=ADAPTERS))
    ids = [11 + slot for slot in range(ADAPTERS)]
    mapping = LoRAMapping(*([ids[slot] if slot >= 0 else 0 for slot in rows] for rows in (slots, samples)))
    made.update_metadata(mapping, ids, ADAPTERS + 1, vocab_size=100)
    return made


class Waits(TorchDispatchMode):
    """Notes the operators for which the host waits for the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        to_host = isinstance(result, torch.Tensor) and result.device.type == "cpu" and any(
            isinstance(argument, torch.Tensor) and argument.device.type == "npu" for argument in args
        )  # fmt: skip
        if name in ("_local_scalar_dense", "nonzero", "unique_consecutive", "masked_select") or to_host:
            self.seen.append(name)
        return result


@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("laid_out", [True, False])
def test_a_fused_layer(slots, laid_out, whole_numbers):
    """Three parts of different widths, as queries, keys and values, of the columns 2 to the last."""
    widths = (OUTPUTS, 4, 12)
    y, x = whole_numbers(len(slots), sum(widths)), whole_numbers(len(slots), INPUTS)
    a = [whole_numbers(ADAPTERS, 1, RANK, INPUTS) for _ in widths]
    b = [whole_numbers(ADAPTERS, 1, width, RANK) for width in widths]
    parts = y.split(widths, dim=1)
    expected = torch.cat([row_by_row(*part, slots, 2.0) for part in zip(parts, [x] * 3, a, b, strict=True)], dim=1)
    on_device = [one.npu() for one in b]
    if laid_out:
        on_device = [products.lay_out(one) for one in on_device]
    made, result = wrapper(slots), y.npu()
    with Waits() as waits:
        made.add_lora_linear(result, x.npu(), tuple(one.npu() for one in a), tuple(on_device), 2.0, widths)
    assert torch.equal(result.cpu(), expected)
    assert waits.seen == []


def test_what_the_fully_sharded_layers_call(whole_numbers):
    """The two products apart, with a buffer in between, and the second into columns of its own."""
    slots = BATCHES["mixed"]
    y, x = whole_numbers(len(slots), 30), whole_numbers(len(slots), INPUTS)
    a, b = whole_numbers(ADAPTERS, 1, RANK, INPUTS), whole_numbers(ADAPTERS, 1, OUTPUTS, RANK)
    made, result = wrapper(slots), y.npu()
    buffer = torch.zeros((1, len(slots), RANK), device="npu")
    made.add_shrink(buffer, x.npu(), (a.npu(),), 1.0)
    made.add_expand(result, buffer, (b.npu(),), (OUTPUTS,), offset_start=7, add_input=True)
    assert torch.equal(result[:, 7:27].cpu(), row_by_row(y[:, 7:27], x, a, b, slots))
    assert torch.equal(result[:, :7].cpu(), y[:, :7])
    assert torch.equal(result[:, 27:].cpu(), y[:, 27:])


def test_embedding(whole_numbers):
    """vLLM's layer looks rows of A up at the offsets that the wrapper holds."""
    slots = BATCHES["mixed"]
    made = wrapper(slots)
    assert made._embeddings_indices[: len(slots)].tolist() == [0, 0, 200, 200, 0, 100, 0]
    y, rows, b = whole_numbers(len(slots), OUTPUTS), whole_numbers(len(slots), RANK), whole_numbers(ADAPTERS, 1, OUTPUTS, RANK)  # fmt: skip
    result = y.npu()
    made.add_lora_embedding(result, rows.npu(), b.npu(), add_input=True)
    expected = torch.stack([row if slot < 0 else row + b[slot, 0] @ rows[i] for i, (row, slot) in enumerate(zip(y, slots, strict=True))])  # fmt: skip
    assert torch.equal(result.cpu(), expected)


def test_logits_and_classifiers_take_the_adapters_of_the_sampled_rows(whole_numbers):
    samples = [2, -1, 0]
    made = wrapper([-1, -1, -1, -1, 2, 0], samples)
    y, x = whole_numbers(3, OUTPUTS + 4), whole_numbers(3, INPUTS)
    a, b = whole_numbers(ADAPTERS, 1, RANK, INPUTS), whole_numbers(ADAPTERS, 1, OUTPUTS, RANK)
    result = y.npu()
    made.add_lora_logits(result, x.npu(), a.npu(), b.npu(), 1.0)
    assert torch.equal(result[:, :OUTPUTS].cpu(), row_by_row(y[:, :OUTPUTS], x, a, b, samples))
    assert torch.equal(result[:, OUTPUTS:].cpu(), y[:, OUTPUTS:])  # the padding of the vocabulary

    weight, bias = whole_numbers(ADAPTERS, 1, OUTPUTS, INPUTS), whole_numbers(ADAPTERS, OUTPUTS)
    enabled = torch.tensor([False, True, True])
    labels = y[:, :OUTPUTS].contiguous()
    result = labels.npu()
    made.apply_lora_full_linear(result, x.npu(), weight.npu(), bias.npu(), enabled.npu())
    assert torch.equal(result.cpu(), torch.stack([weight[2, 0] @ x[0] + bias[2], labels[1], labels[2]]))


def test_rows_of_prompts_have_the_adapter_of_their_request(whole_numbers):
    made = wrapper([0, 1], [0, 1])
    x, a, b = whole_numbers(5, INPUTS), whole_numbers(ADAPTERS, 1, RANK, INPUTS), whole_numbers(ADAPTERS, 1, OUTPUTS, RANK)  # fmt: skip
    y = torch.zeros(5, OUTPUTS)
    for adapter, slot in ((13, 2), (0, -1)):
        result = y.npu()
        with made.sampling_as(adapter, [11, 12, 13]):
            made.add_lora_logits(result, x.npu(), a.npu(), b.npu(), 1.0)
        assert torch.equal(result.cpu(), row_by_row(y, x, a, b, [slot] * 5))
    result = y[:2].npu()
    made.add_lora_logits(result, x[:2].npu(), a.npu(), b.npu(), 1.0)  # as before
    assert torch.equal(result.cpu(), row_by_row(y[:2], x[:2], a, b, [0, 1]))


def test_padding_has_no_adapter(whole_numbers):
    """A step may have more rows than tokens, after a step that had adapters there."""
    made = wrapper([1] * 8)
    made.update_metadata(SimpleNamespace(index_mapping=(12, 0), prompt_mapping=(12,)), [11, 12, 13], 4, 100)
    x, a, b = whole_numbers(4, INPUTS), whole_numbers(ADAPTERS, 1, RANK, INPUTS), whole_numbers(ADAPTERS, 1, OUTPUTS, RANK)  # fmt: skip
    result = torch.zeros(4, OUTPUTS, device="npu")
    made.add_lora_linear(result, x.npu(), (a.npu(),), (b.npu(),), 1.0, (OUTPUTS,))
    assert torch.equal(result.cpu(), row_by_row(torch.zeros(4, OUTPUTS), x, a, b, [1, -1, -1, -1]))


def test_an_overflow_in_one_adapter_stays_in_its_rows(whole_numbers):
    """The product of a row with another adapter's A may be infinite, and must not reach it."""
    slots = [0, -1, 1]
    a, b = whole_numbers(ADAPTERS, 1, RANK, INPUTS), whole_numbers(ADAPTERS, 1, OUTPUTS, RANK)
    a[1] = torch.finfo(torch.float32).max
    x, y = whole_numbers(3, INPUTS).abs() + 1, whole_numbers(3, OUTPUTS)
    result = y.npu()
    wrapper(slots).add_lora_linear(result, x.npu(), (a.npu(),), (b.npu(),), 1.0, (OUTPUTS,))
    assert torch.equal(result[:2].cpu(), row_by_row(y, x, a, b, slots)[:2])
    assert not torch.isfinite(result[2]).all()


def test_bfloat16_logits_of_float32(whole_numbers):
    """A head in float32 over adapters in bfloat16, in which these whole numbers and their sums up to 256 are exact."""
    x, a, b = whole_numbers(2, 4).clamp(-1, 1), whole_numbers(ADAPTERS, 1, RANK, 4).clamp(-1, 1), whole_numbers(ADAPTERS, 1, OUTPUTS, RANK).clamp(-1, 1)  # fmt: skip
    y = torch.zeros(2, OUTPUTS)
    result = y.npu()
    wrapper([], [1, -1]).add_lora_logits(result, x.npu().bfloat16(), a.npu().bfloat16(), b.npu().bfloat16(), 1.0)
    assert torch.equal(result.cpu(), row_by_row(y, x, a, b, [1, -1]))


def test_an_adapter_without_a_slot():
    from vllm_ascend.lora.punica import slots_of

    assert slots_of([0, 12, 11], [11, None, 12]).tolist() == [-1, 2, 0]
    with pytest.raises(KeyError, match=r"LoRA adapters \[13\] are in no slot of \[11, None, 12\]"):
        slots_of([12, 13, 13], [11, None, 12])
