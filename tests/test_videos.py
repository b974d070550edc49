"""parts/videos.py: latents to frames, frames to mp4 files, and files to frames.

The VAE is diffusers' own for Wan, with random weights and few channels. The files are written and
read by the ffmpeg that imageio brings along.
"""

import gc
import math
import sys
import threading
import weakref

import imageio.v2 as imageio
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.testing import assert_close

import running
from parts import videos

torch.set_num_threads(1)  # the networks are small


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, whichever others run before it."""
    torch.manual_seed(0)


@pytest.fixture
def vae():
    """Wan's VAE, tiny: 4 channels a layer, and a third of the real one's blocks."""
    net = AutoencoderKLWan(
        base_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=0,
    )
    return net.eval().requires_grad_(False)


def latents(frames=9, batch=1):
    """Latents of videos of 32 pixels, as the transformer has them.

    The VAE's mean and deviation are taken out of them.
    """
    return torch.randn(batch, 16, frames, 4, 4)


def film_of(vae, z, sizes=2):
    """All frames of latents that come in blocks of these sizes, (B, 3, T, H, W)."""
    return torch.cat([*videos.frames_of(vae, z.split(sizes, 2))], 2)


# -------------------------------------------------------------------------------- latents to frames
@torch.no_grad()
def test_frames_one_by_one_are_what_the_vae_decodes_at_once(vae):
    """Latents in three blocks, decoded frame by frame, are pictures of one decoding.

    The oracle is the VAE's own `decode` of all nine, of two videos.
    """
    z = latents(batch=2)
    parts = [*videos.frames_of(vae, z.split([4, 2, 3], 2))]

    mean = torch.tensor(vae.config.latents_mean).view(-1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)
    want = 127.5 * vae.decode(z * std + mean).sample + 127.5

    assert [part.shape[2] for part in parts] == [1] + [4] * 8
    assert_close(torch.cat(parts, 2), want.round().clamp(0, 255).byte())


def test_a_film_has_no_graph_and_lets_its_blocks_have_one(vae):
    """uint8 has no gradient, so a graph would only hold memory.

    The blocks come out of a network, though, which may be in training while its film is made.
    """
    inside = []
    vae.decoder.register_forward_hook(lambda *_: inside.append(torch.is_grad_enabled()))
    outside = []

    def blocks():
        for block in latents(3).requires_grad_().split(1, 2):
            outside.append(torch.is_grad_enabled())
            yield block

    assert len([*videos.frames_of(vae, blocks())]) == 3
    assert inside == [False] * 3
    assert outside == [True] * 3


def test_the_decoder_is_autocast(vae, monkeypatch):
    """On a GPU it computes in bfloat16, and the pixels are rounded in float32.

    Here a CPU plays that part. The frames are those of float32 to a level of 256.
    """
    z = latents(3)
    want = film_of(vae, z)
    types = []
    vae.decoder.register_forward_hook(lambda net, given, made: types.append(made.dtype))
    monkeypatch.setattr(running, "autocast", lambda x: torch.autocast("cpu", torch.bfloat16))

    film = film_of(vae, z)

    assert types == [torch.bfloat16] * 3
    assert film.dtype == torch.uint8
    assert 0 < (film.float() - want.float()).abs().mean() < 1


def watch_cache(vae):
    """-> a list, to which each decoded frame adds weak references to all that is cached then."""
    cached = []

    def note(net, given, named, made):
        tensors = [v for v in named["feat_cache"] if isinstance(v, torch.Tensor)]
        cached.extend(weakref.ref(v) for v in tensors)

    vae.decoder.register_forward_hook(note, with_kwargs=True)
    return cached


def alive(cached):
    """How many of the references are to something.

    What only waits for Python's garbage collection does not count.
    """
    gc.collect()
    return sum(ref() is not None for ref in cached)


def test_a_film_that_stops_early_leaves_no_cache(vae):
    """It is dropped after two latent frames. The next film is what it would be without it."""
    z = latents(4)
    want = film_of(vae, z)
    cached = watch_cache(vae)

    film = videos.frames_of(vae, [z])
    next(film)
    next(film)
    assert alive(cached) > 10
    del film

    assert alive(cached) == 0
    assert film_of(vae, z).equal(want)
    assert alive(cached) == 0


def test_a_film_whose_blocks_fail_leaves_no_cache(vae):
    """The network that makes the latents has run out of memory, say.

    Who catches that, to go on with less, needs what the cache held.
    """
    cached = watch_cache(vae)

    def blocks():
        yield latents(2)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        for _ in videos.frames_of(vae, blocks()):
            pass

    assert len(cached) > 10
    assert alive(cached) == 0


def test_two_films_at_once_do_not_mix(vae):
    """Each has a cache of its own, though they share the VAE."""
    first, second = latents(3), latents(3)
    wanted = [film_of(vae, first), film_of(vae, second)]

    parts = zip(videos.frames_of(vae, [first]), videos.frames_of(vae, [second]), strict=True)

    films = [torch.cat(film, 2) for film in zip(*parts, strict=True)]
    assert films[0].equal(wanted[0])
    assert films[1].equal(wanted[1])
    assert not wanted[0].equal(wanted[1])


def bytes_alive():
    """The bytes of all tensors that are alive.

    Tensors that share a storage count once.
    """
    gc.collect()
    tensors = [v for v in gc.get_objects() if type(v) is torch.Tensor]
    storages = [v.untyped_storage() for v in tensors]
    return sum({v.data_ptr(): v.nbytes() for v in storages}.values())


def test_a_long_film_takes_constant_memory(vae):
    """The cache is full after two latent frames, and nothing else grows with the film."""
    blocks = latents(5).split(1, 2)
    held = [bytes_alive() for _ in videos.frames_of(vae, blocks)]
    assert held[0] < held[1]
    assert len({*held[2:]}) == 1


def test_a_compiled_decoder_is_three_programs_and_makes_the_same_frames(vae):
    """Three however long the film is, and none for the next one.

    A break in a program would make two of it, so the count says that there is none.
    """
    z = latents()
    want = film_of(vae, z)
    programs = []

    def backend(program, example):
        programs.append(program)
        return program.forward

    torch._dynamo.reset()
    videos.compile_decoder(vae, backend=backend)
    film = film_of(vae, z)
    assert len(programs) == 3
    again = film_of(vae, z, sizes=3)

    assert len(programs) == 3
    assert film.equal(want)
    assert again.equal(want)


# ---------------------------------------------------------------------------------------- mp4 files
def moving(count, size=64):
    """Frames (1, 3, count, size, size) of soft stripes that move, each colour its own way."""
    at = torch.arange(size) / size
    frames = []
    for i in range(count):
        waves = [at + i / 40, at - i / 60, at + 0.3]
        colours = [(math.tau * wave).sin().mul(100).add(128).byte() for wave in waves]
        frames.append(torch.stack(colours)[:, None].expand(3, size, size))
    return torch.stack(frames, 1)[None]


def test_a_written_video_is_read_back(tmp_path):
    """33 frames in the parts that frames_of makes, in their order, at 16 a second.

    The codec is lossy, so the pixels are nearly the same; a frame earlier or later is further off.
    """
    film = moving(33)
    path = tmp_path / "videos/fox.mp4"

    videos.write_mp4(path, film.split([1] + [4] * 8, 2))
    frames, fps = videos.read_video(path)

    assert frames.dtype == torch.uint8
    assert frames.shape == (33, 3, 64, 64)
    assert fps == 16
    want = film[0].transpose(0, 1).float()
    errors = (frames.float() - want).abs().mean((1, 2, 3))
    assert errors.max() < 4
    assert (frames[1:].float() - want[:-1]).abs().mean() > 2 * errors.mean()
    assert [p.name for p in path.parent.iterdir()] == ["fox.mp4"]


def test_a_video_of_another_rate_is_read_with_it(tmp_path):
    """VideoAlign sees two frames of each second, so it must know how many there are.

    Videos to be judged may be anyone's.
    """
    videos.write_mp4(tmp_path / "a.mp4", [moving(12)], fps=24)
    frames, fps = videos.read_video(tmp_path / "a.mp4")
    assert len(frames) == 12
    assert fps == 24


def failing_film():
    """A film that breaks off in the middle.

    Four frames of it are in the encoder by then.
    """
    yield moving(4)
    raise RuntimeError("no memory")


def test_a_film_that_fails_leaves_no_file(tmp_path):
    """There is nothing with which `sample --resume` would take the video for done."""
    with pytest.raises(RuntimeError, match="no memory"):
        videos.write_mp4(tmp_path / "a.mp4", failing_film())
    assert not [*tmp_path.iterdir()]


def test_a_film_that_fails_leaves_the_file_that_there_was(tmp_path):
    """The old video is whole, and of the new one there is nothing.

    A run shows its samples of a step anew when it is resumed.
    """
    path = tmp_path / "a.mp4"
    videos.write_mp4(path, [moving(4)])
    before = path.read_bytes()

    with pytest.raises(RuntimeError, match="no memory"):
        videos.write_mp4(path, failing_film())

    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_what_fails_in_the_thread_is_raised(tmp_path):
    """No mp4 has five colours.

    The frame is the last one, so the error must be asked for when there is nothing more to write.
    """
    film = [moving(4), torch.zeros(1, 5, 1, 64, 64, dtype=torch.uint8)]
    with pytest.raises(ValueError):
        videos.write_mp4(tmp_path / "a.mp4", film)
    assert not [*tmp_path.iterdir()]


def test_a_film_goes_on_while_it_is_written(tmp_path, monkeypatch):
    """The first part waits in the encoder until three more have been made.

    The film does not run away either: no more than a few parts wait.
    """
    ahead = []
    written = []
    four_are_made = threading.Event()
    append = videos.append

    def slow_append(file, part):
        assert four_are_made.wait(timeout=20), "the film waited for the encoder"
        append(file, part)
        written.append(part)

    def film():
        for number, part in enumerate(moving(20).split(1, 2), 1):
            ahead.append(number - len(written))
            if number == 4:
                four_are_made.set()
            yield part

    monkeypatch.setattr(videos, "append", slow_append)
    videos.write_mp4(tmp_path / "a.mp4", film())

    assert len(written) == 20
    assert 4 <= max(ahead) <= videos.WAITING + 2


# --------------------------------------------------------------------------------------- bad videos
def write_noise(path, header_first):
    """A video of 60 frames, whose header is its last part or, as on web pages, the first."""
    options = ["-movflags", "+faststart"] if header_first else []
    writer = imageio.get_writer(
        path,
        format="FFMPEG",
        fps=16,
        output_params=options,
    )
    for image in torch.randint(256, (60, 64, 64, 3), dtype=torch.uint8):
        writer.append_data(image.numpy())
    writer.close()


@pytest.mark.parametrize(
    "header_first, spoil",
    [
        (False, lambda whole: whole[:-400]),
        (True, lambda whole: whole[: len(whole) // 2]),
        (True, lambda whole: whole[:100]),
        (False, lambda whole: b""),
        (False, lambda whole: b"no video\n" * 100),
    ],
    ids=[
        "cut",
        "cut behind its header",
        "cut in its header",
        "empty",
        "text",
    ],
)
def test_a_bad_video_is_named_in_one_line(tmp_path, header_first, spoil):
    """One among hundreds of a folder: its user must know which.

    Where the header comes first, ffmpeg reads what there is of a cut file without an error, and the
    scores would be those of another video.
    """
    path = tmp_path / "fox-3.mp4"
    write_noise(path, header_first)
    assert len(videos.read_video(path)[0]) == 60
    path.write_bytes(spoil(path.read_bytes()))

    with pytest.raises(ValueError) as caught:
        videos.read_video(path)

    said = str(caught.value)
    assert f"{path} is no whole video" in said
    assert "\n" not in said
    assert len(said) < 300


def test_a_missing_video_is_named(tmp_path):
    """A list of videos and their folder do not go together."""
    with pytest.raises(ValueError, match=r"no such video: .*/fox-3\.mp4"):
        videos.read_video(tmp_path / "fox-3.mp4")


def no_module(monkeypatch):
    """imageio alone is installed, which brings no ffmpeg along.

    None in the place of a module makes its import fail.
    """
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)


def no_program(monkeypatch):
    """imageio-ffmpeg came without its program, as on platforms that it has none for."""

    def not_found():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", not_found)


def wrong_program(monkeypatch):
    """imageio-ffmpeg takes what this variable says, and does not look."""
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")


@pytest.mark.parametrize("lose", [no_module, no_program, wrong_program])
def test_a_missing_backend_is_found_before_a_run(monkeypatch, lose):
    """A run would notice at its first video, some hours later.

    Where nothing is missing nothing is said.
    """
    videos.require_mp4()

    lose(monkeypatch)

    with pytest.raises(ValueError, match=r"pip install imageio imageio-ffmpeg") as caught:
        videos.require_mp4()
    assert "\n" not in str(caught.value)
