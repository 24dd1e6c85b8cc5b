"""Tiny checkpoint folders in exactly the published layouts, with random weights."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from vlahub_policies.parts import text
from vlahub_policies.parts.gemma import GemmaConfig, SiglipConfig
from vlahub_policies.parts.normalize import Moments, Statistics
from vlahub_policies.pi0 import Pi0Config, Pi0Policy

UNUSED_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"


def statistics(state: int, actions: int, seed: int = 0) -> Statistics:
    rng = np.random.default_rng(seed)

    def moments(size: int) -> Moments:
        mean, std = rng.normal(size=size), 0.5 + rng.random(size)
        return Moments(*(tuple(values.tolist()) for values in (mean, std, mean - 2 * std, mean + 2 * std)))

    return Statistics(moments(state), moments(actions))


def network(pi05: bool = False, **overrides) -> Pi0Policy:
    """A policy whose sizes can be read back from its tensors: SigLIP heads are 72 wide, as published."""
    sizes = dict(
        pi05=pi05, vlm=GemmaConfig(32, 2, 48, 2, 1, 16), expert=GemmaConfig(24, 2, 40, 2, 1, 16), vision=SiglipConfig(144, 64, 2, 2, 28, 14),
        vocab_size=len(text.bundled()), max_token_len=200 if pi05 else 48, horizon=10 if pi05 else 50,
    )  # fmt: skip
    torch.manual_seed(1)
    policy = Pi0Policy(Pi0Config(**{**sizes, **overrides}), text.bundled()).eval()
    for parameter in policy.parameters():
        parameter.data.normal_(0, 0.1)
    return policy


def published_state(policy: Pi0Policy) -> dict[str, torch.Tensor]:
    unused = torch.zeros(policy.config.vocab_size, policy.config.expert.width)
    return {UNUSED_HEAD: unused, **{name: tensor.clone() for name, tensor in policy.state_dict().items()}}


def openpi(folder: Path, policy: Pi0Policy, numbers: Statistics | None, asset: str = "physical-intelligence/libero") -> Path:
    folder.mkdir()
    save_file(published_state(policy), folder / "model.safetensors")
    record = dict(action_dim=32, action_horizon=policy.config.horizon, paligemma_variant="gemma_2b", action_expert_variant="gemma_300m", precision="bfloat16")
    (folder / "config.json").write_text(json.dumps(record))
    (folder / text.FILE).write_bytes(policy.tokenizer.model)
    if numbers is not None:
        (folder / "assets" / asset).mkdir(parents=True)
        numbers.write(folder / "assets" / asset / "norm_stats.json")
    return folder


def rlinf(folder: Path, policy: Pi0Policy, numbers: Statistics, asset: str = "physical-intelligence/libero", trained: bool = False) -> Path:
    (folder / asset).mkdir(parents=True)
    if trained:  # after RL: a torch file of bare tensors, heads included
        (folder / "actor/model_state_dict").mkdir(parents=True)
        torch.save(published_state(policy), folder / "actor/model_state_dict/full_weights.pt")
    else:
        save_file(published_state(policy), folder / "model.safetensors")
    numbers.write(folder / asset / "norm_stats.json")
    (folder / text.FILE).write_bytes(policy.tokenizer.model)
    return folder


def lerobot(folder: Path, policy: Pi0Policy, numbers: Statistics | None, prefix: str = "") -> Path:
    folder.mkdir()
    pi05 = policy.config.pi05
    save_file({prefix + name: tensor for name, tensor in published_state(policy).items()}, folder / "model.safetensors")
    pictures = {f"observation.images.{name}": {"type": "VISUAL", "shape": [3, 224, 224]} for name in ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")}
    record = {
        "type": "pi05" if pi05 else "pi0",
        "n_obs_steps": 1,
        "input_features": {**pictures, "observation.state": {"type": "STATE", "shape": [32]}},
        "output_features": {"action": {"type": "ACTION", "shape": [32]}},
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "QUANTILES" if pi05 else "MEAN_STD", "ACTION": "QUANTILES" if pi05 else "MEAN_STD"},
        "chunk_size": policy.config.horizon,
        "n_action_steps": policy.config.horizon,
        "max_state_dim": 32,
        "max_action_dim": 32,
        "num_inference_steps": 10,
        "image_resolution": [224, 224],
        "tokenizer_max_length": 200 if pi05 else 48,
    }
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "policy_preprocessor", "steps": []}))
    (folder / "policy_postprocessor.json").write_text(json.dumps({"name": "policy_postprocessor", "steps": []}))
    (folder / text.FILE).write_bytes(policy.tokenizer.model)
    if numbers is not None:
        entries = {"observation.state": numbers.state, "action": numbers.actions}
        tensors = {f"{key}.{name}": torch.tensor(value) for key, moments in entries.items() for name, value in vars(moments).items()}
        save_file(tensors, folder / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    return folder


def dexbotic_names(name: str) -> str:
    for ours, published in (
        ("paligemma_with_expert.paligemma.lm_head.", "model.llm.embed_tokens."),
        ("paligemma_with_expert.paligemma.model.language_model.", "model.llm."),
        ("paligemma_with_expert.paligemma.model.vision_tower.", "model.mm_vision_tower.vision_tower."),
        ("paligemma_with_expert.paligemma.model.multi_modal_projector.linear.", "model.mm_projector."),
        ("paligemma_with_expert.gemma_expert.lm_head.", "model.action_expert.embed_tokens."),
        ("paligemma_with_expert.gemma_expert.model.", "model.action_expert."),
        ("", "model."),
    ):
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    raise AssertionError(name)


def dexbotic(folder: Path, policy: Pi0Policy, numbers: Statistics | None) -> Path:
    """Two shards with an index, as the published 7 GB are."""
    folder.mkdir()
    state = {dexbotic_names(name): tensor.to(torch.bfloat16) for name, tensor in published_state(policy).items()}
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[: len(names) // 2], "model-00002-of-00002.safetensors": names[len(names) // 2 :]}
    for file, members in shards.items():
        save_file({name: state[name] for name in members}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    vision = policy.config.vision
    record = {
        "model_type": "dexbotic_pi0",
        "architectures": ["Pi0ForCausalLM"],
        "action_dim": 32,
        "chunk_size": policy.config.horizon,
        "image_aspect_ratio": "pad",
        "mm_projector_type": "linear",
        "processor_config": "some/where",
        "tokenizer_model_max_length": 48,
        "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": vision.num_attention_heads, "hidden_size": vision.hidden_size},
        "hidden_size": policy.config.vlm.width,
    }
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "SiglipImageProcessor", "resample": 3}))
    (folder / text.FILE).write_bytes(policy.tokenizer.model)
    if numbers is not None:
        wide = [
            {
                name: [*value, *[fill] * (32 - len(value))]
                for name, value, fill in (("mean", m.mean, 0.0), ("std", m.std, 1.0), ("min", m.q01, -1.0), ("max", m.q99, 1.0))
            }
            for m in (numbers.state, numbers.actions)
        ]
        record = {"norm_stats": {"default": {"min": -1, "max": 1}, "state": wide[0], "action": wide[1]}}
        (folder / "norm_stats.json").write_text(json.dumps(record))
    return folder


def observation(batch: int = 2, state: int = 8, wrists: int = 1, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    wrist = (batch, 40, 40, 3) if wrists == 1 else (batch, wrists, 40, 40, 3)
    return {
        "main_images": rng.integers(0, 256, (batch, 48, 64, 3), dtype=np.uint8),
        "wrist_images": rng.integers(0, 256, wrist, dtype=np.uint8),
        "states": rng.normal(size=(batch, state)).astype(np.float32),
        "task_descriptions": ["pick up the black bowl", "open the middle drawer of the cabinet"][:batch],
    }


def with_numbers(policy: Pi0Policy, **entries) -> Pi0Policy:
    """The same network under another configuration."""
    other = type(policy)(replace(policy.config, **entries), policy.tokenizer).eval()
    other.load_state_dict(policy.state_dict(), strict=False)
    return other
