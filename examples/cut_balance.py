"""Whether measured cuts balance the stages: `python examples/cut_balance.py NAME...`.

For every network it measures a profile, as `pipeline.cuts: time` does, and decides the cut of two
stages. Then it times the training step of each stage of this cut and of `equal`, alone in this
process and on one thread. It prints the slowest stage's seconds of both cuts, and the median of
five ratios `time` over `equal`. Below 1 the measured cut is the faster one.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from localpipe.config.load import parse, update
from localpipe.config.resolved import Resolved
from localpipe.pipeline.stages.stage import Stage, mark_nothing, send_nothing, train_step
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan.balanced_cuts import measure_here, time_cuts
from localpipe.plan.measure_worker import make_message
from localpipe.plan.resolve_here import load_data, resolve_here

STAGES, ROUNDS = 2, 5
NAMES = ("torchvision:resnet50", "timm:vit_small_patch16_224")

Step = Callable[[], None]  # trains a stage on one message


def configure(name: str, size: int, batch: int) -> Resolved:
    """Return the configuration of a network at two stages under `greedy`, cut equally."""
    config = parse(
        {
            "model": {"name": name},
            "method": "greedy",
            "pipeline": {"stages": STAGES, "processes": STAGES},
            "data": {"name": "synthetic", "image_size": size, "batch_size": batch},
            "run": {"device": "cpu", "threads": 1},
        },
        "cut_balance",
    )
    return resolve_here(*load_data(config, None))


def make_steps(config: Resolved) -> list[Step]:
    """Return the training step of every stage, on one message of noise."""
    blueprint, plans = build_plans(config)
    return [_make_step(Stage(plan, blueprint, config)) for plan in plans]


def _make_step(stage: Stage) -> Step:
    message = make_message(stage)

    def step() -> None:
        # A rate of 0 does the same work, and no weight becomes infinite.
        train_step(stage, message, 0.0, send_nothing, mark_nothing)

    step()
    return step


def time_steps(step: Step, count: int) -> float:
    """Return the CPU seconds of a step, as a mean. Other processes disturb the clock more."""
    start = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - start) / count


def measure_round(cuts: Sequence[Sequence[Step]], count: int) -> list[float]:
    """Return the seconds of the slowest stage of every cut, from windows there and back."""
    windows = []
    for cut, steps in enumerate(cuts):
        for stage in range(len(steps)):
            windows.append((cut, stage))
    seconds = [[0.0] * len(steps) for steps in cuts]
    for cut, stage in (*windows, *reversed(windows)):
        seconds[cut][stage] += time_steps(cuts[cut][stage], count) / 2
    return [max(times) for times in seconds]


def decide_cut(equal: Resolved) -> Resolved:
    """Return the configuration with the cut of `time`, and print both cuts."""
    start = time.perf_counter()
    profile = measure_here(equal, [STAGES])
    profile_s = time.perf_counter() - start
    timed = update(equal, {"pipeline.cuts": list(time_cuts(profile, (1,) * STAGES, STAGES))})
    equal_end, time_end = (build_plans(config)[1][0].blocks[-1] for config in (equal, timed))
    print(
        f"{equal.model.name}: profiled in {profile_s:.0f} s; stage 0 ends after {equal_end} under "
        f"equal, after {time_end} under time",
        flush=True,
    )
    return timed


def measure(name: str, size: int, batch: int, count: int) -> None:
    """Print the cuts of a network, and how the seconds of their slowest stages compare."""
    equal = configure(name, size, batch)
    timed = decide_cut(equal)
    if build_plans(equal)[1] == build_plans(timed)[1]:
        print("  the same cut: time over equal is 1", flush=True)
        return
    cuts = [make_steps(equal), make_steps(timed)]
    ratios = []
    for _ in range(ROUNDS):
        equal_s, time_s = measure_round(cuts, count)
        ratios.append(time_s / equal_s)
        print(f"  slowest stage: equal {equal_s:.3f} s, time {time_s:.3f} s: {ratios[-1]:.3f}")
    low, high = min(ratios), max(ratios)
    print(
        f"  time over equal: {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})", flush=True
    )


def main() -> None:
    """Print the cuts and the ratios of every network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, help="names, as of model.name")
    parser.add_argument("--size", type=int, default=224, help="side of the images (224)")
    parser.add_argument("--batch", type=int, default=4, help="images of a step (4)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a window (3)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        measure(name, arguments.size, arguments.batch, arguments.steps)


if __name__ == "__main__":
    main()
