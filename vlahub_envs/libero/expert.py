"""The scripted expert: it knows where everything is and what the goal says, and solves the task through the same seven numbers per action as any policy.

Every action is computed from the present state of the world, one at a time: towards a target that moves with the object, ever slower as it comes near.
So a policy that imitates it sees smooth motions that depend on the state and little else, and a push or a slip is corrected on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

from vlahub_envs.libero import grasps
from vlahub_envs.libero.grasps import TIP, Arm, Grasp, Matter
from vlahub_envs.libero.simulation import Libero

OPEN, CLOSED = -1.0, 1.0  # the gripper's number in an action
METRES, RADIANS = 0.05, 0.5  # that an action of 1 asks for
GAIN = 1.25  # of the distance to the target asked for in each step; the controller follows with a delay of three steps
STEEP = 6.0  # metres that a way over obstacles leads down for each metre to the side
MARGIN = 0.02  # m between what is carried and what lies under its way
LIFT = 0.04  # m of missing height at which nothing moves to the side any more
HAND = (0.05, 0.11)  # m from the grip site up to the hand's body, and how far that reaches to the sides
REST = 0.0006  # m: fingers that move less than this in a step have stopped
SLIPPED = 0.02  # m that an object may move in the grip
REACH = 0.69  # m from the shoulder to the wrist; at 0.719 the elbow is straight
SLOW = (0.62, 0.71, 0.35)  # with the wrist further than the first number the hand moves slower, as it could overshoot
ARRIVED = (0.006, 0.06)  # m and rad
PATIENCE = 60  # steps in which a movement must have ended
DOWN = np.array([0.0, 0.0, -1.0])

Pose = tuple[np.ndarray, np.ndarray]  # position [3] and rotation [3, 3]


class ScriptedExpert:
    """The expert of whatever task the simulation runs."""

    def __init__(self, simulation: Libero):
        self.simulation = simulation
        self.arms: dict[int, Arm] = {}

    def reset(self) -> None:
        self.scene = self.simulation.scene
        self.env, self.model, self.data = self.scene.env, self.scene.model, self.scene.data
        self.arm = Arm(self.scene)
        self.grip = OPEN
        self.bodies = {name: np.flatnonzero(self.model.body_rootid == body) for name, body in self.env.obj_body_id.items()}
        self._script = self._solve()

    def act(self) -> np.ndarray:
        """[1, 7]: one action, from the present state."""
        return np.array([next(self._script)], np.float32)

    # -------------------------------------------------------------------------------------------- goals

    def _solve(self) -> Iterator[np.ndarray]:
        while True:
            for predicate, *names in self.env.parsed_problem["goal_state"]:
                if not self.env._eval_predicate([predicate, *names]):
                    yield from {"on": self._put, "in": self._put, "open": self._open, "turnon": self._turn_on}[predicate](*names)
            yield self._towards(*self._hand())

    def _put(self, name: str, place: str) -> Iterator[np.ndarray]:
        body = self.env.obj_body_id[name]
        grasp = self._grasp(self.bodies[name], self.data.xipos[body], self._from_above(body))
        yield from self._take(grasp, body)
        yield from self._carry(name, place)

    def _open(self, name: str) -> Iterator[np.ndarray]:
        joint = self.model.joint(self.env.object_states_dict[name].env.object_sites_dict[name].joints[0]).id
        yield from self._operate(joint, float(self.model.jnt_range[joint][0]))

    def _turn_on(self, name: str) -> Iterator[np.ndarray]:
        joint = self.model.joint(self.env.get_object(name).joints[0]).id
        yield from self._operate(joint, 1.0)

    # -------------------------------------------------------------------------------------------- skills

    def _from_above(self, body: int) -> list[tuple[np.ndarray, float]]:
        """Orientations of a hand that points down: as it does at the start, along the object's sides, and between."""
        angles = set(np.deg2rad([0, 22.5, -22.5, 45, -45, 67.5, -67.5, 90, -90]).round(6))
        for axis in self.data.xmat[body].reshape(3, 3).T:
            if np.hypot(*axis[:2]) > 0.9:
                angle = np.arctan2(axis[1], axis[0])
                angles |= {float((angle + turn + np.pi / 2) % np.pi - np.pi / 2) for turn in (0, np.pi / 2)}
        start = np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1.0]])
        return [(Rotation.from_euler("z", angle).as_matrix() @ start, abs(angle)) for angle in angles]

    def _grasp(self, bodies: np.ndarray, centre: np.ndarray, orientations: list[tuple[np.ndarray, float]]) -> Grasp:
        grasp = grasps.find(self.arm, bodies, centre, orientations)
        if grasp is None:
            raise RuntimeError(f"{self.scene.task.name}: no grasp within reach")
        return grasp

    def _take(self, grasp: Grasp, body: int) -> Iterator[np.ndarray]:
        """Go to the grasp, which moves with the body, and close the gripper."""
        position, rotation = self._frame(body)
        local = rotation.T @ (grasp.position - position), rotation.T @ grasp.rotation

        def target() -> Pose:
            position, rotation = self._frame(body)
            return position + rotation @ local[0], rotation @ local[1]

        self.grip = OPEN
        yield from self._approach(target)
        held = self._hand()
        self.grip = CLOSED
        for step in range(PATIENCE):
            before = self.data.qpos[self.scene.fingers].copy()
            yield self._towards(*held)
            if step > 2 and np.abs(self.data.qpos[self.scene.fingers] - before).max() < REST:
                return

    def _approach(self, target: Callable[[], Pose]) -> Iterator[np.ndarray]:
        """To a pose from behind it, along the hand's own axis; from above also over what stands in the way."""
        for _ in range(3 * PATIENCE):
            position, rotation = target()
            here, turned = self._hand()
            out = rotation[:, 2]
            error = position - here
            angle = Rotation.from_matrix(rotation @ turned.T).magnitude()
            if np.linalg.norm(error) < ARRIVED[0] and angle < ARRIVED[1]:
                return
            aside = np.linalg.norm(error - out * (out @ error))
            back = 0.1
            if out[2] < -0.9:
                over = min(self._height_over(here, position, 0.06, TIP, 0.0, set()), self._ceiling(position))
                back = max(back, over - position[2])
            position = position - out * min(back, STEEP * max(0.0, aside - 0.004) + 0.15 * max(0.0, angle - ARRIVED[1]))
            yield self._towards(position, rotation)

    def _carry(self, name: str, place: str) -> Iterator[np.ndarray]:
        """Bring what the gripper holds to its place, over what stands in the way, and lower it until it is there or gets no lower; then let go."""
        body = self.env.obj_body_id[name]
        own = set(self.bodies[name])
        _, rotation = self._hand()
        lowest = np.inf
        stalled = 0
        apart = np.linalg.norm(self._hand()[0] - self.data.xpos[body])
        for _ in range(3 * PATIENCE):
            here = self.data.xpos[body].copy()
            goal = self._place(name, place)
            low, high = Matter(self.scene, self.bodies[name]).extent(-DOWN)
            bounds = Matter(self.scene, self.bodies[name]).bounds()
            radius = float(np.abs(np.concatenate([bounds[:, 0, :2], bounds[:, 1, :2]]) - here[:2]).max())
            aside = float(np.linalg.norm((goal - here)[:2]))
            hand, _ = self._hand()
            if abs(np.linalg.norm(hand - here) - apart) > SLIPPED:
                break
            over = self._height_over(here, goal, radius, here[2] - low, hand[2] - here[2], own)
            over = max(min(over, self._ceiling(hand + goal - here) - hand[2] + here[2]), goal[2])
            needed = min(over, goal[2] + STEEP * max(0.0, aside - 0.01))
            free = np.clip(1 - (needed - here[2]) / LIFT, 0, 1)
            shift = np.append((goal - here)[:2] * free, needed - here[2])
            if aside < 0.012:
                stalled = stalled + 1 if here[2] > lowest - 0.001 else 0
                lowest = min(lowest, here[2])
                if stalled > 3:
                    break
            yield self._towards(hand + shift, rotation)
        self.grip = OPEN
        hand = self._hand()[0]
        for _ in range(8):
            yield self._towards(hand, rotation)
        for _ in range(8):
            yield self._towards(hand + [0, 0, 0.1], rotation)

    def _operate(self, joint: int, goal: float) -> Iterator[np.ndarray]:
        """Grasp the moving part of a fixture and lead it along its joint."""
        body = int(self.model.jnt_bodyid[joint])
        axis = self.data.xaxis[joint].copy()
        slides = self.model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_SLIDE
        if slides:
            out = axis * np.sign(self.data.qpos[self.model.jnt_qposadr[joint]] - goal)
            orientations = [
                (np.stack([[0, 0, 1.0], np.cross(out, [0, 0, 1.0]), out], axis=1), 0.0),
                (np.stack([[0, 0, -1.0], np.cross(out, [0, 0, -1.0]), out], axis=1), 0.0),
            ]
        else:
            orientations = self._from_above(body)
        grasp = self._grasp(np.array([body]), self.data.xipos[body], orientations)
        yield from self._take(grasp, body)
        for _ in range(2 * PATIENCE):
            left = goal - self.data.qpos[self.model.jnt_qposadr[joint]]
            if abs(left) < 0.003:
                break
            position, rotation = self._hand()
            if slides:
                yield self._towards(position + left * self.data.xaxis[joint], grasp.rotation)
            else:
                turn = Rotation.from_rotvec(np.clip(left, -0.4, 0.4) * self.data.xaxis[joint])
                anchor = self.data.xanchor[joint]
                yield self._towards(anchor + turn.apply(position - anchor), turn.as_matrix() @ rotation)

    # -------------------------------------------------------------------------------------------- geometry and control

    def _place(self, name: str, place: str) -> np.ndarray:
        """Where the object's origin is to be."""
        if place in self.env.object_sites_dict:
            site = self.data.site(place)
            half = np.abs(site.xmat.reshape(3, 3) @ self.env.object_sites_dict[place].size)
            return site.xpos + [0, 0, max(half[2] - 0.02, 0.0)]
        return self.data.xpos[self.env.obj_body_id[place]] - [0, 0, 0.01]

    def _height_over(self, start: np.ndarray, end: np.ndarray, radius: float, below: float, above: float, own: set[int]) -> float:
        """The height of a point on the straight way from start to end at which what hangs `below` it, and the hand's body `above` it, clear everything."""
        matter = self.everything
        bounds = matter.bounds()[~np.isin(self.model.geom_bodyid[matter.geoms], list(own))]
        low, high, top = bounds[:, 0, :2], bounds[:, 1, :2], bounds[:, 1, 2]
        way = start[:2] + np.linspace(0, 1, 20)[:, None, None] * (end - start)[:2]  # [20, 1, 2]
        outside = np.maximum(low - way, way - high)  # [20, n, 2]
        gap = np.linalg.norm(np.maximum(outside, 0), axis=2) + np.minimum(outside.max(axis=2), 0)  # [20, n] negative inside
        # what lies beside the start and is left behind does not count, unless it lies below
        gap = np.where((gap.min(axis=0) < gap[0] - 0.002) | (top < start[2] - below + 0.005), gap.min(axis=0), np.inf)
        height = -np.inf
        for reach, lift in ((radius, below + MARGIN), (HAND[1], MARGIN - HAND[0] - above)):
            # what lies beside the way counts less and less, so that nothing that comes near makes the hand jump
            height = max(height, float((top + lift - STEEP * np.maximum(0, gap - reach)).max()))
        return height

    def _wrist(self) -> np.ndarray:
        """From the grip site to where the axes of the arm's joints 5 and 6 meet."""
        return self.data.xanchor[self.model.joint("robot0_joint6").id] - self.data.site_xpos[self.arm.site]

    def _ceiling(self, position: np.ndarray) -> float:
        """How high the hand can be there without straightening the elbow."""
        wrist, shoulder = position + self._wrist(), self.data.xanchor[self.model.joint("robot0_joint2").id]
        level = np.linalg.norm((wrist - shoulder)[:2])
        return float(shoulder[2] + np.sqrt(max(0.0, REACH**2 - level**2)) - (wrist - position)[2])

    def _within_reach(self, position: np.ndarray) -> np.ndarray:
        """The point itself, or as far towards it at the same height as the elbow allows."""
        wrist, shoulder = position + self._wrist(), self.data.xanchor[self.model.joint("robot0_joint2").id]
        level, height = np.linalg.norm((wrist - shoulder)[:2]), wrist[2] - shoulder[2]
        most = np.sqrt(max(0.0, REACH**2 - height**2))
        if level <= most:
            return position
        return position - np.append((wrist - shoulder)[:2] * (1 - most / level), 0.0)

    @property
    def everything(self) -> Matter:
        return Matter(self.scene, np.flatnonzero(~self.arm.own))

    def _frame(self, body: int) -> Pose:
        return self.data.xpos[body].copy(), self.data.xmat[body].reshape(3, 3).copy()

    def _hand(self) -> Pose:
        return self.data.site_xpos[self.arm.site].copy(), self.data.site_xmat[self.arm.site].reshape(3, 3).copy()

    def _towards(self, position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        here, turned = self._hand()
        move = GAIN * (self._within_reach(position) - here) / METRES
        shoulder = self.data.xanchor[self.model.joint("robot0_joint2").id]
        speed = np.clip((SLOW[1] - np.linalg.norm(here + self._wrist() - shoulder)) / (SLOW[1] - SLOW[0]), SLOW[2], 1)
        turn = GAIN * Rotation.from_matrix(rotation @ turned.T).as_rotvec() / RADIANS
        level = speed * move[:2] / max(1.0, np.abs(move[:2]).max())
        return np.concatenate([level, speed * np.clip(move[2:], -1, 1), turn / max(1.0, np.abs(turn).max()), [self.grip]])
