# SPDX-License-Identifier: Apache-2.0
"""An engine with LoRA adapters that sleeps and wakes, against Hugging Face's peft; `nox -s adapters` has more (feature_engines.py)."""

import pytest
from engine_jobs import ONE_PROCESS
from lora_adapters import ALL, make, side_by_side, spoil

pytestmark = pytest.mark.slow
LENGTH = 16
SAMPLING = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True, "detokenize": False}


@pytest.fixture(scope="module")
def adapters(tiny_qwen3, hugging_face, tmp_path_factory):
    folder, prompts, _ = tiny_qwen3
    wanted = {"two layers": (8, ("q_proj", "v_proj")), "all": (64, ALL), "vocabulary": (16, ("down_proj", "embed_tokens", "lm_head"))}  # fmt: skip
    return make(tmp_path_factory.mktemp("adapters"), folder, prompts[:3], LENGTH, hugging_face, wanted)


def test_adapters_and_sleep(adapters, tiny_qwen3, run_engines, tmp_path):
    folder, prompts = tiny_qwen3[0], tiny_qwen3[1][:3]
    everything, said = side_by_side(adapters, prompts, ["base", *adapters.folders], SAMPLING)
    assert all(adapters.merged[name] == adapters.tokens[name] != adapters.tokens["base"] for name in adapters.folders)
    some, said_of_some = side_by_side(adapters, prompts[:1], ["base", "all"], SAMPLING)
    cycles = [["sleep", 1], ["wake_up"]] * 20
    changes = [[action, adapters.folders[name]] for _ in range(7) for name in adapters.folders for action in ("load_adapter", "drop_adapter")]  # fmt: skip
    spoiled = spoil(tmp_path / "spoiled", adapters.folders["two layers"])
    runs = [
        everything,
        some | {"before": [["load_adapter", spoiled], *changes]},
        everything | {"before": cycles},
        everything | {"before": [["sleep", 1], ["wake_up", ["weights"]], ["wake_up", ["kv_cache"]]]},
        everything | {"before": [["sleep", 2], ["wake_up", ["weights"]], ["reload"], ["wake_up", ["kv_cache"]]]},
    ]
    engine = {
        "model": str(folder), "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 32, "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": 64 << 20, "enable_lora": True, "max_lora_rank": 64, "max_loras": 2, "max_cpu_loras": 3, "enable_sleep_mode": True,
    }  # fmt: skip
    (result,) = run_engines(
        [{"engine": engine, "runs": runs, "inspect": True}], VLLM_ALLOW_INSECURE_SERIALIZATION="1", **ONE_PROCESS
    )
    expected = [said, said_of_some, said, said, said]
    assert [[output["tokens"] for output in outputs] for outputs in result["runs"]] == expected

    (refused, *changed), cycled, by_tags, anew = result["actions"][1:]
    assert "its matrix B of layer" in refused["said"]
    assert "has values that are not finite numbers" in refused["said"]
    assert [one["said"] for one in [*changed, *cycled, *by_tags, *anew]] == [None] * (len(changes) + 40 + 3 + 4)
    memory = [[one["memory"][0] for one in actions] for actions in (changed, cycled, by_tags, anew)]
    assert memory[0][5] == memory[0][-1]  # all adapters were there once
    awake, asleep = memory[1][1], memory[1][0]
    assert awake - asleep > 64 << 20  # the KV cache and the weights
    assert memory[1] == [asleep, awake] * 20
    assert asleep < memory[2][1] < memory[2][2] == awake
    assert memory[3][0] <= asleep
