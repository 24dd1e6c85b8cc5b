"""What the world model is told about a chunk besides the memory frames: action rows, maps of where the end-effectors go, and the camera's rays.

A pose row has 16 numbers: xyz, quaternion xyzw and gripper of the left arm, then of the right. A robot with one arm stands in both halves.
All geometry is numpy in float64; results are float32 or uint8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from vlahub_envs.evac import drawing

Variant = Literal["libero", "agibot"]

# Per-step differences over the "agibotworld" data, per arm dx dy dz droll dpitch dyaw. The LIBERO weights use the same numbers.
DELTA_MEAN = np.array(
    [
        [2.9493694e-05, -2.4703979e-09, -3.2145205e-05, -1.0488863e-04, 6.1255986e-06, 9.9144185e-05],
        [2.520625e-05, 2.386437e-07, -3.6538445e-05, -1.170051e-04, 9.6533126e-06, -1.2602035e-04],
    ]
)
DELTA_STD = np.array(
    [
        [8.9460396e-04, 1.1014855e-03, 1.0237523e-03, 1.0402865e-02, 4.9353766e-03, 1.0759417e-02],
        [9.4362143e-04, 1.3782103e-03, 1.1818999e-03, 7.539298e-03, 4.3202576e-03, 8.1496774e-03],
    ]
)
FRAME_GAP = 3  # the statistics are per control step of the original data; every sampling stride uses three times them
GRIPPER_RANGE = 120.0  # of the AgiBot gripper; the LIBERO weights divide their -1..1 by it all the same
TOOL_TILT = 0.5236  # rad about z between an AgiBot end pose and the tool that is drawn: minus on the left, plus on the right
TOOL_LENGTH = 0.23  # m, from an AgiBot end pose to the drawn point along z
AXIS = 0.1  # m, drawn length of a tool axis
RADIUS, THICKNESS, BACKGROUND = 50, 8, 50  # of the published models' maps, in pixels at every resolution, and grey level
AXIS_COLOURS = (((0, 0, 255), (255, 255, 0), (0, 255, 255)), ((255, 0, 255), (255, 0, 0), (0, 255, 0)))  # RGB of x, y, z; left, right
FARTHEST = 2**31 - 1  # pixels; OpenCV has no larger coordinates


def pose_matrix(position: tuple[float, ...], quaternion_wxyz: tuple[float, ...]) -> np.ndarray:
    """4 x 4: from the camera's axes to the world's."""
    w, x, y, z = quaternion_wxyz
    pose = np.eye(4)
    pose[:3, :3] = rotation_matrix(np.array([x, y, z, w], np.float64))
    pose[:3, 3] = position
    return pose


# ------------------------------------------------------------------------------------------------ rotations


def rotation_matrix(quaternion: np.ndarray) -> np.ndarray:
    """[..., 4] xyzw, of any length but zero -> [..., 3, 3]"""
    length = np.linalg.norm(quaternion, axis=-1, keepdims=True)
    if not (length > 0).all():
        raise ValueError("a pose has the quaternion 0 0 0 0, which is no rotation; poses are xyz, quaternion xyzw, gripper")
    x, y, z, w = np.moveaxis(quaternion / length, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def roll_pitch_yaw(quaternion: np.ndarray) -> np.ndarray:
    """[..., 4] xyzw -> [..., 3]: turns about the fixed x, then y, then z axis."""
    m = rotation_matrix(quaternion)
    pitch = np.arctan2(-m[..., 2, 0], np.hypot(m[..., 0, 0], m[..., 1, 0]))
    return np.stack([np.arctan2(m[..., 2, 1], m[..., 2, 2]), pitch, np.arctan2(m[..., 1, 0], m[..., 0, 0])], axis=-1)


def quaternion_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[..., 4] xyzw: the rotation b, then a."""
    ax, ay, az, aw = np.moveaxis(a, -1, 0)
    bx, by, bz, bw = np.moveaxis(b, -1, 0)
    return np.stack(
        [
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
            aw * bw - ax * bx - ay * by - az * bz,
        ],
        axis=-1,
    )


# ------------------------------------------------------------------------------------------------ actions


def arms(poses: np.ndarray) -> np.ndarray:
    """[..., 16] -> [..., 2, 8] float64"""
    poses = np.asarray(poses, np.float64)
    if poses.shape[-1] != 16:
        raise ValueError(f"pose rows have 16 numbers (two arms of xyz, quaternion xyzw, gripper), not {poses.shape[-1]}")
    return poses.reshape(*poses.shape[:-1], 2, 8)


def action_rows(poses: np.ndarray) -> np.ndarray:
    """Poses [..., n + 1, 16] -> [..., n, 14]: per arm the change of xyz and of roll, pitch, yaw (in (-pi, pi]), and the gripper / 120 after it."""
    both = arms(poses)
    xyz = np.diff(both[..., :3], axis=-3)
    turn = np.diff(roll_pitch_yaw(both[..., 3:7]), axis=-3)
    turn = np.pi - (np.pi - turn) % (2 * np.pi)
    rows = np.concatenate([xyz, turn, both[..., 1:, :, 7:] / GRIPPER_RANGE], axis=-1)
    return rows.reshape(*rows.shape[:-2], 14).astype(np.float32)


def normalised(rows: np.ndarray) -> np.ndarray:
    """Action rows [..., 14] with the six differences of each arm normalised; the grippers stay."""
    both = np.asarray(rows, np.float64).reshape(*rows.shape[:-1], 2, 7).copy()
    both[..., :6] = (both[..., :6] - FRAME_GAP * DELTA_MEAN) / (FRAME_GAP * DELTA_STD)
    return both.reshape(rows.shape).astype(np.float32)


def tilted(poses: np.ndarray) -> np.ndarray:
    """AgiBot pose rows [..., 16] as they are drawn: each tool turned by 30 degrees about its z axis."""
    both = arms(poses).copy()
    for arm, angle in enumerate((-TOOL_TILT, TOOL_TILT)):
        quaternion = both[..., arm, 3:7] / np.linalg.norm(both[..., arm, 3:7], axis=-1, keepdims=True)
        both[..., arm, 3:7] = quaternion_product(quaternion, np.array([0, 0, math.sin(angle / 2), math.cos(angle / 2)]))
    return both.reshape(np.shape(poses)).astype(np.float32)


# ------------------------------------------------------------------------------------------------ cameras


def mujoco_camera(position: Sequence[float], quaternion_wxyz: Sequence[float], fovy: float, height: int, width: int) -> dict[str, tuple]:
    """The entries of WorldModelConfig for a "libero" model that is trained on LIBERO's own pictures, height x width, of a MuJoCo camera (`fovy` in degrees).

    MuJoCo's cameras look along -z, with x to the right and y up. LIBERO's pictures are mirrored left to right, hence the negative focal length.
    """
    focal = height / 2 / math.tan(math.radians(fovy) / 2)
    w, x, y, z = quaternion_wxyz
    # x forward, y left, z up are -z, -x, y in MuJoCo's axes: the rotation with this quaternion
    x, y, z, w = quaternion_product(np.array([x, y, z, w], np.float64), np.array([-0.5, 0.5, 0.5, 0.5])).tolist()
    intrinsic = ((-focal, 0.0, width / 2 - 1), (0.0, focal, height / 2 - 1), (0.0, 0.0, 1.0))
    return {"intrinsic": intrinsic, "camera_position": tuple(map(float, position)), "camera_quaternion_wxyz": (w, x, y, z)}


def scaled_intrinsic(intrinsic: np.ndarray, size: tuple[int, int], new_size: tuple[int, int]) -> np.ndarray:
    """The intrinsics of a picture (height, width) after a resize."""
    factors = np.array([new_size[1] / size[1], new_size[0] / size[0], 1.0], np.float32)[:, None]
    return np.asarray(intrinsic, np.float32) * factors


def rays(intrinsic: np.ndarray, to_world: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions and origins [height, width, 3], in the world, of the rays through the pixel centres. The network takes every camera as looking along z."""
    k, pose = np.asarray(intrinsic, np.float64), np.asarray(to_world, np.float64)
    x = (np.arange(width) + 0.5 - k[0, 2]) / k[0, 0]
    y = (np.arange(height) + 0.5 - k[1, 2]) / k[1, 1]
    directions = np.stack([*np.meshgrid(x, y), np.ones((height, width))], axis=-1)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    directions = directions @ pose[:3, :3].T
    return directions.astype(np.float32), np.broadcast_to(pose[:3, 3], directions.shape).astype(np.float32)


def project(points: np.ndarray, intrinsic: np.ndarray, to_world: np.ndarray, size: tuple[int, int], variant: Variant) -> np.ndarray:
    """Points [..., 3] in the world -> whole pixels [..., 2] (x, y). Points behind the camera are projected like any other, as the models were trained.

    An "agibot" camera looks along its z axis (x right, y down), a "libero" one along x (y left, z up)."""
    k = np.asarray(intrinsic, np.float64)
    in_camera = (points - to_world[:3, 3]) @ to_world[:3, :3]  # the inverse of a rotation is its transpose
    a, b, depth = (in_camera[..., i] for i in ((0, 1, 2) if variant == "agibot" else (1, 2, 0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        uv = np.stack([k[0, 0] * a / depth + k[0, 2], k[1, 1] * b / depth + k[1, 2]], axis=-1)
    if variant == "libero":
        uv = np.array([size[1] - 1, size[0] - 1]) - uv  # left and up are smaller pixel numbers
    uv = np.nan_to_num(uv, nan=FARTHEST, posinf=FARTHEST, neginf=-FARTHEST)
    return np.trunc(np.clip(uv, -FARTHEST, FARTHEST)).astype(np.int64)


# ------------------------------------------------------------------------------------------------ maps


def _colours(anchors: str) -> np.ndarray:
    """Nine colours (hexadecimal), linearly interpolated -> the 256 x 3 table that matplotlib calls by the palette's name."""
    # matplotlib writes its palettes with 17 decimals, and the truncation to bytes below sees the last of them
    values = np.array([[float(f"{int(colour[i : i + 2], 16) / 255:.17f}") for i in (0, 2, 4)] for colour in anchors.split()])
    knots, at = 255 * np.linspace(0, 1, len(values)), 255 * np.linspace(0, 1, 256)
    after = np.searchsorted(knots, at[1:-1])
    share = ((at[1:-1] - knots[after - 1]) / (knots[after] - knots[after - 1]))[:, None]
    between = share * (values[after] - values[after - 1]) + values[after - 1]
    return (255 * np.concatenate([values[:1], between, values[-1:]])).astype(np.uint8)


# ColorBrewer's nine-class sequential palettes, light to dark
GREENS = _colours("f7fcf5 e5f5e0 c7e9c0 a1d99b 74c476 41ab5d 238b45 006d2c 00441b")
REDS = _colours("fff5f0 fee0d2 fcbba1 fc9272 fb6a4a ef3b2c cb181d a50f15 67000d")


def colour_of(table: np.ndarray, value: np.ndarray | float) -> np.ndarray:
    """The colours of values in [0, 1]; beyond, the first or the last."""
    return table[np.clip(256 * np.asarray(value), 0, 255).astype(np.int64)]


def trajectory_maps(
    poses: np.ndarray,
    intrinsic: np.ndarray,
    to_world: np.ndarray,
    size: tuple[int, int],
    variant: Variant,
    radius: int = RADIUS,
    thickness: int = THICKNESS,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Pose rows [n, 16] -> pictures [n, height, width, 3] uint8 of `size` (height, width): at each end-effector a disc, whose colour is the gripper, and the three
    axes of its tool.

    "agibot" draws both arms at the tool's tip. "libero" draws at the pose itself, and its two arms stand at the left pose: the right one covers the left, and
    only it is drawn. Arms whose point lies outside the picture are left out.
    """
    both = arms(poses)
    turn = rotation_matrix(both[..., 3:7])  # [n, 2, 3, 3]: columns are the tool's axes
    if variant == "agibot":
        base, grippers, drawn = both[..., :3] + TOOL_LENGTH * turn[..., 2], both[..., 7] / GRIPPER_RANGE, (0, 1)
    else:
        base, grippers, drawn = both[:, [0, 0], :3], np.clip(both[..., 7], -1, 1) / 2 + 0.5, (1,)
        turn = turn[:, [0, 0]]
    points = np.concatenate([base[:, :, None], base[:, :, None] + AXIS * turn.swapaxes(2, 3)], axis=2)  # [n, 2, 4, 3]
    pixels = torch.from_numpy(project(points, intrinsic, np.asarray(to_world, np.float64), size, variant)).to(device)  # [n, 2, 4, 2]
    height, width = size
    inside = ((pixels[:, :, 0] >= 0) & (pixels[:, :, 0] < torch.tensor([width, height], device=device))).all(-1)  # [n, 2]
    canvas = torch.full((len(both), height, width, 3), BACKGROUND, dtype=torch.uint8, device=device)

    def paint(mask: torch.Tensor, colour: np.ndarray | tuple[int, ...]) -> None:  # colours [n, 3], or one of all
        nonlocal canvas
        canvas = torch.where(mask[..., None], torch.as_tensor(np.asarray(colour, np.uint8), device=device).view(-1, 1, 1, 3), canvas)

    for arm in drawn:
        here = inside[:, arm, None, None]
        paint(drawing.discs(size, pixels[:, arm, 0], radius) & here, colour_of((GREENS, REDS)[arm], grippers[:, arm]))
    for arm in drawn:
        here, start = inside[:, arm, None, None], pixels[:, arm, 0]
        for axis, colour in enumerate(AXIS_COLOURS[arm], 1):
            paint(drawing.lines(size, start, pixels[:, arm, axis], thickness) & here, colour)
    return canvas
