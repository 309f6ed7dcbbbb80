# SPDX-License-Identifier: Apache-2.0
"""What groups a run needs: `GroupConfig`, its families by name, and the plan of handles that follows. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from ascend_comm.errors import InvalidValueError
from ascend_comm.hccl import DEFAULT_BUFFER_MB, HcclOptions, options_for
from ascend_comm.topology import Groups, Topology, check_size

__all__ = ["GroupConfig", "Handle", "memory_by_rank", "memory_bytes", "plan"]

_PARALLEL = ("tp", "pcp", "pp", "dp")
_ROLES = ("both", "producer", "consumer")
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def _named(
    names: Mapping[str, str], build: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs
) -> _Result:
    """``build(*args, **kwargs)``. An InvalidValueError then names the options that the arguments come from, by `names`."""
    try:
        return build(*args, **kwargs)
    except InvalidValueError as error:
        raise error.renamed(names) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupConfig:
    """Which groups to build. Sizes of 0 are off; every rule is checked at construction.

    vllm-ascend sets none of `parallel`, `dynamic_eplb`, `weight_shards`, `pd_tp_ratio` and `pd_head_replicas`; they are for other callers.

    Args:
        topology: the parallel sizes.
        parallel: which of the plain groups "tp", "pcp", "pp", "dp" to build too (vLLM has its own).
        mc2: the expert parallel group.
        dynamic_eplb: a second one, for moving experts beside the forward pass.
        otp: ranks that share an o_proj along DP; needs tensor_parallel 1.
        lmhead_tp: ranks that share the LM head along DP.
        embed_tp: ranks that share the embedding along DP.
        mlp_tp: ranks that share dense MLPs along DP.
        flashcomm2: shards of o_proj within a TP group under FlashComm2 (1: replicated).
        layer_sharding: names of the modules whose layers are spread over ranks; not empty builds `shard_weight`.
        weight_shards: pieces into which TP cuts those weights. None: `flashcomm2` where that is on, else
            `tensor_parallel`; 1 for replicated layers (see `Topology.shard_weight`).
        pd_tp_ratio: TP size of prefill over that of decode nodes; `p_tp` is built where more than one head meets.
        pd_head_replicas: prefill ranks that hold the same KV head.
        kv_role: "producer" (prefill only), "consumer" (decode only) or "both".
        hccl_buffsize_mb: what HCCL_BUFFSIZE says, in MB. It plans memory; nothing here reads the environment.

    Raises:
        ValueError: a size that does not divide, options that exclude each other, an unknown name.
        TypeError: a size that is no int, names that are no tuple.
    """

    topology: Topology
    parallel: tuple[str, ...] = ()
    mc2: bool = True
    dynamic_eplb: bool = False
    otp: int = 0
    lmhead_tp: int = 0
    embed_tp: int = 0
    mlp_tp: int = 0
    flashcomm2: int = 0
    layer_sharding: tuple[str, ...] = ()
    weight_shards: int | None = None
    pd_tp_ratio: int = 1
    pd_head_replicas: int = 1
    kv_role: str = "both"
    hccl_buffsize_mb: int = DEFAULT_BUFFER_MB

    def __post_init__(self) -> None:
        """Check every rule; sizes are checked by building the families once."""
        for field in ("parallel", "layer_sharding"):
            if not isinstance(getattr(self, field), tuple):
                raise TypeError(f"{field}={getattr(self, field)!r}: must be a tuple of names")
        for name in self.parallel:
            if name not in _PARALLEL:
                raise InvalidValueError(
                    "parallel", self.parallel, f"must have no other names than {', '.join(_PARALLEL)}"
                )
        if self.kv_role not in _ROLES:
            raise InvalidValueError("kv_role", self.kv_role, f"must be one of {', '.join(_ROLES)}")
        check_size("hccl_buffsize_mb", self.hccl_buffsize_mb)
        for name in ("otp", "lmhead_tp", "embed_tp", "mlp_tp", "flashcomm2"):
            check_size(name, getattr(self, name), least=0)
        self._check_exclusive()
        self._check_layer_sharding()
        self.families()

    def _check_exclusive(self) -> None:
        tp = self.topology.tensor_parallel
        if self.flashcomm2 and self.otp:
            raise InvalidValueError(
                "flashcomm2",
                self.flashcomm2,
                "cannot be used with {otp}: both cut o_proj; set one of them to 0",
                otp=self.otp,
            )
        if self.otp and tp != 1:
            raise InvalidValueError(
                "otp",
                self.otp,
                "cannot be used with {tensor_parallel}, which must be 1; set it to 0 or use FlashComm2",
                tensor_parallel=tp,
            )
        if self.flashcomm2 and self.kv_role == "consumer":
            raise self._not_on_decode_node("flashcomm2")

    def _not_on_decode_node(self, option: str) -> InvalidValueError:
        return InvalidValueError(
            option,
            getattr(self, option),
            "cannot be used on a decode-only node, {kv_role}; leave it out there",
            kv_role=self.kv_role,
        )

    def _check_layer_sharding(self) -> None:
        if not self.layer_sharding:
            if self.weight_shards is not None:
                raise InvalidValueError(
                    "weight_shards",
                    self.weight_shards,
                    "needs {layer_sharding} to name a module",
                    layer_sharding=self.layer_sharding,
                )
            return
        if self.kv_role == "consumer":
            raise self._not_on_decode_node("layer_sharding")
        if self.flashcomm2 and self.layer_sharding != ("o_proj",):
            raise InvalidValueError(
                "layer_sharding",
                self.layer_sharding,
                "must be ('o_proj',) with {flashcomm2}",
                flashcomm2=self.flashcomm2,
            )
        if self.flashcomm2 and self.weight_shards not in (None, self.flashcomm2):
            raise InvalidValueError(
                "weight_shards",
                self.weight_shards,
                "must be None or the same as {flashcomm2}",
                flashcomm2=self.flashcomm2,
            )

    def families(self) -> dict[str, Groups]:
        """The families to build by name, in the order of creation.

        Raises:
            ValueError: a size that does not fit the topology, named by its field.
        """
        top = self.topology
        found: dict[str, Groups] = {}
        plain = {
            "tp": top.tensor_parallel_groups,
            "pcp": top.prefill_context_parallel_groups,
            "pp": top.pipeline_parallel_groups,
            "dp": top.data_parallel_groups,
        }
        found |= {name: build() for name, build in plain.items() if name in self.parallel}
        found |= {name: top.expert_parallel() for name in ("mc2", "dynamic_eplb") if getattr(self, name)}
        for name in ("otp", "lmhead_tp", "embed_tp", "mlp_tp"):
            if size := getattr(self, name):
                found[name] = _named({"k": name}, top.fine_grained, size)
        if self.flashcomm2:
            otp, odp = _named({"k": "flashcomm2"}, top.flashcomm2, self.flashcomm2)
            found |= {"flashcomm2_otp": otp} if otp else {}
            found["flashcomm2_odp"] = odp
        if self.layer_sharding:
            shards = self.flashcomm2 or top.tensor_parallel if self.weight_shards is None else self.weight_shards
            found["shard_weight"] = _named({"shards": "weight_shards"}, top.shard_weight, shards)
        of_prefill = {"ratio": "pd_tp_ratio", "head_replicas": "pd_head_replicas"}
        p_tp = _named(of_prefill, top.prefill_tp, self.pd_tp_ratio, self.pd_head_replicas)
        if len(p_tp[0]) > 1 and self.kv_role == "producer":
            found["p_tp"] = p_tp
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """One communicator to create, and the names of all groups that share it.

    Args:
        names: the groups it serves, in the order of creation.
        ranks: its global ranks, ascending, two or more.
        options: its options.
    """

    names: tuple[str, ...]
    ranks: tuple[int, ...]
    options: HcclOptions


def plan(config: GroupConfig) -> list[Handle]:
    """Every communicator of the world, in the order in which all ranks create them.

    Groups of equal ranks and options are one handle; groups of one rank need none.
    """
    names: dict[tuple[tuple[int, ...], HcclOptions], list[str]] = {}
    for name, groups in config.families().items():
        options = options_for(name, config.topology.data_parallel)
        for ranks in groups:
            if len(ranks) > 1:
                names.setdefault((tuple(ranks), options), []).append(name)
    return [Handle(names=tuple(shared), ranks=ranks, options=options) for (ranks, options), shared in names.items()]


def memory_by_rank(config: GroupConfig) -> list[int]:
    """Device memory in bytes that the HCCL buffers take, for each global rank."""
    found = [0] * config.topology.world_size
    for handle in plan(config):
        for rank in handle.ranks:
            found[rank] += handle.options.memory_bytes(config.hccl_buffsize_mb)
    return found


def memory_bytes(config: GroupConfig, rank: int) -> int:
    """Device memory in bytes that the HCCL buffers of global `rank` take.

    Raises:
        ValueError: `rank` is not in the topology.
    """
    config.topology.coordinates(rank)
    return memory_by_rank(config)[rank]
