# SPDX-License-Identifier: Apache-2.0
"""A trainer that sends its weights to a server, as in reinforcement learning: the server answers with them from the next request on.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "hccl"}'
    python train_and_serve.py MODEL --url http://localhost:8000

The trainer takes the last visible NPU; the server has the first ones.
"""

import argparse

import httpx
import torch
import torch_npu  # noqa: F401  # torch's device "npu"
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.distributed.weight_transfer.base import ModuleSource
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm_ascend.weight_transfer.trainer import HCCLTrainerInitInfo, HCCLTrainerWeightTransferEngine


def main() -> None:
    """Train, and send."""
    options = argparse.ArgumentParser(description="Train a model on one sentence, and send its weights to a server")
    options.add_argument("model", help="what the server serves: a folder or a name")
    options.add_argument("--url", default="http://localhost:8000", help="of the server")
    options.add_argument("--sentence", default="The capital of France is Lyon.", help="to learn")
    options.add_argument("--steps", type=int, default=8)
    given = options.parse_args()

    device = torch.device("npu", torch.npu.device_count() - 1)
    torch.npu.set_device(device)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).to(
        device
    )  # the engine rounds what it gets
    server = httpx.Client(base_url=given.url, timeout=600)
    workers = server.get("/get_world_size").json()["world_size"]

    engine = HCCLTrainerWeightTransferEngine.trainer_init(
        HCCLTrainerInitInfo(master_address="127.0.0.1", master_port=0, world_size=1 + workers, rank=0),
        client=HTTPVLLMWeightSyncClient(given.url),
        source=ModuleSource(model),
    )
    tokens = tokenizer(given.sentence, return_tensors="pt").input_ids.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    for step in range(given.steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    server.post("/pause", params={"mode": "keep"}).raise_for_status()  # requests wait, and go on with the new weights
    engine.send_weights()
    server.post("/reset_prefix_cache").raise_for_status()  # what was cached is of the old weights
    server.post("/resume").raise_for_status()
    engine.shutdown()
    print("sent")


if __name__ == "__main__":
    main()
