"""The cell as a native ManiSkill environment: `gym.make("VlahubTwinPickPlace-v1")` and `"VlahubTwinPickPlaceReal-v1"` after `import vlahub_envs.twin.cell`.

On the CPU (`num_envs=1`) every reset builds a new scene with the episode's object alone: PhysX remembers where bodies touched, so only a new world repeats an
episode bit for bit. On a GPU (`num_envs=N`) all objects are built once; those not in use lie on a shelf below the floor, so that any
seed can start in any row, and a partial reset touches its own rows only.
"""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill import PACKAGE_ASSET_DIR
from mani_skill.agents.controllers import PDEEPoseController, PDEEPoseControllerConfig, PDJointPosMimicControllerConfig
from mani_skill.agents.registration import register_agent
from mani_skill.agents.robots.panda.panda import Panda
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils import sapien_utils
from mani_skill.utils.geometry.rotation_conversions import (
    euler_angles_to_matrix,
    matrix_to_quaternion,
    quaternion_invert,
    quaternion_multiply,
    quaternion_to_matrix,
)
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs.actor import Actor
from mani_skill.utils.structs.pose import Pose
from mani_skill.utils.structs.types import SimConfig
from sapien.physx import PhysxMaterial
from sapien.render import RenderBodyComponent, RenderMaterial, RenderTexture2D

from vlahub.catalog import suggest
from vlahub_envs.twin import assets as asset_sets
from vlahub_envs.twin.gap import Gap
from vlahub_envs.twin.layout import BASE, FAR, FRONT, HOME, INSTRUCTION, NEAR, TABLE_TOP, Layout, draw, overlap
from vlahub_envs.twin.objects import NAMES, THINGS, TRAY, Part, Thing, parts, tray_parts

MAX_STEPS = 80
SIM_FREQ, CONTROL_FREQ = 500, 5  # Hz
CAMERA = "c19_front_view"
MAX_STEP = 0.1  # m and rad: what one action may ask for
# Of the seven joints. The real arm runs under an impedance controller, which these weak drives imitate: it lags by a quarter of a second
STIFFNESS = (37.8, 29.925, 48.3, 48.3, 2.128, 27.3, 48.3)
DAMPING = (10.5, 10.5, 10.5, 10.5, 0.6354, 10.5, 10.5)
COLLECT_EVERY = 20  # scenes; most are freed at once, without it
CLEARANCE = 0.001  # m above the table at which things are set down
# Collision bits of the robot's links: two that share one do not touch. Parts of hand and wrist always lie within PhysX's contact distance of each other, which would take a
# third of a step's time without any force; the fingers share none, so that they stop each other
APART = {"panda_leftfinger": (25,), "panda_rightfinger": (26,)}
OTHERS = (25, 26)
SHELF = -3.0  # m, top of the shelf for objects that are not in use; the floor is at 0


@cache
def robot_urdf() -> str:
    """ManiSkill's Panda with a camera on its hand, as a file. The camera's mesh, 425,000 triangles that would take most of the time of a picture, is its box."""
    source = Path(PACKAGE_ASSET_DIR) / "robots/panda/panda_v3.urdf"
    tree = ElementTree.parse(source)
    for mesh in tree.iter("mesh"):
        mesh.set("filename", str(source.parent / mesh.get("filename")))
    link = next(link for link in tree.iter("link") if link.get("name") == "camera_link")
    visual, collision = link.find("visual"), link.find("collision")
    for tag in ("origin", "geometry"):
        visual.remove(visual.find(tag))
        visual.append(deepcopy(collision.find(tag)))
    content = ElementTree.tostring(tree.getroot())
    # named after its content: workers share it, and it is never stale
    file = Path(tempfile.gettempdir()) / f"vlahub-twin-{os.getuid()}-{hashlib.sha256(content).hexdigest()[:16]}.urdf"
    if not file.is_file() or file.read_bytes() != content:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.name, delete=False) as work:
            work.write(content)
        os.replace(work.name, file)
    return str(file)


class ArmController(PDEEPoseController):
    """Moves the tool's target: x, y, z along the base's axes, roll, pitch, yaw about the tool's own; R = Rz Ry Rx."""

    config: ArmControllerConfig

    def compute_target_pose(self, prev_ee_pose_at_base: Pose, action: torch.Tensor) -> Pose:
        tool = self.ee_pose_at_base.q  # where the tool is, not where it should be
        (cr, cp, cy), (sr, sp, sy) = ((action[:, 3:] / 2).cos().unbind(1), (action[:, 3:] / 2).sin().unbind(1))
        w, x = cr * cp * cy + sr * sp * sy, sr * cp * cy - cr * sp * sy
        turn = torch.stack([w, x, cr * sp * cy + sr * cp * sy, cr * cp * sy - sr * sp * cy], 1)
        turn = quaternion_multiply(quaternion_multiply(tool, turn), quaternion_invert(tool))  # in the base's frame
        return Pose.create_from_pq(prev_ee_pose_at_base.p + action[:, :3], quaternion_multiply(turn, prev_ee_pose_at_base.q))

    def reset(self) -> None:
        super().reset()
        super().set_drive_targets(self.qpos)  # hold still until the first action comes through

    def set_drive_targets(self, targets: torch.Tensor) -> None:
        if self.config.delay_steps:
            self._waiting = targets
        else:
            super().set_drive_targets(targets)

    def before_simulation_step(self) -> None:
        if self.config.delay_steps and self._step == self.config.delay_steps:
            super().set_drive_targets(self._waiting)
        super().before_simulation_step()  # counts


@dataclass
class ArmControllerConfig(PDEEPoseControllerConfig):
    delay_steps: int = 0  # physics steps from a command to the drives
    controller_cls = ArmController


@register_agent()
class CellPanda(Panda):
    """The real cell's Panda, with the measured drives."""

    uid = "vlahub_cell_panda"
    urdf_path = property(lambda self: robot_urdf())  # written when the first robot is built, not at import

    def is_grasping(self, object: Actor, min_force: float = 0.5, max_angle: int = 85) -> torch.Tensor:
        """As ManiSkill's, which goes on to compute angles between what does not touch: on the CPU that takes a twentieth of a step."""
        if not self.scene.gpu_sim_enabled and not self.scene.get_pairwise_contact_forces(self.finger1_link, object).any():
            return torch.zeros(1, dtype=torch.bool)
        return super().is_grasping(object, min_force, max_angle)

    @property
    def _controller_configs(self) -> dict:
        gap: Gap = self.scene.gap
        arm = ArmControllerConfig(
            joint_names=self.arm_joint_names,
            pos_lower=-MAX_STEP,
            pos_upper=MAX_STEP,
            rot_lower=-MAX_STEP,
            rot_upper=MAX_STEP,
            stiffness=[value * gap.stiffness for value in STIFFNESS],
            damping=[value * gap.damping for value in DAMPING],
            force_limit=100,
            ee_link=self.ee_link_name,
            urdf_path=self.urdf_path,
            use_target=True,  # a step is counted from where the last one should have led: the lag does not add up
            normalize_action=False,
            delay_steps=round(gap.delay * SIM_FREQ),
        )
        fingers = PDJointPosMimicControllerConfig(
            joint_names=self.gripper_joint_names,
            lower=-0.01,  # below 0, so that thin things are held with force
            upper=0.04,
            stiffness=1e3,
            damping=1e2,
            force_limit=100,
            mimic={"panda_finger_joint2": {"joint": "panda_finger_joint1"}},
        )
        return {"pd_ee_twin_delta_pose": {"arm": arm, "gripper": fingers}}


@register_env("VlahubTwinPickPlace-v1", max_episode_steps=MAX_STEPS)
class TwinPickPlace(BaseEnv):
    """
    **Task Description:**
    Pick up one of 25 objects and put it into the white tray.

    **Randomizations:** object (25), places of object and tray (1246 pairs), the object's yaw (4).

    **Success Conditions:** the object touches the tray with more than 0.03 N, its origin is within 65 mm of the tray's seen from above, higher than the tray's,
    and not more than 50 mm above where it would lie. It need not be let go.

    Args:
        camera_size: (height, width) of the picture.
        assets: "auto", "official", "stand-in" or a folder; see `vlahub_envs.twin.assets`.
        gap: how the cell differs from the nominal one.
    """

    SUPPORTED_ROBOTS = ["vlahub_cell_panda"]
    SUPPORTED_REWARD_MODES = ("sparse", "dense", "normalized_dense", "none")
    agent: CellPanda

    def __init__(
        self,
        *args: Any,
        camera_size: tuple[int, int] = (480, 640),
        assets: str | os.PathLike = "auto",
        gap: Gap | None = None,
        robot_uids: str = "vlahub_cell_panda",
        num_envs: int = 1,
        reconfiguration_freq: int | None = None,
        **kwargs: Any,
    ):
        self.camera_size = camera_size
        self.gap = gap or Gap.none()
        self.asset_set = asset_sets.find(assets)
        if reconfiguration_freq is None:
            reconfiguration_freq = 1 if num_envs == 1 else 0
        self._builds_all = reconfiguration_freq == 0 or num_envs > 1
        super().__init__(*args, robot_uids=robot_uids, num_envs=num_envs, reconfiguration_freq=reconfiguration_freq, **kwargs)

    # ------------------------------------------------------------------------------------------------ the scene

    @property
    def _default_sim_config(self) -> SimConfig:
        return SimConfig(sim_freq=SIM_FREQ, control_freq=CONTROL_FREQ, spacing=20)

    @property
    def _default_sensor_configs(self) -> list[CameraConfig]:
        height, width = self.camera_size
        gap = self.gap
        turn = matrix_to_quaternion(euler_angles_to_matrix(torch.deg2rad(torch.tensor(gap.camera_turn, dtype=torch.float32)), "XYZ"))
        pose = sapien.Pose(FRONT.position, FRONT.quaternion) * sapien.Pose(q=turn.tolist())
        pose.p = pose.p + np.array(gap.camera_shift)
        focal = gap.focal * height / 2 / np.tan(FRONT.fovy / 2)
        intrinsic = np.array([[focal, 0, (0.5 + gap.centre[0]) * width], [0, focal, (0.5 + gap.centre[1]) * height], [0, 0, 1]])
        return [CameraConfig(CAMERA, pose, width, height, near=NEAR, far=FAR, intrinsic=intrinsic)]

    @property
    def _default_human_render_camera_configs(self) -> CameraConfig:
        pose = sapien_utils.look_at([-0.75, -0.55, 1.45], [0.0, -0.02, 0.95])
        return CameraConfig("render_camera", pose, 640, 480, fov=0.9, near=0.01, far=100)

    def _clear(self) -> None:
        """As ManiSkill's own, which runs Python's garbage collector every time: that takes ten times as long as to build a new scene."""
        self._close_viewer()
        self.agent, self.scene, self._sensors, self._human_render_cameras, self._hidden_objects, self.things = None, None, {}, {}, [], {}
        self._cleared = getattr(self, "_cleared", 0) + 1
        if self._cleared % COLLECT_EVERY == 0:
            gc.collect()

    def close(self) -> None:
        self._clear()
        gc.collect()

    def _load_agent(self, options: dict) -> None:
        self.scene.gap = self.gap  # where the agent finds it
        super()._load_agent(options, sapien.Pose(BASE, [0, 0, 0, 1]))
        for link in self.agent.robot.links:
            for bit in APART.get(link.name, OTHERS):
                link.set_collision_group_bit(group=2, bit_idx=bit, bit=1)
            for part in link._objs:
                looks = part.entity.find_component_by_type(RenderBodyComponent)
                for shape in looks.render_shapes if looks else ():
                    for piece in getattr(shape, "parts", ()):
                        piece.material.specular, piece.material.roughness = 0.9, 0.3

    def _load_lighting(self, options: dict) -> None:
        self.scene.set_ambient_light(list(self.gap.ambient))
        for direction, colour in self.gap.lamps:
            self.scene.add_directional_light(list(direction), list(colour), shadow=self.enable_shadow)

    def _load_scene(self, options: dict) -> None:
        gap = self.gap
        self.surface = PhysxMaterial(gap.friction, gap.friction, 0)
        self._static("floor", (10, 10, 0.05), (0, 0, -0.05), RenderMaterial(base_color=[*gap.floor, 1], roughness=0.9, specular=0.1))
        if self.asset_set.table is not None:
            self._official_table()
        else:
            self._static("table", (0.75, 1.2, 0.02), (-0.05, 0, TABLE_TOP - 0.02), self._planks())
        self.tray = self._build("tray", TRAY, tray_parts(), (0, 0, 2))
        numbers = range(len(THINGS)) if self._builds_all else [self._layout(0, options).thing]
        self.things: dict[int, Actor] = {
            number: self._build(THINGS[number].name, THINGS[number], parts(THINGS[number]), (0, 0, 3 + number)) for number in numbers
        }
        if self._builds_all:
            self._static("shelf", (3, 0.3, 0.05), (0, 0, SHELF - 0.05), RenderMaterial())
        self._bottom = {number: self.asset_set.bottom(THINGS[number]) for number in self.things}
        self._half_height = torch.tensor([thing.size[2] / 2 for thing in THINGS], device=self.device)
        self.thing = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)  # number of each env's object
        self._flags = {name: torch.zeros(self.num_envs, dtype=torch.bool, device=self.device) for name in ("grasped", "solved", "lost")}

    def _static(self, name: str, half: tuple, centre: tuple, material: RenderMaterial) -> None:
        builder = self.scene.create_actor_builder()
        builder.add_box_collision(half_size=half, material=self.surface)
        builder.add_box_visual(half_size=half, material=material)
        builder.initial_pose = sapien.Pose(centre)
        builder.build_static(name)

    def _planks(self) -> RenderMaterial:
        """The table's colour; with `gap.grain`, of planks that differ."""
        material = RenderMaterial(base_color=[*self.gap.table, 1], roughness=0.8, specular=0.2)
        if self.gap.grain:
            bright = 1 + self.gap.grain * np.random.default_rng(0).uniform(-1, 1, (8, 1, 1))
            planks = np.clip(np.array(self.gap.table) * bright, 0, 1).repeat(8, 0).repeat(64, 1)  # [64, 64, 3]
            planks[::8] *= 0.6  # the gaps between them
            pixels = np.concatenate([planks * 255, np.full((64, 64, 1), 255)], 2).astype(np.uint8)
            material.base_color_texture = RenderTexture2D(pixels, "R8G8B8A8Unorm", srgb=True)
        return material

    def _official_table(self) -> None:
        builder = self.scene.create_actor_builder()
        upright = sapien.Pose(q=[0.70710678, 0.70710678, 0, 0])  # the file is y-up
        builder.add_nonconvex_collision_from_file(str(self.asset_set.table), upright, material=self.surface)
        builder.add_visual_from_file(str(self.asset_set.table), upright)
        builder.initial_pose = sapien.Pose([2.0634, 2.8313, 0])
        builder.build_static("table")

    def _build(self, name: str, thing: Thing, standin: list[Part], start: tuple) -> Actor:
        builder, gap = self.scene.create_actor_builder(), self.gap
        density = thing.density * gap.mass
        files = self.asset_set.files(thing)
        if files is not None:
            builder.add_multiple_convex_collisions_from_file(str(files.collision), material=self.surface, density=density)
            builder.add_visual_from_file(str(files.visual))
        for part in standin if files is None else ():
            colour = gap.tray if thing is TRAY else np.clip(np.array(part.colour) * gap.tint, 0, 1)
            material = RenderMaterial(base_color=[*colour, 1], roughness=0.6, specular=0.3)
            if part.kind == "box":
                pose = sapien.Pose(part.centre)
                builder.add_box_collision(pose, part.half, self.surface, density)
                builder.add_box_visual(pose, part.half, material)
            else:
                pose = sapien.Pose(part.centre, [0.70710678, 0, 0.70710678, 0])  # SAPIEN's cylinders lie along x
                builder.add_cylinder_collision(pose, part.half[0], part.half[2], self.surface, density)
                builder.add_cylinder_visual(pose, part.half[0], part.half[2], material)
        builder.initial_pose = sapien.Pose(start)
        return builder.build(name)

    # ------------------------------------------------------------------------------------------------ an episode

    def _layout(self, row: int, options: Mapping[str, Any]) -> Layout:
        layout = draw(self._batched_episode_rng[row], len(THINGS))
        if (name := options.get("object")) is not None:
            if name not in NAMES:
                raise ValueError(f"there is no object {name!r}; {suggest(str(name), NAMES)}")
            layout = Layout(NAMES.index(name), layout.place, layout.yaw, layout.tray)
        return layout

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict) -> None:
        layouts = [self._layout(int(row), options) for row in env_idx]
        count = len(layouts)
        self.agent.reset(np.array(HOME, np.float32))
        self.agent.robot.set_pose(sapien.Pose(BASE, [0, 0, 0, 1]))
        self.thing[env_idx] = torch.tensor([layout.thing for layout in layouts], device=self.device)
        for number, actor in self.things.items():
            thing = THINGS[number]
            p = np.tile([0.1 * number - 1.2, 0, SHELF - self._bottom[number] + CLEARANCE], (count, 1))
            yaw = np.zeros(count)
            for row, layout in enumerate(layouts):
                if layout.thing == number:
                    yaw[row] = layout.yaw + thing.yaw
                    # long objects may reach over the tray: they start above its rim and come to rest on it
                    rim = TRAY.size[2] if overlap(layout.place, yaw[row], thing.size, layout.tray, TRAY.size[0]) else 0
                    p[row] = (*layout.place, TABLE_TOP + rim - self._bottom[number] + CLEARANCE)
            q = np.stack([np.cos(yaw / 2), 0 * yaw, 0 * yaw, np.sin(yaw / 2)], 1)
            actor.set_pose(self._poses(p, q))
        trays = np.array([(*layout.tray, TABLE_TOP - self.asset_set.bottom(TRAY) + CLEARANCE) for layout in layouts])
        self.tray.set_pose(self._poses(trays, np.tile([1.0, 0, 0, 0], (count, 1))))
        for flag in self._flags.values():
            flag[env_idx] = False

    def _poses(self, p: np.ndarray, q: np.ndarray) -> Pose:
        return Pose.create_from_pq(torch.tensor(p, dtype=torch.float32, device=self.device), torch.tensor(q, dtype=torch.float32, device=self.device))

    def of_thing(self, values: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """From a tensor [B, ...] for each object, each env's own: [B, ...]."""
        out = torch.zeros_like(next(iter(values.values())))
        for number, value in values.items():
            mine = (self.thing == number).view(-1, *[1] * (out.ndim - 1))
            out = torch.where(mine, value, out)
        return out

    @property
    def thing_pose(self) -> torch.Tensor:
        """[B, 7] of each env's object: position, quaternion."""
        return self.of_thing({number: actor.pose.raw_pose for number, actor in self.things.items()})

    def evaluate(self) -> dict:
        thing, tray = self.thing_pose[:, :3], self.tray.pose.p
        force = self.of_thing({number: self.scene.get_pairwise_contact_forces(actor, self.tray) for number, actor in self.things.items()})
        offset = thing - tray
        within = torch.linalg.norm(offset[:, :2], dim=1) <= max(TRAY.size) / 2 + 0.01
        on = (offset[:, 2] > 0) & (offset[:, 2] - TRAY.size[2] / 2 - self._half_height[self.thing] <= 0.05)
        touches = torch.linalg.norm(force, dim=1) > 0.03
        grasped = self.of_thing({number: self.agent.is_grasping(actor) for number, actor in self.things.items()})
        return {"is_grasped": grasped, "success": within & on & touches}

    def compute_sparse_reward(self, obs: Any, action: torch.Tensor, info: dict) -> torch.Tensor:
        """0.2 at the first grasp, 1 at the first success, -0.4 when success is first lost."""
        now = {"grasped": info["is_grasped"], "solved": info["success"], "lost": self._flags["solved"] & ~info["success"]}
        reward = torch.zeros(self.num_envs, device=self.device)
        for (name, before), worth in zip(self._flags.items(), (1.0, 5.0, -2.0), strict=True):
            reward += worth * (now[name] & ~before)
            before |= now[name]
        return reward / 5

    def compute_dense_reward(self, obs: Any, action: torch.Tensor, info: dict) -> torch.Tensor:
        thing, tray, tool = self.thing_pose[:, :3], self.tray.pose.p, self.agent.tcp.pose.p
        reach = 1 - torch.tanh(10 * torch.linalg.norm(thing - tool, dim=1))
        carry = 1 - torch.tanh(10 * torch.linalg.norm((thing - tray)[:, :2], dim=1))
        reward = reach + info["is_grasped"] * (1 + carry)
        return torch.where(info["success"], torch.full_like(reward, 5.0), reward)

    def compute_normalized_dense_reward(self, obs: Any, action: torch.Tensor, info: dict) -> torch.Tensor:
        return self.compute_dense_reward(obs, action, info) / 5

    # ------------------------------------------------------------------------------------------------ what is seen

    def state(self) -> torch.Tensor:
        """[B, 7], exact: the tool's position and Euler angles (R = Rz Ry Rx) in the base's frame, and how far the fingers are apart."""
        tool = self.agent.robot.pose.inv() * self.agent.tcp.pose
        r = quaternion_to_matrix(tool.q)
        angles = [torch.atan2(r[:, 2, 1], r[:, 2, 2]), -torch.asin(r[:, 2, 0].clamp(-1, 1)), torch.atan2(r[:, 1, 0], r[:, 0, 0])]
        width = 2 * self.agent.robot.get_qpos()[:, -1]
        return torch.cat([tool.p, torch.stack([*angles, width], 1)], 1)

    def measured_state(self) -> torch.Tensor:
        """[B, 7], with the sensors' noise."""
        state = self.state()
        if not (self.gap.position_noise or self.gap.rotation_noise or self.gap.gripper_noise):
            return state
        measured = [self.gap.state(row.cpu().numpy(), self._noise(i, 1)) for i, row in enumerate(state)]
        return torch.tensor(np.stack(measured), dtype=torch.float32, device=self.device)

    def _get_obs_agent(self) -> dict:
        return {"state": self.measured_state()}

    def _get_obs_extra(self, info: dict) -> dict:
        if self.obs_mode_struct.state:
            return {"object_pose": self.thing_pose, "tray_pose": self.tray.pose.raw_pose}
        return {}

    def _get_obs_sensor_data(self, apply_texture_transforms: bool = True) -> dict:
        data = super()._get_obs_sensor_data(apply_texture_transforms)
        if "rgb" in data[CAMERA]:
            data[CAMERA]["rgb"] = self._seen(data[CAMERA]["rgb"])
        return data

    def look(self) -> torch.Tensor:
        """The camera's picture as of the last step, [B, H, W, 3] uint8. With obs_mode="none" this is all that is ever drawn."""
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        self.capture_sensor_data()
        camera = self.scene.sensors[CAMERA]
        if self.gpu_sim_enabled:
            rgb = camera.get_obs(rgb=True, depth=False, position=False, segmentation=False)["rgb"]
        else:  # ManiSkill's way leads through CUDA wherever there is a GPU, which costs every simulation process a context of half a GB
            rgb = torch.from_numpy(camera.camera._render_cameras[0].get_picture("Color")[None, ..., :3].copy())
        return self._seen(rgb)

    def _seen(self, rgb: torch.Tensor) -> torch.Tensor:
        if not (self.gap.pixel_noise or self.gap.exposure_noise):
            return rgb
        seen = [self.gap.picture(picture.cpu().numpy(), self._noise(i, 0)) for i, picture in enumerate(rgb)]
        return torch.tensor(np.stack(seen), device=rgb.device)

    def _noise(self, row: int, sensor: int) -> np.random.Generator:
        """A sensor's noise is a function of the episode's seed and the step, so that looking twice shows the same."""
        return np.random.default_rng([int(self._episode_seed[row]), int(self._elapsed_steps[row]), sensor])

    def get_language_instruction(self) -> list[str]:
        return [INSTRUCTION] * self.num_envs


@register_env("VlahubTwinPickPlaceReal-v1", max_episode_steps=MAX_STEPS)
class RealPickPlace(TwinPickPlace):
    """A stand-in for the real cell, which the twin imitates: see `Gap`. For demonstrations and evaluation; CPU physics only, one at a time, as there is one."""

    def __init__(self, *args: Any, num_envs: int = 1, gap: Gap | None = None, **kwargs: Any):
        if num_envs != 1:
            raise ValueError(f"the stand-in for the real cell runs one at a time (num_envs=1, CPU physics), not {num_envs}; train in VlahubTwinPickPlace-v1")
        super().__init__(*args, num_envs=1, gap=gap or Gap(), **kwargs)
