# SPDX-License-Identifier: Apache-2.0
"""Run vLLM engines as a job describes and write what they said. Started as a process of its own by the tests.

python run_engine.py JOB.json RESULT.json
"""

import gc
import json
import sys
from unittest import mock


def generate(llm, run):
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in run["prompts"]]
    adapters = [adapter(name) for name in run["adapters"]] if "adapters" in run else None
    sampling = run["sampling"]  # one for all, or one for each
    params = [SamplingParams(**each) for each in sampling] if isinstance(sampling, list) else SamplingParams(**sampling)
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "cached": output.num_cached_tokens,
            "prompt_tokens": [  # (logprob, rank among all tokens) of each but the first
                (step[token].logprob, step[token].rank)
                for step, token in zip((output.prompt_logprobs or [])[1:], output.prompt_token_ids[1:], strict=False)
            ],
            "logprobs": [
                {str(token): entry.logprob for token, entry in step.items()}
                for step in output.outputs[0].logprobs or []
            ],
        }
        for output in outputs
    ]


NUMBERS = {}
"""Of adapters, by their folders: from 1 on in the order of their first use, as vLLM's server gives them."""


def adapter(folder):
    """vLLM's request for the LoRA adapter in a folder; None stands for the base model."""
    from vllm.lora.request import LoRARequest

    return None if folder is None else LoRARequest(folder, NUMBERS.setdefault(folder, len(NUMBERS) + 1), folder)


def used_memory(worker):
    """Bytes of one worker's device that are taken."""
    import torch

    torch.npu.synchronize()
    torch.npu.empty_cache()
    free, total = torch.npu.mem_get_info()
    return total - free


def act(llm, inspected, name, *arguments):
    """Do what a job asks for before a run. Returns what is said if it is refused, and the memory that is taken on each device then if that may be asked."""
    actions = {
        "sleep": llm.sleep,
        "wake_up": llm.wake_up,
        "reload": lambda: llm.collective_rpc("reload_weights"),
        "load_adapter": lambda folder: llm.llm_engine.add_lora(adapter(folder)),
        "forget": llm.reset_prefix_cache,  # what host memory has of it stays
        "forget_all": lambda: llm.reset_prefix_cache(reset_connector=True),
        "drop_adapter": lambda folder: llm.llm_engine.remove_lora(adapter(folder).lora_int_id),
    }
    said = refusal(actions[name], *arguments)
    return {"said": said, "memory": llm.collective_rpc(used_memory) if inspected else None}


def preemptions(llm):
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def cached_by_source(llm):
    """Tokens of prompts that were not computed so far, by where their keys and values came from."""
    counts = [metric for metric in llm.get_metrics() if metric.name == "vllm:prompt_tokens_cached_by_source"]
    return {metric.labels["source"]: metric.value for metric in counts}


def speculation(llm):
    """Drafts, their tokens, and those that were kept, in all and by their place in a draft; vLLM's own metrics."""
    counts = {metric.name: metric for metric in llm.get_metrics() if metric.name.startswith("vllm:spec_decode_num_")}
    values = {name.removeprefix("vllm:spec_decode_num_"): one for name, one in counts.items()}
    return {name: getattr(one, "values", None) or getattr(one, "value", None) for name, one in values.items()}


def traffic(worker):
    """Calls of each collective so far, by name, in one worker."""
    from collections import Counter

    from ascend_sim import counters

    calls = Counter()
    for (name, _), count in counters.snapshot().collectives.items():
        calls[name] += count.calls
    return dict(calls)


def operators(worker):
    """Calls of each operator of the NPU's own so far, in one worker."""
    from ascend_sim import counters

    return {name: count.calls for name, count in counters.snapshot().operators.items() if name.startswith("npu::")}


def graphs(worker):
    """Replays of graphs, and what was launched from the host, so far in one worker."""
    from ascend_sim import counters

    counts = counters.snapshot()
    return {"replays": counts.graphs.replays, "updates": counts.graphs.updates, "launches": counts.launches}


def memory(worker):
    """Bytes of device memory that tensors of one worker take now, and that are left of the device."""
    import torch

    torch.npu.synchronize()
    return torch.npu.memory_allocated(), torch.npu.mem_get_info()[0]


def all_operators(worker):
    """Calls of each operator so far, in one worker."""
    from ascend_sim import counters

    return {name: count.calls for name, count in counters.snapshot().operators.items()}


def watch_copies(worker):
    """Let the runner of one worker note the copies of its steps that come from host memory which is not pinned: the host waits for them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    runner = worker.model_runner
    runner.blocking_copies = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = str(function)
            if name.startswith(("aten.copy_.", "aten._to_copy.", "aten.to.")) and result.device.type == "npu":
                source = args[1] if name.startswith("aten.copy_.") else args[0]
                if source.device.type == "cpu" and source.numel() and not source.is_pinned():
                    runner.blocking_copies.append(f"{name} of {tuple(source.shape)}")
            return result

    def watched(method):
        def run(*args, **kwargs):
            with Watch():
                return method(*args, **kwargs)

        return run

    runner.execute_model, runner.sample_tokens = watched(runner.execute_model), watched(runner.sample_tokens)


def blocking_copies(worker):
    """What `watch_copies` has let the runner note."""
    return getattr(worker.model_runner, "blocking_copies", None)


def linear_layers(worker):
    """Path -> (op, ranks that share the weight, bytes of weight and bias on this one) of the linear layers in one worker."""
    from vllm_ascend.layers.linear import WithOp

    return {
        layer.prefix: (
            type(layer.op).__name__,
            None if layer.op is None else list(layer.op.group.ranks),
            sum(x.numel() * x.element_size() for x in layer.parameters()),
        )
        for layer in worker.get_model().modules()
        if isinstance(layer, WithOp)
    }


def experts(worker):
    """Of each MoE layer in one worker a digest of the weights in each of its slots, `[2I, H]` and `[H, I]` as in a checkpoint."""
    import hashlib

    from vllm_ascend.layers.moe import AscendRoutedExperts

    def digest(w13, w2):
        return hashlib.sha256(
            w13.t().contiguous().numpy().tobytes() + w2.t().contiguous().numpy().tobytes()
        ).hexdigest()

    return [
        [digest(w13, w2) for w13, w2 in zip(layer.w13_weight.data.cpu(), layer.w2_weight.data.cpu(), strict=True)]
        for layer in worker.get_model().modules()
        if isinstance(layer, AscendRoutedExperts)
    ]


# What is looked at before the first run and after each, by its name in the results.
OVER_RUNS = {"collectives": traffic, "calls": all_operators, "launched": graphs, "memory": memory}


def rebalances(worker):
    """What dynamic EPLB has done in one worker; None where it is off."""
    from dataclasses import asdict

    rebalancer = worker.model_runner.rebalancer
    return None if rebalancer is None else asdict(rebalancer.status)


def load(worker, folder):
    """What is said when one worker loads the checkpoint in another folder into a second model of the same config; None if it loads."""
    from copy import copy

    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    config = copy(worker.vllm_config)
    config.model_config, config.compilation_config = copy(config.model_config), copy(config.compilation_config)
    config.model_config.model, config.compilation_config.static_forward_context = folder, {}
    with set_current_vllm_config(config):
        return refusal(get_model, vllm_config=config)


def refusal(function, *args, **kwargs):
    """The message of the exception that a call ends with, or None."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return str(error)


def reload(llm, arguments):
    """Load weights anew; what is said if they are refused."""
    said = refusal(llm.collective_rpc, "reload_weights", kwargs=arguments)
    llm.reset_prefix_cache()
    return said


def start(rendezvous=None, **engine):
    """An engine; as one data parallel rank of several, if `rendezvous` is the port of the store at which they find each other."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    class RendezvousArgs(EngineArgs):
        """vLLM's own way for ranks without fixed ports, which its offline data parallelism has no option for."""

        def create_engine_config(self, *args, **kwargs):
            config = super().create_engine_config(*args, **kwargs)
            config.parallel_config._coord_store_port = rendezvous
            return config

    with mock.patch("vllm.entrypoints.llm.EngineArgs", RendezvousArgs if rendezvous else EngineArgs):
        return LLM(**engine)


def main(job_file, result_file):
    with open(job_file) as handle:
        job = json.load(handle)
    results = []
    for engine in job:
        llm = start(engine.get("rendezvous"), disable_log_stats=False, **engine["engine"])
        inspected = engine.get("inspect", False)  # needs VLLM_ALLOW_INSECURE_SERIALIZATION=1
        seen = llm.collective_rpc if inspected else lambda of_worker: None
        runs, actions, refusals, drafts, sources = [], [], [], [], []
        over_runs = {name: [seen(of_worker)] for name, of_worker in OVER_RUNS.items()}
        for run in engine["runs"]:
            refusals.append([reload(llm, arguments) for arguments in run.get("reload", ())])
            actions.append([act(llm, inspected, *action) for action in run.get("before", ())])
            if run.get("watch"):
                llm.collective_rpc(watch_copies)
            runs.append(generate(llm, run))
            drafts.append(speculation(llm))
            sources.append(cached_by_source(llm))
            for name, of_worker in OVER_RUNS.items():
                over_runs[name].append(seen(of_worker))
        # Plans come when they come. All data parallel ranks end a run in the same step, so they go on equally long.
        wanted = engine.get("rebalances", 0)
        while wanted and llm.collective_rpc(rebalances)[0]["rebalances"] < wanted:
            runs.append(generate(llm, engine["runs"][-1]))
        results.append(
            {
                "runs": runs,
                "refusals": refusals,
                "actions": actions,
                "loads": [llm.collective_rpc(load, args=(folder,)) for folder in engine.get("load", ())],
                "preemptions": preemptions(llm),
                "speculation": drafts,  # after each run
                "cached": sources,  # likewise
                **over_runs,
                "collectives": over_runs["collectives"][1:],  # after each run
                "blocking": seen(blocking_copies),
                "layers": seen(linear_layers),
                "experts": llm.collective_rpc(experts) if engine.get("experts") else None,
                "rebalances": seen(rebalances),
                "operators": seen(operators),
                "graphs": seen(graphs),
            }
        )
        llm.llm_engine.engine_core.shutdown()
        del llm, seen
        gc.collect()
        gc.freeze()  # as engine_server.py does; an engine's shutdown undoes it
    with open(result_file, "w") as handle:
        json.dump(results, handle)


if __name__ == "__main__":
    main(*sys.argv[1:])
