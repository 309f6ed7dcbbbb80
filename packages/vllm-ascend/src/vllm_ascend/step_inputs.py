# SPDX-License-Identifier: Apache-2.0
"""The inputs of a step, computed on the host and copied to the NPU, one asynchronous copy each.

vLLM's own preparation copies counts and computes positions, lengths and cache slots from them on the device: about 25 operators on a few integers,
each of which takes as long to launch as one on a large tensor. The host knows all of it: where tokens are drafted, it waits here for how many of the last
step's were kept (`exact_counts`). What later steps of vLLM read has the same values in the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["StepInputs", "slots"]


class StepInputs:
    """Prepares the inputs of steps for one model runner.

    Args:
        runner: vLLM's V1 model runner, whose buffers are written.

    Attributes:
        exact_counts: under asynchronous scheduling the scheduler orders a step before it knows how many drafted tokens of the last one were kept, and counts all
            of them. This is vLLM's function that waits for the numbers and corrects the computed tokens of each request; None where they are exact. vLLM calls it once the step
            is launched and computes lengths on the device until then; attention here takes them from the host. The numbers were on their way before the
            draft ran, so that the device has its passes to compute while the host waits and prepares.
    """

    def __init__(self, runner: Any) -> None:
        """Pin host memory for the positions, for which vLLM has none."""
        self._runner = runner
        self.exact_counts: Callable[[], None] | None = None
        self._positions = torch.zeros(runner.max_num_tokens, dtype=torch.int64, pin_memory=True)

    def prepare(self, scheduler_output: Any, counts: NDArray[np.int32]) -> tuple[Tensor, Any, int]:
        """What `GPUModelRunner._prepare_inputs` does.

        Args:
            scheduler_output: the step.
            counts: `[requests]`, tokens of each request in the order of the input batch.

        Returns:
            int32, the places of the tokens whose logits are wanted: of each request the last one, and those before drafted tokens; vLLM's description of the
            drafts, None where none are configured; the tokens sampled of a request at most.
        """
        runner, batch = self._runner, self._runner.input_batch
        requests, tokens = len(counts), int(counts.sum())
        self._mark_incomplete_prompts(counts)
        if self.exact_counts is not None:
            self.exact_counts()
            self.exact_counts = None
        batch.block_table.commit_block_table(requests)
        request = np.repeat(runner.arange_np[:requests], counts)
        ends = runner._get_cumsum_and_arange(counts, runner.query_pos.np)
        positions = self._positions.numpy()[:tokens]
        np.add(batch.num_computed_tokens_cpu[request], runner.query_pos.np[:tokens], out=positions)
        torch.index_select(
            batch.token_ids_cpu_tensor.flatten(),
            0,
            torch.from_numpy(positions + request * batch.token_ids_cpu.shape[1]),
            out=runner.input_ids.cpu[:tokens],
        )
        runner.query_start_loc.np[0] = 0
        runner.query_start_loc.np[1 : requests + 1] = ends
        runner.query_start_loc.np[requests + 1 :].fill(ends[-1])
        runner.query_start_loc.copy_to_gpu()
        lengths = runner.optimistic_seq_lens_cpu.numpy()
        np.add(batch.num_computed_tokens_cpu[:requests], counts, out=lengths[:requests])
        lengths[requests:].fill(0)
        runner.seq_lens.copy_(runner.optimistic_seq_lens_cpu, non_blocking=True)
        runner.positions[:tokens].copy_(self._positions[:tokens], non_blocking=True)
        for table in batch.block_table.block_tables:
            table.slot_mapping.np[:tokens] = slots(table.block_table.np, request, positions, table.block_size)
            table.slot_mapping.copy_to_gpu(tokens)

        runner._compute_prev_positions(requests)
        runner._prepare_input_ids(scheduler_output, requests, tokens, ends)
        if runner.uses_mrope:
            runner._calc_mrope_positions(scheduler_output)
            for row in range(runner.mrope_positions.gpu.shape[0]):  # all rows at once would go through pageable memory
                runner.mrope_positions.gpu[row, :tokens].copy_(
                    runner.mrope_positions.cpu[row, :tokens], non_blocking=True
                )
        if runner.lora_config:
            runner.set_active_loras(batch, counts)
        if runner.speculative_config is None:
            return runner.query_start_loc.gpu[1 : requests + 1] - 1, None, 1
        runner.discard_request_mask.copy_to_gpu(requests)  # for the draft's inputs
        return self._drafted(scheduler_output.scheduled_spec_decode_tokens, ends)

    def _mark_incomplete_prompts(self, counts: NDArray[np.int32]) -> None:
        """Note of which requests the step has a part of the prompt, after which nothing is sampled.

        Both sides count drafted tokens in the same way: the scheduler's computed tokens, and the tokens that a request has or will have.
        """
        runner, batch, requests = self._runner, self._runner.input_batch, len(counts)
        whole = np.array([runner.requests[name].num_tokens for name in batch.req_ids], dtype=np.int32)
        runner.discard_request_mask.np[:requests] = batch.num_computed_tokens_cpu[:requests] + counts < whole

    def _drafted(self, drafts: dict[str, list[int]], ends: NDArray[np.int32]) -> tuple[Tensor, Any, int]:
        """What `prepare` returns for a step with the drafted tokens of some requests; `ends` are the cumulative tokens."""
        drafted = np.zeros(len(ends), dtype=np.int32)
        for name, tokens in drafts.items():
            drafted[self._runner.input_batch.req_id_to_index[name]] = len(tokens)
        described = self._runner._calc_spec_decode_metadata(drafted, ends)
        return described.logits_indices, described, int(drafted.max()) + 1


def slots(
    block_table: NDArray[np.int32], request: NDArray[Any], positions: NDArray[np.int64], block_size: int
) -> NDArray[np.int64]:
    """Slot of each token in the cache: block * block_size + offset within it.

    Args:
        block_table: `[requests, blocks]`, physical block of each logical one.
        request: `[T]`, the request of each token.
        positions: `[T]`, the position of each token in its request.
        block_size: tokens of a block.
    """
    block, offset = np.divmod(positions, block_size)
    found: NDArray[np.int64] = block_table[request, block].astype(np.int64) * block_size + offset
    return found
