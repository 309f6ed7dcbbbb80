# SPDX-License-Identifier: Apache-2.0
"""No step ends within a picture whose tokens see each other. That tokens are right then is shown by the zoo (Gemma3 and Gemma4 with pictures, in chunks)."""

from types import SimpleNamespace

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm_ascend.scheduler import AsyncWholePictures, WholePictures, keep_pictures_whole
from vllm_ascend.start import too_short_for_pictures

BUDGET = 512
BY_VLLM = ([0], 7, 0, [], [])


def picture(offset, length):
    return SimpleNamespace(mm_position=SimpleNamespace(offset=offset, length=length))


@pytest.mark.parametrize("kind", [WholePictures, AsyncWholePictures])
@pytest.mark.parametrize(
    ("computed", "new", "waits"),
    [
        (0, 10, False),  # up to the first picture
        (10, 20, False),  # all of it
        (10, 19, True),  # all but its last token
        (15, 15, False),  # the rest of it, after a part from the prefix cache
        (15, 14, True),
        (30, 5, False),  # between the two
        (10, 30, False),  # into the second: vLLM itself ends before it, or has room
        (40, 1, True),
        (60, 5, False),
    ],
)
def test_a_picture_waits_for_room(monkeypatch, kind, computed, new, waits):
    monkeypatch.setattr(Scheduler, "_try_schedule_encoder_inputs", lambda *_: BY_VLLM)
    request = SimpleNamespace(mm_features=[picture(10, 20), picture(40, 20)])
    found = kind.__new__(kind)._try_schedule_encoder_inputs(request, computed, new, BUDGET)
    assert found == (([], 0, BUDGET, [], []) if waits else BY_VLLM)


@pytest.mark.parametrize(("asynchronous", "ours"), [(False, WholePictures), (True, AsyncWholePictures)])
def test_which_scheduler(asynchronous, ours):
    from vllm.config import SchedulerConfig

    config = SchedulerConfig(max_model_len=256, is_encoder_decoder=False, async_scheduling=asynchronous)
    keep_pictures_whole(config)
    assert config.disable_chunked_mm_input
    assert config.get_scheduler_cls() is ours
    assert issubclass(ours, AsyncScheduler) == asynchronous
    config.scheduler_cls = Scheduler
    keep_pictures_whole(config)
    assert config.get_scheduler_cls() is Scheduler


def test_a_limit_that_no_picture_may_fit_is_refused():
    model = SimpleNamespace(is_mm_prefix_lm=True, architectures=["Gemma3ForConditionalGeneration"])
    (found,) = too_short_for_pictures(model, SimpleNamespace(long_prefill_token_threshold=64))
    assert found.startswith("long_prefill_token_threshold (64) cannot be used with Gemma3ForConditionalGeneration")
    assert not list(too_short_for_pictures(model, SimpleNamespace(long_prefill_token_threshold=0)))
    model.is_mm_prefix_lm = False
    assert not list(too_short_for_pictures(model, SimpleNamespace(long_prefill_token_threshold=64)))
