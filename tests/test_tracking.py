import importlib.util
import sys
import types
from pathlib import Path

import pytest

from vlahub.tracking import METRICS, Tracker, check_name, line, table


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, round(event.value, 6)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_scalars_reach_tensorboard_and_one_line_is_printed_per_iteration(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    tracker = Tracker(tmp_path / "run", {"lr": 0.1, "out": tmp_path})
    tracker.log(10, {"env/success_rate": 0.5, "time/rollout": 2})
    tracker.log(20, {"env/success_rate": 0.75})
    assert curves(tmp_path / "run") == {"env/success_rate": [(10, 0.5), (20, 0.75)], "time/rollout": [(10, 2.0)]}  # readable before close
    tracker.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("step 10") and "env/success_rate 0.5" in lines[0]


def test_other_ranks_write_nothing_but_still_check_names(tmp_path, capsys):
    tracker = Tracker(tmp_path / "run", rank=1)
    tracker.log(1, {"env/return": 1.0})
    with pytest.raises(ValueError, match="did you mean 'env/return'"):
        tracker.log(1, {"env/retrun": 1.0})
    tracker.close()
    assert not (tmp_path / "run").exists() and not capsys.readouterr().out


def test_names_and_values_are_checked(tmp_path):
    for name in METRICS:
        check_name(name.replace("*", "return"))
    with pytest.raises(ValueError, match="'eval/succes_rate'"):
        check_name("eval/succes_rate")
    tracker = Tracker(tmp_path)
    with pytest.raises(TypeError, match="'env/return' must be one number"):
        tracker.log(1, {"env/return": [1, 2]})
    tracker.close()


def test_the_documentation_has_this_table():
    assert (Path(__file__).parents[1] / "docs" / "metrics.md").read_text().endswith(table())


def test_a_diverged_run_is_written_and_said():
    assert "WARNING: actor/loss not finite" in line(1, {"actor/loss": float("nan"), "actor/lr": 1e-4}, 3700)
    assert "1:01:40" in line(1, {}, 3700)
    assert "WARNING" in line(1, {"train/loss_ratio": 2e5}, 0) and "WARNING" not in line(1, {"train/loss_ratio": 2e3}, 0)


def test_without_tensorboard_it_says_so_and_goes_on(tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else found(name, *rest))
    tracker = Tracker(tmp_path)
    tracker.log(1, {"env/return": 1.0})
    assert "pip install 'vlahub[train]'" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_wandb_is_used_on_request_only(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda scalars, step: calls.append((step, scalars)), finish=lambda: calls.append("finish"))
    module = types.ModuleType("wandb")
    module.init = lambda **settings: calls.append(settings) or run
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    Tracker(tmp_path / "quiet").close()
    assert not calls
    tracker = Tracker(tmp_path / "loud", {"lr": 0.1}, wandb=True, project="p")
    tracker.log(3, {"env/return": 1.0})
    tracker.close()
    assert calls[0]["project"] == "p" and calls[0]["name"] == "loud" and calls[0]["config"] == {"lr": 0.1}
    assert calls[1:] == [(3, {"env/return": 1.0}), "finish"]


def test_wandb_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest))
    with pytest.raises(ImportError, match="pip install wandb"):
        Tracker(tmp_path, wandb=True)
