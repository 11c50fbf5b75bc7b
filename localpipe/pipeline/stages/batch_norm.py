"""Batch normalisations that replace a network's own.

One normalises over the rows of all replicas. The other is cheap to differentiate twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from localpipe.pipeline.stages.replicas import Replicas

# What torch's own layers compute. A layer with another forward does something else.
_PLAIN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
# The hooks of a module that may change what it computes or its gradient.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Replacement(_BatchNorm):
    """Holds the parameters and buffers of the layer that it replaces, by the same names.

    Inputs: (B, C), (B, C, H, W) and (B, C, L).
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(
            layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        )
        self.weight = layer.weight
        self.bias = layer.bias
        self.running_mean = layer.running_mean
        self.running_var = layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any shape with channels second."""

    def _count_batch(self) -> float:
        """Count a batch. Return the momentum of the running statistics for this batch."""
        if self.num_batches_tracked is None:
            return 0.0
        self.num_batches_tracked.add_(1)
        if self.momentum is None:
            return 1.0 / float(self.num_batches_tracked)
        return self.momentum


class SyncBatchNorm(_Replacement):
    """Batch normalisation over the rows of all replicas.

    It consists of primitive operations, so it is differentiable twice. It shares the parameters and
    buffers of `layer`. `replicas` must have begun the message.
    """

    def __init__(self, layer: _BatchNorm, replicas: Replicas) -> None:
        super().__init__(layer)
        self._replicas = replicas

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised tensor, of x's shape and dtype.

        x: this replica's rows, (B, C, ...). In training every replica must call it in the same
        order, and the running statistics move in place. In evaluation it is torch's own, without
        communication. Raises NeighbourLostError if another replica is lost.
        """
        if not self.training:
            return super().forward(x)
        dims = _reduced_dims(x)
        wide = x.float()

        # Means and variances of every replica, then of all rows. A mean of squares would cancel
        # where the mean is large.
        statistics = torch.stack([wide.mean(dims), wide.var(dims, correction=0)])
        means, variances = self._replicas.stack(statistics).unbind(1)
        weights = self._replicas.weights(wide.device)[:, None]
        mean = (weights * means).sum(0)
        variance = (weights * (variances + (means - mean).square())).sum(0)
        count = x.numel() / x.shape[1] / self._replicas.weight()
        self._update_statistics(mean.detach(), variance.detach() * count / (count - 1))

        # The affine map: out = x * scale + shift.
        weight: float | Tensor = 1.0
        bias: float | Tensor = 0.0
        if self.weight is not None:
            weight = self.weight.float()
        if self.bias is not None:
            bias = self.bias.float()
        scale = (variance + self.eps).rsqrt() * weight
        shift = -mean * scale + bias
        shape = _channel_shape(x)
        output: Tensor = wide * scale.view(shape) + shift.view(shape)
        return output.to(x.dtype)

    def _update_statistics(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        momentum = self._count_batch()
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


class TwiceBatchNorm(_Replacement):
    """Batch normalisation with a cheap second derivative.

    torch composes its own second derivative of many elementwise passes over the activation. This
    one has a kernel and a few passes. The forward pass is torch's, to the bit. It shares the
    parameters and buffers of `layer`. There is no third derivative: backward() raises RuntimeError,
    and autograd.grad leaves it out.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised tensor, of x's shape and dtype. x: (B, C, ...).

        In training the running statistics move in place. In evaluation it is torch's own.
        """
        if not self.training:
            return super().forward(x)
        momentum = self._count_batch()
        output: Tensor = _Normalisation.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, momentum, self.eps
        )
        return output


class _Normalisation(torch.autograd.Function):
    """y = weight * xn + bias with xn = (x - mean) * scale, mean and scale (C,) of every channel."""

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
        ctx.eps = eps
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, mean, scale = ctx.saved_tensors
        at_x, at_weight, at_bias = _Backward.apply(gradients[0], x, weight, mean, scale, ctx.eps)
        if weight is None:
            at_weight = None
        if not ctx.has_bias:
            at_bias = None
        return at_x, at_weight, at_bias, None, None, None, None


class _Backward(torch.autograd.Function):
    """The gradients at x, weight and bias for the gradient g at y.

    The gradient at x is differentiable, once. The map from g to it is weight * J with
    J(g) = scale * (g - mean(g) - xn * mean(g * xn)), and J is symmetric. So a gradient v at the
    output goes back to g through the same kernel.
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
        at_x, g_xn, g_sum = _run_kernel(g, x, weight, mean, scale, eps)
        ctx.save_for_backward(g, x, weight, mean, scale, g_xn, g_sum)
        ctx.eps = eps
        ctx.mark_non_differentiable(g_xn, g_sum)
        return at_x, g_xn, g_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor, *_: Tensor) -> Any:
        g, x, weight, mean, scale, g_xn, g_sum = ctx.saved_tensors
        count = x.numel() / x.shape[1]
        shape = _channel_shape(x)
        at_g, v_xn, v_sum = _run_kernel(v, x, weight, mean, scale, ctx.eps)
        product_sum = (v * g).sum(_reduced_dims(x), dtype=mean.dtype)

        # Means over all dimensions but the channels.
        g_mean = g_sum / count
        g_xn = g_xn / count
        v_mean = v_sum / count
        v_xn = v_xn / count
        covariance = product_sum / count - v_mean * g_mean  # of v and g

        # At weight, with the covariance c: count * scale * (c - g_xn * v_xn).
        at_weight = None
        if weight is not None:
            at_weight = count * scale * (covariance - g_xn * v_xn)
            at_weight = at_weight.to(weight.dtype)

        # At x: -weight * scale^2 * (v_xn * (g - g_mean) + g_xn * (v - v_mean)
        #                            + xn * (c - 3 * g_xn * v_xn)).
        if weight is None:
            factor = -scale.square()
        else:
            factor = -weight * scale.square()
        constant = -factor * (v_xn * g_mean + g_xn * v_mean)
        slope = factor * scale * (covariance - 3 * g_xn * v_xn)
        at_x = torch.addcmul(constant.view(shape), g, (factor * v_xn).view(shape))
        at_x.addcmul_(v.to(at_x.dtype), (factor * g_xn).view(shape))
        at_x.addcmul_(x - mean.view(shape), slope.view(shape))
        return at_g, at_x.to(x.dtype), at_weight, None, None, None


def _run_kernel(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight * J(g) of x's shape, the sum of g * xn, (C,), and the sum of g, (C,)."""
    all_outputs = [True, True, True]
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, mean, scale, True, eps, all_outputs
    )
    return result


def _reduced_dims(x: Tensor) -> list[int]:
    """Return all dimensions but the channels'."""
    return [0, *range(2, x.dim())]


def _channel_shape(x: Tensor) -> tuple[int, ...]:
    """Return the shape of a (C,) tensor that broadcasts over x."""
    return (1, -1, *[1] * (x.dim() - 2))


def replace_batch_norms(module: nn.Module, replace: Callable[[_BatchNorm], nn.Module]) -> None:
    """Replace every plain batch normalisation inside a module by `replace(layer)`.

    The module changes in place, at any depth. A module that is itself a batch normalisation stays,
    and so do the layers of `find_own_batch_norms`. A layer that stands at several places has one
    replacement at all of them.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if not isinstance(child, _BatchNorm) or _has_own_behaviour(child):
                continue
            if child not in replacements:
                replacements[child] = replace(child)
            parent._modules[name] = replacements[child]


def find_own_batch_norms(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the path and the layer of every batch normalisation that cannot be replaced.

    It does more than torch's: it has a forward or a mode of its own, a hook, or a parametrisation.
    """
    found: list[tuple[str, nn.Module]] = []
    for path, layer in module.named_modules():
        is_ours = isinstance(layer, _Replacement)
        if isinstance(layer, _BatchNorm) and not is_ours and _has_own_behaviour(layer):
            found.append((path, layer))
    return found


def _has_own_behaviour(layer: _BatchNorm) -> bool:
    cls = type(layer)
    if isinstance(layer, _Replacement) or is_parametrized(layer) or "forward" in vars(layer):
        return True
    if cls.forward not in _PLAIN_FORWARDS or cls.train is not nn.Module.train:
        return True
    return any(getattr(layer, hooks) for hooks in _HOOKS)
