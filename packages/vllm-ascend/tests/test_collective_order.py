# SPDX-License-Identifier: Apache-2.0
"""Ranks join their collectives in one order, whatever each of them has to do: the logs of all ranks are compared.

Each pair of the features with collectives of their own (LM head, embedding, o_proj, MLP over data parallel ranks, MC2, recorder of loads, experts that move) is on
together in one of a few engines. In each, rank 0 and rank 1 have no requests in turn, both have some, and one ends early.
"""

from itertools import combinations
from types import SimpleNamespace

import pytest
from ascend_eplb import read_loads
from ascend_sim.collectives import disagreements, read_logs

GREEDY = {"temperature": 0, "ignore_eos": True, "detokenize": False}
ENGINE = {
    "dtype": "bfloat16", "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True, "enable_expert_parallel": True,
}  # fmt: skip
FEATURES = ("lmhead", "embedding", "oproj", "mlp", "mc2", "recorder", "moves")
APART = {("moves", "recorder")}  # refused together
CASES = {
    "all": {
        "features": FEATURES[:-1]
    },  # with the recorder instead of experts that move; a dummy step and a real one in the same interval at every step
    "moved-apart": {"features": ("lmhead", "mc2", "recorder"), "interval": 3},
    "all-to-all-v": {
        "features": ("lmhead", "embedding", "oproj", "mlp", "recorder"),
        "soc": "Ascend910_9391",
        "dtype": "float32",
    },
    "moving-experts": {"features": ("lmhead", "embedding", "oproj", "mlp", "mc2", "moves")},
    "tp2": {"features": ("lmhead", "embedding", "mlp", "recorder"), "tp": 2},
}
# The collective of a feature and the name of its group. The recorder's is vLLM's own group, which has no name: the file shows it.
SEEN_BY = {
    "lmhead": ("alltoall_base_", "lmhead_tp"), "embedding": ("_reduce_scatter_base_", "embed_tp"), "oproj": ("alltoall_base_", "otp"),
    "mlp": ("_reduce_scatter_base_", "mlp_tp"), "mc2": ("npu_moe_distribute_dispatch_v2", "mc2"), "moves": ("recv_", "dynamic_eplb"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Qwen2-MoE with a dense first layer; prompts."""
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(1)
    config = Qwen2MoeConfig(
        vocab_size=500, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=False, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=64, mlp_only_layers=[0], norm_topk_prob=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("order")
    Qwen2MoeForCausalLM(config).save_pretrained(folder)
    return folder, [[(11 * i * i + 5 * k) % 500 for i in range(5 + 9 * k)] for k in range(3)]


def runs(prompts, rank):
    """Both busy and rank 1 ends early; rank 1 idle but for its last token; the other way round."""
    long, short = GREEDY | {"max_tokens": 7}, GREEDY | {"max_tokens": 1}
    both = {"prompts": prompts[rank : rank + 2], "sampling": long if rank == 0 else GREEDY | {"max_tokens": 3}}
    busy, idle = {"prompts": prompts, "sampling": long}, {"prompts": prompts[:1], "sampling": short}
    return [both, busy if rank == 0 else idle, idle if rank == 0 else busy]


def test_every_pair_of_features_is_on_together_in_some_case():
    together = {pair for case in CASES.values() for pair in combinations(sorted(case["features"]), 2)}
    assert together == set(combinations(sorted(FEATURES), 2)) - APART


@pytest.fixture
def sequence(monkeypatch):
    """A function that runs a kind of step of the runner and returns what it passes, where vLLM's own parts are a word each."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm_ascend import model_runner, parallel

    runner, passed = object.__new__(model_runner.AscendModelRunner), []
    hidden, last = object(), object()

    def forward_and_logits(self, scheduler_output, intermediate_tensors=None):
        passed.extend(["forward", "logits"] if scheduler_output.total_num_scheduled_tokens else [])

    def forward_and_eplb_step(self, *args, is_profile=False, skip_eplb=False, **kwargs):
        passed.append("forward")
        if not skip_eplb:
            self.eplb_step(is_dummy=True, is_profile=is_profile)
        return hidden, last

    monkeypatch.setattr(GPUModelRunner, "execute_model", forward_and_logits)
    monkeypatch.setattr(GPUModelRunner, "_dummy_run", forward_and_eplb_step)
    monkeypatch.setattr(parallel, "_current", SimpleNamespace(groups={"lmhead_tp": object()}))
    monkeypatch.setattr(model_runner, "get_pp_group", lambda: SimpleNamespace(is_last_rank=True))
    runner.load_recorder = SimpleNamespace(step=lambda: passed.append("end"))
    runner.model = SimpleNamespace(compute_logits=lambda rows: passed.append("logits") if rows is last else None)
    runner.is_pooling_model = False

    def run(step):
        passed.clear()
        step(runner)
        return passed

    return run


STEP = SimpleNamespace(total_num_scheduled_tokens=3)
NO_TOKENS = SimpleNamespace(total_num_scheduled_tokens=0)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (lambda runner: runner.execute_model(STEP), ["forward", "logits", "end"]),
        (
            lambda runner: (runner.execute_model(STEP), runner.eplb_step()),
            ["forward", "logits", "end"],
        ),  # with sample_tokens
        (lambda runner: runner._dummy_run(1, uniform_decode=True), ["forward", "logits", "end"]),
        (lambda runner: (runner.execute_model(NO_TOKENS), runner._dummy_run(1)), ["forward", "logits", "end"]),
        (lambda runner: runner._dummy_run(8, is_profile=True), ["forward"]),  # vLLM's _dummy_sampler_run follows
        (lambda runner: runner._dummy_run(8, skip_eplb=True), ["forward", "logits"]),
    ],
    ids=["real", "real-and-sampling", "dummy", "no-tokens", "profile", "warm-up"],
)
def test_every_kind_of_step_has_one_sequence(sequence, step, expected):
    assert sequence(step) == expected


def test_a_pooling_model_computes_no_logits_in_a_dummy_step(sequence):
    def step(runner):
        runner.is_pooling_model = True
        runner._dummy_run(1)

    assert sequence(step) == ["forward", "end"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_join_collectives_in_one_order(tiny, run_replicas, tmp_path, name):
    folder, prompts = tiny
    case = CASES[name]
    features, tp, logs = case["features"], case.get("tp", 1), tmp_path / "logs"
    logs.mkdir()
    fine = {f"{feature}_tensor_parallel_size": 2 for feature in features if feature not in ("mc2", "recorder", "moves")}
    recorded = {
        "expert_load_record_path": str(tmp_path / "load.jsonl"),
        "expert_heat_collection_interval": case.get("interval", 1),
    }
    options = {"finegrained_tp_config": fine} | ({"eplb_config": recorded} if "recorder" in features else {})
    if "moves" in features:
        options["eplb_config"] = {
            "dynamic_eplb": True, "eplb_policy_type": "random", "expert_heat_collection_interval": 1, "algorithm_execution_interval": 1,
            "verify_moves": True,
        }  # fmt: skip
    engine = ENGINE | {"model": str(folder), "additional_config": options, "tensor_parallel_size": tp}
    engine |= {"dtype": case["dtype"]} if "dtype" in case else {}
    soc = case.get("soc", "Ascend910_9391" if "mc2" in features else "Ascend910B3")
    run_replicas(
        [[{"engine": engine, "runs": runs(prompts, rank), "rebalances": 2 * ("moves" in features)}] for rank in range(2)],
        ASCEND_SIM_COLLECTIVES=str(logs), ASCEND_SIM_SOC=soc, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_ALLOW_INSECURE_SERIALIZATION="1",
    )  # fmt: skip
    found = read_logs(logs)
    assert len(found) == 2 * tp
    assert disagreements(found) == []
    for log in found.values():
        joined = {
            (call.op, name)
            for call in log
            for name in call.about.removeprefix("ascend_comm:").partition(":")[0].split("+")
        }
        assert {SEEN_BY[feature] for feature in features if feature in SEEN_BY} <= joined
    if "recorder" in features:
        assert len(read_loads(tmp_path / "load.jsonl")) > 7 // case.get("interval", 1)
