"""The arm's controller and the physics of one control step: robosuite's OSC_POSE, number for number, without its second forward pass and its look-ups.

robosuite runs, 25 times per control step, `mj_forward`, the controller, and `mj_step`, which computes the forward pass again. Here the controller stands
between `mj_step1` and `mj_step2`, the two halves of `mj_step`. It calls robosuite's own compiled functions on arrays of the same layout, so that every
intermediate number has the same bits; tests compare them with the stock environment's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error, set_goal_orientation

SUBSTEPS = 25  # of 2 ms: 20 Hz
BROKEN = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)


class Unstable(RuntimeError):
    """MuJoCo found infinities and has reset the world behind our back."""


class Controller:
    """Reads the robot's constants once; `reset` takes over the goal that robosuite's own controller has after its reset."""

    def __init__(self, env: Any):
        self.env, self.robot = env, env.robots[0]
        self.model, self.data = env.sim.model._model, env.sim.data._data
        controller = self.robot.controller
        if controller.name != "OSC_POSE" or controller.impedance_mode != "fixed" or not (controller.use_delta and controller.uncoupling):
            raise RuntimeError(f"robosuite gives the controller {controller.name} with other settings than LIBERO's; this needs robosuite 1.4.0")
        self.site = self.model.site(controller.eef_name).id
        self.joints, self.speeds = controller.qpos_index, controller.qvel_index
        self.kp, self.kd, self.scale = controller.kp, controller.kd, controller.scale_action
        self.actuators = self.robot._ref_joint_actuator_indexes
        self.low, self.high = self.robot.torque_limits
        self.fingers = [self.model.actuator(name).id for name in self.robot.gripper.actuators]
        limits = self.model.actuator_ctrlrange[self.fingers]
        self.grip_middle, self.grip_reach = 0.5 * (limits[:, 1] + limits[:, 0]), 0.5 * (limits[:, 1] - limits[:, 0])
        self.mass = np.zeros((self.model.nv, self.model.nv))
        self.jacp, self.jacr = np.zeros((3, self.model.nv)), np.zeros((3, self.model.nv))

    def reset(self) -> None:
        controller = self.robot.controller  # robosuite makes a new one at every reset
        self.goal_position, self.goal_rotation = np.array(controller.goal_pos), np.array(controller.goal_ori)
        self.rest = np.array(controller.initial_joint)
        # robosuite's first substep works with what its controller measured at its reset, before the initial state was set; so the first goal starts there
        self.measured: tuple[np.ndarray, ...] | None = None
        if not controller.new_update:
            arm = (controller.ee_pos, controller.ee_ori_mat, controller.ee_pos_vel, controller.ee_ori_vel, controller.joint_pos, controller.joint_vel)
            self.measured = (*arm, controller.J_pos, controller.J_ori, controller.J_full, controller.mass_matrix)

    def step(self, action: np.ndarray, after_substep: Callable[[], None]) -> None:
        """One control step of `action` [7]. `after_substep` is called after each 2 ms."""
        model, data = self.model, self.data
        for substep in range(SUBSTEPS):
            mujoco.mj_step1(model, data)
            self._drive(action, new=substep == 0)
            mujoco.mj_step2(model, data)
            after_substep()
        if any(data.warning[kind].number for kind in BROKEN):
            raise Unstable(f"the simulation has become unstable: MuJoCo found infinite or huge numbers at t = {data.time:.3f} s and reset its state")

    def _measure(self) -> tuple[np.ndarray, ...]:
        """Hand position [3], rotation [3, 3], velocity [3], spin [3]; joint positions [7], speeds [7]; Jacobians [3, 7], [3, 7], [6, 7]; mass matrix [7, 7]."""
        model, data = self.model, self.data
        position = np.array(data.site_xpos[self.site])
        rotation = np.array(data.site_xmat[self.site].reshape([3, 3]))
        mujoco.mj_jacSite(model, data, self.jacp, self.jacr, self.site)
        velocity, spin = np.dot(self.jacp, data.qvel), np.dot(self.jacr, data.qvel)
        joints, speeds = np.array(data.qpos[self.joints]), np.array(data.qvel[self.speeds])
        # the copies keep the memory layout of robosuite's arrays, on which the last bit of a product depends
        j_position, j_rotation = np.array(self.jacp[:, self.speeds]), np.array(self.jacr[:, self.speeds])
        j_full = np.array(np.vstack([j_position, j_rotation]))
        mujoco.mj_fullM(model, self.mass, data.qM)
        return position, rotation, velocity, spin, joints, speeds, j_position, j_rotation, j_full, self.mass[self.speeds, :][:, self.speeds]

    def _drive(self, action: np.ndarray, new: bool) -> None:
        data = self.data
        position, rotation, velocity, spin, joints, speeds, j_position, j_rotation, j_full, mass = self.measured or self._measure()
        self.measured = None

        if new:
            delta = self.scale(action[:6])
            # without a turn the rotation aimed at stays; the position aimed at always starts from where the hand is
            if not all(math.isclose(angle, 0.0) for angle in delta[3:]):
                self.goal_rotation = set_goal_orientation(delta[3:], rotation)
            self.goal_position = position + delta[:3]

        error = orientation_error(self.goal_rotation, rotation)
        force = np.multiply(self.goal_position - position, self.kp[0:3]) + np.multiply(-velocity, self.kd[0:3])
        torque = np.multiply(error, self.kp[3:6]) + np.multiply(-spin, self.kd[3:6])
        _, lambda_position, lambda_rotation, nullspace = opspace_matrices(mass, j_full, j_position, j_rotation)
        wrench = np.concatenate([np.dot(lambda_position, force), np.dot(lambda_rotation, torque)])
        torques = np.dot(j_full.T, wrench) + data.qfrc_bias[self.speeds]
        torques += nullspace_torques(mass, nullspace, self.rest, joints, speeds)

        grip = self.robot.gripper.format_action(action[6:])
        data.ctrl[self.fingers] = self.grip_middle + self.grip_reach * grip
        data.ctrl[self.actuators] = np.clip(torques, self.low, self.high)


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
