# SPDX-License-Identifier: Apache-2.0
"""The adapters of one worker: vLLM's manager, with weights laid out for this platform's products and a check of what is loaded."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from vllm_ascend.lora import products
from vllm_ascend.lora.punica import AscendPunicaWrapper

__all__ = ["AscendLoRAManager"]


class AscendLoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's manager of LoRA adapters."""

    def create_lora_manager(self, model: nn.Module, vllm_config: Any) -> Any:
        """Put vLLM's LoRA layers into the model, and lay out their weights as `products.add_expanded` reads them."""
        adapted = super().create_lora_manager(model, vllm_config)
        for layer in self._adapter_manager.modules.values():
            stacked: Any = getattr(layer, "lora_b_stacked", None)
            if isinstance(stacked, Tensor):
                vars(layer)["lora_b_stacked"] = products.lay_out(stacked)
            elif isinstance(stacked, tuple):
                vars(layer)["lora_b_stacked"] = tuple(map(products.lay_out, stacked))
        return adapted

    def sampling_as(self, adapter: int) -> AbstractContextManager[None]:
        """Let all rows whose logits are computed inside have one adapter, 0 for none."""
        manager = self._adapter_manager
        language = manager.mm_mapping.language_model[0] if manager.supports_mm else DEFAULT_LANGUAGE_WRAPPER_KEY
        wrapper = cast(AscendPunicaWrapper, manager.punica_wrapper_mapping[language])
        return wrapper.sampling_as(adapter, manager.lora_index_to_id)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        """Load an adapter.

        Raises:
            ValueError: weights that are not finite numbers. Other requests of a batch multiply them with zero, which is no zero then.
        """
        adapter = super()._load_adapter(lora_request)
        for name, weights in adapter.loras.items():
            matrices: dict[str, Any] = {"A": weights.lora_a, "B": weights.lora_b}
            for letter, given in matrices.items():
                for matrix in given if isinstance(given, list) else [given]:
                    if matrix is not None and not torch.isfinite(matrix).all():
                        raise ValueError(
                            f"LoRA adapter {lora_request.lora_name!r} ({lora_request.lora_path}): its matrix {letter} of layer {name!r} has values that are "
                            "not finite numbers; train or export it anew"
                        )
        return adapter
