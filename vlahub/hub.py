"""From an id to a folder, and from a folder's tensors into a module: safe (no pickled code runs), strict, without a second copy in memory.

`PyTorchModelHubMixin` and most loaders accept a file that holds none of a model's tensors without a word. Here every missing, unexpected or
mis-shaped tensor is reported and refused, unless the family lists it as expected.
"""

from __future__ import annotations

import fnmatch
import importlib.resources
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlahub import catalog

CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is. The message says what is wrong with which file or tensor."""


# ------------------------------------------------------------------------------------------------ id -> folder


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
    files: Sequence[str] | None = None,
) -> Path:
    """The folder of a checkpoint: a local folder, a bundled "vlahub/..." id, or a repository on the hub (cached). `files` limits what is downloaded."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    name = str(name)
    card = catalog.POLICIES.get(name) or catalog.WEIGHTS.get(name)
    if card is not None and card.folder:
        package, _, folder = card.folder.partition(":")
        return Path(str(importlib.resources.files(package))) / folder
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name!r} is no folder on this machine, and no 'user/name' id either; {_nearest(name)}")
    if name.startswith("vlahub/"):
        raise catalog.UnknownId(f"no bundled checkpoint is called {name!r}; {_nearest(name, bundled=True)}")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=None if files is None else list(files),
            )
        )
    except (GatedRepoError, RevisionNotFoundError) as error:
        raise FileNotFoundError(f"{name!r} cannot be read from the hub: {error}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"there is no repository {name!r} on the hub, or it needs a token; {_nearest(name)}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        near = "" if name in catalog.POLICIES else _nearest(name)
        raise FileNotFoundError(
            f"{name!r} is not in the local cache and could not be downloaded ({type(error).__name__}: {error}). "
            f"On a machine with a network run: hf download {name}; then copy the cache here, or pass the folder instead of the id."
            + (f" It is no id that vlahub knows: {near}" if near.startswith("did you mean") else "")
        ) from error


def _nearest(name: str, bundled: bool = False) -> str:
    """What may have been meant; where nothing is near, the way to the list instead of the list, which is long."""
    known = [name for name, card in {**catalog.POLICIES, **catalog.WEIGHTS}.items() if card.folder or not bundled]
    near = catalog.suggest(name, known)
    return near if near.startswith("did you mean") else "`vlahub list` shows the known ones" if known else "none is, in this version"


def family_of(folder: Path) -> str:
    """The policy family that reads this folder: ours by its config.json, or a published layout that a family recognises."""
    config = folder / CONFIG
    if config.exists():
        record = read_json(config)
        if "vlahub_family" in record:
            return catalog.family_card(record["vlahub_family"]).name
    found = [card.name for card in catalog.FAMILIES.values() if card.recognises(folder)]
    if len(found) == 1:
        return found[0]
    if not found:
        here = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        raise CheckpointError(f"{folder} holds no layout that a policy family knows ({', '.join(catalog.FAMILIES)}). It contains: {here}")
    raise CheckpointError(f"{folder} looks like {' and like '.join(found)}; say which with from_pretrained(..., family=...)")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        record = yaml.safe_load(path.read_text())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds no mapping of names to values")
    return record


# ------------------------------------------------------------------------------------------------ files -> tensors


class Weights(Mapping[str, torch.Tensor]):
    """Named tensors of safetensors files, read only when asked for. `shape(name)` reads no data."""

    def __init__(self, files: Iterable[Path]):
        from safetensors import safe_open

        self._slices: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt", device="cpu")
            except Exception as error:  # safetensors raises its own SafetensorError, OSError or FileNotFoundError
                raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
            for name in handle.keys():
                if name in self._slices:
                    raise CheckpointError(f"tensor {name!r} stands in two files of this checkpoint, one of them {file.name}")
                self._slices[name] = handle

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._slices[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_slice(name).get_shape())


def safetensors_files(folder: Path, stem: str = "model") -> list[Path]:
    """`model.safetensors`, or every shard that `model.safetensors.index.json` names; a missing shard is an error."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        record = read_json(index)
        if not isinstance(record, dict) or not isinstance(record.get("weight_map"), dict):
            raise CheckpointError(f"{index} has no weight_map, so it names no shards; download it again")
        shards = sorted(set(record["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).exists()]
        if missing:
            raise CheckpointError(f"{folder} is incomplete: {len(missing)} of {len(shards)} shards are missing ({', '.join(missing[:4])}); download it again")
        return [folder / shard for shard in shards]
    single = folder / f"{stem}.safetensors"
    if not single.exists():
        raise CheckpointError(f"{folder} has neither {single.name} nor {index.name}")
    return [single]


def read_pt(path: Path) -> Any:
    """A torch.save file, memory-mapped, without running pickled code: a file that holds anything but tensors and plain containers is refused."""
    try:
        # the format before PyTorch 1.6 is no zip file and cannot be memory-mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # pickled code is an UnpicklingError; damaged bytes can be any error of the restricted unpickler
        raise CheckpointError(
            f"{path} holds more than tensors and plain containers, or is damaged; it was not loaded because unpickling it could run code. "
            f"Re-save its state dict with torch.save or safetensors. ({str(error).splitlines()[0][:200] if str(error) else 'empty file'})"
        ) from error


# ------------------------------------------------------------------------------------------------ tensors -> module


@dataclass
class KeyReport:
    """What a checkpoint and a module had in common. `refused()` is empty if the load is good."""

    loaded: int = 0
    missing: list[str] = field(default_factory=list)  # in the module, not in the checkpoint
    unexpected: list[str] = field(default_factory=list)  # in the checkpoint, not in the module
    mis_shaped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)  # missing, and expected to be: new heads
    ignored: list[str] = field(default_factory=list)  # unexpected, and expected to be: aliases, unused heads

    def refused(self) -> list[str]:
        def some(names: list[str]) -> str:
            return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")

        kinds = (("missing from the checkpoint", self.missing), ("unexpected in the checkpoint", self.unexpected), ("of another shape", self.mis_shaped))
        return [f"{len(names)} tensors {what}: {some(names)}" for what, names in kinds if names]

    def __str__(self) -> str:
        notes = [f"{self.loaded} tensors loaded"]
        notes += (
            [f"{len(self.initialised)} newly initialised ({', '.join(sorted({name.split('.')[0] for name in self.initialised}))})"] if self.initialised else []
        )
        notes += [f"{len(self.ignored)} ignored as expected"] if self.ignored else []
        return "; ".join(notes + self.refused())


def load_tensors(
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    *,
    rename: Callable[[str], str | None] = lambda name: name,
    may_miss: Iterable[str] = (),
    may_ignore: Iterable[str] = (),
    device: torch.device | str = "cpu",
    source: str = "checkpoint",
) -> KeyReport:
    """Put a checkpoint's tensors into a module, strictly.

    Build the module on the meta device (`with torch.device("meta")`): then each tensor is read once and becomes the parameter, cast to the dtype that the
    parameter has. Tied parameters need one of their names in the checkpoint and stay tied. `rename` maps a checkpoint key to the module's key; None drops it (counted as ignored). `may_miss` and `may_ignore` are shell patterns over
    module keys and checkpoint keys. A module key in `may_miss` that the checkpoint lacks keeps its value, so it must not be on the meta device.
    """
    wanted = module.state_dict()
    report, chosen = KeyReport(), {}
    aliases = tied(module)
    for name in weights:
        target = rename(name)
        if target is None or (target not in wanted and any(fnmatch.fnmatchcase(name, pattern) for pattern in may_ignore)):
            report.ignored.append(name)
        elif target not in wanted:
            report.unexpected.append(name)
        elif target in chosen:
            report.unexpected.append(f"{name} (a second source of {target}, beside {chosen[target]})")
        else:
            shape = weights.shape(name) if isinstance(weights, Weights) else tuple(weights[name].shape)
            if shape != tuple(wanted[target].shape):
                report.mis_shaped.append(f"{name} {list(shape)} for {list(wanted[target].shape)}")
            chosen[target] = name
    for name in wanted:
        if name not in chosen and not any(other in chosen for other in aliases.get(name, ())):
            (report.initialised if any(fnmatch.fnmatchcase(name, pattern) for pattern in may_miss) else report.missing).append(name)
    if report.refused():
        raise CheckpointError(f"{source} does not fit {type(module).__name__}:\n" + "\n".join(f"  - {line}" for line in report.refused()))
    state = {target: weights[name].to(device=device, dtype=wanted[target].dtype) for target, name in chosen.items()}
    module.load_state_dict(state, strict=False, assign=True)
    report.loaded = len(state)
    for name, group in aliases.items():  # assign=True gave each name a parameter of its own
        source_name = next((other for other in group if other in chosen), None)
        if source_name not in (None, name):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, module.get_parameter(source_name))
    stranded = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if stranded:
        raise CheckpointError(f"{type(module).__name__}: {len(stranded)} tensors were left without values: {', '.join(stranded[:6])}")
    return report


def tied(module: nn.Module) -> dict[str, list[str]]:
    """Each parameter that has several names -> all of them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: group for group in groups.values() if len(group) > 1 for name in group}
