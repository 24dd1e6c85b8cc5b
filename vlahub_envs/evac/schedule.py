"""Noise schedule and samplers: v-prediction, zero terminal signal-to-noise ratio, a rescale of the clean latents that depends on the step; DDIM, and
DPM-Solver++(2M), a second-order method for few steps.

The network sees x_t = sqrt(abar_t) s_t z + sqrt(1 - abar_t) noise and predicts v = sqrt(abar_t) noise - sqrt(1 - abar_t) s_t z.
abar is 0 at the last step, so sampling starts from pure noise; s falls from 1 to 0.7 over the first 400 steps and stays there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

Solver = Literal["ddim", "dpm"]


@dataclass(frozen=True)
class ScheduleConfig:
    timesteps: int = 1000
    linear_start: float = 0.00085
    linear_end: float = 0.012
    base_scale: float = 0.7
    scale_steps: int = 400  # over which the scale falls from 1 to base_scale


class Schedule:
    """Everything is a function of the config. Checkpoints hold buffers of the same names, but some files hold them as they were before the zero-SNR rescale."""

    def __init__(self, config: ScheduleConfig):
        steps = np.linspace(config.linear_start**0.5, config.linear_end**0.5, config.timesteps) ** 2
        root = np.sqrt(np.cumprod(1 - steps))
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # shifted so that the last is 0, stretched so that the first stays
        self.betas = 1 - np.concatenate([root[:1] ** 2, root[1:] ** 2 / root[:-1] ** 2])
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        falling = np.linspace(1, config.base_scale, config.scale_steps)
        self.scale = np.concatenate([falling, np.full(config.timesteps, config.base_scale)])

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t, v_t) of clean latents [b, ...] at `timesteps` [b]: the network's input and target."""
        abar, scale = (
            torch.from_numpy(values).to(latents.device, latents.dtype)[timesteps].view(-1, *[1] * (latents.ndim - 1))
            for values in (self.alphas_cumprod, self.scale)
        )
        latents = scale * latents
        return abar.sqrt() * latents + (1 - abar).sqrt() * noise, abar.sqrt() * noise - (1 - abar).sqrt() * latents

    def steps(self, steps: int, eta: float = 1.0, clean_end: bool = False, solver: Solver = "ddim") -> Steps:
        """The table of a run.

        Args:
            steps: network calls.
            eta: 1 adds fresh noise at every step, 0 none; "dpm" adds none.
            clean_end: end at signal 1 and scale 1. Without it the run ends at abar[0] and at the scale of the last network call, as the published sampler does:
                the result keeps 2.9 % noise and is shrunk (0.986 at 50 steps, 0.85 at 5), and is fed back as memory, so few steps fade the picture.
        """
        count = len(self.alphas_cumprod)
        if not 1 <= steps <= count:
            raise ValueError(f"steps must be from 1 to {count}, not {steps}")
        if solver not in get_args(Solver):
            raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, not {solver!r}")
        if not 0 <= eta <= 1 or (eta and solver == "dpm"):
            raise ValueError(f"eta must lie between 0 and 1, and be 0 with the solver 'dpm', not {eta!r}")
        # evenly spaced and counted from the end, so that the first call is at pure noise
        timesteps = np.flip(np.round(np.arange(count, 0, -count / steps))).astype(np.int64) - 1
        # rounded to float32 where the sampler of the published weights rounds
        table, scale = self.alphas_cumprod.astype(np.float32).astype(np.float64), self.scale[timesteps].astype(np.float32).astype(np.float64)
        alphas = table[timesteps]
        first = (1.0, 1.0) if clean_end else (table[0], scale[0])
        alphas_prev, scale_prev = (np.concatenate([[start], values[:-1]]) for start, values in zip(first, (alphas, scale), strict=True))
        sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
        return Steps(timesteps, alphas, alphas_prev, scale, scale_prev, sigmas, solver)


@dataclass(frozen=True)
class Steps:
    """One row per network call, in ascending timestep order; sampling runs from the last row to the first."""

    timesteps: np.ndarray  # int64
    alphas: np.ndarray  # abar at the call ...
    alphas_prev: np.ndarray  # ... and where the step leads
    scale: np.ndarray
    scale_prev: np.ndarray
    sigmas: np.ndarray
    solver: Solver = "ddim"

    def __len__(self) -> int:
        return len(self.timesteps)


@torch.no_grad()
def sample(
    predict: Callable[[torch.Tensor, int], torch.Tensor],
    steps: Steps,
    noise: torch.Tensor,
    step_noise: torch.Tensor | None = None,
    watch: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Noise [b, 4, chunk, h, w] -> latents of the same shape.

    Args:
        predict: the latents and a timestep -> v; puts the memory frames in front of the latents and drops them from its answer.
        step_noise: [steps, b, 4, chunk, h, w] in the order of sampling; needed if eta > 0.
        watch: called after each step with the latents and the predicted clean latents.
    """
    if step_noise is None and steps.sigmas.any():
        raise ValueError("step_noise is needed with eta > 0: fresh noise for every step")
    if steps.solver == "dpm":
        return _sample_dpm(predict, steps, noise, watch)
    x = noise.float()
    for k, i in enumerate(reversed(range(len(steps)))):
        v = predict(x, int(steps.timesteps[i])).float()
        signal, sigma = steps.alphas[i], steps.sigmas[i]
        clean = signal**0.5 * x - (1 - signal) ** 0.5 * v
        direction = signal**0.5 * v + (1 - signal) ** 0.5 * x
        clean = clean * (steps.scale_prev[i] / steps.scale[i])
        # rounding makes this -6e-8 at the first step for some step counts when eta is 1, and its root NaN
        rest = max(1 - steps.alphas_prev[i] - sigma**2, 0.0) ** 0.5
        x = steps.alphas_prev[i] ** 0.5 * clean + rest * direction
        if sigma:
            x = x + sigma * step_noise[k]
        if watch:
            watch(x, clean)
    return x


def _sample_dpm(predict: Callable, steps: Steps, noise: torch.Tensor, watch: Callable | None) -> torch.Tensor:
    """DPM-Solver++(2M): each step extrapolates the predicted clean latents along the log signal-to-noise ratio from the last two predictions."""
    x, before, h_before = noise.float(), None, np.inf
    for i in reversed(range(len(steps))):
        v = predict(x, int(steps.timesteps[i])).float()
        abar, abar_next = steps.alphas[i], steps.alphas_prev[i]
        signal, sigma = abar**0.5 * steps.scale[i], (1 - abar) ** 0.5
        signal_next, sigma_next = abar_next**0.5 * steps.scale_prev[i], (1 - abar_next) ** 0.5
        clean = (abar**0.5 * x - (1 - abar) ** 0.5 * v) / steps.scale[i]
        with np.errstate(divide="ignore"):  # the ratio is 0 at the first call, and infinite at a clean end: both steps are of first order
            h = float(np.log(signal_next / sigma_next if sigma_next else np.inf) - np.log(signal / sigma))
        ahead = clean if before is None or not np.isfinite([h, h_before]).all() else clean + h / (2 * h_before) * (clean - before)
        x = sigma_next / sigma * x - signal_next * float(np.expm1(-h)) * ahead
        before, h_before = clean, h
        if watch:
            watch(x, clean)
    return x


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float, rescale: float = 0.7) -> torch.Tensor:
    """Classifier-free guidance on v, `rescale` of it brought back to the conditional prediction's standard deviation (over all but the batch)."""
    axes = tuple(range(1, conditional.ndim))
    v = unconditional + guidance * (conditional - unconditional)
    restored = v * (conditional.std(dim=axes, keepdim=True) / v.std(dim=axes, keepdim=True))
    return rescale * restored + (1 - rescale) * v
