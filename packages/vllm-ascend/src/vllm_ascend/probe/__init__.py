# SPDX-License-Identifier: Apache-2.0
"""Every kernel that the packages call, once on the device in shapes that the product uses, beside what it should compute.

`cases_*.py` have the calls and, in plain torch in float64 on the CPU, their meaning; `child.py` runs them in a process of its own, `run.py` starts that
process and another one after a kernel that has ended it or does not answer. Nothing here asks whether the device is simulated.
"""
