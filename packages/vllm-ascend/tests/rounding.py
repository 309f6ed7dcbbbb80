# SPDX-License-Identifier: Apache-2.0
"""How far an implementation in bfloat16 may be from the truth: as far as Hugging Face transformers is, in bfloat16 and on the same machine.

The truth is the same model with the same weights in float32. The reference is an ensemble of bfloat16 runs that are all right and add up
their products in different orders. Rounding is chaotic: after a few layers each run has errors of its own, of one distribution. If what
is tested is right as well, then at each position its error is one more of that distribution, and which of the M + 1 errors is its own is
a matter of chance. Over B positions the sum of d = (own error - mean of the others) has expectation 0 under these exchanges, and each d
lies in a range r = (1 + 1/M) (largest - smallest of the M + 1 errors). Hoeffding's inequality then bounds the chance that a right
implementation fails: P(sum d >= s) <= exp(-2 s^2 / sum r^2). Nothing in it depends on a machine, and nothing is fitted.

Errors of neighbouring positions have something in common, the cached keys and values of the tokens before them: so positions count as
blocks, of which the mean error is taken.
"""

import math

import torch
from torch.overrides import TorchFunctionMode

FALSE_ALARM = 1e-6  # the chance that a right implementation fails one comparison, at most
BLOCK = 4  # positions


class OtherOrder(TorchFunctionMode):
    """Inside, `linear` adds up its products in a random order, and rounds each result to bfloat16.

    Args:
        seed: of the orders.
        parts: each product is the sum of so many partial ones, each rounded, as over tensor parallel ranks.
    """

    def __init__(self, seed, parts=1):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.parts = parts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.nn.functional.linear:
            return function(*args, **kwargs)
        return self.linear(*args, **kwargs)

    def linear(self, x, weight, bias=None):
        order = torch.randperm(x.shape[-1], generator=self.generator)
        # Also where the model computes in float32, as some routers do in transformers and not in vLLM.
        products = [(x[..., part] @ weight[:, part].mT).bfloat16() for part in order.chunk(self.parts)]
        return (sum(products) if bias is None else sum(products) + bias.bfloat16()).to(x.dtype)


def own_logprobs(model, prompts):
    """Log-probabilities that a Hugging Face model gives to the prompts' own tokens but the first, `[positions]` in float32.

    Args:
        model: the model.
        prompts: of each its token ids, or all arguments of the model, for one sequence.
    """
    inputs = [prompt if isinstance(prompt, dict) else {"input_ids": torch.tensor([prompt])} for prompt in prompts]
    with torch.inference_mode():
        rows = [model(**each).logits[0, :-1].float().log_softmax(-1) for each in inputs]
    own = [each.get("decoder_input_ids", each.get("input_ids"))[0, 1:, None] for each in inputs]
    return torch.cat([logprobs.gather(1, ids)[:, 0] for logprobs, ids in zip(rows, own, strict=True)])


def errors(ours, exact):
    """Absolute errors of log-probabilities, `[positions]`."""
    assert len(ours) == len(exact)
    return (torch.as_tensor(ours) - exact).abs()


def ensemble(model, exact, prompts, members=3, parts=1):
    """Absolute errors of a bfloat16 model's log-probabilities in several orders of summation, `[members, positions]`."""
    made = []
    for seed in range(members):
        with OtherOrder(seed, parts):
            made.append(errors(own_logprobs(model, prompts), exact))
    return torch.stack(made)


def load(folder):
    """A checkpoint's model in bfloat16, which rounds after every operation."""
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **eager)


def in_bfloat16(folder, prompts, **options):
    """The log-probabilities that a checkpoint's bfloat16 weights give in float32, and the errors of bfloat16 (`ensemble`)."""
    exact = own_logprobs(load(folder).float(), prompts)
    return exact, ensemble(load(folder), exact, prompts, **options)


def prompt_logprobs(result, run=0):
    """Log-probabilities of the prompts' own tokens in one run of a job of `run_engine.py`."""
    return [logprob for output in result["runs"][run] for logprob, _ in output["prompt_tokens"]]


def excess(ours, reference, block=BLOCK):
    """How many times the admissible sum the errors exceed the reference's by: above 1 (or NaN) they are no rounding errors.

    Args:
        ours: errors `[positions]`.
        reference: errors of right implementations, `[members, positions]`.
        block: positions that count as one.
    """
    everyone = torch.cat([ours[None], reference]).double()
    blocks = torch.stack([part.mean(1) for part in everyone.split(block, dim=1)], dim=1)
    differences = blocks[0] - blocks[1:].mean(0)
    ranges = (1 + 1 / len(reference)) * (blocks.amax(0) - blocks.amin(0))
    admissible = math.sqrt(math.log(1 / FALSE_ALARM) / 2 * ranges.square().sum().item())
    return differences.sum().item() / admissible


def assert_as_near(ours, reference, what=""):
    """Fails if the errors are greater than those of the reference, beyond chance."""
    found = excess(ours, reference)
    means = f"mean error {ours.mean():.4f}, of the reference {reference.mean():.4f}, over {len(ours)} positions"
    print(f"{what} {means}: {found:.2f} times what is admissible")
    assert found <= 1, f"{what} {means}: {found:.2f} times what is admissible"


def assert_caught(ours, reference, what=""):
    """Fails if `assert_as_near` would not: a wrong implementation must be told from rounding."""
    found = excess(ours, reference)
    print(
        f"{what} mean error {ours.mean():.4f}, of the reference {reference.mean():.4f}: {found:.2f} times what is admissible"
    )
    assert not found <= 1, f"{what} would not be caught: {found:.2f} times what is admissible"
