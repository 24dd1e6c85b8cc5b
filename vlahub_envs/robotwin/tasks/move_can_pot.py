"""Put a can down beside a pot, on the can's own side."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.assets import DOWN
from vlahub_envs.robotwin.instructions import Sentences, every
from vlahub_envs.robotwin.kinematics import pose
from vlahub_envs.robotwin.task import Task, both_open, planar, side_of


class MoveCanPot(Task):
    step_limit = 400
    objects = {"060_kitchenpot": tuple(range(7)), "105_sauce-can": (0, 2, 4, 5, 6)}
    beside = np.array([0.2, 0.035])  # m: how far the can may be to the side of the pot, and before or behind it
    tilt = np.deg2rad(15)
    sentences = Sentences(
        seen=(
            *every(
                ("Put {B}", "Place {B}", "Move {B}", "Set {B} down", "Bring {B}"),
                ("next to {A}.", "beside {A}.", "to the side of {A}.", "next to {A} with {a}.", "beside {A} using {a}.", "close to {A} with {a}."),
            ),
            *every(
                ("Pick up {B}", "Take {B}", "Grasp {B}"), ("and put it next to {A}.", "with {a} and set it beside {A}.", "and stand it at the side of {A}.")
            ),
            *every(("Use {a} to", "With {a},"), ("move {B} next to {A}.", "stand {B} beside {A}.")),
            "{B} belongs next to {A}.",
            "Let {B} stand beside {A}.",
            "Let {a} carry {B} over to {A}.",
            "Have {a} line {B} up with {A}.",
            "Line {B} up beside {A}.",
            "Shift {B} until it stands next to {A}.",
            "Set {B} upright at the side of {A}.",
        ),
        unseen=(
            *every(("Position {B}", "Transfer {B}", "Relocate {B}"), ("alongside {A}.", "alongside {A} by means of {a}.")),
            "{A} wants {B} at its side.",
            "Stand {B} shoulder to shoulder with {A}.",
            "Make {B} the neighbour of {A}, with {a}.",
            "Let {a} deliver {B} to the side of {A}.",
        ),
    )

    def place(self, scene, draws):
        model = draws.random.randint(0, 7)
        where = draws.place(x=(0, 0), y=(0, 0), base=Rotation.from_euler("z", 180, degrees=True), turn=(0, 0, np.pi / 8))
        self.pot = scene.add("pot", scene.assets.model("060_kitchenpot", model), where)
        at = self.pot.position.copy()
        where = draws.place(x=(-0.3, 0.3), y=(0.05, 0.15), turn=(0, np.pi / 4, 0), redraw_while=lambda p: abs(p[0]) < 0.2 or planar(p, at) < 0.3)
        can = draws.choice(self.objects["105_sauce-can"])
        self.can = scene.add("can", scene.assets.model("105_sauce-can", can), where)
        self.arm, self.side = side_of(where.p), np.sign(where.p[0])
        self.keep_free = ((at[0] + 0.18 * self.side, at[1], 0.06),)  # where the can goes
        self.low = at[2] + 0.001  # of the can's origin; the pot's own is at half its height
        return {"A": f"060_kitchenpot/base{model}", "B": f"105_sauce-can/base{can}", "a": self.arm}

    def solved(self, scene):
        if not both_open(scene):
            return False
        x, y, _ = self.can.position - self.pot.position
        roll, pitch, _ = Rotation.from_matrix(self.can.pose[:3, :3]).as_euler("xyz")
        near = 0 < self.side * x < self.beside[0] and abs(y) < self.beside[1]
        return bool(near and abs(roll - np.pi / 2) < self.tilt and abs(pitch) < self.tilt and self.can.position[2] <= self.low)

    def expert(self, scene, hands):
        target = pose((self.pot.position[0] + 0.18 * self.side, self.pot.position[1], self.can.position[2]), DOWN)
        how = {"point": None, "pre": 0.05, "dis": 0.002}
        yield from hands.grasp(self.arm, self.can, range(16), pre=0.05, fits=lambda hand: hands.can_place(self.arm, self.can, target, hand, **how))
        yield hands.shift(self.arm, (0, -0.1, 0.1))
        yield from hands.place(self.arm, self.can, target, **how)
