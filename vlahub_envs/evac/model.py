"""The EVAC world model: memory frames, where the end-effectors go, and a camera in; the next `chunk` frames out.

    model = WorldModel.from_pretrained("jzndd/evac_for_rlinf", suite="libero_spatial")

Parts, under the names that published files use: `model.diffusion_model` (video UNet), `first_stage_model` (autoencoder), `embedder` (CLIP),
`image_proj_model` and `cond_stage_model` (resamplers of image tokens and action rows); beside them, from files of their own, `reward_model`
(success classifier) and `action_predictor` (action converter).

Shapes: b worlds, m memory frames, c = chunk, T = m + c, H x W pixels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from vlahub_envs.evac import conditioning
from vlahub_envs.evac.acceleration import Accelerated, Acceleration, Inputs, denoise, lay_out
from vlahub_envs.evac.actions import ActionConverter
from vlahub_envs.evac.autoencoder import Autoencoder, AutoencoderConfig
from vlahub_envs.evac.clip import ClipConfig, ImageEmbedder
from vlahub_envs.evac.resampler import Resampler, ResamplerConfig
from vlahub_envs.evac.reward import RewardClassifier
from vlahub_envs.evac.schedule import Schedule, ScheduleConfig, Solver, Steps, guided, sample
from vlahub_envs.evac.unet import UNetConfig, VideoUNet

PICTURES = 32  # that the autoencoder takes at once: 256-pixel ones fill a GPU, and more would only take memory
ACTION_ROW = 14  # two arms of dxyz, drpy, gripper


@dataclass(frozen=True)
class WorldModelConfig:
    """The default is the published LIBERO model; `AGIBOT` is the other published one."""

    height: int = 256
    width: int = 256
    chunk: int = 8
    memory: int = 4
    variant: conditioning.Variant = "libero"  # how trajectory maps are drawn and what the camera's axes mean
    fps: int = 2
    domain: int = 11  # row of the domain embedding: agibotworld, which the LIBERO model keeps
    # The published environment's camera, of a 128-pixel picture although frames have 256; the file does not say which camera the weights were trained with.
    intrinsic: tuple[tuple[float, ...], ...] = ((64.0, 0.0, 64.0), (0.0, 64.0, 64.0), (0.0, 0.0, 1.0))
    camera_position: tuple[float, ...] = (0.3, 0.0, 0.6)
    camera_quaternion_wxyz: tuple[float, ...] = (0.0, -0.4332, 0.0, 0.9013)
    map_radius: int = conditioning.RADIUS  # pixels, of the disc in a trajectory map ...
    map_thickness: int = conditioning.THICKNESS  # ... and of its lines; a model of small frames draws smaller ones
    denoising_steps: int = 50  # how the weights are best sampled, where the user does not say: network calls per chunk ...
    solver: Solver = "ddim"  # ... "ddim" or "dpm" ...
    eta: float = 1.0  # ... and with how much fresh noise
    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    image_resampler: ResamplerConfig = field(default_factory=lambda: ResamplerConfig(embedding_dim=1280, num_queries=16 * 8))  # 16 tokens per chunk frame
    action_resampler: ResamplerConfig = field(default_factory=lambda: ResamplerConfig(embedding_dim=ACTION_ROW))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    reward_widths: tuple[int, ...] | None = (64, 128, 256, 512)  # None: no success classifier, so no environment
    converter_hidden: tuple[int, ...] | None = (64, 64)  # None: no action converter; poses must be given
    converter_motion: bool = False  # the converter knows how the hand moves already (actions.py); the published one does not
    action_dim: int = 7
    gripper_open: float = -1.0  # the pose's gripper number when fully open ...
    gripper_closed: float = 1.0  # ... and when closed; the published data's are not documented, these are LIBERO's action signs

    def __post_init__(self) -> None:
        stride = self.autoencoder.stride * 2 ** (len(self.unet.channel_mult) - 1)  # the UNet halves the latent once per level
        if self.chunk < 1 or self.memory < 2:
            raise ValueError(f"a world model needs chunk >= 1 and memory >= 2, not {self.chunk} and {self.memory}")
        if self.height % stride or self.width % stride:
            raise ValueError(f"height and width must be multiples of {stride}, not {self.height} and {self.width}")
        if self.variant not in get_args(conditioning.Variant):
            raise ValueError(f"variant must be one of {', '.join(get_args(conditioning.Variant))}, not {self.variant!r}")
        pairs = {
            "clip.width and image_resampler.embedding_dim": (self.clip.width, self.image_resampler.embedding_dim),
            "image_resampler.output_dim and unet.context_dim": (self.image_resampler.output_dim, self.unet.context_dim),
            "action_resampler.output_dim and unet.context_dim": (self.action_resampler.output_dim, self.unet.context_dim),
            "action_resampler.num_queries and unet.action_tokens": (self.action_resampler.num_queries, self.unet.action_tokens),
            f"action_resampler.embedding_dim and the {ACTION_ROW} numbers of an action row": (self.action_resampler.embedding_dim, ACTION_ROW),
        }
        for what, (a, b) in pairs.items():
            if a != b:
                raise ValueError(f"{what} must be equal, not {a} and {b}")

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.height // self.autoencoder.stride, self.width // self.autoencoder.stride


AGIBOT = WorldModelConfig(
    height=320,
    width=512,
    chunk=16,
    variant="agibot",
    image_resampler=ResamplerConfig(embedding_dim=1280, num_queries=16 * 16),
    reward_widths=None,
    converter_hidden=None,
)


def tiny_config(height: int, width: int, chunk: int, camera: Mapping[str, Any], variant: conditioning.Variant = "libero", **entries: Any) -> WorldModelConfig:
    """Fewer than four million weights, which a GPU trains in minutes and a CPU runs: half the frame size of the published model, eight latent channels
    because a small autoencoder needs them. `camera`: entries of the config, as `conditioning.mujoco_camera` gives them."""
    latents, tokens = 8, 64

    def resampler(embedding_dim: int, queries: int) -> ResamplerConfig:
        return ResamplerConfig(embedding_dim, queries, dim=tokens, depth=1, heads=2, dim_head=32, output_dim=tokens, ff_mult=2)

    sizes: dict[str, Any] = {
        "unet": UNetConfig(
            in_channels=3 * latents + 7,
            out_channels=latents,
            model_channels=64,
            channel_mult=(1, 1),
            num_res_blocks=1,
            attention_resolutions=(2,),
            num_head_channels=16,
            context_dim=tokens,
            domains=1,
            dropout=0.0,
        ),
        "domain": 0,
        "autoencoder": AutoencoderConfig(channels=32, channel_mult=(1, 1, 1, 2), num_res_blocks=1, latent_channels=latents),
        "clip": ClipConfig(width=64, layers=1, head_width=32, patch=16, embed_dim=8, text_width=8, text_context=1, text_vocabulary=1),
        "image_resampler": resampler(64, 16 * chunk),
        "action_resampler": resampler(ACTION_ROW, 16),
        "reward_widths": (16, 24, 32, 48),
        "converter_hidden": (128, 128),
        "converter_motion": True,
        "map_radius": max(2, height // 16),
        "map_thickness": 2,
        "denoising_steps": 10,
        "solver": "dpm",
        "eta": 0.0,
    }
    return WorldModelConfig(height=height, width=width, chunk=chunk, variant=variant, **{**sizes, **camera, **entries})


@dataclass
class Conditions:
    """What the network is told about one chunk of b worlds."""

    latent: torch.Tensor  # [b, 4, T, h, w]: the memory frames, then the newest of them repeated
    mask: torch.Tensor  # [b, 1, T, h, w]: 1, or 0 over the chunk of an unconditional branch
    map: torch.Tensor  # [b, 4, T, h, w]: latents of the trajectory maps, 0 over the memory
    rays: torch.Tensor  # [b, 6, T, h, w]: direction, origin
    tokens: torch.Tensor  # [b, image tokens + action tokens, context_dim]

    def channels(self) -> torch.Tensor:
        """[b, 15, T, h, w], in the network's order."""
        return torch.cat([self.latent, self.mask, self.map, self.rays], dim=1)


class WorldModel(nn.Module):
    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.diffusion_model = VideoUNet(config.unet)
        self.first_stage_model = Autoencoder(config.autoencoder)
        self.cond_stage_model = Resampler(config.action_resampler)
        self.embedder = ImageEmbedder(config.clip)
        self.image_proj_model = Resampler(config.image_resampler)
        self.reward_model = None if config.reward_widths is None else RewardClassifier(config.reward_widths)
        self.action_predictor = (
            None if config.converter_hidden is None else ActionConverter(config.action_dim, config.converter_hidden, config.converter_motion)
        )
        self.schedule = Schedule(config.schedule)
        self.accelerated: Accelerated | None = None

    @property
    def device(self) -> torch.device:
        return self.image_proj_model.latents.device

    @property
    def unet(self) -> VideoUNet:
        return self.model.diffusion_model

    # ------------------------------------------------------------------------------------------------ pictures and latents

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1], [..., 3, H, W] -> float32 latents [..., 4, h, w]"""
        flat = images.flatten(0, -4).to(self.first_stage_model.quant_conv.weight.dtype)
        return torch.cat([self.first_stage_model.encode(part).float() for part in flat.split(PICTURES)]).unflatten(0, images.shape[:-3])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [b, 4, n, h, w] -> float32 images of about [-1, 1], [b, n, 3, H, W]"""
        frames = latents.transpose(1, 2)
        flat = frames.flatten(0, 1).to(self.first_stage_model.quant_conv.weight.dtype)
        return torch.cat([self.first_stage_model.decode(part).float() for part in flat.split(PICTURES)]).unflatten(0, frames.shape[:2])

    def success(self, frames: torch.Tensor) -> torch.Tensor:
        """Images [b, n, 3, H, W] -> probability that the task is solved in each, float32 [b, n]"""
        return torch.cat([self.reward_model(part) for part in frames.flatten(0, 1).split(PICTURES)]).float().sigmoid().view(frames.shape[:2])

    # ------------------------------------------------------------------------------------------------ conditions

    def image_tokens(self, images: torch.Tensor) -> torch.Tensor:
        """First frames of episodes, in [-1, 1], [b, 3, H, W] -> [b, image tokens, context_dim]"""
        return self.image_proj_model(self.embedder(images).to(self.image_proj_model.latents.dtype))

    def decoded_image_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """Image tokens of latents [b, 4, h, w] after a pass through the decoder: what the published loops show from the second chunk on."""
        return self.image_tokens(self.decode(latents[:, :, None])[:, 0].clamp(-1, 1))

    def action_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Normalised action rows [b, any, 14] -> [b, action tokens, context_dim]"""
        return self.cond_stage_model(rows.to(self.device, self.cond_stage_model.latents.dtype))

    def camera_rays(self, intrinsic: np.ndarray | None = None, to_world: np.ndarray | None = None) -> torch.Tensor:
        """Ray directions and origins [6, h, w] of the model's camera, or of another (`intrinsic` in pixels of an H x W picture)."""
        config = self.config
        if intrinsic is None:
            intrinsic = np.array(config.intrinsic)
        if to_world is None:
            to_world = conditioning.pose_matrix(config.camera_position, config.camera_quaternion_wxyz)
        latent = conditioning.scaled_intrinsic(intrinsic, (config.height, config.width), config.latent_size)
        both = np.concatenate(conditioning.rays(latent, to_world, *config.latent_size), axis=-1)
        return torch.from_numpy(both).permute(2, 0, 1).to(self.device)

    def conditions(self, memory: torch.Tensor, maps: torch.Tensor, rows: torch.Tensor, image_tokens: torch.Tensor, rays: torch.Tensor) -> Conditions:
        """What the network is told.

        Args:
            memory: latents [b, 4, m, h, w].
            maps: trajectory maps of the chunk's frames, uint8 [b, c, H, W, 3].
            rows: normalised action rows [b, any, 14].
            image_tokens: of the episodes' first frames, [b, tokens, context_dim].
            rays: [6, h, w], or [b, 6, T, h, w] where the camera moves.
        """
        pictures = maps.to(self.device).permute(0, 1, 4, 2, 3).float() / 255 * 2 - 1  # [b, c, 3, H, W]
        return self.conditions_of_latents(memory, self.encode(pictures).transpose(1, 2), self.action_tokens(rows), image_tokens, rays)

    def conditions_of_latents(
        self, memory: torch.Tensor, drawn: torch.Tensor, action_tokens: torch.Tensor, image_tokens: torch.Tensor, rays: torch.Tensor
    ) -> Conditions:
        """The same with the maps' latents [b, 4, c, h, w] and the action tokens given."""
        b, channels, m, h, w = memory.shape
        c = drawn.shape[2]
        return Conditions(
            latent=torch.cat([memory, memory[:, :, -1:].expand(-1, -1, c, -1, -1)], dim=2),
            mask=memory.new_ones(b, 1, m + c, h, w),
            map=torch.cat([drawn.new_zeros(b, channels, m, h, w), drawn], dim=2),
            rays=rays if rays.ndim == 5 else rays[None, :, None].expand(b, -1, m + c, -1, -1),
            tokens=torch.cat([image_tokens, action_tokens], dim=1),
        )

    def unconditional(self, conditions: Conditions, m: int) -> Conditions:
        """The branch that guidance pushes away from: a mid-grey picture, and no newest frame over the chunk. Actions, map and rays stay."""
        grey = torch.zeros(1, 3, self.config.height, self.config.width, device=self.device)
        image = self.image_tokens(grey).expand(len(conditions.tokens), -1, -1)
        mask = conditions.mask.clone()
        mask[:, :, m:] = 0
        tokens = torch.cat([image, conditions.tokens[:, image.shape[1] :]], dim=1)
        return Conditions(conditions.latent * mask, mask, conditions.map, conditions.rays, tokens)

    # ------------------------------------------------------------------------------------------------ sampling

    def network(self, conditions: Conditions, m: int) -> Callable[[torch.Tensor, int | torch.Tensor], torch.Tensor]:
        """v [b, 4, T, h, w] as a function of the chunk's noisy latents [b, 4, c, h, w] and a timestep, for all or each [b]. The context is read once."""
        unet, config = self.unet, self.config
        dtype = unet.time_embed[0].weight.dtype
        latent = conditions.latent
        fps, domain = (torch.full((len(latent),), value, device=self.device) for value in (config.fps, config.domain))
        inputs = Inputs(latent[:, :, :m].to(dtype), conditions.channels().to(dtype), unet.read_context(conditions.tokens.to(dtype)), fps, domain)
        if self.accelerated is not None and not torch.is_grad_enabled():
            return self.accelerated.network(inputs, latent[:, :, m:].shape)

        def call(x: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
            steps = timestep if isinstance(timestep, torch.Tensor) else torch.full((len(x),), timestep, device=self.device)
            return denoise(unet, inputs, x, steps)

        return call

    def accelerate(self, mode: Acceleration) -> None:
        """Run the network through CUDA graphs ("graph"), and compiled ("compile"); the weights must stay where they are from now on. "off" undoes it."""
        if mode not in get_args(Acceleration):
            raise ValueError(f"acceleration must be one of {', '.join(get_args(Acceleration))}, not {mode!r}")
        if mode != "off" and self.device.type != "cuda":
            raise ValueError(f"acceleration {mode!r} needs a GPU; this world model lies on the {self.device.type}. Give device='cuda', or acceleration='off'")
        if mode == "compile":
            lay_out(self.unet)
            lay_out(self.first_stage_model)
        self.first_stage_model.compiled = torch.compile(self.first_stage_model.decoder.forward, dynamic=False) if mode == "compile" else None
        self.accelerated = None if mode == "off" else Accelerated(self.unet, mode)

    @torch.no_grad()
    def imagine(self, conditions: Conditions, steps: Steps, noise: torch.Tensor, step_noise: torch.Tensor | None = None, guidance: float = 1.0) -> torch.Tensor:
        """The chunk's latents [b, 4, c, h, w], float32, from `noise` of that shape (and `step_noise` [steps, ...] if the run adds noise)."""
        m = conditions.latent.shape[2] - noise.shape[2]
        conditional = self.network(conditions, m)
        if guidance == 1:
            return sample(lambda x, t: conditional(x, t)[:, :, m:], steps, noise, step_noise)
        unconditional = self.network(self.unconditional(conditions, m), m)
        return sample(lambda x, t: guided(conditional(x, t).float(), unconditional(x, t).float(), guidance)[:, :, m:], steps, noise, step_noise)

    # ------------------------------------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> WorldModel:
        """See `vlahub_envs.evac.checkpoint.load`."""
        from vlahub_envs.evac import checkpoint

        return checkpoint.load(name, **options)

    def save_pretrained(self, folder: str, dtype: torch.dtype | None = None) -> None:
        """See `vlahub_envs.evac.checkpoint.save`."""
        from vlahub_envs.evac import checkpoint

        checkpoint.save(self, folder, dtype)


def memory_rows(count: int, memory: int) -> list[int]:
    """Which of `count` frames so far the model is shown: spread over all but the last, and the last."""
    return [count * i // (memory - 1) for i in range(memory - 1)] + [count - 1]
