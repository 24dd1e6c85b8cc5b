"""The arm's controller and the physics of one control step: robosuite's OSC_POSE, number for number, without its second forward pass, and compiled.

robosuite runs, 25 times per control step, `mj_forward`, the controller, and `mj_step`, which computes the forward pass again. Here the controller stands
between `mj_step1` and `mj_step2`, the two halves of `mj_step`, and the whole inner loop is one compiled function, `_run`. It calls MuJoCo's C functions and
robosuite's own kernels on arrays of the same memory layout, so that every intermediate number has the same bits; tests compare them with the stock
environment's. numba keeps what it has compiled on the disk; only the first use on a machine waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding
import mujoco
import numpy as np
from numba import njit, types
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error, set_goal_orientation

SUBSTEPS = 25  # of 2 ms: 20 Hz
BROKEN = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)

# MuJoCo's C functions on addresses of model, data and arrays. Unlike pointers, named symbols are found again by code that was compiled in another process.
llvmlite.binding.load_library_permanently(str(next(Path(mujoco.__file__).parent.glob("*mujoco.*"))))
_step1 = types.ExternalFunction("mj_step1", types.void(types.intp, types.intp))
_step2 = types.ExternalFunction("mj_step2", types.void(types.intp, types.intp))
_jacobians = types.ExternalFunction("mj_jacSite", types.void(types.intp, types.intp, types.intp, types.intp, types.intc))
_full_mass = types.ExternalFunction("mj_fullM", types.void(types.intp, types.intp, types.intp))


class Unstable(RuntimeError):
    """MuJoCo found infinities and has reset the world behind our back."""


class World(NamedTuple):
    """MuJoCo's own arrays, seen from here, and three of ours for what it computes."""

    model: int  # addresses
    data: int
    qpos: np.ndarray
    qvel: np.ndarray  # [nv]
    bias: np.ndarray  # [nv] gravity, centrifugal and Coriolis forces
    sparse_mass: np.ndarray
    ctrl: np.ndarray
    hand_position: np.ndarray  # [3] of the grip site
    hand_rotation: np.ndarray  # [9]
    mass: np.ndarray  # [nv, nv]
    jacobian_position: np.ndarray  # [3, nv]
    jacobian_rotation: np.ndarray  # [3, nv]


class Arm(NamedTuple):
    """The robot's constants."""

    site: int
    joints: np.ndarray  # [7] addresses in qpos
    speeds: np.ndarray  # [7] addresses in qvel
    actuators: np.ndarray  # [7]
    low: np.ndarray  # [7] torque limits
    high: np.ndarray
    kp: np.ndarray  # [6] stiffness, damping
    kd: np.ndarray
    fingers: np.ndarray  # [2] actuators
    grip_middle: np.ndarray  # [2] from -1..1 to positions
    grip_reach: np.ndarray
    grip_speed: float  # per substep


class Measured(NamedTuple):
    """What the controller reads, in the memory layout of robosuite's arrays: the last bit of a product depends on it."""

    position: np.ndarray  # [3] of the hand
    rotation: np.ndarray  # [3, 3]
    velocity: np.ndarray  # [3]
    spin: np.ndarray  # [3]
    joints: np.ndarray  # [7]
    speeds: np.ndarray  # [7]
    j_position: np.ndarray  # [3, 7] Fortran order, as all below
    j_rotation: np.ndarray  # [3, 7]
    j_full: np.ndarray  # [6, 7]
    mass: np.ndarray  # [7, 7]


class Goal(NamedTuple):
    """What the controller drives to."""

    position: np.ndarray  # [3]
    rotation: np.ndarray  # [3, 3]
    rest: np.ndarray  # [7] joints that it prefers
    grip: np.ndarray  # [2] in -1..1, moves by `grip_speed` per substep


# Plain loops, because numba takes seconds to compile an assignment to a slice.


@njit(cache=True)
def _measure(world: World, arm: Arm, now: Measured) -> None:
    _jacobians(world.model, world.data, world.jacobian_position.ctypes.data, world.jacobian_rotation.ctypes.data, arm.site)
    _full_mass(world.model, world.mass.ctypes.data, world.sparse_mass.ctypes.data)
    velocity, spin = np.dot(world.jacobian_position, world.qvel), np.dot(world.jacobian_rotation, world.qvel)
    for i in range(3):
        now.position[i], now.velocity[i], now.spin[i] = world.hand_position[i], velocity[i], spin[i]
        for k in range(3):
            now.rotation[i, k] = world.hand_rotation[3 * i + k]
    for k in range(7):
        now.joints[k], now.speeds[k] = world.qpos[arm.joints[k]], world.qvel[arm.speeds[k]]
        for i in range(3):
            now.j_position[i, k] = now.j_full[i, k] = world.jacobian_position[i, arm.speeds[k]]
            now.j_rotation[i, k] = now.j_full[3 + i, k] = world.jacobian_rotation[i, arm.speeds[k]]
        for i in range(7):
            now.mass[i, k] = world.mass[arm.speeds[i], arm.speeds[k]]


@njit(cache=True)
def _drive(world: World, arm: Arm, now: Measured, goal: Goal, grip: float) -> None:
    """Set the motors' torques and the fingers' aim."""
    force, torque, wrench = np.empty(3), np.empty(3), np.empty(6)
    error = orientation_error(goal.rotation, now.rotation)
    for i in range(3):
        force[i] = (goal.position[i] - now.position[i]) * arm.kp[i] + -now.velocity[i] * arm.kd[i]
        torque[i] = error[i] * arm.kp[3 + i] + -now.spin[i] * arm.kd[3 + i]
    _, lambda_position, lambda_rotation, nullspace = opspace_matrices(now.mass, now.j_full, now.j_position, now.j_rotation)
    force, torque = np.dot(lambda_position, force), np.dot(lambda_rotation, torque)
    for i in range(3):
        wrench[i], wrench[3 + i] = force[i], torque[i]
    torques, rest = np.dot(now.j_full.T, wrench), nullspace_torques(now.mass, nullspace, goal.rest, now.joints, now.speeds)
    for k in range(7):
        world.ctrl[arm.actuators[k]] = min(max(torques[k] + world.bias[arm.speeds[k]] + rest[k], arm.low[k]), arm.high[k])
    for k, side in ((0, -1.0), (1, 1.0)):
        goal.grip[k] = min(max(goal.grip[k] + side * arm.grip_speed * np.sign(grip), -1.0), 1.0)
        world.ctrl[arm.fingers[k]] = arm.grip_middle[k] + arm.grip_reach[k] * goal.grip[k]


@njit(cache=True)
def _run(world: World, arm: Arm, now: Measured, goal: Goal, grip: float, count: int, begun: bool) -> None:
    """`count` substeps; of the first one `begun` says that its first half and the measuring are done."""
    for substep in range(count):
        if substep > 0 or not begun:
            _step1(world.model, world.data)
            _measure(world, arm, now)
        _drive(world, arm, now, goal, grip)
        _step2(world.model, world.data)


class Controller:
    """Reads the robot's constants once; `reset` takes over the goal that robosuite's own controller has after its reset."""

    def __init__(self, env: Any):
        self.robot = robot = env.robots[0]
        self.model, self.data = env.sim.model._model, env.sim.data._data
        controller, gripper = robot.controller, robot.gripper
        known = controller.name == "OSC_POSE" and controller.impedance_mode == "fixed" and controller.use_delta and controller.uncoupling
        if not known or type(gripper).__name__ != "PandaGripper" or len(robot._ref_joint_actuator_indexes) != 7:
            raise RuntimeError(f"robosuite gives {type(robot).__name__} and {controller.name} with other settings than LIBERO's; this needs robosuite 1.4.0")
        self.scale = controller.scale_action
        model, data, nv = self.model, self.data, self.model.nv
        self.site = site = model.site(controller.eef_name).id
        self.world = World(
            model._address, data._address, data.qpos, data.qvel, data.qfrc_bias, data.qM, data.ctrl, data.site_xpos[site], data.site_xmat[site],
            mass=np.zeros((nv, nv)), jacobian_position=np.zeros((3, nv)), jacobian_rotation=np.zeros((3, nv)),
        )  # fmt: skip
        fingers = np.array([model.actuator(name).id for name in gripper.actuators])
        limits = model.actuator_ctrlrange[fingers]
        self.arm = Arm(
            site=site,
            joints=np.array(controller.qpos_index),
            speeds=np.array(controller.qvel_index),
            actuators=np.array(robot._ref_joint_actuator_indexes),
            low=np.array(robot.torque_limits[0], float),
            high=np.array(robot.torque_limits[1], float),
            kp=np.array(controller.kp, float),
            kd=np.array(controller.kd, float),
            fingers=fingers,
            grip_middle=0.5 * (limits[:, 1] + limits[:, 0]),
            grip_reach=0.5 * (limits[:, 1] - limits[:, 0]),
            grip_speed=gripper.speed,
        )
        vectors = [np.zeros(size) for size in (3, 3, 3, 7, 7)]
        self.now = Measured(vectors[0], np.zeros((3, 3)), *vectors[1:], *(np.zeros((rows, 7), order="F") for rows in (3, 3, 6, 7)))
        self.goal = Goal(np.zeros(3), np.zeros((3, 3)), np.zeros(7), np.zeros(2))

    def reset(self) -> None:
        controller = self.robot.controller  # robosuite makes a new one at every reset
        # assigned in place: compiled code checks no bounds, and the hand's command is one number until it has moved, then two
        for mine, its in zip(self.goal, (controller.goal_pos, controller.goal_ori, controller.initial_joint, self.robot.gripper.current_action), strict=True):
            mine[:] = its
        # robosuite's first substep works with what its controller measured at its reset, before the initial state was set; so the first goal starts there
        self.measured = not controller.new_update
        if self.measured:
            arm = (controller.ee_pos, controller.ee_ori_mat, controller.ee_pos_vel, controller.ee_ori_vel, controller.joint_pos, controller.joint_vel)
            for mine, its in zip(self.now, (*arm, controller.J_pos, controller.J_ori, controller.J_full, controller.mass_matrix), strict=True):
                mine[:] = its

    def step(self, action: np.ndarray, pause: int, look: Callable[[], None]) -> None:
        """One control step of `action` [7]; `look` is called after `pause` of its substeps (0: not at all)."""
        mujoco.mj_step1(self.model, self.data)
        if not self.measured:
            _measure(self.world, self.arm, self.now)
        self.measured = False
        delta = self.scale(action[:6])
        # without a turn the rotation aimed at stays; the position aimed at always starts from where the hand is
        if delta[3:].any():
            self.goal.rotation[:] = set_goal_orientation(delta[3:], self.now.rotation)
        self.goal.position[:] = self.now.position + delta[:3]
        if pause:
            _run(self.world, self.arm, self.now, self.goal, action[6], pause, True)
            look()
        _run(self.world, self.arm, self.now, self.goal, action[6], SUBSTEPS - pause, not pause)
        if any(self.data.warning[kind].number for kind in BROKEN):
            raise Unstable(f"the simulation has become unstable: MuJoCo found infinite or huge numbers at t = {self.data.time:.3f} s and reset its state")


class SampleClock:
    """When robosuite's observables look: once per control step, at a substep that depends on how the episode began.

    After `reset` and `set_init_state`, which look once each, it is the 24th of 25, and pictures and states are those of that moment. The additions are
    robosuite's, in its order, because their rounding decides where the period ends.
    """

    def __init__(self) -> None:
        self.elapsed, self.sampled = 0.0, False
        for _ in range(2):
            self.tick(force=True)

    def tick(self, force: bool = False) -> bool:
        """2 ms have passed. -> is this the moment to look?"""
        self.elapsed += 0.002
        look = force or (not self.sampled and 0.05 >= self.elapsed)
        self.sampled = self.sampled or look
        if self.elapsed >= 0.05:
            self.elapsed %= 0.05
            self.sampled = False
        return look

    def step(self) -> int:
        """A control step passes. -> after how many of its substeps to look; the last time counts. 0: not at all."""
        return max(number if self.tick() else 0 for number in range(1, SUBSTEPS + 1))
