import json

import numpy as np
import pytest
import torch

from vlahub.hub import CheckpointError
from vlahub_policies.parts.normalize import Moments, RunningStatistics, Statistics, normalize, statistics_of, unnormalize


def moments() -> Moments:
    return Moments((1.0, -2.0), (0.5, 0.0), (0.0, -2.0), (2.0, -2.0))


@pytest.mark.parametrize("quantile", [False, True])
def test_there_and_back(quantile):
    x = torch.tensor([[1.0, -2.0], [1.3, -2.0]], dtype=torch.float64)
    scaled = normalize(x, moments(), quantile)
    torch.testing.assert_close(unnormalize(scaled, moments(), quantile), x)
    assert scaled[0, 0] == pytest.approx(0.0, abs=1e-5)


def test_formulas():
    assert normalize(torch.tensor([2.0, -2.0]), moments(), False)[0] == pytest.approx(1 / (0.5 + 1e-6))
    assert normalize(torch.tensor([2.0, -2.0]), moments(), True).tolist() == pytest.approx([2 / (2 + 1e-6) * 2 - 1, -1.0])  # a constant dimension becomes -1


def test_widths():
    wide = unnormalize(torch.ones(4), moments(), False)
    assert wide[2:].tolist() == [1.0, 1.0]  # beyond the statistics: passed through
    assert normalize(torch.ones(1), moments(), False).shape == (1,)  # wider statistics are cut


def test_missing_or_broken_statistics_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="q01 and q99"):
        normalize(torch.ones(1), Moments((0.0,), (1.0,)), True)
    with pytest.raises(CheckpointError, match="different widths"):
        Moments((0.0,), (1.0, 1.0))
    with pytest.raises(CheckpointError, match="not finite"):
        Moments((float("nan"),), (1.0,))
    file = tmp_path / "norm_stats.json"
    file.write_text(json.dumps({"norm_stats": {"default": {"min": [0], "max": [1]}}}))
    with pytest.raises(CheckpointError, match="no statistics of 'state'"):
        Statistics.read(file)
    file.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Statistics.read(file)


def test_files_of_openpi_and_dexbotic(tmp_path):
    numbers = Statistics(moments(), moments())
    numbers.write(tmp_path / "a.json")
    assert Statistics.read(tmp_path / "a.json") == numbers
    entry = {"min": [0.0, -2.0], "max": [2.0, -2.0], "mean": [1.0, -2.0], "std": [0.5, 0.0]}
    (tmp_path / "b.json").write_text(json.dumps({"default": {"min": -1, "max": 1}, "state": entry, "action": entry}))
    assert Statistics.read(tmp_path / "b.json") == numbers


def test_running_statistics_agree_with_numpy():
    data = np.random.default_rng(0).normal(size=(4000, 3)) * [1, 10, 0.1]
    found = statistics_of(list(data.reshape(8, 500, 3)), data).state
    np.testing.assert_allclose(found.mean, data.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.std, data.std(0), rtol=1e-9)
    spread = data.max(0) - data.min(0)
    for share, values in ((0.01, found.q01), (0.99, found.q99)):
        assert (np.abs(values - np.quantile(data, share, axis=0)) < 0.005 * spread).all()
    constant = RunningStatistics()
    constant.update(np.ones((5, 1)))
    assert constant.moments().q01[0] == pytest.approx(1.0) and constant.moments().std == (0.0,)
    with pytest.raises(ValueError, match="vectors of 2 numbers after vectors of 1"):
        constant.update(np.ones((5, 2)))
    with pytest.raises(ValueError, match="at least 2"):
        RunningStatistics().moments()
