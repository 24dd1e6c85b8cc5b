"""Goldens of the EVAC world model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import torch

from benchmarks.parity import Check, Golden, filled_state
from vlahub_envs.evac import checkpoint, conditioning
from vlahub_envs.evac.actions import ActionConverter
from vlahub_envs.evac.autoencoder import Autoencoder, AutoencoderConfig
from vlahub_envs.evac.clip import ClipConfig, clip_pixels
from vlahub_envs.evac.environment import EvacVectorEnv
from vlahub_envs.evac.model import AGIBOT, WorldModel, WorldModelConfig
from vlahub_envs.evac.quirks import PublishedImagination
from vlahub_envs.evac.resampler import ResamplerConfig
from vlahub_envs.evac.reward import RewardClassifier
from vlahub_envs.evac.schedule import Schedule, ScheduleConfig, guided, sample
from vlahub_envs.evac.simulation import state_of
from vlahub_envs.evac.start_states import StartState, StartStates, resized
from vlahub_envs.evac.trajectory import imagine_trajectory
from vlahub_envs.evac.unet import UNetConfig, VideoUNet


def place(golden: Golden) -> Callable[[Golden], Iterable[Check]] | None:
    if golden.path.parent.name != "evac":
        return None
    return RUNNERS.get(golden.path.stem)


def close(golden: Golden, name: str, actual: torch.Tensor, atol: float = 1e-4, rtol: float = 1e-4) -> Check:
    """`rtol` is of the expected tensor's absolute maximum, as the goldens define it."""
    expected = golden.tensors[f"out.{name}"]
    return Check(name, actual, expected, atol=atol + rtol * float(expected.abs().max()))


def inputs(golden: Golden) -> dict[str, torch.Tensor]:
    return {name.removeprefix("in."): tensor for name, tensor in golden.tensors.items() if name.startswith("in.")}


def load(module, golden, prefix):
    state = filled_state({k: v for k, v in golden.meta["state_dict"].items() if k.startswith(prefix)}, golden.meta["seed"])
    module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items()}, strict=True)
    return module.eval()


def unet_config(record: dict, action_tokens: int = 16) -> UNetConfig:
    same = ("in_channels", "out_channels", "model_channels", "num_res_blocks", "num_head_channels", "context_dim", "dropout")
    return UNetConfig(
        **{name: record[name] for name in same},
        channel_mult=tuple(record["channel_mult"]),
        attention_resolutions=tuple(record["attention_resolutions"]),
        action_tokens=action_tokens,
    )


def autoencoder_config(record: dict) -> AutoencoderConfig:
    return AutoencoderConfig(record["ch"], tuple(record["ch_mult"]), record["num_res_blocks"], record["z_channels"])


@torch.no_grad()
def unet(golden: Golden) -> Iterable[Check]:
    given, record = inputs(golden), golden.meta["config"]["unet"]
    model = load(VideoUNet(unet_config(record, golden.meta["config"]["traj_context_len"])), golden, "model.diffusion_model.")
    seen = {}
    model.init_attn[0].register_forward_hook(lambda _, __, y: seen.update(after_init_attn=y))
    model.middle_block[-1].register_forward_hook(lambda _, __, y: seen.update(after_middle=y))
    views, chunk, frames = record["n_view"], record["chunk"], given["x"].shape[2]
    yield close(golden, "temb", model.embed(given["timesteps"], given["fs"], given["domain_id"], frames, chunk))
    context = model.read_context(given["context"], views)
    y = model(given["x"], given["timesteps"], context, given["fs"], given["domain_id"], chunk, views)
    for name in ("after_init_attn", "after_middle"):
        yield close(golden, name, seen[name])
    yield close(golden, "y", y)


@torch.no_grad()
def autoencoder(golden: Golden) -> Iterable[Check]:
    given, record = inputs(golden), golden.meta["config"]["first_stage"]["ddconfig"]
    model = load(Autoencoder(autoencoder_config(record)), golden, "first_stage_model.")
    mean, logvar = model.posterior(given["image"])
    yield close(golden, "mean", mean)
    yield close(golden, "logvar", logvar)
    yield close(golden, "moments", model.quant_conv(model.encoder(given["image"])))
    yield close(golden, "encoded", model.encode(given["image"]))
    yield close(golden, "decoded", model.decode(given["latent"]))


def schedule_config(record: dict) -> ScheduleConfig:
    return ScheduleConfig(record["timesteps"], record["linear_start"], record["linear_end"], record["base_scale"])


def schedule(golden: Golden) -> Iterable[Check]:
    def near(name: str, actual: np.ndarray) -> Check:
        return Check(name, actual, golden.tensors[f"out.{name}"], atol=1e-12, rtol=1e-6)

    mine = Schedule(schedule_config(golden.meta["config"]))
    yield near("betas", mine.betas.astype(np.float32))
    yield near("alphas_cumprod", mine.alphas_cumprod)
    yield near("sqrt_alphas_cumprod", np.sqrt(mine.alphas_cumprod))
    yield near("sqrt_one_minus_alphas_cumprod", np.sqrt(1 - mine.alphas_cumprod))
    yield near("scale_arr", mine.scale)
    for count in sorted({int(name.rpartition("_")[2]) for name in golden.tensors if name.startswith("out.timesteps_")}):
        steps = mine.steps(count)
        for name in ("timesteps", "alphas", "alphas_prev", "sigmas", "scale", "scale_prev"):
            yield near(f"{name}_{count}", getattr(steps, name))


@torch.no_grad()
def ddim(golden: Golden) -> Iterable[Check]:
    given, config = inputs(golden), golden.meta["config"]
    model = load(VideoUNet(unet_config(config["unet"])), golden, "model.diffusion_model.")
    memory, chunk = config["n_previous"], config["chunk"]
    parts = [given[name] for name in ("cond_latent", "mask", "traj_latent", "ray_d", "ray_o")]

    def network(parts: list[torch.Tensor], context: torch.Tensor) -> Callable[[torch.Tensor, int], torch.Tensor]:
        read = model.read_context(context)

        def call(x: torch.Tensor, step: int) -> torch.Tensor:
            full = torch.cat([torch.cat([given["cond_latent"][:, :, :memory], x], dim=2), *parts], dim=1)
            return model(full, torch.full((len(x),), step), read, given["fs"], given["domain_id"], chunk)

        return call

    conditional = network(parts, given["context"])
    mask = given["mask"].clone()
    mask[:, :, memory:] = 0
    unconditional = network([parts[0] * mask, mask, *parts[2:]], given["context_uncond"])

    def plain(x: torch.Tensor, step: int) -> torch.Tensor:
        return conditional(x, step)[:, :, memory:]

    def with_guidance(x: torch.Tensor, step: int) -> torch.Tensor:
        return guided(conditional(x, step), unconditional(x, step), 7.5, 0.7)[:, :, memory:]

    table = Schedule(schedule_config(config["schedule"]))
    for name, eta, predict in (("eta1", 1.0, plain), ("eta0", 0.0, plain), ("cfg", 0.0, with_guidance)):
        states, cleans = [], []
        result = sample(
            predict,
            table.steps(config["steps"], eta),
            given["noise"],
            given["step_noise"][:, :, :, memory:],
            lambda x, z, s=states, c=cleans: (s.append(x), c.append(z)),
        )
        yield close(golden, f"{name}.samples", torch.cat([given["cond_latent"][:, :, :memory], result], dim=2), 0, 1e-3)
        yield close(golden, f"{name}.x", torch.stack(states), 0, 1e-3)
        yield close(golden, f"{name}.pred_x0", torch.stack(cleans), 0, 1e-3)


def batch_norm_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A variance must be positive: running_var is 1 + fill."""
    return {k: 1 + v if k.endswith("running_var") else v for k, v in state.items()}


@torch.no_grad()
def reward_model(golden: Golden) -> Iterable[Check]:
    given = inputs(golden)
    model = RewardClassifier()
    state = batch_norm_state(filled_state(golden.meta["state_dict"], golden.meta["seed"]))
    model.load_state_dict({**state, "net.7.bias": given["head_bias"]}, strict=True)
    logit = model.eval()(given["image"])[:, None]
    yield close(golden, "logit", logit)
    yield close(golden, "probability", logit.sigmoid())
    yield close(golden, "reward", (logit.sigmoid() > 0.5).float())


@torch.no_grad()
def action_predictor(golden: Golden) -> Iterable[Check]:
    given = inputs(golden)
    record = golden.meta["config"]
    model = ActionConverter(record["input_dim"] - record["output_dim"], tuple(record["hidden_dims"]))
    statistics = {name: given[name] for name in ("abs_action_mean", "abs_action_std")}
    model.load_state_dict({**filled_state(golden.meta["state_dict"], golden.meta["seed"]), **statistics}, strict=True)
    yield close(golden, "raw", model.raw(given["delta_action"], given["pose"]))
    yield close(golden, "next_pose", model(given["delta_action"], given["pose"]))
    chained = model.chain(torch.stack([given["delta_action"] * factor for factor in (-1.5, -0.5, 0.5, 1.5)], dim=1), given["pose"])
    yield close(golden, "chain", chained.transpose(0, 1))


def colormaps(golden: Golden) -> Iterable[Check]:
    yield Check("greens", conditioning.GREENS, golden.tensors["out.greens"])
    yield Check("reds", conditioning.REDS, golden.tensors["out.reds"])


def geometry(golden: Golden) -> Iterable[Check]:
    given, config = {name: tensor.numpy() for name, tensor in inputs(golden).items()}, golden.meta["config"]

    def near(name: str, actual: np.ndarray) -> Check:
        return close(golden, name, torch.from_numpy(actual), 1e-5, 0)

    agibot, libero = config["agibot"], config["rlinf"]
    size, original = (agibot["height"], agibot["width"]), (agibot["original_height"], agibot["original_width"])
    poses = given["abs_pose"]
    drawn = conditioning.tilted(np.concatenate([poses[:1]] * (agibot["n_previous"] - 1) + [poses]))
    yield near("agibot.vis_pose", drawn)
    yield near("agibot.delta_raw", conditioning.action_rows(poses))
    yield near("agibot.delta", conditioning.normalised(conditioning.action_rows(poses)))
    intrinsic = conditioning.scaled_intrinsic(given["intrinsic"], original, size)
    coarse = (size[0] // 8, size[1] // 8)
    latent = conditioning.scaled_intrinsic(intrinsic, size, coarse)
    yield near("agibot.intrinsic_scaled", intrinsic)
    yield near("agibot.intrinsic_latent", latent)
    directions, origins = conditioning.rays(latent, given["c2w"], *coarse)
    yield near("agibot.ray_d", directions)
    yield near("agibot.ray_o", origins)
    rows = drawn[slice(*agibot["traj_rows"])]
    maps = conditioning.trajectory_maps(rows, intrinsic, given["c2w"], size, "agibot")
    yield Check("agibot.traj_map", maps.numpy(), golden.tensors["out.agibot.traj_map"])

    size = (libero["height"], libero["width"])
    poses = given["libero_pose"]
    yield near("rlinf.delta", conditioning.normalised(conditioning.action_rows(poses[libero["n_previous"] - 1 :])))
    maps = conditioning.trajectory_maps(poses[libero["traj_rows"]], given["libero_intrinsic"], given["libero_c2w"], size, "libero")
    yield Check("rlinf.traj_map", maps.numpy(), golden.tensors["out.rlinf.traj_map"])


def world_config(meta: dict) -> WorldModelConfig:
    """The configuration of a whole (tiny) world model, in the words of the goldens."""
    config = meta["config"]
    params = (
        {name: config["acwm"][f"{name}_config"]["params"] for name in ("unet", "first_stage", "cond_stage", "image_proj_stage")} if "acwm" in config else {}
    )
    first, action, image = (
        params.get(long, config.get(short))
        for long, short in (("first_stage", "first_stage"), ("cond_stage", "cond_stage"), ("image_proj_stage", "image_proj"))
    )

    def resampler(record: dict) -> ResamplerConfig:
        record = dict(record)
        queries = record.pop("num_queries") * record.pop("video_length", 1)
        return ResamplerConfig(num_queries=queries, **record)

    vision, text = config["open_clip"]["vision_cfg"], config["open_clip"]["text_cfg"]
    return WorldModelConfig(
        height=config.get("height", 48),
        width=config.get("width", 64),
        chunk=config["chunk"],
        memory=config["n_previous"],
        fps=config.get("fps", 2),
        domain=config.get("domain_id", 11),
        unet=unet_config(params["unet"]) if params else UNetConfig(model_channels=32, num_head_channels=8, channel_mult=(1,), context_dim=image["output_dim"]),
        autoencoder=autoencoder_config(first["ddconfig"]),
        clip=ClipConfig(
            width=vision["width"],
            layers=vision["layers"],
            head_width=vision["head_width"],
            patch=vision["patch_size"],
            embed_dim=config["open_clip"]["embed_dim"],
            text_width=text["width"],
            text_context=text["context_length"],
            text_vocabulary=text["vocab_size"],
        ),
        image_resampler=resampler(image),
        action_resampler=resampler(action),
        schedule=schedule_config(config["acwm"]) if params else ScheduleConfig(),
    )


@torch.no_grad()
def conditioning_golden(golden: Golden) -> Iterable[Check]:
    given, config = inputs(golden), golden.meta["config"]
    height, width = given["video"].shape[-2:]
    model = WorldModel(dataclasses.replace(world_config(golden.meta), height=height, width=width)).eval()
    state = filled_state(golden.meta["state_dict"], golden.meta["seed"])
    model.load_state_dict({**model.state_dict(), **state}, strict=True)  # the golden has no UNet
    m = config["n_previous"]
    video = given["video"].transpose(1, 2).float() / 127.5 - 1  # [b, T, 3, H, W]
    yield close(golden, "clip_pixels", clip_pixels(video[:1, 0]))
    yield close(golden, "clip_tokens", model.embedder(video[:, 0]))
    latents = model.encode(video).transpose(1, 2)
    yield close(golden, "z", latents)
    tokens = model.image_tokens(video[:, 0])
    yield close(golden, "image_tokens", tokens)
    yield close(golden, "action_tokens", model.action_tokens(given["delta_action"]))
    cameras = [
        torch.stack([model.camera_rays(k.numpy(), pose.numpy()) for pose in poses], dim=1)
        for k, poses in zip(given["intrinsic"], given["extrinsic"], strict=True)
    ]
    maps = given["traj"].permute(0, 2, 3, 4, 1)[:, m:]
    conditions = model.conditions(latents[:, :, :m], maps, given["delta_action"], tokens, torch.stack(cameras))
    yield close(golden, "cond_latent", conditions.latent)
    yield close(golden, "mask", conditions.mask)
    yield close(golden, "traj_latent", conditions.map)
    yield close(golden, "ray_d", conditions.rays[:, :3])
    yield close(golden, "ray_o", conditions.rays[:, 3:])
    yield close(golden, "context", conditions.tokens)


def manifest_full(golden: Golden) -> Iterable[Check]:
    expected = {name: tuple(entry["shape"]) for name, entry in golden.meta.items()}
    yield from same_shapes("published file", checkpoint.published_shapes(WorldModelConfig()), expected)


def same_shapes(what: str, actual: dict[str, tuple], expected: dict[str, tuple]) -> Iterable[Check]:
    differing = sorted(name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name))
    yield Check(f"{what}: names and shapes that differ", differing, [])
    yield Check(f"{what}: tensors", [len(actual)], [len(expected)])


def manifest_parts(golden: Golden) -> Iterable[Check]:
    model = checkpoint.empty_model(WorldModelConfig())
    for part, name in ((model.reward_model, "reward_model"), (model.action_predictor, "action_predictor")):
        expected = {key: tuple(entry["shape"]) for key, entry in golden.meta[name]["keys"].items()}
        shapes = {key: tuple(tensor.shape) for key, tensor in part.state_dict().items() if key not in checkpoint.STATISTICS}
        yield from same_shapes(name, shapes, expected)
    ours, other = checkpoint.published_shapes(WorldModelConfig()), checkpoint.published_shapes(AGIBOT)
    for key, shapes in golden.meta["world_model_agibot"]["shape_differences"].items():
        yield Check(f"{key} (libero)", list(ours[key]), shapes["rlinf"])
        yield Check(f"{key} (agibot)", list(other[key]), shapes["agibot"])
    differing = sorted(key for key in ours if ours[key] != other[key])
    yield Check("shapes that differ between the variants", differing, sorted(golden.meta["world_model_agibot"]["shape_differences"]))


def rollout_model(golden: Golden, **changes) -> WorldModel:
    """A whole tiny world model with the golden's weights. Classifier and converter are filled under their own names."""
    config = dataclasses.replace(world_config(golden.meta), **changes)
    seed, shapes = golden.meta["seed"], golden.meta["state_dict"]
    beside = ("reward_model.", "action_predictor.")
    state = {}
    for prefix in ("", *beside):
        part = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix) and (prefix or not key.startswith(beside))}
        state |= {prefix + key: tensor for key, tensor in batch_norm_state(filled_state(part, seed)).items()}
    given = inputs(golden)
    if "decoder_scale" in given:
        for name in ("weight", "bias"):
            state[f"first_stage_model.decoder.conv_out.{name}"] *= given["decoder_scale"]
        state["action_predictor.network.4.weight"] *= given["predictor_scale"]
        state |= {"action_predictor.network.4.bias": given["predictor_bias"], "reward_model.net.7.bias": given["head_bias"]}
        state |= {"action_predictor.abs_action_mean": torch.zeros(1, 8), "action_predictor.abs_action_std": torch.ones(1, 8)}
    model = WorldModel(config)
    state = {name: tensor for name, tensor in state.items() if name not in checkpoint.SCHEDULE_BUFFERS}
    model.load_state_dict(state, strict=True)
    return model.eval()


class Recorded(PublishedImagination):
    """The published loop with the golden's noise, keeping what each stage was fed."""

    def __init__(self, *args, noises: list[tuple[torch.Tensor, torch.Tensor]], **kwargs):
        super().__init__(*args, **kwargs)
        self.noises, self.seen = noises, []
        model = self.model
        make, imagine, decode = model.conditions, model.imagine, model.decode

        def conditions(memory, maps, rows, tokens, rays):
            made = make(memory, maps, rows, tokens, rays)
            self.seen.append({"maps": maps, "rows": rows, "conditions": made})
            return made

        def imagined(made, *rest):
            latents = imagine(made, *rest)
            self.seen[-1]["samples"] = torch.cat([made.latent[:, :, : -latents.shape[2]], latents], dim=2)
            return latents

        def decoded(latents):
            self.seen[-1]["frames"] = decode(latents)
            return self.seen[-1]["frames"]

        model.conditions, model.imagine, model.decode = conditions, imagined, decoded

    def poses(self, worlds, actions):
        planned = super().poses(worlds, actions)
        self.buffer = worlds[0].buffer(planned[0][0])
        return planned

    def noise(self, worlds):
        return self.noises[len(self.seen) - 1]


@torch.no_grad()
def rollout_rlinf(golden: Golden) -> Iterable[Check]:
    given, config = inputs(golden), golden.meta["config"]
    m, size = config["n_previous"], (config["height"], config["width"])
    camera = config["camera"]
    model = rollout_model(
        golden,
        intrinsic=tuple(map(tuple, given["intrinsic"].tolist())),
        camera_position=tuple(camera["position"]),
        camera_quaternion_wxyz=tuple(camera["quaternion_wxyz"]),
    )
    noises = [(first, later[:, :, :, m:]) for first, later in zip(given["noise"], given["step_noise"], strict=True)]
    start = StartState(resized(given["frame"].numpy(), *size), given["init_ee_pose"].numpy(), "any", 0, 0)
    imagination = Recorded(model, StartStates([start]), noises=noises, denoising_steps=config["ddim_steps"], eta=config["eta"], clean_end=False)
    env = EvacVectorEnv(imagination=imagination, max_steps=config["max_episode_steps"])

    def relative(name: str, actual: object) -> Check:
        return close(golden, name, torch.as_tensor(actual), 0, 2e-3)

    def exact(name: str, actual: object, atol: float = 0) -> Check:
        return Check(name, actual, golden.tensors[f"out.{name}"], atol=atol)

    def shown(stage: str, observation: dict) -> Check:
        """Our states have LIBERO's layout, the published ones are the pose twice."""
        expected = golden.tensors[f"out.{stage}.state"][0, :8].numpy()
        return Check(f"{stage}.state", observation["states"][0], state_of(expected, model.config), atol=1e-4)

    observation, _ = env.reset(seed=0)
    yield exact("reset.full_image", observation["main_images"])
    yield relative("reset.memory", start.pixels()[None])
    yield shown("reset", observation)
    total = 0.0
    for chunk, actions in enumerate(given["actions"]):
        result = env.step_chunk(actions.numpy())
        seen, name = imagination.seen[chunk], f"chunk{chunk}"
        conditions = seen["conditions"]
        yield exact(f"{name}.action_buffer", np.concatenate([imagination.buffer] * 2, axis=-1)[None], 1e-4)
        yield exact(f"{name}.delta_action", seen["rows"], 1e-4)
        yield Check(f"{name}.traj_map", seen["maps"][0], golden.tensors[f"out.{name}.traj_map"][m:])
        yield relative(f"{name}.cond_latent", conditions.latent)
        yield relative(f"{name}.traj_latent", conditions.map)
        yield close(golden, f"{name}.context", conditions.tokens, 1e-4, 0)
        yield relative(f"{name}.samples", seen["samples"])
        yield relative(f"{name}.frames", seen["frames"][0])
        yield exact(f"{name}.full_image", result.observation["main_images"], 1)
        yield shown(name, result.observation)
        yield relative(f"{name}.success_probability", result.info["success_probability"].T)
        total += result.reward.sum()
        yield exact(f"{name}.rewards", result.reward)
        yield exact(f"{name}.terminations", result.terminated)
        yield exact(f"{name}.truncations", result.truncated)
        yield exact(f"{name}.return", [total])
        yield exact(f"{name}.episode_len", result.info["steps"])
    rays = imagination.rays
    yield relative("ray_d", rays[:3])
    yield relative("ray_o", rays[3:])
    env.close()


@torch.no_grad()
def rollout_agibot(golden: Golden) -> Iterable[Check]:
    given, config = inputs(golden), golden.meta["config"]
    size = (config["height"], config["width"])
    model = rollout_model(golden, variant="agibot", reward_widths=None, converter_hidden=None)
    frame = given["frame"].numpy()
    poses = given["abs_pose"].numpy()
    stages = []
    video, maps = imagine_trajectory(
        model,
        resized(frame, *size, antialias=True),
        poses,
        conditioning.scaled_intrinsic(given["intrinsic"].numpy(), frame.shape[:2], size),
        given["c2w"].numpy(),
        model.schedule.steps(config["ddim_steps"], config["eta"]),
        lambda k: (given["noise"][k], None),
        guidance=config["guidance"],
        strict_upstream_quirks=True,
        watch=lambda *stage: stages.append(stage),
    )
    yield close(golden, "vis_pose", torch.from_numpy(conditioning.tilted(poses)), 1e-5, 0)
    yield close(golden, "delta", torch.from_numpy(conditioning.normalised(conditioning.action_rows(poses[config["n_previous"] - 1 :]))), 1e-5, 0)
    for k, rows, conditions, latents in stages:
        yield close(golden, f"chunk{k}.delta_action", rows, 1e-5, 0)
        yield close(golden, f"chunk{k}.cond_latent", conditions.latent, 0, 1e-3)
        yield close(golden, f"chunk{k}.traj_latent", conditions.map, 0, 1e-3)
        yield close(golden, f"chunk{k}.context", conditions.tokens, 0, 1e-3)
        samples = torch.cat([conditions.latent[:, :, : config["n_previous"]], latents], dim=2)
        yield close(golden, f"chunk{k}.samples", samples, 0, 1e-3)
    yield Check("traj_video", maps, golden.tensors["out.traj_video"])
    # at most 1 % of the values may differ by more than 1
    difference = (torch.from_numpy(video).int() - golden.tensors["out.video"].int()).abs()
    yield Check("video: share of values that differ by more than 1", [float((difference > 1).float().mean())], [0.0], atol=0.01)


RUNNERS: dict[str, Callable[[Golden], Iterable[Check]]] = {
    "unet": unet,
    "unet_multiview": unet,
    "autoencoder": autoencoder,
    "schedule": schedule,
    "ddim": ddim,
    "conditioning": conditioning_golden,
    "reward_model": reward_model,
    "action_predictor": action_predictor,
    "colormaps": colormaps,
    "geometry": geometry,
    "rollout_rlinf": rollout_rlinf,
    "rollout_agibot": rollout_agibot,
    "manifest_full": manifest_full,
    "manifest_parts": manifest_parts,
}
