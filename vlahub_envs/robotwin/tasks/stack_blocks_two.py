"""Stack the green cube on the red one."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.assets import DOWN, box
from vlahub_envs.robotwin.instructions import Sentences, every
from vlahub_envs.robotwin.kinematics import pose
from vlahub_envs.robotwin.task import Task, both_open, planar, side_of

HALF = 0.025
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}


class StackBlocksTwo(Task):
    step_limit = 800
    objects = {}
    colours = ("red", "green")  # from the bottom up
    keep_free = ((0, -0.13, 0.05),)  # where the stack is built
    near = np.array([0.025, 0.025, 0.012])  # m: how far a cube may be from its place on the one below
    sentences = Sentences(
        seen=(
            *every(
                ("Put", "Stack", "Place", "Set"),
                ("{B} on {A}", "{B} on top of {A}", "{B} right above {A}"),
                (".", "with {b}, once {a} has brought {A} to the middle.", "after moving {A} to the middle."),
            ),
            "Use {a} for {A} and {b} for {B}, and build a stack of the two.",
            "Build a stack: {A} below, {B} on it.",
            "Make a tower with {A} at the bottom and {B} at the top.",
            "{A} goes to the middle first, then {B} goes on it.",
            "Take {A} with {a}, set it down in the middle, and stack {B} on it with {b}.",
            "Let {b} put {B} onto {A}, which {a} moves to the middle.",
            "Move {A} to the middle and pile {B} on it.",
            "Pick up {B} and lay it on {A}.",
        ),
        unseen=(
            *every(("Pile", "Lay"), ("{B} onto {A}", "{B} over {A}"), (".", "with {b}, after {a} has moved {A}.")),
            "Let the two cubes form a column, {B} above {A}.",
            "With {a} centre {A}; with {b} top it with {B}.",
        ),
    )

    def place(self, scene, draws):
        poses = draw_cubes(draws, len(self.colours), z=0.741 + HALF, clear=0.15)
        for colour, where in zip(self.colours, poses, strict=True):
            scene.add(colour, box((HALF, HALF, HALF), COLOURS[colour]), where)
        self.cubes = [scene.things[colour] for colour in self.colours]
        self.arms = [side_of(where.p) for where in poses]
        objects = {letter: f"the {colour} block" for letter, colour in zip("ABC", self.colours, strict=False)}
        return objects | dict(zip("abc", self.arms, strict=False))

    def solved(self, scene):
        if not both_open(scene):
            return False
        steps = np.diff([cube.position for cube in self.cubes], axis=0)
        return bool((np.abs(steps - (0, 0, 2 * HALF)) < self.near).all())

    def expert(self, scene, hands):
        target, last = pose((0, -0.13, 0.75 + scene.lowered), DOWN), None
        for cube, arm in zip(self.cubes, self.arms, strict=True):
            yield from hands.grasp(arm, cube, range(4), pre=0.09, home=[last] if last not in (None, arm) else [])
            yield hands.lift(arm, 0.07)
            yield from hands.place(arm, cube, target, pre=0.05, dis=0.0)
            yield hands.lift(arm, 0.07)
            target, last = cube.point("functional", 1), arm


def draw_cubes(draws, count, z, clear):
    """Poses of cubes that lie apart from each other and `clear` metres away from where they are to go."""
    poses = []
    while len(poses) < count:
        where = draws.place(
            x=(-0.28, 0.28),
            y=(-0.08, 0.05),
            z=z,
            base=Rotation.identity(),
            turn=(0, 0, 0.75),
            near_in_the_middle=True,
            redraw_while=lambda p: abs(p[0]) < 0.05 or planar(p, (0, -0.1)) < clear or any(planar(p, other.p) < 0.1 for other in poses),
        )
        poses.append(where)
    return poses
