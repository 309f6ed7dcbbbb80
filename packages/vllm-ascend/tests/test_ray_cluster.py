# SPDX-License-Identifier: Apache-2.0
"""What is said of a cluster of Ray; Ray itself is not among the requirements of the tests."""

from types import SimpleNamespace

import pytest
from vllm_ascend import ray_cluster

RAY = SimpleNamespace(distributed_executor_backend="ray", world_size=4)
PROCESSES = SimpleNamespace(distributed_executor_backend="mp", world_size=4)


def cluster(initialised=True, **resources):
    return SimpleNamespace(is_initialized=lambda: initialised, cluster_resources=lambda: resources)


def test_a_cluster_without_npus():
    (finding,) = ray_cluster.broken(RAY, cluster(CPU=64.0))
    assert finding.startswith("distributed_executor_backend ('ray'): the cluster of Ray has no resource \"NPU\", of which 4 are needed; start each node by `ray start ... --resources '{\"NPU\": 8}'`")  # fmt: skip


@pytest.mark.parametrize(
    ("parallel", "ray"),
    [(RAY, cluster(NPU=8.0)), (RAY, cluster(NPU=1.0)), (RAY, cluster(initialised=False)), (RAY, None), (PROCESSES, cluster())],
    ids=["enough", "others may join", "not known yet", "not imported", "without Ray"],
)  # fmt: skip
def test_what_may_still_become_right(parallel, ray):
    assert list(ray_cluster.broken(parallel, ray)) == []


def test_who_is_told_what_ray_must_know():
    for ray in (None, cluster(initialised=False)):
        (notice,) = ray_cluster.notices(RAY, ray)
        assert 'Ray must count NPUs as the resource "NPU", of which 4 are needed' in notice
        assert ray_cluster.notices(PROCESSES, ray) == []
    assert ray_cluster.notices(RAY, cluster(NPU=8.0)) == []
