# SPDX-License-Identifier: Apache-2.0
"""transformers' mixers with a recurrent state, the same mathematics in float64 token by token, and this plugin's layers with the same weights on the NPU."""

import warnings
from copy import deepcopy
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

HIDDEN, WIDTH, BLOCKS = 48, 4, 5


class Projection(nn.Module):
    """A linear layer of transformers as vLLM's are called."""

    def __init__(self, linear, *, adds_bias=True):
        super().__init__()
        self.weight, self.bias, self.adds_bias = linear.weight, linear.bias, adds_bias

    def forward(self, x):
        return functional.linear(x, self.weight, self.bias if self.adds_bias else None), None


def convolved(mixer, rows):
    """Rows `[T, D]` after the convolution, in float64."""
    weight, padded = mixer.conv1d.weight[:, 0].double(), functional.pad(rows, (0, 0, WIDTH - 1, 0))
    out = sum(padded[tap : tap + len(rows)] * weight[:, tap] for tap in range(WIDTH))
    return functional.silu(out if mixer.conv1d.bias is None else out + mixer.conv1d.bias.double())


def linear(layer, x):
    return functional.linear(x, layer.weight.double(), None if layer.bias is None else layer.bias.double())


def rms(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


class Mamba:
    """One state for each channel and number."""

    def __init__(self):
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        config = MambaConfig(hidden_size=HIDDEN, state_size=8, conv_kernel=WIDTH, time_step_rank=5, use_bias=True)
        self.theirs = MambaMixer(config, 0)
        self.shapes = (WIDTH - 1, 2 * HIDDEN), (2 * HIDDEN, 8)

    def exact(self, hidden):
        m = self.theirs
        x, gate = linear(m.in_proj, hidden.double()).chunk(2, dim=-1)
        x = convolved(m, x)
        dt, b, c = linear(m.x_proj, x).split([5, 8, 8], dim=-1)
        dt, a = functional.softplus(linear(m.dt_proj, dt)), -m.A_log.double().exp()
        state, out = x.new_zeros(x.shape[1], 8), []
        for t in range(len(x)):
            state = torch.exp(dt[t, :, None] * a) * state + (dt[t] * x[t])[:, None] * b[t]
            out.append(state @ c[t] + m.D.double() * x[t])
        return linear(m.out_proj, torch.stack(out) * functional.silu(gate))

    def ours(self):
        from vllm_ascend.layers.mamba.mixers import AscendMambaMixer

        m, layer = self.theirs, bare(AscendMambaMixer)
        layer.in_proj, layer.x_proj, layer.out_proj = map(Projection, (m.in_proj, m.x_proj, m.out_proj))
        layer.dt_proj, layer.conv1d = Projection(m.dt_proj, adds_bias=False), m.conv1d
        layer.A, layer.D = nn.Parameter(-m.A_log.exp()), m.D
        layer.time_step_rank, layer.ssm_state_size = 5, 8
        layer.use_rms_norm = layer.is_lora_enabled = False
        return layer

    @staticmethod
    def run(layer, hidden):
        out = torch.full_like(hidden, torch.nan)
        layer.forward(hidden, out)
        return out


class Mamba2:
    """One decay a head; two groups of them share what is written and read."""

    def __init__(self):
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        config = Mamba2Config(
            hidden_size=HIDDEN, num_heads=8, head_dim=12, state_size=16, n_groups=2, conv_kernel=WIDTH
        )
        self.theirs = Mamba2Mixer(config, 0)
        self.shapes = (WIDTH - 1, 96 + 2 * 32), (8, 12, 16)

    def exact(self, hidden):
        m = self.theirs
        gate, rows, dt = linear(m.in_proj, hidden.double()).split([96, 160, 8], dim=-1)
        x, b, c = convolved(m, rows).split([96, 32, 32], dim=-1)
        x, (b, c) = x.view(-1, 8, 12), (each.view(-1, 2, 16).repeat_interleave(4, 1) for each in (b, c))
        dt, a = functional.softplus(dt + m.dt_bias.double()), -m.A_log.double().exp()
        state, out = x.new_zeros(8, 12, 16), []
        for t in range(len(x)):
            state = torch.exp(dt[t] * a)[:, None, None] * state + (dt[t, :, None] * x[t])[..., None] * b[t, :, None]
            out.append((state * c[t, :, None]).sum(-1) + m.D.double()[:, None] * x[t])
        y = torch.stack(out).flatten(1) * functional.silu(gate)
        return linear(m.out_proj, rms(y, m.norm.weight, m.norm.variance_epsilon))

    def ours(self):
        from vllm_ascend.layers.mamba.mixers import AscendMambaMixer2

        m, layer = self.theirs, bare(AscendMambaMixer2)
        layer.in_proj, layer.out_proj, layer.conv1d = Projection(m.in_proj), Projection(m.out_proj), m.conv1d
        layer.A, layer.D, layer.dt_bias = nn.Parameter(-m.A_log.exp()), m.D, m.dt_bias
        layer.norm = m.norm
        layer.num_heads, layer.head_dim, layer.ssm_state_size, layer.tp_size = 8, 12, 16, 1
        layer.tped_intermediate_size, layer.tped_conv_size, layer.tped_dt_size = 96, 160, 8
        layer.split_hidden_states_B_C_fn = lambda rows: rows.split([96, 32, 32], dim=-1)
        return layer

    @staticmethod
    def run(layer, hidden):
        return layer.forward(hidden)


class GatedDeltaNet:
    """Twice as many heads of values as of keys."""

    def __init__(self):
        from transformers import Qwen3NextConfig
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

        config = Qwen3NextConfig(
            hidden_size=HIDDEN, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
            linear_value_head_dim=12, linear_conv_kernel_dim=WIDTH,
        )  # fmt: skip
        self.theirs = Qwen3NextGatedDeltaNet(config, 0)
        self.shapes = (WIDTH - 1, 2 * 32 + 48), (4, 12, 16)

    def exact(self, hidden):
        m = self.theirs
        mixed = m.fix_query_key_value_ordering(
            *(linear(each, hidden.double())[None] for each in (m.in_proj_qkvz, m.in_proj_ba))
        )
        q, k, v, z, b, a = (each[0] for each in mixed)
        q, k, v = convolved(m, torch.cat([each.flatten(1) for each in (q, k, v)], dim=-1)).split([32, 32, 48], dim=-1)
        q, k = (each.view(-1, 2, 16).repeat_interleave(2, 1) for each in (q, k))
        q, k = (each * torch.rsqrt(each.square().sum(-1, keepdim=True) + 1e-6) for each in (q, k))
        v = v.view(-1, 4, 12)
        decay = (-m.A_log.double().exp() * functional.softplus(a + m.dt_bias.double())).exp()
        state, out = v.new_zeros(4, 12, 16), []
        for t in range(len(v)):
            state = state * decay[t, :, None, None]
            new = b[t].sigmoid()[:, None] * (v[t] - (state @ k[t][..., None])[..., 0])
            state = state + new[..., None] * k[t][:, None]
            out.append((state @ q[t][..., None])[..., 0] / 4)  # the root of 16
        y = rms(torch.stack(out), m.norm.weight, m.norm.variance_epsilon) * functional.silu(z)
        return linear(m.out_proj, y.flatten(1))

    def ours(self):
        with warnings.catch_warnings():  # vLLM's module imports much, of which torch warns
            warnings.simplefilter("ignore")
            from vllm_ascend.layers.mamba.gated_delta_net import AscendQwenGatedDeltaNetAttention

        m, layer = self.theirs, bare(AscendQwenGatedDeltaNetAttention)
        layer.in_proj_qkvz, layer.in_proj_ba, layer.out_proj = map(
            Projection, (m.in_proj_qkvz, m.in_proj_ba, m.out_proj)
        )
        layer.conv1d, layer.norm, layer.A_log, layer.dt_bias = m.conv1d, m.norm, m.A_log, m.dt_bias
        layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim = 2, 4, 16, 12
        layer.key_dim, layer.value_dim, layer.tp_size = 32, 48, 1
        layer.gqa_interleaved_layout, layer.enable_fused_gdn_spec_decode = True, False
        layer._forward_method = layer.forward_cuda
        return layer

    @staticmethod
    def run(layer, hidden):
        return layer.forward(hidden)


KINDS = {"mamba": Mamba, "mamba2": Mamba2, "gated delta net": GatedDeltaNet}


def bare(kind):
    """A layer without vLLM's constructor, which needs a configuration and groups of ranks."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.prefix = "layer"
    return layer


class Runner:
    """A layer on the NPU with a cache whose blocks are not finite before they are written."""

    def __init__(self, kind):
        self.kind, self.layer = kind, deepcopy(kind.ours()).to("npu")
        # As vLLM binds them: both are views of one page a block.
        sizes = [torch.Size(shape).numel() for shape in kind.shapes]
        pages = torch.full((BLOCKS, sum(sizes) + 3), torch.nan, device="npu")
        parts = pages.split([*sizes, 3], dim=1)[:2]
        self.layer.kv_cache = tuple(part.unflatten(1, shape) for part, shape in zip(parts, kind.shapes, strict=True))

    def step(self, rows, *, padding=0):
        """One step.

        Args:
            rows: (hidden states `[T, HIDDEN]` of a request, its earlier tokens, its block), in vLLM's order.
            padding: rows after the last token.

        Returns:
            Outputs of each request.
        """
        from vllm.forward_context import override_forward_context
        from vllm_ascend.layers.mamba.step import RecurrentStep, batches_of

        counts = [len(hidden) for hidden, _, _ in rows]
        starts = [sum(counts[:index]) for index in range(len(rows) + 1)]
        lengths = [len(hidden) + earlier for hidden, earlier, _ in rows]
        slots = torch.tensor([block for _, _, block in rows], device="npu")
        step = RecurrentStep(starts[-1], starts[1:], batches_of(starts, lengths, slots))
        hidden = functional.pad(torch.cat([hidden for hidden, _, _ in rows]), (0, 0, 0, padding)).to("npu")
        context = SimpleNamespace(attn_metadata={"layer": step}, no_compile_layers={"layer": self.layer})
        with override_forward_context(context), torch.inference_mode():
            out = self.kind.run(self.layer, hidden).cpu()
        return out[: starts[-1]].split(counts)
