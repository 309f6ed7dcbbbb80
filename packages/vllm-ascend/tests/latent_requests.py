# SPDX-License-Identifier: Apache-2.0
"""A step of random requests through the real backend of latent attention, without an engine."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from attention_bounds import attend, causal
from paged_steps import description, paged

__all__ = ["BLOCK", "LATENT", "ROPE", "LatentRequests"]

LATENT, ROPE, BLOCK = 512, 64, 128
SCALE = 0.05


def config(nope, value):
    """What the builder asks of vLLM's configuration; it reads context in chunks of 512 tokens."""
    text = SimpleNamespace(kv_lora_rank=LATENT, qk_nope_head_dim=nope, qk_rope_head_dim=ROPE, v_head_dim=value)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text, max_model_len=16),
        cache_config=SimpleNamespace(block_size=BLOCK, num_gpu_blocks=None),
        scheduler_config=SimpleNamespace(max_num_seqs=1),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        speculative_config=None,
    )


class LatentRequests:
    """Random requests in bfloat16, whose cached tokens lie in blocks of any order; what no request has written is NaN.

    W_UK and W_UV are applied as vLLM's layer does for the absorbed form, and as `kv_b_proj` does for the plain one.
    """

    def __init__(self, lengths, context, *, heads=4, nope=128, value=128):
        from vllm.v1.attention.backend import AttentionType
        from vllm_ascend.attention.mla import AscendMLAImpl
        from vllm_ascend.attention.mla_step import AscendMLAMetadataBuilder

        self.random = torch.Generator().manual_seed(1)
        self.lengths, self.heads, self.nope, self.value = lengths, heads, nope, value
        self.totals = [new + old for new, old in zip(lengths, context, strict=True)]
        table, self.slots, blocks = paged(self.totals, BLOCK, self.random)
        self.cache = torch.full((blocks, BLOCK, LATENT + ROPE), torch.nan).bfloat16().npu()
        self.weight = self.selection()
        weight = self.weight.flatten(1).npu()
        self.impl = AscendMLAImpl(
            heads, LATENT + ROPE, SCALE, 1, None, None, "auto", None, AttentionType.DECODER, None, kv_lora_rank=LATENT,
            qk_nope_head_dim=nope, qk_rope_head_dim=ROPE, v_head_dim=value, kv_b_proj=lambda rows: (rows @ weight, None),
        )  # fmt: skip
        self.builder = AscendMLAMetadataBuilder(None, [], config(nope, value), torch.device("npu"))
        self.described = description(lengths, self.totals, table)
        self.step = self.builder.build(0, self.described)
        self.latents = [self.tensor(total, LATENT) for total in self.totals]
        self.rotated = [self.tensor(total, ROPE) for total in self.totals]
        self.query = [self.tensor(length, heads, nope + ROPE) for length in lengths]

    def selection(self):
        """`kv_b_proj` `[512, N, D + V]`: each key and value number is one of the latent, or its opposite, so that bfloat16 has it exactly in both forms."""
        weight = torch.zeros(LATENT, self.heads, self.nope + self.value)
        for head in range(self.heads):
            for first, width in ((0, self.nope), (self.nope, self.value)):
                chosen = torch.randperm(LATENT, generator=self.random)[:width]
                sign = torch.randint(2, (width,), generator=self.random) * 2.0 - 1
                weight[chosen, head, torch.arange(first, first + width)] = sign
        return weight.bfloat16()

    def tensor(self, *shape):
        return torch.randn(*shape, generator=self.random).bfloat16()

    def expected(self, parts):
        """`attend` of all requests; `parts`: of each one's keys."""
        results = []
        for query, latents, rotated, count in zip(self.query, self.latents, self.rotated, parts, strict=True):
            projected = torch.einsum("sl,lnp->snp", latents.double(), self.weight.double())
            keys, values = projected.split([self.nope, self.value], -1)
            keys = torch.cat((keys, rotated.double().unsqueeze(1).expand(-1, self.heads, -1)), -1)
            unseen = causal(len(query), len(keys))
            results.append(attend(query, keys, values, SCALE, unseen, products=LATENT + ROPE, parts=count))
        return [torch.cat(part) for part in zip(*results, strict=True)]

    def take(self, *, plain):
        """Let all requests of more than 16 tokens take the plain form, or none."""
        self.builder.plain = plain
        self.builder.forms = replace(self.builder.forms, most_tokens=0)
        self.step = self.builder.build(0, self.described)

    def run(self):
        """Write all latents, and attend. `[T, N, V]` on the host."""
        self.write()
        return self.attend()

    def write(self):
        """Write all latents and rotated keys to the cache."""
        from vllm.forward_context import override_forward_context

        metadata = {"layer": SimpleNamespace(num_actual_tokens=sum(self.totals), query_ends=[])}
        latents, rotated, slots = (torch.cat(part).npu() for part in (self.latents, self.rotated, self.slots))
        with override_forward_context(SimpleNamespace(attn_metadata=metadata)):
            self.impl.do_kv_cache_update(latents, rotated.unsqueeze(1), self.cache, slots, "auto", None)

    def attend(self):
        """What vLLM's layer does: one form after the other. `[T, N, V]` on the host."""
        query, cut = torch.cat(self.query).npu(), self.step.num_decode_tokens
        out = torch.zeros(len(query), self.heads * self.value).bfloat16().npu()
        if self.step.num_prefills:
            new = [part[-n:] for part, n in zip(self.latents, self.lengths, strict=True)]
            keys = [part[-n:] for part, n in zip(self.rotated, self.lengths, strict=True)]
            new_latents, new_keys = torch.cat(new)[cut:].npu(), torch.cat(keys)[cut:].unsqueeze(1).npu()
            self.impl.forward_mha(query[cut:], new_latents, new_keys, self.cache, self.step, None, out[cut:])
        if cut:
            w_uk, w_uv = self.weight.double().split([self.nope, self.value], -1)
            nope, rope = query[:cut].split([self.nope, ROPE], -1)
            absorbed = torch.einsum("tnp,lnp->tnl", nope.cpu().double(), w_uk).bfloat16().npu()
            latent_out, _ = self.impl.forward_mqa((absorbed, rope), self.cache, self.step, None)
            out[:cut] = torch.einsum("tnl,lnv->tnv", latent_out.cpu().double(), w_uv).flatten(1).bfloat16().npu()
        return out.cpu().view(-1, self.heads, self.value)
