import dataclasses
import subprocess
import sys

import gymnasium as gym
import pytest

import vlahub
from tests.worlds import POINT, PointWorld
from vlahub import catalog
from vlahub.catalog import EnvCard, FamilyCard, PolicyCard, UnknownId


def test_importing_vlahub_brings_no_simulator_no_model_and_no_torch():
    heavy = ("torch", "transformers", "sapien", "mani_skill", "mujoco", "robosuite", "libero", "huggingface_hub", "av", "tyro", "pyarrow")
    code = (
        "import time; start = time.perf_counter(); import vlahub; seconds = time.perf_counter() - start; import sys; "
        f"print(round(seconds, 2), [name for name in {heavy} if name in sys.modules])"
    )
    seconds, loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(" ", 1)
    print(f"import vlahub takes {seconds} s")
    assert loaded.strip() == "[]"


def test_lazy_names_resolve_and_unknown_ones_do_not():
    from vlahub.policy import Policy

    assert vlahub.Policy is Policy
    with pytest.raises(AttributeError, match="no attribute 'Polcy'"):
        vlahub.Polcy  # noqa: B018


def test_every_public_name_exists():
    for name in vlahub.__all__:
        assert getattr(vlahub, name) is not None


def test_gymnasium_knows_the_ids_with_and_without_the_module():
    assert gym.make("test/Point").env_id == gym.make("vlahub:test/Point").env_id == "test/Point"
    assert gym.make("test/Point", size=32).observation_space["main_images"].shape == (32, 32, 3)
    assert catalog.env_card("vlahub:test/Point") is POINT


def test_unknown_ids_suggest_the_nearest():
    with pytest.raises(UnknownId, match=r"no environment is called 'test/Pont'; did you mean 'test/Point'"):
        catalog.env_card("test/Pont")
    with pytest.raises(gym.error.NameNotFound, match="`Point`"):
        gym.make("test/Pont")
    with pytest.raises(UnknownId, match="known are .*'test/Point'"):
        catalog.env_card("zzzzzzzzzzzz")
    with pytest.raises(UnknownId, match="no policy family is called"):
        catalog.family_card("nothing like it")


def test_suggest():
    assert catalog.suggest("LIBERO-spatial", ["LIBERO-Spatial", "LIBERO-Goal"]).startswith("did you mean 'LIBERO-Spatial'")
    assert catalog.suggest("x", ["aaaa", "bbbb"]) == "known are 'aaaa', 'bbbb'"
    assert catalog.suggest("x", []) == "known are none"


def test_ids_are_registered_once(recwarn):
    with pytest.raises(ValueError, match="'test/Point' is registered already, with another card"):
        vlahub.register_env(dataclasses.replace(POINT, summary="another"))
    vlahub.register_env(dataclasses.replace(POINT))  # the same card again, from a notebook cell, is no conflict
    assert catalog.env_card("test/Point") is POINT and not recwarn


def test_a_third_party_registers_families_and_policies(monkeypatch):
    monkeypatch.setattr(catalog, "FAMILIES", {})
    monkeypatch.setattr(catalog, "POLICIES", {})
    vlahub.register_family(FamilyCard(name="mine", policy="mine:Mine", summary="", recognises=lambda folder: False))
    vlahub.register_policy(PolicyCard(id="me/mine", family="mine", summary=""))
    assert catalog.family_card("mine").policy == "mine:Mine" and list(catalog.POLICIES) == ["me/mine"]


def test_missing_packages_are_named_with_the_command_that_installs_them():
    with pytest.raises(ImportError, match=r"test/Needy needs no_such_simulator, which is not installed: pip install 'vlahub\[sapien\]'"):
        catalog.make_simulation(EnvCard(id="test/Needy", family="test", simulation="", summary="", needs=("no_such_simulator", "numpy"), extra="sapien"))


def test_options_of_a_simulation():
    fixed = EnvCard(id="test/Small", family="test", simulation=POINT.simulation, summary="", kwargs={"size": 10})
    assert isinstance(catalog.make_simulation(POINT), PointWorld)
    assert catalog.make_simulation(fixed, wrists=1).size == 10
    with pytest.raises(TypeError, match=r"test/Point has no option 'wrist'; did you mean 'wrists'"):
        catalog.make_simulation("test/Point", wrist=1)
    with pytest.raises(TypeError, match="test/Small has no option 'size'"):  # what the card fixes is not the user's to choose
        catalog.make_simulation(fixed, size=12)


def test_experts():
    simulation = catalog.make_simulation(POINT)
    simulation.reset(0, {})
    assert catalog.make_expert(POINT, simulation).act().shape == (1, 2)
    with pytest.raises(ValueError, match="test/Silent has no scripted expert"):
        catalog.make_expert(EnvCard(id="test/Silent", family="test", simulation=POINT.simulation, summary=""), simulation)


def test_every_card_is_complete():
    for card in catalog.ENVS.values():
        assert card.summary and card.simulation.count(":") == 1, card.id
    for card in catalog.POLICIES.values():
        assert card.summary and card.family in catalog.FAMILIES, card.id
        # A checkpoint may be known before the environments that it was trained for; of a family that is there, every id must be
        there = {env_id.split("-")[0] for env_id in catalog.ENVS}
        assert {env_id for env_id in card.envs if env_id.split("-")[0] in there} <= catalog.ENVS.keys(), card.id
