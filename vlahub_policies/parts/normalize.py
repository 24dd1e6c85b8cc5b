"""Statistics of states and actions, and the two normalisations that published policies use: mean / standard deviation, and quantiles 1 % .. 99 %."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlahub.hub import CheckpointError, read_json

EPSILON = 1e-6  # openpi's, Dexbotic's and RLinf's: added to the scale, in both directions
STILL = 1e-4  # a dimension of a dataset that moves less than this does not move


@dataclass(frozen=True)
class Moments:
    """Statistics of one vector, a number per dimension. A policy needs either mean and std, or q01 and q99."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    q01: tuple[float, ...] | None = None
    q99: tuple[float, ...] | None = None

    def __post_init__(self):
        sizes = {name: len(value) for name, value in vars(self).items() if value is not None}
        if len(set(sizes.values())) > 1:
            raise CheckpointError(f"statistics of different widths: {sizes}")
        for name, value in vars(self).items():
            if value is not None and not np.isfinite(value).all():
                raise CheckpointError(f"statistics {name!r} holds numbers that are not finite")

    def scale(self, quantile: bool, width: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """(shift, scale), so that normalised = (x - shift) / scale; widened to `width` with dimensions that pass through, or cut to it."""
        low, high = (self.q01, self.q99) if quantile else (self.mean, self.std)
        if low is None or high is None:
            kind = "q01 and q99 (quantile normalisation)" if quantile else "mean and std"
            raise CheckpointError(f"the statistics hold no {kind}; this policy needs them")
        low, high = (np.asarray(value[:width], np.float64) for value in (low, high))
        # (x - q01) / (q99 - q01) * 2 - 1 = (x - (q01 + half)) / half
        shift, scale = ((low + (high - low + EPSILON) / 2), (high - low + EPSILON) / 2) if quantile else (low, high + EPSILON)
        more = width - len(shift)
        shift, scale = np.concatenate([shift, np.zeros(more)]), np.concatenate([scale, np.ones(more)])
        return torch.as_tensor(shift, device=device), torch.as_tensor(scale, device=device)


@dataclass(frozen=True)
class Statistics:
    """What a policy was trained with."""

    state: Moments
    actions: Moments

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Statistics:
        return cls(*(Moments(**{name: tuple(value) for name, value in record[key].items() if value is not None}) for key in ("state", "actions")))

    @classmethod
    def read(cls, file: Path) -> Statistics:
        """`norm_stats.json` of openpi, RLinf or Dexbotic: {"norm_stats": {"state": ..., "actions" or "action": ...}}, wrapper optional."""
        record = read_json(file)
        record = record.get("norm_stats", record)
        parts = []
        for names in (("state",), ("actions", "action")):
            found = next((record[name] for name in names if name in record), None)
            if not isinstance(found, Mapping):
                raise CheckpointError(f"{file} has no statistics of {names[0]!r}; it has {', '.join(map(repr, record)) or 'nothing'}")
            # Dexbotic keeps its 1 % and 99 % quantiles under the names min and max
            entries = {"mean": found.get("mean"), "std": found.get("std"), "q01": found.get("q01", found.get("min")), "q99": found.get("q99", found.get("max"))}
            parts.append(Moments(**{name: tuple(np.atleast_1d(value).tolist()) for name, value in entries.items() if value is not None}))
        return cls(*parts)

    def write(self, file: Path) -> None:
        """As openpi's norm_stats.json."""
        entries = {key: {name: value and list(value) for name, value in vars(part).items()} for key, part in (("state", self.state), ("actions", self.actions))}
        file.write_text(json.dumps({"norm_stats": entries}, indent=2) + "\n")

    @classmethod
    def of_dataset(cls, statistics: Mapping[str, Mapping[str, Sequence[float]]]) -> Statistics:
        """Of `vlahub.dataset.Dataset.statistics`: {"states": ..., "actions": ...}. A dimension that never changes there is left at its scale, not blown up."""
        parts = []
        for key in ("states", "actions"):
            mean, std, low, high = (np.asarray(statistics[key][name], np.float64) for name in ("mean", "std", "q01", "q99"))
            still = high - low < STILL
            low, high = np.where(still, (low + high) / 2 - 1, low), np.where(still, (low + high) / 2 + 1, high)
            parts.append(Moments(*(tuple(numbers.tolist()) for numbers in (mean, np.where(std < STILL, 1.0, std), low, high))))
        return cls(*parts)

    @classmethod
    def identity(cls, state_dim: int, action_dim: int) -> Statistics:
        """Statistics that leave everything as it is (up to a factor of 1 + 1e-6)."""
        parts = [Moments((0.0,) * size, (1.0,) * size, (-1.0,) * size, (1.0,) * size) for size in (state_dim, action_dim)]
        return cls(*parts)


def normalize(x: torch.Tensor, moments: Moments, quantile: bool) -> torch.Tensor:
    """[..., D] -> [..., D], computed in float64 (statistics of near-constant dimensions divide by 1e-6)."""
    shift, scale = moments.scale(quantile, x.shape[-1], x.device)
    return (x.double() - shift) / scale


def unnormalize(x: torch.Tensor, moments: Moments, quantile: bool) -> torch.Tensor:
    """The inverse. Dimensions beyond the statistics pass through."""
    shift, scale = moments.scale(quantile, x.shape[-1], x.device)
    return x.double() * scale + shift


class RunningStatistics:
    """Mean, standard deviation and quantiles of vectors that arrive in batches, as openpi computes them.

    Quantiles come from a histogram per dimension. When a new extreme arrives the histogram is re-binned by its bins' lower edges, so the result depends slightly
    on how the data were batched.
    """

    def __init__(self, bins: int = 5000):
        self.bins, self.count = bins, 0

    def update(self, batch: np.ndarray) -> None:
        """batch: [..., D]"""
        batch = np.asarray(batch, np.float64).reshape(-1, batch.shape[-1])
        low, high = batch.min(0), batch.max(0)
        if self.count == 0:
            self.low, self.high = low, high
            self.mean, self.mean_square = np.zeros_like(low), np.zeros_like(low)
            margin = 1e-10  # a constant dimension still gets bins of some width
            self.edges = [np.linspace(a - margin, b + margin, self.bins + 1) for a, b in zip(low, high, strict=True)]
            self.histograms = [np.zeros(self.bins) for _ in low]
        elif len(low) != len(self.low):
            raise ValueError(f"vectors of {len(low)} numbers after vectors of {len(self.low)}")
        elif (low < self.low).any() or (high > self.high).any():
            self.low, self.high = np.minimum(low, self.low), np.maximum(high, self.high)
            for i, (a, b) in enumerate(zip(self.low, self.high, strict=True)):
                edges = np.linspace(a, b, self.bins + 1)
                self.histograms[i] = np.histogram(self.edges[i][:-1], bins=edges, weights=self.histograms[i])[0]
                self.edges[i] = edges
        self.count += len(batch)
        share = len(batch) / self.count
        self.mean += (batch.mean(0) - self.mean) * share
        self.mean_square += ((batch**2).mean(0) - self.mean_square) * share
        for i, column in enumerate(batch.T):
            self.histograms[i] += np.histogram(column, bins=self.edges[i])[0]

    def moments(self) -> Moments:
        if self.count < 2:
            raise ValueError(f"statistics of {self.count} vectors mean nothing; give at least 2")
        std = np.sqrt(np.maximum(0, self.mean_square - self.mean**2))
        quantiles = [self._quantile(share) for share in (0.01, 0.99)]
        return Moments(*(tuple(np.asarray(value).tolist()) for value in (self.mean, std, *quantiles)))

    def _quantile(self, share: float) -> list[float]:
        return [edges[np.searchsorted(np.cumsum(histogram), share * self.count)] for histogram, edges in zip(self.histograms, self.edges, strict=True)]


def statistics_of(states: Sequence[np.ndarray] | np.ndarray, actions: Sequence[np.ndarray] | np.ndarray) -> Statistics:
    """Statistics of a dataset: arrays [..., D], or sequences of them (one per episode, say)."""
    parts = []
    for batches in (states, actions):
        running = RunningStatistics()
        for batch in [batches] if isinstance(batches, np.ndarray) else batches:
            running.update(np.asarray(batch))
        parts.append(running.moments())
    return Statistics(*parts)
