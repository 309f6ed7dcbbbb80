# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention without an engine: against plain float64 mathematics, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from latent_requests import BLOCK, LATENT, ROPE, LatentRequests


@pytest.mark.parametrize(("nope", "value"), [(128, 128), (64, 96), (192, 256)])
@pytest.mark.parametrize(
    ("lengths", "context", "absorbed"),
    [
        ([1, 1, 1], [4, 128, 300], 3),
        ([200, 16, 17], [0, 0, 0], 0),
        ([15, 200], [128, 131], 1),
        ([1, 40, 100, 33], [4, 500, 900, 0], 3),
        ([1, 16, 1, 300, 2, 33], [257, 5, 128, 900, 14, 0], 3),
    ],
    ids=["decode", "prefill", "chunk", "short-chunks", "mixed"],
)
def test_attention_over_latents(lengths, context, absorbed, nope, value):
    """The simulator's strict mode. 900 cached tokens are read in two chunks, of which the second has another request's context as well."""
    requests = LatentRequests(lengths, context, nope=nope, value=value)
    step = requests.step
    if value == 256:  # no plain form
        absorbed = len(lengths)
    assert (step.num_decodes, step.num_prefills) == (absorbed, len(lengths) - absorbed)
    assert step.num_decode_tokens == sum(lengths[:absorbed])
    if step.prefill and 300 in lengths:
        assert [chunk.kv_ends for chunk in step.prefill.chunks] == [[512], [388, 402]]
    found = requests.run().double()
    parts = [1 + -(-old // 512) if i >= absorbed else 1 for i, old in enumerate(context)]
    expected, allowed = requests.expected(parts)
    assert ((found - expected).abs() <= allowed).all()
    for wrong in (
        expected.roll(1, 1),
        expected * (1 + 2**-6),
    ):  # another head's result, and all of them a little too large
        assert not ((found - wrong).abs() <= allowed).all()


def test_no_context_is_read_for_prompts_that_have_none():
    requests = LatentRequests([20, 30], [0, 0])
    assert requests.step.prefill.chunks == []
    assert requests.builder.reorder_batch_threshold == 170


@pytest.mark.parametrize(("key", "value"), [(128, 128), (64, 96)])
def test_requests_take_the_form_of_fewer_operations(key, value):
    from vllm_ascend.attention.mla_step import Forms

    forms = Forms(latent=LATENT, projected=key + value, most_tokens=10**6)
    for cached in (0, 1, 50, 128, 1000, 100_000):
        for new in range(17, 190):
            pairs = sum(cached + 1 + token for token in range(new))
            plain = pairs * (2 * 128 + ROPE) + (cached + new) * LATENT * (key + value)
            absorbed = pairs * (2 * LATENT + ROPE) + new * LATENT * (key + value)
            assert forms.absorbed([new], [cached]) == (absorbed < plain), (new, cached)
            assert new <= forms.most_new or absorbed >= plain
    assert forms.absorbed([1, 16, 17], [0, 0, 0]) == 2


def test_the_absorbed_form_takes_no_more_memory_than_was_counted_and_no_more_pieces_than_the_kernel():
    from vllm_ascend.attention.mla_step import Forms

    forms = Forms(latent=LATENT, projected=256, most_tokens=100)
    assert forms.absorbed([40, 40, 40, 1], [5000] * 4) == 2
    assert forms.absorbed([1] * 200 + [16], [5000] * 201) == 201
    requests = LatentRequests([1], [1])
    assert requests.builder.forms.most_tokens == 512 * (256 + 256 + 64) // (3 * (512 + 64))


def test_tiles_end_where_their_last_token_sees():
    from vllm_ascend.attention.mla_step import tiles

    requests, ends, keys = tiles([1, 34, 50], [9, 100, 16])
    assert requests == [0, 1, 1, 1, 2]
    assert ends == [1, 17, 33, 34, 50]
    assert keys == [9, 83, 99, 100, 16]


@pytest.mark.parametrize(
    ("metadata", "kept"), [(None, 0), ({}, 0), ({"layer": SimpleNamespace(num_actual_tokens=1, query_ends=[1])}, 1)]
)
def test_no_padding_slots(metadata, kept):
    """Padding tokens, and all tokens of a rank without requests, have slots of -1, which the kernel does not take."""
    from vllm.forward_context import override_forward_context

    impl = LatentRequests([1], [0]).impl
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
