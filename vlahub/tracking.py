"""Metrics: their names, what each means, and where they are written.

    tracker = Tracker("runs/ppo-click-bell", settings=vars(args), wandb=args.wandb, rank=rank)
    tracker.log(step, {"env/success_rate": 0.8, "train/actor/approx_kl": 0.01})
    tracker.close()

Every name has one meaning, written down in `METRICS`; a name that stands in no row is an error, so two baselines cannot call one thing by two names.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlahub import catalog

# Name -> meaning. A trailing * stands for any further words. Means are taken over all ranks before they are logged.
METRICS = {
    "env/success_once": "share of the iteration's trajectories that were solved at least once",
    "env/success_rate": "share of finished episodes that were solved",
    "env/episode_len": "mean number of control steps of finished episodes",
    "env/return": "mean undiscounted sum of rewards of finished episodes",
    "env/step_reward": "mean reward per control step",
    "env/termination_rate": "share of finished episodes that terminated; the others hit the time limit",
    "env/aborted": "episodes lost to a crashed or hung simulation; counted in no other metric",
    "eval/*": "the metric of the same name under env/, over a deterministic evaluation with exact episodes",
    "rollout/reward_mean": "mean over chunks of the reward that the update uses",
    "rollout/reward_std": "its standard deviation",
    "rollout/episode_length": "mean length of the trajectories in the batch, in control steps",
    "rollout/success_rate": "share of the batch's trajectories that were solved",
    "rollout/advantages_*": "mean, std, min or max of the advantages over the whole batch, all ranks together",
    "rollout/returns_*": "mean, std, min or max of the value targets over the whole batch, all ranks together",
    "rollout/groups_kept": "share of GRPO's groups that the update uses; the others were filtered by their score, or lost",
    "train/actor/policy_loss": "clipped surrogate loss",
    "train/actor/approx_kl": "(ratio - 1) - log ratio, mean: how far the policy moved from the one that sampled",
    "train/actor/reference_kl": "KL divergence from the frozen policy that the run started from (k3 estimate), where it is part of the loss",
    "train/actor/clip_fraction": "share of ratios outside the clip range",
    "train/actor/entropy": "mean entropy of the action distribution",
    "train/actor/grad_norm": "norm of the gradient before clipping",
    "train/actor/lr": "learning rate",
    "train/actor/ratio": "mean importance ratio; 1 at the first update of an iteration",
    "train/critic/value_loss": "loss of the value head",
    "train/critic/explained_variance": "1 - Var(target - value) / Var(target) over the whole batch",
    "actor/loss": "loss of one optimiser step",
    "actor/value_loss": "value loss of one optimiser step",
    "actor/entropy": "entropy of one optimiser step",
    "actor/grad_norm": "norm of the gradient of one optimiser step, before clipping",
    "actor/lr": "learning rate of one optimiser step",
    "actor/total_loss": "sum of all weighted losses of one optimiser step",
    "train/ppo_loss": "the reinforcement-learning loss in co-training",
    "train/sft_loss": "the supervised loss in co-training",
    "train/loss_ratio": "beta * |sft_loss| / |ppo_loss|; above 1e5 one of the two does nothing",
    "train/skipped_steps": "optimiser steps left out since the process began, because the loss or a gradient was not finite; absent while there are none",
    "world/*": "a world model's training loss (autoencoder, converter, video, classifier), or a figure of its held-out report",
    "time/*": "seconds of one iteration spent there; `sync` is averaging gradients, `weights` their way to rollout ranks",
    "charts/SPS": "control steps per second, from the start of the run, all ranks together",
}

LARGEST_LOSS_RATIO = 1e5  # beyond it float32 gradients of the smaller loss vanish beside the larger one's


class Tracker:
    """Writes metrics on rank 0 and does nothing on the others.

    TensorBoard files go to `folder` whenever tensorboard is installed, Weights & Biases is used on request, and every call prints one plain line.

    Args:
        folder: the run's folder; its name is the run's name on W&B.
        settings: the run's arguments, stored beside the curves.
        wandb: also log to Weights & Biases; needs `pip install wandb` and a login (or WANDB_MODE=offline).
        project: the W&B project.
        rank: of this process.
        console: print one line per `log`.
    """

    def __init__(
        self, folder: str | Path, settings: Mapping[str, Any] | None = None, wandb: bool = False, project: str = "vlahub", rank: int = 0, console: bool = True
    ):
        self.rank, self.console, self.started = rank, console, time.perf_counter()
        self._board = self._wandb = None
        if rank != 0:
            return
        folder, settings = Path(folder), {name: value for name, value in (settings or {}).items()}
        folder.mkdir(parents=True, exist_ok=True)
        if wandb:
            if importlib.util.find_spec("wandb") is None:
                raise ImportError("logging to Weights & Biases was asked for, but wandb is not installed: pip install wandb, or leave it off")
            import wandb as weights_and_biases

            self._wandb = weights_and_biases.init(project=project, name=folder.name, dir=str(folder), config=settings)
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder))
            self._board.add_text("settings", "```json\n" + json.dumps(settings, indent=2, default=str) + "\n```")
        elif console:
            print("tensorboard is not installed, so no curves are written: pip install 'vlahub[train]'")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write scalars at a step (control steps for RL, optimiser steps for SFT). Unknown names and values that are no number are errors.

        NaN and infinities are written as they are, and said on the line: a diverged run must be seen, not stopped by its logger."""
        scalars = {name: _scalar(name, value) for name, value in metrics.items()}
        if self.rank != 0:
            return
        for name, value in scalars.items():
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        if self._board is not None:
            self._board.flush()  # an iteration takes seconds or minutes, and a killed run keeps what it had
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)
        if self.console:
            print(line(step, scalars, time.perf_counter() - self.started), flush=True)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._board = self._wandb = None


def line(step: int, scalars: Mapping[str, float], seconds: float) -> str:
    """One plain line: `step 2048  0:01:12  env/success_rate 0.81  train/actor/approx_kl 0.011`, with warnings at its end."""
    words = [f"step {step}", f"{int(seconds // 3600)}:{int(seconds // 60) % 60:02d}:{int(seconds) % 60:02d}"]
    words += [f"{name} {value:.4g}" for name, value in scalars.items()]
    broken = [name for name, value in scalars.items() if not math.isfinite(value)]
    words += [f"WARNING: {', '.join(broken)} not finite"] if broken else []
    if scalars.get("train/loss_ratio", 0) > LARGEST_LOSS_RATIO:
        words.append(
            f"WARNING: train/loss_ratio above {LARGEST_LOSS_RATIO:g}, the reinforcement-learning loss has no weight beside the supervised one: lower --sft-loss-weight"
        )
    return "  ".join(words)


def table() -> str:
    """METRICS as a Markdown table: docs/metrics.md."""
    return "| name | meaning |\n|---|---|\n" + "".join(f"| `{name}` | {meaning.replace('|', chr(92) + '|')} |\n" for name, meaning in METRICS.items())


def check_name(name: str) -> None:
    base = name.replace("eval/", "env/", 1) if name.startswith("eval/") else name
    if not any(fnmatch.fnmatchcase(base, pattern) for pattern in METRICS):
        raise ValueError(f"no metric is called {name!r}; {catalog.suggest(name, METRICS)} (vlahub.tracking.METRICS lists all)")


def _scalar(name: str, value: Any) -> float:
    check_name(name)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {name!r} must be one number, not {value!r}") from error
