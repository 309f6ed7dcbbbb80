# SPDX-License-Identifier: Apache-2.0
"""What an op is told: the groups and options of a run (`LinearEnv`) and what changes with every step (`StepState`)."""

from dataclasses import dataclass
from itertools import pairwise

from ascend_comm import CommGroup, InvalidValueError

from ascend_linear.layer_shard import LayerShard

__all__ = ["FLASHCOMM1_DENSE_THRESHOLD", "LinearEnv", "MoeLayers", "StepState", "layer_index", "plan_step"]

FLASHCOMM1_DENSE_THRESHOLD = 1000
"""Tokens up to which a dense model is faster without FlashComm1. Empirical."""

_MATMUL_ALLREDUCE_RANKS = (1, 2, 4, 8)  # of the kernels, torch_npu/_op_plugin_docs.py
_MATMUL_REDUCE_SCATTER_RANKS = (2, 4, 8)


def layer_index(prefix: str) -> int | None:
    """n of the first components ``layers.<n>`` of a path in a model; None where there are none."""
    components = prefix.split(".")
    return next((int(n) for name, n in pairwise(components) if name == "layers" and n.isdecimal()), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeLayers:
    """Which layers of a model are MoE layers.

    Args:
        routed_experts: number of routed experts; 0 for a dense model.
        layers: indices of the MoE layers.

    Raises:
        ValueError: a negative number.
    """

    routed_experts: int = 0
    layers: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Check the number."""
        if self.routed_experts < 0:
            raise InvalidValueError("routed_experts", self.routed_experts, "must be at least 0")


def _ranks(group: CommGroup | None) -> int:
    """How many ranks a group has; 0 without one."""
    return 0 if group is None else group.world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearEnv:
    """The communication groups of this rank, and the options that decide which layer uses which of them.

    A group that is not None turns its feature on. vLLM's GroupCoordinator fits after `ascend_comm.wrap`.

    Args:
        tp: the tensor parallel group.
        mlp_tp: mlp-TP: the DP peers that share dense MLPs.
        otp: oproj-TP: the DP peers that share o_proj; needs a `tp` of one rank.
        flashcomm2_odp: FlashComm2 is on: the TP ranks with which tokens are exchanged for heads.
        flashcomm2_otp: FlashComm2 with k > 1: the k TP ranks that share o_proj.
        dp_rank: index of this rank along DP, in its own world.
        enable_flashcomm1: tokens split over `tp` between the layers; needs a `tp` of more than one rank.
        enable_matmul_allreduce: product and all-reduce in one kernel.
        enable_matmul_reduce_scatter: product and reduce-scatter of FlashComm1 in one kernel; for dense models.
        enable_dsa_cp: context parallelism of DeepSeek sparse attention; needs `enable_flashcomm1`. Not used by vllm-ascend.
        enable_shared_expert_dp: shared experts replicated.
        layer_sharding: last path components of the layers whose weights are spread over ranks.
        o_shard: the series of o_proj, which FlashComm2 with ``layer_sharding=("o_proj",)`` streams.
        moe: which layers are MoE layers.

    Raises:
        ValueError: groups whose sizes do not fit each other, options that exclude each other or miss what they need.
    """

    tp: CommGroup
    mlp_tp: CommGroup | None = None
    otp: CommGroup | None = None
    flashcomm2_odp: CommGroup | None = None
    flashcomm2_otp: CommGroup | None = None
    dp_rank: int = 0
    enable_flashcomm1: bool = False
    enable_matmul_allreduce: bool = False
    enable_matmul_reduce_scatter: bool = False
    enable_dsa_cp: bool = False
    enable_shared_expert_dp: bool = False
    layer_sharding: tuple[str, ...] = ()
    o_shard: LayerShard | None = None
    moe: MoeLayers = MoeLayers()

    def __post_init__(self) -> None:
        """Check every rule."""
        tp = self.tp.world_size
        if self.dp_rank < 0:
            raise InvalidValueError("dp_rank", self.dp_rank, "must be at least 0")
        if self.otp is not None and tp != 1:
            raise InvalidValueError("otp", self.otp.world_size, "needs {tp} to be 1; use FlashComm2 instead", tp=tp)
        if self.enable_flashcomm1 and tp == 1:
            raise InvalidValueError("enable_flashcomm1", True, "needs {tp} to be larger than 1", tp=tp)
        if self.enable_dsa_cp and not self.enable_flashcomm1:
            raise InvalidValueError(
                "enable_dsa_cp", True, "cannot be used with {enable_flashcomm1}; turn that on", enable_flashcomm1=False
            )
        self._check_fusion(tp)
        self._check_flashcomm2(tp)

    def _check_fusion(self, tp: int) -> None:
        if self.enable_matmul_allreduce:
            replaced = {"enable_flashcomm1": self.enable_flashcomm1, "flashcomm2_odp": _ranks(self.flashcomm2_odp)}
            for option, value in replaced.items():
                if value:
                    rule = f"cannot be used with {{{option}}}, which replaces the all-reduce; turn one of the two off"
                    raise InvalidValueError("enable_matmul_allreduce", True, rule, **{option: value})
            if tp not in _MATMUL_ALLREDUCE_RANKS:
                raise InvalidValueError(
                    "enable_matmul_allreduce", True, f"needs {{tp}} to be one of {_MATMUL_ALLREDUCE_RANKS}", tp=tp
                )
        if self.enable_matmul_reduce_scatter:
            if not self.enable_flashcomm1:
                raise InvalidValueError(
                    "enable_matmul_reduce_scatter",
                    True,
                    "cannot be used with {enable_flashcomm1}; turn that on",
                    enable_flashcomm1=False,
                )
            if self.moe.routed_experts:
                raise InvalidValueError(
                    "enable_matmul_reduce_scatter",
                    True,
                    "needs a dense model, but has {routed_experts}",
                    routed_experts=self.moe.routed_experts,
                )
            if tp not in _MATMUL_REDUCE_SCATTER_RANKS:
                raise InvalidValueError(
                    "enable_matmul_reduce_scatter",
                    True,
                    f"needs {{tp}} to be one of {_MATMUL_REDUCE_SCATTER_RANKS}",
                    tp=tp,
                )

    def _check_flashcomm2(self, tp: int) -> None:
        if self.o_shard is not None and (self.flashcomm2_odp is None or "o_proj" not in self.layer_sharding):
            raise InvalidValueError(
                "o_shard",
                self.o_shard.group.world_size,
                "needs {flashcomm2_odp} to be 2 or more, and {layer_sharding} to be ('o_proj',)",
                flashcomm2_odp=_ranks(self.flashcomm2_odp),
                layer_sharding=self.layer_sharding,
            )
        if self.flashcomm2_odp is None:
            if self.flashcomm2_otp is not None:
                raise InvalidValueError(
                    "flashcomm2_otp",
                    _ranks(self.flashcomm2_otp),
                    "needs {flashcomm2_odp} to be 2 or more too",
                    flashcomm2_odp=0,
                )
            return
        odp, k = self.flashcomm2_odp.world_size, self.flashcomm2_size
        if self.otp is not None:
            raise InvalidValueError(
                "flashcomm2_odp",
                odp,
                "cannot be used with {otp}: both cut o_proj; leave one of them out",
                otp=_ranks(self.otp),
            )
        if odp < 2 or odp * k != tp:
            raise InvalidValueError(
                "flashcomm2_odp",
                odp,
                "must be 2 or more, and its product with {flashcomm2_otp} must be {tp}",
                flashcomm2_otp=k,
                tp=tp,
            )
        if set(self.layer_sharding) - {"o_proj"}:
            raise InvalidValueError(
                "layer_sharding", self.layer_sharding, "must be ('o_proj',) or empty with FlashComm2"
            )

    @property
    def flashcomm2_size(self) -> int:
        """The number k of shards of o_proj under FlashComm2; 0 where that is off."""
        if self.flashcomm2_odp is None:
            return 0
        return 1 if self.flashcomm2_otp is None else self.flashcomm2_otp.world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class StepState:
    """What one forward step tells the ops. It must be the same on all ranks of the TP group.

    Args:
        flashcomm1: tokens are split over TP between the layers in this step.
        pad_size: rows of padding that make this step's token count a multiple of TP; 0 unless `flashcomm1`.
        dp_tokens: tokens of every DP rank in this step, where known. Ops that need equal counts check them.
        prefill: some request of this step has more than one new token. The kernel that fuses a product and an all-reduce is for such steps alone.

    Raises:
        ValueError: padding that is negative, or given without `flashcomm1`.
    """

    flashcomm1: bool = False
    pad_size: int = 0
    dp_tokens: tuple[int, ...] | None = None
    prefill: bool = False

    def __post_init__(self) -> None:
        """Check the padding."""
        if self.pad_size < 0:
            raise ValueError(f"pad_size={self.pad_size}: must be at least 0")
        if self.pad_size and not self.flashcomm1:
            raise ValueError(f"pad_size={self.pad_size}: must be 0 where flashcomm1 is False")


def plan_step(
    tokens: int,
    env: LinearEnv,
    *,
    threshold: int = FLASHCOMM1_DENSE_THRESHOLD,
    dp_tokens: tuple[int, ...] | None = None,
    prefill: bool = False,
) -> StepState:
    """The state of a step of `tokens` tokens.

    FlashComm1 runs where `env` enables it: always for a MoE model, for a dense one above `threshold` tokens. The padded
    length is `tokens` rounded up to a multiple of TP. With `dp_tokens` the largest of those stands for `tokens`, so
    that all DP ranks agree.

    Args:
        tokens: tokens of this rank's TP group.
        env: groups and options.
        threshold: tokens up to which a dense model stays without.
        dp_tokens: tokens of every DP rank; its entry `env.dp_rank` must be `tokens`.
        prefill: some request of the step has more than one new token.

    Raises:
        ValueError: a negative count, or `dp_tokens` that does not fit.
    """
    if tokens < 0:
        raise ValueError(f"tokens={tokens}: must be at least 0")
    if threshold < 0:
        raise ValueError(f"threshold={threshold}: must be at least 0")
    if dp_tokens is not None and (env.dp_rank >= len(dp_tokens) or dp_tokens[env.dp_rank] != tokens):
        raise ValueError(f"dp_tokens={dp_tokens}: entry dp_rank={env.dp_rank} must be tokens={tokens}")
    longest = max(dp_tokens) if dp_tokens else tokens
    if not env.enable_flashcomm1 or (env.moe.routed_experts == 0 and longest <= threshold):
        return StepState(dp_tokens=dp_tokens, prefill=prefill)
    tp = env.tp.world_size
    return StepState(flashcomm1=True, pad_size=-(-longest // tp) * tp - tokens, dp_tokens=dp_tokens, prefill=prefill)
