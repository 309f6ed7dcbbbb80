# SPDX-License-Identifier: Apache-2.0
"""What each rank does: a layer on its tokens and slots, against the dense layer in float64, which every rank knows by seed.

Legend: n tokens of a rank, T tokens of a dispatcher, E experts, S slots, L slots of a rank, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from ascend_comm import Solo
from moe_bounds import Layer, assert_close, float_layer, w8a8_layer
from moe_oracle import Replicas, gates, normal, replicas
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ascend_moe import (
    Activation,
    CommMethod,
    FloatExperts,
    MoeOutput,
    Partial,
    Reduced,
    RoutingSpec,
    SharedExperts,
    Soc,
    W8A8Experts,
    experts_forward,
    forward_selected,
    make_comm,
    quantise_weights,
    reduced,
    select_experts,
)
from ascend_moe.shared import start_on

H, I, E = 64, 64, 8  # noqa: E741
SIZES = ((2, 1, 2), (2, 2, 1), (4, 2, 2), (4, 4, 1), (8, 4, 2), (8, 1, 8))
"""Ranks, data parallel size, tensor parallel size."""

METHODS = GATHER, EXCHANGE, MC2 = CommMethod.ALL_GATHER, CommMethod.ALL_TO_ALL_V, CommMethod.MC2
W13, W2 = normal(E, H, 2 * I, seed=1) / H**0.5, normal(E, I, H, seed=2) / I**0.5
SHARED = normal(H, H, seed=3) / H**0.5
IN_ORDER = Replicas(experts=E, slots=tuple(range(E)))


@dataclass(frozen=True)
class Traffic:
    """Logits for all tokens, and how many of these each group of ranks with the same tokens has."""

    counts: tuple[int, ...]
    top_k: int
    logits: Tensor

    @property
    def spec(self) -> RoutingSpec:
        return RoutingSpec(top_k=self.top_k, scoring="softmax", renormalise=True)


def traffics(owners: int) -> dict[str, Traffic]:
    """Random and adversarial routing for `owners` groups of ranks with tokens of their own."""
    ragged = tuple((5, 0, 9, 2, 7, 1, 3, 12)[:owners])
    even = (11,) * owners

    def random(counts: tuple[int, ...]) -> Tensor:
        return normal(sum(counts), E, seed=10 + sum(counts))

    favourite, shunned = random(even), random(even)
    favourite[:, 5] += 50
    shunned[:, 2] -= 50
    return {
        "even": Traffic(even, 2, random(even)),
        "ragged": Traffic(ragged, 3, random(ragged)),
        "all tokens to one expert": Traffic(even, 1, favourite),
        "an expert with none": Traffic(even, 2, shunned),
        "one token": Traffic((1,) + (0,) * (owners - 1), 2, random((1,))),
        "top k = experts": Traffic(even, E, random(even)),
        "no token": Traffic((0,) * owners, 2, random((0,))),
    }


def positions(traffic: Traffic, method: CommMethod, tp: int, sequence: bool) -> list[int]:
    """Of every token, its place among the tokens that its dispatcher sees: this decides on the replica."""
    places = []
    for owner, count in enumerate(traffic.counts):
        for i in range(count):
            if method is GATHER:
                places.append(sum(traffic.counts[:owner]) + i if sequence else owner * max(traffic.counts) + i)
            elif sequence:
                places.append(i)
            else:
                longest = max(traffic.counts) if method is MC2 else count
                places.append(i % -(-longest // tp))
    return places


def expected_load(slots_TK: list[list[int]], num_slots: int) -> list[int]:
    load = [0] * num_slots
    for row in slots_TK:
        for slot in row:
            load[slot] += 1
    return load


class Rank:
    """This process among the ranks of one set of parallel sizes: its tokens, its slots and their experts, and what the result has to be."""

    def __init__(
        self,
        world: Any,
        sizes: tuple[int, int, int],
        method: CommMethod,
        *,
        sequence: bool = False,
        where: Replicas = IN_ORDER,
        soc: Soc = Soc.A3,
    ) -> None:
        size, dp, self.tp = sizes
        self.world, self.method, self.sequence = world, method, sequence
        self.owners, self.owner = (size, world.rank) if sequence else (dp, world.rank // self.tp)
        self.where = where
        self.num_slots = len(self.where.slots)
        self.env = world.env(*sizes, self.num_slots, sequence_parallel=sequence, soc=soc)
        self.comm = make_comm(method, self.env)
        start = world.rank * self.env.slots_per_rank
        self.held = list(self.where.slots[start : start + self.env.slots_per_rank])
        self.experts = FloatExperts(w13=self.put(W13[self.held]), w2=self.put(W2[self.held]))
        self.traffics = traffics(self.owners)

    def put(self, x: Tensor) -> Tensor:
        return x.to(self.world.device)

    def own(self, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        """This rank's part of what belongs to all tokens."""
        return x.split(counts)[self.owner]

    def tokens(self, traffic: Traffic, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Hidden states and logits of this rank."""
        both = (hidden(traffic).to(dtype), traffic.logits)
        return tuple(self.put(self.own(x, traffic.counts)) for x in both)

    def forward(self, traffic: Traffic, **changed: Any) -> MoeOutput:
        """The layer on this rank's tokens."""
        options = {"spec": traffic.spec, "experts": self.experts, "comm": self.comm, "tokens": traffic.counts}
        return experts_forward(*self.tokens(traffic), **options | changed)

    def check(self, output: MoeOutput, traffic: Traffic, shared: Tensor | None = None) -> None:
        """The output is that of the dense layer, plus the product with a shared weight `[H, H]`."""
        assert isinstance(output, Partial if self.method is GATHER and not self.sequence else Reduced)
        assert self.comm.output_is_reduced is isinstance(output, Reduced)
        x = hidden(traffic)
        dense = float_layer(x, gates(traffic.logits, traffic.spec), W13, W2)
        if shared is not None:
            magnitude = x.double().abs() @ shared.double().abs()
            dense = dense.plus(x.double() @ shared.double(), magnitude, H, torch.float32)
        close(reduced(output, self.env.tp), self.own_layer(dense, traffic))

    def own_layer(self, dense: Layer, traffic: Traffic) -> Layer:
        """This rank's tokens of a layer."""
        return dense.split(traffic.counts)[self.owner]

    def total_load(self, output: MoeOutput) -> list[int]:
        """The load of all slots, from each rank's own."""
        return self.env.ep.all_gather(output.load, 0).tolist()


def hidden(traffic: Traffic) -> Tensor:
    """Hidden states of all tokens."""
    return normal(sum(traffic.counts), H, seed=20)


def chosen(traffic: Traffic) -> list[list[int]]:
    """The experts of all tokens."""
    return select_experts(traffic.logits, traffic.spec)[1].tolist()


def close(actual: Tensor, dense: Layer) -> None:
    """Within what rounding may add to the dense layer."""
    assert_close(actual, dense.out, dense.allowed)


def equals_dense(world: Any, sizes: tuple[int, int, int], method: CommMethod, sequence: bool) -> None:
    """One method over one set of parallel sizes: every traffic, with and without redundant slots, the replica chosen by token."""
    for redundant in (0, 8):
        rank = Rank(world, sizes, method, sequence=sequence, where=replicas(E, redundant))
        table = rank.where.table(rows=5)
        used: set[int] = set()
        for name, traffic in rank.traffics.items():
            try:
                output = rank.forward(traffic, routing_table=rank.put(table))
                rank.check(output, traffic)
                places = positions(traffic, method, rank.tp, sequence)
                slots = [[int(table[t % 5, e]) for e in row] for t, row in zip(places, chosen(traffic), strict=True)]
                load = rank.total_load(output)
                assert load == expected_load(slots, rank.num_slots), "wrong load"
                used.update(slot for slot, count in enumerate(load) if count)
            except Exception as error:
                error.add_note(f"{name}, {redundant} redundant slots, rank {world.rank}")
                raise
        assert used == set(range(E + redundant)), f"slots without a token: {set(range(E + redundant)) - used}"


def kernels_of_a2(world: Any, sizes: tuple[int, int, int], method: CommMethod) -> None:
    """A2's kernels of MC2 take other arguments."""
    rank = Rank(world, sizes, method, soc=Soc.A2)
    for traffic in rank.traffics.values():
        rank.check(rank.forward(traffic), traffic)


def replica_by_rank(world: Any, sizes: tuple[int, int, int], method: CommMethod) -> None:
    """`log2phy`: each rank sends to replicas of its own choice."""
    rank = Rank(world, sizes, method, where=replicas(E, 8))
    traffic = rank.traffics["even"]
    output = rank.forward(traffic, log2phy=rank.put(rank.where.log2phy(world.rank)))
    rank.check(output, traffic)
    rows = -(-11 // rank.tp)
    senders = [owner * rank.tp + i // rows for owner in range(rank.owners) for i in range(11)]
    slots = [
        [int(rank.where.log2phy(sender)[e]) for e in row] for sender, row in zip(senders, chosen(traffic), strict=True)
    ]
    assert rank.total_load(output) == expected_load(slots, 16)


def padding_reaches_nobody(world: Any, sizes: tuple[int, int, int], method: CommMethod, sequence: bool) -> None:
    """Padding made by the caller holds NaN: it changes no token, is in no count, and goes to no expert."""
    rank = Rank(world, sizes, method, sequence=sequence)
    spec = RoutingSpec(top_k=2, scoring="sigmoid", renormalise=True)
    padded, real = 9, [3, 9, 0, 5, 8, 1, 9, 2][: rank.owners]
    x, logits = normal(rank.owners, padded, H, seed=30), normal(rank.owners, padded, E, seed=31)
    for i, count in enumerate(real):
        x[i, count:], logits[i, count:] = torch.nan, torch.nan
    count = real[rank.owner]
    output = experts_forward(
        rank.put(x[rank.owner]),
        rank.put(logits[rank.owner]),
        spec=spec,
        experts=rank.experts,
        comm=rank.comm,
        mask=rank.put(torch.arange(padded) < count),
    )
    x, mine = x[rank.owner, :count], logits[rank.owner, :count]
    close(reduced(output, rank.env.tp)[:count], float_layer(x, gates(mine, spec), W13, W2))
    ids = [row for i, n in enumerate(real) for row in select_experts(logits[i, :n], spec)[1].tolist()]
    assert rank.total_load(output) == expected_load(ids, E)


def nan_stays_with_its_token(world: Any, sizes: tuple[int, int, int], method: CommMethod) -> None:
    """One request gone wrong spoils no other one's tokens."""
    rank = Rank(world, sizes, method)
    traffic = rank.traffics["even"]
    for bad in range(sum(traffic.counts)):
        x = hidden(traffic)
        x[bad] = torch.nan
        mine = [rank.put(rank.own(part, traffic.counts)) for part in (x, traffic.logits)]
        output = experts_forward(*mine, spec=traffic.spec, experts=rank.experts, comm=rank.comm, tokens=traffic.counts)
        result = reduced(output, rank.env.tp).cpu()
        dense = rank.own_layer(float_layer(x, gates(traffic.logits, traffic.spec), W13, W2), traffic)
        spoilt = dense.out.isnan().any(dim=1)
        assert torch.equal(result.isnan().any(dim=1), spoilt), f"token {bad}"
        close(result[~spoilt], Layer(dense.out[~spoilt], dense.allowed[~spoilt]))


def selected_elsewhere(world: Any, sizes: tuple[int, int, int], method: CommMethod, sequence: bool) -> None:
    """Weights and slots from another router: `forward_selected` equals `experts_forward`, bit for bit."""
    rank = Rank(world, sizes, method, sequence=sequence)
    traffic = rank.traffics["ragged"]
    x, logits = rank.tokens(traffic)
    routed = select_experts(logits, traffic.spec)
    given = forward_selected(x, *routed, experts=rank.experts, comm=rank.comm, tokens=traffic.counts)
    whole = rank.forward(traffic)
    assert torch.equal(given.hidden, whole.hidden)
    assert torch.equal(given.load, whole.load)
    assert type(given) is type(whole)


def shared_experts(world: Any, sizes: tuple[int, int, int], method: CommMethod, sequence: bool) -> None:
    """The shared MLP in each mode, on the current stream and on a second one."""
    rank = Rank(world, sizes, method, sequence=sequence)
    weight = rank.put(SHARED)
    shard = torch.zeros_like(weight)  # without the rows of the other TP ranks: a partial product
    rows = slice(world.rank % rank.tp * H // rank.tp, (world.rank % rank.tp + 1) * H // rank.tp)
    shard[rows] = weight[rows]
    streams: list[torch.Stream | None] = [None, torch.Stream(world.device)]
    for name, stream in product(("even", "ragged", "one token"), streams):
        traffic = rank.traffics[name]
        passed: list[int] = []

        def whole(part: Tensor, passed: list[int] = passed) -> Tensor:
            passed.append(len(part))
            return part @ weight

        modes = [SharedExperts(mlp=whole, mode="replicated", stream=stream)]
        if not sequence:
            modes.append(SharedExperts(mlp=lambda part: part @ shard, mode="tensor_parallel", stream=stream))
        for shared in modes:
            rank.check(rank.forward(traffic, shared=shared), traffic, SHARED)
        longest = -(-max(traffic.counts) // (1 if sequence else rank.tp))
        assert sum(passed) <= longest, "more than the own tokens"
    x, made = torch.ones(3, H, device=world.device), []
    wait = start_on(streams[1], lambda part: made.append(part @ weight) or made[-1], x)
    assert made[0].isnan().all(), "lazy streams would show a missing wait"
    assert torch.equal(wait(), x @ weight)


def w8a8(world: Any, sizes: tuple[int, int, int], method: CommMethod, dtype: torch.dtype) -> None:
    """int8 experts against the dense layer in float64 with rows rounded to int8 where the kernels round them."""
    rank = Rank(world, sizes, method)
    (q13, s13), (q2, s2) = quantise_weights(W13), quantise_weights(W2)
    if dtype == torch.bfloat16:
        s2 = s2.bfloat16()
    mine = [rank.put(x[rank.held]) for x in (q13, s13, q2, s2)]
    for activation, name in product((Activation(), Activation(limit=1.0)), ("even", "ragged", "no token")):
        experts = W8A8Experts(w13=mine[0], w13_scale=mine[1], w2=mine[2], w2_scale=mine[3], activation=activation)
        traffic = rank.traffics[name]
        output = experts_forward(
            *rank.tokens(traffic, dtype), spec=traffic.spec, experts=experts, comm=rank.comm, tokens=traffic.counts
        )
        result = reduced(output, rank.env.tp)
        assert result.dtype == dtype
        x = hidden(traffic).to(dtype)
        dense = w8a8_layer(x, gates(traffic.logits, traffic.spec), q13, s13, q2, s2, activation, dtype)
        try:
            close(result, rank.own_layer(dense, traffic))
        except AssertionError as error:
            error.add_note(name)
            raise


class Waits(TorchDispatchMode):
    """Counts the operators for which the host waits on the device."""

    VALUES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::repeat_interleave.Tensor", "aten::masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        name = op._schema.name if not op._schema.overload_name else f"{op._schema.name}.{op._schema.overload_name}"
        from_npu = any(isinstance(arg, Tensor) and arg.device.type == "npu" for arg in args)
        to_cpu = isinstance(result, Tensor) and result.device.type == "cpu"
        depends = name.startswith(self.VALUES) and not (kwargs or {}).get("output_size")
        if from_npu and (to_cpu or depends):
            self.found.append(name)
        return result


def host_waits_once_at_most(world: Any, sizes: tuple[int, int, int], method: CommMethod) -> None:
    """Only all-to-all-v asks the device for numbers, once a layer."""
    rank = Rank(world, sizes, method, where=replicas(E, 8))
    table = rank.put(rank.where.table(rows=3))
    with Waits() as waits:
        torch.ones(1, device=world.device).tolist()
    assert len(waits.found) == 1, "this test sees no wait"
    for name in ("even", "ragged"):
        with Waits() as waits:
            rank.forward(rank.traffics[name], routing_table=table)
        assert len(waits.found) == (1 if method is EXCHANGE else 0), waits.found


def bfloat16(world: Any, sizes: tuple[int, int, int], method: CommMethod) -> None:
    """In bfloat16 the kernels check all that their documentation asks for."""
    rank = Rank(world, sizes, method)
    experts = FloatExperts(w13=rank.experts.w13.bfloat16(), w2=rank.experts.w2.bfloat16())
    for name, traffic in rank.traffics.items():
        x, logits = rank.tokens(traffic, torch.bfloat16)
        output = experts_forward(x, logits, spec=traffic.spec, experts=experts, comm=rank.comm, tokens=traffic.counts)
        wide = (W13.bfloat16(), W2.bfloat16())
        dense = float_layer(
            hidden(traffic).bfloat16(), gates(traffic.logits, traffic.spec), *wide, dtype=torch.bfloat16
        )
        result = reduced(output, rank.env.tp)
        assert result.dtype == torch.bfloat16
        try:
            close(result, rank.own_layer(dense, traffic))
        except AssertionError as error:
            error.add_note(name)
            raise


def without_expert_parallelism(world: Any, sizes: tuple[int, int, int]) -> None:
    """Every rank has a shard of every expert: its columns of gate and up, its rows of down."""
    rank = Rank(world, sizes, GATHER)
    size = sizes[0]
    comm = make_comm(GATHER, replace(rank.env, ep=Solo(world.rank), mc2=None))
    part = slice(world.rank * I // size, (world.rank + 1) * I // size)
    w13 = torch.cat([W13[:, :, part], W13[:, :, I:][:, :, part]], dim=2)
    experts = FloatExperts(w13=rank.put(w13), w2=rank.put(W2[:, part].contiguous()))
    for name, traffic in rank.traffics.items():
        try:
            rank.check(rank.forward(traffic, experts=experts, comm=comm), traffic)
        except AssertionError as error:
            error.add_note(name)
            raise


def label(sizes: tuple[int, int, int], method: CommMethod | None = None, sequence: bool = False) -> str:
    size, dp, tp = sizes
    how = "" if method is None else f"{method.value} "
    return f"{how}{'sequence ' if sequence else ''}{size} ranks DP{dp} TP{tp}"


def on(sizes: tuple[int, int, int], case: Callable[..., None], **options: Any) -> Callable[[Any], None]:
    """The case on the first `sizes[0]` ranks; the others skip it."""

    def run(world: Any) -> None:
        if world.rank < sizes[0]:
            case(world, sizes=sizes, **options)

    return run


def all_cases() -> dict[str, Callable[[Any], None]]:
    """Every case by name, small worlds first."""
    cases: dict[str, Callable[[Any], None]] = {}
    for sizes, method, sequence in product(SIZES, METHODS, (False, True)):
        where = label(sizes, method, sequence)
        wanted = {"dense": equals_dense}
        if sizes in ((2, 1, 2), (4, 2, 2), (8, 4, 2)):
            wanted["padding"] = padding_reaches_nobody
        if sizes == (4, 2, 2):
            wanted |= {"selected": selected_elsewhere, "shared": shared_experts}
        for name, case in wanted.items():
            cases[f"{name}: {where}"] = on(sizes, case, method=method, sequence=sequence)
    for sizes, method in product(SIZES, (EXCHANGE, MC2)):
        cases[f"by rank: {label(sizes, method)}"] = on(sizes, replica_by_rank, method=method)
    for sizes, method in product(((2, 2, 1), (4, 2, 2), (8, 1, 8)), METHODS):
        cases[f"w8a8: {label(sizes, method)}"] = on(sizes, w8a8, method=method, dtype=torch.float32)
    cases[f"A2: {label((4, 2, 2), MC2)}"] = on((4, 2, 2), kernels_of_a2, method=MC2)
    for sizes, method in product(((2, 2, 1), (4, 2, 2)), METHODS):
        cases[f"NaN: {label(sizes, method)}"] = on(sizes, nan_stays_with_its_token, method=method)
    for method in METHODS:
        cases[f"waits: {label((4, 2, 2), method)}"] = on((4, 2, 2), host_waits_once_at_most, method=method)
    for sizes in ((2, 1, 2), (4, 2, 2)):
        cases[f"without EP: {label(sizes)}"] = on(sizes, without_expert_parallelism)
    return cases


def strict_cases() -> dict[str, Callable[[Any], None]]:
    """Cases for a simulated NPU that refuses what hardware refuses."""
    cases: dict[str, Callable[[Any], None]] = {}
    for method in METHODS:
        cases[f"bfloat16: {label((4, 2, 2), method)}"] = on((4, 2, 2), bfloat16, method=method)
        cases[f"w8a8: {label((4, 2, 2), method)}"] = on((4, 2, 2), w8a8, method=method, dtype=torch.bfloat16)
    return cases


CASES = {"exact": all_cases(), "strict": strict_cases()}
"""By how the simulated NPU is set up: float32 everywhere, or only what its documentation allows."""
