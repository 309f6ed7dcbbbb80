# SPDX-License-Identifier: Apache-2.0
"""What the MoE layers of a worker share: their groups, the communication method of each step, and where experts lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ascend_moe
from ascend_comm import CommGroup
from ascend_eplb import Placement
from ascend_moe import CommMethod, MoeComm, MoeEnv, Soc, choose_method, make_comm, mc2_buffer_bytes

from vllm_ascend.config import EplbConfig
from vllm_ascend.deployment import Deployment
from vllm_ascend.eplb.placement import ExpertPlacement, LayerSlots

__all__ = ["ExpertGroups", "Experts", "LayerComm", "sizes", "uses_mc2"]

_CAPTURED_TOKENS = 512  # nothing is captured here: the largest decoding batch stands for it, up to this
_MC2_TOP_K, _MC2_HIDDEN, _MC2_HIDDEN_MULTIPLE = 16, 8192, 32  # what its kernels take
_MB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGroups:
    """The groups over which MoE layers communicate.

    Args:
        ep: ranks that share the experts, `Solo()` without expert parallelism.
        tp: tensor parallel ranks.
        dp: data parallel ranks.
        mc2: the ranks of `ep` again, for MC2's kernels alone; None: MC2 is not used.
    """

    ep: CommGroup
    tp: CommGroup
    dp: CommGroup
    mc2: CommGroup | None = None


def sizes(
    deployment: Deployment, *, slots_per_rank: int, soc: Soc, max_num_seqs: int, hccl_buffsize_mb: int
) -> ascend_moe.DispatchConfig:
    """What the choice of a communication method depends on, with `slots_per_rank` experts on each rank, replicas among them.

    Raises:
        ValueError: MC2 is to be used, and HCCL's buffers are too small for its kernels.
    """
    top, model, ranks = deployment.topology, deployment.model, deployment.expert_ranks
    fits_mc2 = model.half_precision and (
        model.experts_per_token <= _MC2_TOP_K
        and model.hidden <= _MC2_HIDDEN
        and model.hidden % _MC2_HIDDEN_MULTIPLE == 0
    )
    chosen_by = ascend_moe.DispatchConfig(
        soc=soc,
        ep_size=ranks,
        tp_size=top.tensor_parallel,
        world_size=top.world_size,
        experts_per_rank=slots_per_rank,
        top_k=max(model.experts_per_token, 1),
        max_captured_tokens=min(max_num_seqs, _CAPTURED_TOKENS) if fits_mc2 else 0,
    )
    needed = -(-mc2_buffer_bytes(chosen_by, model.hidden) // _MB) if uses_mc2(chosen_by) else 0
    if needed > hccl_buffsize_mb:
        raise ValueError(
            f"environment variable HCCL_BUFFSIZE ({hccl_buffsize_mb} MB) must be {needed} or more for MC2: {chosen_by.mc2_capacity} tokens of "
            f"{model.hidden} features a step, {chosen_by.experts_per_rank} experts on each of {ranks} ranks; or lower max_num_seqs ({max_num_seqs})"
        )
    return chosen_by


def uses_mc2(chosen_by: ascend_moe.DispatchConfig) -> bool:
    """Whether some step will take MC2."""
    return choose_method(chosen_by, 1) is CommMethod.MC2


class LayerComm:
    """How one MoE layer communicates.

    Args:
        env: its groups and slots.
        chosen_by: what the method depends on.
        sums_later: whether the model sums the layer's output over TP itself, so that only partial sums may be returned.
    """

    def __init__(self, env: MoeEnv, chosen_by: ascend_moe.DispatchConfig, sums_later: bool) -> None:
        """Build what every method needs, in the same order on all ranks."""
        self._chosen_by = replace(chosen_by, ep_size=1) if sums_later else chosen_by
        methods = [CommMethod.ALL_GATHER]
        if self._chosen_by.ep_size > 1:
            methods += [CommMethod.ALL_TO_ALL_V, *([CommMethod.MC2] if env.mc2 is not None else [])]
        self._comms = {method: make_comm(method, env) for method in methods}

    def of_step(self, tokens: int) -> MoeComm:
        """The method for a step of so many tokens, before TP slices them: the most of any data parallel rank."""
        return self._comms[choose_method(self._chosen_by, tokens)]


class Experts:
    """One for a worker with a MoE model.

    Args:
        config: what was asked for.
        placement: where experts lie.
        deployment: the model over ranks.
        groups: what layers communicate over.
        chosen_by: what the method depends on.
    """

    def __init__(
        self,
        config: EplbConfig,
        placement: Placement,
        deployment: Deployment,
        groups: ExpertGroups,
        chosen_by: ascend_moe.DispatchConfig,
    ) -> None:
        """Choose this rank's part of the placement."""
        self.config = config
        self.groups = groups
        self._chosen_by = chosen_by
        self._comms: dict[tuple[Any, ...], LayerComm] = {}
        self._placement = ExpertPlacement(
            placement,
            layout=config.layout,
            moe_layer_ids=deployment.model.moe_layer_ids,
            rank=groups.ep.rank_in_group,
            tp_size=deployment.topology.tensor_parallel,
            replica=groups.dp.rank_in_group,
        )

    def slots(self, decoder_layer: int, num_experts: int) -> LayerSlots:
        """Where the experts of a layer lie. ValueError: they do not divide over the ranks."""
        return self._placement.layer(decoder_layer, num_experts)

    def comm(self, num_slots: int, *, sequence_parallel: bool, sums_later: bool) -> LayerComm:
        """How a layer communicates; layers that are alike share it. All ranks ask in the same order."""
        key = (num_slots, sequence_parallel, sums_later)
        if key not in self._comms:
            env = MoeEnv(
                ep=self.groups.ep,
                num_slots=num_slots,
                tp=self.groups.tp,
                dp=self.groups.dp,
                mc2=self.groups.mc2,
                soc=self._chosen_by.soc,
                sequence_parallel=sequence_parallel,
            )
            self._comms[key] = LayerComm(env, self._chosen_by, sums_later)
        return self._comms[key]
