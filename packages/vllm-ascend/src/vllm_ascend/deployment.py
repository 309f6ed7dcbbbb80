# SPDX-License-Identifier: Apache-2.0
"""What is to be served, and over which ranks: the facts that rules and placements ask for. No vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ascend_comm import Topology
from ascend_linear import MoeLayers

from vllm_ascend.moe_layers import ConfigReader, moe_layers, routed_experts, unknown_selectors

__all__ = ["Deployment", "Model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the rules need to know of a model.

    Args:
        moe: which layers are MoE layers; `moe.routed_experts` is 0 for a dense model.
        latent_attention: whether attention runs as multi-head latent attention (MLA).
        unknown_selectors: keys of its config that seem to choose MoE layers and are not known here, so that `moe` may be wrong.
        decoder_layers: how many decoder layers it has; 0 where unknown.
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
    unknown_selectors: tuple[str, ...] = ()
    decoder_layers: int = 0
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

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """The decoder layers that are MoE layers, ascending; empty where that is not known."""
        return tuple(sorted(self.moe.layers))

    @classmethod
    def of(cls, text_config: object, **known: Any) -> Model:
        """Read a Hugging Face config of a language model, or a mapping of its keys.

        Args:
            text_config: the config; of a model of several parts that of the language model.
            known: arguments of this class that are known otherwise.
        """

        config = ConfigReader(text_config)
        get, number = config.get, config.number
        heads = number("num_attention_heads")
        head = number("v_head_dim", "head_dim") or (number("hidden_size") // heads if heads else 0)
        if isinstance(get("v_head_dim", "head_dim"), list):  # of each layer
            head = 0
        read = {
            "moe": MoeLayers(routed_experts=routed_experts(config), layers=frozenset(moe_layers(config))),
            "unknown_selectors": unknown_selectors(config),
            "decoder_layers": number("num_hidden_layers"),
            "experts_per_token": number("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"),
            "hidden": number("hidden_size"),
            "shared_experts": bool(get("n_shared_experts", "shared_expert_intermediate_size", default=0)),
            "tied_embeddings": bool(get("tie_word_embeddings", default=False)),
            "vocabulary": number("vocab_size"),
            "dense_width": number("intermediate_size"),
            "attention_width": heads * head,
        }
        return cls(**{**read, **known})


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
            microbatches=parallel.use_ubatching,
            prompt_embeddings=model.enable_prompt_embeds,
            round_robin_experts=parallel.expert_placement_strategy == "round_robin",
        )
