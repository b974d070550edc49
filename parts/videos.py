"""Wan's latents to frames, frames to mp4 files, and files to frames.

    film = frames_of(vae, blocks)  # an iterator: frame by frame, in constant memory
    write_mp4(Path("fox.mp4"), film, fps=16)
    frames, fps = read_video(Path("fox.mp4"))

Frames are uint8. Files need imageio and ffmpeg, for which a run asks at its start (require_mp4).
"""

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn

import running

QUALITY = 8  # of imageio's 0 to 10
WAITING = 4  # parts of a video that wait for the encoder at most


# ------------------------------------------------------------------------------- latents and frames
def frames_of(vae: nn.Module, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The frames (B, 3, 1 or 4, H, W) uint8 of latents, one latent frame after another.

    vae is diffusers' AutoencoderKLWan, and blocks are latents (B, 16, n, h, w) as the transformer
    has them, which follow each other in time. The first latent frame makes one frame, the others
    four each, and H = 8 h. They are those of vae.decode of all latents together.

    The decoder's convolutions look two frames back in time, and a cache keeps those, so a video may
    be of any length. The cache is this iterator's own and ends with it. It computes in bfloat16 on
    a GPU.
    """
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape)
    std = torch.tensor(vae.config.latents_std).view(shape)
    cache = [None] * vae._cached_conv_counts["decoder"]  # the decoder fills it
    first = True
    for block in blocks:
        z = block * std.to(block) + mean.to(block)
        for frame in z.split(1, 2):
            yield to_pixels(decode(vae, frame, cache, first))
            first = False


@torch.no_grad()
def decode(vae: nn.Module, z: Tensor, cache: list, first: bool) -> Tensor:
    """A latent frame (B, 16, 1, h, w), denormalised -> frames in [-1, 1] and a little beyond."""
    with running.autocast(z):
        z = vae.post_quant_conv(z)
        return vae.decoder(z, feat_cache=cache, feat_idx=[0], first_chunk=first)


def to_pixels(x: Tensor) -> Tensor:
    """Frames in [-1, 1], and a little beyond -> uint8."""
    return (127.5 * x.float() + 127.5).round().clamp(0, 255).to(torch.uint8)


def compile_decoder(vae: nn.Module, backend: str | Callable = "inductor") -> None:
    """Compile the decoder of an AutoencoderKLWan, as frames_of calls it.

    It becomes three programs for each shape of latents: one for the first latent frame, whose cache
    is empty, one for the second, whose cache has a frame, and one for all others. Block by block
    there would be more, because each block is told its own place in the cache.
    """
    vae.decoder.compile(backend=backend, dynamic=False)


# ---------------------------------------------------------------------------------------- mp4 files
def require_mp4() -> None:
    """ValueError, which says what to install: mp4 files can be neither written nor read."""
    fix = "no mp4 can be written or read: pip install imageio imageio-ffmpeg"
    try:
        import imageio  # noqa: F401
        from imageio_ffmpeg import get_ffmpeg_exe

        program = get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ValueError(fix) from error
    running.require(shutil.which(program), f"{fix}, and set no IMAGEIO_FFMPEG_EXE but a program's")


def write_mp4(path: Path, frames: Iterable[Tensor], fps: int = 16) -> None:
    """Write one video to path, whole or not at all; its folder is made.

    frames are (1, 3, n, H, W) uint8, as frames_of has them, on any device. A thread copies them
    from the GPU and encodes them while the next ones are computed. What fails there is raised here.
    """
    import imageio.v2 as imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"_{path.name}")
    try:
        writer = imageio.get_writer(unfinished, format="FFMPEG", fps=fps, quality=QUALITY)
        # imageio's own context does not close after an error, and ffmpeg would still write the file
        with closing(writer):
            append_all(writer, frames)
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def append_all(file, frames: Iterable[Tensor]) -> None:
    """Append frames to a writer of imageio, in a thread, of which WAITING parts lag behind."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(1) as thread:
        for part in frames:
            waiting.append(thread.submit(append, file, part))
            if len(waiting) > WAITING:
                waiting.popleft().result()
        for done in waiting:
            done.result()


def append(file, part: Tensor) -> None:
    """Append frames (1, 3, n, H, W) to a writer of imageio, which wants (H, W, 3) each."""
    (video,) = part
    for image in video.permute(1, 2, 3, 0).cpu().numpy():
        file.append_data(image)


def read_video(path: Path) -> tuple[Tensor, float]:
    """The frames (T, 3, H, W) uint8 of a video file, and how many a second are shown.

    ValueError, which names the file: it is missing or empty, or broken, or no video.
    """
    import imageio.v2 as imageio
    import numpy as np

    running.require(path.is_file(), f"no such video: {path}")
    try:
        with closing(imageio.get_reader(path, format="FFMPEG")) as file:
            told = file.get_meta_data()
            images = list(file.iter_data())
        fps = float(told["fps"])
        running.require(images and fps > 0, "it has no frame")

        # A file whose header comes first can be cut without an error of ffmpeg. What it tells is
        # not exact, for it may be of a sound that lasts a little longer than the pictures.
        count = round(told["duration"] * fps)
        running.require(
            len(images) >= 0.9 * count, f"{len(images)} of some {count} frames are there"
        )
    except Exception as error:  # imageio has errors of all kinds, with all that ffmpeg printed
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        raise ValueError(f"{path} is no whole video ({reason:.150}): make it again") from error
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), fps
