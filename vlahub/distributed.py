"""One script on one CPU, one GPU, eight GPUs or several nodes: ranks, seeds, statistics over ranks, sharding.

    python train.py                                                                         # one process
    torchrun --standalone --nproc-per-node 8 train.py                                       # one node
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py   # on each of two nodes

    ranks = distributed.setup()
    ...
    distributed.cleanup()

Every function works without torchrun as well, as if there were one rank.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands.

    With roles, rank and world count the policy ranks alone, the team that trains; the others have rank -1. All ranks below are numbered as torchrun does.
    """

    rank: int  # 0 to world - 1, over all nodes
    world: int
    local_rank: int  # on this node; chooses the GPU
    device: torch.device
    env_ranks: tuple[int, ...] = ()  # those that simulate for this one; empty: it simulates itself
    rollout_ranks: tuple[int, ...] = ()  # of a policy rank: those that infer for it; empty: it infers itself
    role: Literal["policy", "rollout", "env"] = "policy"
    serves: tuple[int, ...] = ()  # of an env or a rollout rank: whom it simulates or infers for


# The ranks that all functions below speak of: None for all, or those that infer and train while others simulate for them.
_team: dist.ProcessGroup | None = None
_groups: dict[str, dist.ProcessGroup] = {}  # further ones: "cpu", "roles", "weights", "gradients"
_first = 0  # policy rank 0, as torchrun numbers it


def setup(device: str | None = None, env_ranks: str = "", policy_ranks: str = "", rollout_ranks: str = "", timeout: float = 600.0) -> Ranks:
    """Join the other processes that torchrun started, or stand alone.

    Args:
        device: "cpu" or "cuda"; by default cuda where there is one.
        env_ranks, policy_ranks, rollout_ranks: which ranks only simulate, which train, and which infer, as "0-3" and "4-7". Without rollout_ranks the policy
            ranks infer, without env_ranks whoever infers simulates; all empty: every rank does everything.
        timeout: seconds after which a collective operation that a rank does not join is an error.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in os.environ]
    if given and "RANK" in given and len(given) < len(names):
        raise RuntimeError(f"{', '.join(name for name in names if name not in given)} not set, but {', '.join(given)} is; start the script with torchrun")
    launched = len(given) == len(names)
    rank, world, local_rank = (int(os.environ[name]) for name in names[:3]) if launched else (0, 1, 0)
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}; start as many processes as GPUs (--nproc-per-node)"
            )
        torch.cuda.set_device(local_rank)
    chosen = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if launched and not dist.is_initialized():
        # Both backends: NCCL moves what is on GPUs, gloo what is on the CPU (observations, objects)
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout), device_id=chosen if kind == "cuda" else None)
    return _split(Ranks(rank, world, local_rank, chosen), env_ranks, policy_ranks, rollout_ranks)


def _split(ranks: Ranks, env_ranks: str, policy_ranks: str, rollout_ranks: str = "") -> Ranks:
    """Give the ranks their roles. Whoever works for a role gets as large a share of it as the others, consecutive ranks."""
    global _team, _first
    texts = {"env_ranks": env_ranks, "rollout_ranks": rollout_ranks, "policy_ranks": policy_ranks}
    if not any(texts.values()):
        if ranks.world > 1:
            _groups["gradients"] = dist.new_group()
        return ranks
    if not policy_ranks or not (env_ranks or rollout_ranks):
        words = ", ".join(f"{name} ({text or 'none'})" for name, text in texts.items())
        raise ValueError(f"{words}: policy_ranks says who trains, and goes with env_ranks (who simulates), rollout_ranks (who infers) or both")
    found = {name: parse_ranks(text, ranks.world) if text else [] for name, text in texts.items()}
    envs, rollouts, policies = found.values()
    for rank in range(ranks.world):
        roles = [name for name, members in found.items() if rank in members]
        if len(roles) > 1:
            words = " and in ".join(f"{name} ({texts[name]})" for name in roles)
            raise ValueError(f"rank {rank} stands in {words}; a rank has one role, and without any every rank does everything")
        if not roles:
            words = ", ".join(f"{name} ({text})" for name, text in texts.items() if text)
            raise ValueError(f"rank {rank} stands in none of {words}; this run has ranks 0 to {ranks.world - 1}")
    asking = rollouts or policies  # whom the env ranks simulate for
    if len(envs) % len(asking):
        name = "rollout" if rollouts else "policy"
        raise ValueError(f"{len(envs)} env ranks cannot be shared evenly by {len(asking)} {name} ranks; give each {name} rank as many env ranks, at least one")
    if rollouts and len(rollouts) % len(policies) and len(policies) % len(rollouts):
        raise ValueError(f"{len(rollouts)} rollout ranks and {len(policies)} policy ranks do not share evenly: one number must divide the other")
    _team, _first = dist.new_group(policies), policies[0]
    _groups["gradients"] = dist.new_group(policies)
    # Observations, actions and rollouts travel by gloo. A rank waits for others as long as they work, and one that dies is noticed by its connection.
    _groups["roles"] = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    if rollouts:
        _groups["weights"] = dist.new_group([policies[0], *rollouts])
    alone = replace(ranks, rank=-1, world=len(policies))
    if ranks.rank in envs:
        return replace(alone, role="env", serves=_partners(ranks.rank, envs, asking))
    if ranks.rank in rollouts:
        return replace(alone, role="rollout", env_ranks=_partners(ranks.rank, rollouts, envs), serves=_partners(ranks.rank, rollouts, policies))
    mine = {"rollout_ranks": _partners(ranks.rank, policies, rollouts)} if rollouts else {"env_ranks": _partners(ranks.rank, policies, envs)}
    return replace(alone, rank=policies.index(ranks.rank), **mine)


def _partners(rank: int, own: list[int], others: list[int]) -> tuple[int, ...]:
    """The ranks of another role that a rank works with: its share of them, or, where they are fewer, the one that it shares with its neighbours."""
    place = own.index(rank)
    if 0 < len(others) < len(own):
        return (others[place * len(others) // len(own)],)
    return tuple(others[i] for i in share(len(others), place, len(own)))


def cleanup() -> None:
    """Leave the process group; without it NCCL warns at exit. Call it when all is well: after an error, exiting lets torchrun stop the other ranks."""
    global _team
    if dist.is_initialized():
        dist.destroy_process_group()
    _team = None
    _groups.clear()


def rank() -> int:
    return dist.get_rank(_team) if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size(_team) if dist.is_initialized() else 1


def print0(*values: Any) -> None:
    """Print on rank 0 only, at once."""
    if rank() == 0:
        print(*values, flush=True)


def barrier(what: str, seconds: float = 60.0) -> None:
    """Wait for all ranks. One that does not come within `seconds` is named in the error; `what` says what it was waited for."""
    if not dist.is_initialized():
        return
    try:
        dist.monitored_barrier(_cpu_group(), timeout=datetime.timedelta(seconds=seconds), wait_all_ranks=True)
    except RuntimeError as error:
        raise TimeoutError(f"rank {rank()} waited {seconds:g} s for the other ranks ({what}): {str(error).splitlines()[0]}") from error


def _cpu_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks: the default group if it is gloo alone, else one made at the first call, which all ranks must make together."""
    if dist.get_backend() == "gloo":
        return _team
    if "cpu" not in _groups:
        _groups["cpu"] = dist.new_group(
            None if _team is None else dist.get_process_group_ranks(_team), backend="gloo", use_local_synchronization=_team is not None
        )
    return _groups["cpu"]


def roles_group() -> dist.ProcessGroup:
    """What ranks of different roles talk through."""
    return _groups["roles"]


def on_rank0(function: Callable[[], Result]) -> Result:
    """Run a function on rank 0 and give every rank its result. An error there is raised on all ranks: nobody waits for a rank that failed."""
    if world() == 1:
        return function()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = error
    failure = answer[1]
    if failure is not None:  # an exception may not survive pickling; its words do
        answer[1] = f"{type(failure).__name__}: {failure}"
    dist.broadcast_object_list(answer, group=_team, group_src=0)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise RuntimeError(f"rank 0 failed: {answer[1]}")
    return answer[0]


# ------------------------------------------------------------------------------------------------ shares and seeds


def share(count: int, rank: int, world: int) -> range:
    """This rank's consecutive part of `count` things numbered over all ranks; parts differ by one at most.

    Seed an environment by its number over all ranks: then the same environments run whatever the number of ranks."""
    return range(rank * count // world, (rank + 1) * count // world)


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, numpy and torch. Rank 0's stream is that of the seed alone; give the same rank everywhere where all ranks must agree (fresh weights)."""
    mixed = int(np.random.SeedSequence([seed, rank] if rank else [seed]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def parse_ranks(text: str, world: int) -> list[int]:
    """ "0-3,6" -> [0, 1, 2, 3, 6]: ranks of a role, each below `world`, each once."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"ranks {text!r}: {part.strip()!r} is no rank and no range; write ranks like 0-3,6")
        span = range(int(first), int(last if dash else first) + 1)
        if not span:
            raise ValueError(f"ranks {text!r}: the range {part.strip()!r} runs backwards")
        found += span
    twice = sorted({rank for rank in found if found.count(rank) > 1})
    if twice:
        raise ValueError(f"ranks {text!r}: {', '.join(map(str, twice))} stands there twice")
    if max(found) >= world:
        raise ValueError(f"ranks {text!r}: there is no rank {max(found)}; this run has ranks 0 to {world - 1}")
    return sorted(found)


# ------------------------------------------------------------------------------------------------ numbers over all ranks


@dataclass(frozen=True)
class Statistics:
    """Of all selected entries of all ranks together."""

    mean: float
    std: float  # unbiased; 0 for a single entry
    min: float
    max: float
    count: int


def statistics(values: torch.Tensor, mask: torch.Tensor | None = None) -> Statistics:
    """Mean, unbiased standard deviation, minimum and maximum of `values` where `mask` (of the same shape) is true, over all ranks.

    A collective: every rank calls it, also one that has nothing to give. Summed in float64 and in two passes, so that the number of ranks shows only
    in the last digits.
    """
    if mask is not None and mask.shape != values.shape:
        raise ValueError(f"mask {tuple(mask.shape)} and values {tuple(values.shape)} differ in shape")
    chosen = (values if mask is None else values[mask.bool()]).detach().double()
    total = torch.stack([chosen.sum(), torch.tensor(float(chosen.numel()), dtype=torch.float64, device=chosen.device)])
    extremes = torch.full((2,), -torch.inf, dtype=torch.float64, device=chosen.device)  # of -values and values
    if chosen.numel():
        extremes = torch.stack([-chosen.min(), chosen.max()])
    if dist.is_initialized():
        dist.all_reduce(total, group=_team)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=_team)
    count = int(total[1])
    if count == 0:
        raise ValueError("there is nothing to take statistics of: no rank has an entry that the mask selects")
    mean = total[0] / count
    squares = (chosen - mean).square().sum()
    if dist.is_initialized():
        dist.all_reduce(squares, group=_team)
    std = (squares / max(count - 1, 1)).sqrt()
    return Statistics(mean.item(), std.item(), -extremes[0].item(), extremes[1].item(), count)


def average(metrics: Mapping[str, float], weight: float = 1.0) -> dict[str, float]:
    """The mean of each metric over the ranks that have it, each rank counted `weight` times (its number of episodes, say)."""
    gathered: list[Any] = [(dict(metrics), weight)]
    if dist.is_initialized():
        gathered = [None] * world()
        dist.all_gather_object(gathered, (dict(metrics), weight), group=_team)
    sums: dict[str, list[float]] = {}
    for values, share_of in gathered:
        for name, value in values.items():
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0] += share_of * float(value)
            entry[1] += share_of
    return {name: total / weights for name, (total, weights) in sums.items() if weights > 0}


def any_rank(flag: bool) -> bool:
    """True on all ranks if it is true on one: a signal, a non-finite loss."""
    if not dist.is_initialized():
        return flag
    gathered: list[Any] = [None] * world()
    dist.all_gather_object(gathered, bool(flag), group=_team)
    return any(gathered)


# ------------------------------------------------------------------------------------------------ weights over all ranks


BUCKET = 2**27  # numbers that are copied and reduced at once: few large messages, and no second copy of all gradients in memory


LARGE = 2**20  # numbers: gradients of this size are worth a reduction of their own, in place and under way while the backward pass goes on


class EarlyGradients:
    """Averages a module's large gradients while the backward pass still computes the others; `average_gradients` waits for them and does the rest.

    Set `armed` before the backward pass that completes the gradients. Ranks must reduce in one order, or they wait for each other for ever: that in which rank 0
    completed them in the first such pass. A gradient that is complete before its turn waits, one that a rank does not have takes part as zeros. They have a process
    group of their own, because other reductions come between at different places.
    """

    def __init__(self, module: nn.Module):
        self.parameters = [p for p in module.parameters() if p.requires_grad and p.numel() >= LARGE]
        self.armed = False
        # places in the list of parameters
        self._order: list[int] | None = None
        self._complete: dict[int, None] = {}  # in the order of their completion
        self._works: list[Any] = []  # one per place of the order that is under way
        for place, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(lambda _, place=place: self._on_gradient(place))

    def _on_gradient(self, place: int) -> None:
        if not self.armed:
            return
        if place in self._complete:
            raise RuntimeError("a gradient grew after it was complete: only one backward pass may follow sync_gradients(..., True)")
        self._complete[place] = None
        while self._order is not None and len(self._works) < len(self._order) and self._order[len(self._works)] in self._complete:
            self._reduce(self._order[len(self._works)])

    def _reduce(self, place: int) -> None:
        parameter = self.parameters[place]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        op = dist.ReduceOp.AVG if parameter.grad.is_cuda else dist.ReduceOp.SUM  # gloo has no average
        self._works.append(dist.all_reduce(parameter.grad, op, group=_groups["gradients"], async_op=True))

    def finish(self) -> None:
        """Reduce what is left and wait for all."""
        if self._order is None:
            first = on_rank0(lambda: list(self._complete))
            self._order = list(dict.fromkeys([*first, *range(len(self.parameters))]))
        for place in self._order[len(self._works) :]:
            self._reduce(place)
        for work, place in zip(self._works, self._order, strict=True):
            work.wait()
            gradient = self.parameters[place].grad
            if not gradient.is_cuda:
                gradient /= world()
        self.armed = False
        self._complete, self._works = {}, []


def average_gradients(parameters: Iterable[nn.Parameter], early: EarlyGradients | None = None) -> None:
    """Mean of the gradients over all ranks, in place: data parallelism for a model that every rank holds whole.

    One reduction per dtype and BUCKET over flattened gradients, but for those that `early` takes care of. A parameter without a gradient on one rank counts as zero
    there, so ranks need not agree which were used; one without a gradient on any rank stays without, as on a single rank, and the optimizer leaves it alone.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if world() == 1 or not trained:
        return
    used = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.uint8, device=trained[0].device)
    elsewhere = set() if early is None else {id(parameter) for parameter in early.parameters}
    if early is not None:
        early.finish()
    dist.all_reduce(used, dist.ReduceOp.MAX, group=_team)
    buckets: list[list[nn.Parameter]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[nn.Parameter], int]] = {}  # the bucket that is being filled, and its numbers
    for parameter, wanted in zip(trained, used.tolist(), strict=True):
        if id(parameter) in elsewhere:
            parameter.grad = parameter.grad if wanted else None
        elif wanted:
            kind = parameter.dtype, parameter.device
            bucket, size = filling.get(kind, ([], BUCKET))
            if size + parameter.numel() > BUCKET:
                bucket, size = [], 0
                buckets.append(bucket)
            bucket.append(parameter)
            filling[kind] = bucket, size + parameter.numel()
    for members in buckets:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in members])
        dist.all_reduce(flat, group=_team)
        flat /= world()
        for parameter, gradient in zip(members, flat.split([p.numel() for p in members]), strict=True):
            if parameter.grad is None:
                parameter.grad = gradient.view_as(parameter).clone()
            else:
                parameter.grad.copy_(gradient.view_as(parameter))


@torch.no_grad()
def broadcast_weights(module: nn.Module, source: int = 0) -> None:
    """Give every rank the parameters and buffers of rank `source`."""
    if world() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, group=_team, group_src=source)


@torch.no_grad()
def broadcast_to_rollout_ranks(module: nn.Module) -> None:
    """Give the rollout ranks what trains, and the buffers, as policy rank 0 holds them; call it on that rank and on the rollout ranks."""
    for tensor in (*(parameter for parameter in module.parameters() if parameter.requires_grad), *module.buffers()):
        dist.broadcast(tensor, _first, group=_groups["weights"])


def mesh(ranks: Ranks, replicas: int = 1) -> Any:
    """The device mesh of all ranks for `shard`: one dimension, or (replicas, shards) where each group of ranks, a node say, holds a whole copy."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if ranks.world % replicas:
        near = [n for n in range(1, ranks.world + 1) if ranks.world % n == 0]
        raise ValueError(f"{ranks.world} ranks cannot hold {replicas} equal replicas; possible are {', '.join(map(str, near))}")
    if _team is not None:
        if replicas > 1:
            raise ValueError("with roles the policy ranks hold one sharded copy together: replicas must be 1")
        return DeviceMesh.from_group(_team, ranks.device.type, mesh_dim_names=("shard",))
    if replicas == 1:
        return init_device_mesh(ranks.device.type, (ranks.world,), mesh_dim_names=("shard",))
    return init_device_mesh(ranks.device.type, (replicas, ranks.world // replicas), mesh_dim_names=("replicate", "shard"))


# Methods that run weights without going through forward(): those of a Policy, and of a layer whose output nobody reads
ENTRY_POINTS = ("act", "predict", "sample", "value", "evaluate", "sft_loss", "keys_values")


def shard(module: nn.Module, blocks: Sequence[nn.Module], mesh: Any, entry_points: Sequence[str] = ENTRY_POINTS) -> nn.Module:
    """Shard a module's parameters over the ranks (FSDP2), in place; they move to the mesh's device on the way.

    Weights are gathered in their own dtype, and autocast decides about computation: bfloat16 with float32 master weights then gives the same numbers as without
    shards. Gathering in bfloat16 would halve the traffic and round the norms, which the models' originals keep in float32.

    Args:
        blocks: sub-modules that are gathered and freed one at a time, the transformer layers.
        entry_points: methods besides forward() that use the weights, of the module and of blocks. They are registered at once: called without, the blocks
            would take themselves for roots, and the next real forward would fail.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Slices of outputs are views; nothing writes into them, which is what the warning is about.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)  # what comes after it is its own backward pass
    for part in (module, *blocks):
        inside: list[str] = []  # the entry point that runs
        for name in entry_points:
            if hasattr(part, name):
                plain = getattr(part, name)
                register_fsdp_forward_method(part, name)
                setattr(part, name, _outermost(plain, getattr(part, name), inside))
    return module


def _outermost(plain: Callable, gathering: Callable, inside: list[str]) -> Callable:
    """A method that gathers its module's weights, unless another such method of the module called it: at the end of the inner one they would be freed."""

    @functools.wraps(plain)
    def run(*given: Any, **named: Any) -> Any:
        if inside:
            return plain(*given, **named)
        inside.append(plain.__name__)
        try:
            return gathering(*given, **named)
        finally:
            inside.clear()

    return run


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was applied to it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # takes most of a second to import; while nobody has, nothing is sharded
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all weights of a sharded module, so a forward pass needs no other rank: in rollouts, where ranks do not ask in step, and where
    rank 0 evaluates alone. A collective at its beginning; nothing for a module that is whole anyway. No gradients inside, and no state_dict(), which shards again.
    """
    parts = [part for part in module.modules() if is_sharded(part)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not module, recurse=False)


def sync_gradients(module: nn.Module, on: bool, early: EarlyGradients | None = None) -> None:
    """Whether the next backward pass reduces gradients over the ranks: those of a sharded module, or those that `early` takes care of. Only the last of several
    that accumulate may."""
    if is_sharded(module):
        module.set_requires_gradient_sync(on)
    elif early is not None:
        early.armed = on


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients, whole or sharded, down to `max_norm` in place. Returns their norm before, over all ranks' shards; a collective if they are sharded."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shards it is a sum over ranks that is still to be made
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, element by element. A collective."""
    out = values.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(out, group=_team)
    return out


def gather(items: Sequence[Any]) -> list[Any]:
    """All ranks' items behind each other, on every rank. A collective."""
    if not dist.is_initialized():
        return list(items)
    gathered: list[Any] = [None] * world()
    dist.all_gather_object(gathered, list(items), group=_team)
    return [item for part in gathered for item in part]
