"""Instructions: templates with placeholders, filled with an object's description and an arm.

`{A}`, `{B}` stand for objects, `{a}`, `{b}` for arms. Each task has sentences, and each object descriptions, in two sets: "seen" for training, "unseen" held
out. One switch selects both. The sentences are this package's own; upstream's are not shipped.
"""

from __future__ import annotations

import itertools
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
    "001_bottle": {
        "seen": (
            "bottle",
            "drink bottle",
            "blue bottle",
            "bottle with a red cap",
            "plastic bottle",
            "bottle with a pale label",
            "bottle with a narrow neck",
            "round bottle",
            "tall bottle",
            "bottle with a waist",
            "closed bottle",
            "water bottle",
        ),
        "unseen": ("lemonade bottle", "blue flask", "container with a red lid"),
    },
    "002_bowl": {
        "seen": (
            "bowl",
            "round bowl",
            "small bowl",
            "bowl with a thin wall",
            "open bowl",
            "empty bowl",
            "bowl on a flat foot",
            "dinner bowl",
            "kitchen bowl",
            "shallow bowl",
            "soup bowl",
            "bowl on the table",
        ),
        "unseen": ("cereal bowl", "wide dish with a rim", "little round basin"),
    },
    "003_plate": {
        "seen": (
            "plate",
            "round plate",
            "white plate",
            "flat plate",
            "dinner plate",
            "large plate",
            "pale plate",
            "plate with a rim",
            "empty plate",
            "plate on the table",
            "light-coloured plate",
            "smooth plate",
        ),
        "unseen": ("big white dish", "serving plate", "round pale dish"),
    },
    "019_coaster": {
        "seen": (
            "coaster",
            "round coaster",
            "brown coaster",
            "flat coaster",
            "disc-shaped coaster",
            "coaster for cups",
            "thin coaster",
            "wooden coaster",
            "drink coaster",
            "round brown mat",
            "coaster on the table",
            "flat round mat",
        ),
        "unseen": ("cup mat", "brown disc", "mat for drinks"),
    },
    "020_hammer": {
        "seen": (
            "hammer",
            "hammer with a yellow handle",
            "hammer with a grey head",
            "metal-headed hammer",
            "tool with a heavy head",
            "hammer in the middle of the table",
            "hand hammer",
            "straight hammer",
            "hammer lying on the table",
            "carpenter's hammer",
            "hammer with a long handle",
            "steel hammer",
        ),
        "unseen": ("nail hammer", "striking tool", "hammer with a square head"),
    },
    "021_cup": {
        "seen": (
            "cup",
            "round cup",
            "empty cup",
            "cup without a lid",
            "drinking cup",
            "open cup",
            "upright cup",
            "small cup",
            "reddish cup",
            "cup with a thin wall",
            "tea cup",
            "cup on the table",
        ),
        "unseen": ("beaker", "drinking vessel", "little mug without a handle"),
    },
    "041_shoe": {
        "seen": (
            "shoe",
            "dark shoe",
            "single shoe",
            "shoe with a white sole",
            "shoe with a brown toe",
            "flat shoe",
            "lace-up shoe",
            "walking shoe",
            "trainer",
            "sports shoe",
            "low shoe",
            "shoe on the table",
        ),
        "unseen": ("sneaker", "piece of footwear", "running shoe with a pale sole"),
    },
    "044_microwave": {
        "seen": (
            "microwave",
            "microwave oven",
            "pale microwave",
            "microwave with a dark door",
            "small microwave",
            "kitchen microwave",
            "closed microwave",
            "box-shaped oven",
            "oven with a bar handle",
            "microwave on the far side",
            "countertop microwave",
            "white oven with a dark door",
        ),
        "unseen": ("food heater", "cooker with a hinged door", "appliance with a black front"),
    },
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
    "056_switch": {
        "seen": (
            "switch",
            "light switch",
            "rocker switch",
            "wall switch",
            "switch with a blue rocker",
            "white switch",
            "plate with a rocker",
            "electric switch",
            "floating switch",
            "square switch",
            "switch in the air",
            "button switch",
        ),
        "unseen": ("lamp control", "toggle on a white plate", "flip control"),
    },
    "060_kitchenpot": {
        "seen": (
            "pot",
            "kitchen pot",
            "cooking pot",
            "steel pot",
            "pot with two handles",
            "round pot",
            "pot with a lid",
            "grey pot",
            "covered pot",
            "metal pot",
            "soup pot",
            "pot in the middle of the table",
        ),
        "unseen": ("stew pan", "cauldron with dark handles", "lidded saucepan"),
    },
    "105_sauce-can": {
        "seen": (
            "can",
            "sauce can",
            "red can",
            "can with a grey foot",
            "tin",
            "round tin",
            "food can",
            "upright can",
            "can of sauce",
            "small can",
            "red tin",
            "metal can",
        ),
        "unseen": ("preserve tin", "cylinder of sauce", "canister"),
    },
}


def every(*parts: tuple[str, ...]) -> tuple[str, ...]:
    """Every sentence that takes one phrase from each part in turn."""
    return tuple(" ".join(phrases).replace(" .", ".") for phrases in itertools.product(*parts))


def placeholders(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def instruction(sentences: Sentences, which: InstructionSet, stands_for: Mapping[str, str], seed: int) -> str:
    """One sentence for an episode, drawn by its seed. `stands_for`: {"A": "050_bell/base0", "a": "left"}; an object without a model's number, "the red cube", is put in as it is."""
    random = np.random.default_rng([seed, 14])  # apart from the layout's generator, whose order of draws is upstream's
    templates = sentences.fitting(which, stands_for)
    template = templates[random.integers(len(templates))]
    words = {}
    for letter, value in stands_for.items():
        if letter.isupper() and "/" not in value:
            words[letter] = value
        elif letter.isupper():
            known = WORDS[value.split("/")[0]][which]
            words[letter] = f"the {known[random.integers(len(known))]}"
        else:
            words[letter] = f"the {value} arm"
    return template.format(**words)
