# SPDX-License-Identifier: Apache-2.0
"""All that this package uses of torch_npu, imported on first use."""

from importlib import import_module
from typing import Any

__all__ = ["hccl_process_group_options"]


def hccl_process_group_options(buffer_mb: int) -> Any:
    """`pg_options` for ``torch.distributed.new_group`` that give an HCCL communicator buffers of `buffer_mb` MB.

    Source: Ascend Extension for PyTorch, "HCCL parameters through pg_options" (key ``hccl_buffer_size``, an int in MB).

    Raises:
        RuntimeError: torch_npu is not installed.
    """
    try:
        distributed_c10d = import_module("torch_npu._C._distributed_c10d")
    except ModuleNotFoundError as error:
        raise RuntimeError("backend 'hccl' needs torch_npu: pip install torch-npu==2.13.0") from error
    options = distributed_c10d.ProcessGroupHCCL.Options()
    options.hccl_config = {"hccl_buffer_size": buffer_mb}
    return options
