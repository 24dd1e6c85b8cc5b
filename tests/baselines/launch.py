"""Run a baseline with the test world and the test policy registered: python tests/baselines/launch.py ppo --env-id test/Point ..."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tests.conftest  # noqa: F401  registers them
from vlahub.run import arguments

if __name__ == "__main__":
    baseline = importlib.import_module(f"baselines.{sys.argv[1]}")
    baseline.main(arguments(baseline.Args, baseline.__doc__, sys.argv[2:]))
