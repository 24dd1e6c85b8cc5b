import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import vlahub
from tests.worlds import PointWorld
from vlahub import catalog
from vlahub.env import Episode
from vlahub.observation import validate
from vlahub.simulation import Outcomes


def point(**options):
    return gym.make("test/Point", **options)


def test_gym_make_gives_our_class_and_passes_gymnasiums_checker(recwarn):
    env = gym.make("test/Point", render_mode="rgb_array")
    assert type(env) is vlahub.Env
    check_env(env)
    assert not [str(w.message) for w in recwarn]


def test_reset_is_a_function_of_the_seed():
    first, second = point(), point()
    a, info = first.reset(seed=7)
    b, _ = second.reset(seed=7)
    validate(a)
    assert info["seed"] == 7
    assert all(np.array_equal(a[key], b[key]) for key in a)
    assert not np.array_equal(a["states"], first.reset(seed=8)[0]["states"])
    drawn, info = first.reset()
    again, _ = second.reset(seed=info["seed"])
    assert np.array_equal(drawn["states"], again["states"])


def test_step_chunk_equals_steps_and_draws_once():
    chunked, stepped = point(), point()
    chunked.reset(seed=3), stepped.reset(seed=3)
    actions = np.random.default_rng(0).uniform(-0.3, 0.3, (5, 2)).astype(np.float32)
    drawn = chunked.simulation.renders
    result = chunked.step_chunk(actions)
    assert chunked.simulation.renders == drawn + 1
    for i, action in enumerate(actions):
        observation, reward, terminated, truncated, _ = stepped.step(action)
        assert (reward, terminated, truncated) == (result.reward[i], result.terminated[i], result.truncated[i])
    assert all(np.array_equal(observation[key], result.observation[key]) for key in observation)
    assert result.length == 5


def test_chunk_stops_at_success_and_at_the_time_limit():
    env = point(max_steps=60)
    env.reset(seed=3)
    expert = catalog.make_expert("test/Point", env.simulation)
    while not env.episode.done:
        result = env.step_chunk(np.vstack([expert.act(), np.zeros((3, 2))]))
    assert result.terminated.sum() == 1 and result.terminated[result.length - 1] and not result.truncated.any()
    assert result.reward[result.length :].sum() == 0 and result.info["success"]

    env = point(max_steps=6)
    env.reset(seed=3)
    env.step_chunk(np.zeros((4, 2)))
    result = env.step_chunk(np.zeros((4, 2)))
    assert result.length == 2 and result.truncated.tolist() == [False, True, False, False] and not result.terminated.any()
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        env.step(np.zeros(2))


@pytest.mark.parametrize(
    ("actions", "error", "words"),
    [
        (np.zeros(3), ValueError, r"shape \(1, 3\), expected \('N', 2\)|expected"),
        (np.array([np.nan, 0]), ValueError, "nan"),
        (np.array([0, np.inf]), ValueError, "finite"),
        (np.array(["a", "b"]), TypeError, "numbers"),
    ],
)
def test_bad_actions_are_refused(actions, error, words):
    env = point()
    env.reset(seed=0)
    with pytest.raises(error, match=words):
        env.step(actions)


def test_actions_out_of_bounds_are_clipped_and_counted():
    env, other = point(), point()
    env.reset(seed=0), other.reset(seed=0)
    observation, *_, info = env.step(np.array([9.0, 0.5]))
    expected, *_, plain = other.step(np.array([1.0, 0.5]))
    assert info["clipped"] == 1 and "clipped" not in plain
    assert np.array_equal(observation["states"], expected["states"])


def test_clipping_is_counted_in_float32_and_overflow_is_refused():
    env = point()
    env.reset(seed=0)
    *_, info = env.step(np.array([1 + 1e-9, -1.0]))  # 1.0 in float32
    assert "clipped" not in info
    with pytest.raises(ValueError, match="finite"):
        env.step(np.array([1e300, 0]))


class Unstoppable(PointWorld):
    """Runs every action that it is given, as a video model does; `returned` replaces its outcomes."""

    returned: Outcomes

    def apply(self, actions, watch=None):
        return self.returned


def test_a_simulation_that_runs_past_the_end_is_cut_there():
    world = Unstoppable()
    episode = Episode(world)
    episode.reset(0, {})
    world.returned = Outcomes(np.ones(4, np.float32), np.array([False, True, True, True]))
    reward, terminated, truncated, length, info = episode.run(np.zeros((4, 2), np.float32))
    assert length == 2 and reward.tolist() == [1, 1, 0, 0] and terminated.tolist() == [False, True, False, False]
    assert not truncated.any() and info["steps"] == 2 and info["success"] and episode.done


@pytest.mark.parametrize(("rewards", "successes"), [(0, 0), (5, 5), (3, 2)])
def test_outcomes_of_a_wrong_length_are_refused(rewards, successes):
    world = Unstoppable()
    episode = Episode(world)
    episode.reset(0, {})
    world.returned = Outcomes(np.zeros(rewards, np.float32), np.zeros(successes, bool))
    with pytest.raises(RuntimeError, match="was given 4 actions"):
        episode.run(np.zeros((4, 2), np.float32))


def test_bad_arguments_say_what_to_do():
    with pytest.raises(TypeError, match="no option 'sise'; did you mean 'size'"):
        point(sise=3)
    with pytest.raises(ValueError, match="render_mode"):
        catalog.load("vlahub.env:make")("test/Point", render_mode="human")
    with pytest.raises(ValueError, match="max_steps"):
        point(max_steps=0)
    env = point()
    with pytest.raises(ValueError, match=r"unknown reset option 'tusk'.*'task'"):
        env.reset(seed=0, options={"tusk": 1})
    with pytest.raises(ValueError, match="tasks 0 to 2"):
        env.reset(seed=0, options={"task": 9})
    with pytest.raises(ValueError, match="seed"):
        env.reset(seed=-1)
    with pytest.raises(gym.error.ResetNeeded):  # a failed reset does not leave the old episode running
        env.step(np.zeros(2))


def test_unknown_ids_suggest_the_nearest():
    with pytest.raises(vlahub.UnknownId, match="'test/Point'"):
        catalog.make_simulation("test/Pont")
