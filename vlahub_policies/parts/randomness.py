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
    # Philox is counter-based: its 128-bit key takes the pair of seeds as it is, and its counter starts each stream far from the others. One generator
    # that is put into each row's state draws what a generator of its own would, in a fifth of the time.
    bits = np.random.Philox(counter=[0, 0, stream, 0], key=0)
    state, rng, rows = bits.state, np.random.Generator(bits), []
    for row in seeds.cpu().numpy().astype(np.uint64):
        state["state"]["key"] = row
        bits.state = state
        rows.append(draw(rng))
    return torch.from_numpy(np.array(rows)).to(device)
