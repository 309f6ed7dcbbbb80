# SPDX-License-Identifier: Apache-2.0
"""AscendConfig: this plugin's options, given as `--additional-config '{...}'`, under the names that the public plugin uses.

Here each value is checked on its own. What options ask of each other, of the parallel sizes and of the model is checked in `rules`.

The options are read by the functions below and not by pydantic, which vLLM brings: its findings are of other words and one per type that was tried, and a
key has three kinds of answer here (unknown, known of the public plugin and without effect, known and not supported), for which it has no place.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from ascend_linear.state import FLASHCOMM1_DENSE_THRESHOLD

from vllm_ascend.eplb.options import LAYOUTS, POLICY_NUMBERS, EplbConfig
from vllm_ascend.findings import found_by, refuse, shown
from vllm_ascend.public_options import INERT, KNOWN, OF_VLLM, REMEDIES, changes_nothing

__all__ = ["LAYOUTS", "AscendConfig", "EplbConfig", "FinegrainedTP", "PrefetchRatio", "WeightPrefetch"]

_POLICY = "eplb_config.eplb_policy_type"  # a name, or a number that stands for one
_LARGEST_NUMBER = 2**31 - 1
# Options that leave a layer's product as it is: where another one begins, and in which format weights lie.
_OF_NO_LAYER = frozenset({"flashcomm1_dense_threshold", "weight_nz_mode"})
_LONGEST_NAME = 100  # of a key that is compared with those that exist
_Options = TypeVar("_Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinegrainedTP:
    """`finegrained_tp_config`: ranks along data parallel that share a kind of layer; 0 leaves it to the TP group.

    Args:
        lmhead_tensor_parallel_size: of the LM head.
        oproj_tensor_parallel_size: of o_proj; needs tensor_parallel_size 1.
        embedding_tensor_parallel_size: of the token embedding.
        mlp_tensor_parallel_size: of the dense MLPs.
    """

    lmhead_tensor_parallel_size: int = 0
    oproj_tensor_parallel_size: int = 0
    embedding_tensor_parallel_size: int = 0
    mlp_tensor_parallel_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _AttentionRatio:
    qkv: float = 1.0
    o: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _MoeRatio:
    gate_up: float = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class _MlpRatio:
    gate_up: float = 1.0
    down: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchRatio:
    """`prefetch_ratio`: the share of each weight that is prefetched, 0 to 1. That of `moe` is not used yet."""

    attn: _AttentionRatio = field(default_factory=_AttentionRatio)
    moe: _MoeRatio = field(default_factory=_MoeRatio)
    mlp: _MlpRatio = field(default_factory=_MlpRatio)

    @property
    def by_module(self) -> dict[str, float]:
        """As `ascend_linear.PrefetchConfig` takes them."""
        return {"qkv": self.attn.qkv, "o": self.attn.o, "gate_up": self.mlp.gate_up, "down": self.mlp.down}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPrefetch:
    """`weight_prefetch_config`: whether and how much of the next layer's weight is brought into the L2 cache ahead."""

    enabled: bool = False
    prefetch_ratio: PrefetchRatio = field(default_factory=PrefetchRatio)


@dataclass(frozen=True, slots=True, kw_only=True)
class AscendConfig:
    """This plugin's options, each of the right type.

    Args:
        enable_flashcomm1: tokens split over TP between the layers.
        flashcomm1_dense_threshold: tokens of a step up to which a dense model does without it (an option of this plugin alone).
        flashcomm2_parallel_size: shards of o_proj under FlashComm2; 1 keeps it whole, 0 is off.
        enable_matmul_allreduce: product and all-reduce in one kernel.
        layer_sharding: modules whose layers are spread over ranks; o_proj with FlashComm2.
        enable_shared_expert_dp: shared experts whole on every rank, which computes its share of the tokens.
        finegrained_tp_config: TP sizes per module.
        weight_prefetch_config: weight prefetch.
        weight_nz_mode: 1: int8 weights of linear layers are kept in the format FRACTAL_NZ; 0: in their own.
        eplb_config: where experts lie.
    """

    enable_flashcomm1: bool = False
    flashcomm1_dense_threshold: int = FLASHCOMM1_DENSE_THRESHOLD
    flashcomm2_parallel_size: int = 0
    enable_matmul_allreduce: bool = False
    layer_sharding: tuple[str, ...] = ()
    enable_shared_expert_dp: bool = False
    finegrained_tp_config: FinegrainedTP = field(default_factory=FinegrainedTP)
    weight_prefetch_config: WeightPrefetch = field(default_factory=WeightPrefetch)
    weight_nz_mode: int = 1
    eplb_config: EplbConfig = field(default_factory=EplbConfig)

    @classmethod
    def of(cls, additional_config: object, retired_variables: Mapping[str, str] | None = None) -> AscendConfig:
        """Read what the user gave; arguments as of `read`.

        Raises:
            ValueError: everything that is wrong with it.
        """
        config, findings = cls.read(additional_config, retired_variables)
        refuse(findings)
        return config

    @classmethod
    def read(
        cls, additional_config: object, retired_variables: Mapping[str, str] | None = None
    ) -> tuple[AscendConfig, list[str]]:
        """Read what the user gave, with one finding for each fault.

        Args:
            additional_config: vLLM's `additional_config`.
            retired_variables: variables of the public plugin that are set, with the key that took their place ("" for none).

        Returns:
            The options, those that are wrong at their defaults, and what is wrong: an unknown key, a known one that this plugin does not
            have, a value of the wrong type, a variable that the public plugin read. Each finding names the option, its value and the remedy.
        """
        findings = []
        for name, key in (retired_variables or {}).items():
            remedy = f"use --additional-config '{{\"{key}\": ...}}'" if key else "unset it"
            findings.append(f"environment variable {name} belongs to the public plugin and is not read here; {remedy}")
        if not isinstance(additional_config, Mapping):
            findings.append(f"additional_config must be a JSON object, got {type(additional_config).__name__}")
            return cls(), findings
        given = {key: value for key, value in additional_config.items() if key not in (*INERT, *OF_VLLM)}
        return _read(cls, given, "", findings), findings

    def of_layers(self) -> Iterator[str]:
        """Each option that is on and changes layers, with its value."""
        defaults = AscendConfig()
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in _OF_NO_LAYER or value == getattr(defaults, option.name):
                continue
            if option.name != "weight_prefetch_config" or value.enabled:
                yield f"option {option.name!r} ({shown(value)})"


def _read(options: type[_Options], given: object, path: str, findings: list[str]) -> _Options:
    """A config class from a JSON object whose keys are its fields or options of `KNOWN`. null leaves a field at its default.

    Args:
        options: the class.
        given: the object.
        path: of the object, "" or ending in a point.
        findings: what is wrong is appended here.
    """
    if not isinstance(given, Mapping):
        findings.append(f"option {path[:-1]!r} ({shown(given)}) must be an object with the keys {_names(options)}")
        return options()
    defaults = options()
    read: dict[str, Any] = {}
    for key, value in given.items():
        if not isinstance(key, str):
            findings.append(f"{_where(path)} has the key {shown(key)}, which must be a text")
        elif f"{path}{key}" in KNOWN:
            if not changes_nothing(f"{path}{key}", value):
                findings.append(_unsupported(f"{path}{key}", value))
        elif key not in _names(options):
            findings.append(_unknown(key, value, path))
        elif value is not None:
            if f"{path}{key}" == _POLICY and type(value) is int:
                value = POLICY_NUMBERS.get(value, str(value))
            read[key] = _read_value(getattr(defaults, key), value, f"{path}{key}", findings)
    found = found_by(lambda: options(**read))
    findings += found
    return defaults if found else options(**read)


def _where(path: str) -> str:
    return f"option {path[:-1]!r}" if path else "additional_config"


def _unsupported(path: str, value: object) -> str:
    remedy = REMEDIES.get(path)
    if remedy is None:
        neutral = next(iter(KNOWN[path]), None)
        remedy = "remove it" + ("" if neutral is None else f", or set it to {neutral!r}")
    return f"option {path!r} ({shown(value)}) of the public plugin is not supported by this one; {remedy}"


def _unknown(key: str, value: object, path: str) -> str:
    """The finding for a key that does not exist at `path`: the place where it belongs, or names that are near."""
    everywhere = [*_paths(AscendConfig), *KNOWN, *INERT]
    if places := [name for name in everywhere if name.rpartition(".")[2] == key]:
        if places[0] in KNOWN and not changes_nothing(places[0], value):
            return _unsupported(places[0], value)
        hint = f"it belongs at {' or '.join(map(repr, places))}"
    else:
        names = {name.rpartition(".")[2]: name for name in everywhere}
        names |= {
            here: here for name in everywhere if name.startswith(path) and "." not in (here := name.removeprefix(path))
        }
        near = difflib.get_close_matches(key[:_LONGEST_NAME], names, n=3)
        hint = (
            f"did you mean {' or '.join(names[name] for name in near)}?"
            if near
            else "see docs/options.md for the names that exist"
        )
    return f"{_where(path)} has an unknown option {shown(key)} ({shown(value)}); {hint}"


def _paths(options: type, path: str = "") -> list[str]:
    """The paths of all fields of a config class and of those that it holds."""
    found = []
    for name in _names(options):
        inner = type(getattr(options(), name))
        found += [f"{path}{name}", *(_paths(inner, f"{path}{name}.") if is_dataclass(inner) else ())]
    return found


def _names(options: type) -> list[str]:
    return [f.name for f in fields(options)]


def _read_value(default: Any, value: Any, path: str, findings: list[str]) -> Any:
    """`value` as the type that `default` has; `default` and a finding where it is of another."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        allowed, fits = "true or false", isinstance(value, bool)
    elif isinstance(default, int):
        allowed = f"a whole number, 0 or more and at most {_LARGEST_NUMBER}"
        fits = is_number and isinstance(value, int) and 0 <= value <= _LARGEST_NUMBER
    elif isinstance(default, float):
        allowed, fits = "a number from 0 to 1", is_number and 0 <= value <= 1
    elif isinstance(default, str):
        allowed, fits = "a text", isinstance(value, str)
    elif isinstance(default, tuple):
        fits = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
        allowed, value = "a list of names", tuple(value) if fits else value
    else:
        return _read(type(default), value, f"{path}.", findings)
    if not fits:
        findings.append(f"option {path!r} ({shown(value)}) must be {allowed}")
        return default
    return value
