# SPDX-License-Identifier: Apache-2.0
"""Parallel linear ops: how a layer's weight is cut, what its ranks exchange, and the product, in one object.

`get_parallel_op` chooses the op of a layer by its path and the options of a run; every op is also usable on its own.
"""

from ascend_linear.cost import Cost, LayerSize
from ascend_linear.flashcomm2 import Flashcomm2OProjRowParallelOp, Flashcomm2OshardQKVParallelOp
from ascend_linear.layer_shard import LayerShard, StreamedWeight
from ascend_linear.matmul_allreduce import MatmulAllreduceRowParallelOp
from ascend_linear.mlp import MLPColumnParallelOp, MLPRowParallelOp
from ascend_linear.op import (
    CustomColumnParallelOp,
    CustomLinearOp,
    CustomReplicatedOp,
    CustomRowParallelOp,
    Gemm,
    LinearParams,
    LinearResult,
)
from ascend_linear.oproj import OProjRowParallelOp
from ascend_linear.prefetch import PrefetchConfig, WeightPrefetcher
from ascend_linear.quant import QuantMethod, W8A8Dynamic, W8A8Static
from ascend_linear.select import Selected, get_parallel_op, get_replicated_op, in_tower, is_moe_layer
from ascend_linear.sequence import SequenceColumnParallelOp, SequenceRowParallelOp
from ascend_linear.sharded_cp import ShardedCPColumnParallelOp, ShardedCPRowParallelOp
from ascend_linear.state import LinearEnv, MoeLayers, StepState, layer_index, plan_step

__all__ = [
    "Cost",
    "CustomColumnParallelOp",
    "CustomLinearOp",
    "CustomReplicatedOp",
    "CustomRowParallelOp",
    "Flashcomm2OProjRowParallelOp",
    "Flashcomm2OshardQKVParallelOp",
    "Gemm",
    "LayerShard",
    "LayerSize",
    "LinearEnv",
    "LinearParams",
    "LinearResult",
    "MLPColumnParallelOp",
    "MLPRowParallelOp",
    "MatmulAllreduceRowParallelOp",
    "MoeLayers",
    "OProjRowParallelOp",
    "PrefetchConfig",
    "QuantMethod",
    "Selected",
    "SequenceColumnParallelOp",
    "SequenceRowParallelOp",
    "ShardedCPColumnParallelOp",
    "ShardedCPRowParallelOp",
    "StepState",
    "StreamedWeight",
    "W8A8Dynamic",
    "W8A8Static",
    "WeightPrefetcher",
    "get_parallel_op",
    "get_replicated_op",
    "in_tower",
    "is_moe_layer",
    "layer_index",
    "plan_step",
]
