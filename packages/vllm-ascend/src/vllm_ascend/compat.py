# SPDX-License-Identifier: Apache-2.0
"""Every patch of vLLM or torch, one function each, with the reason and what will retire it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vllm_ascend import multimodal

__all__ = [
    "accept_profiler",
    "alias_cuda_streams",
    "copy_states_of_blocks",
    "declare_torchvision_operators",
    "drop_late_answers",
    "name_missing_libraries",
    "replace_fused_topk",
    "replace_gemma4_routing",
    "replace_gptq_and_awq_methods",
    "replace_grouped_topk",
    "replace_model_loader",
    "replace_triton_kernels",
    "shard_of",
]


def accept_profiler() -> None:
    """Let vLLM's worker accept `--profiler-config` with the profiler "torch" on an NPU.

    Reason: `vllm/profiler/wrapper.py` has tables of its own devices, by which it refuses all others. Retired by: a hook for platforms there.
    """
    from vllm.profiler import wrapper

    wrapper._SUPPORTED_PROFILER_KINDS["npu"] = frozenset({"torch"})
    wrapper._DEFAULT_TORCH_PROFILER_ACTIVITIES["npu"] = ("CPU",)
    wrapper._SUPPORTED_TORCH_PROFILER_ACTIVITIES["npu"] = frozenset({"CPU"})


def alias_cuda_streams() -> None:
    """Let `torch.cuda.Stream`, `Event` and their kin mean the NPU's.

    Reason: vLLM 0.32's V1 model runner names torch.cuda for its copy streams (asynchronous scheduling).
    Both stay classes, for torch asks `isinstance` of them. Retired by: vLLM using `torch.Stream`/`torch.Event` there, as its V2 runner begins to do.
    """
    torch.cuda.Stream = torch.npu.Stream  # type: ignore[misc]
    torch.cuda.Event = torch.npu.Event  # type: ignore[misc]
    torch.cuda.stream = torch.npu.stream
    torch.cuda.current_stream = torch.npu.current_stream
    torch.cuda.default_stream = torch.npu.default_stream
    torch.cuda.set_stream = torch.npu.set_stream


@contextmanager
def shard_of(module: ModuleType, rank: int, size: int) -> Iterator[None]:
    """Let a layer of vLLM's `module` that is constructed within take shard `rank` of `size`, not its place in the TP group.

    Reason: the constructors of MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear and ParallelLMHead take no rank and size;
    they ask these two functions, as names of their module. Retired by: `tp_rank` and `tp_size` as arguments, which ColumnParallelLinear has.
    """
    names = {"get_tensor_model_parallel_rank": rank, "get_tensor_model_parallel_world_size": size}
    kept = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, lambda value=value: value)
        yield
    finally:
        for name, function in kept.items():
            setattr(module, name, function)


def replace_grouped_topk(grouped_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Let vLLM's router of grouped experts choose with `grouped_topk`.

    Reason: `GroupedTopKRouter` calls a function of its module, not the CustomOp `GroupedTopk` that could be replaced, and what that function compiles
    is ten operators where the NPU has one. Retired by: the router going through its CustomOp.
    """
    from vllm.model_executor.layers.fused_moe.router import grouped_topk_router

    grouped_topk_router.grouped_topk = grouped_topk


def replace_fused_topk(fused_topk: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """Let vLLM's router of ungrouped experts choose with `fused_topk`.

    Reason: its own function has a compiled operator write into tensors that it has made; what the NPU's kernel returns would be copied there.
    Retired by: the router going through a CustomOp.
    """
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router

    fused_topk_router.fused_topk = fused_topk


def replace_gemma4_routing(routing: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Let Gemma 4's router choose experts by another function.

    Reason: vLLM 0.32 has a Triton kernel for CUDA, and else a function whose `one_hot` brings numbers to the host, which no graph can capture.
    Retired by: a hook for platforms there, or a function without `one_hot`.
    """
    from vllm.model_executor.models import gemma4

    gemma4.gemma4_routing_function_torch = routing


def replace_gptq_and_awq_methods(gptq_linear_method: type, awq_method: Callable[..., Any]) -> None:
    """Let linear layers of GPTQ and AWQ checkpoints take the methods that are given.

    Reason: GPTQ's own method asks CUDA's Marlin kernel whether it takes the type of the weights, and AWQ's chooses a Triton kernel wherever the device is
    not CUDA, XPU or CPU, before either asks for a kernel of the platform. Retired by: both asking `choose_mp_linear_kernel` alone, as compressed-tensors does.
    """
    from vllm.model_executor.layers.quantization import auto_awq, auto_gptq

    auto_gptq.AutoGPTQLinearMethod = gptq_linear_method  # type: ignore[assignment,misc]
    auto_awq.AutoAWQConfig.get_quant_method = awq_method  # type: ignore[method-assign]


def drop_late_answers() -> None:
    """Let a call of all workers get none of an earlier call's answers.

    Reason: where one worker fails, `MultiprocExecutor.collective_rpc` raises and leaves the answers of the workers after it in their queues. From then on
    each call of all workers gets those of the call before: a failure is reported for the next call, and a step may be answered by an older one.
    Retired by: vLLM reading all answers, or telling them apart (its pull request 57846).
    """
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

    call = MultiprocExecutor.collective_rpc
    late: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # answers of calls that have failed, by queue

    def read(queue: Any, left: Callable[[], float | None]) -> Any:
        while late.get(queue):
            queue.dequeue(timeout=left())
            late[queue] -= 1
        return queue.dequeue(timeout=left())

    def collective_rpc(self: Any, method: Any, timeout: float | None = None, *args: Any, **kwargs: Any) -> Any:
        waits = not kwargs.get("non_block", False)
        future = call(self, method, timeout, *args, **kwargs | {"non_block": True})
        aggregates = kwargs.get("kv_output_aggregator") or kwargs.get("ec_output_aggregator")
        rank = None if aggregates else kwargs.get("unique_reply_rank")
        queues = list(self.response_mqs) if rank is None else [self.response_mqs[rank]]
        ends = None if timeout is None else time.monotonic() + timeout

        def left() -> float | None:
            return None if ends is None else max(0.0, ends - time.monotonic())

        def answers() -> Any:
            found: list[Any] = []
            unread = list(queues)
            try:
                while unread:
                    status, answer = read(unread[0], left)
                    del unread[0]
                    if status != WorkerProc.ResponseStatus.SUCCESS:
                        raise RuntimeError(
                            f"Worker failed with error '{answer}', please check the stack trace above for the root cause"
                        )
                    found.append(answer)
            except TimeoutError as error:
                raise TimeoutError(f"RPC call to {method} timed out.") from error
            finally:
                for queue in unread:
                    late[queue] = late.get(queue, 0) + 1
            return found if rank is None else found[0]

        future.get_response = answers
        return future.result() if waits else future

    MultiprocExecutor.collective_rpc = collective_rpc  # type: ignore[method-assign]


def replace_model_loader(in_tree: type, ours: type) -> None:
    """Let vLLM use the loader `ours` for every load format that it has `in_tree` for.

    Reason: `register_model_loader`, which does this for one format, warns the user that the format "will be overwritten", once for each of seven.
    Retired by: a loader that a platform can choose, or the check of what was loaded as strict in vLLM as it is here.
    """
    from vllm.model_executor import model_loader

    formats = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    formats.update({name: ours for name, loader in formats.items() if loader is in_tree})


def replace_triton_kernels(replacements: Mapping[str, Callable[..., None]]) -> None:
    """Replace Triton kernels of vLLM through its own hook.

    Reason: they need Triton, which this plugin never asks for. The hook looks for the kernels in every module of the process, and takes
    `__dict__` of whatever it finds there for a dictionary; of an object that answers every name (llvmlite has one) it is not, and the start ended with
    "'_lib_fn_wrapper' object has no attribute 'get'". Only vLLM's modules hold the kernels, so that the hook is shown no others.
    Retired by: for the hook nothing, it is vLLM's way for other platforms; for the modules a check of the type in `_rebind_kernels`.

    Args:
        replacements: by the full name of the kernel.
    """
    from vllm.triton_utils import dispatcher

    for name in replacements:  # the hook would import them, but looks for them among the modules that there are now
        import_module(".".join(part for part in name.split(".")[:-1] if not part[0].isupper()))
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"}
    kept = dispatcher.sys
    try:
        dispatcher.sys = SimpleNamespace(modules=modules)  # type: ignore[assignment]
        dispatcher.register_kernels(replacements)
    finally:
        dispatcher.sys = kept


def copy_states_of_blocks() -> None:
    """Let vLLM copy a request's recurrent states to the block in which it goes on, by operators of torch.

    Reason: with prefix caching a request's state stays in the block in which it was when the block was full, and the request goes on in another one. vLLM's runner
    collects the addresses of both and copies them with a Triton kernel. Retired by: that copy as a method of the runner, or through the hook for other platforms' kernels.
    """
    from vllm.v1.worker import mamba_utils

    def copy_at_once(
        copy_bufs: Any, kv_cache_config: Any, mamba_state_copy_funcs: Any, mamba_group_ids: list[int],
        src_block_idx: int, dest_block_idx: int, accept_token_bias: int, req_state: Any, forward_context: dict[str, Any],
    ) -> None:  # fmt: skip
        assert accept_token_bias == 0  # without speculative decoding, which `start.py` refuses
        for group in mamba_group_ids:
            source, target = (req_state.block_ids[group][index] for index in (src_block_idx, dest_block_idx))
            for name in kv_cache_config.kv_cache_groups[group].layer_names:
                for states in forward_context[name].kv_cache:
                    states[target].copy_(states[source])

    mamba_utils.collect_mamba_copy_meta = copy_at_once
    mamba_utils.do_mamba_copy_block = lambda copy_bufs: None


# What torchvision 0.28 registers shape functions for when it is imported. Detection models call them, image processors do not.
TORCHVISION_OPERATORS = (
    "nms", "qnms", "roi_align", "_roi_align_backward", "qroi_align", "ps_roi_align", "_ps_roi_align_backward", "roi_pool",
    "_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d", "_deform_conv2d_backward",
)  # fmt: skip


@cache
def declare_torchvision_operators() -> torch.library.Library | None:
    """Let torchvision be imported where its compiled part does not load, as that of its CUDA build beside a CPU build of torch.

    Torch calls this at the end of its own import (entry point `torch.backends`).

    Reason: torchvision goes on without its compiled part, but then registers shape functions for the operators in it, and its import ends with
    "operator torchvision::nms does not exist"; so do those of transformers' classes. The processors of most multimodal models need its Python part alone. The operators are declared
    and have no kernel; torchvision itself refuses to call them. Retired by: a torchvision build for the torch in use, which is left alone.

    Returns:
        What keeps the declarations alive; None where torchvision is absent, has been imported, or is whole.
    """
    spec = find_spec("torchvision")
    folders = (spec.submodule_search_locations if spec else None) or []
    if not folders or "torchvision" in sys.modules or _loads(Path(folder) for folder in folders):
        return None
    declared = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in TORCHVISION_OPERATORS:
        with suppress(RuntimeError):  # the compiled part may have declared it before it failed
            declared.define(f"{name}(...) -> ...")  # type: ignore[no-untyped-call]
    return declared


def _loads(folders: Iterable[Path]) -> bool:
    """Whether torchvision's compiled part, `_C`, is in one of the folders and loads."""
    names = [f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    libraries = [folder / name for folder in folders for name in names if (folder / name).exists()]
    try:
        for library in libraries:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError):
        # A library that it is linked to is absent, such as CUDA's, or it was built for another torch.
        return False
    return bool(libraries)


@cache
def name_missing_libraries() -> None:
    """Let vLLM's error about a model that it cannot inspect name the extra that its processor needs.

    Reason: without torchvision vLLM answers "Model architectures [...] failed to be inspected", and the cause is one of many tracebacks in
    the log. Retired by: vLLM naming the cause in the error. Does nothing where everything is installed.
    """
    from vllm.model_executor.models.registry import _ModelRegistry

    raise_for_unsupported = _ModelRegistry._raise_for_unsupported

    def and_name_them(self: Any, architectures: list[str]) -> None:
        try:
            raise_for_unsupported(self, architectures)
        except ValueError as error:
            reason = multimodal.what_is_missing()
            if reason is None or "failed to be inspected" not in str(error):
                raise
            raise ValueError(f"{error} Here {reason}.") from error

    _ModelRegistry._raise_for_unsupported = and_name_them  # type: ignore[method-assign]
