# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention without an engine: against plain float64 mathematics, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

LATENT, ROPE, HEADS, BLOCK = 512, 64, 4, 128
SCALE = 0.05
EXPONENTIAL = 8  # roundings that stand for one exp in float32: 4 units in the last place


def gamma(roundings, dtype=torch.float32):
    """What so many roundings do to a number, relatively (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3)."""
    change = roundings * torch.finfo(dtype).eps / 2
    return change / (1 - change)


def naive(query, query_rope, latents, keys):
    """float64 `[T, N, 512]` for the last T of a request's K tokens; latents `[K, 512]`, rotated keys `[K, 64]`. And how far bfloat16 may be from it.

    Scores, their exponentials and the sums over keys are off by roundings in float32, in whatever order; the result is stored once.
    """
    tokens, length = query.shape[0], latents.shape[0]
    out = torch.empty(tokens, HEADS, LATENT, dtype=torch.float64)
    allowed = torch.empty_like(out)
    for t in range(tokens):
        seen = length - tokens + t + 1
        for n in range(HEADS):
            scores = SCALE * (latents[:seen] @ query[t, n] + keys[:seen] @ query_rope[t, n])
            terms = SCALE * (latents[:seen].abs() @ query[t, n].abs() + keys[:seen].abs() @ query_rope[t, n].abs())
            weights = scores.softmax(0)
            out[t, n] = weights @ latents[:seen]
            of_a_weight = gamma(LATENT + ROPE + 1) * terms + gamma(1) * (scores.max() - scores) + gamma(EXPONENTIAL)
            computed = 2 * (of_a_weight.max() + gamma(2 * seen + 4)) * (weights @ latents[:seen].abs())
            allowed[t, n] = computed + gamma(1, torch.bfloat16) * (out[t, n].abs() + computed)
    return out, allowed


@pytest.fixture
def backend():
    """The real builder and implementation, as vLLM would construct them."""
    from vllm.forward_context import override_forward_context
    from vllm.v1.attention.backend import AttentionType
    from vllm_ascend.attention.mla import AscendMLAImpl, AscendMLAMetadataBuilder

    impl = AscendMLAImpl(
        HEADS, LATENT + ROPE, SCALE, 1, None, None, "auto", None, AttentionType.DECODER, None, kv_lora_rank=LATENT
    )
    with override_forward_context(SimpleNamespace(attn_metadata={})):
        yield AscendMLAMetadataBuilder(None, [], None, torch.device("npu")), impl


def description(lengths, totals, table):
    """A step as vLLM describes it: new tokens and keys of each request."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    keys = torch.tensor(totals, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.npu(), query_start_loc_cpu=starts, seq_lens=keys.npu(), seq_lens_cpu_upper_bound=keys,
        num_reqs=len(lengths), num_actual_tokens=sum(lengths), max_query_len=max(lengths), max_seq_len=max(totals),
        block_table_tensor=table.npu(), slot_mapping=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lengths", "context"),
    [
        ([1, 1, 1], [4, 128, 300]),
        ([200, 16, 17], [0, 0, 0]),
        ([40, 15], [131, 128]),
        ([1, 130, 1, 33, 2], [257, 0, 5, 128, 14]),
    ],
    ids=["decode", "prefill", "chunk", "mixed"],
)
def test_attention_over_latents(backend, lengths, context):
    """bfloat16 in the simulator's strict mode; cached tokens lie in blocks of any order, and what no request has written is NaN."""
    builder, impl = backend
    random = torch.Generator().manual_seed(1)

    def tensor(*shape):
        return torch.randn(*shape, generator=random).bfloat16()

    totals = [new + old for new, old in zip(lengths, context, strict=True)]
    blocks = [-(-total // BLOCK) for total in totals]
    free = (torch.randperm(sum(blocks), generator=random) + 1).split(blocks)
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    cache = torch.full((sum(blocks) + 1, BLOCK, LATENT + ROPE), torch.nan).bfloat16().npu()
    requests = []
    for request, (total, mine) in enumerate(zip(totals, free, strict=True)):
        table[request, : len(mine)] = mine
        position = torch.arange(total)
        latents, keys, slots = tensor(total, LATENT), tensor(total, ROPE), mine[position // BLOCK] * BLOCK + position % BLOCK  # fmt: skip
        impl.do_kv_cache_update(latents.npu(), keys.unsqueeze(1).npu(), cache, slots.npu(), "auto", None)
        requests.append((tensor(lengths[request], HEADS, LATENT), tensor(lengths[request], HEADS, ROPE), latents, keys))
    query, query_rope = (torch.cat(part).npu() for part in list(zip(*requests, strict=True))[:2])
    step = builder.build(0, description(lengths, totals, table))
    assert (step.num_decode_tokens, step.num_prefills) == (sum(lengths), 0)
    found, _ = impl.forward_mqa((query, query_rope), cache, step, None)
    for part, request in zip(found.cpu().split(lengths), requests, strict=True):
        expected, allowed = naive(*(x.double() for x in request))
        assert ((part.double() - expected).abs() <= allowed).all()
        for wrong in (
            expected.roll(1, 1),
            expected * (1 + 2**-7),
        ):  # another head's result, and all of them a little too large
            assert not ((part.double() - wrong).abs() <= allowed).all()


def test_tiles_end_where_their_last_token_sees():
    from vllm_ascend.attention.mla import tiles

    requests, ends, keys = tiles([1, 34, 50], [9, 100, 16])
    assert requests == [0, 1, 1, 1, 2]
    assert ends == [1, 17, 33, 34, 50]
    assert keys == [9, 83, 99, 100, 16]


def test_no_padding_slots_without_a_step(backend):
    """Steps of a rank without requests have slots of -1, which the kernel does not take."""
    from vllm.forward_context import override_forward_context

    _, impl = backend
    cache = torch.zeros(1, BLOCK, LATENT + ROPE).bfloat16().npu()
    rows = torch.ones(2, LATENT).bfloat16().npu(), torch.ones(2, 1, ROPE).bfloat16().npu()
    with override_forward_context(SimpleNamespace(attn_metadata=None)):
        impl.do_kv_cache_update(*rows, cache, torch.tensor([-1, -1]).npu(), "auto", None)
    assert not cache.any()


def test_backends_by_kind_of_attention():
    from vllm_ascend.platform import AscendPlatform

    def asked(**wanted):
        common = {"use_mla": False, "use_sparse": False, "has_sink": False, "use_mm_prefix": False}
        return SimpleNamespace(**{**common, "head_size": 576, "dtype": torch.bfloat16, **wanted})

    assert AscendPlatform.get_attn_backend_cls(None, asked(use_mla=True)).endswith("mla.AscendMLABackend")
    assert AscendPlatform.get_attn_backend_cls(None, asked()).endswith("gqa.AscendAttentionBackend")
    with pytest.raises(ValueError, match="no attention backend for sparse attention"):
        AscendPlatform.get_attn_backend_cls(None, asked(use_mla=True, use_sparse=True))
    grouped, latent = (SimpleNamespace(name=name) for name in ("ASCEND_ATTN", "ASCEND_MLA"))
    assert AscendPlatform.get_attn_backend_cls(latent, asked(use_mla=True)).endswith("mla.AscendMLABackend")
    with pytest.raises(ValueError, match="'ASCEND_ATTN': vllm-ascend has 'ASCEND_MLA' for this layer"):
        AscendPlatform.get_attn_backend_cls(grouped, asked(use_mla=True))
