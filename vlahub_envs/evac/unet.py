"""The video UNet that denoises a clip of latents: `memory` frames that are given, then `chunk` frames that are imagined.

Shapes: b worlds, v views, t = memory + chunk frames, n = b*v*t frames in all, C channels, h x w latent pixels. Activations stay [n, C, h, w]; in
channels-last memory every rearrangement below between frames and tokens is a view.

Attention to the context (image tokens, action tokens) needs only its keys and values, which are the same for every frame and every denoising step:
`read_context` computes them once per chunk, and worlds that are finished are dropped from them by indexing.
Module names are the published tensor names, `temopral_conv` included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

MOST_ROWS = 32768  # of a call of `attend`: on an H200 cuDNN's backward pass ran with these and failed with 65,536, which 256 clips in training have
PACKED = 8  # rows of `attend_packed` in a tile: 96 tokens of 12 frames

Context = list[tuple[torch.Tensor, torch.Tensor]]  # per spatial block: keys and values, each [b, heads, tokens, head width]


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 19  # latent 4, conditioning latent 4, mask 1, trajectory-map latent 4, ray direction 3, ray origin 3
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)  # strides at which the transformers stand (the middle block always has them)
    num_head_channels: int = 64
    context_dim: int = 1024
    action_tokens: int = 16  # the last tokens of the context; all before them are image tokens
    domains: int = 30
    dropout: float = 0.1


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[b, heads, queries, d] x [b, heads, keys, d] -> [b, queries, heads*d]"""
    if len(q) > MOST_ROWS:
        return torch.cat([attend(*part) for part in zip(q.split(MOST_ROWS), k.split(MOST_ROWS), v.split(MOST_ROWS), strict=True)])
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attend_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention among the few tokens of very many rows, [n, heads, tokens, d] -> [n, tokens, heads*d].

    A GPU's kernels give each row and head a tile of 64 or 128 tokens, of which 12 frames fill little: this took a fifth of the compiled network's time. Here
    several rows share a tile, kept apart by a mask."""
    n, heads, tokens, d = q.shape
    rows = math.gcd(n, PACKED)
    at = torch.arange(rows * tokens, device=q.device) // tokens
    apart = torch.zeros((), dtype=q.dtype, device=q.device).where(at[:, None] == at, -torch.inf)
    q, k, v = (x.transpose(1, 2).reshape(n // rows, rows * tokens, heads, d).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, apart).transpose(1, 2).reshape(n, tokens, heads * d)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[b, tokens, heads*d] -> [b, heads, tokens, d]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class GroupNorm(nn.GroupNorm):
    """PyTorch's CPU kernel for channels-last input subtracts two large sums and loses three digits on flat pictures; the one for contiguous input does not.

    Pictures of one pixel count as both, so the pixels are laid in one row, which has no channels-last form."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(32, channels, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(2)).view_as(x) if x.device.type == "cpu" else super().forward(x)


class Attention(nn.Module):
    """Self-attention, or attention to a context whose keys and values come from `read`.

    `context_dim` switches on the published key and value weights for image (`_ip`) and action (`_tp`) tokens. Of the pairs to_k/to_v, _ip and _tp a context
    block uses exactly one (`source`); the others are in every checkpoint and are kept so that loading stays strict.
    `short`: the attention is among few tokens (see `attend_packed`).
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, source: str = "", short: bool = False):
        super().__init__()
        self.heads, self.source, self.short = heads, source, short
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        if context_dim:
            self.to_k_ip = nn.Linear(context_dim, dim, bias=False)
            self.to_v_ip = nn.Linear(context_dim, dim, bias=False)
            self.to_k_tp = nn.Linear(context_dim, dim, bias=False)
            self.to_v_tp = nn.Linear(context_dim, dim, bias=False)

    def read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Context tokens [b, tokens, context_dim] -> keys and values."""
        k, v = (self.to_k_ip, self.to_v_ip) if self.source == "image" else (self.to_k_tp, self.to_v_tp)
        return split_heads(k(tokens), self.heads), split_heads(v(tokens), self.heads)

    def forward(self, x: torch.Tensor, context: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        q = split_heads(self.to_q(x), self.heads)
        k, v = context or (split_heads(self.to_k(x), self.heads), split_heads(self.to_v(x), self.heads))
        packed = self.short and q.is_cuda and not torch.is_grad_enabled()
        return self.to_out((attend_packed if packed else attend)(q, k, v))


class GEGLU(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float, context_dim: int | None = None, source: str = "", short: bool = False):
        super().__init__()
        self.attn1 = Attention(dim, heads, short=short)
        self.ff = FeedForward(dim, dropout)
        self.attn2 = Attention(dim, heads, context_dim, source, short)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)


class SpatialTransformer(nn.Module):
    """Attention among the pixels of one frame (of all views of it), then from every pixel to the context."""

    def __init__(self, channels: int, heads: int, config: UNetConfig, source: str):
        super().__init__()
        self.norm = GroupNorm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, config.dropout, config.context_dim, source)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, frames: int, views: int, context: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        h = x.shape[2]
        x = side_by_side(x, frames, views)  # [b*t, C, v*h, w]
        y = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [b*t, v*h*w, C]
        (block,) = self.transformer_blocks
        y = y + block.attn1(block.norm1(y))
        # all frames of a world ask the same keys, so they stand in one row of queries and nothing is repeated
        asked = block.attn2(block.norm2(y).unflatten(0, (-1, frames)).flatten(1, 2), context)  # [b, t*v*h*w, C]
        y = y + asked.view_as(y)
        y = y + block.ff(block.norm3(y))
        x = x + self.proj_out(y).transpose(1, 2).reshape(x.shape)
        return apart(x, frames, views, h)


def side_by_side(x: torch.Tensor, frames: int, views: int) -> torch.Tensor:
    """[b*v*t, C, h, w] -> [b*t, C, v*h, w]: the views of a frame below each other."""
    if views == 1:
        return x
    _, channels, h, w = x.shape
    return x.view(-1, views, frames, channels, h, w).permute(0, 2, 3, 1, 4, 5).reshape(-1, channels, views * h, w)


def apart(x: torch.Tensor, frames: int, views: int, h: int) -> torch.Tensor:
    """The inverse of `side_by_side`."""
    if views == 1:
        return x
    _, channels, _, w = x.shape
    return x.reshape(-1, frames, channels, views, h, w).permute(0, 3, 1, 2, 4, 5).reshape(-1, channels, h, w)


class TemporalTransformer(nn.Module):
    """Attention among the frames of one pixel: two self-attentions, no mask and no positional code (frame order is known from the convolutions)."""

    def __init__(self, channels: int, heads: int, head_width: int, dropout: float, convolutional: bool = False):
        super().__init__()
        inner = heads * head_width
        self.norm = GroupNorm(channels, eps=1e-6)
        # the first one of the network is published as 1x1 convolutions ([out, in, 1]), the others as matrices
        self.proj_in = nn.Conv1d(channels, inner, 1) if convolutional else nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(inner, heads, dropout, short=True)])
        self.proj_out = nn.Conv1d(inner, channels, 1) if convolutional else nn.Linear(inner, channels)

    def forward(self, x: torch.Tensor, frames: int, views: int) -> torch.Tensor:
        n, channels, h, w = x.shape
        # statistics run over the group's channels and all pixels, frames and views of a world: [b, C, v*t, h*w]
        y = self.norm(as_clip(x, views * frames))
        y = y.permute(0, 2, 3, 1).reshape(-1, frames, h * w, channels).transpose(1, 2).flatten(0, 1)  # [b*v*h*w, t, C]
        (block,) = self.transformer_blocks
        y = matrix(self.proj_in, y)
        y = y + block.attn1(block.norm1(y))
        y = y + block.attn2(block.norm2(y))
        y = y + block.ff(block.norm3(y))
        y = matrix(self.proj_out, y)
        y = y.unflatten(0, (-1, h * w)).transpose(1, 2).reshape(n, h, w, channels).permute(0, 3, 1, 2)
        return x + y


def matrix(layer: nn.Linear | nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
    """A linear layer, or a 1x1 convolution used as one: [..., in] -> [..., out]"""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


def as_clip(x: torch.Tensor, frames: int) -> torch.Tensor:
    """[clips*frames, C, h, w] -> [clips, C, frames, h*w]"""
    _, channels, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(-1, frames, h * w, channels).permute(0, 3, 1, 2)


def as_frames(x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """The inverse of `as_clip`."""
    clips, channels, frames, _ = x.shape
    return x.permute(0, 2, 3, 1).reshape(clips * frames, h, w, channels).permute(0, 3, 1, 2)


class TemporalConv(nn.Module):
    """Four stages of GroupNorm, SiLU and a causal convolution over three frames, added to their input."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()

        def stage(*between: nn.Module) -> nn.Sequential:
            return nn.Sequential(GroupNorm(channels), nn.SiLU(), *between, nn.Conv3d(channels, channels, (3, 1, 1)))

        self.conv1 = stage()
        self.conv2, self.conv3, self.conv4 = (stage(nn.Dropout(dropout)) for _ in range(3))

    def forward(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        _, _, h, w = x.shape
        clip = as_clip(x, frames)
        y = clip
        for stage in (self.conv1, self.conv2, self.conv3, self.conv4):
            *before, conv = stage
            for layer in before:
                y = layer(y)
            first = y[:, :, :1]
            # frames are the image rows and pixels the columns of a 2-D convolution: the same sums, and channels-last memory needs no copy
            y = F.conv2d(torch.cat([first, first, y], dim=2), conv.weight.squeeze(-1), conv.bias)
        return as_frames(clip + y, h, w)


class ResBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, emb_channels: int, dropout: float):
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(GroupNorm(out_channels), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        self.temopral_conv = TemporalConv(out_channels, dropout)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, frames: int) -> torch.Tensor:
        y = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        y = self.skip_connection(x) + self.out_layers(y)
        return self.temopral_conv(y, frames)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def sinusoid(steps: torch.Tensor, width: int) -> torch.Tensor:
    """[k] whole numbers -> [k, width]: cosines, then sines, periods from 2 pi to 2 pi * 10000."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=steps.device))
    angles = steps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class VideoUNet(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        base, width = config.model_channels, 4 * config.model_channels

        def mlp() -> nn.Sequential:
            return nn.Sequential(nn.Linear(base, width), nn.SiLU(), nn.Linear(width, width))

        self.domain_embedding = nn.Embedding(config.domains, width)
        self.time_embed, self.fps_embedding = mlp(), mlp()
        self.spatial: list[SpatialTransformer] = []  # in order of construction: even ones look at action tokens, odd ones at image tokens

        def level(channels: int, out: int, stride: int | None) -> list[nn.Module]:
            """A residual block, and both transformers where `stride` has them (None: always, in the middle)."""
            layers: list[nn.Module] = [ResBlock(channels, out, width, config.dropout)]
            return layers + (transformers(out) if stride is None or stride in config.attention_resolutions else [])

        def transformers(channels: int) -> list[nn.Module]:
            heads = channels // config.num_head_channels
            spatial = SpatialTransformer(channels, heads, config, "image" if len(self.spatial) % 2 else "action")
            self.spatial = [*self.spatial, spatial]
            return [spatial, TemporalTransformer(channels, heads, config.num_head_channels, config.dropout)]

        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(config.in_channels, base, 3, padding=1)])])
        # 8 heads whatever the width: the published network widens 320 channels to 512 here
        self.init_attn = nn.ModuleList([TemporalTransformer(base, 8, config.num_head_channels, config.dropout, convolutional=True)])
        channels, stride, skips = base, 1, [base]
        for depth, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(nn.ModuleList(level(channels, mult * base, stride)))
                channels = mult * base
                skips.append(channels)
            if depth < len(config.channel_mult) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)
                stride *= 2
        self.middle_block = nn.ModuleList([*level(channels, channels, None), ResBlock(channels, channels, width, config.dropout)])
        self.output_blocks = nn.ModuleList()
        for depth, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = level(channels + skips.pop(), mult * base, stride)
                channels = mult * base
                if depth and i == config.num_res_blocks:
                    layers.append(Upsample(channels))
                    stride //= 2
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(GroupNorm(base), nn.SiLU(), nn.Conv2d(base, config.out_channels, 3, padding=1))

    def read_context(self, tokens: torch.Tensor, views: int = 1) -> Context:
        """Context tokens [b*v, image tokens + action tokens, context_dim] -> keys and values of every spatial block."""
        image, action = tokens[:, : -self.config.action_tokens], tokens[:, -self.config.action_tokens :]
        image = image.reshape(-1, views * image.shape[1], image.shape[2])  # [b, v*tokens, D]: the image tokens of all views
        action = action[::views]  # [b, tokens, D]: of the first view
        return [block.transformer_blocks[0].attn2.read(image if block.transformer_blocks[0].attn2.source == "image" else action) for block in self.spatial]

    def embed(self, timesteps: torch.Tensor, fps: torch.Tensor, domain: torch.Tensor, frames: int, chunk: int) -> torch.Tensor:
        """The rows given to the residual blocks: [b*v*t, 4C]. Memory frames are clean, hence at step 0.

        timesteps [b*v]; fps, domain [b], or [b*v] where every view has its own."""
        base, dtype = self.config.model_channels, self.time_embed[0].weight.dtype
        noisy = self.time_embed(sinusoid(timesteps, base).to(dtype))
        clean = self.time_embed(sinusoid(torch.zeros_like(timesteps), base).to(dtype))
        always = self.fps_embedding(sinusoid(fps, base).to(dtype)) + self.domain_embedding(domain)
        always = always.repeat_interleave(len(timesteps) // len(always), dim=0)
        rows = torch.stack([clean] * (frames - chunk) + [noisy] * chunk, dim=1)  # [b*v, t, 4C]
        return (rows + always[:, None]).flatten(0, 1)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: Context,
        fps: torch.Tensor,
        domain: torch.Tensor,
        chunk: int,
        views: int = 1,
    ) -> torch.Tensor:
        """v-prediction [b*v, out, t, h, w] for x [b*v, in, t, h, w] at `timesteps` [b*v], which holds for the last `chunk` frames."""
        clips, _, frames, height, width = x.shape
        emb = self.embed(timesteps, fps, domain, frames, chunk)
        keys_values = iter(context)

        def run(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
            for layer in layers:
                if isinstance(layer, ResBlock):
                    x = layer(x, emb, frames)
                elif isinstance(layer, SpatialTransformer):
                    x = layer(x, frames, views, next(keys_values))
                elif isinstance(layer, TemporalTransformer):
                    x = layer(x, frames, views)
                else:
                    x = layer(x)
            return x

        x = x.transpose(1, 2).flatten(0, 1)  # [n, in, h, w]
        skips = []
        for i, layers in enumerate(self.input_blocks):
            x = run(layers, x)
            if i == 0:
                x = run(self.init_attn, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for layers in self.output_blocks:
            x = run(layers, torch.cat([x, skips.pop()], dim=1))
        x = self.out(x)
        return x.view(clips, frames, -1, height, width).transpose(1, 2)
