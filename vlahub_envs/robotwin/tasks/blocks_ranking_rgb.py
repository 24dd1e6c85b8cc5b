"""Line up three cubes in front of the robot: red, green, blue from left to right."""

from __future__ import annotations

import itertools

from vlahub_envs.robotwin.assets import DOWN, box
from vlahub_envs.robotwin.instructions import Sentences, every
from vlahub_envs.robotwin.kinematics import pose
from vlahub_envs.robotwin.task import Task, both_open, side_of
from vlahub_envs.robotwin.tasks.stack_blocks_two import COLOURS, draw_cubes


class BlocksRankingRGB(Task):
    step_limit = 1200
    objects = {}
    sentences = Sentences(
        seen=(
            *every(
                ("Arrange", "Line up", "Order", "Put", "Place", "Sort"),
                ("{A}, {B} and {C}", "the three cubes as {A}, {B}, {C}"),
                ("from left to right.", "in a row, left to right.", "from left to right with {a}, {b} and {c} in turn."),
            ),
            *every(
                ("{A} goes to the left, {B} to the middle, {C} to the right", "Put {A} left of {B}, and {C} right of {B}", "Make a row: {A}, {B}, {C}"),
                (".", "using {a}, {b} and {c} in turn.", "in front of the robot.", "with small gaps between them."),
            ),
            "Take {A} with {a}, {B} with {b}, {C} with {c}, and set them side by side in this order.",
            "The row of cubes must read {A}, {B}, {C}.",
        ),
        unseen=(
            *every(("Rank", "Set out", "Lay out"), ("{A}, {B}, {C}",), ("from the left to the right.", "side by side, beginning at the left.")),
            "Between {A} on the left and {C} on the right, place {B}.",
            "Let {a} move {A} to the left end, {b} move {B} to the middle and {c} move {C} to the right end.",
            "Form a line that starts with {A}, goes on with {B} and ends with {C}.",
            "Left {A}, middle {B}, right {C}.",
        ),
    )

    def place(self, scene, draws):
        poses = draw_cubes(draws, len(COLOURS), z=0.765, clear=0.1)
        while in_order([where.p for where in poses], 0.12):
            poses = draw_cubes(draws, len(COLOURS), z=0.765, clear=0.1)
        half = draws.uniform(0.015, 0.025)
        self.cubes = [scene.add(colour, box((half, half, half), COLOURS[colour]), where) for colour, where in zip(COLOURS, poses, strict=True)]
        self.arms = [side_of(where.p) for where in poses]
        y = draws.uniform(-0.2, -0.1)
        self.targets = [pose((draws.uniform(*x), y, 0.74 + scene.lowered), DOWN) for x in ((-0.09, -0.08), (-0.01, 0.01), (0.08, 0.09))]  # the expert's
        self.keep_free = tuple((*target[:2, 3], 0.05) for target in self.targets)
        return {letter: f"the {colour} block" for letter, colour in zip("ABC", COLOURS, strict=True)} | dict(zip("abc", self.arms, strict=True))

    def solved(self, scene):
        return both_open(scene) and in_order([cube.position for cube in self.cubes], 0.13)

    def expert(self, scene, hands):
        last = None
        for cube, arm, target in zip(self.cubes, self.arms, self.targets, strict=True):
            yield from hands.grasp(arm, cube, range(4), pre=0.09, home=[last] if last not in (None, arm) else [])
            yield hands.lift(arm, 0.07)
            yield from hands.place(arm, cube, target, pre=0.09, dis=0.01)
            yield hands.back(arm, 0.07)
            last = arm


def in_order(positions, apart: float) -> bool:
    """Do they stand in a row from left to right, each less than `apart` metres right of the one before?"""
    return all(0 < b[0] - a[0] < apart and abs(b[1] - a[1]) < 0.03 for a, b in itertools.pairwise(positions))
