# SPDX-License-Identifier: Apache-2.0
"""vLLM's V1 model runner on an NPU, and the order in which a step joins collectives.

Ranks that share a group must join their collectives in one order, whatever each of them has to do: in a step with requests (`execute_model`), in
the step without any that a data parallel rank runs while another is busy (`_dummy_run`), and in the profiling run, after which all run the same steps to
warm the kernels up (`warmup.py`). The order is

    1. the model's forward pass, with embedding, o_proj, dense MLPs and experts, layer by layer;
    2. the logits, where this is the last pipeline stage of a model that generates;
    3. the end of the step (`_end_step`), where what counts steps over all ranks meets.

Sampling comes after that and joins no collective of data parallel ranks. A feature with a collective of its own outside the model belongs into
`_end_step`, and nowhere else. `tests/test_collective_order.py` compares the orders of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.models import supports_lora
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ascend import compat, graphs, loader, parallel
from vllm_ascend.attention import mla
from vllm_ascend.eplb.rebalance import Rebalancer
from vllm_ascend.eplb.record import LoadRecorder
from vllm_ascend.host_copy import HostCopy
from vllm_ascend.layers import linear, moe, moving, sequence
from vllm_ascend.lora.manager import AscendLoRAManager
from vllm_ascend.sampling import AscendTopKTopPSampler
from vllm_ascend.speculative.lengths import DraftLengths
from vllm_ascend.step_inputs import StepInputs

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

__all__ = ["AscendModelRunner"]


class AscendModelRunner(GPUModelRunner):
    """The GPU runner, with NPU streams and events, and with one order of collectives in all kinds of steps."""

    load_recorder: LoadRecorder | None = None
    rebalancer: Rebalancer | None = None
    warm_up: Callable[[], None] | None = None
    """Runs steps through the worker before memory is counted."""
    splits_hidden_states: bool
    """Whether a layer of the model takes and gives hidden states of a part of the tokens on each TP rank."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        """Build vLLM's runner on `device`."""
        compat.alias_cuda_streams()
        super().__init__(vllm_config, device)
        self.step_inputs = StepInputs(self)
        self.filters = AscendTopKTopPSampler(self.sampler)
        drafter = getattr(self, "drafter", None)  # of the last pipeline stage
        self.draft_lengths = DraftLengths(drafter) if isinstance(drafter, SpecDecodeBaseProposer) else None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then give the linear ops its weights and put FlashComm1's hooks on it."""
        super().load_model(*args, **kwargs)
        if isinstance(self.model, CUDAGraphWrapper):
            self.model = graphs.AscendGraphWrapper(self.model.runnable, self.vllm_config)
        model = self.get_model()
        sequence.attach(model)
        draft = getattr(getattr(self, "drafter", None), "model", None)
        for one in (model, draft) if isinstance(draft, torch.nn.Module) else (model,):
            linear.finish_loading(one)
            mla.reserve_workspace(one)
        self.load_recorder = moe.load_recorder(model)
        self.rebalancer = moving.rebalancer(model, str(self.model_config.served_model_name))
        if self.rebalancer is not None:
            self.model_memory_usage += self.rebalancer.num_bytes  # so that the KV cache leaves room for its buffers
        self.splits_hidden_states = any(getattr(layer, "use_sequence_parallel_moe", False) for layer in model.modules())

    def load_lora_model(self, model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> nn.Module:
        """Put LoRA layers into the model. ValueError for one that has no adapters in vLLM."""
        if not supports_lora(model):
            raise ValueError(f"{type(model).__name__} takes no LoRA adapters in vLLM; leave --enable-lora out")
        self.lora_manager = AscendLoRAManager(vllm_config, device, model.embedding_modules)
        adapted: nn.Module = self.lora_manager.create_lora_manager(model, vllm_config)
        return adapted

    def profile_run(self, randomize_inputs: bool = False) -> None:
        """The largest step, as vLLM runs it to measure memory; then `warm_up` over a small KV cache, whose lasting costs are measured with it."""
        super().profile_run(randomize_inputs=randomize_inputs)
        if self.warm_up is not None:
            self.warm_up()

    def _check_and_update_cudagraph_mode(self, *args: Any, **kwargs: Any) -> None:
        """Decide which steps are captured, as vLLM does, and which of their sizes."""
        sizes = self.compilation_config.cudagraph_capture_sizes
        if sizes and self.splits_hidden_states:  # no step has one token, see below: it is padded to the next size
            self.compilation_config.cudagraph_capture_sizes = [size for size in sizes if size > 1]
        super()._check_and_update_cudagraph_mode(*args, **kwargs)
        graphs.drop_what_does_not_fit(self)

    def capture_model(self) -> int:
        """Capture decoding steps in graphs. Returns the bytes that they take."""
        return graphs.capture(self)

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: Any) -> Any:
        """Prepare a step on the host; with embeddings in the place of prompts as vLLM does it, on the device."""
        if self.enable_prompt_embeds:
            return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        prepared = self.step_inputs.prepare(scheduler_output, num_scheduled_tokens)
        if self.draft_lengths is not None:
            begins = self.input_batch.num_computed_tokens_cpu[: len(num_scheduled_tokens)]
            self.draft_lengths.begin(begins, prepared[1].num_draft_tokens)
        return prepared

    def _update_states(self, scheduler_output: SchedulerOutput) -> None:
        """vLLM's, of which the function that corrects computed tokens is called while the step is prepared, not after its launch."""
        self.step_inputs.exact_counts = super()._update_states(scheduler_output)

    def _copy_valid_sampled_token_count(
        self, next_token_ids: torch.Tensor, valid_sampled_tokens_count: torch.Tensor
    ) -> None:
        """Begin to copy to the host how many tokens each request has won, before a draft runs."""
        super()._copy_valid_sampled_token_count(next_token_ids, valid_sampled_tokens_count)
        if self.draft_lengths is not None and self.num_spec_tokens > 1:  # a second pass needs them
            self.draft_lengths.won = HostCopy(valid_sampled_tokens_count)

    def _init_kv_zero_meta(self) -> None:
        """Nothing: vLLM prepares addresses for a Triton kernel here, which `_zero_block_ids` does without."""

    def _zero_block_ids(self, block_ids: list[int]) -> None:
        """Fill blocks of keys and values with zeros that begin to be used; what was a layer's state in the same memory need not be finite numbers."""
        if not block_ids:
            return
        blocks = async_tensor_h2d(block_ids, device=self.device, dtype=torch.int64)
        for group in self._kv_cache_spec_attn_group_iterator():
            if not isinstance(group.kv_cache_spec, AttentionSpec):
                continue
            for name in group.layer_names:
                cache = self.compilation_config.static_forward_context[name].kv_cache
                pieces = cache.shape[0] // self.kv_cache_config.num_blocks  # the kernel's blocks in one of the cache
                cache.unflatten(0, (-1, pieces)).index_fill_(0, blocks, 0)

    def reload_weights(
        self, weights_iterator: Any = None, weights_path: str | None = None, is_checkpoint_format: bool = True
    ) -> None:
        """Load weights anew into the model that runs, as vLLM does, and check that all have come (`loader.reloading`).

        Cached prefixes are of the old weights: `reset_prefix_cache` drops them.

        Raises:
            ValueError: tensors that are missing; layer sharding, whose weights are not all on this rank; experts that move; weights in the form of kernels for a model that
                keeps more than they are.
        """
        linear.refuse_to_reload()
        moving.refuse_to_reload()
        model = self.get_model()
        derives = self.model_config.quantization is not None or self.model_config.use_mla
        if not is_checkpoint_format and derives:
            raise ValueError(
                "reload_weights with is_checkpoint_format=False: what a quantised model, or one with latent attention, derives from its weights "
                "would stay as it is; give the weights as a checkpoint has them"
            )
        if is_checkpoint_format:
            checked = loader.reloading(model, self.model_config, partial=weights_iterator is not None)
            model.load_weights = checked  # type: ignore[assignment]  # vLLM calls this attribute
        try:
            super().reload_weights(weights_iterator, weights_path, is_checkpoint_format)
        finally:
            model.__dict__.pop("load_weights", None)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """A step with requests, on any pipeline stage: vLLM's forward pass with logits or pooling, then the end of the step.

        Without tokens it is no step: the engine runs a dummy one next, for which the other ranks wait.
        """
        output = super().execute_model(scheduler_output, *args, **kwargs)
        if scheduler_output.total_num_scheduled_tokens:
            self._end_step()
        return output

    @torch.inference_mode()
    def _dummy_run(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A step without requests: forward pass, logits where data parallel ranks share the LM head, end of the step.

        After a profiling run (`is_profile`) vLLM computes the logits itself, on all ranks. Neither that run nor one that warms kernels up (`skip_eplb`)
        is a step that counts.
        """
        with parallel.without_requests():
            hidden, last = super()._dummy_run(*args, **kwargs)
        if kwargs.get("is_profile"):
            return hidden, last
        if self._shares_lmhead() and get_pp_group().is_last_rank and not self.is_pooling_model:
            self.model.compute_logits(last)  # type: ignore[operator]
        if not kwargs.get("skip_eplb"):
            self._end_step()
        return hidden, last

    def _end_step(self) -> None:
        """The last part of every step, on every rank: what all ranks do together after the forward pass and the logits."""
        if self.load_recorder is not None:
            self.load_recorder.step()
        if self.rebalancer is not None:
            self.rebalancer.step()

    def eplb_step(self, is_dummy: bool = False, is_profile: bool = False) -> None:
        """Nothing. vLLM calls this after the logits in a step with requests, and before them in a dummy step: `_end_step` is for such work.

        vLLM's own load balancing (`enable_eplb`), which it is for, is not offered on this platform.
        """

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

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """Draw tokens; top-k and top-p by the kernel where it takes them."""
        with self.filters.step(self.input_batch):
            return super()._sample(*args, **kwargs)

    def _get_prompt_logprobs_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Log-probabilities of prompts, for which the LM head runs once more. `AscendPlatform.validate_request` refuses them where it is shared."""
        if self._shares_lmhead() and self.num_prompt_logprobs:
            raise RuntimeError(
                "a request with prompt_logprobs has come to an engine with finegrained_tp_config.lmhead_tensor_parallel_size"
            )
        if self.lora_config is None or not self.num_prompt_logprobs:
            return super()._get_prompt_logprobs_dict(*args, **kwargs)
        # vLLM has the adapters of the rows that are sampled alone, and these rows are others: of one request at a time.
        manager, wanted = cast(AscendLoRAManager, self.lora_manager), self.num_prompt_logprobs
        found: dict[str, Any] = {}
        for request, number in list(wanted.items()):
            adapter = self.requests[request].lora_request
            self.num_prompt_logprobs = {request: number}
            with manager.sampling_as(0 if adapter is None else adapter.lora_int_id):
                found |= super()._get_prompt_logprobs_dict(*args, **kwargs)
            if not self.num_prompt_logprobs:
                del wanted[request]
        self.num_prompt_logprobs = wanted
        return found

    @staticmethod
    def _shares_lmhead() -> bool:
        """Whether data parallel ranks share the LM head."""
        shared = parallel.current()
        return shared is not None and "lmhead_tp" in shared.groups

    def shutdown(self) -> None:
        """Write what the recorder still holds, then release what vLLM built."""
        if self.load_recorder is not None:
            self.load_recorder.close()
            self.load_recorder = None
        if self.rebalancer is not None:
            self.rebalancer.close()
            self.rebalancer = None
        super().shutdown()
