# SPDX-License-Identifier: Apache-2.0
"""What layer sharding refuses, who keeps what, and the order of its broadcasts. Weights that travel: shard_cases.py."""

import ascend_linear as al
import pytest
import torch
from ascend_comm import Pending, Solo


class Recorder(Solo):
    """A group of W ranks as one of them sees it, that notes broadcasts and which of them were waited for."""

    def __init__(self, world_size: int, rank_in_group: int) -> None:
        super().__init__()
        self.world_size, self.rank_in_group = world_size, rank_in_group
        self.sources: list[int] = []
        self.waited: list[int] = []

    def broadcast_async(self, input_, src=0):
        number = len(self.sources)
        self.sources.append(src)
        return Noted(self, number)


class Noted(Pending):
    __slots__ = ("_group", "_number")

    def __init__(self, group: Recorder, number: int) -> None:
        super().__init__(None)
        self._group, self._number = group, number

    def wait(self) -> None:
        self._group.waited.append(self._number)


def series(group, layers, step, start=True):
    shard = al.LayerShard(group, prefetch_step=step)
    for layer in layers:
        shard.add(layer, torch.full((2, 3), float(layer)))
    if start:
        shard.start()
    return shard


def test_owners_count_from_the_first_layer_of_the_stage():
    shard = series(Recorder(3, 1), range(16, 21), 1)
    assert [shard.owner(layer) for layer in range(16, 21)] == [0, 1, 2, 0, 1]
    assert [layer for layer in range(16, 21) if shard.keeps(layer)] == [17, 20]
    assert 16 in shard
    assert 0 not in shard


def test_a_broadcast_starts_prefetch_step_ahead_and_wraps():
    group = Recorder(4, 0)
    shard = series(group, range(10, 15), 2)
    assert group.sources == [0, 1]
    for layer in (10, 11, 12, 13, 14, 10):
        shard.reach(layer)
        shard.wait(layer)
    assert group.sources == [0, 1, 2, 3, 0, 0, 1, 2]  # positions 0 1 | 2 3 4 0 1 2
    assert group.waited == [0, 1, 2, 3, 4, 5]


def test_a_step_alone_leaves_nothing_under_way():
    group = Recorder(4, 0)
    shard = series(group, range(10, 15), 2)
    shard.finish()
    assert shard.finished
    with pytest.raises(RuntimeError, match="layer 10 reached before start"):
        shard.reach(10)
    for _ in range(2):
        shard.start(once=True)
        for layer in range(10, 15):
            shard.reach(layer)
            shard.wait(layer)
        shard.finish()
    assert group.sources == [0, 1, *[0, 1, 2, 3, 0] * 2]  # positions 0 1 | 0 1 2 3 4 | 0 1 2 3 4
    assert group.waited == list(range(len(group.sources)))
    shard.start()
    shard.finish(wait=False)
    assert len(group.waited) == len(group.sources) - 2


def test_a_window_is_not_overwritten_before_its_broadcast_is_done():
    group = Recorder(2, 0)
    shard = series(group, range(4), 0)
    shard.reach(0)
    shard.reach(1)  # layer 0 was skipped: nobody has waited for its weight
    assert group.waited == [0]
    shard.start()
    assert group.waited == [0, 1]


def test_one_rank_keeps_all_and_streams_nothing():
    shard = series(Solo(), range(3), 1)
    shard.reach(0)
    assert torch.equal(shard.wait(0), torch.zeros(2, 3))
    assert shard.memory_bytes == 3 * 24


@pytest.mark.parametrize(("layers", "step"), [(1, 0), (2, 1), (5, 4), (0, 0)])
def test_too_long_a_window(layers, step):
    with pytest.raises(ValueError, match=rf"prefetch_step={step}: with {layers} layers it must be 0 to {layers - 2}"):
        series(Recorder(2, 0), range(layers), step)


def test_refusals():
    with pytest.raises(ValueError, match="prefetch_step=-1: must be at least 0"):
        al.LayerShard(Solo(), prefetch_step=-1)
    shard = series(Recorder(2, 0), (3, 7, 11), 1, start=False)
    with pytest.raises(ValueError, match="layer=7: must come after layer 11"):
        shard.add(7, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"weight of layer 12, torch.float32 \(3, 2\): must be like the first one's"):
        shard.add(12, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="must be like the first one's"):
        shard.add(12, torch.zeros(2, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"with strides \(1, 2\): must be contiguous"):
        shard.add(12, torch.zeros(3, 2).t())
    with pytest.raises(RuntimeError, match="layer 3 reached before start"):
        shard.reach(3)
    shard.start()
    with pytest.raises(RuntimeError, match="layer 12 added after start"):
        shard.add(12, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"layer=4: not in the series, which has \[3, 7, 11\]"):
        shard.reach(4)
    with pytest.raises(RuntimeError, match="layer 7 reached where layer 3 is due"):
        shard.reach(7)
    with pytest.raises(RuntimeError, match="weight of layer 3 is asked for, but that layer was not reached"):
        shard.wait(3)
