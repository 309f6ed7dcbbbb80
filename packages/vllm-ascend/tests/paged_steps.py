# SPDX-License-Identifier: Apache-2.0
"""A step of random requests through the real attention backend, without an engine."""

from types import SimpleNamespace

import torch

__all__ = ["Step", "description", "paged"]


def description(lengths, totals, table, spans=None):
    """A step as vLLM describes it: new tokens and keys of each request, and their blocks; the positions of each request's pictures."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    keys = torch.tensor(totals, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.npu(), query_start_loc_cpu=starts, seq_lens=keys.npu(), seq_lens_cpu_upper_bound=keys,
        num_reqs=len(lengths), num_actual_tokens=sum(lengths), max_query_len=max(lengths), max_seq_len=max(totals),
        block_table_tensor=table.npu(), slot_mapping=None, mm_req_doc_ranges=spans,
    )  # fmt: skip


def paged(totals, block, random):
    """Blocks of any order for requests of so many tokens: the table int32 `[requests, blocks]`, the slots of each request's tokens, and the blocks in all.

    The first block is nobody's, as in vLLM.
    """
    blocks = [-(-total // block) for total in totals]
    free = (torch.randperm(sum(blocks), generator=random) + 1).split(blocks)
    table = torch.zeros(len(totals), max(blocks), dtype=torch.int32)
    for request, mine in enumerate(free):
        table[request, : len(mine)] = mine
    positions = [torch.arange(total) for total in totals]
    slots = [mine[at // block] * block + at % block for mine, at in zip(free, positions, strict=True)]
    return table, slots, sum(blocks) + 1


class Step:
    """Requests whose cached tokens lie in blocks of any order; what no request has written is NaN.

    Attributes:
        layer: what is passed as vLLM's layer.
    """

    layer = None

    def __init__(
        self, lengths, context, *, heads, kv_heads, size, window=None, block=128, dtype=torch.bfloat16, backend=None, spans=None,
        slopes=None, soft_cap=None, **options
    ):  # fmt: skip
        from vllm.v1.kv_cache_interface import FullAttentionSpec
        from vllm_ascend.attention.gqa import AscendAttentionBackend

        backend = backend or AscendAttentionBackend

        self.random = torch.Generator().manual_seed(1)
        self.lengths, self.dtype = lengths, dtype
        self.totals = [new + old for new, old in zip(lengths, context, strict=True)]
        table, self.slots, blocks = paged(self.totals, block, self.random)
        spec = FullAttentionSpec(block_size=block, num_kv_heads=kv_heads, head_size=size, head_size_v=size, dtype=dtype)
        width = backend.customize_spec(spec).page_size_bytes // (2 * block * dtype.itemsize)
        order = backend.supported_kv_cache_layouts()[0].layer_view_order
        shape = (blocks, 2, block, width)
        memory = torch.full([shape[axis] for axis in order], torch.nan).to(dtype).npu()
        self.cache = memory.permute(*(order.index(axis) for axis in range(4)))  # `shape`, as vLLM gives it
        self.impl = backend.get_impl_cls()(
            heads, size, size**-0.5, kv_heads, slopes, window, "auto", soft_cap, **options
        )  # vLLM gives them by position
        config = SimpleNamespace(
            cache_config=SimpleNamespace(num_gpu_blocks=None),
            scheduler_config=SimpleNamespace(max_num_seqs=len(lengths)),
        )
        builder = backend.get_builder_cls()(spec, [], config, torch.device("npu"))
        self.metadata = builder.build(0, description(lengths, self.totals, table, spans))
        shapes = ((lengths, heads), (self.totals, kv_heads), (self.totals, kv_heads))
        self.query, self.keys, self.values = (
            [torch.randn(n, count, size, generator=self.random).to(dtype) for n in sizes] for sizes, count in shapes
        )
        self.rows = [torch.cat(part).npu() for part in (self.query, self.keys, self.values)]

    def fuse(self):
        """Make the query, and the keys and values that are written, views of wider tensors."""
        self.rows = [torch.cat((rows, rows), 1)[:, : rows.shape[1]] for rows in self.rows]

    def requests(self):
        """Of each request the query, and keys and values for each query head."""
        for query, keys, values in zip(self.query, self.keys, self.values, strict=True):
            group = query.shape[1] // keys.shape[1]
            yield query, keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)

    def run(self):
        """Write all keys and values, and attend. `[T, N, D]` on the host."""
        from vllm.forward_context import override_forward_context

        tokens = SimpleNamespace(num_actual_tokens=sum(self.totals), query_ends=[])
        with override_forward_context(SimpleNamespace(attn_metadata={"layer": tokens})):
            self.impl.do_kv_cache_update(None, *self.rows[1:], self.cache, torch.cat(self.slots).npu())
        output = torch.empty(self.rows[0].shape, dtype=self.dtype).npu()
        self.impl.forward(self.layer, self.rows[0], *self.rows[1:], self.cache, self.metadata, output)
        return output.cpu()
