# SPDX-License-Identifier: Apache-2.0
"""The status of dynamic EPLB on its way to Prometheus, and what `vllm-ascend eplb status` prints of it."""

import http.server
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from typer.testing import CliRunner
from vllm_ascend.cli import app
from vllm_ascend.eplb import metrics
from vllm_ascend.eplb.report import Status, cells
from vllm_ascend.eplb.status import read

NAMES = {
    "balancedness", "planned_from", "predicted", "longest_wait_seconds", "intervals_total", "rebalances_total", "moves_total",
    "bytes_moved_total", "background_seconds_total", "waited_seconds_total", "failures_total",
}  # fmt: skip
LIMIT = 60  # seconds: a safety net


@pytest.fixture
def registry():
    return CollectorRegistry()


def status(**more):
    made = Status(
        intervals=3, rebalances=2, moves=40, bytes_moved=1 << 33, background_seconds=1.5, planned_from=0.5, predicted=0.75, **more
    )  # fmt: skip
    made.step_waited(0.25)
    made.observed(np.array([[10.0, 30.0], [0.0, 0.0], [20.0, 20.0]]))
    for reason in ("no load", "failed: the planner's process has ended", "no load"):
        made.count_dropped(reason)
    return made


def served(registry, address, *statuses):
    """The metrics' text after a sender has sent so many statuses."""
    metrics.listen(str(address), metrics.Metrics(registry))
    sender = metrics.StatusSender(str(address), "tiny")
    for one in statuses:
        sender.send(one)
    sender.close()
    ends = time.monotonic() + LIMIT
    asked = {"model_name": "tiny"}
    while registry.get_sample_value(f"{metrics.PREFIX}moves_total", asked) != sum(one.moves for one in statuses[-1:]):
        assert time.monotonic() < ends
        time.sleep(0.01)
    return generate_latest(registry).decode()


def test_a_status_becomes_metrics(registry, tmp_path):
    shown = read(served(registry, tmp_path / "status", Status(moves=1), status()))
    assert shown.numbers.keys() == NAMES
    assert shown.numbers["balancedness"] == (20 / 30 + 1.0) / 2  # of the two layers with load
    assert (shown.numbers["planned_from"], shown.numbers["predicted"]) == (0.5, 0.75)
    assert (shown.numbers["rebalances_total"], shown.numbers["moves_total"]) == (2, 40)
    assert shown.numbers["bytes_moved_total"] == 1 << 33
    assert shown.numbers["waited_seconds_total"] == shown.numbers["longest_wait_seconds"] == 0.25
    assert shown.dropped == {"no load": 2, "failed": 1}
    assert shown.load == [("0", "0", 0.5), ("0", "1", 1.5), ("1", "0", 0), ("1", "1", 0), ("2", "0", 1), ("2", "1", 1)]  # fmt: skip


def test_counters_go_on_when_the_engine_starts_anew(registry):
    kept = metrics.Metrics(registry)
    for moves in (3, 5, 2):
        message = {name: 0 for name in NAMES} | {"model_name": "tiny", "moves": moves, "dropped": {}, "load": []}
        kept.update({name.removesuffix("_total"): value for name, value in message.items()})
    assert registry.get_sample_value(f"{metrics.PREFIX}moves_total", {"model_name": "tiny"}) == 5 + 2


def test_a_message_of_another_form_ends_nothing(registry, tmp_path, caplog):
    sender = metrics.StatusSender(str(tmp_path / "status"), "tiny")
    sender.send(status())  # nobody listens yet
    metrics.listen(str(tmp_path / "status"), kept := metrics.Metrics(registry))
    for wrong in (b"{", b"3", b"{}", b'{"balancedness": "high"}'):
        sender._socket.sendto(wrong, sender._address)
    sender.send(status())
    sender.close()
    ends = time.monotonic() + LIMIT
    while not kept._known and time.monotonic() < ends:
        time.sleep(0.01)
    assert registry.get_sample_value(f"{metrics.PREFIX}moves_total", {"model_name": "tiny"}) == 40
    assert caplog.text.count("a status of dynamic EPLB cannot be read") == 4


@pytest.mark.parametrize(("layers", "ranks"), [(1, 1), (3, 4), (16, 16), (58, 320)])
def test_the_heat_map_has_each_rank_of_each_layer_in_one_cell_and_fits_a_message(layers, ranks):
    heat = np.random.default_rng(0).random((layers, ranks))
    found = cells(heat.tolist())
    assert len(found) == min(layers, 16) * min(ranks, 16)
    relative = heat / heat.mean(axis=1, keepdims=True)
    count = 0
    for over_layers, over_ranks, load in found:
        (first, last), (left, right) = ([int(part) for part in (span.split("-") * 2)[:2]] for span in (over_layers, over_ranks))  # fmt: skip
        part = relative[first : last + 1, left : right + 1]
        assert load == round(part.max(), 4)
        count += part.size
    assert count == heat.size
    assert len(json.dumps(found)) < metrics._LARGEST_MESSAGE / 2


@pytest.fixture
def server():
    """A function that serves a text at /metrics, and returns the URL."""
    servers = []

    def start(text, code=200):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(code if self.path == "/metrics" else 404)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        servers.append(made)
        return f"http://127.0.0.1:{made.server_port}"

    yield start
    for made in servers:
        made.shutdown()
        made.server_close()


def test_the_status_of_a_server(registry, tmp_path, server):
    url = server(served(registry, tmp_path / "status", status()))
    for given in (url, f"{url}/", f"{url}/metrics", url.removeprefix("http://")):
        done = CliRunner().invoke(app, ["eplb", "status", given], env={"COLUMNS": "120"})
        assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if line.strip()]
    assert ["rebalances", "2"] in rows
    assert ["bytes", "sent", "over", "all", "ranks", "8,589,934,592"] in rows
    assert ["plans", "that", "moved", "nothing:", "failed", "1"] in rows
    assert [*map(str, (0, "0.50", "1.50"))] in rows  # of the heat map
    as_json = json.loads(CliRunner().invoke(app, ["eplb", "status", "--json", url]).output)
    assert as_json["moves_total"] == 40
    assert as_json["plans_dropped"] == {"failed": 1, "no load": 2}
    assert as_json["rank_load"][1] == {"layers": "0", "ranks": "1", "load": 1.5}


@pytest.mark.parametrize(
    ("text", "code", "path", "said"),
    [
        ("", 200, "", "the server has no metrics of dynamic EPLB yet"),
        ("vllm:num_requests_running 3\n", 200, "", "the server has no metrics of dynamic EPLB yet"),
        ("<html>", 200, "", "the answer of the server is no text of metrics"),
        ("", 500, "", "answers 500"),
        ("", 200, "/v1", "/v1/metrics answers 404"),
    ],
)  # fmt: skip
def test_a_server_without_such_metrics(server, text, code, path, said):
    done = CliRunner().invoke(app, ["eplb", "status", server(text, code) + path])
    assert done.exit_code == 1
    assert said in done.output


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host", "'ftp://host' must be the URL of a server"),
        ("http://", "'http://' must be the URL of a server"),
        ("http://127.0.0.1:bad", "cannot be read"),
        ("http://no.such.host.invalid", "cannot be read"),
    ],
)
def test_a_url_without_a_server(url, said):
    done = CliRunner().invoke(app, ["eplb", "status", url])
    assert done.exit_code == 1
    assert said in done.output
    assert "Traceback" not in done.output


PROCESS = """
import multiprocessing, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from prometheus_client import REGISTRY
from vllm_ascend import envs
from vllm_ascend.eplb.front_end import serve_metrics
from vllm_ascend.eplb.metrics import PREFIX, StatusSender
from vllm_ascend.eplb.report import Status

def moves():
    return REGISTRY.get_sample_value(f"{PREFIX}moves_total", {"model_name": "tiny"})

rank, count = map(int, sys.argv[1:])
parallel = SimpleNamespace(_api_process_rank=rank, _api_process_count=count)
for _ in range(2):  # vLLM may make its configuration more than once, and a process may have several engines
    serve_metrics(SimpleNamespace(parallel_config=parallel))
address = envs.eplb_status_socket()
assert Path(address).parent.stat().st_mode & 0o777 == 0o700
if rank < 0:
    for server in range(2):
        code = f"import sys; sys.argv[1:] = '{server}', '2'; exec({SOURCE!r})"
        child = multiprocessing.get_context("spawn").Process(target=exec, args=(code, {"SOURCE": SOURCE}))
        child.start()
        child.join()
        assert child.exitcode == 0
elif rank == 0:
    sender, ends = StatusSender(address, "tiny"), time.monotonic() + 60
    while not moves():
        sender.send(Status(moves=7))
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert moves() == 7
    for method in ("fork", "spawn"):  # the process that runs the engine makes its configuration once more
        with multiprocessing.get_context(method).Pool(1) as pool:
            pool.apply(serve_metrics, (SimpleNamespace(parallel_config=parallel),))
            assert pool.apply(envs.eplb_status_socket) == address
else:
    assert moves() is None
print(Path(address).parent)
"""


@pytest.mark.parametrize(("rank", "count"), [(0, 1), (-1, 2)], ids=["one-process", "two-api-servers"])
def test_the_processes_of_an_engine_find_each_other(rank, count):
    """The worker's part is played by the process that listens. One of two API servers listens; the folder goes with the process that made it."""
    done = subprocess.run(
        [sys.executable, "-c", f"SOURCE = {PROCESS!r}; exec(SOURCE)", str(rank), str(count)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.split()[-1]).exists()
