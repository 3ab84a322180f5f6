"""A GPT in plain PyTorch: pre-norm, rotary embeddings, one weight for the input and the output embedding."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from thinwire.comm.settings import Settings


class GPTSettings(Settings):
    """Shape of a GPT.

    vocab: number of token ids; "auto" = as many as the tokenizer has.
    mlp: "gelu" (two matrices, 4 x width hidden) or "swiglu" (three, 8/3 x width rounded up to a multiple of 32).
    weights: what to start from: a safetensors file, a checkpoint, or a run folder with checkpoints; "" draws them from
      the seed. Unlike with checkpoint.resume, steps are counted from 0 and no optimizer memory is taken over.
    """

    kind: Literal["gpt"] = "gpt"
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    width: int = Field(gt=0)
    context: int = Field(gt=1)
    vocab: Annotated[int, Field(gt=1)] | Literal["auto"] = "auto"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    rotary_base: float = Field(10_000.0, gt=1)
    weights: str = ""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> GPTSettings:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} must be a multiple of 2 x heads = {2 * self.heads}: rotary embeddings turn "
                "pairs of numbers within a head"
            )
        return self


class GPT(nn.Module):
    """A decoder-only transformer.

    Vaswani et al. 2017 (1706.03762), with RMS norms before each block (Zhang and Sennrich 2019, 1910.07467), rotary
    position embeddings (Su et al. 2021, 2104.09864) and no biases: per layer x += attention(norm(x)),
    x += mlp(norm(x)); logits = norm(x) @ embedding^T.

    Args:
        settings: the shape.
        vocab: number of token ids, from the tokenizer.
    """

    def __init__(self, settings: GPTSettings, vocab: int) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(vocab, settings.width)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.width, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at each position.

        Args:
            tokens: (batch, length) integers, length at most settings.context.
        Returns: (batch, length, vocab), in the compute dtype.
        """
        length = tokens.shape[1]
        if length > self.settings.context:
            raise ValueError(f"model.context: {length} tokens given, the model sees at most {self.settings.context}")
        head_width = self.settings.width // self.settings.heads
        turn = rotary_angles(length, head_width, self.settings.rotary_base, tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, turn)
        return F.linear(self.norm(x), self.embedding.weight)

    def initialise(self, seed: int) -> None:
        """Draw all weights anew: N(0, 0.02^2), residual outputs narrower by sqrt(2 layers), norms 1.

        Drawn on the CPU from a generator of its own, in the order of the parameters, so that every rank and every
        device gets the same numbers from the same seed.
        """
        generator = torch.Generator().manual_seed(seed)
        narrow = 1 / math.sqrt(2 * self.settings.layers)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() < 2:
                    parameter.fill_(1.0)
                    continue
                std = 0.02 * narrow if name.removesuffix(".weight").endswith("output") else 0.02
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


class Block(nn.Module):
    """Attention, then a position-wise MLP, each on the normed input and added to it."""

    def __init__(self, settings: GPTSettings) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(settings.width, eps=1e-6)
        self.attention = Attention(settings)
        self.mlp_norm = nn.RMSNorm(settings.width, eps=1e-6)
        self.mlp = MLP(settings)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Args: x (batch, length, width); turn as rotary_angles() gives."""
        x = x + self.attention(self.attention_norm(x), turn)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, settings: GPTSettings) -> None:
        super().__init__()
        self.heads = settings.heads
        self.input = nn.Linear(settings.width, 3 * settings.width, bias=False)
        self.output = nn.Linear(settings.width, settings.width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Args: x (batch, length, width); turn as rotary_angles() gives."""
        batch, length, width = x.shape
        query, key, value = self.input(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(query, turn), rotate(key, turn), value, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """gelu: output(gelu(input(x))); swiglu (Shazeer 2020, 2002.05202): output(silu(a) * b), [a, b] = input(x).

    Args:
        hidden: numbers between the two matrices; default: see GPTSettings.
    """

    def __init__(self, settings: GPTSettings, hidden: int | None = None) -> None:
        super().__init__()
        self.gated = settings.mlp == "swiglu"
        if hidden is None:
            hidden = -(-8 * settings.width // 96) * 32 if self.gated else 4 * settings.width
        self.input = nn.Linear(settings.width, hidden * (2 if self.gated else 1), bias=False)
        self.output = nn.Linear(hidden, settings.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (batch, length, width)."""
        hidden = self.input(x)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        return self.output(hidden)  # type: ignore[no-any-return]


def rotary_angles(length: int, head_width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i / head_width), each (length, head_width / 2), fp32."""
    frequency = base ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pair (x_i, x_{i + half}) of each head by its position's angle; x: (batch, heads, length, head_width)."""
    cos, sin = turn
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
