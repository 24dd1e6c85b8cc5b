"""vlahub: robot environments and Vision-Language-Action policies behind one set of contracts.

    import gymnasium as gym, vlahub

    env = gym.make("vlahub/RoboTwin-ClickBell")
    policy = vlahub.Policy.from_pretrained("robbyant/lingbot-vla-4b")

Importing the package registers every environment id with Gymnasium and imports no simulator, no model and no torch.
"""

import importlib
from typing import Any

from vlahub.catalog import EnvCard, FamilyCard, PolicyCard, UnknownId, register_env, register_family, register_policy
from vlahub.env import ChunkResult, Env
from vlahub.interface import Camera, Field, Interface, InterfaceError, check
from vlahub.simulation import Outcomes, Simulation

__version__ = "0.1.0"

# Imported on first use: torch alone costs two seconds.
_LAZY = {"Policy": "vlahub.policy", "VectorEnv": "vlahub.vector", "evaluate": "vlahub.evaluation"}

__all__ = [
    "Camera", "ChunkResult", "Env", "EnvCard", "FamilyCard", "Field", "Interface", "InterfaceError", "Outcomes", "PolicyCard", "Simulation", "UnknownId",
    "check", "register_env", "register_family", "register_policy", *_LAZY,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vlahub' has no attribute {name!r}")


# The families that ship with vlahub register themselves; these imports bring cards only.
importlib.import_module("vlahub_envs")
importlib.import_module("vlahub_policies")
