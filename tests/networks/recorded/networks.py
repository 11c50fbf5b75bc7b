"""Small networks that no one wrote to be cut, each with something that breaks a careless replay."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A residual block with dropout, stochastic depth and an in-place ReLU."""

    def __init__(self, width: int = 8, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, momentum=momentum)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.2)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the branch, which some samples skip in training."""
        branch = self.conv2(self.drop(self.relu(self.bn1(self.conv1(x)))))
        if self.training:
            keep = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.8
            branch = branch * keep / 0.8
        output: Tensor = self.relu(x + branch)
        return output


class Body(nn.Module):
    """A stem, some blocks, and a head of functions."""

    def __init__(self, *blocks: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks: Any = nn.ModuleList(blocks)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (B, 10)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        """Return the logits of the last activation."""
        output: Tensor = self.fc(x.mean((2, 3)))
        return output


def residual(momentum: float | None = 0.1) -> Body:
    """Return four residual blocks."""
    return Body(*(Residual(momentum=momentum) for _ in range(4)))


class InPlace(Body):
    """An in-place function and an in-place layer right after every boundary."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu_(x)
            x = block(x) * 1.5
            x += 1
        return self.head(x)


class Views(Body):
    """Views that are written through: two windows on one memory are alive for a while."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            first, second = x[:, :4], x[:, 4:]
            second.mul_(2)
            first.add_(1)
            x = block(x) * 1.5
        return self.head(x)


class Permuted(nn.Module):
    """Blocks that normalise the channels last and return a permuted tensor, as ConvNeXt's."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) with the channels innermost in memory."""
        y = self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1)))
        output: Tensor = y.permute(0, 3, 1, 2) + 0.5 * x
        return output


class Downsample(nn.Module):
    """A convolution whose input has the channels innermost in memory, and so its output."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv2d(width, width, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of half the size."""
        y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        output: Tensor = self.conv(y)
        return output


class Positions(Body):
    """A decision by values that depend on sizes alone, as for packed sequences of words."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        positions = torch.arange(x.shape[-1], device=str(x.device))
        for block in self.blocks:
            if (positions.diff() != 1).any():
                raise ValueError("packed")
            x = block(x) * float(positions.max()) + positions
        return self.head(x)


class ChannelsLast(nn.Module):
    """Blocks of layers on (B, H, W, C)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C), shifted by one place before the norm."""
        output: Tensor = x + self.mlp(self.norm(torch.roll(x, (1, 1), (1, 2))))
        return output


class Hwc(Body):
    """A network on (B, H, W, C) inside."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1).contiguous()
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.fc(x.mean((1, 2)))
        return output


class LongSkip(Body):
    """The stem's output is read by every block: two tensors are alive everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x)
        x = skip.relu()
        for block in self.blocks:
            x = block(x) + skip
        return self.head(x)


class Reinjects(Body):
    """The image is read by every block: there is no place where one tensor is alive."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for block in self.blocks:
            y = block(y + x[:, :1])
        return self.head(y) * x.mean((1, 2, 3)).unsqueeze(1)


class Windows(nn.Module):
    """Two windows on one memory are alive between the first two layers with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        doubled = 2 * x
        y = self.stem(x)
        left, right = y[:, :4], y[:, 4:]
        left.add_(x.mean(1, keepdim=True))
        right.add_(doubled.mean(1, keepdim=True))
        left = self.left(left)
        output: Tensor = self.fc(torch.cat([left, self.right(right)], 1).mean((2, 3)))
        return output


class WrittenSkip(Body):
    """A skip that is written in place on its way."""

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x)
        x = skip.relu()
        for block in self.blocks:
            x = block(x)
            skip.add_(1)
            x = x + skip
        return self.head(x)


class UNet(nn.Module):
    """Two levels down, two levels up, skips by concatenation; the output is a map."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = self._block(3, 8)
        self.down2 = self._block(8, 8)
        self.middle = self._block(8, 8)
        self.up2 = self._block(16, 8)
        self.up1 = self._block(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def _block(self, inputs: int, width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """Return one map a class."""
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.middle(F.max_pool2d(second, 2))
        x = self.up2(torch.cat([F.interpolate(x, scale_factor=2), second], 1))
        x = self.up1(torch.cat([F.interpolate(x, scale_factor=2), first], 1))
        output: Tensor = self.out(x)
        return output


class EncoderBlock(nn.Module):
    """A transformer's block without attention, with a mask that depends on sizes alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return (B, T, D). mask: (T, T)."""
        output: Tensor = x + mask @ self.mlp(self.norm(x))
        return output


class Language(nn.Module):
    """Words in, words out; the embedding is the output's weight where `is_tied`."""

    def __init__(self, is_tied: bool, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.positions = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(EncoderBlock(width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 11, bias=False)
        if is_tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, words: Tensor) -> dict[str, Any]:
        """Return a dict whose `logits` are (B, T, 11)."""
        batch, length = words.shape
        mask = torch.tril(torch.ones(length, length, device=words.device)) / length
        x = self.embed(words) + self.positions.expand(batch, length, -1)
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        return {"hidden": x, "logits": self.lm_head(x)}


class Caching(Body):
    """A tensor that the first call keeps for all others."""

    scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.scale is None:
            self.scale = torch.full((1, 8, 1, 1), 0.5, device=x.device)
        for block in self.blocks:
            x = block(x) * self.scale
        return self.head(x)


class Shifted(Body):
    """Calls of functions that have other numbers in training than in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.training:
            x = x * 2
        for block in self.blocks:
            x = block(x) * 2
        return self.head(x)


class Tokens(nn.Module):
    """A vision transformer's frame: a class token, positions, and a permuted convolution."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(width, 2, 16, 0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the class token."""
        batch = x.shape[0]
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(batch, -1, -1), x], dim=1) + self.positions
        output: Tensor = self.fc(self.encoder(x)[:, 0])
        return output


class Sequence(nn.Module):
    """Convolutions over a sequence: (B, C, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(3 if i == 0 else 8, 8, 3) for i in range(3))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits. x: (B, 3, H, W)."""
        x = x.flatten(2)
        for layer in self.layers:
            x = layer(x).relu()
        output: Tensor = self.fc(x.mean(2))
        return output


class Auxiliary(Body):
    """An auxiliary classifier in training, or always."""

    is_always = False

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.aux: Any = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 10, 1))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        aux = None
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == 1 and (self.training or self.is_always):
                aux = self.aux(x).mean((2, 3))
        return {"out": self.head(x), "aux": aux}


class Pooled(nn.Module):
    """A map is pooled to one place, and upsampled again to the side of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.first = nn.Conv2d(8, 8, 1)
        self.second = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        place = self.second(self.first(self.pool(self.stem(x))))
        return nn.functional.interpolate(place, size, mode="nearest")


class Contexts(Body):
    """Scopes of autocast and no_grad in the forward."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.kernel: Tensor
        self.register_buffer("kernel", torch.rand(8, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            with torch.no_grad():
                scale = x.abs().amax((1, 2, 3), keepdim=True)
            x = block(x) / (scale + 1)
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                y = F.conv2d(x, self.kernel, groups=8, padding=1)
            x = x + y.float()
        return self.head(x)


class Double(torch.autograd.Function):
    """Twice the input; the gradient is three times, to show whose backward runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """Return factor * x."""
        return x * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return another gradient than the true one."""
        return gradients[0] * 3, None


class Custom(Body):
    """A custom autograd.Function between the blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = Double.apply(block(x), 2.0)
        return self.head(x)


class Twice(Body):
    """The second block is called twice, with the third between: no cut lies there."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.stem(x))
        x = self.blocks[1](x)
        x = self.blocks[2](x)
        x = self.blocks[1](x)
        return self.head(self.blocks[3](x))


class Counting(Body):
    """Buffers that training writes: a running mean and a counter."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.center: Tensor
        self.passes: Tensor
        self.register_buffer("center", torch.zeros(8))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.stem(x))
        if self.training:
            self.center.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
            self.passes += 1
        x = x - self.center.view(1, -1, 1, 1)
        for block in self.blocks[1:]:
            x = block(x)
        return self.head(x)


class PlainTensor(Body):
    """A tensor that is a plain attribute, not a buffer."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.scale = torch.linspace(0.5, 1.5, 8).view(1, 8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) * self.scale
        return self.head(x)


# -- networks that cannot be cut -------------------------------------------------------------------


class Decides(Body):
    """A decision by a tensor's values."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.mean() > 0:
            x = -x
        return super().head(x)


class Asks(Body):
    """A value taken out by item()."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x * x.abs().amax().item())


class Contains(Body):
    """A search for a value in a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x * 2 if 0.0 in x else x)


class DecidingBlock(nn.Module):
    """A decision inside a block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x, or the convolution of x."""
        return x + (self.conv(x) if bool((x > 0).any()) else 0)


class Loops(Body):
    """A loop over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([self.stem(sample) for sample in x])
        return self.head(x)


class PythonRandom(Body):
    """LayerDrop from Python's generator."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if random.random() < 2:
                x = block(x)
        return self.head(x)


class NumpyRandom(Body):
    """Noise from numpy's generator."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) * float(np.random.rand())
        return self.head(x)


class RandomBlock(nn.Module):
    """Python's generator inside a block, which draws again in every replay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus a branch of random weight."""
        output: Tensor = x + self.conv(x) * random.random()
        return output


class ReplacesBuffer(Counting):
    """A buffer that is replaced instead of written."""

    def forward(self, x: Tensor) -> Tensor:
        self.center = self.center * 0.9
        return super().forward(x)


class Cache:
    """An object that modules pass each other."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []


class CachingBlock(nn.Module):
    """A block that takes a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        """Return x plus the cached tensors."""
        cache.tensors.append(x)
        output: Tensor = x + self.conv(sum(cache.tensors[1:], cache.tensors[0]))
        return output


class Caches(Body):
    """Blocks that pass each other a cache."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        cache = Cache()
        for block in self.blocks:
            x = block(x, cache)
        return self.head(x)


class SquareBatch(Body):
    """A size that is the square of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        ones = torch.ones(len(x) * len(x), device=x.device)
        return self.head(x * ones.sum())


class FunctionalNorm(nn.Module):
    """A batch normalisation of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x."""
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, None, self.training)
