# SPDX-License-Identifier: Apache-2.0
"""A process that has imported vLLM and forks for each job: the imports take longer than most of the tests' engines run.

python engine_server.py SOCKET, the descriptor of a connected socket. It takes lines of JSON and answers each with one:

{"module": name, "arguments": [...], "said": file, "env": {...}} -> process id of a child that runs the module's `main` in a session of its own
{"poll": process id} -> the child's exit code as `subprocess.Popen` has it, null while it runs
"""

import gc
import importlib
import json
import os
import socket
import sys

MODULES = [
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.model_loader",
    "vllm_ascend.worker",
    "vllm_ascend.model_runner",
    "vllm_ascend.platform",
]


def child(connection, request):
    """Leave the server's session and descriptors, and run the job."""
    os.setsid()
    connection.close()
    said = os.open(request["said"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    os.environ.update(request["env"])
    importlib.import_module(request["module"]).main(*request["arguments"])


def main(descriptor):
    connection = socket.socket(fileno=int(descriptor))
    for module in MODULES:
        importlib.import_module(module)
    # vLLM collects garbage a dozen times an engine, and each time looked at all that was imported: most of the time that an engine of a test took.
    gc.collect()
    gc.freeze()
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would have only one of them"
    codes = {}
    lines = connection.makefile("rw")
    for line in iter(lines.readline, ""):
        request = json.loads(line)
        if pid := request.get("poll"):
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid)
        else:
            answer = os.fork()
            if answer == 0:
                return child(connection, request)
        lines.write(json.dumps(answer) + "\n")
        lines.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
