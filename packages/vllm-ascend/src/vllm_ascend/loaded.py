# SPDX-License-Identifier: Apache-2.0
"""Which elements of a model's parameters weight loaders have written: what tells a complete checkpoint from one that lacks tensors. No vLLM.

A loader of vLLM copies a shard of a checkpoint's tensor into a part of a parameter, and what it does not reach keeps whatever the memory held.
Names alone do not show that (a fused parameter counts as loaded as soon as one of its parts is), and values do not either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import product
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LoadRecord", "Region", "region_of"]

Region = tuple[int, tuple[int, ...], tuple[int, ...]]
"""A part of a tensor's memory: offset, sizes and strides, in elements."""


def region_of(view: Tensor) -> Region:
    """The part of its memory that a tensor shows."""
    return int(view.storage_offset()), tuple(view.shape), tuple(view.stride())


class LoadRecord(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, untyped
    """Notes, while it is entered, which elements of parameters are written by any operator, on any device, the meta device among them.

    Args:
        parameters: by name. A parameter whose memory is exchanged meanwhile (`parameter.data = ...`) counts as written.

    Attributes:
        parameters: those that were given.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Store the parameters, none of which is written yet."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch's, untyped
        self.parameters = dict(parameters)
        self._storages = {name: _storage(parameter) for name, parameter in self.parameters.items()}
        # Holding on to the memory keeps its address from being given to another tensor.
        self._held = [parameter.untyped_storage() for parameter in self.parameters.values()]
        self._written: dict[int, set[Region]] = {storage: set() for storage in self._storages.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note what it has written."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for position, name in _outputs_of(func):
            target = args[position] if position < len(args) else kwargs.get(name)
            if isinstance(target, Tensor) and (regions := self._written.get(_storage(target))) is not None:
                regions.add(region_of(target))
        return result

    def touched(self, name: str) -> bool:
        """Whether any element of the parameter has been written."""
        return self._exchanged(name) or bool(self._written[self._storages[name]])

    def unwritten(self, name: str, parts: Mapping[str, Region]) -> list[str]:
        """Those of `parts`, which together are the parameter `name`, that have elements that were not written."""
        if self._exchanged(name):
            return []
        written = _merged(run for region in self._written[self._storages[name]] for run in _runs(region))
        return [label for label, region in parts.items() if not _covers(written, _merged(_runs(region)))]

    def written_elements(self, name: str) -> int:
        """How many elements of the parameter have been written, each counted once."""
        if self._exchanged(name):
            return self.parameters[name].numel()
        return sum(
            end - begin
            for begin, end in _merged(run for region in self._written[self._storages[name]] for run in _runs(region))
        )

    def _exchanged(self, name: str) -> bool:
        return _storage(self.parameters[name]) != self._storages[name]


def _storage(tensor: Tensor) -> int:
    """What all views of one piece of memory have in common, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


@cache
def _outputs_of(func: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an operator writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((at, one.name) for at, one in arguments if one.alias_info is not None and one.alias_info.is_write)


def _runs(region: Region) -> Iterator[tuple[int, int]]:
    """The region as runs of consecutive elements, `(begin, end)`."""
    offset, sizes, strides = region
    if 0 in sizes:
        return
    axes = sorted((stride, size) for stride, size in zip(strides, sizes, strict=True) if stride and size > 1)
    length = 1
    while axes and axes[0][0] == length:  # an axis along which the run goes on
        length *= axes.pop(0)[1]
    for steps in product(*(range(0, stride * size, stride) for stride, size in axes)):
        begin = offset + sum(steps)
        yield begin, begin + length


def _merged(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same elements in the fewest runs, ascending."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(runs):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _covers(written: list[tuple[int, int]], wanted: list[tuple[int, int]]) -> bool:
    """Whether every run of `wanted` lies within one of `written`; both as `_merged` gives them."""
    at = 0
    for begin, end in wanted:
        while at < len(written) and written[at][1] < end:
            at += 1
        if at == len(written) or written[at][0] > begin:
            return False
    return True
