"""The whole imagined chunk against numbers computed when the model was equal to the published implementation (benchmarks/parity.py).

Weights are functions of their names, so a change of any name, order, constant or formula shows here within a second.
"""

import numpy as np
import pytest
import torch

from benchmarks.parity import filled_state
from tests.envs.evac_tiny import CHUNK, CONFIG, SIZE
from vlahub_envs.evac.model import WorldModel
from vlahub_envs.evac.simulation import alone


def filled_model() -> WorldModel:
    made = WorldModel(CONFIG).eval().requires_grad_(False)
    state = filled_state({name: tensor.shape for name, tensor in made.state_dict().items() if tensor.is_floating_point()}, seed=0)
    for name in state:
        if name.endswith(("running_var", "abs_action_std")):
            state[name] += 1  # must be positive
    made.load_state_dict(state, strict=False)
    return made


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return filled_model()


def image(seed: int) -> torch.Tensor:
    waves = torch.linspace(0, 6, SIZE)
    return torch.stack([torch.outer(torch.sin(waves + i + seed), torch.cos(2 * waves - i)) for i in range(3)])


def waves(*shape: int) -> torch.Tensor:
    """Numbers that look like noise and need no generator."""
    return (torch.arange(int(np.prod(shape)), dtype=torch.float64).mul(1.7).sin() * 43758.5453 % 2 - 1).float().view(shape)


def fingerprint(x: torch.Tensor) -> list[float]:
    flat = x.double().flatten()
    return [float(flat.mean()), float(flat.std()), float(flat[len(flat) // 3]), float(flat[-1])]


EXPECTED = {  # mean, standard deviation, one number in the middle, the last number
    "latents": [0.024034, 0.10129, 0.044145, -0.019076],
    "image tokens": [-0.00012753, 0.97785, 0.82742, 0.71792],
    "action tokens": [0.0012333, 1.0071, 0.43086, 0.55361],
    "map": [0.014378, 0.068623, -0.13986, -0.035427],
    "rays": [0.12919, 0.47447, 0.0, 0.6],
    "v": [0.069412, 0.45973, 0.81023, -0.39177],
    "imagined": [-0.0864, 0.5683, 0.1274, 0.14349],
    "guided": [-0.071791, 0.73202, 1.0266, -0.25848],
    "frames": [0.097111, 0.73222, 0.028508, -0.019405],
    "verdict": [0.18995, 0.012502, 0.1807, 0.1933],
    "poses": [-0.61108, 0.71088, -1.6211, -0.52364],
}


def computed(model: WorldModel) -> dict[str, list[float]]:
    pixels = torch.stack([image(0), image(1)])
    latents = model.encode(pixels)
    tokens = model.image_tokens(pixels)
    memory = torch.stack([latents, latents * 0.5, -latents, latents.flip(-1)], dim=2)
    maps = ((waves(2, CHUNK, SIZE, SIZE, 3) + 1) * 127).to(torch.uint8)
    made = model.conditions(memory, maps, waves(2, CHUNK, 14), tokens, model.camera_rays())
    noise = waves(2, 4, CHUNK, *CONFIG.latent_size)
    v = model.network(made, CONFIG.memory)(noise, 600)
    imagined = model.imagine(made, model.schedule.steps(2, eta=0.0), noise)
    guided = model.imagine(made, model.schedule.steps(2, eta=0.0), noise, guidance=3.0)
    frames = model.decode(imagined)
    poses = model.action_predictor.chain(waves(2, CHUNK, 7), waves(2, 8))
    return {
        "latents": fingerprint(latents),
        "image tokens": fingerprint(tokens),
        "action tokens": fingerprint(made.tokens[:, -16:]),
        "map": fingerprint(made.map),
        "rays": fingerprint(made.rays),
        "v": fingerprint(v),
        "imagined": fingerprint(imagined),
        "guided": fingerprint(guided),
        "frames": fingerprint(frames),
        "verdict": fingerprint(model.reward_model(frames.flatten(0, 1))),
        "poses": fingerprint(poses),
    }


@torch.no_grad()
def test_every_stage_gives_its_numbers(model):
    found = computed(model)
    assert found.keys() == EXPECTED.keys()
    for stage, numbers in found.items():
        assert numbers == pytest.approx(EXPECTED[stage], abs=2e-4, rel=2e-3), stage


WORLD = [137.75, 0.54677, 0.66676, 137.22, 0.5439, -0.27364]  # mean brightness, success probability and height after each of two chunks


def test_a_world_gives_its_numbers(model):
    world = alone(model, denoising_steps=2, eta=0.0, threshold=0.9)
    picture = ((image(0).permute(1, 2, 0) + 1) * 127).to(torch.uint8).numpy()
    world.reset(0, {"image": picture, "pose": np.array([0.5, 0.1, 0.2, 0, 0, 0, 1, -1], np.float32), "text": "go"})
    world.imagination.noise = lambda worlds: (waves(1, 4, CHUNK, *CONFIG.latent_size), None)
    seen = []
    for chunk in waves(2, CHUNK, 7).numpy():
        outcomes = world.apply(chunk)
        seen += [float(world.observe()["main_images"].mean()), float(outcomes.info["success_probability"][-1]), float(world.pose[2])]
    assert seen == pytest.approx(WORLD, rel=5e-3, abs=2e-3)
