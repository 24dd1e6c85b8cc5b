"""Recording demonstrations: a policy or the scripted expert on an exact set of episodes, written as a LeRobot-format dataset.

    vlahub record --env vlahub/RoboTwin-ClickBell --policy expert --episodes 100 --num-envs 8 --out data/click-bell

Each row of the dataset is one control step: the observation, and the action that was applied after it. A chunk still runs as a whole, as it does in training and
evaluation, and is looked at after every control step. In a simulation that plans a chunk as one path (RoboTwin's executor="chunk") the action of a row
is therefore the waypoint that the path heads for next, passed without stopping; a policy that predicts chunks of these actions repeats the same path.

Which episodes run depends on their number and the seed only, as in evaluation, but their seeds are their own: nothing recorded is evaluated on, or met in training.
Episodes are written in that order, so the dataset does not depend on the number of environments. The same command goes on with an interrupted recording.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

import vlahub
from vlahub import catalog, evaluation
from vlahub.catalog import EnvCard
from vlahub.dataset import SEEN, Dataset, DatasetWriter, convert_to_v30
from vlahub.env import own
from vlahub.evaluation import Episode, SettingsDiffer, agree, checked_chunk, episodes_of, lock, player_of
from vlahub.interface import Fit, check
from vlahub.observation import Observation, select, stack
from vlahub.simulation import Expert, Outcomes
from vlahub.vector import VectorEnv

PURPOSE = (2,)  # spawn key of recorded episodes, apart from those of training (1), GRPO's starts (3) and evaluations (none)
NOISE_STEPS = 10  # control steps for which one draw of action noise holds: noise that changes at every step is smoothed away by the robot's controller
AHEAD = 2  # finished episodes that wait in memory for an earlier one, per environment, before no further ones begin


@dataclass
class Line:
    """One finished episode: a line of meta/recording.jsonl."""

    task: int
    trial: int
    seed: int
    instruction: str
    success: bool
    length: int
    total_reward: float
    episode: int | None  # its number in the dataset; None: left out
    aborted: str = ""  # why its simulation was lost, if it was lost twice


@dataclass
class Recording:
    """What a recording came to."""

    folder: Path
    lines: list[Line]

    @property
    def written(self) -> int:
        return sum(line.episode is not None for line in self.lines)

    @property
    def failures(self) -> list[Line]:
        return [line for line in self.lines if not line.success]

    def __str__(self) -> str:
        aborted = sum(bool(line.aborted) for line in self.lines)
        solved = sum(line.success for line in self.lines)
        lost = f", {aborted} lost to a failing simulation" if aborted else ""
        return f"{self.written} of {len(self.lines)} episodes are in {self.folder} ({solved} solved{lost})"


@dataclass
class Running:
    """An episode under way."""

    episode: Episode
    attempt: int = 1
    observations: list[Observation] = field(default_factory=list)  # what was seen before each step, and after the last
    seen: list[bool] = field(default_factory=list)  # of each of these: was it looked at, or is it the one before once more?
    actions: list[np.ndarray] = field(default_factory=list)  # chunks [n, D], as applied
    rewards: list[np.ndarray] = field(default_factory=list)
    solved: list[np.ndarray] = field(default_factory=list)  # was the task solved after each step?
    aborted: str = ""
    success: bool = False

    @property
    def steps(self) -> int:
        return sum(map(len, self.actions))


class Journal:
    """meta/recording.json (what is recorded) and meta/recording.jsonl (how each episode went), beside the dataset's own files."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        if (folder / "meta/info.json").exists() and not (folder / "meta/recording.json").exists():
            raise SettingsDiffer(f"{folder} holds a dataset that `vlahub record` did not make; choose another folder")
        try:
            (folder / "meta").mkdir(parents=True, exist_ok=True)
            self._file = open(folder / "meta/recording.jsonl", "a+b", buffering=0)
        except OSError as error:
            raise OSError(error.errno, f"cannot write to the output folder {folder}: {error.strerror}; choose another with --out") from error
        lock(self._file, folder, "recording")
        agree(folder / "meta/recording.json", settings, "recording")

    def lines(self, written: int) -> list[Line]:
        """The finished episodes. A line is written before its episode is: one whose episode is not there, or that is cut off, is dropped from the file."""
        self._file.seek(0)
        kept, size = [], 0
        for text in self._file.read().splitlines(keepends=True):
            line = Line(**json.loads(text)) if text.endswith(b"\n") else None
            if line is None or (line.episode is not None and line.episode >= written):
                break
            kept.append(line)
            size += len(text)
        self._file.truncate(size)
        return kept

    def add(self, line: Line) -> None:
        self._file.write(json.dumps(asdict(line)).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def record(
    env: Any,
    policy: Any,
    episodes: int,
    out: str | Path,
    *,
    num_envs: int = 1,
    seed: int = 0,
    version: Literal["v2.1", "v3.0"] = "v2.1",
    images: Literal["png", "jpeg", "video"] = "png",
    only_successes: bool = True,
    noise: float | Sequence[float] = 0.0,
    labels: Literal["applied", "intended"] = "applied",
    after: int = 0,
    look_every: int = 1,
    first_trial: int = 0,
    execute: int | None = None,
    max_steps: int | None = None,
    timeout: float = 300.0,
    env_options: Mapping[str, Any] | None = None,
    policy_name: str = "",
    progress: bool = True,
) -> Recording:
    """Run episodes and write them as a dataset.

    Args:
        env: an id or an `EnvCard`.
        policy: "expert", "random", a `vlahub.Policy` or a function, as in `vlahub.evaluate`.
        episodes: how many are run; with `only_successes` the dataset may hold fewer.
        out: the dataset's folder.
        num_envs: environments that run at once, each in a process of its own. The dataset does not depend on it.
        seed: decides the seed of every (task, trial).
        version: of the LeRobot format. v3.0 is made at the end, of a v2.1 dataset in `OUT.recording`, which is then deleted.
        images: "png" (lossless), "jpeg" or "video".
        only_successes: leave out episodes that were not solved.
        noise: standard deviation of Gaussian noise on every action, in action units, one number or one for each of an action's numbers; a new draw every ten control steps.
        labels: with noise, record the actions that were "applied", which is what a world model learns from, or those that were "intended" (DART): what the expert would
            do where the noise led it, which is what behaviour cloning learns to recover from. Noise that holds leads away from the goal, so applied actions would teach that.
        after: control steps that an episode goes on for once it was solved, so that the solved state is seen too (world models and classifiers need it).
        look_every: control steps from one look to the next within a chunk. Every step has a row in any case; one that was not looked at repeats the observation before it, and
            the column "observation.seen" says so. `vlahub.dataset.Dataset` draws only rows that were seen.
        first_trial: of every task; the trials before it are left for evaluations, which begin with trial 0.
        execute, max_steps, timeout, env_options, policy_name, progress: as in `vlahub.evaluate`.
    """
    if isinstance(look_every, bool) or look_every < 1:
        raise ValueError(f"look_every must be at least 1, not {look_every}")
    if isinstance(episodes, bool) or episodes < 1 or num_envs < 1 or seed < 0:
        raise ValueError(f"episodes and num_envs must be at least 1 and seed at least 0, not {episodes}, {num_envs} and {seed}")
    spread = np.atleast_1d(np.asarray(noise, float)).tolist()  # one number, or one for each of an action's
    if not all(0 <= value < np.inf for value in spread) or isinstance(after, bool) or after < 0:
        raise ValueError(f"noise and after must be at least 0, not {noise} and {after}")
    if labels not in ("applied", "intended"):
        raise ValueError(f"labels must be 'applied' or 'intended', not {labels!r}")
    if isinstance(first_trial, bool) or first_trial < 0:
        raise ValueError(f"first_trial must be at least 0, not {first_trial}")
    if version not in ("v2.1", "v3.0"):
        raise ValueError(f"version must be 'v2.1' or 'v3.0', not {version!r}")
    if images not in ("png", "jpeg", "video"):
        raise ValueError(f"images must be 'png', 'jpeg' or 'video', not {images!r}")
    out = Path(out)
    folder = out if version == "v2.1" else out.with_name(out.name + ".recording")
    training = [module for module in policy.modules() if module.training] if hasattr(policy, "modules") else []
    for module in training:  # dropout belongs to training
        module.training = False
    venv = _vector_env(env, policy, min(num_envs, episodes), max_steps, timeout, env_options or {}, after)
    try:
        if len(spread) not in (1, venv.single_action_space.shape[0]):
            raise ValueError(
                f"noise has {len(spread)} numbers, an action of {venv.card.id} has {venv.single_action_space.shape[0]}; give as many, or one for all"
            )
        player = player_of(policy, venv.single_action_space, execute, policy_name)
        fit = check(venv, player.policy) if player.policy is not None else Fit()
        todo = episodes_of(episodes, int(seed), venv.tasks, venv.trials, PURPOSE, first_trial)
        settings = {
            "env": venv.card.id, "env_options": dict(env_options or {}), "assets": venv.assets, "max_steps": venv.max_steps, "policy": player.name,
            "weights": player.weights, "execute": player.execute, "seed": int(seed), "images": images, "only_successes": only_successes, "version": version,
            "vlahub": vlahub.__version__, **({"noise": spread if len(spread) > 1 else spread[0]} if any(spread) else {}), **({"labels": labels} if labels != "applied" else {}),
            **({"after": after} if after else {}), **({"look_every": look_every} if look_every > 1 else {}), **({"first_trial": first_trial} if first_trial else {}),
        }  # fmt: skip
        if version == "v3.0" and (out / "meta/info.json").exists():
            return _finished(out, settings, todo)
        journal = Journal(folder, settings)
        try:
            writer = DatasetWriter(folder, venv.interface, venv.metadata["render_fps"], images, robot_type=venv.card.family)
            lines = journal.lines(len(writer))
            _refuse_extra(folder, lines, todo)
            _run(venv, player, fit, todo, lines, writer, journal, only_successes, spread, labels, look_every, progress)
        finally:
            journal.close()
    finally:
        for module in training:
            module.training = True
        venv.close()
    if len(writer):
        statistics = Dataset(folder).statistics
        named = {writer.columns.states: statistics["states"], writer.columns.actions: statistics["actions"]}
        (folder / "meta/stats.json").write_text(json.dumps(named, indent=2) + "\n")
        if version == "v3.0":
            draft = out.with_name(out.name + ".converting")
            shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed while it converted
            convert_to_v30(folder, draft)
            for name in ("recording.json", "recording.jsonl"):
                shutil.copy(folder / "meta" / name, draft / "meta" / name)
            draft.rename(out)
            shutil.rmtree(folder)
    return Recording(out, lines)


def _finished(out: Path, settings: Mapping[str, Any], todo: Sequence[Episode]) -> Recording:
    """A v3.0 dataset that is complete: what it holds, if it is what was asked for."""
    if not (out / "meta/recording.json").exists():
        raise SettingsDiffer(f"{out} holds a dataset that `vlahub record` did not make; choose another folder")
    agree(out / "meta/recording.json", settings, "recording")
    lines = [Line(**json.loads(text)) for text in (out / "meta/recording.jsonl").read_text().splitlines()]
    _refuse_extra(out, lines, todo)
    if len(lines) < len(todo):
        raise SettingsDiffer(
            f"{out} is a v3.0 dataset of {len(lines)} recorded episodes, and only v2.1 can be extended; record the {len(todo)} into another folder"
        )
    return Recording(out, lines)


def _refuse_extra(folder: Path, lines: Sequence[Line], todo: Sequence[Episode]) -> None:
    extra = {(line.task, line.trial) for line in lines} - {(episode.task, episode.trial) for episode in todo}
    if extra:
        raise SettingsDiffer(
            f"{folder} holds {len(lines)} recorded episodes, {len(extra)} of them beyond the {len(todo)} asked for; ask for more, or use another folder"
        )


def _vector_env(env: Any, policy: Any, num_envs: int, max_steps: int | None, timeout: float, env_options: Mapping[str, Any], after: int) -> Any:
    card = catalog.env_card(env) if isinstance(env, str) else env
    if policy == evaluation.EXPERT and not card.expert:
        raise ValueError(f"{card.id} has no scripted expert; record a policy instead")
    if card.vector != type(card).vector:
        raise ValueError(f"{card.id} runs as one batch and does not show every control step of a chunk, so it cannot be recorded")
    # The expert lives beside the simulation: nobody waits for anybody if each env is a slot of its own. A policy is asked for half of the envs at a time.
    slots = num_envs if policy == evaluation.EXPERT else min(2, num_envs)
    if after:
        lingering = {"card": card, "options": dict(env_options), "steps": after}
        expert = "vlahub.record:lingering_expert" if card.expert else ""
        card, env_options = replace(card, simulation="vlahub.record:Lingering", kwargs=lingering, expert=expert), {}
    return VectorEnv(card, num_envs, max_steps=max_steps, slots=slots, workers=num_envs, timeout=timeout, **env_options)


def _run(
    venv: Any,
    player: Any,
    fit: Fit,
    todo: Sequence[Episode],
    lines: list[Line],
    writer: DatasetWriter,
    journal: Journal,
    only: bool,
    noise: Sequence[float],
    labels: str,
    look_every: int,
    progress: bool,
) -> None:
    """Run what is not recorded yet. Each slot goes round fill, ask, receive; finished episodes are written in order."""
    done = {(line.task, line.trial) for line in lines}
    order = [episode for episode in todo if (episode.task, episode.trial) not in done]
    queue, running, finished = deque(Running(episode) for episode in order), {}, {}
    place = {episode.index: i for i, episode in enumerate(order)}
    following = 0  # place of the next episode to be written
    slots = [venv.slot_envs(slot) for slot in range(venv.slots)]
    if progress and lines:
        print(f"{len(lines)} of {len(todo)} episodes were recorded before", flush=True)

    def fill(slot: int) -> None:
        rows, fresh = slots[slot], []
        for row in slots[slot]:
            if row not in running and queue and place[queue[0].episode.index] < following + (1 + AHEAD) * venv.num_envs:
                running[row] = queue.popleft()
                fresh.append(row)
        if fresh:
            observation = evaluation.start(venv, [running[row].episode if row in fresh else None for row in rows], slot)
            for row in fresh:
                running[row].observations = [own(select(observation, row - rows.start))]  # a copy: the batch's memory is used again
                running[row].seen = [True]

    def ask(slot: int) -> bool:
        rows = slots[slot]
        live = [row for row in rows if row in running]
        if not live:
            return False
        if player.act is None:
            chunks = [None if chunk is None else chunk[: player.execute] for chunk in venv.expert_actions(slot=slot)]
        else:
            seen = [running[row].observations[-1] for row in live]
            given = player.act(fit.observation(stack(seen)), [(running[row].episode.seed, running[row].steps) for row in live])
            by_row = dict(zip(live, fit.actions(checked_chunk(given, len(live), player.execute)), strict=True))
            chunks = [by_row.get(row) for row in rows]
        low, high = venv.single_action_space.low, venv.single_action_space.high
        for i, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
            if row in running and chunk is not None:  # within the bounds, as it is applied
                one, chunk = running[row], np.asarray(chunk, np.float32)
                drawn = noise_of(one.episode.seed, range(one.steps, one.steps + len(chunk)), chunk.shape[1]) if any(noise) else 0.0
                chunks[i] = np.clip(chunk + np.float32(noise) * drawn, low, high)
                one.actions.append(chunks[i] if labels == "applied" else np.clip(chunk, low, high))
        venv.send(chunks, slot=slot, look=look_every)
        return True

    def receive(slot: int) -> None:
        result = venv.recv(slot)
        for i, row in enumerate(slots[slot]):
            if row not in running:
                continue
            one, length = running[row], int(result.length[i])
            if result.info["aborted"][i]:
                del running[row]
                reason = str(result.info["abort_reason"][i])
                if one.attempt <= evaluation.RETRIES:
                    say(f"episode {one.episode.index} is lost and runs again: {reason}")
                    queue.appendleft(Running(one.episode, one.attempt + 1))
                else:
                    one.aborted = reason
                    finished[place[one.episode.index]] = one
                continue
            for observation in result.info["observations"][i]:
                one.seen.append(observation is not None)
                one.observations.append(one.observations[-1] if observation is None else observation)
            one.actions[-1] = one.actions[-1][:length]
            one.rewards.append(result.reward[i, :length].copy())
            ends_solved = np.arange(length) == length - 1 if result.info["success"][i] else np.zeros(length, bool)
            one.solved.append(np.asarray(result.info["solved"][i][:length], bool) if "solved" in result.info else ends_solved)
            if result.done[i]:
                one.success = bool(result.info["success"][i])
                finished[place[one.episode.index]] = one
                del running[row]

    def write() -> None:
        nonlocal following
        while following in finished:
            one = finished.pop(following)
            following += 1
            keep = not one.aborted and (one.success or not only)
            episode = one.episode
            line = Line(
                episode.task, episode.trial, episode.seed, str(one.observations[0]["task_descriptions"]), one.success, sum(map(len, one.rewards)),
                float(sum(reward.sum(dtype=np.float64) for reward in one.rewards)), len(writer) if keep else None, one.aborted,
            )  # fmt: skip
            journal.add(line)
            if keep:
                outcome = {"next.success": np.concatenate(one.solved), "next.reward": np.concatenate(one.rewards)}
                if look_every > 1:
                    outcome[SEEN] = np.array(one.seen[: line.length])
                writer.add_episode(one.observations[: line.length], np.concatenate(one.actions), outcome)
            lines.append(line)
            if not line.success:
                say(f"episode {episode.index} (task {episode.task}, trial {episode.trial}, seed {episode.seed}) {'is lost: ' + one.aborted if one.aborted else 'is not solved'}"
                    + ("" if keep else " and left out"))  # fmt: skip
            if len(lines) == len(todo) or len(lines) % max(1, len(todo) // 20) == 0:
                say(f"{len(lines)} of {len(todo)} episodes, {len(writer)} in the dataset")

    def say(words: str) -> None:
        if progress:
            print(words, flush=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the episode of env", RuntimeWarning)  # lost episodes are told here, by their number
        under_way: deque[int] = deque()

        def begin(slot: int) -> None:
            fill(slot)
            if ask(slot):
                under_way.append(slot)

        for slot in range(len(slots)):
            begin(slot)
        while under_way:
            receive(under_way.popleft())
            write()
            for slot in range(len(slots)):  # also those that waited for an earlier episode to be written
                if slot not in under_way:
                    begin(slot)


def noise_of(seed: int, steps: Sequence[int], size: int) -> np.ndarray:
    """Standard Gaussian noise [len(steps), size] of an episode's control steps; the same however the steps are cut into chunks."""
    draws = {block: np.random.default_rng([seed, block, 1]).standard_normal(size) for block in {step // NOISE_STEPS for step in steps}}
    return np.stack([draws[step // NOISE_STEPS] for step in steps]).astype(np.float32)


# ------------------------------------------------------------------------------------------------ going on after success


class Lingering:
    """A simulation whose episodes end `steps` control steps after they were first solved. info["solved"] [n] says of each step whether the task is solved after it."""

    def __init__(self, card: EnvCard, options: Mapping[str, Any], steps: int):
        self.card, self.steps, self.inner = card, steps, catalog.make_simulation(card, **options)
        self.interface, self.max_steps, self.assets = self.inner.interface, self.inner.max_steps, self.inner.assets
        self.tasks, self.trials = self.inner.tasks, self.inner.trials
        self.observe, self.render, self.close = self.inner.observe, self.inner.render, self.inner.close
        self.left: int | None = None  # control steps to go; None until the task is solved

    def reset(self, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        self.left = None
        return self.inner.reset(seed, options)

    def apply(self, actions: np.ndarray, watch: Callable[[], None] | None = None) -> Outcomes:
        parts: list[Outcomes] = []
        over, count = False, 0
        while count < len(actions) and not over:
            part = self.inner.apply(actions[count:] if self.left is None else actions[count : count + self.left], watch)  # it stops where it is solved
            ran = len(part.reward)
            if self.left is not None:
                self.left -= ran
            elif part.success.any():
                self.left = self.steps - (ran - 1 - int(part.success.argmax()))
            lost = part.terminated is not None and bool(part.terminated.any()) and not part.success.any()
            over, count = lost or (self.left is not None and self.left <= 0), count + ran
            parts.append(part)
        reward, success = (np.concatenate([getattr(part, name) for part in parts]) for name in ("reward", "success"))
        terminated = np.zeros(len(reward), bool)
        terminated[-1] = over
        return Outcomes(reward, success, terminated, {**parts[-1].info, "solved": success})


def lingering_expert(simulation: Lingering) -> Expert:
    return catalog.make_expert(simulation.card, simulation.inner)
