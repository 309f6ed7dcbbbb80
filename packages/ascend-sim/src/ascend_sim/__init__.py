# SPDX-License-Identifier: Apache-2.0
"""A simulated Ascend NPU: the real torch_npu over a stub of CANN, with the numbers computed on the CPU.

Importing this package does nothing. The simulator starts by itself when a process imports torch (see `ascend_sim.loader`).
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
