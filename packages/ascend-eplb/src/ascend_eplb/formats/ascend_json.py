# SPDX-License-Identifier: Apache-2.0
"""The Ascend expert map: JSON with a list of layers, each with a list of devices, each with its experts.

Other readers of this format rely on the order of the lists and ignore ids and counts. This one goes by the ids, checks
them and the counts against the lists, and names the JSON path in every error.
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from ascend_eplb.formats.atomic import write_atomically
from ascend_eplb.formats.parse import parse_file
from ascend_eplb.limits import MOST_LAYER_ID
from ascend_eplb.placement import Placement

__all__ = ["from_document", "parse_json", "read_ascend_json", "read_json", "to_document", "write_ascend_json"]


def read_ascend_json(path: Path, num_experts: int = 0) -> Placement:
    """Read an Ascend map. Errors: OSError, and as `read_json` and `from_document`."""
    return from_document(read_json(path), num_experts)


def read_json(path: Path) -> Any:
    """The parsed file.

    Raises:
        OSError, ValueError: as `parse_file`, also for an object that has a key twice.
    """
    return parse_file(path, "JSON", parse_json)


def parse_json(content: bytes) -> Any:
    """Parsed JSON. Raises what `json.loads` raises, and ValueError for an object that has a key twice."""
    return json.loads(content, object_pairs_hook=_no_duplicate_keys)


def write_ascend_json(placement: Placement, path: Path) -> None:
    """Write an Ascend map, one device a line, atomically."""
    text = json.dumps(to_document(placement))  # whose only strings are its keys
    text = text.replace('{"layer_id"', '\n  {"layer_id"').replace('{"device_id"', '\n    {"device_id"')
    write_atomically(path, (text + "\n").encode())


def to_document(placement: Placement) -> dict[str, Any]:
    """The map as plain dicts and lists, ready for `json`."""
    return {
        "moe_layer_count": placement.layers,
        "layer_list": [
            {
                "layer_id": layer_id,
                "device_count": placement.ranks,
                "device_list": [{"device_id": rank, "device_expert": ids} for rank, ids in enumerate(layer)],
            }
            for layer_id, layer in zip(placement.layer_ids, placement.physical_to_logical.tolist(), strict=True)
        ],
    }


def from_document(document: Any, num_experts: int = 0) -> Placement:
    """The placement in a parsed map.

    Raises:
        ValueError: a field missing or of another type, a count or an id that does not fit, or an invalid placement;
            names the JSON path.
    """
    layer_list = _list(_field(document, "layer_list", "$"), "$.layer_list")
    count = _integer(_field(document, "moe_layer_count", "$"), "$.moe_layer_count")
    if count != len(layer_list):
        raise ValueError(f"$.moe_layer_count is {count}, but $.layer_list holds {len(layer_list)} layers")
    layers: dict[int, list[list[int]]] = {}
    where: dict[int, str] = {}
    for index, entry in enumerate(layer_list):
        path = f"$.layer_list[{index}]"
        layer_id = _integer(_field(entry, "layer_id", path), f"{path}.layer_id")
        if layer_id in layers:
            raise ValueError(f"{path}.layer_id is {layer_id}, as {where[layer_id]}.layer_id is already")
        layers[layer_id], where[layer_id] = _devices(entry, path), path
    order = sorted(layers)
    shape = [len(device) for device in layers[order[0]]]
    for layer_id in order:
        sizes = [len(device) for device in layers[layer_id]]
        if sizes != shape or len(set(sizes)) != 1:
            raise ValueError(
                f"{where[layer_id]}.device_list: all devices of all layers must hold equally many experts, not {sizes}"
                f" here and {shape} in {where[order[0]]}"
            )
    _check_experts(layers, where, num_experts)
    return Placement([layers[layer_id] for layer_id in order], num_experts, tuple(order))  # type: ignore[arg-type]


def _devices(entry: Any, path: str) -> list[list[int]]:
    """The experts of each device of one layer, in the order of the device ids."""
    device_list = _list(_field(entry, "device_list", path), f"{path}.device_list")
    count = _integer(_field(entry, "device_count", path), f"{path}.device_count")
    if count != len(device_list):
        raise ValueError(f"{path}.device_count is {count}, but {path}.device_list holds {len(device_list)} devices")
    devices: dict[int, list[int]] = {}
    for index, device in enumerate(device_list):
        here = f"{path}.device_list[{index}]"
        device_id = _integer(_field(device, "device_id", here), f"{here}.device_id")
        if not 0 <= device_id < count or device_id in devices:
            raise ValueError(f"{here}.device_id is {device_id}; the ids must be 0..{count - 1}, each once")
        experts = _list(_field(device, "device_expert", here), f"{here}.device_expert")
        devices[device_id] = [_integer(e, f"{here}.device_expert[{slot}]") for slot, e in enumerate(experts)]
        first: dict[int, int] = {}
        for slot, expert in enumerate(devices[device_id]):
            if first.setdefault(expert, slot) != slot:
                raise ValueError(
                    f"{here}.device_expert[{slot}]: expert {expert} is already in slot {first[expert]} of this device"
                )
    return [devices[device_id] for device_id in range(count)]


def _check_experts(layers: dict[int, list[list[int]]], where: dict[int, str], num_experts: int) -> None:
    experts = num_experts or 1 + max(e for devices in layers.values() for device in devices for e in device)
    for layer_id, devices in layers.items():
        found = {expert for device in devices for expert in device}
        if max(found) >= experts:
            raise ValueError(f"{where[layer_id]}: expert {max(found)} is not in 0..{experts - 1}")
        if len(found) < experts:
            missing = next(expert for expert in range(experts) if expert not in found)
            more = f" and {experts - len(found) - 1} more" if experts - len(found) > 1 else ""
            raise ValueError(f"{where[layer_id]}: expert {missing}{more} of 0..{experts - 1} is on no device")


def _field(entry: Any, name: str, path: str) -> Any:
    if not isinstance(entry, dict):
        raise ValueError(f"{path} must be an object, not {type(entry).__name__}")
    if name not in entry:
        raise ValueError(f"{path}.{name} is missing")
    return entry[name]


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path} must be a list with at least one entry, not {_short(value)}")
    return value


def _short(value: Any) -> str:
    """A value in at most about 40 characters, however large or deeply nested it is."""
    return reprlib.repr(value)


def _integer(value: Any, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_LAYER_ID:
        raise ValueError(f"{path} must be a whole number from 0 to {MOST_LAYER_ID}, not {_short(value)}")
    return value


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"an object has the key {name[:40]!r} twice")
        result[name] = value
    return result
