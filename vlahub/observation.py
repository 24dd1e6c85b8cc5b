"""The observation contract: the keys, their shapes, and what one does with a batch of them.

A single environment gives `[H, W, 3]` images and a `[D]` state; a vector environment the same with a leading batch dimension `B` and a list of `B` instructions.

| key                 | dtype   | one env                                 | batched                                    |
|---------------------|---------|-----------------------------------------|--------------------------------------------|
| `main_images`       | uint8   | `[H, W, 3]`                             | `[B, H, W, 3]`                             |
| `wrist_images`      | uint8   | `[H, W, 3]`, two wrists `[2, H, W, 3]`  | `[B, H, W, 3]`, two wrists `[B, 2, H, W, 3]` |
| `extra_view_images` | uint8   | `[V, H, W, 3]`                          | `[B, V, H, W, 3]`                          |
| `states`            | float32 | `[D]`                                   | `[B, D]`                                   |
| `task_descriptions` | str     | `str`                                   | list of `B` str                            |

`wrist_images` and `extra_view_images` are optional: an absent key is absent, never None.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

if TYPE_CHECKING:  # torch takes two seconds to import and is not needed to describe an observation
    import torch

    from vlahub.interface import Interface

Observation = dict[str, Any]

IMAGES = ("main_images", "wrist_images", "extra_view_images")
KEYS = (*IMAGES, "states", "task_descriptions")
REQUIRED = ("main_images", "states", "task_descriptions")
LONGEST_INSTRUCTION = 512


class InstructionSpace(spaces.Text):
    """A `Text` space that takes any instruction: spaces, punctuation and every language. Samples are printable ASCII."""

    def __init__(self, max_length: int = LONGEST_INSTRUCTION, seed: int | None = None):
        super().__init__(max_length=max_length, min_length=0, charset=string.ascii_letters + string.digits + " ,.'-", seed=seed)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length


def space_of(interface: Interface) -> spaces.Dict:
    """The observation space of one environment with this interface."""

    def images(views: Sequence, always_stacked: bool) -> spaces.Box:
        shape = (views[0].height, views[0].width, 3)
        return spaces.Box(0, 255, shape if len(views) == 1 and not always_stacked else (len(views), *shape), np.uint8)

    entries: dict[str, spaces.Space] = {"main_images": images([interface.main], False)}
    if interface.wrists:
        entries["wrist_images"] = images(interface.wrists, False)
    if interface.extras:
        entries["extra_view_images"] = images(interface.extras, True)
    entries["states"] = interface.state_space()
    entries["task_descriptions"] = InstructionSpace()
    return spaces.Dict(entries)


def is_batched(observation: Mapping[str, Any]) -> bool:
    return not isinstance(observation["task_descriptions"], str)


def batch_size(observation: Mapping[str, Any]) -> int:
    if not is_batched(observation):
        raise ValueError("this observation is of a single environment and has no batch size; see vlahub.observation.batched")
    return len(observation["task_descriptions"])


def validate(observation: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the key if the observation breaks the contract. Works on numpy and torch, single and batched."""
    for key in REQUIRED:
        if observation.get(key) is None:
            raise ValueError(f"observation[{key!r}] is missing; every observation has {', '.join(REQUIRED)}")
    for key, value in observation.items():
        if key not in KEYS:
            raise ValueError(f"observation[{key!r}] is not part of the contract; known keys are {', '.join(KEYS)}")
        if value is None:
            raise ValueError(f"observation[{key!r}] is None; leave an absent key out")
    texts = observation["task_descriptions"]
    if not isinstance(texts, str) and not (isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)):
        raise ValueError("observation['task_descriptions'] must be a str, or a list of str in a batch")
    batch = () if isinstance(texts, str) else (len(texts),)
    for key in (*IMAGES, "states"):
        if key not in observation:
            continue
        value, wanted = observation[key], "float32" if key == "states" else "uint8"
        if not hasattr(value, "shape"):
            raise ValueError(f"observation[{key!r}] must be a numpy array or a torch tensor, not {type(value).__name__}")
        dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
        if dtype != wanted:
            raise ValueError(f"observation[{key!r}] is {dtype}, expected {wanted}")
        if shape[: len(batch)] != batch:
            raise ValueError(f"observation[{key!r}] has shape {shape}, but there are {batch[0]} task_descriptions")
        inner = len(shape) - len(batch)
        if key == "states" and inner != 1:
            raise ValueError(f"observation['states'] has shape {shape}, expected {[*batch, 'D']}")
        if key != "states" and (shape[-1:] != (3,) or inner not in ((3,) if key == "main_images" else (3, 4))):
            raise ValueError(
                f"observation[{key!r}] has shape {shape}, expected {[*batch, 'H', 'W', 3]}"
                + ("" if key == "main_images" else " or one more dimension for views")
            )


def stack(observations: Sequence[Mapping[str, Any]]) -> Observation:
    """Observations of single environments -> one batch (numpy)."""
    keys = observations[0].keys()
    if any(observation.keys() != keys for observation in observations):
        raise ValueError(f"observations with different keys cannot be stacked: {sorted({tuple(sorted(o)) for o in observations})}")
    return {key: [o[key] for o in observations] if key == "task_descriptions" else np.stack([o[key] for o in observations]) for key in keys}


def batched(observation: Mapping[str, Any]) -> Observation:
    """The observation with a batch dimension, added (B = 1) if it is of a single environment."""
    if is_batched(observation):
        return dict(observation)
    return {key: [value] if key == "task_descriptions" else value[None] for key, value in observation.items()}


def select(observation: Mapping[str, Any], rows: Any) -> Observation:
    """Some rows of a batch: an int gives one env's observation, a slice / index array / bool mask gives a smaller batch."""
    texts = observation["task_descriptions"]
    if isinstance(rows, (int, np.integer)):
        chosen: Any = texts[rows]
    elif isinstance(rows, slice):
        chosen = list(texts[rows])
    else:
        rows = np.asarray(rows)
        chosen = [texts[i] for i in (np.flatnonzero(rows) if rows.dtype == bool else rows)]
    return {key: chosen if key == "task_descriptions" else value[rows] for key, value in observation.items()}


def concatenate(batches: Sequence[Mapping[str, Any]]) -> Observation:
    """Several batches -> one (numpy)."""
    return {
        key: [text for batch in batches for text in batch[key]] if key == "task_descriptions" else np.concatenate([batch[key] for batch in batches])
        for key in batches[0]
    }


def to_torch(observation: Mapping[str, Any], device: torch.device | str = "cpu") -> Observation:
    """Arrays -> tensors on `device` (text stays text). Always copies out of the environment's buffers."""
    import torch

    def move(value: Any) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        # torch.tensor copies, and takes read-only buffers without a warning, but no negative strides (pictures turned by slicing)
        return torch.tensor(np.ascontiguousarray(value), device=device)

    return {key: value if key == "task_descriptions" else move(value) for key, value in observation.items()}


def views(observation: Mapping[str, Any], key: str) -> Any:
    """`[B, V, H, W, 3]` of a batched observation, whether or not its single view carries the V dimension."""
    images = observation[key]
    return images[:, None] if images.ndim == 4 else images
