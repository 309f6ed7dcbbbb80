# SPDX-License-Identifier: Apache-2.0
"""The arrangements that are compared, the ops of a layer in each, and the least bytes that each has to send.

W ranks, N tokens of them together, b bytes a number. The least: what the arrangement's own exchanges need on N tokens, with
bandwidth-optimal collectives; what is measured more is padding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import ascend_linear as al
import torch
from ascend_comm import GroupConfig, GroupSet, Topology

WORLD, LAYERS, TOKENS = 4, 8, 61
HIDDEN, HEADS, QKV, INTERMEDIATE = 512, 768, 1152, 1024
BYTES = 2  # bfloat16


def gather(rows: int, width: int, ranks: int, b: int = BYTES) -> float:
    """All-gather to, or reduce-scatter of, `rows`; half of an all-reduce."""
    return rows * width * b * (ranks - 1) / ranks


def exchange(rows: int, width: int, ranks: int, b: int = BYTES) -> float:
    """All-to-all of a tensor of which each rank holds ``[rows, width]``."""
    return rows * width * b * (ranks - 1) / ranks


def plain() -> float:
    return 2 * 2 * gather(TOKENS, HIDDEN, WORLD)


def flashcomm1() -> float:
    return 4 * gather(TOKENS, HIDDEN, WORLD)


def flashcomm2(k: int, b: int = BYTES) -> float:
    """Of o_proj: heads for tokens over ODP, reduce-scatter over OTP, all-gather over TP; and down's all-reduce."""
    g = WORLD // k
    o_proj = exchange(TOKENS, HEADS // WORLD, g, b) + gather(-(-TOKENS // g), HIDDEN, k) + gather(TOKENS, HIDDEN, WORLD)
    return o_proj + 2 * gather(TOKENS, HIDDEN, WORLD)


def data_parallel_mlp() -> float:
    return 2 * gather(WORLD * (TOKENS // WORLD), HIDDEN, WORLD)


def data_parallel_oproj() -> float:
    rows = TOKENS // WORLD
    return exchange(rows, HEADS, WORLD) + gather(WORLD * rows, HIDDEN, WORLD)


def o_shard() -> float:
    """FlashComm2 with k = 1, and each o_proj broadcast once a step by the rank that keeps it."""
    return flashcomm2(1) + HIDDEN * HEADS * BYTES / WORLD


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """One row of the table.

    Args:
        name: in the table.
        least: bytes per rank and layer that it has to send.
        formula: the same in words.
        data_parallel: DP ranks; TP is what remains.
        groups: options of `GroupConfig`.
        env: options of `LinearEnv`.
        int8: o_proj (and what FlashComm1 fuses) in W8A8 with a static scale.
    """

    name: str
    least: Callable[[], float]
    formula: str
    data_parallel: int = 1
    groups: dict[str, object] = field(default_factory=dict)
    env: dict[str, object] = field(default_factory=dict)
    int8: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a TP group. DP ranks have equal counts, as oproj-TP and mlp-TP ask for."""
        return TOKENS // self.data_parallel

    @property
    def config(self) -> GroupConfig:
        """The groups."""
        topology = Topology(WORLD, data_parallel=self.data_parallel, tensor_parallel=WORLD // self.data_parallel)
        return GroupConfig(topology=topology, parallel=("tp", "dp"), mc2=False, **self.groups)


FC1 = {"enable_flashcomm1": True}
O_SHARD = {"flashcomm2": 1, "layer_sharding": ("o_proj",)}
FC2_FORMULA = "a2a(N, A/W; G) + rs(N/G, H; k) + ag(N, H) + 2 rs(N, H)"
ARRANGEMENTS = (
    Arrangement(name="tensor parallel", least=plain, formula="4 rs(N, H)"),
    Arrangement(
        name="tensor parallel, matmul-allreduce",
        least=plain,
        formula="4 rs(N, H)",
        env={"enable_matmul_allreduce": True},
    ),
    Arrangement(name="FlashComm1", least=flashcomm1, formula="2 ag(N, H) + 2 rs(N, H)", env=FC1),
    Arrangement(
        name="FlashComm1, fused",
        least=flashcomm1,
        formula="2 ag(N, H) + 2 rs(N, H)",
        env={**FC1, "enable_matmul_reduce_scatter": True},
    ),
    Arrangement(
        name="FlashComm1, fused, o_proj int8",
        least=flashcomm1,
        formula="2 ag(N, H) + 2 rs(N, H)",
        env={**FC1, "enable_matmul_reduce_scatter": True},
        int8=True,
    ),
    *[
        Arrangement(
            name=f"FlashComm2 k={k}" + (", int8" if int8 else ""),
            least=partial(flashcomm2, k, 1 if int8 else BYTES),
            formula=FC2_FORMULA,
            groups={"flashcomm2": k},
            int8=int8,
        )
        for int8 in (False, True)
        for k in (1, 2)
    ],
    Arrangement(
        name="FlashComm2 k=1, o-shard",
        least=o_shard,
        formula=f"{FC2_FORMULA} + H A b / W",
        groups=O_SHARD,
        env={"layer_sharding": ("o_proj",)},
    ),
    Arrangement(
        name="oproj-TP, DP 4",
        least=data_parallel_oproj,
        formula="a2a(N/W, A; W) + rs(N, H)",
        data_parallel=WORLD,
        groups={"otp": WORLD},
    ),
    Arrangement(
        name="mlp-TP, DP 4",
        least=data_parallel_mlp,
        formula="ag(N, H) + rs(N, H)",
        data_parallel=WORLD,
        groups={"mlp_tp": WORLD},
    ),
)

SHAPES = {
    "qkv_proj": ("column", QKV, HIDDEN),
    "o_proj": ("row", HIDDEN, HEADS),
    "gate_up_proj": ("column", 2 * INTERMEDIATE, HIDDEN),
    "down_proj": ("row", HIDDEN, INTERMEDIATE),
}
BLOCK = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}


def build(arrangement: Arrangement, groups: GroupSet) -> tuple[al.LinearEnv, list[dict[str, al.CustomLinearOp]], int]:
    """The environment, the ops of every layer by name, and the bytes that o_proj takes on this rank per layer."""
    names = {name: groups.get(name) for name in ("otp", "mlp_tp", "flashcomm2_odp", "flashcomm2_otp")}
    shard = al.LayerShard(groups["shard_weight"]) if "shard_weight" in groups else None
    env = al.LinearEnv(tp=groups["tp"], dp_rank=groups["dp"].rank_in_group, o_shard=shard, **names, **arrangement.env)
    layers, held = [], 0
    for index in range(LAYERS):
        ops = {}
        for name, (direction, out, in_) in SHAPES.items():
            prefix = f"model.layers.{index}.{BLOCK[name]}.{name}"
            op, _, size = al.get_parallel_op(direction, prefix, env)
            if op is None:
                kind = al.CustomColumnParallelOp if direction == "column" else al.CustomRowParallelOp
                op = kind(env, prefix=prefix)
            shape = (out // size, in_) if direction == "column" else (out, in_ // size)
            int8 = arrangement.int8 and name == "o_proj"
            weight = torch.zeros(shape, dtype=torch.int8 if int8 else torch.bfloat16)
            streamed = shard.add(index, weight) if shard and name == "o_proj" else None
            quant = static_quant(out) if int8 else None
            op.update_attrs(al.LinearParams(weight=weight, quant=quant, streamed=streamed, return_bias=False))
            held += weight.nbytes if name == "o_proj" and shard is None else 0
            ops[name] = op
        layers.append(ops)
    if shard:
        shard.start()
        held = shard.memory_bytes
    return env, layers, held // LAYERS


def static_quant(out: int) -> al.W8A8Static:
    return al.W8A8Static(
        input_scale=torch.ones(1),
        input_offset=torch.zeros(1),
        deq_scale=torch.ones(out),
        quant_bias=torch.zeros(out, dtype=torch.int32),
    )
