"""Many simulations in worker processes as a gymnasium VectorEnv, with `step_chunk` and `send` / `recv`.

    env = gym.make_vec("vlahub/RoboTwin-ClickBell", num_envs=8)
    observation, info = env.reset(seed=0)                    # env i gets seed 0 + i
    result = env.step_chunk(policy.act(observation))         # [8, N, D] actions; one look, after the last of them
    env.reset(options={"reset_mask": result.done})           # seeds are drawn per env, so results do not depend on the number of workers

The parent sends each worker process (vlahub/worker.py) a list of jobs and gathers one list of replies. Observations lie in shared memory in a few
slabs of one batch each: a worker writes its rows of a free slab, and the arrays that the user gets are views of it. A slab is free again when the
last array that looks into it is gone, so an observation that the user keeps never changes; if too many are kept, later ones are copies.
The memory is an anonymous file: it has no name in /dev/shm, is not bound by the size of /dev/shm, and vanishes with the last process that maps it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from vlahub import catalog, worker
from vlahub.catalog import EnvCard
from vlahub.env import ChunkResult, checked_actions, checked_seed
from vlahub.observation import Observation, space_of
from vlahub.simulation import Simulation
from vlahub.worker import Channel, Facts, Failure, Job, Layout, Reply, Resident, Setup, places

SLABS_PER_SLOT = 4  # one being written, one or two that the user holds, one to spare; untouched slabs cost no memory
ATTEMPTS = 3  # failures of one env in a row, without a chunk that worked between them, after which the vector env gives up
BUILDING = 600.0  # seconds that building one simulation may take, if `timeout` is not longer: imports, shaders, assets made on first use
GRACE = 5.0  # seconds that a worker has to close its simulations before it is killed

# One thread per worker: the workers share the cores already.
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")}


class WorkerError(RuntimeError):
    """Workers fail again and again; the message says how."""


class WorkerLost(Exception):
    """A worker process died or hangs. Handled inside the vector env."""


class Worker:
    """The parent's end of one worker process. The process starts on first use, and again after it was lost."""

    def __init__(self, card: EnvCard, world: bytes, envs: range, num_envs: int, memory: int, timeout: float):
        self.card, self.world, self.envs, self.num_envs, self.memory, self.timeout = card, world, envs, num_envs, memory, timeout
        self.process: subprocess.Popen | None = None
        self.channel: Channel | None = None
        self.facts: Facts | None = None  # None until the process has built its simulations
        self.broken: set[int] = set()  # envs whose simulation raised; the next reset builds it anew
        self.deadline = 0.0
        self.lost = ""  # why the last message could not be sent

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", worker.BOOTSTRAP, str(theirs.fileno()), json.dumps(list(map(str, sys.path)))],
                pass_fds=(theirs.fileno(), self.memory),
                stdin=subprocess.DEVNULL,  # some simulators ask questions; nobody could answer
                env={**os.environ, **ONE_THREAD},
                process_group=0,  # Ctrl-C goes to the parent alone, which then ends the workers
            )
        self.channel, self.facts, self.lost = Channel(ours), None, ""
        self.broken.clear()
        self.deadline = time.monotonic() + max(self.timeout, BUILDING) * len(self.envs)
        main = worker.main_module() if b"__main__" in self.world else None
        self._send(Setup(os.getpid(), self.memory, self.num_envs, self.envs, main, self.world))

    def post(self, slab: int, jobs: Mapping[int, Job]) -> None:
        self.lost = ""
        if self.process is None:
            self.start()
        # a process that is still building its simulations needs that time on top
        self.deadline = max(self.deadline, time.monotonic()) if self.facts is None else time.monotonic()
        rebuilt = {env for env in self.broken if env in jobs and jobs[env].kind == "reset"}
        self.broken -= rebuilt
        self.deadline += self.timeout * len(jobs) + BUILDING * len(rebuilt)
        self._send((slab, jobs))

    def _send(self, message: Any) -> None:
        self.channel.socket.settimeout(self.timeout)
        try:
            self.channel.send(message)
        except OSError as error:
            self.lost = str(error)  # told when the answer is asked for

    def ready(self) -> Facts | Failure:
        """Wait until the simulations are built."""
        if self.facts is None:
            answer = self._receive()
            if isinstance(answer, Failure):
                self.kill()
                return answer
            self.facts = answer
        return self.facts

    def answer(self, jobs: Mapping[int, Job]) -> dict[int, Reply]:
        """Wait for the replies to the jobs posted."""
        ready = self.ready()
        if isinstance(ready, Failure):
            return {env: Reply(failure=ready) for env in jobs}
        replies = self._receive()
        self.broken |= {env for env, reply in replies.items() if reply.failure is not None}
        return replies

    def _receive(self) -> Any:
        while not self.lost:
            # An answer that is there counts even if it is fetched late, after the deadline of another worker was waited for
            remaining = self.deadline - time.monotonic()
            try:
                self.channel.socket.settimeout(min(1.0, max(remaining, 0.001)))
                return self.channel.receive()
            except TimeoutError:
                if self.process.poll() is not None:  # a dead process whose own children hold the socket open gives no end of file
                    self.lost = "it died"
                elif remaining <= 0:
                    self.kill()
                    self.lost = f"it gave no answer in time (timeout={self.timeout:g} seconds per env) and was killed"
            except (EOFError, OSError):
                self.lost = "it died"
        if self.process is not None:
            status = _wait(self.process, 1.0)  # its socket may close a moment before its exit status is known
            self.kill()
            if status is not None and status < 0:
                self.lost = f"it was killed by {signal.Signals(-status).name}" + (" (out of memory?)" if status == -signal.SIGKILL else "")
            elif status is not None:
                self.lost = f"it exited with status {status}"
        raise WorkerLost(self.lost)

    def hang_up(self) -> None:
        """Ask the process to close its simulations and leave."""
        if self.channel is not None:
            self.channel.socket.close()

    def kill(self, grace: float = 0.0) -> None:
        """End the process, and whatever it started, after `grace` seconds at the latest."""
        self.hang_up()
        if self.process is not None:
            _wait(self.process, grace)
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            _wait(self.process, GRACE)  # a process that is stuck in a driver ends when the driver lets it
        self.process = self.channel = self.facts = None


class InProcess:
    """A worker without a process: the simulations of `workers=0`, stepped where they are asked for. What `Worker` does, at once."""

    def __init__(self, card: EnvCard, world: bytes, envs: range, num_envs: int, memory: int, timeout: float):
        self.world, self.envs, self.num_envs, self.memory = world, envs, num_envs, memory
        self.facts: Facts | None = None
        self.residents: dict[int, Resident] = {}
        self.slabs: dict[int, dict[int, dict[str, np.ndarray]]] = {}
        self.replies: dict[int, Reply] = {}

    def start(self) -> None:
        card, options, max_steps = pickle.loads(self.world)
        self.residents = {env: Resident(card, options, max_steps) for env in self.envs}
        self.facts = Facts.of(self.residents[self.envs[0]].episode)

    def ready(self) -> Facts:
        return self.facts

    def post(self, slab: int, jobs: Mapping[int, Job]) -> None:
        if not self.residents:
            self.start()
        if slab not in self.slabs:
            self.slabs[slab] = places(self.facts.interface, self.num_envs, mmap.mmap(self.memory, 0), slab, self.envs)
        self.replies = {env: self.residents[env].do(job, self.slabs[slab][env]) for env, job in jobs.items()}

    def answer(self, jobs: Mapping[int, Job]) -> dict[int, Reply]:
        return self.replies

    def hang_up(self) -> None:
        pass

    def kill(self, grace: float = 0.0) -> None:
        for resident in self.residents.values():
            resident.close()
        self.residents = {}


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit status, or None if the process has not ended by then."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def shut_down(workers: Sequence[Worker | InProcess], memory: int, owner: int) -> None:
    """End all workers and free the shared memory's descriptor. Runs on close, on garbage collection and at the end of the program."""
    if os.getpid() != owner:  # a fork of the parent; the workers are not its own
        return
    for one in workers:
        one.hang_up()
    deadline = time.monotonic() + GRACE
    for one in workers:
        one.kill(max(0.0, deadline - time.monotonic()))
    os.close(memory)


@dataclass
class Exchange:
    """Jobs under way, which rows of the batch they concern, and where their observations go."""

    rows: range
    jobs: dict[int, Job]
    count: int = 0  # N of the chunk
    clipped: Mapping[int, int] = field(default_factory=dict)
    aborted: dict[int, str] = field(default_factory=dict)  # env -> why
    slab: int = -1  # chosen when it begins


class BaseVectorEnv(gymnasium.vector.VectorEnv):
    """What every vector env of vlahub does alike: checked arguments, slots, seeds, spaces. A natively batched family starts from this class.

    It calls `_set_up` first and `_describe` once it knows its world, and sets `_started` in its first reset.
    """

    def _set_up(self, num_envs: int, slots: int, render_mode: str | None, autoreset_mode: AutoresetMode | str) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
        for name, value in (("num_envs", num_envs), ("slots", slots)):
            _whole(name, value)
        if slots > num_envs:
            raise ValueError(f"slots={slots} needs at least as many envs, but num_envs={num_envs}")
        self.num_envs, self.slots, self.render_mode = int(num_envs), int(slots), render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self._slots = [range(part[0], part[-1] + 1) for part in np.array_split(range(num_envs), slots)]
        self._generators = [seeding.np_random()[0] for _ in range(self.num_envs)]  # per env: the seeds of unseeded resets
        self._next_seeds: list[int | None] = [None] * self.num_envs  # drawn, not yet used
        self._pending: dict[int, Any] = {}  # by slot, what `send` started
        self._started = False  # has any env been reset?

    def _describe(self, world: Facts | Simulation) -> None:
        self.interface, self.max_steps, self.tasks, self.trials, self.assets = world.interface, world.max_steps, world.tasks, world.trials, world.assets
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": round(self.interface.control_hz or 20),
            "autoreset_mode": self.autoreset_mode,
        }
        self.single_observation_space = space_of(self.interface)
        self.single_action_space = self.interface.action_space()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def slot_envs(self, slot: int) -> range:
        """The envs of a slot."""
        if isinstance(slot, bool) or not isinstance(slot, (int, np.integer)) or not 0 <= slot < len(self._slots):
            raise ValueError(f"slot must be a whole number from 0 to {len(self._slots) - 1}, not {slot!r}; the number of slots is an argument of the env")
        return self._slots[slot]

    def _idle(self, slot: int | None, where: str) -> range:
        """The envs of a slot, or all; none of them may be under way."""
        if self.closed:
            raise gymnasium.error.ClosedEnvironmentError(f"{where}() after close(): make a new environment")
        rows = range(self.num_envs) if slot is None else self.slot_envs(slot)
        busy = sorted(self._pending if slot is None else self._pending.keys() & {slot})
        if busy:
            raise gymnasium.error.AlreadyPendingCallError(f"{where}() while slot {busy[0]} is under way: call recv({busy[0]}) first", "send")
        return rows

    def park(self) -> None:
        """Leave the GPU's memory to others until `unpark`. Simulations in worker processes keep theirs; a family whose worlds are a model on the GPU moves it."""

    def unpark(self) -> None:
        """Be ready to run again."""

    def _checked_chunks(self, actions: Any, rows: range, where: str) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
        """Actions as `step_chunk` takes them -> per row a chunk [n, D] within bounds, and how many numbers were clipped."""
        if not self._started:
            raise gymnasium.error.ResetNeeded(f"call reset() before {where}()")
        if isinstance(actions, (list, tuple)):
            if len(actions) != len(rows):
                raise ValueError(f"{where}: {len(actions)} chunks of actions for {len(rows)} envs")
            empty = np.zeros((0, *self.single_action_space.shape), np.float32), np.int64(0)
            checked = [
                empty if chunk is None or np.size(chunk) == 0 else checked_actions(chunk, self.single_action_space, (), f"{where}, env {env}")
                for env, chunk in zip(rows, actions, strict=True)
            ]
            return [chunk for chunk, _ in checked], [count for _, count in checked]
        return checked_actions(actions, self.single_action_space, (len(rows),), where)

    def _seeds(self, seed: Any, rows: range) -> list[int | None]:
        if seed is None:
            return [None] * len(rows)
        if isinstance(seed, (list, tuple, np.ndarray)):
            if len(seed) != len(rows):
                raise ValueError(f"seed has {len(seed)} entries for {len(rows)} envs")
            return [None if one is None else checked_seed(one) for one in seed]
        return [checked_seed(checked_seed(seed) + env) for env in rows]

    def _seed(self, env: int, seed: int | None = None) -> int:
        """The seed of the env's next episode: the one given, which restarts its generator, or one that the generator draws."""
        drawn, self._next_seeds[env] = self._next_seeds[env], None
        if seed is not None:
            self._generators[env] = seeding.np_random(seed)[0]
            return seed
        return int(self._generators[env].integers(2**31)) if drawn is None else drawn


class VectorEnv(BaseVectorEnv):
    """Copies of one environment in worker processes. `gym.make_vec("vlahub/...")` returns this class.

    Beyond Gymnasium's methods:

    - `step_chunk` runs N actions per env and looks once; `send` and `recv` do the same for one half of the envs while the policy is busy with the other.
    - `reset(options=...)` takes `reset_mask`, and every other option either for all envs or as a list of one value per env.
    - `expert_actions` asks the scripted experts, which live beside the simulations; `step_chunk(..., record=...)` brings back frames.

    An episode is lost if its worker process dies, if it gives no answer in time, or if its simulation raises. Then `truncated` stands at the first step of
    the chunk with length 0, `info["aborted"]` is True and `info["abort_reason"]` says why. Such an episode is neither a success nor a failure. The next
    reset brings the env back; envs in other workers notice nothing. Whatever is raised about a reset (an unknown option, a task out of range) is the
    user's to see and is raised here as it was there. An env without an episode (never reset, or lost) shows zeros and an empty instruction.

    Args:
        card: the environment, or its id.
        num_envs: size B of the batch.
        render_mode: None or "rgb_array" (what `render` returns).
        max_steps: control steps per episode; the simulation's own limit by default.
        workers: processes; at most one per env. By default as many as there are cores, for every slot. A worker with several envs steps them in turn, and
            if it is lost, so are all its episodes: give `workers=num_envs` to simulations that are likely to crash. 0 steps all envs in the calling
            process, the default for cards that say `cheap`: a step of microseconds is not worth a message, but a crash or a hang is then the caller's.
        slots: equal parts that `send` and `recv` treat apart; 2 lets a policy infer on one half while the other half simulates.
        timeout: seconds that a worker may take to reset or run one env; after that it counts as hung and is replaced. Building takes longer and has ten
            minutes.
        autoreset_mode: Gymnasium's; in `step_chunk` a finished env runs nothing until it is reset, and no mode runs past an episode's end.
        options: of the simulation.
    """

    def __init__(
        self,
        card: EnvCard | str,
        num_envs: int = 1,
        *,
        render_mode: str | None = None,
        max_steps: int | None = None,
        workers: int | None = None,
        slots: int = 1,
        timeout: float = 300.0,
        autoreset_mode: AutoresetMode | str = AutoresetMode.DISABLED,
        **options: Any,
    ):
        self.closed = True  # until there is something to close
        if worker.serving:
            raise RuntimeError(
                "a worker process has to import your script, because the environment is defined in it, and the script makes a vector env when imported: "
                "put that part under `if __name__ == '__main__':`, or the environment into a module of its own"
            )
        self.card = catalog.env_card(card) if isinstance(card, str) else card
        self._set_up(num_envs, slots, render_mode, autoreset_mode)
        if workers is None and self.card.cheap:
            workers = 0
        if workers:
            _whole("workers", workers)
        if workers and workers < slots:
            raise ValueError(f"workers={workers} is too few for slots={slots}: a worker serves one slot")
        if timeout <= 0:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
        count = slots if workers == 0 else workers or cores() * slots
        shares = [len(part) for part in np.array_split(range(count), slots)]  # workers of each slot
        groups = [np.array_split(rows, min(share, len(rows))) for rows, share in zip(self._slots, shares, strict=True)]
        world = pickle.dumps((self.card, options, max_steps))
        if b"__main__" in world and worker.main_module() is None:
            raise ValueError(f"{self.card.id} is defined in a notebook or an interactive session: put it into a .py file that worker processes can import")
        memory = _anonymous_file()
        kind = InProcess if workers == 0 else Worker
        self._workers = [
            kind(self.card, world, range(part[0], part[-1] + 1), self.num_envs, memory, float(timeout)) for group in groups for part in map(list, group)
        ]
        self._finalizer = weakref.finalize(self, shut_down, self._workers, memory, os.getpid())
        try:
            facts = self._build()
        except BaseException:
            self._finalizer()
            raise
        self._describe(facts)
        self._layout = Layout(self.interface, self.num_envs)
        slabs = SLABS_PER_SLOT * slots
        os.ftruncate(memory, slabs * self._layout.size)
        self._memory = mmap.mmap(memory, slabs * self._layout.size)
        self._free = list(range(slabs))

        self._over = np.ones(self.num_envs, bool)  # no episode runs
        self._shown = np.zeros(self.num_envs, bool)  # the worker has an observation
        self._lost: dict[int, str] = {}  # episodes lost outside a chunk, to be reported by the next one
        self._failures = np.zeros(self.num_envs, int)  # in a row
        self.closed = False

    def _build(self) -> Facts:
        """Start all processes at once and wait for their simulations."""
        for one in self._workers:
            one.start()
        for one in self._workers:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    facts = one.ready()
                    break
                except WorkerLost as lost:
                    if attempt == ATTEMPTS:
                        raise WorkerError(f"{self.card.id}: a worker failed {ATTEMPTS} times to build its simulation; the last time {lost}") from None
                    one.start()
            if isinstance(facts, Failure):
                raise facts.exception()
        if any(one.facts != self._workers[0].facts for one in self._workers):
            raise RuntimeError(f"{self.card.id} is not the same in every process: {[one.facts for one in self._workers]}")
        return facts

    # Gymnasium's methods

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None, slot: int | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start episodes.

        Args:
            seed: an int s gives env i the seed s + i; a list gives each its own, None for a drawn one. Without a seed, every env draws from the generator
                that its own last seed started. info["seed"] says which seeds were used.
            options: `reset_mask`, bool [B], resets some envs only. Every other option goes to the simulations: a list, tuple or array has one value per env
                (None: this env goes without the option), anything else is for all.
            slot: reset within this slot only (masks, lists and the observation are of its size); the other slots may be under way.
        """
        rows = self._idle(slot, "reset")
        options = dict(options or {})
        mask = checked_mask(options.pop("reset_mask", True), len(rows), "options['reset_mask']")
        if not mask.any():
            raise ValueError("options['reset_mask'] selects no env")
        seeds = self._seeds(seed, rows)
        each = per_env(options, len(rows))
        if isinstance(seed, (int, np.integer)):
            super().reset(seed=int(seed))
        jobs: dict[int, Job] = {}
        for row, env in enumerate(rows):
            if mask[row]:
                jobs[env] = Job("reset", seed=self._seed(env, seeds[row]), options=each[row])
            elif self._shown[env]:
                jobs[env] = Job("repeat")
        exchange = self._begin(Exchange(rows, jobs))
        replies = self._gather(exchange)
        infos = {row: replies[env].info for row, env in enumerate(rows) if mask[row]}
        return self._observation(exchange, replies), collate(infos, len(rows))

    def step(self, actions: Any) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One action [B, D] per env. Finished envs are an error, unless the autoreset mode resets them."""
        rows = self._idle(None, "step")
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"step: actions have shape {actions.shape}, expected {self.action_space.shape}")
        if self.autoreset_mode is not AutoresetMode.NEXT_STEP and self._over.any():
            raise gymnasium.error.ResetNeeded(f"the episodes of envs {np.flatnonzero(self._over).tolist()} are over: reset them with options['reset_mask']")
        result = self._finish(self._chunk(actions[:, None], rows, "step", None, 1))
        return result.observation, result.reward[:, 0], result.terminated[:, 0], result.truncated[:, 0], result.info

    def render(self, mask: Any = None) -> tuple[np.ndarray | None, ...] | None:
        """A picture for people per env, or None where the env has no episode or is left out by `mask` [B]."""
        if self.render_mode is None:
            return None
        rows = self._idle(None, "render")
        wanted = checked_mask(True if mask is None else mask, self.num_envs, "mask") & self._shown
        return tuple(self._ask("render", [env for env in rows if wanted[env]], rows))

    def close_extras(self, **kwargs: Any) -> None:
        """End the workers. Observations that the user holds stay valid."""
        self._finalizer()

    # Chunks

    def step_chunk(self, actions: Any, record: Any = None, record_every: int = 1, look: int = 0) -> ChunkResult:
        """Run a chunk in every env and look once, at its end. An env stops where its episode ends; a finished env runs nothing (length 0).

        Args:
            actions: [B, N, D] in env units; or a list of B chunks [n, D] of different lengths, where an empty one or None leaves the env as it is.
            record: bool [B], or True: bring back info["frames"], per env a list of pictures [H, W, 3] for people.
            record_every: a picture after every so many control steps.
            look: bring back info["observations"], per env a list of what is seen after each control step that ran; for recording demonstrations. With K > 1 only after
                every K-th step and the last; the others are None.
        """
        rows = self._idle(None, "step_chunk")
        return self._finish(self._chunk(actions, rows, "step_chunk", record, record_every, look))

    def send(self, actions: Any, slot: int = 0, record: Any = None, record_every: int = 1, look: int = 0) -> None:
        """Start `step_chunk` in one slot and return at once; its envs are `slot_envs(slot)`."""
        rows = self._idle(slot, "send")
        self._pending[slot] = self._chunk(actions, rows, "send", record, record_every, look)

    def recv(self, slot: int = 0) -> ChunkResult:
        """Wait for what `send` started in this slot."""
        self.slot_envs(slot)
        if slot not in self._pending:
            raise gymnasium.error.NoAsyncCallError(f"recv({slot}) without a send to slot {slot}", "send")
        return self._finish(self._pending.pop(slot))

    def expert_actions(self, slot: int | None = None) -> list[np.ndarray | None]:
        """What each env's scripted expert does next: chunks [n, D], n differing, as `step_chunk` takes them; None where no episode runs."""
        rows = self._idle(slot, "expert_actions")
        if not self.card.expert:
            raise ValueError(f"{self.card.id} has no scripted expert")
        return self._ask("expert", [env for env in rows if not self._over[env] and env not in self._lost], rows)

    def _chunk(self, actions: Any, rows: range, where: str, record: Any, record_every: int, look: int = 0) -> Exchange:
        """Check the arguments and start the chunk."""
        chunks, clipped = self._checked_chunks(actions, rows, where)
        recorded = checked_mask(False if record is None else record, len(rows), "record")
        if record_every < 1:
            raise ValueError(f"record_every must be at least 1, not {record_every}")

        jobs: dict[int, Job] = {}
        aborted = {env: self._lost.pop(env) for env in rows if env in self._lost}
        for env in aborted:
            self._over[env] = True
        for row, env in enumerate(rows):
            if env in aborted:
                if self.autoreset_mode is AutoresetMode.SAME_STEP:
                    jobs[env] = Job("reset", seed=self._seed(env))
            elif self._over[env] and self.autoreset_mode is AutoresetMode.NEXT_STEP:
                jobs[env] = Job("reset", seed=self._seed(env))
            elif not self._over[env] and len(chunks[row]):
                next_seed = None
                if self.autoreset_mode is AutoresetMode.SAME_STEP:
                    next_seed = self._next_seeds[env] = self._seed(env)  # spent if the episode ends
                jobs[env] = Job("run", actions=chunks[row].tobytes(), next_seed=next_seed, record_every=record_every if recorded[row] else 0, look=look)
            elif self._shown[env]:
                jobs[env] = Job("repeat")
        clips = {env: int(clipped[row]) for row, env in enumerate(rows) if clipped[row]}
        return self._begin(Exchange(rows, jobs, max(map(len, chunks)), clips, aborted))

    def _finish(self, exchange: Exchange) -> ChunkResult:
        """Wait for a chunk and make its result."""
        replies = self._gather(exchange)
        shape = len(exchange.rows), max(exchange.count, 1)  # 1: an abort needs a place for its flag
        reward, length = np.zeros(shape, np.float32), np.zeros(shape[0], np.int64)
        terminated, truncated = np.zeros(shape, bool), np.zeros(shape, bool)
        infos: dict[int, dict[str, Any]] = {}
        for row, env in enumerate(exchange.rows):
            reply = replies.get(env, Reply())
            infos[row] = {**(reply.info or {}), "aborted": env in exchange.aborted}
            if env in exchange.aborted:
                truncated[row, 0] = True
                infos[row]["abort_reason"] = exchange.aborted[env]
                if self.autoreset_mode is AutoresetMode.SAME_STEP:
                    infos[row].update(final_obs=self._nothing(), final_info={"aborted": True})
            elif reply.outcome is not None:
                ran = length[row] = reply.outcome.length
                reward[row, :ran] = np.frombuffer(reply.outcome.reward, np.float32)
                terminated[row, ran - 1], truncated[row, ran - 1] = reply.outcome.terminated, reply.outcome.truncated
                if reply.final is not None:
                    final_obs, final_info = reply.final
                    infos[row].update(final_obs=final_obs, final_info=final_info)
                if env in exchange.clipped:
                    infos[row]["clipped"] = exchange.clipped[env]
        return ChunkResult(self._observation(exchange, replies), reward, terminated, truncated, length, collate(infos, shape[0]))

    # Between the parent and its workers

    def _begin(self, exchange: Exchange) -> Exchange:
        exchange.slab = self._free.pop()
        self._post(exchange, exchange.jobs)
        return exchange

    def _post(self, exchange: Exchange, jobs: Mapping[int, Job]) -> None:
        try:
            for one in self._workers:
                if mine := {env: jobs[env] for env in one.envs if env in jobs}:
                    one.post(exchange.slab, mine)
        except BaseException:
            self._abandon(exchange)
            raise

    def _gather(self, exchange: Exchange) -> dict[int, Reply]:
        """Wait for all replies. Resets that a lost worker could not do are done again by its successor; other lost jobs end their episodes."""
        replies: dict[int, Reply] = {}
        errors: list[BaseException] = []
        jobs = exchange.jobs
        try:
            while jobs:
                again: dict[int, Job] = {}
                for one in self._workers:
                    mine = {env: jobs[env] for env in one.envs if env in jobs}
                    if not mine:
                        continue
                    try:
                        answers = one.answer(mine)
                    except WorkerLost as lost:
                        reason = f"the worker process of envs {one.envs.start}-{one.envs.stop - 1} was lost: {lost}"
                        self._forget(one.envs, reason, except_for=mine)
                        answers = {env: Reply(lost=reason) for env in mine}
                    for env, reply in answers.items():
                        retry = self._settle(env, mine[env], reply, exchange, errors)
                        if retry is not None:
                            again[env] = retry
                        elif reply.failure is None and reply.lost is None:
                            replies[env] = reply
                self._post(exchange, again)
                jobs = again
        except BaseException:
            self._abandon(exchange)
            raise
        if errors:
            self._free.append(exchange.slab)
            for other in errors[1:]:
                errors[0].add_note(f"and in another env: {other}")
            raise errors[0]
        for env, reason in exchange.aborted.items():
            warnings.warn(f"the episode of env {env} is aborted: {reason}", RuntimeWarning, stacklevel=4)
        return replies

    def _settle(self, env: int, job: Job, reply: Reply, exchange: Exchange, errors: list[BaseException]) -> Job | None:
        """Book one reply. Returns a job to be done next, if the env needs one."""
        reason = reply.lost or (f"its simulation raised {reply.failure.summary}" if reply.failure else None)
        if reason is None:
            if job.kind == "reset" or reply.final is not None:
                self._over[env], self._shown[env] = False, True
                self._lost.pop(env, None)
                self._started = True
                if reply.final is not None:
                    self._next_seeds[env] = None
            elif reply.outcome is not None:
                self._over[env] = reply.outcome.terminated or reply.outcome.truncated
            if reply.outcome is not None:
                self._failures[env] = 0
            return None

        if job.kind == "reset" and reply.failure is not None:
            self._over[env], self._shown[env] = True, False
            self._lost.pop(env, None)
            errors.append(reply.failure.exception())
            return None
        if job.kind in ("render", "expert") and reply.failure is not None:
            self._forget([env], reason)
            errors.append(reply.failure.exception())
            return None
        if job.kind not in ("reset", "run"):
            self._forget([env], reason)
            return None
        self._failures[env] += 1
        self._over[env], self._shown[env] = True, False
        if job.kind == "run":
            exchange.aborted[env] = reason
        if self._failures[env] >= ATTEMPTS:
            error = WorkerError(f"{self.card.id}: env {env} failed {ATTEMPTS} times in a row; the last time {reason}")
            if reply.failure is not None:
                error.add_note(f"in a worker process:\n{reply.failure.traceback}")
            self._failures[env] = 0
            errors.append(error)
            return None
        if job.kind == "reset":
            return job
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            return Job("reset", seed=self._seed(env))
        return None

    def _forget(self, envs: Sequence[int], reason: str, except_for: Mapping[int, Any] | None = None) -> None:
        """The worlds of these envs are gone. Episodes that were running are reported as aborted by the next chunk."""
        for env in envs:
            if env in (except_for or {}):
                continue
            if not self._over[env]:
                self._lost[env] = reason
            self._shown[env] = False

    def _abandon(self, exchange: Exchange) -> None:
        """An exchange was interrupted (Ctrl-C in a notebook): its replies must not be taken for those of a later one, so its workers start afresh."""
        for one in self._workers:
            if any(env in exchange.jobs for env in one.envs):
                one.kill()
                self._forget(one.envs, "the call was interrupted")
        self._free.append(exchange.slab)

    def _ask(self, kind: Any, envs: Sequence[int], rows: range) -> list[Any]:
        """Jobs that write no observation; their values, None for other rows."""
        exchange = self._begin(Exchange(rows, {env: Job(kind) for env in envs}))
        replies = self._gather(exchange)
        self._free.append(exchange.slab)
        return [replies[env].value if env in replies else None for env in rows]

    def _observation(self, exchange: Exchange, replies: Mapping[int, Reply]) -> Observation:
        """The rows of the exchange's slab, lent to the user for as long as any array looks into it."""
        lease = (ctypes.c_char * self._layout.size).from_buffer(self._memory, exchange.slab * self._layout.size)
        observation: Observation = {key: array[exchange.rows.start : exchange.rows.stop] for key, array in self._layout.arrays(lease).items()}
        instructions = [replies[env].instruction if env in replies else None for env in exchange.rows]
        for row, instruction in enumerate(instructions):
            if instruction is None:
                for array in observation.values():
                    array[row] = 0
        if len(self._free) < len(self._slots) - len(self._pending):  # every slot that is not under way must find a slab
            observation = {key: array.copy() for key, array in observation.items()}
            self._free.append(exchange.slab)
        else:
            weakref.finalize(lease, self._free.append, exchange.slab).atexit = False
        return {**observation, "task_descriptions": [instruction or "" for instruction in instructions]}

    def _nothing(self) -> Observation:
        """The observation of an env without an episode."""
        zeros = {key: np.zeros(shape[1:], dtype) for key, dtype, shape, *_ in self._layout.blocks}
        return {**zeros, "task_descriptions": ""}

    # Seeds

    def __reduce__(self) -> Any:
        raise TypeError("a vector env owns processes and cannot be copied or pickled: make it where it is used")


def make(env_id: str, num_envs: int = 1, max_episode_steps: int | None = None, **options: Any) -> gymnasium.vector.VectorEnv:
    """Vector entry point of every id in Gymnasium's registry. Natively batched families bring a class of their own, called with the same arguments."""
    card = catalog.env_card(env_id)
    if max_episode_steps is not None:
        options["max_steps"] = max_episode_steps  # Gymnasium's name for it
    return catalog.load(card.vector)(card, num_envs=num_envs, **options)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _anonymous_file() -> int:
    """A file without a name, to be mapped by several processes."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("vlahub")
    with tempfile.TemporaryFile() as file:  # where there is no memfd (macOS)
        return os.dup(file.fileno())


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def checked_mask(mask: Any, count: int, name: str) -> np.ndarray:
    """bool [count] of a mask or of one bool for all."""
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"{name} must be an array of bool, not of {mask.dtype}")
    if mask.shape not in ((), (count,)):
        raise ValueError(f"{name} has shape {mask.shape}, expected ({count},)")
    return np.broadcast_to(mask, count)


def per_env(options: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Reset options -> those of each env."""
    each: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in options.items():
        if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value) > 0:
            if len(value) != count:
                raise ValueError(f"options[{name!r}] has {len(value)} values for {count} envs; give one value for all, or one per env")
            values = [one.item() if isinstance(one, np.generic) else one for one in value]
        else:
            values = [value] * count
        for one, its_value in zip(each, values, strict=True):
            if its_value is not None:
                one[name] = its_value
    return each


def collate(infos: Mapping[int, Mapping[str, Any]], count: int) -> dict[str, Any]:
    """Infos of single envs -> Gymnasium's form for vectors: per key an array over the envs, and under `_key` the mask of those that have it."""
    batch: dict[str, Any] = {}
    for key in dict.fromkeys(key for info in infos.values() for key in info):
        values = {row: info[key] for row, info in infos.items() if key in info}
        mask = np.zeros(count, bool)
        mask[list(values)] = True
        batch[key], batch[f"_{key}"] = _column(values, count, key), mask
    return batch


def _column(values: Mapping[int, Any], count: int, key: str) -> Any:
    some = list(values.values())
    kinds = set(map(type, some))
    if len(kinds) == 1 and kinds <= {bool, int, float} and len(some) == count:  # the usual case, quickly
        return np.array(some)
    if key != "final_obs" and all(issubclass(kind, Mapping) for kind in kinds):  # Gymnasium keeps final_obs as one dict per env
        return collate(values, count)
    if all(issubclass(kind, (bool, int, float, np.number, np.bool_, np.ndarray)) for kind in kinds) and len(set(map(np.shape, some))) == 1:
        stacked = np.stack([np.asarray(value) for value in some])
        column = np.zeros((count, *stacked.shape[1:]), stacked.dtype)
        column[list(values)] = stacked
        return column
    column = np.full(count, None, object)
    for row, value in values.items():
        column[row] = value
    return column
