import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.worlds import PointExpert, PointWorld
from vlahub.dataset import Columns, Dataset, DatasetError, DatasetWriter, Loader, convert_to_v30
from vlahub.simulation import Simulation


def episode(world: PointWorld, seed: int):
    """One demonstration: observations, actions."""
    world.reset(seed, {})
    expert, observations, actions, success = PointExpert(world), [], [], False
    while not success:
        observations.append(world.observe())
        actions.append(expert.act()[0])
        success = bool(world.apply(actions[-1][None]).success[-1])
    return observations, np.array(actions, np.float32)


@pytest.fixture
def world() -> Simulation:
    return PointWorld(size=16, wrists=2, extras=1)


def record(folder, world, count=3, **options):
    demos = [episode(world, seed) for seed in range(count)]
    with DatasetWriter(folder, world.interface, fps=10, **options) as writer:
        for observations, actions in demos:
            writer.add_episode(observations, actions, {"next.success": np.arange(len(actions)) == len(actions) - 1})
    return demos


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, world, version):
    demos = record(tmp_path / "a", world)
    folder = tmp_path / "a" if version == "v2.1" else convert_to_v30(tmp_path / "a", tmp_path / "b")
    dataset = Dataset(folder, horizon=3)
    assert len(dataset) == sum(len(actions) for _, actions in demos) and dataset.interface == world.interface and dataset.fps == 10
    frame = 0
    for observations, actions in demos:
        for step, observation in enumerate(observations):
            item = dataset[frame]
            for key, value in observation.items():
                assert np.array_equal(item[key], value), key
            left = min(3, len(actions) - step)
            assert np.array_equal(item["actions"][:left], actions[step : step + left])
            assert (item["actions"][left:] == actions[-1]).all() and item["action_is_pad"].tolist() == [False] * left + [True] * (3 - left)
            frame += 1


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_video_frames_are_the_right_ones(tmp_path, version):
    world = PointWorld(size=64)
    demos = record(tmp_path / "a", world, images="video")
    folder = tmp_path / "a" if version == "v2.1" else convert_to_v30(tmp_path / "a", tmp_path / "b")
    dataset = Dataset(folder)
    pictures = np.stack([observation["main_images"] for observations, _ in demos for observation in observations]).astype(int)
    for frame in range(len(dataset)):
        error = np.abs(pictures - dataset[frame]["main_images"]).mean((1, 2, 3))
        assert error[frame] < 6 and error[frame] == error.min(), "H.264 is lossy, but the nearest picture must be the frame itself"


def test_the_files_are_what_other_readers_expect(tmp_path, world):
    demos = record(tmp_path, world)
    info = json.loads((tmp_path / "meta/info.json").read_text())
    assert info["codebase_version"] == "v2.1" and info["total_episodes"] == 3 and info["splits"] == {"train": "0:3"} and info["video_path"] is None
    assert info["features"]["observation.images.wrist0"] == {"dtype": "image", "shape": [16, 16, 3], "names": ["height", "width", "channel"]}
    table = pq.read_table(tmp_path / "data/chunk-000/episode_000001.parquet")
    assert table.schema.field("observation.state").type == pa.list_(pa.float32(), 2) and table.schema.field("timestamp").type == pa.float32()
    described = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert described["observation.images.top"] == {"_type": "Image"} and described["action"]["_type"] == "Sequence"
    assert table["index"].to_pylist()[0] == len(demos[0][1]) and np.allclose(np.diff(table["timestamp"].to_pylist()), 0.1)
    assert table["next.success"].to_pylist()[-1] is True
    stats = json.loads((tmp_path / "meta/episodes_stats.jsonl").read_text().splitlines()[0])["stats"]
    assert np.allclose(stats["action"]["mean"], demos[0][1].mean(0)) and np.shape(stats["observation.images.top"]["mean"]) == (3, 1, 1)

    v30 = convert_to_v30(tmp_path, tmp_path / "v30")
    info = json.loads((v30 / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and "total_chunks" not in info and info["data_files_size_in_mb"] == 100
    row = pq.read_table(v30 / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[1]
    assert row["dataset_from_index"] == len(demos[0][1]) and row["data/file_index"] == 0 and "stats/action/mean" in row


def test_statistics_are_exact(tmp_path, world):
    actions = np.concatenate([actions for _, actions in record(tmp_path, world)]).astype(np.float64)
    stats = Dataset(tmp_path).statistics["actions"]
    assert np.allclose(stats["std"], actions.std(0)) and np.allclose(stats["q99"], np.quantile(actions, 0.99, axis=0)) and stats["count"] == [len(actions)]


def test_a_killed_recording_goes_on(tmp_path, world):
    record(tmp_path, world, 2)
    for name in ("episodes.jsonl", "episodes_stats.jsonl"):  # as if killed in the middle of the third episode's lines
        with (tmp_path / "meta" / name).open("a") as file:
            file.write('{"episode_index": 2, "len')
    (tmp_path / "data/chunk-000/episode_000002.parquet").write_bytes(b"half a file")
    info = json.loads((tmp_path / "meta/info.json").read_text())
    (tmp_path / "meta/info.json").write_text(json.dumps(info | {"total_episodes": 1, "total_frames": 1}))
    writer = DatasetWriter(tmp_path, world.interface, fps=10)
    assert len(writer) == 2
    observations, actions = episode(world, 9)
    assert writer.add_episode(observations, actions, {"next.success": np.zeros(len(actions), bool)}) == 2
    dataset = Dataset(tmp_path)
    assert len(dataset.episodes) == 3 and np.array_equal(dataset[len(dataset) - 1]["main_images"], observations[-1]["main_images"])
    assert dataset.info["total_frames"] == len(dataset)


def test_extending_needs_the_same_layout(tmp_path, world):
    record(tmp_path, world, 1)
    with pytest.raises(DatasetError, match="other fps"):
        DatasetWriter(tmp_path, world.interface, fps=20)
    with pytest.raises(DatasetError, match="other features"):
        DatasetWriter(tmp_path, PointWorld(size=8).interface, fps=10)
    writer = DatasetWriter(tmp_path, world.interface, fps=10)
    observations, actions = episode(world, 0)
    with pytest.raises(ValueError, match=r"earlier episodes have the columns \['next.success'\]"):
        writer.add_episode(observations, actions)
    with pytest.raises(ValueError, match="one action for each observation"):
        writer.add_episode(observations, actions[:-1])
    with pytest.raises(ValueError, match="not finite, at step 0"):
        writer.add_episode(observations, actions * np.nan)
    with pytest.raises(ValueError, match="at least one step"):
        writer.add_episode([], actions[:0])


def test_broken_files_are_named(tmp_path, world):
    record(tmp_path, world)
    file = tmp_path / "data/chunk-000/episode_000001.parquet"
    whole = file.read_bytes()
    table = pq.read_table(file)

    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match="episode_000001.parquet is not a readable parquet file"):
        Dataset(tmp_path)
    file.unlink()
    with pytest.raises(DatasetError, match="episode_000001.parquet is missing"):
        Dataset(tmp_path)
    pq.write_table(table.slice(1), file)
    with pytest.raises(DatasetError, match=r"episode 1 should have \d+ rows"):
        Dataset(tmp_path)
    pictures = table["observation.images.top"].to_pylist()
    pictures[1]["bytes"] = pictures[1]["bytes"][:40]
    place = table.column_names.index("observation.images.top")
    pq.write_table(table.set_column(place, "observation.images.top", pa.array(pictures)), file)
    dataset = Dataset(tmp_path)
    with pytest.raises(DatasetError, match=r"episode_000001.parquet: column 'observation.images.top', row 1"):
        dataset[dataset.episodes[1].start + 1]
    actions = np.array(table["action"].to_pylist(), np.float32)
    actions[1, 0] = np.nan
    place = table.column_names.index("action")
    pq.write_table(table.set_column(place, "action", pa.FixedSizeListArray.from_arrays(pa.array(actions.ravel()), 2)), file)
    with pytest.raises(DatasetError, match="column 'action', row 1 is not finite"):
        Dataset(tmp_path)
    with pytest.raises(DatasetError, match="no meta/info.json"):
        Dataset(tmp_path / "meta")


def test_datasets_of_others_are_mapped_or_refused(tmp_path):
    """An openpi-style set: image, wrist_image, state, actions, and no file of ours."""
    (tmp_path / "meta").mkdir()
    (tmp_path / "data/chunk-000").mkdir(parents=True)
    feature = {
        "image": ("image", [4, 4, 3]),
        "wrist_image": ("image", [4, 4, 3]),
        "state": ("float32", [8]),
        "actions": ("float32", [7]),
        "task_index": ("int64", [1]),
    }
    info = {
        "codebase_version": "v2.1",
        "fps": 10,
        "chunks_size": 1000,
        "video_path": None,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    }
    info["features"] = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in feature.items()}
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    (tmp_path / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "put it there"}\n')
    (tmp_path / "meta/episodes.jsonl").write_text('{"episode_index": 0, "tasks": ["put it there"], "length": 2}\n')
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(buffer, "PNG")
    cell = {"bytes": buffer.getvalue(), "path": None}
    rows = {"image": [cell] * 2, "wrist_image": [cell] * 2, "state": [[0.0] * 8] * 2, "actions": [[1.0] * 7] * 2, "task_index": [0, 0]}
    pq.write_table(pa.table(rows), tmp_path / "data/chunk-000/episode_000000.parquet")

    item = Dataset(tmp_path)[1]
    assert item["wrist_images"].shape == (4, 4, 3) and (item["main_images"] == 7).all() and item["task_descriptions"] == "put it there"
    info["features"]["front"] = {"dtype": "image", "shape": [4, 4, 3]}
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match=r"2 cameras that could be the main one \(image, front\)"):
        Dataset(tmp_path)
    assert len(Dataset(tmp_path, columns=Columns("image", "state", "actions"))) == 2


def test_loader_sees_every_frame_once_per_epoch_and_resumes(tmp_path, world):
    record(tmp_path, world)
    dataset = Dataset(tmp_path, horizon=2)
    total = len(dataset)
    loader = Loader([dataset], batch_size=total, seed=1)
    first, second = loader.indices(0), loader.indices(1)
    assert sorted(first) == sorted(second) == list(range(total)) and list(first) != list(second)

    whole = Loader([dataset], batch_size=4, seed=1)
    ranks = [Loader([dataset], batch_size=2, seed=1, rank=rank, world=2) for rank in range(2)]
    for step in range(5):
        assert np.array_equal(whole.indices(step), np.concatenate([rank.indices(step) for rank in ranks])), "two ranks share one order"

    batches = [next(whole) for _ in range(4)]
    resumed = Loader([dataset], batch_size=4, seed=1)
    resumed.step = 3
    again = next(resumed)
    assert all(np.array_equal(batches[3][key], again[key]) for key in again)
    assert again["actions"].shape == (4, 2, 2) and len(again["task_descriptions"]) == 4


def test_loader_mixes_by_weight(tmp_path, world):
    record(tmp_path / "a", world, 1)
    record(tmp_path / "b", world, 4)
    a, b = Dataset(tmp_path / "a"), Dataset(tmp_path / "b")
    loader = Loader([a, b], batch_size=2000, weights=[3, 1])
    assert 0.71 < (loader.indices(0) < len(a)).mean() < 0.79  # 0.75 +- 4 standard errors
    with pytest.raises(ValueError, match="2 positive numbers"):
        Loader([a, b], batch_size=2, weights=[1, 0])


def test_datasets_that_do_not_go_together_are_refused_by_name(tmp_path, world):
    record(tmp_path / "a", world, 1)
    a = Dataset(tmp_path / "a")
    for name, other, fps, words in (
        ("told", PointWorld(size=16, wrists=2, extras=1, told=True), 10, "told has 4 numbers in states, .*a has 2"),
        ("fast", world, 20, "fast has 20 frames per second, .*a has 10"),
        ("small", PointWorld(size=8, wrists=2, extras=1), 10, r"small has \[\[8, 8, 3\]\] as shapes of main_images, .*a has \[\[16, 16, 3\]\]"),
        ("blind", PointWorld(size=16), 10, r"blind has \[\] as shapes of wrist_images"),
    ):
        observations, actions = episode(other, 0)
        DatasetWriter(tmp_path / name, other.interface, fps=fps).add_episode(observations, actions)
        with pytest.raises(DatasetError, match=words + ".*datasets of one loader must agree .*rl_co.md"):
            Loader([a, Dataset(tmp_path / name)], batch_size=1)


def test_an_empty_episode_a_broken_video_and_missing_statistics_are_named(tmp_path, world):
    record(tmp_path, world, 2, images="video")
    dataset = Dataset(tmp_path)
    film = dataset.episodes[1].videos["observation.images.top"][0]
    whole = film.read_bytes()
    for content, words in ((whole[: len(whole) // 3], "is no readable video"), (b"", "is no readable video")):
        film.write_bytes(content)
        with pytest.raises(DatasetError, match=rf"episode_000001.mp4 {words}"):
            dataset[dataset.episodes[1].start]
    film.unlink()
    with pytest.raises(DatasetError, match="episode_000001.mp4"):
        dataset[dataset.episodes[1].start]
    stats, lines = tmp_path / "meta/episodes_stats.jsonl", tmp_path / "meta/episodes.jsonl"
    stats.write_text(stats.read_text().splitlines()[0] + "\n")
    with pytest.raises(DatasetError, match=r"episodes_stats.jsonl has no statistics of episode 1, .*DatasetWriter"):
        convert_to_v30(tmp_path, tmp_path / "new")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    rows[0]["length"] = 0
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DatasetError, match=r"episode 0 has no frames, .*episodes=\["):
        Dataset(tmp_path)


def test_import_brings_no_torch():
    code = "import vlahub.dataset, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
