"""The choice of the form that runs, without a GPU: the policy says it lies on one, and graphs are stood in for."""

import copy
import pickle
import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vlahub_policies.parts import acceleration
from vlahub_policies.parts.acceleration import Accelerated, Acceleration, Quick, through


@dataclass(frozen=True)
class Config:
    acceleration: str = "compile"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.quick, self.layer = Quick(), nn.Linear(2, 2)

    def forward(self, x):
        return through(self.quick, False, self.layer, x)


def forms(policy, mode):
    return {nn.Linear: negated} if mode == "compile" else {}


def negated(layer, x):
    return -layer(x)


def pack(policy):
    policy.packs += 1


class Policy(Accelerated):
    def __init__(self, on="cuda"):
        super().__init__()
        self.config, self.on, self.packs, self.model = Config(), on, 0, Model()
        self.fast = Acceleration(self, self.work, pack, forms)

    def parameters(self, recurse=True):
        return iter([SimpleNamespace(device=SimpleNamespace(type=self.on))])

    def work(self, inputs):
        return {"y": self.model(inputs["x"])}


class Graph:
    """Stands in for a CUDA graph."""

    broken: tuple = ()

    def __init__(self, function):
        self.function = function

    def __call__(self, inputs):
        out = self.function(inputs)
        if self.function.__self__.fast._mode in self.broken:
            raise ValueError("no such kernel\nand much more")
        return out


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    monkeypatch.setattr(acceleration, "Captured", Graph)
    with torch.no_grad():
        yield


def run(policy):
    x = torch.ones(1, 2)
    return torch.sign(policy.fast({"x": x})["y"] / policy.model.layer(x)).mean().item()  # -1: the quick form


def test_layers_run_in_their_quick_form_on_a_gpu_and_without_gradients_only():
    policy = Policy()
    assert run(policy) == -1 and run(policy) == -1 and policy.packs == 1
    with torch.enable_grad():
        assert policy.model(torch.ones(1, 2)).requires_grad and run(policy) == 1
    assert run(Policy("cpu")) == 1


def test_what_fails_falls_back_with_a_word(monkeypatch):
    monkeypatch.setattr(Graph, "broken", ("compile",))
    policy = Policy()
    with pytest.warns(RuntimeWarning, match="acceleration='compile' failed, continuing with 'graph': no such kernel$"):
        assert run(policy) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(policy) == 1  # once is enough
    monkeypatch.setattr(Graph, "broken", ("compile", "graph"))
    policy.config = replace(policy.config)  # another config starts anew
    with pytest.warns(RuntimeWarning) as told:
        assert run(policy) == 1
    assert [str(warning.message).split(" failed")[0] for warning in told] == ["acceleration='compile'", "acceleration='graph'"]


def test_it_starts_over_when_parameters_move_or_are_replaced():
    policy = Policy()
    for change in (lambda: policy.double().float(), lambda: policy.load_state_dict(policy.state_dict(), assign=True)):
        run(policy)
        change()
        assert policy.fast._captured is None and policy.model.quick == {}


def test_copies_have_graphs_of_their_own():
    policy = Policy()
    run(policy)
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert twin.fast.policy is twin and twin.fast._captured is None and twin.model.quick == {}
        assert run(twin) == -1
    assert policy.fast._captured is not None
