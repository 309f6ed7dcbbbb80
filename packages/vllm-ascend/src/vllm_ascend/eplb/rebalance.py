# SPDX-License-Identifier: Apache-2.0
"""Dynamic EPLB in a worker: observe, decide, move, commit, report, a bit of it at the end of each step, on all ranks in the same steps.

An interval of load is summed over ranks on the hosts, and the first rank's planner makes a plan of it in a process of its own. Ranks ask each other
whether it is there, and then for the plan itself. Each batch of the plan is on its way beside two steps or more; when every rank says that its part has
arrived, all change weights and maps of that layer between the same two steps. Everything that one rank begins in a step, all begin in that step:
what happens when follows from the numbers of steps and from what ranks have agreed on alone.

Legend: M MoE layers, E experts, R ranks, K slots of a rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from ascend_comm import CommGroup
from ascend_eplb import Placement, rank_loads
from numpy.typing import NDArray
from torch import Tensor

from vllm_ascend.eplb import report
from vllm_ascend.eplb.client import Planner, Question
from vllm_ascend.eplb.control import NOT_YET, NOTHING, Control, Waits
from vllm_ascend.eplb.decide import COLUMNS, RebalanceDecision, Rules, placement_after
from vllm_ascend.eplb.metrics import StatusSender
from vllm_ascend.eplb.move import MovableLayer, Mover, check_tensors, slot_bytes
from vllm_ascend.eplb.observe import LoadSnapshot
from vllm_ascend.eplb.options import EplbConfig
from vllm_ascend.eplb.verify import Checksums

__all__ = ["PLAN_SECONDS", "Rebalancer"]

_WAIT_SECONDS = 45.0  # for another rank; longer than any step takes
# What one step adds at most to the time that a batch is waited for: between two steps may lie a pause of any length without requests.
_MOST_SECONDS_OF_A_STEP = 5.0
PLAN_SECONDS = 120.0
# A first guess at the time of a transfer, 10 GB/s, until one has been measured; and the weight of a new measurement.
_SECONDS_PER_BYTE, _NEW = 1e-10, 0.25
# Steps after which the host reads the counts: with asynchronous scheduling it is up to one step ahead of the device, and would wait for less.
_STEPS_TO_COPY = 2


class Rebalancer:
    """Dynamic EPLB of one worker. All ranks build it together, with equal layers and options.

    Args:
        config: the options.
        layers: the M layers.
        group: the R ranks, with a communicator for this alone.
        planner: of the first rank; None on the others. It is closed with this object.
        sender: on the first rank, of the status whenever it has changed; None: it is not sent. It is closed with this object.

    Raises:
        ValueError: layers that differ in their numbers of experts or have tensors that cannot be moved.
        NoMemoryError: no memory for the buffers on some rank; raised on all of them.
    """

    def __init__(
        self,
        config: EplbConfig,
        layers: Sequence[MovableLayer],
        group: CommGroup,
        planner: Planner | None,
        sender: StatusSender | None = None,
    ) -> None:
        """Take the buffers' memory, and open the communicator."""
        experts = {one.placed.num_experts for one in layers}
        if len(experts) != 1:
            raise ValueError(
                f"option 'eplb_config.dynamic_eplb' (True) needs MoE layers with equal numbers of experts, got {sorted(experts)}"
            )
        ids = np.concatenate([one.placed.physical_to_logical for one in layers])
        self.placed = Placement(ids, experts.pop(), tuple(one.number for one in layers))
        for one in layers:
            check_tensors(one.name, one.tensors, self.placed.slots_per_rank)
        self._config, self._layers, self._group, self._planner = config, layers, group, planner
        self.status, self._sender = report.Status(), sender
        self._told = 0
        self._waits = Waits(_WAIT_SECONDS)
        self._control = Control(group, self._waits)
        tensors = [one.tensors for one in layers]
        self._mover = Mover(group, tensors, config.move_buffer_experts)
        self._checksums = Checksums(self.placed, tensors, group) if config.verify_moves else None
        self._expert_bytes = max(slot_bytes(one) for one in tensors)
        self._step = self._interval_began = 0
        self._step_seconds, self._last_step, self._batch_seconds = 0.0, 0.0, 0.0
        self._seconds_per_byte = _SECONDS_PER_BYTE
        self._snapshot: LoadSnapshot | None = None
        self._is_asked = False
        self._next: tuple[int, Callable[[], None]] | None = None
        self._decision: RebalanceDecision | None = None
        self._batches: list[NDArray[np.int32]] = []
        self._began = (0, 0.0)
        self._map: report.MapWriter | None = None
        if planner is not None and config.expert_map_record_path:
            self._map = report.MapWriter(config.expert_map_record_path)
            self._map.put(self.placed)

    @property
    def num_bytes(self) -> int:
        """Device memory of the buffers."""
        return self._mover.num_bytes

    def step(self) -> None:
        """One step is over, with requests on this rank or not.

        Raises:
            TimeoutError, RuntimeError: a rank is gone, or not in step with the others, or a slot does not hold its expert.
        """
        self._step += 1
        self._measure_step()
        self._waits.waited = 0.0
        if self._next is not None and self._next[0] <= self._step:
            (_, follow), self._next = self._next, None
            follow()
        self._observe()
        self.status.step_waited(self._waits.waited)
        if self._sender is not None and self._told != self.status.changes:
            self._told = self.status.changes
            self._sender.send(self.status)

    def close(self) -> None:
        """End the planner, and write the placement in force. What is on its way is dropped: slots are whole. More calls do nothing."""
        planner, self._planner = self._planner, None
        if planner is not None:
            planner.close()
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.send(self.status)
            sender.close()
        writer, self._map = self._map, None
        if writer is not None:
            writer.put(self.placed)
            writer.close()

    def _measure_step(self) -> None:
        """Learn how long a step takes. A pause without requests must not count as one, so that a step counts twice what is known at most."""
        now = time.perf_counter()
        took, self._last_step = now - self._last_step, now
        self._batch_seconds += min(took, _MOST_SECONDS_OF_A_STEP)
        if self._step == 2:
            self._step_seconds = took
        elif self._step > 2:
            self._step_seconds += _NEW * (min(took, 2 * self._step_seconds) - self._step_seconds)

    def _after(self, steps: int, follow: Callable[[], None]) -> None:
        """Go on some steps later."""
        assert self._next is None
        self._next = self._step + steps, follow

    def _observe(self) -> None:
        """Take the counts of an interval; sum them over ranks when they have come to the host."""
        since = self._step - self._interval_began
        if self._snapshot is not None and since >= _STEPS_TO_COPY:
            snapshot, self._snapshot = self._snapshot, None
            self._waits.until(snapshot.is_there, "the copy of the experts' loads to the host")
            self._put(snapshot.counts())
        elif self._snapshot is None and since >= self._config.expert_heat_collection_interval:
            self._interval_began = self._step
            self._snapshot = LoadSnapshot([one.heat for one in self._layers])

    def _put(self, counts: Tensor) -> None:
        """Sum the counts `[M, E]`, and ask the planner, unless a plan is asked for or carried out."""
        work = self._control.sum(counts)
        self.status.intervals += 1
        asks, self._is_asked = not self._is_asked, True
        if self._planner is not None:
            what = f"the sum of the experts' loads, which was begun in step {self._step}"
            waits, placed, status = Waits(_WAIT_SECONDS), self.placed, self.status

            def load() -> NDArray[np.float64]:
                if work is not None:
                    waits.work(work, what)
                summed = counts.numpy().astype(np.float64)
                status.observed(rank_loads(placed, summed))
                return summed

            self._planner.put(load, self._question() if asks else None)
        else:
            self._summed = work, counts  # kept until the sum is complete, which the next one is not begun before
        if asks:
            self._after(self._config.algorithm_execution_interval, self._ask)

    def _question(self) -> Question:
        slots = self.placed.layers * self.placed.slots
        rules = Rules(
            policy=self._config.eplb_policy_type,
            weighting=self._config.load_weighting,
            max_moves=max(int(self._config.move_budget * slots), 1),
            buffer_experts=self._config.move_buffer_experts,
            expert_bytes=self._expert_bytes,
            horizon_steps=self._config.expert_heat_collection_interval,
            seed=self.status.intervals,
        )
        return Question(
            placed=self.placed, rules=rules, step_seconds=self._step_seconds, seconds_per_byte=self._seconds_per_byte
        )

    def _ask(self) -> None:
        """Ask the first rank whether there is a plan, and of how many transfers."""
        word = NOT_YET
        if self._planner is not None and (decision := self._planner.reply()) is not None:
            self._decision, word = decision, len(decision.transfers) or NOTHING
        self._control.begin(self._step, "the question for a plan", word=word)
        self._after(1, self._hear)

    def _hear(self) -> None:
        """What the first rank has said."""
        word = self._control.result().word
        if word == NOT_YET:
            self._after(self._config.algorithm_execution_interval, self._ask)
        elif word == NOTHING:
            self._is_asked = False
            self._report_decision()
        else:
            table = np.zeros((word, len(COLUMNS)), np.int32)
            if self._decision is not None:
                table = self._decision.transfers
                self._report_decision()
            plan = torch.from_numpy(np.ascontiguousarray(table))
            work = self._control.broadcast(plan)

            def take() -> None:
                if work is not None:
                    self._waits.work(work, "the plan")
                transfers = plan.numpy()
                placement_after(self.placed, transfers)  # ValueError on all ranks alike, before anything moves
                ends = np.flatnonzero(np.diff(transfers[:, 0])) + 1
                self._batches = np.split(transfers, ends)[::-1]
                self._began = self._step, time.perf_counter()
                self._moved = transfers
                self._start()

            self._after(1, take)

    def _start(self) -> None:
        """Begin the next batch, and ask in the step after whether all ranks have theirs."""
        self._batch = self._batches.pop()
        self._mover.start(self._batch)
        self._batch_seconds = 0.0
        self._after(1, self._ask_for_arrival)

    def _ask_for_arrival(self) -> None:
        if self._batch_seconds > _WAIT_SECONDS:
            raise TimeoutError(
                f"dynamic EPLB has waited {_WAIT_SECONDS:.0f} seconds for the weights of experts of {self._layers[self._batch[0, 1]].name} from or to "
                f"other ranks; this rank has {'all' if self._mover.is_complete() else 'not all'} of its own"
            )
        self._control.begin(self._step, "the question whether a batch has arrived", ready=self._mover.is_complete())
        self._after(1, self._commit)

    def _commit(self) -> None:
        """Change weights and maps of a layer, if all ranks are ready: this is between the same two steps on all of them."""
        if not self._control.result().ready:
            self._ask_for_arrival()
            return
        self._measure_transfer(self._mover.commit())
        layer = int(self._batch[0, 1])
        self.placed = placement_after(self.placed, self._batch)
        one = Placement(self.placed.physical_to_logical[layer : layer + 1], self.placed.num_experts)
        self._layers[layer].place(one)
        if self._checksums is not None:
            self._checksums.check(layer, one.physical_to_logical[0, self._group.rank_in_group])
        if self._batches:
            self._start()
        else:
            self._end_rebalance()

    def _measure_transfer(self, seconds: float) -> None:
        """Learn from a batch what a byte costs, on a rank that took part in it."""
        here = self._group.rank_in_group
        experts = int(max((self._batch[:, column] == here).sum() for column in (3, 5)))
        if experts:
            self._seconds_per_byte += _NEW * (seconds / (experts * self._expert_bytes) - self._seconds_per_byte)

    def _end_rebalance(self) -> None:
        self._is_asked = False
        (step, began), status, moves = self._began, self.status, len(self._moved)
        seconds, num_bytes = time.perf_counter() - began, moves * self._expert_bytes
        status.rebalances += 1
        status.changes += 1
        status.moves += moves
        status.bytes_moved += num_bytes
        status.background_seconds += seconds
        if self._planner is not None:
            layers = len(np.unique(self._moved[:, 1]))
            report.log_rebalance(
                status, moves=moves, layers=layers, num_bytes=num_bytes, seconds=seconds, steps=self._step - step
            )
        if self._map is not None:
            self._map.put(self.placed)

    def _report_decision(self) -> None:
        """Count and log the decision, on the rank that has it."""
        decision, self._decision = self._decision, None
        if decision is None:
            return
        self.status.planned_from, self.status.predicted = decision.before, decision.after
        self.status.changes += 1
        if decision.reason:
            self.status.count_dropped(decision.reason)
            report.log_dropped(decision.reason, decision.before, decision.after)
