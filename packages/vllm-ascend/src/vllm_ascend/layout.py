# SPDX-License-Identifier: Apache-2.0
"""From options, parallel sizes and the model to groups and a `LinearEnv`, with every rule between them. No process state, no vLLM.

`check` runs before worker processes start; `planned_env` shows what any rank will use, without one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, cast

from ascend_comm import CommGroup, GroupConfig, Topology, group_of
from ascend_linear import LayerShard, LinearEnv, MoeLayers

from vllm_ascend.config import AscendConfig
from vllm_ascend.eplb import placement

__all__ = ["Deployment", "Model", "check", "group_config", "linear_env", "planned_env"]

# What the libraries' messages call a thing -> what the user calls it.
_IN_USERS_WORDS = {
    "otp": "finegrained_tp_config.oproj_tensor_parallel_size",
    "lmhead_tp": "finegrained_tp_config.lmhead_tensor_parallel_size",
    "embed_tp": "finegrained_tp_config.embedding_tensor_parallel_size",
    "mlp_tp": "finegrained_tp_config.mlp_tensor_parallel_size",
    "flashcomm2": "flashcomm2_parallel_size",
    "flashcomm2_odp": "flashcomm2_parallel_size",
    "tensor_parallel": "tensor_parallel_size",
    "tp": "tensor_parallel_size",
    "data_parallel": "data_parallel_size",
    "pipeline_parallel": "pipeline_parallel_size",
}
_VOCABULARY_PADDING = 64  # vLLM pads the vocabulary to a multiple of it
_MATMUL_REDUCE_SCATTER_RANKS = (2, 4, 8)  # of the fused kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the rules need to know of a model.

    Args:
        moe: which layers are MoE layers; `moe.routed_experts` is 0 for a dense model.
        latent_attention: whether attention runs as multi-head latent attention (MLA).
        moe_layer_ids: the decoder layers that are MoE layers, ascending.
        experts_per_token: routed experts that a token passes; 0 where unknown.
        shared_experts: whether its MoE layers have shared experts.
        multimodal: whether it embeds more than tokens.
        tied_embeddings: whether the LM head is the token embedding.
        vocabulary: tokens, without padding.
        dense_width: neurons of a dense MLP; 0 where unknown.
        attention_width: features that o_proj takes; 0 where unknown.
        hidden: features of a token between layers; 0 where unknown.
        half_precision: whether it computes in float16 or bfloat16.
    """

    moe: MoeLayers = field(default_factory=MoeLayers)
    moe_layer_ids: tuple[int, ...] = ()
    experts_per_token: int = 0
    latent_attention: bool = False
    shared_experts: bool = False
    multimodal: bool = False
    tied_embeddings: bool = False
    vocabulary: int = 0
    dense_width: int = 0
    attention_width: int = 0
    hidden: int = 0
    half_precision: bool = True

    @classmethod
    def of(cls, text_config: object, **known: Any) -> Model:
        """Read a Hugging Face config of a language model, or a mapping of its keys.

        Args:
            text_config: the config; of a model of several parts that of the language model.
            known: arguments of this class that are known otherwise.
        """

        def get(*names: str, default: Any = None) -> Any:
            for name in names:
                value = text_config.get(name) if isinstance(text_config, Mapping) else getattr(text_config, name, None)
                if value is not None:
                    return value
            return default

        def number(*names: str) -> int:
            """0 where there is none, or one for each layer."""
            value = get(*names, default=0)
            return value if isinstance(value, int) else 0

        experts = get("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts", default=0)
        experts = max(experts, default=0) if isinstance(experts, (list, tuple)) else experts
        layers = number("num_hidden_layers") if experts else 0
        every, first = get("moe_layer_freq", default=1), get("first_k_dense_replace")
        regular = isinstance(every, int) and every > 0 and isinstance(first, int)  # some list every layer instead
        heads = number("num_attention_heads")
        head = number("v_head_dim", "head_dim") or (number("hidden_size") // heads if heads else 0)
        read = {
            "moe": MoeLayers(
                routed_experts=experts,
                first_k_dense_replace=first if regular else None,
                moe_layer_freq=every if regular else 1,
            ),
            "moe_layer_ids": tuple(layer for layer in range(layers) if _has_experts(layer, get)),
            "experts_per_token": number("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"),
            "hidden": number("hidden_size"),
            "shared_experts": bool(get("n_shared_experts", "shared_expert_intermediate_size", default=0)),
            "tied_embeddings": bool(get("tie_word_embeddings", default=False)),
            "vocabulary": number("vocab_size"),
            "dense_width": number("intermediate_size"),
            "attention_width": heads * head,
        }
        return cls(**{**read, **known})


def _has_experts(layer: int, get: Callable[..., Any]) -> bool:
    """Whether a decoder layer of a MoE model is one with experts; `get` reads its config.

    Each family has words of its own: DeepSeek and GLM, Step3 and Llama 4 (a list), Qwen, Ernie.
    """
    every = get("moe_layer_freq", default=1)
    if isinstance(every, (list, tuple)):
        return layer < len(every) and bool(every[layer])
    listed = get("moe_layers_enum", "moe_layers")
    if isinstance(listed, (str, list, tuple)):
        return layer in [int(one) for one in (listed.split(",") if isinstance(listed, str) else listed)]
    if layer in get("mlp_only_layers", default=()) or (layer + 1) % get(
        "decoder_sparse_step", "moe_layer_interval", default=1
    ):
        return False
    if not get("moe_layer_start_index", default=0) <= layer <= get("moe_layer_end_index", default=layer):
        return False
    return bool(layer >= get("first_k_dense_replace", default=0) and layer % every == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A model over ranks.

    Args:
        topology: the parallel sizes. The ranks of a dense model's data parallel replicas are worlds of their own in vLLM: 1 there.
        data_parallel_asked: what the user gave as data_parallel_size.
        model: the model.
        expert_parallel: whether `enable_expert_parallel` is on.
        kv_role: "producer" (prefill only), "consumer" (decode only) or "both".
        speculative: whether a draft is decoded speculatively.
        adapters: whether LoRA is on.
        microbatches: whether steps are cut into overlapping microbatches (DBO).
        prompt_embeddings: whether requests may carry embeddings instead of tokens.
        round_robin_experts: whether vLLM's `expert_placement_strategy` is "round_robin".
    """

    topology: Topology
    data_parallel_asked: int = 1
    model: Model = field(default_factory=Model)
    expert_parallel: bool = False
    kv_role: str = "both"
    speculative: bool = False
    adapters: bool = False
    microbatches: bool = False
    prompt_embeddings: bool = False
    round_robin_experts: bool = False

    @property
    def expert_ranks(self) -> int:
        """Ranks that share the experts of a layer: 1 without expert parallelism, where each has a shard of every expert."""
        top = self.topology
        return top.data_parallel * top.prefill_context_parallel * top.tensor_parallel if self.expert_parallel else 1

    @classmethod
    def of(cls, vllm_config: Any) -> Deployment:
        """From vLLM's `VllmConfig`, whose `model_config` is there."""
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        facts = Model.of(
            model.hf_text_config,
            latent_attention=bool(model.use_mla),
            multimodal=bool(model.is_multimodal_model),
            tied_embeddings=bool(getattr(model.hf_config, "tie_word_embeddings", False)),
            half_precision=str(model.dtype) in ("torch.float16", "torch.bfloat16"),
            experts_per_token=model.get_num_experts_per_tok() or 0,
        )
        asked = parallel.data_parallel_size
        replicas = asked if facts.moe.routed_experts else 1
        sizes = (replicas, parallel.pipeline_parallel_size, parallel.prefill_context_parallel_size, parallel.tensor_parallel_size)  # fmt: skip
        transfer = vllm_config.kv_transfer_config
        role = (transfer.kv_role if transfer is not None else None) or "kv_both"
        return cls(
            topology=Topology(sizes[0] * sizes[1] * sizes[2] * sizes[3], *sizes),
            data_parallel_asked=asked,
            model=facts,
            expert_parallel=parallel.enable_expert_parallel,
            kv_role=role.removeprefix("kv_"),
            speculative=vllm_config.speculative_config is not None,
            adapters=vllm_config.lora_config is not None,
            microbatches=parallel.use_ubatching,
            prompt_embeddings=model.enable_prompt_embeds,
            round_robin_experts=parallel.expert_placement_strategy == "round_robin",
        )


class _PlannedGroup:
    """The ranks of a group that has no communicator: enough to choose ops with, an error to communicate over."""

    device_group = cpu_group = None

    def __init__(self, ranks: list[int], rank: int) -> None:
        self.ranks = ranks
        self.world_size = len(ranks)
        self.rank_in_group = ranks.index(rank)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name}: this group of ranks {self.ranks} is only planned")


def check(config: AscendConfig, deployment: Deployment) -> None:
    """Check every rule between the options, the parallel sizes and the model.

    Raises:
        ValueError: the first rule that is broken, naming the option, its value and what is allowed.
    """
    for broken in _broken_rules(config, deployment):
        raise ValueError(broken)
    planned_env(config, deployment)
    placement.check(config.eplb_config, deployment)


def group_config(
    config: AscendConfig, deployment: Deployment, hccl_buffsize_mb: int = 200, *, mc2: bool = False
) -> GroupConfig:
    """The groups to build beside vLLM's own. ValueError, in the user's words, for sizes that do not fit."""
    fine = config.finegrained_tp_config
    with _UsersWords():
        return GroupConfig(
            topology=deployment.topology,
            mc2=mc2,
            otp=fine.oproj_tensor_parallel_size,
            lmhead_tp=fine.lmhead_tensor_parallel_size,
            embed_tp=fine.embedding_tensor_parallel_size,
            mlp_tp=fine.mlp_tensor_parallel_size,
            flashcomm2=config.flashcomm2_parallel_size,
            layer_sharding=config.layer_sharding,
            kv_role=deployment.kv_role,
            hccl_buffsize_mb=hccl_buffsize_mb,
        )


def linear_env(
    config: AscendConfig,
    deployment: Deployment,
    *,
    tp: CommGroup,
    groups: Mapping[str, CommGroup],
    dp_rank: int,
) -> LinearEnv:
    """What the linear ops of one rank are told. ValueError, in the user's words, for options that do not fit."""
    ranks, model = deployment.topology.tensor_parallel, deployment.model
    fused = model.half_precision and not model.moe.routed_experts and ranks in _MATMUL_REDUCE_SCATTER_RANKS
    streams_o_proj = config.flashcomm2_parallel_size > 0 and "o_proj" in config.layer_sharding
    with _UsersWords():
        return LinearEnv(
            tp=tp,
            mlp_tp=groups.get("mlp_tp"),
            otp=groups.get("otp"),
            flashcomm2_odp=groups.get("flashcomm2_odp"),
            flashcomm2_otp=groups.get("flashcomm2_otp"),
            dp_rank=dp_rank,
            enable_flashcomm1=config.enable_flashcomm1,
            enable_matmul_allreduce=config.enable_matmul_allreduce,
            enable_matmul_reduce_scatter=config.enable_flashcomm1 and fused,
            enable_shared_expert_dp=config.enable_shared_expert_dp,
            layer_sharding=config.layer_sharding,
            o_shard=LayerShard(groups["shard_weight"]) if streams_o_proj else None,
            moe=model.moe,
        )


def planned_env(config: AscendConfig, deployment: Deployment, rank: int = 0) -> LinearEnv:
    """`linear_env` as global `rank` will have it, over groups that cannot communicate. ValueError as there."""
    top = deployment.topology

    def planned(groups: list[list[int]]) -> CommGroup:
        return cast(CommGroup, _PlannedGroup(group_of(groups, rank), rank))

    groups = {name: planned(found) for name, found in group_config(config, deployment).families().items()}
    tp = planned(top.tensor_parallel_groups())
    return linear_env(config, deployment, tp=tp, groups=groups, dp_rank=top.coordinates(rank).data)


class _UsersWords:
    """Context in which a library's ValueError names options as the user does."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError):
            said = re.sub(
                r"[a-z0-9_]+(?=\W)", lambda word: _IN_USERS_WORDS.get(word.group(), word.group()), f"{error} "
            )
            raise ValueError(said.strip()) from None


def _broken_rules(config: AscendConfig, deployment: Deployment) -> Iterator[str]:
    yield from _broken_flashcomm_rules(config, deployment)
    yield from _broken_finegrained_rules(config, deployment)
    model, names = deployment.model, list(config.layer_sharding)
    if config.enable_shared_expert_dp and not (model.moe.routed_experts and model.shared_experts):
        yield "option 'enable_shared_expert_dp' (True) needs a MoE model with shared experts"
    if names and not config.flashcomm2_parallel_size:
        yield f"option 'layer_sharding' ({names}) needs flashcomm2_parallel_size > 0, and must be ['o_proj'] then"
    idle = AscendConfig(flashcomm1_dense_threshold=config.flashcomm1_dense_threshold)
    if not config.weight_prefetch_config.enabled:  # its ratios ask for nothing then
        idle = replace(idle, weight_prefetch_config=config.weight_prefetch_config)
    changes_layers = replace(config, eplb_config=idle.eplb_config) != idle
    if deployment.microbatches and model.moe.routed_experts:
        yield "microbatches (enable_dbo) cannot be used with a MoE model; leave enable_dbo out"
    for wanted, what in ((deployment.adapters, "LoRA"), (deployment.microbatches, "microbatches (enable_dbo)")):
        if wanted and changes_layers:
            yield f"{what} cannot be used with this plugin's options for linear layers; leave one of the two out"


def _broken_flashcomm_rules(config: AscendConfig, deployment: Deployment) -> Iterator[str]:
    if not config.enable_flashcomm1:
        return
    top, model = deployment.topology, deployment.model
    if top.tensor_parallel == 1:
        yield "option 'enable_flashcomm1' (True) needs tensor_parallel_size > 1, got 1"
    if model.moe.routed_experts and not deployment.expert_parallel:
        yield "option 'enable_flashcomm1' (True) of a MoE model needs enable_expert_parallel"
    if model.moe.routed_experts and top.data_parallel > 1:
        yield f"option 'enable_flashcomm1' (True) of a MoE model needs data_parallel_size 1, got {top.data_parallel}"
    if model.multimodal:  # features that a model adds between its layers (deepstack) are of all tokens
        yield "option 'enable_flashcomm1' (True) cannot be used with a multimodal model"
    if model.latent_attention:
        yield "option 'enable_flashcomm1' (True) cannot be used with multi-head latent attention"
    if deployment.speculative:
        yield "option 'enable_flashcomm1' (True) cannot be used with speculative decoding"


def _broken_finegrained_rules(config: AscendConfig, deployment: Deployment) -> Iterator[str]:
    fine, model, top = config.finegrained_tp_config, deployment.model, deployment.topology
    vocabulary = -(-model.vocabulary // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
    sizes = {
        "lmhead": (fine.lmhead_tensor_parallel_size, "the padded vocabulary", vocabulary),
        "oproj": (fine.oproj_tensor_parallel_size, "the features of o_proj", model.attention_width),
        "embedding": (fine.embedding_tensor_parallel_size, "the padded vocabulary", vocabulary),
        "mlp": (fine.mlp_tensor_parallel_size, "intermediate_size", model.dense_width),
    }
    for name, (size, what, width) in sizes.items():
        option = f"option 'finegrained_tp_config.{name}_tensor_parallel_size' ({size})"
        if size > 1 and deployment.data_parallel_asked > top.data_parallel:
            yield f"{option} needs a MoE model: vLLM runs the data parallel ranks of a dense one apart; it must be 0 or 1"
        elif size and width % size:
            yield f"{option} must divide {what} of the model, {width}"
    lmhead, embedding = sizes["lmhead"][0], sizes["embedding"][0]
    if model.tied_embeddings and lmhead != embedding:
        yield (
            f"options 'finegrained_tp_config.lmhead_tensor_parallel_size' ({lmhead}) and '...embedding_tensor_parallel_size' "
            f"({embedding}) must be equal, for the model's LM head is its embedding (tie_word_embeddings)"
        )
    if lmhead and deployment.speculative:
        yield f"option 'finegrained_tp_config.lmhead_tensor_parallel_size' ({lmhead}) cannot be used with speculative decoding"
    if embedding and (model.multimodal or deployment.prompt_embeddings):
        yield (
            f"option 'finegrained_tp_config.embedding_tensor_parallel_size' ({embedding}) needs a model that is given tokens alone: "
            "not a multimodal one, and not with enable_prompt_embeds"
        )
