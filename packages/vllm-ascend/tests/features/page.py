# SPDX-License-Identifier: Apache-2.0
"""docs/features.md, from the results of runs."""

from features.table import APART, CELLS, FEATURES, PLAIN, engine, kind_of_model

NOT_RUN = ["not run", ""]
INTRODUCTION = """# Features

Written by `nox -s features` from its runs; do not edit.

What users switch on, each alone and each pair together, on tiny models with random weights (`packages/vllm-ascend/tests/features/`), served by vLLM {vllm} on the
simulated NPU in float32, W8A8 in bfloat16. Four prompts of 5 to 150 tokens (five with up to two pictures each for multimodal models) are answered with 8 greedy tokens, or with
a vector each by pooling models. The reference is Hugging Face transformers {transformers}, without any of the features. A pair is run on the model that both need: Qwen3, with
experts Qwen3-MoE, either in int8 or int4, Qwen2-VL, with experts Qwen3-VL-MoE. It has the options of both; expert parallelism is over two ranks of tensor parallelism where it is not beside DP.

| a cell says | that |
|---|---|
| works | an engine with both features said the tokens of the reference in every run, and showed that it used them; vectors are as near to it as their arithmetic allows; of pictures in int8 only the tokens that rounding leaves decided are compared |
| refused | vLLM or vllm-ascend refuses the configuration before workers start; the number is that of the refusal below |
| eager | as works, but that steps run operator by operator and not in graphs; the number is that of the line that says so |
| not run | nobody has looked yet |
| – | two forms of a checkpoint, of which a model has one |

**Of {all} cells, {works} work, {eager} work without graphs, {refused} are refused, {left} have not been run{other}.**

## Feature by feature

| feature | switched on by | model | what a run shows beside the right answers | alone |
|---|---|---|---|---|
"""
MODELS = {
    "dense": "Qwen3", "experts": "Qwen3-MoE", "int8": "Qwen3 in int8", "int4": "Qwen3 in int4", "pictures": "Qwen2-VL",
}  # fmt: skip


def cell_of(results, name):
    return results["cells"].get(name, {}).get("cell", NOT_RUN)


class Notes:
    """Reasons, each once, in the order in which they are first referred to."""

    def __init__(self):
        self.numbers = {}

    def shown(self, cell):
        """A cell as it stands in a table."""
        word, detail = cell
        if not detail:
            return word
        number = self.numbers.setdefault((word, detail), len(self.numbers) + 1)
        return f"{word} [{number}](#reasons)"

    def lines(self):
        return [f"{number}. *{word}*: {one_line(detail)}" for (word, detail), number in self.numbers.items()]


def one_line(text):
    """A quotation of Markdown's code, without what would end it."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def switched_on(feature):
    """The options of a feature as vLLM's arguments."""
    changed = engine([feature.name])
    given = {name: value for name, value in changed.items() if PLAIN.get(name) != value and name not in OF_RUNS}
    return ", ".join(f"`{name}={value!r}`" for name, value in given.items()) or "its checkpoint"


# Arguments that a run needs and no user must give for the feature.
OF_RUNS = ("skip_tokenizer_init", "max_model_len", "max_num_batched_tokens")


def counts(results):
    words = [cell_of(results, name)[0] for name in CELLS]
    known = {word: words.count(word) for word in ("works", "eager", "refused")}
    left = words.count("not run")
    other = len(words) - sum(known.values()) - left
    return {"all": len(words), "left": left, "other": f", {other} do neither" if other else "", **known}


def render(results):
    """The page."""
    notes = Notes()
    text = INTRODUCTION.format(**results["versions"], **counts(results))
    for name, feature in FEATURES.items():
        model = MODELS[kind_of_model([name])]
        text += (
            f"| {name} | {switched_on(feature)} | {model} | {feature.shown} | {notes.shown(cell_of(results, name))} |\n"
        )
    text += "\n## Feature by feature, in pairs\n\n"
    text += f"| | {' | '.join(feature.heading for feature in FEATURES.values())} |\n{'|---' * (len(FEATURES) + 1)}|\n"
    for row in FEATURES:
        cells = []
        for column in FEATURES:
            if {row, column} == APART:
                cells.append("–")
                continue
            name = row if row == column else next(name for name, pair in CELLS.items() if set(pair) == {row, column})
            cells.append(notes.shown(cell_of(results, name)))
        text += f"| {row} | {' | '.join(cells)} |\n"
    return text + "\n## Reasons\n\n" + "\n".join(notes.lines()) + "\n"
