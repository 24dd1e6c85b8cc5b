"""EVAC's geometry: rotations, action rows, projection, and maps drawn as OpenCV 4 draws them."""

import numpy as np
import pytest
import torch

from vlahub_envs.evac import conditioning, drawing

# drawn with cv2.line and cv2.circle of OpenCV 4.12; OpenCV 5 gives other pixels for lines of this kind
THICK = """
..................
............###...
........########..
.....############.
..##############..
..##############..
.############.....
..########........
...###............
..................
"""
CUT_OFF = """
.........###
......######
.....#######
....########
.....#######
......###...
............
............
"""
DISC = """
....#....
..#####..
.#######.
.#######.
#########
.#######.
.#######.
..#####..
....#....
"""


def picture(text: str) -> np.ndarray:
    return np.array([[mark == "#" for mark in row] for row in text.split()])


def line(height: int, width: int, start, end, thickness: int) -> np.ndarray:
    return drawing.lines((height, width), torch.tensor([start]), torch.tensor([end]), thickness)[0].numpy()


def disc(size: int, x: int, y: int, radius: int) -> np.ndarray:
    return drawing.discs((size, size), torch.tensor([[x, y]]), radius)[0].numpy()


def test_lines_and_discs_have_opencv4s_pixels():
    np.testing.assert_array_equal(line(10, 18, (3, 6), (14, 3), 4), picture(THICK))
    np.testing.assert_array_equal(line(8, 12, (6, 3), (60, -9), 3), picture(CUT_OFF))
    np.testing.assert_array_equal(disc(9, 4, 4, 4), picture(DISC))
    assert [int(disc(120, 60, 60, radius).sum()) for radius in (7, 50)] == [149, 7845]


def test_shapes_are_cut_at_the_border():
    np.testing.assert_array_equal(disc(120, 3, 118, 50), np.roll(disc(240, 63, 118, 50), -60, axis=1)[:120, :120])
    assert not disc(20, -60, 10, 50).any() and not disc(20, 10, 90, 50).any() and not line(20, 20, (-30, -30), (-20, -25), 8).any()


def test_a_line_of_no_length_is_its_end():
    np.testing.assert_array_equal(line(20, 20, (9, 9), (9, 9), 8), disc(20, 9, 9, 4))


@pytest.mark.parametrize("end", [(2_147_483_647, -2_147_483_647), (-2_147_483_647, 3), (8, 2_147_483_647)])
def test_lines_that_leave_the_picture_far_away_cost_no_more(end):
    drawn = line(16, 16, (8, 8), end, 3)
    assert drawn[8, 8] and 16 <= drawn.sum() <= 80


def quaternion(axis: list[float], angle: float) -> np.ndarray:
    return np.array([*(np.sin(angle / 2) * np.array(axis)), np.cos(angle / 2)])


def test_rotations():
    quarter = conditioning.rotation_matrix(quaternion([0, 0, 1], np.pi / 2))
    np.testing.assert_allclose(quarter @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    roll, pitch, yaw = (quaternion(axis, angle) for axis, angle in (([1, 0, 0], 0.3), ([0, 1, 0], -0.2), ([0, 0, 1], 2.9)))
    both = conditioning.quaternion_product(yaw, conditioning.quaternion_product(pitch, roll))  # about fixed axes: x first
    np.testing.assert_allclose(conditioning.roll_pitch_yaw(3 * both), [0.3, -0.2, 2.9], atol=1e-12)
    with pytest.raises(ValueError, match="quaternion 0 0 0 0"):
        conditioning.rotation_matrix(np.zeros(4))


def pose(xyz=(0.0, 0.0, 0.0), turn=(0.0, 0.0, 0.0, 1.0), gripper=0.0) -> np.ndarray:
    return np.array([*xyz, *turn, gripper])


def test_action_rows_are_differences_that_take_the_short_way_round():
    before, after = pose((0, 0, 0), quaternion([0, 0, 1], 3.1), 60), pose((0.1, 0, -0.2), quaternion([0, 0, 1], -3.1), 30)
    rows = conditioning.action_rows(np.stack([np.tile(before, 2), np.tile(after, 2)]))
    assert rows.shape == (1, 14)
    np.testing.assert_allclose(rows[0, :7], [0.1, 0, -0.2, 0, 0, 2 * np.pi - 6.2, 0.25], atol=1e-6)
    np.testing.assert_array_equal(rows[0, :7], rows[0, 7:])
    mean, std = conditioning.DELTA_MEAN[1], conditioning.DELTA_STD[1]
    np.testing.assert_allclose(conditioning.normalised(rows)[0, 7:13], (rows[0, 7:13] - 3 * mean) / (3 * std), rtol=1e-5)
    assert conditioning.normalised(rows)[0, 13] == rows[0, 13]
    with pytest.raises(ValueError, match="16 numbers"):
        conditioning.action_rows(before[None])


K = np.array([[100.0, 0, 32], [0, 100, 24], [0, 0, 1]])


def test_both_cameras_put_a_point_where_they_should():
    in_front = np.array([0.05, 0.02, 1.0])  # right, down, forward
    np.testing.assert_array_equal(conditioning.project(in_front, K, np.eye(4), (48, 64), "agibot"), [37, 26])
    forward_x = np.array([1.0, -0.05, -0.02])  # the same point for a camera that looks along x, with y to the left and z up
    u, v = 100 * -0.05 + 32, 100 * -0.02 + 24
    np.testing.assert_array_equal(conditioning.project(forward_x, K, np.eye(4), (48, 64), "libero"), [63 - u, 47 - v])


def test_a_mujoco_camera_sees_points_where_mujoco_draws_them():
    entries = conditioning.mujoco_camera((0.6586, 0, 1.6104), (0.638, 0.3048, 0.3048, 0.638), 45, 256, 256)
    assert entries["intrinsic"][0][0] == pytest.approx(-309.02, abs=0.01)
    to_world = conditioning.pose_matrix(entries["camera_position"], entries["camera_quaternion_wxyz"])
    point = np.array([-0.1, 0.15, 1.0])
    axes = conditioning.rotation_matrix(np.array([0.3048, 0.3048, 0.638, 0.638]))  # columns: the camera's right, up and backward in the world
    right, up, backward = (point - [0.6586, 0, 1.6104]) @ axes
    column, row = 128 + 309.02 * right / -backward, 128 - 309.02 * up / -backward
    seen = conditioning.project(point, np.array(entries["intrinsic"]), to_world, (256, 256), "libero")
    np.testing.assert_array_equal(seen, [int(256 - column), int(row)])  # mirrored left to right


def test_rays_start_at_the_camera_and_pass_through_the_pixels():
    to_world = conditioning.pose_matrix((0.5, 0.0, 1.0), (0.0, 1.0, 0.0, 0.0))  # turned by 180 degrees about x: looking down
    directions, origins = conditioning.rays(K, to_world, 48, 64)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(origins[3, 5], [0.5, 0.0, 1.0])
    along = directions[30, 50] / -directions[30, 50, 2]
    np.testing.assert_allclose(along, [(50.5 - 32) / 100, -(30.5 - 24) / 100, -1], atol=1e-6)


def test_maps_show_position_orientation_and_gripper():
    arm = pose((1.0, 0.0, 0.0), gripper=1.0)
    drawn = conditioning.trajectory_maps(np.tile(arm, (1, 2)), K, np.eye(4), (48, 64), "libero")[0].numpy()
    assert drawn.shape == (48, 64, 3)
    np.testing.assert_array_equal(drawn[23, 31], conditioning.AXIS_COLOURS[1][2])  # z is drawn last
    assert (drawn == conditioning.REDS[255]).all(-1).any()  # a closed gripper has the palette's last colour, and covers the left arm's disc
    outside = conditioning.trajectory_maps(np.tile(pose((1.0, 5.0, 0.0)), (1, 2)), K, np.eye(4), (48, 64), "libero")[0].numpy()
    assert (outside == conditioning.BACKGROUND).all()


def test_the_two_arms_of_an_agibot_are_drawn_apart():
    left, right = pose((-0.2, 0, 1.0 - 0.23), gripper=0), pose((0.2, 0, 1.0 - 0.23), gripper=120)
    drawn = conditioning.trajectory_maps(np.concatenate([left, right])[None], K, np.eye(4), (160, 240), "agibot")[0].numpy()
    assert (drawn == conditioning.GREENS[0]).all(-1).any() and (drawn == conditioning.REDS[255]).all(-1).any()


def test_palettes_run_from_light_to_dark():
    assert conditioning.GREENS[0].tolist() == [0xF7, 0xFC, 0xF5] and conditioning.REDS[255].tolist()[0] == 0x67
    assert (np.diff(conditioning.GREENS.astype(int).sum(1)) <= 0).all()
    np.testing.assert_array_equal(conditioning.colour_of(conditioning.GREENS, 7.0), conditioning.GREENS[255])
