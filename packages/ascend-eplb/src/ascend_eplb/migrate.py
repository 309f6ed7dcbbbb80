# SPDX-License-Identifier: Apache-2.0
"""From one placement to the next: keep experts where they are, and plan which rank sends which slot to which.

Legend: L layers, R ranks, K slots per rank, E experts, N nodes, M transfers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ascend_eplb.cluster import Cluster
from ascend_eplb.maps import replica_table
from ascend_eplb.placement import IntArray, Placement

__all__ = ["TransferPlan", "align_slots", "relabel_ranks", "transfer_plan"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransferPlan:
    """Transfers, as int32 arrays `[M]` of one length: the expert in a slot of `old` goes to a slot of `new`.

    `layer` counts rows 0..L-1 of the placements (not model-global numbers). Where source and destination rank are the
    same the transfer is a local copy. All sources mean the contents before any transfer.
    """

    layer: IntArray
    expert: IntArray
    source_rank: IntArray
    source_slot: IntArray
    target_rank: IntArray
    target_slot: IntArray
    ranks_per_node: int

    def __len__(self) -> int:
        """M, the number of transfers, local copies included."""
        return len(self.layer)

    @property
    def local(self) -> NDArray[np.bool_]:
        """bool `[M]`: copies within a rank."""
        return np.asarray(self.source_rank == self.target_rank)

    @property
    def within_node(self) -> NDArray[np.bool_]:
        """bool `[M]`: transfers between ranks of one node, or within a rank."""
        return np.asarray(self.source_rank // self.ranks_per_node == self.target_rank // self.ranks_per_node)

    def bytes_moved(self, expert_bytes: int) -> int:
        """Bytes that leave a rank, at `expert_bytes` an expert (all its weights in one layer)."""
        return int((~self.local).sum()) * expert_bytes

    def bytes_between_nodes(self, expert_bytes: int) -> int:
        """Bytes that leave a node."""
        return int((~self.within_node).sum()) * expert_bytes

    def select(self, index: NDArray[np.generic]) -> TransferPlan:
        """The transfers at these positions, in this order."""
        columns = ("layer", "expert", "source_rank", "source_slot", "target_rank", "target_slot")
        picked = {name: getattr(self, name)[index] for name in columns}
        return TransferPlan(**picked, ranks_per_node=self.ranks_per_node)


def align_slots(old: Placement, new: Placement) -> Placement:
    """`new` with every expert that stays on its rank in the slot it has in `old`; the others fill the remaining slots.

    Raises:
        ValueError: the placements differ in layers, experts, ranks or slots.

    Complexity: O(L * R * E + L * S log K).

    Source: what vLLM's `preserve_intragpu_slots` does, for all ranks at once.
    """
    _check_alike(old, new)
    slot_LRE = np.full((old.layers, old.ranks, old.num_experts), -1, dtype=np.int32)
    number_K = np.broadcast_to(np.arange(old.slots_per_rank, dtype=np.int32), old.physical_to_logical.shape)
    np.put_along_axis(slot_LRE, old.physical_to_logical, number_K, axis=2)
    kept_LRK = np.take_along_axis(slot_LRE, new.physical_to_logical, axis=2)
    layer, rank, slot = np.nonzero(kept_LRK >= 0)
    ids_LRK = np.full(kept_LRK.shape, -1, dtype=np.int32)
    ids_LRK[layer, rank, kept_LRK[layer, rank, slot]] = new.physical_to_logical[layer, rank, slot]
    ids_LRK[ids_LRK < 0] = new.physical_to_logical[kept_LRK < 0]
    return Placement(ids_LRK, new.num_experts, new.layer_ids)


def relabel_ranks(old: Placement, new: Placement, *, nodes: int = 1) -> Placement:
    """`new` with its ranks renumbered, layer by layer, so that more experts are where `old` has them already.

    Ranks are exchanged within a node only. Pairs that share most experts are matched first; then pairs exchange their
    matches while more experts stay in place that way. Never fewer stay than without relabelling. Loads and balancedness do
    not change.

    Raises:
        ValueError: the placements differ in shape, or `nodes` does not divide the ranks.

    Complexity: O(L * R^2 * E), and O(L * R^2) for each of a few rounds of exchanges.

    Source: the assignment problem, by greedy choice and exchanges of two.
    """
    _check_alike(old, new)
    Cluster(ranks=old.ranks, nodes=nodes)  # checks both numbers
    overlap_LRQ = _overlap(old, new)
    source_LR = _match_ranks(overlap_LRQ, nodes)
    kept_L = np.take_along_axis(overlap_LRQ, source_LR[:, :, None], axis=2).sum(axis=(1, 2))
    worse_L = kept_L < np.trace(overlap_LRQ, axis1=1, axis2=2)
    source_LR[worse_L] = np.arange(old.ranks)
    ids_LRK = np.take_along_axis(new.physical_to_logical, source_LR[:, :, None], axis=1)
    return Placement(ids_LRK, new.num_experts, new.layer_ids)


def transfer_plan(old: Placement, new: Placement, *, nodes: int = 1) -> TransferPlan:
    """The transfers that turn `old` into `new`, slot by slot; use `align_slots` first, for slots are taken as they are.

    A slot that keeps its expert needs nothing. The sender of any other is the rank itself if it holds the expert,
    else a holder in the same node, else any holder; among several of these, the one that has sent least in this layer.

    Args:
        old: the placement in force.
        new: the placement wanted; same layers, experts, ranks and slots.
        nodes: number of nodes, which divides the ranks.

    Raises:
        ValueError: the placements differ in shape, or `nodes` does not divide the ranks.

    Complexity: O(L * S log S), and one vector step for each transfer of a layer with a choice of senders.

    Source: this project.
    """
    _check_alike(old, new)
    cluster = Cluster(ranks=old.ranks, nodes=nodes)
    layer, rank, slot = np.nonzero(old.physical_to_logical != new.physical_to_logical)
    expert = new.physical_to_logical[layer, rank, slot]
    order_LS, start_LE, count_LE = replica_table(old)
    start_M, count_M = start_LE[layer, expert], count_LE[layer, expert]
    most = int(count_M.max()) if len(layer) else 1
    turn_C = np.arange(most)
    column_MC = np.minimum(start_M[:, None] + turn_C, old.slots - 1)
    physical_MC = order_LS[layer[:, None], column_MC]
    holder_MC = physical_MC // old.slots_per_rank
    node_R = cluster.node_of()
    cost_MC = 2 - (node_R[holder_MC] == node_R[rank][:, None]) - (holder_MC == rank[:, None]).astype(np.int64)
    cost_MC = np.where(turn_C < count_M[:, None], cost_MC, 3)
    candidate_MC = cost_MC == cost_MC.min(axis=1, keepdims=True)
    choice_M = _balanced_choice(layer, holder_MC, candidate_MC, (old.layers, old.ranks))
    source_M = physical_MC[np.arange(len(layer)), choice_M]
    source_rank, source_slot = np.divmod(source_M, old.slots_per_rank)
    return TransferPlan(
        layer=layer.astype(np.int32),
        expert=expert.astype(np.int32),
        source_rank=source_rank.astype(np.int32),
        source_slot=source_slot.astype(np.int32),
        target_rank=rank.astype(np.int32),
        target_slot=slot.astype(np.int32),
        ranks_per_node=cluster.ranks_per_node,
    )


def _balanced_choice(
    layer_M: NDArray[np.int64], holder_MC: IntArray, candidate_MC: NDArray[np.bool_], shape: tuple[int, int]
) -> NDArray[np.int64]:
    """`[M]`: the candidate of each transfer, those without a choice counted first, then the least busy sender."""
    choice_M = candidate_MC.argmax(axis=1)
    sent_LR = np.zeros(shape, dtype=np.int64)
    single_M = candidate_MC.sum(axis=1) == 1
    sender_M = holder_MC[np.arange(len(choice_M)), choice_M]
    np.add.at(sent_LR, (layer_M[single_M], sender_M[single_M]), 1)
    open_X = np.flatnonzero(~single_M)
    counts_L = np.bincount(layer_M[open_X], minlength=shape[0])
    turn_X = np.arange(len(open_X)) - np.repeat(np.cumsum(counts_L) - counts_L, counts_L)
    by_turn = open_X[np.argsort(turn_X, kind="stable")]
    sizes = np.bincount(turn_X, minlength=1)
    for chunk in np.split(by_turn, np.cumsum(sizes)[:-1]):
        layer_A = layer_M[chunk]
        busy_AC = np.where(candidate_MC[chunk], sent_LR[layer_A[:, None], holder_MC[chunk]], np.iinfo(np.int64).max)
        choice_M[chunk] = busy_AC.argmin(axis=1)
        sent_LR[layer_A, holder_MC[chunk, choice_M[chunk]]] += 1
    return np.asarray(choice_M)


def _overlap(old: Placement, new: Placement) -> NDArray[np.float32]:
    """`[L, R, Q]`: experts that rank R of `old` and rank Q of `new` share."""
    held = []
    for placement in (old, new):
        held_LRE = np.zeros((old.layers, old.ranks, old.num_experts), dtype=np.float32)
        np.put_along_axis(held_LRE, placement.physical_to_logical, np.float32(1), axis=2)
        held.append(held_LRE)
    return np.asarray(held[0] @ held[1].transpose(0, 2, 1))


def _match_ranks(overlap_LRQ: NDArray[np.float32], nodes: int) -> NDArray[np.int64]:
    """`[L, R]`: the rank Q that each R takes, of the same node; by greatest overlap, then exchanges while they help."""
    layers, ranks, _ = overlap_LRQ.shape
    node_R = np.arange(ranks) // (ranks // nodes)
    allowed_RQ = node_R[:, None] == node_R
    row_X, other_X = np.divmod(np.flatnonzero((overlap_LRQ > 0) & allowed_RQ), ranks)  # row = layer * R + rank
    column_X = row_X // ranks * ranks + other_X
    after_X = (other_X - row_X) % ranks  # equal overlaps: the same rank first, then the next ones
    shared_X = overlap_LRQ.reshape(-1, ranks)[row_X, other_X].astype(np.int64)
    key_X = ((shared_X.max(initial=0) - shared_X) * ranks + after_X) << 32 | np.arange(len(row_X))
    order_X = np.sort(key_X) & (2**32 - 1)
    row_X, column_X = row_X[order_X], column_X[order_X]
    source = np.full(layers * ranks, -1, dtype=np.int64)
    first_of_row, first_of_column = source.copy(), source.copy()
    taken = np.zeros(layers * ranks, dtype=bool)
    while len(row_X):  # pairs that are the best of both their rank and the other one
        number_X = np.arange(len(row_X))
        first_of_row[row_X[::-1]], first_of_column[column_X[::-1]] = number_X[::-1], number_X[::-1]
        best = (first_of_row[row_X] == number_X) & (first_of_column[column_X] == number_X)
        source[row_X[best]], taken[column_X[best]] = column_X[best], True
        left = (source[row_X] < 0) & ~taken[column_X]
        row_X, column_X = row_X[left], column_X[left]
    source[source < 0] = np.flatnonzero(~taken)  # no overlap left, so in order: a node has as many of both
    source_LR = np.asarray(source.reshape(layers, ranks) % ranks)
    _exchange_ranks(overlap_LRQ, source_LR, allowed_RQ)
    return source_LR


def _exchange_ranks(
    overlap_LRQ: NDArray[np.float32], source_LR: NDArray[np.int64], allowed_RQ: NDArray[np.bool_]
) -> None:
    """Let pairs of ranks exchange what they take where they share more then; those that gain most, all at once."""
    ranks = source_LR.shape[1]
    number_R = np.arange(ranks)
    open_A = np.arange(len(source_LR))
    while len(open_A):
        source_AR = source_LR[open_A]
        given_ARQ = overlap_LRQ[open_A[:, None, None], number_R[:, None], source_AR[:, None, :]]
        own_AR = given_ARQ[:, number_R, number_R]
        gain_ARQ = given_ARQ + given_ARQ.transpose(0, 2, 1) - own_AR[:, :, None] - own_AR[:, None, :]
        gain_ARQ[:, ~allowed_RQ] = -1.0
        mate_AR = gain_ARQ.argmax(axis=2)
        row_A1 = np.arange(len(open_A))[:, None]
        mutual_AR = (mate_AR[row_A1, mate_AR] == number_R) & (gain_ARQ[row_A1, number_R, mate_AR] > 0)
        row_X, rank_X = np.nonzero(mutual_AR)
        source_LR[open_A[row_X], rank_X] = source_AR[row_X, mate_AR[row_X, rank_X]]
        open_A = open_A[mutual_AR.any(axis=1)]


def _check_alike(old: Placement, new: Placement) -> None:
    if old.slots_per_rank != new.slots_per_rank:
        raise ValueError(
            f"old and new placement differ in slots per rank: {old.slots_per_rank} and {new.slots_per_rank}"
        )
    for name in ("layers", "num_experts", "ranks"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise ValueError(f"old and new placement differ in {name}: {before} and {after}")
