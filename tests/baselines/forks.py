"""Start baselines as forks of one process that has imported torch already: an import costs five seconds of every run, a fork milliseconds.

python -m tests.baselines.forks     # reads a job a line, [words of the command line, file of stdout, file of stderr]; answers with pid, then exit status
"""

import atexit
import importlib
import json
import os
import runpy
import sys
import traceback


def child(words: list[str], out: str, err: str) -> int:
    """One run of tests/baselines/launch.py, as a process of its own sees it."""
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY | os.O_CREAT), (2, err, os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(path, flags), number)
    sys.argv = ["tests/baselines/launch.py", *words]
    try:
        runpy.run_path("tests/baselines/launch.py", run_name="__main__")
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def main() -> None:
    for module in ("torch._dynamo", "torch.utils.tensorboard", "baselines.rl_co", "tests.mlp"):  # the first optimizer imports torch._dynamo
        importlib.import_module(module)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = child(*json.loads(line))
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
