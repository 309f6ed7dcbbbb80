# SPDX-License-Identifier: Apache-2.0
"""From options, parallel sizes and the model to groups and a `LinearEnv`, with every rule between them. No process state, no vLLM.

`check` runs before worker processes start; `planned_env` shows what any rank will use, without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, NoReturn, cast

from ascend_comm import CommGroup, GroupConfig, InvalidValueError, group_of
from ascend_linear import LayerShard, LinearEnv

from vllm_ascend.config import AscendConfig
from vllm_ascend.deployment import Deployment
from vllm_ascend.eplb import placement
from vllm_ascend.findings import refuse
from vllm_ascend.models import padded_vocabulary

__all__ = ["broken", "broken_on", "check", "group_config", "linear_env", "planned_env"]

# Fields of the libraries' configs -> the options that they come from.
_OPTIONS = {
    "otp": "finegrained_tp_config.oproj_tensor_parallel_size",
    "lmhead_tp": "finegrained_tp_config.lmhead_tensor_parallel_size",
    "embed_tp": "finegrained_tp_config.embedding_tensor_parallel_size",
    "mlp_tp": "finegrained_tp_config.mlp_tensor_parallel_size",
    "flashcomm2": "flashcomm2_parallel_size",
    "flashcomm2_odp": "flashcomm2_parallel_size",
    "flashcomm2_otp": "flashcomm2_parallel_size",
    "o_shard": "layer_sharding",
    "weight_shards": "layer_sharding",
    "tp": "tensor_parallel_size",
    "tensor_parallel": "tensor_parallel_size",
    "data_parallel": "data_parallel_size",
    "pipeline_parallel": "pipeline_parallel_size",
    "prefill_context_parallel": "prefill_context_parallel_size",
}
_MATMUL_REDUCE_SCATTER_RANKS = (2, 4, 8)  # of the fused kernel
_ATLAS_A3 = "Ascend910_93"  # how the names of its chips begin


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
        ValueError: all rules that are broken, each naming the option, its value and what is allowed.
    """
    refuse(broken(config, deployment))


def broken(config: AscendConfig, deployment: Deployment) -> Iterator[str]:
    """One finding for each rule that is broken."""
    yield from _broken_rules(config, deployment)
    yield from _broken_in_libraries(_without_refused(config, deployment), deployment)
    yield from placement.broken(config.eplb_config, deployment)


def broken_on(config: AscendConfig, chip: str) -> Iterator[str]:
    """Findings for options whose kernels do not run on this host's chip, by its name, such as "Ascend910_9391"."""
    if config.enable_matmul_allreduce and chip.startswith(_ATLAS_A3):
        yield (
            f"option 'enable_matmul_allreduce' (True) needs an Atlas A2, on which its kernel (npu_mm_all_reduce_base) runs, and this host's chip is "
            f"{chip}, an Atlas A3; leave the option out"
        )


def _broken_in_libraries(config: AscendConfig, deployment: Deployment) -> Iterator[str]:
    """Findings for the rules of ascend-comm and ascend-linear, which raise the first: the option it names is left out, and they are asked again."""
    while True:
        try:
            planned_env(config, deployment)
        except InvalidValueError as error:
            yield error.phrased()
            changed = next(
                (left for name in (error.field, *error.others) if (left := _without(config, name)) != config), None
            )
            if changed is None:  # no option is at fault
                return
            config = changed
        else:
            return


def _without(config: Any, path: str) -> Any:
    """The config with the option at a dotted path as it is by default; the config itself where there is no such option."""
    name, _, rest = path.partition(".")
    if name not in {field.name for field in fields(config)}:
        return config
    return replace(config, **{name: _without(getattr(config, name), rest) if rest else getattr(type(config)(), name)})


def _without_refused(config: AscendConfig, deployment: Deployment) -> AscendConfig:
    """The config without what `_broken_rules` refuses and ascend-comm or ascend-linear would refuse again for the same reason."""
    ranks, fine = deployment.topology, config.finegrained_tp_config
    if ranks.tensor_parallel == 1:
        config = replace(config, enable_flashcomm1=False)
    if deployment.data_parallel_asked > ranks.data_parallel:
        refused = {field.name: 0 for field in fields(fine) if getattr(fine, field.name) > 1}
        config = replace(config, finegrained_tp_config=replace(fine, **refused))
    return config


def group_config(
    config: AscendConfig, deployment: Deployment, hccl_buffsize_mb: int = 200, *, mc2: bool = False
) -> GroupConfig:
    """The groups to build beside vLLM's own. InvalidValueError, which names options, for sizes that do not fit."""
    fine = config.finegrained_tp_config
    with _as_options():
        return GroupConfig(
            topology=deployment.topology,
            mc2=mc2,
            dynamic_eplb=config.eplb_config.dynamic_eplb,
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
    """What the linear ops of one rank are told. InvalidValueError, which names options, for options that do not fit."""
    ranks, model = deployment.topology.tensor_parallel, deployment.model
    fused = model.half_precision and not model.moe.routed_experts and ranks in _MATMUL_REDUCE_SCATTER_RANKS
    streams_o_proj = config.flashcomm2_parallel_size > 0 and "o_proj" in config.layer_sharding
    with _as_options():
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


@contextmanager
def _as_options() -> Iterator[None]:
    """Let an InvalidValueError of a library name options, as the user gave them, and not the library's fields."""
    try:
        yield
    except InvalidValueError as error:
        raise error.renamed(_OPTIONS) from None


def _broken_rules(config: AscendConfig, deployment: Deployment) -> Iterator[str]:
    yield from _broken_flashcomm_rules(config, deployment)
    yield from _broken_finegrained_rules(config, deployment)
    model, names = deployment.model, list(config.layer_sharding)
    if config.weight_nz_mode not in (0, 1):
        yield f"option 'weight_nz_mode' ({config.weight_nz_mode}) must be 0 or 1: weights that are not quantised keep their own format here"
    by_layer = {
        "eplb_config.expert_map_path": config.eplb_config.expert_map_path,
        "finegrained_tp_config.mlp_tensor_parallel_size": config.finegrained_tp_config.mlp_tensor_parallel_size,
    }
    for option, value in by_layer.items():
        if value and model.unknown_selectors:
            yield (
                f"option {option!r} ({value!r}) cannot be used with this model: its config seems to choose "
                f"its MoE layers by {', '.join(model.unknown_selectors)}, which vllm-ascend does not know; leave the option out"
            )
    if config.enable_shared_expert_dp and not (model.moe.routed_experts and model.shared_experts):
        yield "option 'enable_shared_expert_dp' (True) needs a MoE model with shared experts"
    if names and not config.flashcomm2_parallel_size:
        yield f"option 'layer_sharding' ({names}) needs flashcomm2_parallel_size > 0, and must be ['o_proj'] then"
    idle = AscendConfig(
        flashcomm1_dense_threshold=config.flashcomm1_dense_threshold, weight_nz_mode=config.weight_nz_mode
    )
    if not config.weight_prefetch_config.enabled:  # its ratios have no effect then
        idle = replace(idle, weight_prefetch_config=config.weight_prefetch_config)
    changes_layers = replace(config, eplb_config=idle.eplb_config) != idle
    if deployment.microbatches and model.moe.routed_experts:
        yield "microbatches (enable_dbo) cannot be used with a MoE model; leave enable_dbo out"
    if deployment.microbatches and changes_layers:
        yield "microbatches (enable_dbo) cannot be used with this plugin's options for linear layers; leave one of the two out"
    routed, chosen = model.moe.routed_experts, model.experts_per_token
    if routed and chosen > routed:
        yield f"the model's config asks for {chosen} experts a token, and its MoE layers have {routed}"


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
    vocabulary = padded_vocabulary(model.vocabulary)
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
