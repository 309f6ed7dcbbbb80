# SPDX-License-Identifier: Apache-2.0
"""An engine's half of a weight transfer, one in each worker: vLLM's for NCCL, over a group of HCCL, and with the check that a layer has come as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.distributed.weight_transfer.base import WeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo

from vllm_ascend.loader import WeightsAnew
from vllm_ascend.weight_transfer.group import TransferGroup

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig

__all__ = ["HCCLWeightTransferEngine", "HCCLWeightTransferInitInfo"]


@dataclass(kw_only=True)
class HCCLWeightTransferInitInfo(WeightTransferInitInfo):
    """What the trainer tells the workers, as `HCCLTrainerInitInfo` has it; the first worker has the rank `rank_offset`."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    packed: bool
    packed_buffer_size_bytes: int
    packed_num_buffers: int
    timeout_seconds: float


class HCCLWeightTransferEngine(NCCLWeightTransferEngine):
    """Receives weights, which vLLM's layerwise reloading puts into the parameters that run: tensors keep their addresses, and graphs stay valid.

    Layers of which nothing is sent keep their weights. What is sent of others must be all of them.
    """

    init_info_cls = HCCLWeightTransferInitInfo  # type: ignore[assignment]  # vLLM's engine is typed for NCCL's
    model_update_group: TransferGroup | None  # type: ignore[assignment]  # so is this

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module
    ) -> None:
        """Nothing is received before `init_transfer_engine`."""
        super().__init__(config, vllm_config, device, model)
        self._anew: WeightsAnew | None = None

    def init_transfer_engine(self, init_info: HCCLWeightTransferInitInfo) -> None:  # type: ignore[override]  # and this
        """Meet the trainer, leaving the one before it.

        Raises:
            RuntimeError: the trainer cannot be reached, or a member has failed.
            TimeoutError: the trainer did not come.
        """
        self.shutdown()
        self.packed = init_info.packed
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        self.packed_num_buffers = init_info.packed_num_buffers
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        group = TransferGroup(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.timeout_seconds
        )
        try:
            group.join()
        except BaseException as error:
            group.fail(error)
            raise
        self.model_update_group = group

    def start_weight_update(self) -> None:
        """Lay the parameters out as a checkpoint has them."""
        self._anew = WeightsAnew(self.model, self.model_config, "what the trainer has sent")
        super().start_weight_update()
        self._anew.expect()

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive a round's weights, or a part of them.

        Raises:
            RuntimeError: no trainer, or a member has failed.
            ValueError: a tensor that the model does not have, or of another shape. Layers that were complete have the new weights, all others the old ones.
        """
        assert self._anew is not None
        try:
            with self._anew.loading():
                super().receive_weights(update_info)
        except BaseException as error:
            if isinstance(error, AssertionError):  # vLLM's loaders assert shapes, without a word
                error = ValueError(
                    "a tensor that the trainer has sent does not have the shape that the model's checkpoint has"
                )
            if self.model_update_group is not None:
                self.model_update_group.fail(error)
            raise error

    def finish_weight_update(self) -> None:
        """Compute what is derived from the weights.

        Raises:
            ValueError: parts of a layer that have not come. Layers that were complete have the new weights, all others the old ones.
        """
        assert self._anew is not None
        self._anew.refuse_missing(partial=True)
        super().finish_weight_update()
