"""RL-Co: PPO in simulation together with supervised learning on a real robot's data, in one file.

    vlahub record --env vlahub/RoboTwin-ClickBell --policy expert --episodes 50 --out data/real    # stands for the real robot's data here
    python baselines/rl_co.py --real-dataset data/real                                             # offline, on a CPU, in minutes
    torchrun --nproc-per-node 8 baselines/rl_co.py --env-id ENV --policy CHECKPOINT --real-dataset FOLDER --sft-loss-weight 0.2
    python baselines/rl_co.py --no-use-real-data-co-training                                       # plain PPO, equal to ppo.py to the digit
    python baselines/rl_co.py --resume runs/NAME                                                   # go on where a run stopped

The loss of every micro-batch is L = L_PPO + beta * L_SFT: reinforcement learning improves the policy in simulation, the supervised loss on demonstrations of the
real robot keeps it from forgetting the real pictures and motions. Rollouts, advantages and L_PPO are those of ppo.py, whose pure functions are imported;
what stands here is the update with both losses, from top to bottom.

How this differs from RLinf's:
 1. `train/loss_ratio` is beta * |L_SFT| / |L_PPO|, beta included: how much the supervised loss outweighs the other.
 2. The real data are shuffled anew every epoch, and batch k depends on the seed and k alone: a resumed run, or one on another number of ranks, sees the same.
 3. Each micro-batch of PPO goes with `sft_batch_size` real frames, all ranks together, as there. So the frames of an optimizer step, the true batch size, grow
    with the number of micro-batches; it is computed and printed at the start.
 4. While only the critic warms up, no real data are drawn.
"""

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `baselines` lies, however this file is started

from baselines import ppo
from baselines.ppo import advantages_of, critic_loss, minibatches, surrogate
from vlahub import distributed
from vlahub.dataset import Dataset, Loader, fitting
from vlahub.distributed import Ranks, print0
from vlahub.interface import Fit
from vlahub.policy import Policy
from vlahub.rollout import Rollout, SeedStream, reduce_log_prob
from vlahub.run import Run, advice, arguments, divides, serve


@dataclass
class Args(ppo.Args):
    use_real_data_co_training: bool = True
    """add the supervised loss; without it this is plain PPO"""
    real_dataset: tuple[str, ...] = ()
    """folders of LeRobot datasets (v2.1 or v3.0) with the real robot's demonstrations"""
    real_weights: tuple[float, ...] = ()
    """how often each of them is drawn from; by default all frames of all datasets count alike"""
    sft_loss_weight: float = 0.2
    """beta, the weight of the supervised loss"""
    sft_batch_size: int = 16
    """real frames that go with each micro-batch of PPO, all ranks together"""
    cache_gb: float = 2.0
    """decoded pictures kept in memory, per dataset and rank"""
    loader_threads: int = 2
    """threads that decode pictures ahead of time, per rank"""


def micro_batches_of(args: Args, ranks: int) -> int:
    """Forward passes of each rank per optimizer step."""
    return args.num_envs * args.num_chunks // args.num_minibatches // ranks // args.micro_batch_size


def check_args(args: Args, ranks: Ranks) -> None:
    """PPO's own checks, then those of the real data; says how both batches are made up."""
    if args.sft_loss_weight < 0:
        raise ValueError(f"sft_loss_weight must not be negative, it is {args.sft_loss_weight}: that would unlearn the demonstrations")
    ppo.check_args(args, ranks)
    if not args.use_real_data_co_training:
        print0("no co-training: plain PPO")
        return
    if not args.real_dataset:
        raise ValueError("no real data given: --real-dataset FOLDER (vlahub record makes one), or --no-use-real-data-co-training for plain PPO")
    divides(args.sft_batch_size, ranks.world, "sft_batch_size", "the number of ranks")
    count = micro_batches_of(args, ranks.world)
    decisions = args.num_envs * args.num_chunks // args.num_minibatches
    print0(
        f"co-training: each of the {count} micro-batches of an optimizer step goes with {args.sft_batch_size} real frames, "
        f"{args.sft_batch_size // ranks.world} on each of {ranks.world} ranks, weighted {args.sft_loss_weight:g}\n"
        f"true batch size of the supervised loss: {decisions} decisions x {args.sft_batch_size} frames / ({args.micro_batch_size} per micro-batch x {ranks.world} "
        f"ranks) = {count * args.sft_batch_size} real frames per optimizer step"
    )


def real_data(args: Args, policy: Policy, ranks: Ranks) -> tuple[Loader, Fit]:
    """The real robot's frames, as the policy expects them. What does not fit is an error that names the dataset and the field."""
    first = Dataset(args.real_dataset[0])
    datasets = [Dataset(folder, horizon=policy.horizon, columns=first.columns, cache_gb=args.cache_gb) for folder in args.real_dataset]
    fit = fitting(datasets, policy, args.policy)
    print0(f"real data: {sum(map(len, datasets))} frames in {sum(len(dataset.episodes) for dataset in datasets)} episodes")
    return Loader(datasets, args.sft_batch_size // ranks.world, args.seed, args.real_weights or None, ranks.rank, ranks.world, args.loader_threads), fit


def supervised_loss(policy: Policy, loader: Loader, fit: Fit, args: Args) -> torch.Tensor:
    """Of the next batch of real frames, this rank's share; the noise that a flow policy trains on is a function of (seed, position in the run)."""
    share = loader.batch_size
    positions = torch.arange(share) + loader.step * args.sft_batch_size + loader.rank * share
    batch = next(loader)
    return policy.sft_loss({**fit.observation(batch)}, torch.stack([torch.full((share,), args.seed), positions], 1))


def loss_ratio(sft: float, rl: float, beta: float) -> float:
    """beta * |SFT| / |RL|; a reinforcement-learning loss of exactly 0 gives a large number rather than none."""
    return beta * abs(sft) / max(abs(rl), 1e-12)


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    real: tuple[Loader, Fit] | None,
    envs: range,
    args: Args,
    iteration: int,
    run: Run,
) -> dict[str, float]:
    """The optimizer steps of one iteration: ppo.update with the supervised loss beside the other in every micro-batch. Returns metrics."""
    advantage, returns, mask = advantages_of(rollout, args)
    spread = distributed.statistics(advantage, mask)
    advantage = rollout.flat((advantage - spread.mean) / (spread.std + 1e-8) * mask)  # [R] or [R, N]
    targets, target_mask, valid = rollout.flat(returns), rollout.flat(mask), rollout.flat(rollout.valid)
    old_value = rollout.flat(rollout.value)[:, : targets.shape[1]] if targets.ndim == 2 else rollout.flat(rollout.value)[:, 0]
    old_log_prob, entries = reduce_log_prob(rollout.log_prob.float(), valid, args.ratio_level)
    warmup = iteration < args.critic_warmup
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "ratio", "ppo_loss", "sft_loss", "grad_norm")
    totals, steps, stop = dict.fromkeys(names, 0.0), 0, False

    for epoch in range(args.update_epochs):
        for rows in minibatches(rollout, envs, args, iteration, epoch):
            counts = distributed.total(torch.stack([entries[rows].sum(), target_mask[rows].sum()]).double())
            if not counts.all():  # every decision of this minibatch was aborted, on all ranks
                continue
            sums = torch.zeros(8, dtype=torch.float64, device=rows.device)
            micro = micro_batches_of(args, distributed.world())
            for number, part in enumerate(rows.tensor_split(micro), 1):  # as many on every rank, even where aborted decisions are missing
                weight = 1.0 if len(part) else 0.0  # a filler takes part in what all ranks do together and adds nothing
                if not len(part):
                    part = rows[:1] if len(rows) else torch.zeros(1, dtype=torch.int64, device=rows.device)
                with run.autocast():
                    now = policy.evaluate({key: tensor[part] for key, tensor in rollout.trace.items()})
                log_prob, entry_mask = reduce_log_prob(now.log_prob.float(), valid[part], args.ratio_level)
                old = old_log_prob[part]
                entropy, _ = reduce_log_prob(now.entropy.float(), valid[part], args.ratio_level)
                scale = advantage[part].view(*advantage[part].shape, *[1] * (log_prob.ndim - advantage[part].ndim))
                entry_mask, value_mask = entry_mask * weight, target_mask[part] * weight
                loss, ratio = surrogate(log_prob, old, scale, args.clip_low, args.clip_high)
                new_value = now.value.float()[:, : targets.shape[1]] if targets.ndim == 2 else now.value.float()[:, 0]
                value_loss = critic_loss(new_value, old_value[part], targets[part], args.value_clip, args.huber_delta)
                policy_loss = (loss * entry_mask).sum() / counts[0]
                entropy_mean = (entropy * entry_mask).sum() / counts[0]
                value_mean = (value_loss * value_mask).sum() / counts[1]
                actor = 0.0 if warmup else policy_loss - args.entropy_coef * entropy_mean
                ppo_loss = actor + args.value_coef * value_mean
                supervised, last = real is not None and not warmup, number == micro
                run.sync_gradients(policy, last and not supervised)
                # Gradients are averaged over the ranks, but the sums above are divided by the counts of all ranks already.
                (ppo_loss * distributed.world()).backward()
                sft_loss = torch.zeros((), device=rows.device)
                if supervised:
                    # a backward pass of its own: the graphs of both losses need not be in memory together
                    with run.autocast():
                        sft_loss = supervised_loss(policy, *real, args)
                    run.sync_gradients(policy, last)
                    (args.sft_loss_weight * sft_loss / micro).backward()
                with torch.no_grad():
                    log_ratio = (log_prob - old) * entry_mask
                    kl = (((ratio - 1) * entry_mask - log_ratio).sum()) / counts[0]
                    clipped = (((ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)) * entry_mask).sum() / counts[0]
                    shared = sft_loss.float() / micro / distributed.world()  # each rank's mean is over as many frames
                    mean_ratio = (ratio * entry_mask).sum() / counts[0]
                    sums += torch.stack([policy_loss, value_mean, entropy_mean, kl, clipped, mean_ratio, ppo_loss, shared]).double()
            sums = distributed.total(sums).tolist()
            total_loss = sums[6] + args.sft_loss_weight * sums[7]
            norm = run.step(optimizer, policy, total_loss, args.max_grad_norm, only="value_head" if warmup else "")
            totals = {name: totals[name] + number for name, number in zip(names, (*sums, norm), strict=True)}
            steps += 1
            stop = bool(args.target_kl) and sums[3] > args.target_kl
            if stop:
                break
        if stop:
            break

    means = {name: total / max(steps, 1) for name, total in totals.items()}
    sft, rl = means.pop("sft_loss"), means.pop("ppo_loss")
    metrics = {f"train/actor/{name}": value for name, value in means.items() if name != "value_loss"}
    metrics |= {"train/critic/value_loss": means["value_loss"], "rollout/advantages_mean": spread.mean, "rollout/advantages_std": spread.std}
    value_error = distributed.statistics(targets - old_value, target_mask)
    target_spread = distributed.statistics(targets, target_mask)
    metrics |= {"rollout/returns_mean": target_spread.mean, "rollout/returns_std": target_spread.std}
    metrics["train/critic/explained_variance"] = 1 - value_error.std**2 / max(target_spread.std**2, 1e-12)
    if real is not None:
        metrics |= {"train/ppo_loss": rl, "train/sft_loss": sft, "actor/total_loss": rl + args.sft_loss_weight * sft}
        metrics["train/loss_ratio"] = loss_ratio(sft, rl, args.sft_loss_weight)
    return metrics


def main(args: Args) -> None:
    ranks = distributed.setup(None if args.device == "auto" else args.device, args.env_ranks, args.policy_ranks, args.rollout_ranks)
    check_args(args, ranks)
    if ranks.role != "policy":
        return serve(args, args.num_envs, ranks, value_head=True)
    run = Run("rl_co", args, ranks)
    envs = distributed.share(args.num_envs, ranks.rank, ranks.world)
    with advice(args), closing(run.make_env(len(envs))) as env:
        policy = run.load_policy(env.interface, value_head=True)
        real = real_data(args, policy, ranks) if args.use_real_data_co_training else None
        run.shard(policy)
        optimizer = run.optimizer(policy, {"value_head": args.value_learning_rate})
        seeds = SeedStream(args.seed, envs)
        collector = run.collector(env, policy, seeds)
        counters = run.restore(policy, optimizer, {"iteration": 0, "steps": 0, "episodes": [0] * args.num_envs, "real_batches": 0})
        seeds.count = [counters["episodes"][b] for b in envs]
        if real is not None:
            real[0].step = counters["real_batches"]

        for iteration in range(counters["iteration"], args.total_iterations):
            if run.evaluate(policy, env, iteration, counters["steps"]):
                collector.restart()
            run.set_learning_rates(optimizer, 1 - iteration / args.total_iterations if args.anneal else 1.0)
            with run.timed("rollout"), run.acting(policy), run.filming(collector, iteration):
                rollout = collector.steady(args.num_chunks)
            with run.timed("train"), run.updating(optimizer, env):
                policy.train()
                metrics = update(policy, optimizer, rollout, real, envs, args, iteration, run)
            counters["steps"] += int(distributed.total(rollout.valid.sum()))
            counters["real_batches"] = real[0].step if real is not None else 0
            run.log(counters["steps"], metrics, rollout)
            stop = run.stopping()
            if stop or (args.save_every and (iteration + 1) % args.save_every == 0) or iteration + 1 == args.total_iterations:
                collector.restart()
                episodes = distributed.gather(seeds.count)
                run.save(policy, optimizer, {**counters, "iteration": iteration + 1, "episodes": episodes})
            if stop:
                print0(f"stopped by {run.stop_signal or 'a signal to another rank'}; go on with --resume {run.folder}")
                break
        else:
            run.evaluate(policy, env, args.total_iterations, counters["steps"])
            run.export(policy)
    run.close()


if __name__ == "__main__":
    main(arguments(Args, __doc__))
