"""Goldens of OpenVLA-OFT: the network in its four decoding paths, FiLM, pixels, the action codec, prompts, and the lists of published keys."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.parity import Check, Golden, filled_state
from vlahub import hub
from vlahub.interface import Camera, Field, Interface
from vlahub_policies import openvla_oft as oft
from vlahub_policies import openvla_oft_folders as folders
from vlahub_policies.parts import resize, robots
from vlahub_policies.parts.jpeg import jpeg_round_trip
from vlahub_policies.parts.llama import LlamaConfig
from vlahub_policies.parts.vit import VitConfig

ATOL = 1e-4


def place(golden: Golden) -> Callable[[Golden], Iterator[Check]] | None:
    if golden.path.parent.name != "openvla_oft":
        return None
    name = golden.path.stem
    if name.startswith("manifest_full"):
        return adapter_manifest if "lora" in name else manifest
    starts = {
        "discrete_rlinf_official": official,
        "discrete_rlinf": rlinf,
        "discrete_moojink": moojink,
        "l1_moojink": l1,
        "film_vision": film,
        "image_moojink": image_moojink,
        "image_rlinf": image_rlinf,
        "image_robotwin_crop": image_robotwin,
        "action_codec": action_codec,
        "prompts": prompts,
    }
    return next((runner for start, runner in starts.items() if name.startswith(start)), None)


# ------------------------------------------------------------------------------------------------ building a tiny policy


def interface(views: int, action_dim: int, state_dim: int = 0) -> Interface:
    state = (Field("state", state_dim, "1"),) if state_dim else ()
    return Interface(Camera("main"), state, (Field("action", action_dim, "1"),), wrists=tuple(Camera(f"wrist{i}") for i in range(views - 1)))


def tower(record: dict) -> VitConfig:
    dim, registers = record["embed_dim"], record.get("reg_tokens", 0)
    return VitConfig(
        dim,
        record["depth"],
        record["num_heads"],
        int(dim * record["mlp_ratio"]),
        prefix_tokens=registers + record.get("class_token", True),
        layer_scale="init_values" in record,
        pool=record.get("global_pool") == "map",
    )


def config_of(golden: Golden, **entries: object) -> oft.OpenVLAOFTConfig:
    record = golden.meta["config"]
    llm = {field.name: record["llm"][field.name] for field in dataclasses.fields(LlamaConfig)}
    action_dim, key = record.get("action_dim", 7), record.get("unnorm_key", "")
    entries = {
        "interface": interface(record["num_images"], action_dim, record.get("proprio_dim", 0)),
        "statistics": record["norm_stats"][key] if key else {"action": {"q01": [-1.0] * action_dim, "q99": [1.0] * action_dim}},
        "unnorm_key": key,
        "proprio": "proprio_dim" in record,
        "horizon": record.get("num_action_chunks", 8),
        "execute": record.get("num_action_chunks", 8),
        "bounds": "minmax" if record.get("normalization", "").startswith("bounds (") else "q99",
        "vocab_size": record["llm"]["pad_token_id"],
        "image_size": record["image_size"],
        "patch": record["patch_size"],
        "dino": tower(record["dino"]),
        "siglip": tower(record["siglip"]),
        "llama": LlamaConfig(**llm),
        **entries,
    }
    return oft.OpenVLAOFTConfig(**entries)


def build(golden: Golden, config: oft.OpenVLAOFTConfig) -> oft.OpenVLAOFT:
    state = filled_state(golden.meta["state_dict"], golden.meta["seed"])
    for suffix, factor in golden.meta["config"].get("scale_after_fill", {}).items():
        state = {name: tensor * factor if name.startswith("language_model.") and name.endswith(suffix) else tensor for name, tensor in state.items()}
    with torch.device("meta"):
        policy = oft.OpenVLAOFT(config)
    hub.load_tensors(policy, state, may_ignore=oft.unused(config), source=golden.path.name)
    return policy.eval()


# ------------------------------------------------------------------------------------------------ comparing


def check(golden: Golden, name: str, actual: object, atol: float = ATOL) -> Iterator[Check]:
    """Nothing where this golden holds no such tensor: sizes and variants keep different ones."""
    if f"out.{name}" in golden.tensors:
        yield Check(name, actual, golden.tensors[f"out.{name}"], atol)


def every_fifth(golden: Golden, hidden: torch.Tensor) -> torch.Tensor:
    """Long chunks are stored at every 5th position."""
    stored = golden.tensors["out.action_hidden"].shape[1]
    return hidden if hidden.shape[1] == stored else hidden[:, ::5]


def log_probs(logits: torch.Tensor, bins: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    table = F.log_softmax(logits / temperature, dim=-1)
    return table.gather(-1, bins[..., None])[..., 0].flatten(1), -(table.exp() * table).sum(-1).flatten(1)


@torch.no_grad()
def rlinf(golden: Golden) -> Iterator[Check]:
    config = config_of(golden, end_token=False, binary_gripper=False, value_head=True, value_level="action")
    atol = 5e-4 if "scale_after_fill" in golden.meta["config"] else ATOL
    policy, t, first = build(golden, config), golden.tensors, config.vocab_size - oft.BINS
    pixels, ids = t["in.pixel_values"], t["in.input_ids"]
    length = ids.shape[1] + config_patches(config, pixels) + policy.slots
    positions, keep = policy.layout(ids, length)
    yield from check(golden, "lm_attention_mask", keep, 0)
    yield from check(golden, "lm_position_ids", positions, 0)
    features = policy.vision_backbone(pixels)
    yield from check(golden, "vision_features", features)
    yield from check(golden, "projected_patches", policy.projector(features))
    hidden = policy(pixels, *policy.trimmed(ids)[:1], padded=True)
    logits = policy.bin_logits(hidden)
    yield from check(golden, "action_hidden", hidden[:, : policy.slots], atol)
    yield from check(golden, "action_logits", logits.flatten(1, 2), atol)
    bins = logits.argmax(-1)
    yield from check(golden, "action_tokens", bins + first, 0)
    yield from check(golden, "actions", policy.unnormalised(oft.bins_to_actions(bins)))
    yield from check(golden, "logprobs", log_probs(logits, bins, 1.0)[0], atol)
    yield from check(golden, "values", policy.value_head(hidden[:, 0]), atol)
    trained, entropy = log_probs(logits, t["in.train_action_tokens"] - first, 1.6)
    yield from check(golden, "train_logprobs", trained, atol)
    yield from check(golden, "train_entropy", entropy, atol)
    yield from check(golden, "train_values", policy.value_head(hidden[:, 0]), atol)
    if "in.decode_logits" in t:
        logits = t["in.decode_logits"].unflatten(1, (policy.horizon, policy.action_dim))
        bins = logits.argmax(-1)
        yield from check(golden, "decode_tokens", bins + first, 0)
        yield from check(golden, "decode_actions", policy.unnormalised(oft.bins_to_actions(bins)))
        yield from check(golden, "decode_logprobs", log_probs(logits, bins, 1.0)[0])


@torch.no_grad()
def official(golden: Golden) -> Iterator[Check]:
    config = config_of(golden, binary_gripper=False, value_head=True, value_level="action")
    policy, t = build(golden, config), golden.tensors
    pixels, pad = t["in.pixel_values"], config.vocab_size
    prompts = [row[real.bool()].tolist() for row, real in zip(t["in.input_ids"], t["in.attention_mask"], strict=True)]
    ids = oft.left_padded(prompts, t["in.input_ids"].shape[1], pad)
    state = policy.normalised(t["in.state"], "proprio")
    yield from check(golden, "proprio_normalized", state, 1e-9)
    # the original moves each row's padding to its end (position number 1); ours stays between the patches and the prompt
    positions, keep = policy.layout(ids, ids.shape[1] + config_patches(config, pixels) + policy.slots + 1)
    order = torch.argsort(~keep, dim=1, stable=True)
    yield from check(golden, "lm_attention_mask", keep.gather(1, order), 0)
    yield from check(golden, "lm_position_ids", torch.where(keep, positions, 1).gather(1, order), 0)
    hidden = policy(pixels, ids, state.float())
    logits = policy.bin_logits(hidden)
    yield from check(golden, "action_hidden", every_fifth(golden, hidden[:, : policy.slots]))
    flat = logits.flatten(1, 2)
    yield from check(golden, "action_logits", every_fifth(golden, flat))
    bins = logits.argmax(-1)
    yield from check(golden, "action_tokens", bins.flatten(1), 0)
    yield from check(golden, "actions", policy.unnormalised(oft.bins_to_actions(bins)))
    yield from check(golden, "logprobs", log_probs(logits, bins, 1.0)[0])
    # the original's value head counts from the end of the padded row, so it reads the action position numbered by the row's padding; ours reads position 0
    padding = (ids == pad).sum(1)
    values = policy.value_head(hidden[torch.arange(len(ids)), 1 + padding])
    yield from check(golden, "values", values)
    trained, entropy = log_probs(logits, t["in.train_action_tokens"].view_as(bins), 1.6)
    yield from check(golden, "train_logprobs", trained)
    yield from check(golden, "train_entropy", entropy)
    yield from check(golden, "train_values", values)
    decoded = t["in.decode_tokens"].view(-1, policy.horizon, policy.action_dim)
    yield from check(golden, "decode_actions", policy.unnormalised(oft.bins_to_actions(decoded)))


@torch.no_grad()
def moojink(golden: Golden) -> Iterator[Check]:
    config = config_of(golden, binary_gripper=False, whole_vocabulary=True)
    policy, t, first = build(golden, config), golden.tensors, config.vocab_size - oft.BINS
    ids = torch.cat([t["in.input_ids"], t["in.input_ids"].new_full((len(t["in.input_ids"]), 1), 29871)], dim=1)
    hidden = policy(t["in.pixel_values"], ids, padded=False)
    yield from unpadded_mask(golden, policy, ids)
    yield from check(golden, "action_hidden", hidden[:, : policy.slots])
    yield from check(golden, "action_logits", policy.bin_logits(hidden).flatten(1, 2))
    tokens = policy.language_model.lm_head(hidden[:, : policy.slots]).argmax(-1)
    yield from check(golden, "action_tokens", tokens, 0)
    shape = (policy.horizon, policy.action_dim)
    yield from check(golden, "actions", policy.unnormalised(oft.bins_to_actions(tokens.view(shape) - first)))
    # the whole vocabulary of the stand-in: 0 everywhere but in the bins, and id 278 at 50 in every 9th position from the 4th on
    logits = torch.zeros(1, policy.slots, config.llama.vocab_size)
    logits[..., first : config.vocab_size] = t["in.decode_logits"]
    logits[:, 4::9, 278] = 50
    yield from check(golden, "decode_actions", policy.unnormalised(oft.bins_to_actions(logits.argmax(-1).view(shape) - first)))
    hidden, targets = trained(golden, policy)
    # the loss in our terms wants actions; their bins' centres are the same tokens (bins 0 and 1 share one, so ids are compared through the labels)
    yield from check(golden, "train_loss", token_loss(policy, hidden, targets)[None])
    yield from check(golden, "train_action_logits", policy.bin_logits(hidden).flatten(1, 2))


@torch.no_grad()
def l1(golden: Golden) -> Iterator[Check]:
    policy, t = build(golden, config_of(golden, binary_gripper=False, head="l1")), golden.tensors
    state = policy.normalised(t["in.state"], "proprio")
    yield from check(golden, "proprio_normalized", state, 1e-9)
    yield from check(golden, "proprio_token", policy.proprio_projector(state.float()[None]))
    yield from check(golden, "projected_patches", policy.projector(policy.vision_backbone(t["in.pixel_values"])))
    hidden = policy(t["in.pixel_values"], t["in.input_ids"], state.float()[None], padded=False)
    yield from unpadded_mask(golden, policy, t["in.input_ids"])
    yield from check(golden, "action_hidden", hidden[:, : policy.slots])
    actions = policy.action_head(hidden[:, : policy.slots])
    yield from check(golden, "normalized_actions", actions[0])
    yield from check(golden, "actions", policy.unnormalised(actions)[0])
    hidden, _ = trained(golden, policy, t["in.train_proprio"])
    target = t["in.train_actions"]
    yield from check(golden, "train_predicted", policy.action_head(hidden[:, : policy.slots]))
    yield from check(golden, "train_loss", policy.loss(hidden, target, torch.ones_like(target[..., :1]))[None])


def trained(golden: Golden, policy: oft.OpenVLAOFT, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states, labels of the action positions and </s>) of the training inputs, whose action tokens stand behind the prompt."""
    t = golden.tensors
    labelled = t["in.train_labels"] != oft.IGNORED
    prompts = [row[: int(marks.nonzero()[0])].tolist() for row, marks in zip(t["in.train_input_ids"], labelled, strict=True)]
    ids = oft.left_padded(prompts, max(map(len, prompts)), policy.config.vocab_size)
    return policy(t["in.train_pixel_values"], ids, state), t["in.train_labels"][labelled].view(len(ids), -1)


def token_loss(policy: oft.OpenVLAOFT, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    bins = targets[:, :-1] - (policy.config.vocab_size - oft.BINS)
    # a bin's lower edge belongs to it, so this is an action that the codec turns into exactly these ids
    actions = oft.bin_edges()[oft.BINS - 1 - bins].view(-1, policy.horizon, policy.action_dim)
    return policy.loss(hidden, actions, torch.ones_like(actions[..., :1]))


def unpadded_mask(golden: Golden, policy: oft.OpenVLAOFT, ids: torch.Tensor) -> Iterator[Check]:
    length = ids.shape[1] + config_patches(policy.config, golden.tensors["in.pixel_values"]) + policy.slots + 1
    yield from check(golden, "lm_attention_mask", policy.layout(ids, length)[1], 0)


def config_patches(config: oft.OpenVLAOFTConfig, pixels: torch.Tensor) -> int:
    return (config.image_size // config.patch) ** 2 * (pixels.shape[1] // 6) + config.proprio


@torch.no_grad()
def film(golden: Golden) -> Iterator[Check]:
    config = config_of(golden, film=True)
    state = filled_state(golden.meta["state_dict"], golden.meta["seed"])
    with torch.device("meta"):
        backbone = oft.VisionBackbone(config)
    weights = {folders.without_film_wrapping(name): tensor for name, tensor in state.items()}
    ignore = [pattern.removeprefix("vision_backbone.") for pattern in oft.unused(config)]
    hub.load_tensors(backbone, {name.removeprefix("vision_backbone."): tensor for name, tensor in weights.items()}, may_ignore=ignore)
    yield from check(golden, "vision_features", backbone(golden.tensors["in.pixel_values"], golden.tensors["in.language_embeddings"].mean(1)))


# ------------------------------------------------------------------------------------------------ pixels, numbers, words


def image_moojink(golden: Golden) -> Iterator[Check]:
    t = golden.tensors
    jpeg = jpeg_round_trip(t["in.image"][None])
    resized = resize.lanczos(jpeg, 224)
    cropped = resize.centre_crop(resized, 224)
    for name, actual in (("jpeg", jpeg), ("resized", resized), ("cropped", cropped), ("cropped", oft.prepare_images(t["in.image"][None], "moojink", 224))):
        yield from check(golden, name, actual[0], 0)
    yield from check(golden, "pixel_values", oft.pixel_values(cropped[None])[0], 1e-6)


def image_rlinf(golden: Golden) -> Iterator[Check]:
    yield from check(golden, "pixel_values", oft.pixel_values(oft.prepare_images(golden.tensors["in.image"][None], "rlinf", 224)[None])[0], 1e-6)


def image_robotwin(golden: Golden) -> Iterator[Check]:
    yield from check(golden, "cropped", oft.prepare_images(golden.tensors["in.image"][None], "robotwin", 224)[0], 0)


def action_codec(golden: Golden) -> Iterator[Check]:
    t, record = golden.tensors, golden.meta["config"]
    statistics = record["norm_stats"][record["unnorm_key"]]
    first = record["vocab_size"] - oft.BINS
    policy = bare(oft.OpenVLAOFTConfig(interface=robots.LIBERO_TWO_CAMERAS, statistics=statistics, vocab_size=record["vocab_size"]))
    yield from check(golden, "token_ids_of_actions", oft.actions_to_bins(t["in.actions_in_pm1"]) + first, 0)
    yield from check(golden, "values_of_token_ids", oft.bins_to_actions(t["in.token_ids"] - first), 1e-12)
    yield from check(golden, "unnormalized_actions", policy.unnormalised(t["in.normalized_actions"]), 1e-12)
    yield from check(golden, "normalized_state", policy.normalised(t["in.state"], "proprio"), 1e-12)
    # the gripper rule alone: un-normalised actions come back unchanged from normalising only inside the bounds, so scale with the identity
    identity = {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7, "mask": [False] * 7}}
    plain = bare(oft.OpenVLAOFTConfig(interface=robots.LIBERO_ONE_CAMERA, statistics=identity))
    yield from check(golden, "libero_actions", plain.to_env(t["in.env_actions_in"]), 1e-6)


def bare(config: oft.OpenVLAOFTConfig) -> oft.OpenVLAOFT:
    """A policy of which only the scales matter: no values in its weights."""
    with torch.device("meta"):
        return oft.OpenVLAOFT(config)


def prompts(golden: Golden) -> Iterator[Check]:
    """Texts, and ids where VLAHUB_LLAMA_TOKENIZER names a folder with Llama-2's tokenizer.json (its vocabulary is not ours to ship)."""
    folder = os.environ.get("VLAHUB_LLAMA_TOKENIZER")
    tokenizer = folders.read_tokenizer(Path(folder)) if folder else None
    for number, entry in enumerate(golden.meta["prompts"]):
        yield Check(f"{number} text", oft.prompt(entry["task"]), entry["prompt"])
        if tokenizer:
            yield Check(f"{number} ids", oft.prompt_ids(tokenizer, entry["task"]), entry["input_ids"])


# ------------------------------------------------------------------------------------------------ published keys


def full_size() -> oft.OpenVLAOFT:
    statistics = {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}, "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8}}
    entries = dict(interface=robots.LIBERO_TWO_CAMERAS, head="l1", proprio=True, value_head=True, value_level="action")
    return bare(oft.OpenVLAOFTConfig(statistics=statistics, **entries))


def manifest(golden: Golden) -> Iterator[Check]:
    """Every published key is ours with its shape, or is listed as reaching no output; and none of ours is missing."""
    policy = full_size()
    ours = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    component = golden.path.stem.removeprefix("manifest_full").removeprefix("_")
    separate = ("action_head.", "proprio_projector.", "value_head.")
    if component:
        ours = {name: shape for name, shape in ours.items() if name.startswith(f"{component}.")}
    else:
        ours = {name: shape for name, shape in ours.items() if not name.startswith(separate)}
    theirs = {folders.component_key(component, name) if component else name: tuple(entry["shape"]) for name, entry in golden.meta.items()}
    dead = {name: shape for name, shape in theirs.items() if any(fnmatchcase(name, pattern) for pattern in oft.unused(policy.config))}
    yield Check("keys that no output depends on", [len(dead)], [0 if component else 43])
    yield Check("keys and shapes", ours, {name: shape for name, shape in theirs.items() if name not in dead})


def adapter_manifest(golden: Golden) -> Iterator[Check]:
    """Every pair of a full adapter belongs to one of our weights, with matching sizes, or to one that reaches no output."""
    policy = full_size()
    ours = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    tensors = {name: torch.empty(entry["shape"], device="meta") for name, entry in golden.meta.items()}
    deltas, replaced = folders.split_adapter(tensors)
    dead = [name for name in deltas if any(fnmatchcase(name, pattern) for pattern in oft.unused(policy.config))]
    yield Check("adapted weights", [len(deltas)], [(len(tensors) - len(replaced)) // 2])
    yield Check("adapted weights without use", [len(dead)], [4 + 4 + 5])  # the last blocks, and the pooling head's q, kv, proj, fc1, fc2
    merged = {name: tuple(folders.lora_delta(*pair).shape) for name, pair in deltas.items() if name not in dead}
    yield Check("shapes of the products", merged, {name: ours.get(name) for name in merged})
    yield Check("whole tensors", {name: tuple(tensor.shape) for name, tensor in replaced.items()}, {name: ours[name] for name in replaced})
