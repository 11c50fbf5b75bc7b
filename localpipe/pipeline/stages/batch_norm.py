"""Batch normalisations that stand for a network's own: over the rows of all replicas, or cheap to differentiate twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from localpipe.pipeline.stages.replicas import Replicas


class _StandIn(_BatchNorm):
    """Holds the parameters and buffers of the layer it stands for, under the same names.

    (B, C), (B, C, H, W) and (B, C, L).
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(
            layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        )
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked

    def _check_input_dim(self, input: Tensor) -> None:
        """Take any shape with channels second."""

    def _counted(self) -> float:
        """Count a batch; return how far the running statistics move towards it."""
        if self.num_batches_tracked is None:
            return 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum


class SyncBatchNorm(_StandIn):
    """Batch normalisation over the rows of all replicas, of primitive operations, so that it is differentiable twice."""

    def __init__(self, layer: _BatchNorm, replicas: Replicas) -> None:
        super().__init__(layer)
        self._replicas = replicas

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        places = [0, *range(2, x.dim())]
        wide = x.float()
        # Means and variances of every replica, then of all: a mean of squares would cancel where the mean is large.
        own = torch.stack([wide.mean(places), wide.var(places, correction=0)])
        means, variances = self._replicas.stacked(own).unbind(1)
        shares = self._replicas.shares(wide.device)[:, None]
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        count = x.numel() / x.shape[1] / self._replicas.share()
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        shape = _channels(x)
        scale = (variance + self.eps).rsqrt() * (
            1.0 if self.weight is None else self.weight.float()
        )
        shift = -mean * scale + (0.0 if self.bias is None else self.bias.float())
        out: Tensor = wide * scale.view(shape) + shift.view(shape)
        return out.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        momentum = self._counted()
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


class TwiceBatchNorm(_StandIn):
    """Batch normalisation whose gradient at its input can be differentiated again for little more than the first time.

    torch composes its own second derivative of many elementwise passes over the activation, this one has a kernel and a few;
    the forward pass is torch's, to the bit.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        momentum = self._counted()
        out: Tensor = _Normalised.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, momentum, self.eps
        )
        return out


class _Normalised(torch.autograd.Function):
    """y = weight * xn + bias with xn = (x - mean) * scale, mean and scale over all places but the channel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, scale = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps, ctx.biased = eps, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, mean, scale = ctx.saved_tensors
        at_x, at_weight, at_bias = _Backward.apply(gradients[0], x, weight, mean, scale, ctx.eps)
        no_weight = weight is None
        return (
            at_x,
            None if no_weight else at_weight,
            at_bias if ctx.biased else None,
            None,
            None,
            None,
            None,
        )


class _Backward(torch.autograd.Function):
    """The gradients at x, weight and bias for the gradient g at y; the one at x can be differentiated, once.

    The map from g to the gradient at x is weight * J with J(g) = scale * (g - mean(g) - xn * mean(g * xn)), and J is
    symmetric: a gradient v that comes back to it goes on to g through the same kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        at_x, g_xn, g_sum = _kernel(g, x, weight, mean, scale, eps)
        ctx.save_for_backward(g, x, weight, mean, scale, g_xn, g_sum)
        ctx.eps = eps
        ctx.mark_non_differentiable(g_xn, g_sum)
        return at_x, g_xn, g_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor, *_: Tensor) -> Any:
        g, x, weight, mean, scale, g_xn, g_sum = ctx.saved_tensors
        count, shape = x.numel() / x.shape[1], _channels(x)
        at_g, v_xn, v_sum = _kernel(v, x, weight, mean, scale, ctx.eps)
        together = (v * g).sum([0, *range(2, x.dim())], dtype=mean.dtype)
        # Means over all places but the channel; `both` is the covariance of v and g.
        g_mean, g_xn, v_mean, v_xn = g_sum / count, g_xn / count, v_sum / count, v_xn / count
        both = together / count - v_mean * g_mean
        at_weight = count * scale * (both - g_xn * v_xn)
        # at x: -weight * scale^2 * (v_xn * (g - g_mean) + g_xn * (v - v_mean) + xn * (both - 3 * g_xn * v_xn))
        factor = -scale.square() if weight is None else -weight * scale.square()
        constant = -factor * (v_xn * g_mean + g_xn * v_mean)
        at_x = torch.addcmul(constant.view(shape), g, (factor * v_xn).view(shape))
        at_x.addcmul_(v.to(at_x.dtype), (factor * g_xn).view(shape))
        at_x.addcmul_(x - mean.view(shape), (factor * scale * (both - 3 * g_xn * v_xn)).view(shape))
        return (
            at_g,
            at_x.to(x.dtype),
            None if weight is None else at_weight.to(weight.dtype),
            None,
            None,
            None,
        )


def _kernel(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight * J(g), the sum of g * xn and the sum of g, both (C,)."""
    everything = [True, True, True]
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, mean, scale, True, eps, everything
    )
    return found


def _channels(x: Tensor) -> tuple[int, ...]:
    return (1, -1, *[1] * (x.dim() - 2))


def replace_batch_norms(module: nn.Module, stand_in: Callable[[_BatchNorm], nn.Module]) -> None:
    """Let a layer of another kind stand for every batch normalisation inside a module."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, stand_in(child))
        else:
            replace_batch_norms(child, stand_in)
