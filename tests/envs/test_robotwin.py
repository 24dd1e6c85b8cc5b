import hashlib
import json
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import sapien
from gymnasium.utils.env_checker import check_env
from scipy.spatial.transform import Rotation

import vlahub
from vlahub import assets as releases
from vlahub import catalog
from vlahub.doctor import SOFTWARE_VULKAN
from vlahub.observation import validate
from vlahub_envs.robotwin import assets, robot, trajectory
from vlahub_envs.robotwin.expert import Hands, Unreachable
from vlahub_envs.robotwin.instructions import instruction
from vlahub_envs.robotwin.kinematics import Arm, euler_of_pose, pose, pose_of_euler
from vlahub_envs.robotwin.room import TABLE_TOP
from vlahub_envs.robotwin.task import Draws
from vlahub_envs.robotwin.tasks.click_bell import ClickBell

ID = "vlahub/RoboTwin-ClickBell"
SMALL = {"camera_size": (24, 32)}


def bell(**options) -> vlahub.Env:
    return gym.make(ID, assets="stand-in", **{**SMALL, **options})


@pytest.fixture(scope="module")
def env() -> Iterator[vlahub.Env]:
    env = bell()
    yield env
    env.close()


def run_expert(env: vlahub.Env, seed: int, limit: int = 200) -> bool:
    env.reset(seed=seed)
    expert = catalog.make_expert(ID, env.simulation)
    expert.reset()
    while not env.episode.done and env.episode.steps < limit:
        result = env.step_chunk(expert.act())
    return bool(result.info["success"])


# ------------------------------------------------------------------------------------------------ the env


def test_gymnasiums_checker_has_one_piece_of_advice_only_in_the_other_control_mode_too():
    env = bell(render_mode="rgb_array", control_mode="ee_pose", cameras=("head", "front"))
    assert env.observation_space["extra_view_images"].shape == (1, 24, 32, 3) and "wrist_images" not in env.observation_space.keys()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env)
    # absolute joint angles and hand poses are in radians and metres, as published policies give them, and not scaled to [-1, 1]
    assert all("symmetric and normalized" in str(warning.message) for warning in caught)
    env.close()


def test_what_one_sees(env):
    observation, info = env.reset(seed=3)
    validate(observation)
    assert observation["main_images"].shape == (24, 32, 3) and observation["wrist_images"].shape == (2, 24, 32, 3)
    assert observation["states"].tolist() == [0] * 6 + [1] + [0] * 6 + [1]  # home, grippers open
    assert list(env.interface.cameras) == ["head", "left_wrist", "right_wrist"]
    assert env.interface.action == env.interface.state and env.action_space.shape == (14,)
    assert env.assets == "stand-in" and info["stands_for"] == "A=050_bell/base0, a=right"
    for view in (observation["main_images"], *observation["wrist_images"]):
        assert view.std() > 2  # something is in it
    assert env.simulation.render().shape == (480, 640, 3)


def test_the_pictures_show_the_bell_and_the_arms(env):
    before, _ = env.reset(seed=0)
    env.simulation.scene.things["bell"].entity.set_pose(env.simulation.scene.robot.base)  # out of sight
    without = env.simulation.observe()["main_images"]
    changed = np.abs(before["main_images"].astype(int) - without).max(axis=-1) > 30
    assert 5 < changed.sum() < 150  # a bell of 13 cm in a picture of about a metre
    env.reset(seed=0)
    expert = catalog.make_expert(ID, env.simulation)
    expert.reset()
    after = env.step_chunk(expert.act()).observation  # one arm reaches over the bell
    assert (after["main_images"] != without).mean() > 0.05
    orange = [(view[..., 0] > view[..., 2].astype(int) + 60).sum() for view in after["wrist_images"]]
    assert min(orange) > 5  # each wrist camera sees its own fingertips


def test_the_same_seed_is_the_same_episode_in_any_process(env):
    code = "import tests.envs.test_robotwin as t; env = t.bell(); t.collide(env, 1); print(t.collide(env, 5))"
    digests = {collide(env, seed) for seed in (5, 5)}  # whatever the scene went through before
    digests.add(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1])
    assert len(digests) == 1
    assert collide(env, 6) not in digests


def collide(env: vlahub.Env, seed: int) -> str:
    """A digest of an episode in which the arms run into the table, the stand and each other: contacts are what makes physics depend on the past."""
    observation, _ = env.reset(seed=seed)
    digest = hashlib.sha256(observation["task_descriptions"].encode())
    random, touched = np.random.default_rng(5), 0
    for _ in range(2):
        actions = random.uniform(-2, 2, (3, 14))
        actions[:, [6, 13]] = random.uniform(0, 1, (3, 2))
        result = env.step_chunk(actions)
        scene = env.simulation.scene
        touched += len(scene.physics.get_contacts())
        for array in (scene.robot.articulation.get_qpos(), scene.robot.articulation.get_qvel(), *map(result.observation.get, ("main_images", "wrist_images"))):
            digest.update(np.ascontiguousarray(array).tobytes())
    assert touched
    return digest.hexdigest()


def test_layouts_follow_upstreams_draws():
    np.random.seed(7)
    np.random.uniform(0, 0)
    for _ in range(2):
        np.random.randn(3), np.random.uniform(0, 0)
    while True:
        x, y, _ = np.random.uniform(-0.25, 0.25), np.random.uniform(-0.2, 0), np.random.uniform(0.741, 0.741)
        if abs(x) >= 0.05:
            break
    model = np.random.choice([0, 1], 1)[0]
    env = bell()
    _, info = env.reset(seed=7)
    thing = env.simulation.scene.things["bell"]
    assert np.allclose(thing.position, [x, y, 0.741], atol=1e-6) and thing.model.id == model
    assert info["stands_for"] == f"A=050_bell/base{model}, a={'left' if x < 0 else 'right'}"
    env.reset(seed=4, options={"trial": 3})
    assert np.allclose(env.simulation.scene.things["bell"].position, [x, y, 0.741], atol=1e-6)
    positions = np.array([bell_position(seed) for seed in range(200)])
    assert (
        (np.abs(positions[:, 0]) >= 0.05).all() and (np.abs(positions[:, 0]) <= 0.25).all() and (positions[:, 1] <= 0).all() and (positions[:, 1] >= -0.2).all()
    )


def bell_position(seed: int) -> np.ndarray:
    return Draws(seed).place(x=(-0.25, 0.25), y=(-0.2, 0.0), redraw_while=lambda position: abs(position[0]) < 0.05).p


def test_turned_placements_draw_three_angles_about_the_objects_own_axes():
    draws, same = Draws(0), Draws(0)
    turned = draws.place((0, 1), (0, 1), turn=(0, 3.14, 0))
    plain = same.place((0, 1), (0, 1))
    assert np.allclose(turned.p, plain.p)
    up = Rotation.from_quat(np.roll(turned.q, -1)).apply([0, 1, 0])
    assert np.allclose(up, [0, 0, 1], atol=1e-6) and not np.allclose(turned.q, plain.q)
    assert [draws.choice((0, 1, 2)) for _ in range(9)] != [same.choice((0, 1, 2)) for _ in range(9)]


# ------------------------------------------------------------------------------------------------ solving it


@pytest.mark.parametrize("options", [{}, {"executor": "per_action"}, {"control_mode": "ee_pose"}])
def test_the_expert_rings_the_bell(options):
    env = bell(cameras=("head",), **options)
    assert all(run_expert(env, seed) for seed in range(4))
    env.close()


@pytest.mark.slow
def test_the_expert_rings_the_bell_on_a_hundred_layouts(env):
    assert sum(run_expert(env, seed) for seed in range(100)) >= 95


def test_a_bell_has_the_measured_size_and_a_taller_one_is_never_solved(env, monkeypatch):
    for model_id, margin in ((0, 0.0287), (1, 0.0265)):
        model = assets.StandIns().model("050_bell", model_id)
        outline = np.concatenate([np.array(solid.outline) for solid in model.solids])
        assert np.allclose([outline[:, 1].min(), outline[:, 1].max()], model.center[1] + model.size[1] / 2 * np.array([-1, 1]), atol=1e-9)
        assert np.isclose(2 * outline[:, 0].max(), model.size[0])
        assert abs(outline[:, 1].max() - model.points["contact"][0][1, 3] - margin) < 2e-4
        vertices = model.solids[-1].mesh()[0]
        assert np.isclose(vertices[:, 1].max(), outline[:, 1].max())
    # From above, a finger meets the top, which may stand 3 cm over the contact point: 1.3 mm more than model 0's does, 3.5 mm more than model 1's.
    for millimetres, solved in ((1, [True, True]), (2, [False, True]), (4, [False, False])):
        up = np.array([0, millimetres / 2000, 0])  # so much for the centre makes it that much taller, its bottom where it was
        monkeypatch.setitem(
            assets.STANDINS, "050_bell", partial(lambda make, up, size, center, contact: make(size + 2 * up, center + up, contact), assets.bell, up)
        )
        assert [run_expert(env, seed) for seed in (0, 1)] == solved
        assert env.simulation.scene.things["bell"].model.id == 1  # seed 0 has model 0, seed 1 model 1


def test_success_needs_a_closed_gripper_on_the_bells_side_and_a_touch_near_the_point(env, monkeypatch):
    env.reset(seed=0)
    simulation, scene = env.simulation, env.simulation.scene
    task, hand = simulation.task, scene.robot
    point = task.bell.point("contact")[:3, 3]
    assert task.arm == "left"

    def solved(offset, left, right=1.0):
        hand.grippers = np.array([left, right])
        monkeypatch.setattr(scene, "touching", lambda links, thing: np.array([point + offset]).reshape(-1, 3))
        return task.solved(scene)

    assert solved((0.0249, -0.0249, 0.0299), left=0.19)
    assert not solved((0.0251, 0, 0), left=0.19) and not solved((0, -0.0251, 0), left=0.19) and not solved((0, 0, 0.0301), left=0.19)
    assert not solved((0, 0, 0), left=0.2) and not solved((0, 0, 0), left=1.0, right=0.0)
    monkeypatch.setattr(scene, "touching", lambda links, thing: np.zeros((0, 3)))
    hand.grippers = np.zeros(2)
    assert not task.solved(scene)


def test_a_chunk_stops_at_success_and_draws_nothing_on_the_way(env, monkeypatch):
    env.reset(seed=0)
    expert = catalog.make_expert(ID, env.simulation)
    expert.reset()
    env.step_chunk(expert.act()), env.step_chunk(expert.act())
    drawn, stage = [], env.simulation.scene.stage
    pictures = stage.pictures
    monkeypatch.setattr(stage, "pictures", lambda names: drawn.append(names) or pictures(names))
    down = expert.act()
    chunk = np.vstack([down, np.repeat(down[-1:], 10, axis=0)])
    result = env.step_chunk(chunk)
    assert len(drawn) == 1
    assert result.terminated.sum() == 1 and result.terminated[result.length - 1] and result.reward[result.length - 1] == 1 == result.reward.sum()
    assert result.length <= len(down) and result.info["success"]
    with pytest.raises(gym.error.ResetNeeded):
        env.step_chunk(chunk)


def test_watching_sees_every_control_step_and_changes_nothing(env):
    actions = np.tile([0.2, 0.5, 0.5, 0, 0, 0, 0.5] * 2, (4, 1)) * np.linspace(0.25, 1, 4)[:, None]
    env.reset(seed=1)
    quiet = env.step_chunk(actions)
    env.reset(seed=1)
    frames = []
    watched = env.step_chunk(actions, watch=lambda: frames.append(env.simulation.render()))
    assert len(frames) == 4 and (frames[0] != frames[3]).any()
    assert all(np.array_equal(quiet.observation[key], watched.observation[key]) for key in quiet.observation)


def test_objects_fall_rest_and_are_drawn_and_leave_with_their_episode(env):
    env.reset(seed=0)
    scene = env.simulation.scene
    alone = env.simulation.observe()["main_images"]
    model = scene.assets.model("050_bell", 1)
    where = [sapien.Pose([x, 0.05, 0.80], [0.5, 0.5, 0.5, 0.5]) for x in (0.15, 0.3)]
    dropped = [scene.add(f"bell {i}", model, pose, mass=0.05) for i, pose in enumerate(where)]
    scene.ready()
    for _ in range(250):
        scene.step()
    for thing, spawn in zip(dropped, where, strict=True):
        bottom = thing.position[2] + model.center[1] - model.size[1] / 2
        assert abs(bottom - TABLE_TOP) < 1e-3 and np.allclose(thing.position[:2], spawn.p[:2], atol=0.01)
        assert np.isclose(thing.body.mass, 0.05) and thing.point("contact")[2, 3] > bottom
    both = env.simulation.observe()["main_images"]
    assert (np.abs(both.astype(int) - alone).max(axis=-1) > 30).sum() > 5
    env.reset(seed=0)
    assert np.array_equal(env.simulation.observe()["main_images"], alone) and list(scene.things) == ["bell"]


def test_scripts_move_one_hand_or_both_and_tip_over_for_far_grasps(env):
    env.reset(seed=0)
    simulation, scene = env.simulation, env.simulation.scene
    hands, hand = Hands(simulation), scene.robot
    before = {side: hand.hand(side) for side in robot.SIDES}
    env.step_chunk(hands.go(left=pose((0.02, 0, 0)) @ before["left"], right=pose((0, 0.03, 0.01)) @ before["right"]))
    env.step_chunk(hands.lift("left", 0.05))
    env.step_chunk(hands.grip("right", 0.3))
    assert np.allclose((hand.hand("left") - before["left"])[:3, 3], [0.02, 0, 0.05], atol=2e-3)
    assert np.allclose((hand.hand("right") - before["right"])[:3, 3], [0, 0.03, 0.01], atol=2e-3)
    assert hand.gripper("right") == pytest.approx(0.3) and hand.gripper("left") == 1
    bell = scene.things["bell"]
    for y, straight in ((-0.1, True), (0.2, False)):
        bell.entity.set_pose(sapien.Pose([-0.15, y, 0.741], [0.5, 0.5, 0.5, 0.5]))
        target = hands.grasp_pose("left", bell, back=0.05)
        tcp = target[:3, 3] + (robot.TCP + 0.05) * target[:3, 0]
        assert np.allclose(tcp, bell.point("contact")[:3, 3], atol=1e-6)
        assert np.isclose(-target[2, 0], 1) == straight and target[1, 0] > -1e-6  # down, or down and forwards
    bell.entity.set_pose(sapien.Pose([-0.15, 2.0, 0.741], [0.5, 0.5, 0.5, 0.5]))
    with pytest.raises(Unreachable, match=r"left hand cannot grasp bell"):
        hands.grasp_pose("left", bell)
    expert = catalog.make_expert(ID, simulation)
    expert.reset()
    assert np.allclose(expert.act(), hand.state, atol=1e-6)  # it stays where it is


# ------------------------------------------------------------------------------------------------ executors and control modes


def test_the_two_executors_end_in_the_same_state_by_different_paths():
    actions = np.zeros((5, 14), np.float32)
    actions[:, 1:3] = np.linspace(0.02, 0.1, 5)[:, None]
    actions[:, 6] = np.linspace(1, 0.5, 5)
    outcomes, states = [], []
    for executor in ("chunk", "per_action"):
        env = bell(executor=executor, cameras=("head",))
        env.reset(seed=0)
        result = env.step_chunk(actions)
        outcomes.append(result.info["physics_steps"])
        states.append(result.observation["states"])
        measured = env.simulation.scene.robot.articulation.get_qpos()
        names = [joint.name for joint in env.simulation.scene.robot.articulation.active_joints]
        assert abs(measured[names.index("fl_joint2")] - 0.1) < 0.02  # the joints follow their drive targets
    assert np.array_equal(*states) and np.allclose(states[0][[1, 2, 6]], [0.1, 0.1, 0.5], atol=1e-6)
    assert 150 < outcomes[0] < 200  # 0.1 rad through five points without stopping: as long as one move of 0.1 rad
    assert outcomes[1] == 5 * np.ceil(250 * 2 * np.sqrt(0.02))  # rest to rest five times


def test_hand_poses_are_reached_and_unreachable_ones_are_flagged():
    env = bell(control_mode="ee_pose", cameras=("head",))
    env.reset(seed=0)
    hands = env.simulation.scene.robot
    home = [euler_of_pose(hands.hand(side)) for side in robot.SIDES]
    asked = np.array([*home[0], 1, *home[1], 1])
    asked[[1, 2, 8, 9]] += [0.05, -0.05, 0.03, 0.02]  # left hand forwards and down, right hand forwards and up
    result = env.step_chunk(asked[None])
    assert result.info["unreachable"] == 0 and result.info["ik_error"] < 1e-3
    for i, side in enumerate(robot.SIDES):
        assert np.allclose(hands.hand(side)[:3, 3], asked[7 * i : 7 * i + 3], atol=1e-3)
        link = hands.links[f"{robot.PREFIX[side]}_link6"].entity.pose
        assert np.allclose(link.p, asked[7 * i : 7 * i + 3], atol=0.01)  # the arm itself, not only the command
    far = asked.copy()
    far[:3] = [-1.4, 1.4, 1.0]
    result = env.step_chunk(far[None])
    assert result.info["unreachable"] == 1 and result.info["ik_error"] > 0.5
    reach = hands.hand("left")[:2, 3] - robot.ARM_BASE["left"][0][:1]
    assert reach[1] > home[0][1] + 0.1  # stretched out towards it


# ------------------------------------------------------------------------------------------------ kinematics


def test_forward_kinematics_agrees_with_sapien_and_with_the_known_home(env):
    env.reset(seed=0)
    hands = env.simulation.scene.robot
    assert np.allclose(hands.hand("left")[:3, 3], [-0.298, -0.314, 0.942], atol=5e-4)
    assert np.allclose(hands.hand("right")[:3, 3], [0.306, -0.313, 0.941], atol=5e-4)
    for side in robot.SIDES:  # the gripper points away from the robot
        assert np.allclose(hands.hand(side)[:3, 0], [0, 1, 0], atol=0.03)
    names = [joint.name for joint in hands.articulation.active_joints]
    random = np.random.default_rng(0)
    for _ in range(5):
        positions = random.uniform(-2, 2, len(names)).astype(np.float32)
        hands.articulation.set_qpos(positions)
        for side, arm in hands.arms.items():
            joints = positions[[names.index(name) for name in arm.names]]
            link = hands.links[f"{robot.PREFIX[side]}_link6"].entity.pose.to_transformation_matrix()
            assert np.allclose(arm.forward(joints), link, atol=1e-5)


def test_inverse_kinematics_comes_back_and_says_how_far_off_it_is():
    random = np.random.default_rng(0)
    arm = Arm(robot.urdf(), "fl_link6", robot.BASE)
    for _ in range(40):
        joints = np.array([0, 1.2, 1.0, 0, 0, 0]) + random.uniform(-0.6, 0.6, 6)
        target = arm.forward(joints)
        solution = arm.inverse(target, np.zeros(6))
        assert solution.reached
        tip = arm.forward(solution.joints)
        assert np.linalg.norm(tip[:3, 3] - target[:3, 3]) < 1e-3 and np.abs(tip[:3, :3] - target[:3, :3]).max() < 0.015
        assert (np.abs(solution.joints) <= np.pi).all()
        near = arm.inverse(target, joints + 0.02)
        assert np.abs(near.joints - joints).max() < 0.05  # from nearby it stays nearby
    tip, jacobian = arm.jacobian(joints)
    for i, step in enumerate(1e-6 * np.eye(6)):
        moved = arm.forward(joints + step)
        assert np.allclose((moved - tip)[:3, 3] / 1e-6, jacobian[:3, i], atol=1e-4)
        assert np.allclose(Rotation.from_matrix(moved[:3, :3] @ tip[:3, :3].T).as_rotvec() / 1e-6, jacobian[3:, i], atol=1e-4)
    round_the_back = np.array([0, 1.2, 1.0, 0, 0, 3.0])
    solution = arm.inverse(arm.forward(round_the_back), np.array([0, 1.2, 1.0, 0, 0, -2.9]))
    assert solution.reached and np.allclose(solution.joints, round_the_back, atol=0.02)  # -3.28 would be nearer, but lies beyond half a turn
    far = pose((5, 5, 5))
    solution = arm.inverse(far, np.zeros(6))
    assert not solution.reached and np.isclose(solution.position_error, np.linalg.norm(arm.forward(solution.joints)[:3, 3] - 5), atol=1e-6)


def test_euler_angles_come_back():
    for values in (np.array([0.1, 0.2, 0.3, 0.4, -0.5, 2.0]), np.array([0, 0, 0, 0.7, np.pi / 2, 0]), np.array([0, 0, 0, -0.7, -np.pi / 2, 0])):
        assert np.allclose(euler_of_pose(pose_of_euler(values)), values, atol=1e-6)
    turn = pose_of_euler(np.array([0, 0, 0, 0.3, 0.4, 0.5]))[:3, :3]
    assert np.allclose(turn, (Rotation.from_euler("z", 0.5) * Rotation.from_euler("y", 0.4) * Rotation.from_euler("x", 0.3)).as_matrix())


# ------------------------------------------------------------------------------------------------ time


@pytest.mark.parametrize(("distance", "steps"), [(0.01, 50), (0.1, 159), (0.25, 250), (1.0, 500), (3.0, 1000)])
def test_rest_to_rest_takes_the_known_time(distance, steps):
    goal = np.zeros(12)
    goal[3] = distance
    positions, velocities, ends = trajectory.rest_to_rest(np.zeros(12), goal)
    assert len(positions) == ends[-1] == steps
    assert np.array_equal(positions[-1], goal) and velocities[-1, 3] == 0
    assert (np.diff(positions[:, 3]) > -1e-12).all()
    assert np.allclose(np.diff(positions[:, 3], prepend=0)[:-1] * 250, velocities[:-1, 3], atol=0.003)


@pytest.mark.parametrize("kind", ["smooth", "noisy", "wild", "zigzag", "tiny", "holds"])
def test_a_chunk_keeps_the_limits_and_passes_every_waypoint(kind):
    random = np.random.default_rng(1)
    waypoints = {
        "smooth": np.linspace(0, 1, 26)[:, None] ** 2 * random.uniform(-1, 1, 12),
        "noisy": np.cumsum(random.normal(0, 0.03, (26, 12)), axis=0),
        "wild": random.uniform(-3, 3, (5, 12)),
        "zigzag": 0.1 * (np.arange(6) % 2)[:, None] * np.ones(12),
        "tiny": np.cumsum(random.normal(0, 1e-4, (9, 12)), axis=0),
        "holds": np.repeat(random.uniform(-0.2, 0.2, (4, 12)), 3, axis=0),
    }[kind]
    grippers = random.uniform(0, 1, (len(waypoints), 2))
    motion = trajectory.plan(waypoints, grippers)
    path = np.vstack([waypoints[:1], motion.joints])
    assert np.abs(np.diff(path, axis=0)).max() * 250 < 1.01 * trajectory.MAX_VELOCITY
    assert np.abs(np.diff(motion.velocities, axis=0)).max() * 250 < 1.15 * trajectory.MAX_ACCELERATION  # sampled at 4 ms, between the planner's own grid
    assert (np.diff(motion.ends, prepend=0) > 0).all() and motion.ends[-1] == len(motion)
    for action, end in enumerate(motion.ends, start=1):
        assert np.abs(motion.joints[end - 1] - waypoints[action]).max() < 0.005
        assert np.allclose(motion.grippers[end - 1], grippers[action])
    assert np.array_equal(motion.joints[-1], waypoints[-1]) and np.abs(motion.velocities[-1]).max() == 0
    if kind == "holds":  # an action that moves no arm takes the time of one recorded frame
        assert np.diff(motion.ends, prepend=0)[[0, 1, 3, 4]].tolist() == [15, 15, 15, 15]


def test_a_path_that_cannot_be_planned_as_one_stops_at_every_waypoint(monkeypatch):
    waypoints = np.linspace(0, 0.3, 4)[:, None] * np.ones(12)
    monkeypatch.setattr(trajectory.TOPPRA, "compute_trajectory", lambda self: None)
    motion = trajectory.plan(waypoints, np.ones((4, 2)))
    assert motion.ends.tolist() == [159, 318, 477] and np.array_equal(motion.joints[-1], waypoints[-1])


# ------------------------------------------------------------------------------------------------ words


def test_sentences_have_a_seen_and_a_held_out_set():
    sentences = ClickBell.sentences
    assert len(set(sentences.seen)) == 31 and len(set(sentences.unseen)) == 7 and not set(sentences.seen) & set(sentences.unseen)
    stands_for = {"A": "050_bell/base0", "a": "left"}
    assert len(sentences.fitting("seen", stands_for)) == 31  # with the arm, or without it
    assert all("{a}" not in template for template in sentences.fitting("seen", {"A": "050_bell/base0"}))
    drawn = {instruction(sentences, "seen", stands_for, seed) for seed in range(50)}
    assert len(drawn) > 30 and all("{" not in sentence and "bell" in sentence for sentence in drawn)
    assert any("the left arm" in sentence for sentence in drawn) and not any("right arm" in sentence for sentence in drawn)
    env = bell(instruction_set="unseen", cameras=("head",))
    assert env.reset(seed=1)[0]["task_descriptions"] not in {instruction(sentences, "seen", stands_for, seed) for seed in range(500)}


def test_every_episode_has_its_own_sentence_about_its_own_layout(env):
    sentences = set()
    for seed in range(12):
        observation, info = env.reset(seed=seed)
        words = observation["task_descriptions"]
        sentences.add(words)
        other = "left arm" if info["stands_for"].endswith("a=right") else "right arm"
        assert other not in words and env.reset(seed=seed)[0]["task_descriptions"] == words
    assert len(sentences) > 8


# ------------------------------------------------------------------------------------------------ assets


def write_official_release(folder) -> None:
    """The layout of the official release, with a box for the bell and our own robot as the URDF."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)
    faces = [0, 1, 3, 0, 3, 2, 4, 6, 7, 4, 7, 5, 0, 4, 5, 0, 5, 1, 2, 3, 7, 2, 7, 6, 0, 2, 6, 0, 6, 4, 1, 5, 7, 1, 7, 3]
    data = corners.tobytes() + np.array(faces, np.uint16).tobytes()
    views = [{"buffer": 0, "byteOffset": 0, "byteLength": 96}, {"buffer": 0, "byteOffset": 96, "byteLength": 72}]
    accessors = [
        {"bufferView": 0, "componentType": 5126, "count": 8, "type": "VEC3", "min": [-1, -1, -1], "max": [1, 1, 1]},
        {"bufferView": 1, "componentType": 5123, "count": 36, "type": "SCALAR"},
    ]
    header = {
        "asset": {"version": "2.0"},
        "scenes": [{"nodes": [0]}],
        "scene": 0,
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(data)}],
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    glb = (
        struct.pack("<4sII", b"glTF", 2, 28 + len(text) + len(data))
        + struct.pack("<I4s", len(text), b"JSON")
        + text
        + struct.pack("<I4s", len(data), b"BIN\0")
        + data
    )
    for model in (0, 1):
        for kind in ("visual", "collision"):
            file = folder / "objects" / "050_bell" / kind / f"base{model}.glb"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(glb)
        contact = pose((0, 0.1, 0)).tolist()  # before scaling: 27 mm below the top
        record = {"center": [0, 0, 0], "extents": [2, 2, 2], "scale": [0.05, 0.03, 0.05], "contact_points_pose": [contact], "functional_matrix": []}
        (folder / "objects" / "050_bell" / f"model_data{model}.json").write_text(json.dumps(record))
    urdf = folder / assets.ROBOT_URDF
    urdf.parent.mkdir(parents=True)
    urdf.write_text(robot.urdf())


def test_the_official_release_is_used_where_it_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("VLAHUB_ASSETS", str(tmp_path))
    assert assets.find("auto", ["050_bell"]).name == "stand-in"
    with pytest.raises(FileNotFoundError, match=r"objects\.zip.*TianxingChen/RoboTwin2\.0.*vlahub assets robotwin --download.*VLAHUB_ASSETS"):
        gym.make(ID, assets="official")
    write_official_release(tmp_path / "robotwin")
    assert assets.find("auto", ["050_bell"]).name == "official" == assets.find(str(tmp_path / "robotwin"), ["050_bell"]).name
    assert assets.find("auto", ["050_bell", "001_bottle"]).name == "stand-in"  # an incomplete release is not mixed with stand-ins
    assert assets.find("stand-in", ["050_bell"]).name == "stand-in"
    env = gym.make(ID, **SMALL)
    assert env.assets == "official"
    env.reset(seed=0)
    thing = env.simulation.scene.things["bell"]
    assert np.allclose(thing.model.size, [0.1, 0.06, 0.1])
    assert np.allclose(thing.point("contact")[:3, 3], thing.position + np.array([0, 0, 0.1 * 0.03]), atol=1e-6)  # scaled, and y-up
    assert run_expert(env, 0)  # it collides
    (tmp_path / "robotwin" / "objects" / "050_bell" / "model_data0.json").unlink()
    (tmp_path / "robotwin" / "objects" / "050_bell" / "model_data1.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model_data\d\.json"):
        env.reset(seed=0)


def test_the_release_is_a_pack_that_can_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("VLAHUB_ASSETS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    code = "import sys, vlahub.assets as a, pathlib; print(a.missing('robotwin', pathlib.Path('/nowhere'))); assert 'sapien' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", "import vlahub; " + code], capture_output=True, text=True, check=True).stdout
    assert assets.ROBOT_URDF in out and "objects/050_bell" in out and "objects/021_cup" in out
    assert releases.find("robotwin") is None and releases.find("robotwin-backgrounds") is None
    write_official_release(tmp_path / "robotwin")
    for name in assets._measurements():
        (tmp_path / "robotwin" / "objects" / name).mkdir(exist_ok=True)
    assert releases.find("robotwin") == tmp_path / "robotwin"
    snapshot = tmp_path / "hub" / "datasets--TianxingChen--RoboTwin2.0" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "robotwin").rename(snapshot)  # the hub's cache is a place to look, too
    assert assets.find("official", ["050_bell"]).folder == snapshot == assets.find("auto", ["050_bell"]).folder
    with pytest.raises(FileNotFoundError, match=r"snapshots/abc lacks objects/001_nothing\); get them with"):
        assets.find("official", ["050_bell", "001_nothing"])
    for which in ("seen", "unseen"):
        (tmp_path / "robotwin-backgrounds" / "background_texture" / which).mkdir(parents=True)
    assert assets.backgrounds(assets.Official(snapshot), "seen") == tmp_path / "robotwin-backgrounds" / "background_texture"
    assert not releases.missing("robotwin-backgrounds", tmp_path / "robotwin-backgrounds")


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"control_mode": "joints"}, ValueError, "control_mode must be 'qpos' or 'ee_pose', not 'joints'"),
        ({"executor": "fast"}, ValueError, "executor must be 'chunk' or 'per_action'"),
        ({"cameras": ("head", "left_wirst")}, ValueError, "'left_wrist'"),
        ({"cameras": ("left_wrist",)}, ValueError, "must contain 'head'"),
        ({"camera_size": 240}, ValueError, r"camera_size must be \(height, width\)"),
        ({"camera_size": (240, 0)}, ValueError, "camera_size"),
        ({"instruction_set": "new"}, ValueError, "'seen' or 'unseen'"),
        ({"shader": "rt"}, ValueError, "shader"),
        ({"assets": "oficial"}, FileNotFoundError, "'auto', 'official', 'stand-in'"),
        ({"camera_sise": (24, 32)}, TypeError, "'camera_size'"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, error, words):
    with pytest.raises(error, match=words):
        gym.make(ID, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": 1}, "task 0 only"),
        ({"trial": -1}, "trial must be"),
        ({"trial": 1.5}, "trial must be"),
        ({"layout": 3}, "unknown reset option 'layout'.*'trial'"),
    ],
)
def test_bad_reset_options_are_refused_by_name(env, options, words):
    with pytest.raises(ValueError, match=words):
        env.reset(seed=0, options=options)


def test_an_unknown_task_suggests_the_nearest():
    from vlahub_envs.robotwin.simulation import RoboTwin

    with pytest.raises(ValueError, match="did you mean 'ClickBell'"):
        RoboTwin(task="ClickBel")


def test_without_vulkan_the_error_says_what_to_install(tmp_path):
    blind = {**os.environ, "VK_ICD_FILENAMES": str(tmp_path / "none.json"), "VK_DRIVER_FILES": str(tmp_path / "none.json")}
    code = f"import gymnasium, vlahub; gymnasium.make({ID!r}, assets='stand-in')"
    done = subprocess.run([sys.executable, "-c", code], env=blind, capture_output=True, text=True)
    assert done.returncode == 1 and SOFTWARE_VULKAN in done.stderr and "vlahub doctor" in done.stderr


def test_close_may_be_called_twice():
    env = bell()
    env.reset(seed=0)
    env.close(), env.close()


@pytest.mark.slow
def test_two_hundred_resets_do_not_grow_the_process(env):
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    for seed in range(30):
        env.reset(seed=seed)
    before = resident()
    for seed in range(200):
        env.reset(seed=seed)
    assert resident() < 1.05 * before
