"""Evaluate policies of every kind in one environment, and compare them.

    python examples/evaluate_policy.py --env-id vlahub/RoboTwin-ClickBell --episodes 10 --num-envs 2
    python examples/evaluate_policy.py --checkpoint robbyant/lingbot-vla-4b      # or a folder, or a bundled "vlahub/..." id

A policy is a checkpoint, the words "expert" and "random", or any function from a batched observation to actions [B, T, D].
"""

import numpy as np
import tyro

import vlahub
from vlahub.catalog import make_simulation


def hold_still(observation: dict) -> np.ndarray:
    """The lower bound that every policy must beat: the robot's own joint positions as its targets, four times over."""
    return np.repeat(observation["states"][:, None], 4, axis=1)  # [B, D] -> [B, T = 4, D]


def main(env_id: str = "vlahub/RoboTwin-ClickBell", checkpoint: str = "", episodes: int = 10, num_envs: int = 2, out: str = "runs/example") -> None:
    simulation = make_simulation(env_id)
    interface = simulation.interface
    simulation.close()
    print(f"{env_id}: cameras {', '.join(interface.cameras)}; state of {interface.state_dim}, action of {interface.action_dim} numbers")

    policies = {"expert": "expert", "random": "random"}
    if interface.state_dim == interface.action_dim:
        policies["hold_still"] = hold_still
    if checkpoint:
        policies["checkpoint"] = vlahub.Policy.from_pretrained(checkpoint)

    for name, policy in policies.items():
        # the same seed gives every policy the same episodes; run again after Ctrl-C to go on
        results = vlahub.evaluate(env_id, policy, episodes=episodes, num_envs=num_envs, seed=0, out=f"{out}/{name}", videos=1)
        print(results)


if __name__ == "__main__":
    tyro.cli(main)
