# SPDX-License-Identifier: Apache-2.0
"""Vision and audio towers: no option for linear layers touches one, and their attention is one NPU kernel."""

import ast
from pathlib import Path
from types import SimpleNamespace

import ascend_linear as al
import pytest
import torch
import vllm
from ascend_comm import Topology
from vllm_ascend.attention import kernels
from vllm_ascend.config import AscendConfig
from vllm_ascend.deployment import Deployment, Model
from vllm_ascend.layers import linear, tower
from vllm_ascend.rules import planned_env

MOE = Model(
    moe=al.MoeLayers(routed_experts=4, layers=frozenset({2})), dense_width=64, attention_width=64, shared_experts=True
)
OVER_TP = Deployment(topology=Topology(2, 1, 1, 1, 2))
OVER_DP = Deployment(topology=Topology(2, 2, 1, 1, 1), model=MOE)
OPTIONS = {
    "enable_flashcomm1": ({"enable_flashcomm1": True}, OVER_TP),
    "flashcomm2_parallel_size": ({"flashcomm2_parallel_size": 1}, OVER_TP),
    "layer_sharding": ({"flashcomm2_parallel_size": 1, "layer_sharding": ["o_proj"]}, OVER_TP),
    "enable_matmul_allreduce": ({"enable_matmul_allreduce": True}, OVER_TP),
    "mlp_tensor_parallel_size": ({"finegrained_tp_config": {"mlp_tensor_parallel_size": 2}}, OVER_DP),
    "oproj_tensor_parallel_size": ({"finegrained_tp_config": {"oproj_tensor_parallel_size": 2}}, OVER_DP),
    "enable_shared_expert_dp": (
        {"enable_shared_expert_dp": True},
        Deployment(topology=Topology(2, 1, 1, 1, 2), model=MOE),
    ),
}
# The last components that rules look for, and some that towers have.
LAYERS = {
    "column": ("qkv_proj", "gate_up_proj", "in_proj", "query_key_value", "conv1d", "fc1", "qkv"),
    "row": ("o_proj", "out_proj", "down_proj", "dense", "proj", "fc2"),
}


def parts_of_models():
    """(kind, path) of the parts that vLLM's multimodal models name: `tower_model`, `connector` and `language_model`."""
    root = Path(vllm.__file__).parent
    found = set()
    for file in [*root.glob("model_executor/models/*.py"), *root.glob("models/**/*.py")]:
        text = file.read_text()
        calls = ast.walk(ast.parse(text)) if "from_string_field" in text else ()
        for call in calls:
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "from_string_field":
                found |= {
                    (keyword.arg, constant.value.rstrip("."))
                    for keyword in call.keywords
                    for constant in ast.walk(keyword.value)
                    if isinstance(constant, ast.Constant)
                }
    return sorted(found)


PARTS = parts_of_models()
KERNEL = "npu::npu_fused_infer_attention_score"


def test_the_parts_of_models_are_found():
    kinds = {kind: [path for other, path in PARTS if other == kind] for kind, _ in PARTS}
    assert {"tower_model", "connector", "language_model"} == set(kinds)
    assert {"visual", "vision_tower", "audio_tower"} <= set(kinds["tower_model"])
    assert {"visual.merger", "multi_modal_projector", "mlp1"} <= set(kinds["connector"])


@pytest.mark.parametrize(("kind", "path"), PARTS, ids=[f"{kind} {path}" for kind, path in PARTS])
def test_towers_are_known_by_their_paths(kind, path):
    assert al.in_tower(f"{path}.layers.0.self_attn.qkv_proj") is (kind != "language_model")
    assert al.in_tower(f"model.{path}.layers.0.mlp.fc1") is (kind != "language_model") or path == "encoder"


@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_touches_a_tower(option):
    said, deployment = OPTIONS[option]
    env = planned_env(AscendConfig.of(said), deployment)
    plain = planned_env(AscendConfig(), deployment)
    chosen = 0
    for direction, names in LAYERS.items():
        for name in names:
            for middle in ("layers.1.mlp", "layers.1.self_attn", "layers.1.attention", "layers.1.mlp.shared_experts"):
                of_the_model = al.get_parallel_op(direction, f"language_model.model.{middle}.{name}", env)
                chosen += of_the_model[1:] != (env.tp.rank_in_group, env.tp.world_size) or of_the_model.op is not None
                if "shared" in middle:
                    continue  # no tower has them
                for kind, path in PARTS:
                    if kind != "language_model":
                        found = al.get_parallel_op(direction, f"{path}.{middle}.{name}", env)
                        assert found == (None, plain.tp.rank_in_group, plain.tp.world_size), (path, middle, name)
    assert chosen, "the option does nothing for the language model either"


def test_weight_prefetch_leaves_towers_out():
    layers = [
        SimpleNamespace(prefix=f"{path}.layers.{n}.{name}", weight=torch.empty(1), next_to_prefetch=None)
        for path in ("vision_tower.vision_model.encoder", "language_model.model")
        for n in range(2)
        for name in ("self_attn.qkv_proj", "mlp.down_proj")
    ]
    linear._chain(layers)
    chain = [layer.next_to_prefetch for layer in layers]
    assert chain[:4] == [None] * 4
    assert [following[1].prefix for following in chain[4:]] == [layer.prefix for layer in [*layers[5:], layers[4]]]


def attend(query, key, value, ends):
    """One sequence after another, in float64."""
    parts, start = [], 0
    for end in ends:
        q, k, v = (x[start:end].double().transpose(0, 1) for x in (query, key, value))
        groups = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        parts.append((torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v).transpose(0, 1))
        start = end
    return torch.cat(parts)


def layer_of(heads, kv_heads, size):
    """The layer without vLLM's constructor, which asks for an engine's configuration."""
    layer = tower.AscendTowerAttention.__new__(tower.AscendTowerAttention)
    torch.nn.Module.__init__(layer)
    layer.num_heads, layer.num_kv_heads, layer.head_size, layer.scale = heads, kv_heads, size, size**-0.5
    return layer


@pytest.mark.parametrize("size", [32, 64, 72, 80, 96, 128, 200, 256])
@pytest.mark.parametrize("form", ["packed", "rows"])
def test_attention_of_a_tower(size, form):
    """Sequences of several lengths one after another, or as rows; bfloat16, whose own rounding of query, key, value and result is the bound."""
    from ascend_sim import counters

    torch.manual_seed(size)
    ends = [5, 6, 40, 60] if form == "packed" else [20, 40, 60]
    query, key, value = (torch.randn(60, heads, size).bfloat16() for heads in (4, 2, 2))
    layer = layer_of(4, 2, size)
    shape = (1, 60, -1) if form == "packed" else (3, 20, -1)
    cumulative = torch.tensor([0, *ends], dtype=torch.int32) if form == "packed" else None
    before = counters.snapshot().operators
    found = layer.forward_oot(*(x.npu().reshape(*shape) for x in (query, key, value)), cu_seqlens=cumulative)
    after = counters.snapshot().operators
    assert found.shape == (*shape[:2], 4 * size)
    assert after[KERNEL].calls - (before[KERNEL].calls if KERNEL in before else 0) == 1
    expected = attend(query, key, value, ends)
    # A result is an average of values with weights that the kernel may round to bfloat16, and is rounded itself: 2^-8 of the largest value for each.
    bound = 2 * 2**-8 * value.double().abs().max()
    assert (found.cpu().reshape(60, 4, size).double() - expected).abs().max() <= bound


def test_the_bound_catches_one_sequence_for_two():
    torch.manual_seed(0)
    query, key, value = (torch.randn(60, 2, 64).bfloat16() for _ in range(3))
    wrong = attend(query, key, value, [60]) - attend(query, key, value, [30, 60])
    assert wrong.abs().max() > 2 * 2**-8 * value.double().abs().max()


def test_heads_beyond_the_kernel_are_refused():
    x = torch.zeros(4, 1, 264).npu()
    with pytest.raises(ValueError, match="264"):
        kernels.attention_of_any_size(x, x, x)


@pytest.mark.parametrize("size", [40, 64, 80])
@pytest.mark.parametrize("mask", ["none", "bool", "numbers"])
def test_a_tower_of_transformers(size, mask):
    """Three sounds of one length, or with padding that no query sees; transformers' function is the reference, in float64 on the host."""
    from ascend_sim import counters
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from vllm_ascend.layers import transformers_tower

    torch.manual_seed(size)
    query = torch.randn(3, 4, 30, size).bfloat16()
    key, value = (torch.randn(3, 2, 30, size).bfloat16() for _ in range(2))
    seen = (torch.arange(30) < torch.tensor([30, 7, 18])[:, None])[:, None, None].expand(-1, 1, 30, -1)
    numbers = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    given = {"none": None, "bool": seen, "numbers": numbers.bfloat16()}[mask]
    module = SimpleNamespace(is_causal=False, num_key_value_groups=2)
    before = counters.snapshot().operators
    on_npu = (None if x is None else x.npu() for x in (query, key, value, given))
    found, weights = transformers_tower.attend(module, *on_npu, scaling=0.2)
    after = counters.snapshot().operators
    assert after[KERNEL].calls - (before[KERNEL].calls if KERNEL in before else 0) == 1
    assert weights is None
    assert found.is_contiguous()
    doubled = (x.double().repeat_interleave(n, 1) for x, n in ((query, 1), (key, 2), (value, 2)))
    alone = SimpleNamespace(is_causal=False)
    expected, _ = sdpa_attention_forward(alone, *doubled, None if mask == "none" else seen, scaling=0.2)
    bound = 2 * 2**-8 * value.double().abs().max()
    assert (found.cpu().double() - expected).abs().max() <= bound
    assert (found.cpu().double() - expected.roll(1, 2)).abs().max() > bound


@pytest.mark.parametrize(
    "change",
    [
        {"is_causal": True},
        {"attention_mask": torch.zeros(3, 4, 30, 30)},
        {"position_bias": torch.zeros(1, 4, 30, 30)},
        {"device": "cpu"},
    ],
    ids=str,
)
def test_a_tower_of_transformers_as_it_is_otherwise(change, monkeypatch):
    """What the kernel has no form for goes to transformers' own function, with all that was given."""
    from vllm_ascend.layers import transformers_tower

    arguments = {"attention_mask": None, "is_causal": False, "scaling": 0.2} | change
    rows = [torch.randn(3, 4, 30, 64).to(arguments.pop("device", "npu")) for _ in range(3)]
    seen = []
    monkeypatch.setattr(
        transformers_tower, "sdpa_attention_forward", lambda *args, **kwargs: seen.append((args, kwargs))
    )
    transformers_tower.attend(SimpleNamespace(), *rows, **arguments)
    ((args, kwargs),) = seen
    assert all(given is row for given, row in zip(args[1:4], rows, strict=True))
    assert args[4] is arguments.pop("attention_mask")
    assert {name: kwargs[name] for name in arguments} == arguments
