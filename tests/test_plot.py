import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.test_cli import call
from vlahub.plot import choose, labels, plot, read
from vlahub.tracking import Tracker


def a_run(folder, scale=1.0, steps=30, **more):
    tracker = Tracker(folder, console=False)
    for step in range(steps):
        tracker.log(step * 100, {"env/success_rate": scale * step / steps, "train/actor/policy_loss": scale, "time/rollout": 1.0, **more})
    tracker.close()
    return folder


def test_curves_are_read_back_and_a_resumed_step_counts_once(tmp_path):
    a_run(tmp_path / "a")
    tracker = Tracker(tmp_path / "a", console=False)  # the run goes on from step 2800
    tracker.log(2900, {"env/success_rate": 0.25})
    tracker.close()
    curve = read(tmp_path / "a")["env/success_rate"]
    assert [step for step, _ in curve] == [100 * i for i in range(30)] and curve[-1][1] == 0.25 and curve[3][1] == pytest.approx(0.1)


def test_several_runs_are_drawn_over_each_other(tmp_path):
    runs = [a_run(tmp_path / "x/a"), a_run(tmp_path / "y/a", 0.5, **{"env/return": 2.0}), a_run(tmp_path / "b", 0.2, steps=1)]
    assert labels(runs) == ["x/a", "y/a", "b"]
    assert call("plot", *map(str, runs), "--out", str(tmp_path / "new/curves.png")) == 0
    picture = np.asarray(Image.open(tmp_path / "new/curves.png").convert("RGB")).astype(int)
    assert picture.shape[1] > 1000, "three panels side by side: success, return and policy loss"
    for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # matplotlib's first three
        assert (np.abs(picture - colour).sum(-1) < 30).sum() > 20


def test_a_long_legend_stays_within_the_picture(tmp_path):
    runs = [a_run(tmp_path / f"a-run-with-a-long-name-{i}", steps=2) for i in range(5)]
    picture = np.asarray(Image.open(plot(runs, tmp_path / "c.png", ["env/success_rate"])).convert("L"))
    assert (picture[:, [0, 1, -2, -1]] == 255).all() and (picture[:80] < 128).any()


def test_metrics_are_chosen_by_pattern_and_suggested(tmp_path, capsys):
    run = a_run(tmp_path / "a")
    curves = [read(run)]
    assert choose(curves, ["time/*", "env/success_rate"]) == ["time/rollout", "env/success_rate"]
    assert choose(curves, []) == ["env/success_rate", "train/actor/policy_loss"]
    assert call("plot", str(run), "--metrics", "env/succes_rate", "--out", str(tmp_path / "c.png")) == 2
    assert "did you mean 'env/success_rate'" in capsys.readouterr().err
    assert not (tmp_path / "c.png").exists()


def test_mistakes_are_named(tmp_path):
    a_run(tmp_path / "runs/a")
    with pytest.raises(FileNotFoundError, match=r"runs is no folder of a run: .*name the runs in it \(a\)"):
        plot([tmp_path / "runs"])
    with pytest.raises(FileNotFoundError, match="nothing is no folder"):
        plot([tmp_path / "nothing"])
    with pytest.raises(ValueError, match=r"must end in .png"):
        plot([tmp_path / "runs/a"], tmp_path / "curves.jpg")
    with pytest.raises(ValueError, match="no run given"):
        plot([])


def test_import_brings_neither_matplotlib_nor_torch():
    code = "import sys, vlahub.plot; print([name for name in ('matplotlib', 'torch', 'tensorboard') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240).stdout.strip() == "[]"
