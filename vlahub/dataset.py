"""LeRobot-format datasets: write (v2.1, and v3.0 by conversion), read both, statistics, endless resumable batches.

v2.1 is the default because openpi and RLinf read it. The `lerobot` package cannot live beside ours (its pins), so the layout is written and read here with
pyarrow, Pillow and, for video features only, PyAV.

    with DatasetWriter("demos", interface, fps=20) as writer:
        writer.add_episode(observations, actions)
    dataset = Dataset("demos", horizon=8)
    for batch in Loader([dataset], batch_size=32): ...          # observation keys + actions [B, T, D] + action_is_pad [B, T]
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlahub import video
from vlahub.interface import Fit, Interface, InterfaceError, check
from vlahub.observation import Observation, stack, views

CHUNK = 1000  # episodes per folder, as LeRobot's `chunks_size`
ROW_GROUP = 8  # rows read together when one image is asked for; small, because training reads at random
INDEX_COLUMNS = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64", "task_index": "int64"}
SEEN = "observation.seen"  # optional column: False where a row repeats the observation before it, because nobody looked
ROLES = ("main_images", "wrist_images", "extra_view_images")
DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


CONVERT = "docs/rl_co.md shows how to convert a dataset"


class DatasetError(ValueError):
    """A dataset that cannot be read or extended. The message names the file and, where there is one, the row."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a dataset feed which observation key."""

    main_images: str
    states: str
    actions: str
    wrist_images: tuple[str, ...] = ()
    extra_view_images: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        return (self.main_images, *self.wrist_images, *self.extra_view_images)

    @classmethod
    def of(cls, interface: Interface) -> Columns:
        """LeRobot's own naming for a robot with this interface."""
        names = [[f"observation.images.{camera.name}" for camera in cameras] for cameras in ((interface.main,), interface.wrists, interface.extras)]
        return cls(names[0][0], "observation.state", "action", tuple(names[1]), tuple(names[2]))

    @classmethod
    def guess(cls, features: Mapping[str, Any], where: str) -> Columns:
        """From the features of a dataset that somebody else wrote; ambiguous cameras are an error."""

        def one(candidates: Sequence[str], what: str) -> str:
            found = [name for name in candidates if name in features]
            if not found:
                raise DatasetError(
                    f"{where} has no column for {what} (looked for {', '.join(candidates)}); it has {', '.join(features)}. Pass columns=Columns(...)"
                )
            return found[0]

        cameras = [name for name, feature in features.items() if feature["dtype"] in ("image", "video")]
        wrists = sorted(name for name in cameras if "wrist" in name.lower())  # "left" sorts before "right"
        others = [name for name in cameras if name not in wrists]
        if len(others) != 1:
            raise DatasetError(
                f"{where} has {len(others)} cameras that could be the main one ({', '.join(others) or 'none'}). Pass columns=Columns(main_images=...)"
            )
        return cls(others[0], one(("observation.state", "state"), "the state"), one(("action", "actions"), "the actions"), tuple(wrists))


# ------------------------------------------------------------------------------------------------ writing


class DatasetWriter:
    """Writes a v2.1 dataset, one episode at a time; every episode is on disk when `add_episode` returns. An existing dataset is extended.

    Args:
        folder: the dataset's root.
        interface: of the environment; gives names and shapes of cameras, state and action.
        fps: control steps per second.
        images: "png" (lossless), "jpeg" (quality 95) or "video" (H.264 mp4 per episode and camera).
        robot_type: free text, as LeRobot keeps it.
    """

    def __init__(self, folder: str | Path, interface: Interface, fps: float, images: Literal["png", "jpeg", "video"] = "png", robot_type: str = "unknown"):
        if images not in ("png", "jpeg", "video"):
            raise ValueError(f"images must be 'png', 'jpeg' or 'video', not {images!r}")
        self.folder, self.interface, self.columns, self.image_format, self.fps = Path(folder), interface, Columns.of(interface), images, fps
        features = _features(interface, self.columns, "video" if images == "video" else "image", fps)
        info_file = self.folder / "meta/info.json"
        if info_file.exists():
            self.info = _read_json(info_file)
            if self.info.get("codebase_version") != "v2.1":
                raise DatasetError(f"{folder} is a {self.info.get('codebase_version')} dataset; only v2.1 datasets can be extended")
            for what, mine, theirs in (("fps", fps, self.info["fps"]), ("features", _shapes(features), _shapes(self.info["features"]))):
                if mine != theirs:
                    raise DatasetError(f"{folder} exists with other {what}: {theirs}, this recording has {mine}; choose another folder")
            self.tasks = {line["task"]: line["task_index"] for line in _read_jsonl(self.folder / "meta/tasks.jsonl")}
            self._recover()
        else:
            (self.folder / "meta").mkdir(parents=True, exist_ok=True)
            self.info = {
                "codebase_version": "v2.1", "robot_type": robot_type, "total_episodes": 0, "total_frames": 0, "total_tasks": 0, "total_videos": 0,
                "total_chunks": 0, "chunks_size": CHUNK, "fps": fps, "splits": {"train": "0:0"}, "data_path": DATA_PATH,
                "video_path": VIDEO_PATH if images == "video" else None, "features": features,
            }  # fmt: skip
            self.tasks = {}
            _write_json(self.folder / "meta/vlahub.json", {"interface": interface.to_dict()})
            _write_json(info_file, self.info)

    def __len__(self) -> int:
        return self.info["total_episodes"]

    def add_episode(self, observations: Sequence[Observation], actions: np.ndarray, extras: Mapping[str, np.ndarray] | None = None) -> int:
        """Append one episode: L observations (single-env), L actions [L, D]; the action is the one taken after seeing the observation. Returns its index.

        `extras` are further per-step columns, [L] bool or float32, the same in every episode ("next.success", "next.reward")."""
        actions = np.asarray(actions, np.float32)
        length = len(observations)
        if length == 0:
            raise ValueError("an episode needs at least one step")
        if actions.shape != (length, self.interface.action_dim):
            raise ValueError(f"actions have shape {actions.shape}, expected {(length, self.interface.action_dim)}: one action for each observation")
        if not np.isfinite(actions).all():
            raise ValueError(f"actions hold a number that is not finite, at step {int(np.argwhere(~np.isfinite(actions))[0, 0])}")
        episode, start = self.info["total_episodes"], self.info["total_frames"]
        extras = {name: np.asarray(column) for name, column in (extras or {}).items()}
        for name, column in extras.items():
            feature = {"dtype": "bool" if column.dtype == bool else "float32", "shape": [1], "names": None}
            if self.info["features"].setdefault(name, feature) != feature or (episode and name not in self._extras()):
                raise ValueError(f"column {name!r} is not in the episodes written before, or has another type")
        if missing := self._extras() - extras.keys():
            raise ValueError(f"earlier episodes have the columns {sorted(missing)}, this one does not")

        frames = {column: self._camera(observations, column) for column in self.columns.images}  # [L, H, W, 3] each
        states = np.stack([observation["states"] for observation in observations]).astype(np.float32)
        texts = [observation["task_descriptions"] for observation in observations]
        for text in texts:
            self.tasks.setdefault(text, len(self.tasks))
        table: dict[str, Any] = {self.columns.states: states, self.columns.actions: actions, **extras}
        table |= {
            "timestamp": (np.arange(length) / self.fps).astype(np.float32), "frame_index": np.arange(length), "episode_index": np.full(length, episode),
            "index": np.arange(start, start + length), "task_index": np.array([self.tasks[text] for text in texts]),
        }  # fmt: skip
        where = {"episode_chunk": episode // CHUNK, "episode_index": episode}
        for column, pictures in frames.items():
            if self.image_format == "video":
                video.save(_parent(self.folder / VIDEO_PATH.format(video_key=column, **where)), video.encode(pictures, self.fps))
            else:
                table[column] = cells = []
                for picture, seen in zip(pictures, extras.get(SEEN, np.ones(length, bool)), strict=True):
                    cells.append(_encoded(picture, self.image_format) if seen or not cells else cells[-1])
        _write_parquet(_parent(self.folder / DATA_PATH.format(**where)), table, self.info["features"])

        stats = {name: _statistics(np.asarray(values), quantiles=False) for name, values in table.items() if name not in frames}
        stats |= {column: _image_statistics(pictures) for column, pictures in frames.items()}
        # The line in episodes.jsonl is what makes the episode exist; `_recover` makes the other files agree with it after a crash.
        _write_jsonl(self.folder / "meta/tasks.jsonl", [{"task_index": index, "task": text} for text, index in self.tasks.items()])
        _append_jsonl(self.folder / "meta/episodes_stats.jsonl", {"episode_index": episode, "stats": stats})
        _append_jsonl(self.folder / "meta/episodes.jsonl", {"episode_index": episode, "tasks": sorted(set(texts)), "length": length})
        self._count(episode + 1, start + length)
        return episode

    def _recover(self) -> None:
        """After a crash: keep the episodes whose line in episodes.jsonl is whole, and make the other files agree with them."""
        lines = self.folder / "meta/episodes.jsonl"
        for file in (lines, self.folder / "meta/episodes_stats.jsonl"):
            if file.exists() and not file.read_bytes().endswith(b"\n"):  # killed while its last line was written
                os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
        episodes = _read_jsonl(lines)
        stats = [line for line in _read_jsonl(self.folder / "meta/episodes_stats.jsonl") if line["episode_index"] < len(episodes)]
        _write_jsonl(self.folder / "meta/episodes_stats.jsonl", stats)
        self._count(len(episodes), sum(line["length"] for line in episodes))

    def _count(self, episodes: int, frames: int) -> None:
        self.info |= {
            "total_episodes": episodes, "total_frames": frames, "total_tasks": len(self.tasks), "total_chunks": -(-episodes // CHUNK),
            "total_videos": episodes * len(self.columns.images) if self.image_format == "video" else 0, "splits": {"train": f"0:{episodes}"},
        }  # fmt: skip
        _write_json(self.folder / "meta/info.json", self.info)

    def _extras(self) -> set[str]:
        return self.info["features"].keys() - {*self.columns.images, self.columns.states, self.columns.actions, *INDEX_COLUMNS}

    def _camera(self, observations: Sequence[Observation], column: str) -> np.ndarray:
        for role in ROLES:
            named = getattr(self.columns, role)
            names = (named,) if isinstance(named, str) else named
            if column in names:
                pictures = np.stack([observation[role] for observation in observations])  # [L, H, W, 3] or [L, V, H, W, 3]
                return pictures if role == "main_images" else views({role: pictures}, role)[:, names.index(column)]
        raise KeyError(column)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # every episode is complete on disk already


def _features(interface: Interface, columns: Columns, camera_dtype: str, fps: float) -> dict[str, dict]:
    def vector(fields: Sequence[Any]) -> dict:
        names = [field.name if field.size == 1 else f"{field.name}_{i}" for field in fields for i in range(field.size)]
        return {"dtype": "float32", "shape": [len(names)], "names": names}

    features: dict[str, dict] = {}
    for column, camera in zip(columns.images, (interface.main, *interface.wrists, *interface.extras), strict=True):
        features[column] = {"dtype": camera_dtype, "shape": [camera.height, camera.width, 3], "names": ["height", "width", "channel"]}
        if camera_dtype == "video":
            features[column]["info"] = {
                "video.fps": fps, "video.height": camera.height, "video.width": camera.width, "video.channels": 3, "video.codec": "h264",
                "video.pix_fmt": "yuv420p", "video.is_depth_map": False, "has_audio": False,
            }  # fmt: skip
    features[columns.states], features[columns.actions] = vector(interface.state), vector(interface.action)
    return features | {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in INDEX_COLUMNS.items()}


def _shapes(features: Mapping[str, dict]) -> dict[str, tuple]:
    """What must agree when a dataset is extended: the columns that the interface gives."""
    return {name: (feature["dtype"], tuple(feature["shape"])) for name, feature in features.items() if tuple(feature["shape"]) != (1,) or name in INDEX_COLUMNS}


def _encoded(picture: np.ndarray, image_format: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, **({"format": "PNG", "compress_level": 1} if image_format == "png" else {"format": "JPEG", "quality": 95}))
    return {"bytes": buffer.getvalue(), "path": None}


def _write_parquet(path: Path, table: Mapping[str, Any], features: Mapping[str, dict]) -> None:
    """A parquet file whose schema the `datasets` package understands (without the metadata an image column comes back as a raw struct)."""
    arrays, fields, described = [], [], {}
    for name, values in table.items():
        dtype, (size, *more) = features[name]["dtype"], features[name]["shape"]
        if dtype == "image":
            kind: pa.DataType = pa.struct({"bytes": pa.binary(), "path": pa.string()})
            array = pa.array(values, kind)
            described[name] = {"_type": "Image"}
        elif size == 1 and not more and np.asarray(values).ndim == 1:
            kind = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}[dtype]
            array = pa.array(values, kind)
            described[name] = {"dtype": dtype, "_type": "Value"}
        else:
            kind = pa.list_(pa.float32(), size)
            array = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(values, np.float32).ravel()), size)
            # `datasets` >= 4 writes "List", which older readers reject; every version reads "Sequence"
            described[name] = {"feature": {"dtype": dtype, "_type": "Value"}, "length": size, "_type": "Sequence"}
        arrays.append(array)
        fields.append(pa.field(name, kind))
    schema = pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": described}})})
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), temporary, row_group_size=ROW_GROUP)
    os.replace(temporary, path)


def _statistics(values: np.ndarray, quantiles: bool = True) -> dict[str, list[float]]:
    """Of each number of a column, [F, D] or [F]."""
    values = values.astype(np.float64).reshape(len(values), -1)
    out = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    if quantiles:
        out["q01"], out["q99"] = np.quantile(values, 0.01, axis=0), np.quantile(values, 0.99, axis=0)
    return {**{name: value.tolist() for name, value in out.items()}, "count": [len(values)]}


def _image_statistics(pictures: np.ndarray) -> dict[str, Any]:
    """Per channel in [0, 1], shape [3, 1, 1] as LeRobot has it, from at most 100 frames at a quarter of the resolution."""
    sample = pictures[np.linspace(0, len(pictures) - 1, min(len(pictures), 100)).astype(int), ::4, ::4] / 255.0
    of = {"min": sample.min((0, 1, 2)), "max": sample.max((0, 1, 2)), "mean": sample.mean((0, 1, 2)), "std": sample.std((0, 1, 2))}
    return {**{name: value.reshape(3, 1, 1).tolist() for name, value in of.items()}, "count": [len(sample)]}


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class EpisodeEntry:
    """Where an episode lies."""

    index: int
    length: int
    start: int  # first frame in the dataset
    file: Path
    first_row: int  # of this episode in the file (v3.0 keeps many episodes in one)
    videos: Mapping[str, tuple[Path, float]]  # video column -> file, the time of its first frame


class Dataset:
    """A LeRobot dataset, v2.1 or v3.0, for random access. Small columns are kept in memory; pictures are decoded when asked for.

    Items are the rows whose observation was seen (`vlahub record --look-every`), by default all; `states`, `actions`, `texts` and `column` hold all rows.

    Args:
        folder: the dataset's root (the folder that holds `meta/`).
        horizon: T, actions per item; beyond the episode's end the last one is repeated and flagged.
        columns: which columns feed the policy; needed only where the names leave a doubt.
        episodes: indices to keep; all by default.
        cache_gb: decoded pictures are kept up to this size, which makes small datasets fast on few cores.
    """

    def __init__(self, folder: str | Path, horizon: int = 1, columns: Columns | None = None, episodes: Sequence[int] | None = None, cache_gb: float = 1.0):
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, not {horizon}")
        self.folder, self.horizon = Path(folder), horizon
        info_file = self.folder / "meta/info.json"
        if not info_file.exists():
            raise DatasetError(
                f"{folder} is no LeRobot dataset: there is no meta/info.json" + (" (pass the folder that holds meta/)" if self.folder.is_dir() else "")
            )
        self.info = _read_json(info_file)
        self.fps, self.features, version = self.info["fps"], self.info["features"], self.info.get("codebase_version")
        own = self.folder / "meta/vlahub.json"
        self.interface = Interface.from_dict(_read_json(own)["interface"]) if own.exists() else None
        self.columns = columns or (Columns.of(self.interface) if self.interface else Columns.guess(self.features, str(folder)))
        for name in (*self.columns.images, self.columns.states, self.columns.actions):
            if name not in self.features:
                raise DatasetError(f"{folder} has no column {name!r}; it has {', '.join(self.features)}")
        if version == "v2.1":
            entries, self.tasks = self._entries_v21()
        elif version == "v3.0":
            entries, self.tasks = self._entries_v30()
        else:
            raise DatasetError(f"{info_file}: codebase_version is {version!r}; v2.1 and v3.0 can be read (lerobot's own scripts convert older ones to v2.1)")
        if episodes is not None:
            known = {entry.index: entry for entry in entries}
            if unknown := [index for index in episodes if index not in known]:
                raise DatasetError(f"{folder} has no episodes {unknown[:5]}; it has {len(known)}")
            entries = [known[index] for index in episodes]
        if not entries:
            raise DatasetError(f"{folder} holds no episode")
        if empty := [entry.index for entry in entries if entry.length < 1]:
            raise DatasetError(
                f"{folder}: episode {empty[0]} has no frames, so there is nothing to learn from it; leave it out with episodes=[...], or record it again"
            )
        self.episodes = entries
        self._read_small_columns()
        self._images: dict[tuple[str, int], np.ndarray] = {}
        self._cache_bytes, self._cached = int(cache_gb * 1e9), 0

    def __len__(self) -> int:
        return len(self.frames)

    def _entries_v21(self) -> tuple[list[EpisodeEntry], dict[int, str]]:
        entries, start, size = [], 0, self.info.get("chunks_size", CHUNK)
        for line in _read_jsonl(self.folder / "meta/episodes.jsonl"):
            where = {"episode_chunk": line["episode_index"] // size, "episode_index": line["episode_index"]}
            videos = {
                name: (self.folder / self.info["video_path"].format(video_key=name, **where), 0.0)
                for name in self.columns.images
                if self.features[name]["dtype"] == "video"
            }
            entries.append(EpisodeEntry(line["episode_index"], line["length"], start, self.folder / self.info["data_path"].format(**where), 0, videos))
            start += line["length"]
        return entries, {line["task_index"]: line["task"] for line in _read_jsonl(self.folder / "meta/tasks.jsonl")}

    def _entries_v30(self) -> tuple[list[EpisodeEntry], dict[int, str]]:
        entries = []
        first_of_file: dict[Path, int] = {}
        for file in sorted((self.folder / "meta/episodes").glob("chunk-*/file-*.parquet")):
            for line in _read_table(file).to_pylist():
                data = self.folder / self.info["data_path"].format(chunk_index=line["data/chunk_index"], file_index=line["data/file_index"])
                first = first_of_file.setdefault(data, line["dataset_from_index"])
                videos = {
                    name: (
                        self.folder
                        / self.info["video_path"].format(
                            video_key=name, chunk_index=line[f"videos/{name}/chunk_index"], file_index=line[f"videos/{name}/file_index"]
                        ),
                        line[f"videos/{name}/from_timestamp"],
                    )
                    for name in self.columns.images
                    if self.features[name]["dtype"] == "video"
                }
                row = line["dataset_from_index"] - first
                entries.append(EpisodeEntry(line["episode_index"], line["length"], line["dataset_from_index"], data, row, videos))
        tasks = _read_table(self.folder / "meta/tasks.parquet").to_pylist()
        # pandas keeps the index (the task's text) under its name or, if it had none, under __index_level_0__
        return entries, {line["task_index"]: line.get("task") or line["__index_level_0__"] for line in tasks}

    def _read_small_columns(self) -> None:
        """states [F, Ds], actions [F, Da], texts [F], and for each frame its episode's place in `self.episodes` and its row in the file."""
        states, actions, texts, place, rows = [], [], [], [], []
        wanted = [self.columns.states, self.columns.actions, "task_index"]
        tables: dict[Path, pa.Table] = {}
        for i, entry in enumerate(self.episodes):
            if entry.file not in tables:
                tables = {entry.file: _read_table(entry.file, wanted)}  # v3.0 episodes come file by file
            table = tables[entry.file].slice(entry.first_row, entry.length)
            if len(table) != entry.length:
                raise DatasetError(f"{entry.file}: episode {entry.index} should have {entry.length} rows from row {entry.first_row}, the file has {len(table)}")
            for name, out in ((self.columns.states, states), (self.columns.actions, actions)):
                values = _matrix(table[name], self.features[name]["shape"][0], entry, name)
                if not np.isfinite(values).all():
                    raise DatasetError(f"{entry.file}: column {name!r}, row {entry.first_row + int(np.argwhere(~np.isfinite(values))[0, 0])} is not finite")
                out.append(values)
            for index in table["task_index"].to_pylist():
                if index not in self.tasks:
                    raise DatasetError(f"{entry.file}: task_index {index} is not in {self.folder / 'meta'}'s tasks ({len(self.tasks)} of them)")
                texts.append(self.tasks[index])
            place += [i] * entry.length
            rows += range(entry.first_row, entry.first_row + entry.length)
        self.states, self.actions, self.texts = np.concatenate(states), np.concatenate(actions), texts
        self._place, self._row = np.array(place), np.array(rows)
        self._last = np.cumsum([entry.length for entry in self.episodes]) - 1  # last frame of each episode
        self._seen = self.column(SEEN).astype(bool) if SEEN in self.features else np.ones(len(self.actions), bool)
        self.frames = np.flatnonzero(self._seen)  # the row of each item

    def column(self, name: str) -> np.ndarray:
        """A column of one number per frame, such as "next.success", over the frames kept: [F]."""
        if name not in self.features:
            raise DatasetError(f"{self.folder} has no column {name!r}; it has {', '.join(self.features)}")
        parts = [_read_table(entry.file, [name])[name].slice(entry.first_row, entry.length).to_numpy() for entry in self.episodes]
        return np.concatenate(parts)

    @property
    def layout(self) -> dict[str, Any]:
        """What datasets that are drawn from together must have in common."""
        roles = {role: getattr(self.columns, role) for role in ROLES}
        shapes = {role: [self.features[name]["shape"] for name in ((names,) if isinstance(names, str) else names)] for role, names in roles.items()}
        return {
            "numbers in states": self.states.shape[1],
            "numbers in actions": self.actions.shape[1],
            "frames per second": self.fps,
            **{f"as shapes of {role}": found for role, found in shapes.items()},
        }

    @property
    def statistics(self) -> dict[str, dict[str, list[float]]]:
        """Exact statistics of "states" and "actions" over the frames kept: min, max, mean, std, q01, q99, count."""
        return {"states": _statistics(self.states), "actions": _statistics(self.actions)}

    @staticmethod
    def joint_statistics(datasets: Sequence[Dataset], fit: Fit | None = None) -> dict[str, dict[str, list[float]]]:
        """Exact statistics over the frames of several datasets, the states as the policy gets them."""
        states = np.concatenate([dataset.states for dataset in datasets])
        if fit is not None and fit.state is not None:
            states = fit.state.convert(states)
        return {"states": _statistics(states), "actions": _statistics(np.concatenate([dataset.actions for dataset in datasets]))}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The observation of one frame (single-env keys), `actions` [T, D] and `action_is_pad` [T]."""
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        frame = int(self.frames[index])
        item: dict[str, Any] = {"main_images": self._image(self.columns.main_images, frame)}
        for role in ("wrist_images", "extra_view_images"):
            names = getattr(self.columns, role)
            if names:
                pictures = [self._image(name, frame) for name in names]
                item[role] = pictures[0] if len(pictures) == 1 and role == "wrist_images" else np.stack(pictures)
        steps = np.arange(frame, frame + self.horizon)
        last = self._last[self._place[frame]]
        return {
            **item,
            "states": self.states[frame],
            "task_descriptions": self.texts[frame],
            "actions": self.actions[np.minimum(steps, last)],
            "action_is_pad": steps > last,
        }

    def _image(self, column: str, frame: int) -> np.ndarray:
        """[H, W, 3] uint8."""
        key = (column, frame)
        if key in self._images:
            return self._images[key]
        entry, row = self.episodes[self._place[frame]], int(self._row[frame])
        if self.features[column]["dtype"] == "video":
            file, begin = entry.videos[column]
            return self._keep(column, frame, _video_frame(file, begin + (row - entry.first_row) / self.fps))
        first, cells = _cells(entry.file, column, row)
        if self._cached < self._cache_bytes:  # opening the file costs more than a picture, so its neighbours are kept as well
            for other in range(max(first, entry.first_row), min(first + len(cells), entry.first_row + entry.length)):
                if other != row and self._seen[frame + other - row] and (column, frame + other - row) not in self._images:
                    self._keep(column, frame + other - row, _decoded(cells[other - first], f"{entry.file}: column {column!r}, row {other}"))
        return self._keep(column, frame, _decoded(cells[row - first], f"{entry.file}: column {column!r}, row {row}"))

    def _keep(self, column: str, frame: int, picture: np.ndarray) -> np.ndarray:
        """Check a picture and put it into the cache while there is room."""
        entry, row = self.episodes[self._place[frame]], int(self._row[frame])
        if picture.shape != tuple(self.features[column]["shape"]):
            raise DatasetError(
                f"{entry.file}: column {column!r}, row {row} is a picture of shape {picture.shape}, info.json says {self.features[column]['shape']}"
            )
        if (column, frame) not in self._images and self._cached + picture.nbytes <= self._cache_bytes:
            self._images[column, frame] = picture
            self._cached += picture.nbytes
        return picture


def _matrix(column: pa.ChunkedArray, size: int, entry: EpisodeEntry, name: str) -> np.ndarray:
    rows = column.to_pylist()
    rows = [row if isinstance(row, list) else [row] for row in rows]
    for i, row in enumerate(rows):
        if len(row) != size:
            raise DatasetError(f"{entry.file}: column {name!r}, row {entry.first_row + i} has {len(row)} numbers, info.json says {size}")
    return np.asarray(rows, np.float32).reshape(len(rows), size)


def _cells(file: Path, column: str, row: int) -> tuple[int, list[bytes]]:
    """The encoded pictures of the row group that holds a row, and the number of its first row."""
    try:
        with pq.ParquetFile(file) as parquet:
            first = 0
            for group in range(parquet.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                if row < first + count:
                    values = parquet.read_row_group(group, [column])[column].to_pylist()
                    return first, [value["bytes"] if value["bytes"] is not None else (file.parent / value["path"]).read_bytes() for value in values]
                first += count
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(f"{file}: column {column!r}, row {row} cannot be read: {error}") from error
    raise DatasetError(f"{file} has no row {row}")


def _decoded(data: bytes, where: str) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG chunk
        raise DatasetError(f"{where} is no readable picture: {error}") from error


def _video_frame(file: Path, seconds: float) -> np.ndarray:
    """The frame shown at a time: seek to the key frame before it, decode forward."""
    import av

    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            container.seek(int(seconds / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time is not None and frame.time >= seconds - 1e-4:  # LeRobot's own tolerance for timestamps
                    return frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError) as error:
        raise DatasetError(f"{file} is no readable video: {error}") from error
    raise DatasetError(f"{file} ends before {seconds:.3f} s, where a frame should be")


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Items -> a batch: batched observation keys, `actions` [B, T, D], `action_is_pad` [B, T]."""
    return stack(items)


def fitting(datasets: Sequence[Dataset], policy: Any, name: str) -> Fit:
    """How all of these datasets meet a policy. What does not fit is an error that names the dataset and the field.

    Args:
        name: what the user calls the policy.
    """
    wants, fits = policy.interface, []
    for dataset in datasets:
        if dataset.interface is not None:
            try:
                fits.append(check(dataset.interface, policy))
            except InterfaceError as error:
                raise DatasetError(f"{dataset.folder} (here 'the environment') and --policy {name}: {error}") from error
            continue
        # somebody else's dataset does not say what its numbers mean, but how many there are can be compared
        columns, cameras = dataset.columns, 1 + len(wants.wrists) + len(wants.extras) - len(wants.optional_cameras)
        problems = []
        if wants.state and dataset.states.shape[1] != wants.state_dim:
            problems.append(f"{columns.states!r} has {dataset.states.shape[1]} numbers, the policy's state {wants.state_dim}")
        if dataset.actions.shape[1] != wants.action_dim:
            problems.append(f"{columns.actions!r} has {dataset.actions.shape[1]} numbers, the policy's action {wants.action_dim}")
        if len(columns.images) < cameras:
            problems.append(f"there are {len(columns.images)} cameras ({', '.join(columns.images)}), the policy needs {cameras}")
        if wants.control_hz and abs(dataset.fps - wants.control_hz) > 1e-6:
            problems.append(f"it has {dataset.fps:g} frames a second, the policy's control rate is {wants.control_hz:g}")
        if problems:
            raise DatasetError(f"{dataset.folder} does not fit --policy {name}: {'; '.join(problems)} ({CONVERT})")
        fits.append(Fit())
    if any(fit != fits[0] for fit in fits):
        found = ", ".join(f"{dataset.folder}: {fit}" for dataset, fit in zip(datasets, fits, strict=True))
        raise DatasetError(f"the datasets need different adapters ({found}); train on those that agree")
    return fits[0]


class Loader:
    """Endless shuffled batches. Batch k is a pure function of (seed, k), so `step` is all the state there is, and ranks share one order.

    Without weights every frame is seen once per epoch, in a fresh order each epoch. With weights each item's dataset is drawn by weight, then a frame of it.

    Args:
        datasets: one or several, with the same shapes.
        batch_size: per rank.
        weights: one per dataset, any positive numbers; None goes through all frames of all datasets evenly.
        workers: threads that decode pictures ahead of time.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        batch_size: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 2,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        first = datasets[0]
        for other in datasets[1:]:
            for what, mine in first.layout.items():
                if (theirs := other.layout[what]) != mine:
                    raise DatasetError(f"{other.folder} has {theirs} {what}, {first.folder} has {mine}; datasets of one loader must agree ({CONVERT})")
        if weights is not None and (len(weights) != len(datasets) or min(weights) <= 0):
            raise ValueError(f"weights must be {len(datasets)} positive numbers, one per dataset, not {list(weights)}")
        self.datasets, self.batch_size, self.seed, self.rank, self.world = list(datasets), batch_size, seed, rank, world
        self.weights = None if weights is None else np.asarray(weights, float) / np.sum(weights)
        self.starts = np.cumsum([0, *(len(dataset) for dataset in datasets)])
        self.step = 0
        self._pool = ThreadPoolExecutor(workers)
        self._ahead: tuple[int, list] | None = None
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def indices(self, step: int) -> np.ndarray:
        """Frames of this rank's batch `step`, counted over all datasets."""
        total, wide = int(self.starts[-1]), self.batch_size * self.world
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        if self.weights is not None:
            rng = np.random.default_rng([self.seed, step])
            which = rng.choice(len(self.datasets), wide, p=self.weights)
            lengths = np.diff(self.starts)
            return (self.starts[which] + np.minimum((rng.random(wide) * lengths[which]).astype(np.int64), lengths[which] - 1))[mine]
        out = []
        for position in range(step * wide, (step + 1) * wide)[mine]:
            epoch, place = divmod(position, total)
            if self._order[0] != epoch:
                self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(total))
            out.append(self._order[1][place])
        return np.array(out)

    def _submit(self, step: int) -> list:
        def item(index: int) -> dict[str, Any]:
            dataset = int(np.searchsorted(self.starts, index, side="right")) - 1
            return self.datasets[dataset][int(index - self.starts[dataset])]

        return [self._pool.submit(item, index) for index in self.indices(step)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        futures = self._ahead[1] if self._ahead and self._ahead[0] == self.step else self._submit(self.step)
        self.step += 1
        self._ahead = (self.step, self._submit(self.step))
        return collate([future.result() for future in futures])


# ------------------------------------------------------------------------------------------------ v3.0


def convert_to_v30(source: str | Path, target: str | Path) -> Path:
    """Write a v2.1 dataset as v3.0: episodes share files, pictures and video packets are copied as they are."""
    source, target = Path(source), Path(target)
    dataset = Dataset(source)
    if dataset.info["codebase_version"] != "v2.1":
        raise DatasetError(f"{source} is a {dataset.info['codebase_version']} dataset; only v2.1 is converted")
    if target.exists() and any(target.iterdir()):
        raise DatasetError(f"{target} exists and is not empty; choose another folder")
    video_columns = [name for name, feature in dataset.features.items() if feature["dtype"] == "video"]
    stats = {line["episode_index"]: line["stats"] for line in _read_jsonl(source / "meta/episodes_stats.jsonl")}
    if missing := [entry.index for entry in dataset.episodes if entry.index not in stats]:
        raise DatasetError(
            f"{source / 'meta/episodes_stats.jsonl'} has no statistics of episode {missing[0]}{' and others' if missing[1:] else ''}, which v3.0 keeps; "
            f"write the episodes anew with DatasetWriter ({CONVERT})"
        )
    texts = {line["episode_index"]: line["tasks"] for line in _read_jsonl(source / "meta/episodes.jsonl")}
    groups: list[list[EpisodeEntry]] = []
    size = 0
    for entry in dataset.episodes:  # data files of about 100 MB, as info.json promises
        if not groups or size + entry.file.stat().st_size > 100e6:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.file.stat().st_size
    rows = []
    for number, group in enumerate(groups):
        place = {"chunk_index": number // CHUNK, "file_index": number % CHUNK}
        data = _parent(target / "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet".format(**place))
        tables = [pq.read_table(entry.file) for entry in group]
        pq.write_table(pa.concat_tables(tables), data, row_group_size=ROW_GROUP)
        spans = {name: _join_videos([entry.videos[name][0] for entry in group], target, name, place, dataset.fps) for name in video_columns}
        for i, entry in enumerate(group):
            row: dict[str, Any] = {"episode_index": entry.index, "tasks": texts[entry.index], "length": entry.length}
            row |= {"dataset_from_index": entry.start, "dataset_to_index": entry.start + entry.length}
            row |= {
                "data/chunk_index": place["chunk_index"],
                "data/file_index": place["file_index"],
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
            for name in video_columns:
                begin, end = spans[name][i]
                row |= {f"videos/{name}/chunk_index": place["chunk_index"], f"videos/{name}/file_index": place["file_index"]}
                row |= {f"videos/{name}/from_timestamp": begin, f"videos/{name}/to_timestamp": end}
            row |= {f"stats/{name}/{kind}": value for name, kinds in stats[entry.index].items() for kind, value in kinds.items()}
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), _parent(target / "meta/episodes/chunk-000/file-000.parquet"))
    tasks = pa.table({"task_index": list(dataset.tasks), "task": list(dataset.tasks.values())})
    pandas = {"index_columns": ["task"], "columns": [], "column_indexes": [], "pandas_version": "2"}  # the text is the frame's index
    pq.write_table(tasks.replace_schema_metadata({"pandas": json.dumps(pandas)}), target / "meta/tasks.parquet")
    whole = {dataset.columns.states: dataset.statistics["states"], dataset.columns.actions: dataset.statistics["actions"]}
    _write_json(target / "meta/stats.json", whole)
    info = {key: value for key, value in dataset.info.items() if key not in ("total_videos", "total_chunks")}
    info |= {"codebase_version": "v3.0", "data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
    info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4" if video_columns else None
    if (source / "meta/vlahub.json").exists():
        _write_json(target / "meta/vlahub.json", _read_json(source / "meta/vlahub.json"))
    _write_json(target / "meta/info.json", info)
    return target


def _join_videos(files: Sequence[Path], target: Path, column: str, place: Mapping[str, int], fps: float) -> list[tuple[float, float]]:
    """Copy the packets of several mp4 files into one. Returns each file's (begin, end) in seconds."""
    import av

    out = _parent(target / "videos/{column}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4".format(column=column, **place))
    spans, frames = [], 0
    with av.open(str(out), "w") as joined:
        stream = None
        for file in files:
            with av.open(str(file)) as part:
                video = part.streams.video[0]
                stream = stream or joined.add_stream_from_template(video)
                offset, count = round(frames / fps / video.time_base), 0
                for packet in part.demux(video):
                    if packet.dts is None:  # the flush packet at the end
                        continue
                    packet.pts += offset
                    packet.dts += offset
                    packet.stream = stream
                    joined.mux(packet)
                    count += 1
            spans.append((frames / fps, (frames + count) / fps))
            frames += count
    return spans


# ------------------------------------------------------------------------------------------------ files


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(columns) if columns else None)
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing; the dataset is incomplete") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(f"{path} is not a readable parquet file: {error}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DatasetError(f"{path} is not valid JSON: {error}") from error


def _read_jsonl(path: Path) -> list[dict]:
    if not path.exists():
        return []
    out = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path}, line {number} is not valid JSON: {error}") from error
    return out


def _write_json(path: Path, record: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, path)


def _write_jsonl(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(temporary, path)


def _append_jsonl(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
