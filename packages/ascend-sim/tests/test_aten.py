# SPDX-License-Identifier: Apache-2.0
"""The special cases of running aten operators on aliases: views, out=, generators, dtypes, devices, memory, streams."""

import gc
import subprocess
import sys

import pytest
import torch
import torch_npu
from sim_bounds import unit_roundoff
from torch.nn import functional

NPU = torch.device("npu")
MIB = 1 << 20


def pair(*shape, dtype=torch.float32):
    cpu = torch.randn(*shape).to(dtype)
    return cpu, cpu.to(NPU)


def same(npu, cpu, **tolerance):
    assert npu.device.type == "npu"
    torch.testing.assert_close(npu.cpu(), cpu, **tolerance)


# Views and in-place operators


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.unsqueeze(0),
        lambda t: t[:, :1].squeeze(1),
        lambda t: t.transpose(0, 1),
        lambda t: t.t(),
        lambda t: t.permute(1, 0),
        lambda t: t.contiguous(),
        lambda t: t.view(-1),
        lambda t: t.reshape(2, 12),
        lambda t: t.flatten(),
        lambda t: t.select(1, 2),
        lambda t: t.narrow(0, 1, 2),
        lambda t: t[::2, 1:],
        lambda t: t.diagonal(),
        lambda t: t.split(2, dim=1)[1],
        lambda t: t.split_with_sizes([1, 5], dim=1)[1],
        lambda t: t.chunk(3, dim=1)[0],
        lambda t: t.unbind(0)[3],
        lambda t: t.unfold(1, 2, 2),
        lambda t: t.as_strided((2, 2), (6, 1), 7),
        lambda t: t.detach(),
        lambda t: t.view(torch.int32),
        lambda t: torch.movedim(t, 0, 1),
        lambda t: t.expand(4, 6)[0],
        lambda t: t.swapaxes(0, 1)[2:],
        lambda t: t.view(2, 2, 6).flatten(0, 1),
        lambda t: torch.view_as_complex(t.view(4, 3, 2)),
        lambda t: t.unflatten(1, (2, 3)),
        lambda t: t.T[1],
    ],
)
def test_a_view_is_written_through(view):
    cpu, npu = pair(4, 6)
    view(cpu).fill_(3)
    view(npu).fill_(3)
    same(npu, cpu)


def test_a_view_shares_memory_and_strides_with_its_base():
    base = torch.zeros(4, 6, device=NPU)
    view = base.unsqueeze(1).transpose(0, 2)
    assert view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    assert (view.shape, view.stride(), view.storage_offset()) == ((6, 1, 4), (1, 6, 6), 0)
    assert base[2:].data_ptr() == base.data_ptr() + 2 * 6 * 4


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.unsqueeze_(0),
        lambda t: t.unsqueeze_(0).squeeze_(),
        lambda t: t.t_(),
        lambda t: t.transpose_(0, 1),
        lambda t: t.swapaxes_(0, 1),
        lambda t: t.as_strided_((3, 2), (1, 6)),
        lambda t: t.resize_(2, 2),
        lambda t: t.resize_(3, 6)[:2].clone(),
    ],
)
def test_operators_that_change_the_shape_in_place(change):
    cpu, npu = pair(2, 6)
    out, expected = change(npu), change(cpu)
    assert (out.shape, out.stride()) == (expected.shape, expected.stride())
    if npu.numel() <= 12:
        same(npu, cpu)
        assert npu.stride() == cpu.stride()


def test_in_place_operators_return_the_same_object():
    t = torch.ones(3, device=NPU)
    assert t.add_(1) is t
    assert t.mul_(2).data_ptr() == t.data_ptr()
    same(t, torch.full((3,), 4.0))


@pytest.mark.parametrize("size", [0, 2, 3, 7])
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_out_of_any_size_is_resized(size):
    cpu, npu = pair(3)
    out = torch.empty(size, device=NPU)
    assert torch.add(npu, 1, out=out) is out
    same(out, cpu + 1)


def test_out_is_a_view_and_has_another_dtype():
    cpu, npu = pair(3, 4)
    target = torch.zeros(3, 8, device=NPU)
    torch.mm(npu, npu.t(), out=target[:, 1:4])
    same(target[:, 1:4], cpu @ cpu.t())
    assert target[:, 4:].abs().sum() == 0
    assert target[:, 0].abs().sum() == 0
    same(torch.add(npu, 1, out=torch.empty(3, 4, device=NPU, dtype=torch.float64)), (cpu + 1).double())


def test_several_outs():
    cpu, npu = pair(3, 5)
    values, indices = torch.empty(0, device=NPU), torch.empty(0, dtype=torch.long, device=NPU)
    torch.max(npu, 1, out=(values, indices))
    same(values, cpu.max(1).values)
    same(indices, cpu.max(1).indices)


def test_list_operators():
    cpus, npus = [list(column) for column in zip(pair(3), pair(2, 2), strict=True)]
    torch._foreach_add_(npus, 1)
    torch._foreach_add_(cpus, 1)
    for npu, cpu in zip(
        npus + list(torch._foreach_mul(npus, npus)), cpus + list(torch._foreach_mul(cpus, cpus)), strict=True
    ):
        same(npu, cpu)
    same(torch.cat([npus[0], npus[1].flatten()]), torch.cat([cpus[0], cpus[1].flatten()]))
    same(torch.stack([npus[0], npus[0]]), torch.stack([cpus[0], cpus[0]]))


def test_set_shares_storage():
    a, b = torch.arange(6.0, device=NPU), torch.empty(0, device=NPU)
    b.set_(a.untyped_storage(), 2, (2, 2), (2, 1))
    b.zero_()
    same(a, torch.tensor([0.0, 1, 0, 0, 0, 0]))
    assert b.is_set_to(a[2:].view(2, 2))


# Numbers, dtypes, formats


def test_wrapped_numbers_do_not_promote():
    assert (torch.ones(2, dtype=torch.bfloat16, device=NPU) * 2.5).dtype == torch.bfloat16
    assert (torch.ones(2, dtype=torch.int32, device=NPU) + 1).dtype == torch.int32
    assert (torch.ones(2, dtype=torch.int32, device=NPU) + torch.tensor(1.5)).dtype == torch.float32
    assert (torch.ones(2, dtype=torch.float16, device=NPU) + torch.ones((), device=NPU)).dtype == torch.float16


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool],
)
def test_to_another_dtype_and_back(dtype):
    cpu, npu = pair(3, 4)
    same(npu.to(dtype), cpu.to(dtype))
    assert torch.equal(npu.to("cpu", dtype), cpu.to(dtype))
    same(cpu.to(NPU, dtype), cpu.to(dtype))


def test_to_keeps_or_changes_the_memory_format():
    cpu, npu = pair(2, 3, 4, 5)
    last = npu.to(memory_format=torch.channels_last)
    assert last.stride() == cpu.to(memory_format=torch.channels_last).stride()
    same(last, cpu)
    assert cpu.permute(3, 1, 0, 2).to(NPU).stride() == cpu.permute(3, 1, 0, 2).stride()
    assert npu.permute(3, 1, 0, 2).to(torch.float16).stride() == cpu.permute(3, 1, 0, 2).to(torch.float16).stride()
    sliced = cpu.permute(1, 0, 2, 3)[:, :, ::2]
    assert sliced.to(NPU).stride() == sliced.clone().stride()
    same(sliced.to(NPU), sliced)
    same(cpu[:1].expand(4, 3, 4, 5).to(NPU), cpu[:1].expand(4, 3, 4, 5))


def test_results_keep_the_strides_of_the_cpu():
    cpu, npu = pair(4, 6)
    assert (npu.t() + 1).stride() == (cpu.t() + 1).stride()
    assert torch.empty_like(npu.t()).stride() == torch.empty_like(cpu.t()).stride()
    same(npu.t()[::2] * 2, cpu.t()[::2] * 2)


def test_conjugates_and_negatives_are_lazy_and_right():
    cpu, npu = pair(5, dtype=torch.complex64)
    npu = (cpu := torch.complex(torch.randn(5), torch.randn(5))).to(NPU)
    assert npu.conj().is_conj()
    same(npu.conj().resolve_conj(), cpu.conj().resolve_conj())
    assert torch.equal(npu.conj().cpu(), cpu.conj())
    assert torch.equal(npu.conj().imag.cpu(), cpu.conj().imag)
    same(torch.zeros_like(npu).copy_(npu.conj()), cpu.conj().resolve_conj())
    same(npu.conj() @ npu, cpu.conj() @ cpu)
    same(torch.view_as_real(npu), torch.view_as_real(cpu))


def test_zero_tensors_have_memory():
    same(torch._efficientzerotensor((2, 3), device=NPU) + torch.ones(3, device=NPU), torch.ones(2, 3))


def test_scalars_leave_the_device():
    t = torch.tensor([1.5, float("nan")], device=NPU)
    assert t[0].item() == 1.5
    assert t.isnan().tolist() == [False, True]
    assert bool(t[0] > 1)
    assert torch.tensor(7, device=NPU).item() == 7


def test_empty_and_zero_dimensional_tensors():
    assert torch.ones(0, 3, device=NPU).sum().item() == 0
    assert torch.cat([torch.ones(0, 3, device=NPU), torch.ones(2, 3, device=NPU)]).shape == (2, 3)
    assert torch.ones((), device=NPU).add_(1).item() == 2
    assert torch.nonzero(torch.zeros(3, device=NPU)).shape == (0, 1)


# Devices


def test_indices_may_be_on_the_cpu():
    cpu, npu = pair(4, 3)
    rows = torch.tensor([2, 0])
    same(npu[rows], cpu[rows])
    same(npu[rows.to(NPU)], cpu[rows])
    same(npu[npu > 0], cpu[cpu > 0])
    npu[rows] = 7.0
    cpu[rows] = 7.0
    same(npu, cpu)


def test_other_cpu_tensors_are_refused():
    with pytest.raises(RuntimeError, match=r"found at least two devices, npu:0 and cpu! \(operator aten::add\)"):
        torch.ones(2, device=NPU) + torch.ones(2)
    with pytest.raises(RuntimeError, match="two devices"):
        torch.ones(2) + torch.ones(2, device=NPU)
    with pytest.raises(RuntimeError, match="two devices"):
        torch.ones(2)[torch.tensor([0], device=NPU)]
    assert (torch.ones(2, device=NPU) + torch.tensor(1.0)).tolist() == [2, 2]


def test_two_npus_are_two_devices():
    first, second = torch.ones(2, device="npu:0"), torch.ones(2, device="npu:1")
    assert second.device.index == 1
    assert (second + 1).device.index == 1
    with pytest.raises(RuntimeError, match="npu:0 and npu:1"):
        first + second
    assert (first + second.to("npu:0")).tolist() == [2, 2]
    assert torch.zeros(2, device="npu:0").copy_(second).tolist() == [1, 1]
    with torch.npu.device(1):
        assert torch.ones(1, device="npu").device.index == 1
        assert torch.npu.current_device() == 1
    assert torch.npu.current_device() == 0


def test_factories():
    same(torch.arange(5, device=NPU), torch.arange(5))
    same(torch.full((2,), 3.5, device=NPU), torch.full((2,), 3.5))
    same(torch.tensor([[1, 2]], device=NPU), torch.tensor([[1, 2]]))
    same(torch.eye(3, device=NPU), torch.eye(3))
    assert torch.zeros_like(torch.ones(2, device=NPU), device="cpu").device.type == "cpu"
    assert torch.zeros_like(torch.ones(2), device=NPU).device.type == "npu"


# Operators that torch_npu differentiates by itself


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "run",
    [
        lambda t: functional.scaled_dot_product_attention(t, t, t, is_causal=True),
        lambda t: functional.softmax(t, dim=-1),
        lambda t: torch.matmul(t, t.transpose(-1, -2)),
        lambda t: torch.where(t > 0, t, -t),
        lambda t: t.transpose(1, 2).contiguous(),
        lambda t: torch.gather(t, 3, torch.zeros(1, 2, 4, 1, dtype=torch.long, device=t.device)),
        lambda t: t.repeat_interleave(2),
        lambda t: functional.logsigmoid(t),
        lambda t: functional.linear(t, torch.ones(3, 8, device=t.device)),
        lambda t: functional.binary_cross_entropy_with_logits(t, torch.zeros_like(t)),
        lambda t: functional.l1_loss(t, torch.zeros_like(t)),
        lambda t: torch.sgn(t) * t,
    ],
)
def test_operators_with_npu_autograd_kernels(run, grad):
    cpu = torch.randn(1, 2, 4, 8)
    npu = cpu.to(NPU).requires_grad_(grad)
    cpu.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        out, expected = run(npu), run(cpu)
    same(out.detach(), expected.detach())
    assert out.requires_grad == grad
    if grad:
        out.square().sum().backward()
        expected.square().sum().backward()
        same(npu.grad, cpu.grad)
    with torch.inference_mode():
        same(run(npu.detach()).clone(), expected.detach())


def test_one_hot():
    ids = torch.tensor([1, 3, 0])
    same(functional.one_hot(ids.to(NPU), 4), functional.one_hot(ids, 4))
    same(functional.one_hot(ids.to(NPU)), functional.one_hot(ids))


def test_a_module_trains_as_on_the_cpu():
    """In float64: where the result keeps half of the digits after three steps of an optimizer, the same was computed, whatever order its sums had."""
    torch.manual_seed(0)
    cpu = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    npu = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 2)).to(
        NPU
    )
    npu.load_state_dict(cpu.state_dict())
    batch = torch.randn(16, 4, dtype=torch.float64)
    for model, x in ((cpu.double(), batch), (npu.double(), batch.to(NPU))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for trained, expected in zip(npu.parameters(), cpu.parameters(), strict=True):
        half_of_the_digits = unit_roundoff(torch.float64) ** 0.5
        same(trained.detach(), expected.detach(), rtol=half_of_the_digits, atol=half_of_the_digits)


# Random numbers


def draws(generator=None):
    return torch.cat(
        [
            torch.rand(3, device=NPU, generator=generator),
            torch.randn(3, device=NPU, generator=generator),
            torch.empty(3, device=NPU).exponential_(generator=generator),
            torch.multinomial(torch.ones(50, device=NPU), 3, generator=generator).float(),
            torch.randperm(50, device=NPU, generator=generator)[:3].float(),
        ]
    ).cpu()


def test_manual_seed_covers_the_npu():
    torch.manual_seed(5)
    first, second = draws(), draws()
    torch.manual_seed(5)
    assert torch.equal(draws(), first)
    assert torch.equal(draws(), second)
    assert not torch.equal(first, second)
    torch.npu.manual_seed(6)
    assert not torch.equal(draws(), first)


def test_generators_are_reproducible_and_apart():
    one, two = torch.Generator(NPU).manual_seed(1), torch.Generator(NPU).manual_seed(2)
    alone = [draws(torch.Generator(NPU).manual_seed(1)) for _ in range(2)]
    assert torch.equal(*alone)
    mixed = [(draws(one), draws(two)) for _ in range(2)]
    assert torch.equal(mixed[0][0], alone[0])
    assert not torch.equal(mixed[0][0], mixed[0][1])
    assert not torch.equal(mixed[0][0], mixed[1][0])
    assert one.initial_seed() == 1
    assert one.device.type == "npu"


def test_generator_state_goes_back_and_forth():
    generator = torch.Generator(NPU).manual_seed(3)
    draws(generator)
    state = generator.get_state()
    after = draws(generator)
    generator.set_state(state)
    assert torch.equal(draws(generator), after)
    state = torch.npu.get_rng_state()
    after = draws()
    torch.npu.set_rng_state(state)
    assert torch.equal(draws(), after)


def test_dropout_draws_from_the_npu_generator_alone():
    ones = torch.ones(1000, device=NPU)
    masks = []
    for _ in range(2):
        torch.manual_seed(9)
        masks.append(
            [
                functional.dropout(ones, 0.5).cpu(),
                torch.native_dropout(ones, 0.5, True)[0].cpu(),
                functional.dropout(ones, 0.5).cpu(),
            ]
        )
        masks[-1].append(torch.rand(3))  # the CPU's generator has not moved
    torch.manual_seed(9)
    assert torch.equal(masks[0][3], torch.rand(3))
    for first, second in zip(*masks, strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(masks[0][0], masks[0][2])
    assert abs(masks[0][0].count_nonzero() - 500) < 5 * 250**0.5  # five standard deviations of 1000 halves


def test_the_numbers_are_random():
    torch.manual_seed(0)
    sample = torch.cat([torch.randn(4, device=NPU) for _ in range(2500)])
    deviations = 5  # of the mean and the standard deviation of so many normal numbers: 1 / sqrt(n) and 1 / sqrt(2 n)
    assert abs(sample.mean()) < deviations / len(sample) ** 0.5
    assert abs(sample.std() - 1) < deviations / (2 * len(sample)) ** 0.5
    assert sample.unique().numel() > 9900


# Memory


def test_pinned_memory_and_asynchronous_copies():
    plain = torch.ones(4)
    pinned = plain.pin_memory()
    assert pinned.is_pinned()
    assert pinned[2:].is_pinned()
    assert not plain.is_pinned()
    assert torch.empty(4, pin_memory=True).is_pinned()
    npu = pinned.to(NPU, non_blocking=True)
    pinned.copy_(npu * 2, non_blocking=True)
    torch.npu.synchronize()
    assert pinned.tolist() == [2, 2, 2, 2]


def test_memory_is_accounted():
    gc.collect()
    torch.npu.empty_cache()
    free, total = torch.npu.mem_get_info()
    allocated = torch.npu.memory_allocated()
    assert total == 4 << 30
    block = torch.empty(64 * MIB, dtype=torch.uint8, device=NPU)
    assert torch.npu.memory_allocated() - allocated >= 64 * MIB
    assert free - torch.npu.mem_get_info()[0] >= 64 * MIB
    assert torch.npu.mem_get_info(1)[0] == total
    del block
    gc.collect()
    assert torch.npu.memory_allocated() == allocated
    assert torch.npu.mem_get_info()[0] < free
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info()[0] == free
    assert torch.accelerator.get_memory_info(0) == torch.npu.mem_get_info(0)


def test_out_of_memory_is_real_and_leaves_the_device_usable():
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 5\.00 GiB"):
        torch.empty(5 << 30, dtype=torch.uint8, device=NPU)
    gc.collect()
    torch.npu.empty_cache()
    assert torch.ones(1000, device=NPU).sum().item() == 1000
    assert torch.npu.mem_get_info()[0] > 3 << 30


# Streams and events


def test_streams_and_events():
    stream = torch.npu.Stream()
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    start.record()
    with torch.npu.stream(stream):
        assert torch.npu.current_stream() == stream
        t = torch.ones(3, device=NPU) * 2
        t.record_stream(stream)
    end.record(stream)
    torch.npu.current_stream().wait_stream(stream)
    end.synchronize()
    assert end.query()
    assert stream.query()
    assert start.elapsed_time(end) >= 0
    assert torch.npu.current_stream() == torch.npu.default_stream()
    assert t.tolist() == [2, 2, 2]


def test_the_device_introduces_itself():
    assert torch.npu.is_available()
    assert torch.npu.device_count() == 8
    assert torch.npu.get_device_name() == "Ascend910B3"
    assert torch.accelerator.current_accelerator().type == "npu"
    assert torch.npu.get_device_properties(0).total_memory == 4 << 30
    assert torch_npu.npu.utils.get_cann_version() == "8.5.0"
    with pytest.raises(RuntimeError, match=r"107001|device"):
        torch.ones(1, device="npu:8")


# What is not simulated


def test_an_operator_without_a_kernel_fails_with_its_name():
    names = [name for name in ("npu_ciou", "npu_bounding_box_encode", "npu_giou") if hasattr(torch_npu, name)]
    boxes = torch.ones(4, 4, device=NPU)
    for name in names:
        with pytest.raises(RuntimeError, match=r"(?i)" + name.removeprefix("npu_").replace("_", "")[:4]):
            getattr(torch_npu, name)(boxes, boxes, *([0.0] * 4, [1.0] * 4) if "encode" in name else ())
    assert names


def test_sparse_tensors_fail_with_the_operators_name():
    with pytest.raises(NotImplementedError, match=r"aten::\w+ makes a tensor of layout Sparse"):
        torch.eye(3, device=NPU).to_sparse()


def test_deepcopy_pickle_and_numpy_go_by_the_cpu(tmp_path):
    cpu, npu = pair(3)
    torch.save({"t": npu}, tmp_path / "t.pt")
    same(torch.load(tmp_path / "t.pt")["t"], cpu)
    assert torch.equal(torch.load(tmp_path / "t.pt", map_location="cpu")["t"], cpu)
    with pytest.raises(TypeError, match="can't convert npu"):
        npu.numpy()


def test_a_program_with_nothing_special_is_silent_on_standard_output():
    code = "import torch; print((torch.ones(2, device='npu') + 1).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800, check=True)
    assert done.stdout == "[2.0, 2.0]\n"
    assert "HcclSetConfig" not in done.stderr
