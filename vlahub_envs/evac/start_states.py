"""Where imagined episodes begin: a first frame, the end-effector's pose in it, and the instruction.

starts = read("starts.safetensors")          # ours
starts = read("world_model_buffer/libero_spatial")   # the published folder of *.npy trajectories, read without running pickled code
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vlahub_envs.evac.actions import POSE

FILE = "starts.safetensors"  # in a folder of weights: the start states that belong to them
# in the file: the bytes of all pictures (PNG or JPEG, about a third or a tenth of the pixels) behind each other, and how many each has
TENSORS = ("pictures", "sizes", "poses", "tasks", "trials")
TEXTS = "texts"  # in the file's metadata: a JSON list with the instruction of every task


class StartStateError(ValueError):
    """A start state, or a file of them, that cannot be used. The message names the entry and what to do."""


@dataclass(frozen=True, eq=False)  # compared by identity: worlds with the same start share its encoding
class StartState:
    image: np.ndarray  # [H, W, 3]: uint8, or float32 in [-1, 1] as a resize leaves it
    pose: np.ndarray  # [8] float32: xyz, quaternion xyzw, gripper
    text: str
    task: int = -1  # -1: given by hand
    trial: int = -1

    def pixels(self) -> torch.Tensor:
        """[3, H, W] float32 in [-1, 1]"""
        image = torch.from_numpy(np.ascontiguousarray(self.image)).permute(2, 0, 1)
        return image.float() / 255 * 2 - 1 if self.image.dtype == np.uint8 else image

    def check(self, height: int, width: int) -> None:
        """Raise a StartStateError if a world model of this frame size cannot start here."""
        image, pose = self.image, self.pose
        if not isinstance(image, np.ndarray) or image.dtype not in (np.uint8, np.float32) or image.ndim != 3 or image.shape[2] != 3:
            raise StartStateError(f"the start image must be uint8 [H, W, 3] (or float32 in [-1, 1]), not {_words(image)}")
        if image.shape[:2] != (height, width):
            raise StartStateError(
                f"the start image is {image.shape[0]}x{image.shape[1]}, this world model imagines {height}x{width}; "
                "record it at that size, or resize it with vlahub_envs.evac.start_states.resized"
            )
        if image.dtype == np.float32 and not (np.abs(image) <= 1).all():
            raise StartStateError("a float32 start image must lie in [-1, 1]")
        if not isinstance(pose, np.ndarray) or pose.shape != (POSE,) or not np.isfinite(pose).all():
            raise StartStateError(f"the start pose must be {POSE} finite numbers (xyz, quaternion xyzw, gripper), not {_words(pose)}")
        if not np.linalg.norm(pose[3:7]) > 0:
            raise StartStateError("the start pose has the quaternion 0 0 0 0, which is no rotation")
        if not isinstance(self.text, str) or not self.text:
            raise StartStateError(f"the start state's text must be a non-empty instruction, not {self.text!r}")


def _words(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else f"{type(value).__name__} {value!r:.60}"


def given(options: Mapping[str, Any]) -> StartState:
    """A start state from reset options `image`, `pose`, `text`; all three are needed."""
    missing = [name for name in ("image", "pose", "text") if options.get(name) is None]
    if missing:
        raise StartStateError(
            f"reset options lack {', '.join(missing)}: a start by hand needs image [H, W, 3], pose [8] and text; or select one by task and trial"
        )
    return StartState(np.asarray(options["image"]), np.asarray(options["pose"], np.float32), options["text"])


def resized(image: np.ndarray, height: int, width: int, antialias: bool = False) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [height, width, 3] in [-1, 1], bilinear. The published LIBERO loader does not blur before shrinking, the AgiBot one does."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False, antialias=antialias)
    return (pixels[0].permute(1, 2, 0) * 2 - 1).numpy()


class StartStates(Sequence[StartState]):
    """A collection, with tasks and trials to select from."""

    def __init__(self, states: Sequence[StartState]):
        if not states:
            raise StartStateError("a collection of start states needs at least one")
        self.states = list(states)
        self._of: dict[tuple[int, int], StartState] = {}
        for state in self.states:
            if (state.task, state.trial) in self._of:
                raise StartStateError(f"two start states are called task {state.task}, trial {state.trial}")
            self._of[state.task, state.trial] = state
        self.trials_of: dict[int, list[int]] = {}
        for task, trial in sorted(self._of):
            self.trials_of.setdefault(task, []).append(trial)
        if sorted(self.trials_of) != list(range(len(self.trials_of))):
            raise StartStateError(f"tasks must be numbered 0, 1, 2, ... without a gap, not {sorted(self.trials_of)}")

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: Any) -> Any:
        return self.states[index]

    @property
    def tasks(self) -> int:
        return len(self.trials_of)

    @property
    def trials(self) -> int:
        """Trials that every task has."""
        return min(map(len, self.trials_of.values()))

    def choose(self, seed: int, task: int | None = None, trial: int | None = None) -> StartState:
        """The state of a task and trial; what is left open is drawn from the seed."""
        rng = np.random.default_rng(seed)
        if task is None and trial is None:
            return self.states[int(rng.integers(len(self.states)))]
        drawn = int(rng.integers(self.tasks))
        task = drawn if task is None else task
        if task not in self.trials_of:
            raise StartStateError(f"task {task} is out of range; the start states have tasks 0 to {self.tasks - 1}")
        trials = self.trials_of[task]
        trial = trials[int(rng.integers(len(trials)))] if trial is None else trial
        if trial not in trials:
            raise StartStateError(f"task {task} has no trial {trial}; it has {len(trials)}, from {trials[0]} to {trials[-1]}")
        return self._of[task, trial]


# ------------------------------------------------------------------------------------------------ files


def read(path: str | Path) -> StartStates:
    """Our file (*.safetensors), or a published folder of *.npy trajectories (their first frames are used)."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.glob("*.npy") if not file.stem.endswith("_kir"))  # _kir files hold key frames for another environment
        if not files:
            raise StartStateError(f"{path} holds no *.npy trajectories")
        return from_trajectories({file.name: first_frame(file) for file in files})
    if path.suffix != ".safetensors":
        raise StartStateError(f"{path} is neither a *.safetensors file of start states nor a folder of *.npy trajectories")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            keys, metadata = set(file.keys()), file.metadata() or {}
            if keys != set(TENSORS) or TEXTS not in metadata:
                found = sorted(keys | {f"metadata[{name!r}]" for name in metadata})
                raise StartStateError(f"{path} has the entries {', '.join(found)}; a start-state file has {', '.join(TENSORS)} and metadata[{TEXTS!r}]")
            pictures, sizes, poses, tasks, trials = (file.get_tensor(name) for name in TENSORS)
            texts = json.loads(metadata[TEXTS])
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise StartStateError(f"{path} is not a readable start-state file: {error}") from error
    counts = len(sizes), len(poses), len(tasks), len(trials)
    if len(set(counts)) > 1 or sizes.sum() != len(pictures) or tasks.max(initial=-1) >= len(texts):
        raise StartStateError("{}: {} pictures, {} poses, {} tasks and {} trials do not belong together".format(path, *counts))
    try:
        images = [np.array(Image.open(io.BytesIO(part.tobytes())).convert("RGB")) for part in np.split(pictures, np.cumsum(sizes)[:-1])]
    except OSError as error:
        raise StartStateError(f"{path} holds a picture that cannot be read: {error}") from error
    return StartStates(
        [
            StartState(image, np.asarray(pose, np.float32), texts[task], int(task), int(trial))
            for image, pose, task, trial in zip(images, poses, tasks, trials, strict=True)
        ]
    )


def write(starts: StartStates, path: str | Path, quality: int = 0) -> None:
    """Write our file. Images must be uint8; they are kept as PNG, or as JPEG of this `quality`, which takes a quarter of the room."""
    from safetensors.numpy import save_file

    if any(state.image.dtype != np.uint8 for state in starts):
        raise StartStateError("a start-state file holds uint8 images; round resized ones first")
    pictures = []
    for state in starts:
        buffer = io.BytesIO()
        Image.fromarray(state.image).save(buffer, **({"format": "JPEG", "quality": quality} if quality else {"format": "PNG"}))
        pictures.append(np.frombuffer(buffer.getvalue(), np.uint8))
    columns = {
        "pictures": np.concatenate(pictures),
        "sizes": np.array([len(picture) for picture in pictures], np.int64),
        "poses": np.stack([state.pose for state in starts]).astype(np.float32),
        "tasks": np.array([state.task for state in starts], np.int64),
        "trials": np.array([state.trial for state in starts], np.int64),
    }
    texts = {state.task: state.text for state in starts}
    save_file(columns, path, metadata={TEXTS: json.dumps([texts[task] for task in range(starts.tasks)])})


def from_trajectories(frames: Mapping[str, Mapping[str, Any]]) -> StartStates:
    """First frames of published trajectories, by file name. Instructions become tasks in alphabetical order, files of one instruction its trials."""
    states: list[StartState] = []
    parsed = {name: _parse(name, frame) for name, frame in frames.items()}
    order = {text: task for task, text in enumerate(sorted({text for _, _, text in parsed.values()}))}
    counts = dict.fromkeys(order, 0)
    for image, pose, text in parsed.values():
        states.append(StartState(image, pose, text, order[text], counts[text]))
        counts[text] += 1
    return StartStates(states)


def _parse(name: str, frame: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, str]:
    keys = ", ".join(sorted(map(str, frame)))
    pose = frame.get("init_ee_pose", frame.get("abs_action"))
    text = frame.get("instruction", frame.get("task"))
    for what, value in (("image", frame.get("image")), ("init_ee_pose (or abs_action)", pose), ("instruction (or task)", text)):
        if value is None:
            raise StartStateError(f"{name}: its first frame has no {what}; it has {keys}")
    text = text.item() if isinstance(text, (np.ndarray, np.generic)) else text
    return np.asarray(frame["image"]), np.asarray(pose, np.float32).reshape(-1), text.decode() if isinstance(text, bytes) else str(text)


def first_frame(file: Path) -> Mapping[str, Any]:
    """Frame 0 of a published trajectory: a pickled array of dicts."""
    try:
        with file.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            _, _, dtype = reader(stream)
            frames = _ArrayUnpickler(stream).load() if dtype.hasobject else None
    except (ValueError, pickle.UnpicklingError, EOFError) as error:
        raise StartStateError(f"{file} is not a published trajectory: {error}") from error
    if not isinstance(frames, np.ndarray) or frames.size == 0 or not isinstance(frames.reshape(-1)[0], Mapping):
        raise StartStateError(f"{file} is not a published trajectory, which is an array of one dict per frame")
    return frames.reshape(-1)[0]


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays and plain containers only: a file that names anything else is refused before any of it runs."""

    ALLOWED = {
        *((f"numpy.{core}.{name}") for core in ("core", "_core") for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")),
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",
    }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(
                f"it holds an object of {module}.{name}; only arrays, numbers, text and containers are read, because others could run code"
            )
        return super().find_class(module, name)
