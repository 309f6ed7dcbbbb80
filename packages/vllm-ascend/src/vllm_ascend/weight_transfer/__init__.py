# SPDX-License-Identifier: Apache-2.0
"""Weights from a trainer into an engine that runs, over HCCL: vLLM's weight transfer with the backend "hccl".

A trainer takes `HCCLTrainerInitInfo` and `HCCLTrainerWeightTransferEngine` from `trainer.py`; vLLM makes the engine's half (`worker.py`) in each worker.
"""

from __future__ import annotations

__all__ = ["BACKEND", "register"]

BACKEND = "hccl"
"""The name of this plugin's backend, in vLLM's `weight_transfer_config`."""


def register() -> None:
    """Make both halves known to vLLM, which imports them when they are asked for. Once a process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    WeightTransferEngineFactory.register_engine(BACKEND, f"{__name__}.worker", "HCCLWeightTransferEngine")
    WeightTransferTrainerFactory.register_engine(BACKEND, f"{__name__}.trainer", "HCCLTrainerWeightTransferEngine")
