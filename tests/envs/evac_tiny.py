"""A world model of a few hundred thousand random weights, and start states for it."""

import numpy as np
import torch

from vlahub_envs.evac.autoencoder import AutoencoderConfig
from vlahub_envs.evac.clip import ClipConfig
from vlahub_envs.evac.model import WorldModel, WorldModelConfig
from vlahub_envs.evac.resampler import ResamplerConfig
from vlahub_envs.evac.simulation import alone
from vlahub_envs.evac.start_states import StartState, StartStates
from vlahub_envs.evac.unet import UNetConfig

SIZE, CHUNK = 32, 4


def resampler(embedding_dim: int, queries: int) -> ResamplerConfig:
    return ResamplerConfig(embedding_dim, queries, dim=16, depth=1, heads=2, dim_head=8, output_dim=24, ff_mult=2)


CONFIG = WorldModelConfig(
    height=SIZE,
    width=SIZE,
    chunk=CHUNK,
    intrinsic=((16.0, 0.0, 16.0), (0.0, 16.0, 16.0), (0.0, 0.0, 1.0)),
    unet=UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2), num_head_channels=16, context_dim=24),
    autoencoder=AutoencoderConfig(channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1),
    clip=ClipConfig(width=32, layers=1, head_width=16, patch=56, embed_dim=8, text_width=8, text_context=3, text_vocabulary=5),
    image_resampler=resampler(32, 16 * CHUNK),
    action_resampler=resampler(14, 16),
    reward_widths=(8, 8, 8, 8),
    converter_hidden=(16,),
)


def tiny(seed: int = 0, success: float | None = None) -> WorldModel:
    """`success` fixes the classifier's logit on every frame; None leaves it random."""
    torch.manual_seed(seed)
    model = WorldModel(CONFIG).eval().requires_grad_(False)
    if success is not None:
        model.reward_model.net[-1].weight.zero_()
        model.reward_model.net[-1].bias.fill_(success)
    return model


def starts(tasks: int = 2, trials: int = 3) -> StartStates:
    rng = np.random.default_rng(0)
    return StartStates(
        [
            StartState(
                rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
                np.concatenate([rng.normal(size=3) * 0.1, rng.normal(size=4), [-1.0]]).astype(np.float32),
                f"do task {task}",
                task,
                trial,
            )
            for task in range(tasks)
            for trial in range(trials)
        ]
    )


def simulator(camera_size: tuple[int, int], wrist: bool):
    """A simulation with LIBERO's interface and options, to take start states from."""
    assert camera_size == (SIZE, SIZE) and not wrist
    return alone(tiny(), starts())
