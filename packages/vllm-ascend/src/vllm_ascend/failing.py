# SPDX-License-Identifier: Apache-2.0
"""A rank on which a step has failed does not leave the others waiting for it.

vLLM's executor waits for the answer of one rank, or of all in their order. Where that rank waits for another one, in a collective or for what an earlier
pipeline stage sends, and the other has raised, nobody reads what it said. Its process ends, which the executor does notice.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from threading import Timer
from typing import Any, Concatenate, ParamSpec, TypeVar

from vllm.logger import init_logger

__all__ = ["ends_the_engine"]

_GRACE = 5.0
"""Seconds in which an executor that does hear of the error ends this process itself, after it has passed the error on."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
logger = init_logger("vllm.vllm_ascend")


def ends_the_engine(
    method: Callable[Concatenate[Any, Arguments], Result],
) -> Callable[Concatenate[Any, Arguments], Result]:
    """A worker's method in which ranks wait for each other: what it raises ends the engine, on whichever rank. It is raised as well."""

    @wraps(method)
    def run(worker: Any, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return method(worker, *args, **kwargs)
        except Exception as error:
            parallel = worker.parallel_config
            if parallel.world_size > 1 and parallel.distributed_executor_backend == "mp":
                timer = Timer(_GRACE, _end, (worker.rank, method.__name__, f"{type(error).__name__}: {error}"))
                timer.daemon = True
                timer.start()
            raise

    return run


def _end(rank: int, name: str, said: str) -> None:
    logger.error("Rank %d ends, because other ranks may wait for it: %s has failed here (%s)", rank, name, said)
    os._exit(1)
