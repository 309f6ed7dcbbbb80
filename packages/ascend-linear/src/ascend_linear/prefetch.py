# SPDX-License-Identifier: Apache-2.0
"""Weight prefetch: while something else computes, the next layer's weight is brought into the L2 cache.

It pays in decode, where a product is bound by reading its weight; with many tokens it only takes bandwidth.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ascend_linear import kernels

__all__ = ["PrefetchConfig", "WeightPrefetcher"]

_MODULES = ("qkv", "o", "gate_up", "down")
_MB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchConfig:
    """What is prefetched.

    Args:
        ratios: share of the weight of each of "qkv", "o", "gate_up" and "down", 0 to 1. Left out: 0.
        max_tokens: tokens of a step up to which it is worth it. Empirical.
        max_bytes: at most so much of a weight: what the L2 cache can spare. Empirical, for Atlas A2 and A3.

    Raises:
        ValueError: an unknown name, a ratio outside 0 to 1, a negative limit.
    """

    ratios: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(_MODULES, 1.0))
    max_tokens: int = 500
    max_bytes: int = 18 * _MB

    def __post_init__(self) -> None:
        """Check."""
        for name, ratio in self.ratios.items():
            if name not in _MODULES:
                raise ValueError(f"ratios={dict(self.ratios)}: {name!r} is unknown; allowed are {', '.join(_MODULES)}")
            if not 0 <= ratio <= 1:
                raise ValueError(f"ratios[{name!r}]={ratio}: must be 0 to 1")
        for name in ("max_tokens", "max_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0")

    def bytes_of(self, module: str, weight: Tensor, tokens: int) -> int:
        """How much of `weight` is prefetched in a step of `tokens` tokens; 0: nothing."""
        if tokens > self.max_tokens:
            return 0
        whole = weight.numel() * weight.element_size()
        return min(int(whole * self.ratios.get(module, 0.0)), self.max_bytes)


class WeightPrefetcher:
    """Prefetches on a side stream of its own. One for each device.

    Args:
        config: what is prefetched.
    """

    def __init__(self, config: PrefetchConfig) -> None:
        """The stream is made at the first prefetch."""
        self.config = config
        self._stream: Any = None
        self._running = False

    def start(self, module: str, weight: Tensor, dependency: Tensor) -> bool:
        """Prefetch `weight` from when `dependency` is computed on.

        Args:
            module: "qkv", "o", "gate_up" or "down".
            weight: what the coming product will read.
            dependency: ``[tokens, ...]``, computed just now on the current stream.

        Returns:
            Whether there was something to do.

        Raises:
            RuntimeError: torch_npu is missing.
        """
        size = self.config.bytes_of(module, weight, dependency.shape[0])
        if size == 0:
            return False
        if self._stream is None:
            self._stream = kernels.side_stream()
        kernels.prefetch(weight, dependency, size, self._stream)
        self._running = True
        return True

    def finish(self) -> None:
        """After the product: the current stream waits for the prefetches, so that they do not pile up."""
        if self._running:
            kernels.wait_for(self._stream)
        self._running = False
