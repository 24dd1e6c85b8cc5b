"""Lift a pot by its two handles."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.instructions import Sentences, every
from vlahub_envs.robotwin.robot import SIDES
from vlahub_envs.robotwin.task import Task


class LiftPot(Task):
    step_limit = 400
    objects = {"060_kitchenpot": (0, 1)}
    high, near, upright = 0.82, 0.03, 0.8  # m: how high the pot's origin must get, and how near to its handle each hand must be; cosine of the pot's tilt
    sentences = Sentences(
        seen=(
            *every(
                ("Lift {A}", "Raise {A}", "Pick up {A}", "Hoist {A}", "Take {A} up", "Hold {A} up"),
                (
                    "with both arms.",
                    "by its two handles.",
                    "with two hands, one at each handle.",
                    "off the table with both grippers.",
                    "straight up, level, with both hands.",
                ),
            ),
            *every(
                ("Grasp {A} at both handles", "Hold {A} on both sides", "Take both handles of {A}"),
                ("and lift.", "and lift it off the table.", "and raise it.", "and bring it up."),
            ),
            "Use both arms to lift {A}.",
            "Use the two grippers together to raise {A}.",
            "Let both arms pick {A} up at the same time.",
            "With one hand at each handle, lift {A}.",
            "{A} has two handles: lift it by them.",
            "Get {A} off the table without tilting it.",
            "Bring {A} up with both hands at once.",
            "Let the left arm and the right arm raise {A} together.",
        ),
        unseen=(
            *every(("Elevate {A}", "Heave {A} up"), ("using both grippers.", "by the grips at its sides.", "keeping it level.")),
            "Carry {A} upwards with two hands.",
            "Have both grippers take {A} by its ears and lift.",
            "Two arms, one pot: lift {A}.",
            "Level, and by its sides, bring {A} up from the table.",
        ),
    )

    def place(self, scene, draws):
        model = draws.random.randint(0, 2)
        where = draws.place(x=(-0.05, 0.05), y=(-0.05, 0.05), base=Rotation.from_quat([0, 0, 0.71006, 0.704141]), turn=(0, 0, np.pi / 8))
        self.pot = scene.add("pot", scene.assets.model("060_kitchenpot", model), where)
        x, y, _ = where.p
        self.keep_free = ((x - 0.2, y, 0.1), (x + 0.2, y, 0.1))  # where the hands come from
        return {"A": f"060_kitchenpot/base{model}"}

    def solved(self, scene):
        if self.pot.position[2] <= self.high or self.pot.pose[2, 2] <= self.upright:
            return False
        return all(np.linalg.norm(scene.robot.grasp_point(side) - self.pot.point("contact", i)[:3, 3]) < self.near for i, side in enumerate(SIDES))

    def expert(self, scene, hands):
        yield hands.grip("both", 0.5)
        rise = 0.88 - self.pot.position[2]
        yield from hands.grasp_both({side: self.pot for side in SIDES}, {side: [i] for i, side in enumerate(SIDES)}, lift=rise)
        yield hands.shift_both((0, 0, rise))
