# SPDX-License-Identifier: Apache-2.0
"""HCCL communicators: the buffer each group gets, and the device memory it costs. Pure arithmetic, no torch.

Every communicator owns two buffers, one to send from and one to receive into, of the size set for it or of
``HCCL_BUFFSIZE`` (200 MB where unset). Source: CANN, "HCCL_BUFFSIZE" in its environment variable reference ("each
communicator occupies 2 x HCCL_BUFFSIZE"). One MB is 2**20 bytes here, as there.
"""

from dataclasses import dataclass

from ascend_comm.topology import check_size

__all__ = ["DEFAULT_BUFFER_MB", "HcclOptions", "data_parallel_buffer_mb", "options_for"]

DEFAULT_BUFFER_MB = 200
_SMALLEST_DATA_PARALLEL_MB = 50
_DYNAMIC_EPLB_MB = 100
_BUFFERS_PER_COMMUNICATOR = 2
_MB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class HcclOptions:
    """What distinguishes two communicators over the same ranks. Groups of equal ranks and options share one handle.

    Args:
        buffer_mb: size of one of the two buffers in MB. None leaves it to the environment variable HCCL_BUFFSIZE, which
            some kernels read for themselves.
        lane: collectives of one lane run one after the other. What has to overlap with the layers' own (weights
            streamed ahead, expert moves) has a lane, and so a communicator, of its own.

    Raises:
        ValueError: `buffer_mb` below 1.
    """

    buffer_mb: int | None = DEFAULT_BUFFER_MB
    lane: str = "layers"

    def __post_init__(self) -> None:
        """Check the size."""
        if self.buffer_mb is not None:
            check_size("buffer_mb", self.buffer_mb)

    def memory_bytes(self, hccl_buffsize_mb: int = DEFAULT_BUFFER_MB) -> int:
        """Device memory of one communicator in bytes.

        Args:
            hccl_buffsize_mb: what HCCL_BUFFSIZE says, in MB; used where `buffer_mb` is None.
        """
        buffer_mb = hccl_buffsize_mb if self.buffer_mb is None else self.buffer_mb
        return _BUFFERS_PER_COMMUNICATOR * buffer_mb * _MB


def data_parallel_buffer_mb(data_parallel: int) -> int:
    """Buffer in MB of the `dp` group, for one int32 per rank and one more: max(50, ceil((dp + 1) * 4 / 2**20))."""
    check_size("data_parallel", data_parallel)
    return max(_SMALLEST_DATA_PARALLEL_MB, -(-(data_parallel + 1) * 4 // _MB))


def options_for(name: str, data_parallel: int) -> HcclOptions:
    """The options of the group called `name` (see `GroupConfig.families`) where there are `data_parallel` replicas.

    `mc2` follows HCCL_BUFFSIZE, because its kernels read that; `dp` and `dynamic_eplb` need little; all others get 200
    MB.
    """
    if name == "mc2":
        return HcclOptions(buffer_mb=None)
    if name == "dp":
        return HcclOptions(buffer_mb=data_parallel_buffer_mb(data_parallel))
    if name == "dynamic_eplb":
        return HcclOptions(buffer_mb=_DYNAMIC_EPLB_MB, lane="experts")
    if name == "shard_weight":
        return HcclOptions(lane="weights")
    return HcclOptions()
