# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention without an engine: against plain float64 mathematics, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from attention_bounds import attend, causal
from paged_steps import description

LATENT, ROPE, HEADS, BLOCK, WIDTH = 512, 64, 4, 128, 128
SCALE = 0.05


def sizes(nope=WIDTH, value=WIDTH, **scheduler):
    """What the builder asks of vLLM's configuration."""
    text = SimpleNamespace(kv_lora_rank=LATENT, qk_nope_head_dim=nope, qk_rope_head_dim=ROPE, v_head_dim=value)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text, max_model_len=16),
        cache_config=SimpleNamespace(block_size=BLOCK, num_gpu_blocks=None),
        scheduler_config=SimpleNamespace(**{"max_num_seqs": 1, **scheduler}),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        speculative_config=None,
    )


def backend(weight, nope=WIDTH, value=WIDTH):
    """The real builder and implementation, as vLLM would construct them."""
    from vllm.v1.attention.backend import AttentionType
    from vllm_ascend.attention.mla import AscendMLAImpl
    from vllm_ascend.attention.mla_step import AscendMLAMetadataBuilder

    impl = AscendMLAImpl(
        HEADS, LATENT + ROPE, SCALE, 1, None, None, "auto", None, AttentionType.DECODER, None, kv_lora_rank=LATENT,
        qk_nope_head_dim=nope, qk_rope_head_dim=ROPE, v_head_dim=value, kv_b_proj=lambda rows: (rows @ weight, None),
    )  # fmt: skip
    return AscendMLAMetadataBuilder(None, [], sizes(nope, value), torch.device("npu")), impl


@pytest.fixture
def written():
    """Write a request's latents and rotated keys to the cache."""
    from vllm.forward_context import override_forward_context

    def write(impl, latents, keys, cache, slots):
        metadata = {"layer": SimpleNamespace(num_actual_tokens=len(slots))}
        with override_forward_context(SimpleNamespace(attn_metadata=metadata)):
            impl.do_kv_cache_update(latents.npu(), keys.unsqueeze(1).npu(), cache, slots.npu(), "auto", None)

    return write


class Requests:
    """Random requests in bfloat16, whose cached tokens lie in blocks of any order; what no request has written is NaN.

    W_UK and W_UV are applied as vLLM's layer does for the absorbed form, and as `kv_b_proj` does for the plain one.
    """

    def __init__(self, lengths, context, nope, value):
        self.random = torch.Generator().manual_seed(1)
        self.lengths, self.nope, self.value = lengths, nope, value
        self.totals = [new + old for new, old in zip(lengths, context, strict=True)]
        blocks = [-(-total // BLOCK) for total in self.totals]
        self.free = (torch.randperm(sum(blocks), generator=self.random) + 1).split(blocks)
        self.table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
        for request, mine in enumerate(self.free):
            self.table[request, : len(mine)] = mine
        self.cache = torch.full((sum(blocks) + 1, BLOCK, LATENT + ROPE), torch.nan).bfloat16().npu()
        self.weight = self.selection(nope, value)
        self.latents = [self.tensor(total, LATENT) for total in self.totals]
        self.rotated = [self.tensor(total, ROPE) for total in self.totals]
        self.query = [self.tensor(length, HEADS, nope + ROPE) for length in lengths]

    def selection(self, nope, value):
        """`kv_b_proj` `[512, N, D + V]`: each key and value number is one of the latent, or its opposite, so that bfloat16 has it exactly in both forms."""
        weight = torch.zeros(LATENT, HEADS, nope + value)
        for head in range(HEADS):
            for first, width in ((0, nope), (nope, value)):
                chosen = torch.randperm(LATENT, generator=self.random)[:width]
                sign = torch.randint(2, (width,), generator=self.random) * 2.0 - 1
                weight[chosen, head, torch.arange(first, first + width)] = sign
        return weight.bfloat16()

    def tensor(self, *shape):
        return torch.randn(*shape, generator=self.random).bfloat16()

    def write(self, impl, written):
        for total, mine, latents, keys in zip(self.totals, self.free, self.latents, self.rotated, strict=True):
            position = torch.arange(total)
            written(impl, latents, keys, self.cache, mine[position // BLOCK] * BLOCK + position % BLOCK)

    def expected(self, parts):
        """`attend` of all requests; `parts`: of each one's keys."""
        results = []
        for query, latents, rotated, count in zip(self.query, self.latents, self.rotated, parts, strict=True):
            projected = torch.einsum("sl,lnp->snp", latents.double(), self.weight.double())
            keys, values = projected.split([self.nope, self.value], -1)
            keys = torch.cat((keys, rotated.double().unsqueeze(1).expand(-1, HEADS, -1)), -1)
            unseen = causal(len(query), len(keys))
            results.append(attend(query, keys, values, SCALE, unseen, products=LATENT + ROPE, parts=count))
        return [torch.cat(part) for part in zip(*results, strict=True)]

    def found(self, impl, step):
        """What vLLM's layer makes of the two forms, one after the other."""
        query, cut = torch.cat(self.query).npu(), step.num_decode_tokens
        w_uk, w_uv = self.weight.split([self.nope, self.value], -1)
        out = torch.zeros(len(query), HEADS * self.value).bfloat16().npu()
        if step.num_prefills:
            new = [part[-n:] for part, n in zip(self.latents, self.lengths, strict=True)]
            rotated = [part[-n:] for part, n in zip(self.rotated, self.lengths, strict=True)]
            latents, keys = torch.cat(new)[cut:].npu(), torch.cat(rotated)[cut:].unsqueeze(1).npu()
            impl.forward_mha(query[cut:], latents, keys, self.cache, step, None, out[cut:])
        if cut:
            nope, rope = query[:cut].split([self.nope, ROPE], -1)
            absorbed = torch.einsum("tnp,lnp->tnl", nope.cpu().double(), w_uk.double()).bfloat16().npu()
            latent_out, _ = impl.forward_mqa((absorbed, rope), self.cache, step, None)
            values = torch.einsum("tnl,lnv->tnv", latent_out.cpu().double(), w_uv.double())
            out[:cut] = values.flatten(1).bfloat16().npu()
        return out.cpu().view(-1, HEADS, self.value)


@pytest.mark.parametrize(("nope", "value"), [(128, 128), (64, 96), (192, 256)])
@pytest.mark.parametrize(
    ("lengths", "context", "absorbed"),
    [
        ([1, 1, 1], [4, 128, 300], 3),
        ([200, 16, 17], [0, 0, 0], 0),
        ([15, 40], [128, 131], 1),
        ([1, 16, 1, 130, 2, 33], [257, 5, 128, 900, 14, 0], 3),
    ],
    ids=["decode", "prefill", "chunk", "mixed"],
)
def test_attention_over_latents(written, lengths, context, absorbed, nope, value):
    """The simulator's strict mode. 900 cached tokens are read in two chunks, which begin and end within other requests' context."""
    requests = Requests(lengths, context, nope, value)
    weight = requests.weight.flatten(1).npu()
    builder, impl = backend(weight, nope, value)
    requests.write(impl, written)
    step = builder.build(0, description(lengths, requests.totals, requests.table))
    if value == 256:  # no plain form
        absorbed = len(lengths)
    assert (step.num_decodes, step.num_prefills) == (absorbed, len(lengths) - absorbed)
    assert step.num_decode_tokens == sum(lengths[:absorbed])
    if step.prefill and max(context) == 900:
        assert [chunk.kv_ends for chunk in step.prefill.chunks] == [[512], [388, 402]]
    found = requests.found(impl, step).double()
    parts = [1 + -(-old // 512) if i >= absorbed else 1 for i, old in enumerate(context)]
    expected, allowed = requests.expected(parts)
    assert ((found - expected).abs() <= allowed).all()
    for wrong in (
        expected.roll(1, 1),
        expected * (1 + 2**-6),
    ):  # another head's result, and all of them a little too large
        assert not ((found - wrong).abs() <= allowed).all()


def test_no_context_is_read_for_prompts_that_have_none(written):
    requests = Requests([20, 30], [0, 0], 128, 128)
    builder, _ = backend(requests.weight.flatten(1).npu())
    assert builder.build(0, description([20, 30], [20, 30], requests.table)).prefill.chunks == []
    assert builder.reorder_batch_threshold == 16


def test_tiles_end_where_their_last_token_sees():
    from vllm_ascend.attention.mla_step import tiles

    requests, ends, keys = tiles([1, 34, 50], [9, 100, 16])
    assert requests == [0, 1, 1, 1, 2]
    assert ends == [1, 17, 33, 34, 50]
    assert keys == [9, 83, 99, 100, 16]


@pytest.mark.parametrize(
    ("metadata", "kept"), [(None, 0), ({}, 0), ({"layer": SimpleNamespace(num_actual_tokens=1)}, 1)]
)
def test_no_padding_slots(metadata, kept):
    """Padding tokens, and all tokens of a rank without requests, have slots of -1, which the kernel does not take."""
    from vllm.forward_context import override_forward_context

    _, impl = backend(None)
    cache = torch.zeros(1, BLOCK, LATENT + ROPE).bfloat16().npu()
    rows = torch.ones(2, LATENT).bfloat16().npu(), torch.ones(2, 1, ROPE).bfloat16().npu()
    with override_forward_context(SimpleNamespace(attn_metadata=metadata)):
        impl.do_kv_cache_update(*rows, cache, torch.tensor([5, -1]).npu(), "auto", None)
    assert cache.count_nonzero() == kept * (LATENT + ROPE)


def test_backends_by_kind_of_attention():
    from vllm_ascend.platform import AscendPlatform

    def asked(**wanted):
        common = {
            "use_mla": False,
            "use_sparse": False,
            "has_sink": False,
            "use_mm_prefix": False,
            "attn_type": "decoder",
        }
        return SimpleNamespace(**{**common, "head_size": 576, "dtype": torch.bfloat16, **wanted})

    assert AscendPlatform.get_attn_backend_cls(None, asked(use_mla=True)).endswith("mla.AscendMLABackend")
    assert AscendPlatform.get_attn_backend_cls(None, asked()).endswith("gqa.AscendAttentionBackend")
    assert AscendPlatform.get_attn_backend_cls(None, asked(attn_type="encoder_only")).endswith(
        "encoder.AscendEncoderAttentionBackend"
    )
    with pytest.raises(ValueError, match="no attention backend for sparse attention"):
        AscendPlatform.get_attn_backend_cls(None, asked(use_mla=True, use_sparse=True))
    grouped, latent = (SimpleNamespace(name=name) for name in ("ASCEND_ATTN", "ASCEND_MLA"))
    assert AscendPlatform.get_attn_backend_cls(latent, asked(use_mla=True)).endswith("mla.AscendMLABackend")
    with pytest.raises(ValueError, match="'ASCEND_ATTN': vllm-ascend has 'ASCEND_MLA' for this layer"):
        AscendPlatform.get_attn_backend_cls(grouped, asked(use_mla=True))
