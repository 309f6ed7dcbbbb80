# SPDX-License-Identifier: Apache-2.0
"""What a prompt costs in latent attention: operations and bytes read from the cache, in the plain form, in the absorbed form, and by formula.

Run: python benchmarks/attention/run.py. It writes RESULTS.md beside itself and needs ascend-sim. All figures are counted or follow from the step that the
product's builder made, so they are the same on every machine; nothing here is a time on hardware.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from ascend_sim.counters import counting

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "packages" / "vllm-ascend" / "tests"))

from latent_requests import LATENT, ROPE, LatentRequests  # noqa: E402

HEADS, WIDTH, BYTES = 8, 128, 2
CASES = (  # new tokens and cached ones of a request
    (17, 0), (17, 1536), (64, 1536), (128, 0), (128, 128), (128, 1536), (160, 1536), (176, 1536), (512, 0), (512, 1536),
)  # fmt: skip
PASSES = 4  # over projected keys and values: the projection writes them, the copy that makes them contiguous reads and writes them, the kernel reads them
HEAD = """<!-- written by benchmarks/attention/run.py -->
# Latent attention: what a prompt costs

One request, {heads} heads, keys of 128 + 64 and values of 128 numbers projected up from latents of 512, bfloat16, with C cached and T new tokens. Operations of all matrix
products: attention, and the projections that belong to a form (to keys and values, or of queries into the latent space and of results out of it). Bytes: latents and rotated keys that
are read from the cache, and in the plain form what the cached tokens' projected keys and values cost, which are written, made contiguous and read: 4 times {heads} x 256 x 2 bytes a token.

The product takes the form of fewer operations. With P pairs of a new token and a key that it sees, the absorbed form multiplies 1088 - 320 = 768 numbers more for each pair and head, and the
plain form 512 x 256 more for each cached token. So with a long context the absorbed form is the cheaper one up to 170 new tokens, with a short one for fewer, and without one never. Bytes do not
move that place down: in pieces of 16 tokens the absorbed form reads 72 T bytes a cached token, at 170 new tokens 12 KiB, and the plain form 2 KiB a head and token, 16 KiB with the 8 heads
that are the fewest of a DeepSeek-V3 (128 heads over 16 ranks). Requests of at most 16 new tokens take the absorbed form always.

The least is that of the cheaper form with each pair of a token and a key that it sees computed once, and the cache read once: with P = C T + T (T + 1) / 2 pairs and N heads,
2 N (P (192 + 128) + (C + T) 512 (128 + 128)) operations in the plain form, 2 N (P (576 + 512) + T 512 (128 + 128)) in the absorbed one.

| T | C | plain, MFLOP | absorbed, MFLOP | least | taken | taken / least | plain, KiB | absorbed, KiB | least |
|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|
"""


def cost(tokens: int, context: int, plain: bool) -> tuple[int, int]:
    """Operations and bytes of one form, of the calls that the product makes."""
    requests = LatentRequests([tokens], [context], heads=HEADS)
    requests.take(plain=plain)
    requests.write()
    with counting() as work:
        requests.attend()
    step = requests.step
    if step.prefill is not None:
        cached = sum(chunk.kv_ends[-1] for chunk in step.prefill.chunks)
        return work.delta.flops, cached * (LATENT + ROPE + PASSES * HEADS * 2 * WIDTH) * BYTES
    assert step.decode is not None
    projections = 2 * HEADS * tokens * LATENT * 2 * WIDTH  # by vLLM's layer, around the kernel
    return work.delta.flops + projections, sum(step.decode.kv_lengths) * (LATENT + ROPE) * BYTES


def taken(tokens: int, context: int) -> str:
    """The form that the product takes."""
    return "plain" if LatentRequests([tokens], [context], heads=HEADS).step.prefill is not None else "absorbed"


def least(tokens: int, context: int) -> tuple[int, int]:
    """Operations of each form, by formula."""
    pairs = context * tokens + tokens * (tokens + 1) // 2
    plain = pairs * (2 * WIDTH + ROPE) + (context + tokens) * LATENT * 2 * WIDTH
    absorbed = pairs * (2 * LATENT + ROPE) + tokens * LATENT * 2 * WIDTH
    return 2 * HEADS * plain, 2 * HEADS * absorbed


def main() -> None:
    """Write the table."""
    lines = []
    for tokens, context in CASES:
        (plain, plain_bytes), (absorbed, absorbed_bytes) = cost(tokens, context, True), cost(tokens, context, False)
        best, form = min(least(tokens, context)), taken(tokens, context)
        shown = (f"{plain / 1e6:,.1f}", f"{absorbed / 1e6:,.1f}")
        ratio = (plain if form == "plain" else absorbed) / best
        read = (f"{count / 1024:,.0f}" for count in (plain_bytes, absorbed_bytes, context * (LATENT + ROPE) * BYTES))
        lines.append(f"| {tokens} | {context} | {' | '.join(shown)} | {best / 1e6:,.1f} | {form} | {ratio:.2f} | {' | '.join(read)} |")  # fmt: skip
    text = HEAD.format(heads=HEADS) + "\n".join(lines) + "\n"
    (HERE / "RESULTS.md").write_text(text)
    print(text)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
