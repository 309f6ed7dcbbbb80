# SPDX-License-Identifier: Apache-2.0
"""A rank that is killed in the middle of a run: the others end with an error, without a limit that ends them, and leave no process."""

import json
import os
import signal

import pytest
from engine_processes import (
    data_parallel,
    end,
    processes_of_session,
    rendezvous,
    until,
    what_it_said,
)

pytestmark = pytest.mark.slow
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

    def __init__(self, engine_servers, folder, said, env, **engine):
        job = said.with_suffix(".json")
        job.write_text(json.dumps(ENGINE | {"model": str(folder)} | engine))
        settings = {"ASCEND_SIM_STRICT": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        self.said = said
        self.process = engine_servers.start("run_long", [job], said, settings | env)

    def until(self, reached):
        return until(reached, self.process, self.said)

    def workers(self):
        """Process ids, as soon as it has generated something."""

        def reached():
            assert self.process.poll() is None, what_it_said(self.said)
            return [line.split()[1:] for line in self.said.read_text().splitlines() if line.startswith("workers ")]

        return [int(pid) for pid in self.until(reached)[0]]

    def assert_it_ends_with_an_error(self):
        """Of itself; its processes are gone when it is."""
        assert self.until(lambda: self.process.poll() is not None)
        assert self.process.returncode != 0
        said = self.said.read_text()
        assert "EngineDeadError" in said
        assert "\ndone" not in said
        assert self.until(lambda: not processes_of_session(self.process.pid))


@pytest.mark.parametrize("soc", ["Ascend910B3", "Ascend910_9391"], ids=["all-gather", "mc2"])
def test_a_killed_worker_ends_its_engine(engine_servers, folder, tmp_path, soc):
    run = Run(engine_servers, folder, tmp_path / "said.txt", {"ASCEND_SIM_SOC": soc}, tensor_parallel_size=2)
    try:
        os.kill(run.workers()[1], signal.SIGKILL)
        run.assert_it_ends_with_an_error()
    finally:
        end(run.process)


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["tp2", "pp2"])
@pytest.mark.parametrize("when", ["start", "step"])
def test_a_rank_that_raises_ends_its_engine(engine_servers, folder, tmp_path, when, sizes):
    """The last rank, of whose answer vLLM's executor hears only after the first one's: or never, where it wants the first one's alone."""
    worker = {"worker_cls": "failing_worker.FailingWorker"}
    run = Run(engine_servers, folder, tmp_path / "said.txt", {"FAILS_IN": when}, **worker, **sizes)
    try:
        assert run.until(lambda: run.process.poll() is not None)
        assert run.process.returncode != 0
        assert "ValueError: this rank has no luck" in run.said.read_text()
        assert run.until(lambda: not processes_of_session(run.process.pid))
    finally:
        end(run.process)


def test_a_killed_replica_ends_the_others(engine_servers, folder, tmp_path):
    store = rendezvous()
    runs = [
        Run(engine_servers, folder, tmp_path / f"said{rank}.txt", data_parallel(rank, 2), rendezvous=store.port)
        for rank in range(2)
    ]
    try:
        for run in runs:
            run.workers()
        end(runs[1].process)
        runs[0].assert_it_ends_with_an_error()
    finally:
        for run in runs:
            end(run.process)
