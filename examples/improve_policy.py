"""Reinforcement learning that one can wait for: a small trained policy whose arms are miscalibrated, five minutes of PPO on two CPU cores, success before and after.

    python examples/improve_policy.py                     # about 7 minutes on 2 cores; everything goes to outputs/demo
    python examples/improve_policy.py --offset 0          # the bundled policy as it is

The bundled policy presses the bell of vlahub/RoboTwin-ClickBell. Here every target of its shoulders is off by `offset`, as on a robot whose encoders were mounted
carelessly: an error that is the same everywhere. PPO tries small deviations, sees the reward of 0 or 1 at the end of each episode and nothing else, and moves the last layer.
"""

import dataclasses
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

import vlahub

SHOULDERS = (1, 8)  # of the 14 numbers of an action: 6 joints and a gripper for the left arm, then for the right
ENV = "vlahub/RoboTwin-ClickBell"
OPTIONS = {"denoising_steps": 4, "num_steps": 4}  # evaluated on the grid that is trained


def miscalibrated(name: str, offset: float, folder: Path) -> Path:
    """A copy of a policy whose shoulder targets are all `offset` rad too high."""
    policy = vlahub.Policy.from_pretrained(name, dtype=torch.float32)
    joints = policy.config.joints
    actions = joints.statistics.actions
    mean = [value + offset * (i in SHOULDERS) for i, value in enumerate(actions.mean)]
    statistics = dataclasses.replace(joints.statistics, actions=dataclasses.replace(actions, mean=tuple(mean)))
    policy.config = dataclasses.replace(policy.config, joints=dataclasses.replace(joints, statistics=statistics))
    return policy.save_pretrained(folder)
