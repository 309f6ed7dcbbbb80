# SPDX-License-Identifier: Apache-2.0
"""Layers with a recurrent state in the place of keys and values: Mamba, Mamba2 and the gated delta net, by single operators of torch.

vLLM's own layers call Triton kernels. Here a class for each mixer keeps vLLM's constructor, weights and projections, and computes what lies between the
projections with the functions of `convolution.py`, `scan.py` and `delta_rule.py`, which know nothing of vLLM.
"""

from __future__ import annotations

from functools import cache

__all__ = ["register"]


@cache
def register() -> None:
    """Replace vLLM's layers, once a process, for a model that has such; others are spared the imports."""
    from vllm_ascend import compat
    from vllm_ascend.layers.mamba import gated_delta_net, mixers

    compat.copy_states_of_blocks()
    mixers.register()
    gated_delta_net.register()
