# SPDX-License-Identifier: Apache-2.0
"""Runs at every interpreter start (`ascend_sim.pth`), so it only asks to be called when torch is imported.

The stub of CANN must be in the process before `import torch`, because torch imports torch_npu at its end, and torch_npu links against CANN.
The operators must be in place right after `import torch_npu`.
"""

import os
import sys


class _Finder:
    """Watches for the first import of torch and of torch_npu."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN206
        """Never finds a module by itself; see importlib.abc.MetaPathFinder."""
        if name == "torch":
            from ascend_sim import loader

            return loader.torch_spec(name)
        if name == "torch_npu":
            from ascend_sim import loader

            return loader.watched_spec(name)
        return None


def install() -> None:
    """Put the watcher first on `sys.meta_path`, unless ASCEND_SIM=0 switches the simulator off."""
    if os.environ.get("ASCEND_SIM") != "0" and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


install()
