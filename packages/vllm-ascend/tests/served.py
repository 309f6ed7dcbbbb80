# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` for tests: a process in a session of its own, which listens on a port that the kernel chooses, and its clients."""

import sys
from contextlib import contextmanager

import httpx
import openai
from engine_processes import LIMIT, end, listening_port, start, until

__all__ = ["Server", "running"]


class Server:
    """A server of one model, under the name "model".

    Attributes:
        log: the file of what it says.
        http: a client of httpx, once `wait` has returned.
        openai: a client of openai, likewise.
    """

    def __init__(self, model, log, *options, env=None):
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "model", "--port", "0",
            "--host", "127.0.0.1", *options,
        ]  # fmt: skip
        self.log, self.clients = log, []
        self.process = start(command, log, env or {})

    def wait(self):
        """Until it answers."""
        address = f"http://127.0.0.1:{listening_port(self.process, self.log)}"
        self.http = httpx.Client(base_url=address, timeout=LIMIT)
        self.openai = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=LIMIT, max_retries=0)
        self.clients = [self.http, self.openai]
        until(self.is_alive, self.process, self.log)

    def close(self):
        """End it and all that it has started."""
        for client in self.clients:
            client.close()
        end(self.process)

    def is_alive(self):
        """Whether it says that it is well."""
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def post(self, path, **body):
        """The answer to a request about its model."""
        return self.http.post(path, json={"model": "model", **body})


@contextmanager
def running(servers, never):
    """Servers by name, which start side by side and answer inside the block. At its end all are alive, and none has said `never`; then they end."""
    try:
        for server in servers.values():
            server.wait()
        yield servers
        for server in servers.values():
            assert server.is_alive()
            assert never not in server.log.read_text()
    finally:
        for server in servers.values():
            server.close()
