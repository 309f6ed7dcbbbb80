# SPDX-License-Identifier: Apache-2.0
"""Blocks that hold keys and values now and a layer's state then: how they are emptied, and how a state goes on in another block."""

from types import SimpleNamespace

import pytest
import torch


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("values_apart", [False, True])
def test_blocks_that_begin_to_be_used_are_emptied(pieces, values_apart):
    """Those of attention layers, whole, where the kernel has smaller ones as well; states are left alone."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec
    from vllm_ascend.model_runner import AscendModelRunner

    blocks, size, width = 4, 8, 3
    shape = (blocks * pieces, 2, size // pieces, width)
    cache = torch.full(shape, torch.nan, device="npu")
    if values_apart:
        cache = cache.transpose(0, 1).contiguous().transpose(0, 1)
    state = torch.full((blocks, 5), torch.nan, device="npu")
    attention = FullAttentionSpec(
        block_size=size, num_kv_heads=1, head_size=width, head_size_v=width, dtype=torch.float32
    )
    mamba = MambaSpec(shapes=((5,),), dtypes=(torch.float32,), block_size=size)
    groups = [
        SimpleNamespace(kv_cache_spec=attention, layer_names=["attention"]),
        SimpleNamespace(kv_cache_spec=mamba, layer_names=["mamba"]),
    ]
    layers = {"attention": SimpleNamespace(kv_cache=cache), "mamba": SimpleNamespace(kv_cache=(state,))}
    runner = SimpleNamespace(
        device=torch.device("npu"),
        kv_cache_config=SimpleNamespace(num_blocks=blocks),
        compilation_config=SimpleNamespace(static_forward_context=layers),
        _kv_cache_spec_attn_group_iterator=lambda: iter(groups),
    )
    AscendModelRunner._zero_block_ids(runner, [])
    assert cache.isnan().all()
    AscendModelRunner._zero_block_ids(runner, [3, 1])
    of_block = cache.cpu().reshape(blocks, -1)
    assert of_block[[1, 3]].eq(0).all()
    assert of_block[[0, 2]].isnan().all()
    assert state.isnan().all()


def test_a_state_goes_on_in_another_block():
    """Called as vLLM's runner calls it when a request has filled the block in which its state was."""
    from vllm.v1.worker import mamba_utils
    from vllm_ascend import compat

    compat.copy_states_of_blocks()
    caches = {name: tuple(torch.arange(6.0, device="npu")[:, None] + shift for shift in (0, 10)) for name in "abc"}
    layers = {name: SimpleNamespace(kv_cache=cache) for name, cache in caches.items()}
    groups = SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(layer_names=names) for names in (["attention"], ["a", "b"], ["c"])]
    )
    request = SimpleNamespace(block_ids=([0], [2, 4], [1, 5]))
    buffers = SimpleNamespace(offset=0)
    mamba_utils.collect_mamba_copy_meta(buffers, groups, {}, [1, 2], 0, 1, 0, request, layers)
    mamba_utils.do_mamba_copy_block(buffers)
    expected = {"a": [0, 1, 2, 3, 2, 5], "b": [0, 1, 2, 3, 2, 5], "c": [0, 1, 2, 3, 4, 1]}
    for name, cache in caches.items():
        for shift, states in zip((0, 10), cache, strict=True):
            assert (states[:, 0] - shift).tolist() == expected[name]
