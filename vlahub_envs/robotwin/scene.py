"""The SAPIEN scene: table, wall, lights, robot, cameras, and the objects of the present episode.

It is built once. A reset takes the last episode's objects out, puts the next ones in and sets the robot's state; object bodies are kept and used again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sapien
from sapien.physx import PhysxCollisionShapeConvexMesh, PhysxMaterial, PhysxRigidDynamicComponent, PhysxRigidStaticComponent
from sapien.render import RenderBodyComponent, RenderMaterial, RenderShapeTriangleMesh
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin import robot as robots
from vlahub_envs.robotwin.assets import Model, Official, StandIns
from vlahub_envs.robotwin.trajectory import TIMESTEP

TABLE_TOP = 0.74
OBJECT_MASS = 0.01  # kg, unless a task says otherwise
PLAIN = (0.3, 0.3, 0.1)  # PhysX's default material: ground, meshes, the robot. Static friction, dynamic friction, restitution
GRIPPY = (0.5, 0.5, 0.0)  # wall, table top and primitive shapes


@dataclass(frozen=True)
class View:
    """A camera: where it looks from. Vertical opening in degrees."""

    position: tuple[float, float, float] = (0, 0, 0)
    forward: tuple[float, float, float] = (1, 0, 0)
    left: tuple[float, float, float] = (0, 1, 0)
    fovy: float = 37.0  # of the "D435" type
    link: str = ""  # a robot link that carries it; it then looks along the link's x

    def pose(self) -> sapien.Pose:
        forward, left = (np.array(v, float) / np.linalg.norm(v) for v in (self.forward, self.left))
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack([forward, left, np.cross(forward, left)], axis=1)
        matrix[:3, 3] = self.position
        return sapien.Pose(matrix)


VIEWS = {
    "head": View((-0.032, -0.45, 1.35), (0, 0.6, -0.8), (-1, 0, 0)),
    "left_wrist": View(link="left_camera"),
    "right_wrist": View(link="right_camera"),
    "front": View((0, -0.45, 0.85), (0, 1, -0.1), (-1, 0, 0)),
    # for people: from the far side of the table, over the bell, at the robot
    "people": View((0.8, 0.33, 1.6), (-0.82, -0.65, -0.72), (0.65, -0.82, 0), fovy=50),
}

NO_VULKAN = (
    "SAPIEN found no device to draw with. On a machine with a GPU install its own driver with Vulkan; on one without, a software Vulkan "
    "(Mesa's lavapipe, 23.1 or later): `apt-get install mesa-vulkan-drivers libvulkan1` on Debian 13 and Ubuntu 24.04, "
    "`apt-get install -t bookworm-backports mesa-vulkan-drivers libvulkan1` on Debian 12. `vlahub doctor` checks it."
)


def render_system(device: str | None) -> sapien.render.RenderSystem:
    """A renderer on `device` ("cuda", "cuda:1", "cpu"), or on the first GPU if there is one and else on the CPU."""
    sapien.render.set_log_level("off")  # on a CPU it reports missing GPU features as errors, and goes on without them
    candidates = [device] if device else ["cuda", "cpu"]
    problems = []
    for name in candidates:
        try:
            return sapien.render.RenderSystem(name)
        except RuntimeError as error:
            problems.append(f"{name}: {error}")
    if device is None:
        try:  # whatever device another scene in this process draws on: SAPIEN uses one per process
            return sapien.render.RenderSystem()
        except RuntimeError as error:
            problems.append(f"any: {error}")
    raise RuntimeError(f"{NO_VULKAN} Tried: {'; '.join(problems)}")


class Thing:
    """An object of the present episode."""

    def __init__(self, name: str, model: Model, entity: sapien.Entity):
        self.name, self.model, self.entity = name, model, entity

    @property
    def pose(self) -> np.ndarray:
        """[4, 4] in the world."""
        return self.entity.pose.to_transformation_matrix()

    @property
    def position(self) -> np.ndarray:
        return self.entity.pose.p

    def point(self, kind: str, index: int = 0) -> np.ndarray:
        """World pose [4, 4] of a "contact" or "functional" point."""
        return self.pose @ self.model.points[kind][index]


class Scene:
    """Args: `assets` the asset set, `device`, `shader` and `shadows` for the renderer."""

    def __init__(self, assets: StandIns | Official, device: str | None, shader: str, shadows: bool):
        self.assets, self.shadows, self.shader = assets, shadows, shader
        renderer = render_system(device)
        # SAPIEN keeps these for the process: set them anew for every scene, whatever was built before
        sapien.physx.set_scene_config(gravity=[0, 0, -9.81], bounce_threshold=2.0, enable_pcm=True, enable_tgs=True)
        sapien.physx.set_body_config(solver_position_iterations=10, solver_velocity_iterations=1, sleep_threshold=0.005)
        sapien.physx.set_shape_config(contact_offset=0.01, rest_offset=0.0)
        sapien.physx.set_default_material(*PLAIN)
        self.sapien = sapien.Scene([sapien.physx.PhysxCpuSystem(), renderer])
        self.sapien.set_timestep(TIMESTEP)
        self.physics = self.sapien.physx_system
        self._build_room()
        self.robot = self._load_robot()
        self.cameras: dict[str, sapien.render.RenderCameraComponent] = {}
        self.things: dict[str, Thing] = {}
        self._bodies: dict[tuple, list[sapien.Entity]] = {}  # out of the scene, ready for use
        self._used: list[tuple[tuple, sapien.Entity]] = []

    # -------------------------------------------------------------------------------------------- building

    def _build_room(self) -> None:
        scene = self.sapien
        scene.set_ambient_light([0.5, 0.5, 0.5])
        scene.add_directional_light([0, 0.5, -1], [0.5, 0.5, 0.5], shadow=self.shadows)
        for x in (1, -1):
            scene.add_point_light([x, 0, 1.8], [1, 1, 1], shadow=self.shadows)
        scene.add_ground(0)
        grippy, plain = PhysxMaterial(*GRIPPY), PhysxMaterial(*PLAIN)
        white, wall = RenderMaterial(base_color=[1, 1, 1, 1]), RenderMaterial(base_color=[1, 0.9, 0.9, 1])
        # name, half size, position, friction, colour
        boxes = [("wall", (3, 0.6, 1.5), (0, 1, 1.5), grippy, wall), ("table", (0.6, 0.35, 0.025), (0, 0, TABLE_TOP - 0.025), grippy, white)]
        leg = (TABLE_TOP - 0.05) / 2
        boxes += [("leg", (0.025, 0.025, leg), (x, y, leg), plain, white) for x in (-0.55, 0.55) for y in (-0.3, 0.3)]
        for name, half, position, friction, colour in boxes:
            builder = scene.create_actor_builder()
            builder.add_box_collision(half_size=half, material=friction)
            builder.add_box_visual(half_size=half, material=colour)
            builder.set_initial_pose(sapien.Pose(position))
            builder.build_static(name)

    def _load_robot(self) -> robots.Robot:
        import tempfile
        from pathlib import Path

        loader = self.sapien.create_urdf_loader()
        official = self.assets.robot_urdf()
        if official is not None:
            articulation, text = loader.load(str(official)), official.read_text(encoding="utf-8")
        else:
            text = robots.urdf()
            with tempfile.TemporaryDirectory() as folder:  # SAPIEN reads URDFs from files only
                file = Path(folder) / "aloha_agilex.urdf"
                file.write_text(text)
                articulation = loader.load(str(file))
        articulation.set_root_pose(sapien.Pose(robots.BASE))
        return robots.Robot(articulation, text)

    def add_camera(self, name: str, height: int, width: int) -> None:
        view = VIEWS[name]
        sapien.render.set_camera_shader_dir(self.shader)
        sapien.render.set_picture_format("Color", "r8g8b8a8unorm")
        fovy = np.deg2rad(view.fovy)
        if view.link:
            mount = self.robot.links[view.link].entity
            near = 0.1 if self.assets.name == "official" else 0.03  # at the official 0.1 m the fingers, which end 0.1 m away, would be cut off
            camera = self.sapien.add_mounted_camera(name, mount, sapien.Pose(), width, height, fovy, near, 100)
        else:
            camera = self.sapien.add_camera(name, width, height, fovy, 0.1, 100)
            camera.entity.set_pose(view.pose())
        self.cameras[name] = camera

    # -------------------------------------------------------------------------------------------- episodes

    def clear(self) -> None:
        """Take the last episode's objects out; put the robot home."""
        for key, entity in self._used:
            self.sapien.remove_entity(entity)
            self._bodies.setdefault(key, []).append(entity)
        self._used, self.things = [], {}
        self.robot.reset()

    def add(self, name: str, model: Model, where: sapien.Pose, static: bool = False, mass: float = OBJECT_MASS) -> Thing:
        """Put an object in. `name` is how the task calls it."""
        key = (model.name, model.id, static, mass)
        spare = self._bodies.get(key, [])
        entity = spare.pop() if spare else self._body(model, static, mass)
        entity.name = model.name
        entity.set_pose(where)
        self.sapien.add_entity(entity)
        if not static:
            body = entity.find_component_by_type(PhysxRigidDynamicComponent)
            body.set_linear_velocity([0, 0, 0])
            body.set_angular_velocity([0, 0, 0])
        self._used.append((key, entity))
        self.things[name] = Thing(name, model, entity)
        return self.things[name]

    def _body(self, model: Model, static: bool, mass: float) -> sapien.Entity:
        plain = PhysxMaterial(*PLAIN)
        if model.visual is not None:
            builder = self.sapien.create_actor_builder()
            builder.add_visual_from_file(str(model.visual), scale=model.scale)
            if static:
                builder.add_nonconvex_collision_from_file(str(model.collision), scale=model.scale, material=plain)
            else:
                builder.add_multiple_convex_collisions_from_file(str(model.collision), scale=model.scale, material=plain)
            builder.set_physx_body_type("static" if static else "dynamic")
            entity = builder.build_entity()
        else:
            entity, looks = sapien.Entity(), RenderBodyComponent()
            body = PhysxRigidStaticComponent() if static else PhysxRigidDynamicComponent()
            for solid in model.solids:
                vertices, normals, triangles = solid.mesh()
                material = RenderMaterial(base_color=[*solid.colour, 1], metallic=solid.metallic, roughness=0.5, specular=0.5)
                uvs = np.zeros((len(vertices), 2), np.float32)
                looks.attach(RenderShapeTriangleMesh(vertices.astype(np.float32), triangles.astype(np.uint32), normals.astype(np.float32), uvs, material))
                body.attach(PhysxCollisionShapeConvexMesh(vertices.astype(np.float32), [1, 1, 1], plain))
            entity.add_component(looks)
            entity.add_component(body)
        if not static:
            entity.find_component_by_type(PhysxRigidDynamicComponent).mass = mass
        return entity

    # -------------------------------------------------------------------------------------------- running

    def step(self) -> None:
        self.physics.step()

    def touching(self, links: list, thing: Thing) -> np.ndarray:
        """Positions [K, 3] of the contact points between robot links and an object, as the physics engine reports them after a step."""
        bodies = [c for c in thing.entity.components if isinstance(c, (PhysxRigidStaticComponent, PhysxRigidDynamicComponent))]
        found = []
        for contact in self.physics.get_contacts():
            pair = contact.bodies
            if (pair[0] in links and pair[1] in bodies) or (pair[1] in links and pair[0] in bodies):
                found += [point.position for point in contact.points]
        return np.array(found).reshape(-1, 3)

    def pictures(self, names: tuple[str, ...]) -> list[np.ndarray]:
        """[H, W, 3] uint8 of each camera, as of now."""
        self.sapien.update_render()
        for name in names:
            self.cameras[name].take_picture()
        return [self.cameras[name].get_picture("Color")[..., :3] for name in names]

    def close(self) -> None:
        self.cameras.clear()
        self.things.clear()
        self._bodies.clear()
        self._used.clear()
        self.robot = self.physics = self.sapien = None


def upright(yaw: float = 0.0) -> Rotation:
    """The default orientation of a y-up object: its y is the world's z. `yaw` turns it about its own y."""
    return Rotation.from_quat([0.5, 0.5, 0.5, 0.5]) * Rotation.from_euler("y", yaw)
