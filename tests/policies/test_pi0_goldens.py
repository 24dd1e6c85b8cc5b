"""Outputs of openpi, RLinf and Dexbotic at tiny sizes; benchmarks/parity.py runs the same on any folder."""

from pathlib import Path

import pytest

from benchmarks.goldens import pi0 as goldens
from benchmarks.parity import Golden

FOLDER = Path(__file__).parent.parent / "goldens"
FILES = sorted(file for family in ("pi0", "pi05", "dexbotic_pi0") for file in (FOLDER / family).glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_equal_to_the_original(file):
    golden = Golden(file)
    checks = list(goldens.place(golden)(golden))
    assert len(checks) >= 10
    failed = [(check.tensor, *check.verdict(), check.tolerance()) for check in checks if not check.verdict()[0]]
    assert not failed
