"""Ranks with one role each: env ranks simulate, rollout ranks infer, policy ranks train (and infer, where there are no rollout ranks).

    torchrun --standalone --nproc-per-node 8 baselines/ppo.py --env-ranks 0-3 --policy-ranks 4-7 ...
    torchrun --standalone --nproc-per-node 8 baselines/ppo.py --env-ranks 0-3 --rollout-ranks 4-5 --policy-ranks 6-7 ...

Whoever infers holds a `RemoteEnv` where it would otherwise hold a vector env. Its calls travel to the env ranks that simulate for it, are made there on an
ordinary vector env, and what they return travels back. Likewise a policy rank with rollout ranks holds a `RemoteCollector`, whose calls are made on the
`Collector` of each of them; before, they are given the weights. Seeds and their cursor belong to the policy rank, so a run gives the same numbers wherever
its environments and its inference live.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vlahub import distributed
from vlahub.env import ChunkResult
from vlahub.evaluation import Results, evaluate
from vlahub.observation import Observation
from vlahub.policy import Policy
from vlahub.rollout import Collector, Film, Rollout, SeedStream, joined
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


def answer_of(rank: int) -> Any:
    """What a rank answers; its error, if it is one."""
    answer = receive(rank)
    if isinstance(answer, Failure):
        error = answer.exception()
        error.add_note(f"on rank {rank}")
        raise error
    return answer


# ------------------------------------------------------------------------------------------------ environments on other ranks


def serve_env(make: Callable[[], Any], client: int) -> None:
    """Life of an env rank: make the vector env and answer the calls of the rank that infers until it closes it."""
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
        facts = [answer_of(rank) for rank in self.ranks]
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
            pictures += answer_of(rank) if mine.any() else [None] * len(mine)
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
        return answer_of(rank)


# ------------------------------------------------------------------------------------------------ inference on other ranks


def serve_rollouts(make: Callable[[], Collector], clients: Sequence[int]) -> None:
    """Life of a rollout rank: make a collector with its environments and its copy of the policy, and collect for policy ranks until the first of them ends it.

    The first also says when weights come and when to evaluate. Where there are several, each gets its own consecutive environments of every rollout."""
    try:
        collector = make()
    except BaseException as error:
        for client in clients:
            send(Failure.of(error), client)
        raise
    env, policy = collector.env, collector.policy
    each = env.num_envs // len(clients)
    parts = [range(i * each, (i + 1) * each) for i in range(len(clients))]
    with closing(env):
        for client in clients:
            send({**{name: getattr(env, name) for name in TOLD}, "num_envs": each, "leads": client == clients[0]}, client)
        while True:
            method, given = receive(clients[0])
            if method == "close":
                return
            if method == "weights":
                distributed.broadcast_to_rollout_ranks(policy)
            elif method == "evaluate":
                try:
                    send(evaluate(env, policy, **given), clients[0])
                except Exception as error:
                    send(Failure.of(error), clients[0])
            else:
                requests = [given, *(receive(client)[1] for client in clients[1:])]
                answers: list[Any]
                try:
                    rollout = _collect(collector, requests)
                    counts = [collector.seeds.count[part.start : part.stop] for part in parts]
                    answers = [(rollout.of(part).to("cpu"), count, collector.film) for part, count in zip(parts, counts, strict=True)]
                except Exception as error:
                    answers = [Failure.of(error)] * len(clients)
                for client, answer in zip(clients, answers, strict=True):
                    send(answer, client)


def _collect(collector: Collector, requests: Sequence[Mapping[str, Any]]) -> Rollout:
    """One rollout for what all policy ranks of this rollout rank ask."""
    collector.seeds.count = [count for request in requests for count in request["counts"]]
    collector.film = requests[0]["film"]
    if requests[0]["restart"]:
        collector.restart()
    if requests[0]["chunks"] is not None:
        return collector.steady(requests[0]["chunks"])
    return collector.episodes(np.concatenate([request["seeds"] for request in requests]))


class RolloutRanks:
    """The ranks that infer for a policy rank, and through them their environments: what a policy rank reads of a vector env, weights, evaluation."""

    def __init__(self, ranks: Sequence[int]):
        self.ranks = tuple(ranks)
        facts = [answer_of(rank) for rank in self.ranks]
        for name in TOLD:
            setattr(self, name, facts[0][name])
        self.num_envs = sum(fact["num_envs"] for fact in facts)
        self.leads = facts[0]["leads"]  # of several policy ranks that share a rollout rank, one speaks for all

    def give_weights(self, policy: Policy) -> None:
        """Policy rank 0's weights to all rollout ranks. Every policy rank calls it, while it holds all of them (`distributed.whole`)."""
        self._tell("weights")
        if distributed.rank() == 0:
            distributed.broadcast_to_rollout_ranks(policy)

    def evaluate(self, **named: Any) -> Results:
        """`vlahub.evaluation.evaluate` on the first rollout rank, in its environments; its files lie where that rank runs."""
        send(("evaluate", named), self.ranks[0])
        return answer_of(self.ranks[0])

    def park(self) -> None:
        """Nothing: this rank's GPU holds no environment."""

    unpark = park

    def close(self) -> None:
        self._tell("close")

    def _tell(self, what: str) -> None:
        for rank in self.ranks if self.leads else ():
            send((what, None), rank)


class RemoteCollector:
    """The part of `Collector` that baselines use, where other ranks infer."""

    def __init__(self, env: RolloutRanks, policy: Policy, seeds: SeedStream):
        self.env, self.policy, self.seeds = env, policy, seeds
        self.film: Film | None = None
        self._restart = True

    def restart(self) -> None:
        self._restart = True

    def steady(self, chunks: int) -> Rollout:
        return self._collect(chunks, None)

    def episodes(self, seeds: Sequence[int]) -> Rollout:
        return self._collect(None, np.asarray(seeds))

    def _collect(self, chunks: int | None, seeds: np.ndarray | None) -> Rollout:
        each = self.env.num_envs // len(self.env.ranks)
        for i, rank in enumerate(self.env.ranks):
            mine = slice(i * each, (i + 1) * each)
            request = {"chunks": chunks, "seeds": None if seeds is None else seeds[mine], "counts": self.seeds.count[mine], "restart": self._restart}
            send(("collect", {**request, "film": self.film if i == 0 else None}), rank)
        self._restart = False
        answers = [answer_of(rank) for rank in self.env.ranks]
        self.seeds.count = [count for _, counts, _ in answers for count in counts]
        if self.film is not None:
            self.film.__dict__.update(answers[0][2].__dict__)  # the caller holds it
        return joined([part for part, _, _ in answers]).to(self.policy.device)
