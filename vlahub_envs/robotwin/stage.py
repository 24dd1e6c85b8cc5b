"""What is drawn: room, robot, objects and cameras in a SAPIEN scene that has no physics. It is built once and lasts as long as the simulation.

The physics world (`scene.py`) is another one, new at every reset; before a picture, poses are copied from there to here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sapien
from sapien.render import RenderBodyComponent, RenderMaterial, RenderShapeTriangleMesh, RenderTexture2D
from sapien.wrapper.articulation_builder import ArticulationBuilder

from vlahub.doctor import SOFTWARE_VULKAN
from vlahub_envs.robotwin.assets import Model
from vlahub_envs.robotwin.jointed import LinkLooks
from vlahub_envs.robotwin.randomization import PLAIN_LIGHTS, Lights
from vlahub_envs.robotwin.room import GROUND, ROOM


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
    # for people: from the far side of the table at the robot
    "people": View((0.8, 0.33, 1.6), (-0.82, -0.65, -0.72), (0.65, -0.82, 0), fovy=50),
}
MOST_KEPT = 64  # models that are kept for later episodes. Clutter from the official release goes through hundreds, with their textures
FAR = 100.0  # m; the cameras' far clipping plane
NEAR = 0.1  # the near one, as upstream's. A wrist camera's cuts off the fingers, which end 0.1 m away, ...
NEAR_WRIST_STANDIN = 0.03  # ... so with the stand-in robot, which no published checkpoint has seen, it is nearer

NO_VULKAN = (
    "SAPIEN found no device to draw with. On a machine with a GPU install its own driver with Vulkan; on one without, a software Vulkan: "
    f"{SOFTWARE_VULKAN}. `vlahub doctor` checks it."
)

# SAPIEN sets its renderer up with the first picture, which takes a CPU six seconds, and drops it with the last scene. One renderer kept back spares every
# later environment of this process those seconds.
_kept: list[sapien.render.RenderSystem] = []


def render_system(device: str | None) -> sapien.render.RenderSystem:
    """A renderer on `device` ("cuda", "cuda:1", "cpu"), or on the first GPU if there is one and else on the CPU."""
    sapien.render.set_log_level("off")  # on a CPU it reports missing GPU features as errors, and goes on without them
    # The last, without a name, takes whatever device another scene in this process draws on: SAPIEN uses one per process.
    candidates = [(device,)] if device else [("cuda",), ("cpu",), ()]
    problems = []
    for candidate in candidates:
        try:
            system = sapien.render.RenderSystem(*candidate)
        except RuntimeError as error:
            problems.append(f"{candidate[0] if candidate else 'any'}: {error}")
            continue
        if not _kept:
            _kept.append(sapien.render.RenderSystem(*candidate))
        return system
    raise RuntimeError(f"{NO_VULKAN} Tried: {'; '.join(problems)}")


class Stage:
    """Args: `robot` the robot's builder, `base` its pose, `renderer`, `shader` and `shadows`, `near_wrist` the wrist cameras' near plane."""

    def __init__(self, robot: ArticulationBuilder, base: sapien.Pose, renderer: sapien.render.RenderSystem, shader: str, shadows: bool, near_wrist: float):
        self.shader, self.near_wrist = shader, near_wrist
        self.sapien = scene = sapien.Scene([renderer])
        lights = PLAIN_LIGHTS
        self.directional = scene.add_directional_light([0, 0.5, -1], lights.directional, shadow=shadows)
        self.points = [scene.add_point_light([x, 0, 1.8], colour, shadow=shadows) for x, colour in zip((1, -1), lights.points, strict=True)]
        self.light(lights)
        builder = scene.create_actor_builder()
        builder.add_plane_visual(sapien.Pose(q=GROUND), [10, 10, 10], RenderMaterial(base_color=[0.8, 0.8, 0.8, 1]))
        self._stand(builder.build_render_component(), sapien.Pose())
        self.furniture: dict[str, tuple[sapien.Entity, RenderMaterial]] = {}
        for box in ROOM:
            builder = scene.create_actor_builder()
            material = RenderMaterial(base_color=[*box.colour, 1])
            builder.add_box_visual(half_size=box.half, material=material)
            self.furniture[box.name] = self._stand(builder.build_render_component(), sapien.Pose(box.position)), material
        self.links = {link.name: self._stand(link.build_render_component(), base) for link in robot.link_builders}
        self._textures: dict[str, RenderTexture2D] = {}
        self.cameras: dict[str, sapien.render.RenderCameraComponent] = {}
        self._bodies: dict[tuple, list[sapien.Entity]] = {}  # every body made so far of a model; those of past episodes are out of the scene
        self._shown: list[tuple[sapien.Entity, sapien.Entity]] = []  # (what is drawn, what it follows)

    def _stand(self, looks: RenderBodyComponent, where: sapien.Pose) -> sapien.Entity:
        entity = sapien.Entity()
        entity.add_component(looks)
        entity.set_pose(where)
        self.sapien.add_entity(entity)
        return entity

    def add_camera(self, name: str, height: int, width: int) -> None:
        view = VIEWS[name]
        # SAPIEN keeps these two for the process: set them anew for every camera, whatever was built before
        sapien.render.set_camera_shader_dir(self.shader)
        sapien.render.set_picture_format("Color", "r8g8b8a8unorm")
        fovy = np.deg2rad(view.fovy)
        if view.link:
            camera = self.sapien.add_mounted_camera(name, self.links[view.link], sapien.Pose(), width, height, fovy, self.near_wrist, FAR)
        else:
            camera = self.sapien.add_camera(name, width, height, fovy, NEAR, FAR)
            camera.entity.set_pose(view.pose())
        self.cameras[name] = camera

    def light(self, lights: Lights) -> None:
        self.sapien.set_ambient_light(lights.ambient)
        for component, colour in zip((self.directional, *self.points), (lights.directional, *lights.points), strict=True):
            component.color = colour

    def lower_table(self, by: float) -> None:
        """`by` metres, <= 0, below its usual height. The legs then reach into the table top."""
        entity, _ = self.furniture["table"]
        box = next(box for box in ROOM if box.name == "table")
        entity.set_pose(sapien.Pose(np.add(box.position, (0, 0, by))))

    def paint(self, name: str, picture: np.ndarray | None) -> None:
        """A picture [S, S, 4] on "wall" or "table", or none. Each has one texture that is written again: SAPIEN keeps every texture that it is given."""
        _, material = self.furniture[name]
        if picture is None:
            material.base_color_texture = None
            return
        if name not in self._textures:
            self._textures[name] = RenderTexture2D(picture, "R8G8B8A8Unorm", srgb=True)
        else:
            self._textures[name].upload(picture)
        material.base_color_texture = self._textures[name]

    def aim(self, name: str, offset: np.ndarray) -> None:
        """A fixed camera so far [3] off its place."""
        self.cameras[name].entity.set_pose(sapien.Pose(offset) * VIEWS[name].pose())

    def show(self, robot_links: dict[str, sapien.Entity], objects: list[tuple[Model | LinkLooks, sapien.Entity]]) -> None:
        """Draw from here on the robot and the objects of a new physics world."""
        for entity, _ in self._shown:
            if entity not in self.links.values():
                self.sapien.remove_entity(entity)
        self._shown = [(self.links[name], entity) for name, entity in robot_links.items()]
        used: dict[tuple, int] = {}
        keys = {model.key for model, _ in objects}
        self._bodies = {key: bodies for key, bodies in self._bodies.items() if key in keys or key[0] != "box"}  # boxes come in any size: keep none
        if len(self._bodies) > MOST_KEPT:
            self._bodies = {key: bodies for key, bodies in self._bodies.items() if key in keys}
            sapien.render.clear_cache()  # SAPIEN keeps every mesh and texture file that it has read
        for model, entity in objects:
            key = model.key
            bodies = self._bodies.setdefault(key, [])
            used[key] = used.get(key, 0) + 1
            if used[key] > len(bodies):
                bodies.append(self._body(model))
            body = bodies[used[key] - 1]
            self.sapien.add_entity(body)
            self._shown.append((body, entity))

    def _body(self, model: Model | LinkLooks) -> sapien.Entity:
        entity = sapien.Entity()
        if isinstance(model, LinkLooks):
            entity.add_component(model.builder.build_render_component())
            return entity
        if model.visual is not None:
            builder = self.sapien.create_actor_builder()
            builder.add_visual_from_file(str(model.visual), scale=model.scale)
            entity.add_component(builder.build_render_component())
            return entity
        looks = RenderBodyComponent()
        for solid in model.solids:
            vertices, normals, triangles = solid.mesh()
            material = RenderMaterial(base_color=[*solid.colour, 1], metallic=solid.metallic, roughness=0.5, specular=0.5)
            uvs = np.zeros((len(vertices), 2), np.float32)
            looks.attach(RenderShapeTriangleMesh(vertices.astype(np.float32), triangles.astype(np.uint32), normals.astype(np.float32), uvs, material))
        entity.add_component(looks)
        return entity

    def pictures(self, names: tuple[str, ...]) -> list[np.ndarray]:
        """[H, W, 3] uint8 of each camera, as the physics world stands now."""
        for body, followed in self._shown:
            body.set_pose(followed.pose)
        self.sapien.update_render()
        for name in names:
            self.cameras[name].take_picture()
        return [self.cameras[name].get_picture("Color")[..., :3] for name in names]

    def close(self) -> None:
        self.cameras, self.links, self._bodies, self._shown, self._textures, self.furniture = {}, {}, {}, [], {}, {}
        self.sapien = self.directional = self.points = None
