"""The trained policies that ship with the package: small, whole, and able to do in a simulation what they were trained for."""

import pytest

import vlahub
from vlahub import catalog, hub
from vlahub.evaluation import evaluate
from vlahub.vector import make

BUNDLED = sorted(name for name, card in catalog.POLICIES.items() if card.folder)


@pytest.mark.parametrize("name", BUNDLED)
def test_it_is_small_and_loads(name):
    assert sum(file.stat().st_size for file in hub.resolve(name).iterdir()) < 4e6
    policy, card = vlahub.Policy.from_pretrained(name), catalog.POLICIES[name]
    assert policy.family == card.family
    assert "%" in card.measured  # how often it succeeds, counted


@pytest.fixture(scope="module")
def bowl_on_ramekin():
    env = make("vlahub/LIBERO-Spatial", num_envs=1, slots=1, workers=1, max_steps=130, task=5, camera_size=(128, 128), assets="stand-in")
    yield env
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vlahub/dexbotic-pi0-tiny-libero", "vlahub/qwenoft-tiny-libero"])
def test_it_solves_what_it_was_trained_on(bowl_on_ramekin, name):
    """One of its easier tasks. Chance is nil: a random policy never lifts a bowl."""
    assert evaluate(bowl_on_ramekin, vlahub.Policy.from_pretrained(name), episodes=2, seed=7, videos=0, progress=False).successes >= 1


@pytest.mark.slow
@pytest.mark.parametrize("task, steps", [("AdjustBottle", 175), ("OpenMicrowave", 175)])
def test_one_policy_solves_several_tasks(task, steps):
    """Each its own way; nothing but the picture and the sentence tells which is asked for."""
    env = make(f"vlahub/RoboTwin-{task}", num_envs=1, slots=1, workers=1, max_steps=steps, cameras=("head",), assets="stand-in")
    try:
        results = evaluate(env, vlahub.Policy.from_pretrained("vlahub/lingbot-tiny-robotwin"), episodes=2, seed=7, videos=0, progress=False)
    finally:
        env.close()
    assert results.successes >= 1
