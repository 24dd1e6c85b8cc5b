"""Put a shoe on a blue mat, its toe to the left."""

from __future__ import annotations

import numpy as np
import sapien
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.assets import box
from vlahub_envs.robotwin.instructions import Sentences, every
from vlahub_envs.robotwin.kinematics import pose
from vlahub_envs.robotwin.task import Task, both_open, side_of

TOE_LEFT = Rotation.from_matrix([[0, -1, 0], [-1, 0, 0], [0, 0, -1]])  # of a functional point of the shoe that stands so


class PlaceShoe(Task):
    step_limit = 500
    objects = {"041_shoe": tuple(range(10))}
    near = np.array([0.05, 0.02])  # m: how far the shoe's origin may be from the middle of the mat
    straight = np.array([0.5, 0.5, -0.5, -0.5])  # the quaternion w, x, y, z of a shoe that stands with its toe to the left, ...
    skew = 0.07  # ... and how far each of its numbers may be off
    sentences = Sentences(
        seen=(
            *every(
                ("Put {A}", "Place {A}", "Set {A}", "Move {A}", "Lay {A}"),
                (
                    "on the mat with its toe to the left.",
                    "on the blue mat, toe to the left.",
                    "on the blue mat with {a}, toe to the left.",
                    "on the mat so that it points left.",
                    "onto the mat using {a}, pointing left.",
                    "in the middle of the blue mat.",
                ),
            ),
            *every(
                ("Take {A}", "Pick up {A}", "Grasp {A}"),
                ("and put it on the mat, toe left.", "with {a} and set it on the mat, toe left.", "and turn it left on the mat."),
            ),
            *every(("Use {a} to", "With {a},"), ("put {A} on the blue mat.", "turn {A} to the left on the mat.")),
            "{A} belongs on the blue mat, its toe to the left.",
            "Let {A} stand on the mat and point left.",
            "Bring {A} to the mat and turn its toe to the left.",
            "Let {a} place {A} squarely on the mat.",
            "Line {A} up with the mat, heel to the right.",
            "Carry {A} to the mat, heel to the right.",
            "The toe of {A} must point left on the mat.",
        ),
        unseen=(
            *every(("Position {A}", "Park {A}", "Rest {A}"), ("on the blue pad, facing left.", "on the blue pad with {a}, facing left.")),
            "Transfer {A} to the blue pad; its tip looks left.",
            "Have {a} bring {A} to the blue rectangle, tip to the left.",
            "Square {A} up on the blue rectangle.",
            "On the blue rectangle, leave {A} facing left.",
        ),
    )

    def place(self, scene, draws):
        self.mat = scene.add("mat", box((0.13, 0.05, 0.0005), (0, 0, 1)), sapien.Pose([0, -0.08, 0.74]), static=True)
        where = draws.place(
            x=(-0.25, 0.25),
            y=(-0.1, 0.05),
            base=Rotation.from_euler("x", 90, degrees=True),
            turn=(0, 3.14, 0),
            near_in_the_middle=True,
            redraw_while=lambda p: p[0] ** 2 + p[1] ** 2 < 0.0225,
        )
        model = draws.choice(self.objects["041_shoe"])
        self.shoe = scene.add("shoe", scene.assets.model("041_shoe", model), where)
        self.arm = side_of(where.p)
        return {"A": f"041_shoe/base{model}", "a": self.arm}

    def solved(self, scene):
        q = self.shoe.entity.pose.q
        q = q if q[0] >= 0 else -q
        off = self.shoe.position[:2] - self.mat.position[:2]
        return both_open(scene) and bool((np.abs(off) < self.near).all() and (np.abs(q - self.straight) < self.skew).all())

    def expert(self, scene, hands):
        model = self.shoe.model
        sole = model.points["functional"][0][1, 3] - (model.center[1] - model.size[1] / 2)  # from the sole up to the functional point
        target = pose(np.add(self.mat.position, (0, 0, sole)), TOE_LEFT)
        how = {"pre": 0.07, "dis": 0.003, "align": True}
        yield from hands.grasp(self.arm, self.shoe, (0, 1), fits=lambda hand: hands.can_place(self.arm, self.shoe, target, hand, **how))
        yield hands.lift(self.arm, 0.07)
        yield from hands.place(self.arm, self.shoe, target, **how)
