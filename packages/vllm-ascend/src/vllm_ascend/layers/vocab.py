# SPDX-License-Identifier: Apache-2.0
"""Token embedding and LM head over data parallel ranks (embedding-TP, lmhead-TP), and the embedding's part in FlashComm1."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from ascend_comm import CommGroup
from ascend_linear import StepState
from torch import Tensor
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_vocab
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_ascend import compat, parallel

__all__ = ["AscendLogitsProcessor", "AscendParallelLMHead", "AscendVocabParallelEmbedding", "register"]

# Names of the embedding whose output enters the first layer; "" where a model names none.
_OF_TOKENS = ("", "embed_in", "embed_tokens", "embeddings", "tok_embeddings", "word_embeddings", "wte")


class _OverDataParallel(VocabParallelEmbedding):
    """A layer whose rows may be cut over the data parallel ranks of `shared_over`, the group called `group_name`, or None."""

    group_name: str
    shared_over: CommGroup | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Let vLLM build the layer as this rank's shard."""
        shared = parallel.current()
        in_tree = next(kind for kind in type(self).__mro__ if not issubclass(kind, _OverDataParallel))
        given = signature(in_tree.__init__).bind(self, *args, **kwargs).arguments
        vllm_decides = given.get("disable_tp") or given.get("parallel_group") is not None
        group = None if shared is None or vllm_decides else shared.groups.get(self.group_name)
        if group is None:
            super().__init__(*args, **kwargs)
        else:
            with compat.shard_of(vllm_vocab, group.rank_in_group, group.world_size):
                super().__init__(*args, **kwargs)
        self.shared_over = group


class AscendVocabParallelEmbedding(_OverDataParallel):
    """`VocabParallelEmbedding` over data parallel ranks (embedding-TP), whose output FlashComm1 may split."""

    group_name = "embed_tp"

    def forward(self, input_: Tensor) -> Tensor:
        """Token ids `[N]` -> `[N, H]`, under FlashComm1 this rank's chunk `[P / TP, H]`."""
        state = parallel.step()
        splits = state.flashcomm1 and self.reduce_results and self.prefix.rpartition(".")[2] in _OF_TOKENS
        if self.shared_over is not None:
            return self._over_data_parallel(input_, state, splits)
        if not splits:
            embedded: Tensor = super().forward(input_)  # type: ignore[no-untyped-call]
            return embedded
        shared = parallel.current()
        assert shared is not None  # it has planned the step that splits tokens
        partial = self._partial(input_)
        if self.tp_size == 1:  # each rank has all rows
            return shared.own_chunk(partial, state)
        return shared.env.tp.reduce_scatter(shared.pad(partial, state), 0)

    def _partial(self, ids: Tensor) -> Tensor:
        """`[n]` -> `[n, H]`, zeros for the rows that another rank has."""
        reduces, self.reduce_results = self.reduce_results, False
        try:
            partial: Tensor = super().forward(ids)  # type: ignore[no-untyped-call]
        finally:
            self.reduce_results = reduces
        return partial

    def _over_data_parallel(self, ids: Tensor, state: StepState, splits: bool) -> Tensor:
        """Gather the ids of all ranks of the group, look up those in this rank's rows, and scatter the sums to the tokens' ranks."""
        shared, group = parallel.current(), self.shared_over
        assert shared is not None
        assert group is not None
        counts = shared.tokens_over(group, state)
        longest = ids.shape[0] if counts is None else max(counts)
        everyone = group.all_gather(torch.nn.functional.pad(ids, (0, longest - ids.shape[0])), 0)
        embedded = group.reduce_scatter(self._partial(everyone), 0)[: ids.shape[0]]
        return shared.own_chunk(embedded, state) if splits else embedded


class AscendParallelLMHead(_OverDataParallel, ParallelLMHead):
    """`ParallelLMHead` over data parallel ranks (lmhead-TP)."""

    group_name = "lmhead_tp"


class AscendLogitsProcessor(LogitsProcessor):
    """`LogitsProcessor` that gathers rows instead of logits where the LM head is shared over data parallel ranks."""

    def _get_logits(
        self,
        hidden_states: Tensor,
        lm_head: VocabParallelEmbedding,
        embedding_bias: Tensor | None,
        skip_gather: bool = False,
    ) -> Tensor | None:
        """`[n, H]` -> `[n, V]`. n may differ between the ranks of the group; all take part in every step, dummy ones too."""
        group: CommGroup | None = getattr(lm_head, "shared_over", None)
        if group is None:
            logits: Tensor | None = super()._get_logits(hidden_states, lm_head, embedding_bias, skip_gather)
            return logits
        shared = parallel.current()
        assert shared is not None
        own = hidden_states.shape[0]
        counts = shared.tokens_over(group, shared.last_step)
        # No rank samples more rows than it has requests or tokens, and every rank knows this bound.
        rows = own if counts is None else min(max(counts), shared.max_num_seqs)
        everyone = group.all_gather(torch.nn.functional.pad(hidden_states, (0, 0, 0, rows - own)), 0)
        parts = group.all_to_all(self._apply_head(lm_head, everyone, embedding_bias))  # part r: own rows, shard r
        joined = parts.view(group.world_size, rows, -1).transpose(0, 1).reshape(rows, -1)
        return joined[:own, : self.org_vocab_size]


def register() -> None:
    """Replace vLLM's layers."""
    VocabParallelEmbedding.register_oot(AscendVocabParallelEmbedding)
    ParallelLMHead.register_oot(AscendParallelLMHead)
    LogitsProcessor.register_oot(AscendLogitsProcessor)
