"""Six methods on six libraries' networks, four stages, ten steps.

`python -m tests.networks.pairs [NETWORK ...]`.

It prints a table. A pair that is refused has its line below the table. Exits 1 with more than four
refused pairs, or if a pair fails in another way.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localpipe.errors import UserError
from localpipe.plan.resolve_here import load_data
from localpipe.runs.prepare import check_plan
from tests.harness import settings, train_here

MOST_REFUSED = 4
NETWORKS = (
    "torchvision:resnet18",
    "torchvision:swin_t",
    "torchvision:convnext_tiny",
    "torchvision:densenet121",
    "torchvision:mobilenet_v3_small",
    "timm:efficientnet_b0",
)
METHODS: Mapping[str, dict[str, Any]] = {
    "infopro": {"objective": {"name": "infopro"}},
    "auglocal": {"objective": {"name": "auglocal"}},
    "dgl": {"objective": {"name": "dgl"}},
    "predsim": {"objective": {"name": "predsim"}},
    "R1E": {"context": {"mode": "R1E"}},
    "cosine": {"reconcile": {"distance": "cosine"}},
}


def train_pair(network: str, method: str, steps: int = 10, size: int = 64) -> str | None:
    """Train a network by a method in one process; return why it is refused, or None."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(
            Path(folder, "run"),
            model={"name": network, "num_classes": 10},
            method=METHODS[method],
            data={"image_size": size, "samples": 4 * steps, "batch_size": 4},
            optim={"epochs": 1, "max_steps": steps, "lr": 0.001},
        )
        try:
            _, dataset = load_data(config, None)
            check_plan(config, dataset)
        except UserError as error:
            return str(error)
        train_here(config)
    return None


def main() -> int:
    """Train every pair, and print the table."""
    networks = sys.argv[1:] or NETWORKS
    refused = []
    print("| network |", " | ".join(METHODS), "|")
    print("|---|" + "---|" * len(METHODS))
    for network in networks:
        cells = []
        for method in METHODS:
            reason = train_pair(network, method)
            cells.append("trains" if reason is None else "refused")
            if reason is not None:
                refused.append(f"- {network}, {method}: {reason}")
        print(f"| `{network}` |", " | ".join(cells), "|", flush=True)
    print("\n".join(["", *refused, f"{len(refused)} of {len(networks) * len(METHODS)} refused"]))
    return int(len(refused) > MOST_REFUSED)


if __name__ == "__main__":
    sys.exit(main())
