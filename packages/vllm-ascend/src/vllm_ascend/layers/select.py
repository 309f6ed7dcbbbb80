# SPDX-License-Identifier: Apache-2.0
"""Which op a linear layer of a model gets. No vLLM here: `vllm-ascend explain` asks the same question without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ascend_linear import LinearEnv, Selected, get_parallel_op, layer_index
from ascend_linear.select import Rule

__all__ = ["select"]

# Column layers that need no op under FlashComm1: what precedes them has gathered the tokens.
_GATHERED_BEFORE = ("q_b_proj", "kv_b_proj")


def select(
    direction: Literal["column", "row"],
    prefix: str,
    env: LinearEnv,
    *,
    disable_tp: bool = False,
    rules: Sequence[Rule] | None = None,
) -> Selected:
    """The op of a layer, as `get_parallel_op` has it, and a check that every layer to which FlashComm1 brings split tokens knows of that.

    Raises:
        ValueError: FlashComm1 splits tokens before this layer, and no op of it knows of that.
    """
    chosen = get_parallel_op(direction, prefix, env, disable_tp=disable_tp, rules=rules)
    name = prefix.rpartition(".")[2]
    if env.enable_flashcomm1 and chosen.op is None and not disable_tp and name not in _GATHERED_BEFORE:
        # A neighbour that FlashComm1 is made for tells whether tokens are split here: not in towers, shared experts or outside of layers.
        only = LinearEnv(tp=env.tp, enable_flashcomm1=True)
        neighbour = get_parallel_op("row", f"{prefix.rpartition('.')[0]}.o_proj", only)
        if layer_index(prefix) is not None and neighbour.op is not None:
            raise ValueError(
                f"option 'enable_flashcomm1' (True) cannot be used with this model: its layer {prefix!r} does not know of split tokens"
            )
    return chosen
