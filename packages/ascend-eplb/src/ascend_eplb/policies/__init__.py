# SPDX-License-Identifier: Apache-2.0
"""Balancing policies: functions from a `Problem` to a `Placement`, found by name in `registry`."""
