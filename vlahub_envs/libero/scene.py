"""One LIBERO task, compiled: start an episode, run control steps, remember what the cameras see, and draw it when asked."""

from __future__ import annotations

import atexit
import ctypes
import gc
import itertools
import os
import sys
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import mujoco
import numpy as np

from vlahub import worker
from vlahub_envs.libero import upstream
from vlahub_envs.libero.upstream import LiberoTask

CAMERAS = {"agentview": "agentview", "eye_in_hand": "robot0_eye_in_hand"}  # our name -> the model's
# all of MjData that drawing reads
SEEN = ("xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat", "light_xpos", "light_xdir")
# Bytes of prepared meshes and textures that MuJoCo may keep for the next compilation. The robot takes 79 MB; every task needs it, and to prepare it takes 0.6 s.
MESHES = 100 * 2**20
HIDDEN = 5  # a group of geoms that is not drawn
MAX_PLACEMENTS = 100  # rejection sampling of start poses fails once in a while; so often only if a region is too small


class Scene:
    """The stock environment of one task, without its renderer and observables, which this class replaces."""

    def __init__(self, task: LiberoTask, assets: Path, size: tuple[int, int], people_size: tuple[int, int]):
        libero = upstream.load()
        from libero.libero.envs import bddl_utils

        from vlahub_envs.libero.control import Controller  # imports robosuite, which must be prepared first

        libero.libero._assets_path_cache = str(assets)  # where libero looks first
        domain = libero.domains[bddl_utils.get_problem_info(str(task.bddl))["problem_name"]]
        mujoco.mj_setCacheCapacity(mujoco.mj_getCache(), MESHES)
        with _own_randomness(0):  # construction places objects once
            self.env = domain(
                str(task.bddl),
                robots=["Panda"],
                controller_configs=libero.robosuite.load_controller_config(default_controller="OSC_POSE"),
                gripper_types="default",
                initialization_noise=None,
                use_camera_obs=False,
                has_offscreen_renderer=False,
                hard_reset=False,
            )
        _free_what_compiling_left()
        self.task, self.size, self.people_size = task, size, people_size
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        self.states = upstream.initial_states(task.init)
        width = 1 + self.model.nq + self.model.nv
        if self.states.shape[1] != width:
            raise RuntimeError(f"{task.name}: an initial state has {self.states.shape[1]} numbers, but the model of these assets needs {width}")
        self.compiled = {name: getattr(self.model, name).copy() for name in ("body_pos", "body_quat", "site_rgba")}
        self.controller = Controller(self.env)
        robot = self.env.robots[0]
        self.hand = self.model.body(robot.robot_model.eef_name).id
        self.fingers = robot._ref_gripper_joint_pos_indexes
        self.shown = mujoco.MjData(self.model)  # the world as last sampled
        self.pairs = [(getattr(self.shown, name), getattr(self.data, name)) for name in SEEN]
        self.burner = self.model.site_rgba.copy()
        self.state = np.zeros(8, np.float32)
        self.painter: Painter | None = None

    def reset(self, seed: int, trial: int, settle: int, settle_grip: float) -> None:
        """Initial state `trial`; the seed places what is not part of it, the fixtures. Then `settle` steps that nobody sees.

        The same as a stock environment that is freshly built, seeded, reset and set to the state, without building it.
        """
        from robosuite.utils.errors import RandomizationError

        from vlahub_envs.libero.control import SampleClock

        env = self.env
        with _own_randomness(seed):
            for _ in range(MAX_PLACEMENTS):
                # objects are placed relative to regions of fixtures, which robosuite expects where the model was compiled
                for name, values in self.compiled.items():
                    getattr(self.model, name)[:] = values
                mujoco.mj_resetData(self.model, self.data)
                env.robots[0].gripper.current_action = np.zeros(env.robots[0].gripper.dof)  # else the last episode's grip would linger
                try:
                    env._reset_internal()
                    break
                except RandomizationError:
                    continue
            else:
                raise RuntimeError(f"{self.task.name}: no free place for its objects was found in {MAX_PLACEMENTS} attempts")
        mujoco.mj_forward(self.model, self.data)
        env.visualize(vis_settings={name: False for name in env._visualizations})
        self.controller.reset()
        row = self.states[trial]
        self.data.time, self.data.qpos[:], self.data.qvel[:] = row[0], row[1 : 1 + self.model.nq], row[1 + self.model.nq :]
        mujoco.mj_forward(self.model, self.data)
        env._check_success()
        env._post_process()
        self.clock = SampleClock()
        self._sample()
        pause = np.array([0.0] * 6 + [settle_grip])
        for _ in range(settle):
            self.step(pause)

    def step(self, action: np.ndarray) -> bool:
        """One control step. -> is the task solved?"""
        self.controller.step(action, self.clock.step(), self._sample)
        solved = bool(self.env._check_success())
        self.env._post_process()
        return solved

    def _sample(self) -> None:
        """Keep what robosuite's observables would read at this moment; pictures are drawn from it later, if at all."""
        for kept, present in self.pairs:
            kept[:] = present
        self.burner[:] = self.model.site_rgba
        self.state = np.concatenate([self.data.site_xpos[self.controller.site], axis_angle(self.data.xquat[self.hand]), self.data.qpos[self.fingers]])

    def picture(self, camera: str, size: tuple[int, int]) -> np.ndarray:
        """[H, W, 3] uint8 as OpenGL has it: the bottom row first."""
        if self.painter is None:
            self.painter = Painter(self.model, self.size, self.people_size)
        return self.painter.draw(self.shown, self.burner, CAMERAS[camera], size)

    def close(self) -> None:
        if self.painter is not None:
            self.painter.close()
            self.painter = None


class Shelf:
    """The compiled tasks of this process that no episode uses. Environments take one for an episode and put it back, so those of one worker share what they
    compile: 128 environments that each compile ten tasks for themselves would spend minutes on it, and gigabytes of the GPU."""

    def __init__(self):
        self.room = 0  # scenes that may exist, in use or not: what all open environments of this process ask for
        self.used = 0
        self.kept: list[tuple[Hashable, Scene]] = []  # the one that was used last at the end

    def take(self, key: Hashable, build: Callable[[], Scene]) -> Scene:
        """A kept scene of that key, or else a new one; the one that lay longest makes room for it."""
        for index in reversed(range(len(self.kept))):
            if self.kept[index][0] == key:
                self.used += 1
                return self.kept.pop(index)[1]
        self._drop(self.room - 1)
        scene = build()
        self.used += 1
        return scene

    def put(self, key: Hashable, scene: Scene) -> None:
        self.used -= 1
        self.kept.append((key, scene))

    def resize(self, change: int) -> None:
        """An environment that keeps `change` scenes opens; with a negative number it closes."""
        self.room += change
        self._drop(self.room)

    def _drop(self, most: int) -> None:
        count = min(len(self.kept), self.used + len(self.kept) - most)
        if count > 0:
            for _ in range(count):
                self.kept.pop(0)[1].close()
            gc.collect()  # robosuite's objects refer to each other in circles


def _free_what_compiling_left() -> None:
    """The heap that compiling needed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def axis_angle(wxyz: np.ndarray) -> np.ndarray:
    """Rotation vector [3] of a quaternion, as the published policies' training data have it: angles from 0 to 2 pi, no choice of sign."""
    w = min(max(wxyz[0], -1.0), 1.0)
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return wxyz[1:] * (2.0 * np.arccos(w) / sine)


class _own_randomness:
    """robosuite draws from numpy's global generator: seed it inside, and give it back as it was."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        self.before = np.random.get_state()
        np.random.seed(self.seed)

    def __exit__(self, *_: Any) -> None:
        np.random.set_state(self.before)


# ------------------------------------------------------------------------------------------------ drawing


@cache
def _gl_context(process: int) -> Any:
    """One OpenGL context for each process: a context does not survive a fork, and different models can share it."""
    backend = upstream.choose_gl()
    if worker.serving:  # Mesa's software drivers start a thread for each core; workers share the cores already
        os.environ.setdefault("LP_NUM_THREADS", "0")
    from OpenGL.error import Error as GLError

    try:
        if backend == "egl":
            from mujoco.egl import GLContext
        else:
            from mujoco.osmesa import GLContext
        context = GLContext(640, 480)
    except (ImportError, AttributeError, RuntimeError, GLError) as error:
        other = "osmesa" if backend == "egl" else "egl"
        raise RuntimeError(
            f"no OpenGL context: {backend} was tried ({type(error).__name__}: {error}). Set MUJOCO_GL={other} before the program starts, or install Mesa "
            "(Debian, Ubuntu: apt-get install libegl1 libgl1 libosmesa6; tools/system_packages.sh does it). `vlahub doctor` says which of them work"
        ) from error
    atexit.register(context.free)  # later, while the interpreter ends, EGL is gone already and complains
    return context


def _give_up(reason: str) -> NoReturn:
    """The OpenGL context is lost (a GPU that was reset, a driver that was replaced), and with it every picture of this process.

    A worker ends: the vector env then starts another one, with a fresh context, and the episode counts as aborted."""
    words = f"this process has lost its OpenGL context and cannot draw any more ({reason}); the driver's log (dmesg) may say why. Start the program again"
    if worker.serving:
        print(f"vlahub: {words}", file=sys.stderr, flush=True)
        os._exit(1)
    raise RuntimeError(words)


class Painter:
    """What OpenGL holds of one model, set up as robosuite does: visual geoms only, a buffer of at least 640 x 480, at most 1000 geoms."""

    def __init__(self, model: mujoco.MjModel, *sizes: tuple[int, int]):
        self.model = model
        model.vis.global_.offwidth = max(640, *(width for _, width in sizes))
        model.vis.global_.offheight = max(480, *(height for height, _ in sizes))
        if not model.light_castshadow.any():  # as in robosuite's arenas: a map of 4096 x 4096 that nothing looks at would take 64 MB of the GPU for each model
            model.vis.quality.shadowsize = 0
        self.gl = _gl_context(os.getpid())
        self.gl.make_current()
        self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        if self.context.currentBuffer != mujoco.mjtFramebuffer.mjFB_OFFSCREEN:
            raise RuntimeError("OpenGL offers no off-screen buffer; try MUJOCO_GL=osmesa")
        self.scene = mujoco.MjvScene(model, maxgeom=1000)
        self.options, self.pull, self.camera = mujoco.MjvOption(), mujoco.MjvPerturb(), mujoco.MjvCamera()
        self.options.geomgroup[0], self.options.geomgroup[1] = 0, 1
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        # what can be left out where the camera does not look, which is all but planes, and the corners of its boxes [G, 8, 3], 1 mm larger for rounding
        self.limited = np.flatnonzero((model.geom_group == 1) & (model.geom_rbound > 0))
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=3)))
        boxes = model.geom_aabb[self.limited]
        self.corners = boxes[:, None, :3] + signs * (boxes[:, None, 3:] + 0.001)

    def draw(self, data: mujoco.MjData, site_rgba: np.ndarray, camera: str, size: tuple[int, int]) -> np.ndarray:
        from OpenGL.error import Error as GLError

        try:
            image = self._draw(data, site_rgba, camera, size)
            wrong = f"OpenGL error {code:#x}" if (code := mujoco.mjr_getError()) else ""
        except (RuntimeError, GLError) as error:  # of making the context current
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            _give_up(wrong)
        return image

    def _draw(self, data: mujoco.MjData, site_rgba: np.ndarray, camera: str, size: tuple[int, int]) -> np.ndarray:
        height, width = size
        self.gl.make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)  # another model's buffer may be bound
        self.camera.fixedcamid = number = self.model.camera(camera).id
        present, unseen = self.model.site_rgba.copy(), self._unseen(data, number, width / height)
        self.model.site_rgba[:], self.model.geom_group[unseen] = site_rgba, HIDDEN
        mujoco.mjv_updateScene(self.model, data, self.options, self.pull, self.camera, mujoco.mjtCatBit.mjCAT_ALL, self.scene)
        self.model.site_rgba[:], self.model.geom_group[unseen] = present, 1
        viewport = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(viewport, self.scene, self.context)
        image = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, viewport, self.context)
        return image

    def _unseen(self, data: mujoco.MjData, camera: int, aspect: float) -> np.ndarray:
        """The geoms that lie outside of the camera's pyramid, all of one's corners beyond one of its sides. OpenGL would clip them, after working on each vertex."""
        world = data.geom_xpos[self.limited, None] + self.corners @ data.geom_xmat[self.limited].reshape(-1, 3, 3).swapaxes(1, 2)  # [G, 8, 3]
        x, y, z = np.moveaxis((world - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3), 2, 0)  # right, up, towards the viewer
        up = np.tan(np.deg2rad(self.model.cam_fovy[camera]) / 2)
        sides = (x > -z * up * aspect, x < z * up * aspect, y > -z * up, y < z * up, z > 0)
        return self.limited[np.any([side.all(axis=1) for side in sides], axis=0)]

    def close(self) -> None:
        self.gl.make_current()
        self.context.free()
