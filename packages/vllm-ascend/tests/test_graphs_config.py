# SPDX-License-Identifier: Apache-2.0
"""What is taken of `cudagraph_mode`, and what the user is told."""

from types import SimpleNamespace

import pytest
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm_ascend import graphs_config
from vllm_ascend.attention.composed import ComposedMetadataBuilder
from vllm_ascend.attention.gqa import AscendAttentionMetadataBuilder
from vllm_ascend.attention.mla_step import AscendMLAMetadataBuilder


def config(asked, level=2, **changed):
    model = {
        "enforce_eager": False, "runner_type": "generate", "is_encoder_decoder": False, "is_hybrid": False, "is_attention_free": False,
        "enable_prompt_embeds": False, "hf_text_config": {}, "architectures": ["AForCausalLM"], "uses_alibi": False, "is_mm_prefix_lm": False, "use_mla": False,
        "enable_sleep_mode": False,
    }  # fmt: skip
    method, drafted = changed.pop("draft", (None, 0))
    lora, ranks = changed.pop("lora", None), changed.pop("ranks", 1)
    options = changed.pop("additional_config", None)
    return SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=asked),
        model_config=SimpleNamespace(**model | changed),
        optimization_level=level,
        kv_transfer_config=None,
        speculative_config=method and SimpleNamespace(method=method),
        num_speculative_tokens=drafted,
        lora_config=lora,
        parallel_config=SimpleNamespace(world_size_across_dp=ranks),
        additional_config=options,
    )


@pytest.mark.parametrize(
    ("asked", "taken", "said"),
    [
        (None, "FULL_DECODE_ONLY", ""),
        ("NONE", "NONE", ""),
        ("FULL_DECODE_ONLY", "FULL_DECODE_ONLY", ""),
        ("FULL", "FULL_DECODE_ONLY", "cudagraph_mode FULL: steps with prompts are not captured"),
        ("PIECEWISE", "FULL_DECODE_ONLY", "cudagraph_mode PIECEWISE: nothing is compiled here"),
        ("FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "FULL_DECODE_ONLY is taken instead"),
    ],
)
def test_modes(asked, taken, said):
    given = config(asked and CUDAGraphMode[asked])
    notice = graphs_config.choose(given)
    assert given.compilation_config.cudagraph_mode == CUDAGraphMode[taken]
    assert said in notice
    assert bool(said) == bool(notice)


def test_adapters():
    given = config(None, lora=object())
    assert graphs_config.choose(given) == ""
    assert given.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY


@pytest.mark.parametrize("asked", [None, CUDAGraphMode.FULL_DECODE_ONLY])
def test_enforce_eager(asked):
    given = config(asked, enforce_eager=True)
    assert graphs_config.choose(given) == ""
    assert given.compilation_config.cudagraph_mode == CUDAGraphMode.NONE


@pytest.mark.parametrize(("asked", "taken"), [(None, "NONE"), (CUDAGraphMode.FULL_DECODE_ONLY, "FULL_DECODE_ONLY")])
def test_without_optimisations_nothing_is_captured_unless_asked_for(asked, taken):
    given = config(asked, level=0)
    assert graphs_config.choose(given) == ""
    assert given.compilation_config.cudagraph_mode == CUDAGraphMode[taken]


@pytest.mark.parametrize(
    ("changed", "feature"),
    [
        ({"runner_type": "pooling"}, "pooling models"),
        ({"is_hybrid": True}, "models with a recurrent state"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"uses_alibi": True}, "steps of attention with ALiBi position biases (AForCausalLM)"),
        ({"hf_text_config": {"attn_logit_softcapping": 50.0}}, "steps of attention with a soft cap"),
        ({"draft": ("mtp", 16), "use_mla": True}, "steps of latent attention with 16 drafted tokens"),
        ({"lora": object(), "enable_sleep_mode": True}, "LoRA adapters with sleep mode"),
    ],
)
def test_what_is_not_captured_is_named(changed, feature):
    for asked, name in ((CUDAGraphMode.FULL_DECODE_ONLY, "cudagraph_mode FULL_DECODE_ONLY: "), (None, "")):
        given = config(asked, **changed)
        notice = graphs_config.choose(given)
        assert notice.startswith(f"{name}{feature}")
        assert "every step runs operator by operator" in notice
        assert given.compilation_config.cudagraph_mode == CUDAGraphMode.NONE


@pytest.mark.parametrize(
    ("method", "said"), [("ngram", False), ("suffix", False), ("draft_model", True), ("mtp", True)]
)
def test_drafts(method, said):
    """What a model drafts is computed outside of graphs, and the user is told."""
    for asked in (None, CUDAGraphMode.FULL_DECODE_ONLY):
        given = config(asked, draft=(method, 15), use_mla=True)
        assert ("the passes of the model that drafts" in graphs_config.choose(given)) == said
        assert given.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY


def test_the_configuration_of_a_draft_model_changes_nothing():
    given = config(CUDAGraphMode.FULL_DECODE_ONLY, runner_type="draft", draft=("draft_model", 3))
    assert graphs_config.choose(given) == ""
    assert given.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY


@pytest.mark.parametrize(
    ("builder", "support"),
    [
        (AscendAttentionMetadataBuilder, AttentionCGSupport.UNIFORM_BATCH),
        (AscendMLAMetadataBuilder, AttentionCGSupport.UNIFORM_BATCH),
        (ComposedMetadataBuilder, AttentionCGSupport.NEVER),
    ],
)
def test_what_attention_supports(builder, support):
    assert builder.get_cudagraph_support(None, None) == support
