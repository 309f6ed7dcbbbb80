# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` as a user runs it, called with the OpenAI client."""

import json
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from engine_processes import LIMIT, end, listening_port, start, until

pytestmark = pytest.mark.slow
# The embedding and the LM head in a group of one rank: what the front end refuses is the same for more.
SHARED = {"embedding_tensor_parallel_size": 1, "lmhead_tensor_parallel_size": 1}


def is_answered(client):
    try:
        return client.models.list()
    except openai.APIConnectionError:
        return None


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    """A server process, in a session of its own, and a client."""
    port = 0  # the kernel chooses
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(smollm2), "--served-model-name", "smollm2", "--port", str(port),
        "--additional-config", json.dumps({"finegrained_tp_config": SHARED}), "--max-model-len", "512", "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(128 << 20), "--host", "127.0.0.1",
    ]  # fmt: skip
    process = start(command, log, {})

    try:
        port = listening_port(process, log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=LIMIT, max_retries=0)
        until(lambda: is_answered(client), process, log)
        yield process, client, log
        client.close()
    finally:
        end(process)


def chat(client, text, **options):
    return client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": text}], temperature=0, **options
    )


def test_streaming_chat(server):
    _, client, _ = server
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in chat(client, "Name the capital of France.", max_tokens=24, stream=True)
    ]
    assert len(parts) > 3
    assert "Paris" in "".join(parts)


def test_sixteen_requests_at_once(server):
    _, client, _ = server

    def ask(i):
        return chat(client, f"Count from {i} to {i + 3}.", max_tokens=12, seed=i).usage.completion_tokens

    with ThreadPoolExecutor(16) as pool:
        assert all(0 < count <= 12 for count in pool.map(ask, range(16)))


def test_structured_output(server):
    _, client, _ = server
    answer = chat(
        client, "Is the sky blue?", max_tokens=8, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert answer.choices[0].message.content in ("yes", "no")


def test_a_seed_gives_the_same_sample_again(server):
    _, client, _ = server
    ask = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 1.0}
    first, again, other = (client.completions.create(**ask, seed=seed).choices[0].text for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_a_client_that_disconnects(server):
    _, client, _ = server
    stream = chat(client, "Write a very long story.", max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    assert chat(client, "Hello", max_tokens=2).usage.completion_tokens <= 2


def test_errors_of_the_api(server):
    _, client, _ = server
    with pytest.raises(openai.BadRequestError, match=r"maximum context length|512"):
        chat(client, "word " * 2000, max_tokens=4)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such-model", prompt="x", max_tokens=1)


def test_a_refused_request_gets_its_reason(server):
    _, client, _ = server
    ask = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 2}
    for more in ({"extra_body": {"prompt_logprobs": 0}}, {"echo": True, "logprobs": 1}):
        with pytest.raises(
            openai.BadRequestError, match=r"log-probabilities of the prompt .* are not available"
        ) as caught:
            client.completions.create(**ask, **more)
        assert caught.value.param == "prompt_logprobs"
    with pytest.raises(openai.BadRequestError, match="log-probabilities of the prompt"):
        chat(client, "Hello", max_tokens=2, extra_body={"prompt_logprobs": 1})
    assert client.completions.create(**ask, logprobs=1).choices[0].logprobs is not None


def test_sigterm_ends_everything(server, alive):
    """The last test of this module: afterwards the server is gone, and so is every process that it started."""
    process, _, log = server
    process.send_signal(signal.SIGTERM)
    until(lambda: process.poll() is not None, process, log)
    until(lambda: not alive(process.pid), process, log)
    served, triggered, ending = log.read_text().partition("[shutdown] API server: shutdown triggered")
    assert triggered
    assert "Traceback" not in served
    # vLLM's front end listens on while it stops its engine. Where it sees the engine gone first, it logs an EngineDeadError: a race of its own.
    errors = re.findall(r"\w*(?:Error|Exception)\b(?=:)", ending)
    assert set(errors) <= {"EngineDeadError"}, ending[-3000:]
    assert ending.count("Traceback") == len(errors)
    assert "Application shutdown complete" in ending
