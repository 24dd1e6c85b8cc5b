"""Fine-tune a policy on a small dataset of demonstrations, and look at what it learnt.

python examples/finetune.py                                                  # a tiny pi0 on 100 recorded episodes; two minutes on two CPU cores
python examples/finetune.py --dataset my/demos --checkpoint lerobot/pi05_base --robot libero --device cuda --learning-rate 1e-4

A dataset is a folder in LeRobot's format, v2.1 or v3.0; without one, the scripted expert of examples/add_your_own_env.py records some. This is the whole loop;
baselines/sft.py adds what long runs need (several GPUs, resuming, warm-up, evaluation in the environment, an average of the weights).
"""

from pathlib import Path

import numpy as np
import torch
import tyro

import vlahub
from vlahub.dataset import Dataset, Loader, collate
from vlahub.record import record
from vlahub_policies.pi0 import Pi0Policy


def main(
    dataset: str = "",
    checkpoint: str = "",
    robot: str = "",
    out: str = "outputs/finetuned",
    episodes: int = 100,
    steps: int = 300,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    device: str = "cpu",
) -> None:
    """
    Args:
        dataset: Folder of demonstrations; empty to record some first.
        checkpoint: Folder or hub id of a pi0 or pi0.5; empty for a tiny one with fresh weights.
        robot: libero, robotwin or twin, where the checkpoint does not say.
        out: Folder for the demonstrations (demos) and the fine-tuned policy (policy).
        episodes: How many are recorded where no dataset is given.
        steps: Optimizer steps.
        batch_size: Frames per step.
        learning_rate: Of AdamW. Published weights want a smaller one, 1e-4 for adapters.
        device: cpu or cuda.
    """
    if not dataset:
        dataset = f"{out}/demos"
        print(record("examples.add_your_own_env:my/Reach", "expert", episodes, dataset, progress=False))

    # Every tenth episode is left out of training, to see what holds beyond it.
    every = [entry.index for entry in Dataset(dataset).episodes]
    if checkpoint:  # adapters in the action expert train, and the small layers around it; what is frozen needs neither gradients nor optimizer state
        options = {"robot": robot} if robot else {}
        policy = vlahub.Policy.from_pretrained(checkpoint, device=device, statistics="identity", relative=(), lora_rank=16, **options)
    else:
        policy = Pi0Policy.tiny(Dataset(dataset).interface).to(device)
    train, held_out = (
        Dataset(dataset, policy.horizon, episodes=part) for part in ([index for index in every if index not in every[9::10]], every[9::10] or every[-1:])
    )
    policy.set_statistics(train.statistics)  # what one unit of state and action is, to the network
    frames = collate([held_out[frame] for frame in range(len(held_out))])
    scale = np.array(train.statistics["actions"]["std"])
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    print(f"{sum(parameter.numel() for parameter in trained):,} of {sum(parameter.numel() for parameter in policy.parameters()):,} parameters train")
    print(f"{len(train)} frames to train on; error on episodes left out: {error_of(policy, frames, scale):.2f} standard deviations of an action")

    optimizer = torch.optim.AdamW(trained, learning_rate)
    loader, losses = Loader([train], batch_size), []
    policy.train()
    for step, batch in zip(range(steps), loader, strict=False):
        seeds = torch.tensor([[0, step * batch_size + row] for row in range(batch_size)])  # of the noise that the flow is trained on
        loss = policy.sft_loss(batch, seeds)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % max(1, steps // 10) == 0:
            print(f"step {step + 1}: loss {np.mean(losses[-max(1, steps // 10) :]):.3f}", flush=True)

    print(f"error on episodes left out: {error_of(policy.eval(), frames, scale):.2f} standard deviations of an action")
    policy.save_pretrained(f"{out}/policy")
    again = vlahub.Policy.from_pretrained(Path(out) / "policy", device=device)
    print(f"saved in {out}/policy; it loads as {type(again).__name__}")


def error_of(policy: vlahub.Policy, frames: dict, scale: np.ndarray) -> float:
    """Mean distance between the actions that a policy would run before it looks again and those of the demonstration."""
    observation = {key: value for key, value in frames.items() if key not in ("actions", "action_is_pad")}
    seeds = [(0, frame) for frame in range(len(frames["actions"]))]
    run = slice(0, policy.execute)
    real = ~frames["action_is_pad"][:, run]
    wrong = np.abs(policy.act(observation, seeds)[:, run] - frames["actions"][:, run]) / scale  # [B, T, D]
    return float(wrong[real].mean())


if __name__ == "__main__":
    tyro.cli(main)
