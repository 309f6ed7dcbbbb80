# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own: how tests start them, wait for them, and see where they hang.

Each runs in a session of its own, so that all processes that it starts can be found. The environment switches Python's fault handler on
in all of them: on SIGABRT a process prints the stacks of all its threads and ends.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

HERE = Path(__file__).parent
# A safety net against hangs, many times what any test takes on two busy cores; no test asserts how long anything takes.
LIMIT = 1800
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONFAULTHANDLER": "1"}
STACKS = "==== The limit was reached. Stacks of all processes: ===="


def processes_of_session(session):
    """Process ids of a session that was started with `start_new_session`, without zombies."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry))
    return sorted(found)


def start(command, said, env, **options):
    """A process in a session of its own that appends what it prints to the file `said`."""
    with said.open("a") as handle:
        return subprocess.Popen(
            command, env=os.environ | ENVIRONMENT | env, stdout=handle, stderr=subprocess.STDOUT, start_new_session=True,
            **options,
        )  # fmt: skip


def end(process):
    """Kill a process that `start` returned, and its whole session."""
    for pid in processes_of_session(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def end_with_stacks(process, said):
    """Each process of the session appends the stacks of its threads to the file `said`, and ends.

    All are stopped before the first is asked, so that none shows what it does about another's end.
    """
    session = processes_of_session(process.pid)
    with said.open("a") as handle:
        handle.write(f"\n{STACKS}\n")
    for pid in session:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    for pid in session:
        with suppress(ProcessLookupError, FileNotFoundError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            with said.open("a") as handle:
                handle.write(f"\n---- process {pid}: {command[:200]}\n")
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
            os.kill(pid, signal.SIGABRT)
            os.kill(pid, signal.SIGCONT)
            ends = time.monotonic() + 30
            while pid in processes_of_session(process.pid) and time.monotonic() < ends:
                time.sleep(0.05)
    end(process)


def what_it_said(said):
    """The end of what a session printed, and all stacks if it was ended with them."""
    before, marker, stacks = said.read_text(errors="replace").partition(STACKS)
    return f"{said}:\n{before[-6000:]}{marker}{stacks[:40_000]}"


def until(reached, process, said):
    """The first true value of `reached()`. When the limit strikes first, the session of the process ends with all stacks, and the test fails."""
    ends = time.monotonic() + LIMIT
    while not (found := reached()):
        if time.monotonic() >= ends:
            end_with_stacks(process, said)
            raise AssertionError(what_it_said(said))
        time.sleep(0.2)
    return found


def listening_port(process, said):
    """The TCP port on which a server listens that was told to take any (0); waits until it does, and fails if the process ends before."""

    def reached():
        assert process.poll() is None, what_it_said(said)
        connections = psutil.Process(process.pid).net_connections("tcp")
        return next((entry.laddr.port for entry in connections if entry.status == psutil.CONN_LISTEN), None)

    return until(reached, process, said)


def wait(processes, said, limit=LIMIT):
    """Wait for the ends of processes that `start` returned; the first that fails ends all, and so does the limit, with all stacks.

    Args:
        processes: what is waited for.
        said: the file that each writes to, in the same order.
        limit: seconds.
    """
    ends = time.monotonic() + limit
    try:
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            if time.monotonic() >= ends:
                for process, file in zip(processes, said, strict=True):
                    end_with_stacks(process, file)
                break
            time.sleep(0.2)
    finally:
        for process in processes:
            end(process)
    assert all(process.returncode == 0 for process in processes), "\n\n".join(map(what_it_said, said))


class Forked:
    """A job that an `EngineServer` has forked, with what the functions of this module use of `subprocess.Popen`."""

    def __init__(self, server, pid):
        self.server, self.pid, self.returncode = server, pid, None

    def poll(self):
        if self.returncode is None:
            self.returncode = self.server.ask({"poll": self.pid})
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(0.05)


class EngineServer:
    """A running `engine_server.py`."""

    def __init__(self, said, env):
        self.said = said
        self.socket, other = socket.socketpair()
        with other:
            command = [sys.executable, str(HERE / "engine_server.py"), str(other.fileno())]
            self.process = start(command, said, env, pass_fds=[other.fileno()])
        self.socket.settimeout(LIMIT)
        self.lines = self.socket.makefile("rw")

    def ask(self, request):
        """The answer to a request."""
        try:
            self.lines.write(json.dumps(request) + "\n")
            self.lines.flush()
            answer = self.lines.readline()
        except TimeoutError:
            end_with_stacks(self.process, self.said)
            answer = ""
        except BrokenPipeError:
            answer = ""
        assert answer, what_it_said(self.said)
        return json.loads(answer)

    def close(self):
        self.lines.close()
        self.socket.close()
        end(self.process)


class EngineServers:
    """The servers of a test session: one for each setting of the simulated NPU, which a process reads once."""

    def __init__(self, folder):
        self.folder, self.servers = folder, {}

    def start(self, module, arguments, said, env):
        """`module.main(*arguments)` in a session of its own, which appends what it prints to the file `said`.

        Workers are forked and have one thread each; `test_serve` starts them as users do.
        """
        env = {"ASCEND_SIM_STRICT": "0", "OMP_NUM_THREADS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "fork"} | env
        simulated = {name: value for name, value in env.items() if name.startswith(("ASCEND_SIM", "OMP"))}
        key = tuple(sorted(simulated.items()))
        if key not in self.servers:
            self.servers[key] = EngineServer(self.folder / f"server{len(self.servers)}.txt", simulated)
        server = self.servers[key]
        request = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "said": str(said),
            "env": env,
        }
        said.touch()
        return Forked(server, server.ask(request))

    def start_engines(self, job, folder, env):
        """`run_engine.py` with a job, whose files lie in the folder."""
        folder.mkdir(exist_ok=True)
        (folder / "job.json").write_text(json.dumps(job))
        return self.start("run_engine", [folder / "job.json", folder / "result.json"], folder / "said.txt", env)

    def close(self):
        for server in self.servers.values():
            server.close()


def wait_for_engines(processes, folders):
    """The results of processes that `start_engines` returned. A step that they could not capture in a graph fails the test: its tokens would be right all the same."""
    said = [folder / "said.txt" for folder in folders]
    wait(processes, said)
    assert not any("cannot be captured" in file.read_text(errors="replace") for file in said), "\n\n".join(map(what_it_said, said))  # fmt: skip
    return [json.loads((folder / "result.json").read_text()) for folder in folders]


def data_parallel(rank, size):
    """The environment of one data parallel rank among processes that each run one (vLLM's offline data parallelism)."""
    return {
        "VLLM_DP_SIZE": str(size), "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank),
    }  # fmt: skip


def rendezvous():
    """A store at which the data parallel ranks of one engine find each other, and its port, chosen by the kernel.

    vLLM would take VLLM_DP_MASTER_PORT and the port after it, and the same two again for the next engine of the same processes. A rank
    that is done first then joins the store that the other still holds of the engine before: the one waits for a peer, and the other for a
    rank that will never come. So each engine gets a store of its own, which the caller holds; its rank 0 publishes there to which port the
    kernel has bound its own store.
    """
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
