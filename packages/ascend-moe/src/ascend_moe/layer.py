# SPDX-License-Identifier: Apache-2.0
"""A mixture-of-experts layer from end to end: prepare, route, dispatch, experts, combine, finalize.

Legend: n tokens of the layer on this rank, E logical experts, S physical slots, L slots of this rank, K experts per token,
H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ascend_comm import CommGroup
from torch import Tensor

from ascend_moe.choose import CommMethod
from ascend_moe.dispatch import Dispatcher, make_dispatcher
from ascend_moe.env import MoeEnv
from ascend_moe.experts import Experts
from ascend_moe.prepare import Prepared, TokenDistribution, make_token_distribution
from ascend_moe.routing import RoutingSpec, select_experts
from ascend_moe.shared import SharedExperts, start_on

__all__ = ["MoeComm", "MoeOutput", "Partial", "Reduced", "experts_forward", "forward_selected", "make_comm", "reduced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """A result that is complete: it must not be summed over ranks again.

    Attributes:
        hidden: `[n, H]`.
        load: int64 `[L]`: tokens that each slot of this rank received from all ranks, without padding.
    """

    hidden: Tensor
    load: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """A result that is one TP rank's partial sum: the caller sums it over TP, once. It has the attributes of `Reduced`."""

    hidden: Tensor
    load: Tensor


MoeOutput: TypeAlias = Reduced | Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeComm:
    """One communication method over the groups of a run. It has no state: all layers share it.

    Attributes:
        env: the groups.
        distribution: which tokens this rank routes; its `finalize` returns the result to the layer's own tokens.
        dispatcher: sends tokens to the ranks of their experts, and sums the results.
    """

    env: MoeEnv
    distribution: TokenDistribution
    dispatcher: Dispatcher

    @property
    def output_is_reduced(self) -> bool:
        """Whether every layer that uses it returns `Reduced`; otherwise every layer returns `Partial`."""
        return self.distribution.output_is_reduced


def make_comm(method: CommMethod, env: MoeEnv) -> MoeComm:
    """A communication method over the groups of `env`.

    Raises:
        ValueError: MC2 without `env.mc2`.
        RuntimeError: MC2 over one rank, or not over HCCL.
    """
    return MoeComm(env=env, distribution=make_token_distribution(method, env), dispatcher=make_dispatcher(method, env))


def experts_forward(
    hidden: Tensor,
    logits: Tensor,
    *,
    spec: RoutingSpec,
    experts: Experts,
    comm: MoeComm,
    bias: Tensor | None = None,
    log2phy: Tensor | None = None,
    routing_table: Tensor | None = None,
    tokens: Sequence[int] | None = None,
    mask: Tensor | None = None,
    shared: SharedExperts | None = None,
) -> MoeOutput:
    """The layer's output for this rank's tokens. All ranks of the EP group call it together, each for its own tokens.

    The vLLM plugin does not use this function (vLLM's router has chosen before): it calls `forward_selected`.

    Args:
        hidden: `[n, H]`, on the NPU.
        logits: `[n, E]`, of the layer's router.
        spec: how to route; see `select_experts`, also for `bias`.
        experts: this rank's L slots.
        comm: the method, from `make_comm`.
        log2phy: int32 `[E]`, the slot of each expert for the tokens of this rank.
        routing_table: int32 `[P, E]`, the same by token position. All ranks have the same.
        tokens: n of every DP rank, or under sequence parallelism of every EP rank. None: all have n.
        mask: bool `[n]`, False for padding that the caller has made; real tokens come first.
        shared: an MLP for all tokens, whose result is added.

    Raises:
        ValueError: something does not fit; among that `log2phy` with all-gather, where all ranks route the same tokens
            and must agree on the slot: give `routing_table`, of one row if need be.
    """
    if log2phy is not None and comm.dispatcher.method is CommMethod.ALL_GATHER:
        raise ValueError(
            "log2phy must be None with all-gather: it may differ by rank, and then an expert would be computed twice; "
            "give routing_table, which chooses by token"
        )

    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        return select_experts(logits, spec, bias, log2phy=log2phy, routing_table=routing_table)

    return _forward(hidden, (logits,), route, experts=experts, comm=comm, tokens=tokens, mask=mask, shared=shared)


def forward_selected(
    hidden: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    experts: Experts,
    comm: MoeComm,
    tokens: Sequence[int] | None = None,
    mask: Tensor | None = None,
    shared: SharedExperts | None = None,
) -> MoeOutput:
    """`experts_forward` for a router outside of this package. This is what the vLLM plugin calls.

    Args:
        hidden: `[n, H]`, on the NPU.
        weights: float32 `[n, K]`.
        ids: int32 `[n, K]`, physical slots. With all-gather, TP ranks give the same for the tokens that they share.

    The other arguments are those of `experts_forward`.
    """

    def given(weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return weights, ids

    return _forward(hidden, (weights, ids), given, experts=experts, comm=comm, tokens=tokens, mask=mask, shared=shared)


def reduced(output: MoeOutput, tp: CommGroup) -> Tensor:
    """`[n, H]`: the output, summed over TP if it is `Partial`. The vLLM plugin does not use it: vLLM's runner does the sum."""
    return output.hidden if isinstance(output, Reduced) else tp.all_reduce(output.hidden)


def _forward(
    hidden: Tensor,
    routed: tuple[Tensor, ...],
    select: Callable[..., tuple[Tensor, Tensor]],
    *,
    experts: Experts,
    comm: MoeComm,
    tokens: Sequence[int] | None,
    mask: Tensor | None,
    shared: SharedExperts | None,
) -> MoeOutput:
    """The whole layer. `select` returns weights and ids, given the tensors `routed` after `prepare`."""
    if experts.num_slots != comm.env.slots_per_rank:
        raise ValueError(
            f"experts has {experts.num_slots} slots, must have {comm.env.slots_per_rank}: "
            f"num_slots={comm.env.num_slots} over {comm.env.ep.world_size} ranks"
        )
    if shared is not None and shared.mode == "tensor_parallel" and comm.env.sequence_parallel:
        raise ValueError("shared.mode='tensor_parallel' must be 'replicated' under sequence parallelism")
    prepared = comm.distribution.prepare(hidden, routed, tokens=tokens, mask=mask)
    wait = None if shared is None else _start_shared(shared, hidden, prepared)
    weights, ids = select(*prepared.routed)
    dispatched = comm.dispatcher.dispatch(prepared.hidden, weights, ids, mask=prepared.mask, quantise=experts.quantised)
    rows = experts.forward(dispatched, hidden.dtype)
    out = comm.dispatcher.combine(rows, dispatched)
    if wait is None or shared is None:
        result = comm.distribution.finalize(out, prepared)
    elif shared.mode == "replicated":
        result = comm.distribution.finalize(out, prepared, wait())
    else:
        result = comm.distribution.finalize(out, prepared)
        part = wait()
        result = result + (comm.env.tp.all_reduce(part) if comm.output_is_reduced else part)
    kind = Reduced if comm.output_is_reduced else Partial
    return kind(hidden=result, load=dispatched.counts)


def _start_shared(shared: SharedExperts, hidden: Tensor, prepared: Prepared) -> Callable[[], Tensor]:
    """Start the shared MLP on the tokens that are this rank's in its mode."""
    x = hidden[prepared.own] if shared.mode == "replicated" else hidden
    return start_on(shared.stream, shared.mlp, x) if len(x) else lambda: x
