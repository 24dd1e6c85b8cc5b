"""What holds for every registered environment id. A family that registers an id is covered from then on."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import vlahub
from tests.envs import evac_tiny
from vlahub import catalog
from vlahub.interface import Interface
from vlahub.observation import select, stack, validate

# Drawing costs a CPU most of the time, and nothing here looks at what is drawn: the pictures are small. LIBERO's suites differ in their tasks, and to compile
# one takes half a second: Spatial draws its tasks here, of the others one task is made, each another one. The imagined suites have a few random weights,
# the one with bundled weights too: a chunk of those takes 0.7 s, and their own test is in test_evac_environment.py
LIBERO_TASK = {"Spatial": None, "Object": 3, "Goal": 7, "10": 3, "90": 20, "130": 10}
# The expert of LIBERO covers three suites and six tasks of a fourth (3 is one of them), and an imagination has no state to look at
NO_EXPERT = ("vlahub/LIBERO-90", "vlahub/LIBERO-130", "vlahub/EVAC-")


def make(env_id: str, **options) -> vlahub.Env:
    match catalog.env_card(env_id).family:
        case "robotwin":
            options |= {"camera_size": (16, 16)}
        case "twin":
            options |= {"camera_size": (48, 64)}
        case "libero":
            task = LIBERO_TASK[env_id.removeprefix("vlahub/LIBERO-")]
            options |= {"camera_size": (32, 32), "task": task, "protocol": "openvla"}  # half the settle steps of ours
        case "evac":
            options |= {"model": evac_tiny.tiny(success=-9.0), "starts": evac_tiny.starts(), "denoising_steps": 1}
    return gym.make(env_id, **options)


# Building a world takes seconds, so the tests of one id share one
@pytest.fixture(scope="module", params=catalog.ENVS)
def env(request):
    env = make(request.param, render_mode="rgb_array")
    yield env
    env.close()
    env.close()  # closing twice is allowed


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_gymnasiums_checker_has_no_complaint(env, recwarn):
    assert type(env) is vlahub.Env and env.spec.id == env.env_id
    check_env(env, skip_close_check=True)
    complaints = [str(warning.message) for warning in recwarn if "gymnasium" in warning.filename]
    # Actions are in the units that published policies give (joint positions in rad, poses in m), so Gymnasium's advice to scale them cannot be followed
    low, high = env.action_space.low, env.action_space.high
    if (low < -1).any() or (high > 1).any() or ((low != 0) & (abs(low) != abs(high))).any():
        complaints = [words for words in complaints if "symmetric and normalized space" not in words]
    assert not complaints


def test_reset_is_a_function_of_the_seed(env):
    first, info = env.reset(seed=3)
    validate(first)
    assert env.observation_space.contains(first)
    assert info["seed"] == 3 and 0 <= info["task"] < env.simulation.tasks and "trial" in info
    env.step(env.action_space.sample() * 0 + np.clip(0, env.action_space.low, env.action_space.high))  # an episode in between must leave no trace
    again, other = env.reset(seed=3)
    assert same(first, again) and (info["task"], info["trial"]) == (other["task"], other["trial"])
    different = [env.reset(seed=seed)[0] for seed in (4, 5, 6)]
    assert not all(same(first, observation) for observation in different)
    drawn, info = env.reset()
    assert same(drawn, env.reset(seed=info["seed"])[0])


def test_a_task_and_a_trial_choose_the_episode(env):
    last = env.simulation.tasks - 1
    _, info = env.reset(seed=0, options={"task": last, "trial": 1})
    assert (info["task"], info["trial"]) == (last, 1)
    for task in (last + 1, -1):
        with pytest.raises(ValueError, match=str(last)):
            env.reset(seed=0, options={"task": task})


def test_interface_survives_json_and_fits_itself(env):
    assert Interface.from_dict(env.interface.to_dict()) == env.interface
    assert str(vlahub.check(env, env.interface)) == "direct"
    assert env.assets and env.metadata["render_fps"] > 0


def test_step_chunk_equals_steps(env):
    rng = np.random.default_rng(0)
    low, high = (np.clip(bound, -1, 1) for bound in (env.action_space.low, env.action_space.high))
    env.reset(seed=5)
    count = 1 if env.interface.control_hz is None else 4  # without a fixed rate, a chunk is planned as a whole and is more than its steps
    actions = rng.uniform(low, high, (count, len(low))).astype(np.float32)
    result = env.step_chunk(actions)
    validate(result.observation)
    assert result.reward.shape == result.terminated.shape == result.truncated.shape == (count,)
    assert 1 <= result.length <= count and {"success", "steps"} <= result.info.keys()
    env.reset(seed=5)
    for i in range(result.length):
        observation, reward, terminated, truncated, info = env.step(actions[i])
        assert reward == pytest.approx(result.reward[i], abs=1e-6)
        assert (terminated, truncated) == (result.terminated[i], result.truncated[i])
    assert observation["states"] == pytest.approx(result.observation["states"], abs=1e-5)
    assert info["steps"] == result.info["steps"]


def test_observations_stay_as_they_were(env):
    first, _ = env.reset(seed=1)
    kept = {key: value if isinstance(value, str) else value.copy() for key, value in first.items()}
    env.step(env.action_space.high.clip(-1, 1))
    env.reset(seed=2)
    assert same(first, kept)
    batch = stack([first, kept])
    validate(batch)
    assert same(select(batch, 1), kept)


def test_the_expert_acts_within_bounds(env):
    if not catalog.env_card(env.env_id).expert:
        assert env.env_id.startswith(NO_EXPERT), f"{env.env_id} has no scripted expert, so nothing proves it solvable"
        with pytest.raises(ValueError, match="no scripted expert"):
            catalog.make_expert(env.env_id, env.simulation)
        return
    env.reset(seed=0)
    expert = catalog.make_expert(env.env_id, env.simulation)
    expert.reset()
    for _ in range(3):
        chunk = expert.act()
        assert chunk.ndim == 2 and chunk.shape[1:] == env.action_space.shape and len(chunk) >= 1
        result = env.step_chunk(chunk)
        assert "clipped" not in result.info, "the expert asks for more than the bounds allow"
        if result.done:
            break


def test_pictures_for_people(env):
    env.reset(seed=0)
    picture = env.render()
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 0


def test_bad_actions_are_refused(env):
    env.reset(seed=0)
    dim = env.action_space.shape[0]
    for action, error, words in (
        (np.zeros(dim + 1), ValueError, "shape"),
        (np.full(dim, np.nan), ValueError, "finite"),
        (np.full(dim, np.inf), ValueError, "finite"),
        (np.array(["x"] * dim), TypeError, "numbers"),
    ):
        with pytest.raises(error, match=words):
            env.step(action)
    for chunk in (np.zeros(dim), np.zeros((0, dim)), np.zeros((1, 1, dim))):
        with pytest.raises(ValueError, match="expected"):
            env.step_chunk(chunk)


def test_the_time_limit_cuts_the_episode(env):
    short = vlahub.Env(env.simulation, env.env_id, max_steps=2)
    short.reset(seed=0)
    still = np.clip(0, short.action_space.low, short.action_space.high)
    result = short.step_chunk(np.stack([still] * 3))
    assert result.length == 2 and (result.truncated.tolist() == [False, True, False] or result.terminated.any())
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        short.step(still)


def test_unknown_options_are_refused(env):
    with pytest.raises(ValueError, match=r"unknown reset option 'tusk'; known are .*'task'"):
        env.reset(seed=0, options={"tusk": 1})
    with pytest.raises(TypeError, match=f"{env.env_id} has no option 'no_such_option'"):
        gym.make(env.env_id, no_such_option=1)
    for seed in (-1, 2**31, 0.5, True):
        with pytest.raises(ValueError, match="seed must be a whole number"):
            env.reset(seed=seed)


@pytest.mark.parametrize("env_id", {c.family: c.id for c in catalog.ENVS.values()}.values())
def test_two_instances_agree(env_id):
    """Nothing of an episode depends on the process's history. One id per family: it shares its code with the others."""
    used, fresh = make(env_id), make(env_id)
    try:
        used.reset(seed=1)
        used.step(np.clip(0, used.action_space.low, used.action_space.high))
        assert same(used.reset(seed=2)[0], fresh.reset(seed=2)[0])
        actions = np.random.default_rng(0).uniform(used.action_space.low.clip(-1), used.action_space.high.clip(max=1), (3, *used.action_space.shape))
        assert same(used.step_chunk(actions).observation, fresh.step_chunk(actions).observation)
    finally:
        used.close()
        fresh.close()
