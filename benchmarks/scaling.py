"""PPO's inference and training phases on one rank and on several: samples per second, scaling efficiency and peak memory.

    torchrun --standalone --nproc-per-node 1 benchmarks/scaling.py --out scaling.jsonl     # first, what the others are compared with
    torchrun --standalone --nproc-per-node 2 benchmarks/scaling.py --out scaling.jsonl     # prints all rows of the file, with their efficiency
    python benchmarks/scaling.py --models tiny --device cpu --decisions 8 --micro-batch-size 4 --size 64 --repeats 1     # does the script work at all?

What is timed is what baselines/ppo.py runs: `Policy.sample` for a batch of observations, and `ppo.update` on the decisions, in bfloat16 with float32 weights.
Observations are random pictures of LIBERO's shape (two cameras of 256 x 256, 8 state numbers, an instruction); rewards are random; nothing is simulated. Every
rank brings as many decisions (weak scaling), so efficiency is samples per second over N times those of one rank.

    tiny           tiny:pi0, 1.7 million parameters, weights whole on every rank
    tiny-sharded   the same with --shard: weights, gradients and optimizer state spread over the ranks; compared with tiny on one rank
    pi0-expert     pi0 at full size, 3.3 billion random parameters, of which the action expert trains; weights whole on every rank
    pi0            the same with all parameters training
    pi0-sharded    the same with --shard
"""

import gc
import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro

from baselines import ppo
from vlahub import distributed
from vlahub.distributed import Ranks, print0
from vlahub.observation import Observation
from vlahub.policy import Policy, Sample
from vlahub.rollout import Rollout
from vlahub.run import Run
from vlahub_policies.parts import text
from vlahub_policies.parts.normalize import Statistics
from vlahub_policies.parts.robots import LIBERO
from vlahub_policies.pi0 import Pi0Config, Pi0Policy

CHUNKS, MINIBATCHES = 4, 2  # decisions per environment, optimizer steps per update
MODELS = ("tiny", "tiny-sharded", "pi0-expert", "pi0", "pi0-sharded")


@dataclass
class Row:
    """One model on one number of ranks. Times are the slowest rank's medians; samples are those of all ranks."""

    model: str
    ranks: int
    parameters: int
    trained: int
    decisions: int  # of each rank, in one update
    infer_seconds: float  # one decision of every environment
    train_seconds: float  # one update: every decision forward and backward once, MINIBATCHES optimizer steps
    sync_seconds: float  # of the update, reducing gradients; with sharding that is spread over the passes and not seen apart
    infer_samples: float  # per second
    train_samples: float  # per second
    infer_memory: float  # GiB at the most, of the fullest rank
    train_memory: float
    device: str


def observation(count: int, size: int, rng: np.random.Generator) -> Observation:
    pictures = {key: rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8) for key in ("main_images", "wrist_images")}
    states = rng.normal(size=(count, 8)).astype(np.float32)
    return {**pictures, "states": states, "task_descriptions": ["pick up the black bowl between the plate and the ramekin and place it on the plate"] * count}


def build(model: str, device: torch.device) -> Policy:
    torch.manual_seed(0)  # the same weights on every rank
    if model.startswith("tiny"):
        return Pi0Policy.tiny(LIBERO, value_head=True).to(device)
    config = Pi0Config(interface=LIBERO, value_head=True, statistics=Statistics.identity(8, 7), train_expert_only=model == "pi0-expert")
    with torch.device(device):
        policy = Pi0Policy(config, text.bundled())
        policy.initialise()
    return policy.to(device)


def rollout_of(samples: list[Sample], rng: np.random.Generator) -> Rollout:
    """As the collector would give it, with random rewards and no episode's end."""
    count, steps = len(samples[0].actions), 5
    device = samples[0].log_prob.device
    shape = (len(samples), count, steps)
    rollout = Rollout(
        trace={key: torch.cat([sample.trace[key] for sample in samples]) for key in samples[0].trace},
        log_prob=torch.cat([sample.log_prob for sample in samples]),
        row=torch.arange(len(samples) * count, device=device).view(len(samples), count),
        reward=torch.from_numpy(rng.random(shape, dtype=np.float32)).to(device),
        valid=torch.ones(shape, dtype=torch.bool, device=device),
        terminated=torch.zeros(shape, dtype=torch.bool, device=device),
        truncated=torch.zeros(shape, dtype=torch.bool, device=device),
    )
    rollout.value = rollout.grid(torch.cat([sample.value for sample in samples]).float())
    rollout.cut_value = torch.zeros(shape[:2], device=device)
    rollout.next_value = torch.zeros(count, device=device)
    return rollout


def slowest(seconds: list[float]) -> float:
    """The median of this rank's times; the largest over all ranks."""
    return max(distributed.gather([statistics.median(seconds)]))


def peak(device: torch.device) -> float:
    """GiB at the most since the last call, of the fullest rank; on a CPU since the process began."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return max(distributed.gather([used]))


def measure(model: str, ranks: Ranks, decisions: int, micro_batch_size: int, size: int, repeats: int, folder: str) -> Row:
    envs = decisions // CHUNKS
    args = ppo.Args(
        env_id="", policy=model, out=folder, name=model, bf16=True, shard=model.endswith("-sharded"), num_envs=envs * ranks.world, num_chunks=CHUNKS,
        num_minibatches=MINIBATCHES, micro_batch_size=micro_batch_size, update_epochs=1, target_kl=0.0, learning_rate=1e-6, eval_every=0,
    )  # fmt: skip
    ppo.check_args(args, ranks)
    run = Run("ppo", args, ranks)
    policy = build(model, ranks.device)
    parameters, trained = sum(p.numel() for p in policy.parameters()), sum(p.numel() for p in policy.parameters() if p.requires_grad)
    run.shard(policy)
    optimizer = run.optimizer(policy, {"value_head": args.value_learning_rate})
    rng = np.random.default_rng(ranks.rank)
    seen = observation(envs, size, rng)
    seeds = torch.stack([torch.arange(envs) + ranks.rank * envs, torch.zeros(envs, dtype=torch.int64)], 1)

    def timed(function, *given) -> tuple[float, object]:
        distributed.barrier("the next measurement", 300)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        result = function(*given)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - before, result

    peak(ranks.device)
    with run.acting(policy):
        policy.sample(seen, seeds)  # captures, compiles, fills the allocator
        chunks = [timed(policy.sample, seen, seeds + torch.tensor([0, k])) for k in range(CHUNKS)]
    infer, infer_memory = slowest([seconds for seconds, _ in chunks]), peak(ranks.device)
    rollout = rollout_of([sample for _, sample in chunks], rng)
    mine = distributed.share(args.num_envs, ranks.rank, ranks.world)
    train, sync = [], []
    policy.train()
    for iteration in range(1 + repeats):  # the first makes the optimizer's state
        run.seconds = {}
        seconds, _ = timed(ppo.update, policy, optimizer, rollout, mine, args, iteration, run)
        train.append(seconds)
        sync.append(run.seconds.get("sync", 0.0))
    run.tracker.close()
    update = slowest(train[1:])
    return Row(
        model, ranks.world, parameters, trained, decisions, infer, update, slowest(sync[1:]), envs * ranks.world / infer, decisions * ranks.world / update,
        infer_memory, peak(ranks.device), torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU",
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    def efficiency(row: Row, what: str) -> str:
        alone = [one for one in rows if one.ranks == 1 and (one.model, one.decisions) == (row.model.removesuffix("-sharded"), row.decisions)]
        return f"{getattr(row, what) / row.ranks / getattr(alone[-1], what):.1%}" if alone and row.ranks > 1 else "-"

    lines = [
        "| policy | trained / all parameters | ranks | infer: samples/s | efficiency | train: samples/s | efficiency | of it sync | peak GiB: infer, train |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.model} | {row.trained / 1e6:.0f} / {row.parameters / 1e6:.0f} million | {row.ranks} | {row.infer_samples:.1f} | {efficiency(row, 'infer_samples')} | "
            f"{row.train_samples:.1f} | {efficiency(row, 'train_samples')} | {row.sync_seconds / row.train_seconds:.1%} | {row.infer_memory:.1f}, {row.train_memory:.1f} |"
        )
    return "\n".join(lines)


def main(
    models: tuple[str, ...] = MODELS,
    decisions: int = 64,
    micro_batch_size: int = 16,
    size: int = 256,
    repeats: int = 3,
    device: str = "auto",
    out: str = "",
) -> None:
    """Measure and print a table.

    Args:
        models: of those above.
        decisions: of each rank per update; a multiple of 8.
        micro_batch_size: decisions per forward pass.
        size: side of the pictures that the environment would give.
        repeats: updates whose median counts, after one to warm up.
        device: cpu, or auto.
        out: file of rows that this run is added to and compared with.
    """
    if unknown := sorted(set(models) - set(MODELS)):
        raise SystemExit(f"unknown model {unknown[0]!r}; known are {', '.join(MODELS)}")
    if decisions % (CHUNKS * MINIBATCHES):
        raise SystemExit(f"--decisions {decisions} must be a multiple of {CHUNKS * MINIBATCHES}")
    ranks = distributed.setup(None if device == "auto" else device)
    file = Path(out) if out else None
    rows = [Row(**json.loads(line)) for line in file.read_text().splitlines()] if file is not None and file.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for model in models if ranks.world > 1 else [model for model in models if not model.endswith("-sharded")]:
            rows.append(measure(model, ranks, decisions, micro_batch_size, size, repeats, distributed.on_rank0(lambda: folder)))
            gc.collect()
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()
            if ranks.rank == 0 and file is not None:
                with open(file, "a") as lines:
                    lines.write(json.dumps(asdict(rows[-1])) + "\n")
    print0("\n" + table(rows))
    distributed.cleanup()


if __name__ == "__main__":
    tyro.cli(main)
