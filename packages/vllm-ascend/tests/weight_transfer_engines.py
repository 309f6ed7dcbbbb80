# SPDX-License-Identifier: Apache-2.0
"""An engine and a trainer that sends it weights, as a job describes: the engine's workers are processes, this one is the trainer, on the last NPU.

python weight_transfer_engines.py JOB.json RESULT.json
"""

import json
import sys


class Direct:
    """The engine in this process, as a trainer calls it."""

    def __init__(self, llm):
        self.llm = llm

    def init_weight_transfer_engine(self, init_info):
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self):
        self.llm.start_weight_update()

    def update_weights(self, update_info):
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version=None):
        self.llm.finish_weight_update(weight_version)


def source(folder, wrong):
    """A checkpoint's weights, or with a fault: an exception on the way, a name that no model has, a tensor of another shape, a layer without its last tensor."""
    from safetensors.torch import load_file
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    tensors = load_file(f"{folder}/model.safetensors", "npu")

    class Checkpoint(WeightSource):
        def pairs(self):
            pairs = list(tensors.items())
            middle = len(pairs) // 2
            name, tensor = pairs[middle]
            if wrong == "name":
                pairs[middle] = ("model.nowhere.weight", tensor)
            elif wrong == "shape":
                pairs[middle] = (name, tensor.flatten()[1:])
            elif wrong == "part":
                del pairs[next(at for at, (name, _) in enumerate(pairs) if "up_proj" in name)]
            return pairs

        def metadata(self):
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.pairs()]

        def __iter__(self):
            for at, pair in enumerate(self.pairs()):
                if wrong == "source" and at == 7:
                    raise ArithmeticError("the trainer's own")
                yield pair

    return Checkpoint()


def main(job_file, result_file):
    import torch
    import torch_npu  # noqa: F401
    from vllm import LLM, SamplingParams
    from vllm.config import WeightTransferConfig
    from vllm_ascend.weight_transfer.trainer import HCCLTrainerInitInfo, HCCLTrainerWeightTransferEngine

    with open(job_file) as handle:
        job = json.load(handle)
    llm = LLM(**job["engine"], weight_transfer_config=WeightTransferConfig(backend="hccl"))
    torch.npu.set_device(job.get("device", torch.npu.device_count() - 1))
    parallel = llm.llm_engine.vllm_config.parallel_config

    def answers():
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        outputs = llm.generate(prompts, SamplingParams(**job["sampling"]), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    results, engine = [{"said": None, "tokens": answers()}], None
    for one in job["rounds"]:
        said = None
        try:
            weights = source(one["weights"], one.get("wrong"))
            if engine is None:
                info = HCCLTrainerInitInfo(
                    "127.0.0.1", 0, 1 + parallel.world_size_across_dp, rank=0, **one.get("wire", {})
                )
                engine = HCCLTrainerWeightTransferEngine.trainer_init(info, client=Direct(llm), source=weights)
            engine.source = weights
            engine.send_weights()
            llm.reset_prefix_cache()
        except Exception as error:
            said = [type(error).__name__, str(error)]
            if engine is not None:
                engine.shutdown()
                engine = None
        results.append({"said": said, "tokens": answers()})
        if one.get("leaves") and engine is not None:
            engine.shutdown()
            engine = None
    with open(result_file, "w") as handle:
        json.dump(results, handle)


if __name__ == "__main__":
    main(*sys.argv[1:])
