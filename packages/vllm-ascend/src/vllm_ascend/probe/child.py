# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_ascend.probe.child N`: run the cases from number N on, and print a JSON line before and after each.

The process ends after a case that the runtime refuses: an error of the device may be that of all that follows.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from vllm_ascend.probe import cases_attention, cases_dense, cases_linear, cases_moe, cases_weight_only
from vllm_ascend.probe.expected import Case, Result, compare

__all__ = ["FAMILIES", "all_cases", "main", "run"]

FAMILIES = (cases_dense, cases_attention, cases_linear, cases_moe, cases_weight_only)


def all_cases() -> list[Callable[[], Case]]:
    """What builds each case, in the order in which they run."""
    return [build for family in FAMILIES for build in family.cases()]


def run(case: Case) -> Result:
    """Call the kernel and wait for it; an error of the runtime is the result "refused" with its words."""
    try:
        outputs = case.call(*(tensor.to("npu") for tensor in case.inputs))
        torch.accelerator.synchronize()
        found = [output.cpu() for output in outputs]
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        said = " ".join((str(error).strip() or repr(error)).split())
        return Result(kernel=case.kernel, shape=case.shape, verdict="refused", detail=said)
    return compare(case, found)


def _lines(first: int) -> Iterator[dict[str, Any]]:
    builders = all_cases()
    yield {"cases": len(builders)}
    for number in range(first, len(builders)):
        case = builders[number]()
        yield {"begins": number, "kernel": case.kernel, "shape": case.shape}
        result = run(case)
        yield {"ends": number, **asdict(result)}
        if result.verdict == "refused":
            return


def main() -> None:
    """Entry point of the process."""
    importlib.import_module("torch_npu")
    torch.accelerator.set_device_index(0)
    with torch.inference_mode():
        for line in _lines(int(sys.argv[1])):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
