# SPDX-License-Identifier: Apache-2.0
"""What each linear layer of a model will do under given options: op, group, bytes of weight and of communication. Starts nothing.

Bytes of communication are what one rank sends; `ascend_linear.cost` says how they are counted, and each op what it costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

from ascend_comm import Solo, Topology, group_of
from ascend_linear import (
    Cost,
    CustomColumnParallelOp,
    CustomLinearOp,
    CustomRowParallelOp,
    LayerSize,
    LinearEnv,
    get_replicated_op,
    layer_index,
    plan_step,
)
from ascend_linear.select import Rule

from vllm_ascend.attention import limits
from vllm_ascend.config import AscendConfig
from vllm_ascend.deployment import Deployment, Model
from vllm_ascend.findings import refuse
from vllm_ascend.layers.select import select
from vllm_ascend.models import Config, Linear, layers_of, padded_vocabulary, stage_layers
from vllm_ascend.rules import check, group_config, planned_env

__all__ = ["BYTES", "Explained", "explain", "merged"]

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
Rules = Mapping[str, Sequence[Rule]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """One layer on one rank.

    Args:
        path: its path in the model.
        op: class of the op; "" where the layer's forward is vLLM's own.
        ranks: global ranks that share its weight.
        weight_bytes: of weight and bias on this rank; under layer sharding the mean over the ranks, without the buffers.
        bytes_per_token: what this rank sends for each token of its TP group; of the LM head, for each row that is sampled.
        bytes_per_step: what it sends in every step whatever the tokens, on average over ranks (streamed weights).
        launches: products and collectives that a forward launches.
    """

    path: str
    op: str
    ranks: tuple[int, ...]
    weight_bytes: int
    bytes_per_token: float
    bytes_per_step: float = 0.0
    launches: int = 1

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def explain(
    config: Config,
    options: AscendConfig,
    topology: Topology,
    *,
    expert_parallel: bool = False,
    rank: int = 0,
    tokens: int = 4096,
    dtype: str = "bfloat16",
    rules: Rules = MappingProxyType({}),
) -> list[Explained]:
    """Every linear layer of the pipeline stage of `rank`, with the embedding before and the LM head after them, where they are on it.

    Args:
        config: the model's Hugging Face config.
        options: this plugin's.
        topology: the parallel sizes as the user gives them.
        expert_parallel: whether experts are spread over ranks.
        rank: global rank.
        tokens: tokens of a step, which decide whether FlashComm1 takes part.
        dtype: of weights and activations, a key of `BYTES`. Weights that a checkpoint has quantised are counted in it too.
        rules: the tables by which "column" and "row" layers get their ops; ascend-linear's own where there is none.

    Raises:
        ValueError: options that do not fit, a rank or type that does not exist, an unknown architecture.
    """
    if dtype not in BYTES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(BYTES)}")
    body = layers_of(config)
    stages = topology.pipeline_parallel
    if stages > config["num_hidden_layers"]:
        raise ValueError(
            f"pipeline_parallel_size ({stages}) must be at most the model's {config['num_hidden_layers']} layers"
        )
    heads, ranks = config["num_attention_heads"], topology.tensor_parallel
    latent = config.get("kv_lora_rank") is not None
    kv_heads = 0 if latent else config.get("num_key_value_heads") or heads
    refuse(limits.broken(limits.Attention(heads=heads, kv_heads=kv_heads, ranks=ranks)))
    model = Model.of(config, latent_attention=latent, half_precision=dtype != "float32")
    asked = topology.data_parallel
    if not model.moe.routed_experts and asked > 1:  # each replica is a world of its own
        topology = Topology(topology.world_size // asked, 1, *_inner_sizes(topology))
    topology.coordinates(rank)
    deployment = Deployment(topology=topology, data_parallel_asked=asked, model=model, expert_parallel=expert_parallel)
    check(options, deployment)
    env = planned_env(options, deployment, rank)
    step = plan_step(tokens, env, threshold=options.flashcomm1_dense_threshold)
    costs = _Costs(env, step.flashcomm1, BYTES[dtype])
    stage = topology.coordinates(rank).pipeline
    here = stage_layers(config["num_hidden_layers"], stages, stage)
    explained = [_explained(linear, env, costs, rules) for linear in body if layer_index(linear.path) in here]
    groups = {name: group_of(found, rank) for name, found in group_config(options, deployment).families().items()}
    ends = _Ends(config, env, groups, costs, stages)
    return [*([ends.embedding()] if stage == 0 else []), *explained, *([ends.lm_head()] if stage == stages - 1 else [])]


def merged(rows: Iterable[Explained]) -> list[tuple[Explained, int]]:
    """Layers that differ only in their index as one row with ``*`` in its place, and how many there are."""
    found: dict[Explained, int] = {}
    for row in rows:
        index = layer_index(row.path)
        path = row.path if index is None else row.path.replace(f"layers.{index}.", "layers.*.", 1)
        key = replace(row, path=path)
        found[key] = found.get(key, 0) + 1
    return list(found.items())


def _inner_sizes(topology: Topology) -> tuple[int, int, int]:
    return topology.pipeline_parallel, topology.prefill_context_parallel, topology.tensor_parallel


def _explained(linear: Linear, env: LinearEnv, costs: _Costs, rules: Rules) -> Explained:
    op: CustomLinearOp | None
    if linear.kind == "replicated":
        op, cut = get_replicated_op(linear.path, env), 1
    else:
        op, _, cut = select(linear.kind, linear.path, env, rules=rules.get(linear.kind))
    plain = _plain(linear, env, cut)
    cost = costs.of(linear, op or plain)
    weight = costs.weight(linear, cut)
    return Explained(
        path=linear.path,
        op="" if op is None else type(op).__name__,
        ranks=tuple((op or plain).group.ranks),
        weight_bytes=weight // cost.weight_ranks,
        bytes_per_token=cost.bytes_per_token,
        bytes_per_step=weight / cost.weight_ranks if cost.weight_ranks > 1 else 0.0,
        launches=cost.launches,
    )


def _plain(linear: Linear, env: LinearEnv, cut: int) -> CustomLinearOp:
    """The op that does what a layer without one does: tensor parallelism, or nothing where its weight is whole."""
    kind = CustomRowParallelOp if linear.kind == "row" else CustomColumnParallelOp
    return kind(env, group=env.tp if cut > 1 else Solo(env.tp.ranks[env.tp.rank_in_group]), prefix=linear.path)


class _Costs:
    """Bytes of layers under one environment. `size` is that of an element."""

    def __init__(self, env: LinearEnv, flashcomm1: bool, size: int) -> None:
        self.env = env
        self.flashcomm1 = flashcomm1
        self.size = size

    def weight(self, linear: Linear, cut: int) -> int:
        """Bytes of weight and bias on a rank that holds one of `cut` shards; key and value heads are repeated where they are too few."""
        pairs, pair = linear.heads
        if linear.kind == "row":
            return (linear.outputs * linear.inputs // cut + linear.bias * linear.outputs) * self.size
        outputs = linear.outputs // cut + max(1, pairs // cut) * pair
        return outputs * (linear.inputs + linear.bias) * self.size

    def of(self, linear: Linear, op: CustomLinearOp) -> Cost:
        """What a forward of the layer costs under `op`."""
        size = LayerSize(
            inputs=linear.inputs, outputs=linear.outputs, element_bytes=self.size, reduced_later=linear.reduced_later
        )
        return op.cost(size, flashcomm1=self.flashcomm1)


class _Ends:
    """The embedding and the LM head."""

    def __init__(
        self, config: Config, env: LinearEnv, groups: dict[str, list[int]], costs: _Costs, stages: int
    ) -> None:
        self.env, self.groups, self.costs = env, groups, costs
        self.hidden = config["hidden_size"] * costs.size
        self.vocabulary = padded_vocabulary(config["vocab_size"])
        self.tied = bool(config.get("tie_word_embeddings")) and stages == 1  # a last stage has a copy of its own

    def embedding(self) -> Explained:
        tp = self.env.tp.world_size
        if shared := self.groups.get("embed_tp"):
            k = len(shared)
            ids = 4 * (k - 1)  # int32
            return self._row("model.embed_tokens", "embedding-TP", shared, ids + self.hidden * (k - 1))
        sent = self.hidden * (tp - 1) / tp
        return self._row("model.embed_tokens", "", self.env.tp.ranks, sent if self.costs.flashcomm1 else 2 * sent)

    def lm_head(self) -> Explained:
        logits, tp = self.vocabulary * self.costs.size, self.env.tp.world_size
        if shared := self.groups.get("lmhead_tp"):
            k = len(shared)
            row = self._row("lm_head", "lmhead-TP", shared, self.hidden * (k - 1) + logits * (k - 1) / k)
        else:
            row = self._row("lm_head", "", self.env.tp.ranks, logits / tp * (tp - 1))
        return replace(row, weight_bytes=0) if self.tied else row

    def _row(self, path: str, op: str, ranks: list[int], sent: float) -> Explained:
        weight = self.vocabulary // len(ranks) * self.hidden
        return Explained(path=path, op=op, ranks=tuple(ranks), weight_bytes=weight, bytes_per_token=sent)
