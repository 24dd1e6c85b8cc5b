"""Policy x vector env -> a batch of trajectories, ready for PPO or GRPO.

The two halves of the environments alternate: while the policy looks at one half, the other half simulates (`send` / `recv`).
Shapes: K chunks of B environments; N <= T actions of each predicted chunk are executed; R <= K * B decisions were taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from vlahub import video
from vlahub.env import ChunkResult
from vlahub.interface import check
from vlahub.observation import Observation, select
from vlahub.policy import Policy, Sample, Trace
from vlahub.vector import VectorEnv

if TYPE_CHECKING:
    from vlahub.remote import RemoteEnv

Level = Literal["token", "action", "chunk"]


@dataclass(frozen=True)
class EpisodeRecord:
    """One finished episode."""

    env: int  # row of the vector env
    seed: int
    task: int
    success: bool
    total_reward: float
    length: int  # control steps


@dataclass
class Rollout:
    """R decisions, flat, and what came of them, as a [K, B] grid. `row[k, b]` joins the two: the decision's index, or -1 where none was taken or it was aborted."""

    trace: Trace  # each tensor [R, ...]: all that Policy.evaluate needs
    log_prob: torch.Tensor  # [R, T, D], or as the family's Sample says
    row: torch.Tensor  # [K, B] int64
    reward: torch.Tensor  # [K, B, N]
    valid: torch.Tensor  # [K, B, N] bool: control steps that ran, up to and including the first done
    terminated: torch.Tensor  # [K, B, N] bool
    truncated: torch.Tensor  # [K, B, N] bool: cut by the time limit
    value: torch.Tensor | None = None  # [K, B, V], V = 1 (per chunk) or T (per action); 0 where row is -1; None without a value head
    cut_value: torch.Tensor | None = None  # [K, B] value of the last observation of episodes that the time limit cut; 0 elsewhere
    next_value: torch.Tensor | None = None  # [B] value of the observation after the last chunk
    episodes: list[EpisodeRecord] = field(default_factory=list)
    aborted: int = 0  # episodes lost to a crashed or hanging worker; their decisions are in no row
    seconds: dict[str, float] = field(default_factory=dict)  # "infer", "simulate": waiting for the environments, resets included

    def grid(self, per_row: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """[R, ...] -> [K, B, ...]."""
        out = per_row.new_full((*self.row.shape, *per_row.shape[1:]), fill)
        out[self.row >= 0] = per_row[self.row[self.row >= 0]]
        return out

    def flat(self, grid: torch.Tensor) -> torch.Tensor:
        """[K, B, ...] -> [R, ...] in the order of the rows; aborted rows get zeros and `used` says which they are."""
        out = grid.new_zeros((len(self.log_prob), *grid.shape[2:]))
        out[self.row[self.row >= 0]] = grid[self.row >= 0]
        return out

    def used(self) -> torch.Tensor:
        """Indices of the rows that may be trained on."""
        return self.row[self.row >= 0].sort().values

    def of(self, envs: range) -> Rollout:
        """The part of some environments. Lost episodes are counted with the first environment."""
        row = self.row[:, envs.start : envs.stop]
        kept = row[row >= 0].sort().values
        kept = kept if len(kept) else torch.zeros(1, dtype=torch.int64, device=row.device)  # a batch never has no row at all
        part = {name: grid[..., envs.start : envs.stop] if name == "next_value" else grid[:, envs.start : envs.stop] for name, grid in self._grids().items()}
        return replace(
            self,
            **part,
            row=torch.where(row >= 0, torch.searchsorted(kept, row.contiguous()), -1),
            trace={key: tensor[kept] for key, tensor in self.trace.items()},
            log_prob=self.log_prob[kept],
            episodes=[replace(record, env=record.env - envs.start) for record in self.episodes if record.env in envs],
            aborted=self.aborted if envs.start == 0 else 0,
        )

    def to(self, device: torch.device | str) -> Rollout:
        moved = {name: grid.to(device) for name, grid in self._grids().items()}
        return replace(
            self, **moved, row=self.row.to(device), log_prob=self.log_prob.to(device), trace={key: tensor.to(device) for key, tensor in self.trace.items()}
        )

    def _grids(self) -> dict[str, torch.Tensor]:
        """What is there per environment, but for `row`."""
        names = [one.name for one in fields(self) if one.name not in ("row", "log_prob", "trace")]
        return {name: getattr(self, name) for name in names if isinstance(getattr(self, name), torch.Tensor)}


def joined(parts: Sequence[Rollout]) -> Rollout:
    """The rollouts of several groups of environments as one, these behind each other."""
    if len(parts) == 1:
        return parts[0]
    longest = max(len(part.row) for part in parts)
    firsts = np.cumsum([0, *(len(part.log_prob) for part in parts)]).tolist()
    envs = np.cumsum([0, *(part.row.shape[1] for part in parts)]).tolist()

    def grid(get: Callable[[Rollout], torch.Tensor], fill: float) -> torch.Tensor:  # [K, B, ...] each -> [longest, all B, ...]
        grids = [get(part) for part in parts]
        return torch.cat([torch.cat([one, one.new_full((longest - len(one), *one.shape[1:]), fill)]) for one in grids], 1)

    together = {name: grid(lambda part, name=name: getattr(part, name), 0) for name in parts[0]._grids() if name != "next_value"}  # type: ignore[misc]
    if parts[0].next_value is not None:
        together["next_value"] = torch.cat([part.next_value for part in parts])  # type: ignore[misc]
    offsets = iter(firsts)
    return Rollout(
        **together,
        row=grid(lambda part: torch.where(part.row >= 0, part.row + next(offsets), -1), -1),
        trace={key: torch.cat([part.trace[key] for part in parts]) for key in parts[0].trace},
        log_prob=torch.cat([part.log_prob for part in parts]),
        episodes=[replace(record, env=record.env + first) for part, first in zip(parts, envs, strict=False) for record in part.episodes],
        aborted=sum(part.aborted for part in parts),
        seconds={what: max(part.seconds[what] for part in parts) for what in parts[0].seconds},
    )


def reduce_log_prob(log_prob: torch.Tensor, valid: torch.Tensor, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-number log-probabilities -> the level at which the ratio is taken, and the mask of entries that count.

    Args:
        log_prob: [R, T, D] where the policy factorises so, [R, T] or [R] otherwise. Entropies reduce the same way.
        valid: [R, N] bool, the control steps that ran; actions beyond N or after the episode's end never count.
        level: "token" keeps [R, N, D]; "action" sums over D -> [R, N]; "chunk" sums over what ran -> [R].
    """
    if log_prob.ndim == 1:
        if level != "chunk":
            raise ValueError(f"this policy gives one log-probability per chunk, so the ratio cannot be taken per {level}; use the level 'chunk'")
        return log_prob, valid.any(1)
    log_prob = log_prob[:, : valid.shape[1]]
    if log_prob.ndim == 2:
        if level == "token":
            raise ValueError("this policy gives one log-probability per action, so the ratio cannot be taken per token; use the level 'action' or 'chunk'")
        per_action = log_prob
    elif level == "token":
        return log_prob, valid[..., None].expand_as(log_prob)
    else:
        per_action = log_prob.sum(-1)
    if level == "action":
        return per_action, valid
    return (per_action * valid).sum(1), valid.any(1)


class SeedStream:
    """Episode seeds that depend on the run's seed, the environment's place among all ranks and its episode count, not on who finishes first."""

    def __init__(self, seed: int, envs: Sequence[int]):
        self.seed, self.envs = seed, list(envs)
        self.count = [0] * len(self.envs)  # episodes started per environment: the cursor that a checkpoint stores

    def next(self, env: int) -> int:
        # the spawn key keeps them apart from the seeds of evaluation episodes, which are drawn from three numbers as well
        sequence = np.random.SeedSequence([self.seed, self.envs[env], self.count[env]], spawn_key=(1,))
        self.count[env] += 1
        return int(sequence.generate_state(1)[0] >> 1)  # 31 bits, as vlahub.env.checked_seed wants


FRAMES = 240  # of a film at most: a rollout of hundreds of steps stays a short clip, and its pictures fit in memory


@dataclass
class Film:
    """Pictures of the first environment during one rollout, with step, reward and return drawn on."""

    frames: list[np.ndarray] = field(default_factory=list)
    every: int = 1  # control steps between pictures; the collector spreads them over the rollout

    def add(self, result: ChunkResult, instruction: str, step: int, total: float, max_steps: int) -> None:
        """The pictures of one chunk, which began after `step` control steps with a return of `total`."""
        rewards = result.reward[0].cumsum()
        for i, picture in enumerate(result.info["frames"][0] or ()):
            last = (i + 1) * self.every - 1  # the control step in this chunk that it was taken after
            ended = bool(result.done[0]) and last == result.length[0] - 1
            end = ("solved" if result.info["success"][0] else "not solved") if ended else ""
            status = f"step {step + last + 1}/{max_steps}   reward {result.reward[0, last]:.2f}   return {total + rewards[last]:.2f}   {end}"
            if len(self.frames) < FRAMES:
                self.frames.append(video.caption(picture, instruction, status, {"solved": "good", "not solved": "bad"}.get(end, "plain")))

    def pictures(self) -> list[np.ndarray]:
        """The frames in one size: instructions of different episodes take different numbers of lines above them."""
        height = max(map(len, self.frames))
        return [np.pad(frame, ((height - len(frame), 0), (0, 0), (0, 0))) for frame in self.frames]


class Collector:
    """Runs a policy in a vector env. Running episodes go on from one `steady` call to the next.

    Args:
        env: the environments of this rank, a VectorEnv or, where they live on other ranks, a RemoteEnv; with slots=2 the policy infers for one half while the
            other half simulates.
        policy: compared with the environments' interface here.
        seeds: episode seeds in `steady`; exploration noise always.
        execute: N, how many actions of each chunk run before the policy looks again; the policy's own default if None.
    """

    def __init__(self, env: VectorEnv | RemoteEnv, policy: Policy, seeds: SeedStream, execute: int | None = None):
        self.env, self.policy, self.seeds = env, policy, seeds
        self.fit = check(env, policy)
        self.execute = policy.execute if execute is None else execute
        if not 1 <= self.execute <= policy.horizon:
            raise ValueError(f"execute must be from 1 to the policy's horizon {policy.horizon}, not {self.execute}")
        count = env.num_envs
        self.slots = [np.array(env.slot_envs(slot)) for slot in range(env.slots)]
        self.seen: list[Observation] = [{} for _ in self.slots]  # newest observation of each slot
        self.over = np.ones(count, bool)
        self.noise, self.seed, self.task, self.steps = (np.zeros(count, np.int64) for _ in range(4))
        self.total = np.zeros(count, np.float64)
        self.film: Film | None = None  # set for a rollout of which pictures are wanted

    def restart(self) -> None:
        """Drop running episodes. Called at a checkpoint, so that a resumed run equals an uninterrupted one."""
        self.over[:] = True

    def steady(self, chunks: int) -> Rollout:
        """`chunks` decisions in every environment; when an episode ends, the next one begins."""
        self.seconds = {"infer": 0.0, "simulate": 0.0}
        with self._timed("simulate"):
            for slot in range(len(self.slots)):
                self._begin(slot)
        return self._collect(chunks, refill=True)

    def episodes(self, seeds: Sequence[int], options: Mapping[str, Any] | None = None) -> Rollout:
        """One whole episode per environment, from the given seeds; an environment that is done costs nothing more.

        Equal seeds (and options) give equal initial states, the groups of GRPO; exploration noise differs all the same.
        An option is one value for all environments or a list of one per environment."""
        self.over[:] = True
        self.seconds = {"infer": 0.0, "simulate": 0.0}
        with self._timed("simulate"):
            for slot in range(len(self.slots)):
                self._begin(slot, np.asarray(seeds), options)
        return self._collect(-(-self.env.max_steps // self.execute), refill=False)

    # ------------------------------------------------------------------------------------------------

    def _begin(self, slot: int, seeds: np.ndarray | None = None, options: Mapping[str, Any] | None = None) -> None:
        """Start an episode in every environment of the slot that has none."""
        rows = self.slots[slot]
        fresh = rows[self.over[rows]]
        if not len(fresh):
            return
        for b in fresh:
            self.noise[b] = self.seeds.next(b)
        self.seed[fresh] = self.noise[fresh] if seeds is None else seeds[fresh]
        chosen: dict[str, Any] = {
            name: [value[b] for b in rows] if isinstance(value, (list, tuple, np.ndarray)) else value for name, value in (options or {}).items()
        }
        self.seen[slot], info = self.env.reset(seed=self.seed[rows].tolist(), options={**chosen, "reset_mask": self.over[rows]}, slot=slot)
        self.task[fresh] = np.asarray(info["task"])[self.over[rows]]
        self.steps[fresh], self.total[fresh], self.over[fresh] = 0, 0.0, False

    def _observation(self, slot: int, mask: np.ndarray) -> Observation:
        """Of some environments of a slot, as the policy expects it."""
        return self.fit.observation(self.seen[slot] if mask.all() else select(self.seen[slot], mask))

    def _noise(self, rows: np.ndarray) -> torch.Tensor:
        """[b, 2] seeds of the noise of these environments' next decisions."""
        return torch.from_numpy(np.stack([self.noise[rows], self.steps[rows]], axis=1))

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - before

    @torch.no_grad()
    def _collect(self, chunks: int, refill: bool) -> Rollout:
        count, N = self.env.num_envs, self.execute
        row = np.full((chunks, count), -1, np.int64)
        reward, cut_value = np.zeros((chunks, count, N), np.float32), np.zeros((chunks, count), np.float32)
        valid, terminated, truncated = (np.zeros((chunks, count, N), bool) for _ in range(3))
        first = np.zeros(count, np.int64)  # the chunk of this rollout at which each running episode began
        samples: list[Sample] = []
        records: list[EpisodeRecord] = []
        decisions = aborted = 0
        running: dict[int, int] = {}  # slot -> the chunk that it simulates
        if self.film is not None:
            self.film.every = min(N, -(-chunks * N // FRAMES))

        def receive(slot: int) -> None:
            nonlocal aborted
            k, rows = running.pop(slot), self.slots[slot]
            with self._timed("simulate"):
                result = self.env.recv(slot)
            if self.film is not None and "frames" in result.info:
                self.film.add(result, self.seen[slot]["task_descriptions"][0], int(self.steps[0]), float(self.total[0]), self.env.max_steps)
            self.seen[slot] = result.observation
            asked, lost = ~self.over[rows], np.asarray(result.info["aborted"], bool)
            ended = asked & (result.done | lost)
            reward[k, rows] = result.reward
            terminated[k, rows], truncated[k, rows] = result.terminated, result.truncated & ~lost[:, None]
            valid[k, rows] = np.arange(N) < result.length[:, None]
            self.steps[rows] += result.length
            self.total[rows] += result.reward.sum(1)
            if not ended.any():
                return
            for b, is_lost, success in zip(rows[ended], lost[ended], result.info["success"][ended] if "success" in result.info else lost[ended], strict=True):
                if is_lost:  # neither a success nor a failure: nothing of the episode is trained on
                    aborted += 1
                    row[first[b] : k + 1, b], valid[first[b] : k + 1, b] = -1, False
                else:
                    records.append(EpisodeRecord(int(b), int(self.seed[b]), int(self.task[b]), bool(success), float(self.total[b]), int(self.steps[b])))
            first[rows[ended]] = k + 1
            self.over[rows[ended]] = True
            if refill:
                cut = truncated[k, rows].any(1)
                if cut.any() and samples[0].value is not None:
                    with self._timed("infer"):
                        cut_value[k, rows[cut]] = self.policy.value(self._observation(slot, cut), self._noise(rows[cut]))[:, 0].float().cpu().numpy()
                with self._timed("simulate"):
                    self._begin(slot)

        for k in range(chunks):
            for slot, rows in enumerate(self.slots):
                if slot in running:
                    receive(slot)
                asked = ~self.over[rows]
                if not asked.any():
                    continue
                with self._timed("infer"):
                    sample = self.policy.sample(self._observation(slot, asked), self._noise(rows[asked]))
                    actions = np.zeros((len(rows), N, self.env.single_action_space.shape[0]), np.float32)
                    actions[asked] = self.fit.actions(sample.actions[:, :N].float().cpu().numpy())
                filmed = {}
                if self.film is not None and slot == 0 and asked[0] and len(self.film.frames) < FRAMES:
                    filmed = {"record": np.arange(len(rows)) == 0, "record_every": self.film.every}
                self.env.send(actions, slot, **filmed)
                running[slot] = k
                row[k, rows[asked]] = np.arange(decisions, decisions + asked.sum())
                decisions += int(asked.sum())
                samples.append(sample)
            if not running:
                break
        for slot in list(running):
            receive(slot)

        if not refill:  # drop the tail that no episode reached
            chunks = int(valid.any((1, 2)).sum()) or 1
        device = samples[0].log_prob.device

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array[:chunks]).to(device)

        rollout = Rollout(
            trace={key: torch.cat([sample.trace[key] for sample in samples]) for key in samples[0].trace},
            log_prob=torch.cat([sample.log_prob for sample in samples]),
            row=on_device(row),
            reward=on_device(reward),
            valid=on_device(valid),
            terminated=on_device(terminated),
            truncated=on_device(truncated),
            episodes=records,
            aborted=aborted,
            seconds=self.seconds,
        )
        if samples[0].value is not None:
            rollout.value = rollout.grid(torch.cat([sample.value for sample in samples]).float())
            rollout.cut_value = on_device(cut_value)
            if refill:
                with self._timed("infer"):
                    every = [(self._observation(slot, np.ones(len(rows), bool)), self._noise(rows)) for slot, rows in enumerate(self.slots)]
                    rollout.next_value = torch.cat([self.policy.value(*given)[:, 0] for given in every]).float()
        return rollout
