# SPDX-License-Identifier: Apache-2.0
"""What a cluster of Ray must know of NPUs before vLLM's workers can be placed on it. No vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["broken", "notices"]

_REMEDY = "start each node by `ray start ... --resources '{\"NPU\": 8}'`, with the number of its NPUs, or give `ray.init` these resources"


def broken(parallel: Any, ray: Any) -> Iterator[str]:
    """Findings for a cluster that is there and has no NPUs: vLLM would wait half an hour for them.

    Args:
        parallel: vLLM's `ParallelConfig`.
        ray: the module `ray`; None where nothing has imported it.
    """
    if parallel.distributed_executor_backend != "ray" or ray is None or not ray.is_initialized():
        return
    if not ray.cluster_resources().get("NPU"):
        yield f"distributed_executor_backend ('ray'): the cluster of Ray has no resource \"NPU\", of which {parallel.world_size} are needed; {_REMEDY}"


def notices(parallel: Any, ray: Any) -> list[str]:
    """What to know where this process has no cluster yet, and so cannot ask it. Arguments as of `broken`."""
    if parallel.distributed_executor_backend != "ray" or (ray is not None and ray.is_initialized()):
        return []
    return [
        f'Ray must count NPUs as the resource "NPU", of which {parallel.world_size} are needed: vLLM waits for them half an hour. Where `ray status` does not '
        f"show them, {_REMEDY}"
    ]
