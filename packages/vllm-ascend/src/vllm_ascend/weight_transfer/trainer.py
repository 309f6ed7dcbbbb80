# SPDX-License-Identifier: Apache-2.0
"""A trainer's half of a weight transfer: vLLM's for NCCL, over a group of HCCL, and with the failures of either side noticed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient, WeightSource
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from vllm_ascend import compat
from vllm_ascend.weight_transfer import BACKEND
from vllm_ascend.weight_transfer.group import TransferGroup
from vllm_ascend.weight_transfer.worker import HCCLWeightTransferInitInfo

__all__ = ["HCCLTrainerInitInfo", "HCCLTrainerWeightTransferEngine"]


@dataclass
class HCCLTrainerInitInfo(NCCLTrainerInitInfo):
    """Where the trainer listens, and how weights are sent. vLLM's `WeightTransferTrainerFactory` finds the engine by it.

    Args:
        master_address: of this host, as the workers reach it.
        master_port: of it, for the transfer. 0: any that is free.
        world_size: the trainer's one sender and all workers (tensor x pipeline x data parallel).
        packed: gather tensors in buffers, and broadcast those.
        packed_buffer_size_bytes: of one buffer; the largest tensor may exceed it.
        packed_num_buffers: how many are filled and sent in turn.
        timeout_seconds: how long one side waits for the other, at the start and before each broadcast.
        rank: this process's among those of the trainer; 0 sends, the others only take part in what the source gathers.
    """

    backend: ClassVar[str] = BACKEND

    timeout_seconds: float = 600.0


class HCCLTrainerWeightTransferEngine(NCCLTrainerWeightTransferEngine):
    """Sends a model's weights to the workers of an engine, one round for each `send_weights`.

    In the trainer's process `torch.cuda`'s streams then mean the NPU's (vLLM's half is written in their names). After a failure the engine is built anew
    by `trainer_init`, after `shutdown`.
    """

    init_info_cls = HCCLTrainerInitInfo
    model_update_group: TransferGroup | None  # type: ignore[assignment]  # vLLM's engine is typed for NCCL's

    @classmethod
    def trainer_init(  # type: ignore[override]  # and this
        cls, init_info: HCCLTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        """Meet the workers. Every rank of the trainer calls it, with its own device current.

        Args:
            init_info: how.
            client: of the engine's server, or of the engine itself.
            source: the weights, by their names in a checkpoint.

        Raises:
            ValueError: no source.
            RuntimeError: the port is taken, a worker has failed, or two ranks use one device.
            TimeoutError: a worker did not come.
        """
        if source is None:
            raise ValueError("weight transfer over HCCL needs a source of weights, such as vLLM's ModuleSource(model)")
        compat.alias_cuda_streams()
        engine = cls(
            client=client,
            source=source,
            is_sender=init_info.is_sender,
            packed=init_info.packed,
            packed_buffer_size_bytes=init_info.packed_buffer_size_bytes,
            packed_num_buffers=init_info.packed_num_buffers,
        )
        if not engine.is_sender:
            return engine
        group = TransferGroup(
            init_info.master_address, init_info.master_port, 0, init_info.world_size, init_info.timeout_seconds
        )
        engine.model_update_group, engine.client = group, _Watched(client, group)
        wire = HCCLWeightTransferInitInfo(
            rank_offset=1,
            **{key: value for key, value in asdict(init_info).items() if key != "rank"} | {"master_port": group.port},
        )
        try:
            with ThreadPoolExecutor(max_workers=1) as pool:  # the workers answer once the group is formed
                answer = pool.submit(engine.client.init_weight_transfer_engine, asdict(wire))
                try:
                    group.join()
                except RuntimeError:
                    if answer.done():
                        answer.result()  # what the server said is the reason
                    raise
                answer.result()
        except BaseException:
            engine.shutdown()
            raise
        return engine

    def send_weights(self) -> None:
        """Send all weights, and return when the engine computes with them. Every rank of the trainer calls it.

        Raises:
            RuntimeError: a worker has failed. Its engine goes on with what had come of whole layers; send everything anew after `trainer_init`.
            TimeoutError: a worker did not come.
        """
        try:
            super().send_weights()
        except BaseException as error:
            if self.model_update_group is not None:
                self.model_update_group.fail(error)
            raise

    def _post_send_sync(self) -> None:
        torch.npu.current_stream().synchronize()


class _Watched:
    """A client whose failed calls are told to the group, so that the trainer does not wait there for workers that will not come."""

    def __init__(self, client: VLLMWeightSyncClient, group: TransferGroup) -> None:
        self._client, self._group = client, group

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            try:
                return call(*arguments, **named)
            except BaseException as error:
                self._group.fail(error)
                raise

        return watched
