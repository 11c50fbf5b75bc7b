"""SGR, successive gradient reconciliation (Yang et al., ICML 2024).

Stage k >= 1 adds weight * D to its local loss. D is a distance between two gradients at the
activation that it received: that of its own local loss, and that of the sender's local loss. The
received gradient is a constant, so nothing flows back to the sender.

The paper's coefficient and normalisation are not published. Gradients are per sample (times the
samples of the message), so that D does not depend on the batch. In a small experiment of the
reference, `cosine` was stable with a weight of 0.1 to 1, and `l2` with 0.01 to 0.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_NORM = 1e-12


def gradient_distance(kind: str, gradient: Tensor, received: Tensor) -> Tensor:
    """Return the distance D of two gradients, a scalar in fp32, differentiable in `gradient`.

    gradient, received: (B, ...), per sample. kind: `l2`, and any other text is `cosine`.

    cosine: the mean of 1 - cos over the samples, except those with a norm below 1e-12.
    l2: the mean over the samples of the squared norm of the difference.

    A received gradient that is not finite has no distance: 16-bit arithmetic of the sender, or a
    16-bit boundary dtype, may have overflowed. Such a sample adds 0 to l2, and cosine leaves it
    out. Where cosine leaves out all of them, D is 0.
    """
    a = gradient.float().flatten(1)
    b = received.detach().float().flatten(1)
    is_finite = b.isfinite().all(1)
    if kind == "l2":
        b = torch.where(is_finite[:, None], b, a.detach())
        distance: Tensor = (a - b).square().sum(1).mean()
        return distance

    has_norm = (a.detach().norm(dim=1) >= MIN_NORM) & (b.norm(dim=1) >= MIN_NORM) & is_finite
    # The left-out rows are replaced before the division, since a masked infinite gradient is still
    # not a number.
    a = torch.where(has_norm[:, None], a, torch.ones_like(a))
    b = torch.where(has_norm[:, None], b, torch.ones_like(b))
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    distances = torch.where(has_norm, 1 - cosine, torch.zeros_like(cosine))
    mean: Tensor = distances.sum() / has_norm.sum().clamp_min(1)
    return mean
