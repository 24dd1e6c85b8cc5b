"""Published folders load unedited and give the numbers of the network that was written; what does not fit is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vlahub
from tests.policies import published
from tests.policies.test_text import as_json
from vlahub.hub import CheckpointError
from vlahub.policy import Policy
from vlahub_policies.dexbotic import DexboticConfig, DexboticPolicy
from vlahub_policies.parts import normalize, robots
from vlahub_policies.pi0 import Pi0Policy

NUMBERS = published.statistics(8, 7)
LIBERO_PI0 = dict(relative=tuple(range(6)), execute=5, statistics=NUMBERS)


def same_actions(loaded: Policy, expected: Policy, observation: dict | None = None) -> None:
    observation = published.observation() if observation is None else observation
    np.testing.assert_allclose(loaded.act(observation), expected.act(observation), atol=1e-5)


def load(folder, **options) -> Policy:
    return vlahub.Policy.from_pretrained(folder, dtype=torch.float32, **options)


def test_openpi_folder(tmp_path):
    network = published.network()
    loaded = load(published.openpi(tmp_path / "ckpt", network, NUMBERS))
    assert isinstance(loaded, Pi0Policy) and not loaded.config.pi05 and (loaded.horizon, loaded.execute) == (50, 5)
    assert loaded.interface == robots.LIBERO
    same_actions(loaded, published.with_numbers(network, **LIBERO_PI0))


def test_pi05_is_recognised_by_its_tensors(tmp_path):
    network = published.network(pi05=True)
    loaded = load(published.openpi(tmp_path / "ckpt", network, NUMBERS))
    assert loaded.config.pi05 and loaded.config.quantile and loaded.horizon == 10 and not loaded.config.state_in_prompt and loaded.config.max_token_len == 200
    same_actions(loaded, published.with_numbers(network, statistics=NUMBERS, quantile=True, execute=5))


def test_rlinf_folders(tmp_path):
    network = published.network(value_head=True)
    loaded = load(published.rlinf(tmp_path / "sft", network, NUMBERS))  # the critic is left out unless asked for
    same_actions(loaded, published.with_numbers(network, **LIBERO_PI0))
    assert not hasattr(loaded, "value_head")
    trained = load(published.rlinf(tmp_path / "rl", network, NUMBERS, trained=True), value_head=True)
    torch.testing.assert_close(trained.value_head.mlp[0].weight, network.value_head.mlp[0].weight)
    same_actions(trained, published.with_numbers(network, **LIBERO_PI0))


def test_rlinf_twin_pads_before_it_normalises(tmp_path):
    wide = published.statistics(32, 32)
    folder = published.rlinf(tmp_path / "ckpt", published.network(pi05=True, horizon=8, execute=4), wide, "physical-intelligence/pick_and_place_real")
    loaded = load(folder)
    assert loaded.interface == robots.TWIN and (loaded.horizon, loaded.execute, loaded.config.pad_first) == (8, 4, True)
    state = loaded.prepare(published.observation(state=7))["state"]
    shift, scale = wide.state.scale(True, 32, "cpu")
    torch.testing.assert_close(state[:, 7:].double(), (-shift / scale)[7:].expand(2, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_lerobot_folders(tmp_path, prefix):
    network = published.network(pi05=True)
    loaded = load(published.lerobot(tmp_path / "ckpt", network, NUMBERS, prefix))
    assert loaded.config.state_in_prompt and loaded.config.resize == "lerobot" and loaded.config.relative == ()
    same_actions(loaded, published.with_numbers(network, statistics=NUMBERS, quantile=True, execute=10, state_in_prompt=True, resize="lerobot"))


def test_lerobot_base_ships_no_statistics(tmp_path):
    network = published.network()
    folder = published.lerobot(tmp_path / "pi0_base", network, None)
    with pytest.raises(CheckpointError, match="robot="):
        load(folder)
    with pytest.raises(CheckpointError, match="statistics='identity'"):
        load(folder, robot="libero")
    base = load(folder, robot="robotwin", statistics="identity")
    assert base.act(published.observation(state=14, wrists=2)).shape == (2, 50, 14)
    NUMBERS.write(tmp_path / "numbers.json")
    same_actions(
        load(folder, robot="libero", statistics=tmp_path / "numbers.json"), published.with_numbers(network, statistics=NUMBERS, execute=50, resize="lerobot")
    )


def test_dexbotic_folder(tmp_path):
    network = published.network()
    loaded = load(published.dexbotic(tmp_path / "libero-db-pi0", network, NUMBERS))
    assert isinstance(loaded, DexboticPolicy) and loaded.config.pad_first and loaded.config.resize == "dexbotic"
    assert 6 not in loaded.config.relative and len(loaded.config.relative) == 31
    mine = {name: getattr(network.config, name) for name in ("vlm", "expert", "vision", "vocab_size")}
    wide = normalize.Statistics.read(tmp_path / "libero-db-pi0" / "norm_stats.json")
    expected = DexboticPolicy(DexboticConfig(**mine, statistics=wide), network.tokenizer).eval()
    expected.load_state_dict({name: tensor.to(torch.bfloat16).float() for name, tensor in network.state_dict().items()})
    same_actions(loaded, expected)


def test_embedding_under_both_names(tmp_path):
    network = published.network()
    folder = published.openpi(tmp_path / "ckpt", network, NUMBERS)
    state = load_file(folder / "model.safetensors")
    embedding = state["paligemma_with_expert.paligemma.lm_head.weight"]
    state["paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"] = embedding.clone()
    save_file(state, folder / "model.safetensors")
    same_actions(load(folder), published.with_numbers(network, **LIBERO_PI0))
    del state["paligemma_with_expert.paligemma.lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    same_actions(load(folder), published.with_numbers(network, **LIBERO_PI0))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def folder(tmp_path):
    return published.openpi(tmp_path / "ckpt", published.network(), NUMBERS)


def edited(folder, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_a_missing_tensor_is_refused(folder):
    edited(folder, lambda state: state.pop("action_out_proj.bias"))
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint: action_out_proj\.bias"):
        load(folder)


def test_an_extra_tensor_is_refused(folder):
    edited(folder, lambda state: state.update(surprise=torch.zeros(1)))
    with pytest.raises(CheckpointError, match="unexpected in the checkpoint: surprise"):
        load(folder)


def test_a_wrong_shape_is_refused(folder):
    edited(folder, lambda state: state.update({"state_proj.weight": torch.zeros(24, 31)}))
    with pytest.raises(CheckpointError, match=r"state_proj.weight \[24, 31\] for \[24, 32\]"):
        load(folder)


def test_missing_statistics_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"norm_stats\.json"):
        load(published.openpi(tmp_path / "ckpt", published.network(), None), robot="libero")


def test_statistics_of_another_kind_or_width_are_refused(tmp_path):
    folder = published.openpi(tmp_path / "a", published.network(pi05=True), normalize.Statistics(*(normalize.Moments((0.0,) * n, (1.0,) * n) for n in (8, 7))))
    with pytest.raises(CheckpointError, match="q01 and q99"):
        load(folder)
    with pytest.raises(CheckpointError, match="the robot has 14"):
        load(published.openpi(tmp_path / "b", published.network(), NUMBERS), robot="robotwin")


def test_two_statistics_need_a_choice(folder):
    (folder / "assets/other").mkdir()
    NUMBERS.write(folder / "assets/other/norm_stats.json")
    with pytest.raises(CheckpointError, match="several statistics"):
        load(folder)
    load(folder, statistics=folder / "assets/other/norm_stats.json", robot="libero")


def test_a_pickle_is_refused_without_running_it(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    folder = published.rlinf(tmp_path / "ckpt", published.network(), NUMBERS, trained=True)
    torch.save({"paligemma_with_expert.x": Bomb()}, folder / "actor/model_state_dict/full_weights.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        load(folder)
    assert not (tmp_path / "exploded").exists()


def test_a_missing_tokenizer_says_where_to_get_it(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="hf download google/paligemma-3b-pt-224"):
        load(folder)


def test_a_tokenizer_json_loads_and_travels(folder, tmp_path):
    (folder / "tokenizer.json").write_bytes(as_json((folder / "tokenizer.model").read_bytes()))
    expected = load(folder).tokenizer.prompt("open the drawer")
    (folder / "tokenizer.model").unlink()
    policy = load(folder)
    policy.save_pretrained(tmp_path / "own")
    again = vlahub.Policy.from_pretrained(tmp_path / "own")
    assert again.tokenizer.file == "tokenizer.json" and expected == policy.tokenizer.prompt("open the drawer") == again.tokenizer.prompt("open the drawer")


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    folder = published.openpi(tmp_path / "ckpt", published.network(vocab_size=100), NUMBERS)
    with pytest.raises(CheckpointError, match="embeds only 100"):
        load(folder)


def test_unknown_options_are_named(folder):
    with pytest.raises(TypeError, match="did you mean 'noise_level'"):
        load(folder, noise_levle=1.0)


def test_half_a_download_is_refused(tmp_path):
    folder = published.dexbotic(tmp_path / "libero", published.network(), NUMBERS)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards are missing"):
        load(folder)


def test_dexbotic_refuses_other_preparations(tmp_path):
    folder = published.dexbotic(tmp_path / "libero", published.network(), NUMBERS)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "image_aspect_ratio": "anyres"}))
    with pytest.raises(CheckpointError, match="image_aspect_ratio"):
        load(folder)
