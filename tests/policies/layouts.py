"""Writes tiny policies as folders in the layouts of the published checkpoints."""

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from vlahub_policies.parts import qwen_text


def base_model(folder: Path, vision, text, tokenizer) -> Path:
    """A Qwen2.5-VL base as far as it is read: config.json in the form of transformers 4, and the tokenizer."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(qwen_text.to_bytes(tokenizer))
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen2_5_vl",
                **{"vocab_size": 7, "hidden_size": text.hidden, "num_hidden_layers": text.layers, "num_attention_heads": text.heads},
                **{"num_key_value_heads": text.kv_heads, "intermediate_size": text.mlp, "rms_norm_eps": text.eps, "rope_theta": text.rope_base},
                "rope_scaling": {"type": "mrope", "mrope_section": list(text.rope_sections)},
                "vision_config": {
                    **{
                        "depth": vision.depth,
                        "hidden_size": vision.hidden,
                        "num_heads": vision.heads,
                        "intermediate_size": vision.mlp,
                        "window_size": vision.window,
                    },
                    **{"patch_size": vision.patch, "fullatt_block_indexes": list(vision.full_attention), "out_hidden_size": vision.out},
                },
            }
        )
    )
    return folder


def starvla_run(run: Path, policy, *, base: str, steps=(100000, 30000), statistics=None, template=None) -> Path:
    (run / "checkpoints").mkdir(parents=True)
    framework = {
        "name": "QwenOFT",
        "qwenvl": {"base_vlm": base},
        "action_model": {"past_action_window_size": 0, "future_action_window_size": policy.horizon - 1},
    }
    data = {"obs_image_size": list(policy.config.image_size[::-1])} | ({"CoT_prompt": template} if template else {})
    (run / "config.yaml").write_text(yaml.safe_dump({"framework": framework, "datasets": {"vla_data": data}}))
    codec = policy.config.codec
    numbers = {"min": list(codec.low), "max": list(codec.high), "mask": list(codec.scaled)}
    (run / "dataset_statistics.json").write_text(json.dumps(statistics or {"franka": {"action": numbers, "num_transitions": 1}}))
    state = {}
    for name, tensor in policy.state_dict().items():
        if name == "log_std" or name.startswith("value_head"):
            continue
        head = name.startswith("action_model.")
        state[name.replace("action_model.", "action_model.model.", 1) if head else f"qwen_vl_interface.model.model.{name}"] = tensor.bfloat16()
    state["qwen_vl_interface.model.lm_head.weight"] = state["qwen_vl_interface.model.model.language_model.embed_tokens.weight"].clone()
    for i, step in enumerate(steps):
        torch.save(
            {name: tensor if i == 0 else torch.zeros_like(tensor) for name, tensor in state.items()}, run / "checkpoints" / f"steps_{step}_pytorch_model.pt"
        )
    return run


def lingbot_folder(folder: Path, policy, *, tokenizer_path: str, statistics: dict, in_yaml: dict | None = None, yaml_at: Path | None = None) -> Path:
    folder.mkdir(parents=True)
    prefixes = (
        ("visual.", "qwenvl_with_expert.qwenvl.visual."),
        ("language_model.", "qwenvl_with_expert.qwenvl.model."),
        ("expert.", "qwenvl_with_expert.qwen_expert.model."),
    )
    state = {}
    for name, tensor in policy.model.state_dict().items():
        for ours, theirs in prefixes:
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        state[f"model.{name}"] = tensor.float().contiguous()
    names = sorted(state)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, members in shards.items():
        save_file({name: state[name] for name in members}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: shard for shard, members in shards.items() for name in members}}))
    (folder / "config.json").write_text(json.dumps({"type": "pi0", "chunk_size": policy.horizon, "n_action_steps": policy.horizon, "proj_width": 1024}))
    place = yaml_at or folder
    (place / "norm.json").write_text(json.dumps({"norm_stats": statistics, "count": 5}))
    record = {
        "model": {"tokenizer_path": tokenizer_path, "adanorm_time": True, "old_adanorm": True},
        "data": {"norm_type": "bounds_99_woclip", "norm_stats_file": "assets/norm_stats/norm.json", "img_size": policy.config.image_size[0]},
        "train": {"tokenizer_max_length": policy.config.max_text, "loss_type": "L1_fm", "max_action_dim": policy.config.joints.width, **(in_yaml or {})},
    }
    (place / "lingbotvla_cli.yaml").write_text(yaml.safe_dump(record))
    return folder
