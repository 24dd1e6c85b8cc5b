"""pi0, pi0.5 and Dexbotic's pi0: network, sampler, log-probabilities, and what happens to images, text, states and actions."""

import fnmatch
from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks.parity import Check, Golden, filled_state
from vlahub.hub import load_tensors
from vlahub.interface import Camera, Field, Interface
from vlahub_policies import dexbotic, pi0
from vlahub_policies.parts import flow, gemma, images, normalize, text

TOY_TOKENIZER = "toy_tokenizer.model"


def place(golden: Golden) -> Callable[[Golden], Iterator[Check]] | None:
    meta, name = golden.meta, golden.path.stem
    if name.startswith("manifest"):
        return manifest if any(key.startswith(("paligemma_with_expert.", "model.action_expert.")) for key in meta) else None
    model = str(meta.get("model", ""))
    if not model.startswith(("pi0", "dexbotic_pi0")):
        return None
    if "transforms around" in model:
        return dexbotic_transforms if model.startswith("dexbotic") else openpi_transforms
    return reinforcement if "rl" in meta["config"] else network


def policy_of(golden: Golden) -> pi0.Pi0Policy:
    """The policy that a golden's configuration describes, with the golden's weights."""
    sizes, published = golden.meta["config"], golden.meta["state_dict"]
    is_dexbotic = golden.meta["model"].startswith("dexbotic")
    rl = sizes.get("rl", {})
    layers = [i for i in range(0, 20, 2) if f"value_head.mlp.{i + 2}.weight" in published]  # all but the last
    config = (dexbotic.DexboticConfig if is_dexbotic else pi0.Pi0Config)(
        pi05=any(name.removeprefix("model.") == "time_mlp_in.weight" for name in published),
        vlm=gemma.GemmaConfig(**sizes["vlm"]),
        expert=gemma.GemmaConfig(**sizes["expert"]),
        vision=gemma.SiglipConfig(**sizes["vision"]),
        **{name: sizes[name] for name in ("vocab_size", "action_dim", "max_token_len")},
        horizon=sizes["action_horizon"],
        interface=Interface(
            Camera("main"), (Field("state", sizes["action_dim"], "1"),), (Field("action", rl.get("action_env_dim", sizes["action_dim"]), "1"),)
        ),
        execute=1,
        relative=(),
        noise_method=rl.get("noise_method", "flow_sde"),
        noise_level=rl.get("noise_level", 0.5),
        num_steps=rl.get("num_steps", 4),
        joint_logprob=rl.get("joint_logprob", False),
        noise_range=tuple(rl.get("noise_logvar_range", (0.08, 0.16))),
        value_head=rl.get("add_value_head", False),
        value_from="prefix" if rl.get("value_after_vlm") else "actions",
        value_hidden=tuple(published[f"value_head.mlp.{i}.weight"][0] for i in layers),
        train_expert_only=False,
    )
    policy = (dexbotic.DexboticPolicy if is_dexbotic else pi0.Pi0Policy)(config, text.bundled()).eval()
    load_tensors(policy, filled_state(published, golden.meta["seed"]), rename=type(policy).rename)
    return policy


def prefix_of(golden: Golden, policy: pi0.Pi0Policy) -> pi0.Prefix:
    return policy.encode_prefix(*_prefix_inputs(golden))


def _prefix_inputs(golden: Golden) -> tuple[torch.Tensor, ...]:
    given = golden.tensors
    pixels = given["images"] if "images" in given else torch.stack([given[f"image_{i}"] for i in range(golden.meta["config"]["cameras"])], 1)
    return pixels, given["tokens"], given["token_mask"], given["image_masks"]


def checks(golden: Golden, actual: dict) -> Iterator[Check]:
    """Every stored output that was computed; a stored output that was not is an error."""
    outputs = golden.meta["outputs"]
    missing = sorted(outputs.keys() - actual.keys())
    if missing:
        raise KeyError(f"outputs not computed: {missing}")
    tolerances = golden.meta["tolerance"]
    for name in outputs:
        expected = golden.tensors[name]
        kind = next((entry for pattern, entry in tolerances.items() if isinstance(entry, dict) and fnmatch.fnmatchcase(name, pattern)), tolerances["default"])
        exact = not expected.dtype.is_floating_point
        yield Check(name, actual[name], expected, 0.0 if exact else kind["atol"], 0.0 if exact else kind.get("rtol", 0.0))


@torch.no_grad()
def network(golden: Golden) -> Iterator[Check]:
    policy, given = policy_of(golden), golden.tensors
    prefix = prefix_of(golden, policy)
    embedded, mask = policy.embed_prefix(*_prefix_inputs(golden))
    timing = policy.timing(given["timestep"])
    suffix_out = policy.expert_features(prefix, given["state"], given["noisy_actions"], timing)
    train_x, _ = flow.interpolate(given["train_actions"], given["train_noise"], given["train_time"])
    losses = policy.flow_loss(prefix, given["state"], given["train_actions"], given["train_noise"], given["train_time"])
    actual = {
        "prefix_embs": embedded,
        "prefix_mask": mask,
        "prefix_position_ids": mask.long().cumsum(1) - 1,
        "prefix_out": prefix.out,
        "prefix_key_last_layer": prefix.kept[-1][0].transpose(1, 2),
        "time_emb": timing.embedding,
        "suffix_embs": policy.embed_suffix(given["state"], given["noisy_actions"], timing),
        "suffix_block_ids": policy.block_ids().expand(len(mask), -1),
        "v_t": policy.velocity(suffix_out),
        "suffix_out": suffix_out,
        "train_v_t": policy.velocity(policy.expert_features(prefix, given["state"], train_x, policy.timing(given["train_time"]))),
        "loss_elementwise": losses,
        "loss": losses.mean(),
    }
    if policy.config.pi05:
        actual["adarms_cond"] = policy.time_condition(timing.embedding)
    for steps in (10, 4):
        taken = flow.walk(policy._denoise(prefix, given["state"]), given["sample_noise"], flow.euler(steps), None)
        actual[f"sample_{steps}"] = taken.chain[:, -1]
    yield from checks(golden, actual)


@torch.no_grad()
def reinforcement(golden: Golden) -> Iterator[Check]:
    """RLinf's rollout and training passes.

    Two of its numbers are computed here from our network's outputs, because the policy does it otherwise: a rollout's value is there the mean over all steps even
    when the training pass values one step, and the critic after the language model pools over padded tokens.
    """
    policy, given = policy_of(golden), golden.tensors
    config, rl = policy.config, golden.meta["config"]["rl"]
    steps, chunk, dims = config.num_steps, rl["action_chunk"], rl["action_env_dim"]
    prefix, drawn = prefix_of(golden, policy), given["denoise_inds"][:, 0]
    how, actual = config.exploration, {}
    plan = flow.schedule(how.method, steps, how.noise_level) if how.joint else flow.stochastic_at(how.method, steps, how.noise_level, drawn)
    denoise = policy._denoise(prefix, given["state"])
    taken = flow.walk(denoise, given["initial_noise"], plan, given["step_noise"])
    rows = torch.arange(len(drawn))

    def recompute(chains: torch.Tensor, index: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Before the mean over steps: [B, 1, H, A] for one step, [B, n + 1, H, A] if all count."""
        if index is not None:
            trace = {"chain": torch.stack([chains[rows, index], chains[rows, index + 1]], 1), "step": index}
            log_prob, entropy, value = flow.score(denoise, trace, how)
            return log_prob[:, None], entropy[:, None], value
        single = flow.Exploration(how.method, steps, how.noise_level)
        parts = [flow.score(denoise, {"chain": chains[:, i : i + 2], "step": torch.full_like(drawn, i)}, single) for i in range(steps)]
        zero, one = torch.zeros_like(chains[:, 0]), torch.ones_like(chains[:, 0])
        log_probs = [flow.normal_log_prob(chains[:, 0], zero, one), *(part[0] for part in parts)]
        entropies = [flow.normal_entropy(one) * (how.method == "flow_noise"), *(part[1] for part in parts)]
        return torch.stack(log_probs, 1), torch.stack(entropies, 1), None if parts[0][2] is None else torch.cat([part[2] for part in parts], 1)

    new_log_probs, new_entropy, new_values = recompute(taken.chain, None if how.joint else drawn)
    if config.value_from == "prefix":
        new_values = rollout_values = policy.value_head(upstream_pool(golden, policy, prefix.out))
        other_values = new_values
    else:
        rollout_values = taken.value.mean(1, keepdim=True)
    if how.joint:
        other_log_probs, _, other_steps = recompute(given["other_chains"], None)
    else:
        each = [recompute(given["other_chains"], torch.full_like(drawn, k)) for k in range(steps)]
        other_log_probs, other_steps = torch.cat([part[0] for part in each], 1), None if each[0][2] is None else torch.cat([part[2] for part in each], 1)
    if config.value_from == "actions":
        other_values = other_steps
    actual |= {
        "chains": taken.chain,
        "denoise_inds": given["denoise_inds"],
        "prev_values": rollout_values,
        "new_logprobs": new_log_probs,
        "new_values": new_values,
        "new_entropy": new_entropy,
        "other_logprobs": other_log_probs,
        "other_values": other_values,
        "logprobs_final": new_log_probs[:, :, :chunk, :dims].mean(1),
        "entropy_final": new_entropy[:, :, :chunk, :dims].mean((1, 2, 3))[:, None],
        "values_final": new_values.mean(1),
    }
    terms = flow.normal_log_prob(taken.chain[:, 1:], taken.mean, taken.spread)
    zero, one = torch.zeros_like(given["initial_noise"]), torch.ones_like(given["initial_noise"])
    first = flow.normal_log_prob(given["initial_noise"], zero, one)
    rollout = torch.cat([first[:, None], terms], 1).mean(1) if how.joint else terms[rows, drawn]
    actual["prev_logprobs"] = rollout[:, :chunk, :dims]
    clock = flow.grid(steps)
    actual["sigmas"] = flow.schedule("flow_sde", steps, how.noise_level).spread / (clock[:-1] - clock[1:]).sqrt()
    for k in range(steps):
        x = taken.chain[:, k]
        point = denoise(x, clock[k].expand(len(x)))
        actual[f"step{k}_velocity"] = point.velocity
        for method in flow.METHODS:
            table = flow.schedule(method, steps, how.noise_level)
            actual[f"step{k}_{_upstream(method)}_mean"] = table.keep[k] * x + table.move[k] * point.velocity
            actual[f"step{k}_{_upstream(method)}_std"] = point.spread if method == "flow_noise" else table.spread[k].expand(len(x))
    yield from checks(golden, actual)


def _upstream(method: str) -> str:
    return "flow_ode" if method == "ode" else method


def upstream_pool(golden: Golden, policy: pi0.Pi0Policy, out: torch.Tensor) -> torch.Tensor:
    """RLinf's mean_token: the image tokens of the first cameras and every language position, padding included."""
    sizes = golden.meta["config"]
    per_image, language = policy.config.vision.tokens, policy.config.max_token_len
    if sizes["rl"]["value_vlm_mode"] == "first_token":
        return out[:, 0]
    if sizes["rl"]["value_vlm_mode"] == "last_token":
        return out[:, -1]
    used = out[:, : per_image * sizes["rl"]["num_images_in_input"]]
    return torch.cat([used, out[:, -language:]], 1).mean(1)


# ------------------------------------------------------------------------------------------------ around the network


def toy_tokenizer(golden: Golden) -> text.Tokenizer:
    """The tokenizer that stands in for the published one; it lies beside the goldens of openpi."""
    for folder in (golden.path.parent, golden.path.parent.parent / "pi0", golden.path.parent.parent):
        if (folder / TOY_TOKENIZER).is_file():
            return text.Tokenizer((folder / TOY_TOKENIZER).read_bytes())
    raise FileNotFoundError(f"{TOY_TOKENIZER} is neither beside {golden.path} nor in ../pi0")


def openpi_transforms(golden: Golden) -> Iterator[Check]:
    given, actual = golden.tensors, {}
    tokenizer = toy_tokenizer(golden)
    for entry in golden.meta["texts"]:
        kind, i = entry["kind"], entry["index"]
        if kind == "pi0":
            row = tokenizer.prompt(entry["prompt"])
        else:
            row = tokenizer.prompts_with_state([entry["prompt"]], given[f"pi05_state_{i}"].numpy()[None])[0]
            yield Check(f"pi05_decoded_{i}", tokenizer.decode(row[: entry["max_len"]]), entry["decoded"])
        tokens, mask = text.pad([row], entry["max_len"])
        actual[f"{kind}_tokens_{i}"], actual[f"{kind}_mask_{i}"] = tokens[0], mask[0]
    for name in golden.meta["outputs"]:
        if name.startswith("resize_"):
            picture, size = given[f"image_{name.split('_')[-1]}"][None], given[name].shape[0]
            floats = images.to_pixels(picture.permute(0, 3, 1, 2))
            as_floats = name.startswith("resize_torch")
            actual[name] = images.resize_float_with_pad(floats, size)[0].permute(1, 2, 0) if as_floats else images.resize_with_pad(picture, size)[0]
    for kind in ("state", "actions"):
        running = normalize.RunningStatistics()
        for batch in np.split(given[f"stats_samples_{kind}"].numpy(), 5):
            running.update(batch)
        actual |= {f"stats_{kind}_{name}": torch.tensor(value, dtype=torch.float64) for name, value in vars(running.moments()).items()}
    statistics = normalize.Statistics(
        *(normalize.Moments(**{n: tuple(actual[f"stats_{kind}_{n}"].tolist()) for n in ("mean", "std", "q01", "q99")}) for kind in ("state", "actions"))
    )
    for name, quantile in (("meanstd", False), ("quantile", True)):
        policy = _transforms(pi0.Pi0Config(statistics=statistics, quantile=quantile, relative=tuple(range(6))))
        state, actions = given["state"][None], given["actions"][None]
        actual[f"{name}_state"] = policy._normalize(state, "state")[0, :8]
        target = policy._from_robot(actions, state)
        actual[f"{name}_delta_actions"] = target[0, :, :7]
        yield Check(f"{name}_padding", target[0, :, 7:], torch.zeros_like(target[0, :, 7:]))
        actual[f"{name}_back_padded"] = normalize.unnormalize(target[0].double(), statistics.actions, quantile)
        actual[f"{name}_back_libero"] = policy._to_robot(target, state)[0]
    yield from checks(golden, {name: value for name, value in actual.items() if name in golden.meta["outputs"]})


def dexbotic_transforms(golden: Golden) -> Iterator[Check]:
    given, actual = golden.tensors, {}
    size = golden.meta["image_size"]
    tokenizer = toy_tokenizer(golden)
    for entry in golden.meta["texts"]:
        actual[f"tokens_{entry['index']}"] = text.pad([tokenizer.prompt(entry["prompt"])], entry["max_len"])[0][0]
    for i in range(sum(name.startswith("pixel_values_") for name in golden.meta["outputs"])):
        actual[f"pixel_values_{i}"] = images.to_pixels(images.pad_then_resize(given[f"image_{i}"][None], size))[0].permute(2, 0, 1)

    def moments(kind: str) -> normalize.Moments:
        return normalize.Moments(*(tuple(given[f"stats_{kind}_{name}"].tolist()) for name in ("mean", "std", "min", "max")))

    statistics = normalize.Statistics(moments("state"), moments("action"))
    for name, quantile in (("meanstd", False), ("quantile", True)):
        policy = _transforms(dexbotic.DexboticConfig(statistics=statistics, quantile=quantile))
        state, actions = given["state"][None], given["actions"][None]
        target = policy._from_robot(actions, state)
        actual[f"{name}_state"] = policy._normalize(state, "state")[0]
        actual[f"{name}_action"] = target[0]
        actual[f"{name}_back"] = policy._to_robot(target, state)[0]
        wide = torch.nn.functional.pad(actions, (0, 32 - actions.shape[-1]))
        actual["delta_action"] = (wide - policy._offset(state)[:, None])[0]
    yield from checks(golden, actual)


def _transforms(config: pi0.Pi0Config) -> pi0.Pi0Policy:
    """A policy of published sizes without weights: its input and output transforms work all the same."""
    kind = dexbotic.DexboticPolicy if isinstance(config, dexbotic.DexboticConfig) else pi0.Pi0Policy
    with torch.device("meta"):
        return kind(config, text.bundled())


def manifest(golden: Golden) -> Iterator[Check]:
    """Every published tensor of the full-size checkpoint has its place, with its shape, and every place is filled."""
    published = golden.meta
    is_dexbotic = any(name.startswith("model.action_expert.") for name in published)
    kind = dexbotic.DexboticPolicy if is_dexbotic else pi0.Pi0Policy
    with torch.device("meta"):
        policy = kind(kind.Config(pi05=any(name.removeprefix("model.") == "time_mlp_in.weight" for name in published)), text.bundled())
    ours = {name: list(tensor.shape) for name, tensor in policy.state_dict().items()}
    theirs = {kind.rename(name): entry["shape"] for name, entry in published.items()}
    unused = [name for name in published if kind.rename(name) is None]
    theirs.pop(None, None)
    yield Check("keys missing here", sorted(theirs.keys() - ours.keys()), [])
    yield Check("keys without a published tensor", sorted(ours.keys() - theirs.keys()), [])
    yield Check("shapes that differ", [name for name in ours if ours[name] != theirs.get(name)], [])
    yield Check("published tensors that nothing reads", len(unused), 1)
