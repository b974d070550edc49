"""Pictures as people have them: turned phones, 16 bits, transparency, hidden files, half a file.

Whoever reads pictures in this project does so by open_image, so that all see the same pixels, and
finds them by image_files.

    for path in image_files(Path("photos")):
        image = open_image(path)  # RGB, 8 bits, upright
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import running

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes of grey


# ------------------------------------------------------------------------------------------ finding
def image_files(folder: Path) -> list[Path]:
    """The pictures in a folder and in the folders below it, sorted by path.

    Their names end in one of SUFFIXES, in any case of letters. What is hidden is left out, and so
    is all that lies in a hidden folder. The folder itself may have any name.
    """
    files = []
    for path in sorted(folder.rglob("*")):
        hidden = any(is_hidden(name) for name in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            files.append(path)
    return files


def is_hidden(name: str) -> bool:
    """Is it the name of a file or a folder that some program has left beside the pictures?

    Jupyter leaves .ipynb_checkpoints, with copies, and a Mac leaves ._000.png and __MACOSX.
    """
    return name.startswith((".", "__MACOSX"))


def labelled_folder(folder: Path, least: int = 2) -> tuple[list[Path], list[int], list[str]]:
    """FOLDER/class/*.png -> the pictures, the number of each one's class, the names of the classes.

    The classes are the folders that are not hidden, in sorted order, and a class has the pictures
    of the folders below it too. ValueError: there is no such folder, or it has fewer than two
    classes, or a class has fewer than `least` pictures.
    """
    running.require(
        folder.is_dir(), f"{folder} is no folder: give one with pictures in {folder}/CLASS/*.png"
    )
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))
    running.require(
        len(classes) >= 2,
        f"{folder} has {len(classes)} folders of a class ({', '.join(classes) or 'none'}): "
        f"give two or more, with pictures in {folder}/CLASS/*.png",
    )

    paths, labels = [], []
    for label, name in enumerate(classes):
        files = image_files(folder / name)
        running.require(
            len(files) >= least,
            f"{folder / name} has {len(files)} pictures: give each class {least} or more",
        )
        paths += files
        labels += [label] * len(files)
    return paths, labels, classes


# ------------------------------------------------------------------------------------------ reading
def open_image(path: Path) -> Image.Image:
    """A picture in RGB of 8 bits, as a viewer shows it.

    It stands upright, as its EXIF says. What is transparent lies on white. Grey of 16 bits keeps
    its upper 8. ValueError, with the name of the file: it is missing, cut short, broken or no
    picture, or its pixels are floats, whose range nobody knows.
    """
    try:
        with Image.open(path) as file:
            return as_rgb(upright(file))
    except Exception as error:  # Pillow has errors of all kinds for broken files
        raise ValueError(f"{path} cannot be read as a picture ({error!s:.150})") from error


def upright(image: Image.Image) -> Image.Image:
    """A picture turned as its EXIF says, or as it is stored where the EXIF is broken or missing."""
    image.load()  # so that only the EXIF can fail below
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode of Pillow -> RGB. ValueError: its pixels are floats."""
    if image.mode == "F":
        raise ValueError("its pixels are floats: save it with 8 bits")
    if image.mode in SIXTEEN_BITS:  # Pillow's own convert makes all above 255 white
        grey = np.asarray(image).clip(0, 2**16 - 1) // 2**8
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


# --------------------------------------------------------------------------------------- to tensors
def to_tensor() -> Callable[[Image.Image], Tensor]:
    """A function of a picture in RGB -> (3, H, W) in [0, 1]."""
    from torchvision.transforms import v2

    return v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])


def to_square(
    size: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    """A function of a picture in RGB -> (3, size, size), less mean and by std.

    The shorter side becomes size, by Pillow's bicubic interpolation, and the middle is cut out.
    """
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.Resize(size, v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
            to_tensor(),
            v2.Normalize(mean, std),
        ]
    )
