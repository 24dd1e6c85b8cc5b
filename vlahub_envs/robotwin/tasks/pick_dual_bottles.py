"""Pick up two bottles, one with each hand, and bring them to the middle."""

from __future__ import annotations

from vlahub_envs.robotwin.assets import DOWN
from vlahub_envs.robotwin.instructions import Sentences, every
from vlahub_envs.robotwin.kinematics import pose, quaternion
from vlahub_envs.robotwin.robot import SIDES
from vlahub_envs.robotwin.task import Task

BOTTLES = {"left": (13, (-0.25, -0.05), (0.66, 0.66, -0.25, -0.25)), "right": (16, (0.05, 0.25), (0.65, 0.65, 0.27, 0.27))}  # model, x limits, quaternion
MIDDLE = {"left": (-0.06, -0.105), "right": (0.06, -0.105)}  # m: x, y that each bottle is brought to


class PickDualBottles(Task):
    step_limit = 400
    objects = {"001_bottle": (13, 16)}
    keep_free = tuple((*place, 0.1) for place in MIDDLE.values())
    near, high = 0.1, 0.89  # m: how far from its place each bottle may be in x and in y, and how high it must get
    sentences = Sentences(
        seen=(
            *every(
                ("Pick up {A} and {B}", "Lift {A} and {B}", "Take {A} and {B}", "Grasp {A} and {B}"),
                (
                    "at the same time.",
                    "with one hand each.",
                    "and bring them to the middle.",
                    "with both arms and hold them in the middle.",
                    "together, one bottle per arm.",
                ),
            ),
            "Lift both bottles at once.",
            "Pick both bottles up, one with each arm.",
            "Use the left arm for {A} and the right arm for {B}, and lift both.",
            "Let each arm pick up one bottle.",
            "Bring {A} and {B} together above the table.",
            "With two hands, hold {A} and {B} in front of the robot.",
            "Raise both bottles to the middle.",
            "{A} goes into the left hand, {B} into the right: lift them.",
            "Collect both bottles at the same time.",
            "Hold up {A} with one arm and {B} with the other.",
        ),
        unseen=(
            *every(("Fetch {A} and {B}", "Gather {A} and {B}"), ("using two grippers.", "and keep them side by side in the air.", "in one go.")),
            "Two bottles, two arms: raise them together.",
            "Both grippers take a bottle and meet in the centre.",
            "Let {A} and {B} meet above the table.",
            "Have the two arms hoist {A} and {B}.",
        ),
    )

    def place(self, scene, draws):
        self.bottles = {}
        for side, (model, x, q) in BOTTLES.items():
            where = draws.place(x=x, y=(0.03, 0.23), base=quaternion(*q), turn=(0, 1, 0))
            self.bottles[side] = scene.add(f"{side} bottle", scene.assets.model("001_bottle", model), where)
        return {"A": "001_bottle/base13", "B": "001_bottle/base16"}

    def solved(self, scene):
        for side, bottle in self.bottles.items():
            x, y, z = bottle.point("functional")[:3, 3]
            if z <= self.high or max(abs(x - MIDDLE[side][0]), abs(y - MIDDLE[side][1])) >= self.near:
                return False
        return True

    def expert(self, scene, hands):
        yield from hands.grasp_both(self.bottles, dict.fromkeys(SIDES, range(8)), pre=0.08)
        yield hands.shift_both((0, 0, 0.1))
        yield hands.place_both(self.bottles, {side: pose((*MIDDLE[side], 1.0), DOWN) for side in SIDES})
