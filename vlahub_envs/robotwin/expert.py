"""The scripted expert: it knows where everything is and runs the task's script, through the same 14 numbers per action as any policy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.kinematics import Solution, pose
from vlahub_envs.robotwin.robot import SIDES
from vlahub_envs.robotwin.room import TABLE_TOP
from vlahub_envs.robotwin.scene import Thing
from vlahub_envs.robotwin.simulation import RoboTwin
from vlahub_envs.robotwin.trajectory import RECORD_EVERY, rest_to_rest, through

GRIP_STEPS = 300  # physics steps of closing or opening: 200 to move, 100 to settle
TILTS = np.linspace(0, 0.9, 10)  # rad: if a grasp is out of reach, the hand tips over, about the axis that the fingers open along, to point more forwards
STRAIGHT_STEP = 0.02  # m between the points at which a straight line is turned into joints
ARC_STEP = 0.1  # rad between the points at which an arc is turned into joints
SWINGS = (1.0, 0.7, 0.4, 0.0)  # how much of an arc a hand may turn with it
LARGEST_TURN = 0.6  # rad of a joint between two such points
NEARLY = 0.15 * np.pi  # rad: so near to an easy direction a grasp counts as easy
LEVEL = -0.7  # of the z of a hand's x axis: below, the hand points down
ASIDE = (0, 0.3, -0.3, 0.6, -0.6, 1.0, -1.0, 1.5, -1.5)  # rad: how far off the easiest way a hand that puts something down may be turned
WRIST = 0.026  # m: radius of the wrist, and a little
ORIGIN_AS_POINT = pose(rotation=Rotation.from_quat([np.sqrt(0.5), 0, 0, np.sqrt(0.5)]))  # z down, in a y-up object
# orientations of the hand that it takes easily: pointing down with the camera on the far side, and forwards to the other arm's side
EASY = {
    "down": Rotation.from_matrix([[0, -1, 0], [0, 0, 1], [-1, 0, 0]]),
    "left": Rotation.from_euler("z", 45, degrees=True),
    "right": Rotation.from_euler("z", 135, degrees=True),
}


def between(a: np.ndarray, b: np.ndarray, part: float) -> np.ndarray:
    """The pose at `part` (0 to 1) of the straight way from pose a to pose b, turning evenly."""
    turn = Rotation.from_matrix(b[:3, :3] @ a[:3, :3].T).as_rotvec()
    return pose(a[:3, 3] + part * (b[:3, 3] - a[:3, 3]), Rotation.from_rotvec(part * turn) * Rotation.from_matrix(a[:3, :3]))


def shortest_turn(a: np.ndarray, b: np.ndarray) -> Rotation:
    """The smallest rotation that takes the unit vector a to b."""
    axis, cosine = np.cross(a, b), float(a @ b)
    length = np.linalg.norm(axis)
    if length < 1e-6:
        sideways = np.eye(3)[np.abs(a).argmin()]
        axis = np.cross(a, sideways)
        return Rotation.identity() if cosine > 0 else Rotation.from_rotvec(np.pi * axis / np.linalg.norm(axis))
    return Rotation.from_rotvec(axis / length * math.atan2(length, cosine))


def gripper_turn(contact: np.ndarray) -> Rotation:
    """How the hand is turned that grasps at a contact frame [4, 4]."""
    # gripper x = -y of the contact frame (towards the object), y = -z (the fingers open along it), z = +x
    return Rotation.from_matrix(np.stack([-contact[:3, 1], -contact[:3, 2], contact[:3, 0]], axis=1))


class Unreachable(RuntimeError):
    """The expert's script asks for a pose that the arm cannot take. The layout counts as unsolvable."""


class Hands:
    """Moves that scripts are made of. Each returns a chunk of actions [n, 14] in the simulation's own units, from the present commanded state."""

    def __init__(self, simulation: RoboTwin):
        self.simulation, self.robot = simulation, simulation.scene.robot

    def go(self, home: Sequence[str] = (), straight: bool = False, **poses: np.ndarray) -> np.ndarray:
        """One or both hands to world poses of link6, at once: `go(left=..., right=...)`. They start and end at rest together.

        Args:
            home: arms that go back to their home posture meanwhile.
            straight: hands move along straight lines, not along the shortest way of the joints.
        """
        start, arm = self.robot.joints, self.robot.part
        before = {side: self.robot.hand(side) for side in poses}
        way = max((float(np.linalg.norm(target[:3, 3] - before[side][:3, 3])) for side, target in poses.items()), default=0.0)
        count = max(1, math.ceil(way / STRAIGHT_STEP)) if straight else 1
        path = [start]
        for part in np.arange(1, count + 1) / count:
            goal = path[-1].copy()
            for side, target in poses.items():
                goal[arm[side]] = self.joints_for(side, between(before[side], target, part), goal[arm[side]])
            for side in home:
                goal[arm[side]] = start[arm[side]] + part * (self.robot.home - start)[arm[side]]
            path.append(goal)
        if np.abs(path[-1] - start).max() < 1e-6:
            return self._actions(start[None], self.robot.grippers[None])
        if count > 1 and np.abs(np.diff(path, axis=0)).max() > LARGEST_TURN:
            path = [start, path[-1]]  # the line leads past a posture in which the arm has to turn over
        return self._moves(path)

    def _moves(self, path: list[np.ndarray]) -> np.ndarray:
        """The actions that lead through joints [12], the first of which are the present ones."""
        positions, _, _ = through(np.array(path)) if len(path) > 2 else rest_to_rest(*path)
        last = len(positions) - 1
        rows = np.append(np.arange(RECORD_EVERY - 1, last, RECORD_EVERY), last)  # at the rate of the demonstrations, and the end itself
        return self._actions(positions[rows], np.repeat(self.robot.grippers[None], len(rows), axis=0))

    def joints_for(self, side: str, target: np.ndarray, start: np.ndarray) -> np.ndarray:
        """[6] joints for a world pose of link6, near the joints `start`."""
        solution = self._solve(side, target, start)
        if not solution.reached:
            where = np.round(target[:3, 3], 3).tolist()
            raise Unreachable(f"the {side} hand cannot reach {where}: {solution.position_error:.3f} m, {solution.rotation_error:.2f} rad off")
        return solution.joints

    def _solve(self, side: str, target: np.ndarray, start: np.ndarray) -> Solution:
        """Inverse kinematics near `start`; if that has the wrist on the table, with the wrist turned over, where this helps."""
        arm = self.robot.arms[side]

        def above(joints: np.ndarray) -> bool:
            return arm.joint_positions(joints)[:, 2].min() > TABLE_TOP + self.simulation.scene.lowered + WRIST

        solution = arm.inverse(target, start)
        if not solution.reached or above(solution.joints):
            return solution
        for over in self.robot.kind.wrist_turns:
            other = arm.inverse(target, solution.joints + over)
            if other.reached and above(other.joints):
                return other
        return solution

    def reaches(self, side: str, *targets: np.ndarray) -> bool:
        """Can a hand go to all these poses, one after the other?"""
        if any(self.robot.arms[side].too_far(target) for target in targets):
            return False
        joints = self.robot.joints[self.robot.part[side]]
        for target in targets:
            solution = self._solve(side, target, joints)
            if not solution.reached:
                return False
            joints = solution.joints
        return True

    def move(self, side: str, target: np.ndarray, straight: bool = False, home: Sequence[str] = ()) -> np.ndarray:
        return self.go(home, straight, **{side: target})

    def lift(self, side: str, height: float) -> np.ndarray:
        """Straight up, or down if negative, by `height` metres."""
        return self.shift(side, (0, 0, height))

    def shift(self, side: str, by: Sequence[float]) -> np.ndarray:
        """By a displacement in the world."""
        return self.move(side, pose(by) @ self.robot.hand(side), straight=True)

    def back(self, side: str, by: float) -> np.ndarray:
        """Out along the gripper, away from what is in front of it."""
        return self.shift(side, -by * self.robot.hand(side)[:3, 0])

    def swing(self, side: str, point: np.ndarray, axis: np.ndarray, angle: float) -> np.ndarray:
        """Along an arc of `angle` rad about an axis [3] through a point [3], as one opens a door: turning with it, or less if the arm cannot follow."""
        start = self.robot.hand(side)
        arm = start[:3, 3] + self.robot.tcp * start[:3, 0] - point
        best: list[np.ndarray] = []
        for share in SWINGS:
            path = [self.robot.joints]
            for part in np.arange(ARC_STEP, angle, ARC_STEP):
                turn = Rotation.from_rotvec(share * part * axis) * Rotation.from_matrix(start[:3, :3])
                goal = pose(point + Rotation.from_rotvec(part * axis).apply(arm) - self.robot.tcp * turn.as_matrix()[:, 0], turn)
                solution = self._solve(side, goal, path[-1][self.robot.part[side]])
                if not solution.reached or np.abs(solution.joints - path[-1][self.robot.part[side]]).max() > LARGEST_TURN:
                    break
                path.append(path[-1].copy())
                path[-1][self.robot.part[side]] = solution.joints
            best = max(best, path, key=len)
        if len(best) < 2:
            raise Unreachable(f"the {side} hand cannot move along the arc about {np.round(point, 3).tolist()}")
        return self._moves(best)

    def grip(self, side: str, value: float) -> np.ndarray:
        """Move the gripper of one side, or of "both", to `value` (0 closed ... 1 open) and let it settle, the arms at rest."""
        count = GRIP_STEPS // RECORD_EVERY
        grippers = np.repeat(self.robot.grippers[None], count, axis=0)
        for i in range(2) if side == "both" else [SIDES.index(side)]:
            grippers[:, i] += (value - grippers[:, i]) * np.minimum(1, np.arange(1, count + 1) / (count * 2 / 3))
        return self._actions(np.repeat(self.robot.joints[None], count, axis=0), grippers)

    def grasp_pose(self, side: str, thing: Thing, point: int = 0, back: float = 0.0) -> np.ndarray:
        """The pose of link6 [4, 4] that holds the object's contact point between the fingers, `back` metres back along the gripper.

        The first of ten that is within reach: as the contact frame says, then tipped over more and more.
        """
        return self._grasps(side, thing, (point,), (back,))[0]

    def _grasps(
        self,
        side: str,
        thing: Thing,
        points: Sequence[int | np.ndarray],
        backs: Sequence[float],
        fits: Callable[[np.ndarray], bool] = lambda hand: True,
    ) -> list[np.ndarray]:
        """One pose of link6 for each distance in `backs` from the same grasp: of the easiest point, with the smallest tilt, that brings all of them within reach.

        The pose of the last distance must also pass `fits`.
        """
        contacts = [thing.point("contact", point) if isinstance(point, int) else thing.pose @ point for point in points]
        turns = [gripper_turn(contact) for contact in contacts]

        def hardness(turn: Rotation) -> float:
            """Angle to the way the hand points most easily: down; or, unless it is near, a mixture of down and forwards to the other side."""
            down, aside = ((turn.inv() * easy).magnitude() for easy in (EASY["down"], EASY[side]))
            return down if down < NEARLY else aside + NEARLY if aside < NEARLY else 2 * NEARLY + 0.7 * down + 0.3 * aside

        for turn, contact in sorted(zip(turns, contacts, strict=True), key=lambda pair: hardness(pair[0])):
            for tilt in TILTS:
                tipped = turn * Rotation.from_euler("y", -tilt)
                poses = [pose(contact[:3, 3] - (self.robot.tcp + back) * tipped.as_matrix()[:, 0], tipped) for back in backs]
                if self.reaches(side, *poses) and fits(poses[-1]):
                    return poses
        raise Unreachable(f"the {side} hand cannot grasp {thing.name}, at {np.round(contacts[0][:3, 3], 3).tolist()}")

    def grasp(
        self,
        side: str,
        thing: Thing,
        points: Sequence[int | np.ndarray] = (0,),
        pre: float = 0.1,
        deep: float = 0.0,
        home: Sequence[str] = (),
        fits: Callable[[np.ndarray], bool] = lambda hand: True,
    ) -> Iterator[np.ndarray]:
        """To `pre` metres before one of the contact points, straight up to it (and `deep` metres beyond), close.

        Args:
            points: numbers of contact points that will do, or contact frames [4, 4] in the object's own frame.
            home: arms that go home meanwhile.
            fits: is a grasp with link6 there any good for what comes next? See `can_place`.
        """
        before, at = self._grasps(side, thing, points, (pre, -deep), fits)
        yield self.move(side, before, home=home)
        yield self.move(side, at, straight=True)
        yield self.grip(side, 0.0)

    def press(self, side: str, thing: Thing, point: int = 0, pre: float = 0.1, lower: float = 0.0) -> Iterator[np.ndarray]:
        """To `pre` metres before a contact point, then straight on until the fingertips are as deep in it as fingers that grasp there.

        Args:
            lower: m, how far below the point to press, along the hand's z axis.
        """
        contact = np.linalg.inv(thing.pose) @ thing.point("contact", point) @ pose((-lower, 0, 0))  # its x axis is the hand's z axis
        before, at = self._grasps(side, thing, [contact], (pre, 0.0))
        yield self.move(side, before, straight=True)  # the joints' shortest way would lead over the table's edge
        yield self.move(side, at, straight=True)

    def grasp_both(
        self, things: dict[str, Thing], points: dict[str, Sequence[int]], pre: float = 0.1, deep: float = 0.0, lift: float = 0.0
    ) -> Iterator[np.ndarray]:
        """`grasp` with both hands at once, in a way that lets them rise by `lift` metres afterwards. `things` and `points`: what the "left" and the "right" hand take, and where."""
        up = pose((0, 0, lift))
        ways = {
            side: self._grasps(side, things[side], points[side], (pre, -deep), lambda hand, side=side: self.reaches(side, hand, up @ hand)) for side in SIDES
        }
        yield self.go(**{side: before for side, (before, _) in ways.items()})
        yield self.go(straight=True, **{side: at for side, (_, at) in ways.items()})
        yield self.grip("both", 0.0)

    def shift_both(self, by: Sequence[float]) -> np.ndarray:
        """Both hands by the same displacement in the world."""
        return self.go(straight=True, **{side: pose(by) @ self.robot.hand(side) for side in SIDES})

    def place(
        self,
        side: str,
        thing: Thing,
        target: np.ndarray,
        point: int | None = 0,
        pre: float = 0.1,
        dis: float = 0.02,
        tilts: Sequence[float] = (0.0,),
        release: bool = True,
        home: Sequence[str] = (),
        align: bool = False,
    ) -> Iterator[np.ndarray]:
        """Bring a held object's functional point (or its origin, if None) onto `target` [4, 4]: to `pre` metres above it, then to `dis` metres, and let go.

        The object turns as little as brings the z axis of the point (the origin's y axis, which is up) onto the target's z axis, and then about that axis: so that
        the gripper's z axis (the camera's side) points away from the robot if the hand points down, or else the hand forwards to the other arm's side; or a little
        to either side of that, whichever is within reach.

        Args:
            tilts: rad; if nothing is within reach, tip the hand with the object over by the next of these, to point more forwards.
            align: turn the object about the target's z axis until the two x axes agree, wherever the hand then points.
        """
        goals = self._placements(side, thing, target, self.hand_as_it_is(side), point, (pre, dis), tilts, align)
        if not goals:
            raise Unreachable(f"the {side} hand cannot put {thing.name} to {np.round(target[:3, 3], 3).tolist()}")
        if pre > dis:
            yield self.move(side, goals[0], home=home)
            yield self.move(side, goals[1], straight=True)
        else:
            yield self.move(side, goals[1], home=home)
        if release:
            yield self.grip(side, 1.0)

    def place_both(self, things: dict[str, Thing], targets: dict[str, np.ndarray]) -> np.ndarray:
        """Bring functional point 0 of what each hand holds onto its target [4, 4], both at once, and keep hold of it."""
        goals = {}
        for side in SIDES:
            found = self._placements(side, things[side], targets[side], self.hand_as_it_is(side), 0, (0.0,), (0.0,), align=False)
            if not found:
                raise Unreachable(f"the {side} hand cannot put {things[side].name} to {np.round(targets[side][:3, 3], 3).tolist()}")
            goals[side] = found[0]
        return self.go(**goals)

    def can_place(
        self,
        side: str,
        thing: Thing,
        target: np.ndarray,
        hand: np.ndarray,
        point: int | None = 0,
        pre: float = 0.1,
        dis: float = 0.02,
        tilts: Sequence[float] = (0.0,),
        align: bool = False,
    ) -> bool:
        """Could the hand `place` the object as it lies now, if it took it with link6 at the pose `hand` [4, 4]?"""
        return bool(self._placements(side, thing, target, hand, point, (pre, dis), tilts, align))

    def _placements(
        self,
        side: str,
        thing: Thing,
        target: np.ndarray,
        hand: np.ndarray,
        point: int | None,
        heights: Sequence[float],
        tilts: Sequence[float],
        align: bool,
    ) -> list[np.ndarray]:
        """Poses of link6 that bring an object in the hand to these heights above `target`: of the first way that is within reach, or none."""
        tip = thing.pose @ (thing.model.points["functional"][point] if point is not None else ORIGIN_AS_POINT)
        up = target[:3, :3] @ (0, 0, -1)  # a functional point's z axis points down, and so does a target's
        held = np.linalg.inv(tip) @ hand
        turns = [Rotation.from_matrix(target[:3, :3])] if align else self._turns(side, tip, target[:3, 2], hand)
        for tilt, turn in itertools.product(tilts, turns):
            grip = Rotation.from_matrix(held[:3, :3])
            tipped = turn * grip * Rotation.from_euler("y", -tilt) * grip.inv()
            goals = [pose(target[:3, 3] + height * up, tipped) @ held for height in heights]
            if self.reaches(side, *goals):
                return goals
        return []

    def _turns(self, side: str, tip: np.ndarray, axis: np.ndarray, hand: np.ndarray) -> list[Rotation]:
        """World orientations to try of a held point, now at `tip` [4, 4], whose z axis is to lie along `axis` [3]; best first."""
        now = Rotation.from_matrix(tip[:3, :3])
        level = shortest_turn(tip[:3, 2], axis)
        forwards, _, camera = level.apply(hand[:3, :3].T)
        # A hand from above turns its camera away from the robot; one from the side points forwards to the other side
        held, wish = (camera, (0, 1.0, 0)) if forwards[2] < LEVEL else (forwards, EASY[side].as_matrix()[:, 0])
        held, wish = (vector - axis * (axis @ vector) for vector in (held, np.array(wish)))
        lengths = np.linalg.norm(held), np.linalg.norm(wish)
        first = 0.0 if min(lengths) < 1e-3 else math.atan2(axis @ np.cross(held, wish), held @ wish)
        return [Rotation.from_rotvec((first + aside) * axis) * level * now for aside in ASIDE]

    def hand_as_it_is(self, side: str) -> np.ndarray:
        """World pose of link6 [4, 4], where the physics has it."""
        return self.robot.hand_as_it_is(side)

    def _actions(self, joints: np.ndarray, grippers: np.ndarray) -> np.ndarray:
        return self.simulation.encode(joints, grippers)


class ScriptedExpert:
    """The expert of whatever task the simulation runs."""

    def __init__(self, simulation: RoboTwin):
        self.simulation = simulation
        self._script: Iterator[np.ndarray] = iter(())
        self.over, self.failure = True, ""  # is the script at its end; why it stopped early, if it did

    def reset(self) -> None:
        self._script = self.simulation.task.expert(self.simulation.scene, Hands(self.simulation))
        self.over, self.failure = False, ""

    def act(self) -> np.ndarray:
        """The next move of the script; when it is over (or out of reach), the robot stays where it is."""
        robot = self.simulation.scene.robot
        try:
            for chunk in self._script:
                return chunk
        except Unreachable as error:
            self.failure = str(error)
        self._script, self.over = iter(()), True
        return self.simulation.encode(robot.joints[None], robot.grippers[None])
