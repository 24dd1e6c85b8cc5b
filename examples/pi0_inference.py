"""Ask a pi0 policy for a chunk of actions, and look at what it says.

python examples/pi0_inference.py                                          # a tiny policy with random weights
python examples/pi0_inference.py --checkpoint Dexmal/libero-db-pi0 --device cuda
python examples/pi0_inference.py --checkpoint path/to/openpi/checkpoint --robot libero
"""

import time

import numpy as np
import torch
import tyro

import vlahub
from vlahub_policies.parts import robots
from vlahub_policies.pi0 import Pi0Policy


def main(checkpoint: str = "", robot: str = "", device: str = "cpu", instruction: str = "pick up the black bowl and place it on the plate") -> None:
    """
    Args:
        checkpoint: Folder or hub id; empty for a tiny policy with random weights.
        robot: libero, robotwin or twin, where the checkpoint does not say.
        device: cpu or cuda.
        instruction: What the robot is asked to do.
    """
    if checkpoint:
        policy = vlahub.Policy.from_pretrained(checkpoint, device=device, **({"robot": robot} if robot else {}))
    else:
        policy = Pi0Policy.tiny(robots.LIBERO).to(device).eval()
    interface = policy.interface
    print(f"{sum(parameter.numel() for parameter in policy.parameters()):,} parameters; cameras {', '.join(interface.cameras)}")
    print(f"state: {', '.join(f'{field.name}[{field.size}]' for field in interface.state) or 'none'}")
    print(f"action: {', '.join(f'{field.name}[{field.size}]' for field in interface.action)}")

    # An environment gives such a dictionary; any image size will do.
    picture = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    observation = {"main_images": picture, "states": np.zeros(interface.state_dim, np.float32), "task_descriptions": instruction}
    if interface.wrists:
        observation["wrist_images"] = picture if len(interface.wrists) == 1 else np.stack([picture] * len(interface.wrists))

    for attempt in range(3):  # the first call prepares kernels and graphs
        start = time.perf_counter()
        chunk = policy.act(observation, seeds=[(0, attempt)])  # [T, D]; noise is a function of (episode seed, control step)
        print(f"chunk {chunk.shape} in {1e3 * (time.perf_counter() - start):.1f} ms, of which {policy.execute} actions run before the next look")
    print("first action:", np.array2string(chunk[0], precision=3))

    batch = vlahub.observation.stack([observation] * 4)
    sample = policy.sample(batch, torch.tensor([[episode, 0] for episode in range(4)]))  # a rollout's decisions explore ...
    evaluation = policy.evaluate(sample.trace)  # ... and are scored again in training
    print(f"log-probabilities {tuple(sample.log_prob.shape)}, repeated to {float((evaluation.log_prob - sample.log_prob).detach().abs().max()):.0e}")


if __name__ == "__main__":
    tyro.cli(main)
