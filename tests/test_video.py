import errno
import subprocess

import numpy as np
import pytest

from vlahub import video


def pictures(count=7, height=24, width=31):
    return [np.full((height, width, 3), (200, i * 10, 20), np.uint8) for i in range(count)]


def test_an_mp4_has_every_frame_at_the_padded_size_and_the_right_colours():
    data = video.encode(iter(pictures()), fps=12.5)
    frames = video.decode(data)
    assert frames.shape == (7, 24, 32, 3)
    assert np.abs(frames[3, :, :31].mean((0, 1)) - (200, 30, 20)).max() < 8  # a lossy codec, but not swapped channels or levels

    import io

    import av

    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].average_rate == 12.5 and container.streams.video[0].codec_context.name == "h264"


def test_even_repeats_the_last_row_and_column_only_where_needed():
    odd = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    padded = video.even(odd)
    assert padded.shape == (4, 6, 3) and (padded[:3, :5] == odd).all() and (padded[3, :5] == odd[2]).all()
    assert video.even(padded).shape == (4, 6, 3)


def test_the_caption_stands_above_the_picture_and_hides_nothing():
    picture = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    captioned = video.caption(picture, "go to the red target", "step 3/20   reward 0.00")
    factor = captioned.shape[1] // 24
    assert captioned.shape[1] >= video.LEAST_WIDTH and captioned.shape[0] % 2 == 0
    below = len(captioned) - 24 * factor
    assert (captioned[below::factor, ::factor] == picture).all()
    strip = captioned[:below]
    assert (strip.max(axis=(1, 2)) > 150).any()  # there is ink
    assert not np.array_equal(captioned, video.caption(picture, "go to the blue target", "step 3/20   reward 0.00"))
    assert not np.array_equal(captioned, video.caption(picture, "go to the red target", "step 4/20   reward 0.00"))


def test_a_long_instruction_is_wrapped_and_stays_within_the_width():
    picture = np.zeros((240, 320, 3), np.uint8)
    short, long = (video.caption(picture, "word " * n, "step 1") for n in (3, 60))
    assert long.shape[0] > short.shape[0] and long.shape[1] == short.shape[1] == 320
    assert long[:-240, -3:].max() < 60  # no ink runs into the right margin


@pytest.mark.parametrize(
    ("frames", "words"),
    [([], "at least one frame"), ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 10, 3), np.uint8)], r"frame 1 has shape \[8, 10, 3\]")],
)
def test_bad_frames_are_refused(frames, words):
    with pytest.raises(ValueError, match=words):
        video.encode(frames, fps=10)


def test_a_picture_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], not float64"):
        video.caption(np.zeros((8, 8, 3)), "", "")


def test_a_full_disk_raises_and_leaves_no_half_written_file(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tiny file system needs root")
    try:
        with pytest.raises(OSError) as error:
            video.save(tmp_path / "long.mp4", bytes(100_000))
        assert error.value.errno == errno.ENOSPC
        assert not list(tmp_path.iterdir())
        assert video.save(tmp_path / "short.mp4", b"x" * 100).read_bytes() == b"x" * 100
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
