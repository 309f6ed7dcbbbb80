# SPDX-License-Identifier: Apache-2.0
"""All that this package uses of torch_npu, imported on first use. Weights are handed over as ``[in, out]`` views.

Sources: torch_npu/_op_plugin_docs.py in the wheel, and torch_npu/op_plugin/meta for shapes and types.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "dynamic_quant",
    "mm_all_reduce",
    "mm_reduce_scatter",
    "prefetch",
    "quant_matmul",
    "quantize",
    "side_stream",
    "wait_for",
]


def _torch_npu() -> Any:
    """The module, or RuntimeError with the remedy."""
    try:
        import torch_npu
    except ImportError as error:
        raise RuntimeError(
            "this layer's kernels need torch_npu: pip install torch-npu==2.13.0 (and CANN, or ascend-sim where there is no NPU)"
        ) from error
    return torch_npu


def mm_all_reduce(x: Tensor, weight: Tensor, comm_name: str, bias: Tensor | None = None) -> Tensor:
    """The sum over ranks of ``x [n, in] @ weight [in, out] + bias [out]``, in one kernel: on Atlas A2, in steps with prompts.

    Args:
        x: float16 or bfloat16, contiguous, not empty.
        weight: of the same type.
        comm_name: HCCL communicator of 1, 2, 4 or 8 ranks.
        bias: of the same type; what one rank adds is in the sum once.
    """
    result: Tensor = _torch_npu().npu_mm_all_reduce_base(x, weight, comm_name, reduce_op="sum", bias=bias, comm_turn=0)
    return result


def mm_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    comm_name: str,
    world_size: int,
    *,
    token_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """This rank's rows of the sum over ranks of ``x [n, in] @ weight [in, out]``, in one kernel: ``[n / W, out]``.

    Args:
        x: float16, bfloat16 or int8, contiguous, not empty; n a multiple of W.
        weight: of the same type.
        comm_name: HCCL communicator of W ranks.
        world_size: W, one of 2, 4, 8.
        token_scale, weight_scale: int8: float32 ``[n, 1]`` and ``[1, out]``, by which the product is multiplied; the kernel takes both or neither.
        output_dtype: int8: float16 or bfloat16.
    """
    result: Tensor = _torch_npu().npu_mm_reduce_scatter_base(
        x,
        weight,
        comm_name,
        world_size,
        reduce_op="sum",
        bias=None,
        x1_scale=token_scale,
        x2_scale=weight_scale,
        comm_turn=0,
        output_dtype=output_dtype,
        comm_mode="aiv",
    )
    return result


def quantize(x: Tensor, reciprocal_scale: Tensor, offset: Tensor) -> Tensor:
    """``round(x * reciprocal_scale + offset)`` as int8, saturated; both of x's type, one number or one a feature."""
    result: Tensor = _torch_npu().npu_quantize(x, reciprocal_scale, offset, torch.qint8, -1, False)
    return result


def dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [n, in]`` as int8, and the float32 scale ``[n]`` of each token, ``max|x| / 127``."""
    quantised, scale = _torch_npu().npu_dynamic_quant(x)
    return quantised, scale


def quant_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    token_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype,
) -> Tensor:
    """``(x [n, in] @ weight [in, out] + bias) * scale * token_scale`` of int8 operands; not for an empty x.

    Args:
        x: int8.
        weight: int8.
        scale: float32 ``[out]``.
        token_scale: float32 ``[n]``.
        bias: ``[out]``. int32: added before scaling; floating point (with token_scale): after.
        output_dtype: float16 or bfloat16.
    """
    result: Tensor = _torch_npu().npu_quant_matmul(
        x, weight, scale, pertoken_scale=token_scale, bias=bias, output_dtype=output_dtype
    )
    return result


def prefetch(weight: Tensor, dependency: Tensor, max_bytes: int, stream: Any) -> None:
    """Bring up to `max_bytes` of `weight` into the L2 cache, on `stream`, once `dependency` has been computed."""
    npu = _torch_npu()
    stream.wait_stream(npu.npu.current_stream())
    with npu.npu.stream(stream):
        npu.npu_prefetch(weight, dependency, max_bytes)


def side_stream() -> Any:
    """A stream beside the one that computes."""
    return _torch_npu().npu.Stream()


def wait_for(stream: Any) -> None:
    """Let what follows on the current stream wait for what `stream` has been given."""
    _torch_npu().npu.current_stream().wait_stream(stream)
