# SPDX-License-Identifier: Apache-2.0
"""The dispatcher of each communication method."""

from ascend_moe.choose import CommMethod
from ascend_moe.dispatch.all_gather import AllGatherDispatcher
from ascend_moe.dispatch.all_to_all import AllToAllDispatcher
from ascend_moe.dispatch.base import Dispatcher
from ascend_moe.dispatch.mc2 import Mc2Dispatcher
from ascend_moe.env import MoeEnv

__all__ = ["make_dispatcher"]

_DISPATCHERS: dict[CommMethod, type[AllGatherDispatcher] | type[AllToAllDispatcher] | type[Mc2Dispatcher]] = {
    kind.method: kind for kind in (AllGatherDispatcher, AllToAllDispatcher, Mc2Dispatcher)
}


def make_dispatcher(method: CommMethod, env: MoeEnv) -> Dispatcher:
    """The dispatcher of a method, over the groups of `env`.

    Raises:
        ValueError: no such method, or MC2 without `env.mc2`.
    """
    if method not in _DISPATCHERS:
        raise ValueError(f"method={method!r} must be one of {', '.join(str(known) for known in CommMethod)}")
    return _DISPATCHERS[method](env)
