"""The scripted expert: it knows where everything is and what the goal says, and solves the task through the same seven numbers per action as any policy.

Every action is computed from the present state of the world, one at a time: towards a target that moves with the object, ever slower as it comes near.
So a policy that imitates it sees smooth motions that depend on the state and little else, and a push or a slip is corrected on the way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

from vlahub_envs.libero import grasps
from vlahub_envs.libero.grasps import CLEARANCE, TIP, Arm, Grasp, Matter, Pose
from vlahub_envs.libero.simulation import Libero

OPEN, CLOSED = -1.0, 1.0  # the gripper's number in an action
METRES, RADIANS = 0.05, 0.5  # that an action of 1 asks for
GAIN = 1.25  # of the distance to the target asked for in each step; the controller follows with a delay of three steps
STEEP = 6.0  # metres that a way over obstacles leads down for each metre to the side
MARGIN = 0.02  # m between what is carried and what lies under its way
AHEAD = 0.05  # m
LOW = 0.035  # m above the lowest point of what is carried, up to which even what is left behind could catch it
LIFT = 0.04  # m of missing height at which nothing moves to the side any more
HAND = (0.05, 0.11)  # m from the grip site up to the hand's body, and how far that reaches to the sides
GRIP = 5  # steps until the gripper's command, which moves by 0.25 per step, has come from open to closing
REST = 0.0006  # m: fingers that move less than this in a step have stopped
REACH = 0.69  # m from the shoulder to the wrist; at 0.719 the elbow is straight
SLOW = (0.62, 0.71, 0.35)  # with the wrist further than the first number the hand moves outwards slower, as it could overshoot
ARRIVED = (0.006, 0.06)  # m and rad
OVERSHOOT = 0.006  # m that a hand arrives too far; at a drawer's front a finger would be caught, and not close
SLIDE = 0.02  # m that a sliding hand is ahead of itself; a faster one rides up the rim that it pushes
BESIDE = 0.03  # m before the face that is to be pushed
LOST = 2  # steps without touching what it carries or moves, after which the hand lets go
PATIENCE = 60  # steps in which a movement must have ended
FIRM = (0.021, 0.4)  # m between the tip of the fingers and the top of an object, or parts of its height, from which a grasp holds a leaning wall
TIPPED = 0.1  # rad that an object may tip while the hand comes
FLAT = 0.03  # m: what is lower and cannot be grasped is slid
DOWN = np.array([0.0, 0.0, -1.0])

# of each suite the tasks that were measured; see docs/libero.md
SOLVED = {"libero_spatial": range(10), "libero_object": range(10), "libero_goal": range(10), "libero_10": (0, 1, 3, 4, 6, 7)}
START = Rotation.from_matrix([[0, 1, 0], [1, 0, 0], [0, 0, -1]])  # of the hand, at an episode's start


class Unreachable(RuntimeError):
    """Something that has to be grasped is not within the arm's reach, or no skill leads to the goal. The episode counts as unsolved."""


class ScriptedExpert:
    """The expert of whatever task the simulation runs."""

    def __init__(self, simulation: Libero, untried: bool = False):
        self.simulation, self.untried = simulation, untried  # untried: also try tasks that are not known to be solved
        self.failure = ""  # why it gave up, if it did

    def reset(self) -> None:
        scene = self.simulation.scene
        if scene is None:
            raise RuntimeError("no episode was started: call the simulation's reset() before the expert's")
        if not self.untried and scene.task.number not in SOLVED.get(scene.task.suite, ()):
            known = "; ".join(f"LIBERO-{suite.removeprefix('libero_').capitalize()}: {', '.join(map(str, tasks))}" for suite, tasks in SOLVED.items())
            raise ValueError(
                f"the expert does not know task {scene.task.name!r} of {scene.task.suite}; the tasks that it solves are, of {known} (`task=` makes an environment of one task)"
            )
        self.scene, self.env, self.model, self.data = scene, scene.env, scene.model, scene.data
        self.arm = Arm(scene)
        self.bodies = {name: np.flatnonzero(self.model.body_rootid == body) for name, body in self.env.obj_body_id.items()}
        self.grip, self.failure = OPEN, ""
        self._script = self._solve()

    def act(self) -> np.ndarray:
        """[1, 7]: one action, from the present state. An expert that has given up holds still."""
        try:
            return np.array([next(self._script)], np.float32)
        except Unreachable as error:
            self.failure = str(error)
            self._script = self._stay()
            return self.act()

    def _stay(self) -> Iterator[np.ndarray]:
        while True:
            yield self._towards(*self._hand())

    # -------------------------------------------------------------------------------------------- goals

    def _solve(self) -> Iterator[np.ndarray]:
        skills = {"on": self._put, "in": self._put, "open": self._open, "close": self._close, "turnon": self._turn_on}
        while True:
            left = [goal for goal in self.env.parsed_problem["goal_state"] if not self.env._eval_predicate(goal)]
            for predicate, *names in sorted(left, key=lambda goal: goal[0] == "close"):  # a skill that did not work is tried again
                if predicate not in skills:
                    raise Unreachable(f"no skill makes {' '.join(names)} {predicate!r}")
                yield from skills[predicate](*names)
            if not left:
                yield self._towards(*self._hand())

    def _put(self, name: str, place: str) -> Iterator[np.ndarray]:
        """On or in another object or a region of one. A drawer is opened first."""
        drawer = self._drawer(place)
        while drawer is not None and not self.env._eval_predicate(["open", place]):
            yield from self._open(place)
        offset = self._free_spot(name, place)
        yield from self._bring(name, lambda: self._place(place) + offset)

    def _bring(self, name: str, goal: Callable[[], np.ndarray]) -> Iterator[np.ndarray]:
        """An object's origin to a point, which may move."""
        body = self.env.obj_body_id[name]
        slipped: list[np.ndarray] = []  # points of the object at which it was held and lost
        while True:
            position, rotation = self._frame(body)
            grasp = self._grasp(name, goal, [position + rotation @ point for point in slipped])
            if grasp is None and not slipped:
                break
            if grasp is None:
                slipped.clear()
            elif (yield from self._take(grasp, body)):
                if (yield from self._carry(name, goal)):
                    return
                slipped.append(rotation.T @ (grasp.position - position))
        if np.ptp(Matter(self.scene, self.bodies[name]).bounds()[:, :, 2]) >= FLAT:
            raise Unreachable(f"the arm can grasp {name} nowhere")
        yield from self._drag(name, goal)

    def _grasp(self, name: str, goal: Callable[[], np.ndarray], avoid: list[np.ndarray]) -> Grasp | None:
        """How to take an object that is to be brought to a point: deep from above, else deep with a hand that leans, else less and less deep."""
        body = self.env.obj_body_id[name]
        carry = goal() - self.data.xpos[body]
        low, high = Matter(self.scene, self.bodies[name]).extent(-DOWN)
        firm = min(FIRM[0], FIRM[1] * (high - low))
        above = self._from_above(body)
        for most, least in itertools.pairwise((np.inf, firm, firm / 2, 0.0)):
            depths = [depth for depth in grasps.DEPTHS if least <= depth < most]
            for orientations in (above, self._tilted(above)):
                grasp = grasps.find(
                    self.arm, self.bodies[name], self.data.xipos[body], orientations, lambda at, rotation: (at + carry, rotation), depths, avoid
                )
                if grasp is not None:
                    return grasp
        return None

    def _open(self, place: str) -> Iterator[np.ndarray]:
        joint = self._drawer(place)
        yield from self._operate(joint, float(self.model.jnt_range[joint][0]))

    def _close(self, place: str) -> Iterator[np.ndarray]:
        joint = self._drawer(place)
        if joint is None:
            raise Unreachable(f"no skill closes {place}: it is no drawer")
        yield from self._push(joint, float(self.model.jnt_range[joint][1]))

    def _turn_on(self, name: str) -> Iterator[np.ndarray]:
        yield from self._operate(self.model.joint(self.env.get_object(name).joints[0]).id, 1.0)

    def _drawer(self, place: str) -> int | None:
        """The joint that moves a region."""
        site = self.env.object_sites_dict.get(place)
        return self.model.joint(site.joints[0]).id if site is not None and site.joints else None

    # -------------------------------------------------------------------------------------------- skills

    def _from_above(self, body: int) -> list[tuple[np.ndarray, float]]:
        """Orientations of a hand that points down: as it does at the start, along the object's sides, and between."""
        angles = set(np.deg2rad([0, 22.5, -22.5, 45, -45, 67.5, -67.5, 90, -90]).round(6))
        for axis in self.data.xmat[body].reshape(3, 3).T:
            if np.hypot(*axis[:2]) > 0.9:
                angle = np.arctan2(axis[1], axis[0])
                angles |= {float((angle + turn + np.pi / 2) % np.pi - np.pi / 2) for turn in (0, np.pi / 2)}
        return [((Rotation.from_euler("z", angle) * START).as_matrix(), abs(angle)) for angle in angles]

    def _tilted(self, orientations: list[tuple[np.ndarray, float]]) -> list[tuple[np.ndarray, float]]:
        """These and others that lean about the axis along which the fingers close: near its foot the arm cannot point down."""
        leans = np.deg2rad([0, 20, -20, 40, -40])
        return [((Rotation.from_rotvec(lean * rotation[:, 0])).as_matrix() @ rotation, turn + abs(lean)) for rotation, turn in orientations for lean in leans]

    def _from_the_front(self, out: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """Orientations of a hand that points along `out`, which is level, or down from there; its fingers open level, or upright."""
        aside = np.cross(out, DOWN)
        orientations = []
        for tilt in np.deg2rad([0, 15, 30, 45, 60]):
            towards = np.cos(tilt) * out + np.sin(tilt) * DOWN
            for closing in (aside, -aside, np.cross(aside, towards), np.cross(towards, aside)):
                rotation = np.stack([closing, np.cross(towards, closing), towards], axis=1)
                orientations.append((rotation, float((Rotation.from_matrix(rotation) * START.inv()).magnitude())))
        return orientations

    def _leaning(self, into: np.ndarray, position: np.ndarray) -> np.ndarray | None:
        """A hand that points down and a little along `into`, which is level, with its fingers side by side as seen from there, and reaches a position."""
        for lean in np.deg2rad([30, 45, 15]):
            out = np.cos(lean) * DOWN + np.sin(lean) * into
            sides = sorted((np.cross(into, DOWN), np.cross(DOWN, into)), key=lambda side: -side @ START.as_matrix()[:, 0])  # the smaller turn first
            for side in sides:
                rotation = np.stack([side, np.cross(out, side), out], axis=1)
                if self.arm.reaches(position, rotation, CLEARANCE):
                    return rotation
        return None

    def _take(self, grasp: Grasp, body: int) -> Generator[np.ndarray, None, bool]:
        """Go to the grasp, which moves with the body, and close the gripper. -> False if the body tips on the way, so that another grasp is needed."""
        position, rotation = self._frame(body)
        local = rotation.T @ (grasp.position - position), rotation.T @ grasp.rotation
        upright = rotation.T @ DOWN

        def target() -> Pose:
            position, rotation = self._frame(body)
            return position + rotation @ local[0], rotation @ local[1]

        self.grip = OPEN
        for action in self._approach(target):
            if np.linalg.norm(self._frame(body)[1].T @ DOWN - upright) > TIPPED:
                return False
            yield action
        held = self._hand()
        self.grip = CLOSED
        for step in range(PATIENCE):
            before = self.data.qpos[self.scene.fingers].copy()
            yield self._towards(*held)
            if step > GRIP and np.abs(self.data.qpos[self.scene.fingers] - before).max() < REST:
                break
        return True

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
                over = min(self._height_over(here, position, 0.06, TIP, 0.0, set()), self._ceiling(here, error))
                back = max(back, over - position[2])
            position = position - out * min(back, STEEP * max(0.0, aside - 0.004) + 0.15 * max(0.0, angle - ARRIVED[1]))
            yield self._towards(position, rotation)

    def _carry(self, name: str, goal: Callable[[], np.ndarray]) -> Generator[np.ndarray, None, bool]:
        """Bring what the gripper holds to a point, over what stands in the way, and lower it until it is there or gets no lower; then let go.

        -> False if it slips away."""
        body = self.env.obj_body_id[name]
        own = set(self.bodies[name])
        _, rotation = self._hand()
        lowest = np.inf
        stalled = 0
        lost = 0  # steps
        for _ in range(3 * PATIENCE):
            here = self.data.xpos[body].copy()
            there = goal()
            low, _ = Matter(self.scene, self.bodies[name]).extent(-DOWN)
            aside = float(np.linalg.norm((there - here)[:2]))
            hand, _ = self._hand()
            lost = 0 if self._touches(self.bodies[name]) else lost + 1
            if lost > LOST:
                break
            over = self._height_over(here, there, self._radius(name), here[2] - low, hand[2] - here[2], own)
            over = max(min(over, self._ceiling(hand, there - here) - hand[2] + here[2]), there[2])
            needed = min(over, there[2] + STEEP * max(0.0, aside - 0.01))
            free = np.clip(1 - (needed - here[2]) / LIFT, 0, 1)
            back = (1 - free) * max(0.0, needed - here[2]) * rotation[:2, 2] / rotation[2, 2]  # out as the hand came in: it may lean, under a drawer
            shift = np.append((there - here)[:2] * free + back, needed - here[2])
            if aside < 0.012:
                stalled = stalled + 1 if here[2] > lowest - 0.001 else 0
                lowest = min(lowest, here[2])
                if stalled > 3:
                    break
            yield self._towards(hand + shift, rotation)
        yield from self._let_go()
        return lost <= LOST

    def _let_go(self) -> Iterator[np.ndarray]:
        """Open the gripper and go back a little."""
        self.grip = OPEN
        hand, rotation = self._hand()
        for _ in range(8):
            yield self._towards(hand, rotation)
        for _ in range(8):
            yield self._towards(hand - 0.1 * rotation[:, 2], rotation)

    def _drag(self, name: str, goal: Callable[[], np.ndarray]) -> Iterator[np.ndarray]:
        """Slide something that is too flat to be grasped: closed fingers in its middle push its rim from within."""
        body = self.env.obj_body_id[name]

        def place() -> np.ndarray:
            middle = self.data.xpos[body].copy()
            surface = Matter(self.scene, self.bodies[name]).along(middle, -DOWN)[-1][1]
            return middle - (surface + TIP + 0.002) * DOWN

        # a little higher, because the open fingers with which it is tried would touch the rim
        free = (rotation for rotation, _ in sorted(self._from_above(body), key=lambda o: o[1]) if self.arm.reaches(place() - 0.02 * DOWN, rotation, 0.01))
        rotation = next(free, None)
        if rotation is None:
            raise Unreachable(f"the arm can neither grasp nor slide {name}")

        def target() -> Pose:
            return place(), rotation

        self.grip = CLOSED
        yield from self._approach(target)
        for _ in range(2 * PATIENCE):
            left = (goal() - self.data.xpos[body])[:2]
            hand = self._hand()[0]
            if np.linalg.norm(left) < 0.005 or np.linalg.norm((hand - self.data.xpos[body])[:2]) > self._radius(name):
                break
            push = left * min(1.0, SLIDE / float(np.linalg.norm(left)))
            yield self._towards(np.append(hand[:2] + push, target()[0][2]), rotation)
        for _ in range(8):
            yield self._towards(self._hand()[0] - 0.1 * DOWN, rotation)

    def _operate(self, joint: int, goal: float) -> Iterator[np.ndarray]:
        """Grasp the moving part of a fixture and lead it along its joint."""
        body = int(self.model.jnt_bodyid[joint])
        axis, anchor = self.data.xaxis[joint].copy(), self.data.xanchor[joint].copy()
        slides = self.model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_SLIDE
        way = goal - self.data.qpos[self.model.jnt_qposadr[joint]]

        def led(position: np.ndarray, rotation: np.ndarray, way: float = way) -> Pose:
            """The hand's pose after the joint has moved."""
            if slides:
                return position + way * axis, rotation
            turn = Rotation.from_rotvec(way * axis)
            return anchor + turn.apply(position - anchor), turn.as_matrix() @ rotation

        orientations = self._from_the_front(-axis * np.sign(way)) if slides else self._tilted(self._from_above(body))
        grasp = grasps.find(self.arm, np.array([body]), self.data.xipos[body], orientations, led)
        if grasp is None:
            raise Unreachable(f"the arm can grasp {self.model.body(body).name} nowhere")
        if slides:
            grasp = replace(grasp, position=grasp.position - min(OVERSHOOT, grasp.depth / 2) * grasp.rotation[:, 2])
        yield from self._take(grasp, body)
        lost = 0
        for _ in range(2 * PATIENCE):
            left = goal - self.data.qpos[self.model.jnt_qposadr[joint]]
            lost = 0 if self._touches(np.array([body])) else lost + 1
            if abs(left) < 0.003 or lost > LOST:
                break
            position, rotation = self._hand()
            yield self._towards(*led(position, grasp.rotation if slides else rotation, left if slides else np.clip(left, -0.4, 0.4)))
        yield from self._let_go()

    def _push(self, joint: int, goal: float) -> Iterator[np.ndarray]:
        """Push a drawer shut by its handle: closed fingers side by side, the hand leaning so that nothing else comes near the cabinet."""
        body = np.array([self.model.jnt_bodyid[joint]])
        into = self.data.xaxis[joint].copy()

        def ahead(way: float) -> np.ndarray:
            """The point so far behind the middle of the drawer's foremost face."""
            part = Matter(self.scene, body)
            reach = (np.abs(into @ part.axes) * part.halves).sum(axis=1) - part.centres @ into  # [geoms] how far each comes out
            foremost = reach.argmax()
            return part.centres[foremost] + (way - reach[foremost] - part.centres[foremost] @ into) * into

        self.grip = CLOSED
        rotation = self._leaning(into, ahead(-BESIDE))
        if rotation is None:
            raise Unreachable(f"the arm cannot push {self.model.body(int(body[0])).name}")
        yield from self._approach(lambda: (ahead(-BESIDE), rotation))
        for _ in range(2 * PATIENCE):
            left = goal - float(self.data.qpos[self.model.jnt_qposadr[joint]])
            if left < 0.003:
                break
            yield self._towards(ahead(min(left, SLIDE)), rotation)
        yield from self._let_go()

    # -------------------------------------------------------------------------------------------- geometry and control

    def _touches(self, bodies: np.ndarray) -> bool:
        """Does the hand touch one of them?"""
        pairs = self.model.geom_bodyid[self.data.contact.geom]  # [contacts, 2]
        return bool((self.arm.own[pairs] & np.isin(pairs[:, ::-1], bodies)).any())

    def _place(self, place: str) -> np.ndarray:
        """Where an object's origin is to be."""
        if place in self.env.object_sites_dict:
            site = self.data.site(place)
            half = self._half_size(place)
            return site.xpos - max(half[2] - 0.02, 0.0) * DOWN
        return self.data.xpos[self.env.obj_body_id[place]] - [0, 0, 0.01]

    def _half_size(self, place: str) -> np.ndarray:
        """Of a region, along the world's axes."""
        return np.abs(self.data.site(place).xmat.reshape(3, 3) @ self.env.object_sites_dict[place].size)

    def _free_spot(self, name: str, place: str) -> np.ndarray:
        """From the middle of a region to the nearest point in it with nothing above: the inner part of a drawer lies under the cabinet's top."""
        if place not in self.env.object_sites_dict:
            return np.zeros(3)
        middle, half = self._place(place), self._half_size(place)
        bounds = self.everything.bounds()
        bounds = bounds[
            (bounds[:, 1, 2] > self.data.site(place).xpos[2] + half[2] + 0.005) & ~np.isin(self.model.geom_bodyid[self.everything.geoms], self.bodies[name])
        ]
        steps = [np.append(half[:2] * part, 0.0) for part in itertools.product(np.linspace(-0.75, 0.75, 7), repeat=2)]
        radius = self._radius(name) + 0.01
        for step in sorted(steps, key=np.linalg.norm):
            at = (middle + step)[:2]
            if (_gap(bounds, at) > radius).all():
                return step
        return np.zeros(3)

    def _radius(self, name: str) -> float:
        """How far an object reaches to the sides of its origin."""
        bounds = Matter(self.scene, self.bodies[name]).bounds()[:, :, :2]
        return float(np.abs(bounds - self.data.xpos[self.env.obj_body_id[name]][:2]).max())

    def _height_over(self, start: np.ndarray, end: np.ndarray, radius: float, below: float, above: float, own: set[int]) -> float:
        """The height of a point on the straight way from start to end at which what hangs `below` it, and the hand's body `above` it, clear everything."""
        matter = self.everything
        bounds = matter.bounds()[~np.isin(self.model.geom_bodyid[matter.geoms], list(own))]
        low, high, top = bounds[:, 0, :2], bounds[:, 1, :2], bounds[:, 1, 2]
        way = start[:2] + np.linspace(0, 1, 20)[:, None, None] * (end - start)[:2]  # [20, 1, 2]
        outside = np.maximum(low - way, way - high)  # [20, n, 2]
        gap = np.linalg.norm(np.maximum(outside, 0), axis=2) + np.minimum(outside.max(axis=2), 0)  # [20, n] negative inside
        # what is left behind does not count, unless it is low
        gap = np.where((gap.min(axis=0) < gap[0] - 0.002) | (top < start[2] - below + LOW), gap.min(axis=0), np.inf)
        height = -np.inf
        for reach, lift in ((radius, below + MARGIN), (HAND[1], MARGIN - HAND[0] - above)):
            # what lies beside the way counts less and less, so that nothing that comes near makes the hand jump
            height = max(height, float((top + lift - STEEP * np.maximum(0, gap - reach)).max()))
        return height

    def _wrist(self) -> np.ndarray:
        """From the grip site to where the axes of the arm's joints 5 and 6 meet."""
        return self.data.xanchor[self.arm.wrist] - self.data.site_xpos[self.arm.site]

    def _ceiling(self, position: np.ndarray, way: np.ndarray) -> float:
        """How high the hand can be a little further on its way and keep well away from a straight elbow."""
        ahead = position + way * min(1.0, AHEAD / max(1e-6, float(np.linalg.norm(way[:2]))))
        wrist, shoulder = ahead + self._wrist(), self.data.xanchor[self.arm.shoulder]
        level = np.linalg.norm((wrist - shoulder)[:2])
        return float(shoulder[2] + np.sqrt(max(0.0, (REACH - 0.02) ** 2 - level**2)) - (wrist - ahead)[2])

    def _within_reach(self, position: np.ndarray) -> np.ndarray:
        """The point itself, or as far towards it at the same height as the elbow allows."""
        wrist, shoulder = position + self._wrist(), self.data.xanchor[self.arm.shoulder]
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
        arm = here + self._wrist() - self.data.xanchor[self.arm.shoulder]
        stretched = np.linalg.norm(arm)
        speed = np.clip((SLOW[1] - stretched) / (SLOW[1] - SLOW[0]), SLOW[2], 1) if arm @ move > 0 else 1.0
        turn = GAIN * Rotation.from_matrix(rotation @ turned.T).as_rotvec() / RADIANS
        level = move[:2] / max(1.0, np.abs(move[:2]).max() / speed)
        return np.concatenate([level, np.clip(move[2:], -speed, speed), turn / max(1.0, np.abs(turn).max()), [self.grip]])


def _gap(bounds: np.ndarray, point: np.ndarray) -> np.ndarray:
    """[n]: level distance of a point [2] from boxes [n, 2, 3]."""
    return np.linalg.norm(np.maximum(np.maximum(bounds[:, 0, :2] - point, point - bounds[:, 1, :2]), 0), axis=1)
