import json

import numpy as np
import pytest
import torch

import vlahub
from tests.slope import INTERFACE, SLOPE, Norm, Slope, SlopeConfig
from tests.worlds import PointWorld
from vlahub import catalog, hub
from vlahub.catalog import FamilyCard, PolicyCard
from vlahub.hub import CheckpointError
from vlahub.observation import select, stack, to_torch
from vlahub.policy import config_from_dict, config_to_dict


@pytest.fixture(autouse=True)
def slope_family(monkeypatch):
    monkeypatch.setattr(catalog, "FAMILIES", {"slope": SLOPE})
    monkeypatch.setattr(catalog, "POLICIES", {})


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return Slope(SlopeConfig(sizes=(4, 5), norm=Norm((1.0, 2.0), "z")))


@pytest.fixture
def saved(policy, tmp_path):
    return policy.save_pretrained(tmp_path / "saved")


def observations(count):
    found = []
    for seed in range(count):
        world = PointWorld(size=8)
        world.reset(seed, {})
        found.append(world.observe())
    return stack(found)


def test_save_and_load_give_the_same_policy(policy, saved):
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors", "words.txt"]
    loaded = vlahub.Policy.from_pretrained(saved)
    assert type(loaded) is Slope and not loaded.training and loaded.config == policy.config and loaded.interface == INTERFACE
    assert np.array_equal(loaded.act(observations(2)), policy.act(observations(2)))
    assert "library_name: vlahub" in (saved / "README.md").read_text() and "step[2]" in (saved / "README.md").read_text()
    assert Slope.from_pretrained(str(saved), dtype=torch.float64).head.weight.dtype == torch.float64


def test_options_override_the_config_and_unknown_ones_are_named(saved):
    assert vlahub.Policy.from_pretrained(saved, execute=1).execute == 1
    with pytest.raises(TypeError, match="SlopeConfig has no entry 'exekute'; did you mean 'execute'"):
        vlahub.Policy.from_pretrained(saved, exekute=1)


def test_published_layouts_load_unedited(policy, tmp_path):
    (tmp_path / "slope.json").write_text('{"horizon": 3}')
    torch.save(policy.state_dict(), tmp_path / "slope.pt")
    loaded = vlahub.Policy.from_pretrained(tmp_path, noise=0.5)
    assert loaded.config.noise == 0.5 and torch.equal(loaded.head.weight, policy.head.weight)


def test_shards_load_and_a_missing_one_is_named(policy, saved):
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(policy.state_dict(), saved, max_shard_size=40)
    assert not (saved / "model.safetensors").exists()
    loaded = vlahub.Policy.from_pretrained(saved)
    assert torch.equal(loaded.head.weight, policy.head.weight)
    policy.save_pretrained(saved)  # one file again: no stale index is left beside it
    vlahub.Policy.from_pretrained(saved)
    save_torch_state_dict(policy.state_dict(), saved, max_shard_size=40)
    (saved / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"incomplete: 1 of 2 shards are missing \(model-00002-of-00002.safetensors\)"):
        vlahub.Policy.from_pretrained(saved)


def test_tensors_that_do_not_fit_are_refused(policy, saved):
    from safetensors.torch import save_file

    state = dict(policy.state_dict())
    save_file({"head.weight": state["head.weight"][:2].clone(), "tail": torch.ones(1)}, saved / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        vlahub.Policy.from_pretrained(saved)
    for words in ("missing from the checkpoint: head.bias", "unexpected in the checkpoint: tail", "head.weight [2, 2] for [6, 2]", str(saved)):
        assert words in str(raised.value)


def test_a_config_of_another_version_or_family_is_refused(saved, monkeypatch):
    record = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**record, "config": {**record["config"], "depth": 3}}))
    with pytest.raises(CheckpointError, match=r"entries that SlopeConfig does not know: depth"):
        vlahub.Policy.from_pretrained(saved)
    (saved / "config.json").write_text(json.dumps({**record, "vlahub_family": "slop"}))
    with pytest.raises(catalog.UnknownId, match="no policy family is called 'slop'; did you mean 'slope'"):
        vlahub.Policy.from_pretrained(saved)


def test_a_class_loads_only_its_own_family(saved):
    class Other(Slope):
        pass

    with pytest.raises(CheckpointError, match=r"is a slope policy, not a Other; load it with vlahub.Policy.from_pretrained"):
        Other.from_pretrained(saved)


def test_a_family_whose_packages_are_missing_says_what_to_install(saved, monkeypatch):
    card = FamilyCard(name="slope", policy="tests.slope:Slope", summary="", recognises=lambda folder: False, needs=("no_such_model",))
    monkeypatch.setattr(catalog, "FAMILIES", {"slope": card})
    with pytest.raises(ImportError, match=r"slope policy family needs no_such_model.*pip install 'vlahub\[policies\]'"):
        vlahub.Policy.from_pretrained(saved)


def test_options_of_a_known_checkpoint_are_applied(saved, monkeypatch):
    monkeypatch.setitem(catalog.POLICIES, "vlahub/slope-tiny", PolicyCard(id="vlahub/slope-tiny", family="slope", summary="", options={"execute": 3}))
    monkeypatch.setattr(hub, "resolve", lambda name, **_: saved)
    assert vlahub.Policy.from_pretrained("vlahub/slope-tiny").execute == 3
    assert vlahub.Policy.from_pretrained("vlahub/slope-tiny", execute=1).execute == 1


def test_act_takes_single_and_batched_numpy_and_torch(policy):
    batch = observations(3)
    actions = policy.act(batch)
    assert actions.shape == (3, 3, 2) and actions.dtype == np.float32
    assert policy.act(select(batch, 1)).shape == (3, 2)
    assert np.array_equal(policy.act(to_torch(batch)), actions)
    assert not torch.is_grad_enabled() or policy.head.weight.grad is None


def test_deterministic_actions_do_not_depend_on_the_batch(policy):
    batch, seeds = observations(3), [(5, 0), (6, 10), (7, 20)]
    whole = policy.act(batch, seeds=seeds)
    for i in range(3):
        assert policy.act(select(batch, slice(i, i + 1)), seeds=seeds[i : i + 1])[0] == pytest.approx(whole[i], abs=1e-6)
    assert not np.allclose(policy.act(batch, seeds=[(1, 0)] * 3), policy.act(batch, seeds=[(2, 0)] * 3))
    with pytest.raises(ValueError, match="2 seeds for a batch of 3 observations"):
        policy.act(batch, seeds=seeds[:2])


def test_samples_explore_and_evaluate_returns_their_log_prob(policy):
    batch = observations(3)
    assert not np.allclose(policy.act(batch, deterministic=False), policy.act(batch, deterministic=False))
    seeds = [(5, 0), (6, 10), (7, 20)]
    whole = policy.act(batch, deterministic=False, seeds=seeds)
    assert policy.act(select(batch, 1), deterministic=False, seeds=seeds[1:2]) == pytest.approx(whole[1], abs=1e-6)
    sample = policy.sample(batch)
    evaluation = policy.evaluate(sample.trace)
    with pytest.raises(ValueError, match="this slope policy has no value head"):
        policy.value(batch)
    assert torch.equal(evaluation.log_prob, sample.log_prob) and evaluation.log_prob.requires_grad and not sample.log_prob.requires_grad


def test_a_broken_observation_is_refused(policy):
    with pytest.raises(ValueError, match=r"observation\['states'\] is float64, expected float32"):
        policy.act({**observations(1), "states": np.zeros((1, 2))})


def test_configs_round_trip():
    config = SlopeConfig(norm=Norm((0.5,), "a"), maybe=Norm((2.0, 3.0), "b"))
    assert config_from_dict(SlopeConfig, json.loads(json.dumps(config_to_dict(config)))) == config
    assert config_from_dict(SlopeConfig, config_to_dict(SlopeConfig())) == SlopeConfig()


def test_push_to_hub_uploads_what_from_pretrained_reads(policy, monkeypatch):
    import huggingface_hub

    seen = {}

    class Api:  # there is no hub on the test machine; the client's own calls are what is checked
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            seen.update(repo_id=repo_id, private=private)
            return f"hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen["policy"] = vlahub.Policy.from_pretrained(folder_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert policy.push_to_hub("me/slope", private=True, token="t") == "hub/me/slope"
    assert seen["repo_id"] == "me/slope" and seen["private"] and seen["token"] == "t"
    assert torch.equal(seen["policy"].head.weight, policy.head.weight)
