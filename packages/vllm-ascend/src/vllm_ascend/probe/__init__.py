# SPDX-License-Identifier: Apache-2.0
"""Every kernel that the packages call, once on the device in shapes that the product uses, beside what it should compute.

`cases_*.py` have the calls and, in plain torch in float64 on the CPU, their meaning; `child.py` runs them in a process of its own, `ranks.py` those of two
ranks in two processes, and `run.py` starts these and new ones after a kernel that has ended its process or does not answer. Nothing here asks whether the
device is simulated.
"""
