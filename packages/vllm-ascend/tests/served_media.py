# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` of a model that reads pictures and of one that writes sound down: right and wrong input. `nox -s media` runs this file."""

import base64
import io
import wave

import numpy as np
import openai
import pytest
from PIL import Image
from served import Server, running
from zoo import ENTRIES, media, reference
from zoo.entries import Entry
from zoo.multimodal import ids_of, tokenizer

pytestmark = pytest.mark.slow
OPTIONS = ("--dtype", "float32", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(64 << 20))
RELAXED = {"ASCEND_SIM_STRICT": "0", "OMP_NUM_THREADS": "1"}
TRANSCRIPT = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
QUESTION = "w100 w101 w102"


def whisper():
    """The zoo's, with the words that a transcription begins with."""
    import transformers

    processor, config = ENTRIES["Whisper"].make()
    tokens = tokenizer(TRANSCRIPT)
    config |= {"decoder_start_token_id": ids_of(tokens, TRANSCRIPT[0])[0]}
    return transformers.WhisperProcessor(feature_extractor=processor.feature_extractor, tokenizer=tokens), config


WHISPER = Entry(
    name="Whisper", task="audio", config="WhisperConfig", model="WhisperForConditionalGeneration", make=whisper, encodes=True, mark=TRANSCRIPT[0]
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> folder and model in transformers."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("reader", "writer")}
    return {
        "reader": (folders["reader"], reference.checkpoint(ENTRIES["Qwen2VL"], folders["reader"])[0]),
        "writer": (folders["writer"], reference.checkpoint(WHISPER, folders["writer"])[0]),
    }


@pytest.fixture(scope="module")
def servers(made):
    """Of both models; they start side by side."""
    reader = (*OPTIONS, "--max-model-len", "512", "--limit-mm-per-prompt", '{"image": 2, "video": 0}')
    options = {"reader": reader, "writer": OPTIONS}
    started = {
        name: Server(folder, folder / "log.txt", *options[name], env=RELAXED) for name, (folder, _) in made.items()
    }
    with running(started, "EngineDeadError"):
        yield started


@pytest.fixture
def reader(servers):
    return servers["reader"].openai


@pytest.fixture
def writer(servers):
    return servers["writer"].openai


def pixels(seed, shape=(56, 84)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8))


def picture(seed, kind="PNG", shape=(56, 84)):
    written = io.BytesIO()
    pixels(seed, shape).save(written, kind)
    return written.getvalue()


def url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def ask(client, *urls, text=QUESTION, **more):
    """The ids of 12 greedy tokens."""
    content = [{"type": "image_url", "image_url": {"url": each}} for each in urls] + [{"type": "text", "text": text}]
    answer = client.chat.completions.create(
        model="model", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=12, logprobs=True,
        extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True}, **more,
    )  # fmt: skip
    return [int(each.token.removeprefix("token_id:")) for each in answer.choices[0].logprobs.content]


def test_a_picture_by_its_data_url_is_answered_as_by_transformers(reader, made):
    from transformers import AutoProcessor

    folder, model = made["reader"]
    processor = AutoProcessor.from_pretrained(folder)
    for seeds in ([0], [1], [0], [0, 1], []):
        images = {"images": [pixels(seed) for seed in seeds]} if seeds else {}
        text = "\n".join([PICTURE] * len(seeds) + [QUESTION])
        given = dict(processor(text=[text], **images, return_tensors="pt"))
        ids = given.pop("input_ids")[0].tolist()
        given.pop("attention_mask")
        expected, _ = reference.greedy(model, ids, given)
        assert ask(reader, *(url(picture(seed)) for seed in seeds)) == expected[:12], seeds


def test_formats_and_sizes(reader):
    both = ask(reader, url(picture(0, "JPEG"), "image/jpeg"), url(picture(1, "WEBP", (200, 60)), "image/webp"))
    assert len(both) == 12
    assert len(ask(reader, url(picture(0, shape=(1400, 1400))))) == 12  # the processor makes it smaller


BAD = {
    "broken": [url(picture(0)[:60])],
    "not base64": ["data:image/png;base64,%%%"],
    "no image": [url(b"%PDF-1.7 and so on", "application/pdf")],
    "a picture in words": [url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml")],
    "empty": [url(b"")],
    "no data": ["data:image/png"],
    "unknown scheme": ["gopher://127.0.0.1/picture.png"],
    "too many": [url(picture(seed)) for seed in range(3)],
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_picture_is_the_callers_fault(reader, case):
    with pytest.raises(openai.BadRequestError) as raised:
        ask(reader, *BAD[case])
    assert raised.value.body["message"]
    assert "Traceback" not in str(raised.value)
    assert len(ask(reader, url(picture(0)))) == 12  # the server lives


def test_a_file_of_the_server_is_not_read(reader):
    """vLLM answers with status 500 where 400 would be right; the server lives."""
    with pytest.raises(openai.APIStatusError, match="--allowed-local-media-path"):
        ask(reader, "file:///etc/hostname")
    assert len(ask(reader, url(picture(0)))) == 12


PARTS = {
    "sound": {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"}},
    "video": {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
    "unknown": {"type": "smell", "smell": "roses"},
}


@pytest.mark.parametrize("kind", PARTS)
def test_what_the_model_does_not_take_is_the_callers_fault(reader, kind):
    with pytest.raises(openai.BadRequestError):
        reader.chat.completions.create(
            model="model", messages=[{"role": "user", "content": [PARTS[kind]]}], max_tokens=4
        )
    assert len(ask(reader, url(picture(0)))) == 12


def test_a_long_text_beside_a_picture_is_refused_and_an_empty_one_is_answered(reader):
    with pytest.raises(openai.BadRequestError, match=r"maximum context length|512"):
        ask(reader, url(picture(0)), text="w100 " * 600)
    assert len(ask(reader, url(picture(0)), text="")) == 12


def sound(seed, samples=16000):
    """A WAV file of 16-bit samples, and what it holds."""
    values = (np.random.default_rng(seed).normal(size=samples) * 3000).astype(np.int16)
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(media.SAMPLING_RATE)
        file.writeframes(values.tobytes())
    return written.getvalue(), values.astype(np.float32) / 32768


def written_down(client, content, **more):
    answer = client.audio.transcriptions.create(
        model="model", file=("sound.wav", content), language="en", temperature=0, **more
    )
    return answer.text


def test_a_sound_is_written_down_as_by_transformers(writer, made):
    from transformers import AutoProcessor

    folder, model = made["writer"]
    processor = AutoProcessor.from_pretrained(folder)
    ids = processor.tokenizer.convert_tokens_to_ids(TRANSCRIPT)
    texts = set()
    for seed, samples in ((0, 16000), (1, 8000)):
        content, values = sound(seed, samples)
        features = processor.feature_extractor(values, sampling_rate=media.SAMPLING_RATE, return_tensors="pt")
        expected, _ = reference.greedy(
            model, ids, {"input_features": features["input_features"], "decoder_input_ids": None}
        )
        text = written_down(writer, content)
        assert text.split()[: len(expected)] == processor.tokenizer.decode(expected).split()
        texts.add(text)
    assert len(texts) == 2


BAD_SOUNDS = {"broken": b"RIFF" + bytes(40), "empty": b"", "a picture": picture(0)}


@pytest.mark.parametrize("case", BAD_SOUNDS)
def test_a_bad_sound_is_the_callers_fault(writer, case):
    with pytest.raises(openai.BadRequestError) as raised:
        written_down(writer, BAD_SOUNDS[case])
    assert raised.value.body["message"]
    assert written_down(writer, sound(0)[0])  # the server lives


def test_a_language_that_is_none_is_the_callers_fault(writer):
    with pytest.raises(openai.BadRequestError):
        writer.audio.transcriptions.create(model="model", file=("sound.wav", sound(0)[0]), language="xx")
