"""Supervised fine-tuning (behaviour cloning) of Vision-Language-Action policies on LeRobot-format datasets, in one file.

    vlahub record --env vlahub/RoboTwin-ClickBell --policy expert --episodes 100 --out data/click-bell
    python baselines/sft.py --dataset data/click-bell --policy tiny:pi0 --env-id vlahub/RoboTwin-ClickBell
    torchrun --nproc-per-node 8 baselines/sft.py --dataset data/a data/b --weights 3 1 --policy lerobot/pi05_base --batch-size 256
    python baselines/sft.py --resume runs/NAME                                                     # go on where a run stopped

One iteration is one optimizer step on `batch_size` frames of all ranks together: each frame's observation, and the `horizon` actions that followed it.

How this differs from openpi's and lerobot's trainers:
 1. Frames are shuffled over all datasets, redrawn every epoch; with `weights` the dataset of each frame is drawn first. Batch k depends on the seed and k alone,
    so a resumed run, and a run on another number of ranks, sees the same batches.
 2. Actions beyond an episode's end are flagged and do not count in the loss (openpi trains on the repeated last action).
 3. A fresh policy takes its normalisation statistics from the datasets; a pretrained one keeps its own unless `dataset_statistics` says otherwise.
 4. The noise that a flow policy trains on is a function of (seed, position in the run).
"""

import copy
import math
from contextlib import closing, nullcontext
from dataclasses import dataclass

import torch

from vlahub import distributed
from vlahub.dataset import Dataset, Loader, fitting
from vlahub.distributed import Ranks, print0
from vlahub.policy import Policy
from vlahub.run import Run, advice, arguments, divides


@dataclass
class Args:
    dataset: tuple[str, ...] = ()
    """folders of LeRobot datasets (v2.1 or v3.0)"""
    weights: tuple[float, ...] = ()
    """how often each dataset is drawn from; by default all frames of all datasets count alike"""
    policy: str = "tiny:pi0"
    """bundled id, folder or hub repository; "tiny:FAMILY" is a small policy of that family with fresh weights"""
    env_id: str = ""
    """environment to evaluate in; none if empty"""
    policy_options: tuple[str, ...] = ()
    """entries of the policy's config to override, as KEY=VALUE (horizon=25 noise_level=0.3)"""
    env_options: tuple[str, ...] = ()
    """options of the environment, as KEY=VALUE (control_mode=ee_pose)"""
    out: str = "runs"
    """folder of all runs; this run gets a folder of its own below it"""
    name: str = ""
    """name of the run; made of policy, seed and time if empty"""
    resume: str = ""
    """folder of a run to go on with; it keeps its arguments, only total_iterations and what does not touch the training may be given anew"""
    seed: int = 0
    """seed of shuffles, training noise and fresh weights"""
    device: str = "auto"
    """auto: this rank's GPU if there is one, else the CPU"""
    bf16: bool = False
    """compute in bfloat16; weights and optimizer stay in float32"""
    shard: bool = False
    """spread weights, gradients and optimizer state over the ranks (FSDP2), for policies too large for one GPU"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass instead of keeping them: less memory, about a third more time"""
    track: bool = False
    """also log to Weights & Biases"""

    total_iterations: int = 2000
    """optimizer steps"""
    batch_size: int = 32
    """frames per optimizer step, all ranks together"""
    micro_batch_size: int = 0
    """frames per forward pass of a rank; 0: the rank's whole share. Smaller saves memory and changes nothing else"""
    learning_rate: float = 3e-4
    """peak learning rate"""
    warmup: int = 100
    """iterations in which the learning rate rises to its peak"""
    final_lr_fraction: float = 0.1
    """the learning rate falls along a cosine to this fraction of its peak"""
    weight_decay: float = 1e-4
    """of AdamW"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    ema: float = 0.0
    """decay of an exponential moving average of the weights, which is then what is evaluated and exported (openpi: 0.999); 0: none"""
    dataset_statistics: bool = False
    """replace a pretrained policy's normalisation statistics by those of the datasets"""
    cache_gb: float = 2.0
    """decoded pictures kept in memory, per dataset and rank"""
    loader_threads: int = 2
    """threads that decode pictures ahead of time, per rank"""

    num_envs: int = 2
    """environments of an evaluation"""
    workers: int = 0
    """simulation processes of an evaluation; 0: one per CPU core"""
    max_steps: int = 0
    """control steps per evaluation episode; 0: the environment's own limit"""
    eval_every: int = 500
    """iterations between evaluations; 0: never"""
    eval_episodes: int = 50
    """episodes of an evaluation, the same ones each time"""
    log_every: int = 20
    """iterations between lines of the log"""
    save_every: int = 500
    """iterations between checkpoints"""
    keep: int = 2
    """checkpoints kept"""
    max_skipped: int = 5
    """optimizer steps in a row that may be skipped for a loss or gradient that is not finite before the run stops"""


def check_args(args: Args, ranks: Ranks) -> None:
    """Refuse combinations that do not divide, and say how the batch is made up."""
    if not args.dataset:
        raise ValueError("no dataset given: --dataset FOLDER (vlahub record makes one)")
    if not 0 <= args.ema < 1:
        raise ValueError(f"ema must be from 0 to below 1, not {args.ema}")
    divides(args.batch_size, ranks.world, "batch_size", "the number of ranks")
    share = args.batch_size // ranks.world
    args.micro_batch_size = args.micro_batch_size or share
    divides(share, args.micro_batch_size, "a rank's share of the batch", "micro_batch_size")
    print0(
        f"one iteration: {args.batch_size} frames = {ranks.world} ranks x {share // args.micro_batch_size} micro-batches x {args.micro_batch_size} frames; "
        f"{args.total_iterations} iterations = {args.total_iterations * args.batch_size} frames"
    )


def learning_rate_fraction(iteration: int, args: Args) -> float:
    """Linear warm-up, then a cosine to `final_lr_fraction`."""
    if iteration < args.warmup:
        return (iteration + 1) / args.warmup
    progress = (iteration - args.warmup) / max(1, args.total_iterations - args.warmup)
    return args.final_lr_fraction + (1 - args.final_lr_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def average_into(ema: Policy, policy: Policy, decay: float, iteration: int) -> None:
    """Move the average towards the weights. It forgets faster at the start, so that it does not remember the fresh weights."""
    decay = min(decay, (1 + iteration) / (10 + iteration))
    for averaged, now in zip(ema.state_dict().values(), policy.state_dict().values(), strict=True):
        if averaged.is_floating_point():
            averaged.lerp_(now, 1 - decay)
        else:
            averaged.copy_(now)


def main(args: Args) -> None:
    ranks = distributed.setup(None if args.device == "auto" else args.device)
    check_args(args, ranks)
    first = Dataset(args.dataset[0])
    run = Run("sft", args, ranks)
    with advice(args), closing(run.make_env(args.num_envs)) if args.env_id and args.eval_every and ranks.rank == 0 else nullcontext() as env:
        interface = first.interface or (env.interface if env is not None else None)
        if interface is None and args.policy.startswith("tiny:"):
            raise ValueError(
                f"{args.dataset[0]} does not say what its columns mean (it was not written by vlahub); give --env-id, or start from a pretrained policy"
            )
        policy = run.load_policy(interface)
        datasets = [Dataset(folder, horizon=policy.horizon, columns=first.columns, cache_gb=args.cache_gb) for folder in args.dataset]
        share = args.batch_size // ranks.world
        loader = Loader(datasets, share, args.seed, args.weights or None, ranks.rank, ranks.world, args.loader_threads)
        fit = fitting(datasets, policy, args.policy)
        if args.policy.startswith("tiny:") or args.dataset_statistics:
            policy.set_statistics(Dataset.joint_statistics(datasets, fit))
        print0(
            f"{sum(map(len, datasets))} frames in {sum(len(d.episodes) for d in datasets)} episodes; {sum(map(len, datasets)) / args.batch_size:.0f} iterations an epoch"
        )

        ema = copy.deepcopy(policy) if args.ema else None
        run.shard(policy, ema)
        optimizer = run.optimizer(policy)
        others = {"ema": ema} if ema is not None else {}
        counters = run.restore(policy, optimizer, {"iteration": 0}, others)
        loader.step = counters["iteration"]
        losses: list[float] = []

        for iteration in range(counters["iteration"], args.total_iterations):
            run.evaluate(ema or policy, env, iteration, iteration)
            fraction = learning_rate_fraction(iteration, args)
            run.set_learning_rates(optimizer, fraction)
            policy.train()
            with run.timed("data"):
                batch = next(loader)
                batch = {**fit.observation(batch)}
            with run.timed("train"):
                total = torch.zeros((), device=ranks.device)
                positions = torch.arange(share) + iteration * args.batch_size + ranks.rank * share
                seeds = torch.stack([torch.full((share,), args.seed), positions], 1)
                parts = range(0, share, args.micro_batch_size)
                for start in parts:
                    piece = {key: value[start : start + args.micro_batch_size] for key, value in batch.items()}
                    with run.autocast():
                        loss = policy.sft_loss(piece, seeds[start : start + args.micro_batch_size])
                    run.sync_gradients(policy, start == parts[-1])
                    (loss / len(parts)).backward()
                    total += loss.detach() / len(parts)
                mean = distributed.total(total).item() / ranks.world
                norm = run.step(optimizer, policy, mean, args.max_grad_norm)
                if ema is not None:
                    average_into(ema, policy, args.ema, iteration)
            losses.append(mean)
            if (iteration + 1) % args.log_every == 0 or iteration + 1 == args.total_iterations:
                metrics = {"train/sft_loss": sum(losses) / len(losses), "train/actor/grad_norm": norm, "train/actor/lr": args.learning_rate * fraction}
                run.log(iteration + 1, metrics)
                losses = []
            last = iteration + 1 == args.total_iterations
            stop = run.stopping()
            if stop or last or (args.save_every and (iteration + 1) % args.save_every == 0):
                run.save(policy, optimizer, {"iteration": iteration + 1}, others)
            if stop:
                print0(f"stopped by {run.stop_signal or 'a signal to another rank'}; go on with --resume {run.folder}")
                break
        else:
            run.evaluate(ema or policy, env, args.total_iterations, args.total_iterations)
            run.export(ema or policy)
    run.close()


if __name__ == "__main__":
    main(arguments(Args, __doc__))
