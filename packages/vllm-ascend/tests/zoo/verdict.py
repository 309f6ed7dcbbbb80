# SPDX-License-Identifier: Apache-2.0
"""What an entry's runs are worth: one cell for each column of the page."""

import hashlib
import inspect
import json
import re

from rounding import excess

from zoo.trial import KINDS

COLUMNS = {
    "float32": "whole prompts and decoding, float32",
    "cache": "the same again, from the prefix cache",
    "chunked": "prompts in chunks of 32 tokens",
    "tp": "tensor parallelism over 2 ranks",
    "pp": "two pipeline stages",
    "ep": "expert parallelism over 2 ranks",
    "bfloat16": "bfloat16 in strict mode",
    "graphs": "whether decoding steps were replays of graphs",
    "tower": "whether a tower's attention is the NPU's kernel",
}
GOOD = ("equal", "as near", "captured", "kernel", "-", "not run")
BLOCK_TOKENS = 128


def digest(entry):
    """Changes with everything that an entry says about the model and the runs."""
    made = inspect.getsource(entry.make) if entry.make else ""
    said = (entry.config, entry.model, entry.sizes, entry.ranks, entry.engine, entry.mark, made)
    said += (entry.names,) if entry.names else ()
    said += (entry.attention,) if entry.attention != "eager" else ()
    said += (entry.chunk,) if entry.chunk != 32 else ()
    said += (entry.published,) if entry.published else ()
    said += ("turned experts",) if entry.turned_experts else ()
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def count(found, expected):
    """Tokens that are equal, in each answer up to the first that is not."""
    total = 0
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            if one != other:
                break
            total += 1
    return total


def equality(found, expected):
    """`equal`, or how many tokens of how many."""
    right, all_of_them = count(found, expected), sum(map(len, expected))
    return ["equal", ""] if right == all_of_them else [f"{right} of {all_of_them}", ""]


def of_prompts(said, reference):
    """The cell of whole prompts. Where tokens differ: how many are the most likely one after the reference's own, and how far log-probabilities are."""
    cell = equality(said["whole"]["tokens"], reference["tokens"])
    if cell[0] != "equal":
        rows = [entry for row in said["forced"] for entry in row]
        exact = [logprob for row in reference["logprobs"] for logprob in row]
        error = sum(abs(ours - theirs) for (ours, _), theirs in zip(rows, exact, strict=True)) / len(rows)
        right = sum(rank == 1 for _, rank in rows)
        cell = [f"{right} of {len(rows)}", f"mean error of log-probabilities {error:.2g}"]
    return cell


def of_cache(said, reference):
    """The cell of the second run: the prompts of more than a block must have come from the cache. Beside a recurrent state blocks may be longer than all prompts."""
    block = said["block"]
    long = [n for n, request in enumerate(reference["requests"]) if block < len(request["ids"])]
    if block == 0 or (block > BLOCK_TOKENS and not long):
        why = (
            f"a block has {block} tokens, more than any prompt"
            if block
            else "vLLM leaves the cache off for such models"
        )
        return ["-", why]
    hits = [said["again"]["cached"][n] for n in long]
    if not all(hits):
        return ["no hit", f"{hits} tokens of the prompts beyond a block came from the cache"]
    return equality(said["again"]["tokens"], reference["tokens"])


def of_tokens(said, reference):
    return equality(said["whole"]["tokens"], reference["tokens"])


def of_bfloat16(said, reference):
    import torch

    exact, errors = torch.tensor(reference["bfloat16"]["exact"]), torch.tensor(reference["bfloat16"]["errors"])
    ours = (torch.tensor(said["logprobs"]) - exact).abs()
    found = excess(ours, errors)
    means = f"mean error {ours.mean():.3g}, of transformers' bfloat16 {errors.mean():.3g}"
    return ["as near", means] if found <= 1 else ["off", f"{means}, {found:.2f} times what is admissible"]


def of_graphs(said, reference):
    return ["captured" if said["replays"] else "-", ""]


def of_tower(said, reference):
    calls = said["of_torch"]
    return ["torch", f"{calls} calls of torch's attention"] if calls else ["kernel", ""]


# Column -> (kind of run, its engine, the cell of what the engine said).
CELLS = {
    "float32": ("one", "one", of_prompts),
    "cache": ("one", "one", of_cache),
    "chunked": ("one", "chunked", of_tokens),
    "tp": ("tp", "tp", of_tokens),
    "pp": ("pp", "pp", of_tokens),
    "ep": ("ep", "ep", of_tokens),
    "bfloat16": ("bfloat16", "bfloat16", of_bfloat16),
    "graphs": ("one", "one", of_graphs),
    "tower": ("one", "one", of_tower),
}


def raised_in(text):
    """The messages of exceptions in what a run printed, where workers begin their lines with who they are; else the last line."""
    lines = [re.sub(r"^\(.*?\] |^\[rank\d+\]: ", "", line).strip() for line in text.splitlines() if line.strip()]
    return [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)(: |$)", line)] or lines[-1:]


def of_workers(file, message):
    """What the first worker raised, where the engine only says that one did."""
    if "root cause" not in message and "EngineDeadError" not in message:
        return ""
    found = raised_in(file.read_text(errors="replace"))
    return f" ({found[0]})" if found else ""


def refused(folder):
    """The reason why an entry is refused on one rank in float32; None where it is not, or was not asked yet. It is then refused in every other way."""
    file = folder / "one.json"
    return json.loads(file.read_text())["one"].get("refused") if file.exists() else None


def cells(entry, folder, ended, kinds=KINDS):
    """Column -> [word, detail].

    Args:
        entry: the entry.
        folder: where its runs wrote.
        ended: kind of run -> how its process ended, where it did not end well.
        kinds: the kinds of runs that were to be made.
    """
    if "reference" in ended:
        return {column: ["no reference", ended["reference"]] for column in COLUMNS}
    reference = json.loads((folder / "reference.json").read_text())
    found = {}
    for column, (kind, engine, judge) in CELLS.items():
        # vLLM neither caches nor cuts the prompts of a model with an encoder.
        absent = {
            "ep": not entry.experts,
            "tower": entry.make is None,
            "cache": entry.encodes,
            "chunked": entry.encodes,
        }
        if absent.get(column):
            found[column] = ["-", ""]
            continue
        if kind not in kinds and not refused(folder):
            found[column] = ["not run", ""]
            continue
        file = folder / f"{'one' if refused(folder) else kind}.json"
        engine = "one" if refused(folder) else engine
        said = json.loads(file.read_text()).get(engine) if file.exists() else None
        if said is None:
            found[column] = ["failed", ended.get(kind, "the run did not come so far")]
        elif outcome := next((word for word in ("refused", "failed") if word in said), None):
            found[column] = [outcome, said[outcome] + of_workers(folder / f"{kind}.txt", said[outcome])]
        else:
            found[column] = uncaptured(folder / f"{kind}.txt") or judge(said, reference)
    return found


def uncaptured(file):
    """The cell of a run that printed of a step that it could not capture in a graph, or None."""
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return next((["not captured", line] for line in lines if "cannot be captured in a graph" in line), None)


def is_good(result):
    """Whether every cell is equal, or the whole entry is refused. Pipeline stages alone may be refused: vLLM has not made all models for them."""
    words = {column: word for column, (word, _) in result["cells"].items()}
    if words.get("pp") == "refused" != words["float32"]:
        del words["pp"]
    return set(words.values()) <= {"refused", "-"} or set(words.values()) <= set(GOOD)
