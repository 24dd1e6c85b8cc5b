"""Flip a rocker switch with a closed gripper."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.instructions import Sentences, every
from vlahub_envs.robotwin.task import Task


class TurnSwitch(Task):
    step_limit = 400
    objects = {"056_switch": tuple(range(8))}
    keep_free = ((-0.2, 0, 0.2), (0, 0, 0.2), (0.2, 0, 0.2))  # before and below the switch, which floats
    margin = 0.05  # rad: so much may be missing from the end of the rocker's way
    sentences = Sentences(
        seen=(
            *every(
                ("Flip {A}", "Turn {A} on", "Press {A}", "Push {A}", "Switch {A} on", "Toggle {A}", "Hit {A}"),
                (".", "with {a}.", "once.", "using the closed gripper of {a}.", "by pressing its lower half."),
            ),
            *every(("Use {a} to", "Let {a}", "With {a},"), ("flip {A}.", "press {A}.", "turn {A} on.")),
            "Close the gripper and press {A}.",
            "Push the rocker of {A} in.",
            "Make {A} click over.",
            "Reach out and tip {A} over.",
            "Tap {A} until it flips.",
            "Bring {a} to {A} and push.",
        ),
        unseen=(
            *every(("Activate {A}", "Operate {A}", "Tip {A} over"), (".", "by means of {a}.")),
            "Poke {A} with a fist.",
            "Let {A} snap to its other side.",
            "Have {a} nudge {A} to the on position.",
            "Press the lower edge of {A}.",
        ),
    )

    def place(self, scene, draws):
        model = draws.random.randint(0, 8)
        where = draws.place(x=(-0.25, 0.25), y=(0.0, 0.1), z=(0.81, 0.84), base=Rotation.from_quat([0, 0, 0.71006, 0.704141]), turn=(0, 0, np.pi / 4))
        self.switch = scene.add("switch", scene.assets.model("056_switch", model), where, static=True)
        self.arm = "right" if self.switch.pose[0, 0] < 0 else "left"  # its face looks along -x of its base
        return {"A": f"056_switch/base{model}", "a": self.arm}

    def solved(self, scene):
        return bool(self.switch.joint() >= self.switch.limits()[1] - self.margin)

    def expert(self, scene, hands):
        yield hands.grip(self.arm, 0.0)
        yield from hands.press(self.arm, self.switch, lower=0.006)
