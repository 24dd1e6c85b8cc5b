"""Published folders of the pi0 family, read as they are.

| layout  | configuration                            | tensors                                                             | statistics                                                        |
|---------|------------------------------------------|---------------------------------------------------------------------|-------------------------------------------------------------------|
| openpi  | `config.json` without a kind, or none    | `model.safetensors`                                                 | `assets/<asset>/norm_stats.json`                                  |
| RLinf   | none                                     | `model.safetensors`, or `actor/model_state_dict/full_weights.pt`    | `<asset>/norm_stats.json`                                         |
| lerobot | `config.json`, type pi0 or pi05          | `model.safetensors`, names with or without `model.`                 | `policy_preprocessor_step_*_normalizer_processor.safetensors`     |
| Dexbotic| `config.json`, model_type dexbotic_pi0   | `model.safetensors` in shards, own names                            | `norm_stats.json`                                                 |

Sizes are read from the tensors' shapes. What no file says (the robot, the length of the chunk, which actions are relative) follows from the robot, as its
published training configuration has it; any of it can be overridden by an argument of from_pretrained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlahub import catalog, hub
from vlahub.hub import CheckpointError
from vlahub_policies.parts import robots, text
from vlahub_policies.parts.filling import filled
from vlahub_policies.parts.gemma import GemmaConfig, SiglipConfig
from vlahub_policies.parts.normalize import Moments, Statistics
from vlahub_policies.pi0 import EMBEDDING, EMBEDDING_ALIAS, Pi0Policy

RL_WEIGHTS = ("actor/model_state_dict/full_weights.pt", "model_state_dict/full_weights.pt")
LIBERO_RELATIVE = tuple(range(6))  # pi0_libero subtracts the state even from actions that are increments already, and was trained so
ALOHA_RELATIVE = (*range(6), *range(7, 13))  # all joints, not the grippers

# (pi05, robot) -> what its published training configuration says
RECIPES: dict[tuple[bool, str], dict[str, Any]] = {
    (False, "libero"): dict(horizon=50, execute=5, relative=LIBERO_RELATIVE),
    (True, "libero"): dict(horizon=10, execute=5),
    (False, "robotwin"): dict(horizon=50, execute=50, relative=ALOHA_RELATIVE),
    (True, "robotwin"): dict(horizon=50, execute=50, relative=ALOHA_RELATIVE, state_in_prompt=True, aloha_units=True),
    # Trained with states and actions padded before normalisation: every padded dimension's target is -1 instead of 0
    (True, "twin"): dict(horizon=8, execute=4, pad_first=True),
}
ROBOTS = {"libero": robots.LIBERO, "robotwin": robots.ROBOTWIN, "twin": robots.TWIN}
ASSETS = {"libero": "libero", "pick_and_place_real": "twin", "robotwin": "robotwin"}  # part of an asset's name -> robot


def load(
    kind: type[Pi0Policy],
    folder: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    robot: str | None = None,
    statistics: Statistics | str | Path | None = None,
    tokenizer: str | Path | None = None,
    **options: Any,
) -> Pi0Policy:
    """Args:
    robot: "libero", "robotwin" or "twin", where the folder does not say.
    statistics: a norm_stats.json (or `Statistics`) where the folder has none; "identity" to use states and actions as they are.
    tokenizer: PaliGemma's tokenizer.model or tokenizer.json, where it is neither in the folder nor in the hub's cache.
    options: entries of the policy's Config.
    """
    known = {field.name for field in dataclasses.fields(kind.Config)}
    for name in options:
        if name not in known:
            raise TypeError(f"{kind.__name__} has no option {name!r}; {catalog.suggest(name, [*known, 'robot', 'statistics', 'tokenizer'])}")
    config = hub.read_json(folder / hub.CONFIG) if (folder / hub.CONFIG).exists() else {}
    weights = _weights(folder)
    shapes = {ours: shape for name, shape in _shapes(weights) if (ours := kind.rename(name)) is not None}
    found = sizes(shapes, folder, config)
    lerobot = config.get("type") in ("pi0", "pi05")
    if statistics is None:
        statistics, asset = _lerobot_statistics(folder) if lerobot else _statistics(folder)
    else:
        asset = str(statistics) if isinstance(statistics, Path) else ""
    robot = robot or _robot(folder, asset, statistics)
    if robot not in ROBOTS:
        raise CheckpointError(f"robot {robot!r} is unknown; known are {', '.join(ROBOTS)}")
    if statistics is None:
        raise CheckpointError(
            f"{folder} has no normalisation statistics (looked for norm_stats.json in it and in its sub-folders). "
            "Pass statistics=PATH of a norm_stats.json, or statistics='identity' for a base model whose statistics fine-tuning will set"
        )
    interface = options.get("interface", ROBOTS[robot])
    if statistics == "identity":
        statistics = Statistics.identity(interface.state_dim, interface.action_dim)
    elif not isinstance(statistics, Statistics):
        statistics = Statistics.read(Path(statistics))
    entries = kind.published_entries(config, robot, found["pi05"], found["action_dim"])
    entries = {**found, **entries, "interface": interface, "statistics": statistics, **options}
    made = kind.Config(**entries)
    _check_widths(folder, made)

    tokens = text.find(folder, tokenizer, fits=made.vocab_size)
    # repaired files hold the tied embedding under both of its names
    drop = (
        [name for name in weights if name.removeprefix("model.") == EMBEDDING_ALIAS]
        if any(name.removeprefix("model.") == EMBEDDING for name in weights)
        else []
    )
    return filled(
        kind,
        made,
        tokens,
        weights,
        device,
        dtype or torch.bfloat16,
        rename=lambda name: None if name in drop else kind.rename(name),
        # a critic or noise head of an RL run, when the policy is loaded without it
        may_ignore=("value_head.*", "noise_head.*", "model.value_head.*", "model.noise_head.*"),
        source=str(folder),
    )


def entries_of(config: Mapping[str, Any], robot: str, pi05: bool) -> dict[str, Any]:
    """Config entries of an openpi, RLinf or lerobot folder."""
    recipe = RECIPES.get((pi05, robot))
    if recipe is None:
        raise CheckpointError(f"no published pi0{'.5' if pi05 else ''} was trained for {robot!r}; known are {', '.join(r for p, r in RECIPES if p == pi05)}")
    entries = {"max_token_len": 200 if pi05 else 48, "quantile": pi05, **recipe}
    if config.get("type") in ("pi0", "pi05"):  # lerobot
        modes = config.get("normalization_mapping", {})
        if len({modes.get(kind) for kind in ("STATE", "ACTION")}) > 1:
            raise CheckpointError(f"config.json normalises states and actions differently ({modes}), which this policy does not")
        # lerobot has no relative actions and no unit conversion, and pi0.5 always reads its state in the prompt
        entries |= dict(
            relative=(), aloha_units=False, pad_first=False, state_in_prompt=pi05, resize="lerobot", quantile=modes.get("STATE", "MEAN_STD") == "QUANTILES"
        )
        entries["max_token_len"] = config.get("tokenizer_max_length", entries["max_token_len"])
        entries["denoising_steps"] = config.get("num_inference_steps", 10)
    for name in ("action_horizon", "chunk_size"):
        if name in config:
            entries["horizon"] = config[name]
    if "n_action_steps" in config:
        entries["execute"] = config["n_action_steps"]
    entries["execute"] = min(entries["execute"], entries["horizon"])
    return entries


# ------------------------------------------------------------------------------------------------ tensors


def _weights(folder: Path) -> Mapping[str, torch.Tensor]:
    for name in RL_WEIGHTS:
        if (folder / name).is_file():
            state = hub.read_pt(folder / name)
            wrong = [key for key, value in state.items() if not isinstance(value, torch.Tensor)] if isinstance(state, dict) else ["?"]
            if wrong:
                raise CheckpointError(f"{folder / name} is no flat state dict: {wrong[:3]} are no tensors")
            return state
    pickles = sorted(path.name for pattern in ("*.pt", "*.bin", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles and not (folder / hub.WEIGHTS).exists() and not (folder / hub.WEIGHTS_INDEX).exists():
        raise CheckpointError(
            f"{folder} holds its weights as {', '.join(pickles[:3])}, which is not a published layout of pi0; convert it to model.safetensors"
        )
    return hub.Weights(hub.safetensors_files(folder))


def _shapes(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in weights:
        yield name, weights.shape(name) if isinstance(weights, hub.Weights) else tuple(weights[name].shape)


def sizes(shapes: Mapping[str, tuple[int, ...]], folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the network from the shapes of its tensors. Heads: published pi0 has one key/value head everywhere, and SigLIP's heads are 72 wide unless config.json says."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise CheckpointError(f"{folder} is no pi0 checkpoint, or is damaged: it has no tensor {name}")
        return shapes[name]

    def count(prefix: str) -> int:
        return 1 + max((int(name.removeprefix(prefix).split(".")[0]) for name in shapes if name.startswith(prefix)), default=-1)

    def gemma(prefix: str) -> GemmaConfig:
        first = f"{prefix}layers.0."
        head_dim, width = shape(f"{first}self_attn.k_proj.weight")
        return GemmaConfig(
            width, count(f"{prefix}layers."), shape(f"{first}mlp.gate_proj.weight")[0], shape(f"{first}self_attn.q_proj.weight")[0] // head_dim, 1, head_dim
        )

    tower = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
    hidden, _, patch, _ = shape(f"{tower}embeddings.patch_embedding.weight")
    side = round(shape(f"{tower}embeddings.position_embedding.weight")[0] ** 0.5)
    heads = config.get("vision_config", {}).get("num_attention_heads") or max(1, hidden // 72)
    if hidden % heads:
        raise CheckpointError(f"SigLIP's width {hidden} does not split into {heads} heads")
    layers = f"{tower}encoder.layers."
    return {
        "pi05": "time_mlp_in.weight" in shapes,
        "vlm": gemma("paligemma_with_expert.paligemma.model.language_model."),
        "expert": gemma("paligemma_with_expert.gemma_expert.model."),
        "vision": SiglipConfig(hidden, shape(f"{layers}0.mlp.fc1.weight")[0], count(layers), heads, side * patch, patch),
        "vocab_size": shape(EMBEDDING)[0],
        "action_dim": shape("action_in_proj.weight")[1],
    }


# ------------------------------------------------------------------------------------------------ statistics and robot


def _statistics(folder: Path) -> tuple[Statistics | None, str]:
    """(statistics, the name of their asset) of openpi's, RLinf's and Dexbotic's folders."""
    found = sorted(
        path for pattern in ("norm_stats.json", "*/norm_stats.json", "*/*/norm_stats.json", "*/*/*/norm_stats.json") for path in folder.glob(pattern)
    )
    if not found:
        return None, ""
    if len(found) > 1:
        places = ", ".join(str(path.relative_to(folder)) for path in found)
        raise CheckpointError(f"{folder} has several statistics ({places}); say which with statistics=PATH")
    asset = str(found[0].parent.relative_to(folder))
    return Statistics.read(found[0]), "" if asset == "." else asset


def _lerobot_statistics(folder: Path) -> tuple[Statistics | None, str]:
    files = sorted(folder.glob("policy_preprocessor_step_*_normalizer_processor.safetensors"))
    if not files:
        return None, ""
    entries = hub.Weights(files[:1])
    parts = []
    for key in ("observation.state", "action"):
        values = {name: tuple(np.atleast_1d(entries[f"{key}.{name}"].numpy()).tolist()) for name in ("mean", "std", "q01", "q99") if f"{key}.{name}" in entries}
        if not values:
            return None, ""
        parts.append(Moments(**values))
    return Statistics(*parts), ""


def _robot(folder: Path, asset: str, statistics: Any) -> str:
    for part, robot in ASSETS.items():
        if part in asset.lower() or (not asset and part in folder.name.lower()):
            return robot
    widths = tuple(len(m.mean or m.q01 or ()) for m in (statistics.state, statistics.actions)) if isinstance(statistics, Statistics) else ()
    found = [name for name, interface in ROBOTS.items() if (interface.state_dim, interface.action_dim) == widths]
    if len(found) == 1:
        return found[0]
    raise CheckpointError(f"{folder} does not say which robot it is for; pass robot= one of {', '.join(ROBOTS)}")


def _check_widths(folder: Path, config: Any) -> None:
    """Statistics must cover the robot's numbers; wider ones are padding."""
    for what, needed in (("state", config.interface.state_dim), ("actions", config.interface.action_dim)):
        moments = getattr(config.statistics, what)
        pair = (moments.q01, moments.q99) if config.quantile else (moments.mean, moments.std)
        if None in pair:
            kind = "q01 and q99" if config.quantile else "mean and std"
            raise CheckpointError(
                f"the statistics of {folder} hold no {kind} of {what}, by which this policy normalises; pass statistics=PATH, or quantile={not config.quantile}"
            )
        if len(pair[0]) < needed and what in ("state", "actions"):
            raise CheckpointError(f"the statistics of {folder} cover {len(pair[0])} numbers of {what}, the robot has {needed}; pass robot= or statistics=PATH")
