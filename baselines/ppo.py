"""PPO for Vision-Language-Action policies, in one file.

    python baselines/ppo.py                                                                        # offline, on a CPU, in minutes
    torchrun --nproc-per-node 8 baselines/ppo.py --env-id vlahub/LIBERO-Spatial --policy Dexmal/libero-db-pi0 --num-envs 64
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 baselines/ppo.py ...      # the same line on both nodes
    python baselines/ppo.py --resume runs/NAME                                                     # go on where a run stopped

One iteration: every environment takes `num_chunks` decisions (a decision is a chunk of actions, of which `execute` run), advantages are estimated by GAE,
and the clipped surrogate is maximised for `update_epochs` passes over the decisions in `num_minibatches` parts.

How this differs from the PPO paper and from RLinf's:
 1. A decision is a whole chunk. The advantage is taken per chunk or per action (`advantage_level`), the ratio per chunk, action or token (`ratio_level`).
 2. An episode cut by the time limit bootstraps from the value of its last observation; one that terminates does not. Episodes follow each other without gaps.
 3. Advantages are normalised over all ranks, with the unbiased standard deviation.
 4. Every minibatch takes an equal share of each environment's decisions, redrawn every epoch. So the batches do not depend on the number of ranks.
 5. Losses are sums divided by the number of entries in the whole minibatch, all ranks and micro-batches together: splitting a batch changes nothing.
 6. The critic's loss is a Huber loss with the value clipped around the rollout's; the rollout's value and the training's are the same estimator.
 7. The exploration noise of a decision is a function of (seed, environment, episode, step), so a run on two ranks sees the data that one rank sees.
"""

from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from vlahub import distributed
from vlahub.distributed import Ranks, print0
from vlahub.policy import Policy
from vlahub.rollout import Level, Rollout, SeedStream, reduce_log_prob
from vlahub.run import Run, advice, arguments, divides, serve


@dataclass
class Args:
    env_id: str = "vlahub/RoboTwin-ClickBell"
    """environment to train in"""
    policy: str = "tiny:pi0"
    """bundled id, folder or hub repository; "tiny:FAMILY" is a small policy of that family with fresh weights"""
    policy_options: tuple[str, ...] = ()
    """entries of the policy's config to override, as KEY=VALUE (horizon=25 noise_level=0.3)"""
    train_only: tuple[str, ...] = ()
    """beginnings of the names of the parameters that train (value_head model.action_out_proj); empty: all that the policy's options leave trainable"""
    env_options: tuple[str, ...] = ()
    """options of the environment, as KEY=VALUE (control_mode=ee_pose)"""
    out: str = "runs"
    """folder of all runs; this run gets a folder of its own below it"""
    name: str = ""
    """name of the run; made of environment, policy, seed and time if empty"""
    resume: str = ""
    """folder of a run to go on with; it keeps its arguments, only total_iterations may be given anew"""
    seed: int = 0
    """seed of episodes, exploration noise, shuffles and fresh weights"""
    device: str = "auto"
    """auto: this rank's GPU if there is one, else the CPU"""
    bf16: bool = False
    """compute in bfloat16; weights and optimizer stay in float32"""
    shard: bool = False
    """spread weights, gradients and optimizer state over the ranks (FSDP2), for policies too large for one GPU"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass instead of keeping them: less memory, about a third more time"""
    offload: bool = False
    """for a policy and a world model on one GPU: outside updates the optimizer's state lies on the CPU, in updates the world model does"""
    env_ranks: str = ""
    """ranks that only simulate, as 0-3; by default every rank does everything"""
    rollout_ranks: str = ""
    """ranks that only infer, and simulate where there are no env_ranks; they get the weights after every update"""
    policy_ranks: str = ""
    """with either: ranks that train, and infer where there are no rollout_ranks. Each gets as many of the others"""
    track: bool = False
    """also log to Weights & Biases"""

    num_envs: int = 8
    """environments of all ranks together"""
    workers: int = 0
    """simulation processes of each rank; 0: as many as the rank's share of CPU cores"""
    num_chunks: int = 16
    """decisions of each environment per iteration"""
    execute: int = 0
    """actions of each chunk that run before the policy looks again; 0: the policy's own default"""
    max_steps: int = 0
    """control steps per episode; 0: the environment's own limit"""

    total_iterations: int = 100
    """iterations of rollout and update"""
    update_epochs: int = 2
    """passes over each rollout"""
    num_minibatches: int = 4
    """optimizer steps per pass; must divide num_chunks"""
    micro_batch_size: int = 0
    """decisions per forward pass of a rank; 0: the rank's whole share of a minibatch. Smaller saves memory and changes nothing else"""
    learning_rate: float = 2e-5
    """of the policy"""
    value_learning_rate: float = 3e-4
    """of the value head"""
    anneal: bool = False
    """lower both learning rates linearly to zero over the run"""
    weight_decay: float = 0.0
    """of AdamW"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""

    gamma: float = 0.99
    """discount per chunk or action, whichever advantage_level says"""
    gae_lambda: float = 0.95
    """lambda of GAE"""
    bootstrap_time_limit: bool = True
    """a time limit is not an end: the value of the last observation stands for what would follow. False where being done in time is the task"""
    advantage_level: Literal["chunk", "action"] = "chunk"
    """one advantage per chunk, or one per action (needs a critic with one value per action)"""
    ratio_level: Level = "chunk"
    """one probability ratio per chunk, per action or per token"""
    clip_low: float = 0.2
    """the ratio is clipped from below at 1 - clip_low"""
    clip_high: float = 0.2
    """the ratio is clipped from above at 1 + clip_high"""
    value_clip: float = 0.2
    """new values are clipped to within this distance of the rollout's; 0 switches it off"""
    huber_delta: float = 10.0
    """beyond this error the value loss grows linearly"""
    value_coef: float = 1.0
    """weight of the value loss"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus (no effect where the exploration noise is fixed)"""
    target_kl: float = 0.1
    """stop an iteration's updates once approx_kl exceeds this; 0: never"""
    critic_warmup: int = 0
    """iterations at the start in which only the value head learns"""

    eval_every: int = 10
    """iterations between evaluations (one before the first); 0: never"""
    eval_episodes: int = 50
    """episodes of an evaluation: the same ones each time, none of which is trained on"""
    video_every: int = 0
    """iterations between films of a rollout (step and reward drawn on, in the run's folder videos); 0: none"""
    save_every: int = 10
    """iterations between checkpoints; running episodes are dropped there, so that a resumed run equals an uninterrupted one"""
    keep: int = 2
    """checkpoints kept"""
    max_skipped: int = 5
    """optimizer steps in a row that may be skipped for a loss or gradient that is not finite before the run stops"""


# ------------------------------------------------------------------------------------------------ the algorithm


def gae(
    reward: torch.Tensor,  # [S, B]
    value: torch.Tensor,  # [S, B]
    next_value: torch.Tensor,  # [B] of the state after the last step
    terminated: torch.Tensor,  # [S, B] bool
    cut: torch.Tensor,  # [S, B] bool: the time limit ended the episode here ...
    cut_value: torch.Tensor,  # [S, B] ... in a state of this value
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns [S, B]. delta = r + gamma V' - V, with V' = 0 after termination; the sum does not cross the end of an episode."""
    advantage, following = torch.zeros_like(reward), torch.zeros_like(next_value)
    for t in reversed(range(len(reward))):
        after = torch.where(cut[t], cut_value[t], next_value * ~terminated[t])
        delta = reward[t] + gamma * after - value[t]
        following = delta + gamma * gae_lambda * following * ~(terminated[t] | cut[t])
        advantage[t], next_value = following, value[t]
    return advantage, advantage + value


def advantages_of(rollout: Rollout, args: Args) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(advantage, return, mask): per chunk [K, B], or per action [K, B, N]."""
    K, B, N = rollout.reward.shape
    cut_value = rollout.cut_value * args.bootstrap_time_limit
    if args.advantage_level == "chunk":
        terminated, cut = rollout.terminated.any(2), rollout.truncated.any(2)
        steps = (rollout.reward.sum(2), rollout.value[..., 0], rollout.next_value, terminated, cut, cut_value)
        return *gae(*steps, args.gamma, args.gae_lambda), rollout.row >= 0

    def in_time(grid: torch.Tensor) -> torch.Tensor:  # [K, B, N] -> [K * N, B]
        return grid.transpose(1, 2).reshape(K * N, B)

    # Actions after an episode's end lie between its last step and the next episode's first; the end cuts the sum before it reaches them.
    value = in_time(rollout.value[..., :N])
    cut_value = in_time(cut_value[..., None].expand(K, B, N))
    steps = (in_time(rollout.reward), value, rollout.next_value, in_time(rollout.terminated), in_time(rollout.truncated), cut_value)
    advantage, returns = gae(*steps, args.gamma, args.gae_lambda)
    return advantage.view(K, N, B).transpose(1, 2), returns.view(K, N, B).transpose(1, 2), rollout.valid


def surrogate(log_prob: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped policy loss of each entry (to be minimised), and the ratio."""
    ratio = (log_prob - old).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)), ratio


def critic_loss(value: torch.Tensor, old: torch.Tensor, target: torch.Tensor, clip: float, delta: float) -> torch.Tensor:
    """Huber loss of each entry; with clipping, the worse of the value and the value moved at most `clip` away from the rollout's."""
    loss = torch.nn.functional.huber_loss(value, target, reduction="none", delta=delta)
    if not clip:
        return loss
    near = old + (value - old).clamp(-clip, clip)
    return torch.maximum(loss, torch.nn.functional.huber_loss(near, target, reduction="none", delta=delta))


def minibatches(rollout: Rollout, envs: range, args: Args, iteration: int, epoch: int) -> list[torch.Tensor]:
    """Rows of each minibatch: every environment's K decisions in an order of its own, dealt out in equal parts."""
    order = np.stack([np.random.default_rng([args.seed, iteration, epoch, env]).permutation(args.num_chunks) for env in envs], axis=1)  # [K, B]
    parts = torch.from_numpy(order).view(args.num_minibatches, -1, len(envs)).to(rollout.row.device)
    rows = [rollout.row.gather(0, part).flatten() for part in parts]
    return [part[part >= 0] for part in rows]


def check_args(args: Args, ranks: Ranks) -> None:
    """Refuse combinations that do not divide, and say how the batch is made up."""
    divides(args.num_envs, ranks.world, "num_envs", "the number of ranks")
    divides(args.num_chunks, args.num_minibatches, "num_chunks", "num_minibatches")
    local = args.num_envs // ranks.world * (args.num_chunks // args.num_minibatches)
    args.micro_batch_size = args.micro_batch_size or local
    divides(local, args.micro_batch_size, "a rank's share of a minibatch", "micro_batch_size")
    if args.advantage_level == "action" and args.ratio_level == "chunk":
        raise ValueError("one ratio per chunk cannot carry one advantage per action: choose ratio_level action or token, or advantage_level chunk")
    print0(
        f"one iteration: {args.num_envs} envs x {args.num_chunks} chunks = {args.num_envs * args.num_chunks} decisions, {args.update_epochs} epochs x "
        f"{args.num_minibatches} optimizer steps of {local * ranks.world} decisions\n"
        f"one optimizer step: {ranks.world} ranks x {local // args.micro_batch_size} micro-batches x {args.micro_batch_size} decisions"
    )


def update(policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout, envs: range, args: Args, iteration: int, run: Run) -> dict[str, float]:
    """The optimizer steps of one iteration. Returns metrics."""
    advantage, returns, mask = advantages_of(rollout, args)
    spread = distributed.statistics(advantage, mask)
    advantage = rollout.flat((advantage - spread.mean) / (spread.std + 1e-8) * mask)  # [R] or [R, N]
    targets, target_mask, valid = rollout.flat(returns), rollout.flat(mask), rollout.flat(rollout.valid)
    old_value = rollout.flat(rollout.value)[:, : targets.shape[1]] if targets.ndim == 2 else rollout.flat(rollout.value)[:, 0]
    old_log_prob, entries = reduce_log_prob(rollout.log_prob.float(), valid, args.ratio_level)
    warmup = iteration < args.critic_warmup
    totals: dict[str, float] = {}
    steps, stop = 0, False

    for epoch in range(args.update_epochs):
        for rows in minibatches(rollout, envs, args, iteration, epoch):
            counts = distributed.total(torch.stack([entries[rows].sum(), target_mask[rows].sum()]).double())
            if not counts.all():  # every decision of this minibatch was aborted, on all ranks
                continue
            sums = torch.zeros(6, dtype=torch.float64, device=rows.device)
            micro = len(range(0, args.num_envs * args.num_chunks // args.num_minibatches // distributed.world(), args.micro_batch_size))
            for number, part in enumerate(rows.tensor_split(micro), 1):  # as many on every rank, even where aborted decisions are missing
                if not len(part):
                    part = rows[:1] if len(rows) else torch.zeros(1, dtype=torch.int64, device=rows.device)
                    weight = 0.0  # takes part in what all ranks do together, adds nothing
                else:
                    weight = 1.0
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
                run.sync_gradients(policy, number == micro)
                # Gradients are averaged over the ranks, but the sums above are divided by the counts of all ranks already.
                ((actor + args.value_coef * value_mean) * distributed.world()).backward()
                with torch.no_grad():
                    log_ratio = (log_prob - old) * entry_mask
                    kl = (((ratio - 1) * entry_mask - log_ratio).sum()) / counts[0]
                    clipped = (((ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)) * entry_mask).sum() / counts[0]
                    sums += torch.stack([policy_loss, value_mean, entropy_mean, kl, clipped, (ratio * entry_mask).sum() / counts[0]]).double()
            sums = distributed.total(sums).tolist()
            norm = run.step(optimizer, policy, sums[0] + sums[1], args.max_grad_norm, only="value_head" if warmup else "")
            for name, number in zip(("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "ratio", "grad_norm"), (*sums, norm), strict=True):
                totals[name] = totals.get(name, 0.0) + number
            steps += 1
            stop = bool(args.target_kl) and sums[3] > args.target_kl
            if stop:
                break
        if stop:
            break

    means = {name: total / max(steps, 1) for name, total in totals.items()}
    metrics = {f"train/actor/{name}": value for name, value in means.items() if name != "value_loss"}
    metrics |= {"train/critic/value_loss": means.get("value_loss", 0.0), "rollout/advantages_mean": spread.mean, "rollout/advantages_std": spread.std}
    value_error = distributed.statistics(targets - old_value, target_mask)
    target_spread = distributed.statistics(targets, target_mask)
    metrics |= {"rollout/returns_mean": target_spread.mean, "rollout/returns_std": target_spread.std}
    metrics["train/critic/explained_variance"] = 1 - value_error.std**2 / max(target_spread.std**2, 1e-12)
    return metrics


def main(args: Args) -> None:
    ranks = distributed.setup(None if args.device == "auto" else args.device, args.env_ranks, args.policy_ranks, args.rollout_ranks)
    check_args(args, ranks)
    if ranks.role != "policy":
        return serve(args, args.num_envs, ranks, value_head=True)
    run = Run("ppo", args, ranks)
    envs = distributed.share(args.num_envs, ranks.rank, ranks.world)
    with advice(args), closing(run.make_env(len(envs))) as env:
        policy = run.load_policy(env.interface, value_head=True)
        run.shard(policy)
        optimizer = run.optimizer(policy, {"value_head": args.value_learning_rate})
        seeds = SeedStream(args.seed, envs)
        collector = run.collector(env, policy, seeds)
        counters = run.restore(policy, optimizer, {"iteration": 0, "steps": 0, "episodes": [0] * args.num_envs})
        seeds.count = [counters["episodes"][b] for b in envs]

        for iteration in range(counters["iteration"], args.total_iterations):
            if run.evaluate(policy, env, iteration, counters["steps"]):
                collector.restart()
            run.set_learning_rates(optimizer, 1 - iteration / args.total_iterations if args.anneal else 1.0)
            with run.timed("rollout"), run.acting(policy), run.filming(collector, iteration):
                rollout = collector.steady(args.num_chunks)
            with run.timed("train"), run.updating(optimizer, env):
                policy.train()
                metrics = update(policy, optimizer, rollout, envs, args, iteration, run)
            counters["steps"] += int(distributed.total(rollout.valid.sum()))
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
