"""The success classifier: one frame -> the probability that the task is solved in it. It is never told the task: each suite has its own weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    def __init__(self, channels: int, out_channels: int, shrink: bool):
        super().__init__()
        stride = 2 if shrink else 1
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if shrink:
            self.conv3 = nn.Conv2d(channels, out_channels, 1, stride=2)
        self.bn1, self.bn2 = nn.BatchNorm2d(out_channels), nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.conv3(x) if hasattr(self, "conv3") else x))


class RewardClassifier(nn.Module):
    """A ResNet-18 whose convolutions have biases. `widths` of its four stages; the published one has the default."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512)):
        super().__init__()
        first = widths[0]
        stages, channels = [], first
        for i, width in enumerate(widths):
            stages.append(nn.Sequential(Residual(channels, width, shrink=i > 0), Residual(width, width, shrink=False)))
            channels = width
        self.net = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, first, 7, stride=2, padding=3), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 1),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """RGB in [-1, 1], [n, 3, H, W] -> logits [n]. Values beyond are clamped, so that a decoder's overshoot cannot stop an episode."""
        return self.net(images.clamp(-1, 1)).squeeze(-1)
