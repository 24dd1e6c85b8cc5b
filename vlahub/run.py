"""The plumbing that every baseline shares and none should repeat: the run's folder, its arguments, resuming, learning rates, skipped steps, evaluation, logs.

The algorithm is not here: the files in baselines/ hold it from top to bottom. A baseline's arguments are a dataclass with (at least) the fields of `Shared`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import tyro

from vlahub import catalog, checkpoint, distributed, video
from vlahub.catalog import key_values
from vlahub.distributed import Ranks, print0
from vlahub.evaluation import evaluate
from vlahub.interface import Interface
from vlahub.policy import Policy
from vlahub.remote import RemoteCollector, RemoteEnv, RolloutRanks, serve_env, serve_rollouts
from vlahub.rollout import Collector, Film, Rollout, SeedStream
from vlahub.tracking import Tracker
from vlahub.vector import VectorEnv, make

EVAL_SEED = 1_000_003  # of evaluation episodes; the episodes of training draw theirs another way (vlahub.rollout.SeedStream)
# What may change when a run is resumed; anything else would silently make it another run.
MAY_CHANGE = {
    "resume", "total_iterations", "eval_every", "eval_episodes", "video_every", "keep", "track", "workers", "out", "name", "device", "shard",
    "gradient_checkpointing", "offload", "env_ranks", "policy_ranks", "rollout_ranks",
}  # fmt: skip

Args = TypeVar("Args")


class Shared(Protocol):
    """Arguments that `Run` reads."""

    env_id: str
    env_options: tuple[str, ...]
    policy: str
    policy_options: tuple[str, ...]
    out: str
    name: str
    resume: str
    seed: int
    bf16: bool
    shard: bool
    gradient_checkpointing: bool
    track: bool
    workers: int
    max_steps: int
    learning_rate: float
    weight_decay: float
    eval_every: int
    eval_episodes: int
    total_iterations: int
    keep: int
    max_skipped: int


def arguments(kind: type[Args], description: str | None, argv: Sequence[str] | None = None) -> Args:
    """Parse the command line. With --resume FOLDER the run's own arguments are the defaults, and those that would make it another run may not differ."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parsed = tyro.cli(kind, description=description, args=argv)
    if not parsed.resume:
        return _known(parsed)
    file = Path(parsed.resume) / "args.json"
    if not file.exists():
        raise SystemExit(f"--resume {parsed.resume}: this folder holds no run (there is no {file.name}); give the folder that a run printed at its start")
    saved = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(file.read_text()).items()})
    parsed = tyro.cli(kind, description=description, args=argv, default=saved)
    differ = [f.name for f in dataclasses.fields(kind) if f.name not in MAY_CHANGE and getattr(parsed, f.name) != getattr(saved, f.name)]
    if differ:
        words = ", ".join(f"{name} was {getattr(saved, name)!r}, now {getattr(parsed, name)!r}" for name in differ)
        raise SystemExit(f"--resume {parsed.resume}: a resumed run keeps its arguments, but {words}. Start a new run instead")
    return _known(parsed)


def _known(args: Any) -> Any:
    """The arguments, if the names of environment and policy lead somewhere: a mistyped one is a message at once, not a traceback after minutes."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `--env-id module:id` names a module beside the user, where Python does not look for a script's imports
    if not hasattr(args, "policy"):  # a world model's trainer has neither
        return args
    family, _, name = args.policy.partition(":")
    try:
        if args.env_id:
            catalog.env_card(args.env_id)
        if family == "tiny":
            catalog.family_card(name)
        elif "/" not in args.policy and not Path(args.policy).is_dir():
            raise catalog.UnknownId(
                f"--policy {args.policy}: no such folder; ids read user/name, and tiny:FAMILY ({', '.join(catalog.FAMILIES)}) is a fresh small one"
            )
    except (catalog.UnknownId, ModuleNotFoundError) as error:
        raise SystemExit(str(error)) from error
    return args


def divides(whole: int, part: int, whole_name: str, part_name: str) -> None:
    """An error with the nearest numbers that do, if `part` does not divide `whole`."""
    if part < 1 or whole % part:
        nearest = sorted((n for n in range(1, whole + 1) if whole % n == 0), key=lambda n: abs(n - part))[:3]
        raise ValueError(f"{part_name} ({part}) does not divide {whole_name} ({whole}); nearest that do: {', '.join(map(str, sorted(nearest)))}")


def memory_advice(error: BaseException, args: Any) -> str:
    """What to change if the error means too little memory, else nothing."""
    words = str(error).lower()
    if not (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or (isinstance(error, RuntimeError) and ("out of memory" in words or "allocate memory" in words))
    ):
        return ""
    knobs = []
    if hasattr(args, "micro_batch_size"):
        knobs.append(f"a smaller --micro-batch-size (it is {args.micro_batch_size}; the batch and the result stay the same)")
    offers = ("bf16", ""), ("gradient_checkpointing", ", where the policy's family offers it"), ("offload", ""), ("shard", " on several GPUs")
    for name, what in offers:
        if not getattr(args, name, True):
            knobs.append(f"--{name.replace('_', '-')}{what}")
    for name, value in vars(args).items():
        if name in ("num_envs", "num_groups", "rollout_rounds", "num_chunks", "batch_size") and value > 1:
            knobs.append(f"a smaller --{name.replace('_', '-')} (it is {value})")
    return others_on_gpu(error) + "the run is out of memory. In this order, try " + "; ".join(knobs)


def others_on_gpu(error: BaseException) -> str:
    """Whose the GPU's memory is, if most of it is not this process's: none of the knobs of a training frees what simulators take for their pictures."""
    if not isinstance(error, torch.OutOfMemoryError) or not torch.cuda.is_available():
        return ""
    (free, total), own = torch.cuda.mem_get_info(), torch.cuda.memory_reserved()
    others = total - free - own
    if others < total / 2:
        return ""
    return (
        f"{others / 2**30:.0f} of this GPU's {total / 2**30:.0f} GB are not this training's ({own / 2**30:.0f} GB are): simulators that draw on it hold memory "
        "for each environment and task (nvidia-smi counts it, and lists no process for it), and so do other programs. Fewer environments, or another GPU to "
        "draw on (MUJOCO_EGL_DEVICE_ID for LIBERO), come first. Otherwise: "
    )


@contextlib.contextmanager
def advice(args: Any) -> Iterator[None]:
    """Add what to change to an error that means too little memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if words := memory_advice(error, args):
            error.add_note(words)
        raise


def make_env(args: Shared, count: int, ranks: int) -> VectorEnv:
    """Environments in two halves that alternate where there are processes for both. `ranks` share the cores of this machine."""
    options = key_values("env-options", args.env_options)
    options |= {"max_steps": args.max_steps} if args.max_steps else {}
    card = catalog.env_card(args.env_id)
    batched = card.vector != catalog.EnvCard.vector  # on this rank's device: no processes, no halves
    if batched or (card.cheap and not args.workers):
        return make(args.env_id, num_envs=count, **options)
    workers = min(count, args.workers or max(2, (os.cpu_count() or 1) // ranks))
    return make(args.env_id, num_envs=count, slots=min(2, workers), workers=workers, **options)


def serve(args: Any, num_envs: int, ranks: Ranks, **policy_options: Any) -> None:
    """Life of a rank that does not train: it simulates, or infers, its share of all environments until those that it does so for are done."""
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a scheduler's wish to stop is for the policy ranks, which still need the others to save and leave
        signal.signal(number, signal.SIG_IGN)
    members = distributed.parse_ranks(args.env_ranks if ranks.role == "env" else args.rollout_ranks, dist.get_world_size())
    divides(num_envs, len(members), "the number of environments", f"the number of {ranks.role} ranks")
    count, here = num_envs // len(members), min(len(members), int(os.environ["LOCAL_WORLD_SIZE"]))

    def collector() -> Collector:
        env = RemoteEnv(ranks.env_ranks) if ranks.env_ranks else make_env(args, count, here)
        policy = load_policy(args, env.interface, **policy_options).to(ranks.device).eval()
        return Collector(env, policy, SeedStream(args.seed, distributed.share(num_envs, members.index(dist.get_rank()), len(members))), args.execute or None)

    if ranks.role == "env":
        serve_env(lambda: make_env(args, count, here), ranks.serves[0])
    else:
        with advice(args), autocast(args, ranks.device):
            serve_rollouts(collector, ranks.serves)
    distributed.cleanup()


def load_policy(args: Shared, interface: Interface, **options: Any) -> Policy:
    """The policy that a run starts from, with float32 weights: "tiny:FAMILY" with fresh weights, anything else by from_pretrained."""
    distributed.seed_everything(args.seed)  # fresh weights and heads are the same on every rank
    options = {**options, **key_values("policy-options", args.policy_options)}
    if args.gradient_checkpointing:
        options["gradient_checkpointing"] = True
    family, _, name = args.policy.partition(":")
    try:
        if family == "tiny":
            policy = catalog.load(catalog.family_card(name).policy).tiny(interface, **options)
        else:
            policy = Policy.from_pretrained(args.policy, dtype=torch.float32, **options)
    except TypeError as error:
        if args.gradient_checkpointing and "gradient_checkpointing" in str(error):
            raise ValueError(f"the family of {args.policy} does not offer gradient checkpointing: leave --gradient-checkpointing off") from error
        raise
    only = tuple(getattr(args, "train_only", ()))
    names = [name for name, _ in policy.named_parameters()]
    for start in only:
        if not any(name.startswith(start) for name in names):
            parts = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
            raise ValueError(f"train_only: no parameter of {args.policy} begins with {start!r}; they begin with {parts}")
    for name, parameter in policy.named_parameters() if only else ():
        parameter.requires_grad_(parameter.requires_grad and name.startswith(only))
    return policy


def autocast(args: Shared, device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if args.bf16 else contextlib.nullcontext()


def _move_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    for state in optimizer.state.values():
        state.update({name: value.to(device) for name, value in state.items() if isinstance(value, torch.Tensor)})


class Run:
    """One training run: its folder, clocks, tracker and checkpoints. A collective object: every rank makes one."""

    def __init__(self, algorithm: str, args: Shared, ranks: Ranks):
        self.args, self.ranks = args, ranks
        policy = Path(args.policy).name.replace(":", "-")
        name = args.name or f"{algorithm}-{args.env_id.split('/')[-1]}-{policy}-{args.seed}-{time.strftime('%m%d-%H%M%S')}"
        self.folder = Path(args.resume) if args.resume else Path(distributed.on_rank0(lambda: str(Path(args.out) / name)))
        if not args.resume and checkpoint.latest(self.folder / "checkpoints"):
            raise SystemExit(f"{self.folder} holds a run already: go on with it by --resume {self.folder}, or choose another --name")
        settings = dataclasses.asdict(args)  # type: ignore[call-overload]
        if ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "args.json").write_text(json.dumps(settings, indent=2) + "\n")
        self.tracker = Tracker(self.folder, settings, wandb=args.track, rank=ranks.rank)
        print0(f"run {self.folder} on {ranks.world} rank{'s' if ranks.world > 1 else ''} ({ranks.device.type})")
        if (args.eval_every or getattr(args, "video_every", 0)) and not video.available():
            print0(f"WARNING: {video.NO_VIDEOS}")
        self.seconds: dict[str, float] = {}
        self.skipped = self.skipped_in_a_row = 0
        self.started, self.steps_at_start = time.perf_counter(), 0
        self.stop_signal = ""
        self.rollout_ranks: RolloutRanks | None = None
        self.early: distributed.EarlyGradients | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):  # what schedulers send before they end a job
            with contextlib.suppress(ValueError):  # not in the main thread (a notebook, a test)
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        self.stop_signal = signal.Signals(number).name

    def stopping(self) -> bool:
        """Whether any rank was asked to stop; the caller then saves and leaves."""
        return distributed.any_rank(bool(self.stop_signal))

    # ------------------------------------------------------------------------------------------------ parts of a run

    def make_env(self, count: int) -> VectorEnv | RemoteEnv | RolloutRanks:
        """This rank's environments, wherever they live."""
        if self.ranks.rollout_ranks:
            self.rollout_ranks = RolloutRanks(self.ranks.rollout_ranks)
            return self.rollout_ranks
        if self.ranks.env_ranks:
            return RemoteEnv(self.ranks.env_ranks)
        return make_env(self.args, count, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def collector(self, env: Any, policy: Policy, seeds: SeedStream) -> Collector | RemoteCollector:
        """What runs the policy in these environments, on this rank or through its rollout ranks."""
        return RemoteCollector(env, policy, seeds) if self.rollout_ranks else Collector(env, policy, seeds, self.args.execute or None)

    def load_policy(self, interface: Interface, **options: Any) -> Policy:
        policy = load_policy(self.args, interface, **options)
        return policy if self.shards else policy.to(self.ranks.device)  # sharding moves one block at a time: the whole may not fit

    @property
    def shards(self) -> bool:
        return self.args.shard and self.ranks.world > 1

    def shard(self, *policies: Policy | None) -> None:
        """With --shard: spread weights, gradients and optimizer state of each policy over the ranks. Make copies before, the optimizer after."""
        if self.shards and getattr(self.args, "offload", False):
            raise ValueError("--offload keeps the optimizer's state of a whole policy on the CPU; with --shard it is spread over the ranks already: choose one")
        if self.args.shard and not self.shards:
            print0("--shard: one rank holds everything; start with torchrun on several")
        for policy in policies if self.shards else ():
            if policy is not None:
                blocks = policy.blocks()
                distributed.shard(policy, blocks, distributed.mesh(self.ranks))
                print0(f"sharded over {self.ranks.world} ranks, gathered in {len(blocks) + 1} parts")

    @contextlib.contextmanager
    def acting(self, policy: Policy) -> Iterator[None]:
        """Around rollouts and evaluations: the policy does not train, every rank holds all of its weights, and rollout ranks have been given them."""
        training = policy.training
        policy.eval()
        with self.autocast(), distributed.whole(policy):
            if self.rollout_ranks:
                with self.timed("weights"):
                    self.rollout_ranks.give_weights(policy)
            yield
        policy.train(training)

    def optimizer(self, policy: Policy, rates: Mapping[str, float] | None = None) -> torch.optim.AdamW:
        """AdamW over what trains; parameters whose name begins with a key of `rates` get that learning rate."""
        rates = rates or {}
        groups: dict[str, list[torch.nn.Parameter]] = {name: [] for name in ("", *rates)}
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                groups[next((key for key in rates if name.startswith(key)), "")].append(parameter)
        if self.ranks.world > 1 and not distributed.is_sharded(policy):
            self.early = distributed.EarlyGradients(policy)
        trained = sum(parameter.numel() for members in groups.values() for parameter in members)
        print0(f"training {trained:,} of {sum(p.numel() for p in policy.parameters()):,} parameters")
        return torch.optim.AdamW(
            [{"params": members, "lr": rates.get(name, self.args.learning_rate), "full_lr": rates.get(name, self.args.learning_rate)} for name, members in groups.items() if members],
            weight_decay=self.args.weight_decay,
            fused=True,  # one kernel for all parameters
        )  # fmt: skip

    def set_learning_rates(self, optimizer: torch.optim.Optimizer, fraction: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * fraction

    def autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.args, self.ranks.device)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - before

    @contextlib.contextmanager
    def updating(self, optimizer: torch.optim.Optimizer, env: VectorEnv | RemoteEnv | RolloutRanks) -> Iterator[None]:
        """Around an update. With --offload the environment's model and the optimizer's state take turns on the GPU: outside updates the latter lies on the CPU."""
        if not self.args.offload:
            yield
            return
        env.park()
        _move_state(optimizer, self.ranks.device)
        yield
        _move_state(optimizer, torch.device("cpu"))
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()  # what is free is to be free for the environment's allocator too
        env.unpark()

    @contextlib.contextmanager
    def filming(self, collector: Collector | RemoteCollector, iteration: int) -> Iterator[None]:
        """Every `video_every` iterations rank 0 films its first environment, into videos/ITERATION.mp4; otherwise nothing is drawn."""
        every = self.args.video_every
        if not every or iteration % every or self.ranks.rank or not video.available():
            yield
            return
        collector.film = film = Film()
        yield
        collector.film = None
        try:
            if film.frames:
                (self.folder / "videos").mkdir(exist_ok=True)
                data = video.encode(film.pictures(), collector.env.metadata["render_fps"] / film.every)
                video.save(self.folder / "videos" / f"{iteration:06d}.mp4", data)
        except OSError as error:  # a full disk; the training does not depend on it
            print(f"WARNING: iteration {iteration} has no video: {error}", flush=True)

    def sync_gradients(self, policy: Policy, on: bool) -> None:
        """Before a backward pass: whether it is the last before `step`, and so may begin to reduce gradients over the ranks."""
        distributed.sync_gradients(policy, on, self.early)

    def step(self, optimizer: torch.optim.Optimizer, policy: Policy, loss: float, max_norm: float, only: str = "") -> float:
        """One optimizer step from the gradients of all ranks; returns their norm before clipping.

        A loss or gradient that is not finite skips the step. It is counted and told; too many in a row end the run.
        `only` limits the step to parameters whose name begins so."""
        if not distributed.is_sharded(policy):
            with self.timed("sync"):
                distributed.average_gradients(policy.parameters(), self.early)
        if only:
            for name, parameter in policy.named_parameters():
                if not name.startswith(only):
                    parameter.grad = None
        norm = distributed.clip_gradients(policy.parameters(), max_norm)
        if math.isfinite(norm) and math.isfinite(loss):
            optimizer.step()
            self.skipped_in_a_row = 0
        else:  # the same on every rank: loss and gradients are already averaged
            self.skipped += 1
            self.skipped_in_a_row += 1
            mine = {name: p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for name, p in policy.named_parameters() if p.grad is not None}
            guilty = list(dict.fromkeys(distributed.gather([name for name, gradient in mine.items() if not gradient.isfinite().all()])))
            where = f"the gradient of {', '.join(guilty[:3])}{' and others' if len(guilty) > 3 else ''}" if guilty else f"the loss ({loss})"
            print0(f"WARNING: optimizer step skipped, because {where} is not finite ({self.skipped_in_a_row} in a row, {self.skipped} in all)")
            if self.skipped_in_a_row >= self.args.max_skipped:
                last = checkpoint.latest(self.folder / "checkpoints")
                raise FloatingPointError(
                    f"{self.skipped_in_a_row} optimizer steps in a row were not finite. Lower the learning rate or max_grad_norm, or switch bf16 off. "
                    f"The last good checkpoint is {last or 'the policy that the run started from'}"
                )
        optimizer.zero_grad(set_to_none=True)
        return norm

    # ------------------------------------------------------------------------------------------------ evaluation, logs, checkpoints

    def evaluate(self, policy: Policy, env: VectorEnv | RolloutRanks | None, iteration: int, steps: int) -> bool:
        """Deterministic success rate on the same episodes each time, if it is due (returns whether). The report is in eval/ITERATION.

        Rank 0 runs them in its own environments, so their running episodes are given up."""
        every = self.args.eval_every
        if not every or not self.args.env_id or (iteration % every and iteration != self.args.total_iterations):
            return False

        def run() -> dict[str, float]:
            out = self.folder / "eval" / f"{iteration:06d}"
            shutil.rmtree(out, ignore_errors=True)  # of a run that was killed after it; the weights may differ in the last digit
            wanted = dict(episodes=self.args.eval_episodes, seed=EVAL_SEED, out=out, videos=1, progress=False, policy_name=self.args.policy)
            results = env.evaluate(**wanted) if isinstance(env, RolloutRanks) else evaluate(env, policy, **wanted)
            print(f"after {iteration} iterations: {results}", flush=True)
            return results.metrics()

        with self.acting(policy):
            self.tracker.log(steps, distributed.on_rank0(run))
        return True

    def log(self, steps: int, metrics: Mapping[str, float], rollout: Rollout | None = None) -> None:
        """Log an iteration, with the clocks. `metrics` are the same on every rank; a rollout's episodes are counted over all ranks."""
        values = dict(metrics)
        if rollout is not None:
            done = rollout.episodes
            steps_run = sum(record.length for record in done)
            mine = {
                "env/success_rate": sum(record.success for record in done) / max(len(done), 1),
                "env/episode_len": steps_run / max(len(done), 1),
                "env/return": sum(record.total_reward for record in done) / max(len(done), 1),
                "env/step_reward": sum(record.total_reward for record in done) / max(steps_run, 1),
            }
            values = {**distributed.average(mine, len(done)), **values}
            values["env/aborted"] = distributed.total(torch.tensor(float(rollout.aborted), device=self.ranks.device)).item()
            values["charts/SPS"] = (steps - self.steps_at_start) / (time.perf_counter() - self.started)
            self.seconds |= {f"rollout_{what}": seconds for what, seconds in rollout.seconds.items()}
        if self.skipped:
            values["train/skipped_steps"] = self.skipped
        values |= distributed.average({f"time/{what}": seconds for what, seconds in self.seconds.items()})
        self.seconds = {}
        self.tracker.log(steps, values)

    def save(self, policy: Policy, optimizer: torch.optim.Optimizer, counters: Mapping[str, Any], others: Mapping[str, Policy] | None = None) -> Path:
        """A checkpoint that `--resume` continues from and whose policy/ folder from_pretrained reads. `others`: further policies that the run carries along."""
        return checkpoint.save(self.folder / "checkpoints", counters["iteration"], policy, optimizer, counters=counters, keep=self.args.keep, others=others)

    def restore(self, policy: Policy, optimizer: torch.optim.Optimizer, fresh: Mapping[str, Any], others: Mapping[str, Policy] | None = None) -> dict[str, Any]:
        """The counters to start from: those of the newest checkpoint when resuming, else `fresh`."""
        distributed.seed_everything(self.args.seed, self.ranks.rank)
        newest = checkpoint.latest(self.folder / "checkpoints") if self.args.resume else None
        if newest is None:
            if self.args.resume:
                print0(f"{self.folder} has no checkpoint yet: starting from the beginning")
            return dict(fresh)
        counters = checkpoint.load(newest, policy, optimizer, others=others)
        self.steps_at_start = counters.get("steps", 0)
        print0(f"resuming after iteration {counters['iteration']} from {newest}")
        return {**fresh, **{name: value for name, value in counters.items() if name != "step"}}

    def export(self, policy: Policy) -> None:
        """The finished policy, in the run's folder `policy`, for from_pretrained."""
        tensors = checkpoint.whole_tensors(policy)
        distributed.on_rank0(lambda: str(policy.save_pretrained(self.folder / "policy", tensors=tensors)))
        print0(f"the policy is in {self.folder / 'policy'}: vlahub eval --env {self.args.env_id or 'ID'} --policy {self.folder / 'policy'}")

    def close(self) -> None:
        self.tracker.close()
        distributed.cleanup()
