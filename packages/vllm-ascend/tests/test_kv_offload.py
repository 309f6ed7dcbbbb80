# SPDX-License-Identifier: Apache-2.0
"""The KV cache's blocks in host memory: the copies alone, and an engine that has forgotten what it computed. `kv_engines.py` has more."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_jobs import ONE_PROCESS
from kv_prompts import LENGTH, SIZE, after_eviction, assert_loaded, offloading, qwen3
from vllm.config import KVTransferConfig
from vllm_ascend.kv_offload import limits

OURS = "vllm_ascend.kv_offload.connector"


def spec(*groups):
    """Blocks of the device: for each group their numbers, and the place of the first in its request."""
    from vllm.v1.kv_offload.base import GPULoadStoreSpec

    numbers = [number for blocks, _ in groups for number in blocks]
    return GPULoadStoreSpec(numbers, [len(blocks) for blocks, _ in groups], [place for _, place in groups])


def naive_pairs(groups, chunks, blocks_per_chunk):
    """(group, block of the device, block of the host), one after the other."""
    pairs, chunks = [], list(chunks)
    for group, (blocks, place) in enumerate(groups):
        place, taken = place % blocks_per_chunk, 0
        for number, block in enumerate(blocks):
            taken = (place + number) // blocks_per_chunk
            pairs.append((group, block, chunks[taken] * blocks_per_chunk + (place + number) % blocks_per_chunk))
        chunks = chunks[taken + 1 :] if blocks else chunks
    return pairs


@pytest.mark.parametrize(
    ("given", "size", "module"),
    [
        ({}, None, OURS),
        ({"kv_connector_module_path": OURS}, None, OURS),
        ({"kv_connector_module_path": "somebody.elses"}, None, "somebody.elses"),
        (None, 2.0, OURS),
    ],
)
def test_a_connector_is_chosen(given, size, module):
    """Named, named with its module, another one of that name, and by a size."""
    transfer = (
        None if given is None else KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both", **given)
    )
    cache = SimpleNamespace(kv_offloading_size=size, kv_offloading_backend="native")
    config = SimpleNamespace(cache_config=cache, kv_transfer_config=transfer)
    limits.choose(config)
    transfer = config.kv_transfer_config
    assert transfer.kv_connector == "OffloadingConnector"
    assert transfer.kv_connector_module_path == module
    assert transfer.kv_connector_extra_config.get("spec_name") == ("AscendOffloadingSpec" if module == OURS else None)
    assert limits.chosen(config) == (module == OURS)
    assert transfer.kv_connector_extra_config.get("cpu_bytes_to_use") == (2 << 30 if size else None)


@pytest.mark.parametrize(
    ("groups", "chunks", "blocks_per_chunk", "number"),
    [
        ([([3, 4, 5], 0)], [0, 1, 2], 1, 1),
        ([([3, 4, 5, 9], 7)], [6, 7, 2, 3], 1, 3),
        ([([5, 4, 3], 0)], [0, 1, 2], 1, 3),
        ([([1, 2, 3, 4, 8], 3)], [4, 5, 0], 2, 3),
        ([([2, 3], 1), ([], 0), ([7, 8, 9], 2)], [4, 9, 1, 0], 2, 4),
    ],
)
def test_runs(groups, chunks, blocks_per_chunk, number):
    from vllm_ascend.kv_offload.copies import runs

    found = list(runs(spec(*groups), np.array(chunks, np.int32), blocks_per_chunk))
    assert len(found) == number
    assert [
        (group, run.device + i, run.host + i) for group, run in found for i in range(run.length)
    ] == naive_pairs(groups, chunks, blocks_per_chunk)  # fmt: skip


@pytest.fixture
def cache():
    """Two layers as attention has them, keys apart from values, and one whose blocks are pieces: bytes of 6 blocks each, in two groups."""
    from vllm_ascend.kv_offload.connector import pieces_of

    def layer(pieces):
        memory = torch.randint(-100, 100, (2, 6, 4, 8), dtype=torch.int8).npu().transpose(0, 1)
        return SimpleNamespace(impl=SimpleNamespace(pieces=pieces), kv_cache=memory)

    apart = layer(lambda cache: (cache[:, 0], cache[:, 1]))
    layers = {"a": apart, "b": layer(lambda cache: (cache[:, 0], cache[:, 1])), "shares a": apart}
    layers["whole"] = SimpleNamespace(impl=SimpleNamespace(pieces=lambda cache: (cache,)), kv_cache=torch.randint(-100, 100, (12, 2, 4, 8), dtype=torch.int8).npu())  # fmt: skip
    return pieces_of(layers, [["a", "b", "shares a"], ["whole"]], 6)


def test_pieces(cache):
    assert [one.tensor.shape for one in cache.tensors] == [(6, 32)] * 4 + [(6, 128)]
    assert [[ref.tensor_idx for ref in group] for group in cache.group_data_refs] == [[0, 1, 2, 3], [4]]


@pytest.fixture
def late_stream():
    """The current stream is one whose operators a lazy simulator runs when something waits for them, as it does of the streams of copies."""
    with torch.npu.stream(torch.npu.Stream()):
        yield


def test_copies(cache, late_stream):
    """Blocks come back as they were, into other places; what is not asked for stays, and so does what is written after `wait`."""
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm_ascend.kv_offload.copies import AscendOffloadingWorker

    worker = AscendOffloadingWorker(cache, num_chunks=4, blocks_per_chunk=2)
    tensors = [one.tensor for one in cache.tensors]
    before = [tensor.cpu() + 1 for tensor in tensors]
    for tensor in tensors:
        tensor.add_(1)  # before the store
    assert worker.submit_store(1, spec(([0, 1, 4], 0), ([5], 1)), CPULoadStoreSpec([2, 0, 3]))
    worker.wait({1})
    for tensor in tensors:
        tensor.zero_()  # after the store
    assert [(done.job_id, done.success, done.transfer_size) for done in worker.get_finished()] == [(1, True, 3 * 4 * 32 + 128)]  # fmt: skip
    assert worker.get_finished() == []
    assert worker.submit_load(2, CPULoadStoreSpec([2, 0, 3]), spec(([3, 5, 0], 0), ([2], 1)))
    worker.wait({2})
    after = [tensor + 0 for tensor in tensors]  # computed by the step's stream
    for found, old in zip(after[:4], before[:4], strict=True):
        expected = torch.zeros_like(old)
        expected[[3, 5, 0]] = old[[0, 1, 4]]
        assert torch.equal(found.cpu(), expected)
    expected = torch.zeros_like(before[4])
    expected[2] = before[4][5]
    assert torch.equal(after[4].cpu(), expected)
    assert [done.job_id for done in worker.get_finished()] == [2]
    worker.shutdown()


@pytest.mark.slow
def test_prompts_that_were_evicted(tmp_path, hugging_face, run_engines):
    """By either way to ask for it; the second with decoding steps in graphs, larger chunks and the other policy."""
    folder, expected = qwen3(tmp_path / "qwen3", hugging_face)
    graphs = {
        "enforce_eager": False,
        "compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2]},
    }
    transfer = offloading(blocks_per_chunk=2, eviction_policy="arc")
    jobs = [
        after_eviction(folder, kv_offloading_size=SIZE),
        after_eviction(folder, kv_transfer_config=transfer, inspect=True, **graphs),
    ]
    sized, transferred = run_engines(jobs, VLLM_ALLOW_INSECURE_SERIALIZATION="1", **ONE_PROCESS)
    assert_loaded(sized, expected)
    assert_loaded(transferred, expected, cached=[256, 0, 256, 0, 0])  # chunks are of two blocks
    assert transferred["graphs"][0]["replays"] > LENGTH
