# SPDX-License-Identifier: Apache-2.0
"""Running a placement of ascend-eplb in an engine: where experts lie, and how many tokens they get."""
