"""The EVAC world model: sizes, sampler, and what must not depend on the batch."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.envs.evac_tiny import CHUNK, CONFIG, SIZE, tiny
from vlahub_envs.evac import checkpoint, unet
from vlahub_envs.evac.acceleration import Inputs, denoise, lay_out, size_for
from vlahub_envs.evac.clip import clip_pixels
from vlahub_envs.evac.model import AGIBOT, WorldModelConfig, memory_rows
from vlahub_envs.evac.schedule import Schedule, ScheduleConfig, guided, sample
from vlahub_envs.evac.unet import GroupNorm, attend, attend_packed

MEMORY = CONFIG.memory


def conditions(model, worlds: int):
    generator = torch.Generator().manual_seed(1)
    memory = torch.randn(worlds, 4, MEMORY, *CONFIG.latent_size, generator=generator)
    maps = torch.randint(0, 256, (worlds, CHUNK, SIZE, SIZE, 3), generator=generator).to(torch.uint8)
    rows = torch.randn(worlds, CHUNK, 14, generator=generator)
    tokens = model.image_tokens(torch.rand(worlds, 3, SIZE, SIZE, generator=generator) * 2 - 1)
    return model.conditions(memory, maps, rows, tokens, model.camera_rays())


def rows_of(made, rows):
    return type(made)(**{field.name: getattr(made, field.name)[rows] for field in dataclasses.fields(made)})


def test_full_size_models_have_the_published_parameter_counts():
    model = checkpoint.empty_model(WorldModelConfig())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count == {
        "model": 1_464_484_100,
        "first_stage_model": 83_653_863,
        "cond_stage_model": 47_245_312,
        "embedder": 683_800_065,
        "image_proj_model": 48_656_384,
        "reward_model": 11_180_033,
        "action_predictor": 5_704,
    }
    assert len(checkpoint.published_shapes(WorldModelConfig())) == 2310
    assert checkpoint.published_shapes(AGIBOT)["image_proj_model.latents"] == (1, 256, 1024)


def test_a_world_is_imagined_the_same_in_any_batch():
    model, steps = tiny(), Schedule(ScheduleConfig()).steps(3, eta=1.0)
    made = conditions(model, 3)
    noise, later = torch.randn(3, 4, CHUNK, *CONFIG.latent_size), torch.randn(3, 3, 4, CHUNK, *CONFIG.latent_size)
    together = model.imagine(made, steps, noise, later)
    assert together.isfinite().all()
    alone = model.imagine(rows_of(made, [2]), steps, noise[[2]], later[:, [2]])
    torch.testing.assert_close(together[[2]], alone, atol=1e-4, rtol=1e-4)


def test_every_condition_reaches_the_result():
    model = tiny()
    made = conditions(model, 1)
    x = torch.randn(1, 4, CHUNK, *CONFIG.latent_size)
    v = model.network(made, MEMORY)(x, 500)
    assert v.shape == (1, 4, MEMORY + CHUNK, *CONFIG.latent_size)
    for name in ("latent", "mask", "map", "rays"):
        other = dataclasses.replace(made, **{name: getattr(made, name) + 0.5})
        assert not torch.allclose(v, model.network(other, MEMORY)(x, 500), atol=1e-5), name
    image, action = made.tokens.clone(), made.tokens.clone()
    image[:, :-16] += 1
    action[:, -16:] += 1
    for tokens in (image, action):
        assert not torch.allclose(v, model.network(dataclasses.replace(made, tokens=tokens), MEMORY)(x, 500), atol=1e-6)
    assert not torch.allclose(v, model.network(made, MEMORY)(x, 900), atol=1e-5)


def test_conditions_of_a_chunk():
    made = conditions(tiny(), 2)
    assert made.channels().shape == (2, 15, MEMORY + CHUNK, *CONFIG.latent_size)
    assert (made.map[:, :, :MEMORY] == 0).all() and (made.map[:, :, MEMORY:] != 0).any()
    torch.testing.assert_close(made.latent[:, :, MEMORY:], made.latent[:, :, MEMORY - 1 : MEMORY].expand(-1, -1, CHUNK, -1, -1))
    away = tiny().unconditional(made, MEMORY)
    assert (away.mask[:, :, MEMORY:] == 0).all() and (away.latent[:, :, MEMORY:] == 0).all()
    torch.testing.assert_close(away.latent[:, :, :MEMORY], made.latent[:, :, :MEMORY])
    torch.testing.assert_close(away.tokens[:, -16:], made.tokens[:, -16:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 40}, "multiples of 16, not 40 and 32"),
        ({"memory": 1}, "memory >= 2"),
        ({"variant": "franka"}, "one of libero, agibot"),
        (
            {"image_resampler": dataclasses.replace(CONFIG.image_resampler, output_dim=8)},
            "image_resampler.output_dim and unet.context_dim must be equal, not 8 and 24",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_memory_is_spread_over_the_history():
    assert memory_rows(4, 4) == [0, 1, 2, 3] and memory_rows(12, 4) == [0, 4, 8, 11] and memory_rows(20, 4) == [0, 6, 13, 19]


def test_decoding_is_per_picture():
    model = tiny()
    latents = torch.randn(2, 4, 3, *CONFIG.latent_size)
    together = model.decode(latents)
    assert together.shape == (2, 3, 3, SIZE, SIZE)
    torch.testing.assert_close(model.decode(latents[1:, :, 2:])[0, 0], together[1, 2], atol=1e-5, rtol=1e-4)
    assert model.encode(together).shape == (2, 3, 4, *CONFIG.latent_size)


def test_pictures_are_blurred_only_where_they_shrink():
    board = (torch.arange(1024)[:, None] + torch.arange(1024)) % 2 * 2.0 - 1
    board = board.expand(1, 3, -1, -1)
    assert clip_pixels(board).std(dim=(-2, -1)).max() < 0.05
    assert clip_pixels(board[:, :, :200, :200]).std(dim=(-2, -1)).min() > 0.8
    grey = clip_pixels(torch.zeros(1, 3, 300, 500))
    torch.testing.assert_close(
        grey[0, :, 5, 5], torch.tensor([(0.5 - m) / s for m, s in ((0.48145466, 0.26862954), (0.4578275, 0.26130258), (0.40821073, 0.27577711))])
    )


# ------------------------------------------------------------------------------------------------ schedule and sampler


def test_the_schedule_ends_in_pure_noise():
    schedule = Schedule(ScheduleConfig())
    assert schedule.alphas_cumprod[-1] == 0
    np.testing.assert_allclose(schedule.alphas_cumprod[[0, 500, 998]], [0.99915, 0.24102, 1.97e-7], rtol=2e-3)
    assert schedule.steps(50).timesteps.tolist() == list(range(19, 1000, 20))
    assert schedule.steps(27).timesteps[[0, 1, -1]].tolist() == [36, 73, 999]
    with pytest.raises(ValueError, match="from 1 to 1000, not 0"):
        schedule.steps(0)


def oracle(schedule: Schedule, latents: torch.Tensor):
    """The v-prediction of a network that knows the answer."""

    def predict(x: torch.Tensor, step: int) -> torch.Tensor:
        abar, scaled = float(schedule.alphas_cumprod[step]), float(schedule.scale[step]) * latents
        noise = (x - abar**0.5 * scaled) / (1 - abar) ** 0.5
        return schedule.noised(latents, noise, torch.full((len(x),), step))[1]

    return predict


@pytest.mark.parametrize(
    ("count", "eta", "solver"), [(1, 0.0, "ddim"), (5, 0.0, "ddim"), (20, 1.0, "ddim"), (25, 1.0, "ddim"), (50, 1.0, "ddim"), (1, 0.0, "dpm"), (8, 0.0, "dpm")]
)
def test_a_perfect_network_is_sampled_exactly(count, eta, solver):
    schedule, latents = Schedule(ScheduleConfig()), torch.randn(2, 4, 3, 2, 2)
    noise, later = torch.randn(latents.shape), torch.randn(count, *latents.shape)
    found = sample(oracle(schedule, latents), schedule.steps(count, eta, True, solver), noise, later)
    torch.testing.assert_close(found, latents, atol=2e-5, rtol=1e-4)


def test_the_second_order_solver_needs_fewer_steps():
    """Latents that are standard Gaussian: the best prediction is known, and the exact way from noise to latents changes nothing."""
    schedule, noise = Schedule(ScheduleConfig()), torch.ones(1, 1, 1, 1, 1)

    def predict(x: torch.Tensor, step: int) -> torch.Tensor:
        abar, scale = float(schedule.alphas_cumprod[step]), float(schedule.scale[step])
        signal, sigma = abar**0.5 * scale, (1 - abar) ** 0.5
        latents = signal / (signal**2 + sigma**2) * x
        return schedule.noised(latents, (x - signal * latents) / sigma, torch.full((1,), step))[1]

    def error(steps: int, solver: str) -> float:
        return abs(float(sample(predict, schedule.steps(steps, 0.0, True, solver), noise)) - 1)

    assert error(10, "dpm") < 0.5 * error(10, "ddim") and error(40, "dpm") < 0.25 * error(10, "dpm")
    with pytest.raises(ValueError, match="be 0 with the solver 'dpm'"):
        schedule.steps(10, 1.0, True, "dpm")
    with pytest.raises(ValueError, match="solver must be one of ddim, dpm"):
        schedule.steps(10, 0.0, True, "euler")


@pytest.mark.parametrize(("count", "shrink"), [(50, 0.986), (27, 0.973), (10, 0.926), (5, 0.85)])
def test_the_published_ending_shrinks_the_result(count, shrink):
    schedule, latents = Schedule(ScheduleConfig()), torch.randn(1, 4, 3, 8, 8)
    found = sample(oracle(schedule, latents), schedule.steps(count, 0.0), torch.randn_like(latents))
    assert float((found * latents).sum() / (latents * latents).sum()) == pytest.approx(shrink, abs=0.01)


def test_noise_must_be_given_where_it_is_needed():
    schedule = Schedule(ScheduleConfig())
    with pytest.raises(ValueError, match="step_noise"):
        sample(lambda x, t: x, schedule.steps(4, 1.0), torch.zeros(1, 4, 1, 1, 1))


def test_guidance_of_one_changes_nothing_but_the_scale():
    v, u = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    torch.testing.assert_close(guided(v, u, 1.0), v)
    pushed = guided(v, u, 7.5, rescale=1.0)
    torch.testing.assert_close(pushed.std(dim=(1, 2, 3, 4)), v.std(dim=(1, 2, 3, 4)))


@pytest.mark.parametrize("side", [1, 4])
def test_norms_are_exact_where_a_picture_is_flat(side):
    """Two nearly equal numbers per group: a variance computed as the difference of two large sums would be noise. Also for pictures of one pixel, on two threads."""
    torch.manual_seed(0)
    norm, before = GroupNorm(64, eps=1e-6), torch.get_num_threads()
    x = torch.empty_strided((14, 64, side, side), (64 * side * side, 1, 64 * side, 64))  # as a channels-last convolution leaves it
    x.copy_(10 + 1e-3 * torch.randn(14, 64, side, side))
    try:
        torch.set_num_threads(2)
        error = (norm(x) - norm.double()(x.double())).abs().max()
    finally:
        torch.set_num_threads(before)
    assert error < 5e-3  # mean / std is 1e4, so rounding alone gives 1e-3


# ------------------------------------------------------------------------------------------------ acceleration


def test_padded_batches_give_the_same_answer():
    """What a CUDA graph of a larger batch is given: the last world repeated."""
    model = tiny()
    made = conditions(model, 3)
    x = torch.randn(3, 4, CHUNK, *CONFIG.latent_size)
    wanted = model.network(made, MEMORY)(x, 500)
    context = model.unet.read_context(made.tokens)
    given = Inputs(made.latent[:, :, :MEMORY], made.channels(), context, torch.full((3,), CONFIG.fps), torch.full((3,), CONFIG.domain))
    found = denoise(model.unet, given.padded(4), torch.cat([x, x[-1:]]), torch.full((4,), 500))
    torch.testing.assert_close(found[:3], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[3], wanted[2], atol=1e-5, rtol=1e-5)


def test_graphs_are_made_for_few_batch_sizes():
    sizes = [size_for(batch) for batch in range(1, 65)]
    assert all(size >= batch and size <= 1.5 * batch for batch, size in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]


def test_acceleration_needs_a_gpu_and_a_name():
    with pytest.raises(ValueError, match="'graph' needs a GPU; this world model lies on the cpu"):
        tiny().accelerate("graph")
    with pytest.raises(ValueError, match="must be one of off, graph, compile"):
        tiny().accelerate("fast")


def test_the_layout_of_the_weights_changes_nothing():
    model = tiny()
    made, x = conditions(model, 1), torch.randn(1, 4, CHUNK, *CONFIG.latent_size)
    wanted = model.network(made, MEMORY)(x, 500), model.decode(x)
    lay_out(model.unet)
    lay_out(model.first_stage_model)
    assert model.unet.out[2].weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip((model.network(made, MEMORY)(x, 500), model.decode(x)), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [16, 12, 7, 1])
def test_rows_that_share_a_tile_do_not_see_each_other(rows):
    q, k, v = (torch.randn(rows, 12, 3, 16, generator=torch.Generator().manual_seed(i)).transpose(1, 2) for i in range(3))
    torch.testing.assert_close(attend_packed(q, k, v), attend(q, k, v))


def test_very_many_rows_are_attended_to_in_parts(monkeypatch):
    q, k, v = (torch.randn(7, 12, 3, 16).transpose(1, 2).requires_grad_() for _ in range(3))
    whole = attend(q, k, v)
    (gradient,) = torch.autograd.grad(whole.sum(), q)
    monkeypatch.setattr(unet, "MOST_ROWS", 3)
    calls = []
    inner = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: calls.append(len(q)) or inner(q, k, v))
    torch.testing.assert_close(attend(q, k, v), whole)
    torch.testing.assert_close(torch.autograd.grad(attend(q, k, v).sum(), q)[0], gradient)
    assert calls == [3, 3, 1] * 2


def test_training_never_packs(monkeypatch):
    """Packing needs a mask, and not every backend has a backward pass for one."""

    def refuse(*given):
        raise AssertionError("packed")

    monkeypatch.setattr(unet, "attend_packed", refuse)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    attention = unet.Attention(32, 2, short=True)
    rows = torch.randn(4, 12, 32)
    attention(rows).sum().backward()
    with torch.no_grad(), pytest.raises(AssertionError, match="packed"):
        attention(rows)
