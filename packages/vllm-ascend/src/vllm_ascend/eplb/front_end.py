# SPDX-License-Identifier: Apache-2.0
"""Where the metrics of dynamic EPLB come into the process that answers /metrics."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from vllm_ascend import envs
from vllm_ascend.eplb.metrics import Metrics, listen

__all__ = ["serve_metrics"]

_logger = logging.getLogger("vllm.vllm_ascend")


def serve_metrics(vllm_config: Any) -> None:
    """Take part in this engine's metrics. Called where vLLM has made its configuration: in the process of the engine's user, in each API server, and in each
    process that runs an engine for them.

    The first of these processes chooses the socket, and those that it starts with multiprocessing inherit its path. Metrics are where vLLM's are: in the
    first process, or in the first of several API servers, whose metrics vLLM sums up. Where the socket cannot be opened, the log says so, and there are no
    metrics.

    Args:
        vllm_config: vLLM's `VllmConfig`.
    """
    parallel = vllm_config.parallel_config
    server, servers = parallel._api_process_rank, parallel._api_process_count
    address = envs.eplb_status_socket()
    is_first = address is None or multiprocessing.parent_process() is None
    if is_first:
        address = str(_folder(os.getpid()) / "status")
        envs.set_eplb_status_socket(address)
    if address is not None and server == 0 and is_first == (servers == 1):
        _listen(address)


@cache
def _folder(process: int) -> Path:
    """A folder that only this user can look into; it goes when the process ends, and not when one ends that was forked from it."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-ascend-"))

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


@cache
def _listen(address: str) -> None:
    """Listen from now on. The engines of one process share the socket."""
    try:
        listen(address, Metrics())
    except OSError as error:
        _logger.warning("there are no metrics of dynamic EPLB: %s: %s", address, error)
