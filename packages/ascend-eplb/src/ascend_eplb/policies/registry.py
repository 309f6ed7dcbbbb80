# SPDX-License-Identifier: Apache-2.0
"""The policies by name."""

from __future__ import annotations

from types import MappingProxyType

from ascend_eplb.policies.balanced import balanced
from ascend_eplb.policies.base import Policy
from ascend_eplb.policies.deepseek import deepseek
from ascend_eplb.policies.incremental import incremental, swift

__all__ = ["POLICIES", "find_policy", "policy_names"]

POLICIES = MappingProxyType({"balanced": balanced, "incremental": incremental, "swift": swift, "deepseek": deepseek})


def policy_names() -> tuple[str, ...]:
    """The names of the policies that `rebalance` accepts.

    O(1). No errors.
    Source: the registry.
    """
    return tuple(POLICIES)


def find_policy(policy: str | Policy) -> Policy:
    """The policy of this name, or the function itself where it is one already.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    if callable(policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is not one of {', '.join(POLICIES)}")
    return POLICIES[policy]
