# SPDX-License-Identifier: Apache-2.0
"""vLLM's V1 model runner on an NPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ascend import compat, parallel
from vllm_ascend.attention import mla
from vllm_ascend.eplb.record import LoadRecorder
from vllm_ascend.layers import linear, moe, sequence

__all__ = ["AscendModelRunner"]


class AscendModelRunner(GPUModelRunner):
    """The GPU runner, with NPU streams and events."""

    load_recorder: LoadRecorder | None = None
    splits_hidden_states: bool
    """Whether a layer of the model takes and gives hidden states of a part of the tokens on each TP rank."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        """Build vLLM's runner on `device`."""
        compat.alias_cuda_streams()
        super().__init__(vllm_config, device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then give the linear ops its weights and put FlashComm1's hooks on it."""
        super().load_model(*args, **kwargs)
        model = self.get_model()
        linear.finish_loading(model)
        sequence.attach(model)
        mla.spare_workspace(model)
        self.load_recorder = moe.load_recorder(model)
        self.splits_hidden_states = any(getattr(layer, "use_sequence_parallel_moe", False) for layer in model.modules())

    def eplb_step(self, is_dummy: bool = False, is_profile: bool = False) -> None:
        """What vLLM calls after each step of all ranks that share experts."""
        super().eplb_step(is_dummy, is_profile)
        if self.load_recorder is not None and not is_profile:
            self.load_recorder.step()

    def _pool(self, *args: Any, **kwargs: Any) -> Any:
        """The end of a step of a pooling model, after which vLLM does not call `eplb_step`."""
        output = super()._pool(*args, **kwargs)
        self.eplb_step()
        return output

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        """How many tokens each replica's step has. One token becomes two where layers hand hidden states on split over TP ranks.

        vLLM's DeepSeek layers know such a state by its number of rows being another one than the tokens', but a rank's part of one token is
        one row as well. On GPUs captured graphs pad such steps. All replicas pad alike, so that they agree on the numbers.
        """
        mode, batch, microbatches, over_replicas, statistics = super()._determine_batch_execution_and_padding(*args, **kwargs)  # fmt: skip
        if self.splits_hidden_states:
            batch = replace(batch, num_tokens=max(batch.num_tokens, 2))
            over_replicas = None if over_replicas is None else over_replicas.clamp(min=2)
        return mode, batch, microbatches, over_replicas, statistics

    def _dummy_run(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A step without requests. Where data parallel ranks share the LM head, it goes on to the logits, for which the others wait.

        A profiling run computes them itself.
        """
        hidden, last = super()._dummy_run(*args, **kwargs)
        computes_logits = get_pp_group().is_last_rank and not self.is_pooling_model
        if self._lmhead_is_shared() and computes_logits and not kwargs.get("is_profile"):
            self.model.compute_logits(last)  # type: ignore[operator]
        return hidden, last

    def _get_prompt_logprobs_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Log-probabilities of prompts, for which the LM head runs once more. `AscendPlatform.validate_request` refuses them where it is shared."""
        if self._lmhead_is_shared() and self.num_prompt_logprobs:
            raise RuntimeError(
                "a request with prompt_logprobs has come to an engine with finegrained_tp_config.lmhead_tensor_parallel_size"
            )
        return super()._get_prompt_logprobs_dict(*args, **kwargs)

    @staticmethod
    def _lmhead_is_shared() -> bool:
        shared = parallel.current()
        return shared is not None and "lmhead_tp" in shared.groups
