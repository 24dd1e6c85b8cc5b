"""The action converter: a policy's relative action and the present end-effector pose -> the next pose."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

POSE = 8  # xyz, quaternion xyzw, gripper


class ActionConverter(nn.Module):
    """A small MLP that predicts the next absolute pose. `abs_action_mean` and `abs_action_std` are the poses' statistics, stored beside the published weights."""

    def __init__(self, action_dim: int = 7, hidden: tuple[int, ...] = (64, 64)):
        super().__init__()
        widths = [action_dim + POSE, *hidden, POSE]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.network = nn.Sequential(*layers[:-1])
        self.register_buffer("abs_action_mean", torch.zeros(1, POSE))
        self.register_buffer("abs_action_std", torch.ones(1, POSE))

    def raw(self, action: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
        """The network alone: actions [b, 7] and normalised poses [b, 8] -> normalised next poses [b, 8]."""
        return self.network(torch.cat([action, pose], dim=-1))

    def forward(self, action: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
        """Actions [b, 7] and poses [b, 8] in metres -> next poses [b, 8]. The quaternion is not normalised; whoever turns it into a rotation does that."""
        return self.raw(action, (pose - self.abs_action_mean) / self.abs_action_std) * self.abs_action_std + self.abs_action_mean

    def chain(self, actions: torch.Tensor, pose: torch.Tensor, normalised: bool = True) -> torch.Tensor:
        """Actions [b, n, 7] from pose [b, 8] -> the pose after each of them, [b, n, 8]. `normalised=False` feeds poses to the bare network."""
        poses = []
        for action in actions.unbind(dim=1):
            pose = self(action, pose) if normalised else self.raw(action, pose)
            poses.append(pose)
        return torch.stack(poses, dim=1)
