# SPDX-License-Identifier: Apache-2.0
"""Rank arithmetic: which global ranks form which communication group.

Every family of groups is a view of one array of ranks, ``arange(world_size)`` shaped ``[XDP, DP, PP, PCP, TP]`` (external data
parallel, data parallel, pipeline parallel, prefill context parallel, tensor parallel; the last axis is the fastest). It
is the order of vLLM's ``initialize_model_parallel``. Pure Python: neither torch nor numpy is needed.

A *family* is ``list[list[int]]``: groups of global ranks. Members ascend within a group, and no rank is in two groups
of a family.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul

from ascend_comm.errors import InvalidValueError

__all__ = ["Coordinates", "Groups", "Topology", "group_of"]

Groups = list[list[int]]

MOST_RANKS = 1 << 16
"""Ranks of a world at most: a family of groups has an entry for each, and no cluster has so many."""


def group_of(groups: Sequence[Sequence[int]], rank: int) -> list[int]:
    """The group of `groups` that holds global `rank`.

    Args:
        groups: a family of groups, as a method of `Topology` returns it.
        rank: a *global* rank. A local (per node) rank finds the wrong group on every node but the first.

    Raises:
        ValueError: no group holds the rank.
    """
    for group in groups:
        if rank in group:
            return list(group)
    raise ValueError(f"rank={rank} is in none of the {len(groups)} groups; global ranks are expected")


def check_size(name: str, value: int, least: int = 1) -> None:
    """Raise unless `value` is an int (no bool) of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise InvalidValueError(name, value, f"must be at least {least}")


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _no_divisor(name: str, value: int, tp: int) -> InvalidValueError:
    return InvalidValueError(
        name, value, f"must divide {{tensor_parallel}}, so be one of {_divisors(tp)}", tensor_parallel=tp
    )


def _groups(shape: Sequence[int], members: Sequence[int], order: Sequence[int] | None = None) -> Groups:
    """Groups along the axes `members` of ``arange(prod(shape)).reshape(shape)``, listed along the axes `order`.

    `order` holds every axis that is not in `members`, the last one fastest; by default as they stand in `shape`.
    """
    strides = [*accumulate(reversed(shape[1:]), mul, initial=1)][::-1]

    def offsets(axes: Sequence[int]) -> list[int]:
        found = [0]
        for axis in axes:
            found = [offset + i * strides[axis] for offset in found for i in range(shape[axis])]
        return found

    if order is None:
        order = [axis for axis in range(len(shape)) if axis not in members]
    inside = offsets(members)
    return [[base + offset for offset in inside] for base in offsets(order)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """Where one rank stands on each axis of the rank array."""

    external_data: int
    data: int
    pipeline: int
    prefill_context: int
    tensor: int


@dataclass(frozen=True, slots=True)
class Topology:
    """The parallel sizes of a world, and the families of groups that follow from them.

    The arguments may be given by position: their order is the order of the axes of the rank array.

    Args:
        world_size: number of ranks.
        data_parallel: replicas of the model that step together (DP).
        pipeline_parallel: pipeline stages of a replica (PP).
        prefill_context_parallel: ranks that share the context of a prefill (PCP).
        tensor_parallel: ranks that share a layer (TP).

    Raises:
        InvalidValueError: a size below 1, a world of more than `MOST_RANKS`, or sizes whose product does not divide
            `world_size`. What is left of it is external data parallel.
        TypeError: a size that is no int.
    """

    world_size: int
    data_parallel: int = 1
    pipeline_parallel: int = 1
    prefill_context_parallel: int = 1
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_size("world_size", self.world_size)
        if self.world_size > MOST_RANKS:
            raise InvalidValueError("world_size", self.world_size, f"must be at most {MOST_RANKS}")
        check_size("data_parallel", self.data_parallel)
        check_size("pipeline_parallel", self.pipeline_parallel)
        check_size("prefill_context_parallel", self.prefill_context_parallel)
        check_size("tensor_parallel", self.tensor_parallel)
        inner = self.data_parallel * self.replica_size
        if self.world_size % inner:
            raise InvalidValueError(
                "world_size",
                self.world_size,
                f"must be a multiple of {inner}, the product of "
                "{data_parallel}, {pipeline_parallel}, {prefill_context_parallel} and {tensor_parallel}",
                data_parallel=self.data_parallel,
                pipeline_parallel=self.pipeline_parallel,
                prefill_context_parallel=self.prefill_context_parallel,
                tensor_parallel=self.tensor_parallel,
            )

    @property
    def external_data_parallel(self) -> int:
        """Independent copies of everything within (XDP): what remains of the world."""
        return self.world_size // (self.data_parallel * self.replica_size)

    @property
    def replica_size(self) -> int:
        """Ranks of one copy of the model: PP x PCP x TP."""
        return self.pipeline_parallel * self.prefill_context_parallel * self.tensor_parallel

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """The shape ``(XDP, DP, PP, PCP, TP)`` of the rank array."""
        return (
            self.external_data_parallel,
            self.data_parallel,
            self.pipeline_parallel,
            self.prefill_context_parallel,
            self.tensor_parallel,
        )

    def coordinates(self, rank: int) -> Coordinates:
        """Where global `rank` stands on each axis.

        Raises:
            ValueError: `rank` outside ``0 .. world_size - 1``.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank={rank}: must be 0 to {self.world_size - 1}")
        index = [rank // prod(self.shape[axis + 1 :]) % size for axis, size in enumerate(self.shape)]
        return Coordinates(
            external_data=index[0], data=index[1], pipeline=index[2], prefill_context=index[3], tensor=index[4]
        )

    def global_rank(self, data_parallel_index: int, rank: int) -> int:
        """The rank in the world of a process that knows its rank in its own replica.

        Args:
            data_parallel_index: index of the replica, external data parallel included: ``0 .. XDP * DP - 1``.
            rank: its rank there, or in a larger world of whole replicas: only ``rank % replica_size`` counts.

        Raises:
            ValueError: an index or rank out of range.
        """
        replicas = self.world_size // self.replica_size
        if not 0 <= data_parallel_index < replicas:
            raise ValueError(f"data_parallel_index={data_parallel_index}: must be 0 to {replicas - 1}")
        if rank < 0:
            raise ValueError(f"rank={rank}: must be at least 0")
        return data_parallel_index * self.replica_size + rank % self.replica_size

    def tensor_parallel_groups(self) -> Groups:
        """Ranks that share a layer: vLLM's TP groups, ``[tensor_parallel]`` ranks each."""
        return _groups(self.shape, (4,))

    def prefill_context_parallel_groups(self) -> Groups:
        """Ranks that share a context: vLLM's PCP groups."""
        return _groups(self.shape, (3,))

    def pipeline_parallel_groups(self) -> Groups:
        """One rank of each stage: vLLM's PP groups. The only family that crosses pipeline stages."""
        return _groups(self.shape, (2,))

    def data_parallel_groups(self) -> Groups:
        """The same rank of each replica: vLLM's DP groups."""
        return _groups(self.shape, (1,))

    def expert_parallel(self) -> Groups:
        """DP x PCP x TP within one pipeline stage: vLLM's EP groups, and those of `mc2` and `dynamic_eplb`."""
        return _groups(self.shape, (1, 3, 4))

    def fine_grained(self, k: int) -> Groups:
        """Groups of `k` consecutive DP ranks for each stage, PCP and TP index (otp, lmhead_tp, embed_tp, mlp_tp).

        Raises:
            ValueError: `k` does not divide `data_parallel`.
        """
        check_size("k", k)
        xdp, dp, pp, pcp, tp = self.shape
        if dp % k:
            raise InvalidValueError(
                "k", k, f"must divide {{data_parallel}}, so be one of {_divisors(dp)}", data_parallel=dp
            )
        return _groups((xdp, dp // k, k, pp, pcp, tp), (2,))

    def flashcomm2(self, k: int) -> tuple[Groups, Groups]:
        """The two families of FlashComm2 within each TP group, for an o_proj cut into `k` shards.

        With ``G = tensor_parallel / k``: OTP is strided (``base + i + j * G`` over j, k ranks), ODP is contiguous
        (``base + j * G + i`` over i, G ranks).

        Returns:
            ``(otp, odp)``. For ``k == 1`` the weight is replicated: `otp` is empty (there is none), `odp` is the TP
            groups.

        Raises:
            ValueError: `k` does not divide `tensor_parallel`, or is not below it.
        """
        shape = (*self.shape[:4], k, self._flashcomm2_block(k))
        return ([] if k == 1 else _groups(shape, (4,)), _groups(shape, (5,)))

    def flashcomm2_token_order(self, k: int) -> list[list[int]]:
        """The order in which FlashComm2 sends the token chunks of a TP group.

        Returns:
            ``[G, k]`` chunk indices below `tensor_parallel`, ``ids[i][j] = i + j * G``: row i goes to ODP peer i, and
            after the reduce-scatter over OTP every rank ends with the chunk of its own TP index.

        Raises:
            ValueError: as `flashcomm2`.
        """
        block = self._flashcomm2_block(k)
        return [[i + j * block for j in range(k)] for i in range(block)]

    def shard_weight(self, shards: int = 1) -> Groups:
        """Ranks of one pipeline stage that hold the same piece of a weight, so that each can keep some layers for all.

        Args:
            shards: pieces into which a TP group cuts the weight, in contiguous blocks of ranks: 1 for a replicated
                layer (the group is the whole stage), `tensor_parallel` for a TP-sharded one (DP and PCP peers of equal
                TP index), k for the o_proj of FlashComm2 (its ODP blocks across DP and PCP).

        Raises:
            ValueError: `shards` does not divide `tensor_parallel`.
        """
        check_size("shards", shards)
        xdp, dp, pp, pcp, tp = self.shape
        if tp % shards:
            raise _no_divisor("shards", shards, tp)
        return _groups((xdp, dp, pp, pcp, shards, tp // shards), (1, 3, 5))

    def prefill_tp(self, ratio: int, head_replicas: int = 1) -> Groups:
        """Ranks of a prefill node whose KV heads one rank of a decode node needs (`p_tp`).

        Args:
            ratio: TP size of the prefill node over that of the decode node (`pd_tp_ratio`).
            head_replicas: prefill ranks that hold the same KV head (TP over the number of KV heads, at least 1). Each
                group then holds different heads: the TP ranks are viewed as ``[heads, replicas]``, transposed, and cut
                into chunks.

        Raises:
            ValueError: `ratio` or `head_replicas` does not divide `tensor_parallel`, or the decode ranks do not divide
                the heads.
        """
        check_size("ratio", ratio)
        check_size("head_replicas", head_replicas)
        xdp, dp, pp, pcp, tp = self.shape
        if tp % ratio:
            raise _no_divisor("ratio", ratio, tp)
        if ratio % head_replicas:
            raise InvalidValueError(
                "head_replicas",
                head_replicas,
                f"must divide {{ratio}} so that the {tp // ratio} decode ranks share the heads evenly; one of {_divisors(ratio)}",
                ratio=ratio,
            )
        chunk = ratio // head_replicas
        shape = (xdp, dp, pp, pcp, tp // ratio, chunk, head_replicas)
        return _groups(shape, (5,), order=(0, 1, 2, 3, 6, 4))

    def _flashcomm2_block(self, k: int) -> int:
        """G = tensor_parallel / k, after the size rules of FlashComm2."""
        check_size("k", k)
        tp = self.tensor_parallel
        if k >= tp or tp % k:
            allowed = _divisors(tp)[:-1]
            rule = "must divide {tensor_parallel} and be smaller, so be one of " + str(allowed)
            raise InvalidValueError(
                "k", k, rule if allowed else "needs {tensor_parallel} to be larger than 1", tensor_parallel=tp
            )
        return tp // k
