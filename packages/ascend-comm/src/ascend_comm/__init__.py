# SPDX-License-Identifier: Apache-2.0
"""Who talks to whom: rank topology and communication groups.

`Topology` and `GroupConfig` are pure Python. What needs torch (`CommGroup`, `TorchGroup`, `Solo`, `wrap`, `GroupSet`,
...) is imported on first use, so that ``import ascend_comm`` alone does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ascend_comm.config import GroupConfig, Handle, memory_bytes, plan
from ascend_comm.errors import InvalidValueError
from ascend_comm.hccl import HcclOptions
from ascend_comm.topology import Coordinates, Groups, Topology, group_of

if TYPE_CHECKING:
    from ascend_comm.collectives import Pending, hccl_comm_name
    from ascend_comm.group import CommGroup, Coordinator, Solo, TorchGroup, wrap
    from ascend_comm.groups import GroupSet

__all__ = [
    "CommGroup",
    "Coordinates",
    "Coordinator",
    "GroupConfig",
    "GroupSet",
    "Groups",
    "Handle",
    "HcclOptions",
    "InvalidValueError",
    "Pending",
    "Solo",
    "Topology",
    "TorchGroup",
    "group_of",
    "hccl_comm_name",
    "memory_bytes",
    "plan",
    "wrap",
]

_NEEDS_TORCH = {
    "CommGroup": "group",
    "Coordinator": "group",
    "GroupSet": "groups",
    "Pending": "collectives",
    "Solo": "group",
    "TorchGroup": "group",
    "hccl_comm_name": "collectives",
    "wrap": "group",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use (PEP 562)."""
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module 'ascend_comm' has no attribute {name!r}")
    return getattr(import_module(f"ascend_comm.{_NEEDS_TORCH[name]}"), name)
