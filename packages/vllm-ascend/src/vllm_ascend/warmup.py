# SPDX-License-Identifier: Apache-2.0
"""A prompt and a decoding step before the first request, as a scheduler would order them; of a model that pools, a prompt alone.

vLLM's profiling run has no attention metadata: it runs neither attention nor the write to the cache, and its sampler has logits without a step. What a
kernel costs at its first call (loading it, its workspace, the connections and buffers of an HCCL group) would be paid by the first request,
from memory that the KV cache has taken by then. These steps go through the worker's own `execute_model` and `sample_tokens`, so
that pipeline stages hand hidden states and tokens on, and data parallel replicas count tokens together, as in any other step. All
ranks run the same steps, at the same place of their start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from vllm import PoolingParams, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.tasks import PoolingTask
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_ascend.attention.limits import BLOCK_SIZES
from vllm_ascend.layers import moe

if TYPE_CHECKING:
    from vllm_ascend.model_runner import AscendModelRunner
    from vllm_ascend.worker import AscendWorker

__all__ = ["small_cache", "warm_up"]

logger = init_logger(__name__)

PROMPT = 8  # tokens: with the one decoded after them they fit one block of any size
BLOCK = BLOCK_SIZES[0]  # tokens of the smallest block
REQUEST = "ascend-warm-up"


@contextmanager
def small_cache(runner: AscendModelRunner, tokens: int = 1) -> Iterator[int]:
    """Give the layers a KV cache while the real one has no size yet: blocks for so many tokens for each group, and the one that vLLM keeps free. The number
    of groups is what the block gets: encoders have none."""
    config, cache = runner.vllm_config, runner.cache_config
    groups = get_kv_cache_groups(config, runner.get_kv_cache_spec())
    blocks = sum(-(-tokens // group.kv_cache_spec.block_size) for group in groups)
    asked, cache.num_gpu_blocks_override = cache.num_gpu_blocks_override, 1 + blocks
    try:
        small = get_kv_cache_config_from_groups(config, groups, available_memory=0)
    finally:
        cache.num_gpu_blocks_override = asked
    try:
        with set_current_vllm_config(config):
            runner.initialize_kv_cache(small, is_profiling=True)
        yield len(groups)
    finally:
        runner._cleanup_profiling_kv_cache()
        runner._mamba_bufs = None  # what vLLM has prepared for the copies of states between blocks knows this cache


def warm_up(worker: AscendWorker, *, cached: bool = True) -> None:
    """Run the steps, and leave no trace of them in the runner. Collective over all ranks of all replicas.

    Encoder-decoder models are left out: their prompt is nothing without what the encoder makes of an input. So are models that pool over pipeline stages,
    of which only the last one may know the tasks.

    Args:
        worker: whose model is loaded.
        cached: whether the model has a KV cache, which then has no size yet. An encoder has none: its runner is ready for steps.
    """
    runner = worker.model_runner
    pools = runner.is_pooling_model
    tokens = min(PROMPT, runner.max_num_tokens, runner.max_model_len - (not pools))
    if runner.model_config.is_encoder_decoder or tokens < 1:
        return
    if pools and (runner.parallel_config.pipeline_parallel_size > 1 or not _pooling_task(runner)):
        return
    with small_cache(runner) if cached else nullcontext(0) as groups, _uncounted(runner):
        runner.cudagraph_dispatcher.keys_initialized = False  # no step is prepared for a graph before there are any
        _step(worker, _prompt(runner, tokens, groups))
        if not pools:
            _step(worker, _decoding(runner, tokens))
        end = SchedulerOutput.make_empty()
        end.finished_req_ids = {REQUEST}
        worker.execute_model(end)
    logger.info_once(
        "Ran a prompt of %d tokens%s to warm the kernels up.", tokens, "" if pools else " and a decoding step"
    )


def _step(worker: AscendWorker, step: SchedulerOutput) -> None:
    """One step to its end: the host waits for what is sampled."""
    output: Any = worker.execute_model(step)
    if output is None and not worker.model_runner.is_pooling_model:
        output = worker.sample_tokens(None)
    if hasattr(output, "get_output"):  # asynchronous scheduling
        output.get_output()


def _pooling_task(runner: AscendModelRunner) -> PoolingTask | None:
    """A task of a model that pools; None where a plugin of vLLM's does all of it."""
    tasks = sorted(set(runner.get_supported_pooling_tasks()) - {"plugin"})
    return tasks[0] if tasks else None


def _pooling(runner: AscendModelRunner) -> PoolingParams | None:
    """What a request asks of a model that pools; None of others."""
    if not runner.is_pooling_model:
        return None
    params = PoolingParams(task=_pooling_task(runner))
    params.verify(runner.model_config)
    return params


def _prompt(runner: AscendModelRunner, tokens: int, groups: int) -> SchedulerOutput:
    pooling = _pooling(runner)
    request = NewRequestData(
        req_id=REQUEST,
        prompt_token_ids=[0] * tokens,
        mm_features=[],
        sampling_params=None if pooling else SamplingParams(temperature=0, max_tokens=2),
        pooling_params=pooling,
        block_ids=tuple([1 + index] for index in range(groups)),
        num_computed_tokens=0,
        lora_request=None,
    )
    step = SchedulerOutput.make_empty()
    step.scheduled_new_reqs = [request]
    return _of_tokens(step, tokens, runner)


def _decoding(runner: AscendModelRunner, tokens: int) -> SchedulerOutput:
    """The step after a prompt of `tokens` tokens; its token is that which the runner has sampled, and after it come drafted ones if there is room for them."""
    cached = CachedRequestData.make_empty()
    cached.req_ids, cached.new_block_ids = [REQUEST], [None]
    cached.num_computed_tokens, cached.num_output_tokens = [tokens], [1]
    step = SchedulerOutput.make_empty()
    step.scheduled_cached_reqs = cached
    drafts = runner.num_spec_tokens
    if drafts and 1 + drafts <= runner.max_num_tokens and tokens + 1 + 2 * drafts <= min(runner.max_model_len, BLOCK):
        step.scheduled_spec_decode_tokens = {REQUEST: [0] * drafts}
        return _of_tokens(step, 1 + drafts, runner)
    return _of_tokens(step, 1, runner)


def _of_tokens(step: SchedulerOutput, tokens: int, runner: AscendModelRunner) -> SchedulerOutput:
    step.num_scheduled_tokens, step.total_num_scheduled_tokens = {REQUEST: tokens}, tokens
    step.num_spec_tokens_to_schedule = runner.num_spec_tokens
    return step


@contextmanager
def _uncounted(runner: AscendModelRunner) -> Iterator[None]:
    """Let no step in the block count towards the load of experts."""
    recorder, runner.load_recorder = runner.load_recorder, None
    try:
        yield
    finally:
        runner.load_recorder = recorder
        moe.clear_loads(runner.get_model())
