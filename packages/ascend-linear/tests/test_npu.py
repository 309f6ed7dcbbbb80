# SPDX-License-Identifier: Apache-2.0
"""Every op on the simulated NPU over hccl, in 2, 4 and 8 processes. What hardware refuses is refused in two of them."""

import npu_cases
import pytest
from spawned import RELAXED, STRICT, spawn


@pytest.mark.parametrize(
    ("case", "world", "environment"),
    [
        (npu_cases.strict_2, 2, STRICT),
        (npu_cases.strict_4, 4, STRICT),
        (npu_cases.relaxed_8, 8, RELAXED),
    ],
)
def test_over_hccl(case, world, environment, tmp_path):
    spawn(case, world, tmp_path, environment)
