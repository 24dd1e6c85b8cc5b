"""The files that OpenVLA-OFT checkpoints are published as: shards, heads in files of their own, adapters, statistics. Read unedited, no pickled code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vlahub import hub


def read_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.exists():
        raise hub.CheckpointError(f"{folder} has no tokenizer.json; download the whole repository again")
    return Tokenizer.from_file(str(file))


def choose_statistics(folder: Path, key: str | None) -> tuple[str, dict[str, Any]]:
    """(data set, its statistics). dataset_statistics.json is of this checkpoint; config.json adds the pre-training sets, for those who ask by name."""
    own = hub.read_json(folder / "dataset_statistics.json") if (folder / "dataset_statistics.json").exists() else {}
    known = {**(hub.read_json(folder / hub.CONFIG).get("norm_stats") or {} if (folder / hub.CONFIG).exists() else {}), **own}
    if key is None and len(own) == 1:
        return next(iter(own.items()))
    if key in known:
        return key, known[key]
    names = f"this checkpoint knows {', '.join(map(repr, sorted(own) or sorted(known)))}" if known else f"{folder} has no dataset_statistics.json"
    if key is None:
        raise hub.CheckpointError(f"which data set's statistics scale the actions? Give unnorm_key=...; {names}, or statistics={{...}} of your own")
    raise hub.CheckpointError(f"unnorm_key {key!r} is unknown; {names}")


def component_file(folder: Path, component: str) -> Path | None:
    """`action_head--150000_checkpoint.pt` and its like: at most one per component."""
    found = sorted(folder.glob(f"{component}--*_checkpoint.pt"))
    if len(found) > 1:
        raise hub.CheckpointError(f"{folder} has {len(found)} files of {component} ({', '.join(file.name for file in found)}); keep the one that you want")
    return found[0] if found else None


def component_key(component: str, name: str) -> str:
    """Heads are saved alone, through DistributedDataParallel: `module.fc1.weight` -> `proprio_projector.fc1.weight`."""
    name = name.removeprefix("module.")
    return name if name.startswith(f"{component}.") else f"{component}.{name}"


def without_film_wrapping(name: str) -> str:
    """FiLM wraps the vision backbone and each block of it once more: the same tensor without the wrappers' names."""
    return name.replace("vision_backbone.vision_backbone.", "vision_backbone.").replace(".block.", ".")


Pair = tuple[torch.Tensor, torch.Tensor]


def split_adapter(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Pair], dict[str, torch.Tensor]]:
    """A peft file -> ({weight: (A, B)}, {weight: the whole tensor that replaces it}), under the model's own names."""
    pairs, whole = {}, {}
    for name in tensors:
        target = name.removeprefix("base_model.model.").replace(".default.", ".").replace(".base_layer.", ".")
        if ".lora_A." in target:
            partner = name.replace(".lora_A.", ".lora_B.")
            if partner not in tensors:
                raise hub.CheckpointError(f"the adapter has {name} without {partner}")
            pairs[target.replace(".lora_A", "")] = (tensors[name], tensors[partner])
        elif ".lora_B." not in target:
            whole[target] = tensors[name]
    return pairs, whole


def lora_delta(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """B A in float32; for a convolution (A [r, 3, 14, 14], B [dim, r, 1, 1]) the product has the kernel's shape."""
    return (b.float().flatten(1) @ a.float().flatten(1)).view(b.shape[0], *a.shape[1:])


def adapter_scale(folder: Path) -> float:
    record = hub.read_json(folder / "adapter_config.json")
    unsupported = [name for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if record.get(name)]
    if unsupported:
        raise hub.CheckpointError(
            f"{folder / 'adapter_config.json'} uses {', '.join(unsupported)}, which OpenVLA-OFT adapters do not; merge it with peft first"
        )
    return record["lora_alpha"] / record["r"]


class Published(hub.Weights):
    """The tensors of a published checkpoint under the model's own names: shards, separate component files, an adapter merged as it is read."""

    def __init__(self, folder: Path, base: str | Path | None):
        adapter_config = folder / "adapter_config.json"
        self.is_adapter = adapter_config.exists() and not (folder / hub.CONFIG).exists()
        self.root = folder
        if self.is_adapter:
            base = base or hub.read_json(adapter_config).get("base_model_name_or_path")
            if not base:
                raise hub.CheckpointError(f"{folder} is an adapter whose adapter_config.json names no base model; give base=... (a folder or an id)")
            try:
                self.root = hub.resolve(base)
            except (FileNotFoundError, ValueError) as error:
                raise hub.CheckpointError(
                    f"{folder} is an adapter on the base model {base!r}, which was not found; give base=... (a folder or an id). {error}"
                ) from error
        elif base is not None:
            raise hub.CheckpointError(f"base={str(base)!r} is only for adapter folders; {folder} holds a whole model")
        super().__init__(hub.safetensors_files(self.root))
        self.whole: dict[str, torch.Tensor] = {}
        self.pairs: dict[str, Pair] = {}
        self.scale = 1.0
        if self.is_adapter:  # a lora_adapter/ folder beside a whole model is what has been merged into it already
            self.scale = adapter_scale(folder)
            self.pairs, self.whole = split_adapter(hub.Weights([folder / "adapter_model.safetensors"]))
        self.components = {name: component_file(folder, name) for name in ("action_head", "proprio_projector", "vision_backbone")}
        for name, file in self.components.items():
            if file is not None and name != "vision_backbone":
                self.whole |= {component_key(name, key): tensor for key, tensor in self._state(file).items()}
        if self.components["vision_backbone"] is not None:
            self._add_film(folder, self._state(self.components["vision_backbone"]))
        strangers = sorted(self.pairs.keys() - self._slices.keys() - self.whole.keys())
        if strangers:
            raise hub.CheckpointError(f"the adapter changes weights that the base model lacks: {', '.join(strangers[:4])}; is {self.root} its base?")

    @staticmethod
    def _state(file: Path) -> dict[str, torch.Tensor]:
        state = hub.read_pt(file)
        if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise hub.CheckpointError(f"{file} is not a state dict (names -> tensors)")
        return state

    def _add_film(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        """The wrapped backbone was saved with its adapter apart; it replaces the backbone of the shards."""
        pairs, whole = split_adapter({without_film_wrapping("vision_backbone." + name.removeprefix("module.")): tensor for name, tensor in state.items()})
        if pairs:
            if not (folder / "lora_adapter").is_dir():
                raise hub.CheckpointError(
                    f"{folder}: the FiLM vision backbone holds an adapter, and lora_adapter/adapter_config.json with its scale is missing"
                )
            self.scale = adapter_scale(folder / "lora_adapter")
        self.pairs |= pairs
        self.whole |= whole

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.whole[name] if name in self.whole else super().__getitem__(name)
        if name not in self.pairs:
            return tensor
        return (tensor.float() + self.scale * lora_delta(*self.pairs[name])).to(tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices.keys() | self.whole.keys())

    def __len__(self) -> int:
        return len(self._slices.keys() | self.whole.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self.whole[name].shape) if name in self.whole else super().shape(name)
        if name in self.pairs:
            a, b = (tuple(tensor.shape) for tensor in self.pairs[name])
            if (b[0], *a[1:]) != shape:
                raise hub.CheckpointError(f"the adapter of {name} makes {(b[0], *a[1:])}, the weight is {shape}")
        return shape
