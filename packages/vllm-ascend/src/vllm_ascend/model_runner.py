# SPDX-License-Identifier: Apache-2.0
"""vLLM's V1 model runner on an NPU."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ascend import compat

__all__ = ["AscendModelRunner"]


class AscendModelRunner(GPUModelRunner):
    """The GPU runner, with NPU streams and events."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        """Build vLLM's runner on `device`."""
        compat.alias_cuda_streams()
        super().__init__(vllm_config, device)
