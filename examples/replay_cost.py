"""What replaying a recorded network costs: `python examples/replay_cost.py NAME...`.

It trains the plain module and its recorded pieces in turn, in one process on one thread, and prints
the median of nine ratios of their samples per second. 1.0 is no cost. The default networks are
torchvision:resnet50, which is recorded here although localpipe ships it, and a small transformer of
timm.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from localpipe.networks.library_network import find_library_network
from localpipe.networks.recorded.recording import find_aliases, record

PAIRS = 9
NAMES = ("torchvision:resnet50", "timm:vit_tiny_patch16_224")


def build_pair(name: str, size: int) -> tuple[nn.Module, nn.Module]:
    """Return a network with random weights, and its pieces in a row with the same weights."""
    library, _, network = name.partition(":")
    library_network = find_library_network(library, network, (3, size, size), 1000, {})
    plain, copied = library_network.build(), library_network.build()
    copied.load_state_dict(plain.state_dict())
    empty = library_network.build()
    aliases = find_aliases(empty)
    recording = record(empty.to("meta"), (3, size, size), aliases=aliases)
    return plain, nn.Sequential(*recording.pieces(copied))


def make_step(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Return a training step with plain SGD."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def time_steps(step: Callable[[], None], count: int) -> float:
    """Return the CPU seconds of so many steps. Other processes disturb the clock more."""
    start = time.process_time()
    for _ in range(count):
        step()
    return time.process_time() - start


def measure(name: str, size: int, batch: int, steps: int) -> list[float]:
    """Return the ratios of samples per second, recorded over plain, of every pair of windows."""
    plain, recorded = build_pair(name, size)
    images = torch.randn(batch, 3, size, size)
    labels = torch.arange(batch)
    plain_step = make_step(plain, images, labels)
    recorded_step = make_step(recorded, images, labels)
    time_steps(plain_step, 2)
    time_steps(recorded_step, 2)
    ratios = []
    for pair in range(PAIRS):
        # Each comes first in turn.
        if pair % 2:
            plain_s = time_steps(plain_step, steps)
            recorded_s = time_steps(recorded_step, steps)
        else:
            recorded_s = time_steps(recorded_step, steps)
            plain_s = time_steps(plain_step, steps)
        ratios.append(plain_s / recorded_s)
    return ratios


def main() -> None:
    """Print a line for every network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, help="LIBRARY:NAME")
    parser.add_argument("--size", type=int, default=224, help="side of the images (224)")
    parser.add_argument("--batch", type=int, default=4, help="images of a step (4)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a window (3)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        ratios = measure(name, arguments.size, arguments.batch, arguments.steps)
        low, high = min(ratios), max(ratios)
        print(f"{name}: {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
