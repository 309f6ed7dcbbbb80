# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2, DeepSeek-V3 and GLM4-MoE in whole engines: greedy tokens against Hugging Face transformers, float32.

The prompts are chunked (64 tokens a step), some are longer than a block of 128 tokens, and two of them begin with the same block.
"""

import pytest
import torch
from ascend_comm import Topology
from engine_jobs import tokens
from moe_families import TOKENS, made_families
from rounding import assert_as_near, assert_caught, errors, in_bfloat16, load, own_logprobs, prompt_logprobs
from vllm_ascend.config import AscendConfig
from vllm_ascend.explain import explain
from vllm_ascend.models import read_config

pytestmark = pytest.mark.slow
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
SMALL = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True,
}
INSPECT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
ATLAS_A3 = {"ASCEND_SIM_SOC": "Ascend910_9391"}


def cached(result, run=0):
    return [output["cached"] for output in result["runs"][run]]


@pytest.fixture(scope="module")
def families(tmp_path_factory, hugging_face):
    """Name -> folder, prompts and Hugging Face's tokens of each model."""
    return made_families(tmp_path_factory.mktemp, hugging_face)


def jobs(families, prompts=slice(None), **engine):
    return [
        {
            "engine": {"model": str(folder), **SMALL, **engine},
            "runs": [{"prompts": given[prompts], "sampling": GREEDY}],
            "inspect": True,
        }
        for folder, given, _ in families.values()
    ]


def test_one_rank(families, run_engines):
    results = run_engines(jobs(families), **INSPECT)
    for result, (name, (_, _, expected)) in zip(results, families.items(), strict=True):
        assert tokens(result) == expected, name
        assert cached(result) == [0, 0, 0, 0, 128], name
        assert "npu::npu_moe_gating_top_k" in result["operators"][0], name


@pytest.mark.long
def test_log_probabilities_in_bfloat16(families, run_engines):
    """The simulator's strict mode, in which kernels take what hardware takes. Latent attention, and routers that send some tokens elsewhere."""
    folder, prompts, _ = families["deepseek_v3"]
    engine = {"model": str(folder), **SMALL, "dtype": "bfloat16"}
    runs = [{"prompts": prompts, "sampling": GREEDY | {"max_tokens": 1, "prompt_logprobs": 0}}]
    (result,) = run_engines([{"engine": engine, "runs": runs}], ASCEND_SIM_STRICT="1", **INSPECT)
    exact, reference = in_bfloat16(folder, prompts)
    assert_as_near(errors(prompt_logprobs(result), exact), reference, "DeepSeek-V3 in bfloat16:")
    model = load(folder)
    with torch.inference_mode():
        model.model.layers[1].self_attn.scaling *= 1.2
    assert_caught(errors(own_logprobs(model, prompts), exact), reference, "a wrong scale in one layer of three:")


@pytest.mark.parametrize(("experts_apart", "soc"), [(False, {}), (True, ATLAS_A3)], ids=["tp2", "tp2-ep-a3"])
def test_two_ranks(families, run_engines, experts_apart, soc):
    """On an Atlas A3, where routed experts' sums come complete and shared experts' do not, with experts apart. Also what `explain` says of the linear layers, and preemption: 3 blocks of 128 tokens, one more being vLLM's own, and a request of 142 tokens beside one that grows beyond 128."""
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": experts_apart}
    results = run_engines(jobs(families, **parallel, num_gpu_blocks_override=4), **soc, **INSPECT)
    for result, (name, (folder, _, expected)) in zip(results, families.items(), strict=True):
        assert tokens(result) == expected, name
        assert result["preemptions"] > 0, name
        rows = explain(read_config(str(folder)), AscendConfig(), Topology(2, 1, 1, 1, 2), dtype="float32", expert_parallel=experts_apart)  # fmt: skip
        # The embedding, the LM head, routers and DeepSeek's own class of merged layer are none of the plugin's linear layers.
        others = ("embed_tokens", "lm_head", "mlp.gate", "fused_qkv_a_proj")
        explained = {row.path: row.weight_bytes for row in rows if not row.path.endswith(others)}
        assert {path: size for path, (_, _, size) in result["layers"][0].items()} == explained, name


@pytest.mark.parametrize("ranks", [1, 2], ids=["dp2-ep", "tp2-dp2-ep"])
def test_replicas(families, run_replicas, ranks):
    """Two replicas with different work; the one that is done first goes on with dummy batches for the other, which ends with steps of one token."""
    shares = [slice(0, 2), slice(2, None)]
    parallel = {"tensor_parallel_size": ranks, "enable_expert_parallel": True}
    results = run_replicas([jobs(families, share, **parallel) for share in shares], **INSPECT)
    for share, replica in zip(shares, results, strict=True):
        for result, (name, (_, _, expected)) in zip(replica, families.items(), strict=True):
            assert tokens(result) == expected[share], name
