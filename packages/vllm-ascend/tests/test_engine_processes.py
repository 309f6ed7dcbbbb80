# SPDX-License-Identifier: Apache-2.0
"""What the tests' own harness does with processes that hang or fail."""

import sys
import time

import pytest
from engine_processes import data_parallel, end, processes_of_session, rendezvous, start, wait

# A parent that waits for its worker, which waits for ever in a thread beside its main one.
HANGING = """
import multiprocessing, threading, time

def wait_in_a_thread():
    print("ready", flush=True)
    time.sleep(100_000)

def work():
    thread = threading.Thread(target=wait_in_a_thread)
    thread.start()
    thread.join()

def wait_for_the_worker(worker):
    worker.join()

if __name__ == "__main__":
    worker = multiprocessing.get_context("{method}").Process(target=work)
    worker.start()
    wait_for_the_worker(worker)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_limit_prints_the_stacks_of_parent_and_worker(tmp_path, method):
    script, said = tmp_path / "hanging.py", tmp_path / "said.txt"
    script.write_text(HANGING.replace("{method}", method))
    process = start([sys.executable, str(script)], said, {"ASCEND_SIM": "0"})
    try:
        while "ready" not in said.read_text() and process.poll() is None:
            time.sleep(0.05)
        with pytest.raises(AssertionError) as failure:
            wait([process], [said], limit=0)
    finally:
        end(process)
    for function in ("in wait_for_the_worker", "in work", "in wait_in_a_thread"):
        assert function in str(failure.value)
        assert function in said.read_text()
    assert processes_of_session(process.pid) == []


def test_one_that_fails_ends_the_others(tmp_path):
    said = [tmp_path / "failing.txt", tmp_path / "waiting.txt"]
    failing = start([sys.executable, "-c", "raise SystemExit('no such model')"], said[0], {"ASCEND_SIM": "0"})
    waiting = start(["sleep", "100000"], said[1], {})
    with pytest.raises(AssertionError, match="no such model"):
        wait([failing, waiting], said)
    assert processes_of_session(waiting.pid) == []


def test_each_rendezvous_has_a_port_of_its_own():
    stores = [rendezvous() for _ in range(3)]
    assert len({store.port for store in stores}) == 3
    assert data_parallel(1, 2)["VLLM_DP_RANK"] == "1"


def test_a_forked_job_ends_as_a_process_of_its_own(tmp_path, engine_servers):
    """Its exit code, its output, its session; a second one knows nothing of the first."""
    (tmp_path / "unused.json").write_text("[]")
    said = [tmp_path / "works.txt", tmp_path / "fails.txt"]
    works = engine_servers.start("run_engine", [tmp_path / "unused.json", tmp_path / "result.json"], said[0], {})
    wait([works], said[:1])
    assert (tmp_path / "result.json").read_text() == "[]"
    fails = engine_servers.start("run_engine", [tmp_path / "missing.json", tmp_path / "result.json"], said[1], {})
    with pytest.raises(AssertionError, match=r"FileNotFoundError.*missing.json"):
        wait([fails], said[1:])
    assert (works.returncode, fails.returncode) == (0, 1)
