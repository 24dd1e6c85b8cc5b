"""The world model's trainer, on episodes of a hand that moves a square: data, stages, report, and the environment that comes out."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from baselines import world_model
from baselines.world_model import Args, dropped, main, read_episodes, ssim, standardise
from vlahub.dataset import DatasetError, DatasetWriter
from vlahub.run import arguments
from vlahub_envs.evac.environment import EvacVectorEnv
from vlahub_envs.evac.model import WorldModel, tiny_config
from vlahub_envs.evac.simulation import interface_of, state_of

SIZE = 32
INTERFACE = interface_of(tiny_config(SIZE, SIZE, 8, {}))


def write(folder, episodes: int = 4, length: int = 12, interface=INTERFACE) -> None:
    """A white square follows the hand; the task is solved where the hand is far to the right."""
    rng = np.random.default_rng(0)
    writer = DatasetWriter(folder, interface, 20)
    for episode in range(episodes):
        position, observations, actions, solved = np.array([0.0, 0.0, 1.0]), [], [], []
        for _ in range(length):
            image = np.full((SIZE, SIZE, 3), 40, np.uint8)
            x, y = ((position[:2] + 1) / 2 * (SIZE - 6)).astype(int).clip(0, SIZE - 6)
            image[y : y + 6, x : x + 6] = 255
            pose = np.array([*position, 1.0, 0.0, 0.0, 0.01, -1.0])
            state = state_of(pose, tiny_config(SIZE, SIZE, 8, {}))
            observations.append({"main_images": image, "states": state, "task_descriptions": f"go right {episode % 2}"})
            action = np.concatenate([[rng.uniform(0, 1), rng.uniform(-1, 1), 0], np.zeros(3), [-1]]).astype(np.float32)
            position = position + 0.1 * action[:3]
            actions.append(action)
            solved.append(position[0] > 0.3)
        writer.add_episode(observations, np.stack(actions), {"next.success": np.array(solved)})


def test_episodes_say_what_is_seen_and_what_is_solved(tmp_path):
    write(tmp_path)
    data = read_episodes([str(tmp_path)], held_out=0.25, seed=0)
    assert data.frames.shape == (48, SIZE, SIZE, 3) and data.held_out.sum() == 12 and len(data.episodes) == 4
    np.testing.assert_array_equal(data.solved, data.poses[:, 0] > 0.3 + 1e-6)  # a frame's label belongs to what it shows
    np.testing.assert_allclose(np.diff(data.poses[:12, 0]), 0.1 * data.actions[:11, 0], atol=1e-6)
    assert ((data.poses[1:12, 3:7] * data.poses[:11, 3:7]).sum(-1) > 0).all()
    clips = data.clips(8, held_out=False)
    assert len(clips) == 3 * 4 and not data.held_out[clips].any() and (data.first[clips] == data.first[clips + 8]).all()


def test_a_tiny_model_is_trained_reported_and_becomes_an_environment(tmp_path):
    write(tmp_path / "data")
    few = {f"{stage}_iterations": 2 for stage in world_model.STAGES} | {f"{stage}_batch": 4 for stage in world_model.STAGES}
    args = Args(
        dataset=(str(tmp_path / "data"),),
        out=str(tmp_path),
        name="run",
        device="cpu",
        **few,
        held_out=0.3,
        imagined_clips=2,
        report_chunks=1,
        videos=1,
        snapshot_seconds=1e-9,
    )
    main(args)
    found = json.loads((tmp_path / "run/report.json").read_text())
    assert 0 < found["one_chunk_imagined"]["psnr"] < found["one_chunk_frozen"]["psnr"] + 60 and found["rollout"]["episodes"] == 1
    assert (tmp_path / "run/side_by_side_0.mp4").stat().st_size > 0
    release = tmp_path / "run/release"
    snapshot, released = (WorldModel.from_pretrained(str(tmp_path / "run" / name)).state_dict() for name in ("snapshot", "release"))
    for name, tensor in snapshot.items():  # the last one was taken after the last step
        if name.startswith("model.diffusion_model."):
            torch.testing.assert_close(tensor, released[name])
    assert (release / "model.safetensors").stat().st_size <= 8e6
    env = EvacVectorEnv(num_envs=2, model=release)
    observation, info = env.reset(seed=0, options={"task": [0, 1]})
    assert observation["task_descriptions"] == ["go right 0", "go right 1"] and info["task"].tolist() == [0, 1]
    assert env.step_chunk(np.zeros((2, 8, 7), np.float32)).length.max() > 0
    with pytest.raises(SystemExit, match="holds a run already"):
        main(args)
    main(arguments(Args, "", ["--resume", str(tmp_path / "run")]))  # nothing is left to train; the report is written again
    assert json.loads((tmp_path / "run/report.json").read_text()) == found
    only = dataclasses.replace(args, name="only", init=str(release), report_only=True, held_out=1.0)
    main(only)  # of all episodes, whatever was held out in training; nothing is trained, so nothing is released
    found = json.loads((tmp_path / "only/report.json").read_text())
    assert found["held_out_episodes"] == found["episodes"] == 4 and not (tmp_path / "only/release").exists()
    assert Image.open(tmp_path / "only/strip_0.png").size == (8 * SIZE, 2 * SIZE)
    with pytest.raises(ValueError, match="--report-only needs the weights"):
        main(dataclasses.replace(only, init=""))
    with pytest.raises(ValueError, match="only with --report-only"):
        main(dataclasses.replace(only, report_only=False))


def test_a_dataset_that_grows_keeps_its_held_out_starts(tmp_path):
    for name, episodes in (("few", 12), ("many", 24)):
        write(tmp_path / name, episodes)
    few, many = (read_episodes([str(tmp_path / name)], held_out=0.25, seed=3) for name in ("few", "many"))
    np.testing.assert_array_equal(few.held_out, many.held_out[: 12 * 12])
    assert 0 < few.held_out.sum() < 12 * 12


def test_training_begins_with_given_weights(tmp_path):
    write(tmp_path / "data", 1)
    data = read_episodes([str(tmp_path / "data")], 0.5, 0)
    fresh = world_model.make_model(Args(seed=1), data, tmp_path)
    fresh.save_pretrained(str(tmp_path / "model"))
    again = world_model.make_model(Args(seed=2, init=str(tmp_path / "model")), data, tmp_path)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, fresh.state_dict()[name])
    with pytest.raises(ValueError, match="differs from the model .* in chunk, image_resampler"):
        world_model.make_model(Args(init=str(tmp_path / "model"), chunk=4), data, tmp_path)
    with pytest.raises(ValueError, match="--init is for fresh models"):
        world_model.make_model(Args(init=str(tmp_path / "model"), model=str(tmp_path / "model")), data, tmp_path)


def test_bad_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="no dataset given"):
        main(Args())
    write(tmp_path / "still", length=2)
    with pytest.raises(DatasetError, match="no frame of these datasets shows a solved task"):
        read_episodes([str(tmp_path / "still")], 0.1, 0)
    other = dataclasses.replace(INTERFACE, state=(INTERFACE.state[0], INTERFACE.state[1], dataclasses.replace(INTERFACE.state[2], name="grip")))
    write(tmp_path / "other", interface=other)
    with pytest.raises(DatasetError, match="needs LIBERO's state"):
        read_episodes([str(tmp_path / "other")], 0.1, 0)


def test_standardised_latents_decode_to_the_same_pictures():
    torch.manual_seed(0)
    model = WorldModel(tiny_config(SIZE, SIZE, 8, {})).eval().requires_grad_(False)
    images = torch.rand(4, 3, SIZE, SIZE) * 2 - 1
    before, decoded = model.encode(images), model.first_stage_model.decode(model.encode(images))
    mean, std = before.transpose(0, 1).flatten(1).mean(1), before.transpose(0, 1).flatten(1).std(1)
    standardise(model, mean, std)
    after = model.encode(images)
    torch.testing.assert_close(after, (before - mean[:, None, None]) / std[:, None, None], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.first_stage_model.decode(after), decoded, atol=1e-4, rtol=1e-3)


def test_conditions_are_dropped_as_often_as_they_should_be():
    kept = dropped(np.random.default_rng(0), 200_000, 0.1)
    for name, share in {"actions": 0.2, "picture": 0.2, "map": 0.1, "mask": 0.2}.items():
        assert 1 - kept[name].mean() == pytest.approx(share, abs=0.005), name
    assert not (~kept["actions"] & ~kept["map"] & ~kept["mask"]).all() and dropped(np.random.default_rng(0), 9, 0.0)["mask"].all()


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 32, 32)
    values = [float(ssim(image, (image + scale * torch.randn_like(image)).clamp(0, 1))) for scale in (0, 0.05, 0.3)]
    assert values[0] == pytest.approx(1) and values[0] > values[1] > values[2] > 0
