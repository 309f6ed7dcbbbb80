# SPDX-License-Identifier: Apache-2.0
"""Loading a model's weights, the first time and anew, with the check that the checkpoint has all of them.

vLLM's own check goes by the names of parameters, leaves out every linear layer and expert, is off for quantised models, and is only a warning when
weights are loaded anew. Here each element of each parameter must have been written (`loaded.py`), and missing tensors are named as in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed import get_rank, is_initialized
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, get_layerwise_info

from vllm_ascend import compat
from vllm_ascend.layers.moe import AscendRoutedExperts
from vllm_ascend.loaded import LoadRecord, Region, region_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig

__all__ = ["AscendModelLoader", "WeightsAnew", "register", "reloading"]

_NAMED = 5  # tensors that an error names at most
# ModelSlim keeps here, beside a model that it has rotated, the matrix for draft models of another basis. The model does without.
_UNUSED = "rot.weight"


class AscendModelLoader(DefaultModelLoader):
    """vLLM's loader of checkpoints, which refuses one that lacks a tensor of the model.

    vLLM's option `model_loader_extra_config={"enable_weights_track": false}` turns the check off.
    """

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Load the checkpoint's tensors into the model.

        Raises:
            ValueError: tensors of the model that the checkpoint lacks.
        """
        if self.enable_weights_track is False:
            super().load_weights(model, model_config)
            return
        own = self.enable_weights_track
        self.enable_weights_track = False  # this check is stricter, and names the missing tensors
        try:
            with LoadRecord(dict(_expected(model))) as record:
                super().load_weights(model, model_config)
        finally:
            self.enable_weights_track = own
        shared = _shared_parts(model, model_config)
        _refuse(
            [name for name in _missing(model, record) if not any(part in f".{name}" for part in shared)],
            f"the checkpoint {model_config.model!r}",
            "To load it as it is: --model-loader-extra-config '{\"enable_weights_track\": false}'",
        )

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]  # vLLM says Generator
        """The checkpoint's tensors by name, but for those that no model has."""
        every = super().get_all_weights(model_config, model)
        return (named for named in every if named[0] != _UNUSED)


def _shared_parts(model: nn.Module, model_config: ModelConfig) -> list[str]:
    """Parts of the names of tensors that a draft's checkpoint may lack: vLLM gives it those of the model for which it drafts."""
    config = get_current_vllm_config_or_none()
    draft = None if config is None else config.speculative_config
    if draft is None or model_config.runner_type != "draft" or draft.method == "draft_model":
        return []
    embedding, head = [".embed_tokens."], [".lm_head.", ".shared_head.head."]
    # Of multi-token prediction, vLLM always shares both; EAGLE's drafts say what they have brought.
    own = getattr(model, "has_own_embed_tokens", False), getattr(model, "has_own_lm_head", False)
    return [*([] if own[0] else embedding), *([] if own[1] else head)]


class WeightsAnew:
    """What has come of weights that vLLM loads anew into a model that runs, and what has not.

    vLLM lays parameters out anew layer by layer and copies a layer over the old one when all of it has come. A layer of which only a part comes would be
    filled up with whatever the memory held.

    Args:
        model: a model that runs, as it is before vLLM lays it out.
        model_config: its config.
        source: what the weights come from, for errors.
    """

    record: LoadRecord

    def __init__(self, model: nn.Module, model_config: ModelConfig, source: str) -> None:
        """Find parameters of two names."""
        self._model, self._model_config, self._source = model, model_config, source
        # A tied parameter is two once vLLM has laid the layers out anew; the second name stays without weights, and keeps the first one's memory.
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._tied = names - {name for name, _ in model.named_parameters()}

    def expect(self) -> None:
        """Begin the record. vLLM has laid the layers out."""
        expected = {name: one for name, one in _expected(self._model) if name not in self._tied}
        self.record = LoadRecord(expected)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Record what is written inside. After a failure incomplete layers have the weights that they had."""
        try:
            with self.record:
                yield
        except BaseException:
            self._keep_incomplete_layers()
            raise

    def refuse_missing(self, *, partial: bool) -> None:
        """Raise ValueError that names the tensors that have not come; incomplete layers have the weights that they had. With `partial`, no tensor of a layer need come."""
        if missing := list(_missing(self._model, self.record, partial=partial)):
            self._keep_incomplete_layers()
            advice = (
                "Layers that were complete have the new weights, all others the old ones; load a complete checkpoint"
            )
            _refuse(missing, self._source, advice)

    def _keep_incomplete_layers(self) -> None:
        """Give layers whose weights have not all come the ones back that they had, and let the model run again."""
        for layer in self._model.modules():
            info = get_layerwise_info(layer)
            info.load_numel = 0
            info.loaded_weights.clear()
        finalize_layerwise_reload(self._model, self._model_config)  # type: ignore[no-untyped-call]


def reloading(model: nn.Module, model_config: ModelConfig, *, partial: bool) -> Callable[..., Any]:
    """The model's `load_weights`, checked, for use while vLLM loads weights anew into it.

    Args:
        model: a model that runs.
        model_config: its config.
        partial: whether layers of which nothing comes may keep their weights.

    Raises, when called:
        ValueError: tensors that were not given. Layers of which all has come have the new weights, all others keep the old ones.
    """
    anew = WeightsAnew(model, model_config, "what was given to reload_weights")
    load: Callable[..., Any] = model.load_weights  # type: ignore[assignment]  # a method, which nn.Module's type does not know

    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> Any:
        anew.expect()
        with anew.loading():
            loaded = load(weights)
        anew.refuse_missing(partial=partial)
        return loaded

    return load_weights


def _expected(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters that a checkpoint must have, by name: not those of quantisation while loading, nor scales of a KV cache."""
    seen: set[Tensor] = set()  # a tied parameter counts under its first name
    for path, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "uses_meta_device", False) or isinstance(method, BaseKVCacheMethod):
            continue
        optional = getattr(method, "optional_parameters", ())
        for name, parameter in sorted(module.named_parameters(recurse=False)):
            if parameter.numel() and name not in optional and parameter not in seen:
                seen.add(parameter)
                yield f"{path}.{name}" if path else name, parameter


def _missing(model: nn.Module, record: LoadRecord, *, partial: bool = False) -> Iterator[str]:
    """Names of tensors that were not loaded, or not as a whole. With `partial` only those of layers of which another tensor was loaded."""
    packed = getattr(model, "packed_modules_mapping", {})
    layers: dict[str, list[str]] = {}
    for full in record.parameters:
        layers.setdefault(full.rpartition(".")[0], []).append(full)
    for path, names in layers.items():
        if partial and not any(record.touched(full) for full in names):
            continue
        module = model.get_submodule(path)
        for full in names:
            parameter = record.parameters[full]
            padded = getattr(parameter, "weight_loader_numel", None)  # vLLM: a part of the parameter is padding
            if padded is None or record.written_elements(full) < padded:
                yield from record.unwritten(full, _parts(path, module, full, parameter, packed))


def _parts(path: str, module: nn.Module, full: str, parameter: Tensor, packed: Any) -> dict[str, Region]:
    """The tensors of a checkpoint that a parameter is made of, each with its part of the parameter."""
    name = full.rpartition(".")[2]
    if isinstance(module, AscendRoutedExperts) and name.startswith(("w13_", "w2_")):
        return _expert_parts(module, name, parameter)
    sizes = list(getattr(module, "output_partition_sizes", ())) if isinstance(module, LinearBase) else []
    parent, _, last = path.rpartition(".")
    parts = packed.get(last, ())
    if len(sizes) > 1 and len(sizes) == len(parts) and parameter.shape[0] in (sum(sizes), len(sizes)):
        views = parameter.detach().split(sizes if parameter.shape[0] == sum(sizes) else 1)  # type: ignore[no-untyped-call]
        prefix = f"{parent}." if parent else ""
        return {f"{prefix}{part}.{name}": region_of(view) for part, view in zip(parts, views, strict=True)}
    return {full: region_of(parameter)}


def _expert_parts(layer: AscendRoutedExperts, name: str, parameter: Tensor) -> dict[str, Region]:
    kind, _, tensor = name.partition("_")
    gate, down, up = layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name
    names = [down] if kind == "w2" else [part for part in (gate, up) if part is not None]
    parts: dict[str, Region] = {}
    for expert, slot in enumerate(layer.slots.expert_map.tolist()):
        if slot >= 0:
            views = parameter.detach()[slot].chunk(len(names))
            parts |= {
                f"{layer.layer_name}.{expert}.{part}.{tensor}": region_of(view)
                for part, view in zip(names, views, strict=True)
            }
    return parts


def _refuse(missing: list[str], source: str, remedy: str) -> None:
    """Raise ValueError if anything is missing."""
    if missing:
        rank = get_rank() if is_initialized() else 0
        named = ", ".join(map(repr, missing[:_NAMED])) + (
            f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        )
        raise ValueError(
            f"{source} lacks {len(missing)} of the tensors that rank {rank} needs, or parts of them: {named} "
            f"(as vLLM's model names them). {remedy}"
        )


def register() -> None:
    """Let vLLM load checkpoints with this loader."""
    compat.replace_model_loader(DefaultModelLoader, AscendModelLoader)
