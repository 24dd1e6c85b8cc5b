"""The resampler (a Perceiver): any number of input tokens -> a fixed number of context tokens. Row order of the input is invisible to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vlahub_envs.evac.unet import attend, split_heads


@dataclass(frozen=True)
class ResamplerConfig:
    embedding_dim: int  # of the input tokens
    num_queries: int = 16  # output tokens
    dim: int = 1024
    depth: int = 4
    heads: int = 12
    dim_head: int = 64
    output_dim: int = 1024
    ff_mult: int = 4


class PerceiverAttention(nn.Module):
    def __init__(self, config: ResamplerConfig):
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.dim_head
        self.norm1, self.norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_kv = nn.Linear(config.dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=False)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(latents), k, v))
        return self.to_out(attend(q, k, v))


class Resampler(nn.Module):
    def __init__(self, config: ResamplerConfig):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, config.num_queries, config.dim) / config.dim**0.5)
        self.proj_in = nn.Linear(config.embedding_dim, config.dim)
        self.proj_out = nn.Linear(config.dim, config.output_dim)
        self.norm_out = nn.LayerNorm(config.output_dim)
        inner = config.ff_mult * config.dim
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(config),
                    nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, inner, bias=False), nn.GELU(), nn.Linear(inner, config.dim, bias=False)),
                ]
            )
            for _ in range(config.depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, any, embedding_dim] -> [b, num_queries, output_dim]"""
        latents = self.latents.expand(len(x), -1, -1)
        x = self.proj_in(x)
        for attention, feed_forward in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))
