"""Evaluation: a policy on an exact set of episodes, with intervals, videos and a report.

    results = vlahub.evaluate("vlahub/RoboTwin-ClickBell", policy, episodes=100, num_envs=8, seed=0, out="runs/click-bell")
    print(results.success_rate, results.interval)

Which episodes run depends on the number of episodes and the seed only, never on how many environments run them: episode (task, trial) has its own seed,
and a policy is asked with (episode seed, control step), so the outcome of an episode does not depend on which others share its batch.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import vlahub
from vlahub import catalog, report, video
from vlahub.interface import Fit, check
from vlahub.observation import select
from vlahub.vector import WorkerError

EXPERT, RANDOM = "expert", "random"
# Runs more that an aborted episode gets before it is left out of the rate. A simulation that crashed by bad luck runs the second time; one that always
# crashes there would only use up the vector env's patience, which ends at three failures in a row.
EPISODES = 50  # unless one says how many
RETRIES = 1
RANDOM_EXECUTE = 10  # a random policy predicts as many actions as it is asked for; ten save nine looks of ten
Z95 = 1.959963984540054  # the 97.5 % quantile of the standard normal: a two-sided 95 % interval


class SettingsDiffer(ValueError):
    """The output folder holds an evaluation with other settings."""


# ------------------------------------------------------------------------------------------------ which episodes


@dataclass(frozen=True)
class Episode:
    """One episode to run."""

    index: int  # its number in the evaluation
    task: int
    trial: int
    seed: int


def episodes_of(count: int, seed: int, tasks: int, trials: int | None, purpose: tuple[int, ...] = (), first_trial: int = 0) -> list[Episode]:
    """The `count` episodes of an evaluation, task by task; with another `purpose` (a spawn key), episodes chosen alike with seeds of their own.

    Every task gets the same number of trials (the first `count % tasks` tasks one more), beginning with `first_trial`. The seed of a (task, trial) depends on
    nothing but `seed`: a longer evaluation contains the shorter one. They are ordered task by task because loading a task's scene takes most of a reset.
    """
    if trials is not None and count > tasks * (trials - first_trial):
        left = f", of which those before trial {first_trial} are left out" if first_trial else ""
        raise ValueError(
            f"{count} episodes asked for, but this environment has {tasks} tasks x {trials} trials = {tasks * trials} different ones{left}, and each runs once; "
            f"ask for at most {max(0, tasks * (trials - first_trial))}"
        )
    chosen = [(task, first_trial + trial) for task in range(tasks) for trial in range(count // tasks + (task < count % tasks))]
    return [Episode(index, task, trial, episode_seed(seed, task, trial, purpose)) for index, (task, trial) in enumerate(chosen)]


def episode_seed(seed: int, task: int, trial: int, purpose: tuple[int, ...] = ()) -> int:
    """31 bits, because that is the range of environment seeds."""
    return int(np.random.SeedSequence([seed, task, trial], spawn_key=purpose).generate_state(1)[0] >> 1)


# ------------------------------------------------------------------------------------------------ results


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate. Unlike the normal one it stays within 0 and 1 and is right for rates near them."""
    if count == 0:
        return 0.0, 1.0
    rate, spread = successes / count, Z95**2 / count
    centre = (rate + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(rate * (1 - rate) / count + spread / (4 * count))
    # the exact bounds at none and all solved are 0 and 1; rounding would miss them by 1e-17
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == count else centre + half


@dataclass
class Outcome:
    """One episode as it went: a line of episodes.jsonl."""

    index: int
    task: int
    trial: int
    seed: int
    instruction: str
    success: bool
    length: int  # control steps run
    total_reward: float
    clipped: int = 0  # numbers in its actions that lay out of bounds
    attempts: int = 1
    aborted: str = ""  # why the simulation was lost, if it was lost every time
    simulate_seconds: float = 0.0  # waited for the simulation since the line before, all episodes together
    infer_seconds: float = 0.0  # spent in the policy since the line before

    def to_dict(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        return {("return" if name == "total_reward" else name): value for name, value in record.items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Outcome:
        return cls(**{("total_reward" if name == "return" else name): value for name, value in record.items()})


@dataclass
class Summary:
    """What a set of episodes amounts to. Aborted episodes are in no figure but `aborted`."""

    episodes: list[Outcome]

    @property
    def _counted(self) -> list[Outcome]:
        return [outcome for outcome in self.episodes if not outcome.aborted]

    @property
    def counted(self) -> int:
        return len(self._counted)

    @property
    def aborted(self) -> int:
        return len(self.episodes) - self.counted

    @property
    def successes(self) -> int:
        return sum(outcome.success for outcome in self._counted)

    @property
    def success_rate(self) -> float | None:
        return self.successes / self.counted if self.counted else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the success rate."""
        return wilson(self.successes, self.counted)

    @property
    def mean_length(self) -> float | None:
        return sum(outcome.length for outcome in self._counted) / self.counted if self.counted else None

    @property
    def mean_return(self) -> float | None:
        return math.fsum(outcome.total_reward for outcome in self._counted) / self.counted if self.counted else None

    def figures(self) -> dict[str, Any]:
        names = ("success_rate", "interval", "successes", "counted", "aborted", "mean_length", "mean_return")
        return {name: getattr(self, name) for name in names}


@dataclass
class Results(Summary):
    """An evaluation: `success_rate`, `interval`, `successes`, `counted`, `aborted`, `mean_length`, `mean_return` of all episodes, and of each task."""

    settings: dict[str, Any]
    warnings: list[str]
    finished: bool = True
    command: str = ""
    videos: list[str] = dataclasses.field(default_factory=list)

    @property
    def tasks(self) -> dict[int, Summary]:
        numbers = sorted({outcome.task for outcome in self.episodes})
        return {number: Summary([outcome for outcome in self.episodes if outcome.task == number]) for number in numbers}

    def metrics(self) -> dict[str, float]:
        """For `Tracker.log`."""
        values = {"success_rate": self.success_rate, "episode_len": self.mean_length, "return": self.mean_return, "aborted": self.aborted}
        return {f"eval/{name}": float(value) for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """What results.json holds."""
        return {
            **self.figures(),
            "finished": self.finished,
            "warnings": self.warnings,
            "tasks": [{"task": task, "instruction": instruction_of(part.episodes), **part.figures()} for task, part in self.tasks.items()],
            "time": {name: sum(getattr(outcome, name) for outcome in self.episodes) for name in ("simulate_seconds", "infer_seconds")},
            "settings": self.settings,
            "command": self.command,
            "videos": self.videos,
            "versions": versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "episodes": [outcome.to_dict() for outcome in self.episodes],
        }

    def __str__(self) -> str:
        low, high = self.interval
        rate = (
            "no episode counted" if self.success_rate is None else f"{100 * self.success_rate:.1f} % solved (95 % interval {100 * low:.1f} to {100 * high:.1f})"
        )
        aborted = f", {self.aborted} aborted and not counted" if self.aborted else ""
        return f"{self.settings['policy']} on {self.settings['env']} (assets: {self.settings['assets']}): {rate}, {self.successes} of {self.counted} episodes{aborted}"


def instruction_of(outcomes: Sequence[Outcome]) -> str:
    """A task's instruction; its first one and the number of others where it is worded differently every time."""
    texts = list(dict.fromkeys(outcome.instruction for outcome in outcomes if outcome.instruction))
    return (texts[0] if texts else "") + (f" (and {len(texts) - 1} other wording{'s' if len(texts) > 2 else ''})" if len(texts) > 1 else "")


def versions() -> dict[str, str]:
    """Of what can change a number, as far as it is installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("vlahub", "gymnasium", "numpy", "torch", "transformers", "sapien", "mani_skill", "mujoco", "robosuite"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "vlahub": vlahub.__version__}


# ------------------------------------------------------------------------------------------------ policies of every kind


@dataclass
class Player:
    """Anything that can be evaluated, in one form."""

    name: str
    act: Callable[[Mapping[str, Any], Sequence[tuple[int, int]]], np.ndarray] | None  # (observation, seeds) -> [B, T, D]; None: the expert, in the workers
    execute: int | None  # actions run before it is asked again; None: as many as it gives
    policy: Any = None  # what `check` compares with the environment; None: no interface to compare
    weights: str = ""  # fingerprint


def player_of(policy: Any, action_space: Any, execute: int | None, name: str = "") -> Player:
    """`policy`: a vlahub.Policy, "expert", "random", or a function of a batched observation that returns actions [B, T, D]."""
    if execute is not None and execute < 1:
        raise ValueError(f"execute must be at least 1, not {execute}")
    if isinstance(policy, str):
        if policy == EXPERT:
            return Player(EXPERT, None, execute)
        if policy == RANDOM:
            count = execute or RANDOM_EXECUTE
            return Player(RANDOM, lambda observation, seeds: random_actions(action_space, seeds, count), count)
        raise TypeError(f"policy {policy!r} is a name; load it first: vlahub.Policy.from_pretrained({policy!r}). Only 'expert' and 'random' are taken by name")
    if hasattr(policy, "act") and hasattr(policy, "interface"):
        count = execute or policy.execute
        if count > policy.horizon:
            raise ValueError(f"execute={count}, but the policy predicts {policy.horizon} actions at a time; ask for 1 to {policy.horizon}")
        return Player(name or type(policy).__name__, lambda observation, seeds: policy.act(observation, seeds=seeds), count, policy, fingerprint(policy))
    if callable(policy):
        default = f"{getattr(policy, '__module__', '')}:{getattr(policy, '__qualname__', type(policy).__name__)}"
        return Player(name or default, lambda observation, seeds: policy(observation), execute)
    raise TypeError(f"a policy is a vlahub.Policy, 'expert', 'random' or a function of an observation, not {type(policy).__name__}")


def random_actions(space: Any, seeds: Sequence[tuple[int, int]], count: int) -> np.ndarray:
    """Uniform within the bounds (normal where there are none) -> [B, count, D]. A function of episode seed and control step: the same in any batch."""
    low, high = np.nan_to_num(space.low, neginf=0), np.nan_to_num(space.high, posinf=0)
    bounded = space.bounded_below & space.bounded_above

    def one(seed: int, step: int) -> np.ndarray:
        rng = np.random.default_rng([seed, step])
        uniform, normal = rng.uniform(low, np.maximum(low, high)), rng.standard_normal(space.shape)
        return np.where(bounded, uniform, np.clip(normal, space.low, space.high)).astype(np.float32)

    return np.stack([np.stack([one(seed, step + k) for k in range(count)]) for seed, step in seeds])


def fingerprint(policy: Any) -> str:
    """Twelve hex digits of a module's weights, from sixteen numbers of each tensor: cheap on billions of parameters, and any training moves them."""
    if not hasattr(policy, "named_parameters"):
        return ""
    digest = hashlib.sha256()
    # not state_dict(): it would take apart what `vlahub.distributed.whole` has put together
    for name, tensor in sorted([*policy.named_parameters(remove_duplicate=False), *policy.named_buffers(remove_duplicate=False)]):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 16)][:16].float().cpu().clone().numpy()  # a copy: numpy would hold on to memory that shards give back
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + some.tobytes())
    return digest.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------ the output folder


class Folder:
    """settings.json (what is evaluated), episodes.jsonl (one line per finished episode), actions/ (what was executed), videos/, results.json, report.html."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            for name in ("actions", "videos"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            self._lines = open(self.path / "episodes.jsonl", "a+b", buffering=0)
        except OSError as error:
            raise OSError(error.errno, f"cannot write to the output folder {self.path}: {error.strerror}; choose another with out=...") from error
        lock(self._lines, self.path, "evaluation")

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Write the settings, or compare them with those that are there."""
        agree(self.path / "settings.json", settings, "evaluation")

    def finished(self) -> list[Outcome]:
        """The episodes that earlier runs finished. A last line cut off by a kill is dropped from the file."""
        self._lines.seek(0)
        data = self._lines.read()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            self._lines.truncate(len(whole))
        try:
            return [Outcome.from_dict(json.loads(line)) for line in whole.splitlines()]
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{self.path / 'episodes.jsonl'} is damaged ({error}); delete the folder or choose another") from error

    def add(self, outcome: Outcome) -> None:
        """Append one line in one write, and see it on the disk."""
        line = json.dumps(outcome.to_dict()).encode() + b"\n"
        try:
            if self._lines.write(line) != len(line):  # a disk with room for half a line; `finished` drops the half
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._lines.fileno())
        except OSError as error:
            raise OSError(
                error.errno, f"episode {outcome.index} could not be written to {self.path}: {error.strerror}; run the same command again to go on"
            ) from error

    def keep_actions(self, outcome: Outcome, chunks: Sequence[np.ndarray]) -> None:
        """The chunks [n, D] that were executed: with the seed, all that it takes to show the episode again."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, actions=np.concatenate(chunks), sizes=[len(chunk) for chunk in chunks])
        video.save(self.actions_file(outcome), buffer.getvalue())

    def actions(self, outcome: Outcome) -> list[np.ndarray]:
        with np.load(self.actions_file(outcome)) as file:
            return np.split(file["actions"], np.cumsum(file["sizes"])[:-1])

    def actions_file(self, outcome: Outcome) -> Path:
        return self.path / "actions" / f"task{outcome.task:03d}_trial{outcome.trial:04d}.npz"

    def write(self, results: Results, clips: Sequence[report.Clip] = ()) -> None:
        record = results.to_dict()
        _write(self.path / "results.json", json.dumps(record, indent=2, default=str) + "\n")
        _write(self.path / "report.html", report.render(record, clips))

    def close(self) -> None:
        self._lines.close()


def lock(lines: Any, folder: Path, what: str) -> None:
    """Two evaluations (or recordings) in one folder would run the same episodes twice. The lock is on an open file and goes with it."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; there, one per folder is up to the user
        return
    try:
        fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lines.close()
        raise RuntimeError(f"another {what} is writing to {folder}; wait for it or choose another folder") from error


def agree(file: Path, settings: Mapping[str, Any], what: str) -> None:
    """Write the settings of an evaluation or recording, or compare them with those that are there."""
    text = json.dumps(settings, indent=2, default=str) + "\n"
    if not file.exists():
        _write(file, text)
        return
    there, here = json.loads(file.read_text()), json.loads(text)
    differing = [f"{name} is {there.get(name)!r} there, {here.get(name)!r} here" for name in {**there, **here} if there.get(name) != here.get(name)]
    if differing:
        raise SettingsDiffer(
            f"{file.parent} holds {'an' if what[0] in 'aeio' else 'a'} {what} with other settings: {'; '.join(differing)}. Use the same, or another folder"
        )


def _write(path: Path, text: str) -> None:
    video.save(path, text.encode())


# ------------------------------------------------------------------------------------------------ the run


def evaluate(
    env: Any,
    policy: Any,
    episodes: int | None = None,
    *,
    protocol: str = "",
    num_envs: int = 1,
    seed: int = 0,
    out: str | Path | None = None,
    execute: int | None = None,
    max_steps: int | None = None,
    timeout: float = 300.0,
    videos: int | Sequence[int] = 2,
    env_options: Mapping[str, Any] | None = None,
    policy_name: str = "",
    policy_options: Mapping[str, Any] | None = None,
    command: str = "",
    progress: bool = True,
) -> Results:
    """Run a policy on an exact set of episodes.

    An episode whose simulation crashes or hangs is run again; if it is lost once more it counts as aborted, neither solved nor unsolved.
    With `out`, finished episodes are kept as they come, and the same call continues an evaluation that was interrupted; more episodes extend it.

    Args:
        env: an id, an `EnvCard`, or a vector env that exists already (during training); its episodes are given up, and its `num_envs`, `max_steps` and options stay.
        policy: a `vlahub.Policy`, "expert", "random", or a function from a batched observation to actions [B, T, D].
        episodes: how many, 50 by default; every task gets the same number of trials.
        protocol: run as a published evaluator does, by its name: step limit, start, and all (task, trial) pairs unless `episodes` says less. For environments whose
            card has protocols.
        num_envs: environments that run at once, each in a process of its own. The results do not depend on it.
        seed: decides the seed of every (task, trial).
        out: folder for results.json, report.html, videos and what is needed to continue. Without it nothing is written.
        execute: actions of each chunk that run before the policy is asked again; by default `policy.execute`, and all of what a function returns.
        max_steps: control steps per episode; the environment's limit by default.
        timeout: seconds that a simulation may take to start, reset or run a chunk; after that it counts as hung and its episode as aborted.
        videos: record so many solved and so many unsolved episodes, or the episodes of these numbers.
        env_options: options of the simulation.
        policy_name: what results call the policy, for example its id.
        policy_options: what it was loaded with; only written down.
        command: what to type to repeat it; likewise.
        progress: show progress, as a bar on a terminal and as lines elsewhere.
    """
    if protocol:
        env_options = with_protocol(env, protocol, env_options or {})
    elif episodes is None:
        episodes = EPISODES
    for name, value, least in (("episodes", 1 if episodes is None else episodes, 1), ("num_envs", num_envs, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    folder = Folder(out) if out is not None else None
    venv = None
    training = [module for module in policy.modules() if module.training] if hasattr(policy, "modules") else []
    try:
        for module in training:  # dropout belongs to training
            module.training = False
        venv = _vector_env(env, min(num_envs, episodes or num_envs), max_steps, timeout, env_options or {}, policy)
        player = player_of(policy, venv.single_action_space, execute, policy_name)
        fit = check(venv, player.policy) if player.policy is not None else Fit()
        episodes = episodes or venv.tasks * venv.trials
        todo = episodes_of(episodes, int(seed), venv.tasks, venv.trials)
        chosen = None if isinstance(videos, (int, np.integer)) else [int(index) for index in videos]
        if chosen is not None and not all(0 <= index < episodes for index in chosen):
            raise ValueError(f"videos {chosen}: episodes are numbered 0 to {episodes - 1}")
        settings = {
            "env": venv.card.id,
            "env_options": dict(env_options or {}),
            "assets": venv.assets,
            "max_steps": venv.max_steps,
            "policy": player.name,
            "policy_options": dict(policy_options or {}),
            "weights": player.weights,
            "execute": player.execute,
            "adapters": str(fit),
            "seed": int(seed),
            "vlahub": vlahub.__version__,
        }
        outcomes: list[Outcome] = []
        if folder is not None:
            folder.agree(settings)
            outcomes = _already_done(folder, todo)
        command = (
            command
            or f"vlahub.evaluate({venv.card.id!r}, ..., episodes={episodes}, seed={seed}, execute={execute}, max_steps={max_steps}, env_options={env_options})"
        )
        results = Results(outcomes, {**settings, "episodes": episodes, "num_envs": venv.num_envs}, [], command=command)
        if folder is not None and videos and not video.available():
            videos, chosen = 0, None
            _warn(results, video.NO_VIDEOS, progress)
        _run(venv, player, fit, todo, results, folder, progress)
        if folder is not None:
            folder.write(results)  # the figures first: recording takes a while
            clips = _record(venv, _choose(results, videos, chosen), folder, results, progress)
            try:
                folder.write(results, clips)
            except OSError as error:
                _warn(results, f"the videos are not in the report, because it could not be written again: {error}", progress)
        return results
    finally:
        for module in training:
            module.training = True
        if venv is not None and venv is not env:
            venv.close()
        if folder is not None:
            folder.close()


def with_protocol(env: Any, protocol: str, env_options: Mapping[str, Any]) -> dict[str, Any]:
    """The environment's options with its protocol."""
    card = catalog.env_card(env) if isinstance(env, str) else env
    if not isinstance(card, catalog.EnvCard):
        raise ValueError(f"protocol={protocol!r} belongs to making an environment; this one exists already")
    if not card.protocols:
        raise ValueError(f"{card.id} has no protocols; leave out protocol={protocol!r} and say how many episodes to run")
    if protocol not in card.protocols:
        raise ValueError(f"{card.id} has no protocol {protocol!r}; {catalog.suggest(protocol, card.protocols)}")
    if env_options.get("protocol", protocol) != protocol:
        raise ValueError(f"protocol={protocol!r}, but the environment's options say {env_options['protocol']!r}")
    return {**env_options, "protocol": protocol}


def _vector_env(env: Any, num_envs: int, max_steps: int | None, timeout: float, env_options: Mapping[str, Any], policy: Any) -> Any:
    """The vector env: the one given, or one made of an id or a card."""
    if hasattr(env, "recv") and hasattr(env, "num_envs"):
        if env_options or max_steps is not None:
            raise ValueError("env_options and max_steps belong to making an environment; this one exists already")
        if env.autoreset_mode.name != "DISABLED":
            raise ValueError(f"evaluation starts every episode itself; make the vector env with autoreset_mode='Disabled', not {env.autoreset_mode.value!r}")
        return env
    card = catalog.env_card(env) if isinstance(env, str) else env
    if not isinstance(card, catalog.EnvCard):
        raise TypeError(f"env must be an id, an EnvCard or a vlahub vector env, not {type(env).__name__}")
    if policy == EXPERT and not card.expert:
        raise ValueError(f"{card.id} has no scripted expert")
    made: dict[str, Any] = {"num_envs": num_envs, "max_steps": max_steps, "render_mode": "rgb_array"}
    if card.vector == catalog.EnvCard.vector:
        # One half simulates while the policy is busy with the other. One process per env: a simulation that crashes takes no other episode with it.
        made.update(slots=min(2, num_envs), workers=num_envs, timeout=timeout)
    if taken := sorted(env_options.keys() & {*made, "card", "autoreset_mode"}):
        raise ValueError(f"env_options are options of the simulation, and {', '.join(taken)} is not one; see the other arguments of evaluate")
    # a natively batched class offers the same methods, with one slot if it has no use for two
    return catalog.load(card.vector)(card, **made, **env_options)


def _slots(venv: Any) -> list[range]:
    """The rows of each slot."""
    slots: list[range] = []
    while sum(map(len, slots)) < venv.num_envs:
        slots.append(venv.slot_envs(len(slots)))
    return slots


def _already_done(folder: Folder, todo: Sequence[Episode]) -> list[Outcome]:
    """The finished episodes of the folder, renumbered, because more episodes shift the numbers."""
    wanted = {(episode.task, episode.trial): episode for episode in todo}
    outcomes = folder.finished()
    extra = [outcome for outcome in outcomes if (outcome.task, outcome.trial) not in wanted]
    if extra:
        raise SettingsDiffer(
            f"{folder.path} holds {len(outcomes)} finished episodes, {len(extra)} of them beyond the {len(todo)} asked for; ask for more, or use another folder"
        )
    return [dataclasses.replace(outcome, index=wanted[outcome.task, outcome.trial].index) for outcome in outcomes]


@dataclass
class Running:
    """An episode under way in one env."""

    episode: Episode
    attempt: int = 1
    instruction: str = ""
    steps: int = 0
    total_reward: float = 0.0
    clipped: int = 0
    chunks: list[np.ndarray] = dataclasses.field(default_factory=list)  # executed so far, in env units


def _run(venv: Any, player: Player, fit: Fit, todo: Sequence[Episode], results: Results, folder: Folder | None, progress: bool) -> None:
    """Run what is not done yet and add it to `results`.

    Each slot goes round fill, ask, receive: free envs get the next episode, the policy is asked and its chunk sent off, the outcome is booked.
    While one slot's chunk is under way, the other slot is filled and asked."""
    done = {outcome.index for outcome in results.episodes}
    queue = deque(Running(episode) for episode in todo if episode.index not in done)
    running: dict[int, Running] = {}  # by env
    slots = _slots(venv)
    observations: list[Any] = [None] * len(slots)
    clock = {"simulate_seconds": 0.0, "infer_seconds": 0.0}  # since the last finished episode

    def timed(what: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **named)
        finally:
            clock[what] += time.perf_counter() - start

    def fill(slot: int) -> None:
        rows = slots[slot]
        fresh = [row for row in rows if row not in running][: len(queue)]
        if not fresh:
            return
        running.update({row: queue.popleft() for row in fresh})
        started = [running[row].episode if row in fresh else None for row in rows]
        observations[slot] = timed("simulate_seconds", start, venv, started, slot)
        for row in fresh:
            running[row].instruction = observations[slot]["task_descriptions"][row - rows.start]

    def ask(slot: int) -> bool:
        """Returns whether there was anything to ask for."""
        rows = slots[slot]
        live = [row for row in rows if row in running]
        if not live:
            return False
        if player.act is None:
            chunks = timed("infer_seconds", venv.expert_actions, slot=slot)
            chunks = [None if chunk is None else chunk[: player.execute] for chunk in chunks]
        else:
            seen = fit.observation(select(observations[slot], [row - rows.start for row in live]))
            given = timed("infer_seconds", player.act, seen, [(running[row].episode.seed, running[row].steps) for row in live])
            by_row = dict(zip(live, fit.actions(checked_chunk(given, len(live), player.execute)), strict=True))
            chunks = [by_row.get(row) for row in rows]
        for row, chunk in zip(rows, chunks, strict=True):
            if row in running and chunk is not None:
                running[row].chunks.append(np.array(chunk))  # a copy: a policy may write its next actions into the same array
        venv.send(chunks, slot=slot)
        return True

    def receive(slot: int) -> None:
        result = timed("simulate_seconds", venv.recv, slot)
        observations[slot] = result.observation
        for i, row in enumerate(slots[slot]):
            if row not in running:
                continue
            one = running[row]
            one.steps += int(result.length[i])
            one.total_reward += math.fsum(result.reward[i])
            one.clipped += int(result.info["clipped"][i]) if "clipped" in result.info else 0
            aborted = str(result.info["abort_reason"][i]) if result.info["aborted"][i] else ""
            if aborted and one.attempt <= RETRIES:
                shown.say(f"episode {one.episode.index} is lost and runs again: {aborted}")
                queue.appendleft(Running(one.episode, one.attempt + 1))
                del running[row]
            elif result.done[i]:
                finish(one, success=not aborted and bool(result.info["success"][i]), aborted=aborted)
                del running[row]

    def finish(one: Running, success: bool, aborted: str) -> None:
        outcome = Outcome(
            **dataclasses.asdict(one.episode),
            instruction=one.instruction,
            success=success,
            length=one.steps,
            total_reward=one.total_reward,
            clipped=one.clipped,
            attempts=one.attempt,
            aborted=aborted,
            **clock,
        )
        if folder is not None:
            try:
                if not aborted:
                    folder.keep_actions(outcome, one.chunks)
            except OSError as error:
                results.warnings.append(f"the actions of episode {outcome.index} could not be kept ({error.strerror}), so it cannot be recorded")
                shown.say(results.warnings[-1])
            folder.add(outcome)
        clock.update(simulate_seconds=0.0, infer_seconds=0.0)
        results.episodes.append(outcome)
        shown.count(outcome)

    with Shown(results, len(todo), progress) as shown, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the episode of env", RuntimeWarning)  # lost episodes are told here, by their number
        try:
            under_way: deque[int] = deque()
            for slot in range(len(slots)):
                fill(slot)
                if ask(slot):
                    under_way.append(slot)
            while under_way:
                slot = under_way.popleft()
                receive(slot)
                fill(slot)
                if ask(slot):
                    under_way.append(slot)
        except (KeyboardInterrupt, WorkerError):
            results.finished = False
            shown.say(f"stopped after {len(results.episodes)} of {len(todo)} episodes; " + ("the same command continues" if folder else "nothing was written"))
            if folder is not None:
                _conclude(results)
                folder.write(results)
            raise
    _conclude(results)


def _conclude(results: Results) -> None:
    """Order by number, whatever the order of arrival, and say what a reader must know."""
    results.episodes.sort(key=lambda outcome: outcome.index)
    if results.aborted:
        numbers = ", ".join(str(outcome.index) for outcome in results.episodes if outcome.aborted)
        reason = next(outcome.aborted for outcome in results.episodes if outcome.aborted)
        results.warnings.append(
            f"{results.aborted} of {len(results.episodes)} episodes were aborted {RETRIES + 1} times by a failing simulation and are in no figure: "
            f"episode {numbers}. The first reason: {reason}"
        )
    clipped = [outcome for outcome in results.episodes if outcome.clipped]
    if clipped:
        results.warnings.append(f"actions out of bounds were clipped in {len(clipped)} episodes, {sum(outcome.clipped for outcome in clipped)} numbers in all")


def start(venv: Any, started: Sequence[Episode | None], slot: int) -> Any:
    """Start episodes in some envs of a slot (None: leave it). -> the slot's observation."""
    episodes = [episode or Episode(0, 0, 0, 0) for episode in started]  # what stands for the others is not looked at
    options: dict[str, Any] = {"reset_mask": np.array([episode is not None for episode in started]), "task": [episode.task for episode in episodes]}
    if venv.trials is not None:  # otherwise the seed makes the trial
        options["trial"] = [episode.trial for episode in episodes]
    seeds = [None if given is None else given.seed for given in started]
    observation, _ = venv.reset(seed=seeds, options=options, slot=slot)
    return observation


def checked_chunk(actions: Any, batch: int, execute: int | None) -> np.ndarray:
    """What a policy returned, as [B, N, D] of the N actions to run."""
    actions = actions.detach().float().cpu().numpy() if hasattr(actions, "detach") else np.asarray(actions)
    if actions.ndim != 3 or len(actions) != batch or actions.shape[1] < 1:
        raise ValueError(f"the policy returned actions of shape {actions.shape}, expected [B, T, D] with B = {batch} and T of at least 1")
    if execute is not None and actions.shape[1] < execute:
        raise ValueError(f"the policy returned {actions.shape[1]} actions, but execute={execute} of them should run")
    return actions[:, :execute]


# ------------------------------------------------------------------------------------------------ videos


def _choose(results: Results, videos: int | Sequence[int], chosen: Sequence[int] | None) -> list[Outcome]:
    """The episodes to record: those asked for, or some solved and some unsolved ones, spread over the tasks."""
    counted = [outcome for outcome in results.episodes if not outcome.aborted]
    if chosen is not None:
        return [outcome for outcome in counted if outcome.index in chosen]
    picked = []
    for solved in (True, False):
        group = [outcome for outcome in counted if outcome.success == solved]
        picked += [group[i] for i in dict.fromkeys(np.linspace(0, len(group) - 1, min(int(videos), len(group))).round().astype(int))]
    return sorted(picked, key=lambda outcome: outcome.index)


def _record(venv: Any, chosen: Sequence[Outcome], folder: Folder, results: Results, progress: bool) -> list[report.Clip]:
    """Show the chosen episodes again, now with a picture at every step, and write them. The executed actions are repeated, the policy is not asked.

    Recording afterwards costs a few episodes more; recording all of them while they run would draw a picture at every step of each."""
    clips = []
    for outcome in chosen:
        path = folder.path / "videos" / f"task{outcome.task:03d}_trial{outcome.trial:04d}_{'solved' if outcome.success else 'unsolved'}.mp4"
        name = path.relative_to(folder.path).as_posix()
        if progress:
            print(f"recording episode {outcome.index} -> {path}", flush=True)
        try:
            if path.exists():
                data = path.read_bytes()
            else:
                data = video.encode(replay(venv, outcome, folder.actions(outcome)), venv.metadata["render_fps"])
                video.save(path, data)
            poster = video.decode(data)[-1]
        except (OSError, ReplayDiffers, WorkerError) as error:  # a full disk, most often; the figures do not depend on it
            _warn(results, f"episode {outcome.index} has no video: {error}", progress)
            continue
        words = f"task {outcome.task}, trial {outcome.trial}: {outcome.length} steps, return {outcome.total_reward:.2f}"
        clips.append(report.Clip(outcome.index, outcome.success, words, name, data, poster))
        results.videos.append(name)
    return clips


def _warn(results: Results, words: str, progress: bool) -> None:
    results.warnings.append(words)
    if progress:
        print(words, flush=True)


class ReplayDiffers(RuntimeError):
    """The same actions from the same seed led somewhere else."""


def replay(venv: Any, outcome: Outcome, chunks: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """The captioned pictures of an episode, one per control step and one of its start."""
    others = [None] * (len(venv.slot_envs(0)) - 1)
    observation = start(venv, [Episode(outcome.index, outcome.task, outcome.trial, outcome.seed), *others], slot=0)
    instruction, steps, total, success = observation["task_descriptions"][0], 0, 0.0, False

    def captioned(picture: np.ndarray, reward: float, end: str = "") -> np.ndarray:
        status = f"step {steps}/{venv.max_steps}   reward {reward:.2f}   return {total:.2f}   {end}"
        return video.caption(picture, instruction, status, {"solved": "good", "not solved": "bad"}.get(end, "plain"))

    if venv.render_mode == "rgb_array":
        yield captioned(venv.render(mask=np.arange(venv.num_envs) == 0)[0], 0.0)
    for chunk in chunks:
        venv.send([chunk, *others], slot=0, record=np.arange(1 + len(others)) == 0)
        result = venv.recv(0)
        if result.info["aborted"][0]:
            raise ReplayDiffers(f"its simulation was lost while it was recorded: {result.info['abort_reason'][0]}")
        length, success = int(result.length[0]), bool(result.info["success"][0])
        for i, picture in enumerate(result.info["frames"][0]):
            steps, total = steps + 1, total + float(result.reward[0, i])
            last = result.done[0] and i == length - 1
            yield captioned(picture, float(result.reward[0, i]), ("solved" if success else "not solved") if last else "")
    if (success, steps) != (outcome.success, outcome.length):
        raise ReplayDiffers(
            f"the same seed and actions gave {'success' if success else 'no success'} after {steps} steps, in the evaluation "
            f"{'success' if outcome.success else 'no success'} after {outcome.length}: this simulation does not repeat itself"
        )


# ------------------------------------------------------------------------------------------------ progress


class Shown:
    """Progress of an evaluation: a bar on a terminal, about twenty lines elsewhere, nothing if switched off."""

    def __init__(self, results: Results, total: int, enabled: bool):
        self.results, self.total, self.enabled, self.bar = results, total, enabled, None

    def __enter__(self) -> Shown:
        if self.enabled and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar.start()
            self.row = self.bar.add_task(self._words(), total=self.total, completed=len(self.results.episodes))
        elif self.enabled and self.results.episodes:
            self.say(f"{len(self.results.episodes)} of {self.total} episodes were finished before")
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _words(self) -> str:
        aborted = f", {self.results.aborted} aborted" if self.results.aborted else ""
        return f"solved {self.results.successes} of {self.results.counted}{aborted}"

    def count(self, outcome: Outcome) -> None:
        done = len(self.results.episodes)
        if self.bar is not None:
            self.bar.update(self.row, completed=done, description=self._words())
        elif done == self.total or done % max(1, self.total // 20) == 0:
            self.say(f"{done} of {self.total} episodes: {self._words()}")

    def say(self, words: str) -> None:
        if self.bar is not None:
            self.bar.console.print(words, markup=False, highlight=False)
        elif self.enabled:
            print(words, flush=True)
