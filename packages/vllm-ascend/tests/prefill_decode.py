# SPDX-License-Identifier: Apache-2.0
"""Two servers, one that computes prompts and one that decodes, and the proxy of `examples/prefill_decode` before them."""

import json
import random
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
from engine_processes import LIMIT, end, listening_port, start
from served import Server, running

__all__ = ["EXAMPLE", "PROXY", "apart", "computed", "nixl_hosts"]

PROXY = Path(__file__).parents[3] / "examples" / "prefill_decode" / "proxy.py"
# Whole prompts, each found again in a folder by its tokens: vLLM's example has no more.
EXAMPLE = ["--no-enable-chunked-prefill", "--no-enable-prefix-caching"]


def nixl_hosts():
    """Two addresses of this host, for NIXL's side channels: a server listens there on a fixed port, and both run here."""
    return [f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}.{number}" for number in (1, 2)]


@contextmanager
def apart(model, folder, transfer, *options, hosts=(None, None)):
    """A client of the proxy, and the servers by their names.

    Args:
        model: its folder.
        folder: for what they say.
        transfer: `kv_transfer_config` without the role.
        options: of `vllm serve`, for both.
        hosts: of NIXL's side channels.
    """
    servers = {}
    for (name, role), host in zip((("prefill", "kv_producer"), ("decode", "kv_consumer")), hosts, strict=True):
        config = json.dumps({**transfer, "kv_role": role})
        env = {"ASCEND_SIM_STRICT": "0"}  # for float32
        env |= {"VLLM_NIXL_SIDE_CHANNEL_HOST": host} if host else {}
        servers[name] = Server(model, folder / f"{name}.txt", "--kv-transfer-config", config, *options, env=env)
    said = folder / "proxy.txt"
    with running(servers, "Traceback"):
        addresses = {name: str(server.http.base_url).rstrip("/") for name, server in servers.items()}
        command = [sys.executable, str(PROXY), "--prefill", addresses["prefill"], "--decode", addresses["decode"], "--port", "0"]  # fmt: skip
        proxy = start(command, said, {})
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listening_port(proxy, said)}", timeout=LIMIT) as client:
                yield client, servers
        finally:
            end(proxy)


def computed(server):
    """Tokens of prompts that a server has computed so far."""
    text = server.http.get("/metrics").text
    counts = re.findall(r'^vllm:prompt_tokens_by_source_total\{.*source="local_compute".*\} (\S+)$', text, re.M)
    assert counts, re.findall(r"^vllm:prompt\S*", text, re.M)
    return int(sum(map(float, counts)))
