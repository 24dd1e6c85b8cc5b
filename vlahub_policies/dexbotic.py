"""Dexbotic's pi0: the network of `pi0.py` under other tensor names, with other image, state and action preparation.

| what               | openpi's pi0                            | Dexbotic's                                                        |
|--------------------|-----------------------------------------|-------------------------------------------------------------------|
| pictures           | resized bilinearly, then padded         | padded to a square, then resized bicubically                      |
| states and actions | normalised, then padded to 32           | padded to 32, then normalised                                     |
| LIBERO actions     | dimensions 0-5 relative to the state    | all but the gripper relative, padded ones too: they become -state |
| statistics         | `actions`; q01, q99                     | `action`; the quantiles stand under `min` and `max`               |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vlahub.hub import CheckpointError
from vlahub_policies.pi0 import Pi0Config, Pi0Policy

# published name -> the name in pi0.py; the first prefix that fits wins
RENAMED = (
    ("model.llm.embed_tokens.", "paligemma_with_expert.paligemma.lm_head."),
    ("model.llm.", "paligemma_with_expert.paligemma.model.language_model."),
    ("model.mm_vision_tower.", "paligemma_with_expert.paligemma.model."),
    ("model.mm_projector.", "paligemma_with_expert.paligemma.model.multi_modal_projector.linear."),
    ("model.action_expert.", "paligemma_with_expert.gemma_expert.model."),
    ("model.", ""),  # the flow heads
    ("value_head.", "value_head.mlp.0."),  # RLinf's critic: one linear layer
)
UNUSED = ("model.action_expert.embed_tokens.weight",)  # a text embedding that the expert never reads


NOT_RELATIVE = 6  # the gripper


@dataclass(frozen=True)
class DexboticConfig(Pi0Config):
    """`Pi0Config` with Dexbotic's ways as defaults."""

    pad_first: bool = True
    relative: tuple[int, ...] = tuple(i for i in range(32) if i != NOT_RELATIVE)
    resize: Any = "dexbotic"
    value_hidden: tuple[int, ...] = ()  # RLinf's critic for this policy is one linear layer


class DexboticPolicy(Pi0Policy):
    family: ClassVar[str] = "dexbotic"
    Config: ClassVar[type] = DexboticConfig

    @staticmethod
    def rename(name: str) -> str | None:
        """A tensor's name in the published files -> its name here; None for what no forward pass reads."""
        if name in UNUSED:
            return None
        for published, ours in RENAMED:
            if name.startswith(published):
                return ours + name.removeprefix(published)
        return name

    @classmethod
    def published_entries(cls, config: Mapping[str, Any], robot: str, pi05: bool, action_dim: int) -> dict[str, Any]:
        if robot != "libero":
            raise CheckpointError(f"Dexbotic's published pi0 is trained for LIBERO and ManiSkill tables, not for {robot!r}; pass interface= and relative=")
        for key, expected in (("image_aspect_ratio", "pad"), ("mm_projector_type", "linear")):
            if config.get(key, expected) != expected:
                raise CheckpointError(f"config.json has {key} {config[key]!r}; this policy knows {expected!r}")
        entries = {
            "horizon": config.get("chunk_size", 50),
            "execute": 5,
            "max_token_len": config.get("tokenizer_model_max_length", 200 if pi05 else 48),
            "relative": tuple(i for i in range(action_dim) if i != NOT_RELATIVE),
        }
        if pi05:  # its LIBERO training uses a chunk of 10, increments as they are, and mean / std
            entries["relative"] = ()
        return entries
