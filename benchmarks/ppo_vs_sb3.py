"""baselines/ppo.py against stable-baselines3's PPO on the same problem, in one run: final return and samples per second.

    python -m benchmarks.ppo_vs_sb3 --seeds 5 --steps 40960

The problem is Gymnasium's Pendulum-v1 with the same small Gaussian policy (two layers of 64, separate critic), the same hyperparameters and the same evaluation
episodes; docs/results.md says what still differs. Ours runs through the whole contract: a Simulation that also shows a picture. stable-baselines3 runs on Gymnasium's own environment,
in its own process, which is the fastest that it offers for one so cheap. The two alternate seed by seed, so that both meet the same load of the machine.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vlahub
from baselines import ppo
from tests.mlp import GaussianMlp, MlpConfig
from vlahub.evaluation import episodes_of
from vlahub.interface import Camera, Field, Interface
from vlahub.rollout import Collector
from vlahub.run import EVAL_SEED
from vlahub.simulation import Outcomes, check_options

GAMMA, GAE_LAMBDA, RATE, EPOCHS, CLIP, ENVS, STEPS_PER_ENV, BATCH = 0.9, 0.95, 1e-3, 10, 0.2, 4, 512, 64  # close to rl-zoo's for this task
EVAL_EPISODES = 20


class Pendulum:
    """Pendulum-v1 as a Simulation. Its action of -1 to 1 is the torque of -2 to 2."""

    max_steps, tasks, trials, assets = 200, 1, None, "none"
    interface = Interface(
        main=Camera("blank", 1, 1),
        state=(Field("pendulum", 3, "1"),),
        action=(Field("torque", 1, "1", reference="delta", low=-1, high=1),),
        control_hz=20,
    )

    def __init__(self) -> None:
        self.env = gymnasium.make("Pendulum-v1").unwrapped
        self.state = np.zeros(3, np.float32)

    def reset(self, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        check_options(options, {"task": "0, the only one"})
        self.state, _ = self.env.reset(seed=seed)
        return {"task": 0, "trial": 0}

    def apply(self, actions: np.ndarray, watch: Callable[[], None] | None = None) -> Outcomes:
        rewards = []
        for action in actions:
            self.state, reward, *_ = self.env.step(2 * action)
            rewards.append(reward)
            if watch:
                watch()
        return Outcomes(np.array(rewards, np.float32), np.zeros(len(actions), bool))

    def observe(self) -> dict[str, Any]:
        return {"main_images": np.zeros((1, 1, 3), np.uint8), "states": self.state.astype(np.float32), "task_descriptions": "swing up"}

    def render(self) -> np.ndarray:
        return np.zeros((64, 64, 3), np.uint8)

    def close(self) -> None:
        self.env.close()


class PendulumPolicy(GaussianMlp):
    """As stable-baselines3 begins: orthogonal weights, a small last layer, a standard deviation of 1."""

    def __init__(self, config: MlpConfig):
        super().__init__(config)
        for network, last in ((self.actor, 0.01), (self.value_head, 1.0)):
            for i, layer in enumerate(layers := [part for part in network if isinstance(part, torch.nn.Linear)]):
                if not layer.weight.is_meta:
                    torch.nn.init.orthogonal_(layer.weight, last if i == len(layers) - 1 else 2**0.5)
                    torch.nn.init.zeros_(layer.bias)

    @classmethod
    def tiny(cls, interface: Interface, **overrides: Any) -> "PendulumPolicy":
        return super().tiny(interface, **{"horizon": 1, "log_std": 0.0, **overrides})


@dataclass
class Clock:
    """Seconds spent in rollouts and updates: on the wall, and of this process's own computing, which other programs on the machine disturb less."""

    wall: float = 0.0
    cpu: float = 0.0

    def __call__(self, function: Callable) -> Callable:
        def timed(*given: Any, **named: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            result = function(*given, **named)
            self.wall, self.cpu = self.wall + time.perf_counter() - wall, self.cpu + time.process_time() - cpu
            return result

        return timed


@dataclass
class Result:
    final_return: float
    samples_per_second: float
    samples_per_cpu_second: float  # without what worker processes compute


def ours(seed: int, steps: int, out: Path) -> Result:
    iterations = steps // (ENVS * STEPS_PER_ENV)
    args = ppo.Args(
        env_id="bench/Pendulum", policy="tiny:bench-mlp", out=str(out), name=f"ours-{seed}", seed=seed, device="cpu", num_envs=ENVS,
        num_chunks=STEPS_PER_ENV, total_iterations=iterations, update_epochs=EPOCHS, num_minibatches=ENVS * STEPS_PER_ENV // BATCH, learning_rate=RATE, target_kl=0.0,
        value_learning_rate=RATE, gamma=GAMMA, gae_lambda=GAE_LAMBDA, clip_low=CLIP, clip_high=CLIP, value_clip=0.0, huber_delta=1e9, value_coef=1.0,
        max_grad_norm=0.5, eval_every=iterations, eval_episodes=EVAL_EPISODES, save_every=0,
    )  # fmt: skip
    clock = Clock()
    with mock.patch.object(Collector, "steady", clock(Collector.steady)), mock.patch.object(ppo, "update", clock(ppo.update)):
        ppo.main(args)
    results = json.loads((out / args.name / "eval" / f"{iterations:06d}" / "results.json").read_text())
    samples = iterations * ENVS * STEPS_PER_ENV
    return Result(results["mean_return"], samples / clock.wall, samples / clock.cpu)


def theirs(seed: int, steps: int) -> Result:
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    steps = steps // (ENVS * STEPS_PER_ENV) * ENVS * STEPS_PER_ENV
    # vf_coef 0.5 because its value loss is the squared error, twice the Huber loss near zero
    model = PPO(
        "MlpPolicy", make_vec_env("Pendulum-v1", ENVS, seed=seed), seed=seed, device="cpu", n_steps=STEPS_PER_ENV, batch_size=BATCH, n_epochs=EPOCHS, gamma=GAMMA,
        gae_lambda=GAE_LAMBDA, learning_rate=RATE, clip_range=CLIP, vf_coef=0.5, max_grad_norm=0.5, ent_coef=0.0,
    )  # fmt: skip
    clock = Clock()
    model.collect_rollouts, model.train = clock(model.collect_rollouts), clock(model.train)
    model.learn(steps)
    env, returns = gymnasium.make("Pendulum-v1"), []
    for episode in episodes_of(EVAL_EPISODES, EVAL_SEED, 1, None):
        state, _ = env.reset(seed=episode.seed)
        total, over = 0.0, False
        while not over:
            action, _ = model.predict(state, deterministic=True)
            state, reward, terminated, truncated, _ = env.step(action)
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return Result(statistics.fmean(returns), steps / clock.wall, steps / clock.cpu)


def main(seeds: int = 5, steps: int = 40960, cheap: bool = True) -> None:
    """Compare both and print a table.

    Args:
        seeds: runs of each.
        steps: environment steps of a run.
        cheap: step our simulations in the calling process, as stable-baselines3 does; otherwise in worker processes.
    """
    torch.set_num_threads(1)
    # here, because this file is loaded twice: as the script, and as the module that holds these two classes
    vlahub.register_env(vlahub.EnvCard("bench/Pendulum", "bench", "benchmarks.ppo_vs_sb3:Pendulum", "Pendulum-v1 in this contract.", cheap=cheap))
    vlahub.register_family(vlahub.FamilyCard("bench-mlp", "benchmarks.ppo_vs_sb3:PendulumPolicy", "A small Gaussian policy.", recognises=lambda folder: False))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            rows.append((ours(seed, steps, Path(folder)), theirs(seed, steps)))
            a, b = rows[-1]
            print(f"seed {seed}: return {a.final_return:.0f} (ours) {b.final_return:.0f} (sb3); samples/s {a.samples_per_second:.0f} (ours) {b.samples_per_second:.0f} (sb3)", flush=True)  # fmt: skip
    print("\n| | return: mean (each seed) | samples/s: median |\n|---|---|---|")
    for name, side in (("baselines/ppo.py", 0), ("stable-baselines3", 1)):
        returns = [row[side].final_return for row in rows]
        speed = statistics.median(row[side].samples_per_second for row in rows)
        print(f"| {name} | {statistics.fmean(returns):.0f} ({', '.join(f'{value:.0f}' for value in returns)}) | {speed:.0f} |")
    for what in ("samples_per_second", "samples_per_cpu_second")[: 1 + cheap]:
        ratios = sorted(getattr(a, what) / getattr(b, what) for a, b in rows)
        print(f"{what.replace('_', ' ')}, ours / sb3, seed by seed: median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")


if __name__ == "__main__":
    tyro.cli(main)
