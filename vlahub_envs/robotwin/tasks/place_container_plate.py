"""Put a bowl or a cup on a plate."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.instructions import Sentences, every
from vlahub_envs.robotwin.kinematics import pose
from vlahub_envs.robotwin.task import Task, both_open, side_of

CONTAINERS = {"002_bowl": (1, 2, 3, 5), "021_cup": (1, 2, 3, 4, 5, 6, 7)}


class PlaceContainerPlate(Task):
    step_limit = 400
    objects = {**CONTAINERS, "003_plate": (0,)}
    near = np.array([0.05, 0.05, 0.03])  # m: how far the container's origin may be from the plate's
    sentences = Sentences(
        seen=(*every(("Put", "Place", "Set", "Move"), ("{B} on {A}", "{B} onto the middle of {A}"), (".", "with {a}.")),),
        unseen=every(("Rest", "Position"), ("{B} on {A}",), (".", "using {a}.")),
    )

    def place(self, scene, draws):
        where = draws.place(x=(-0.28, 0.28), y=(-0.1, 0.05), redraw_while=lambda p: abs(p[0]) < 0.2)
        name = list(CONTAINERS)[draws.choice((0, 1))]
        model = draws.choice(CONTAINERS[name])
        self.container = scene.add("container", scene.assets.model(name, model), where)
        middle = np.copysign(0.05, where.p[0])
        self.plate = scene.add("plate", scene.assets.model("003_plate", 0), draws.place(x=(middle - 0.03, middle + 0.03), y=(-0.15, -0.1)), static=True)
        self.arm = side_of(where.p)
        return {"A": "003_plate/base0", "B": f"{name}/base{model}", "a": self.arm}

    def solved(self, scene):
        return both_open(scene) and bool((np.abs(self.container.position - self.plate.position) < self.near).all())

    def expert(self, scene, hands):
        yield from hands.grasp(self.arm, self.container, [rim(self.container.model, self.arm)])
        yield hands.lift(self.arm, 0.1)
        yield from hands.place(self.arm, self.container, self.plate.point("functional"), point=None, pre=0.12, dis=0.03)
        yield hands.lift(self.arm, 0.08)


def rim(model, arm):
    """A contact frame [4, 4], in the object's frame, on the rim on the side of an arm: from above, one finger inside.

    Two of the cups have contact points at a handle or around the body, so the rim is taken from the size.
    """
    side = 1 if arm == "right" else -1  # the object's z axis points to the right
    contact = pose((0, model.center[1] + model.size[1] / 2 - 0.005, side * (min(model.size[0], model.size[2]) / 2 - 0.0025)))
    return contact @ pose(rotation=Rotation.from_euler("y", 180, degrees=True)) if side < 0 else contact
