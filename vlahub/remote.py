"""Environments that live on other ranks: env ranks simulate, policy ranks infer and train.

    torchrun --standalone --nproc-per-node 8 baselines/ppo.py --env-ranks 0-3 --policy-ranks 4-7 ...

A policy rank holds a `RemoteEnv` where it would otherwise hold a vector env. Its calls travel to the env ranks that simulate for it, are made there on an
ordinary vector env, and what they return travels back. Nothing else knows of it: seeds, noise and trajectories belong to the policy rank's `Collector`, so
a run gives the same numbers wherever its environments live.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vlahub import distributed
from vlahub.env import ChunkResult
from vlahub.observation import Observation
from vlahub.worker import Failure

# What the other side reads of a vector env, told once
TOLD = ("card", "interface", "max_steps", "tasks", "trials", "assets", "metadata", "render_mode", "autoreset_mode", "single_action_space")


def send(message: Any, rank: int) -> None:
    """Pickle a message to another rank (as torchrun numbers them) and wait until it is taken. Ranks of one run trust each other."""
    stream = io.BytesIO()
    pickle.dump(message, stream, protocol=5)
    data = torch.frombuffer(stream.getbuffer(), dtype=torch.uint8)
    dist.send(torch.tensor([len(data)]), rank, group=distributed.roles_group())
    dist.send(data, rank, group=distributed.roles_group())


def receive(rank: int) -> Any:
    """The next message from another rank. A rank that is gone is an error, at once; one that is busy is waited for."""
    size = torch.zeros(1, dtype=torch.int64)
    try:
        dist.recv(size, rank, group=distributed.roles_group())
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, rank, group=distributed.roles_group())
    except RuntimeError as error:
        raise ConnectionError(f"rank {rank} is gone (its own message says why): {str(error).splitlines()[0]}") from error
    return pickle.loads(data.numpy())


def serve(make: Callable[[], Any], client: int) -> None:
    """Life of an env rank: make the vector env and answer the calls of a policy rank until it closes it."""
    try:
        env = make()
    except BaseException as error:
        send(Failure.of(error), client)
        raise
    try:
        send({**{name: getattr(env, name) for name in TOLD}, "slots": [len(env.slot_envs(slot)) for slot in range(env.slots)]}, client)
        failed: Failure | None = None
        while True:
            method, given, named = receive(client)
            if method == "close":
                return
            answer: Any = None
            try:
                answer = getattr(env, method)(*given, **named) if failed is None else failed
            except Exception as error:
                answer = Failure.of(error)
            if method == "send":  # has no answer: what it raises is told by the next call that has one
                failed = answer if isinstance(answer, Failure) else None
            else:
                failed = None
                send(answer, client)
    finally:
        env.close()


class RemoteEnv:
    """The environments of one or more env ranks, with the attributes and methods of `vlahub.vector.VectorEnv` that `Collector` and `evaluate` use.

    Each slot of each env rank is a slot here: while one of them is waited for, the others simulate.
    """

    def __init__(self, ranks: Sequence[int]):
        self.ranks = tuple(ranks)
        self._pending: set[int] = set()  # slots under way
        facts = [self._answer(rank) for rank in self.ranks]
        for name in TOLD:
            setattr(self, name, facts[0][name])
        sizes = [(rank, local, size) for rank, fact in zip(self.ranks, facts, strict=True) for local, size in enumerate(fact["slots"])]
        ends = np.cumsum([size for *_, size in sizes]).tolist()
        self._places = [(rank, local) for rank, local, _ in sizes]  # of each slot: the env rank, and its number there
        self._rows = [range(end - size, end) for end, (*_, size) in zip(ends, sizes, strict=True)]
        self.slots, self.num_envs = len(sizes), ends[-1]

    def slot_envs(self, slot: int) -> range:
        return self._rows[slot]

    def reset(self, *, seed: Sequence[int | None], options: Mapping[str, Any], slot: int) -> tuple[Observation, dict[str, Any]]:
        return self._call(slot, "reset", seed=seed, options=options)

    def send(self, actions: Any, slot: int = 0, **named: Any) -> None:
        rank, local = self._places[slot]
        send(("send", (actions, local), named), rank)
        self._pending.add(slot)

    def recv(self, slot: int = 0) -> ChunkResult:
        result = self._call(slot, "recv")
        self._pending.discard(slot)
        return result

    def expert_actions(self, slot: int) -> list[np.ndarray | None]:
        return self._call(slot, "expert_actions")

    def render(self, mask: np.ndarray) -> tuple[np.ndarray | None, ...]:
        pictures: list[np.ndarray | None] = []
        for rank in self.ranks:
            mine = np.concatenate([mask[rows.start : rows.stop] for (host, _), rows in zip(self._places, self._rows, strict=True) if host == rank])
            if mine.any():
                send(("render", (), {"mask": mine}), rank)
            pictures += self._answer(rank) if mine.any() else [None] * len(mine)
        return tuple(pictures)

    def park(self) -> None:
        """Nothing: this rank's GPU holds none of it."""

    unpark = park

    def close(self) -> None:
        """Let the env ranks go. Not in the middle of a chunk, which is where an error leaves off: they then end with this rank."""
        for rank in self.ranks if not self._pending else ():
            send(("close", (), {}), rank)

    def _call(self, slot: int, method: str, **named: Any) -> Any:
        rank, local = self._places[slot]
        send((method, (), {**named, "slot": local}), rank)
        return self._answer(rank)

    def _answer(self, rank: int) -> Any:
        answer = receive(rank)
        if isinstance(answer, Failure):
            error = answer.exception()
            error.add_note(f"on env rank {rank}")
            raise error
        return answer
