# SPDX-License-Identifier: Apache-2.0
"""vLLM's OffloadingConnector for the memory of this plugin's attention backends.

vLLM takes a block for one piece of a layer's memory. Here a block's keys lie apart from its values, or its latents from its rotated keys, so that the
copies of a block are several: `pieces` of a backend's class names them. Everything else is vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import offloading_connector
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import get_offloading_group_ids
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor

__all__ = ["OffloadingConnector", "pieces_of"]


class OffloadingConnector(offloading_connector.OffloadingConnector):
    """Under vLLM's name, by which `kv_connector_module_path` finds it (`limits.choose`)."""

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """None: whichever the attention backend has."""
        return None

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Make the worker's copies of what each layer of the model has as its cache; `kv_caches` are vLLM's views of the same memory."""
        assert self.connector_worker is not None
        config = self._kv_cache_config
        groups = [config.kv_cache_groups[group].layer_names for group in get_offloading_group_ids(config)]
        layers = self._vllm_config.compilation_config.static_forward_context
        caches = pieces_of(layers, groups, config.num_blocks)
        self.connector_worker.worker = self.connector_worker.spec.get_worker(caches)


def pieces_of(layers: Mapping[str, Any], groups: Iterable[Sequence[str]], num_blocks: int) -> CanonicalKVCaches:
    """All memory of the cache as tensors of bytes, int8 `[num_blocks, bytes of a block]`.

    Args:
        layers: attention layers by their names, each with `impl` and `kv_cache`.
        groups: names of the layers of each group of vLLM's cache. Layers of several groups may lie in the same memory.
        num_blocks: of the cache; the kernel's may be smaller ones.
    """
    tensors: list[CanonicalKVCacheTensor] = []
    references: list[list[CanonicalKVCacheRef]] = []
    numbers: dict[tuple[int, int], int] = {}
    for names in groups:
        found: dict[int, CanonicalKVCacheRef] = {}
        for name in names:
            layer = layers[name]
            for piece in layer.impl.pieces(layer.kv_cache):
                rows = piece.view(num_blocks, -1).view(torch.int8)
                place = rows.data_ptr(), rows.shape[1]
                if place not in numbers:
                    numbers[place] = len(tensors)
                    tensors.append(CanonicalKVCacheTensor(rows, rows.shape[1]))
                found[numbers[place]] = CanonicalKVCacheRef(numbers[place], rows.shape[1])
        references.append(list(found.values()))
    return CanonicalKVCaches(tensors, references)
