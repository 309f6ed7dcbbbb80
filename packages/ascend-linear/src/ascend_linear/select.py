# SPDX-License-Identifier: Apache-2.0
"""Which layer gets which op: two tables of rules, read from the top, the first that fits wins.

Layers are told apart by whole components of their path (``model.layers.0.self_attn.o_proj``), never by substrings. No
rule touches a vision or audio tower: what lies in between there adds tensors of all tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ascend_linear.flashcomm2 import Flashcomm2OProjRowParallelOp, Flashcomm2OshardQKVParallelOp
from ascend_linear.matmul_allreduce import MatmulAllreduceRowParallelOp
from ascend_linear.mlp import MLPColumnParallelOp, MLPRowParallelOp
from ascend_linear.op import CustomLinearOp, CustomReplicatedOp
from ascend_linear.oproj import OProjRowParallelOp
from ascend_linear.sequence import SequenceColumnParallelOp, SequenceRowParallelOp
from ascend_linear.sharded_cp import ShardedCPColumnParallelOp, ShardedCPRowParallelOp
from ascend_linear.state import LinearEnv, MoeLayers, layer_index

__all__ = [
    "COLUMN_RULES",
    "ROW_RULES",
    "Rule",
    "Selected",
    "get_parallel_op",
    "get_replicated_op",
    "in_tower",
    "is_moe_layer",
]


class Selected(NamedTuple):
    """What a layer gets: its op, or None for its own forward over TP; shard `tp_rank` of `tp_size` of its weight."""

    op: CustomLinearOp | None
    tp_rank: int
    tp_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row of a table.

    Args:
        option: what turns it on, in words.
        active: whether it is on.
        layers: last path components that it is for, dotted where there are several; empty: all.
        op: what those layers get: a class, called with ``(env, prefix=...)``.
        moe_layers: whether it holds for MoE layers too.
        shared_experts: whether it holds for shared experts too.
    """

    option: str
    active: Callable[[LinearEnv], bool]
    layers: tuple[str, ...]
    op: Callable[..., CustomLinearOp]
    moe_layers: bool = True
    shared_experts: bool = True

    def matches(self, env: LinearEnv, prefix: str) -> bool:
        """Whether the layer at `prefix` falls under this rule."""
        return (
            self.active(env)
            and (not self.layers or any(_ends_with(prefix, layer) for layer in self.layers))
            and (self.moe_layers or not is_moe_layer(prefix, env.moe))
            and (self.shared_experts or not _in_shared_expert(prefix))
        )


_TOWERS = ("audio", "image", "sam", "sound", "speech", "vision", "visual", "vit", "vpm", "whisper")
_CONNECTORS = ("aligner", "connector", "merger", "projection", "projector", "projectors", "qformer", "resampler")
# Whole components of names that say nothing of what they are (InternVL and Eagle, Keye, Bailing, Phi-4 multimodal, DeepSeek OCR 2).
_UNTOLD = ("mlp1", "mlp_AR", "linear_proj", "embed_tokens_extend", "qwen2_model")
_FIRST_UNTOLD = ("encoder",)  # of Granite speech; language models have theirs deeper
_QKV = ("qkv_proj", "conv1d", "query_key_value")


COLUMN_RULES = (
    Rule(
        option="enable_dsa_cp",
        active=lambda env: env.enable_dsa_cp,
        layers=("q_b_proj", "kv_b_proj"),
        op=ShardedCPColumnParallelOp,
    ),
    Rule(
        option="mlp_tp",
        active=lambda env: env.mlp_tp is not None,
        layers=("gate_up_proj",),
        op=MLPColumnParallelOp,
        moe_layers=False,
        shared_experts=False,
    ),
    Rule(
        option="FlashComm2 (flashcomm2_odp) with layer_sharding=('o_proj',)",
        active=lambda env: env.flashcomm2_size > 0 and "o_proj" in env.layer_sharding,
        layers=_QKV,
        op=Flashcomm2OshardQKVParallelOp,
    ),
    Rule(
        option="enable_flashcomm1",
        active=lambda env: env.enable_flashcomm1,
        layers=("gate_up_proj", "in_proj", *_QKV),
        op=SequenceColumnParallelOp,
        shared_experts=False,
    ),
)

ROW_RULES = (
    Rule(
        option="enable_dsa_cp with layer_sharding",
        active=lambda env: env.enable_dsa_cp and bool(env.layer_sharding),
        layers=("o_proj",),
        op=ShardedCPRowParallelOp,
    ),
    Rule(
        option="mlp_tp",
        active=lambda env: env.mlp_tp is not None,
        layers=("down_proj",),
        op=MLPRowParallelOp,
        moe_layers=False,
        shared_experts=False,
    ),
    Rule(option="otp", active=lambda env: env.otp is not None, layers=("o_proj",), op=OProjRowParallelOp),
    Rule(
        option="enable_matmul_allreduce",
        active=lambda env: env.enable_matmul_allreduce,
        layers=(),
        op=MatmulAllreduceRowParallelOp,
    ),
    Rule(
        option="FlashComm2 (flashcomm2_odp)",
        active=lambda env: env.flashcomm2_size > 0,
        layers=("o_proj", "out_proj"),
        op=Flashcomm2OProjRowParallelOp,
    ),
    Rule(
        option="enable_flashcomm1",
        active=lambda env: env.enable_flashcomm1,
        layers=("o_proj", "out_proj", "down_proj", "attention.dense"),
        op=SequenceRowParallelOp,
        shared_experts=False,
    ),
)


def get_parallel_op(
    direction: Literal["column", "row"],
    prefix: str,
    env: LinearEnv,
    *,
    disable_tp: bool = False,
    rules: Sequence[Rule] | None = None,
) -> Selected:
    """The op of a column or row parallel layer.

    Args:
        direction: "column" (output features are cut) or "row" (input features are).
        prefix: the layer's path in the model, dotted.
        env: groups and options.
        disable_tp: the layer asks for its whole weight on every rank.
        rules: read instead of `COLUMN_RULES` or `ROW_RULES`.

    Returns:
        `Selected`. Where no rule fits, the op is None and the shard that of the TP group; with `disable_tp`, or for a
        shared expert under `enable_shared_expert_dp`, the op is None and the weight whole (rank 0 of 1).

    Raises:
        ValueError: another direction, or a group that the op needs and `env` lacks.
    """
    if direction not in ("column", "row"):
        raise ValueError(f"direction={direction!r}: must be 'column' or 'row'")
    if disable_tp or (env.enable_shared_expert_dp and _in_shared_expert(prefix)):
        return Selected(None, 0, 1)
    if not in_tower(prefix):
        for rule in (COLUMN_RULES if direction == "column" else ROW_RULES) if rules is None else rules:
            if rule.matches(env, prefix):
                op = rule.op(env, prefix=prefix)
                return Selected(op, op.tp_rank, op.tp_size)
    return Selected(None, env.tp.rank_in_group, env.tp.world_size)


def get_replicated_op(prefix: str, env: LinearEnv, *, disable_tp: bool = False) -> CustomReplicatedOp | None:
    """The op of a replicated layer; None with `disable_tp`."""
    return None if disable_tp else CustomReplicatedOp(env, prefix=prefix)


def is_moe_layer(prefix: str, moe: MoeLayers) -> bool:
    """Whether the layer at `prefix` is in a MoE layer of the model, by n of its components ``layers.<n>``; False where there are none."""
    return moe.routed_experts > 0 and layer_index(prefix) in moe.layers


def _ends_with(prefix: str, layer: str) -> bool:
    """Whether the last components of `prefix` are those of `layer`."""
    return prefix == layer or prefix.endswith(f".{layer}")


def _in_shared_expert(prefix: str) -> bool:
    return not {"shared_expert", "shared_experts"}.isdisjoint(prefix.split("."))


def in_tower(prefix: str) -> bool:
    """Whether the layer at `prefix` is in a vision or audio tower of one of vLLM's models, or in what joins that to the language model."""
    components = prefix.split(".")
    words = {word for component in components for word in component.split("_")}
    return (
        not words.isdisjoint(_TOWERS + _CONNECTORS)
        or not set(components).isdisjoint(_UNTOLD)
        or components[0] in _FIRST_UNTOLD
    )
