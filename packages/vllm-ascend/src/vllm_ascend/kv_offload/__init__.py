# SPDX-License-Identifier: Apache-2.0
"""The KV cache's blocks in host memory: vLLM's OffloadingConnector with an NPU's copies."""
