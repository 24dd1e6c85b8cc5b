"""A small policy for tests and for comparisons with other libraries: an MLP on the state, with each kind of head that the families have."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import nn

from vlahub.interface import Camera, Interface
from vlahub.observation import Observation, to_torch
from vlahub.policy import Evaluation, Policy, Sample, Trace
from vlahub_policies.parts import flow
from vlahub_policies.parts.randomness import fresh_seeds, normal, uniform

BINS = 9


@dataclass(frozen=True)
class MlpConfig:
    interface: Interface
    head: Literal["gaussian", "categorical", "flow"] = "gaussian"
    horizon: int = 2
    width: int = 64
    log_std: float = -0.7
    values: int = 1  # per decision: 1, or horizon for one per action


class MlpPolicy(Policy):
    Config, head = MlpConfig, "gaussian"

    @property
    def family(self) -> str:
        return f"test-mlp-{self.config.head}"

    def __init__(self, config: MlpConfig):
        super().__init__()
        self.config, self.interface, self.horizon, self.execute = config, config.interface, config.horizon, config.horizon
        T, D, S, W = config.horizon, config.interface.action_dim, config.interface.state_dim, config.width
        outputs = {"gaussian": T * D, "categorical": T * D * BINS, "flow": W}[config.head]
        self.actor = nn.Sequential(nn.Linear(S, W), nn.Tanh(), nn.Linear(W, W), nn.Tanh(), nn.Linear(W, outputs))
        self.value_head = nn.Sequential(nn.Linear(S, W), nn.Tanh(), nn.Linear(W, W), nn.Tanh(), nn.Linear(W, config.values))
        if config.head == "gaussian":
            self.log_std = nn.Parameter(torch.full((D,), config.log_std))
        if config.head == "flow":
            self.velocity = nn.Sequential(nn.Linear(W + T * D + 16, W), nn.SiLU(), nn.Linear(W, W), nn.SiLU(), nn.Linear(W, T * D))
            self.explore = flow.Exploration("flow_sde", steps=2, noise_level=1.0)

    @classmethod
    def tiny(cls, interface: Interface, **overrides: Any) -> Self:
        overrides.pop("value_head", None)  # it always has one
        return cls(MlpConfig(_wants(interface), **{"head": cls.head, **overrides}))

    def blocks(self) -> list[nn.Module]:
        return [self.actor]

    @classmethod
    def from_config(cls, config: MlpConfig, folder: Path | None = None) -> Self:
        return cls(config)

    @classmethod
    def from_published(cls, folder: Path, **_: Any) -> Self:
        raise NotImplementedError("this family has no published layout")

    def set_statistics(self, statistics: Mapping[str, Mapping[str, Any]]) -> None:
        """Its worlds have states and actions within -1 and 1 as they are."""

    def prepare(self, observation: Observation) -> Trace:
        return {"states": to_torch({"states": observation["states"], "task_descriptions": []}, self.device)["states"].float()}

    def _grid(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.view(len(flat), self.horizon, -1)

    def _bins(self, inputs: Trace) -> torch.Tensor:
        """Log-probabilities [B, T, D, BINS]."""
        return self.actor(inputs["states"]).view(-1, self.horizon, self.interface.action_dim, BINS).log_softmax(-1)

    def _denoiser(self, inputs: Trace) -> flow.Denoise:
        features = self.actor(inputs["states"])

        def denoise(x: torch.Tensor, t: torch.Tensor) -> flow.Denoised:
            return flow.Denoised(self._grid(self.velocity(torch.cat([features, x.flatten(1), flow.time_embedding(t, 16, 0.1)], -1))))

        return denoise

    def predict(self, inputs: Trace, seeds: torch.Tensor) -> torch.Tensor:
        if self.config.head == "gaussian":
            return self._grid(self.actor(inputs["states"]))
        if self.config.head == "categorical":
            return self._bins(inputs).argmax(-1) / (BINS - 1) * 2 - 1
        start = normal(seeds, (self.horizon, self.interface.action_dim), flow.INITIAL, self.device)
        return flow.walk(self._denoiser(inputs), start, flow.euler(4), None).chain[:, -1]

    @torch.no_grad()
    def sample(self, observation: Observation, seeds: torch.Tensor | None = None) -> Sample:
        inputs = self.prepare(observation)
        seeds = fresh_seeds(len(inputs["states"])) if seeds is None else seeds
        shape, value = (self.horizon, self.interface.action_dim), self.value_head(inputs["states"])
        if self.config.head == "gaussian":
            mean = self._grid(self.actor(inputs["states"]))
            taken = mean + self.log_std.exp() * normal(seeds, shape, device=self.device)
            return Sample(taken, flow.normal_log_prob(taken, mean, self.log_std.exp().expand_as(mean)), value, {**inputs, "taken": taken})
        if self.config.head == "categorical":
            log_probs = self._bins(inputs)
            gumbel = -torch.log(-torch.log(uniform(seeds, (*shape, BINS), device=self.device).clamp(1e-9, 1 - 1e-7)))
            taken = (log_probs + gumbel).argmax(-1)
            return Sample(taken / (BINS - 1) * 2 - 1, log_probs.gather(-1, taken[..., None])[..., 0], value, {**inputs, "taken": taken})
        actions, log_prob, _, trace = flow.explore(partial(flow.walk, self._denoiser(inputs)), shape, seeds, self.explore, self.device)
        return Sample(actions, log_prob, value, {**inputs, **trace})

    def value(self, observation: Observation, seeds: torch.Tensor | None = None) -> torch.Tensor:
        with torch.no_grad():
            return self.value_head(self.prepare(observation)["states"])

    def evaluate(self, trace: Trace) -> Evaluation:
        value = self.value_head(trace["states"])
        if self.config.head == "gaussian":
            mean = self._grid(self.actor(trace["states"]))
            std = self.log_std.exp().expand_as(mean)
            return Evaluation(flow.normal_log_prob(trace["taken"], mean, std), flow.normal_entropy(std), value)
        if self.config.head == "categorical":
            log_probs = self._bins(trace)
            return Evaluation(log_probs.gather(-1, trace["taken"][..., None])[..., 0], -(log_probs.exp() * log_probs).sum(-1), value)
        log_prob, entropy, _ = flow.score(self._denoiser(trace), trace, self.explore)
        return Evaluation(log_prob, entropy, value)

    def sft_loss(self, batch: Mapping[str, Any], seeds: torch.Tensor | None = None) -> torch.Tensor:
        inputs, actions = self.prepare(batch), torch.as_tensor(np.asarray(batch["actions"]), device=self.device)
        if self.config.head == "gaussian":
            return (self._grid(self.actor(inputs["states"])) - actions).pow(2).mean()
        if self.config.head == "categorical":
            wanted = ((actions + 1) / 2 * (BINS - 1)).round().long().clamp(0, BINS - 1)
            return -self._bins(inputs).gather(-1, wanted[..., None]).mean()
        seeds = fresh_seeds(len(actions)) if seeds is None else seeds
        time = flow.sample_time(seeds, self.device)
        x, velocity = flow.interpolate(actions, normal(seeds, actions.shape[1:], flow.TRAINING_NOISE, self.device), time)
        return (self._denoiser(inputs)(x, time).velocity - velocity).pow(2).mean()


class GaussianMlp(MlpPolicy):
    pass


class CategoricalMlp(MlpPolicy):
    head = "categorical"


class FlowMlp(MlpPolicy):
    head = "flow"


def _wants(interface: Interface) -> Interface:
    """What the policy expects of an environment with this interface: its state and action, any main camera."""
    return Interface(main=Camera(interface.main.name, turned=interface.main.turned), state=interface.state, action=interface.action)
