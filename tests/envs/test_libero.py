import dataclasses
import gc
import importlib
import itertools
import os
import pickle
import re
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Iterator

import gymnasium as gym
import mujoco
import numpy as np
import pytest

import vlahub
from vlahub import catalog
from vlahub_envs.libero import assets, standins, upstream
from vlahub_envs.libero import scene as scenes
from vlahub_envs.libero import simulation as libero_simulation
from vlahub_envs.libero.scene import axis_angle
from vlahub_envs.libero.simulation import PROTOCOLS, Libero
from vlahub_policies.parts import robots

SMALL = {"assets": "stand-in", "camera_size": (48, 64)}
BOWL_ON_STOVE, STOVE_AND_MOKA = 7, 2


@pytest.fixture(scope="module")
def env() -> Iterator[vlahub.Env]:
    env = gym.make("vlahub/LIBERO-Spatial", render_mode="rgb_array", **SMALL)
    yield env
    env.close()


# ------------------------------------------------------------------------------------------------ the env


def test_it_fits_the_published_policies(env):
    assert str(vlahub.check(env, robots.LIBERO)) == "direct"
    seven = dataclasses.replace(robots.LIBERO, state=(*robots.LIBERO.state[:2], dataclasses.replace(robots.LIBERO.state[2], name="gripper", size=1)))
    assert "mean_of_two_fingers" in str(vlahub.check(env, seven))
    bare = gym.make("vlahub/LIBERO-Spatial", wrist=False, **SMALL)
    assert str(vlahub.check(bare, robots.LIBERO)) == "direct" and "wrist_images" not in bare.observation_space.spaces


def test_what_one_sees(env):
    observation, info = env.reset(seed=0, options={"task": BOWL_ON_STOVE, "trial": 3})
    assert observation["main_images"].shape == observation["wrist_images"].shape == (48, 64, 3)
    assert observation["task_descriptions"] == "pick up the black bowl on the stove and place it on the plate"
    assert info["task_name"].startswith("pick_up_the_black_bowl_on_the_stove") and env.assets == "stand-in"
    position, rotation, fingers = np.split(observation["states"], [3, 6])
    assert position == pytest.approx([-0.21, 0, 1.18], abs=0.05)
    assert np.linalg.norm(rotation) == pytest.approx(np.pi, abs=0.15)  # the hand looks down
    assert fingers[0] == pytest.approx(0.039, abs=0.002) and fingers[1] == pytest.approx(-fingers[0], abs=1e-4)
    upright = env.render()
    assert upright.shape == (480, 640, 3)
    small = upright.reshape(48, 10, 64, 10, 3).mean(axis=(1, 3))
    mirrored = np.abs(small[:, ::-1] - observation["main_images"]).mean()
    assert mirrored < 8 < np.abs(small - observation["main_images"]).mean()  # the observation is upright, but left is right


def test_one_closes_the_gripper_and_minus_one_opens_it(env):
    env.reset(seed=0, options={"task": BOWL_ON_STOVE})
    closed = env.step_chunk(np.array([[0] * 6 + [1]] * 15)).observation["states"][6]
    opened = env.step_chunk(np.array([[0] * 6 + [-1]] * 15)).observation["states"][6]
    assert closed < 0.005 < 0.035 < opened


def test_actions_move_the_hand_in_the_world(env):
    for axis in range(3):
        before, _ = env.reset(seed=0, options={"task": BOWL_ON_STOVE, "trial": 0})
        action = np.eye(7)[axis]
        moved = env.step_chunk(np.array([action] * 10)).observation["states"][:3] - before["states"][:3]
        assert np.argmax(moved) == axis and 0.08 < moved[axis] < 0.13  # commanded 0.5 m; the controller lags


def test_solving_the_task_ends_the_episode(env):
    env.reset(seed=0, options={"task": BOWL_ON_STOVE, "trial": 0})
    scene = env.simulation.scene
    place(scene, "akita_black_bowl_1", scene.data.xpos[scene.env.obj_body_id["plate_1"]] + [0, 0, 0.02])
    result = env.step_chunk(np.zeros((30, 7)))
    assert result.info["success"] and result.terminated.sum() == 1 and result.reward.sum() == 1
    assert result.length < 30 and result.terminated[result.length - 1]


def place(scene, name: str, position: np.ndarray) -> None:
    address = scene.model.joint(scene.env.get_object(name).joints[-1]).qposadr[0]
    scene.data.qpos[address : address + 3] = position


def test_a_chunk_looks_once_and_sees_what_every_step_would_see(env):
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 7))
    options = {"task": BOWL_ON_STOVE, "trial": 1}
    env.reset(seed=0, options=options)
    for action in actions:
        watched = env.step(action)[0]
    env.reset(seed=0, options=options)
    drawn, draw = [], env.simulation.scene.painter.draw
    env.simulation.scene.painter.draw = lambda *given: drawn.append(given[2]) or draw(*given)
    try:
        blind = env.step_chunk(actions).observation
    finally:
        del env.simulation.scene.painter.draw
    assert drawn == ["agentview", "robot0_eye_in_hand"]
    assert all(np.array_equal(watched[key], blind[key]) for key in blind)


def test_the_seed_places_fixtures_and_the_trial_objects(env):
    def poses(seed, trial):
        env.reset(seed=seed, options={"task": BOWL_ON_STOVE, "trial": trial})
        scene = env.simulation.scene
        return [scene.data.xpos[scene.env.obj_body_id[name]].copy() for name in ("wooden_cabinet_1", "plate_1")]

    state = np.random.get_state()[1].copy()
    cabinet, plate = poses(0, 0)
    other_cabinet, same_plate = poses(1, 0)
    same_cabinet, other_plate = poses(0, 1)
    assert np.array_equal(cabinet, same_cabinet) and not np.array_equal(cabinet, other_cabinet)
    assert np.abs(plate - same_plate).max() < 1e-3 < np.abs(plate - other_plate).max()
    assert np.array_equal(np.random.get_state()[1], state)  # numpy's global generator is the user's


def test_an_unstable_world_is_an_error(env, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log into the present folder
    env.reset(seed=0, options={"task": BOWL_ON_STOVE})
    env.simulation.scene.data.qvel[:] = np.nan
    with pytest.raises(RuntimeError, match="unstable"):
        env.step(np.zeros(7))
    env.reset(seed=0, options={"task": BOWL_ON_STOVE})
    env.step(np.zeros(7))


def test_tasks_take_turns(monkeypatch):
    """Each has its own buffers; the pictures must come from the right ones. With room for one, the older model goes."""
    monkeypatch.setattr(libero_simulation, "SHELF", shelf := scenes.Shelf())
    simulation, firsts = Libero("Goal", models=2, **SMALL), {}
    for task in (0, 1, 0, 1):
        simulation.reset(0, {"task": task, "trial": task})
        views = simulation.observe()
        first = firsts.setdefault(task, views)
        assert all(np.array_equal(views[key], first[key]) for key in ("main_images", "wrist_images"))
    assert not np.array_equal(firsts[0]["main_images"], firsts[1]["main_images"])
    dropped = weakref.ref(simulation.scene.env)
    shelf.resize(-1)
    simulation.reset(0, {"task": 2})
    assert simulation.scene.task.name == simulation.all_tasks[2].name and not shelf.kept and dropped() is None
    simulation.close()
    with pytest.raises(RuntimeError, match="reset"):
        simulation.observe()


def test_environments_of_a_process_share_what_they_compile(monkeypatch):
    """One at a time uses a scene; what one left does not show in the other's episode."""
    monkeypatch.setattr(libero_simulation, "SHELF", shelf := scenes.Shelf())
    first, second = Libero("Goal", models=2, **SMALL), Libero("Goal", models=1, **SMALL)
    first.reset(0, {"task": 0, "trial": 0})
    view, scene = first.observe(), first.scene
    first.apply(np.ones((5, 7), np.float32))
    first.reset(0, {"task": 1})
    second.reset(0, {"task": 0, "trial": 0})
    assert second.scene is scene and (shelf.room, shelf.used, len(shelf.kept)) == (3, 2, 0)
    assert all(np.array_equal(view[key], value) for key, value in second.observe().items())
    first.reset(0, {"task": 0})
    assert first.scene is not scene, "both episodes run"
    assert (shelf.used, len(shelf.kept)) == (2, 1)
    first.close()
    first.close()
    assert (shelf.room, shelf.used, len(shelf.kept)) == (1, 1, 0)
    del second  # forgotten, not closed
    gc.collect()
    assert (shelf.room, shelf.used, len(shelf.kept)) == (0, 0, 0)


def test_shadow_maps_are_left_out_where_no_light_casts_shadows(env):
    env.reset(seed=0, options={"task": BOWL_ON_STOVE})
    scene, picture = env.simulation.scene, env.render()
    assert scene.painter.context.shadowFBO == 0
    scene.painter.close()
    scene.model.vis.quality.shadowsize, scene.model.light_castshadow[:] = 4096, True
    scene.painter = scenes.Painter(scene.model, scene.size, scene.people_size)
    assert scene.painter.context.shadowFBO != 0
    assert not np.array_equal(env.render(), picture)  # so the map does something where it is asked for
    scene.model.light_castshadow[:] = False
    assert np.array_equal(env.render(), picture)


@pytest.mark.slow
def test_states_and_pictures_equal_the_stock_environments():
    """Whatever went before: soft reset, no settle pictures, half the forward passes and late drawing change no bit. The stove's burner glows on the way."""
    simulation = Libero("10", assets="stand-in", camera_size=(64, 64), protocol="openvla")
    simulation.reset(1, {"task": STOVE_AND_MOKA})
    simulation.apply(np.ones((3, 7), np.float32))
    simulation.reset(11, {"task": STOVE_AND_MOKA, "trial": 3})

    from libero.libero.envs import OffScreenRenderEnv

    task = upstream.tasks("10")[STOVE_AND_MOKA]
    stock = OffScreenRenderEnv(bddl_file_name=str(task.bddl), camera_heights=64, camera_widths=64)
    # each hard reset adds a second draw of the same joint; one set is what a first reset would make
    stock.env.object_property_initializers.clear()
    stock.seed(11)
    stock.reset()
    seen = stock.set_init_state(upstream.initial_states(task.init)[3])
    for _ in range(10):
        seen = stock.step([0.0] * 6 + [-1.0])[0]
    actions = np.random.default_rng(0).uniform(-1, 1, (24, 7)).astype(np.float32)
    actions[:, 2] = -np.abs(actions[:, 2])  # down, into contact
    try:
        for chunk in (actions[:0], actions[:8], actions[8:16], actions[16:]):
            if len(chunk):
                for world in (simulation.scene.data, stock.sim.data):
                    world.qpos[-1] = 1.0  # the knob
            simulation.apply(chunk)
            stock.sim._render_context_offscreen.gl_ctx.make_current()  # robosuite draws into whatever context is current
            for action in chunk:
                seen = stock.step(action.astype(np.float64))[0]
            ours = simulation.observe()
            assert np.array_equal(simulation.scene.data.qpos, stock.sim.data.qpos) and np.array_equal(simulation.scene.data.qvel, stock.sim.data.qvel)
            assert np.array_equal(ours["main_images"], seen["agentview_image"][::-1, ::-1])
            assert np.array_equal(ours["wrist_images"], seen["robot0_eye_in_hand_image"][::-1, ::-1])
            assert np.array_equal(simulation.scene.state[:3], seen["robot0_eef_pos"]) and np.array_equal(
                simulation.scene.state[6:], seen["robot0_gripper_qpos"]
            )
    finally:
        # robosuite frees its OpenGL objects when they are collected, in whatever context is current: it must be its own
        stock.sim._render_context_offscreen.gl_ctx.make_current()
        stock.close()
        gc.collect()
        simulation.close()


# ------------------------------------------------------------------------------------------------ tasks and protocols


def test_tasks_are_the_published_ones():
    assert [len(upstream.tasks(suite)) for suite in ("Spatial", "Object", "Goal", "10", "90", "130")] == [10, 10, 10, 10, 90, 130]
    assert upstream.tasks("130")[30] == upstream.tasks("90")[0] and upstream.tasks("130")[-1] == upstream.tasks("10")[9]
    assert upstream.tasks("10")[2].language == "turn on the stove and put the moka pot on it"
    assert upstream.tasks("90")[0].language == "close the top drawer of the cabinet"  # of KITCHEN_SCENE10
    assert upstream.tasks("Goal")[6].language == "put the cream cheese in the bowl"
    for task in upstream.tasks("130"):
        states = upstream.initial_states(task.init)
        assert states.shape[0] == upstream.TRIALS and task.bddl.exists(), task.name
        assert not states[:, 0].any() and np.isfinite(states).all()


def test_a_suite_can_be_cut_down_to_one_task():
    simulation = Libero("90", task=17, **SMALL)
    assert simulation.tasks == 1 and simulation.all_tasks == upstream.tasks("90")[17:18]
    with pytest.raises(ValueError, match="task 1 is out of range; valid are 0 to 0"):
        simulation.reset(0, {"task": 1})
    for suite, count in (("Goal", 10), ("90", 90), ("130", 130)):
        with pytest.raises(ValueError, match=f"task {count} is out of range; valid are 0 to {count - 1}"):
            Libero(suite, task=count, **SMALL)


def test_initial_states_run_no_code(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.init", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(os.getcwd))
    with pytest.raises(pickle.UnpicklingError, match="getcwd"):
        upstream.initial_states(tmp_path / "bad.init")


def test_protocols():
    limits = {name: [protocol.max_steps[suite] for suite in ("Spatial", "Object", "Goal", "10", "90")] for name, protocol in PROTOCOLS.items()}
    assert limits["openvla"] == limits["openpi"] == [220, 280, 300, 520, 400]
    assert limits["lerobot"] == [280, 280, 300, 520, 400] and limits["rlinf"] == [240, 240, 320, 512, 512]
    assert all(catalog.env_card(f"vlahub/LIBERO-{suite}").protocols == tuple(PROTOCOLS) for suite in upstream.SUITES)
    assert (PROTOCOLS["openvla"].settle, PROTOCOLS["rlinf"].settle) == (10, 15)
    assert Libero("Goal", protocol="rlinf", **SMALL).max_steps == 320


def test_rotation_vectors_keep_their_sign():
    half = np.sqrt(0.5)
    assert axis_angle(np.array([half, half, 0, 0])) == pytest.approx([np.pi / 2, 0, 0])
    assert axis_angle(np.array([-half, half, 0, 0])) == pytest.approx([3 * np.pi / 2, 0, 0])
    assert not axis_angle(np.array([1.0, 0, 0, 0])).any()


# ------------------------------------------------------------------------------------------------ assets


def test_everything_that_a_task_names_has_a_stand_in():
    tables = {"table", "floor", "kitchen_table", "living_room_table", "study_table"}
    for task in upstream.tasks("130"):
        text = task.bddl.read_text()
        named = set(re.findall(r"- (\w+)", "".join(re.findall(r"\(:(?:fixtures|objects)(.*?)\)", text, re.DOTALL))))
        assert named - tables <= standins.THINGS.keys(), task.name


@pytest.mark.parametrize("name", standins.THINGS)
def test_stand_ins_have_the_official_bounding_box(name):
    thing = standins.THINGS[name]
    model = mujoco.MjModel.from_xml_string(standins.thing_xml(name))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    corners = []
    for geom in np.flatnonzero(model.geom_group == 0):
        assert model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_BOX
        signs = np.array(list(itertools.product((-1, 1), repeat=3)))
        corners.append(data.geom_xpos[geom] + signs * model.geom_size[geom] @ data.geom_xmat[geom].reshape(3, 3).T)
    corners = np.concatenate(corners)
    # cylinders collide as octagons, whose corners reach 8 % beyond the circle, but no face does
    assert corners.min(axis=0) == pytest.approx(thing.low, abs=0.008) and corners.max(axis=0) == pytest.approx(thing.high, abs=0.008)
    if thing.mass:
        assert model.body_mass.sum() == pytest.approx(thing.mass, rel=1e-4)


def test_a_start_with_a_packet_beside_the_bowls_foot_settles():
    scene = scenes.Scene(upstream.tasks("90")[0], assets.find("stand-in")[1], (32, 32), (32, 32))
    scene.reset(seed=14, trial=14, settle=0, settle_grip=-1.0)
    bodies = [scene.env.obj_body_id[name] for name in ("akita_black_bowl_1", "chocolate_pudding_1")]
    start = scene.data.xpos[bodies].copy()
    for _ in range(20):
        scene.step(np.array([0.0] * 6 + [-1.0]))
    assert np.abs(scene.data.xpos[bodies] - start).max() < 0.12  # a foot as wide as it shows throws both off the table


def test_the_official_release_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("VLAHUB_ASSETS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert assets.find("auto")[0] == "stand-in"
    with pytest.raises(FileNotFoundError, match=r"not complete.*vlahub assets libero --download"):
        assets.find("official")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        assets.find(tmp_path / "nowhere")
    for path, content in standins.files().items():  # a tree of the same names passes for the release
        (tmp_path / "libero" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "libero" / path).write_bytes(content)
    assert assets.find("auto") == ("official", tmp_path / "libero")
    (tmp_path / "libero/textures/yellow_linen_wall_texture.png").unlink()  # named by no XML file, but by a task's style
    with pytest.raises(FileNotFoundError, match=r"lacks textures/yellow_linen_wall_texture\.png"):
        assets.find("official")
    (tmp_path / "libero/stable_scanned_objects/plate/plate.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks stable_scanned_objects/plate/plate\.xml"):
        assets.find("official")
    assert assets.find("auto")[0] == "stand-in"


def test_spoilt_stand_ins_are_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(assets.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = assets.write_standins.__wrapped__()
    assert folder.parent == tmp_path and assets.write_standins.__wrapped__() == folder
    (folder / "scenes/libero_floor_base_style.xml").write_text("<mujoco/>")
    with pytest.raises(FileExistsError, match="delete it"):
        assets.write_standins.__wrapped__()


# ------------------------------------------------------------------------------------------------ bad input, and what must not happen


@pytest.mark.parametrize(
    "options, words",
    [
        ({"protocol": "openval"}, "protocol must be one of .*'openvla'"),
        ({"camera_size": 256}, "camera_size must be"),
        ({"camera_size": (0, 64)}, "camera_size must be"),
        ({"models": 0}, "models must be"),
    ],
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        gym.make("vlahub/LIBERO-Spatial", **options)


def test_bad_tasks_and_trials_are_named(env):
    for options, error, words in (
        ({"task": 10}, ValueError, "task 10 is out of range; valid are 0 to 9\n    0 pick_up_the_black_bowl_between_the_plate"),
        ({"trial": 50}, ValueError, "trial 50 is out of range; valid are 0 to 49$"),
        (
            {"task": "turn the stove on"},
            TypeError,
            r"task must be a whole number, not 'turn the stove on'; valid are 0 to 9\n(.*\n)+    7 pick_up_.*on_the_stove",
        ),
        ({"task": True}, TypeError, "task must be a whole number, not True"),
        ({"trial": 1.0}, TypeError, "trial must be a whole number, not 1.0; valid are 0 to 49"),
    ):
        with pytest.raises(error, match=words):
            env.reset(seed=0, options=options)
    with pytest.raises(TypeError, match="valid are 0 to 89\n(.*\n)*    35 KITCHEN_SCENE7_open_the_microwave"):
        gym.make("vlahub/LIBERO-90", task="KITCHEN_SCENE7 open microwave")


def test_no_gl_says_what_to_install(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(RuntimeError, match="'egl' or 'osmesa'"):
        upstream.choose_gl()
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(upstream.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(RuntimeError, match=r"no OpenGL library for egl or osmesa.*libegl1"):
        upstream.choose_gl()


def test_a_context_that_cannot_be_made_names_its_backend(monkeypatch):
    module = importlib.import_module(f"mujoco.{upstream.choose_gl()}")

    def refuse(width, height):
        raise RuntimeError("no driver")

    monkeypatch.setattr(module, "GLContext", refuse)
    with pytest.raises(RuntimeError, match=rf"{upstream.choose_gl()} was tried \(RuntimeError: no driver\).*MUJOCO_GL=.*apt-get install"):
        scenes._gl_context.__wrapped__(0)


def test_a_lost_context_is_an_error_and_the_end_of_a_worker(env, monkeypatch):
    env.reset(seed=0, options={"task": BOWL_ON_STOVE})
    painter, left = env.simulation.scene.painter, []
    monkeypatch.setattr(scenes.mujoco, "mjr_getError", lambda: 0x507)
    with pytest.raises(RuntimeError, match="lost its OpenGL context.*0x507"):
        env.render()
    monkeypatch.undo()

    class Lost:
        def make_current(self):
            raise RuntimeError("Failed to make the EGL context current.")

    monkeypatch.setattr(painter, "gl", Lost())
    with pytest.raises(RuntimeError, match="lost its OpenGL context.*Failed to make"):
        env.render()
    monkeypatch.setattr(scenes.worker, "serving", True)
    monkeypatch.setattr(scenes.os, "_exit", left.append)
    with pytest.raises(RuntimeError):  # where os._exit comes back
        env.render()
    assert left == [1]
    monkeypatch.undo()
    assert env.render().std() > 0


def test_making_one_is_silent_and_needs_no_home():
    """`import libero` asks questions on stdin and writes to the home, robosuite warns and logs, torch is not needed at all."""
    code = (
        "import sys, gymnasium as gym, vlahub\n"
        "env = gym.make('vlahub/LIBERO-Goal', assets='stand-in', camera_size=(32, 32))\n"
        "env.reset(seed=0)\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "HOME": "/nonexistent"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
