"""A policy from a published checkpoint's tensors."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from vlahub import hub
from vlahub.policy import Policy

P = TypeVar("P", bound=Policy)


def filled(
    kind: type[P], config: Any, tokenizer: Any, weights: Mapping[str, torch.Tensor], device: torch.device | str, dtype: torch.dtype, **reading: Any
) -> P:
    """Built without values and cast, then filled tensor by tensor, so that there is never a second copy. What RL and LoRA add may be missing. `reading`: of `hub.load_tensors`."""
    with torch.device("meta"):
        policy = kind(config, tokenizer)
    policy.cast(dtype)
    hub.load_tensors(policy, weights, may_miss=kind.fresh, device=device, **reading)
    return policy.to(device)  # what the checkpoint lacked stands on the CPU
