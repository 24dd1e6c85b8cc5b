"""Start baselines as forks of one process that has imported torch already: an import costs five seconds of every run, a fork milliseconds.

python -m tests.baselines.forks     # reads a job a line, [words of the command line, file of stdout, file of stderr, ranks]; answers with pid, then exit status

With several ranks a job is as many forks that find the variables of torchrun in their environment.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback


def child(words: list[str], out: str, err: str, ranks: int) -> int:
    """One run of tests/baselines/launch.py, as a process of its own sees it."""
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY | os.O_CREAT), (2, err, os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(path, flags), number)
    return run(words) if ranks == 1 else team(words, ranks)


def team(words: list[str], ranks: int) -> int:
    """The run on several ranks; the first that fails ends the others."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pids = []
    for rank in range(ranks):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ.update({name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()})
            leave(run(words))
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if status:
            for other in pids:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


def run(words: list[str]) -> int:
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


def leave(status: int) -> None:
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    for module in ("torch._dynamo", "torch.utils.tensorboard", "baselines.rl_co", "tests.mlp"):  # the first optimizer imports torch._dynamo
        importlib.import_module(module)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.setsid()  # one group to end, ranks included
            leave(child(*json.loads(line)))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
