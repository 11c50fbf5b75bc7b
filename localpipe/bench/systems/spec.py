"""A system of the benchmark: the facts that a `SystemSpec` declares, and a worker's part of it.

One file with a `SystemSpec` and one line in `registry.SYSTEMS` add a system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from localpipe.bench.systems.step_timer import StepTimer
from localpipe.config import registry
from localpipe.config.resolved import Resolved
from localpipe.pipeline.workers.mesh import Mesh

Cut = tuple[tuple[int, int], ...]  # (first, last) block of every stage
WARM_UP_STEPS = 4
MIN_STEPS = 3  # of a window


@dataclass(frozen=True)
class SystemRequest:
    """One system to measure, sent to its workers as JSON.

    system: a name of the table of systems. It is not checked here. micro_batches and cut: for a
    pipeline of micro-batches, else None. Of localpipe, micro_batches are the messages of a step in
    place of `optim.accumulate`, None for localpipe as configured.
    """

    system: str
    micro_batches: int | None = None
    cut: Cut | None = None

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> SystemRequest:
        """Return the request whose `dataclasses.asdict` was read from JSON. Lists become tuples.

        values: with the keys `system`, `micro_batches` and `cut`, of which the last two may be
        None. Other keys are ignored. Raises KeyError for a missing key, and ValueError for a stage
        of the cut that is no pair. Neither types nor the name are checked.
        """
        cut = None
        if values["cut"] is not None:
            cut = tuple((first, last) for first, last in values["cut"])
        return SystemRequest(values["system"], values["micro_batches"], cut)

    @property
    def is_configured_subject(self) -> bool:
        """Whether it is localpipe with the configuration's own `optim.accumulate`."""
        return self.spec.is_subject and self.micro_batches is None

    @property
    def spec(self) -> SystemSpec:
        """The facts of the system. Raises UserError for an unknown name."""
        return find_system(self.system)


class System:
    """One worker's part of a system. All its workers step at the same time.

    timer: counts the seconds of the steps. A subclass sets it. The worker calls `warm_up` first and
    `close` last.
    """

    timer: StepTimer

    def step(self) -> None:
        """Train on the next batch of the whole system. It waits for other workers' data."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """Return this worker's parameters and buffers under their names in the whole network.

        The tensors share memory with the modules. They are empty where a worker has no weights.
        """
        raise NotImplementedError

    def warm_up(self) -> None:
        """Step until kernels, caches and queues are filled: here, four steps."""
        for _ in range(WARM_UP_STEPS):
            self.step()

    def trial_step(self) -> None:
        """Do the work of one step, to estimate its time. It is called after `warm_up`."""
        self.step()

    def window_steps(self) -> dict[str, Callable[[], None]]:
        """Return the step of every kind of window, by kind, in order. `step` is always there.

        All workers of a system return the same kinds. Each value runs one step without arguments.
        """
        return {"step": self.step}

    def tensors(self) -> list[Tensor]:
        """Return the parameters and buffers, which do not count as saved for the backward pass.

        They share memory with the modules.
        """
        return list(self.weights().values())

    def close(self) -> None:
        """Release process groups and threads. It is called once. Here it does nothing."""


def send_no_bytes(config: Resolved, request: SystemRequest) -> int:
    """Return 0, the bytes that a system of one process sends in a step. Both are ignored."""
    return 0


def list_requested_cuts(config: Resolved, request: SystemRequest) -> list[int] | None:
    """Return the last block of every stage but the last. None for a request without a cut.

    config: not used.
    """
    if request.cut is None:
        return None
    return [last for _, last in request.cut[:-1]]


@dataclass(frozen=True)
class SystemSpec:
    """The facts of one system.

    config: of the system's workers. `build` is called in every worker and returns its part.
    `list_cuts` returns the last block of every stage but the last, None without stages.
    `count_sent_bytes` returns the bytes that all workers together send in a step.
    `count_saved_bytes` returns, by rank, the bytes that autograd holds, for a sample of the whole
    batch. Where it is None, the workers measure one step.

    is_subject: the system that the others are compared with, run as configured.
    is_peer: trains otherwise than by localpipe's stages.
    one_process: runs in one process, else in as many as localpipe.
    uses_all_threads: one process has the threads of all of localpipe's.
    needs_two_processes: cannot run in one process.
    splits_batch: each process trains on its part of the batch, so that it must divide.
    has_micro_batches: is measured at every number of micro-batches, at a cut of its own.
    accumulates: a step takes `optim.accumulate` messages. The subject is measured with as many
    messages as its peers have micro-batches too.
    stages_per_worker: of a system with micro-batches.
    fills_pipeline: it takes no fewer micro-batches than it has stages.
    trains_frozen: knows model.freeze, and trains the other blocks alone.
    freezes_copies: is localpipe with `method.feedback` whose copies are never refreshed. It is
    measured only where parameters come back.
    clips_gradients: knows optim.clip. It has the norm of all gradients that it is to clip.
    min_steps: the fewest steps of a window; more where messages may wait in queues.
    """

    build: Callable[[Mesh, Resolved, SystemRequest], System]
    list_cuts: Callable[[Resolved, SystemRequest], list[int] | None] = list_requested_cuts
    count_sent_bytes: Callable[[Resolved, SystemRequest], int] = send_no_bytes
    count_saved_bytes: Callable[[Resolved], list[int]] | None = None
    is_subject: bool = False
    is_peer: bool = True
    one_process: bool = False
    uses_all_threads: bool = True
    needs_two_processes: bool = False
    splits_batch: bool = False
    has_micro_batches: bool = False
    accumulates: bool = False
    stages_per_worker: int = 1
    fills_pipeline: bool = False
    trains_frozen: bool = True
    freezes_copies: bool = False
    clips_gradients: bool = True
    min_steps: int = MIN_STEPS


def find_system(name: str) -> SystemSpec:
    """Return the facts of a system. Raises UserError with the nearest name where there is none."""
    spec: SystemSpec = registry.look_up(registry.SYSTEMS, name, "bench: bench.systems")
    return spec
