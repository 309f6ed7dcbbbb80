# SPDX-License-Identifier: Apache-2.0
"""Tokens to the ranks of their experts and back, one communication method a file."""

from ascend_moe.dispatch.base import Dispatched, Dispatcher
from ascend_moe.dispatch.registry import make_dispatcher

__all__ = ["Dispatched", "Dispatcher", "make_dispatcher"]
