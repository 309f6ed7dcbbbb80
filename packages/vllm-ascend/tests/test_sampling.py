# SPDX-License-Identifier: Apache-2.0
"""Top-k and top-p by the kernel keep what vLLM's sort keeps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ascend_sim.counters import counting
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm.v1.sample.sampler import Sampler
from vllm_ascend.sampling import AscendTopKTopPSampler

ROWS, VOCABULARY = 16, 2048
KS = torch.tensor([1, 2, 5, 7, 40, 64, 100, 200, 256, 300, 500, 512, 700, 800, 1000, 1024], dtype=torch.int32)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(ROWS, VOCABULARY) * 3


def sums_between(logits, k):
    """A p for each row that lies in the widest gap between two sums of the largest probabilities, and so far from the rounding of any."""
    ordered = logits.double().sort(descending=True).values
    if k is not None:
        ordered[torch.arange(VOCABULARY) >= k.unsqueeze(1)] = -torch.inf
    sums = ordered.softmax(-1).cumsum(-1)[:, :8]
    widths, places = sums.diff(dim=-1).max(-1)
    found = sums.gather(1, places.unsqueeze(1)).squeeze(1) + widths / 2
    return torch.where(widths > 2 * VOCABULARY * torch.finfo(torch.float32).eps, found, 1.0).float()


def drawn(logits, k, p, told, seed=1):
    """What the sampler says of logits on the NPU, its operators, and the logits that it has drawn from."""
    sampler = Sampler(logprobs_mode="processed_logits")
    filters = AscendTopKTopPSampler(sampler)
    k, p = (None if one is None else one.npu() for one in (k, p))
    generators = {row: torch.Generator("npu").manual_seed(seed + row) for row in range(ROWS)}
    with counting() as work:
        if told is None:
            tokens, kept = sampler.topk_topp_sampler(logits.clone().npu(), generators, k, p)
        else:
            with filters.step(SimpleNamespace(top_k_cpu=np.array(told, dtype=np.int32), num_reqs=ROWS)):
                tokens, kept = sampler.topk_topp_sampler(logits.clone().npu(), generators, k, p)
    return tokens.cpu(), kept.cpu(), work.delta.operators


@pytest.mark.parametrize("with_k", [True, False], ids=["k", "no-k"])
@pytest.mark.parametrize("with_p", [True, False], ids=["p", "no-p"])
def test_what_is_kept_and_drawn(logits, with_k, with_p):
    k = KS if with_k else None
    p = sums_between(logits, k) if with_p else None
    told = KS.tolist() if with_k else [VOCABULARY] * ROWS
    expected = apply_top_k_top_p_pytorch(logits.clone(), k, p)
    tokens, kept, operators = drawn(logits, k, p, told)
    assert torch.equal(kept, expected)
    assert ("npu::npu_top_k_top_p" in operators) == (with_k or with_p)
    assert not any("sort" in name for name in operators)
    assert torch.equal(tokens, drawn(expected, None, None, told)[0])


@pytest.mark.parametrize("told", [None, [VOCABULARY, *KS.tolist()[1:]]], ids=["unknown", "one-without"])
def test_what_the_kernel_does_not_take_is_sorted(logits, told):
    """A request without top_k beside others, whose k is then the vocabulary; steps of which the host knows no k."""
    k = torch.cat([torch.tensor([VOCABULARY], dtype=torch.int32), KS[1:]])
    expected = apply_top_k_top_p_pytorch(logits.clone(), k, None)
    _, kept, operators = drawn(logits, k, None, told)
    assert torch.equal(kept, expected)
    assert "npu::npu_top_k_top_p" not in operators


def test_the_limit_belongs_to_one_step(logits):
    """What was told of one step says nothing of the next."""
    sampler = Sampler()
    filters = AscendTopKTopPSampler(sampler)
    with filters.step(SimpleNamespace(top_k_cpu=KS.numpy(), num_reqs=ROWS)):
        pass
    with counting() as work:
        sampler.topk_topp_sampler(logits.npu(), {}, torch.full((ROWS,), VOCABULARY, dtype=torch.int32).npu(), None)
    assert "npu::npu_top_k_top_p" not in work.delta.operators
