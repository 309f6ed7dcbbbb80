# SPDX-License-Identifier: Apache-2.0
"""Processes that are the ranks of one world."""

import os
import subprocess
import sys

__all__ = ["run_ranks"]


def run_ranks(worker, world, arguments, **variables):
    """Run a worker script as `world` processes at once, to their ends; one that fails is an AssertionError with what all of them said.

    Args:
        worker: path of the script.
        world: number of ranks.
        arguments: given a rank, those of its process.
        variables: of the environment, beside RANK, WORLD_SIZE and one thread.
    """
    common = os.environ | {"WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"} | variables
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(worker), *arguments(rank)],
            env=common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=1800)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)
