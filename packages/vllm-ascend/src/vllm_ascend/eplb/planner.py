# SPDX-License-Identifier: Apache-2.0
"""The planner's process: python -m vllm_ascend.eplb.planner. It reads requests from its standard input and writes a reply to each to its standard output.

A frame is 8 bytes, the length in big-endian order, and then an .npz file. Nothing in it is executed. A process of its own, because planning in a thread
would hold Python's interpreter lock for milliseconds at a time while the worker's steps need it.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import BinaryIO

import numpy as np
from ascend_eplb import Placement
from numpy.typing import NDArray

from vllm_ascend.eplb.decide import RebalanceDecision, Rules, decide

__all__ = ["HEADER_BYTES", "Arrays", "as_decision", "as_request", "pack", "serve", "unpack"]

HEADER_BYTES = 8
_LOWER_PRIORITY = 10  # steps come first on a host whose cores are all busy
Arrays = dict[str, NDArray[np.generic]]


def pack(arrays: Arrays) -> bytes:
    """A frame of named arrays."""
    body = io.BytesIO()
    np.savez(body, **arrays)  # type: ignore[arg-type]  # numpy's stub takes no mapping of arrays
    return len(body.getvalue()).to_bytes(HEADER_BYTES, "big") + body.getvalue()


def unpack(body: bytes) -> Arrays:
    """The arrays of a frame without its header; ValueError or OSError where it is none."""
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        return dict(arrays)


def as_request(
    placed: Placement, history: NDArray[np.float64], rules: Rules, *, step_seconds: float, seconds_per_byte: float
) -> bytes:
    """The frame that asks for a decision; arguments as of `decide`."""
    numbers = {"step_seconds": step_seconds, "seconds_per_byte": seconds_per_byte, "experts": placed.num_experts}
    text = json.dumps({"rules": asdict(rules), **numbers})
    return pack({"ids": placed.physical_to_logical, "history": history, "text": np.array(text)})


def as_decision(body: bytes) -> RebalanceDecision:
    """The decision in a reply. ValueError: the planner has failed, or the reply is none."""
    arrays = unpack(body)
    told = json.loads(str(arrays["text"]))
    if "error" in told:
        raise ValueError(told["error"])
    return RebalanceDecision(transfers=arrays["transfers"].astype(np.int32), **told)


def answer(body: bytes) -> bytes:
    """The reply to a request. What goes wrong is the reply."""
    try:
        arrays = unpack(body)
        told = json.loads(str(arrays["text"]))
        placed = Placement(arrays["ids"].astype(np.int32), told["experts"])
        decision = decide(
            placed,
            arrays["history"].astype(np.float64),
            Rules(**told["rules"]),
            step_seconds=told["step_seconds"],
            seconds_per_byte=told["seconds_per_byte"],
        )
    except Exception as error:  # the process goes on: the worker says what was wrong, and asks again
        return pack({"text": np.array(json.dumps({"error": f"{type(error).__name__}: {error}"}))})
    numbers = {name: getattr(decision, name) for name in ("reason", "before", "after", "saved_seconds", "cost_seconds")}
    return pack({"transfers": decision.transfers, "text": np.array(json.dumps(numbers))})


def serve(requests: BinaryIO, replies: BinaryIO, reply_to: Callable[[bytes], bytes] = answer) -> None:
    """Answer requests until the input ends."""
    while len(header := requests.read(HEADER_BYTES)) == HEADER_BYTES:
        size = int.from_bytes(header, "big")
        body = requests.read(size)
        if len(body) < size:
            return
        replies.write(reply_to(body))
        replies.flush()


def main() -> None:
    """Serve on the standard streams. What anything prints goes to the standard error instead of between the frames."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.nice(_LOWER_PRIORITY)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; this one ends with its input
    serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
