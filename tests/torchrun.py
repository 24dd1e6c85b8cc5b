"""Run a piece of code on several gloo ranks, as torchrun does."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def torchrun(code: str, folder: Path, ranks: int = 2, seconds: float = 120) -> subprocess.CompletedProcess:
    """`code` finds the folder as `folder`. Returns the finished process with its output as text."""
    script = folder / "script.py"
    script.write_text(f"from pathlib import Path\nfolder = Path({str(folder)!r})\n" + textwrap.dedent(code))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=env)
