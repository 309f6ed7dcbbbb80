# SPDX-License-Identifier: Apache-2.0
"""The one place with state of a worker process: its communication groups, its `LinearEnv`, and the step that it is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from ascend_comm import CommGroup, GroupSet, Solo, Topology, wrap
from ascend_linear import LinearEnv, PrefetchConfig, StepState, WeightPrefetcher, plan_step
from torch import Tensor
from vllm.distributed.parallel_state import get_dp_group, get_ep_group, get_tp_group
from vllm.forward_context import get_forward_context, is_forward_context_available

from vllm_ascend import envs, experts, rules
from vllm_ascend.attention.step import has_prompts, query_ends
from vllm_ascend.config import AscendConfig
from vllm_ascend.deployment import Deployment
from vllm_ascend.eplb.placement import placement_of
from vllm_ascend.experts import ExpertGroups, MoeContext

__all__ = [
    "Parallel",
    "close",
    "current",
    "forward_context",
    "most_tokens",
    "resume",
    "settle",
    "start",
    "step",
    "stream_once",
    "without_requests",
]

_STEP, _MOST_TOKENS = "ascend_step", "ascend_most_tokens"  # keys in the forward context
_UNSPLIT = StepState()
_current: Parallel | None = None


class Parallel:
    """What the adapters of a worker's layers share.

    Args:
        config: the options.
        env: what linear ops are told.
        groups: the groups beside vLLM's own.
        max_num_seqs: requests of a step at most.
        moe: what MoE layers share; None for a dense model.
    """

    def __init__(
        self, config: AscendConfig, env: LinearEnv, groups: GroupSet, max_num_seqs: int, moe: MoeContext | None = None
    ) -> None:
        """Store them, and create the prefetcher of weights where one is wanted."""
        self.config = config
        self.env = env
        self.groups = groups
        self.max_num_seqs = max_num_seqs
        self.moe = moe
        self.last_step = _UNSPLIT
        self.idle = False
        """Whether the step that runs is without requests, whatever it was prepared with."""
        ratios = config.weight_prefetch_config
        self.prefetcher = (
            WeightPrefetcher(PrefetchConfig(ratios=ratios.prefetch_ratio.by_module)) if ratios.enabled else None
        )

    def plan(self, tokens: int, dp_tokens: tuple[int, ...] | None, *, prefill: bool) -> StepState:
        """The state of the step that begins now. `last_step` keeps it for what runs after the forward pass, such as the LM head."""
        threshold = self.config.flashcomm1_dense_threshold
        self.last_step = plan_step(tokens, self.env, threshold=threshold, dp_tokens=dp_tokens, prefill=prefill)
        return self.last_step

    def tokens_over(self, group: CommGroup, state: StepState) -> tuple[int, ...] | None:
        """Tokens of each rank of `group` (consecutive DP ranks) in a step; None where vLLM has not counted over DP."""
        if state.dp_tokens is None:
            return None
        first = self.env.dp_rank - group.rank_in_group
        return state.dp_tokens[first : first + group.world_size]

    def pad(self, x: Tensor, state: StepState) -> Tensor:
        """`[N, ...]` -> `[P, ...]`, P a multiple of TP."""
        return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, state.pad_size)) if state.pad_size else x

    def own_chunk(self, x: Tensor, state: StepState) -> Tensor:
        """This rank's rows under FlashComm1: `[N, ...]` -> `[P / TP, ...]`."""
        return self.pad(x, state).chunk(self.env.tp.world_size)[self.env.tp.rank_in_group]

    def all_chunks(self, x: Tensor, state: StepState) -> Tensor:
        """All ranks' rows under FlashComm1, without the padding: `[P / TP, ...]` -> `[N, ...]`."""
        gathered = self.env.tp.all_gather(x, 0)
        return gathered[: gathered.shape[0] - state.pad_size]


def start(vllm_config: Any) -> Parallel:
    """Build the groups and the environment of this worker, in the place of those of an earlier one in this process.

    Collective: all ranks of the world call it, after vLLM has built its own groups.

    Raises:
        ValueError: options that do not fit (they have been checked before the workers started), or HCCL buffers too small for MC2.
        MemoryError: the groups' HCCL buffers do not fit into the free device memory.
    """
    global _current
    close()
    config = AscendConfig.of(vllm_config.additional_config)
    parallel = vllm_config.parallel_config
    deployment = _in_actual_world(Deployment.of(vllm_config))
    max_num_seqs, buffsize_mb = vllm_config.scheduler_config.max_num_seqs, envs.hccl_buffsize_mb()
    placed = dispatch = None
    if deployment.model.moe.routed_experts:
        placed = placement_of(config.eplb_config, deployment)
        device_name, slots = torch.npu.get_device_name(0), placed.slots_per_rank
        known = {"slots_per_rank": slots, "device_name": device_name, "max_num_seqs": max_num_seqs}
        # Checked before the workers started as well; the variable may have another value on the host of this worker.
        for finding in experts.broken(deployment, hccl_buffsize_mb=buffsize_mb, **known):
            raise ValueError(finding)
        dispatch = experts.dispatch_config(deployment, **known)
    mc2 = dispatch is not None and experts.uses_mc2(dispatch)
    wanted = rules.group_config(config, deployment, buffsize_mb, mc2=mc2)
    seconds = parallel.distributed_timeout_seconds
    groups = GroupSet(
        wanted,
        backend="hccl",
        free_memory=torch.npu.mem_get_info()[0] if wanted.families() else None,
        timeout=timedelta(seconds=seconds) if seconds else None,
    )
    env = rules.linear_env(
        config, deployment, tp=wrap(get_tp_group()), groups=groups, dp_rank=parallel.data_parallel_rank
    )
    moe = None
    if placed is not None and dispatch is not None:
        ep = wrap(get_ep_group()) if deployment.expert_parallel else Solo()
        over = ExpertGroups(
            ep=ep,
            tp=env.tp,
            dp=wrap(get_dp_group()),
            mc2=groups["mc2"] if mc2 else None,
            moves=groups.get("dynamic_eplb"),
        )
        moe = MoeContext(
            config.eplb_config,
            placed,
            deployment,
            over,
            dispatch,
            most_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            device=torch.device("npu", torch.npu.current_device()),
        )
    _current = Parallel(config, env, groups, max_num_seqs, moe)
    return _current


def _in_actual_world(deployment: Deployment) -> Deployment:
    """The same over the world that runs, which is larger where several replicas are launched outside vLLM."""
    top, world = deployment.topology, torch.distributed.get_world_size()
    if world == top.world_size:
        return deployment
    sizes = (top.data_parallel, top.pipeline_parallel, top.prefill_context_parallel, top.tensor_parallel)
    return replace(deployment, topology=Topology(world, *sizes))


def current() -> Parallel | None:
    """What `start` built; None outside a worker."""
    return _current


def settle(*, wait: bool = True) -> None:
    """Let the current stream wait for what the last step began for the one after it: the weights of first layers, streamed or prefetched.

    Args:
        wait: False forgets it, for what a capture that failed began never runs.
    """
    if _current is None:
        return
    if _current.prefetcher is not None and wait:
        _current.prefetcher.finish()
    if _current.env.o_shard is not None:
        _current.env.o_shard.finish(wait=wait)


def stream_once() -> None:
    """Begin to stream weights for one step alone, which is captured. Collective, after `settle`."""
    if _current is not None and _current.env.o_shard is not None:
        _current.env.o_shard.start(once=True)


def resume() -> None:
    """Before a step that is not captured: stream weights again if that was settled. Collective."""
    if _current is not None and _current.env.o_shard is not None and _current.env.o_shard.finished:
        _current.env.o_shard.start()


def close() -> None:
    """Destroy the groups. More calls do nothing."""
    global _current
    if _current is not None:
        _current.groups.close()
    _current = None


def forward_context(
    num_tokens: int | None, num_tokens_across_dp: Tensor | None, attn_metadata: object = None
) -> dict[str, Any]:
    """What vLLM keeps in the forward context of a step of `num_tokens` tokens, `num_tokens_across_dp` `[DP]` on all replicas.

    Args:
        num_tokens, num_tokens_across_dp: the tokens here and everywhere.
        attn_metadata: the attention's description of the step, by layer; None in a step without requests.
    """
    if _current is None or num_tokens is None:
        return {}
    if _current.moe is not None:
        _current.moe.begin_step([] if _current.idle else query_ends(attn_metadata))
    counts = None if num_tokens_across_dp is None else tuple(num_tokens_across_dp.tolist())
    return {
        _STEP: _current.plan(num_tokens, counts, prefill=has_prompts(attn_metadata)),
        _MOST_TOKENS: max(counts or (num_tokens,)),
    }


@contextmanager
def without_requests() -> Iterator[None]:
    """The steps of the block are without requests: a captured one is prepared with lengths as if it had some."""
    if _current is not None:
        _current.idle = True
    try:
        yield
    finally:
        if _current is not None:
            _current.idle = False


def step() -> StepState:
    """The step whose forward pass runs; outside of one, a step without split tokens."""
    if not is_forward_context_available():
        return _UNSPLIT
    state: StepState = get_forward_context().additional_kwargs.get(_STEP, _UNSPLIT)
    return state


def most_tokens() -> int:
    """Tokens of the step whose forward pass runs: the most of any data parallel rank, before they are split over TP."""
    most: int = get_forward_context().additional_kwargs[_MOST_TOKENS]
    return most
