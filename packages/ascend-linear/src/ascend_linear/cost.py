# SPDX-License-Identifier: Apache-2.0
"""What a layer's forward costs under an op: bytes that a rank sends, and kernels that it launches.

Bytes are those of the collectives' bandwidth-optimal algorithms: of n ranks that each put in b bytes, a rank sends 2b(n-1)/n in an all-reduce,
b(n-1) in an all-gather, b(n-1)/n in a reduce-scatter and in an all-to-all.
"""

from dataclasses import dataclass

__all__ = ["Cost", "LayerSize", "all_gather_bytes", "all_reduce_bytes", "all_to_all_bytes", "reduce_scatter_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSize:
    """A whole layer, as every rank's shard together has it.

    Args:
        inputs: input features.
        outputs: output features.
        element_bytes: of an activation.
        reduced_later: a row layer whose partial sums are returned: the model sums them together with another layer's.
    """

    inputs: int
    outputs: int
    element_bytes: int
    reduced_later: bool = False

    @property
    def input_bytes(self) -> int:
        """Of one token's input features."""
        return self.inputs * self.element_bytes

    @property
    def output_bytes(self) -> int:
        """Of one token's output features."""
        return self.outputs * self.element_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One forward on one rank.

    Args:
        bytes_per_token: sent for each token of the TP group.
        launches: products and collectives that are launched; a fused kernel is one, copies and padding do not count.
        weight_ranks: ranks that each keep an equal part of the series that this layer's shard belongs to (layer sharding), and send that part to
            the others in every step; 1 where the shard stays on its rank.
    """

    bytes_per_token: float = 0.0
    launches: int = 1
    weight_ranks: int = 1


def all_reduce_bytes(put_in: float, ranks: int) -> float:
    """Bytes that a rank sends in an all-reduce of `put_in` bytes."""
    return 2 * put_in * (ranks - 1) / ranks


def all_gather_bytes(put_in: float, ranks: int) -> float:
    """Bytes that a rank sends in an all-gather, to which each rank gives `put_in` bytes."""
    return put_in * (ranks - 1)


def reduce_scatter_bytes(put_in: float, ranks: int) -> float:
    """Bytes that a rank sends in a reduce-scatter of `put_in` bytes."""
    return put_in * (ranks - 1) / ranks


def all_to_all_bytes(put_in: float, ranks: int) -> float:
    """Bytes that a rank sends in an all-to-all of `put_in` bytes in equal parts."""
    return put_in * (ranks - 1) / ranks
