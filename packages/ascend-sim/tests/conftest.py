# SPDX-License-Identifier: Apache-2.0
"""Imports torch before pytest makes errors of warnings: torch_npu's own source has some (invalid escape sequences)."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch  # noqa: F401
