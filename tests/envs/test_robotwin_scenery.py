"""Randomized scenes of RoboTwin: what changes, that the task does not, and that a seed decides it all."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from benchmarks.robotwin_experts import episode
from tests.envs.test_robotwin import write_official_release
from vlahub_envs.robotwin import assets, clutter, randomization
from vlahub_envs.robotwin.expert import ScriptedExpert
from vlahub_envs.robotwin.room import TABLE_TOP
from vlahub_envs.robotwin.simulation import RoboTwin


def simulate(task: str = "ClickBell", **options) -> RoboTwin:
    return RoboTwin(task=task, **{"assets": "stand-in", "cameras": ("head", "front"), "camera_size": (24, 32), **options})


@pytest.fixture(scope="module")
def simulation() -> Iterator[RoboTwin]:
    simulation = simulate(randomization="randomized")
    yield simulation
    simulation.close()


def picture(simulation: RoboTwin) -> np.ndarray:
    seen = simulation.observe()
    return np.concatenate([seen["main_images"][None], seen["extra_view_images"]]).astype(int)


def test_a_seed_decides_everything_whatever_was_there_before(simulation):
    first = []
    for seed in (0, 1, 2):
        info = simulation.reset(seed, {})
        first.append((info, simulation.instruction, picture(simulation)))
    for seed in (2, 0, 1):
        info = simulation.reset(seed, {})
        assert (info, simulation.instruction) == first[seed][:2] and np.array_equal(picture(simulation), first[seed][2])
    assert len({info["scene"] for info, _, _ in first}) == 3
    assert np.abs(first[0][2] - first[1][2]).mean() > 10


def test_the_task_is_where_it_is_in_a_clean_scene_on_a_lower_table(simulation):
    clean, heights = simulate(), []
    for seed in range(15):
        info, plain = simulation.reset(seed, {}), clean.reset(seed, {})
        one, other = simulation.task.bell, clean.task.bell
        assert info["stands_for"] == plain["stands_for"] and one.model.id == other.model.id and "scene" not in plain
        lowered = simulation.scene.lowered
        assert np.allclose(one.position - other.position, (0, 0, lowered), atol=1e-6) and -0.03 <= lowered <= 0
        (table,) = (entity for entity in simulation.scene.world.entities if entity.name == "table")
        assert np.isclose(table.pose.p[2], TABLE_TOP - 0.025 + lowered)
        assert np.isclose(simulation.scene.stage.furniture["table"][0].pose.p[2], table.pose.p[2])
        heights.append(lowered)
    assert min(heights) < -0.02 and max(heights) > -0.01
    clean.close()


def test_clutter_lies_still_on_the_table_and_clear_of_the_task():
    simulation, counts = simulate("StackBlocksTwo", randomization={"clutter": True, "plain_rate": 0.0, "table_height": 0.03}), []
    for seed in range(12):
        info = simulation.reset(seed, {})
        things = simulation.scene.things
        strewn = {name: thing for name, thing in things.items() if name.startswith("clutter")}
        assert info["settled"] and info["scene"].count("/base") == len(strewn) <= clutter.MOST
        counts.append(len(strewn))
        spots = [clutter.footprint(thing.model, thing.pose) for name, thing in things.items() if name not in strewn] + list(simulation.task.keep_free)
        for thing in strewn.values():
            x, y, radius = clutter.footprint(thing.model, thing.pose)
            assert abs(x) + radius < 0.62 and abs(y) + radius < 0.37  # it may have moved a little when it came to rest
            assert thing.model.size[1] <= clutter.TALL or y > -0.02
            assert thing.position[2] > TABLE_TOP + simulation.scene.lowered
            assert all(np.hypot(x - a, y - b) > radius + r + clutter.PADDING - 0.02 for a, b, r in spots)
    assert np.mean(counts) > 8
    simulation.close()


def test_what_lies_about_is_never_what_the_task_speaks_of():
    stand_ins = assets.StandIns()
    assert {"114_bottle", "080_pillbottle"} <= clutter.candidates(stand_ins, ["002_bowl"]).keys()
    assert not {"114_bottle", "080_pillbottle", "071_can"} & clutter.candidates(stand_ins, ["001_bottle", "071_can"]).keys()
    assert not {"105_sauce-can"} & clutter.candidates(stand_ins, ["071_can"]).keys()
    for name, models in clutter.candidates(stand_ins, []).items():
        for model_id in models:
            model = clutter.model_of(stand_ins, name, model_id)
            vertices = model.solids[0].mesh()[0]
            size = vertices.max(axis=0) - vertices.min(axis=0)
            assert np.isclose(size[1], model.size[1]) and (size <= model.size + 1e-6).all()


@pytest.mark.parametrize(
    ("how", "changed"),
    [
        ({"lights": True}, 0.9),
        ({"background": True, "plain_rate": 0.0}, 0.7),
        ({"camera_offset": 0.05}, 0.02),
        ({"table_height": 0.03}, 0.01),
        ({"background": True, "clutter": True}, None),  # with the plain_rate of a clean scene: neither
    ],
)
def test_each_part_by_itself_changes_the_pictures(how, changed):
    clean, simulation = simulate(), simulate(randomization=how)
    differ = []
    for seed in range(3):
        clean.reset(seed, {}), simulation.reset(seed, {})
        differ.append((np.abs(picture(simulation) - picture(clean)).max(axis=-1) > 2).mean())
        assert simulation.scene.things.keys() == clean.scene.things.keys()
    assert min(differ) >= changed if changed is not None else max(differ) == 0
    for name in ("head", "front"):
        poses = [world.scene.stage.cameras[name].entity.pose.p for world in (clean, simulation)]
        assert (0 < np.linalg.norm(np.subtract(*poses)) <= 0.05) == ("camera_offset" in how)
    clean.close(), simulation.close()


def test_lights_may_flicker_with_the_clock_and_not_with_the_looks():
    simulation = simulate(randomization={"lights": True, "flicker_rate": 1.0})
    seen = []
    for _ in range(2):
        simulation.reset(5, {})
        first = picture(simulation)
        assert np.array_equal(first, picture(simulation))  # a second look at the same moment
        simulation.render()
        simulation.apply(np.tile(simulation.scene.robot.state, (2, 1)).astype(np.float32))  # 30 physics steps
        later = picture(simulation)
        assert np.abs(later - first).mean() > 2
        seen.append((first, later))
    assert all(np.array_equal(a, b) for a, b in zip(*seen, strict=True))
    lights = [randomization.Flicker(3).at(step) for step in (0, 14, 15, 3000)]
    assert np.array_equal(lights[0].directional, lights[1].directional) and not np.array_equal(lights[1].directional, lights[2].directional)
    assert np.abs(lights[2].ambient - lights[1].ambient).max() <= 0.1 and all(((0 <= one.ambient) & (one.ambient <= 1)).all() for one in lights)
    simulation.close()


def test_pictures_are_drawn_from_two_sets():
    drawn = [randomization.draw_backgrounds(np.random.RandomState(seed), "unseen", 0.3) for seed in range(300)]
    plain = np.mean([number is None for one in drawn for number in one.values()])
    assert 0.22 < plain < 0.38 and max(number for one in drawn for number in one.values() if number is not None) < 1000
    first = randomization.picture("seen", 7, None)
    assert first.shape == (256, 256, 4) and first.std() > 3
    assert not np.array_equal(first, randomization.picture("unseen", 7, None)) and not np.array_equal(first, randomization.picture("seen", 8, None))


def test_the_expert_solves_randomized_scenes_too(simulation):
    expert = ScriptedExpert(simulation)
    assert all(episode(simulation, expert, seed)[0] for seed in range(3))


def test_official_pictures_and_objects_are_used_with_the_official_set(tmp_path, monkeypatch):
    write_official_release(tmp_path)
    options = {"assets": str(tmp_path), "randomization": {"background": True, "plain_rate": 0.0, "clutter": True}}
    with pytest.raises(FileNotFoundError, match=r"lack background_texture/seen.*vlahub assets robotwin-backgrounds --download"):
        simulate(**options)
    folder = tmp_path / "background_texture" / "seen"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.fromarray(np.full((40, 60, 3), (200, 20, 20), np.uint8)).save(folder / f"{number}.png")
    other = tmp_path / "objects" / "071_can"
    (tmp_path / "objects" / "050_bell").rename(other)
    record = json.loads((other / "model_data0.json").read_text())
    (other / "model_data1.json").write_text(json.dumps({**record, "stable": True}))
    write = tmp_path / "again"
    write_official_release(write)
    (write / "objects" / "050_bell").rename(tmp_path / "objects" / "050_bell")
    assert clutter.candidates(assets.Official(tmp_path), ["050_bell"]) == {"071_can": (1,)}
    simulation = simulate(**options)
    with pytest.raises(FileNotFoundError, match=r"lack .*\d+\.png; delete"):
        for seed in range(5):
            simulation.reset(seed, {})
    monkeypatch.setitem(randomization.PICTURES, "seen", 3)
    info = simulation.reset(1, {})
    assert simulation.assets == "official" and "071_can/base1" in info["scene"] and info["settled"]
    front = picture(simulation)[1]
    assert (front[..., 0] > 2 * front[..., 1]).mean() > 0.5  # red walls, red table
    simulation.close()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("random", "must be 'clean' or 'randomized'"),
        (3, "must be 'clean', 'randomized' or a dict"),
        ({"light": True}, "no entry 'light'; did you mean 'lights'"),
        ({"lights": 1}, "lights must be True or False, not 1"),
        ({"flicker_rate": 2}, "flicker_rate must be a rate from 0 to 1, not 2"),
        ({"table_height": 1.0}, "table_height must be metres, from 0 to 0.1"),
        ({"plain_rate": True}, "plain_rate must be a rate"),
    ],
)
def test_bad_randomization_is_refused_by_name(value, words):
    with pytest.raises(ValueError, match=words):
        simulate(randomization=value)
