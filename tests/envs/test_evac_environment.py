"""Imagined worlds: the vector contract, episodes, poses, and bad input."""

import dataclasses
import socket

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from tests.envs.evac_tiny import CHUNK, CONFIG, SIZE, starts, tiny
from tests.worlds import PointWorld
from vlahub import catalog, hub
from vlahub.catalog import EnvCard
from vlahub.env import Env
from vlahub.observation import select, validate
from vlahub_envs.evac import start_states
from vlahub_envs.evac.environment import EvacVectorEnv
from vlahub_envs.evac.model import WorldModel
from vlahub_envs.evac.simulation import Imagination, alone, starts_of, state_of
from vlahub_envs.evac.start_states import StartState, StartStateError, StartStates

STARTS = starts()


def make(num_envs: int = 2, success: float | None = -9.0, **options) -> EvacVectorEnv:
    return EvacVectorEnv(num_envs=num_envs, model=tiny(success=success), starts=STARTS, denoising_steps=2, **options)


def actions(num_envs: int, count: int = CHUNK, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (num_envs, count, 7)).astype(np.float32)


class Verdicts(torch.nn.Module):
    """A classifier that finds success from the frame of a given number on."""

    def __init__(self, at: int):
        super().__init__()
        self.at, self.seen = at, 0

    def forward(self, images):
        numbers = torch.arange(self.seen, self.seen + len(images))
        self.seen += len(images)
        return torch.where(numbers >= self.at, 9.0, -9.0)


# ------------------------------------------------------------------------------------------------ the contract


def test_observations_keep_the_contract_and_show_the_start():
    env = make(3)
    observation, info = env.reset(seed=5, options={"task": [0, 1, 1], "trial": [0, 0, 2]})
    validate(observation)
    assert observation["main_images"].shape == (3, SIZE, SIZE, 3)
    np.testing.assert_array_equal(observation["main_images"][2], STARTS.choose(0, 1, 2).image)
    assert observation["task_descriptions"] == ["do task 0", "do task 1", "do task 1"]
    np.testing.assert_allclose(observation["states"][0], state_of(STARTS.choose(0, 0, 0).pose, CONFIG))
    assert info["seed"].tolist() == [5, 6, 7] and info["trial"].tolist() == [0, 0, 2]
    assert (env.tasks, env.trials, env.assets, env.max_steps) == (2, 3, "imagined", 256)
    result = env.step_chunk(actions(3))
    validate(result.observation)
    assert all(env.single_observation_space.contains(select(result.observation, i)) for i in range(3))
    assert result.length.tolist() == [CHUNK] * 3 and not result.done.any() and (result.reward == 0).all()
    assert (result.observation["main_images"] != observation["main_images"]).any()
    assert result.info["success_probability"].shape == (3, CHUNK)
    env.close()
    with pytest.raises(gymnasium.error.ClosedEnvironmentError):
        env.reset()


def test_a_parked_world_model_goes_on_as_it_was():
    pictures = []
    for parks in (False, True):
        env = make(1)
        env.reset(seed=0)
        env.step_chunk(actions(1))
        if parks:
            env.park()
            assert env.imagination.model.accelerated is None
            env.unpark()
        pictures.append(env.step_chunk(actions(1, seed=1)).observation["main_images"])
        env.close()
    np.testing.assert_array_equal(*pictures)


def test_states_are_the_poses_that_the_converter_has_reached():
    env = make(1)
    env.reset(seed=0, options={"task": 0, "trial": 1})
    pose = torch.from_numpy(STARTS.choose(0, 0, 1).pose)[None]
    for seed in range(2):
        given = actions(1, seed=seed)
        result = env.step_chunk(given)
        pose = env.imagination.model.action_predictor.chain(torch.from_numpy(given), pose)[:, -1]
        np.testing.assert_allclose(result.observation["states"][0], state_of(pose[0].numpy(), CONFIG), atol=1e-6)


def test_the_hand_keeps_its_momentum_from_chunk_to_chunk():
    torch.manual_seed(0)
    model = WorldModel(dataclasses.replace(CONFIG, converter_motion=True)).eval().requires_grad_(False)
    model.reward_model.net[-1].weight.zero_()
    model.reward_model.net[-1].bias.fill_(-9.0)
    model.action_predictor.motion_std.fill_(0.05)
    env = EvacVectorEnv(num_envs=1, model=model, starts=STARTS, denoising_steps=1)
    env.reset(seed=0, options={"task": 0, "trial": 1})
    given = np.concatenate([actions(1, seed=seed) for seed in range(2)], axis=1)
    whole = model.action_predictor.chain(torch.from_numpy(given), torch.from_numpy(STARTS.choose(0, 0, 1).pose)[None])
    for part in (slice(0, 1), slice(1, CHUNK), slice(CHUNK, 2 * CHUNK)):  # a single step, the rest of a chunk, a whole one
        result = env.step_chunk(given[:, part])
        np.testing.assert_allclose(result.observation["states"][0], state_of(whole[0, part.stop - 1].numpy(), CONFIG), atol=1e-5)
    still = model.action_predictor.chain(torch.from_numpy(given[:, CHUNK:]), whole[:, CHUNK - 1])  # as if the hand had stopped between the chunks
    assert (still - whole[:, CHUNK:]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="cannot run in that loop"):
        model.action_predictor.chain(torch.from_numpy(given), whole[:, 0], normalised=False)


def test_poses_become_liberos_state():
    turn = 1.2
    pose = np.array([0.1, 0.2, 0.3, 0, 2 * np.sin(turn / 2), 0, 2 * np.cos(turn / 2), 1.0], np.float32)  # a quaternion of length 2, a closed gripper
    np.testing.assert_allclose(state_of(pose, CONFIG), [0.1, 0.2, 0.3, 0, turn, 0, 0, 0], atol=1e-6)
    pose[3:] = 0, 0, 0, 1, -1.0
    np.testing.assert_allclose(state_of(pose, CONFIG)[3:], [0, 0, 0, 0.04, -0.04], atol=1e-6)


def test_start_states_are_taken_from_a_simulation_with_the_same_interface():
    found = starts_of(alone(tiny(), STARTS), CONFIG, trials=2)
    assert [(s.task, s.trial) for s in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for start in found:
        original = STARTS.choose(0, start.task, start.trial)
        assert start.text == original.text
        np.testing.assert_array_equal(start.image, original.image)
        np.testing.assert_allclose(state_of(start.pose, CONFIG), state_of(original.pose, CONFIG), atol=1e-6)
        np.testing.assert_allclose(start.pose[7], original.pose[7], atol=1e-6)
    with pytest.raises(ValueError, match="need LIBERO's state"):
        starts_of(PointWorld(), CONFIG, trials=1)


def test_an_episode_does_not_depend_on_its_neighbours():
    many, one = make(3), make(1)
    many.reset(seed=[7, 8, 9], options={"task": [0, 1, 0], "trial": [2, 1, 0]})
    one.reset(seed=[8], options={"task": 1, "trial": 1})
    for seed in range(2):
        given = actions(3, seed=seed)
        together, alone = many.step_chunk(given).observation, one.step_chunk(given[[1]]).observation
        assert np.abs(together["main_images"][1].astype(int) - alone["main_images"][0]).max() <= 1
        np.testing.assert_allclose(together["states"][1], alone["states"][0], atol=1e-5)


def test_splitting_the_batch_changes_nothing():
    whole, split = make(3), make(3, max_batch=2)
    for env in (whole, split):
        env.reset(seed=0)
    a, b = (env.step_chunk(actions(3)).observation["main_images"].astype(int) for env in (whole, split))
    assert np.abs(a - b).max() <= 1


def test_group_members_share_their_start_and_part_by_their_actions():
    env = make(4)
    observation, info = env.reset(seed=[3, 3, 4, 4])
    for a, b in ((0, 1), (2, 3)):
        np.testing.assert_array_equal(observation["main_images"][a], observation["main_images"][b])
        assert info["trial"][a] == info["trial"][b]
    same = actions(4)
    same[1] = same[0]
    images = env.step_chunk(same).observation["main_images"].astype(int)
    assert np.abs(images[0] - images[1]).max() <= 1  # the same seed is the same imagination
    assert np.abs(images[2] - images[3]).max() > 1


def test_the_same_seed_starts_the_same_episode():
    env = make(2)
    first = [env.reset(seed=11)[0], env.step_chunk(actions(2)).observation]
    again = [env.reset(seed=11)[0], env.step_chunk(actions(2)).observation]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a["main_images"], b["main_images"])
    env.reset()
    assert (env.step_chunk(actions(2)).observation["main_images"] != first[1]["main_images"]).any()


# ------------------------------------------------------------------------------------------------ the course of an episode


def test_success_ends_the_episode_at_its_step():
    env = make(1)
    env.imagination.model.reward_model = Verdicts(at=CHUNK + 1)
    env.reset(seed=0)
    assert not env.step_chunk(actions(1)).done.any()
    result = env.step_chunk(actions(1, seed=1))
    assert result.length.tolist() == [2] and result.reward.tolist() == [[0, 1, 0, 0]]
    assert result.terminated.tolist() == [[False, True, False, False]] and not result.truncated.any()
    assert result.info["success"].tolist() == [True] and result.info["steps"].tolist() == [CHUNK + 2]
    pose = env.worlds[0].pose
    np.testing.assert_allclose(result.observation["states"][0], state_of(pose, CONFIG))


def test_finished_worlds_leave_the_batch_until_they_are_reset():
    env = make(3, success=9.0)
    env.reset(seed=0)
    assert env.step_chunk(actions(3)).done.all()
    env.reset(options={"reset_mask": [False, True, False]})
    batches = []
    imagine = env.imagination.model.imagine
    env.imagination.model.imagine = lambda made, *rest: batches.append(len(made.tokens)) or imagine(made, *rest)
    result = env.step_chunk(actions(3))
    assert batches == [1] and result.length.tolist() == [0, 1, 0]
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"\[0, 1, 2\] are over"):
        env.step(actions(3)[:, 0])


def test_autoreset_in_the_next_step():
    env = make(2, success=9.0, autoreset_mode="NextStep")
    env.reset(seed=0)
    _, reward, terminated, *_ = env.step(actions(2)[:, 0])
    assert reward.tolist() == [1, 1] and terminated.all()
    observation, reward, terminated, _, info = env.step(actions(2)[:, 0])  # the actions are ignored
    assert reward.tolist() == [0, 0] and not terminated.any() and (info["seed"] != [0, 1]).all()
    again, _ = env.reset(seed=info["seed"].tolist())
    np.testing.assert_array_equal(observation["main_images"], again["main_images"])


def test_autoreset_in_the_same_step():
    env = make(2, success=9.0, autoreset_mode="SameStep")
    env.reset(seed=0)
    result = env.step_chunk([actions(1)[0], None])
    assert result.terminated[:, 0].tolist() == [True, False] and result.length.tolist() == [1, 0]
    assert result.info["_final_obs"].tolist() == [True, False] and result.info["final_info"]["success"][0]
    again, _ = env.reset(seed=[int(result.info["seed"][0]), 1])
    np.testing.assert_array_equal(result.observation["main_images"], again["main_images"])
    assert (result.info["final_obs"][0]["main_images"] != again["main_images"][0]).any()


def test_an_id_runs_with_the_users_weights(tmp_path):
    """gym.make and gym.make_vec of a registered id; start states lie beside the weights."""
    tiny(success=-9.0).save_pretrained(tmp_path)
    start_states.write(STARTS, tmp_path / start_states.FILE)
    options = {"model": str(tmp_path), "denoising_steps": 1}
    env = gymnasium.make("vlahub/EVAC-LIBERO-10", **options)
    check_env(env, skip_render_check=True)
    many = gymnasium.make_vec("vlahub/EVAC-LIBERO-10", num_envs=2, **options)
    one, (two, info) = env.reset(seed=4)[0], many.reset(seed=4)
    np.testing.assert_array_equal(one["main_images"], two["main_images"][0])
    assert type(many) is EvacVectorEnv and info["trial"].shape == (2,)
    with pytest.raises(TypeError, match="has no option 'suite'"):
        gymnasium.make("vlahub/EVAC-LIBERO-10", suite="libero_goal", **options)


def test_the_bundled_world_model_needs_no_option_and_no_network(monkeypatch):
    """One chunk as a user would run it. Its ten starts are trial 0 of each task."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
    folder = hub.resolve("vlahub/evac-tiny-libero-spatial")
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8e6
    env = gymnasium.make("vlahub/EVAC-LIBERO-Spatial", render_mode="rgb_array")
    assert (env.simulation.tasks, env.simulation.trials) == (10, 1)
    first, info = env.reset(seed=0, options={"task": 3})
    assert first["task_descriptions"] == "pick up the black bowl on the cookie box and place it on the plate" and info["trial"] == 0
    down = np.tile(np.array([0, 0, -1, 0, 0, 0, -1], np.float32), (8, 1))
    result = env.step_chunk(down)
    assert not result.done and result.length == 8
    assert first["states"][2] - result.observation["states"][2] > 0.05, "the hand goes down, by the converter"
    before, after = (observation["main_images"].astype(int) for observation in (first, result.observation))
    changed = np.abs(after - before).mean(-1)
    assert changed[64:].mean() < 8 < changed[:64, 32:96].mean(), "the table stays as it is, the arm above it moves"


def test_starts_come_from_a_simulator(monkeypatch):
    """A seed, a task and a trial start the simulator's own episode."""
    real = alone(tiny(), STARTS)
    monkeypatch.setitem(catalog.ENVS, "test/Real", EnvCard("test/Real", "test", "tests.envs.evac_tiny:simulator", ""))
    env = EvacVectorEnv(num_envs=3, model=tiny(success=-9.0), starts="test/Real", denoising_steps=1)
    observation, info = env.reset(seed=[3, 3, 5], options={"task": [None, None, 1], "trial": [None, None, 2]})
    wanted = real.reset(3, {})
    assert info["task"].tolist() == [wanted["task"], wanted["task"], 1] and info["trial"].tolist() == [wanted["trial"], wanted["trial"], 2]
    np.testing.assert_array_equal(observation["main_images"][1], real.observe()["main_images"])
    np.testing.assert_allclose(observation["states"][1], real.observe()["states"], atol=1e-6)
    assert env.worlds[0].start is env.worlds[1].start and (env.tasks, env.trials) == (2, 3)


def test_the_time_limit_cuts_a_chunk():
    env = make(2, max_steps=CHUNK + 1)
    env.reset(seed=0)
    env.step_chunk(actions(2))
    result = env.step_chunk(actions(2))
    assert result.length.tolist() == [1, 1] and result.truncated[:, 0].all() and not result.terminated.any()
    assert env.step_chunk(actions(2)).length.tolist() == [0, 0]


def test_chunks_of_any_length():
    env = make(1)
    env.reset(seed=0)
    history = [env.imagination.config.memory]
    for count in (1, CHUNK - 1, 2 * CHUNK + 1):
        result = env.step_chunk(actions(1, count))
        assert result.length.tolist() == [count]
        history.append(env.worlds[0].latents.shape[1])
    assert np.diff(history).tolist() == [1, CHUNK - 1, 2 * CHUNK + 1]
    *_, info = env.step(actions(1)[:, 0])
    assert info["steps"].tolist() == [3 * CHUNK + 2]


def test_a_success_in_the_first_of_two_model_chunks_stops_the_second():
    env = make(1)
    env.imagination.model.reward_model = Verdicts(at=2)
    env.reset(seed=0)
    assert env.step_chunk(actions(1, 2 * CHUNK)).length.tolist() == [3]
    assert env.imagination.model.reward_model.seen == CHUNK


def test_slots_run_in_the_background():
    env, plain = make(4, slots=2), make(4)
    given = actions(4)
    env.reset(seed=0)
    plain.reset(seed=0)
    for slot in (0, 1):
        env.send(given[list(env.slot_envs(slot))], slot)
    with pytest.raises(gymnasium.error.AlreadyPendingCallError):
        env.step_chunk(given)
    halves = [env.recv(slot).observation["main_images"].astype(int) for slot in (0, 1)]
    assert np.abs(np.concatenate(halves) - plain.step_chunk(given).observation["main_images"]).max() <= 1
    with pytest.raises(gymnasium.error.NoAsyncCallError):
        env.recv(0)
    env.close()


def test_pictures_for_people():
    env = make(2, render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    first, second = env.render(mask=[True, False])
    np.testing.assert_array_equal(first, observation["main_images"][0, :, ::-1])
    assert second is None and make(2).render() is None


def test_chunks_of_different_lengths_and_recording():
    env = make(3)
    env.reset(seed=0)
    given = actions(3)
    result = env.step_chunk([given[0], given[1][:3], None], record=[True, True, False], record_every=2)
    assert result.length.tolist() == [CHUNK, 3, 0]
    assert [None if frames is None else len(frames) for frames in result.info["frames"]] == [2, 1, None]
    np.testing.assert_array_equal(result.info["frames"][0][1][:, ::-1], result.observation["main_images"][0])
    with pytest.raises(ValueError, match="2 chunks of actions for 3 envs"):
        env.step_chunk([given[0], None])


def test_one_world_is_a_gymnasium_env():
    env = Env(alone(tiny(success=-9.0), STARTS, denoising_steps=2), render_mode="rgb_array")
    observation, _ = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    np.testing.assert_array_equal(env.render(), observation["main_images"][:, ::-1])
    shown = []
    result = env.step_chunk(actions(1)[0], watch=lambda: shown.append(env.render()))
    assert len(shown) == CHUNK and result.length == CHUNK
    np.testing.assert_array_equal(shown[-1][:, ::-1], result.observation["main_images"])
    assert env.step(np.zeros(7, np.float32))[1] == 0.0


def test_a_card_makes_both_kinds_from_files(tmp_path):
    tiny(success=-9.0).save_pretrained(tmp_path / "model")
    start_states.write(STARTS, tmp_path / "starts.safetensors")
    kwargs = {"model": str(tmp_path / "model"), "starts": str(tmp_path / "starts.safetensors")}
    where = "vlahub_envs.evac.simulation:alone", "vlahub_envs.evac.environment:EvacVectorEnv"
    card = EnvCard("test/Imagined", "evac", where[0], "a tiny imagined world", kwargs, vector=where[1])
    world = catalog.make_simulation(card, denoising_steps=2)
    world.reset(3, {})
    env = catalog.load(card.vector)(card, num_envs=2, denoising_steps=2)
    env.reset(seed=[3, 4])
    given = actions(2)
    world.apply(given[0])
    together = env.step_chunk(given).observation["main_images"][0].astype(int)
    assert np.abs(together - world.observe()["main_images"]).max() <= 1
    for make_it in (lambda: catalog.make_simulation(card, denoising_step=2), lambda: catalog.load(card.vector)(card, denoising_step=2)):
        with pytest.raises(TypeError, match="no option 'denoising_step'; did you mean 'denoising_steps'"):
            make_it()


def test_published_quirks_stay_behind_their_switch():
    env = make(2, success=9.0, strict_upstream_quirks=True)
    env.reset(seed=0, options={"task": [0, 1]})
    before = env.reset(seed=0, options={"task": [0, 1]})[0]["states"]
    result = env.step_chunk(actions(2))
    np.testing.assert_array_equal(result.observation["states"], before)  # the pose that is shown never moves
    assert result.reward.tolist() == [[5, 0, 0, 0]] * 2 and result.terminated[:, -1].all() and not result.terminated[:, :-1].any()
    assert env.step_chunk(actions(2)).length.tolist() == [CHUNK] * 2  # finished worlds are imagined on
    tokens = [env.imagination.tokens(world) for world in env.worlds]
    torch.testing.assert_close(*tokens)  # of the first world, whatever the second one saw


# ------------------------------------------------------------------------------------------------ bad input


IMAGE, POSE = np.zeros((SIZE, SIZE, 3), np.uint8), np.array([0, 0, 0, 0, 0, 0, 1, 0], np.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": IMAGE}, "lack pose, text"),
        ({"image": IMAGE, "pose": POSE}, "lack text"),
        ({"image": np.zeros((40, 40, 3), np.uint8), "pose": POSE, "text": "go"}, "is 40x40, this world model imagines 32x32"),
        ({"image": IMAGE.astype(np.float64), "pose": POSE, "text": "go"}, "must be uint8"),
        ({"image": IMAGE, "pose": POSE[:7], "text": "go"}, "8 finite numbers"),
        ({"image": IMAGE, "pose": np.zeros(8), "text": "go"}, "no rotation"),
        ({"image": IMAGE, "pose": POSE, "text": ""}, "non-empty instruction"),
        ({"image": IMAGE, "pose": POSE, "text": "go", "task": 1}, "either image, pose and text, or task and trial"),
        ({"task": 7}, "task 7 is out of range; the start states have tasks 0 to 1"),
        ({"task": 1, "trial": 3}, "task 1 has no trial 3; it has 3, from 0 to 2"),
        ({"tsk": 1}, "unknown reset option 'tsk'"),
    ],
)
def test_bad_starts_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        alone(tiny(), STARTS).reset(0, options)


def test_a_start_by_hand():
    world = alone(tiny(), denoising_steps=2)
    with pytest.raises(StartStateError, match="without start states"):
        world.reset(0, {})
    world.reset(0, {"image": IMAGE, "pose": POSE, "text": "go"})
    assert world.observe()["task_descriptions"] == "go" and world.apply(actions(1)[0]).reward.shape == (CHUNK,)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="needs a world model"):
        EvacVectorEnv(num_envs=2)
    for name in ("Object", "Goal", "10"):
        with pytest.raises(ValueError, match=f"of libero_{name.lower()}, and none ships: give model=...: .* trains one"):
            gymnasium.make(f"vlahub/EVAC-LIBERO-{name}")
    with pytest.raises(ValueError, match="threshold must lie between 0 and 1"):
        make(threshold=1.0)
    bare = tiny()
    bare.reward_model = None
    with pytest.raises(ValueError, match="no success classifier"):
        Imagination(bare)
    env = make(2)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step_chunk(actions(2))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected \(2, 'N', 7\)"):
        env.step_chunk(actions(3))
    with pytest.raises(ValueError, match="must be finite"):
        env.step_chunk(np.full((2, CHUNK, 7), np.nan))


# ------------------------------------------------------------------------------------------------ start-state files


def test_start_state_files_round_trip(tmp_path):
    start_states.write(STARTS, tmp_path / "starts.safetensors")
    again = start_states.read(tmp_path / "starts.safetensors")
    assert [(s.task, s.trial, s.text) for s in again] == [(s.task, s.trial, s.text) for s in STARTS]
    np.testing.assert_array_equal(again[4].image, STARTS[4].image)
    np.testing.assert_array_equal(again[4].pose, STARTS[4].pose)
    flat = np.full_like(IMAGE, 120)
    start_states.write(StartStates([StartState(flat, POSE, "go", task=0, trial=7)]), tmp_path / "small.safetensors", quality=90)
    np.testing.assert_allclose(start_states.read(tmp_path / "small.safetensors")[0].image, flat, atol=2)


def test_a_start_state_file_with_other_keys_is_named(tmp_path):
    from safetensors.numpy import save_file

    save_file({"frames": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(StartStateError, match=r"has the entries frames; a start-state file has pictures, sizes, poses, tasks, trials and metadata\['texts'\]"):
        start_states.read(tmp_path / "other.safetensors")
    start_states.write(STARTS, tmp_path / "whole.safetensors")
    from safetensors.numpy import load_file

    broken = {**load_file(tmp_path / "whole.safetensors"), "sizes": np.array([1] * len(STARTS))}
    save_file(broken, tmp_path / "broken.safetensors", metadata={"texts": '["a", "b", "c", "d", "e", "f"]'})
    with pytest.raises(StartStateError, match="do not belong together"):
        start_states.read(tmp_path / "broken.safetensors")
    save_file({**broken, "pictures": np.zeros(len(STARTS), np.uint8)}, tmp_path / "broken.safetensors", metadata={"texts": '["a", "b", "c", "d", "e", "f"]'})
    with pytest.raises(StartStateError, match="a picture that cannot be read"):
        start_states.read(tmp_path / "broken.safetensors")
    with pytest.raises(StartStateError, match="not a readable start-state file"):
        start_states.read(tmp_path / "missing.safetensors")
    with pytest.raises(StartStateError, match="without a gap"):
        StartStates([StartState(IMAGE, POSE, "go", task=1, trial=0)])


def trajectory(path, frames: list) -> None:
    array = np.empty(len(frames), object)
    array[:] = frames
    np.save(path, array, allow_pickle=True)


def test_published_trajectories_are_read(tmp_path):
    for i, text in enumerate(["put", b"open", "put"]):
        frame = {"image": IMAGE + i, "init_ee_pose": POSE + i, "abs_action": POSE - 1, "instruction": text}
        trajectory(tmp_path / f"step_0_seed_0_traj_{i}.npy", [frame, frame])
    trajectory(tmp_path / "step_0_seed_0_traj_0_kir.npy", [{}])
    found = start_states.read(tmp_path)
    assert [(s.text, s.task, s.trial) for s in found] == [("put", 1, 0), ("open", 0, 0), ("put", 1, 1)]
    np.testing.assert_array_equal(found[2].pose, POSE + 2)
    assert found[2].image.max() == 2


def test_a_published_trajectory_with_other_keys_is_named(tmp_path):
    trajectory(tmp_path / "a.npy", [{"image": IMAGE, "delta_action": POSE, "instruction": "go"}])
    with pytest.raises(StartStateError, match=r"a.npy: its first frame has no init_ee_pose \(or abs_action\); it has delta_action, image, instruction"):
        start_states.read(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(StartStateError, match="is not a published trajectory"):
        start_states.read(tmp_path)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was run",))


def test_a_trajectory_that_would_run_code_is_refused(tmp_path):
    trajectory(tmp_path / "a.npy", [{"image": Trap()}])
    with pytest.raises(StartStateError, match=r"only arrays, numbers, text and containers are read"):
        start_states.read(tmp_path)


def test_resizing():
    image = np.full((64, 64, 3), 255, np.uint8)
    image[:32] = 0
    small = start_states.resized(image, SIZE, SIZE)
    assert small.dtype == np.float32 and small.shape == (SIZE, SIZE, 3) and small.min() == -1 and small.max() == 1
    StartState(small, POSE, "go").check(SIZE, SIZE)
