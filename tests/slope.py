"""A small real policy for tests: a linear map from the state to a chunk."""

import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vlahub import hub
from vlahub.catalog import FamilyCard
from vlahub.hub import CheckpointError
from vlahub.interface import Camera, Field, Interface
from vlahub.policy import Evaluation, Policy, Sample
from vlahub_policies.parts import randomness

INTERFACE = Interface(
    main=Camera("top"),
    state=(Field("position", 2, "m", frame="world"),),
    action=(Field("step", 2, "1", reference="delta", frame="world", low=(-1, -np.inf), high=1),),
)


@dataclass(frozen=True)
class Norm:
    mean: tuple[float, ...] = (0.0, 0.0)
    name: str = "none"


@dataclass(frozen=True)
class SlopeConfig:
    horizon: int = 3
    execute: int = 2
    noise: float = 0.1
    sizes: tuple[int, ...] = (4,)
    norm: Norm = Norm()
    maybe: Norm | None = None
    interface: Interface = INTERFACE


class Slope(Policy):
    """A linear map from the state to a chunk, with Gaussian exploration: small, but every method of the contract is real."""

    family, Config = "slope", SlopeConfig

    def __init__(self, config):
        super().__init__()
        self.config, self.interface, self.horizon, self.execute = config, config.interface, config.horizon, config.execute
        self.head = nn.Linear(2, config.horizon * 2)

    def prepare(self, observation):
        return {"states": torch.as_tensor(np.asarray(observation["states"]), device=self.device)}

    def predict(self, inputs, seeds):
        return self.head(inputs["states"] + randomness.normal(seeds, (2,))).unflatten(-1, (self.horizon, 2))

    def _distribution(self, states):
        return torch.distributions.Normal(self.head(states).unflatten(-1, (self.horizon, 2)), self.config.noise)

    @torch.no_grad()
    def sample(self, observation, seeds=None):
        states = self.prepare(observation)["states"]
        distribution = self._distribution(states)
        seeds = randomness.fresh_seeds(len(states)) if seeds is None else seeds
        actions = distribution.mean + self.config.noise * randomness.normal(seeds, (self.horizon, 2), stream=1)
        return Sample(actions, distribution.log_prob(actions), None, {"states": states, "actions": actions})

    def evaluate(self, trace):
        distribution = self._distribution(trace["states"])
        return Evaluation(distribution.log_prob(trace["actions"]), distribution.entropy(), None)

    def sft_loss(self, batch, seeds=None):
        return (self.head(self.prepare(batch)["states"]).unflatten(-1, (self.horizon, 2)) - batch["actions"]).square().mean()

    def side_files(self):
        return {"words.txt": b"go to the target"}

    @classmethod
    def from_config(cls, config, folder=None):
        if folder is not None and not (folder / "words.txt").exists():
            raise CheckpointError(f"{folder} has no words.txt")
        return cls(config)

    @classmethod
    def from_published(cls, folder, *, device, dtype, **options):
        config = json.loads((folder / "slope.json").read_text())
        policy = cls(SlopeConfig(**{**config, **options}))
        hub.load_tensors(policy, hub.read_pt(folder / "slope.pt"), device=device)
        return policy


SLOPE = FamilyCard(
    name="slope",
    policy="tests.slope:Slope",
    summary="A linear map from the state to a chunk.",
    recognises=lambda folder: (folder / "slope.json").exists(),
    needs=("torch",),
)
