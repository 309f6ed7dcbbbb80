# SPDX-License-Identifier: Apache-2.0
"""What the proxy of `examples/prefill_decode` says to wrong requests, and where its servers are not there. `kv_engines.py` has it before real ones."""

import importlib.util
import socket

import pytest
from prefill_decode import PROXY
from starlette.testclient import TestClient


@pytest.fixture(scope="module")
def proxy():
    spec = importlib.util.spec_from_file_location("proxy", PROXY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def client(proxy):
    """Before a port on which nobody listens as long as the test has it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with TestClient(proxy.application([nobody], [nobody])) as found:
            yield found


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        ("{no", 400, "the request is not JSON"),
        ("[1]", 400, "the request is no JSON object but list"),
        ('{"prompt": "x"}', 502, "no answer from http://127.0.0.1:"),
    ],
)
def test_what_cannot_be_answered(content, status, said, client):
    answer = client.post("/v1/completions", content=content)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_models_of_a_server_that_is_not_there(client):
    assert client.get("/v1/models").status_code == 502
    assert client.get("/health").status_code == 200


def test_what_the_first_server_is_asked(proxy):
    """One token, of one answer, at once; and to keep what it computed."""
    given = {
        "prompt": "x",
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": 2,
        "seed": 3,
    }
    assert proxy.for_prefill(given) == {"prompt": "x", "max_tokens": 1, "stream": False, "seed": 3, "kv_transfer_params": proxy.KEEP}  # fmt: skip
    assert proxy.for_prefill({"max_completion_tokens": 9})["max_completion_tokens"] == 1
    assert given["stream"]
