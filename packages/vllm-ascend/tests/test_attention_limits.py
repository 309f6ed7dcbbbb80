# SPDX-License-Identifier: Apache-2.0
"""The product's limits are those of the kernels' contracts, and what is within them breaks no rule when it runs, in the simulator's strict mode."""

import random

import pytest
import torch
from ascend_sim.contracts import rules
from latent_requests import LatentRequests
from paged_steps import Step
from vllm_ascend.attention import kernels, limits, probe
from vllm_ascend.attention.limits import Attention, broken

RULES = rules()


def rule(name, operator="npu_fused_infer_attention_score"):
    return RULES[f"{operator}.{name}"]


def latent_rule(name):
    return rule(name, "npu_fused_infer_attention_score_v2")


def test_limits_are_those_of_the_contracts():
    assert rule("tnd-head-size").allowed == limits.HEAD_SIZES
    assert rule("head-size").most == kernels.WIDE_HEAD_SIZE
    assert rule("alignment").multiple == kernels.WIDE_HEAD_MULTIPLE
    assert rule("width").most == limits._MOST_NUMBERS_A_QUERY
    assert rule("block-size").allowed == limits.BLOCK_SIZES
    assert rule("heads").most == limits._MOST_HEADS
    assert rule("head-ratio").most == limits._MOST_QUERIES_A_KEY
    assert rule("paged-width").most == limits._MOST_NUMBERS_A_TOKEN
    assert limits._MOST_NUMBERS == rule("paged-numbers").most == latent_rule("paged-numbers").most
    assert (rule("tnd-tokens").most, rule("batch").most) == (limits._MOST_TOKENS, limits._MOST_REQUESTS)
    assert latent_rule("latent-heads").allowed == limits._LATENT_HEADS
    assert limits.LATENT_BLOCK_SIZE in latent_rule("latent-block-size").allowed
    assert latent_rule("latent-queries").most == limits.LATENT_QUERIES
    assert latent_rule("plain-value-size").allowed == (limits.PLAIN_SIZE,)
    assert latent_rule("rope-head-size").allowed == (limits._LATENT_SIZES["kv_lora_rank"], limits.PLAIN_SIZE)
    assert latent_rule("rope-size").allowed == (limits._LATENT_SIZES["qk_rope_head_dim"],)
    assert latent_rule("tnd-tokens").most == limits._SECOND_MOST_TOKENS
    assert latent_rule("lengths").most == limits.LATENT_PIECES


def kernel_block(attention):
    """The block size that vLLM hands to the kernel."""
    from vllm.v1.worker.utils import select_common_block_size
    from vllm_ascend.attention.gqa import AscendAttentionBackend
    from vllm_ascend.attention.mla import AscendMLABackend

    backend = AscendAttentionBackend if attention.latent is None else AscendMLABackend
    return select_common_block_size(attention.block_size or backend.get_preferred_block_size(16), [backend])


def random_step(draw, block):
    """New tokens and cached ones of a few requests: prompts, chunks and decoding."""
    count = draw.randint(1, 4)
    return [draw.choice((1, 1, 2, 15, 16, 17, 40)) for _ in range(count)], [
        draw.choice((0, 1, block - 1, block, block + 3)) for _ in range(count)
    ]


def grouped(draw):
    ranks, kv_heads = draw.choice((1, 1, 2, 4)), draw.choice((1, 2, 3, 8, 16))
    heads = kv_heads * draw.choice((1, 1, 2, 3, 7, 65, 130))
    return Attention(
        heads=heads, kv_heads=kv_heads, head_size=(size := draw.choice((8, 40, 64, 72, 80, 100, 128, 160, 192, 200, 256, 320, 512, 520))), value_size=size,
        ranks=ranks, dtype=draw.choice(("bfloat16",) * 4 + ("float16", "float32")), block_size=draw.choice((0, 0, 0, 128, 384, 512, 16, 192, 1024)),
        sinks=draw.choice((False, False, True)), window=(draw.choice((False, False, True))),
    )  # fmt: skip


def latent(draw):
    heads, nope, value = (
        draw.choice((1, 2, 4, 6, 16)),
        draw.choice((64, 128, 128, 192)),
        draw.choice((96, 128, 128, 256)),
    )
    attention = Attention(
        heads=heads, kv_heads=heads, head_size=576, value_size=576, latent=draw.choice(((512, 64),) * 4 + ((256, 64), (512, 32))),
        ranks=draw.choice((1, 1, 2)), dtype=draw.choice(("bfloat16",) * 3 + ("float16", "float32")),
        block_size=draw.choice((0, 0, 16, 128, 256)), plain_form=limits.has_plain_form(nope, value),
    )  # fmt: skip
    return attention, nope, value


def refused(attention):
    """Whether the start refuses the configuration, or the worker before it loads the model."""
    if list(broken(attention)):
        return True
    try:
        probe.check(attention, torch.device("npu"))
    except ValueError:
        return True
    return False


CASES = 120


@pytest.fixture(scope="module")
def taken():
    """Of each kind of attention, how many random configurations were within the limits."""
    counts = {"grouped": 0, "latent": 0}
    yield counts
    assert all(CASES // 8 < count < CASES for count in counts.values()), counts


@pytest.mark.parametrize("part", range(4))
def test_heads_within_the_limits_break_no_rule(taken, part):
    from vllm_ascend.attention.sinks import AscendSinkAttentionBackend

    draw = random.Random(part)
    for _ in range(CASES // 4):
        attention = grouped(draw)
        if refused(attention):
            continue
        taken["grouped"] += 1
        block = kernel_block(attention)
        lengths, context = random_step(draw, block)
        heads = attention.heads // attention.ranks
        sinks = {"backend": AscendSinkAttentionBackend, "sinks": torch.randn(heads).bfloat16().npu()}
        Step(
            lengths, context, heads=heads, kv_heads=max(attention.kv_heads // attention.ranks, 1),
            size=attention.head_size, block=block, window=draw.choice((1, 20)) if attention.window else None, **(sinks if attention.sinks else {}),
        ).run()  # fmt: skip


@pytest.mark.parametrize("part", range(4))
def test_latent_attention_within_the_limits_breaks_no_rule(taken, part):
    draw = random.Random(part)
    for _ in range(CASES // 4):
        attention, nope, value = latent(draw)
        if refused(attention):
            continue
        taken["latent"] += 1
        assert kernel_block(attention) == limits.LATENT_BLOCK_SIZE
        LatentRequests(*random_step(draw, 128), heads=attention.heads // attention.ranks, nope=nope, value=value).run()
