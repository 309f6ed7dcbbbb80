# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: what vLLM computes with Triton kernels by operators of torch, and the exact lengths that attention takes from the host."""
