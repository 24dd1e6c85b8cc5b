"""Stack three cubes: red below, green, blue on top."""

from vlahub_envs.robotwin.instructions import Sentences, every
from vlahub_envs.robotwin.tasks.stack_blocks_two import StackBlocksTwo


class StackBlocksThree(StackBlocksTwo):
    step_limit = 1200
    colours = ("red", "green", "blue")
    sentences = Sentences(
        seen=(
            *every(
                ("Build a tower of", "Stack", "Make a column of"),
                ("{A}, {B} and {C}", "the three cubes, {A}, {B}, {C}"),
                ("from the bottom to the top.", "in this order, the first at the bottom.", "with {a}, {b} and {c} in turn, the first at the bottom."),
            ),
            *every(
                ("Put {B} on {A}, then {C} on {B}", "Move {A} to the middle, {B} on it, and {C} on top", "Set {A} down first, {B} above it, {C} above that"),
                (".", "using {a}, {b} and {c} in turn.", "so that a tower stands in the middle."),
            ),
            "{C} belongs on {B}, and {B} on {A}.",
            "Take {A} with {a}, {B} with {b} and {C} with {c}, and pile them up in that order.",
            "Pile up {A}, {B} and {C}, in the middle of the table.",
        ),
        unseen=(
            *every(
                ("Heap up {A}, then {B}, then {C}", "Raise a tower: {A}, above it {B}, above that {C}"),
                (".", "in the middle.", "with {a}, {b} and {c} in turn."),
            ),
            "Crown {A} with {B}, and {B} with {C}.",
            "The column must read {A}, {B}, {C} from below.",
            "Begin with {A}, go on with {B}, finish with {C}, each on the one before.",
            "Let {a} place {A}, {b} place {B} on it, and {c} place {C} on that.",
        ),
    )
