"""The robots that the argument `embodiment` knows."""

from __future__ import annotations

import importlib.util
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from vlahub.catalog import suggest
from vlahub_envs.robotwin.kinematics import pose
from vlahub_envs.robotwin.robot import ALOHA, Embodiment

DISTANCE = 0.8  # m between the bases of two single arms, left and right of the middle
PANDA_BASE = pose((0, -0.65, 0.75), Rotation.from_euler("z", 90, degrees=True))  # faces +y, the table


def panda_pair() -> str:
    """URDF text of two Pandas with wrist cameras as one robot, from the files that come with ManiSkill's package."""
    package = importlib.util.find_spec("mani_skill")
    if package is None:
        raise ImportError("embodiment='franka-panda' takes the robot's files from the package mani_skill, which is not installed: pip install 'vlahub[sapien]'")
    file = Path(package.submodule_search_locations[0]) / "assets/robots/panda/panda_v3.urdf"
    if not file.exists():
        raise FileNotFoundError(f"the installed mani_skill lacks {file}; pip install --force-reinstall mani_skill==3.0.1")
    return pair(file)


def pair(file: Path) -> str:
    """URDF text of two of the arms in `file` as one robot, `DISTANCE` apart. Names begin with "left_" or "right_"; the camera's link is called "left_camera"."""
    robot = ElementTree.Element("robot", name=file.stem)
    ElementTree.SubElement(robot, "link", name="footprint")
    for side, y in (("left", DISTANCE / 2), ("right", -DISTANCE / 2)):  # y of the robot's frame points to its left
        arm = ElementTree.parse(file).getroot()

        def named(name: str, side: str = side) -> str:
            return f"{side}_camera" if name == "camera_link" else f"{side}_{name}"

        for element in arm.iter():
            if element.tag in ("link", "joint", "material") and "name" in element.attrib:
                element.set("name", named(element.get("name")))
            if element.tag in ("parent", "child"):
                element.set("link", named(element.get("link")))
            if element.tag == "mesh":
                element.set("filename", os.fspath(file.parent / element.get("filename")))
        children = {joint.find("child").get("link") for joint in arm.iter("joint")}
        (root,) = (link.get("name") for link in arm.iter("link") if link.get("name") not in children)
        for joint in arm.iter("joint"):
            for mimic in joint.findall("mimic"):  # both fingers are driven
                joint.remove(mimic)
        robot.extend(arm)
        joint = ElementTree.SubElement(robot, "joint", name=f"{side}_base_joint", type="fixed")
        ElementTree.SubElement(joint, "parent", link="footprint")
        ElementTree.SubElement(joint, "child", link=root)
        ElementTree.SubElement(joint, "origin", xyz=f"0 {y:g} 0", rpy="0 0 0")
    return ElementTree.tostring(robot, encoding="unicode")


PANDA = Embodiment(
    name="franka-panda",
    urdf=panda_pair,
    base=PANDA_BASE,
    prefix={"left": "left_", "right": "right_"},
    hand="panda_hand",
    tool=pose(rotation=Rotation.from_matrix([[0, 0, 1], [0, -1, 0], [1, 0, 0]])),  # the hand's own z points to what it grasps
    fingers=("panda_finger_joint1", "panda_finger_joint2"),
    home=(0.0, 0.19635, 0.0, -2.618, 0.0, 2.9416, 0.7854),
    closed=0.0,
    span=0.04,
    tcp=0.08,
    # hands that point down, near and far, to both sides
    starts=[
        (turn, shoulder, 0, elbow, 0, shoulder - elbow, np.pi / 4) for shoulder, elbow in ((-0.8, -2.4), (0.2, -2.6), (0.5, -1.8)) for turn in (0, -0.8, 0.8)
    ],
)

EMBODIMENTS = {kind.name: kind for kind in (ALOHA, PANDA)}


def find(name: str) -> Embodiment:
    if name not in EMBODIMENTS:
        raise ValueError(f"embodiment: there is no robot {name!r}; {suggest(str(name), EMBODIMENTS)}")
    return EMBODIMENTS[name]
