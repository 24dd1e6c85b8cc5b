"""Imagine the video of a given pose trajectory, chunk after chunk: what the AgiBot release is used for. No policy, no classifier, no converter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vlahub_envs.evac import conditioning
from vlahub_envs.evac.model import Conditions, WorldModel, memory_rows
from vlahub_envs.evac.schedule import Steps
from vlahub_envs.evac.simulation import to_uint8


@torch.no_grad()
def imagine_trajectory(
    model: WorldModel,
    frame: np.ndarray,
    poses: np.ndarray,
    intrinsic: np.ndarray,
    to_world: np.ndarray,
    steps: Steps,
    noise: Callable[[int], tuple[torch.Tensor, torch.Tensor | None]],
    guidance: float = 1.0,
    strict_upstream_quirks: bool = False,
    watch: Callable[[int, torch.Tensor, Conditions, torch.Tensor], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Frames and trajectory maps, each uint8 [chunks * c, H, W, 3].

    Args:
        frame: the first frame, float32 [H, W, 3] in [-1, 1] (see start_states.resized).
        poses: [m + chunks * c, 16], one row per frame; the first m rows belong to the memory, the last of them to `frame`.
        intrinsic: 3 x 3, in pixels of an H x W picture.
        to_world: camera pose, 4 x 4.
        steps: from model.schedule.steps.
        noise: per chunk number the noise [1, 4, c, h, w] and, if `steps` add noise, theirs [steps, 1, 4, c, h, w].
        guidance: 1 is none.
        strict_upstream_quirks: do as the published program does: after the first chunk the action rows come three rows late and one too many, and the image
            tokens are those of the decoded first frame.
        watch: called per chunk with its number, action rows, conditions and latents.
    """
    config = model.config
    m, c, size = config.memory, config.chunk, (config.height, config.width)
    chunks, rest = divmod(len(poses) - m, c)
    if chunks < 1 or rest:
        raise ValueError(f"poses has {len(poses)} rows; a model with memory {m} and chunk {c} needs {m} + {c} * (a whole number of chunks)")
    if frame.shape != (*size, 3) or frame.dtype != np.float32:
        raise ValueError(f"frame is {frame.dtype} {list(frame.shape)}, expected float32 {[*size, 3]} in [-1, 1]; see start_states.resized")
    rows = torch.from_numpy(conditioning.normalised(conditioning.action_rows(poses[m - 1 :])))  # [chunks * c, 14]
    drawn = conditioning.tilted(poses) if config.variant == "agibot" else poses
    maps = conditioning.trajectory_maps(drawn[m:], intrinsic, to_world, size, config.variant, config.map_radius, config.map_thickness)
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].to(model.device)
    tokens, rays = model.image_tokens(pixels), model.camera_rays(intrinsic, to_world)
    history = model.encode(pixels)[:, :, None].expand(-1, -1, m, -1, -1)  # [1, 4, frames so far, h, w]
    video = []
    for k in range(chunks):
        late = slice(k * c + m - 1, (k + 1) * c + m) if strict_upstream_quirks and k else slice(k * c, (k + 1) * c)
        memory = history[:, :, memory_rows(history.shape[2], m)]
        if strict_upstream_quirks and k == 1:
            tokens = model.decoded_image_tokens(history[:, :, 0])
        conditions = model.conditions(memory, maps[None, k * c : (k + 1) * c], rows[None, late], tokens, rays)
        latents = model.imagine(conditions, steps, *noise(k), guidance=guidance)
        history = torch.cat([history, latents], dim=2)
        video.append(to_uint8(model.decode(latents)[0]).permute(0, 2, 3, 1).cpu().numpy())
        if watch:
            watch(k, rows[None, late], conditions, latents)
    return np.concatenate(video), maps.numpy()
