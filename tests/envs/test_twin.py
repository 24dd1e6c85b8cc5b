import json
from collections.abc import Iterator

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import vlahub
from vlahub import catalog
from vlahub_envs.twin import assets
from vlahub_envs.twin.expert import grasp_yaw
from vlahub_envs.twin.gap import Gap
from vlahub_envs.twin.layout import MIN_DISTANCE, OBJECT_PLACES, PAIRS, TABLE_TOP, TRAY_PLACES, YAWS, draw, overlap
from vlahub_envs.twin.objects import NAMES, THINGS, TRAY, parts, tray_parts
from vlahub_policies.parts.robots import TWIN

ID = "vlahub/Twin-PickPlace"
SMALL = {"camera_size": (24, 32), "assets": "stand-in"}
STAY = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)


@pytest.fixture(scope="module")
def env() -> Iterator[vlahub.Env]:
    env = gym.make(ID, stop_when_solved=False, **SMALL)
    yield env
    env.close()


@pytest.fixture(scope="module")
def real() -> Iterator[vlahub.Env]:
    env = gym.make(f"{ID}-Real", **SMALL)
    yield env
    env.close()


def same(a, b) -> bool:
    return all(np.array_equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------ layout and objects


def test_layouts_are_those_of_the_published_grids():
    assert len(PAIRS) == 1246 and np.linalg.norm(OBJECT_PLACES[PAIRS[:, 0]] - TRAY_PLACES[PAIRS[:, 1]], axis=1).min() > MIN_DISTANCE
    assert np.allclose(OBJECT_PLACES.min(0), (-0.198, -0.265)) and np.allclose(TRAY_PLACES.max(0), (-0.098, 0.135))
    random = np.random.RandomState(0)
    drawn = [draw(random, 25) for _ in range(400)]
    assert {layout.thing for layout in drawn} == set(range(25)) and {layout.yaw for layout in drawn} == set(YAWS)
    assert draw(np.random.RandomState(3), 25) == draw(np.random.RandomState(3), 25) != draw(np.random.RandomState(4), 25)


def test_what_reaches_over_the_tray_starts_above_its_rim(env):
    assert overlap((0, 0), 0, (0.1, 0.02), (0.09, 0), 0.11) and not overlap((0, 0), np.pi / 2, (0.1, 0.02), (0.09, 0), 0.11)
    assert not overlap((0, 0), np.pi / 4, (0.02, 0.02), (0.09, 0), 0.11) and overlap((0, 0), 0.3, (0.01, 0.01), (0, 0), 0.11)
    env.reset(seed=67)  # a bottle of 122 mm, 82 mm from the tray's middle
    before = env.simulation.cell.thing_pose[0, :3].clone()
    assert before[2] == pytest.approx(TABLE_TOP + 0.006 + 0.001 + 0.039 / 2, abs=1e-4)
    env.step_chunk(np.tile(STAY, (5, 1)))
    assert torch.linalg.norm(env.simulation.cell.thing_pose[0, :3] - before) < 0.01  # it comes to rest, and is not thrown out


def test_standins_fill_the_published_sizes_and_fit_between_the_fingers():
    assert len(THINGS) == 25 and THINGS[6].key == "007_ketchup bottle_1" and THINGS[18].size == (0.035, 0.035, 0.085)
    for thing, made in [*((thing, parts(thing)) for thing in THINGS), (TRAY, tray_parts())]:
        low = np.min([np.subtract(part.centre, part.half) for part in made], 0)
        high = np.max([np.add(part.centre, part.half) for part in made], 0)
        wide = [min(thing.size[:2])] * 2 if thing.shape == "round" else thing.size[:2]
        assert np.allclose(high - low, (*wide, thing.size[2])) and np.isclose(low[2], thing.bottom)
        assert min(wide) < 0.07 or thing is TRAY


# ------------------------------------------------------------------------------------------------ the episode


def test_the_robot_starts_at_home_and_the_camera_is_the_cells(env):
    observation, info = env.reset(seed=0)
    # measured on the published twin
    assert observation["states"] == pytest.approx([0.525, 0, 0.132, -np.pi, 0.033, 0, 0.03], abs=5e-4)
    assert info["object"] in NAMES and observation["main_images"].shape == (24, 32, 3)
    assert str(vlahub.check(env, TWIN)) == "direct"  # what the published checkpoint expects
    camera = env.simulation.cell._default_sensor_configs[0]
    assert camera.intrinsic[0] / 32 * 640 == pytest.approx([559.83, 0, 320], abs=0.05)
    assert camera.pose.p[0].tolist() == pytest.approx([0.184, 0.2, 1.4]) and camera.pose.q[0].tolist() == pytest.approx(
        [0.2541, 0.351, 0.1361, -0.8909], abs=1e-4
    )


def test_of_the_robots_parts_only_the_fingers_touch_each_other(env):
    env.reset(seed=0)
    env.step_chunk(np.tile(STAY * [1, 1, 1, 1, 1, 1, -1], (3, 1)))  # closes on nothing
    cell = env.simulation.cell
    links = {link.name for link in cell.agent.robot.links}
    pairs = {frozenset(body.entity.name for body in contact.bodies) for contact in cell.scene.get_contacts()}
    assert {pair for pair in pairs if pair <= links} == {frozenset({"panda_leftfinger", "panda_rightfinger"})}
    assert env.simulation.cell.state()[0, 6] == pytest.approx(0, abs=2e-3)  # they stop where they meet


def test_an_episode_repeats_itself_bit_for_bit_whatever_was_before(env):
    actions = np.random.default_rng(0).uniform(-0.05, 0.05, (8, 7)).astype(np.float32)
    env.reset(seed=11)
    first = env.step_chunk(actions).observation
    for seed in (12, 13):
        env.reset(seed=seed)
        env.step_chunk(actions[:3])
    env.reset(seed=11)
    assert same(first, env.step_chunk(actions).observation)
    env.reset(seed=8, options={"trial": 3})  # the layout of seed 8 + 3
    assert same(first, env.step_chunk(actions).observation)


def test_things_lie_where_the_layout_says_and_stay(env):
    for name in ("kitchen shovel", "nonstop can", "golf ball"):
        _, info = env.reset(seed=5, options={"object": name})
        cell, thing = env.simulation.cell, THINGS[NAMES.index(name)]
        layout = draw(np.random.RandomState(5), 25)
        env.step_chunk(np.tile(STAY, (5, 1)))
        pose = cell.thing_pose[0].numpy()
        assert (
            info["object"] == name and pose[:2] == pytest.approx(layout.place, abs=2e-3) and pose[2] == pytest.approx(TABLE_TOP + thing.size[2] / 2, abs=1e-3)
        )
        turned = Rotation.from_quat(np.roll(pose[3:], -1)) * Rotation.from_euler("z", layout.yaw + thing.yaw).inv()
        assert turned.magnitude() < 0.02
        assert cell.tray.pose.p[0].numpy() == pytest.approx([*layout.tray, TABLE_TOP], abs=2e-3)


def test_actions_step_along_the_base_and_turn_about_the_tools_own_axes(env):
    env.reset(seed=0)
    start = env.step_chunk(np.tile(STAY, (5, 1))).observation["states"]
    assert start[6] == pytest.approx(0.08, abs=1e-3)  # +1 opens
    moved = env.step_chunk(np.array([[0.02, -0.03, 0.01, 0, 0, 0, -1], *[[0, 0, 0, 0, 0, 0, -1]] * 9])).observation["states"]
    assert moved[:3] - start[:3] == pytest.approx([0.02, -0.03, 0.01], abs=4e-3) and moved[6] == pytest.approx(0, abs=1e-3)
    turned = env.step_chunk(np.array([[0, 0, 0, 0.1, 0, 0, -1], [0, 0, 0, 0, 0, -0.06, -1], *[[0, 0, 0, 0, 0, 0, -1]] * 12])).observation["states"]
    expected = Rotation.from_euler("xyz", moved[3:6]) * Rotation.from_euler("x", 0.1) * Rotation.from_euler("z", -0.06)
    assert (Rotation.from_euler("xyz", turned[3:6]) * expected.inv()).magnitude() < 0.03  # of 0.12


def test_success_and_the_sparse_reward(env):
    """The object is put in the tray, taken out, and put in again, by hand."""
    from mani_skill.utils.structs.pose import Pose

    env.reset(seed=3)
    cell = env.simulation.cell
    actor, tray = cell.things[int(cell.thing[0])], cell.tray.pose.p[0]
    half = THINGS[int(cell.thing[0])].size[2] / 2

    def put(offset):
        actor.set_pose(Pose.create_from_pq(tray + torch.tensor(offset), torch.tensor([1.0, 0, 0, 0])))
        return env.step_chunk(STAY[None])

    inside = put((0.04, 0.03, half + 0.005))
    assert inside.reward[0] == pytest.approx(1.0) and inside.info["success"] and not inside.terminated[0]
    assert cell.evaluate()["success"][0]
    outside = put((0.3, 0.0, half + 0.005))
    assert outside.reward[0] == pytest.approx(-0.4) and not cell.evaluate()["success"][0]
    assert put((0.0, 0.0, half + 0.005)).reward[0] == 0  # only once each
    assert cell.evaluate()["success"][0]
    assert put((0.3, 0.0, half + 0.005)).reward[0] == 0
    actor.set_pose(Pose.create_from_pq(tray + torch.tensor([0, 0, half + 0.02]), torch.tensor([1.0, 0, 0, 0])))
    assert not cell.evaluate()["success"][0]  # above the tray, and not on it


def test_only_the_end_of_a_chunk_is_drawn(env, monkeypatch):
    env.reset(seed=0)
    cell, looks = env.simulation.cell, []
    monkeypatch.setattr(cell, "capture_sensor_data", lambda draw=cell.capture_sensor_data: (looks.append(1), draw()))
    env.step_chunk(np.tile(STAY, (4, 1)))
    assert len(looks) == 1
    env.reset(seed=1)
    assert len(looks) == 2


@pytest.mark.parametrize(("env_id", "seed"), [(ID, 1), (f"{ID}-Real", 4)])
def test_the_expert_solves_it(env, real, env_id, seed):
    env = real if env_id.endswith("Real") else env
    env.reset(seed=seed)
    expert = catalog.make_expert(env_id, env.simulation)
    expert.reset()
    total, grasped = 0.0, False
    for _ in range(env.simulation.max_steps):
        chunk = expert.act()
        assert env.action_space.contains(chunk[0])
        outcomes = env.simulation.apply(chunk)  # without a look
        total, grasped = total + outcomes.reward[0], grasped or outcomes.info["grasped"]
        if outcomes.success[0]:
            break
    assert grasped and total == pytest.approx(1.2) and bool(outcomes.terminated[0]) == env.simulation.stop_when_solved
    assert env.simulation.render().shape == (480, 640, 3)


def test_the_hand_turns_the_short_way_and_ties_fall_to_one_side():
    for degrees in range(-180, 180, 15):
        axes = Rotation.from_euler("z", degrees, degrees=True).as_matrix() * (0.02, 0.06, 0.015)
        yaw = grasp_yaw("block", axes)
        assert abs(yaw) <= np.pi / 2 + 2e-3
        closing = np.array([np.cos(yaw + np.pi / 2), np.sin(yaw + np.pi / 2), 0])
        assert abs(closing @ axes[:, 0]) == pytest.approx(0.02)
    assert np.isclose(grasp_yaw("block", np.diag((0.02, 0.06, 0.015))), grasp_yaw("block", np.diag((-0.02, 0.06, 0.015))))
    assert grasp_yaw("round", np.eye(3)) == 0


# ------------------------------------------------------------------------------------------------ the stand-in for the real cell


def test_the_real_cell_looks_and_moves_otherwise_on_the_same_layout(env, real):
    twin, there = env.reset(seed=2), real.reset(seed=2)
    assert twin[1]["object"] == there[1]["object"]
    assert np.abs(twin[0]["main_images"].astype(int) - there[0]["main_images"]).mean() > 20
    assert env.simulation.cell.thing_pose[0, :3].numpy() == pytest.approx(real.simulation.cell.thing_pose[0, :3].numpy())
    assert str(vlahub.check(env, real.interface)) == "direct"
    mass = [one.simulation.cell.things[int(one.simulation.cell.thing[0])].mass.item() for one in (env, real)]
    assert mass[1] == pytest.approx(Gap().mass * mass[0], rel=1e-4)
    again = real.simulation.observe(), real.simulation.observe()
    assert same(*again)  # noise is a function of the step
    assert not np.array_equal(real.step(STAY)[0]["states"][3:5], again[0]["states"][3:5])


def test_every_number_of_the_gap_is_in_use(env):
    """The drives wait for `delay`, and stiffness matters; with no gap the class is the twin."""
    push = np.array([[0.05, 0, 0, 0, 0, 0, 1]], np.float32)
    moved = {}
    for name, gap in {"none": {}, "delay": {"delay": 0.1}, "soft": {"stiffness": 0.5}}.items():
        one = gym.make(ID, gap=gap, **SMALL)
        one.reset(seed=0)
        moved[name] = float(one.step_chunk(push).observation["states"][0])
        one.close()
    env.reset(seed=0)
    assert moved["none"] == pytest.approx(float(env.step_chunk(push).observation["states"][0]))
    gone = {name: x - 0.525 for name, x in moved.items()}
    assert 0.1 * gone["none"] < gone["delay"] < 0.6 * gone["none"] and gone["soft"] < 0.9 * gone["none"]


def test_sensors_blur_by_what_the_gap_says():
    random = np.random.default_rng(0)
    grey = np.full((64, 64, 3), 128, np.uint8)
    seen = Gap(pixel_noise=4, exposure_noise=0).picture(grey, random)
    assert seen.dtype == np.uint8 and np.std(seen.astype(float)) == pytest.approx(4, rel=0.1) and abs(seen.mean() - 128) < 0.3
    states = np.stack([Gap().state(np.zeros(7), random) for _ in range(2000)])
    assert states.std(0) == pytest.approx([0.001] * 3 + [0.003] * 3 + [0.0005], rel=0.1)
    assert Gap.none().picture(grey, random) is grey
    with pytest.raises(ValueError, match=r"gap\.friction is a factor"):
        Gap(friction=0)


# ------------------------------------------------------------------------------------------------ as a ManiSkill environment


def test_maniskill_makes_it_by_its_own_id(capfd):
    import vlahub_envs.twin.cell  # noqa: F401  registers

    cell = gym.make("VlahubTwinPickPlace-v1", obs_mode="rgb+state", render_backend="sapien_cpu", reconfiguration_freq=0, reward_mode="dense", **SMALL)
    observation, _ = cell.reset(seed=5)
    assert observation["sensor_data"]["c19_front_view"]["rgb"].shape == (1, 24, 32, 3)
    observation, reward, terminated, truncated, info = cell.step(STAY)
    assert 0 < reward < 1 and not terminated and not truncated and {"success", "is_grasped"} <= info.keys()
    assert cell.unwrapped.get_language_instruction() == ["Pick up the object on the table and place it into the white tray."]
    # all 25 objects are there, as in a batch on a GPU; those not in use lie still on their shelf, and the layout is that of the seed all the same
    world, layout = cell.unwrapped, draw(np.random.RandomState(5), 25)
    assert len(world.things) == 25 and int(world.thing[0]) == layout.thing and world.thing_pose[0, :2].numpy() == pytest.approx(layout.place, abs=2e-3)
    for number, actor in world.things.items():
        assert number == layout.thing or (actor.pose.p[0, 2] < -2.8 and torch.linalg.norm(actor.linear_velocity[0]) < 0.02)
    cell.reset(seed=6)
    assert int(world.thing[0]) == draw(np.random.RandomState(6), 25).thing and world.thing_pose[0, 2] > TABLE_TOP
    cell.close()
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match="one at a time"):
        gym.make("VlahubTwinPickPlaceReal-v1", num_envs=2)


# ------------------------------------------------------------------------------------------------ assets


def test_the_official_release_is_used_where_it_is_complete(tmp_path, monkeypatch):
    import trimesh

    def write_box(file, size):
        file.parent.mkdir(parents=True, exist_ok=True)
        trimesh.creation.box(size).export(file)

    monkeypatch.setenv("VLAHUB_ASSETS", str(tmp_path))
    assert assets.find("auto").name == "stand-in"
    with pytest.raises(FileNotFoundError, match=r"vlahub assets twin --download.*vlahub assets twin-objects --download"):
        gym.make(ID, assets="official")
    records: dict = {"more_carrot": {}, "more_plate": {}}
    for thing in (*THINGS, TRAY):
        folder = tmp_path / "twin-objects" / assets.place(thing)
        for name in ("collision.obj", "textured.glb"):
            write_box(folder / name, thing.size)
        records[folder.parent.name][thing.key] = {"bbox": {"min": [-side / 2 for side in thing.size], "max": [side / 2 for side in thing.size]}}
    for kind, record in records.items():
        (tmp_path / "twin-objects/carrot" / kind / "model_db.json").write_text(json.dumps(record))
    assert assets.missing_objects(tmp_path / "twin-objects") == [] and assets.find("auto").name == "stand-in"  # without the table
    with pytest.raises(FileNotFoundError, match=r"lacks custom_assets/bridge_table_long.glb"):
        assets.find(tmp_path / "twin-objects")
    write_box(tmp_path / "twin" / assets.TABLE, (8, 2 * TABLE_TOP, 8))  # y-up
    assert assets.find("stand-in").name == "stand-in"
    env = gym.make(ID, camera_size=(24, 32))
    assert env.assets == "official"
    env.reset(seed=0)
    env.step_chunk(np.tile(STAY, (4, 1)))
    cell = env.simulation.cell
    half = THINGS[int(cell.thing[0])].size[2] / 2
    assert cell.thing_pose[0, 2] == pytest.approx(TABLE_TOP + half, abs=2e-3) and cell.tray.pose.p[0, 2] == pytest.approx(
        TABLE_TOP + TRAY.size[2] / 2, abs=2e-3
    )
    env.close()


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"camera_size": 240}, ValueError, r"camera_size must be \(height, width\)"),
        ({"camera_size": (240, 0)}, ValueError, "camera_size"),
        ({"reward": "shaped"}, ValueError, "reward must be 'sparse' or 'dense'"),
        ({"assets": "oficial"}, FileNotFoundError, "'auto', 'official', 'stand-in'"),
        ({"gap": {"delai": 0.1}}, ValueError, "did you mean 'delay'"),
        ({"gap": {"delay": -1}}, ValueError, r"gap\.delay must be at least 0"),
        ({"gap": {"delay": 0.2}}, ValueError, r"gap\.delay must be below 0.2 s"),
        ({"cell": "real"}, TypeError, "no option 'cell'"),
        ({"camera_sise": (24, 32)}, TypeError, "'camera_size'"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, error, words):
    with pytest.raises(error, match=words):
        gym.make(ID, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": 1}, "task 0 only"),
        ({"trial": -1}, "trial must be"),
        ({"trial": 1.5}, "trial must be"),
        ({"object": "carot"}, "did you mean 'carrot'"),
        ({"layout": 3}, "unknown reset option 'layout'.*'object'"),
    ],
)
def test_bad_reset_options_are_refused_by_name(env, options, words):
    with pytest.raises(ValueError, match=words):
        env.reset(seed=0, options=options)


def test_after_close_the_error_says_so():
    env = gym.make(ID, **SMALL)
    env.close(), env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.reset(seed=0)
