# SPDX-License-Identifier: Apache-2.0
"""vLLM's interface for the products of LoRA on a platform ("Punica wrapper"), over `products.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_ascend.lora import products

__all__ = ["AscendPunicaWrapper", "slots_of"]

_NONE = -1  # the slot of a row of the base model


def slots_of(ids: Sequence[int], slot_ids: Sequence[int | None]) -> NDArray[np.int64]:
    """The slot of each adapter, -1 for id 0, which stands for the base model.

    Args:
        ids: of adapters.
        slot_ids: the adapter in each slot.

    Raises:
        KeyError: an adapter that is in no slot.
    """
    given = np.asarray(ids, dtype=np.int64)
    slots = np.full(len(given), _NONE, dtype=np.int64)
    for slot, adapter in enumerate(slot_ids):
        if adapter is not None:
            slots[given == adapter] = slot
    if (lost := given[(given > 0) & (slots == _NONE)]).size:
        raise KeyError(f"LoRA adapters {sorted(set(lost.tolist()))} are in no slot of {list(slot_ids)}")
    return slots


class AscendPunicaWrapper(PunicaWrapperBase):
    """Which adapter each row of a step has, and the products of vLLM's LoRA layers with them. No method waits for the device.

    Args:
        max_num_batched_tokens: tokens of a step at most.
        max_batches: requests of a step at most.
        device: the NPU.
        lora_config: vLLM's.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device,
        *,
        lora_config: Any,
        **kwargs: Any,
    ) -> None:
        """Create the masks, in which no row has an adapter."""
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._slots = torch.arange(lora_config.max_loras, device=device)
        rows = torch.full((3, max_num_batched_tokens), _NONE, dtype=torch.long, device=device)
        # vLLM's properties and its embedding layer read the three by these names.
        self._token_lora_indices, self._sampler_indices, self._embeddings_indices = self._rows = rows
        self._embeddings_indices.zero_()
        self._of_tokens = torch.zeros((max_num_batched_tokens, len(self._slots)), dtype=torch.bool, device=device)
        self._of_samples = torch.zeros_like(self._of_tokens)
        self.no_lora = True

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Take over which adapter each row of the next step has; rows beyond, which are padding, have none.

        Args:
            mapping: the adapters of tokens, and of rows that are sampled.
            lora_index_to_id: the adapter in each slot.
            max_loras: not used.
            vocab_size: rows that an adapter has in vLLM's embedding layer.
        """
        tokens = slots_of(mapping.index_mapping, lora_index_to_id)
        samples = slots_of(mapping.prompt_mapping, lora_index_to_id)
        rows = np.full(self._rows.shape, _NONE, dtype=np.int64)
        rows[0, : len(tokens)] = tokens
        rows[1, : len(samples)] = samples
        rows[2] = np.maximum(rows[0], 0) * vocab_size
        async_tensor_h2d(rows, out=self._rows)
        torch.eq(self._token_lora_indices.unsqueeze(1), self._slots, out=self._of_tokens)
        torch.eq(self._sampler_indices.unsqueeze(1), self._slots, out=self._of_samples)
        self.indices_len[:] = [len(tokens), len(samples), None, len(tokens)]
        self.no_lora = not (tokens >= 0).any()

    @contextmanager
    def sampling_as(self, adapter: int, lora_index_to_id: list[int | None]) -> Iterator[None]:
        """Let all rows whose logits are computed inside have one adapter, 0 for none."""
        (slot,) = slots_of([adapter], lora_index_to_id)
        before = self._of_samples
        self._of_samples = (self._slots == int(slot)).expand_as(before)
        try:
            yield
        finally:
            self._of_samples = before

    def add_shrink(self, y: Any, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float, **kwargs: Any) -> None:
        """`y[s] += scale * x @ A[s].T` with each row's own adapter, for each part s of a fused layer.

        Args:
            y: `[N, r]` for each part.
            x: `[N, I]`.
            lora_a_stacked: `[L, 1, r, I]` for each part.
            scale: a factor.
        """
        if self.no_lora:
            return
        x = x.view(-1, x.shape[-1])
        for part, a in enumerate(lora_a_stacked):
            y[part].add_(products.own(products.shrink(x, a, self._of_tokens[: len(x)], scale)))

    def add_expand(
        self,
        y: Tensor,
        x: Any,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """`y[:, its columns] += x[s] @ B[s].T` with each row's own adapter, for each part s of a fused layer.

        Args:
            y: `[N, all columns]`.
            x: `[N, r]` for each part.
            lora_b_stacked: `[L, 1, O, r]` for each part.
            output_slices: O of each part.
            offset_start: the first part's first column.
            add_inputs: not used: y is zeros where vLLM gives False.
        """
        if self.no_lora:
            return
        y = y.view(-1, y.shape[-1])
        for part, (b, width) in enumerate(zip(lora_b_stacked, output_slices, strict=True)):
            spread = products.spread(x[part], self._of_tokens[: len(y)])
            products.add_expanded(y[:, offset_start : offset_start + width], spread, b)
            offset_start += width

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """`y += x @ B.T` with each row's own adapter; x `[N, r]` are rows of A."""
        if not self.no_lora:
            products.add_expanded(y, products.spread(x, self._of_tokens[: len(x)]), lora_b_stacked)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Both products of a linear layer; arguments as of `add_shrink` and `add_expand`, `buffer` is not used."""
        if self.no_lora:
            return
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        start = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            shrunk = products.shrink(x, a, self._of_tokens[: len(x)], scale)
            products.add_expanded(y[:, start : start + width], shrunk, b)
            start += width

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Both products of the LM head, or of a classifier.

        Args:
            y: `[samples, V]`, and perhaps columns of padding.
            x: `[samples, H]`.
            lora_a_stacked: `[L, 1, r, H]`.
            lora_b_stacked: `[L, 1, V, r]`.
            scale: a factor.
            buffer: not used.
        """
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        shrunk = products.shrink(x, lora_a_stacked, self._of_samples[: len(x)], scale)
        products.add_expanded(y[:, : lora_b_stacked.shape[2]], shrunk, lora_b_stacked)

    def apply_lora_full_linear(
        self,
        y: Tensor,
        x: Tensor,
        weight_stacked: Tensor,
        bias_stacked: Tensor,
        module_enabled: Tensor,
    ) -> None:
        """Replace the rows of y whose adapter brings a classifier of its own by that classifier's output.

        Args:
            y: `[samples, labels]`.
            x: `[samples, H]`.
            weight_stacked: `[L, 1, labels, H]`.
            bias_stacked: `[L, labels]`.
            module_enabled: bool `[L]`, the adapters that bring one.
        """
        output = products.own(products.shrink(x, weight_stacked, self._of_samples[: len(x)]))
        y.copy_(self._select_full_linear_output(y, output, bias_stacked, module_enabled))
