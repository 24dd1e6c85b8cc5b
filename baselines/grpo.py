"""GRPO for Vision-Language-Action policies, in one file: no critic, the other attempts at the same start are the baseline.

    python baselines/grpo.py                                                                       # offline, on a CPU, in minutes
    torchrun --nproc-per-node 8 baselines/grpo.py --env-id vlahub/LIBERO-Spatial --policy Dexmal/libero-db-pi0 --num-groups 8 --group-size 8
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 baselines/grpo.py ...     # the same line on both nodes
    python baselines/grpo.py --resume runs/NAME                                                    # go on where a run stopped

One iteration: `num_groups` x `group_size` environments run one whole episode each, `rollout_rounds` times. The episodes of a group begin in exactly the same
state and differ by exploration alone. The score of an episode is the undiscounted sum of its rewards up to and including the first end; its advantage is
(score - mean of the group) / (standard deviation of the group + 1e-6), the same for all of its decisions. Then the clipped surrogate is maximised.

How this differs from the GRPO paper and from RLinf's:
 1. The group size exists once: the environments of a group are made by it and the advantages are computed by it.
 2. The standard deviation is the unbiased one. An episode whose simulation was lost leaves its group; a group of fewer than two is dropped.
 3. Groups whose mean score is out of bounds (`min_group_score`, `max_group_score`) are dropped before the update: they cost no forward pass and are in no mean.
 4. Every trajectory weighs the same, however long: an entry weighs 1 / (entries of its trajectory).
 5. Losses are sums divided by the weight of the whole minibatch, all ranks and micro-batches together: splitting a batch changes nothing.
 6. Every minibatch takes a share of each trajectory's decisions, redrawn every epoch. So the batches do not depend on the number of ranks.
 7. The KL term is real: k3 = exp(d) - d - 1 with d = log p_reference - log p, against the frozen policy that the run started from.
"""

import copy
import dataclasses
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from vlahub import distributed
from vlahub.distributed import Ranks, print0
from vlahub.policy import Policy, Trace
from vlahub.rollout import Level, Rollout, SeedStream, reduce_log_prob
from vlahub.run import Run, advice, arguments, serve

START_SEEDS = 3  # spawn key of the seeds of starts, apart from those of exploration (1), recordings (2) and evaluations (none)


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
    """seed of starts, exploration noise, shuffles and fresh weights"""
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

    num_groups: int = 2
    """groups that run at once, all ranks together; each rank holds whole groups"""
    group_size: int = 4
    """environments that share a start; there are num_groups x group_size of them"""
    rollout_rounds: int = 1
    """episodes of each environment per iteration"""
    workers: int = 0
    """simulation processes of each rank; 0: as many as the rank's share of CPU cores"""
    execute: int = 0
    """actions of each chunk that run before the policy looks again; 0: the policy's own default"""
    max_steps: int = 0
    """control steps per episode; 0: the environment's own limit"""

    total_iterations: int = 100
    """iterations of rollout and update"""
    update_epochs: int = 2
    """passes over each iteration's decisions"""
    num_minibatches: int = 2
    """optimizer steps per pass"""
    micro_batch_size: int = 0
    """decisions per forward pass of a rank; 0: the rank's whole share of a minibatch. Smaller saves memory and changes nothing else"""
    learning_rate: float = 2e-5
    """of the policy"""
    anneal: bool = False
    """lower the learning rate linearly to zero over the run"""
    weight_decay: float = 0.0
    """of AdamW"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""

    min_group_score: float = -float("inf")
    """groups whose mean score is below this are dropped; 0.1 with rewards of 0 and 1 drops those that hardly ever succeed"""
    max_group_score: float = float("inf")
    """groups whose mean score is above this are dropped; 0.9 with rewards of 0 and 1 drops those that nearly always succeed"""
    ratio_level: Level = "chunk"
    """one probability ratio per chunk, per action or per token"""
    clip_low: float = 0.2
    """the ratio is clipped from below at 1 - clip_low"""
    clip_high: float = 0.2
    """the ratio is clipped from above at 1 + clip_high"""
    kl_coef: float = 0.0
    """weight of the KL divergence from the policy that the run started from, which is kept frozen in memory; 0: neither"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus (no effect where the exploration noise is fixed)"""
    target_kl: float = 0.1
    """stop an iteration's updates once approx_kl exceeds this; 0: never"""

    eval_every: int = 10
    """iterations between evaluations (one before the first); 0: never"""
    eval_episodes: int = 50
    """episodes of an evaluation: the same ones each time, none of which is trained on"""
    video_every: int = 0
    """iterations between films of a rollout (step and reward drawn on, in the run's folder videos); 0: none"""
    save_every: int = 10
    """iterations between checkpoints"""
    keep: int = 2
    """checkpoints kept"""
    max_skipped: int = 5
    """optimizer steps in a row that may be skipped for a loss or gradient that is not finite before the run stops"""


# ------------------------------------------------------------------------------------------------ the algorithm


def start_seeds(args: Args, iteration: int, episode_round: int, envs: range) -> list[int]:
    """The seed of each environment's episode: one per group, so that its members begin in the same state."""

    def of_group(group: int) -> int:
        sequence = np.random.SeedSequence([args.seed, iteration, episode_round, group], spawn_key=(START_SEEDS,))
        return int(sequence.generate_state(1)[0] >> 1)  # 31 bits, as vlahub.env.checked_seed wants

    return [of_group(env // args.group_size) for env in envs]


def scores(rollout: Rollout) -> torch.Tensor:
    """[B] undiscounted reward of each episode, up to and including its first end."""
    return (rollout.reward * rollout.valid).sum((0, 2))


def group_advantages(score: torch.Tensor, alive: torch.Tensor, group_size: int, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """score [B], alive [B] (not aborted) -> advantage [B], and which episodes the update uses [B]. Groups are `group_size` consecutive environments."""
    score, alive = score.double().view(-1, group_size), alive.view(-1, group_size)
    count = alive.sum(1, keepdim=True)
    mean = (score * alive).sum(1, keepdim=True) / count.clamp(min=1)
    std = (((score - mean) * alive).square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    used = alive & (count >= 2) & (mean >= low) & (mean <= high)
    advantage = (score - mean) / (std + 1e-6) * used  # 1e-6: equal scores give 0, not 0 / 0
    return advantage.flatten().float(), used.flatten()


def surrogate(log_prob: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped policy loss of each entry (to be minimised), and the ratio."""
    ratio = (log_prob - old).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)), ratio


def k3(log_prob: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) of each entry, estimated from one sample of the policy: unbiased and never negative."""
    difference = reference - log_prob
    return difference.exp() - difference - 1


def entries_of(log_prob: torch.Tensor, valid: torch.Tensor, level: Level) -> torch.Tensor:
    """[R] how many ratios each row has: 1 per chunk, or those of its actions or tokens that ran."""
    mask = reduce_log_prob(log_prob, valid, level)[1]
    return (mask if mask.ndim == 1 else mask.flatten(1).sum(1)).float()


@dataclass
class Batch:
    """The decisions that the update uses, the trajectories of all rounds behind each other. R rows; N executed actions."""

    trace: Trace  # each tensor [R, ...]
    log_prob: torch.Tensor  # [R, ...] as the policy gives it
    valid: torch.Tensor  # [R, N] bool
    advantage: torch.Tensor  # [R]
    share: torch.Tensor  # [R] weight of each entry of the row: 1 / entries of its trajectory
    trajectories: dict[tuple[int, int], torch.Tensor]  # (round, environment over all ranks) -> its rows, in time


def batch_of(rounds: list[Rollout], envs: range, args: Args) -> tuple[Batch, dict[str, float]]:
    """Drop what is filtered or lost, and give every row its advantage and weight. A collective, because the metrics are over all ranks.

    A rank that has nothing to train on keeps one row, which is in no trajectory, so that it can take part in what all ranks do together."""
    parts: list[tuple[Rollout, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    trajectories: dict[tuple[int, int], torch.Tensor] = {}
    row = 0
    advantages, chunk_rewards = [], []
    for number, rollout in enumerate(rounds):
        alive = rollout.valid.any(2).any(0)
        advantage, used = group_advantages(scores(rollout), alive, args.group_size, args.min_group_score, args.max_group_score)
        entries = rollout.grid(entries_of(rollout.log_prob, rollout.flat(rollout.valid), args.ratio_level)).sum(0)  # [B] of each trajectory
        for b in torch.nonzero(used).flatten().tolist():
            rows = rollout.row[:, b][rollout.row[:, b] >= 0]
            parts.append((rollout, rows, advantage[b].expand(len(rows)), (1 / entries[b]).expand(len(rows))))
            trajectories[number, envs[b]] = torch.arange(row, row + len(rows), device=rows.device)
            row += len(rows)
        advantages.append(advantage[used])
        chunk_rewards.append(rollout.reward.sum(2)[rollout.row >= 0])
    if not parts:
        nothing = torch.zeros(1, device=rounds[0].log_prob.device)
        parts = [(rounds[0], torch.zeros(1, dtype=torch.int64, device=nothing.device), nothing, nothing)]
    batch = Batch(
        trace={key: torch.cat([rollout.trace[key][rows] for rollout, rows, _, _ in parts]) for key in rounds[0].trace},
        log_prob=torch.cat([rollout.log_prob[rows] for rollout, rows, _, _ in parts]),
        valid=torch.cat([rollout.flat(rollout.valid)[rows] for rollout, rows, _, _ in parts]),
        advantage=torch.cat([advantage for _, _, advantage, _ in parts]),
        share=torch.cat([share for _, _, _, share in parts]),
        trajectories=trajectories,
    )
    episodes = [record for rollout in rounds for record in rollout.episodes]
    success = sum(record.success for record in episodes) / max(len(episodes), 1)
    mine = {"env/success_once": success, "rollout/success_rate": success, "rollout/episode_length": sum(e.length for e in episodes) / max(len(episodes), 1)}
    metrics = distributed.average(mine, len(episodes))
    kept = len(trajectories), len({(number, env // args.group_size) for number, env in trajectories})
    sizes = distributed.total(torch.tensor([*kept, sum(map(len, chunk_rewards))], dtype=torch.float64, device=batch.share.device))
    metrics["rollout/groups_kept"] = sizes[1].item() / (args.num_groups * args.rollout_rounds)
    if sizes[2]:
        reward = distributed.statistics(torch.cat(chunk_rewards))
        metrics |= {"rollout/reward_mean": reward.mean, "rollout/reward_std": reward.std}
    if sizes[0]:
        spread = distributed.statistics(torch.cat(advantages))
        metrics |= {f"rollout/advantages_{what}": getattr(spread, what) for what in ("mean", "std", "min", "max")}
    return batch, metrics


def minibatches(batch: Batch, args: Args, iteration: int, epoch: int) -> list[torch.Tensor]:
    """Rows of each minibatch: every trajectory's decisions in an order of its own, dealt out from a minibatch of its own."""
    parts: list[list[torch.Tensor]] = [[] for _ in range(args.num_minibatches)]
    for (number, env), rows in batch.trajectories.items():
        rng = np.random.default_rng([args.seed, iteration, epoch, number, env])
        order = rows[torch.from_numpy(rng.permutation(len(rows))).to(rows.device)]
        first = int(rng.integers(args.num_minibatches))  # otherwise the last minibatches would get nothing of short trajectories
        for i in range(args.num_minibatches):
            parts[(first + i) % args.num_minibatches].append(order[i :: args.num_minibatches])
    nothing = torch.zeros(0, dtype=torch.int64, device=batch.share.device)
    return [torch.cat([nothing, *part]) for part in parts]


def micro_batches(rows: torch.Tensor, args: Args) -> list[tuple[torch.Tensor, float]]:
    """(rows, weight) of each forward pass: as many on every rank. Where a rank has none left it repeats a row at weight 0, which adds nothing."""
    longest = max(distributed.gather([len(rows)]))
    count = -(-longest // args.micro_batch_size) if args.micro_batch_size else 1
    filler = torch.zeros(1, dtype=torch.int64, device=rows.device)
    return [(part, 1.0) if len(part) else (filler, 0.0) for part in rows.tensor_split(count)]


def check_args(args: Args, ranks: Ranks) -> None:
    """Refuse combinations that cannot be, and say how the batch is made up."""
    if args.group_size < 2:
        raise ValueError(f"group_size must be at least 2, not {args.group_size}: an episode alone has nothing to be compared with")
    for name in ("rollout_rounds", "num_minibatches", "update_epochs"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(args, name)}")
    if args.micro_batch_size < 0 or args.kl_coef < 0:
        name = "micro_batch_size" if args.micro_batch_size < 0 else "kl_coef"
        raise ValueError(f"{name} must not be negative, it is {getattr(args, name)}")
    if args.min_group_score > args.max_group_score:
        raise ValueError(f"min_group_score ({args.min_group_score}) is above max_group_score ({args.max_group_score}): no group could be kept")
    if args.num_groups < 1 or args.num_groups % ranks.world:
        below, above = args.num_groups // ranks.world * ranks.world, -(-args.num_groups // ranks.world) * ranks.world
        nearest = " or ".join(str(n) for n in sorted({below, max(above, ranks.world)}) if n)
        raise ValueError(f"num_groups ({args.num_groups}) cannot be shared by {ranks.world} ranks in whole groups; nearest that can: {nearest}")
    envs = args.num_groups * args.group_size
    print0(
        f"one iteration: {args.rollout_rounds} rounds x {args.num_groups} groups x {args.group_size} envs = {args.rollout_rounds * envs} episodes, "
        f"{args.update_epochs} epochs x {args.num_minibatches} optimizer steps on a share of each kept trajectory\n"
        f"one optimizer step: {ranks.world} ranks x {args.num_groups // ranks.world} groups, in micro-batches of "
        f"{args.micro_batch_size or 'all'} decisions"
    )


@torch.no_grad()
def reference_log_prob(reference: Policy, batch: Batch, args: Args, run: Run) -> torch.Tensor:
    """[R, ...] of the batch's decisions under the frozen policy."""
    every = torch.arange(len(batch.share), device=batch.share.device)
    out = torch.zeros_like(batch.log_prob, dtype=torch.float32)
    for part, weight in micro_batches(every, args):
        with run.autocast():
            scored = reference.evaluate({key: tensor[part] for key, tensor in batch.trace.items()}).log_prob.float()
        if weight:
            out[part] = scored
    return out


def update(policy: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer, batch: Batch, args: Args, iteration: int, run: Run) -> dict[str, float]:
    """The optimizer steps of one iteration. Returns metrics; none if no group was kept."""
    anchor = reference_log_prob(reference, batch, args, run) if reference is not None else None
    names = ("policy_loss", "entropy", "reference_kl", "approx_kl", "clip_fraction", "ratio", "grad_norm")
    totals, steps, stop = dict.fromkeys(names, 0.0), 0, False

    for epoch in range(args.update_epochs):
        for rows in minibatches(batch, args, iteration, epoch):
            weight = entries_of(batch.log_prob[rows], batch.valid[rows], args.ratio_level) * batch.share[rows]
            whole = distributed.total(weight.double().sum())  # of the minibatch, all ranks: about the number of trajectories / num_minibatches
            if not whole:
                continue
            sums = torch.zeros(6, dtype=torch.float64, device=rows.device)
            parts = micro_batches(rows, args)
            for number, (part, counts) in enumerate(parts, 1):
                with run.autocast():
                    now = policy.evaluate({key: tensor[part] for key, tensor in batch.trace.items()})
                log_prob, mask = reduce_log_prob(now.log_prob.float(), batch.valid[part], args.ratio_level)
                old, _ = reduce_log_prob(batch.log_prob[part].float(), batch.valid[part], args.ratio_level)
                entropy, _ = reduce_log_prob(now.entropy.float(), batch.valid[part], args.ratio_level)
                tail = [1] * (log_prob.ndim - 1)  # [R] -> [R, 1, ...] beside entries [R, ...]
                entry = mask * batch.share[part].view(-1, *tail) * counts / whole.float()  # weights of all entries of all ranks add up to 1
                loss, ratio = surrogate(log_prob, old, batch.advantage[part].view(-1, *tail), args.clip_low, args.clip_high)
                policy_loss, entropy_mean = (loss * entry).sum(), (entropy * entry).sum()
                kl = torch.zeros((), device=rows.device)
                if anchor is not None:
                    kl = (k3(log_prob, reduce_log_prob(anchor[part], batch.valid[part], args.ratio_level)[0]) * entry).sum()
                run.sync_gradients(policy, number == len(parts))
                # Gradients are averaged over the ranks, but the weights are those of all ranks already.
                ((policy_loss + args.kl_coef * kl - args.entropy_coef * entropy_mean) * distributed.world()).backward()
                with torch.no_grad():
                    moved = ((ratio - 1 - (log_prob - old)) * entry).sum()
                    clipped = (((ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)) * entry).sum()
                    sums += torch.stack([policy_loss, entropy_mean, kl, moved, clipped, (ratio * entry).sum()]).double()
            sums = distributed.total(sums).tolist()
            norm = run.step(optimizer, policy, sums[0] - args.entropy_coef * sums[1] + args.kl_coef * sums[2], args.max_grad_norm)
            totals = {name: totals[name] + number for name, number in zip(names, (*sums, norm), strict=True)}
            steps += 1
            stop = bool(args.target_kl) and sums[3] > args.target_kl
            if stop:
                break
        if stop:
            break

    if not steps:
        print0(f"iteration {iteration + 1}: no group was kept (all filtered or lost), so nothing is learnt from it")
        return {}
    return {f"train/actor/{name}": total / steps for name, total in totals.items() if name != "reference_kl" or reference is not None}


def main(args: Args) -> None:
    ranks = distributed.setup(None if args.device == "auto" else args.device, args.env_ranks, args.policy_ranks, args.rollout_ranks)
    check_args(args, ranks)
    num_envs = args.num_groups * args.group_size
    if ranks.role != "policy":
        return serve(args, num_envs, ranks)
    run = Run("grpo", args, ranks)
    envs = distributed.share(num_envs, ranks.rank, ranks.world)
    with advice(args), closing(run.make_env(len(envs))) as env:
        policy = run.load_policy(env.interface)
        # frozen before a checkpoint is restored: a resumed run is held to the same policy as before
        reference = copy.deepcopy(policy).eval().requires_grad_(False) if args.kl_coef else None
        run.shard(policy, reference)
        optimizer = run.optimizer(policy)
        seeds = SeedStream(args.seed, envs)
        collector = run.collector(env, policy, seeds)
        counters = run.restore(policy, optimizer, {"iteration": 0, "steps": 0, "episodes": [0] * num_envs})
        seeds.count = [counters["episodes"][b] for b in envs]

        for iteration in range(counters["iteration"], args.total_iterations):
            run.evaluate(policy, env, iteration, counters["steps"])
            fraction = 1 - iteration / args.total_iterations if args.anneal else 1.0
            run.set_learning_rates(optimizer, fraction)
            with run.timed("rollout"), run.acting(policy), run.filming(collector, iteration):
                rounds = [collector.episodes(start_seeds(args, iteration, number, envs)) for number in range(args.rollout_rounds)]
            with run.timed("train"), run.updating(optimizer, env):
                policy.train()
                batch, metrics = batch_of(rounds, envs, args)
                metrics |= {**update(policy, reference, optimizer, batch, args, iteration, run), "train/actor/lr": args.learning_rate * fraction}
            counters["steps"] += int(distributed.total(sum(rollout.valid.sum() for rollout in rounds)))
            whole = dataclasses.replace(
                rounds[0],
                episodes=[record for rollout in rounds for record in rollout.episodes],
                aborted=sum(rollout.aborted for rollout in rounds),
                seconds={what: sum(rollout.seconds[what] for rollout in rounds) for what in rounds[0].seconds},
            )
            run.log(counters["steps"], metrics, whole)
            stop = run.stopping()
            if stop or (args.save_every and (iteration + 1) % args.save_every == 0) or iteration + 1 == args.total_iterations:
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
