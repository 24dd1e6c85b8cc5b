"""Aloha's joint conventions and those that pi0 was pre-trained in: some joints turn the other way, and grippers are measured as an angle instead of an opening.

openpi calls this `adapt_to_pi`. Vectors are [..., 14]: left 6 joints, left gripper, right 6 joints, right gripper.
"""

import torch

SIGNS = (1, -1, -1, 1, 1, 1, 1) * 2
GRIPPERS = [6, 13]
OPENING = (0.01844, 0.05800)  # metres, closed and open, of Aloha's gripper
ARM, HORN = 0.036, 0.022  # metres: the linkage that turns the servo's angle into an opening
ANGLE = (0.5476, 1.6296)  # radians of the pre-training data's grippers: encoder counts 2405 to 3110 of 4096, from a zero of 2048
COMMAND = (-0.6213, 1.4910)  # radians, open and closed, of Aloha's gripper command


def state_to_pi(state: torch.Tensor) -> torch.Tensor:
    state = state * state.new_tensor(SIGNS)
    opening = OPENING[0] + state[..., GRIPPERS] * (OPENING[1] - OPENING[0])
    angle = torch.arcsin(((HORN**2 + opening**2 - ARM**2) / (2 * HORN * opening)).clamp(-1, 1))
    return _with_grippers(state, (angle - ANGLE[0]) / (ANGLE[1] - ANGLE[0]))


def actions_to_pi(actions: torch.Tensor) -> torch.Tensor:
    """The inverse of `actions_from_pi`."""
    actions = actions * actions.new_tensor(SIGNS)
    return _with_grippers(actions, COMMAND[0] + actions[..., GRIPPERS] * (COMMAND[1] - COMMAND[0]) - ANGLE[0])


def actions_from_pi(actions: torch.Tensor) -> torch.Tensor:
    actions = actions * actions.new_tensor(SIGNS)
    return _with_grippers(actions, (actions[..., GRIPPERS] + ANGLE[0] - COMMAND[0]) / (COMMAND[1] - COMMAND[0]))


def _with_grippers(vector: torch.Tensor, grippers: torch.Tensor) -> torch.Tensor:
    return vector.index_copy(-1, torch.tensor(GRIPPERS, device=vector.device), grippers.to(vector.dtype))
