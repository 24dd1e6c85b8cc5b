"""RoboTwin with other robots: a pair of Pandas from ManiSkill's package."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

import vlahub
from benchmarks.robotwin_experts import episode
from vlahub.interface import InterfaceError
from vlahub_envs.robotwin import embodiments, robot
from vlahub_envs.robotwin.expert import Hands, ScriptedExpert
from vlahub_envs.robotwin.kinematics import euler_of_pose, pose
from vlahub_envs.robotwin.simulation import RoboTwin


def simulate(**options) -> RoboTwin:
    return RoboTwin(**{"task": "ClickBell", "assets": "stand-in", "camera_size": (24, 32), "embodiment": "franka-panda", **options})


@pytest.fixture(scope="module")
def simulation() -> Iterator[RoboTwin]:
    simulation = simulate()
    yield simulation
    simulation.close()


def test_it_has_sixteen_joint_numbers_within_the_arms_limits(simulation):
    simulation.reset(0, {})
    assert [(field.name, field.size) for field in simulation.interface.action] == [
        ("left_joints", 7),
        ("left_gripper", 1),
        ("right_joints", 7),
        ("right_gripper", 1),
    ]
    space = simulation.interface.action_space()
    assert np.isclose(space.low[5], -0.0175) and np.isclose(space.high[3], -0.0698) and space.high[5] > np.pi
    state = simulation.observe()["states"]
    assert np.allclose(state, [*embodiments.PANDA.home, 1, *embodiments.PANDA.home, 1], atol=1e-6) and space.contains(state)
    assert simulation.scene.robot.articulation.get_qpos()[
        np.array([joint.name.endswith("finger_joint1") for joint in simulation.scene.robot.articulation.active_joints])
    ] == pytest.approx(0.04)


def test_a_policy_for_the_other_robot_is_refused_with_both_layouts(simulation):
    other = RoboTwin(task="ClickBell", assets="stand-in", camera_size=(24, 32))
    with pytest.raises(InterfaceError, match=r"action: the policy has left_joints\[6\].*the environment left_joints\[7\]"):
        vlahub.check(simulation, other)  # an environment's interface in the place of a policy's
    vlahub.check(simulation, replace(simulation.interface))
    other.close()


def test_hands_are_where_kinematics_says(simulation):
    simulation.reset(0, {})
    arms = simulation.scene.robot
    names = [joint.name for joint in arms.articulation.active_joints]
    random = np.random.default_rng(0)
    for _ in range(3):
        joints = random.uniform(simulation.interface.action_space().low, simulation.interface.action_space().high).reshape(2, 8)[:, :7]
        positions = arms.articulation.get_qpos()
        for side, values in zip(robot.SIDES, joints, strict=True):
            positions[[names.index(name) for name in arms.arms[side].names]] = values
        arms.articulation.set_qpos(positions)
        for side, values in zip(robot.SIDES, joints, strict=True):
            assert np.allclose(arms.arms[side].forward(values), arms.hand_as_it_is(side), atol=1e-5)
    for side in robot.SIDES:  # at home the hands point down, with the camera's side away from the robot
        hand = arms.hand(side)
        assert hand[2, 0] > -1 and np.allclose(arms.arms[side].forward(np.array(embodiments.PANDA.home)), hand)


def test_inverse_kinematics_stays_within_the_limits(simulation):
    arm, random = simulation.scene.robot.arms["left"], np.random.default_rng(1)
    home = np.array(embodiments.PANDA.home)
    for _ in range(20):
        joints = np.clip(home + random.uniform(-0.7, 0.7, 7), arm.low, arm.high)
        solution = arm.inverse(arm.forward(joints), home)
        assert solution.reached and (solution.joints >= arm.low - 1e-9).all() and (solution.joints <= arm.high + 1e-9).all()
    solution = arm.inverse(pose((3, 3, 3)), home)
    assert not solution.reached and (solution.joints >= arm.low).all() and (solution.joints <= arm.high).all()


@pytest.mark.parametrize("options", [{}, {"control_mode": "ee_pose"}, {"executor": "per_action", "randomization": "randomized"}])
def test_the_expert_rings_the_bell(options):
    simulation = simulate(**options)
    expert = ScriptedExpert(simulation)
    assert all(episode(simulation, expert, seed)[0] for seed in range(3))
    simulation.close()


def test_arms_go_home_and_hand_poses_are_carried_out():
    simulation = simulate(control_mode="ee_pose")
    simulation.reset(0, {})
    hands, arms = Hands(simulation), simulation.scene.robot
    home = [euler_of_pose(arms.hand(side)) for side in robot.SIDES]
    asked = np.array([*home[0], 1, *home[1], 0.5], np.float32)
    asked[[2, 7]] += (0.05, 0.04)
    outcome = simulation.apply(asked[None])
    assert outcome.info["unreachable"] == 0 and arms.gripper("right") == 0.5
    assert np.allclose(arms.hand_as_it_is("left")[:3, 3], asked[:3], atol=0.01) and np.allclose(arms.hand_as_it_is("right")[:3, 3], asked[7:10], atol=0.01)
    simulation.control_mode = "qpos"
    simulation.apply(hands.go(home=["left", "right"]))
    assert np.allclose(arms.joints, arms.home, atol=1e-6)
    simulation.close()


def test_unknown_robots_and_missing_files_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="no robot 'panda'; did you mean 'franka-panda'"):
        simulate(embodiment="panda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"mani_skill, which is not installed: pip install 'vlahub\[sapien\]'"):
        simulate()
