# SPDX-License-Identifier: Apache-2.0
"""Breaks and edges of the rules of normalisations."""

import torch
import torch_npu
from contract_cases import Case, case


def rms_norm(shape=(2, 16), dtype=torch.bfloat16, gamma=(16,), gamma_dtype=None):
    weight = torch.ones(gamma, dtype=gamma_dtype or dtype).npu()
    return torch_npu.npu_rms_norm(torch.ones(shape, dtype=dtype).npu(), weight, 1e-6)


def add_rms_norm(shape=(2, 16), dtype=torch.bfloat16, gamma=(16,), gamma_dtype=None, x2=None, x2_dtype=None):
    weight, other = (
        torch.ones(gamma, dtype=gamma_dtype or dtype).npu(),
        torch.ones(x2 or shape, dtype=x2_dtype or dtype).npu(),
    )
    return torch_npu.npu_add_rms_norm(torch.ones(shape, dtype=dtype).npu(), other, weight, 1e-6)


def of_both(call):
    """The rules that both operators have, for `call`."""
    return {
        "dtype": case(lambda: call(dtype=torch.int32), lambda: call(dtype=torch.float32)),
        "rank": Case(
            breaks=[lambda: call((16,)), lambda: call((1,) * 8 + (16,))],
            edges=[lambda: call((1, 16)), lambda: call((1,) * 7 + (16,))],
        ),
        "gamma-dtype": case(lambda: call(gamma_dtype=torch.float32), lambda: call(gamma_dtype=torch.bfloat16)),
        "gamma-shape": case(lambda: call(gamma=(8,)), lambda: call(gamma=(2, 16))),
    }


CASES = {
    **{f"npu_rms_norm.{name}": one for name, one in of_both(rms_norm).items()},
    **{f"npu_add_rms_norm.{name}": one for name, one in of_both(add_rms_norm).items()},
    "npu_add_rms_norm.x2-shape": case(lambda: add_rms_norm(x2=(1, 16)), lambda: add_rms_norm(x2=(2, 16))),
    "npu_add_rms_norm.x2-dtype": case(
        lambda: add_rms_norm(x2_dtype=torch.float16), lambda: add_rms_norm(x2_dtype=torch.bfloat16)
    ),
}
