"""Instructions: templates with placeholders, filled with an object's description and an arm.

`{A}`, `{B}` stand for objects, `{a}`, `{b}` for arms. Each task has sentences, and each object descriptions, in two sets: "seen" for training, "unseen" held
out. One switch selects both. The sentences are this package's own; upstream's are not shipped.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

InstructionSet = Literal["seen", "unseen"]


@dataclass(frozen=True)
class Sentences:
    """Templates of one task."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...]

    def fitting(self, which: InstructionSet, stands_for: Mapping[str, str]) -> list[str]:
        """The templates that use every placeholder of the episode, or every one except all the arms."""
        everything = set(stands_for)
        allowed = (everything, {letter for letter in everything if letter.isupper()})
        return [template for template in getattr(self, which) if placeholders(template) in allowed]


# object -> descriptions, which follow "the"
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "050_bell": {
        "seen": (
            "bell",
            "desk bell",
            "call bell",
            "service bell",
            "counter bell",
            "round bell",
            "small metal bell",
            "brass-coloured bell",
            "reception bell with a button on top",
            "dome-shaped bell",
            "bell on a dark base",
            "shiny bell on the table",
        ),
        "unseen": ("hotel bell", "little golden bell", "push bell with a flat base"),
    },
}


def placeholders(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def instruction(sentences: Sentences, which: InstructionSet, stands_for: Mapping[str, str], seed: int) -> str:
    """One sentence for an episode, drawn by its seed. `stands_for`: {"A": "050_bell/base0", "a": "left"}."""
    random = np.random.default_rng([seed, 14])  # apart from the layout's generator, whose order of draws is upstream's
    templates = sentences.fitting(which, stands_for)
    template = templates[random.integers(len(templates))]
    words = {}
    for letter, value in stands_for.items():
        if letter.isupper():
            known = WORDS[value.split("/")[0]][which]
            words[letter] = f"the {known[random.integers(len(known))]}"
        else:
            words[letter] = f"the {value} arm"
    return template.format(**words)
