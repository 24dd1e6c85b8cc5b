"""Llama-2 without a causal mask, under the published key names: every token sees every token that is not padding.

OpenVLA-OFT was trained so (its own fork of transformers changes one attention class); a stock causal Llama loads the same weights without a word and loses
most of the success rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 32064  # rows of the embedding: 32000 pieces and <PAD>, padded to a multiple of 64
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    rms_norm_eps: float = 1e-6  # not Llama-2's own 1e-5: OpenVLA's config leaves it out and trains with the library's default
    rope_theta: float = 10000.0


Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin, [B, 1, S, head_dim / 2]


def call(layer: nn.Module, *inputs: Any) -> torch.Tensor:
    return layer(*inputs)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        dim, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor, rope: Rope, mask: torch.Tensor | None, read: slice) -> torch.Tensor:
        """Attention of the positions `read` to all of `x` [B, S, dim]."""
        cos, sin = rope
        q, k, v = (proj(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj, y in ((self.q_proj, x[:, read]), (self.k_proj, x), (self.v_proj, x)))
        x = F.scaled_dot_product_attention(rotate(q, cos[:, :, read], sin[:, :, read]), rotate(k, cos, sin), v, attn_mask=mask)  # [B, heads, read, head_dim]
        return self.o_proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: torch.Tensor, rope: Rope, mask: torch.Tensor | None, read: slice) -> torch.Tensor:
        x = x[:, read] + self.self_attn(self.input_layernorm(x), rope, mask, read)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embeddings [B, S, dim] -> hidden states of the positions that are read, after the final norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, x: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor | None, read: slice, through: Callable = call) -> torch.Tensor:
        """
        Args:
            positions: [B, S] or [1, S].
            keep: [B, S] bool hides padding keys; None where there are none (attention without a mask is faster).
            read: the positions that are wanted; the last layer computes no others.
            through: runs one layer; `call`, or a compiled form of it.
        """
        rope = tuple(table.to(x.dtype) for table in self.rope(positions))
        mask = None if keep is None else keep[:, None, None, :]  # the same for every query: nothing is causal
        for number, layer in enumerate(self.layers):
            wanted = read if number == len(self.layers) - 1 else slice(None)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, mask, wanted, use_reentrant=False)
            else:
                x = through(layer, x, rope, mask, wanted)
        return self.norm(x)

    def rope(self, positions: torch.Tensor) -> Rope:
        """cos and sin, float32."""
        dim = self.config.hidden_size // self.config.num_attention_heads
        frequencies = self.config.rope_theta ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
        angles = positions.float()[:, None, :, None] * frequencies
        return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of x [B, heads, S, head_dim]; its two halves form the pairs."""
    first, second = x.chunk(2, dim=-1)
    # addcmul: fewer passes over memory than products and sums apart, which at large batches cost as much as attention itself
    return torch.cat([torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)], dim=-1)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
