"""The scene: a physics world, new at every reset, and the stage that draws it.

PhysX remembers where bodies touched and in which order they came, so a world that is put back into its first state does not repeat itself to the last bit. A new
world does, and costs a millisecond: textures, meshes and cameras, the slow part, are on the stage and stay.
"""

from __future__ import annotations

import numpy as np
import sapien
from sapien.physx import (
    PhysxCollisionShapeBox,
    PhysxCollisionShapeConvexMesh,
    PhysxCpuSystem,
    PhysxMaterial,
    PhysxRigidDynamicComponent,
    PhysxRigidStaticComponent,
)
from sapien.wrapper.articulation_builder import ArticulationBuilder
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.assets import Brick, Model, Official, StandIns
from vlahub_envs.robotwin.jointed import Jointed, JointedModel
from vlahub_envs.robotwin.kinematics import pose
from vlahub_envs.robotwin.robot import ALOHA, Embodiment, Robot, build_bodies
from vlahub_envs.robotwin.room import GROUND, PLAIN, ROOM
from vlahub_envs.robotwin.stage import NEAR, NEAR_WRIST_STANDIN, Stage, render_system
from vlahub_envs.robotwin.trajectory import TIMESTEP

OBJECT_MASS = 0.01  # kg, unless a task says otherwise
SETTLE_STEPS, WATCH_STEPS = 2300, 200  # physics steps at reset: until everything lies still, but no more; and how long it must then stay so
STEADY = np.cos(np.deg2rad(3) / 2)  # a body is steady while it turns by less than 3 degrees


class Thing:
    """An object of the present episode."""

    def __init__(self, name: str, model: Model, entity: sapien.Entity, body: PhysxRigidStaticComponent | PhysxRigidDynamicComponent):
        self.name, self.model, self.entity, self.body = name, model, entity, body
        self.free = isinstance(body, PhysxRigidDynamicComponent)
        self.parts = [(model, entity)]  # what is drawn, and the entity that it follows

    @property
    def asleep(self) -> bool:
        return bool(self.body.is_sleeping)

    @property
    def pose(self) -> np.ndarray:
        """[4, 4] in the world."""
        return self.entity.pose.to_transformation_matrix()

    frame = pose  # of the model's measurements

    @property
    def position(self) -> np.ndarray:
        return self.entity.pose.p

    def point(self, kind: str, index: int = 0) -> np.ndarray:
        """World pose [4, 4] of a "contact" or "functional" point."""
        return self.pose @ self.model.points[kind][index]


class Scene:
    """Args: `assets` the asset set; `device`, `shader` and `shadows` for the renderer; `near_is_touching` see `touching`; `embodiment` the robot."""

    def __init__(
        self,
        assets: StandIns | Official,
        device: str | None,
        shader: str,
        shadows: bool,
        near_is_touching: bool = False,
        embodiment: Embodiment = ALOHA,
    ):
        self.assets, self.near_is_touching = assets, near_is_touching
        renderer = render_system(device)  # first: SAPIEN would otherwise pick a device of its own for the robot's colours
        official = assets.robot_urdf() if embodiment is ALOHA else None
        self.robot = Robot(embodiment, official)
        near_wrist = NEAR if official else NEAR_WRIST_STANDIN
        self.stage = Stage(self.robot.builder, self.robot.base, renderer, shader, shadows, near_wrist)
        self.things: dict[str, Thing | Jointed] = {}
        self._builders: dict[tuple, ArticulationBuilder] = {}  # of objects with joints: their files are read once
        self.clear()

    def clear(self, lowered: float = 0.0) -> None:
        """A new physics world: ground, wall, table, and the robot at home. What was in the old one is gone.

        Args:
            lowered: m, <= 0: how far below its usual height the table stands. What is put in later stands so much lower with it.
        """
        self.lowered = lowered
        # SAPIEN keeps these for the process: set them anew for every world, whatever was built before
        sapien.physx.set_scene_config(gravity=[0, 0, -9.81], bounce_threshold=2.0, enable_pcm=True, enable_tgs=True)
        sapien.physx.set_body_config(solver_position_iterations=10, solver_velocity_iterations=1, sleep_threshold=0.005)
        sapien.physx.set_shape_config(contact_offset=0.01, rest_offset=0.0)
        sapien.physx.set_default_material(*PLAIN)
        self.physics = PhysxCpuSystem()
        self.physics.timestep = TIMESTEP
        self.world = sapien.Scene([self.physics])
        self.things = {}
        builder = self.world.create_actor_builder()
        builder.add_plane_collision(sapien.Pose(q=GROUND), PhysxMaterial(*PLAIN))
        builder.build_static("ground")
        for box in ROOM:
            builder = self.world.create_actor_builder()
            builder.add_box_collision(half_size=box.half, material=PhysxMaterial(*box.friction))
            builder.set_initial_pose(sapien.Pose([*box.position[:2], box.position[2] + (lowered if box.name == "table" else 0)]))
            builder.build_static(box.name)
        self.robot.enter(self.world)

    def add(self, name: str, model: Model, where: sapien.Pose, static: bool = False, mass: float = OBJECT_MASS) -> Thing | Jointed:
        """Put an object in.

        Args:
            name: how the task calls it.
            where: its pose, on a table of the usual height.
            static: it stays where it is; one with joints, its base.
            mass: kg; of one with joints, of each link.
        """
        where = sapien.Pose([0, 0, self.lowered]) * where
        if isinstance(model, JointedModel):
            return self._add_jointed(name, model, where, static, mass)
        material = PhysxMaterial(*model.friction)
        if model.collision is not None:
            builder = self.world.create_actor_builder()
            if static:
                builder.add_nonconvex_collision_from_file(str(model.collision), scale=model.scale, material=material)
            else:
                builder.add_multiple_convex_collisions_from_file(str(model.collision), scale=model.scale, material=material)
            builder.set_physx_body_type("static" if static else "dynamic")
            body = builder.build_physx_component()
        else:
            body = PhysxRigidStaticComponent() if static else PhysxRigidDynamicComponent()
            for solid in model.solids:
                if isinstance(solid, Brick):
                    shape = PhysxCollisionShapeBox(solid.half, material)
                    shape.local_pose = sapien.Pose(solid.place)
                else:
                    shape = PhysxCollisionShapeConvexMesh(solid.mesh()[0].astype(np.float32), [1, 1, 1], material)
                body.attach(shape)
        if not static:
            body.mass = mass
        entity = sapien.Entity()
        entity.name = model.name
        entity.add_component(body)
        entity.set_pose(where)
        self.world.add_entity(entity)
        self.things[name] = Thing(name, model, entity, body)
        return self.things[name]

    def _add_jointed(self, name: str, model: JointedModel, where: sapien.Pose, static: bool, mass: float) -> Jointed:
        if model.key not in self._builders:
            self._builders[model.key] = model.builder()
        builder = self._builders[model.key]
        turn, at = where.to_transformation_matrix()[:3, :3], where.p + model.shift[:3, 3]
        builder.set_initial_pose(sapien.Pose(pose(at, Rotation.from_matrix(model.shift[:3, :3] @ turn))))
        articulation = build_bodies(builder, self.world, fixed=static)
        articulation.set_qpos(articulation.get_qpos())  # until then, or the first step, its links are nowhere
        for link in articulation.links:
            link.mass = mass
        self.things[name] = Jointed(name, model, articulation, builder, static)
        return self.things[name]

    def settle(self) -> bool:
        """Let what was put in come to rest, the robot at home. -> did it? If all bodies fall asleep before, the rest of the time would change nothing."""
        free = [thing for thing in self.things.values() if thing.free]
        if not free:
            return True
        robot = self.robot
        robot.command(robot.joints, np.zeros_like(robot.joints), robot.grippers)  # at home the forces that hold it up stay the same
        for _ in range(SETTLE_STEPS):
            self.step()
            if all(thing.asleep for thing in free):
                return True
        before = [thing.entity.pose.q for thing in free]
        for _ in range(WATCH_STEPS):
            self.step()
        return all(abs(np.dot(q, thing.entity.pose.q)) > STEADY for q, thing in zip(before, free, strict=True))

    def ready(self) -> None:
        """Called when every object is in: draw them from here on."""
        self.stage.lower_table(self.lowered)
        self.stage.show({name: link.entity for name, link in self.robot.links.items()}, [part for thing in self.things.values() for part in thing.parts])

    def step(self) -> None:
        self.physics.step()

    def touching(self, bodies: list, thing: Thing) -> np.ndarray:
        """Positions [K, 3] of the points where bodies (robot links, or other objects' bodies) touch an object, after a step.

        The engine reports pairs of points already when shapes come within 2 cm of each other (their contact offsets). Only those that push count, unless
        `near_is_touching`, which is how upstream counts.
        """
        found = []
        for contact in self.physics.get_contacts():
            a, b = contact.bodies
            if (a == thing.body and b in bodies) or (b == thing.body and a in bodies):
                found += [point.position for point in contact.points if self.near_is_touching or np.any(point.impulse)]
        return np.array(found).reshape(-1, 3)

    def close(self) -> None:
        self.stage.close()
        self.robot.leave()
        self.things, self.physics, self.world = {}, None, None
