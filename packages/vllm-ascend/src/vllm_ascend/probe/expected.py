# SPDX-License-Identifier: Apache-2.0
"""What a kernel should return, and by how much it may differ: bounds from the arithmetic of the data types.

`unit(dtype)` is the relative error of one rounding. A kernel reads its inputs as they are, computes in float32, and may round to the data type of its inputs
where a step ends, as the kernels of CANN do; so a bound has a few units of the data type, and one of float32 for each operation of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["FLOAT32", "Case", "Expected", "Result", "compare", "exactly", "random", "rounded", "unit"]

FLOAT32 = 2.0**-24


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """One output.

    Attributes:
        value: float64 or integers.
        allowed: float64 of the same shape, the largest difference; 0 where the output must be exact.
        written: bool of the same shape; False where nothing is promised. None: all.
    """

    value: Tensor
    allowed: Tensor
    written: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call of a kernel.

    Attributes:
        kernel: package and function, as in "ascend_moe.permute".
        shape: what is particular about the call.
        inputs: on the CPU.
        call: given the inputs on the device, the outputs.
        expected: given the inputs on the CPU, what the outputs should be.
    """

    kernel: str
    shape: str
    inputs: Sequence[Tensor]
    call: Callable[..., Sequence[Tensor]]
    expected: Callable[..., Sequence[Expected]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A row of the table.

    Attributes:
        kernel, shape: of the case.
        verdict: "equal" (bit for bit what the exact result rounds to), "within bound", "different", "refused", "no answer" or "not run".
        detail: of the largest difference, or the runtime's own words.
    """

    kernel: str
    shape: str
    verdict: str
    detail: str = field(default="")

    @property
    def is_good(self) -> bool:
        """Whether the kernel did what it should."""
        return self.verdict in ("equal", "within bound", "not run")


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers on the CPU, the same on every machine."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def exactly(value: Tensor, written: Tensor | None = None) -> Expected:
    """An output that must be exact."""
    return Expected(value=value, allowed=torch.zeros(value.shape, dtype=torch.float64), written=written)


def rounded(value: Tensor, error: Tensor) -> Expected:
    """int8 of float64 `value`, which the kernel computes within `error`: the neighbour is as good where a tie is that near."""
    whole = value.round().clamp(-128, 127)
    to_tie = ((value - value.floor()) - 0.5).abs()
    return Expected(value=whole, allowed=(to_tie <= error).double())


def compare(case: Case, outputs: Sequence[Tensor]) -> Result:
    """The row of a case whose kernel has returned `outputs`, on the CPU."""
    expected = case.expected(*case.inputs)
    same, worst, detail = True, 0.0, ""
    for index, (found, wanted) in enumerate(zip(outputs, expected, strict=True)):
        where = torch.ones(wanted.value.shape, dtype=torch.bool) if wanted.written is None else wanted.written
        if found.shape != wanted.value.shape:
            return _result(
                case, "different", f"output {index} has shape {list(found.shape)}, not {list(wanted.value.shape)}"
            )
        same &= bool((found == wanted.value.to(found.dtype))[where].all())
        difference = torch.where(where, (found.double() - wanted.value.double()).abs(), 0.0)
        difference = difference.nan_to_num(nan=torch.inf, posinf=torch.inf)
        excess = torch.where(difference > 0, difference / wanted.allowed, 0.0)  # infinite where nothing is allowed
        if excess.numel() and excess.max() > worst:
            worst, place = float(excess.max()), int(excess.argmax())
            detail = (
                f"output {index}: at most {float(difference.flatten()[place]):.3g} off, of {float(wanted.allowed.flatten()[place]):.3g} allowed "
                f"at {[int(i) for i in torch.unravel_index(torch.tensor(place), found.shape)]}"
            )
    if same:
        return _result(case, "equal", "")
    return _result(case, "within bound" if worst <= 1 else "different", detail)


def _result(case: Case, verdict: str, detail: str) -> Result:
    return Result(kernel=case.kernel, shape=case.shape, verdict=verdict, detail=detail)
