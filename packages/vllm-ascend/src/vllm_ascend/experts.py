# SPDX-License-Identifier: Apache-2.0
"""What the MoE layers of a worker share: their groups, the communication method of each step, and where experts lie. No vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from ascend_comm import CommGroup
from ascend_eplb import Placement
from ascend_moe import CommMethod, DispatchConfig, MoeComm, MoeEnv, Soc, choose_method, make_comm, mc2_buffer_bytes

from vllm_ascend.deployment import Deployment
from vllm_ascend.eplb.observe import CountedRows
from vllm_ascend.eplb.options import EplbConfig
from vllm_ascend.eplb.placement import ExpertPlacement, LayerSlots

__all__ = ["ExpertGroups", "LayerComm", "MoeContext", "broken", "dispatch_config", "most_decoded", "uses_mc2"]

_CAPTURED_TOKENS = 512  # MC2's largest step, where more could be decoded at once
_MC2_TOP_K, _MC2_HIDDEN, _MC2_HIDDEN_MULTIPLE = 16, 8192, 32  # what MC2's kernels accept
_MB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGroups:
    """The groups over which MoE layers communicate.

    Args:
        ep: ranks that share the experts, `Solo()` without expert parallelism.
        tp: tensor parallel ranks.
        dp: data parallel ranks.
        mc2: a second group of the ranks of `ep`, for MC2's kernels alone; None: MC2 is not used.
        moves: a further one, for experts that move; None: they do not.
    """

    ep: CommGroup
    tp: CommGroup
    dp: CommGroup
    mc2: CommGroup | None = None
    moves: CommGroup | None = None


def most_decoded(vllm_config: Any) -> int:
    """Tokens that a replica decodes in a step at most: one for each request, and those that are drafted for it."""
    return int(vllm_config.scheduler_config.max_num_seqs * (1 + vllm_config.num_speculative_tokens))


def dispatch_config(
    deployment: Deployment, *, slots_per_rank: int, device_name: str, decoding_tokens: int
) -> DispatchConfig:
    """What the choice of a communication method depends on.

    Args:
        deployment: the model over ranks.
        slots_per_rank: experts of a layer on each rank, replicas included.
        device_name: the chip as torch_npu names it. `torch.npu.get_device_name(0)` answers without initialising a device.
        decoding_tokens: of a step without prompts, on a replica at most.

    Raises:
        ValueError: a chip of no known family, where several ranks share the experts.
    """
    top, model, ranks = deployment.topology, deployment.model, deployment.expert_ranks
    fits_mc2 = model.half_precision and (
        model.experts_per_token <= _MC2_TOP_K
        and model.hidden <= _MC2_HIDDEN
        and model.hidden % _MC2_HIDDEN_MULTIPLE == 0
    )
    return DispatchConfig(
        # On one rank every chip uses all-gather, so that an unknown chip is no error there.
        soc=Soc.of(device_name) if ranks > 1 else Soc.A2,
        ep_size=ranks,
        tp_size=top.tensor_parallel,
        world_size=top.world_size,
        experts_per_rank=slots_per_rank,
        top_k=max(model.experts_per_token, 1),
        max_captured_tokens=min(decoding_tokens, _CAPTURED_TOKENS) if fits_mc2 else 0,
    )


def broken(
    deployment: Deployment, *, slots_per_rank: int, device_name: str, decoding_tokens: int, hccl_buffsize_mb: int
) -> Iterator[str]:
    """One finding for each reason why the experts cannot communicate on this chip, naming the value and what is allowed.

    Args:
        deployment: the model over ranks.
        slots_per_rank: experts of a layer on each rank, replicas included.
        device_name: the chip as torch_npu names it.
        decoding_tokens: of a step without prompts, on a replica at most.
        hccl_buffsize_mb: HCCL_BUFFSIZE or its default.
    """
    try:
        config = dispatch_config(
            deployment, slots_per_rank=slots_per_rank, device_name=device_name, decoding_tokens=decoding_tokens
        )
    except ValueError as error:
        yield f"experts over {deployment.expert_ranks} ranks (enable_expert_parallel): {error}"
        return
    hidden = deployment.model.hidden
    needed = -(-mc2_buffer_bytes(config, hidden) // _MB) if uses_mc2(config) else 0
    if needed > hccl_buffsize_mb:
        yield (
            f"environment variable HCCL_BUFFSIZE ({hccl_buffsize_mb} MB) must be {needed} or more for MC2: {config.mc2_capacity} tokens of "
            f"{hidden} features a step, {slots_per_rank} experts on each of {config.ep_size} ranks; or lower max_num_seqs, so that a step decodes fewer than {decoding_tokens} tokens"
        )


def uses_mc2(config: DispatchConfig) -> bool:
    """Whether some step will take MC2."""
    return choose_method(config, 1) is CommMethod.MC2


class LayerComm:
    """How one MoE layer communicates: an object for each method that a step may take. All ranks build them in the same order.

    Args:
        env: its groups and slots.
        config: what the method depends on.
        sums_later: whether the model sums the layer's output over TP itself, so that only partial sums may be returned.
    """

    def __init__(self, env: MoeEnv, config: DispatchConfig, sums_later: bool) -> None:
        """Build an object for each method."""
        self._config = replace(config, ep_size=1) if sums_later else config
        methods = [CommMethod.ALL_GATHER]
        if self._config.ep_size > 1:
            methods += [CommMethod.ALL_TO_ALL_V, *([CommMethod.MC2] if env.mc2 is not None else [])]
        self._comms = {method: make_comm(method, env) for method in methods}

    def of_step(self, tokens: int, *, captured: bool = False) -> MoeComm:
        """The method for a step.

        Args:
            tokens: the most of any data parallel rank, before they are split over TP.
            captured: whether the step is captured in a graph, in which the host cannot wait for the sizes of all-to-all-v.
        """
        method = choose_method(self._config, tokens)
        return self._comms[CommMethod.ALL_GATHER if captured and method is CommMethod.ALL_TO_ALL_V else method]


class MoeContext:
    """What all MoE layers of a worker share.

    Args:
        options: `eplb_config`.
        placement: where experts lie.
        deployment: the model over ranks.
        groups: what layers communicate over.
        config: what the communication method depends on.
        most_tokens: tokens of a step at most.
        device: of this worker.
    """

    def __init__(
        self,
        options: EplbConfig,
        placement: Placement,
        deployment: Deployment,
        groups: ExpertGroups,
        config: DispatchConfig,
        *,
        most_tokens: int,
        device: torch.device | str,
    ) -> None:
        """Choose this rank's part of the placement."""
        self.options = options
        self.groups = groups
        self._config = config
        rows = most_tokens + groups.tp.world_size  # split over TP, each part is padded by less than one token
        self.counted = CountedRows(options.stage, rows, device) if options.dynamic_eplb else None
        """What counts the tokens of each expert; None where experts do not move."""
        self.real = CountedRows("all", rows, device) if options.expert_load_record_path else None
        """Which tokens are of requests; None where no load is recorded."""
        self._comms: dict[tuple[Any, ...], LayerComm] = {}
        self._placement = ExpertPlacement(
            placement,
            options=options,
            decoder_layers=deployment.model.decoder_layers,
            rank=groups.ep.rank_in_group,
            tp_size=deployment.topology.tensor_parallel,
            replica=groups.dp.rank_in_group,
        )

    def begin_step(self, query_ends: Sequence[int]) -> None:
        """A step begins with tokens of requests up to these cumulative numbers."""
        for rows in (self.counted, self.real):
            if rows is not None:
                rows.begin(query_ends)

    def slots(self, decoder_layer: int, num_experts: int) -> LayerSlots:
        """Where the experts of a layer lie. ValueError: they do not divide over the ranks."""
        return self._placement.layer(decoder_layer, num_experts)

    def moved(self, placed: Placement) -> LayerSlots:
        """The slots of a layer that has got another placement while the engine runs."""
        return self._placement.moved(placed)

    def comm(self, num_slots: int, *, sequence_parallel: bool, sums_later: bool) -> LayerComm:
        """How a layer communicates. Layers with equal arguments get one object; all ranks must ask in the same order."""
        key = (num_slots, sequence_parallel, sums_later)
        if key not in self._comms:
            env = MoeEnv(
                ep=self.groups.ep,
                num_slots=num_slots,
                tp=self.groups.tp,
                dp=self.groups.dp,
                mc2=self.groups.mc2,
                soc=self._config.soc,
                sequence_parallel=sequence_parallel,
            )
            self._comms[key] = LayerComm(env, self._config, sums_later)
        return self._comms[key]
