# SPDX-License-Identifier: Apache-2.0
"""What the linear layers are told of a step: whether prompts are computed in it, from either attention's description of it."""

from types import SimpleNamespace

import pytest
import torch
from vllm_ascend.attention import step as steps
from vllm_ascend.attention.mla_step import AscendMLAMetadata
from vllm_ascend.attention.step import AscendAttentionMetadata, has_prompts, query_ends, tokens_of_step


def paged(ends: list[int]) -> AscendAttentionMetadata:
    """A step of requests with these cumulative numbers of new tokens."""
    table, mask = torch.zeros(len(ends), 1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int8)
    return AscendAttentionMetadata(
        num_actual_tokens=ends[-1], query_ends=ends, kv_lengths=ends, block_table=table, mask=mask, causal=True
    )


def latent(ends: list[int], *, prefills: int) -> AscendMLAMetadata:
    """A step of requests with these cumulative numbers of new tokens, the last ones in the plain form."""
    return AscendMLAMetadata(
        num_actual_tokens=ends[-1], query_ends=ends, num_decode_tokens=ends[-1 - prefills], num_decodes=len(ends) - prefills, num_prefills=prefills,
        decode=None, prefill=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (paged([1, 2, 3]), False),
        (paged([1]), False),
        (paged([1, 2, 4]), True),
        (paged([7]), True),
        (latent([1, 2, 3], prefills=0), False),
        (latent([3, 4, 5], prefills=0), True),
        (latent([1, 30], prefills=1), True),
    ],
)
def test_a_step_has_prompts_where_a_request_has_more_than_one_new_token(step, expected):
    assert has_prompts({"model.layers.0.self_attn.attn": step}) is expected


@pytest.mark.parametrize("nothing", [None, {}, [{}]])
def test_a_step_without_requests_has_none(nothing):
    assert not has_prompts(nothing)


@pytest.mark.parametrize(
    ("described", "ends"),
    [
        ({"a": paged([1, 4])}, [1, 4]),
        ({"a": latent([1, 30], prefills=1)}, [1, 30]),
        ([{"a": paged([2])}], [2]),
        ({"a": SimpleNamespace(num_prefills=1), "b": paged([1, 4])}, [1, 4]),  # a layer with a recurrent state
        (None, []),
        ({}, []),
    ],
)
def test_the_tokens_of_a_step_and_of_its_requests(described, ends, monkeypatch):
    monkeypatch.setattr(steps, "get_forward_context", lambda: SimpleNamespace(attn_metadata=described))
    assert query_ends(described) == ends
    assert tokens_of_step() == (ends[-1] if ends else 0)
