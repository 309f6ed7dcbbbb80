# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own database of operators: every entry's first sample on the npu against the CPU, with the gradient where there is one."""

import itertools
import warnings

import pytest
import torch
from sim_bounds import unit_roundoff
from torch.utils import _pytree as pytree

pytest.importorskip("expecttest", reason="torch's database of operators needs it: pip install 'ascend-sim[test]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo.core import OpInfo

# Random by purpose: the same shape and kind are all that two devices have in common.
RANDOM = {
    "bernoulli", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal", "rand_like", "randint", "randint_like", "randn",
    "randn_like", "uniform", "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "svd_lowrank",
    "pca_lowrank", "nn.functional.dropout", "nn.functional.dropout2d", "nn.functional.dropout3d", "nn.functional.alpha_dropout",
    "nn.functional.feature_alpha_dropout", "nn.functional.fractional_max_pool2d", "nn.functional.fractional_max_pool3d",
    "nn.functional.multi_head_attention_forward", "nn.functional.rrelu", "nn.functional.scaled_dot_product_attention",
}  # fmt: skip
# Name -> why the npu does not answer as the CPU.
EXCEPTIONS = {
    "tensor_split": "the sample's indices must stay on the CPU, as on every device",
    "to_sparse": "sparse tensors are not simulated",
    "sparse_mm_reduce": "sparse tensors are not simulated",
    "sparse_sampled_addmm": "sparse tensors are not simulated",
}
NO_SAMPLES = {
    "nn_functional_batch_norm_without_cudnn", "torch_ops_aten__efficient_attention_forward", "torch_ops_aten__flash_attention_forward",
}  # fmt: skip
OPERATORS = [
    op for op in op_db if "jiterator" not in op.name and op.formatted_name not in NO_SAMPLES
]  # those are CUDA's


def first_sample(op: OpInfo):
    dtype = (
        next((d for d in (torch.float32, torch.int64, torch.complex64, torch.bool) if d in op.dtypes), None)
        or sorted(op.dtypes, key=str)[0]
    )
    grad = op.supports_autograd and dtype in op.backward_dtypes and (dtype.is_floating_point or dtype.is_complex)
    torch.manual_seed(0)
    return next(iter(op.sample_inputs("cpu", dtype, requires_grad=grad)))


def to_cpu(value):
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def to_npu(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to("npu").requires_grad_(value.requires_grad)
    return torch.device("npu") if isinstance(value, torch.device) or value == "cpu" else value


def run(op: OpInfo, sample, move):
    """Outputs of the operator, and gradients of the sum of its differentiable ones."""
    inputs, args, kwargs = pytree.tree_map(move, (sample.input, sample.args, sample.kwargs))
    torch.manual_seed(1)
    outputs = [
        leaf
        for leaf in pytree.tree_leaves(op(inputs, *args, **kwargs))
        if isinstance(leaf, torch.Tensor | int | float | bool)
    ]
    leaves = [
        leaf
        for leaf in pytree.tree_leaves((inputs, args, kwargs))
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    ]
    differentiable = [out for out in outputs if isinstance(out, torch.Tensor) and out.requires_grad]
    gradients = []
    if leaves and differentiable:
        total = sum((out.abs() if out.is_complex() else out).sum() for out in differentiable)
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return (
        outputs,
        [out.requires_grad for out in outputs if isinstance(out, torch.Tensor)],
        [g for g in gradients if g is not None],
    )


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.formatted_name)
@pytest.mark.filterwarnings("ignore")
def test_the_npu_computes_what_the_cpu_computes(op):
    if op.formatted_name in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[op.formatted_name])
    sample = first_sample(op)
    try:
        expected, expected_flags, expected_gradients = run(op, sample, to_cpu)
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        pytest.skip("oneDNN has no such operator on this processor")
    actual, actual_flags, gradients = run(op, sample, to_npu)
    assert actual_flags == expected_flags
    assert len(gradients) == len(expected_gradients)
    for ours, theirs in zip(
        itertools.chain(actual, gradients), itertools.chain(expected, expected_gradients), strict=True
    ):
        if isinstance(theirs, torch.Tensor):
            assert ours.device.type == "npu"
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
            if op.name not in RANDOM:
                # The same algorithm; only the order of sums may differ. A result that keeps half of its digits is the same.
                floating = (theirs.dtype.is_floating_point or theirs.dtype.is_complex) and theirs.element_size() > 1
                half = unit_roundoff(theirs.dtype) ** 0.5 if floating else 0.0
                torch.testing.assert_close(ours.cpu(), theirs, rtol=half, atol=half, equal_nan=True)
        elif op.name not in RANDOM:
            assert ours == theirs
