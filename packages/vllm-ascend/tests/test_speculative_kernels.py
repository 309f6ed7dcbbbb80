# SPDX-License-Identifier: Apache-2.0
"""What stands in the place of vLLM's Triton kernels of speculative decoding, each beside loops over requests and tokens, on the simulated NPU."""

import math
from itertools import pairwise

import pytest
import torch
from vllm_ascend.speculative import drafting, rejection

VOCABULARY = 11
DRAFTED = [[3, 0, 2, 5], [0, 0], [1], [4, 4, 4], [0, 2]]


def cumulative(counts):
    return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def spans(counts):
    """Of each request the slice of its tokens."""
    ends = [0, *cumulative(counts).tolist()]
    return [slice(begin, end) for begin, end in pairwise(ends)]


def distributions(rows, random):
    return torch.randn(rows, VOCABULARY, generator=random).softmax(-1)


@pytest.mark.parametrize("counts", DRAFTED)
def test_the_value_of_each_tokens_request(counts):
    values = torch.arange(len(counts)) % 3
    output = torch.empty(sum(counts), dtype=torch.int64).npu()
    rejection.expand(output, values.npu(), cumulative(counts).npu(), 0, 7, 128)
    assert output.tolist() == [7 if index % 3 == 0 else index % 3 for index, n in enumerate(counts) for _ in range(n)]


def by_loops(counts, drafts, bonus, decide, rows):
    """The output of rejection sampling; `decide(place in the request, token)` says whether a draft is kept, and what stands there."""
    output = [[-1] * (max(counts) + 1) for _ in counts]
    for request, span in enumerate(spans(counts)):
        if not rows[request]:
            continue
        for place, token in enumerate(range(span.start, span.stop)):
            kept, output[request][place] = decide(place, token)
            if not kept:
                break
        else:
            output[request][counts[request]] = int(bonus[request])
    return output


@pytest.mark.parametrize("counts", DRAFTED)
@pytest.mark.parametrize("synthetic", [False, True])
@pytest.mark.parametrize("greedy", [None, "some"])
def test_greedy_requests(counts, synthetic, greedy):
    random = torch.Generator().manual_seed(sum(counts) + len(counts))
    tokens = sum(counts)
    best = torch.randint(VOCABULARY, (tokens,), generator=random)
    other = torch.randint(VOCABULARY, (tokens,), generator=random)
    drafts = torch.where(torch.rand(tokens, generator=random) < 0.6, best, other).int()
    bonus = torch.randint(VOCABULARY, (len(counts), 1), generator=random)
    rows = torch.tensor([index % 2 == 0 for index in range(len(counts))]) if greedy else None
    uniform, rates = torch.rand(tokens, generator=random, dtype=torch.float64), torch.tensor([0.9, 0.6, 0.4, 0.2, 0.1])

    def decide(place, token):
        if synthetic:
            kept = bool(uniform[token] < rates[place])
            return kept, int(drafts[token] if kept else best[token])
        return bool(drafts[token] == best[token]), int(best[token])

    output = torch.full((len(counts), max(counts) + 1), -1, dtype=torch.int32).npu()
    arguments = (cumulative(counts), drafts, best, bonus, rows)
    rejection.rejection_greedy_sample(
        output, *(None if one is None else one.npu() for one in arguments), max(counts), uniform.npu(), rates.npu(), synthetic
    )  # fmt: skip
    assert output.tolist() == by_loops(counts, drafts, bonus, decide, [True] * len(counts) if rows is None else rows)


@pytest.mark.parametrize("counts", DRAFTED)
@pytest.mark.parametrize("kind", ["certain drafts", "likely drafts", "synthetic"])
def test_random_requests(counts, kind):
    """A draft of -1 is never kept, and one that its draft model gave no probability is not either."""
    random = torch.Generator().manual_seed(3 * sum(counts) + len(counts))
    tokens = sum(counts)
    probs, draft_probs = distributions(tokens, random), distributions(tokens, random)
    drafts = torch.randint(VOCABULARY, (tokens,), generator=random, dtype=torch.int32)
    if tokens > 4:
        drafts[4] = -1
        draft_probs[1, drafts[1]] = 0
    bonus = torch.randint(VOCABULARY, (len(counts), 1), generator=random)
    recovered = torch.randint(VOCABULARY, (tokens,), generator=random, dtype=torch.int32)
    uniform, rates = torch.rand(tokens, generator=random, dtype=torch.float64), torch.tensor([0.9, 0.6, 0.4, 0.2, 0.1])
    greedy = torch.tensor([index % 3 == 1 for index in range(len(counts))])

    def decide(place, token):
        draft = int(drafts[token])
        if kind == "synthetic":
            kept = uniform[token] < rates[place]
        else:
            q = 1.0 if kind == "certain drafts" else draft_probs[token, draft]
            kept = q > 0 and probs[token, draft] / q >= uniform[token]
        kept = bool(kept) and draft >= 0
        return kept, draft if kept else int(recovered[token])

    output = torch.full((len(counts), max(counts) + 1), -1, dtype=torch.int32).npu()
    given = draft_probs.npu() if kind == "likely drafts" else None
    rejection.rejection_random_sample(
        output, cumulative(counts).npu(), drafts.npu(), given, probs.npu(), bonus.npu(), recovered.npu(), uniform.npu(),
        greedy.npu(), max(counts), VOCABULARY, rates.npu() if kind == "synthetic" else None, given is None, kind == "synthetic",
    )  # fmt: skip
    assert output.tolist() == by_loops(counts, drafts, bonus, decide, ~greedy)


@pytest.mark.parametrize("certain", [True, False])
def test_the_token_in_the_place_of_a_rejected_one(certain):
    counts, random = [3, 0, 2], torch.Generator().manual_seed(5)
    probs, draft_probs = distributions(5, random), distributions(5, random)
    drafts = torch.randint(VOCABULARY, (5,), generator=random, dtype=torch.int32)
    drafts[3] = -1
    noise = torch.rand(3, VOCABULARY, generator=random) + 0.1
    noise[0, int(drafts[0])] = math.inf  # the token that cannot be drawn
    output = torch.empty(5, dtype=torch.int32).npu()
    rejection.sample_recovered_tokens(
        output, cumulative(counts).npu(), drafts.npu(), None if certain else draft_probs.npu(), probs.npu(), noise.npu(), VOCABULARY, 8192
    )  # fmt: skip
    for request, span in enumerate(spans(counts)):
        for token in range(span.start, span.stop):
            scores = []
            for word in range(VOCABULARY):
                left = probs[token, word] - (0 if certain else draft_probs[token, word])
                left = 0 if certain and word == drafts[token] else max(float(left), 0)
                scores.append(left * float(noise[request, word]) if left else 0)
            assert int(output[token]) == max(range(VOCABULARY), key=scores.__getitem__)


def test_tokens_that_requests_have_won():
    sampled = torch.tensor([[5, 6, -1], [7, -1, -1], [1, 2, 3], [-1, -1, -1], [4, 99, -1]], dtype=torch.int32)
    discarded = torch.tensor([False, False, True, False, False, True])
    backup = torch.tensor([90, 91, 92, 93, 94, 95], dtype=torch.int32)
    following, counts = torch.empty(2, 5, dtype=torch.int32).npu().unbind()
    drafting.prepare_next_token_padded(
        sampled.npu(), discarded.npu(), backup.npu(), following, counts, 50, 3, 5, sampled.stride(0), 4
    )
    assert counts.tolist() == [2, 1, 0, 0, 1]
    assert following.tolist() == [6, 7, 92, 93, 4]


def test_the_last_token_that_was_not_rejected():
    counts, won = [2, 0, 3], torch.tensor([1, 1, 4], dtype=torch.int32)
    starts = torch.tensor([0, 3, 10, 14], dtype=torch.int32)
    last, rejected = torch.empty(2, 3, dtype=torch.int32).npu().unbind()
    drafting.prepare_inputs_padded(cumulative(counts).npu(), won.npu(), starts.npu(), last, rejected, 3)
    assert rejected.tolist() == [2, 0, 0]
    assert last.tolist() == [0, 9, 13]


def test_the_next_slot_of_each_request():
    """The second request is as long as the model allows; what comes after the requests is padding."""
    table = torch.tensor([[4, 9, 2], [7, 1, 3], [5, 6, 8]], dtype=torch.int32)
    positions = torch.tensor([15, 39, 3])
    lengths = torch.tensor([16, 40, 4], dtype=torch.int32).npu()
    moved, slots = torch.empty(3, dtype=torch.int64).npu(), torch.full((5,), 77).npu()
    drafting.step_slot_mapping(positions.npu(), table.npu(), 3, lengths, moved, slots, 16, 40, 3, -1, 3)
    assert moved.tolist() == [16, 0, 4]
    assert slots.tolist() == [9 * 16, -1, 5 * 16 + 4, -1, -1]
    assert lengths.tolist() == [17, 1, 5]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("rejected", [[0, 0, 0], [2, 0, 1]])
def test_the_inputs_of_a_draft(slots, shifted, rejected):
    lengths, begins, filler, mask = [4, 1, 3], [10, 0, 25], 0, 99
    starts = [0, 4, 5, 8]
    tokens = torch.arange(100, 108, dtype=torch.int32)
    positions = torch.cat([torch.arange(begin, begin + n) for begin, n in zip(begins, lengths, strict=True)])
    following = torch.tensor([50, 51, 52], dtype=torch.int32)
    last = torch.tensor([starts[i + 1] - 1 - rejected[i] for i in range(3)], dtype=torch.int32)
    grown = 8 + 3 * (slots - shifted)
    expected, places, masked, new, hidden = [], [], [], [], []
    for request, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
        own = tokens[starts[request] : starts[request + 1] - rejected[request]].tolist()[int(shifted) :]
        row = [*own, int(following[request]), *[mask] * (slots - 1), *[filler] * rejected[request]]
        new += [len(expected) + len(own) + slot for slot in range(slots)]
        hidden += [len(expected) + token for token in range(length)]
        masked += [len(own) < place < len(own) + slots for place in range(len(row))]
        places += range(begin, begin + len(row))
        expected += row
    assert len(expected) == grown
    out_tokens, out_new, out_hidden = (torch.full((n,), -7, dtype=torch.int32).npu() for n in (40, 3 * slots, 8))
    out_positions, out_rejected, out_masked = torch.full((40,), -7).npu(), torch.ones(40).bool().npu(), torch.ones(40).bool().npu()  # fmt: skip
    drafting.copy_and_expand_inputs(
        tokens.npu(), positions.npu(), following.npu(), out_tokens, out_positions, out_rejected, out_masked, out_new, out_hidden,
        torch.tensor(starts, dtype=torch.int32).npu(), last.npu(), filler, mask, 8, slots, shifted, 256,
    )  # fmt: skip
    assert out_tokens.tolist() == expected + [-7] * (40 - grown)
    assert out_positions.tolist() == places + [-7] * (40 - grown)
    assert out_masked.tolist() == masked + [True] * (40 - grown)
    assert not out_rejected[:grown].any()
    assert out_new.tolist() == new
    assert not shifted or out_hidden.tolist() == hidden


def chi_squared(observed, expected):
    """The statistic over cells that are expected, and its degrees of freedom. A cell that is not expected must be empty."""
    cells = expected > 0
    assert not observed[~cells].any()
    return float(((observed - expected)[cells] ** 2 / expected[cells]).sum()), int(cells.sum()) - 1


def threshold(freedom):
    """What a chi-squared variable exceeds once in 10^6 at most: P(X >= k + 2 sqrt(k x) + 2 x) <= exp(-x) (Laurent and Massart, 2000, Lemma 1)."""
    x = 6 * math.log(10)
    return freedom + 2 * math.sqrt(freedom * x) + 2 * x


def first_tokens(requests, probs, draft_probs, *, certain, spoil=False):
    """The first token of each request, of which each had one drafted, by vLLM's own function over the functions here. Fixed seeds."""
    from types import SimpleNamespace

    from vllm.v1.sample.rejection_sampler import rejection_sample

    torch.npu.manual_seed_all(12)
    if certain:
        drafts = torch.full((requests,), 2, dtype=torch.int32)
    else:
        random = torch.Generator().manual_seed(
            11
        )  # of another seed than the device's, which the simulator computes alike
        drafts = torch.multinomial(draft_probs, requests, replacement=True, generator=random).int()
    given = None if certain else draft_probs.expand(requests, -1).contiguous().npu()
    if spoil:
        given = given.flip(1)
    sampling = SimpleNamespace(
        all_greedy=False, all_random=True, temperature=torch.ones(requests).npu(), generators={}, top_k=None, top_p=None
    )
    ends = torch.arange(1, requests + 1, dtype=torch.int32).npu()
    output = rejection_sample(
        drafts.npu(), [1] * requests, 1, ends, given, probs.log().expand(requests, -1).contiguous().npu(),
        torch.zeros(requests, 1, dtype=torch.int64).npu(), sampling,
    )  # fmt: skip
    return torch.bincount(output[:, 0].cpu().long(), minlength=len(probs)).double()


@pytest.fixture(scope="module")
def kernels_of_torch():
    from vllm.platforms import current_platform

    current_platform.register_triton_kernel_overrides()


@pytest.mark.parametrize("certain", [True, False])
def test_sampled_text_keeps_its_distribution(certain, kernels_of_torch):
    """The model cannot say token 5, and the draft cannot say token 1."""
    requests = 20_000
    probs = torch.tensor([0.25, 0.2, 0.3, 0.05, 0.15, 0.0, 0.05])
    draft_probs = torch.tensor([0.05, 0.0, 0.2, 0.3, 0.15, 0.2, 0.1])
    observed = first_tokens(requests, probs, draft_probs, certain=certain)
    statistic, freedom = chi_squared(observed, probs.double() * requests)
    assert statistic <= threshold(freedom)
    assert freedom == 5


def test_the_threshold_catches_another_distribution(kernels_of_torch):
    """Here the draft's tokens are drawn from other probabilities than those that are given."""
    requests = 20_000
    probs = torch.tensor([0.25, 0.2, 0.3, 0.05, 0.15, 0.0, 0.05])
    draft_probs = torch.tensor([0.05, 0.0, 0.2, 0.3, 0.15, 0.2, 0.1])
    observed = first_tokens(requests, probs, draft_probs, certain=False, spoil=True)
    statistic, freedom = chi_squared(observed, probs.double() * requests)
    assert statistic > threshold(freedom)
