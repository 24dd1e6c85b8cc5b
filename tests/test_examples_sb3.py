"""stable-baselines3 takes our environments, through the wrapper of the example."""

import gymnasium as gym
import numpy as np
import pytest

from examples.sb3_ppo import ForStableBaselines
from tests.test_examples import run


def test_the_wrapper_gives_what_stable_baselines_accepts():
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    env = ForStableBaselines(gym.make("test/Point", size=40, wrists=2, extras=1))
    checker.check_env(env, warn=False)
    observation, _ = env.reset(seed=3)
    whole, _ = env.env.reset(seed=3)
    assert set(observation) == {"main_images", "wrist_images_0", "wrist_images_1", "extra_view_images_0", "states"}
    assert np.array_equal(observation["wrist_images_1"], whole["wrist_images"][1]) and np.array_equal(observation["states"], whole["states"])
    with pytest.raises(ValueError, match="main_images is 24x24"):
        ForStableBaselines(gym.make("test/Point"))


@pytest.mark.slow
def test_stable_baselines_trains_on_our_environment(tmp_path):
    pytest.importorskip("stable_baselines3")
    shown = run("sb3_ppo.py", "--env-id", "tests.sb3_world:test/BigPoint", "--steps", 32, "--n-steps", 8, "--max-steps", 6, "--out", tmp_path / "model.zip")
    assert "trained for 32 control steps" in shown and (tmp_path / "model.zip").exists()
