# SPDX-License-Identifier: Apache-2.0
"""A rank that is killed in the middle of a run: the others end with an error, soon, and leave no process behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SECONDS = 60
ENGINE = {
    "dtype": "bfloat16", "max_model_len": 8192, "max_num_seqs": 2, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 128 << 20,
    "enable_expert_parallel": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=8192, sliding_window=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("lost")
    MixtralForCausalLM(config).save_pretrained(path)
    return path


class Run:
    """`run_long.py` in a session of its own."""

    def __init__(self, alive, folder, said, env, **engine):
        self.alive = alive
        job = said.with_suffix(".json")
        job.write_text(json.dumps(ENGINE | {"model": str(folder)} | engine))
        settings = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "ASCEND_SIM_STRICT": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "fork",
        }
        self.said = said
        with said.open("w") as handle:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "run_long.py"), str(job)],
                env=os.environ | settings | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} | env,
                stdout=handle, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def workers(self):
        """Process ids, as soon as it generates."""
        for _ in range(240):
            lines = [line.split() for line in self.said.read_text().splitlines() if line.startswith("workers ")]
            if lines:
                time.sleep(2)
                return [int(pid) for pid in lines[0][1:]]
            assert self.process.poll() is None, self.said.read_text()[-4000:]
            time.sleep(0.5)
        raise AssertionError(self.said.read_text()[-4000:])

    def assert_it_ends_with_an_error(self):
        killed = time.monotonic()
        try:
            assert self.process.wait(timeout=SECONDS) != 0
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said.read_text()[-4000:]) from None
        said = self.said.read_text()
        assert "EngineDeadError" in said
        assert "\ndone" not in said
        while self.alive(self.process.pid) and time.monotonic() < killed + SECONDS:
            time.sleep(0.2)
        assert not self.alive(self.process.pid)

    def close(self):
        for pid in self.alive(self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.parametrize("soc", ["Ascend910B3", "Ascend910_9391"], ids=["all-gather", "mc2"])
def test_a_killed_worker_ends_its_engine(alive, folder, tmp_path, soc):
    run = Run(alive, folder, tmp_path / "said.txt", {"ASCEND_SIM_SOC": soc}, tensor_parallel_size=2)
    try:
        os.kill(run.workers()[1], signal.SIGKILL)
        run.assert_it_ends_with_an_error()
    finally:
        run.close()


def test_a_killed_replica_ends_the_others(alive, folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"VLLM_DP_SIZE": "2", "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": port}
    runs = [
        Run(
            alive,
            folder,
            tmp_path / f"said{rank}.txt",
            world | {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        for run in runs:
            run.workers()
        for pid in alive(runs[1].process.pid):
            os.kill(pid, signal.SIGKILL)
        runs[0].assert_it_ends_with_an_error()
    finally:
        for run in runs:
            run.close()
