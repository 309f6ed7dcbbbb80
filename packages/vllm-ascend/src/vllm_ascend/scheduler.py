# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler for models in which all tokens of a picture see each other: no step ends within a picture.

vLLM's `disable_chunked_mm_input` ends a step before a picture that does not fit, and then cuts the picture in a later step whose tokens are too few for it
as well, because other requests take theirs. The first tokens of such a picture would never see its last.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

__all__ = ["AsyncWholePictures", "WholePictures", "keep_pictures_whole"]

Scheduled = tuple[list[int], int, int, list[int], list[int]]


def keep_pictures_whole(scheduler_config: Any) -> None:
    """Choose the scheduler in a configuration, unless the user has chosen one."""
    scheduler_config.disable_chunked_mm_input = True
    if scheduler_config.scheduler_cls is None:
        ours = AsyncWholePictures if scheduler_config.async_scheduling else WholePictures
        scheduler_config.scheduler_cls = f"{__name__}.{ours.__name__}"


class WholePictures(Scheduler):
    """A picture waits until a step has room for all that is left of it. vLLM refuses a `max_num_batched_tokens` below the largest picture."""

    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> Scheduled:
        end = num_computed_tokens + num_new_tokens
        for place in (feature.mm_position for feature in request.mm_features):
            if place.offset <= num_computed_tokens <= end < place.offset + place.length:
                return [], 0, encoder_compute_budget, [], []
        scheduled: Scheduled = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, shift_computed_tokens
        )
        return scheduled


class AsyncWholePictures(WholePictures, AsyncScheduler):
    """The same for asynchronous scheduling."""
