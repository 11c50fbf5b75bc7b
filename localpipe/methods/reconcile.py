"""SGR, successive gradient reconciliation (Yang et al., ICML 2024): draw a stage's input gradient to its sender's.

Stage k >= 1 adds weight * D to its local loss, D the distance between the gradient of its own local loss at the activation
it received and the gradient that the sender's local loss had there. The received gradient is a constant, nothing goes back.

The paper's coefficient and normalisation are not known. Gradients are per sample here (times the samples of the message),
which does not depend on the batch; `cosine` with a weight of 0.1 to 1 was stable in a small experiment of the reference,
`l2` with 0.01 to 0.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLAT = 1e-12


def gradient_distance(kind: str, mine: Tensor, received: Tensor) -> Tensor:
    """Return D, a scalar in fp32, differentiable in `mine`. mine, received: (B, ...) gradients per sample.

    cosine: mean over samples of 1 - cos, samples with either norm below 1e-12 left out. l2: mean over samples of the
    squared norm of the difference. A received gradient that is not finite counts as no distance.
    """
    a, b = mine.float().flatten(1), received.detach().float().flatten(1)
    known = b.isfinite().all(
        1
    )  # a sender's 16-bit arithmetic, or wire, may have overflowed: nothing to be drawn to
    if kind == "l2":
        b = torch.where(known[:, None], b, a.detach())
        apart: Tensor = (a - b).square().sum(1).mean()
        return apart
    steep = (a.detach().norm(dim=1) >= FLAT) & (b.norm(dim=1) >= FLAT) & known
    # The left-out rows are replaced before the division, since a masked infinite gradient is still not a number.
    a = torch.where(steep[:, None], a, torch.ones_like(a))
    b = torch.where(steep[:, None], b, torch.ones_like(b))
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    mean: Tensor = torch.where(
        steep, 1 - cosine, torch.zeros_like(cosine)
    ).sum() / steep.sum().clamp_min(1)
    return mean
