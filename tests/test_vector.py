import dataclasses
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import vlahub
from tests.worlds import POINT, PointWorld
from vlahub.observation import select, validate
from vlahub.vector import ATTEMPTS, SLABS_PER_SLOT, InProcess, VectorEnv, WorkerError, collate, make

ROOT = Path(__file__).parents[1]


@pytest.fixture
def point():
    """Makes vector envs of the point world and closes them."""
    made = []

    def build(num_envs=3, **options):
        made.append(make("test/Point", num_envs, **options))
        return made[-1]

    yield build
    for env in made:
        env.close()


def same(first, second):
    """Are two observations equal?"""
    return first.keys() == second.keys() and all(
        list(first[key]) == list(second[key]) if key == "task_descriptions" else np.array_equal(first[key], second[key]) for key in first
    )


def random_chunks(rng, *shape):
    return rng.uniform(-1, 1, (*shape, 2)).astype(np.float32)


# Equality with single envs


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_any_number_of_workers_gives_the_trajectories_of_single_envs(point, workers):
    env = point(workers=workers, wrists=2, extras=1, max_steps=11)
    singles = [gym.make("test/Point", wrists=2, extras=1, max_steps=11) for _ in range(3)]
    observation, info = env.reset(seed=5)
    validate(observation)
    assert observation in env.observation_space and observation["wrist_images"].shape == (3, 2, 24, 24, 3)
    for i, single in enumerate(singles):
        expected, expected_info = single.reset(seed=5 + i)
        assert same(select(observation, i), expected) and info["task"][i] == expected_info["task"]

    rng = np.random.default_rng(0)
    episodes = 0
    for _ in range(8):
        actions = random_chunks(rng, 3, 4)
        result = env.step_chunk(actions)
        for i, single in enumerate(singles):
            one = single.step_chunk(actions[i])
            assert same(select(result.observation, i), one.observation)
            assert all(np.array_equal(getattr(result, name)[i], getattr(one, name)) for name in ("reward", "terminated", "truncated", "length", "done"))
            assert (result.info["success"][i], result.info["steps"][i]) == (one.info["success"], one.info["steps"])
        if result.done.any():
            observation, info = env.reset(options={"reset_mask": result.done})
            assert info["_seed"].tolist() == result.done.tolist()
            for i in np.flatnonzero(result.done):
                episodes += 1
                expected, expected_info = singles[i].reset()  # unseeded: drawn from the env's own generator
                assert same(select(observation, int(i)), expected) and info["seed"][i] == expected_info["seed"]
    assert episodes >= 3


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_step_does_what_gymnasiums_vector_env_does(point, mode):
    env = point(2, autoreset_mode=mode, max_steps=3)
    peer = SyncVectorEnv([lambda: gym.make("test/Point", max_steps=3)] * 2, autoreset_mode=mode)
    assert env.metadata["autoreset_mode"] is mode
    ours, theirs = env.reset(seed=[4, 9]), peer.reset(seed=[4, 9])
    assert same(ours[0], theirs[0])
    rng = np.random.default_rng(1)
    for _ in range(8):
        actions = random_chunks(rng, 2)
        ours, theirs = env.step(actions), peer.step(actions)
        assert same(ours[0], theirs[0])
        assert all(np.array_equal(a, b) for a, b in zip(ours[1:4], theirs[1:4], strict=True))
        info = ours[4]
        assert info.keys() - {"aborted", "_aborted"} == theirs[4].keys()
        for key in theirs[4].keys() - {"final_obs", "final_info"}:
            assert np.array_equal(info[key], theirs[4][key]), key
        if "final_obs" in theirs[4]:
            assert info["final_info"]["success"].tolist() == theirs[4]["final_info"]["success"].tolist()
            for one, other in zip(info["final_obs"], theirs[4]["final_obs"], strict=True):
                assert (one is None and other is None) or same(one, other)
        if mode is AutoresetMode.DISABLED and (ours[2] | ours[3]).all():
            break
    if mode is AutoresetMode.DISABLED:
        with pytest.raises(gym.error.ResetNeeded, match=r"envs \[0, 1\] are over"):
            env.step(actions)
        with pytest.raises(AssertionError):  # the peer's way to say so
            peer.step(actions)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_chunk_never_runs_past_the_end_of_an_episode(point, mode):
    env = point(2, autoreset_mode=mode, max_steps=5)
    env.reset(seed=0)
    still = np.zeros((2, 4, 2), np.float32)
    assert env.step_chunk(still).length.tolist() == [4, 4]
    ended = env.step_chunk(still)
    assert ended.length.tolist() == [1, 1] and ended.truncated[:, 0].all() and ended.done.all()
    after = env.step_chunk(still)
    if mode is AutoresetMode.SAME_STEP:
        assert after.length.tolist() == [4, 4] and ended.info["final_info"]["steps"].tolist() == [5, 5]
    else:
        assert after.length.tolist() == [0, 0] and not after.done.any() and not after.reward.any()
        assert same(after.observation, ended.observation) is (mode is AutoresetMode.DISABLED)


# Reset


def test_reset_options_are_for_all_envs_or_one_per_env(point):
    env = point()
    observation, info = env.reset(seed=0, options={"task": [2, None, 1], "trial": 7})
    drawn = gym.make("test/Point").reset(seed=1, options={"trial": 7})[1]["task"]
    assert info["task"].tolist() == [2, drawn, 1] and info["trial"].tolist() == [7, 7, 7]
    assert observation["task_descriptions"][::2] == ["go to the blue target", "go to the green target"]
    options = {"reset_mask": np.array([False, True, False]), "task": np.array([0, 2, 0])}
    again, info = env.reset(seed=[None, 50, None], options=options)
    assert set(options) == {"reset_mask", "task"}  # left as it was
    assert info["seed"][1] == 50 and info["_seed"].tolist() == [False, True, False]
    assert same(select(again, [0, 2]), select(observation, [0, 2])) and again["task_descriptions"][1] == "go to the blue target"
    single = gym.make("test/Point")
    assert same(select(again, 1), single.reset(seed=50, options={"task": 2})[0])


def test_envs_may_be_left_without_an_episode(point):
    env = point(2)
    observation, _ = env.reset(seed=0, options={"reset_mask": np.array([True, False])})
    assert observation["task_descriptions"][1] == "" and not observation["main_images"][1].any()
    result = env.step_chunk(np.zeros((2, 3, 2)))
    assert result.length.tolist() == [3, 0] and result.info["_success"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"options": {"tusk": 1}}, ValueError, r"unknown reset option 'tusk'.*'task'"),
        ({"options": {"task": [0, 9]}}, ValueError, "tasks 0 to 2"),
        ({"options": {"task": [0, 1, 2]}}, ValueError, r"options\['task'\] has 3 values for 2 envs"),
        ({"options": {"reset_mask": np.array([1, 0])}}, TypeError, "bool"),
        ({"options": {"reset_mask": np.array([True])}}, ValueError, "shape"),
        ({"options": {"reset_mask": np.zeros(2, bool)}}, ValueError, "no env"),
        ({"seed": [1, 2, 3]}, ValueError, "3 entries for 2 envs"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**31 - 1}, ValueError, "seed"),
        ({"seed": [1, 2.5]}, ValueError, "seed"),
        ({"slot": 3}, ValueError, "slot"),
    ],
)
def test_bad_resets_are_the_users_errors(shared, arguments, error, words):
    with pytest.raises(error, match=words):
        shared.reset(**arguments)
    shared.reset(seed=0)  # and nothing is broken afterwards
    assert shared.step_chunk(np.zeros((2, 1, 2))).length.tolist() == [1, 1]


@pytest.fixture(scope="module")
def shared():
    """One env for the tests of bad input, which leave it as it was."""
    env = make("test/Point", 2, workers=1)
    yield env
    env.close()


def test_a_worker_says_where_a_reset_went_wrong(shared):
    with pytest.raises(ValueError, match="tasks 0 to 2") as caught:
        shared.reset(options={"task": 9})
    assert "worlds.py" in caught.value.__notes__[0]
    with pytest.raises(gym.error.ResetNeeded):  # a failed reset leaves no old episode running
        shared.step(np.zeros((2, 2)))


# Actions


@pytest.mark.parametrize(
    ("actions", "error", "words"),
    [
        (np.zeros((2, 2)), ValueError, "expected"),
        (np.zeros((3, 4, 2)), ValueError, "expected"),
        (np.zeros((2, 0, 2)), ValueError, "N >= 1"),
        (np.full((2, 4, 2), np.nan), ValueError, "nan"),
        (np.full((2, 4, 2), "a"), TypeError, "numbers"),
        ([np.zeros((3, 2))], ValueError, "1 chunks of actions for 2 envs"),
        ([np.zeros((3, 2)), np.zeros((3, 1))], ValueError, "env 1"),
    ],
)
def test_bad_actions_are_refused(shared, actions, error, words):
    shared.reset(seed=0)
    with pytest.raises(error, match=words):
        shared.step_chunk(actions)
    with pytest.raises(ValueError, match=r"expected \(2, 2\)"):
        shared.step(np.zeros(2))
    assert shared.step_chunk(np.zeros((2, 1, 2))).info["steps"].tolist() == [1, 1]


def test_clipping_is_counted_per_env(shared):
    shared.reset(seed=0)
    info = shared.step_chunk(np.array([[[0.5, 0.5]], [[9, -9]]])).info
    assert info["clipped"].tolist() == [0, 2] and info["_clipped"].tolist() == [False, True]


def test_chunks_of_different_lengths(shared):
    shared.reset(seed=0)
    result = shared.step_chunk([np.zeros((3, 2)), None])
    assert result.length.tolist() == [3, 0] and result.reward.shape == (2, 3) and not result.done.any()
    assert result.info["steps"].tolist() == [3, 0]


def test_experts_solve_it(point):
    env = point(4, workers=2)
    env.reset(seed=0)
    solved = np.zeros(4, bool)
    while not solved.all():
        result = env.step_chunk(env.expert_actions())
        solved |= result.terminated.any(axis=1)
    assert result.info["success"].all() and env.expert_actions() == [None] * 4
    bare = VectorEnv(dataclasses.replace(POINT, expert=""), 1)
    with pytest.raises(ValueError, match="no scripted expert"):
        bare.reset(), bare.expert_actions()
    bare.close()


def test_recording_and_rendering(point):
    env = point(2, workers=1, render_mode="rgb_array", max_steps=5)
    env.reset(seed=0)
    chunk = np.zeros((2, 4, 2), np.float32)
    plain = env.step_chunk(chunk)
    assert "frames" not in plain.info
    env.reset(seed=0)
    result = env.step_chunk(chunk, record=np.array([False, True]))
    assert same(plain.observation, result.observation)
    assert result.info["_frames"].tolist() == [False, True] and result.info["frames"][0] is None
    assert [frame.shape for frame in result.info["frames"][1]] == [(24, 24, 3)] * 4
    assert len(env.step_chunk(chunk, record=True).info["frames"][0]) == 1  # the time limit
    env.reset(seed=0)
    assert [len(frames) for frames in env.step_chunk(chunk, record=True, record_every=2).info["frames"]] == [2, 2]
    first, second = env.render(mask=np.array([False, True]))
    assert first is None and np.array_equal(second, env.render()[1])
    with pytest.raises(ValueError, match="record_every"):
        env.step_chunk(chunk, record=True, record_every=0)


# Observations in shared memory


def test_observations_that_are_kept_never_change(point):
    env = point(2, workers=2)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    kept = []
    for _ in range(3 * SLABS_PER_SLOT):
        observation = env.step(random_chunks(rng, 2) * 0.1)[0]
        kept.append((observation, {key: np.array(value) for key, value in observation.items()}))
    assert all(np.array_equal(observation[key], copy[key]) for observation, copy in kept for key in copy)
    addresses = {observation["main_images"].__array_interface__["data"][0] for observation, _ in kept}
    assert len(addresses) == len(kept)
    one = kept[0][0]["states"][1]  # a view is enough to keep the memory
    value = one.copy()
    del kept, observation
    for _ in range(2 * SLABS_PER_SLOT):
        env.step(random_chunks(rng, 2) * 0.1)
    assert np.array_equal(one, value)
    env.close()
    assert np.array_equal(one, value)


def test_observations_that_are_let_go_are_not_copied(point):
    env = point(2, workers=1)
    addresses = set()
    observation, _ = env.reset(seed=0)
    for _ in range(10):
        observation = env.step(np.zeros((2, 2)))[0]
        addresses.add(observation["main_images"].__array_interface__["data"][0])
    assert len(addresses) == 2  # one in the user's hands, one being written


def test_users_may_write_into_observations(point):
    env = point(2, workers=1)
    observation, _ = env.reset(seed=0)
    before = observation["main_images"].copy()
    observation["main_images"][:] = 7
    again, _ = env.reset(options={"reset_mask": np.array([True, False])})
    assert np.array_equal(again["main_images"][1], before[1])


class TwoHeads(PointWorld):
    def observe(self):
        return {**super().observe(), "wrist_images": np.zeros((2, self.size, self.size, 3), np.uint8)}


class Widened(PointWorld):
    def observe(self):
        return {**super().observe(), "states": np.zeros(2)}


@pytest.mark.parametrize(("world", "words"), [(TwoHeads, "wrist_images.*does not declare it"), (Widened, "states.*float64.*declares float32")])
def test_an_observation_that_breaks_the_interface_is_refused(world, words):
    env = VectorEnv(dataclasses.replace(POINT, simulation=f"tests.test_vector:{world.__name__}"), 1)
    with pytest.raises(ValueError, match=words):
        env.reset(seed=0)
    env.close()


# Slots


def test_send_and_recv_equal_step_chunk(point):
    halves, whole = point(5, slots=2), point(5, workers=2)
    assert [list(halves.slot_envs(slot)) for slot in (0, 1)] == [[0, 1, 2], [3, 4]]
    first, _ = halves.reset(seed=0)
    second, _ = whole.reset(seed=0)
    assert same(first, second)
    rng = np.random.default_rng(0)
    for order in ([0, 1], [1, 0]):
        actions = random_chunks(rng, 5, 3) * 0.2
        expected = whole.step_chunk(actions)
        for slot in order:
            halves.send(actions[list(halves.slot_envs(slot))], slot)
        for slot in (0, 1):
            part, rows = halves.recv(slot), list(halves.slot_envs(slot))
            assert same(part.observation, select(expected.observation, rows))
            assert np.array_equal(part.reward, expected.reward[rows]) and part.info["steps"].tolist() == expected.info["steps"][rows].tolist()
    assert same(halves.step_chunk(actions).observation, whole.step_chunk(actions).observation)


def test_a_slot_can_be_reset_while_another_is_under_way(point):
    env, plain = point(4, slots=2), point(4, workers=1)
    env.reset(seed=0)
    env.send(np.zeros((2, 3, 2)), 0)
    observation, info = env.reset(seed=10, options={"task": [1, 2]}, slot=1)
    expected, _ = plain.reset(seed=10, options={"task": [0, 0, 1, 2]})
    assert info["seed"].tolist() == [12, 13] and same(observation, select(expected, [2, 3]))
    assert [len(chunk) for chunk in env.expert_actions(slot=1)] == [1, 1]
    assert env.recv(0).length.tolist() == [3, 3]


def test_misuse_of_slots(point):
    env = point(2, slots=2)
    with pytest.raises(gym.error.ResetNeeded, match=r"reset\(\) before send"):
        env.send(np.zeros((1, 3, 2)), 0)
    env.reset(seed=0)
    with pytest.raises(gym.error.NoAsyncCallError, match=r"recv\(1\) without a send"):
        env.recv(1)
    env.send(np.zeros((1, 3, 2)), 0)
    for call in (lambda: env.send(np.zeros((1, 3, 2)), 0), lambda: env.step_chunk(np.zeros((2, 3, 2))), env.reset, lambda: env.reset(slot=0)):
        with pytest.raises(gym.error.AlreadyPendingCallError, match=r"call recv\(0\) first"):
            call()
    with pytest.raises(ValueError, match="0 to 1"):
        env.send(np.zeros((1, 3, 2)), 2)
    assert env.recv(0).length.tolist() == [3]
    env.send(np.zeros((1, 3, 2)), 1)
    env.close()  # under way, and no trouble
    with pytest.raises(gym.error.ClosedEnvironmentError):
        env.reset()


# Trouble


@pytest.mark.parametrize(("trouble", "workers"), [("crash", 3), ("hang", 3), ("raise", 3), ("raise", 0)])
def test_trouble_aborts_one_episode_and_nothing_else(point, trouble, workers):
    env, calm = point(3, workers=workers, trouble=trouble, timeout=5 if trouble == "hang" else 60), point(3, workers=1)
    env.reset(seed=0, options={"trouble": [None, 3, None]}), calm.reset(seed=0)
    rng = np.random.default_rng(0)
    actions = random_chunks(rng, 3, 4) * 0.1
    words = {"crash": "SIGKILL", "hang": "no answer in time", "raise": "the world fell apart"}[trouble]
    with pytest.warns(RuntimeWarning, match=rf"episode of env 1 is aborted.*{words}"):
        result = env.step_chunk(actions)
    expected = calm.step_chunk(actions)
    assert result.info["aborted"].tolist() == [False, True, False] and words in result.info["abort_reason"][1]
    assert result.length.tolist() == [4, 0, 4] and result.truncated.any(axis=1).tolist() == [False, True, False]
    assert result.info["_success"].tolist() == [True, False, True] and not result.terminated.any()
    assert same(select(result.observation, [0, 2]), select(expected.observation, [0, 2]))
    assert result.observation["task_descriptions"][1] == "" and not result.observation["main_images"][1].any()

    after = env.step_chunk(actions)
    assert after.length.tolist() == [4, 0, 4] and not after.info["aborted"].any()  # told once
    observation, _ = env.reset(seed=20, options={"reset_mask": result.done})
    fresh, _ = calm.reset(seed=20)
    assert same(select(observation, 1), select(fresh, 1)) and same(select(observation, 0), select(after.observation, 0))
    assert same(select(env.step_chunk(actions).observation, 1), select(calm.step_chunk(actions).observation, 1))


def test_all_episodes_of_a_lost_worker_are_aborted(point):
    env = point(4, workers=2)
    env.reset(seed=0, options={"trouble": [2, None, None, None]})
    with pytest.warns(RuntimeWarning):
        result = env.step_chunk(np.zeros((4, 3, 2)))
    assert result.info["aborted"].tolist() == [True, True, False, False]


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_autoreset_brings_a_lost_env_back(point, mode, num_envs):
    env = point(num_envs, workers=num_envs, autoreset_mode=mode)
    env.reset(seed=0, options={"trouble": [2, None][:num_envs]})
    still = np.zeros((num_envs, 2), np.float32)
    env.step(still)
    with pytest.warns(RuntimeWarning):
        observation, _, terminated, truncated, info = env.step(still)
    assert info["aborted"].tolist() == truncated.tolist() == [True, False][:num_envs] and not terminated.any()
    if mode is AutoresetMode.NEXT_STEP:
        observation, _, _, truncated, info = env.step(still)
        assert not truncated.any() and not info["aborted"].any()
    else:
        assert info["final_obs"][0]["task_descriptions"] == "" and info["final_obs"][1:].tolist() == [None] * (num_envs - 1)
    single = gym.make("test/Point")
    assert same(select(observation, 0), single.reset(seed=int(info["seed"][0]))[0])


def test_a_worker_killed_between_calls(point):
    env = point(3, workers=3)
    env.reset(seed=0)
    victim = env._workers[1].process
    victim.kill(), victim.wait()
    with pytest.warns(RuntimeWarning, match="SIGKILL"):
        result = env.step_chunk(np.zeros((3, 2, 2)))
    assert result.info["aborted"].tolist() == [False, True, False]
    env._workers[2].process.kill()
    observation, _ = env.reset(options={"reset_mask": np.array([False, True, False])})  # one comes back, the other is lost meanwhile
    assert [text != "" for text in observation["task_descriptions"]] == [True, True, False]
    with pytest.warns(RuntimeWarning, match="env 2"):
        result = env.step_chunk(np.zeros((3, 2, 2)))
    assert result.length.tolist() == [2, 2, 0] and result.info["aborted"].tolist() == [False, False, True]


def test_an_episode_lost_outside_a_chunk_is_reported_by_the_next(point):
    env = point(2, workers=2)
    env.reset(seed=0)
    env._workers[1].process.kill()
    first, second = env.expert_actions()
    assert len(first) == 1 and second is None
    with pytest.warns(RuntimeWarning):
        result = env.step_chunk([first, second])
    assert result.info["aborted"].tolist() == [False, True] and result.done[1]
    env.reset(seed=0)
    assert env.expert_actions()[1] is not None


def test_repeated_failure_is_an_error_with_the_workers_traceback(point):
    env = point(1, trouble="raise")
    for _ in range(ATTEMPTS - 1):
        env.reset(seed=0, options={"trouble": 1})
        with pytest.warns(RuntimeWarning):
            env.step_chunk(np.zeros((1, 1, 2)))
    env.reset(seed=0, options={"trouble": 1})
    with pytest.raises(WorkerError, match=f"env 0 failed {ATTEMPTS} times in a row.*fell apart") as caught:
        env.step_chunk(np.zeros((1, 1, 2)))
    assert "worlds.py" in caught.value.__notes__[0]
    env.reset(seed=0)
    assert env.step_chunk(np.zeros((1, 1, 2))).length == 1


class Fragile(PointWorld):
    """Is never the same again after it raised."""

    def reset(self, seed, options):
        assert not getattr(self, "broken", False), "used again after it broke"
        return super().reset(seed, options)

    def _misbehave(self):
        self.broken = True
        raise RuntimeError("crack")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_simulation_that_raised_is_built_anew_and_its_neighbours_stay(workers):
    env = VectorEnv(dataclasses.replace(POINT, simulation="tests.test_vector:Fragile"), 2, workers=workers)
    env.reset(seed=0, options={"trouble": [1, None]})
    with pytest.warns(RuntimeWarning, match="crack"):
        result = env.step_chunk(np.zeros((2, 2, 2)))
    assert result.length.tolist() == [0, 2] and result.info["aborted"].tolist() == [True, False]
    env.reset(options={"reset_mask": result.done})
    assert env.step_chunk(np.zeros((2, 2, 2))).info["steps"].tolist() == [2, 4]
    env.close()


class Clueless:
    def __init__(self, simulation):
        pass

    def reset(self):
        pass

    def act(self):
        raise LookupError("no plan")


def test_an_expert_that_raises_is_the_users_to_see():
    env = VectorEnv(dataclasses.replace(POINT, expert="tests.test_vector:Clueless"), 1)
    env.reset(seed=0)
    with pytest.raises(LookupError, match="no plan"):
        env.expert_actions()
    with pytest.warns(RuntimeWarning, match="no plan"):
        assert env.step_chunk(np.zeros((1, 2, 2))).info["aborted"].all()
    env.close()


class WithChild(PointWorld):
    """Forks a process of its own, which holds the worker's socket open; `assets` tells its id."""

    def __init__(self):
        super().__init__()
        child = os.fork()
        if not child:
            time.sleep(600)
        self.assets = str(child)


def test_processes_that_simulations_start_end_with_them():
    env = VectorEnv(dataclasses.replace(POINT, simulation="tests.test_vector:WithChild"), 1, timeout=30)
    child = int(env.assets)
    env.reset(seed=0)
    env._workers[0].process.kill()
    with pytest.warns(RuntimeWarning, match="SIGKILL"):  # noticed long before the timeout
        env.step_chunk(np.zeros((1, 2, 2)))
    assert gone([child])
    env.close()


def test_a_fork_of_the_program_leaves_the_workers_alone(point):
    env = point(1)
    env.reset(seed=0)
    child = os.fork()
    if not child:
        env.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert env.step_chunk(np.zeros((1, 2, 2))).length == 2


class Unbuildable(PointWorld):
    """Dies while it is built, unless it has done so `patience` times before; counts in a file."""

    def __init__(self, log: str, patience: int):
        with open(log, "a") as file:
            file.write("x")
        if os.path.getsize(log) <= patience:
            os.kill(os.getpid(), signal.SIGSEGV)
        super().__init__()


class Unresettable(PointWorld):
    def reset(self, seed, options):
        os._exit(3)


class OddError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


class Odd(PointWorld):
    def reset(self, seed, options):
        raise OddError("odd", "indeed")  # cannot be unpickled


def test_errors_of_construction_and_reset(tmp_path):
    card, log = dataclasses.replace(POINT, simulation="tests.test_vector:Unbuildable"), tmp_path / "log"
    with pytest.raises(WorkerError, match=f"failed {ATTEMPTS} times to build.*SIGSEGV"):
        VectorEnv(card, 1, log=str(log), patience=99)
    assert log.read_text() == "x" * ATTEMPTS
    log.unlink()
    VectorEnv(card, 1, log=str(log), patience=ATTEMPTS - 1).close()
    env = VectorEnv(dataclasses.replace(POINT, simulation="tests.test_vector:Unresettable"), 1)
    with pytest.raises(WorkerError, match=f"env 0 failed {ATTEMPTS} times in a row.*exited with status 3"):
        env.reset(seed=0)
    env.close()
    env = VectorEnv(dataclasses.replace(POINT, simulation="tests.test_vector:Odd"), 1)
    with pytest.raises(RuntimeError, match="OddError: odd indeed"):
        env.reset(seed=0)
    env.close()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"sise": 3}, TypeError, "no option 'sise'; did you mean 'size'"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"num_envs": 0}, ValueError, "num_envs"),
        ({"num_envs": 2, "slots": 3}, ValueError, "slots=3"),
        ({"num_envs": 2, "slots": 2, "workers": 1}, ValueError, "workers=1 is too few"),
        ({"timeout": 0}, ValueError, "timeout"),
        ({"render_mode": "human"}, ValueError, "render_mode"),
        ({"autoreset_mode": "sometimes"}, ValueError, "sometimes"),
        ({"env_id": "test/Pont"}, vlahub.UnknownId, "'test/Point'"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, error, words):
    with pytest.raises(error, match=words):
        make(**{"env_id": "test/Point", **arguments})


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_call_leaves_no_stale_replies(point, workers):
    env, calm = point(2, workers=workers, cost=0.05), point(2, workers=1)
    env.reset(seed=0)
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            env.step_chunk(np.zeros((2, 20, 2)))
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.warns(RuntimeWarning, match="interrupted"):
        assert env.step_chunk(np.zeros((2, 1, 2))).info["aborted"].all()
    assert same(env.reset(seed=3)[0], calm.reset(seed=3)[0])
    assert same(env.step_chunk(np.ones((2, 2, 2))).observation, calm.step_chunk(np.ones((2, 2, 2))).observation)


def test_cheap_simulations_live_in_the_calling_process():
    cheap = dataclasses.replace(POINT, cheap=True)
    with closing(VectorEnv(cheap, 2, slots=2)) as here, closing(VectorEnv(cheap, 2, workers=1)) as elsewhere:
        assert all(isinstance(one, InProcess) for one in here._workers) and not isinstance(elsewhere._workers[0], InProcess)
        assert same(here.reset(seed=3)[0], elsewhere.reset(seed=3)[0])
    with pytest.raises(TypeError, match="no option 'sise'"):
        VectorEnv(cheap, 1, sise=3)


# Gymnasium's doors, and others


def test_make_vec(recwarn):
    env = gym.make_vec("test/Point", num_envs=2, size=16, max_episode_steps=7, autoreset_mode="SameStep", render_mode="rgb_array")
    assert type(env) is VectorEnv and env.max_steps == 7 and env.render_mode == "rgb_array"
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP and env.metadata["render_fps"] == 10
    assert (env.tasks, env.trials, env.assets) == (3, None, "none")
    assert env.interface.main.height == 16 and vlahub.check(env, env.interface)
    wrapped = gym.wrappers.vector.RecordEpisodeStatistics(env)
    wrapped.reset(seed=0)
    for _ in range(7):
        *_, info = wrapped.step(np.zeros((2, 2), np.float32))
    assert info["episode"]["l"].tolist() == [7, 7]
    env.close()
    assert not [str(warning.message) for warning in recwarn]


class Batched(gym.vector.VectorEnv):
    def __init__(self, card, num_envs, **options):
        self.card, self.num_envs, self.options = card, num_envs, options


def test_a_natively_batched_family_brings_its_own_class(monkeypatch):
    card = dataclasses.replace(POINT, id="test/Batched", vector="tests.test_vector:Batched")
    monkeypatch.setitem(vlahub.catalog.ENVS, card.id, card)
    env = make(card.id, 3, slots=2)
    assert type(env) is Batched and (env.card, env.num_envs, env.options) == (card, 3, {"slots": 2})


def test_a_vector_env_is_not_copied(shared):
    with pytest.raises(TypeError, match="make it where it is used"):
        pickle.dumps(shared)


def test_collate():
    infos = {0: {"a": 1, "b": {"x": 2.5}, "t": "s"}, 2: {"a": 0.5, "v": np.ones(2), "b": {"x": 1}}}
    batch = collate(infos, 3)
    assert batch["a"].tolist() == [1, 0, 0.5] and batch["_a"].tolist() == [True, False, True]  # an int first does not truncate a float later
    assert batch["b"]["x"].tolist() == [2.5, 0, 1] and batch["v"].shape == (3, 2) and batch["_v"].tolist() == [False, False, True]
    assert batch["t"].tolist() == ["s", None, None]


# Processes: nothing is left behind, and scripts of every kind work

PREPARE = """
import sys
sys.path.insert(0, {root!r})
import numpy as np, vlahub
from tests.worlds import POINT
from vlahub.vector import VectorEnv
env = VectorEnv(POINT, 2, workers=2, trouble="hang")
env.reset(seed=0)
observation = env.step_chunk(np.zeros((2, 3, 2))).observation
print(*[one.process.pid for one in env._workers], flush=True)
"""


def begin(body, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PREPARE.format(root=str(ROOT)) + textwrap.dedent(body))
    # A shell's background jobs, and what they start, ignore Ctrl-C; the program must not, whatever started the tests
    program = f"import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); runpy.run_path({str(script)!r}, run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2, process.communicate()
    return process, pids


def gone(pids, patience=60.0):
    """Do all these processes end within some seconds?"""
    deadline = time.monotonic() + patience
    while any(os.path.exists(f"/proc/{pid}") and "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    "body",
    [
        "env.close()",
        "env.close(); env.close(); assert observation['states'].shape == (2, 2)",
        "del env",
        "",
        "raise KeyError('the user')",
        "sys.exit(0)",
        "env.__class__(POINT, 1); env = None",
    ],
)
def test_nothing_is_left_behind(body, tmp_path):
    shared_memory = set(os.listdir("/dev/shm"))
    process, pids = begin(body, tmp_path)
    _, errors = process.communicate(timeout=120)
    assert gone(pids)
    assert ("KeyError" in errors) if "raise" in body else (errors == "" and process.returncode == 0)  # no complaint of a resource tracker either
    assert set(os.listdir("/dev/shm")) <= shared_memory


@pytest.mark.parametrize(
    ("how", "hangs"), [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGKILL, False), (signal.SIGKILL, True)]
)
def test_nothing_is_left_behind_when_the_program_is_killed(how, hangs, tmp_path):
    process, pids = begin(f"env.reset(options={{'trouble': [1, {1 if hangs else None}]}}); env.step_chunk(np.zeros((2, 9, 2)))", tmp_path)
    time.sleep(0.3)
    os.killpg(process.pid, how)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and gone(pids)
    assert errors.count("Traceback") == (how == signal.SIGINT)  # the program's own; workers hear nothing of Ctrl-C


def test_a_dropped_env_is_collected(point):
    env = make("test/Point", 1)
    process = env._workers[0].process
    del env
    gc.collect()
    assert process.poll() is not None


def run_script(source, tmp_path, stdin=False):
    script = tmp_path / "script.py"
    source = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(source)
    script.write_text(source)
    command = [sys.executable, "-"] if stdin else [sys.executable, str(script)]
    return subprocess.run(command, input=source if stdin else None, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("stdin", [False, True])
def test_scripts_need_no_main_guard(stdin, tmp_path):
    source = """
        import gymnasium as gym, numpy as np, vlahub
        from tests.worlds import POINT
        vlahub.register_env(POINT)
        env = gym.make_vec("test/Point", num_envs=2)
        env.reset(seed=0)
        print(env.step_chunk(np.zeros((2, 3, 2))).length)
    """
    result = run_script(source, tmp_path, stdin)
    assert result.stdout == "[3 3]\n" and result.stderr == ""


OWN_WORLD = """
    import dataclasses
    from tests.worlds import POINT, PointWorld
    from vlahub.vector import VectorEnv
    class MyWorld(PointWorld):
        assets = "mine"
    card = dataclasses.replace(POINT, id="my/World", simulation="__main__:MyWorld")
"""


def test_an_environment_defined_in_the_script_itself(tmp_path):
    guarded = run_script(OWN_WORLD + "    if __name__ == '__main__': print(VectorEnv(card, 2).assets)", tmp_path)
    assert guarded.stdout == "mine\n" and guarded.stderr == ""
    unguarded = run_script(OWN_WORLD + "    print(VectorEnv(card, 2).assets)", tmp_path)
    assert unguarded.stderr.strip() and "if __name__ == '__main__':" in unguarded.stderr and unguarded.returncode == 1
    typed = run_script(OWN_WORLD + "    VectorEnv(card, 2)", tmp_path, stdin=True)
    assert "put it into a .py file" in typed.stderr


def test_a_chunk_can_bring_back_every_observation():
    """What is seen after each step that ran is what single steps would have seen, and the physics does not notice."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (2, 4, 2)).astype(np.float32)
    with closing(VectorEnv(POINT, num_envs=2, workers=2, max_steps=3, timeout=60)) as env:
        env.reset(seed=5)
        result = env.step_chunk(actions, look=True)
        env.reset(seed=5)
        singles = [env.step_chunk(actions[:, i : i + 1]).observation for i in range(3)]
    for b in range(2):
        seen = result.info["observations"][b]
        assert len(seen) == result.length[b] == 3
        for i, observation in enumerate(seen):
            assert all(np.array_equal(observation[key], singles[i][key][b]) for key in ("main_images", "states"))
            assert observation["task_descriptions"] == singles[i]["task_descriptions"][b]
