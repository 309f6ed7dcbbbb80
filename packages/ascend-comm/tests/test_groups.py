# SPDX-License-Identifier: Apache-2.0
"""Real processes over gloo: collectives against a single process, the lifetime of a GroupSet, FlashComm2's token order."""

import comm_cases
import pytest
import torch
from ascend_comm import CommGroup, GroupConfig, GroupSet, Solo, Topology, wrap


@pytest.mark.parametrize(("case", "world"), [("world_of_4", 4), ("flashcomm2", 6)])
def test_spawned(case, world, tmp_path):
    comm_cases.spawn(getattr(comm_cases, case), world, tmp_path)


def test_a_failing_rank_fails_the_test(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="on purpose"):
        comm_cases.spawn(comm_cases.fail_on_rank_1, 2, tmp_path)


def test_solo_is_the_identity():
    solo = Solo(rank=5)
    assert isinstance(solo, CommGroup)
    assert wrap(solo) is solo
    assert (solo.ranks, solo.world_size, solo.rank_in_group) == ([5], 1, 0)
    for dtype in (torch.float32, torch.int8):
        comm_cases.check_collectives(solo, dtype)
        comm_cases.check_all_to_all(solo, dtype)
    comm_cases.check_asynchronous_broadcasts(solo)
    comm_cases.check_refusals(solo)
    with pytest.raises(ValueError, match=r"output_splits=\[1\]: one rank receives what it sends, \[2\]"):
        solo.all_to_all(torch.zeros(2), [1], [2])


def test_one_rank_needs_no_torch_distributed():
    with GroupSet(GroupConfig(topology=Topology(1), parallel=("tp", "dp"))) as groups:
        assert {name: type(group) for name, group in groups.items()} == dict.fromkeys(("tp", "dp", "mc2"), Solo)
        assert groups.handles == ()


def test_more_ranks_do():
    with pytest.raises(
        RuntimeError, match=r"world_size=2 needs torch.distributed: call torch.distributed.init_process"
    ):
        GroupSet(GroupConfig(topology=Topology(2)))


def test_wrap_names_what_is_missing():
    with pytest.raises(TypeError, match="it lacks rank_in_group, world_size"):
        wrap(object())
