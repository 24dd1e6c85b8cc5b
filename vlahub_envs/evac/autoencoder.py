"""The image autoencoder (Stable Diffusion's layout): RGB in [-1, 1], [n, 3, H, W] <-> scaled latents [n, 4, H/8, W/8]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vlahub_envs.evac.unet import GroupNorm, attend

SCALE = 0.18215  # brings the latents to about unit variance; part of every checkpoint of this layout


@dataclass(frozen=True)
class AutoencoderConfig:
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 4

    @property
    def stride(self) -> int:
        return 2 ** (len(self.channel_mult) - 1)


def norm(channels: int) -> GroupNorm:
    return GroupNorm(channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.norm2 = norm(channels), norm(out_channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + y


class AttentionBlock(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))  # [n, 1, h*w, C]
        return x + self.proj_out(attend(q, k, v).transpose(1, 2).reshape(x.shape))


class Resample(nn.Module):
    """Half the size (zero padding on the right and below only), or twice the size."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if up else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1)))


def middle(channels: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1, mid.attn_1, mid.block_2 = ResnetBlock(channels, channels), AttentionBlock(channels), ResnetBlock(channels, channels)
    return mid


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        channels, self.down = config.channels, nn.ModuleList()
        for depth, mult in enumerate(config.channel_mult):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(config.num_res_blocks):
                level.block.append(ResnetBlock(channels, mult * config.channels))
                channels = mult * config.channels
            if depth < len(config.channel_mult) - 1:
                level.downsample = Resample(channels, up=False)
            self.down.append(level)
        self.mid = middle(channels)
        self.norm_out = norm(channels)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.channel_mult[-1] * config.channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = middle(channels)
        levels = []
        for depth, mult in reversed(list(enumerate(config.channel_mult))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                level.block.append(ResnetBlock(channels, mult * config.channels))
                channels = mult * config.channels
            if depth:
                level.upsample = Resample(channels, up=True)
            levels.insert(0, level)  # published numbering: level 0 is the largest picture, although it comes last
        self.up = nn.ModuleList(levels)
        self.norm_out = norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(z)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.compiled: Callable[[torch.Tensor], torch.Tensor] | None = None  # the decoder's forward, where it is compiled
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the (unscaled) latent, each [n, 4, H/8, W/8]."""
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] -> scaled latents. The posterior's mean, not a sample of it: the same picture always gives the same latent."""
        return SCALE * self.posterior(images)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents -> images of about [-1, 1]; the network's output is not clamped."""
        return (self.compiled or self.decoder)(self.post_quant_conv(latents / SCALE))
