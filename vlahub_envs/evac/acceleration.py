"""The network's calls on a GPU with less in between: a CUDA graph of one call for each batch size, around compiled layers if wanted.

The inputs of a chunk that no denoising step changes (memory, conditions, the context's keys and values) are copied into the graph once per chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from vlahub_envs.evac.unet import Context, VideoUNet

Acceleration = Literal["off", "graph", "compile"]
KEPT = 16  # graphs of different batch sizes that are kept: as worlds finish one by one, an iteration passes through all sizes from 128 to 1


@dataclass
class Inputs:
    """What the network is given at every denoising step of a chunk of b worlds."""

    memory: torch.Tensor  # [b, 4, m, h, w]
    constant: torch.Tensor  # [b, 15, T, h, w]
    context: Context
    fps: torch.Tensor  # [b]
    domain: torch.Tensor  # [b]

    def tensors(self) -> list[torch.Tensor]:
        return [self.memory, self.constant, self.fps, self.domain, *(tensor for pair in self.context for tensor in pair)]

    def padded(self, size: int) -> Inputs:
        """Copies with the last world repeated up to `size`."""
        rows = torch.arange(size, device=self.fps.device).clamp(max=len(self.fps) - 1)
        context = [(keys[rows], values[rows]) for keys, values in self.context]
        return Inputs(self.memory[rows], self.constant[rows], context, self.fps[rows], self.domain[rows])


def denoise(unet: Callable, inputs: Inputs, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """v [b, 4, T, h, w] for the chunk's noisy latents [b, 4, c, h, w] at timesteps [b]."""
    full = torch.cat([torch.cat([inputs.memory, x.to(inputs.memory.dtype)], dim=2), inputs.constant], dim=1)  # [b, 19, T, h, w]
    return unet(full, timesteps, inputs.context, inputs.fps, inputs.domain, x.shape[2])


def size_for(batch: int) -> int:
    """The batch size that a graph is made for: worlds finish one by one, and a graph for every number of them would cost more than a few idle rows."""
    step = max(1, 2 ** (max(batch - 1, 1).bit_length() - 2))  # 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ...
    return -(-batch // step) * step


def lay_out(module: nn.Module) -> None:
    """Put the weights of 2-D convolutions into channels-last memory, which the compiled network then hardly leaves."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.to(memory_format=torch.channels_last)


class Accelerated:
    """Replays the network. Its answer is overwritten by the next call."""

    def __init__(self, unet: VideoUNet, mode: Acceleration):
        self.unet = torch.compile(unet.forward, dynamic=False) if mode == "compile" else unet
        self.pool = torch.cuda.graph_pool_handle()  # graphs run one after another, so they share their memory
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Inputs, torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def network(self, inputs: Inputs, x_shape: torch.Size) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """The network of one chunk; `x_shape` is that of its noisy latents."""
        count, size = x_shape[0], size_for(x_shape[0])
        inputs = inputs.padded(size)
        key = (size, *x_shape[1:], *(tensor.shape for tensor in inputs.tensors()))
        if key not in self.graphs:
            while len(self.graphs) >= KEPT:
                self.graphs.pop(next(iter(self.graphs)))
            self.graphs[key] = self._capture(inputs, (size, *x_shape[1:]))
        graph, kept, noisy, timesteps, answer = self.graphs[key]
        for mine, given in zip(kept.tensors(), inputs.tensors(), strict=True):
            mine.copy_(given)

        def call(x: torch.Tensor, timestep: int) -> torch.Tensor:
            noisy[:count].copy_(x)
            timesteps.fill_(timestep)
            graph.replay()
            return answer[:count]

        return call

    def _capture(self, inputs: Inputs, x_shape: tuple[int, ...]) -> tuple:
        noisy = torch.zeros(x_shape, device=inputs.memory.device)
        timesteps = torch.zeros(x_shape[0], dtype=torch.int64, device=noisy.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # outside the graph first: libraries choose their kernels, compilation happens
            for _ in range(2):
                denoise(self.unet, inputs, noisy, timesteps)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            answer = denoise(self.unet, inputs, noisy, timesteps)
        return graph, inputs, noisy, timesteps, answer
