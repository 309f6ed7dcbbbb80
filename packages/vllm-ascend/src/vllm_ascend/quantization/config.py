# SPDX-License-Identifier: Apache-2.0
"""The quantisation method "ascend" of vLLM: a checkpoint that ModelSlim has quantised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from vllm_ascend.findings import refuse
from vllm_ascend.quantization.description import DYNAMIC, FLOAT, Description
from vllm_ascend.quantization.files import has_description, lacking, read_description

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["METHOD", "AscendQuantizationConfig", "choose_by_folder"]

METHOD = "ascend"
# Formats of vLLM that read a checkpoint as its author has written it; others have files of their own, or none.
_CHECKPOINT_FORMATS = ("auto", "hf", "safetensors", "mistral", "fastsafetensors", "instanttensor", "runai_streamer")
# How vLLM begins the names of layers of a model that drafts for another.
_OF_DRAFT = "draft_model."


class AscendQuantizationConfig(QuantizationConfig):
    """What a checkpoint's description says of each layer. vLLM makes one, has it read the description, and asks it layer by layer."""

    def __init__(self) -> None:
        """Nothing is known until `maybe_update_config`, to which vLLM tells the checkpoint."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._description: Description | None = None

    @property
    def description(self) -> Description:
        """The checkpoint's."""
        assert self._description is not None  # vLLM calls maybe_update_config right after the constructor
        return self._description

    def get_name(self) -> str:  # type: ignore[override]  # vLLM's type lists its own names alone
        """The method's name."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the int8 kernels give."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Not asked: this platform has no such numbers."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: `maybe_update_config` reads the description, to say more than vLLM when there is none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AscendQuantizationConfig:
        """Whatever config.json says: the description says all there is."""
        return cls()

    @classmethod
    def override_quantization_method(  # type: ignore[override]  # as get_name
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """This method, if the user says so and config.json has a `quantization_config` that names none, as some of ModelSlim's do."""
        return METHOD if user_quant == METHOD and not hf_quant_cfg.get("quant_method") else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read and check the checkpoint's description.

        Raises:
            ValueError: there is none, or everything in it that is not supported.
        """
        content, source = read_description(model_name, revision, hf_config)
        rms_norms = hasattr(getattr(hf_config, "text_config", hf_config), "rms_norm_eps")
        self._description = Description.read(content, source, rms_norms=rms_norms)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take the names that vLLM's model gives to the checkpoint's tensors."""
        self._description = self.description.renamed(hf_to_vllm_mapper.map_name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer; None: as it would be in a float checkpoint.

        Raises:
            ValueError: what the description says of this layer is not supported.
        """
        from vllm.config import get_current_vllm_config
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from vllm_ascend.quantization.linear import W8A8DynamicLinearMethod, W8A8StaticLinearMethod
        from vllm_ascend.quantization.moe import W8A8DynamicExpertsMethod

        prefix = prefix.removeprefix(_OF_DRAFT)
        if isinstance(layer, LinearBase):
            kind = self.description.linear(prefix, self.packed_modules_mapping)
            if kind == FLOAT:
                return UnquantizedLinearMethod()
            random = get_current_vllm_config().load_config.load_format == "dummy"
            if kind == DYNAMIC:
                return W8A8DynamicLinearMethod(random=random)
            has_weight_scale = self.description.has_weight_scale(prefix, self.packed_modules_mapping)
            return W8A8StaticLinearMethod(random=random, has_weight_scale=has_weight_scale)
        if isinstance(layer, RoutedExperts):
            names = (layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name)
            projections = [name for name in names if name is not None]  # without a gate there is no third one
            kind = self.description.experts(prefix, projections, layer.moe_config.num_logical_experts)
            random = get_current_vllm_config().load_config.load_format == "dummy"
            return None if kind == FLOAT else W8A8DynamicExpertsMethod(layer.moe_config, random=random)
        if isinstance(layer, VocabParallelEmbedding):
            self.description.check_float(prefix)
        return None


def choose_by_folder(vllm_config: VllmConfig) -> None:
    """Choose the method for a model whose folder holds a description, unless another method has been chosen, and look whether its files fit.

    Raises:
        ValueError: everything in the description that is not supported; the dtype is not; tensors that the files lack.
    """
    model = vllm_config.model_config
    if model is None:  # of a config that vLLM makes without a model
        return  # type: ignore[unreachable]  # vLLM's type does not say that
    if model.is_submodel_config:
        # The language model of a multimodal one, whose whole was looked at; its names are vLLM's by now.
        return
    if model.quantization is None and has_description(model.model, model.hf_config):
        model.quantization = METHOD
        vllm_config.quant_config = type(vllm_config).get_quantization_config(model, vllm_config.load_config)
    method = vllm_config.quant_config
    if isinstance(method, AscendQuantizationConfig) and vllm_config.load_config.load_format in _CHECKPOINT_FORMATS:
        decoder_layers = getattr(model.hf_text_config, "num_hidden_layers", 0)
        refuse(lacking(method.description, model.model, decoder_layers))
