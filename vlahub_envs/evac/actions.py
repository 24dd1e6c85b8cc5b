"""The action converter: a policy's relative action and the present end-effector pose -> the next pose."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

POSE = 8  # xyz, quaternion xyzw, gripper


class ActionConverter(nn.Module):
    """A small MLP that predicts the next absolute pose. `abs_action_mean` and `abs_action_std` are the poses' statistics, stored beside the published weights.

    With `motion`, which the published converter has not, the network is also given the last change of the pose and predicts the next one: an arm has momentum, and
    a small network is bad at returning a pose that it was given. Changes are in units of `motion_std`."""

    def __init__(self, action_dim: int = 7, hidden: tuple[int, ...] = (64, 64), motion: bool = False):
        super().__init__()
        self.motion = motion
        widths = [action_dim + POSE * (2 if motion else 1), *hidden, POSE]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.network = nn.Sequential(*layers[:-1])
        self.register_buffer("abs_action_mean", torch.zeros(1, POSE))
        self.register_buffer("abs_action_std", torch.ones(1, POSE))
        if motion:
            self.register_buffer("motion_std", torch.ones(1, POSE))

    def raw(self, action: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
        """The network alone: actions [b, 7] and normalised poses [b, 8] -> normalised next poses [b, 8]."""
        return self.network(torch.cat([action, pose], dim=-1))

    def forward(self, action: torch.Tensor, pose: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        """Actions [b, 7] and poses [b, 8] in metres -> next poses [b, 8]. `last` [b, 8]: the last change of each pose, where the converter has `motion`; None: at rest.
        The quaternion is normalised with `motion` only; whoever turns it into a rotation does that."""
        if self.motion:
            last = torch.zeros_like(pose) if last is None else last
            given = [action, (pose - self.abs_action_mean) / self.abs_action_std, last / self.motion_std]
            reached = pose + self.network(torch.cat(given, dim=-1)) * self.motion_std
            return torch.cat([reached[:, :3], F.normalize(reached[:, 3:7], dim=-1), reached[:, 7:]], dim=-1)
        return self.raw(action, (pose - self.abs_action_mean) / self.abs_action_std) * self.abs_action_std + self.abs_action_mean

    def chain(self, actions: torch.Tensor, pose: torch.Tensor, normalised: bool = True, last: torch.Tensor | None = None) -> torch.Tensor:
        """Actions [b, n, 7] from pose [b, 8] -> the pose after each of them, [b, n, 8]. `normalised=False` feeds poses to the bare network."""
        if self.motion and not normalised:
            raise ValueError("the published loop feeds its action converter bare poses; this one also takes the last motion, so it cannot run in that loop")
        poses = []
        for action in actions.unbind(dim=1):
            reached = self(action, pose, last) if normalised else self.raw(action, pose)
            last, pose = reached - pose, reached
            poses.append(pose)
        return torch.stack(poses, dim=1)
