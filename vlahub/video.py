"""mp4 without a system ffmpeg, and the strip over each picture that says what happens in it.

frames = [caption(picture, "click the bell", "step 12   reward 0.00")]
save("click.mp4", encode(frames, fps=25))
"""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LEAST_WIDTH = 320  # narrower pictures are enlarged by a whole factor, so that the caption can be read
LEAST_TEXT = 13  # pixels; wide pictures get larger letters, because they are shown smaller
MARGIN = 6
INK = {"plain": (235, 235, 235), "good": (110, 220, 130), "bad": (250, 130, 120)}


NO_VIDEOS = "there are no videos, because the package av is not installed: pip install av"


def available() -> bool:
    """Whether `encode` and `decode` can work. Training and evaluation go on without, and say so."""
    return importlib.util.find_spec("av") is not None


def caption(picture: np.ndarray, instruction: str, status: str, mood: str = "plain") -> np.ndarray:
    """A picture [H, W, 3] with a strip on top of it: the status line in the colour of `mood` ("plain", "good", "bad") and the instruction.

    The strip is added and does not cover the scene; it stands above, because browsers lay their controls over the lower edge. Its height depends on the
    instruction and the width only, hence all pictures of an episode come out at the same size. Both sides are even, as H.264 wants them.
    """
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"a picture must be uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}")
    factor = -(-LEAST_WIDTH // picture.shape[1])
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = picture.shape[:2]

    size = max(LEAST_TEXT, width // 30)
    font = ImageFont.load_default(size)
    lines = [status, *_wrap(instruction, font, width - 2 * MARGIN)]
    line_height = size + 4
    strip = len(lines) * line_height + 2 * MARGIN
    canvas = Image.new("RGB", (width, strip + height), (20, 20, 20))
    canvas.paste(Image.fromarray(picture), (0, strip))
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + i * line_height), line, font=font, fill=INK[mood] if i == 0 else INK["plain"])
    return even(np.asarray(canvas))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def even(picture: np.ndarray) -> np.ndarray:
    """The picture with its last row or column repeated where the height or width is odd: H.264 in yuv420p halves both for colour."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def encode(frames: Iterable[np.ndarray], fps: float) -> bytes:
    """Pictures [H, W, 3] uint8, all of one size -> an H.264 mp4 that every browser plays. Takes a generator: one frame is held at a time.

    The file is made in memory (an episode is well under a few megabytes), so a full disk fails in one place, `save`.
    """
    import av

    buffer = io.BytesIO()
    stream = shape = None
    with av.open(buffer, "w", format="mp4") as container:
        for number, frame in enumerate(frames):
            frame = even(np.asarray(frame))
            if stream is None:
                # crf 23 is x264's default quality; "veryfast" because two cores also run the simulation
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "23", "preset": "veryfast"})
                stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
                shape = frame.shape
            if frame.shape != shape:
                raise ValueError(f"frame {number} has shape {list(frame.shape)}, the frames before it {list(shape or ())}; a video has one size")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if stream is None:
            raise ValueError("a video needs at least one frame")
        container.mux(stream.encode(None))
    return buffer.getvalue()


def save(path: str | Path, data: bytes) -> Path:
    """Write a file whole or not at all: under another name first, then renamed."""
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)  # a disk that ran full gets its space back
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not name its file by itself
    return path


def decode(data: bytes | str | Path) -> np.ndarray:
    """All frames of an mp4 -> [N, H, W, 3] uint8. For short videos."""
    import av

    with av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
