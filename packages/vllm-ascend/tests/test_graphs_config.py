# SPDX-License-Identifier: Apache-2.0
"""What is taken of `cudagraph_mode`, and what the user is told."""

from types import SimpleNamespace

import pytest
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm_ascend import graphs_config
from vllm_ascend.attention.composed import ComposedMetadataBuilder
from vllm_ascend.attention.gqa import AscendAttentionMetadataBuilder
from vllm_ascend.attention.sinks import AscendSinkMetadataBuilder


def config(asked, additional_config=None, **changed):
    model = {
        "enforce_eager": False, "runner_type": "generate", "is_encoder_decoder": False, "is_multimodal_model": False, "use_mla": False,
        "is_hybrid": False, "is_attention_free": False,
        "quantization": None, "enable_prompt_embeds": False,
    }  # fmt: skip
    parallel = {"pipeline_parallel_size": 1, "data_parallel_size": 1}
    experts = changed.pop("experts", 0)
    draft = changed.pop("speculative_config", None)
    parallel |= {name: changed.pop(name) for name in tuple(changed) if name in parallel}
    return SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=asked),
        model_config=SimpleNamespace(**model | changed, get_num_experts=lambda: experts),
        parallel_config=SimpleNamespace(**parallel),
        kv_transfer_config=None,
        speculative_config=draft,
        additional_config=additional_config,
    )


@pytest.mark.parametrize(
    ("asked", "taken", "said"),
    [
        (None, "NONE", ""),
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


def test_enforce_eager():
    given = config(CUDAGraphMode.FULL_DECODE_ONLY, enforce_eager=True)
    assert graphs_config.choose(given) == ""
    assert given.compilation_config.cudagraph_mode == CUDAGraphMode.NONE


@pytest.mark.parametrize(
    ("changed", "feature"),
    [
        ({"runner_type": "pooling"}, "pooling models"),
        ({"is_multimodal_model": True}, "multimodal models"),
        ({"use_mla": True}, "models with multi-head latent attention"),
        ({"is_hybrid": True}, "models with a recurrent state"),
        ({"experts": 8}, "mixtures of experts"),
        ({"quantization": "ascend"}, "models quantised by ascend"),
        ({"data_parallel_size": 2}, "data parallel replicas"),
        ({"pipeline_parallel_size": 2}, "pipeline stages"),
        ({"speculative_config": object()}, "steps with drafted tokens (--speculative-config)"),
        ({"additional_config": {"enable_flashcomm1": True}}, "the options enable_flashcomm1 of additional_config"),
    ],
)
def test_what_is_not_captured_is_named(changed, feature):
    given = config(CUDAGraphMode.FULL_DECODE_ONLY, **changed)
    notice = graphs_config.choose(given)
    assert f"FULL_DECODE_ONLY: {feature}" in notice
    assert "every step runs operator by operator" in notice
    assert given.compilation_config.cudagraph_mode == CUDAGraphMode.NONE


@pytest.mark.parametrize(
    ("builder", "window", "support"),
    [
        (AscendAttentionMetadataBuilder, None, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        (AscendAttentionMetadataBuilder, 64, AttentionCGSupport.NEVER),
        (ComposedMetadataBuilder, None, AttentionCGSupport.NEVER),
        (AscendSinkMetadataBuilder, None, AttentionCGSupport.NEVER),
    ],
)
def test_what_attention_supports(builder, window, support):
    spec = SimpleNamespace(sliding_window=window)
    assert builder.get_cudagraph_support(None, spec) == support
    together = SimpleNamespace(kv_cache_specs={"0": SimpleNamespace(sliding_window=None), "1": spec})
    assert builder.get_cudagraph_support(None, together) == support
