# SPDX-License-Identifier: Apache-2.0
"""Slow and obvious: activations by their formulas, weights of all experts, placements of replicas by loops. The dense layer is in moe_bounds.py.

Legend: T tokens, E logical experts, S physical slots, K experts per token, H hidden, I intermediate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_moe import Activation, RoutingSpec, select_experts


def normal(*shape: int, seed: int) -> Tensor:
    """Float32, the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def act(x: Tensor, activation: Activation) -> Tensor:
    """The activation of `[T, 2I]`, from its formula."""
    if activation.interleaved:
        gate, up = x[:, ::2], x[:, 1::2]
    else:
        gate, up = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    if activation.limit is not None:
        gate = torch.minimum(gate, torch.tensor(activation.limit))
        up = torch.clamp(up, -activation.limit, activation.limit)
        return gate / (1 + torch.exp(-activation.alpha * gate)) * (up + activation.up_bias)
    if activation.gate == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if activation.gate == "gelu":
        return gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up
    return gate * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up


def gates(logits: Tensor, spec: RoutingSpec, bias: Tensor | None = None) -> Tensor:
    """Float64 `[T, E]`: the weight of each expert for each token, 0 where it is not chosen."""
    weights, ids = select_experts(logits, spec, bias)
    dense = torch.zeros(logits.shape, dtype=torch.float64)
    return dense.scatter(1, ids.long(), weights.double())


@dataclass(frozen=True)
class Replicas:
    """Which expert is in each slot."""

    experts: int
    slots: tuple[int, ...]

    def of(self, expert: int) -> list[int]:
        """The slots of an expert, ascending."""
        return [slot for slot, held in enumerate(self.slots) if held == expert]

    def table(self, rows: int) -> Tensor:
        """int32 `[rows, E]`: the token at position t takes replica number t + expert."""
        return torch.tensor(
            [[self.of(e)[(t + e) % len(self.of(e))] for e in range(self.experts)] for t in range(rows)],
            dtype=torch.int32,
        )

    def log2phy(self, rank: int) -> Tensor:
        """int32 `[E]`: rank r takes replica number r."""
        chosen = [self.of(e)[rank % len(self.of(e))] for e in range(self.experts)]
        return torch.tensor(chosen, dtype=torch.int32)


def replicas(experts: int, redundant: int) -> Replicas:
    """A placement in mixed order; the first experts have a replica more, none beside its first."""
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(experts + redundant)).tolist()
    return Replicas(experts=experts, slots=tuple(order + [e % experts for e in range(redundant)]))
