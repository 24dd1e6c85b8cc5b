"""Pass a tall red block from the left hand to the right, which stands it on a blue pad."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.assets import DOWN, box
from vlahub_envs.robotwin.instructions import Sentences, every
from vlahub_envs.robotwin.kinematics import pose
from vlahub_envs.robotwin.task import OPEN, Task


class HandoverBlock(Task):
    step_limit = 800
    objects = {}
    near = np.array([0.03, 0.03, 0.01])  # m: how far the block's bottom may be from the middle of the pad's top
    sentences = Sentences(
        seen=(
            *every(
                ("Pass the red block from the left hand to the right", "Hand the tall red block over to the right arm", "Give the red block to the right arm"),
                ("and set it on the blue pad.", "and stand it on the blue pad.", "which puts it on the blue pad.", "to place it on the blue mat."),
            ),
            *every(
                ("Take the red block with the left arm,", "Grasp the tall block with the left arm,", "Lift the red block with the left arm,"),
                ("hand it over,", "pass it to the right arm,", "give it to the other hand,"),
                ("and set it on the blue pad.", "and stand it upright on the blue pad.", "and let the right arm put it on the blue mat."),
            ),
            "Move the red block onto the blue pad, changing hands on the way.",
            "The left arm takes the block, the right arm places it on the pad.",
            "Hand over the red block and put it on the blue pad.",
            "Bring the red block to the blue pad with both arms, one after the other.",
            "Carry the block to the middle, change hands, and set it on the blue pad.",
            "Stand the tall red block on the blue pad after passing it from left to right.",
            "Let the two arms work together to bring the red block to the blue pad.",
            "Pass the block across and place it on the blue pad.",
            "With a handover in the air, bring the red block to the blue pad.",
            "The red block goes from the left arm to the right arm to the blue pad.",
            "Use both arms to put the red block on the blue pad.",
        ),
        unseen=(
            *every(
                ("Transfer the red column", "Relay the red box"),
                ("to the right gripper,",),
                ("then onto the blue square.", "which stands it on the blue square."),
            ),
            "The left gripper fetches the red column and the right one delivers it to the blue square.",
            "Swap hands with the red box before it goes onto the blue square.",
            "Give the red column from gripper to gripper and deliver it to the blue square.",
            "Relay the tall box to the blue square.",
            "Deliver the red box to the blue square by way of both grippers.",
            "Let the right gripper receive the red column and stand it on the blue square.",
        ),
    )

    def place(self, scene, draws):
        where = draws.place(x=(-0.25, -0.05), y=(0, 0.25), z=0.842, base=Rotation.from_quat([0, 0, 0.195, 0.981]), turn=(0, 0, 0.2))
        self.block = scene.add("block", box((0.03, 0.03, 0.1), (1, 0, 0), long=True), where)
        where = draws.place(x=(0.1, 0.25), y=(0.15, 0.2), base=Rotation.identity())
        self.pad = scene.add("pad", box((0.05, 0.05, 0.005), (0, 0, 1)), where, static=True)
        return {}

    def solved(self, scene):
        off = self.block.point("functional", 0)[:3, 3] - self.pad.point("functional", 1)[:3, 3]
        return scene.robot.gripper("right") > OPEN and bool((np.abs(off) < self.near).all())

    def expert(self, scene, hands):
        yield from hands.grasp("left", self.block, range(4), pre=0.13)
        yield hands.lift("left", 0.1)
        yield from hands.place("left", self.block, pose((0, -0.05, 0.9), DOWN), pre=0.0, dis=0.0, release=False)
        yield from hands.grasp("right", self.block, range(4, 8), pre=0.07)
        yield hands.grip("left", 1.0)
        yield hands.back("left", 0.1)
        yield from hands.place("right", self.block, self.pad.point("functional", 1), pre=0.05, dis=0.002, home=["left"])
        yield hands.back("right", 0.08)
