"""The memory estimate: what it counts, and what it says when a batch does not fit."""

import pytest
import torch

from tests.envs.evac_tiny import CONFIG, tiny
from vlahub_envs.evac import memory
from vlahub_envs.evac.environment import EvacVectorEnv
from vlahub_envs.evac.memory import Peak


def test_the_peak_is_what_lives_at_once():
    with torch.device("meta"), Peak() as peak:
        a = torch.empty(1000)
        for _ in range(5):
            b = a + 1  # noqa: F841  the one before is gone when the next is bound
    assert 2 * 4000 <= peak.most <= 3 * 4000 and peak.now == 2 * 4000


def needed(batch: int, dtype=torch.float32) -> int:
    return max(always + batch * each for always, each in memory.estimate(CONFIG, dtype))


def test_larger_batches_and_wider_numbers_take_more():
    assert max(memory.peaks(CONFIG, torch.float32, 40)) == pytest.approx(needed(40) / memory.MARGIN, rel=0.05)
    assert needed(40, torch.bfloat16) < 0.7 * needed(40)


def test_what_does_not_fit_is_refused_with_what_does(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: needed(20))
    assert "20 worlds at once" in memory.check(CONFIG, torch.float32, torch.device("cpu"), 20)
    with pytest.raises(MemoryError, match=r"at most 20 fit: give max_batch=20"):
        EvacVectorEnv(num_envs=22, model=tiny())
    EvacVectorEnv(num_envs=22, model=tiny(), max_batch=20)
    monkeypatch.setattr(memory, "free", lambda device: 0)
    with pytest.raises(MemoryError, match="not even one fits"):
        memory.check(CONFIG, torch.float32, torch.device("cpu"), 1)
    monkeypatch.setattr(memory, "free", lambda device: None)
    assert "free" not in memory.check(CONFIG, torch.float32, torch.device("cpu"), 1)
