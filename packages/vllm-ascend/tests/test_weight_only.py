# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose weights alone are quantised, in engines, beside the model that their numbers stand for in transformers."""

import pytest
import weight_only_models as forms
from engine_jobs import GREEDY, ONE_PROCESS, tokens

pytestmark = pytest.mark.slow
LENGTH = 12
PROMPTS = [[3, 10, 31], [5, 74, 157, 254, 361], list(range(40, 140))]
ENGINE = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 32 << 20, "skip_tokenizer_init": True}  # fmt: skip
RUN = {"prompts": PROMPTS, "sampling": GREEDY | {"max_tokens": LENGTH, "detokenize": False, "logprobs": 3}}


@pytest.mark.parametrize(
    ("bits", "symmetric", "other"), [(4, True, forms.gptq), (4, False, forms.awq), (8, True, forms.gptq)], ids=["4", "4-zeros", "8"]
)  # fmt: skip
def test_tokens(bits, symmetric, other, tmp_path, hugging_face, run_engines):
    """compressed-tensors, which vLLM takes in float32 too, answers as transformers does, on one rank and on two; and in bfloat16 another form of the same weights as it does."""
    folder = tmp_path / "compressed"
    model = forms.make(folder, forms.compressed_tensors, bits, symmetric=symmetric)
    forms.make(tmp_path / "other", other, bits, symmetric=symmetric)
    exact = {"model": str(folder), **ENGINE, "dtype": "float32"}
    jobs = [exact, exact | {"dtype": "bfloat16"}, exact | {"model": str(tmp_path / "other"), "dtype": "bfloat16"}]
    runs = [RUN, RUN | {"before": [["reload"]]}]
    whole, half, same = run_engines([{"engine": engine, "runs": runs} for engine in jobs], **ONE_PROCESS)
    assert tokens(whole) == hugging_face(model, PROMPTS, LENGTH)
    assert [result["actions"][1][0]["said"] for result in (whole, half, same)] == [None] * 3
    assert same["runs"] == half["runs"] == [half["runs"][0]] * 2
    (two,) = run_engines([{"engine": exact | {"tensor_parallel_size": 2}, "runs": [RUN]}])
    assert tokens(two) == tokens(whole)


def test_a_scale_for_each_output_feature(tmp_path, hugging_face, run_engines):
    """Two ranks share the input features of some layers, and each has all scales of these. Weights may be loaded anew."""
    model = forms.make(tmp_path / "model", forms.compressed_tensors, 4, symmetric=False, channels=True)
    engine = {"model": str(tmp_path / "model"), **ENGINE, "dtype": "float32"}
    runs = [RUN, RUN | {"before": [["reload"]]}]
    (one,) = run_engines([{"engine": engine, "runs": runs}], **ONE_PROCESS)
    (two,) = run_engines([{"engine": engine | {"tensor_parallel_size": 2}, "runs": [RUN]}])
    assert one["actions"][1][0]["said"] is None
    assert tokens(one) == tokens(one, 1) == tokens(two) == hugging_face(model, PROMPTS, LENGTH)
