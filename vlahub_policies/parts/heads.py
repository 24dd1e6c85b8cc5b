"""Heads that reinforcement learning adds to a pretrained policy: a critic, and a learned exploration noise. Names follow RLinf's checkpoints."""

import math
from itertools import pairwise

import torch
from torch import nn


class ValueHead(nn.Module):
    """MLP [.., width] -> [.., 1] with ReLU between layers. The last layer starts near zero, so that first values are near zero."""

    def __init__(self, width: int, hidden: tuple[int, ...] = (512, 256, 128)):
        super().__init__()
        layers: list[nn.Module] = []
        for into, out in pairwise((width, *hidden)):
            layers += [nn.Linear(into, out), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden[-1] if hidden else width, 1))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.mlp[-1].weight, std=0.02)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class _Layer(nn.Module):
    def __init__(self, into: int, out: int):
        super().__init__()
        self.linear_1 = nn.Linear(into, out)


class _Layers(nn.Module):
    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.moduleList = nn.ModuleList(_Layer(into, out) for into, out in pairwise(widths))


class NoiseHead(nn.Module):
    """Standard deviation of the exploration noise, per element, from the action expert's features: [.., width] -> [.., action_dim].

    `low` and `high` bound the standard deviation; the head moves between them on a logarithmic scale.
    """

    def __init__(self, width: int, action_dim: int, low: float = 0.08, high: float = 0.16):
        super().__init__()
        self.mlp_logvar = _Layers((width, 128, 64, action_dim))
        self.low, self.high = math.log(low**2), math.log(high**2)  # of the variance

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        layers = [layer.linear_1 for layer in self.mlp_logvar.moduleList]
        hidden = features.to(layers[0].weight.dtype)
        for layer in layers[:-1]:
            hidden = layer(hidden).tanh()
        position = (layers[-1](hidden).tanh() + 1) / 2  # 0 .. 1
        return torch.exp(0.5 * (self.low + (self.high - self.low) * position))
