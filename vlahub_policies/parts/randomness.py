"""Randomness that belongs to a row of the batch, not to the batch.

Exploration noise, denoising noise and sampled tokens are functions of a row's seeds (episode seed, control step), so a rollout does not depend on how
environments are spread over batches, slots, processes or ranks. Drawn on the CPU: a few thousand numbers per row, the same on every device.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

Seeds = torch.Tensor  # [B, 2] int64: episode seed, control step


def fresh_seeds(batch: int) -> Seeds:
    """Seeds drawn from torch's global generator, for callers that bring none."""
    return torch.randint(2**62, (batch, 2))


def normal(seeds: Seeds, shape: Sequence[int], stream: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard normal float32 [B, *shape]. Different streams of the same seeds are independent."""
    return _draw(seeds, stream, device, lambda rng: rng.standard_normal(tuple(shape), dtype=np.float32))


def uniform(seeds: Seeds, shape: Sequence[int], stream: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform float32 in [0, 1), [B, *shape]."""
    return _draw(seeds, stream, device, lambda rng: rng.random(tuple(shape), dtype=np.float32))


def integers(seeds: Seeds, high: int, stream: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    """One int64 in [0, high) per row, [B]."""
    return _draw(seeds, stream, device, lambda rng: rng.integers(high))


def _draw(seeds: Seeds, stream: int, device: torch.device | str, draw: Callable[[np.random.Generator], object]) -> torch.Tensor:
    # Philox is counter-based: its 128-bit key takes the pair of seeds as it is, and its counter starts each stream far from the others.
    rows = [draw(np.random.Generator(np.random.Philox(key=row, counter=[0, 0, stream, 0]))) for row in seeds.cpu().numpy().astype(np.uint64)]
    return torch.from_numpy(np.stack(rows)).to(device)
