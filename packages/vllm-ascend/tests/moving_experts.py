# SPDX-License-Identifier: Apache-2.0
"""Experts that move while engines run: the models, arrangements of ranks, chips and faults that the default tests leave out. `nox -s eplb` runs this file.

In all runs a plan is made at every chance, with random placements, and the checksum of every slot is compared after every change.
"""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from ascend_eplb import load_placement
from engine_processes import end, listening_port, start, until
from moe_families import made_families
from openai import APIConnectionError, OpenAI
from placed_engines import (
    ATLAS_A3,
    ENGINE,
    INSPECT,
    MOVING,
    assert_moved,
    run,
    tiny_model,
    tokens,
)

pytestmark = pytest.mark.slow
CHIPS = pytest.mark.parametrize("soc", [{}, ATLAS_A3], ids=["a2", "a3"])  # all-gather; all-to-all-v
REBALANCES = 5


@pytest.fixture(scope="module")
def families(tmp_path_factory, hugging_face):
    """Name -> folder, prompts and Hugging Face's tokens of a Qwen3-MoE, DeepSeek-V3 and GLM4-MoE."""
    latent = made_families(tmp_path_factory.mktemp, hugging_face)
    return {"qwen3_moe": tiny_model(tmp_path_factory.mktemp("qwen3"), hugging_face)} | {
        name: latent[name] for name in ("deepseek_v3", "glm4_moe")
    }


def moving(folder, prompts, tokens_each, *, rebalances=REBALANCES, engine=ENGINE, **eplb):
    """A job whose experts move, and whose prompts are answered twice at least."""
    job = run(engine | {"model": str(folder), "skip_tokenizer_init": True}, prompts, **(MOVING | eplb))
    for one in job["runs"]:
        one["sampling"] = one["sampling"] | {"max_tokens": tokens_each}
    return job | {"runs": job["runs"] * 2, "rebalances": rebalances}


def assert_tokens(result, expected, what):
    """In each run, the tokens of each answer; and experts have moved without a failure."""
    for answers in result["runs"]:
        assert [output["tokens"] for output in answers] == expected, what
    for status in result["rebalances"]:
        assert status["failures"] == 0, what
        assert status["moves"] > 0, what


@CHIPS
def test_tensor_parallel_ranks(families, run_engines, tmp_path, soc):
    """Without and with redundant experts, against Hugging Face in float32."""
    cases = [(name, redundant) for name in families for redundant in (0, 4)]
    jobs = []
    for name, redundant in cases:
        folder, prompts, expected = families[name]
        record = str(tmp_path / f"{name}-{redundant}.json")
        jobs.append(
            moving(folder, prompts, len(expected[0]), num_redundant_experts=redundant, expert_map_record_path=record)
        )
    for (name, redundant), result in zip(cases, run_engines(jobs, **soc, **INSPECT), strict=True):
        folder, _, expected = families[name]
        assert_tokens(result, expected, (name, redundant))
        assert result["rebalances"][0]["rebalances"] == result["rebalances"][1]["rebalances"] >= REBALANCES
        if name == "qwen3_moe":
            assert_moved(folder, tmp_path / f"{name}-{redundant}.json", result)


@CHIPS
@pytest.mark.parametrize("tp", [1, 2], ids=["dp2", "tp2-dp2"])
def test_data_parallel_ranks(families, run_replicas, tp, soc):
    """In turn both replicas have requests, and one has a single token to say and then nothing, while experts move for the other."""
    jobs, answers = [[], []], [[], []]
    for folder, prompts, expected in families.values():
        length = len(expected[0])
        for replica in range(2):
            job = moving(
                folder, prompts, length, engine=ENGINE | {"tensor_parallel_size": tp}, num_redundant_experts=4, rebalances=2 * REBALANCES
            )  # fmt: skip
            (whole, *_) = job["runs"]
            short = whole["sampling"] | {"max_tokens": 1}
            share = slice(0, 1) if replica == 0 else slice(1, None)
            both, busy = whole | {"prompts": prompts[share]}, whole
            idle = {"prompts": prompts[:1], "sampling": short}
            turns = [(both, share, length), (busy, slice(None), length), (idle, slice(0, 1), 1), (both, share, length)]
            if replica:
                turns[1], turns[2] = turns[2], turns[1]
            jobs[replica].append(job | {"runs": [one for one, _, _ in turns]})
            answers[replica].append([[ids[:most] for ids in expected[part]] for _, part, most in turns])
    for replica, results in enumerate(run_replicas(jobs, **soc, **INSPECT)):
        for name, result, wanted in zip(families, results, answers[replica], strict=True):
            runs = [[output["tokens"] for output in one] for one in result["runs"]]
            assert runs[: len(wanted)] == wanted, (name, replica)
            assert all(one == wanted[-1] for one in runs[len(wanted) :]), (name, replica)
            for status in result["rebalances"]:
                assert status["failures"] == 0
                assert status["rebalances"] >= 2 * REBALANCES


def test_fifty_rebalances(families, run_replicas, tmp_path):
    """In one run of two data parallel ranks, with one plan after the other."""
    folder, prompts, expected = families["qwen3_moe"]
    record = tmp_path / "map.json"
    engine = ENGINE | {"tensor_parallel_size": 1, "max_model_len": 256}
    jobs = [
        [moving(folder, prompts[share], len(expected[0]), rebalances=50, engine=engine, num_redundant_experts=2, expert_map_record_path=str(record))]
        for share in (slice(0, 1), slice(1, None))
    ]  # fmt: skip
    results = [one for (one,) in run_replicas(jobs, **INSPECT)]
    for result, share in zip(results, (slice(0, 1), slice(1, None)), strict=True):
        assert_tokens(result, expected[share], share)
    both = {"experts": [result["experts"][0] for result in results], "rebalances": [result["rebalances"][0] for result in results]}  # fmt: skip
    assert both["rebalances"][0]["rebalances"] >= 50
    assert_moved(folder, record, both)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_upcycled_smollm2_of_real_text(models, smollm2, prompts, greedy, run_engines, graphs):
    """In float32, whose answers are the dense model's from Hugging Face, whichever rank has which expert."""
    from ascend_sim.checkpoints import upcycle

    folder = upcycle(smollm2, models / "smollm2-moe", experts=8, top_k=2)
    engine = ENGINE | {"tensor_parallel_size": 3, "enforce_eager": not graphs}
    job = moving(folder, prompts[:4], 24, engine=engine, rebalances=2, num_redundant_experts=1)
    (result,) = run_engines([job], **INSPECT)
    assert_tokens(result, [answer[:24] for answer in greedy[:4]], "SmolLM2")


def test_quantised_experts_of_real_text(models, smollm2, prompts, run_engines):
    """W8A8 in bfloat16: weights and their scales move. The tokens are those of the same engine whose experts do not move.

    All steps take MC2, for which max_num_seqs makes room: it sums up a token's experts one by one. All-gather and all-to-all-v round a sum on each rank, so
    that in bfloat16 their results depend on which experts share a rank. Without cached prefixes, and in one engine, all runs have the same steps.
    """
    from ascend_sim.checkpoints import quantise, smooth, upcycle
    from test_quantization_engines import CALIBRATION
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": CALIBRATION}], return_dict=False)
    dense = smooth(smollm2, models / "smollm2-smooth", texts=[tokenizer(CALIBRATION)["input_ids"], asked])
    experts = upcycle(dense, models / "smollm2-smooth-moe", experts=8, top_k=2)
    folder = quantise(experts, models / "smollm2-moe-w8a8")
    engine = ENGINE | {
        "dtype": "bfloat16",
        "tensor_parallel_size": 3,
        "max_num_seqs": 256,
        "enable_prefix_caching": False,
    }
    moves = moving(folder, prompts[:4], 16, engine=engine, rebalances=2, num_redundant_experts=1)
    placed = {"additional_config": {"eplb_config": {"num_redundant_experts": 1}}}
    stays = moves | {"rebalances": 0, "engine": moves["engine"] | placed}
    off, moved = run_engines([stays, moves], **ATLAS_A3, **INSPECT)
    assert off["rebalances"] == [None] * 3
    assert [output["tokens"] for output in off["runs"][1]] == tokens(off)
    assert_tokens(moved, tokens(off), "W8A8")
    assert moved["experts"] != off["experts"]


def is_answered(client):
    """What the server says to a first question, or None."""
    try:
        return client.models.list()
    except APIConnectionError:
        return None


@pytest.fixture
def served(models, smollm2, tmp_path):
    """A server of the upcycled SmolLM2 on three ranks whose experts move all the time: its process, client, URL, log, and the file of its map."""
    from ascend_sim.checkpoints import upcycle

    folder = upcycle(smollm2, models / "smollm2-moe", experts=8, top_k=2)
    log, record = tmp_path / "log.txt", tmp_path / "map.json"
    options = {"eplb_config": MOVING | {"num_redundant_experts": 1, "expert_map_record_path": str(record)}}
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--served-model-name", "moving", "--host", "127.0.0.1", "--port", "0",
        "--tensor-parallel-size", "3", "--enable-expert-parallel", "--additional-config", json.dumps(options), "--max-model-len", "512",
        "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(128 << 20),
    ]  # fmt: skip
    process = start(command, log, {"OMP_NUM_THREADS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "fork"})

    try:
        url = f"http://127.0.0.1:{listening_port(process, log)}"
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=1800, max_retries=0)
        until(lambda: is_answered(client), process, log)
        yield process, client, url, log, record
        client.close()
    finally:
        end(process)


def status_of(url):
    """What `vllm-ascend eplb status` says, as JSON; {} where it says nothing yet."""
    command = [sys.executable, "-m", "vllm_ascend.cli", "eplb", "status", "--json", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def test_a_server_tells_its_status_and_ends_in_mid_move(served, alive):
    """Bursts with pauses between them; SIGTERM comes while a stream runs and experts are on their way."""
    process, client, url, log, record = served
    ask = {"model": "moving", "prompt": "Once upon a time", "temperature": 0}
    answers = {client.completions.create(**ask, max_tokens=24).choices[0].text for _ in range(3)}
    assert len(answers) == 1
    status = until(lambda: (found := status_of(url)).get("intervals_total", 0) > 1 and found, process, log)
    assert 0 < status["balancedness"] <= 1
    assert status["failures_total"] == 0
    assert {(cell["ranks"]) for cell in status["rank_load"]} == {"0", "1", "2"}
    stream = iter(client.completions.create(**ask, max_tokens=400, stream=True))
    next(stream)
    process.send_signal(signal.SIGTERM)
    until(lambda: process.poll() is not None, process, log)
    until(lambda: not alive(process.pid), process, log)
    served_until, triggered, _ = log.read_text().partition("[shutdown] API server: shutdown triggered")
    assert triggered
    assert "Traceback" not in served_until
    assert not re.search(r"no plan for the experts|dynamic EPLB has waited", log.read_text())
    load_placement(record, ranks=3, num_experts=8)  # whole


def test_a_rank_that_is_killed_in_mid_move_ends_its_engine(engine_servers, tmp_path):
    """Without a limit that ends it, and without a process that is left."""
    from test_lost_rank import Run
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=8192, sliding_window=None,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    options = {"eplb_config": MOVING | {"move_buffer_experts": 1}}
    run = Run(
        engine_servers, tmp_path / "model", tmp_path / "said.txt", {"ASCEND_SIM_SOC": "Ascend910B3"}, tensor_parallel_size=2, additional_config=options,
    )  # fmt: skip
    try:
        workers = run.workers()
        run.until(lambda: "experts rebalanced" in run.said.read_text())
        os.kill(workers[1], signal.SIGKILL)
        run.assert_it_ends_with_an_error()
    finally:
        end(run.process)
