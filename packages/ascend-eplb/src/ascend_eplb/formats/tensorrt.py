# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's load balancer YAML: `num_slots` and `initial_global_assignments: {layer: [S expert ids]}`."""

from __future__ import annotations

import reprlib
from functools import partial
from pathlib import Path
from typing import Any

from ascend_eplb.formats.atomic import write_atomically
from ascend_eplb.formats.parse import parse_file
from ascend_eplb.limits import MOST_LAYER_ID
from ascend_eplb.placement import Placement, from_physical_to_logical

__all__ = ["read_tensorrt_yaml", "write_tensorrt_yaml"]

_MERGE = "tag:yaml.org,2002:merge"  # the key `<<`, which takes over another mapping's keys


def read_tensorrt_yaml(path: Path, ranks: int | None, num_experts: int = 0) -> Placement:
    """Read the YAML. Its layer numbers become `layer_ids`; the number of ranks is not in the format.

    Raises:
        OSError: the file cannot be read.
        RuntimeError: pyyaml is not installed.
        ValueError: no YAML, a field missing or of another type, `ranks` not given, or an invalid placement.
    """
    document = parse_file(path, "YAML", partial(_parse, _loader(_yaml())))
    if not isinstance(document, dict):
        raise ValueError("must be a mapping with num_slots and initial_global_assignments")
    slots, table = document.get("num_slots"), document.get("initial_global_assignments")
    if not isinstance(table, dict) or not table:
        raise ValueError("initial_global_assignments must map layer numbers to lists of expert ids")
    for layer, ids in table.items():
        here = f"initial_global_assignments.{str(layer)[:40]}"
        if not _is_number(layer):
            raise ValueError(f"{here}: a layer number must be a whole number from 0 to {MOST_LAYER_ID}")
        if not isinstance(ids, list) or not all(map(_is_number, ids)):
            raise ValueError(f"{here}: must be a list of expert ids, whole numbers from 0 to {MOST_LAYER_ID}")
        if len(ids) != slots:
            raise ValueError(f"{here}: holds {len(ids)} slots, num_slots is {reprlib.repr(slots)}")
    if ranks is None:
        raise ValueError("this format does not say how many ranks there are: give ranks")
    order = sorted(table)
    return from_physical_to_logical(
        [table[layer] for layer in order], ranks=ranks, num_experts=num_experts, layer_ids=order
    )


def write_tensorrt_yaml(placement: Placement, path: Path) -> None:
    """Write the YAML atomically. Errors: OSError; RuntimeError where pyyaml is not installed."""
    ids_LS = placement.physical_to_logical.reshape(placement.layers, -1).tolist()
    document = {
        "num_slots": placement.slots,
        "initial_global_assignments": dict(zip(placement.layer_ids, ids_LS, strict=True)),
    }
    text = _yaml().safe_dump(document, sort_keys=False, default_flow_style=None, width=120)
    write_atomically(path, text.encode())


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_LAYER_ID


def _parse(loader: Any, content: bytes) -> Any:
    reader = loader(content)
    try:
        return reader.get_single_data()
    finally:
        reader.dispose()


def _loader(yaml: Any) -> Any:
    """PyYAML's safe loader, which builds plain data only, with an error for a key that a mapping has twice."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
            seen = set()
            for key in keys:
                if key in seen:
                    raise ValueError(f"a mapping has the key {str(key)[:40]!r} twice")
                seen.add(key)
            return super().construct_mapping(node, deep=deep)

    return Loader


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise RuntimeError("YAML needs pyyaml: pip install 'ascend-eplb[yaml]' (or ascend-eplb[cli])") from error
    return yaml
