"""A decoder of tokens: the transformer of GPT-2 in its own sizes, without dropout.

Source: Radford et al. 2019, with the layers of Vaswani et al. 2017.

The embedding of the tokens plus learned positions is block 0. Every layer (pre-norm causal
attention, pre-norm MLP) is one block more. The final norm and a linear layer on every token are the
network's head. The weights of embedding and head are two, since they lie in two stages.

Weights start as GPT-2's do: from a normal distribution of deviation 0.02, and biases from 0. The
two layers of a block whose outputs are added to the tokens start with 0.02 / sqrt(2 * depth).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from localpipe.config.keys import Blocks, Positive
from localpipe.errors import UserError
from localpipe.networks.blueprint import Block, Blueprint
from localpipe.networks.vit import MLP, Attention
from localpipe.tasks.next_token import NextToken

DEVIATION = 0.02


class TokenEmbedding(nn.Module):
    """(B, T) tokens to (B, T, D): a row of features a token, plus one a position.

    vocabulary: the number of tokens. length: the largest T.
    """

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.tokens.weight, std=DEVIATION)
        nn.init.normal_(self.positions, std=DEVIATION)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embedded tokens, (B, T, D). Fewer tokens than `length` have its first ones.

        torch raises RuntimeError for more, and on the CPU IndexError for a token that is not below
        the vocabulary.
        """
        embedded: Tensor = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return embedded


class DecoderLayer(nn.Module):
    """Causal attention, then an MLP of four times the width: (B, T, D) to (B, T, D).

    Each of the two has a layer norm before it and a skip around both. depth: the number of such
    layers in the network, which scales the initial weights of what is added to the tokens.
    """

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, is_causal=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)
        _init_linear_layers(self)
        for added in (self.attn.proj, self.mlp.fc2):
            nn.init.normal_(added.weight, std=DEVIATION / math.sqrt(2 * depth))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens, (B, T, D)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class DecoderHead(nn.Module):
    """The final norm and a linear layer without bias: (B, T, D) to (B, T, vocabulary)."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        _init_linear_layers(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the token after every token, (B, T, vocabulary)."""
        logits: Tensor = self.head(self.norm(x))
        return logits


def _init_linear_layers(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=DEVIATION)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def gpt_blueprint(
    name: str,
    tokens: tuple[int, ...],
    num_classes: int,
    *,
    depth: Blocks = 12,
    width: Positive = 768,
    heads: Positive = 12,
) -> Blueprint:
    """Return the blueprint of a decoder: 1 + depth blocks.

    tokens: (T,), the context's length. num_classes: the vocabulary. depth: the number of layers.
    width: the width of a token. heads: the number of attention heads. Raises UserError if heads do
    not divide the width.
    """
    if width % heads:
        raise UserError(
            f"model: {name} cannot share a width of {width} between {heads} heads; "
            "set model.args.width to a multiple of model.args.heads"
        )
    build_embedding = partial(TokenEmbedding, num_classes, tokens[0], width)
    blocks = [Block("embedding", "embedding.", build_embedding)]
    for index in range(depth):
        block_name = f"blocks.{index}"
        build = partial(DecoderLayer, width, heads, depth)
        blocks.append(Block(block_name, f"{block_name}.", build))
    tail = Block("head", "", partial(DecoderHead, width, num_classes))
    task = NextToken(num_classes, sample=tokens)
    return Blueprint(name, tuple(blocks), tail, task, tokens, dtype="int64")
