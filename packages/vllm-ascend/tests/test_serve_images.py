# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` of a model that reads images, with right and wrong input, through the OpenAI client."""

import base64
import io
import sys

import numpy as np
import openai
import pytest
from engine_processes import LIMIT, end, listening_port, start, until, what_it_said
from PIL import Image
from zoo import ENTRIES, reference

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """The client of a server of a tiny Qwen2-VL."""
    folder = tmp_path_factory.mktemp("images")
    reference.checkpoint(ENTRIES["Qwen2VL"], folder)
    log = folder / "log.txt"
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--served-model-name", "tiny", "--port", "0", "--host", "127.0.0.1",
        "--max-model-len", "512", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(32 << 20), "--dtype", "bfloat16",
        "--limit-mm-per-prompt", '{"image": 2, "video": 0}',
    ]  # fmt: skip
    process = start(command, log, {})

    def reached():
        assert process.poll() is None, what_it_said(log)
        return listening_port(process)

    def answered():
        try:
            return made.models.list()
        except openai.APIConnectionError:
            return None

    try:
        port = until(reached, process, log)
        made = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=LIMIT, max_retries=0)
        until(answered, process, log)
        yield made
        made.close()
    finally:
        end(process)


def url(picture, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def picture(seed, kind="PNG", shape=(56, 84)):
    written = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)).save(written, kind)
    return written.getvalue()


def ask(client, *urls, **more):
    content = [{"type": "text", "text": "w100 w101 w102"}] + [
        {"type": "image_url", "image_url": {"url": each}} for each in urls
    ]
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=12,
        logprobs=True,
        **more,
    )
    return [(each.token, each.logprob) for each in answer.choices[0].logprobs.content]


def test_a_picture_is_seen(client):
    """The same picture gives the same answer, from the processor's cache; another gives another; and so does none."""
    first, again, other, none = (
        ask(client, *urls) for urls in ([url(picture(0))], [url(picture(0))], [url(picture(1))], [])
    )
    assert [token for token, _ in first] == [token for token, _ in again]
    assert first != other
    assert first != none


def test_formats_and_sizes(client):
    both = ask(client, url(picture(0, "JPEG"), "image/jpeg"), url(picture(1, "WEBP", (200, 60)), "image/webp"))
    assert len(both) == 12


BAD = {
    "broken": [url(picture(0)[:60])],
    "not base64": ["data:image/png;base64,%%%"],
    "no image": [url(b"%PDF-1.7 and so on", "application/pdf")],
    "empty": [url(b"")],
    "no data": ["data:image/png"],
    "unknown scheme": ["gopher://127.0.0.1/picture.png"],
    "a file of the server's": ["file:///etc/hostname"],
    "too many": [url(picture(seed)) for seed in range(3)],
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_picture_is_the_callers_fault(client, case):
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, *BAD[case])
    assert raised.value.status_code == 400
    assert raised.value.body["message"]
    assert "Traceback" not in str(raised.value)
    assert len(ask(client, url(picture(0)))) == 12  # the server lives


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
        {"type": "smell", "smell": "roses"},
    ],
    ids=["audio", "video", "unknown"],
)
def test_what_the_model_does_not_take_is_the_callers_fault(client, part):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [part]}], max_tokens=4)
    assert len(ask(client, url(picture(0)))) == 12


def test_a_huge_picture_is_scaled_down(client):
    assert len(ask(client, url(picture(0, shape=(1400, 1400))))) == 12
