"""Reads frames of a video: a file, which PyAV decodes (the extra ``video``), or a folder that holds them as images.

The frames of one video stand behind one image tag, without boundary tokens between them, so that T advances by one for
each frame (NEO paper, section 3.2).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from neo_components.data.image.files import open_image
from neo_components.data.skip_counts import SampleError

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")
QUALITY = 95


def check_rate(frames: int | None, fps: float | None) -> None:
    """Checks how many frames are taken.

    Raises:
        ValueError: if a number is not positive.
    """
    if (frames is not None and frames < 1) or (fps is not None and not fps > 0):
        raise ValueError(f"frames and fps must be positive or None, got frames={frames}, fps={fps}")


def read_frames(path: Path, frames: int | None = 8, fps: float | None = None) -> list[bytes]:
    """Some frames of a video, as image files.

    Args:
        path: a video file, or a folder of images whose names are in order.
        frames: how many, evenly spaced, each in the middle of its part; a shorter video gives all it has. ``None``
            takes all.
        fps: so many per second instead, for a video file.

    Returns:
        The bytes of each frame's image file; JPEG if it was decoded here.

    Raises:
        ModuleNotFoundError: if it is a video file and PyAV is not installed.
        SampleError: (a ``ValueError``) if there is no such video, or it cannot be decoded.
        ValueError: if the numbers are not positive.
    """
    check_rate(frames, fps)
    if path.is_dir():
        images = sorted(file for file in path.iterdir() if file.suffix.lower() in _IMAGES)
        if not images:
            raise SampleError(f"no frames in {path}", "video")
        if fps is not None:
            raise ValueError(f"fps needs a video file; {path} is a folder of frames, whose rate is not known")
        chosen = [images[position].read_bytes() for position in evenly(len(images), frames)]
        for number, data in enumerate(chosen):
            open_image(data, f"frame {number} of {path}")
        return chosen
    if not path.is_file():
        raise SampleError(f"no video {path.name!r} in {path.parent}", "missing_image")
    return _decode(path, frames, fps)


_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def evenly(count: int, wanted: int | None) -> Sequence[int]:
    """Indices of ``wanted`` frames of ``count``, each in the middle of its part."""
    if wanted is None or wanted >= count:
        return range(count)
    return [(2 * position + 1) * count // (2 * wanted) for position in range(wanted)]


def _decode(path: Path, frames: int | None, fps: float | None) -> list[bytes]:
    try:
        import av
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} is a video; decoding it needs PyAV: pip install 'neo-components[video]', or give a folder of "
            "frames"
        ) from None
    try:
        with av.open(str(path)) as container:
            times = [float(frame.time or 0) for frame in container.decode(video=0)]
        wanted = set(_at_rate(times, fps) if fps is not None else evenly(len(times), frames))
        with av.open(str(path)) as container:
            chosen = [_jpeg(f.to_image()) for n, f in enumerate(container.decode(video=0)) if n in wanted]
    except (av.FFmpegError, IndexError) as error:  # IndexError: no video stream
        raise SampleError(f"{path} cannot be decoded ({error})", "video") from None
    if not chosen:
        raise SampleError(f"{path} has no frames", "video")
    return chosen


def _at_rate(times: Sequence[float], fps: float) -> list[int]:
    """The first frame at or behind each multiple of ``1 / fps`` seconds."""
    chosen: list[int] = []
    for number, time in enumerate(times):
        if time - times[0] >= len(chosen) / fps - 1e-6:
            chosen.append(number)
    return chosen


def _jpeg(image: object) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY)  # type: ignore[attr-defined]
    return data.getvalue()
