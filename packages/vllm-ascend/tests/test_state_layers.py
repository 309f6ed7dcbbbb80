# SPDX-License-Identifier: Apache-2.0
"""Layers with a recurrent state without an engine, beside transformers' own, in float32."""

import pytest
import torch
from state_layers import HIDDEN, KINDS, Runner


@pytest.fixture(params=KINDS)
def kind(request):
    torch.manual_seed(1)
    return KINDS[request.param]()


def judged(kind, hidden):
    """What is exact for a request, and how far from it a result in float32 may be: four times transformers' own distance, which is itself of rounding."""
    exact = kind.exact(hidden)
    with torch.inference_mode():
        theirs = (kind.theirs(hidden[None])[0].double() - exact).abs().max()
    assert theirs < 2**-16 * exact.abs().max()
    return exact, 4 * theirs


def test_prompts_in_parts_and_requests_that_come_and_go(kind):
    """Four requests: in one step, in parts of several pieces, with one token, and in the block of one that has ended; each decodes beside the others."""
    lengths, blocks = {"a": 136, "b": 6, "c": 68, "d": 3}, {"a": 3, "b": 1, "c": 4, "d": 1}
    hidden = {name: torch.randn(length, HIDDEN) for name, length in lengths.items()}
    done, found, runner = dict.fromkeys(lengths, 0), {name: [] for name in lengths}, Runner(kind)
    steps = [
        {"a": 70}, {"a": 60, "b": 3}, {"b": 1, "a": 1}, {"a": 1, "b": 1, "c": 66}, {"b": 1, "a": 1, "c": 1},
        {"c": 1, "a": 1, "d": 1}, {"a": 1, "d": 1}, {"d": 1, "a": 1},
    ]  # fmt: skip
    for index, step in enumerate(steps):
        rows = [
            (hidden[name][done[name] : done[name] + tokens], done[name], blocks[name]) for name, tokens in step.items()
        ]
        for name, out in zip(step, runner.step(rows, padding=index % 2), strict=True):
            found[name].append(out)
            done[name] += step[name]
    assert done == lengths
    for name in lengths:
        exact, allowed = judged(kind, hidden[name])
        assert (torch.cat(found[name]).double() - exact).abs().max() <= allowed


def test_a_state_that_is_not_continued_is_caught(kind):
    """The bound is smaller than what a request's second part is wrong by that begins anew, or goes on from another request's state."""
    runner, hidden, other = Runner(kind), torch.randn(40, HIDDEN), torch.randn(20, HIDDEN)
    exact, allowed = judged(kind, hidden)
    runner.step([(hidden[:20], 0, 2), (other, 0, 3)])
    for earlier, block in ((0, 4), (20, 3)):
        (out,) = runner.step([(hidden[20:], earlier, block)])
        assert not (out.double() - exact[20:]).abs().max() <= allowed
    (out,) = runner.step([(hidden[20:], 20, 2)])
    assert (out.double() - exact[20:]).abs().max() <= allowed


def test_padding_writes_to_the_free_block_only(kind):
    """A row of padding that looks like a request that decodes has block 0, which is no request's."""
    runner, hidden = Runner(kind), torch.randn(21, HIDDEN)
    exact, allowed = judged(kind, hidden)
    runner.step([(hidden[:20], 0, 4)])
    before = [cache[1:4].clone() for cache in runner.layer.kv_cache]
    out, _ = runner.step([(hidden[20:], 20, 4), (torch.zeros(1, HIDDEN), 1, 0)])
    assert (out.double() - exact[20:]).abs().max() <= allowed
    for kept, cache in zip(before, runner.layer.kv_cache, strict=True):
        assert torch.equal(kept.isnan(), cache[1:4].isnan())


def test_a_step_without_requests_has_no_state(kind):
    """As in a profiling run: the caches are not there yet."""
    from types import SimpleNamespace

    from vllm.forward_context import override_forward_context

    runner = Runner(kind)
    runner.layer.kv_cache = ()
    context = SimpleNamespace(attn_metadata=None, no_compile_layers={"layer": runner.layer})
    with override_forward_context(context), torch.inference_mode():
        out = kind.run(runner.layer, torch.randn(3, HIDDEN).to("npu"))
    assert out.isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 7, 64, 65])
def test_inverse_of_whole_numbers_is_exact(length):
    """With 1s below the diagonal of the sum of I and N only: the inverse has 1 and -1 by turns, and every step of it is in whole numbers."""
    from vllm_ascend.layers.mamba.delta_rule import inverse_of_unit_lower

    lower = torch.diag(torch.ones(length - 1), -1)
    inverse = inverse_of_unit_lower(lower)
    assert torch.equal(inverse @ (torch.eye(length) + lower), torch.eye(length))
    same = torch.ones(length, length).tril(-1)  # powers of this have numbers of 18 digits; its inverse has none above 1
    assert torch.equal(inverse_of_unit_lower(same) @ (torch.eye(length) + same), torch.eye(length))


@pytest.mark.parametrize(
    ("starts", "lengths", "expected"),
    [
        ([0, 1, 2, 7], [9, 5, 5], [(0, 2, 1, True), (2, 1, 5, False)]),
        ([0, 1, 4], [1, 6], [(0, 1, 1, False), (1, 1, 3, True)]),  # a prompt of one token has no state yet
        (
            [0, 3, 4, 4],
            [3, 8, 7],
            [(0, 1, 3, False), (3, 1, 1, True)],
        ),  # in another order, and a request without tokens
        ([0], [], []),
    ],
)
def test_batches(starts, lengths, expected):
    from vllm_ascend.layers.mamba.step import batches_of

    slots = torch.arange(len(lengths)) + 10
    batches = batches_of(starts, lengths, slots)
    assert [(batch.first, batch.requests, batch.tokens, batch.continues) for batch in batches] == expected
    begins = {start: slot for start, slot in zip(starts, slots.tolist(), strict=False)} if batches else {}
    assert all(batch.slots[0] == begins[batch.first] or batch.first == starts[-1] for batch in batches)
