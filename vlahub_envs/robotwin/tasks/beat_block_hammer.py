"""Take the hammer from the middle of the table and touch a fixed red cube with its head."""

from __future__ import annotations

import numpy as np
import sapien
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.assets import box
from vlahub_envs.robotwin.instructions import Sentences, every
from vlahub_envs.robotwin.task import Task, side_of


class BeatBlockHammer(Task):
    step_limit = 400
    objects = {"020_hammer": (0,)}
    near = 0.02  # m, in x and in y: how far from the middle of the cube the head may strike
    sentences = Sentences(
        seen=(
            *every(
                ("Hit the red cube", "Strike the red block", "Knock on the red cube", "Beat the block"),
                ("with {A}.", "with {A}, held by {a}.", "with the head of {A}."),
            ),
            *every(
                ("Take {A}", "Pick up {A}", "Grasp {A}", "Lift {A}", "Get {A}"),
                ("and hit the block.", "with {a} and hit the block.", "and tap the red cube.", "with {a} and strike the red cube."),
            ),
            *every(("Use {A} to", "Use {a} and {A} to"), ("hit the block.", "strike the red cube.", "tap the block on top.", "knock on the cube.")),
            *every(("Bring {A} to the block", "Swing {A} over to the cube"), ("and let its head touch it.", "with {a} and strike.")),
            "Grip {A} at its handle and beat the red block.",
            "With {a}, lower the head of {A} onto the cube.",
            "Let {a} hammer on the red block.",
            "Hammer on the red block with {A}.",
            "Touch the top of the red cube with {A}.",
            "With {A}, give the block a knock.",
        ),
        unseen=(
            *every(("Fetch {A}", "Reach for {A}"), ("and pound the red cube.", "using {a}, then pound the block.")),
            *every(("Pound the cube", "Give the red block a blow"), ("with {A}.", "with {A} in {a}.")),
            "The red cube wants a blow from {A}.",
            "Let {A} in {a} come down on the block.",
        ),
    )

    def place(self, scene, draws):
        where = sapien.Pose([0, -0.06, 0.783], [0, 0, 0.995, 0.105])
        self.hammer = scene.add("hammer", scene.assets.model("020_hammer", 0), where, mass=0.001)
        where = draws.place(
            x=(-0.25, 0.25),
            y=(-0.05, 0.15),
            z=0.76,
            base=Rotation.identity(),
            turn=(0, 0, 0.5),
            redraw_while=lambda p: abs(p[0]) < 0.05 or p[0] ** 2 + p[1] ** 2 < 0.001,
        )
        self.block = scene.add("block", box((0.025, 0.025, 0.025), (1, 0, 0)), where, static=True)
        self.arm = side_of(where.p)
        return {"A": "020_hammer/base0", "a": self.arm}

    def solved(self, scene):
        off = self.hammer.point("functional")[:2, 3] - self.block.point("functional", 1)[:2, 3]
        return bool((np.abs(off) < self.near).all()) and len(scene.touching([self.block.body], self.hammer)) > 0

    def expert(self, scene, hands):
        yield from hands.grasp(self.arm, self.hammer, pre=0.12, deep=-0.01)
        yield hands.back(self.arm, 0.07)
        target = self.block.point("functional", 1)
        yield from hands.place(self.arm, self.hammer, target, pre=0.05, dis=0.0, tilts=(0, 0.2, 0.4, 0.6), release=False)
        yield hands.lift(self.arm, -0.01)
