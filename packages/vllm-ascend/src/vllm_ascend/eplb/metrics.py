# SPDX-License-Identifier: Apache-2.0
"""Metrics of dynamic EPLB beside vLLM's: the first rank's worker sends its status, and the process that serves /metrics keeps it for Prometheus. No vLLM.

They meet at a Unix datagram socket. A worker that sends never waits: what nobody takes is lost, and the next status has the same sums.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Mapping
from threading import Thread
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from vllm_ascend.eplb.report import Status, cells

__all__ = ["PREFIX", "Metrics", "StatusSender", "listen"]

# Not "vllm:", for vLLM removes what begins so from the registry when an engine starts.
PREFIX = "vllm_ascend:eplb_"
_logger = logging.getLogger("vllm.vllm_ascend")
_LARGEST_MESSAGE = 1 << 16

# Fields of `Status`. Prometheus adds _total to the names of counters.
_GAUGES = {
    "balancedness": "Mean over MoE layers of mean load / load of the fullest rank, for the last interval of load and the placement in force.",
    "planned_from": "Balancedness of the placement in force for the load that the last plan was made from.",
    "predicted": "Balancedness after the last plan, for the same load.",
    "longest_wait_seconds": "The longest time that a step of the first rank has waited for dynamic EPLB.",
}
_COUNTERS = {
    "intervals": "Intervals of load that were summed over ranks.",
    "rebalances": "Rebalances that were completed.",
    "moves": "Slots that got other weights.",
    "bytes_moved": "Bytes of weights that were sent, over all ranks.",
    "background_seconds": "Seconds from the first transfer of a rebalance to its last change.",
    "waited_seconds": "Seconds that steps of the first rank have waited for dynamic EPLB.",
    "failures": "Plans that failed.",
}


class StatusSender:
    """Sends a worker's status.

    Args:
        address: the path of the socket of the process that serves the metrics.
        model_name: the metrics' label of that name, as vLLM's have it.
    """

    def __init__(self, address: str, model_name: str) -> None:
        """Open a socket that does not wait."""
        self._address, self._model_name = address, model_name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def send(self, status: Status) -> None:
        """Send a status; nothing where nobody receives it."""
        numbers = {name: getattr(status, name) for name in (*_GAUGES, *_COUNTERS)}
        message = numbers | {"model_name": self._model_name, "dropped": status.dropped, "load": cells(status.heat)}
        try:
            self._socket.sendto(json.dumps(message).encode(), self._address)
        except OSError as error:
            _logger.debug("the status of dynamic EPLB is not sent: %s", error)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class Metrics:
    """Prometheus metrics, brought up to date by messages of `StatusSender`.

    Args:
        registry: that they are in.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Register them."""
        label = ("model_name",)
        self._gauges = {
            name: Gauge(PREFIX + name, about, label, registry=registry, multiprocess_mode="mostrecent")
            for name, about in _GAUGES.items()
        }
        self._counters = {name: Counter(PREFIX + name, about, label, registry=registry) for name, about in _COUNTERS.items()}  # fmt: skip
        self._dropped = Counter(PREFIX + "plans_dropped", "Plans that moved nothing.", (*label, "reason"), registry=registry)  # fmt: skip
        self._load = Gauge(
            PREFIX + "rank_load",
            "Tokens of a rank / mean of all ranks, in the last interval: the largest of the MoE layers and ranks that the labels name, counted from 0.",
            (*label, "layers", "ranks"),
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._known: dict[Counter, float] = {}

    def update(self, message: Mapping[str, Any]) -> None:
        """Take over what a message says.

        Raises:
            KeyError, TypeError, ValueError: a message of another form.
        """
        model = str(message["model_name"])
        for name, gauge in self._gauges.items():
            if message[name] is not None:  # before the first plan
                gauge.labels(model).set(float(message[name]))
        for name, counter in self._counters.items():
            self._count(counter.labels(model), float(message[name]))
        for reason, count in message["dropped"].items():
            self._count(self._dropped.labels(model, str(reason)), float(count))
        for layers, ranks, load in message["load"]:
            self._load.labels(model, str(layers), str(ranks)).set(float(load))

    def _count(self, counter: Counter, value: float) -> None:
        """Bring a counter to a sum, which begins anew with an engine that was started again."""
        before = self._known.get(counter, 0.0)
        counter.inc(value - before if value >= before else value)
        self._known[counter] = value


def listen(address: str, metrics: Metrics) -> None:
    """Keep metrics up to date from now on, in a thread.

    Raises:
        OSError: the socket cannot be opened at the address.
    """
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(address)

    def receive() -> None:
        while True:
            message = receiver.recv(_LARGEST_MESSAGE)
            try:
                metrics.update(json.loads(message))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                _logger.warning("a status of dynamic EPLB cannot be read: %s: %s", type(error).__name__, error)

    Thread(target=receive, name="expert metrics", daemon=True).start()
