import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vlahub import catalog
from vlahub.catalog import FamilyCard, PolicyCard, UnknownId, WeightsCard
from vlahub.hub import CheckpointError, Weights, family_of, load_tensors, read_json, read_pt, resolve, safetensors_files


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.head = nn.Linear(2, 1)


def meta_net():
    with torch.device("meta"):
        return Net()


@pytest.fixture
def known(monkeypatch, tmp_path):
    """Two known checkpoints, one bundled, and two families that recognise folders by a file."""
    monkeypatch.setattr(
        catalog,
        "POLICIES",
        {
            "lab/pi0-libero": PolicyCard(id="lab/pi0-libero", family="a", summary=""),
            "vlahub/a-tiny-point": PolicyCard(id="vlahub/a-tiny-point", family="a", summary="", folder="tests:."),
        },
    )
    monkeypatch.setattr(
        catalog, "WEIGHTS", {"vlahub/quite-another-dreamt-of-world": WeightsCard(id="vlahub/quite-another-dreamt-of-world", summary="", folder="tests:envs")}
    )
    families = {name: FamilyCard(name=name, policy="", summary="", recognises=lambda folder, name=name: (folder / f"{name}.yaml").exists()) for name in "ab"}
    monkeypatch.setattr(catalog, "FAMILIES", families)


# ------------------------------------------------------------------------------------------------ id -> folder


def test_folders_and_bundled_ids_resolve(known, tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path and resolve(str(tmp_path)) == tmp_path
    assert (resolve("vlahub/a-tiny-point") / "test_hub.py").exists() and (resolve("vlahub/quite-another-dreamt-of-world") / "evac_tiny.py").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert resolve("~/mine") == tmp_path / "mine"


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/folder", "~/no/such", "folder", "a/b/c"])
def test_a_mistyped_path_says_that_it_is_no_folder(known, path):
    with pytest.raises(FileNotFoundError, match="is no folder on this machine"):
        resolve(path)


def test_a_mistyped_bundled_id_suggests_the_nearest(known):
    for name, near in (("vlahub/a-tiny-pont", "vlahub/a-tiny-point"), ("vlahub/quite-another-dreamt-of-wrld", "vlahub/quite-another-dreamt-of-world")):
        with pytest.raises(UnknownId, match=rf"no bundled checkpoint is called '{name}'; did you mean '{near}'\?"):
            resolve(name)


def test_an_id_that_resembles_none_is_not_answered_with_all_of_them(known):
    with pytest.raises(UnknownId, match=r"'vlahub/qqqqqqqqq'; `vlahub list` shows the known ones"):
        resolve("vlahub/qqqqqqqqq")
    with pytest.raises(FileNotFoundError, match=r"no folder .*; `vlahub list` shows") as raised:
        resolve("qqqqqqqqq")
    assert len(str(raised.value)) < 200


def test_an_offline_miss_says_how_to_bring_the_files(known, tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        resolve("lab/pi0-libero", local_files_only=True, cache_dir=tmp_path)
    assert "not in the local cache" in str(raised.value) and "hf download lab/pi0-libero" in str(raised.value) and "did you mean" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match="did you mean 'lab/pi0-libero'"):
        resolve("lab/pi0-libro", local_files_only=True, cache_dir=tmp_path)


def test_a_cached_repository_is_found_without_a_network(known, tmp_path):
    snapshot = tmp_path / "models--lab--pi0-libero" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--lab--pi0-libero" / "refs").mkdir()
    (tmp_path / "models--lab--pi0-libero" / "refs" / "main").write_text("0" * 40)
    assert resolve("lab/pi0-libero", local_files_only=True, cache_dir=tmp_path) == snapshot


def test_families_are_recognised_or_the_contents_are_named(known, tmp_path):
    with pytest.raises(CheckpointError, match=r"no layout that a policy family knows \(a, b\). It contains: nothing"):
        family_of(tmp_path)
    (tmp_path / "a.yaml").touch()
    assert family_of(tmp_path) == "a"
    (tmp_path / "b.yaml").touch()
    with pytest.raises(CheckpointError, match=r"looks like a and like b; say which with from_pretrained\(..., family=...\)"):
        family_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vlahub_family": "b"}))
    assert family_of(tmp_path) == "b"
    (tmp_path / "config.json").write_text(json.dumps({"vlahub_family": "c"}))
    with pytest.raises(UnknownId, match="no policy family is called 'c'"):
        family_of(tmp_path)
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(CheckpointError, match="config.json is not valid JSON"):
        read_json(tmp_path / "config.json")


# ------------------------------------------------------------------------------------------------ files -> tensors


def test_weights_read_shapes_without_data_and_own_what_they_give(tmp_path):
    save_file({"a": torch.ones(2, 3)}, tmp_path / "one.safetensors")
    weights = Weights([tmp_path / "one.safetensors"])
    assert list(weights) == ["a"] and weights.shape("a") == (2, 3)
    weights["a"].add_(1)  # training in place must not write to the file
    assert torch.equal(Weights([tmp_path / "one.safetensors"])["a"], torch.ones(2, 3))
    save_file({"a": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="'a' stands in two files of this checkpoint, one of them two.safetensors"):
        Weights([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"cut.safetensors is not a readable safetensors file"):
        Weights([tmp_path / "cut.safetensors"])


def test_shards_are_those_that_the_index_names(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        safetensors_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    save_file({"z": torch.ones(1)}, tmp_path / "model-9.safetensors")  # left over from elsewhere
    with pytest.raises(CheckpointError, match=r"incomplete: 1 of 2 shards are missing \(model-2.safetensors\)"):
        safetensors_files(tmp_path)
    save_file({"b": torch.ones(1)}, tmp_path / "model-2.safetensors")
    assert sorted(Weights(safetensors_files(tmp_path))) == ["a", "b"]
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        safetensors_files(tmp_path)


class Trap:
    """Unpickling this creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"weight": torch.ones(2), "trap": Trap(str(tmp_path / "sprung"))}, tmp_path / "trap.pt")
    with pytest.raises(CheckpointError, match="unpickling it could run code"):
        read_pt(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"junk" * 50])
def test_damaged_pt_files_are_refused(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad.pt holds more than tensors and plain containers, or is damaged"):
        read_pt(tmp_path / "bad.pt")


@pytest.mark.parametrize("new_format", [True, False])
def test_plain_pt_files_load(tmp_path, new_format):
    torch.save({"state": {"a": torch.arange(3)}, "step": 7}, tmp_path / "plain.pt", _use_new_zipfile_serialization=new_format)
    record = read_pt(tmp_path / "plain.pt")
    assert record["step"] == 7 and record["state"]["a"].tolist() == [0, 1, 2]


# ------------------------------------------------------------------------------------------------ tensors -> module


def test_a_full_checkpoint_loads_into_a_module_on_the_meta_device():
    state = Net().state_dict()
    net = meta_net().to(torch.bfloat16)
    report = load_tensors(net, state)
    assert report.loaded == 4 and str(report) == "4 tensors loaded"
    assert net.body.weight.dtype == torch.bfloat16 and torch.equal(net.body.weight, state["body.weight"].bfloat16()) and net.body.weight.requires_grad


def test_missing_unexpected_and_mis_shaped_tensors_are_refused_by_name():
    state = Net().state_dict()
    del state["head.bias"]
    state["tail.weight"] = torch.ones(1)
    state["body.weight"] = torch.ones(2, 4)
    with pytest.raises(CheckpointError) as raised:
        load_tensors(meta_net(), state, source="lab/net")
    text = str(raised.value)
    assert "lab/net does not fit Net" in text
    assert "1 tensors missing from the checkpoint: head.bias" in text
    assert "1 tensors unexpected in the checkpoint: tail.weight" in text
    assert "1 tensors of another shape: body.weight [2, 4] for [2, 3]" in text


def test_a_refused_checkpoint_leaves_the_module_as_it_was():
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_tensors(net, {name: torch.zeros_like(tensor) for name, tensor in before.items() if name != "head.bias"})
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before)


def test_expected_differences_are_counted_not_refused():
    state = {f"model.{name}": tensor for name, tensor in Net().state_dict().items() if not name.startswith("head")}
    state["model.rotary.inv_freq"] = torch.ones(1)
    state["optimizer.step"] = torch.ones(1)
    net = Net()
    rename = lambda name: name.removeprefix("model.") if name.startswith("model.") else None  # noqa: E731
    report = load_tensors(net, state, rename=rename, may_miss=("head.*",), may_ignore=("*.inv_freq",))
    assert report.loaded == 2 and report.initialised == ["head.weight", "head.bias"] and report.ignored == ["model.rotary.inv_freq", "optimizer.step"]
    assert torch.equal(net.body.weight, state["model.body.weight"])
    with pytest.raises(CheckpointError, match=r"a second source of body.weight, beside body.weight"):
        load_tensors(Net(), {**Net().state_dict(), "model.body.weight": torch.ones(2, 3)}, rename=lambda name: name.removeprefix("model."))


def test_a_new_head_needs_values_of_its_own():
    state = Net().body.state_dict(prefix="body.")
    with pytest.raises(CheckpointError, match=r"2 tensors were left without values: head.weight, head.bias"):
        load_tensors(meta_net(), state, may_miss=("head.*",))


class TiedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("names", [("embedding.weight",), ("head.weight",), ("embedding.weight", "head.weight")])
def test_tied_parameters_stay_tied(names):
    with torch.device("meta"):
        net = TiedNet()
    tensor = torch.randn(5, 3)
    load_tensors(net, dict.fromkeys(names, tensor))
    assert net.head.weight is net.embedding.weight and torch.equal(net.head.weight, tensor)
    assert len(list(net.parameters())) == 1
