"""parts/images.py: which files of a folder are pictures, and which pixels they have.

The pictures are a few pixels large and are written by Pillow, some of them under a name of another
kind, for a file is read by what is in it. What they must look like is worked out by hand.
"""

import re

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base

from parts import images

RED = (255, 0, 0)
WHITE = (255, 255, 255)


def image_of(rows, mode):
    """A picture of Pillow with these bytes: rows (H, W, C), or (H, W) where a pixel is a byte."""
    pixels = np.array(rows, np.uint8)
    height, width = pixels.shape[:2]
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def opened(image, path, **options):
    """The picture, after it has been saved as path and opened again -> (H, W, 3) uint8."""
    image.save(path, **options)
    again = images.open_image(path)
    assert again.mode == "RGB"
    return np.asarray(again)


def touch(folder, *names):
    """Empty files, with the folders that they lie in."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


# ----------------------------------------------------------------------------- what a picture shows
@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_a_plain_picture_is_read_as_it_is(tmp_path, suffix):
    """These three keep every pixel, so what was saved is what is read."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)

    got = opened(image, tmp_path / f"picture.{suffix}", lossless=True)

    assert (got == pixels).all()


TURNED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_a_picture_stands_as_exif_says(tmp_path, orientation):
    """A phone stores what its sensor sees, and says in EXIF how to turn it.

    The oracle is the table of the EXIF standard, in numpy: 6, for example, is a quarter turn
    clockwise.
    """
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[Base.Orientation] = orientation

    got = opened(
        Image.fromarray(pixels),
        tmp_path / "photo.png",
        exif=exif,
    )

    want = TURNED[orientation](pixels)
    assert got.shape == want.shape
    assert (got == want).all()


def test_exif_that_is_broken_does_not_cost_a_sound_picture(tmp_path):
    """Photos on the web have it now and then; viewers show them as they are stored."""
    image = Image.new("RGB", (8, 8), RED)

    got = opened(image, tmp_path / "photo.png", exif=b"Exif\0\0garbage")

    assert (got == RED).all()


SIXTEEN = [0, 0x00FF, 0x0100, 0x8000, 0xFFFF]
EIGHT = [0, 0, 1, 128, 255]


@pytest.mark.parametrize(
    "mode, dtype, kind",
    [
        ("I;16", "<u2", "PNG"),
        ("I;16", "<u2", "TIFF"),
        ("I;16B", ">u2", "TIFF"),
        ("I", "<i4", "TIFF"),
    ],
)
def test_grey_of_16_bits_keeps_its_upper_8(tmp_path, mode, dtype, kind):
    """Pillow itself makes all above 255 white, so a depth map or a scan would be a white sheet."""
    pixels = np.array([SIXTEEN], dtype)
    image = Image.frombytes(mode, (5, 1), pixels.tobytes())

    got = opened(image, tmp_path / "scan.png", format=kind)

    with Image.open(tmp_path / "scan.png") as file:
        assert file.mode == mode
    assert (got == np.array(EIGHT)[None, :, None]).all()


def test_grey_of_16_bits_is_turned_too(tmp_path):
    """Both mendings must work on one picture; here a row becomes a column."""
    image = Image.frombytes("I;16", (5, 1), np.array([SIXTEEN], "<u2").tobytes())
    exif = Image.Exif()
    exif[Base.Orientation] = 6

    got = opened(image, tmp_path / "scan.png", exif=exif)

    assert got.shape == (5, 1, 3)
    assert got[:, 0, 0].tolist() == EIGHT


def test_what_is_transparent_lies_on_white(tmp_path):
    """A cut-out has any colour where it is transparent, which nobody is to see.

    Red is shown whole, hidden, and at an alpha of 51 / 255 = 1 / 5: a fifth of red, four of white.
    """
    image = image_of([[(*RED, 255), (*RED, 0), (*RED, 51)]], "RGBA")

    got = opened(image, tmp_path / "cut.png")

    assert got.tolist() == [[[*RED], [*WHITE], [255, 204, 204]]]


def test_grey_with_alpha_lies_on_white(tmp_path):
    """Black is shown whole and hidden, and at a fifth."""
    image = image_of([[(0, 255), (0, 0), (0, 51)]], "LA")

    got = opened(image, tmp_path / "cut.png")

    assert got[0, :, 1].tolist() == [0, 255, 204]


def palette_image(mode="P"):
    """Pixels 0, 1, 2 of a palette of red, green and blue."""
    image = image_of([[0, 1, 2]], "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image.convert(mode)


def test_a_palette_is_looked_up(tmp_path):
    """The numbers of the pixels are no colours."""
    got = opened(palette_image(), tmp_path / "logo.png")

    assert got.tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]


def test_a_palettes_transparent_colour_lies_on_white(tmp_path):
    """A PNG names one by its number; here it is green's."""
    got = opened(palette_image(), tmp_path / "logo.png", transparency=1)

    assert got.tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_a_palette_with_alpha_lies_on_white():
    """Pillow has a mode for it, PA, which no file has, so it does not pass through one."""
    image = palette_image("PA")
    image.putalpha(image_of([[255, 0, 51]], "L"))
    assert image.mode == "PA"

    got = np.asarray(images.as_rgb(image))

    assert got.tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 255]]]


def test_a_colour_that_is_declared_transparent_lies_on_white(tmp_path):
    """A PNG without alpha may say that one colour is none."""
    image = image_of([[RED, (0, 255, 0)]], "RGB")

    got = opened(image, tmp_path / "logo.png", transparency=(0, 255, 0))

    assert got.tolist() == [[[*RED], [*WHITE]]]


@pytest.mark.parametrize(
    "image, want",
    [
        (image_of([[0, 77, 255]], "L"), [0, 77, 255]),
        (Image.frombytes("1", (3, 1), b"\x40"), [0, 255, 0]),
    ],
    ids=["grey", "1 bit"],
)
def test_grey_is_three_equal_channels(tmp_path, image, want):
    got = opened(image, tmp_path / "grey.png")

    assert (got == np.array(want)[None, :, None]).all()


def test_inks_become_colours(tmp_path):
    """A JPEG for print is CMYK: yellow and magenta make red, all of black makes black.

    JPEG is lossy, so some levels are allowed.
    """
    inks = np.zeros((16, 32, 4))
    inks[:, :16] = (0, 255, 255, 0)
    inks[:, 16:] = (0, 0, 0, 255)

    got = opened(image_of(inks, "CMYK"), tmp_path / "print.jpg", quality=95)

    assert abs(got[8, 4].astype(int) - RED).max() < 6
    assert got[8, 28].max() < 6


# ------------------------------------------------------------------------------- what is no picture
def save_half(path, keep=0.6):
    """A picture whose download stopped before its end."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])


def save_floats(path):
    Image.new("F", (2, 2)).save(path, format="TIFF")


def save_damaged(path):
    """A PNG with some bytes of its header's checksum changed."""
    Image.new("RGB", (4, 4)).save(path)
    whole = bytearray(path.read_bytes())
    whole[29:33] = b"oops"
    path.write_bytes(whole)


@pytest.mark.parametrize(
    "name, save, what",
    [
        ("half.jpg", save_half, "truncated"),
        ("half.png", save_half, ""),
        ("half.webp", save_half, ""),
        ("damaged.png", save_damaged, ""),
        ("page.png", lambda path: path.write_text("<html>404</html>"), "cannot identify"),
        ("empty.png", lambda path: path.touch(), "cannot identify"),
        ("missing.png", lambda path: None, "No such file"),
        ("height.png", save_floats, "floats"),
    ],
)
def test_a_bad_picture_is_named(tmp_path, name, save, what):
    """One of a million files is broken, and only its name helps.

    The message is one line, because that is how the scripts end.
    """
    path = tmp_path / name
    save(path)

    with pytest.raises(ValueError, match=re.escape(str(path))) as raised:
        images.open_image(path)

    assert what in str(raised.value)
    assert "\n" not in str(raised.value)


# -------------------------------------------------------------------------------- which files count
def names_of(files, folder):
    return [path.relative_to(folder).as_posix() for path in files]


def test_pictures_are_found_in_order_at_any_depth(tmp_path):
    """Samples and their classes are told apart by their order, so it must be the same everywhere.

    A camera writes .JPG, and a folder may be called like a picture.
    """
    touch(tmp_path, "b.png", "a/2.JPG", "a/1.Jpeg", "a/deep/3.webp", "c.BMP")
    touch(tmp_path, "a/notes.txt", "metadata.jsonl", "png", "d.gif")
    (tmp_path / "folder.png").mkdir()

    files = images.image_files(tmp_path)

    want = ["a/1.Jpeg", "a/2.JPG", "a/deep/3.webp", "b.png", "c.BMP"]
    assert names_of(files, tmp_path) == want


def test_what_programs_leave_in_a_folder_is_no_picture(tmp_path):
    """A Mac's ._ files cannot be read, and Jupyter's checkpoints would count a picture twice."""
    touch(tmp_path, "a.png", "deep/b.png")
    touch(tmp_path, "._a.png", "__MACOSX/a.png", ".ipynb_checkpoints/a-checkpoint.png")
    touch(tmp_path, "deep/.thumbnails/more/b.png")

    assert names_of(images.image_files(tmp_path), tmp_path) == ["a.png", "deep/b.png"]


def test_a_folder_may_lie_in_a_hidden_one(tmp_path):
    """~/.cache/pictures is a fine place; only what is below the given folder is looked at."""
    folder = tmp_path / ".cache/__MACOSX"
    touch(folder, "a.png")

    assert names_of(images.image_files(folder), folder) == ["a.png"]


# --------------------------------------------------------------------------------- labelled folders
def test_classes_are_folders_in_sorted_order(tmp_path):
    """The number of a class is its place among the names, as torchvision's ImageFolder has it.

    What Jupyter leaves is no class, nor is a file that lies beside the classes.
    """
    touch(tmp_path, "dog/1.png", "dog/0.png", "cat/0.png", "cat/deep/1.png")
    touch(tmp_path, ".ipynb_checkpoints/0.png", "__MACOSX/cat/0.png", "readme.png")

    paths, labels, classes = images.labelled_folder(tmp_path)

    assert classes == ["cat", "dog"]
    assert labels == [0, 0, 1, 1]
    assert names_of(paths, tmp_path) == ["cat/0.png", "cat/deep/1.png", "dog/0.png", "dog/1.png"]


def says(folder, **options):
    """The message with which a labelled folder is refused, which must be one line."""
    with pytest.raises(ValueError) as raised:
        images.labelled_folder(folder, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_class_needs_the_least_number_of_pictures(tmp_path):
    """A class of one cannot be split into what is learned and what is held out.

    The message names the class and how many it has; as many as `least` are enough.
    """
    touch(tmp_path, *(f"cat/{i}.png" for i in range(3)))
    touch(tmp_path, *(f"dog/{i}.png" for i in range(4)))

    assert f"{tmp_path / 'cat'} has 3 pictures" in says(tmp_path, least=4)
    assert len(images.labelled_folder(tmp_path, least=3)[0]) == 7


def test_two_pictures_a_class_are_the_least_by_default(tmp_path):
    touch(tmp_path, "cat/0.png", "cat/1.png", "dog/0.png")

    assert f"{tmp_path / 'dog'} has 1 pictures" in says(tmp_path)


def test_a_class_without_pictures_is_named(tmp_path):
    """Hidden files are none."""
    touch(tmp_path, "cat/0.png", "cat/1.png", "masks/0.txt", "masks/._0.png")

    assert f"{tmp_path / 'masks'} has 0 pictures" in says(tmp_path)


def test_one_class_is_not_enough(tmp_path):
    """A classifier of one class is always right. The message says which one was found."""
    touch(tmp_path, "cat/0.png", "cat/1.png", ".cache/0.png")

    assert "1 folders of a class (cat)" in says(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    """So is a file, which one may give for a folder."""
    touch(tmp_path, "file")

    for name in ("nowhere", "file"):
        assert f"{tmp_path / name} is no folder" in says(tmp_path / name)
