"""Baselines as users start them: in processes of their own."""

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = {**os.environ, "PYTHONPATH": "."}  # Python adds only the script's own folder to its path


def launch(baseline: str, *torchrun: str, ranks: int = 1, **options) -> subprocess.CompletedProcess:
    """Run a baseline with the test world and policies registered. With words for torchrun, under it; else as forks (tests/baselines/forks.py)."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    if not torchrun:
        return fork([baseline, *words], ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *torchrun, "tests/baselines/launch.py", baseline, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=HERE)


@functools.cache
def forks() -> subprocess.Popen:
    """The process that forks; it ends with its standard input. Unbuffered, so that `select` sees every line that was not read yet."""
    return subprocess.Popen([sys.executable, "-m", "tests.baselines.forks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=HERE)


def fork(words: list[str], ranks: int = 1, seconds: float = 300) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in ("out", "err")]
        forks().stdin.write(json.dumps([words, *files, ranks]).encode() + b"\n")
        pid = int(forks().stdout.readline())
        late = not select.select([forks().stdout], [], [], seconds)[0]
        if late:
            os.killpg(pid, signal.SIGKILL)
        status = int(forks().stdout.readline())
        out, err = (Path(file).read_text() for file in files)
        if late:
            raise subprocess.TimeoutExpired(words, seconds, out, err)
        return subprocess.CompletedProcess(words, status, out, err)


def curves(folder, *names: str) -> list[dict[str, float]]:
    """The metrics that a run logged, one dict per logged step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [{name: events.Scalars(name)[i].value for name in names} for i in range(len(events.Scalars(names[0])))]
