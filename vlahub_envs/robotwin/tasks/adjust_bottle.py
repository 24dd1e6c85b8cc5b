"""Pick up a bottle that lies on the table, stand it up in the air and hold it on its own side."""

from __future__ import annotations

from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.assets import DOWN
from vlahub_envs.robotwin.instructions import Sentences, every
from vlahub_envs.robotwin.kinematics import pose
from vlahub_envs.robotwin.task import Task


class AdjustBottle(Task):
    step_limit = 400
    objects = {"001_bottle": (13, 16)}
    keep_free = ((-0.25, -0.12, 0.06), (0.25, -0.12, 0.06))  # below where the bottle is held
    aside, high = 0.15, 0.9  # m: how far on its side, and how high, the middle of the bottle must get
    sentences = Sentences(
        seen=(
            *every(
                ("Pick up {A}", "Lift {A}", "Take {A}", "Grasp {A}", "Raise {A}"),
                (
                    "and hold it upright.",
                    "and turn it the right way up.",
                    "with {a} and hold it upright.",
                    "with {a} and turn it the right way up.",
                    "so that its top points up.",
                    "with {a} so that its neck is at the top.",
                ),
            ),
            *every(("Use {a} to", "Let {a}", "With {a},"), ("stand {A} up in the air.", "hold {A} with its head up.", "lift {A} until it is upright.")),
            "Set {A} upright in the air.",
            "Hold {A} the right way up.",
            "Bring {A} from lying to upright.",
            "Straighten {A} up.",
            "Turn {A} so that it stands, and keep hold of it.",
            "Adjust {A} so that its cap points to the ceiling.",
            "{A} lies on its side: lift it and put it upright.",
            "Lift {A} off the table, head up.",
            "Right {A} with {a}.",
            "Grip {A} with {a}, lift it and turn it upright.",
            "Pick {A} off the table and keep it upright.",
        ),
        unseen=(
            *every(("Fetch {A}", "Collect {A}"), ("and keep its mouth up.", "with {a}, its mouth up.", "and hold it vertically.")),
            "Make {A} vertical, off the table.",
            "{A} has fallen over: raise it, neck up.",
            "Let {a} carry {A} vertically.",
            "Hoist {A} upright with {a}.",
        ),
    )

    def place(self, scene, draws):
        right = draws.random.randint(0, 2) == 1
        model = draws.choice(self.objects["001_bottle"])
        where = draws.place(
            x=(0.08, 0.12) if right else (-0.12, -0.08),
            y=(-0.13, -0.08),
            z=0.752,
            base=Rotation.from_euler("z", 90 if right else -90, degrees=True),  # lying, its top towards the middle of the table
            turn=(0, 0, 0.4),
        )
        self.bottle = scene.add("bottle", scene.assets.model("001_bottle", model), where)
        self.arm = "right" if right else "left"
        return {"A": f"001_bottle/base{model}", "a": self.arm}

    def solved(self, scene):
        x, _, z = self.bottle.point("functional")[:3, 3]
        return bool((x if self.arm == "right" else -x) > self.aside and z > self.high)

    def expert(self, scene, hands):
        yield from hands.grasp(self.arm, self.bottle, range(8), deep=-0.01)
        yield hands.back(self.arm, 0.09)
        side = 1 if self.arm == "right" else -1
        yield from hands.place(self.arm, self.bottle, pose((side * 0.25, -0.12, 0.95), DOWN), pre=0.0, dis=0.0, release=False)
