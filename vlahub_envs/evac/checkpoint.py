"""World-model weights: our own folders, and the published files as they are, without running pickled code.

Layouts that `load` reads:

- ours: `config.json` + `model.safetensors`, written by `save`;
- RLinf's: `evac.ckpt` (a Lightning file) with `classifier.pth` and `action_predictor.pth` beside it, for each suite a folder, and
  `open_clip_pytorch_model.bin` in that folder or above it, which is read only if the CLIP weights are not inside `evac.ckpt`;
- AgiBot's: one DeepSpeed `*.pt` file; it has neither a classifier nor an action converter.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from vlahub import hub
from vlahub.hub import CheckpointError
from vlahub.policy import config_from_dict, config_to_dict, override
from vlahub_envs.evac.model import AGIBOT, WorldModel, WorldModelConfig

KIND = "vlahub_world_model"  # the entry of config.json that says what the folder holds
RLINF, CLASSIFIER, CONVERTER, CLIP = "evac.ckpt", "classifier.pth", "action_predictor.pth", "open_clip_pytorch_model.bin"
DEEPSPEED = "_forward_module."
STATISTICS = ("abs_action_mean", "abs_action_std")
IMAGE_TOKENS = "image_proj_model.latents"
TOKENS_PER_FRAME = 16  # image tokens per chunk frame in both published models

# Buffers of published files. They are functions of the config and are computed from it: some files hold them as they were before the zero-SNR rescale.
SCHEDULE_BUFFERS = {
    **{
        name: (1000,)
        for name in (
            "betas",
            "alphas_cumprod",
            "alphas_cumprod_prev",
            "sqrt_alphas_cumprod",
            "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod",
            "sqrt_recip_alphas_cumprod",
            "sqrt_recipm1_alphas_cumprod",
            "posterior_variance",
            "posterior_log_variance_clipped",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
        )
    },
    "scale_arr": (1400,),
}


def find(name: str | Path, **where: Any) -> Path:
    """The file or folder behind a name: a path, a bundled id, or a repository on the hub. `where`: arguments of vlahub.hub.resolve."""
    return Path(name) if Path(name).is_file() else hub.resolve(name, **where)


def load(
    name: str | Path,
    *,
    suite: str = "",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
    **options: Any,
) -> WorldModel:
    """Load a world model, strictly, ready for inference.

    Args:
        name: a local folder (or one published file), or "user/name" on the hub.
        suite: the folder of the weights where a repository has several, "libero_spatial" for example.
        dtype: of the world model's weights; see `cast`.
        options: entries of WorldModelConfig to override. Entries that size a tensor must agree with the weights.
        revision, cache_dir, force_download, local_files_only, token: as in huggingface_hub.
    """
    path = find(name, revision=revision, cache_dir=cache_dir, force_download=force_download, local_files_only=local_files_only, token=token)
    if (path / hub.CONFIG).exists():
        model = _load_own(path, dtype, device, options)
    else:
        model = _load_published(path, suite, dtype, device, options)
    return model.eval().requires_grad_(False)


def save(model: WorldModel, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write config.json and model.safetensors; `load` reads them back. With `dtype`, all weights but the action converter's are rounded to it: float16 halves
    the file, but poses in metres need more than its three digits."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if dtype is not None:
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() and not name.startswith("action_predictor.") else tensor for name, tensor in tensors.items()
        }
    save_file(tensors, folder / hub.WEIGHTS)
    (folder / hub.CONFIG).write_text(json.dumps({KIND: "evac", "config": config_to_dict(model.config)}, indent=2) + "\n")
    return folder


def empty_model(config: WorldModelConfig, dtype: torch.dtype | None = None) -> WorldModel:
    """A model without storage, to be filled by a checkpoint."""
    with torch.device("meta"):
        return cast(WorldModel(config), dtype)


def cast(model: WorldModel, dtype: torch.dtype | None) -> WorldModel:
    """The world model's weights in another dtype; classifier and converter stay as they are, because they are small and decide rewards and poses."""
    for part in (model.model, model.first_stage_model, model.cond_stage_model, model.embedder, model.image_proj_model):
        part.to(dtype)
    return model


def check_chunk(config: WorldModelConfig, weights: Mapping[str, torch.Tensor], source: Any) -> None:
    """Weights of the other variant load nowhere; say so in words rather than in shapes."""
    if IMAGE_TOKENS not in weights:
        return  # the strict loader reports it
    shape = weights.shape(IMAGE_TOKENS) if isinstance(weights, hub.Weights) else tuple(weights[IMAGE_TOKENS].shape)
    if len(shape) == 3 and shape[1] != config.image_resampler.num_queries:
        wanted = config.image_resampler.num_queries
        raise CheckpointError(
            f"{source} holds {shape[1]} image tokens ({IMAGE_TOKENS} {list(shape)}), the configuration wants {wanted}: published weights have "
            f"{TOKENS_PER_FRAME} per chunk frame, so these imagine chunks of {shape[1] // TOKENS_PER_FRAME} frames and the configuration chunks of {config.chunk} "
            f"(memory {config.memory}). The LIBERO model has chunk 8, the AgiBot model chunk 16, both memory 4; load the weights that belong to the configuration"
        )


# ------------------------------------------------------------------------------------------------ our folders


def _load_own(folder: Path, dtype: torch.dtype | None, device: torch.device | str, options: Mapping[str, Any]) -> WorldModel:
    record = hub.read_json(folder / hub.CONFIG)
    if record.get(KIND) != "evac":
        raise CheckpointError(f"{folder / hub.CONFIG} does not describe an EVAC world model: it has no entry {KIND!r}: 'evac'")
    config = override(config_from_dict(WorldModelConfig, record["config"]), **options)
    weights = hub.Weights(hub.safetensors_files(folder))
    check_chunk(config, weights, folder)
    model = empty_model(config, dtype)
    hub.load_tensors(model, weights, device=device, source=str(folder))
    return model


# ------------------------------------------------------------------------------------------------ published files


def _load_published(path: Path, suite: str, dtype: torch.dtype | None, device: torch.device | str, options: Mapping[str, Any]) -> WorldModel:
    file = path if path.is_file() else _find(path, suite)
    weights = world_model_tensors(hub.read_pt(file), file)
    agibot = IMAGE_TOKENS in weights and weights[IMAGE_TOKENS].shape[1] == AGIBOT.image_resampler.num_queries
    config = AGIBOT if agibot else WorldModelConfig()
    if "chunk" in options:  # the number of image tokens follows the chunk, so that a mismatch is seen
        tokens = TOKENS_PER_FRAME * options["chunk"]
        options = {"image_resampler": dataclasses.replace(config.image_resampler, num_queries=tokens), **options}
    config = override(config, **options)
    check_chunk(config, weights, file)

    extra: dict[str, torch.Tensor] = {}
    if not any(name.startswith("embedder.") for name in weights):
        extra |= clip_tensors(_beside(file, path, CLIP, f"{file.name} holds no CLIP weights (embedder.*)"))
    if config.reward_widths is not None:
        extra |= {f"reward_model.{name}": tensor for name, tensor in _plain(_beside(file, path, CLASSIFIER, "the success classifier")).items()}
    if config.converter_hidden is not None:
        extra |= converter_tensors(_beside(file, path, CONVERTER, "the action converter"))
    model = empty_model(config, dtype)
    hub.load_tensors(model, {**weights, **extra}, may_ignore=SCHEDULE_BUFFERS, device=device, source=str(file))
    return model


def _find(folder: Path, suite: str) -> Path:
    """The world-model file below a folder."""
    found = sorted(folder.rglob(RLINF))
    if suite:
        found = [file for file in found if suite in file.relative_to(folder).parts]
        if not found:
            raise CheckpointError(f"{folder} holds no {RLINF} below a folder called {suite!r}")
    if not found:
        found = sorted(folder.glob("*.pt"))
    if len(found) == 1:
        return found[0]
    if not found:
        here = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        raise CheckpointError(f"{folder} holds no world model: neither {hub.CONFIG} and {hub.WEIGHTS}, nor {RLINF}, nor a *.pt file. It contains: {here}")
    names = ", ".join(str(file.relative_to(folder)) for file in found)
    raise CheckpointError(f"{folder} holds several world models ({names}); say which with suite='{found[0].parent.name}', or give the file itself")


def _beside(file: Path, root: Path, name: str, what: str) -> Path:
    """A file in the folder of the weights, or in one above it up to the folder that was given."""
    last = file.parent if root.is_file() else root
    for folder in (file.parent, *file.parent.parents):
        if (folder / name).exists():
            return folder / name
        if folder == last:
            break
    hint = "; options reward_widths=None or converter_hidden=None load the model without it" if name in (CLASSIFIER, CONVERTER) else ""
    raise CheckpointError(f"{what}: {name} is neither in {file.parent} nor above it; put the published file there{hint}")


def _plain(path: Path) -> dict[str, torch.Tensor]:
    """A state dict as it stands in the file."""
    content = hub.read_pt(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path} is not a plain state dict (names -> tensors)")
    return dict(content)


def world_model_tensors(content: Any, source: Any) -> dict[str, torch.Tensor]:
    """The tensors of a Lightning file (under `state_dict`) or a DeepSpeed file (at top level or under `module`, names prefixed by `_forward_module.`)."""
    for key in ("state_dict", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{source} holds no tensors where a Lightning or a DeepSpeed file has them (state_dict, module, or the top level)")
    if all(name.startswith(DEEPSPEED) for name in tensors):
        tensors = {name.removeprefix(DEEPSPEED): tensor for name, tensor in tensors.items()}
    return tensors


def clip_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The OpenCLIP file's tensors under the world model's names; its text transformer is not part of the world model."""
    return {f"embedder.model.{name}": tensor for name, tensor in _plain(path).items() if not name.startswith("transformer.") and name != "attn_mask"}


def converter_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The action converter's weights and its pose statistics."""
    content = hub.read_pt(path)
    lacking = [name for name in ("model_state_dict", *STATISTICS) if name not in content] if isinstance(content, Mapping) else ["model_state_dict"]
    if lacking:
        raise CheckpointError(
            f"{path} lacks {', '.join(lacking)}; the published action converter is a dict of model_state_dict, abs_action_mean, abs_action_std"
        )
    statistics = {name: torch.as_tensor(content[name], dtype=torch.float32).reshape(1, -1) for name in STATISTICS}
    return {f"action_predictor.{name}": tensor for name, tensor in {**content["model_state_dict"], **statistics}.items()}


def published_shapes(config: WorldModelConfig) -> dict[str, tuple[int, ...]]:
    """Every name and shape of the published world-model file of this configuration."""
    own: Iterable[tuple[str, torch.Tensor]] = empty_model(config).state_dict().items()
    beside = ("reward_model.", "action_predictor.")
    return {**SCHEDULE_BUFFERS, **{name: tuple(tensor.shape) for name, tensor in own if not name.startswith(beside)}}
