"""Baselines as users start them: in processes of their own."""

import os
import subprocess
import sys

HERE = {**os.environ, "PYTHONPATH": "."}  # Python adds only the script's own folder to its path


def launch(baseline: str, *torchrun: str, **options) -> subprocess.CompletedProcess:
    """Run a baseline with the test world and policies registered. With words for torchrun, under it."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *torchrun] if torchrun else [sys.executable]
    return subprocess.run([*launcher, "tests/baselines/launch.py", baseline, *words], capture_output=True, text=True, timeout=300, env=HERE)


def curves(folder, *names: str) -> list[dict[str, float]]:
    """The metrics that a run logged, one dict per logged step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [{name: events.Scalars(name)[i].value for name in names} for i in range(len(events.Scalars(names[0])))]
