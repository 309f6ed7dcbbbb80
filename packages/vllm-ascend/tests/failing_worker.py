# SPDX-License-Identifier: Apache-2.0
"""A worker whose last rank raises, in the warm-up of the start or in a step: the variable FAILS_IN says which."""

import os

from vllm_ascend.worker import AscendWorker


class FailingWorker(AscendWorker):
    def load_model(self, *args, **kwargs):
        super().load_model(*args, **kwargs)
        if self.rank == self.parallel_config.world_size - 1 and os.environ["FAILS_IN"] == "start":
            self._break()

    def compile_or_warm_up_model(self):
        times = super().compile_or_warm_up_model()
        if self.rank == self.parallel_config.world_size - 1 and os.environ["FAILS_IN"] == "step":
            self._break()
        return times

    def _break(self):
        def forward(*args, **kwargs):
            raise ValueError("this rank has no luck")

        self.model_runner.get_model().forward = forward
