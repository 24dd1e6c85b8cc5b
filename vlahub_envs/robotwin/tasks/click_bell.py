"""Press the top of a fixed desk bell with a closed gripper."""

from __future__ import annotations

import numpy as np

from vlahub_envs.robotwin.instructions import Sentences
from vlahub_envs.robotwin.task import CLOSED, Task


class ClickBell(Task):
    step_limit = 400
    objects = {"050_bell": (0, 1)}
    near = np.array([0.025, 0.025, 0.03])  # m: how far from the bell's contact point a touch may be. That point lies below the top by almost 0.03
    sentences = Sentences(
        seen=(
            "Press {A} with {a}.",
            "Ring {A} using {a}.",
            "Click {A} with {a}.",
            "Use {a} to ring {A}.",
            "Use {a} to press the button of {A}.",
            "With {a}, tap the top of {A}.",
            "Push down on {A} with {a}.",
            "Let {a} click {A} once.",
            "Close the gripper of {a} and press {A}.",
            "Move {a} above {A} and push down.",
            "Bring {a} to {A} and make it ring.",
            "Lower {a} onto {A} until it rings.",
            "Tap {A} from above with {a}.",
            "Have {a} hit the button on {A}.",
            "Reach for {A} with {a} and press its top.",
            "Sound {A} by pressing it with {a}.",
            "Press {A}.",
            "Ring {A}.",
            "Click {A}.",
            "Tap the top of {A}.",
            "Push the button of {A}.",
            "Make {A} ring.",
            "Press down on {A} once.",
            "Give {A} a short press from above.",
            "Move above {A} and press it.",
            "Touch the top of {A} with a closed gripper.",
            "Close a gripper and push {A} down.",
            "Go to {A} and ring it.",
            "Sound {A}.",
            "Find {A} and press its button.",
            "Hit the top of {A} to ring it.",
        ),
        unseen=(
            "Ring {A} by lowering {a} onto it.",
            "Take {a}, close it, and click {A}.",
            "Place {a} over {A}, then press.",
            "Use {a} to make {A} sound.",
            "Ding {A} once.",
            "Push the top of {A} down.",
            "Call for service with {A}.",
        ),
    )

    def place(self, scene, draws):
        pose = draws.place(x=(-0.25, 0.25), y=(-0.2, 0.0), redraw_while=lambda position: abs(position[0]) < 0.05)
        model = draws.choice(self.objects["050_bell"])
        self.arm = "left" if pose.p[0] < 0 else "right"
        self.bell = scene.add("bell", scene.assets.model("050_bell", model), pose, static=True)
        return {"A": f"050_bell/base{model}", "a": self.arm}

    def solved(self, scene):
        if scene.robot.gripper(self.arm) >= CLOSED:
            return False
        touches = scene.touching(scene.robot.fingers["left"] + scene.robot.fingers["right"], self.bell)
        return bool((np.abs(touches - self.bell.point("contact")[:3, 3]) < self.near).all(axis=1).any())

    def expert(self, scene, hands):
        above = hands.grasp_pose(self.arm, self.bell, back=0.1)
        yield hands.move(self.arm, above)
        yield hands.grip(self.arm, 0.0)
        yield hands.lift(self.arm, -0.045)
        yield hands.lift(self.arm, 0.045)
