"""The vision transformers ViT-Ti, ViT-S and ViT-B in DeiT's shapes.

Sources: Dosovitskiy et al. 2021, Touvron et al. 2021.

A patch embedding with a class token and learned positions is block 0. Every encoder layer (pre-norm
attention, pre-norm MLP) is one block more. The final norm and a linear layer on the class token are
the network's head. Parameters carry DeiT's names: cls_token, pos_embed, patch_embed.proj,
blocks.0.attn.qkv, norm, head.

Linear layers, the class token and the positions start from a truncated normal distribution of
deviation 0.02. Biases start from 0, the patch embedding as torch has it. There is no dropout and no
stochastic depth.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localpipe.config.keys import Blocks, Positive
from localpipe.errors import UserError
from localpipe.networks.blueprint import Block, Blueprint
from localpipe.tasks.classification import Classification
from localpipe.tasks.layout import Grid

DEVIATION = 0.02
EPSILON = 1e-6  # of every layer norm


@dataclass(frozen=True)
class ViTShape:
    """The width of the tokens and the number of attention heads."""

    width: int
    heads: int


SHAPES = {
    "vit_tiny": ViTShape(192, 3),
    "vit_small": ViTShape(384, 6),
    "vit_base": ViTShape(768, 12),
}


class PatchEmbedding(nn.Module):
    """(B, C, H, W) images to (B, 1 + h * w, D) tokens, the class token first."""

    def __init__(self, channels: int, width: int, patch: int, grid: Grid) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, grid.prefix, width))
        self.pos_embed = nn.Parameter(torch.empty(1, grid.prefix + grid.height * grid.width, width))
        proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=DEVIATION)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens, (B, 1 + h * w, D), with the positions added.

        torch raises RuntimeError for images of another size than the grid's.
        """
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, h * w, D)
        cls_tokens = self.cls_token.expand(x.shape[0], -1, -1)  # (B, 1, D); torch.export follows it
        tokens = torch.cat((cls_tokens, patches), dim=1)
        return tokens + self.pos_embed


class Attention(nn.Module):
    """Multi-head self-attention: (B, T, D) to (B, T, D). The stage selects the kernel.

    is_causal: a token attends to itself and to those before it alone.
    """

    def __init__(self, width: int, heads: int, is_causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.is_causal = is_causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended tokens, (B, T, D), without a skip."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, T, 3, heads, D / heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, D / heads) each
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two linear layers with a GELU between: (B, T, D) to (B, T, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens, (B, T, D), without a skip."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class EncoderLayer(nn.Module):
    """Attention, then an MLP of four times the width: (B, T, D) to (B, T, D).

    Each of the two has a layer norm before it and a skip around both.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, EPSILON)
        self.mlp = MLP(width, 4 * width)
        _init_linear_layers(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens, (B, T, D)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViTHead(nn.Module):
    """The final norm and a linear layer on the class token: (B, T, D) to (B, classes)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, EPSILON)
        self.head = nn.Linear(width, num_classes)
        _init_linear_layers(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (B, classes). Only the first token is read."""
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def _init_linear_layers(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=DEVIATION)
            nn.init.zeros_(layer.bias)


def vit_blueprint(
    name: str,
    image: tuple[int, int, int],
    num_classes: int,
    *,
    patch: Positive = 16,
    depth: Blocks = 12,
    width: Positive | None = None,
    heads: Positive | None = None,
) -> Blueprint:
    """Return the blueprint of `vit_tiny`, `vit_small` or `vit_base`: 1 + depth blocks.

    image: (C, H, W). patch: the side of a patch, in pixels. depth: the number of encoder layers.
    width: the width of a token. heads: the number of attention heads. Where width or heads are
    None, they are those of the name. Raises UserError if heads do not divide the width, or patches
    the image. Raises KeyError for another name, unless both width and heads are set.
    """
    width = width or SHAPES[name].width
    heads = heads or SHAPES[name].heads
    if width % heads:
        raise UserError(
            f"model: {name} cannot share a width of {width} between {heads} heads; "
            "set model.args.width to a multiple of model.args.heads"
        )
    channels, rows, columns = image
    if rows % patch or columns % patch:
        raise UserError(
            f"model: {name} cannot cut images of {rows}x{columns} into patches of {patch}x{patch}; "
            "set model.args.patch to a divisor of both sides"
        )
    grid = Grid(rows // patch, columns // patch, prefix=1)

    # The embedding's parameters have no prefix, as in DeiT.
    build_embedding = partial(PatchEmbedding, channels, width, patch, grid)
    blocks = [Block("embedding", "", build_embedding)]
    for index in range(depth):
        block_name = f"blocks.{index}"
        build = partial(EncoderLayer, width, heads)
        blocks.append(Block(block_name, f"{block_name}.", build))
    tail = Block("head", "", partial(ViTHead, width, num_classes))
    return Blueprint(name, tuple(blocks), tail, Classification(num_classes, grid), image)
