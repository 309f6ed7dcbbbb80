# SPDX-License-Identifier: Apache-2.0
"""A decoding step as one launch: the model's operators are captured once for each padded batch, and replayed.

vLLM's dispatcher pads a batch of decoding requests, each of which has one new token, or one and all that can be drafted, to the next size that was
captured, and its buffers keep their addresses. What the host knows alone
and changes from step to step are the lengths of the requests' keys: torch_npu captures each attention operator in a task group, and `NPUGraph.update`
gives it new lengths on a stream of its own while the graph runs. docs/graphs.md has the whole with a picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]  # its stubs are a package of their own
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import get_world_group, is_global_first_rank
from vllm.forward_context import BatchDescriptor, ForwardContext, get_forward_context, is_forward_context_available
from vllm.logger import init_logger

from vllm_ascend import parallel

if TYPE_CHECKING:
    from vllm_ascend.model_runner import AscendModelRunner

__all__ = [
    "AscendGraphWrapper",
    "capture",
    "drop_what_does_not_fit",
    "fitting",
    "is_captured",
    "measure",
    "note_attention",
]

logger = init_logger("vllm.vllm_ascend")

_LEAST_BYTES = 1 << 20  # of a further graph, for what the driver keeps of it; vLLM counts as much for other devices
_LAYERS = "ascend_graph_layers"  # key in the forward context, while a step is captured


@dataclass(frozen=True, slots=True)
class _Captured:
    """One graph.

    Args:
        graph: torch_npu's.
        output: what the model returned, which a replay writes.
        layers: the layer of each attention operator, in the order of capture.
        spare: a slot for each padding token, which the graph reads (`_spare_slots`).
    """

    graph: Any
    output: Any
    layers: list[str]
    spare: Tensor

    def replay(self, steps: dict[str, Any]) -> None:
        """Launch the graph, and give its attention operators the lengths of this step.

        Args:
            steps: the attention's description of the step, by layer.
        """
        lengths = [steps[layer].kv_lengths for layer in self.layers]
        if all(each is lengths[0] for each in lengths):
            del lengths[1:]
        # An earlier replay reads the lengths that are written now.
        self.graph.graph_dispatch_mode.update_stream.wait_stream(torch.npu.current_stream())
        self.graph.replay()
        # The two versions of the operator have two names for the argument.
        self.graph.update(
            cpu_update_input=[{"actual_seq_lengths_kv": each, "actual_seq_kvlen": each} for each in lengths]
        )


class AscendGraphWrapper(CUDAGraphWrapper):
    """What the runner calls in the place of the model: a captured step is replayed, any other one runs.

    It takes the place of vLLM's own wrapper, which names torch.cuda, and is one for all who ask vLLM's model for what is in it.
    """

    def __init__(self, runnable: Callable[..., Any], vllm_config: Any) -> None:
        """Wrap a model. Nothing is captured before `capture`."""
        super().__init__(runnable, vllm_config, CUDAGraphMode.FULL)
        self.block: int | None = None
        """While steps are captured, the tokens of a block of the KV cache; None at other times."""
        self.captured: dict[BatchDescriptor, _Captured] = {}

    def clear_graphs(self) -> None:
        """Drop all graphs."""
        self.captured.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the model."""
        context = get_forward_context() if is_forward_context_available() else None
        if context is not None and self.block is not None:
            _number(context.slot_mapping)
        if context is None or context.cudagraph_runtime_mode != self.runtime_mode:
            parallel.resume()
            return self.runnable(*args, **kwargs)
        parallel.settle()
        batch = context.batch_descriptor
        assert batch is not None and isinstance(context.attn_metadata, dict)  # noqa: PT018  # so prepared in this mode
        if found := self.captured.get(batch):
            found.replay(context.attn_metadata)
            return found.output
        if self.block is None:
            raise RuntimeError(f"no graph was captured for {batch}, and the step was prepared for one")
        spare = _spare_slots(batch.num_tokens, self.block)
        self.captured[batch] = self._capture(context, spare, args, kwargs)
        return self.captured[batch].output

    def _capture(
        self, context: ForwardContext, spare: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Captured:
        graph = torch.npu.NPUGraph()
        layers: list[str] = []
        context.additional_kwargs[_LAYERS] = layers
        try:
            with _capturing(graph, self.graph_pool):
                context.slot_mapping = _writable(context.slot_mapping, spare)
                parallel.stream_once()
                output = self.runnable(*args, **kwargs)
                parallel.settle()
        except RuntimeError:
            parallel.settle(wait=False)
            raise
        del context.additional_kwargs[_LAYERS]
        return _Captured(graph, output, layers, spare)


@contextmanager
def _capturing(graph: Any, pool: Any) -> Iterator[None]:
    """Capture what the block does on the current stream. Where that fails the stream and torch's dispatch modes are as before, which torch_npu's own context leaves to chance."""
    stream = torch.npu.current_stream()
    context = torch.npu.graph(graph, pool=pool, stream=stream, auto_dispatch_capture=True)
    context.__enter__()
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        said = (type(failure), failure, failure.__traceback__) if failure else (None, None, None)
        try:
            context.__exit__(*said)
        except RuntimeError:  # the end of the capture failed, and what comes after it was left out
            graph.graph_dispatch_mode.__exit__(*said)
            context.stream_ctx.__exit__(*said)
            if failure is None:
                raise


def _writable(slot_mapping: Any, spare: Tensor) -> dict[str, Tensor]:
    """The slots of each layer, with spare ones for padding tokens, to which vLLM gives -1: the cache kernels take no such slot, nor one slot twice.

    The slots of requests are all larger than spare ones.
    """
    found: dict[int, Tensor] = {}
    for slots in slot_mapping.values():
        if id(slots) not in found:
            found[id(slots)] = torch.maximum(slots, spare[: len(slots)])
    return {layer: found[id(slots)] for layer, slots in slot_mapping.items()}


def _number(slot_mapping: Any) -> None:
    """Give each token of a step without requests a slot of its own, from the first one on: in a cache that holds nothing yet."""
    for slots in {id(each): each for each in (slot_mapping or {}).values()}.values():
        torch.arange(len(slots), out=slots)


def _spare_slots(tokens: int, block: int) -> Tensor:
    """int64 `[tokens]`: slots in the block that no request has, which are different for as many tokens in a row as a block has."""
    return torch.arange(tokens, device="npu") % block


def _block_tokens(runner: AscendModelRunner) -> int:
    """Tokens of a block of the KV cache; the least of the groups."""
    return min(int(group.kv_cache_spec.block_size) for group in runner.kv_cache_config.kv_cache_groups)


def note_attention(layer: Any) -> None:
    """Called by a layer before its attention operator: while a step is captured, the order is kept for updates."""
    if is_forward_context_available():
        layers = get_forward_context().additional_kwargs.get(_LAYERS)
        if layers is not None:
            layers.append(layer.layer_name)


def is_captured() -> bool:
    """Whether the step whose forward pass runs is captured in a graph."""
    return get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.FULL


def measure(runner: AscendModelRunner) -> int:
    """Capture the two largest sizes for trial, over a small KV cache, to know what all of them will take.

    Graphs share their memory: the largest one, which is captured first, needs most of it, and each other one a little of its own.

    Returns:
        Bytes of device memory.
    """
    sizes = _sizes(runner)
    if not sizes:
        return 0
    model = _wrapper(runner)
    pool, model.graph_pool = model.graph_pool, torch.npu.graph_pool_handle()
    taken = _capture_sizes(runner, sizes[:2])
    model.clear_graphs()
    model.graph_pool = pool
    each = max(_LEAST_BYTES, *taken[1:], 0)
    return taken[0] + each * (len(sizes) - 1)


def capture(runner: AscendModelRunner) -> int:
    """Capture a decoding step of each size that the dispatcher has. Collective over all ranks.

    The steps of a size that cannot be captured run operator by operator.

    Returns:
        Bytes of device memory that the graphs take.
    """
    started = time.perf_counter()
    shown = is_global_first_rank() and runner.load_config.use_tqdm_on_load
    sizes = _sizes(runner)
    taken = sum(_capture_sizes(runner, tqdm(sizes, disable=not shown, desc="Capturing NPU graphs (decode, FULL)")))
    _agree(runner, sizes)
    logger.info_once(
        "Captured %d graphs of decoding steps in %.0f s, in %.2f GiB.",
        len(_wrapper(runner).captured),
        time.perf_counter() - started,
        taken / (1 << 30),
    )
    return taken


def _agree(runner: AscendModelRunner, sizes: Sequence[BatchDescriptor]) -> None:
    """Drop the graphs of sizes that some rank could not capture: all ranks replay a step or none, for the way of tokens to experts depends on it."""
    model = _wrapper(runner)
    captured = torch.tensor([size in model.captured for size in sizes], dtype=torch.int32)
    torch.distributed.all_reduce(captured, torch.distributed.ReduceOp.MIN, group=get_world_group().cpu_group)
    for size, everywhere in zip(sizes, captured.tolist(), strict=True):
        if not everywhere:
            model.captured.pop(size, None)
            runner.cudagraph_dispatcher.cudagraph_keys[CUDAGraphMode.FULL].discard(size)


def _wrapper(runner: AscendModelRunner) -> AscendGraphWrapper:
    assert isinstance(runner.model, AscendGraphWrapper)
    return runner.model


def _sizes(runner: AscendModelRunner) -> list[BatchDescriptor]:
    """Of the dispatcher, the largest first."""
    found = runner.cudagraph_dispatcher.get_capture_descs()
    return [batch for mode, batches in found if mode == CUDAGraphMode.FULL for batch in batches]


def fitting(sizes: Sequence[int], block: int, *, each: int = 1, padded_to_others: bool) -> list[int]:
    """Of the sizes of steps those for which a block has a slot for each padding token.

    Args:
        sizes: ascending; a batch is padded to the next.
        block: tokens of a block.
        each: tokens of each request, by which sizes can be divided.
        padded_to_others: whether a step may be padding throughout, because another replica's has requests.
    """
    if padded_to_others:
        return [size for size in sizes if size <= block]
    return [size for before, size in pairwise([0, *sizes]) if size - before - each <= block]


def drop_what_does_not_fit(runner: AscendModelRunner) -> None:
    """Take those sizes from the dispatcher whose padding tokens would not all find a slot of their own."""
    keys = runner.cudagraph_dispatcher.cudagraph_keys[CUDAGraphMode.FULL]
    several = runner.parallel_config.data_parallel_size > 1
    block = _block_tokens(runner)
    sizes, each = runner.compilation_config.cudagraph_capture_sizes or [], runner.uniform_decode_query_len
    kept = fitting(sizes, block, each=each, padded_to_others=several)
    dropped = {batch for batch in keys if batch.num_tokens not in kept}
    keys -= dropped
    if dropped:
        logger.info_once(
            "Decoding steps of %s tokens are not captured in graphs: their padding%s needs more slots than the %d of a block.",
            ", ".join(str(size) for size in sorted({batch.num_tokens for batch in dropped})),
            ", for the sake of other replicas," if several else "",
            block,
        )


def _capture_sizes(runner: AscendModelRunner, sizes: Iterable[BatchDescriptor]) -> list[int]:
    """Capture these sizes, of which the first one runs once before, so that what its kernels need at their first call is there.

    A size that cannot be captured is named with the reason.

    Returns:
        Bytes of device memory that each of them takes beside those before it.
    """
    model = _wrapper(runner)
    stream = torch.npu.Stream()
    stream.wait_stream(torch.npu.current_stream())
    free = [_free_memory()]
    model.block = _block_tokens(runner)
    try:
        with runner._freeze_gc(), torch.npu.stream(stream):
            for batch in sizes:
                warm_ups = 1 if len(free) == 1 else 0
                try:
                    runner._warmup_and_capture(batch, cudagraph_runtime_mode=CUDAGraphMode.FULL, num_warmups=warm_ups)
                except RuntimeError as error:
                    logger.warning(
                        "A decoding step of %d tokens cannot be captured in a graph, and runs operator by operator: %s",
                        batch.num_tokens,
                        error,
                    )
                free.append(_free_memory())
    finally:
        model.block = None
        # Steps were captured with stand-ins for adapters, under the numbers that a server gives its first ones.
        runner.maybe_remove_all_loras(runner.lora_config)
    return [before - after for before, after in pairwise(free)]


def _free_memory() -> int:
    torch.npu.synchronize()
    torch.npu.empty_cache()
    return int(torch.npu.mem_get_info()[0])
