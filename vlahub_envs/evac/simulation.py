"""Imagined worlds. `Evac` is one of them under the Simulation protocol; `Imagination` runs any number of them as one batch.

An imagined world is its history: the latents of every frame so far, of which the model is shown four, and the pose that the action converter has reached.
A chunk of actions becomes poses, poses become action rows and maps, the model imagines the frames, the classifier judges each of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlahub import catalog
from vlahub.env import Episode
from vlahub.interface import Camera, Field, Interface
from vlahub.observation import Observation
from vlahub.simulation import Outcomes, Simulation, check_options
from vlahub_envs.evac import OWN_WEIGHTS, SUITES, Suite, checkpoint, conditioning, start_states
from vlahub_envs.evac.acceleration import Acceleration
from vlahub_envs.evac.model import WorldModel, WorldModelConfig, memory_rows
from vlahub_envs.evac.schedule import Solver
from vlahub_envs.evac.start_states import StartState, StartStates

KEPT_STARTS = 256  # start states of a simulator that are remembered
MAPS = 256  # trajectory maps that are drawn at once; more would only take memory
FINGER = 0.04  # m, position of each finger of LIBERO's gripper when fully open
OPTIONS = {
    "task": "number of the task",
    "trial": "number of the start state within the task",
    "image": "first frame by hand, uint8 [H, W, 3]",
    "pose": "end-effector pose in it, [8]",
    "text": "instruction",
}


def interface_of(config: WorldModelConfig) -> Interface:
    """LIBERO's interface, so that one policy runs in the simulator and in its imagination."""
    return Interface(
        main=Camera("agentview", config.height, config.width, turned=180),
        state=(
            Field("position", 3, "m", frame="world", low=-3, high=3),
            Field("rotation", 3, "rad", rotation="axis_angle", frame="world", low=-6.3, high=6.3),
            Field("fingers", 2, "m", low=-0.1, high=0.1),
        ),
        action=(
            Field("position", 3, "1", reference="delta", frame="world", low=-1, high=1),
            Field("rotation", 3, "1", reference="delta", rotation="axis_angle", frame="world", low=-1, high=1),
            Field("gripper", 1, "1", low=-1, high=1, open=-1, closed=1),
        ),
        control_hz=20,
    )


def state_of(pose: np.ndarray, config: WorldModelConfig) -> np.ndarray:
    """Pose [8] (xyz, quaternion xyzw, gripper) -> LIBERO's state [8]: xyz, axis-angle (angle in [0, 2 pi], as LIBERO computes it), two finger positions."""
    xyz, quaternion, gripper = pose[:3].astype(np.float64), pose[3:7].astype(np.float64), float(pose[7])
    quaternion = quaternion / np.linalg.norm(quaternion)
    sine = np.sqrt(max(1 - quaternion[3] ** 2, 0.0))
    turn = np.zeros(3) if sine < 1e-8 else quaternion[:3] / sine * 2 * np.arccos(np.clip(quaternion[3], -1, 1))
    opening = np.clip((gripper - config.gripper_closed) / (config.gripper_open - config.gripper_closed), 0, 1)
    return np.concatenate([xyz, turn, [FINGER * opening, -FINGER * opening]]).astype(np.float32)


def to_uint8(image: torch.Tensor) -> torch.Tensor:
    """Images of about [-1, 1] -> uint8, truncated as the published environment does."""
    return ((image + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)


def upright(frame: np.ndarray) -> np.ndarray:
    """LIBERO's pictures are mirrored left to right (they are upside-down renderings turned by 180 degrees); people want to see left on the left."""
    return frame[:, ::-1].copy()


def pose_of(state: np.ndarray, config: WorldModelConfig) -> np.ndarray:
    """The inverse of `state_of`: LIBERO's state [8] -> pose [8]."""
    angle = float(np.linalg.norm(state[3:6]))
    axis = state[3:6] / angle if angle > 0 else np.zeros(3)
    opening = (state[6] - state[7]) / 2 / FINGER
    gripper = config.gripper_closed + opening * (config.gripper_open - config.gripper_closed)
    return np.concatenate([state[:3], np.sin(angle / 2) * axis, [np.cos(angle / 2), gripper]]).astype(np.float32)


def check_states(simulation: Simulation, config: WorldModelConfig) -> None:
    if [(field.name, field.size) for field in simulation.interface.state] != [(field.name, field.size) for field in interface_of(config).state]:
        raise ValueError(f"start states need LIBERO's state (position, rotation, fingers), not {', '.join(f.name for f in simulation.interface.state)}")


def start_of(simulation: Simulation, config: WorldModelConfig, seed: int, options: Mapping[str, Any]) -> StartState:
    """How an episode of a simulation with this interface begins."""
    info, seen = simulation.reset(seed, options), simulation.observe()
    start = StartState(np.array(seen["main_images"]), pose_of(seen["states"], config), seen["task_descriptions"], info["task"], info["trial"])
    start.check(config.height, config.width)
    return start


def starts_of(simulation: Simulation, config: WorldModelConfig, trials: int, seed: int = 0) -> StartStates:
    """The initial states of a simulation with this interface (LIBERO's), as start states: `trials` of every task."""
    check_states(simulation, config)
    return StartStates([start_of(simulation, config, seed, {"task": task, "trial": trial}) for task in range(simulation.tasks) for trial in range(trials)])


def draw_maps(poses: np.ndarray, config: WorldModelConfig, device: torch.device | str = "cpu") -> torch.Tensor:
    """Poses [n, 8] -> trajectory maps [n, H, W, 3] uint8 in the model's own camera. The one arm stands in both halves of a pose row."""
    to_world = conditioning.pose_matrix(config.camera_position, config.camera_quaternion_wxyz)
    camera = np.array(config.intrinsic), to_world, (config.height, config.width), config.variant, config.map_radius, config.map_thickness
    doubled = np.concatenate([poses, poses], axis=-1)
    return torch.cat([conditioning.trajectory_maps(part, *camera, device=device) for part in np.array_split(doubled, -(-len(doubled) // MAPS))])


class SimulatedStarts:
    """The initial states of a simulator with this interface (LIBERO's), computed when they are asked for: the same seed, task and trial start the same episode there
    and here."""

    def __init__(self, env_id: str, config: WorldModelConfig):
        self.simulation = catalog.make_simulation(env_id, camera_size=(config.height, config.width), wrist=False)
        self.config, self.tasks, self.trials = config, self.simulation.tasks, self.simulation.trials
        check_states(self.simulation, config)
        self.choose = lru_cache(KEPT_STARTS)(self._choose)  # equal starts are one object, and are encoded once

    def _choose(self, seed: int, task: int | None = None, trial: int | None = None) -> StartState:
        chosen = {name: value for name, value in (("task", task), ("trial", trial)) if value is not None}
        return start_of(self.simulation, self.config, seed, chosen)


class Imagination:
    """The model and how it is sampled; shared by all worlds of a batch.

    Args:
        model: a WorldModel with classifier and converter, or what WorldModel.from_pretrained takes; by default the bundled weights of the suite.
        starts: a collection of start states, the path of one, or the id of the simulator whose initial states they are ("vlahub/LIBERO-Spatial"). By default the file
            that lies beside the weights, else the suite's simulator. Without any, every reset needs a start by hand.
        suite: which weights of a repository that holds several; the registered ids set it.
        device, dtype: where and in what the model runs, if it is loaded here; "auto" is a GPU if there is one.
        denoising_steps, solver, eta: network calls per chunk, "ddim" or "dpm", and how much fresh noise every call adds (the published environment: 50, "ddim", 1);
            what the model's config says where they are None.
        clean_end: see Schedule.steps. By default on below 50 steps, where the published ending visibly fades the picture.
        threshold: probability from which a frame counts as a success.
        max_batch: worlds that are imagined at once; larger batches are split. None: all.
        acceleration: on a GPU, "graph" replays the network as CUDA graphs, "compile" compiles it as well, which takes minutes at the first chunk.
    """

    stops = True  # do worlds stop at success and at the time limit? (quirks.py: no)

    def __init__(
        self,
        model: WorldModel | str | Path | None = None,
        starts: StartStates | SimulatedStarts | str | Path | None = None,
        *,
        suite: str = "",
        device: torch.device | str = "auto",
        dtype: torch.dtype | str | None = None,
        denoising_steps: int | None = None,
        solver: Solver | None = None,
        eta: float | None = None,
        clean_end: bool | None = None,
        threshold: float = 0.5,
        max_batch: int | None = None,
        acceleration: Acceleration = "off",
    ):
        known = SUITES.get(suite, Suite(""))
        model = model or known.weights
        if not model:
            raise ValueError(f"an imagined environment needs a world model{f' of {suite}, and none ships' if suite else ''}: give {OWN_WEIGHTS}")
        if not isinstance(model, WorldModel):
            path = checkpoint.find(model)
            beside = path / start_states.FILE
            starts = beside if starts is None and beside.exists() else starts
            if isinstance(dtype, str):  # from a command line
                dtype = getattr(torch, dtype, None)
            if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"dtype must be 'float32', 'bfloat16' or 'float16', not {dtype!r}")
            device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
            model = checkpoint.load(path, suite=suite, device=device, dtype=dtype)
        self.model, self.config = model, model.config
        config = self.config
        for part, what in ((self.model.reward_model, "success classifier"), (self.model.action_predictor, "action converter")):
            if part is None:
                raise ValueError(f"this world model has no {what}, which an environment needs; load weights that have one (the AgiBot release has neither)")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, not {threshold!r}")
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, not {max_batch!r}")
        self.starts = self._starts(known.simulator or None if starts is None else starts)
        calls = config.denoising_steps if denoising_steps is None else denoising_steps
        solver = solver or config.solver
        eta = (config.eta if solver == config.solver else 0.0) if eta is None else eta
        self.steps = self.model.schedule.steps(calls, eta, calls < 50 if clean_end is None else clean_end, solver)
        self.threshold, self.max_batch = threshold, max_batch
        self.acceleration = acceleration
        self.model.accelerate(acceleration)
        self.rays = self.model.camera_rays()

    def _starts(self, given: StartStates | SimulatedStarts | str | Path | None) -> StartStates | SimulatedStarts | None:
        if isinstance(given, str) and given in catalog.ENVS:
            return SimulatedStarts(given, self.config)
        found = start_states.read(given) if isinstance(given, (str, Path)) else given
        for state in found if isinstance(found, StartStates) else ():
            state.check(self.config.height, self.config.width)
        return found

    @torch.no_grad()
    def advance(self, worlds: Sequence[Evac], actions: Sequence[np.ndarray]) -> None:
        """Run a chunk in each world. Afterwards each holds the frame and the pose at its last step, and its Outcomes.

        actions: per world [n, D]. More actions than the model's chunk take several calls, in which worlds that are done no longer take part; of fewer
        actions, the rest of the chunk is imagined with the arm at rest and thrown away.
        """
        c = self.config.chunk
        for world in worlds:
            world.outcomes = None
        for begin in range(0, max(map(len, actions)), c):
            live = [(world, given[begin : begin + c]) for world, given in zip(worlds, actions, strict=True) if len(given) > begin and not world.over()]
            size = self.max_batch or max(len(live), 1)
            for i in range(0, len(live), size):
                self._chunk([world for world, _ in live[i : i + size]], [given for _, given in live[i : i + size]])

    def _chunk(self, worlds: list[Evac], actions: list[np.ndarray]) -> None:
        """At most one chunk of the model."""
        config, model = self.config, self.model
        self._encode_starts(worlds)
        reached, of_rows, of_frames = self.poses(worlds, actions)
        doubled = np.concatenate([of_rows, of_rows], axis=-1)  # [k, c + 1, 16]: the one arm stands in both halves
        rows = torch.from_numpy(conditioning.normalised(conditioning.action_rows(doubled)))
        maps = draw_maps(of_frames.reshape(-1, of_frames.shape[-1]), config, model.device).unflatten(0, of_frames.shape[:2])
        memory = torch.stack([world.latents[:, memory_rows(world.latents.shape[1], config.memory)] for world in worlds])  # [k, 4, m, h, w]
        tokens = torch.stack([self.tokens(world) for world in worlds])
        conditions = model.conditions(memory, maps, rows, tokens, self.rays)
        noise, step_noise = self.noise(worlds)
        latents = model.imagine(conditions, self.steps, noise, step_noise)  # [k, 4, c, h, w]
        if not latents.isfinite().all():
            raise FloatingPointError(f"the world model gave numbers that are not finite, in {model.unet.out[2].weight.dtype}; try dtype=torch.float32")
        frames = model.decode(latents)  # [k, c, 3, H, W]
        probability = model.success(frames).cpu().numpy()
        pictures = to_uint8(frames).permute(0, 1, 3, 4, 2).cpu().numpy()
        for i, (world, given) in enumerate(zip(worlds, actions, strict=True)):
            n = len(given)
            world.latents = torch.cat([world.latents, latents[i, :, :n]], dim=1)
            world.take(pictures[i, :n], reached[i, :n], probability[i, :n])

    def poses(self, worlds: list[Evac], actions: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Poses reached after each action [k, c, 8], poses between which the action rows are taken [k, c + 1, 8], and poses drawn in the maps [k, c, 8]."""
        before = np.stack([world.pose for world in worlds])
        reached = self.convert(before, actions, normalised=True, last=np.stack([world.motion for world in worlds]))
        for i, given in enumerate(actions):
            reached[i, len(given) :] = reached[i, len(given) - 1]  # at rest
        return reached, np.concatenate([before[:, None], reached], axis=1), reached

    def convert(self, before: np.ndarray, actions: list[np.ndarray], normalised: bool, last: np.ndarray | None = None) -> np.ndarray:
        """Poses [k, 8], their last changes and actions, per world [n, D] with n <= c -> the pose after each action [k, c, 8]; rows beyond n are of no use."""
        c, device = self.config.chunk, self.model.device
        padded = np.stack([np.concatenate([given, np.zeros((c - len(given), given.shape[1]), given.dtype)]) for given in actions])
        rows, poses, motion = (None if given is None else torch.from_numpy(given).to(device) for given in (padded, before, last))
        return self.model.action_predictor.chain(rows, poses, normalised, motion).cpu().numpy()

    def tokens(self, world: Evac) -> torch.Tensor:
        """Image tokens [tokens, context_dim] that a world is shown: of its first frame."""
        return world.image_tokens

    def _encode_starts(self, worlds: Sequence[Evac]) -> None:
        """Latents and image tokens of worlds that have none yet; worlds with the same start share them."""
        fresh = [world for world in worlds if world.latents is None]
        unique = list(dict.fromkeys(world.start for world in fresh))
        if not unique:
            return
        pixels = torch.stack([start.pixels() for start in unique]).to(self.model.device)
        latents, tokens = self.model.encode(pixels), self.model.image_tokens(pixels)
        for world in fresh:
            i = unique.index(world.start)
            world.latents = latents[i][:, None].expand(-1, self.config.memory, -1, -1)  # the first frame stands for the whole memory
            world.image_tokens = tokens[i]

    def noise(self, worlds: Sequence[Evac]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Noise of one chunk, [k, 4, c, h, w], and of its steps, [steps, k, 4, c, h, w]. Each world has its own generator, so a result depends neither on the
        batch nor on its order."""
        shape = (self.config.autoencoder.latent_channels, self.config.chunk, *self.config.latent_size)
        first, later = [], []
        for world in worlds:
            first.append(torch.randn(shape, generator=world.generator, device=self.model.device))
            if self.steps.sigmas.any():
                later.append(torch.randn((len(self.steps), *shape), generator=world.generator, device=self.model.device))
        return torch.stack(first), torch.stack(later, dim=1) if later else None

    def world(self) -> Evac:
        return Evac(self)

    def episode(self, world: Evac, max_steps: int | None) -> Episode:
        return Episode(world, max_steps)


class Evac:
    """One imagined world (see vlahub.simulation.Simulation), imagined together with others or alone (`alone`).

    A step is judged by the classifier: reward 1 and the end of the episode at the first frame whose success probability passes the threshold, else 0.
    """

    max_steps = 256  # of the published environment: 32 chunks of 8

    def __init__(self, imagination: Imagination):
        self.imagination = imagination
        self.interface = interface_of(self.imagination.config)
        collection = self.imagination.starts
        self.tasks, self.trials = (collection.tasks, collection.trials) if collection else (0, 0)
        self.assets = "imagined"
        self.start: StartState | None = None
        self.latents: torch.Tensor | None = None  # [4, frames so far, h, w]; made with the first chunk, so that worlds are encoded together
        self.image_tokens: torch.Tensor | None = None  # likewise
        self.outcomes: Outcomes | None = None  # of a chunk that was run in a batch, until `apply` fetches it

    def reset(self, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        check_options(options, OPTIONS)
        by_hand = {name for name in ("image", "pose", "text") if options.get(name) is not None}
        config = self.imagination.config
        if by_hand:
            if "task" in options or "trial" in options:
                raise start_states.StartStateError("reset options: give either image, pose and text, or task and trial")
            start = start_states.given(options)
            start.check(config.height, config.width)
        elif self.imagination.starts is None:
            raise start_states.StartStateError("this environment was made without start states: reset needs the options image, pose and text")
        else:
            start = self.imagination.starts.choose(seed, options.get("task"), options.get("trial"))
        self.start, self.pose, self.outcomes = start, start.pose.astype(np.float32), None
        self.motion = np.zeros_like(self.pose)  # the change of the pose in the last control step
        image = start.image
        self.frame = image if image.dtype == np.uint8 else to_uint8(torch.from_numpy(image)).numpy()
        self.latents = self.image_tokens = None
        self.generator = torch.Generator(self.imagination.model.device).manual_seed(seed)
        return {"task": start.task, "trial": start.trial}

    def apply(self, actions: np.ndarray, watch: Callable[[], None] | None = None) -> Outcomes:
        if self.outcomes is None:
            self.imagination.advance([self], [actions])
        outcomes, self.outcomes = self.outcomes, None
        if watch:  # the frames exist anyway: show each in turn
            for frame in self.frames:
                self.frame = frame
                watch()
        return outcomes

    def over(self) -> bool:
        """The episode ended in the part of the chunk that was run so far."""
        return self.outcomes is not None and bool(self.outcomes.success[-1])

    def take(self, frames: np.ndarray, poses: np.ndarray, probability: np.ndarray) -> None:
        """Book imagined steps, up to the first success: frames [n, H, W, 3], poses [n, 8], success probabilities [n]."""
        success = probability > self.imagination.threshold
        n = int(success.argmax()) + 1 if success.any() else len(success)
        self.motion = poses[n - 1] - (poses[n - 2] if n > 1 else self.pose)
        self.frame, self.pose = frames[n - 1], poses[n - 1]
        before = self.outcomes  # of the model chunks before, where there are more actions than one holds
        if before is None:
            self.frames, probability = frames[:n], probability[:n]
        else:
            self.frames = np.concatenate([self.frames, frames[:n]])
            probability = np.concatenate([before.info["success_probability"], probability[:n]])
        success = probability > self.imagination.threshold
        self.outcomes = Outcomes(success.astype(np.float32), success, info={"success_probability": probability})

    def observe(self) -> Observation:
        return {"main_images": self.frame, "states": state_of(self.pose, self.imagination.config), "task_descriptions": self.start.text}

    def render(self) -> np.ndarray:
        return upright(self.frame)

    def close(self) -> None:
        self.latents = self.image_tokens = None


@wraps(Imagination, assigned=("__doc__",), updated=())
def alone(*args: Any, **options: Any) -> Evac:
    return Imagination(*args, **options).world()


alone.__signature__ = inspect.signature(Imagination)  # so that the catalog knows the options
