"""Put a cup on a coaster."""

from __future__ import annotations

from vlahub_envs.robotwin.instructions import Sentences, every
from vlahub_envs.robotwin.task import Task, both_open, planar, side_of


class PlaceEmptyCup(Task):
    step_limit = 500
    objects = {"021_cup": (0,), "019_coaster": (0,)}
    near, level = 0.035, 0.015  # m: how far the cup's bottom may be from the coaster's middle, seen from above and in height
    sentences = Sentences(
        seen=(
            *every(
                ("Put", "Place", "Set", "Stand", "Set down"),
                ("{A} on {B}.", "{A} on top of {B}.", "{A} in the middle of {B}.", "{A}, which is empty, onto {B}."),
            ),
            *every(
                ("Pick up {A}", "Take {A}", "Lift {A}", "Grasp {A} by its rim"),
                ("and put it on {B}.", "and set it down on {B}.", "and place it onto {B}.", "and stand it on {B}."),
            ),
            *every(("Move {A}", "Bring {A}", "Carry {A}"), ("onto {B}.", "over to {B} and put it down.", "to {B} and let go of it there.")),
            "{A} belongs on {B}.",
            "Let {A} stand on {B}.",
            "Use {B} as a mat for {A}.",
            "Put {B} under {A}, by moving {A} onto it.",
            "Find {A} and stand it on {B}.",
        ),
        unseen=(
            *every(("Transfer {A}", "Shift {A}", "Relocate {A}"), ("onto {B}.", "until it stands on {B}.", "to the top of {B}.")),
            "{B} is where {A} should stand.",
        ),
    )

    def place(self, scene, draws):
        right = draws.random.randint(0, 2) == 0
        where = draws.place(x=(0.15, 0.3) if right else (-0.3, -0.15), y=(-0.2, 0.05))
        self.cup = scene.add("cup", scene.assets.model("021_cup", 0), where)
        mat = draws.place(x=(-0.05, 0.1) if right else (-0.1, 0.05), y=(-0.2, 0.05), redraw_while=lambda p: planar(p, where.p) < 0.1)
        self.coaster = scene.add("coaster", scene.assets.model("019_coaster", 0), mat, static=True)
        self.arm = side_of(where.p)
        return {"A": "021_cup/base0", "B": "019_coaster/base0"}

    def solved(self, scene):
        cup, coaster = (thing.point("functional")[:3, 3] for thing in (self.cup, self.coaster))
        return both_open(scene) and planar(cup, coaster) < self.near and abs(cup[2] - coaster[2]) < self.level

    def expert(self, scene, hands):
        yield hands.grip(self.arm, 0.6)  # one finger goes into the cup
        yield from hands.grasp(self.arm, self.cup, (0,) if self.arm == "right" else (2,))
        yield hands.lift(self.arm, 0.08)
        yield from hands.place(self.arm, self.cup, self.coaster.point("functional"), pre=0.05, dis=0.005)
        yield hands.lift(self.arm, 0.05)
