"""Training checkpoints: written whole or not at all, resumable to the bit, readable by `Policy.from_pretrained`.

    path = checkpoint.save(folder, step, policy, optimizer, scheduler, counters={"env_seed": 4096})
    path = checkpoint.latest(folder)                                # None if there is none
    counters = checkpoint.load(path, policy, optimizer, scheduler)
    policy = vlahub.Policy.from_pretrained(path / "policy")         # inference, anywhere

A checkpoint is a folder `step-000000120`: `policy/` (what `save_pretrained` writes), `training.pt` (optimizer and scheduler), `rng.pt` (the random states of
every rank) and `checkpoint.json` (step, counters). It is written under a hidden name and renamed when complete, so a process killed while saving leaves
all earlier checkpoints as they were. Both functions are collectives: under torchrun every rank calls them; sharded parameters are gathered and spread again.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlahub import distributed, hub
from vlahub.hub import CheckpointError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from vlahub.policy import Policy

RECORD = "checkpoint.json"
VERSION = 1  # of this layout


def save(
    folder: str | Path,
    step: int,
    policy: Policy,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    counters: Mapping[str, Any] | None = None,
    keep: int = 3,
    others: Mapping[str, Policy] | None = None,
) -> Path:
    """Write `folder/step-...` and delete all but the newest `keep` checkpoints.

    Args:
        counters: whatever else the run continues from (iteration, environment steps, the next environment seed), as JSON.
        others: further policies that the run carries along (a moving average); each in a folder of its name.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    folder = Path(folder)
    final = folder / f"step-{step:09d}"

    def refuse_to_overwrite() -> None:
        if (final / RECORD).exists():
            raise FileExistsError(f"{final} exists already; resume from it, or give this run a folder of its own")

    distributed.on_rank0(refuse_to_overwrite)
    tensors, optimizer_state = _gather(policy, optimizer)
    beside = {name: whole_tensors(other) for name, other in (others or {}).items()}
    states = distributed.gather([_random_state()])

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in (*folder.glob(".step-*"), final):  # of a process that was killed while it saved or deleted
            if left_over.exists():
                shutil.rmtree(left_over, ignore_errors=True)
        draft = folder / f".{final.name}.{os.getpid()}"
        draft.mkdir()
        policy.save_pretrained(draft / "policy", tensors=tensors)
        for name, other in (others or {}).items():
            other.save_pretrained(draft / name, tensors=beside[name])
        torch.save({"optimizer": optimizer_state, "scheduler": scheduler.state_dict() if scheduler else None}, draft / "training.pt")
        torch.save(states, draft / "rng.pt")
        record = {"version": VERSION, "step": step, "family": policy.family, "world": distributed.world(), "counters": dict(counters or {})}
        (draft / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        for path in draft.rglob("*"):  # on the disk before the rename is, so that a power cut finds either all of it or nothing
            _sync(path)
        draft.rename(final)
        _sync(folder)
        for old in complete(folder)[:-keep]:
            (old / RECORD).unlink()  # first, so that a deletion cut short leaves nothing that looks complete
            shutil.rmtree(old)

    distributed.on_rank0(write)
    return final


def complete(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name) and (path / RECORD).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(complete(folder)), None)


def load(
    path: str | Path, policy: Policy, optimizer: Optimizer | None = None, scheduler: LRScheduler | None = None, others: Mapping[str, Policy] | None = None
) -> dict[str, Any]:
    """Put a checkpoint into a policy (weights in place), its optimizer, its scheduler and this process's random states. Returns the counters, with `step`."""
    path = Path(path)
    if not (path / RECORD).exists():
        known = ", ".join(found.name for found in complete(path)) if path.is_dir() else ""
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {RECORD}" + (f". It holds {known}: name one of them" if known else ""))
    record = hub.read_json(path / RECORD)
    if record.get("version") != VERSION:
        raise CheckpointError(f"{path} was written in layout {record.get('version')}, this vlahub reads {VERSION}")
    if record["family"] != policy.family:
        raise CheckpointError(
            f"{path} holds a {record['family']} policy, the run trains a {policy.family} policy; start it with the policy that the checkpoint was made of"
        )
    training = hub.read_pt(path / "training.pt")
    for name, given in (("optimizer", optimizer), ("scheduler", scheduler)):
        if given is not None and training[name] is None:
            raise CheckpointError(f"{path} was saved without {name} state, so a run with one cannot continue from it")
    _spread(policy, optimizer, hub.Weights(hub.safetensors_files(path / "policy")), training["optimizer"], path)
    for name, other in (others or {}).items():
        if not (path / name).is_dir():
            raise CheckpointError(f"{path} was saved without {name}/, so a run with one cannot continue from it")
        _spread(other, None, hub.Weights(hub.safetensors_files(path / name)), None, path / name)
    if scheduler is not None:
        scheduler.load_state_dict(training["scheduler"])
    _restore_random_state(hub.read_pt(path / "rng.pt"), record["step"])
    return {**record["counters"], "step": record["step"]}


# ------------------------------------------------------------------------------------------------ weights and optimizer, whole or sharded


def whole_tensors(policy: Policy) -> dict[str, torch.Tensor]:
    """The state dict with full tensors. A collective for a sharded policy, whose tensors then lie on the CPU of rank 0 alone; the other ranks get nothing."""
    if not distributed.is_sharded(policy):
        return policy.state_dict()
    tied, tensors = hub.tied(policy), {}
    for name, tensor in policy.state_dict().items():
        if name == min(tied.get(name, [name])):  # tied parameters stand in the file once
            tensors[name] = _whole(tensor)  # one at a time: all of them may not fit beside the shards
    return tensors if distributed.rank() == 0 else {}


def _gather(policy: Policy, optimizer: Optimizer | None) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Full tensors on the CPU (with shards, on rank 0 only), and the optimizer's state by parameter name, so that it fits any number of ranks.

    torch's own get_optimizer_state_dict would take a step with a fresh optimizer to see what its state looks like, which changes the run.
    """
    tensors = whole_tensors(policy)
    if optimizer is None:
        return tensors, None
    names, record = _parameter_names(policy, optimizer), optimizer.state_dict()
    state = {names[index]: {key: _whole(value) for key, value in entry.items()} for index, entry in record["state"].items()}
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in record["param_groups"]]
    return tensors, {"state": state, "param_groups": groups}


def _spread(policy: Policy, optimizer: Optimizer | None, weights: Mapping[str, torch.Tensor], saved: Any, path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    wanted, tied = policy.state_dict(), hub.tied(policy)
    # Tied parameters stand in the file once
    state = {name: weights[found] for name in wanted if (found := next((n for n in (name, *tied.get(name, ())) if n in weights), None)) is not None}
    report = hub.KeyReport(
        missing=[name for name in wanted if name not in state],
        unexpected=[name for name in weights if name not in wanted],
        mis_shaped=[f"{name} {list(state[name].shape)} for {list(wanted[name].shape)}" for name in state if state[name].shape != wanted[name].shape],
    )
    if report.refused():
        raise CheckpointError(f"{path} does not fit {type(policy).__name__}:\n" + "\n".join(f"  - {line}" for line in report.refused()))
    if optimizer is not None:
        names, record = _parameter_names(policy, optimizer), optimizer.state_dict()
        here, there = ([{*group["params"]} for group in groups] for groups in (record["param_groups"], saved["param_groups"]))
        here = [{names[index] for index in group} for group in here]
        if here != there:
            differing = sorted(set().union(*here) ^ set().union(*there))
            raise CheckpointError(
                f"{path}: the optimizer was saved with {len(there)} groups of {', '.join(str(len(group)) for group in there)} parameters, "
                f"this one has {len(here)} of {', '.join(str(len(group)) for group in here)}"
                + (f"; {', '.join(differing[:6])} trained in one of them only" if differing else "")
            )
    set_model_state_dict(policy, state, options=StateDictOptions(full_state_dict=True))
    if optimizer is not None:
        parameters, index = dict(policy.named_parameters()), {name: i for i, name in enumerate(names)}
        entries = {index[name]: {key: _part(value, parameters[name]) for key, value in entry.items()} for name, entry in saved["state"].items()}
        groups = [{**was, "params": now["params"]} for was, now in zip(saved["param_groups"], record["param_groups"], strict=True)]
        optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _parameter_names(policy: Policy, optimizer: Optimizer) -> list[str]:
    """The optimizer's parameters by name, in its own order."""
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = sum(id(parameter) not in names for parameter in parameters)
    if strangers:
        raise ValueError(f"the optimizer holds {strangers} parameters that are not the policy's; make it after the policy was sharded, of policy.parameters()")
    return [names[id(parameter)] for parameter in parameters]


def _whole(value: Any) -> Any:
    """A tensor on the CPU; one that is sharded is gathered, and only rank 0 keeps it."""
    if not isinstance(value, torch.Tensor):
        return value
    if not hasattr(value, "full_tensor"):
        return value.detach().cpu().clone()
    full = value.full_tensor()
    return full.detach().cpu() if distributed.rank() == 0 else None


def _part(value: Any, parameter: torch.Tensor) -> Any:
    """This rank's shard of a whole tensor that lies as a sharded parameter lies."""
    if not isinstance(value, torch.Tensor) or not hasattr(parameter, "device_mesh") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: every rank has read the whole tensor and keeps its part; nothing is sent
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


# ------------------------------------------------------------------------------------------------ random states


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,  # of the rank's own GPU
    }


def _restore_random_state(states: list[dict[str, Any]], step: int) -> None:
    rank = distributed.rank()
    if distributed.world() != len(states):
        distributed.print0(f"the checkpoint was saved by {len(states)} ranks, this run has {distributed.world()}: it continues, but not to the bit")
    if rank >= len(states):
        distributed.seed_everything(step, rank)
        return
    state = states[rank]
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
