"""One worker process of the vector env: it hosts some simulations, runs what the parent asks of them, and writes what they see into shared memory.

The parent (vlahub/vector.py) starts a fresh interpreter with `BOOTSTRAP`, so that nothing of the parent's simulators, GPU contexts or threads is
inherited and the user's script needs no `if __name__ == "__main__"`. Both sides talk through one socket: the parent sends jobs, one list at a time,
and the worker answers each list with one list of replies. Images and states do not pass through it.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import pickle
import runpy
import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from gymnasium import spaces

from vlahub import catalog
from vlahub.env import Episode, own
from vlahub.interface import Interface
from vlahub.observation import Observation, space_of
from vlahub.simulation import Expert, Simulation

# Run by `python -c` with a socket's number and the parent's sys.path, which says where vlahub and the simulation are to be imported from.
BOOTSTRAP = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from vlahub.worker import serve; serve(int(sys.argv[1]))"

serving = False  # True in a worker process


class Channel:
    """Pickled messages over a socket, with one system call for each message of usual size: at small chunks these calls are what the engine costs."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self.received = bytearray()  # not yet taken

    def send(self, message: Any) -> None:
        data = pickle.dumps(message, protocol=5)
        self.socket.sendall(len(data).to_bytes(8, "little") + data)

    def receive(self) -> Any:
        """The next message. Raises EOFError if the other side is gone, TimeoutError after the socket's timeout; what has arrived by then is kept."""
        missing = 8
        while True:
            if len(self.received) >= 8:
                end = 8 + int.from_bytes(self.received[:8], "little")
                missing = end - len(self.received)
                if missing <= 0:
                    message = pickle.loads(memoryview(self.received)[8:end])
                    self.received = self.received[end:]
                    return message
            data = self.socket.recv(min(max(missing, 2**14), 2**20))
            if not data:
                raise EOFError
            self.received += data


@dataclass
class Setup:
    """What a worker is told first."""

    parent: int  # process id
    memory: int  # file descriptor of the shared memory; it has its size by the time of the first job
    num_envs: int  # of the whole batch
    envs: range  # the ones that live here
    main: tuple[Literal["module", "path"], str] | None  # the user's script, if the world below refers to things defined in it
    world: bytes  # pickled (EnvCard, options, max_steps)


@dataclass
class Facts:
    """What a worker answers to its setup."""

    interface: Interface
    max_steps: int
    tasks: int
    trials: int | None
    assets: str

    @classmethod
    def of(cls, episode: Episode) -> Facts:
        world = episode.simulation
        return cls(world.interface, episode.max_steps, world.tasks, world.trials, world.assets)


class Job(NamedTuple):
    """One request to one env."""

    kind: Literal["reset", "run", "repeat", "render", "expert"]  # repeat: write the last observation again, without drawing it anew
    seed: int = 0  # reset
    options: Mapping[str, Any] | None = None  # reset
    actions: bytes = b""  # run: float32 [n, D]; bytes, because arrays take several times as long to pickle
    next_seed: int | None = None  # run: if the episode ends, start the next one with this seed
    record_every: int = 0  # run: a frame after every so many control steps; 0: none
    look: int = 0  # run: also what is seen after every so many control steps, and after the last; 0: not


class Outcome(NamedTuple):
    """What `run` did."""

    reward: bytes  # float32 [length]
    terminated: bool  # at the last step run, ...
    truncated: bool  # ... the only one at which an episode can end
    length: int


class Reply(NamedTuple):
    """The answer to one Job; what does not apply is None. `failure` is set if the job raised."""

    instruction: str | None = None  # the text of the observation whose arrays were written
    info: dict[str, Any] | None = None
    outcome: Outcome | None = None  # run
    final: tuple[Observation, dict[str, Any]] | None = None  # run: the end of the old episode, if a next one was started
    value: Any = None  # render: a picture; expert: actions
    failure: Failure | None = None
    lost: str | None = None  # set by the parent: the process died or hung


@dataclass
class Failure:
    """An exception on its way to the parent."""

    error: bytes | None  # pickled, if it can be
    summary: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)  # an exception whose __init__ wants other arguments pickles but does not load
        except Exception:
            pickled = None
        return cls(pickled, f"{type(error).__name__}: {error}", traceback.format_exc())

    def exception(self) -> BaseException:
        """The exception of the worker, or a RuntimeError in its place, with the worker's traceback as a note."""
        error: BaseException = RuntimeError(self.summary)
        if self.error is not None:
            try:
                error = pickle.loads(self.error)
            except Exception:  # its class may exist in the worker alone; the summary says what it was
                pass
        error.add_note(f"in a worker process:\n{self.traceback}")
        return error


class Layout:
    """How a batch of observations lies in shared memory: one block per key, in `slabs` of one batch each."""

    def __init__(self, interface: Interface, num_envs: int):
        self.blocks: list[tuple[str, np.dtype, tuple[int, ...], int, int]] = []  # key, dtype, shape with the batch dimension, size, offset
        offset = 0
        for key, space in space_of(interface).items():
            if not isinstance(space, spaces.Box):
                continue  # text travels beside
            shape = (num_envs, *space.shape)
            count = int(np.prod(shape))
            self.blocks.append((key, space.dtype, shape, count, offset))
            offset += -(-count * space.dtype.itemsize // 64) * 64  # whole cache lines
        self.size = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE  # of one slab

    def arrays(self, buffer: Any, start: int = 0) -> dict[str, np.ndarray]:
        """Views [B, ...] of the slab that starts at `start` in `buffer`."""
        return {key: np.frombuffer(buffer, dtype, count, start + offset).reshape(shape) for key, dtype, shape, count, offset in self.blocks}


def places(interface: Interface, num_envs: int, memory: mmap.mmap, slab: int, envs: range) -> dict[int, dict[str, np.ndarray]]:
    """env -> key -> its place in a slab of the shared memory."""
    layout = Layout(interface, num_envs)
    arrays = layout.arrays(memory, slab * layout.size)
    return {env: {key: array[env] for key, array in arrays.items()} for env in envs}


class Resident:
    """One env of the worker: a simulation, its episode and its expert."""

    def __init__(self, card: catalog.EnvCard, options: Mapping[str, Any], max_steps: int | None):
        self.card, self.options, self.max_steps = card, options, max_steps
        self._build()

    def _build(self) -> None:
        self.simulation: Simulation = catalog.make_simulation(self.card, **self.options)
        self.episode = Episode(self.simulation, self.max_steps)
        self.expert: Expert | None = None
        self.expert_is_ready = self.broken = False
        self.seen: Observation = {}

    def do(self, job: Job, rows: dict[str, np.ndarray]) -> Reply:
        """Carry out one job. `rows` are this env's places in shared memory."""
        try:
            if job.kind == "reset":
                info = self._reset(job.seed, job.options or {})
                return Reply(self._show(rows), info)
            if job.kind == "run":
                return self._run(job, rows)
            if job.kind == "repeat":
                return Reply(self._show(rows), {"success": self.episode.succeeded, "steps": self.episode.steps})
            if job.kind == "render":
                return Reply(value=np.array(self.simulation.render()))
            return Reply(value=self._expert_actions())
        except (Exception, SystemExit) as error:  # some simulators call sys.exit
            if job.kind != "reset":
                # A simulation that raised half-way is in an unknown state. Bad reset options, on the other hand, are the user's to correct.
                self.broken = self.episode.done = True
            return Reply(failure=Failure.of(error))

    def _reset(self, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        if self.broken:
            self.close()
            self._build()
        self.expert_is_ready = False
        info = self.episode.reset(seed, options)
        self._look()
        return info

    def _run(self, job: Job, rows: dict[str, np.ndarray]) -> Reply:
        frames: list[np.ndarray] = []
        observations: list[Observation | None] = []
        steps = 0

        def watch() -> None:
            nonlocal steps
            steps += 1
            if job.record_every and steps % job.record_every == 0:
                frames.append(np.array(self.simulation.render()))
            if job.look:
                observations.append(own(self.simulation.observe()) if steps % job.look == 0 else None)

        actions = np.frombuffer(job.actions, np.float32).reshape(-1, self.simulation.interface.action_dim).copy()  # writable
        reward, terminated, truncated, length, info = self.episode.run(actions, watch if job.record_every or job.look else None)
        outcome = Outcome(reward[:length].tobytes(), bool(terminated[length - 1]), bool(truncated[length - 1]), length)
        if job.record_every:
            info["frames"] = frames
        if job.look:
            if observations[-1] is None:
                observations[-1] = own(self.simulation.observe())
            info["observations"] = observations[:length]
            self.seen = observations[-1]  # of the present moment; looking again would draw it twice
        else:
            self._look()
        final = None
        if self.episode.done and job.next_seed is not None:
            final = ({key: value if isinstance(value, str) else np.array(value) for key, value in self.seen.items()}, info)
            info = self._reset(job.next_seed, {})
        return Reply(self._show(rows), info, outcome, final)

    def _look(self) -> None:
        self.seen = self.simulation.observe()  # stays valid until the next observe, so that `repeat` needs no copy

    def _show(self, rows: dict[str, np.ndarray]) -> str:
        if missing := rows.keys() - self.seen.keys():
            raise ValueError(f"{self.card.id} gave an observation without {sorted(missing)}, which its interface declares")
        for key, value in self.seen.items():
            if key == "task_descriptions":
                continue
            row = rows.get(key)
            # compared exactly, because numpy would broadcast one picture over two cameras without a word
            if row is None or value.shape != row.shape or value.dtype != row.dtype:
                declared = "does not declare it" if row is None else f"declares {row.dtype}{list(row.shape)}"
                raise ValueError(f"{self.card.id} gave observation[{key!r}] as {value.dtype}{list(value.shape)}, but its interface {declared}")
            row[...] = value
        return str(self.seen["task_descriptions"])

    def _expert_actions(self) -> np.ndarray:
        if self.expert is None:
            self.expert = catalog.make_expert(self.card, self.simulation)
        if not self.expert_is_ready:
            self.expert.reset()
            self.expert_is_ready = True
        return np.array(self.expert.act(), np.float32)

    def close(self) -> None:
        try:
            self.simulation.close()
        except Exception:
            traceback.print_exc()  # the process is about to end, or the simulation to be replaced: worth telling, not worth failing


def serve(connection: int) -> None:
    """Life of a worker: set up, work off lists of jobs, and leave when the parent closes the socket or is gone."""
    global serving
    serving = True
    faulthandler.enable()  # a segmentation fault in a simulation then says where
    parent = Channel(socket.socket(fileno=connection))
    residents: dict[int, Resident] = {}
    try:
        setup: Setup = parent.receive()
        threading.Thread(target=_leave_with, args=(setup.parent,), daemon=True).start()
        if _build(setup, residents, parent):
            _work(setup, residents, parent)
    except (EOFError, ConnectionError):  # the parent closed the socket, or died
        pass
    for resident in residents.values():
        resident.close()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # whoever read it is gone
            pass
    os._exit(0)  # the simulations are closed; simulators' own exit handlers are known to crash


def _build(setup: Setup, residents: dict[int, Resident], parent: Channel) -> bool:
    try:
        if setup.main:
            _import_main(*setup.main)
        card, options, max_steps = pickle.loads(setup.world)
        for env in setup.envs:
            residents[env] = Resident(card, options, max_steps)
        facts = Facts.of(residents[setup.envs[0]].episode)
    except (Exception, SystemExit) as error:
        parent.send(Failure.of(error))
        return False
    parent.send(facts)
    return True


def _work(setup: Setup, residents: Mapping[int, Resident], parent: Channel) -> None:
    interface = residents[setup.envs[0]].simulation.interface
    memory: mmap.mmap | None = None
    slabs: dict[int, dict[int, dict[str, np.ndarray]]] = {}  # slab -> env -> key -> its place
    while True:
        slab, jobs = parent.receive()
        if memory is None:
            memory = mmap.mmap(setup.memory, 0)  # 0: all of it
        if slab not in slabs:
            slabs[slab] = places(interface, setup.num_envs, memory, slab, setup.envs)
        parent.send({env: residents[env].do(job, slabs[slab][env]) for env, job in jobs.items()})


def _leave_with(parent: int) -> None:
    """End this process if the parent is gone, even if a simulation is in the middle of a long step, or hangs."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main_module() -> tuple[Literal["module", "path"], str] | None:
    """How another process can import the user's script; None in a notebook or an interactive session."""
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:
        return "module", main.__spec__.name
    path = getattr(main, "__file__", None)
    return ("path", os.path.abspath(path)) if path and os.path.isfile(path) else None


def _import_main(kind: str, value: str) -> None:
    """Make the user's script importable as `__main__`, as multiprocessing does: run under another name, so that its guarded part stays asleep."""
    module = types.ModuleType("__mp_main__")
    module.__dict__.update(runpy.run_module(value, run_name="__mp_main__") if kind == "module" else runpy.run_path(value, run_name="__mp_main__"))
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
