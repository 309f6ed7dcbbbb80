# SPDX-License-Identifier: Apache-2.0
"""Which speculative decoding is refused, where a whole configuration of vLLM's would say more than one thing (test_start.py has the others)."""

from types import SimpleNamespace

import pytest
from vllm_ascend.speculative import support


def config(method="medusa", *, parallel=None, kind="medusa", **model):
    own = {
        "runner_type": "generate", "is_encoder_decoder": False, "is_attention_free": False, "is_hybrid": False, "is_multimodal_model": False,
        "enable_prompt_embeds": False, "enable_sleep_mode": False, "quantization": None,
    }  # fmt: skip
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1} | (parallel or {})
    draft = SimpleNamespace(
        method=method, num_speculative_tokens=3, parallel_drafting=False, use_heterogeneous_vocab=False, rejection_sample_method="standard",
        num_speculative_tokens_per_batch_size=None, draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type=kind)),
    )  # fmt: skip
    return SimpleNamespace(
        speculative_config=draft, model_config=SimpleNamespace(**own | model), parallel_config=SimpleNamespace(**sizes), lora_config=None,
        kv_transfer_config=None, additional_config={},
    )  # fmt: skip


def test_what_is_served():
    assert list(support.broken(config())) == []
    assert list(support.broken(config(runner_type="draft", quantization="ascend"))) == []  # the draft model's own
    assert list(support.broken(SimpleNamespace(speculative_config=None))) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config(quantization="ascend"), "(method 'medusa') cannot be used with models quantised by 'ascend'"),
        (config(parallel={"tensor_parallel_size": 2}), "('medusa') needs tensor_parallel_size 1, got 2"),
        (config(parallel={"data_parallel_size": 2}), "('medusa') needs data_parallel_size 1, got 2"),
        (config(runner_type="pooling"), "(method 'medusa') cannot be used with pooling models"),
        (config(is_multimodal_model=True), "(method 'medusa') cannot be used with multimodal models"),
        (config(enable_sleep_mode=True), "cannot be used with sleep mode (enable_sleep_mode)"),
        (config(is_encoder_decoder=True), "cannot be used with models with an encoder and a decoder"),
    ],
)  # fmt: skip
def test_what_is_refused(given, message):
    (found,) = support.broken(given)
    assert message in found


def test_multi_token_prediction_of_another_model():
    ranks = {"tensor_parallel_size": 2, "data_parallel_size": 2}
    findings = support.broken(config("mtp", kind="mimo_mtp", parallel=ranks))
    assert "is served for DeepSeek-V3 and GLM4-MoE, and this model's drafts are of the kind 'mimo_mtp'" in next(
        findings
    )
    assert "('mtp') needs tensor_parallel_size (2) or data_parallel_size (2) to be 1" in next(findings)


def test_the_package_of_a_method(monkeypatch):
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    (found,) = support.broken(config("ngram"))
    assert (
        "('ngram') needs the package numba, which is not installed: uv pip install './packages/vllm-ascend[ngram]'"
        in found
    )
