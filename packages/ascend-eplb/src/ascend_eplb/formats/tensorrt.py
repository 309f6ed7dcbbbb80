# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's load balancer YAML: `num_slots` and `initial_global_assignments: {layer: [S expert ids]}`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ascend_eplb.formats.atomic import write_atomically
from ascend_eplb.placement import Placement, from_physical_to_logical

__all__ = ["read_tensorrt_yaml", "write_tensorrt_yaml"]


def read_tensorrt_yaml(path: Path, ranks: int | None, num_experts: int = 0) -> Placement:
    """Read the YAML; its layer numbers are model-global and stay. The format does not say `ranks`.

    Raises:
        OSError: the file cannot be read.
        RuntimeError: pyyaml is not installed.
        ValueError: no YAML, a field missing or of another type, `ranks` not given, or an invalid placement.
    """
    yaml = _yaml()
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ValueError("must be a mapping with num_slots and initial_global_assignments")
    slots, table = document.get("num_slots"), document.get("initial_global_assignments")
    if not isinstance(table, dict) or not table:
        raise ValueError("initial_global_assignments must map layer numbers to lists of expert ids")
    for layer, ids in table.items():
        here = f"initial_global_assignments.{layer}"
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise ValueError(f"{here}: a layer number must be an integer")
        if not isinstance(ids, list) or any(isinstance(e, bool) or not isinstance(e, int) for e in ids):
            raise ValueError(f"{here}: must be a list of expert ids")
        if len(ids) != slots:
            raise ValueError(f"{here}: holds {len(ids)} slots, num_slots is {slots}")
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


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise RuntimeError("YAML needs pyyaml: pip install 'ascend-eplb[yaml]' (or ascend-eplb[cli])") from error
    return yaml
