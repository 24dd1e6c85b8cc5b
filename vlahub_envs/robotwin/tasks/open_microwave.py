"""Pull the door of a microwave open."""

from __future__ import annotations

from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.instructions import Sentences, every
from vlahub_envs.robotwin.task import Task


class OpenMicrowave(Task):
    step_limit = 1500
    objects = {"044_microwave": (0, 1)}
    keep_free = ((-0.1, 0, 0.2),)  # where the door swings
    open = 0.6  # of the door's way
    sentences = Sentences(
        seen=(
            *every(
                ("Open {A}", "Open the door of {A}", "Pull {A} open", "Pull the door of {A} open", "Swing {A} open"),
                (".", "with {a}.", "by its handle.", "wide.", "using {a} at the handle."),
            ),
            *every(("Use {a} to", "Let {a}", "With {a},"), ("open {A}.", "pull the handle of {A}.", "swing the door of {A} open.")),
            "Grasp the handle of {A} and pull.",
            "Take {A} by its handle and open it.",
            "Get {A} open.",
            "Open up {A}.",
            "Grip the bar of {A} and draw it towards the robot.",
        ),
        unseen=(
            *every(("Unclose {A}", "Draw the door of {A} towards you"), (".", "by means of {a}.")),
            "Make the inside of {A} accessible.",
            "Let {a} tug {A} open.",
            "Pull the front of {A} away.",
            "Swing the front of {A} outwards.",
        ),
    )

    def place(self, scene, draws):
        model = draws.random.randint(0, 2)
        where = draws.place(x=(-0.12, -0.02), y=(0.15, 0.2), z=0.8, base=Rotation.from_euler("z", 90, degrees=True))
        self.microwave = scene.add("microwave", scene.assets.model("044_microwave", model), where, static=True)
        self.arm = "left"  # always: the door opens to the left
        return {"A": f"044_microwave/base{model}", "a": self.arm}

    def solved(self, scene):
        return self.microwave.joint() >= self.open * self.microwave.limits()[1]

    def expert(self, scene, hands):
        yield from hands.grasp(self.arm, self.microwave, (0, 3), pre=0.08, deep=-0.012)
        yield hands.swing(self.arm, *self.microwave.axis(), 1.15)
