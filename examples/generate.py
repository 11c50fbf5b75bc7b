"""Continue a text by a decoder of bytes: `python examples/generate.py net.pt "import "`.

The network is an export of a run with `data.name: bytes`, as of `localpipe train gpt_bytes`, or its
run directory. At temperature 0 every next byte is the likeliest one. Else it is drawn, by a seed.
"""

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

import localpipe


@torch.no_grad()
def continue_text(network: Any, prompt: bytes, count: int, temperature: float, seed: int) -> bytes:
    """Return `count` bytes after a prompt, which has one byte at least."""
    length = network.sample[0]  # tokens that the network sees
    generator = torch.Generator().manual_seed(seed)
    text = bytearray(prompt)
    for _ in range(count):
        window = text[-length:]
        tokens = torch.zeros(1, length, dtype=torch.int64)
        tokens[0, : len(window)] = torch.tensor(list(window))
        # Nothing after the window changes what the network gives at its last byte.
        logits = network(tokens)[0, len(window) - 1]
        text.append(choose(logits, temperature, generator))
    return bytes(text[len(prompt) :])


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """Return a token by its logits (vocabulary,)."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / temperature).softmax(0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="a .pt, .safetensors or .pt2, or a run directory")
    parser.add_argument("prompt", nargs="?", default="import ")
    parser.add_argument("--bytes", type=int, default=200, help="how many follow")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    network = localpipe.load(arguments.file)
    prompt = arguments.prompt.encode() or b"\n"
    text = continue_text(network, prompt, arguments.bytes, arguments.temperature, arguments.seed)
    sys.stdout.write(f"{arguments.prompt}{text.decode('utf-8', 'replace')}\n")


if __name__ == "__main__":
    main()
