"""Prompt files as people have them, and the files that benchmarks want of their prompts.

    rows = read_prompts(Path("prompts.jsonl"))
    rows[0]["prompt"]  # "a red fox in snow"

    rows = layout("geneval", Path("evaluation_metadata.jsonl"))
    rows[5]["file"]  # "00001/samples/0001.png"
    rows[5]["of"]["prompt"]  # the prompt to draw there

    rows = video_layout("vbench", Path("all_dimension_extended.txt"), 5, Path("all_dimension.txt"))
    rows[0]["file"]  # "In a still frame, a stop sign-0.mp4"

They say in one line what is wrong with a file, and where in it.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import running

Row = dict[str, object]
Found = Iterator[tuple[str, object]]  # where in a file ("line 3"), and what is there

KEYS = ("prompt", "caption", "text", "prompts", "prompt_en")  # the first that a row has is read

OURS = [
    f"{style} of {subject} {place}"
    for style in ("a photograph", "an oil painting", "a sketch")
    for subject in ("a red fox", "an old sailor", "a glass teapot", "a lighthouse")
    for place in ("in snow", "at dawn", "in the rain")
]

OUR_VIDEOS = [
    f"{subject} {place}"
    for subject in ("A red fox runs", "An old sailor walks", "A paper boat drifts")
    for place in (
        "through falling snow",
        "along a harbour at dawn",
        "down a street in the rain",
        "past a train that arrives",
    )
]

LAYOUTS = {  # a prompt's number i, the number k of its sample, the style of its file
    "flat": "{i:06}.png",
    "coco": "{i:06}.png",
    "drawbench": "{i:05}.jpg",
    "hpdv2": "{style}/{i:05}.jpg",
    "geneval": "{i:05}/samples/{k:04}.png",
}
STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPDv2, a file each
BENCHMARK = Path("benchmark")  # the folder of these files, as HPDv2 names it

VIDEO_LAYOUTS = {  # a prompt's number i and name, the number k of its sample
    "flat": "{i:06}.mp4",
    "vbench": "{name}-{k}.mp4",
    "vbench_i2v": "{name}-{k}.mp4",
    "videogen_eval": "{i:04}-{k}.mp4",
    "ta_hard": "{i:04}-{k}.mp4",
}
LONGEST_VIDEO_PROMPT = 5000  # characters, of which Wan's text encoder reads 512 tokens
LONGEST_NAME = 240  # bytes: file systems have 255, and a number and .mp4 follow
IMAGE_KEYS = ("image", "image_name")  # of a row of image to video; VBench-I2V has the second


# ------------------------------------------------------------------------------------- prompt files
def read_prompts(path: Path | None, longest: int = 2000) -> list[Row]:
    """The rows of a file of prompts, {"prompt": text, ...}, in their order; OURS if path is None.

    .csv    has a header
    .jsonl  has a string or a dict a line
    .json   is a list of strings or dicts, or COCO's captions_val2014.json
    others  have a prompt a line

    A row's prompt is the first of KEYS that it has, and it keeps all else that it has. Where it
    gives a list, of prompts that follow each other in a video as LongLive's rows do, its prompt is
    the first of them, and its `prompts` is the list.

    The file is UTF-8, with a byte-order mark or without one. Its lines end at line feeds, and empty
    ones are skipped. ValueError, which names the file and the line or the row: it cannot be read,
    or there is no prompt, or one is blank or of more than `longest` characters.
    """
    if path is None:
        return [dict(prompt=prompt) for prompt in OURS]
    readers = {".csv": csv_rows, ".tsv": csv_rows, ".jsonl": jsonl_rows, ".json": json_rows}
    read = readers.get(path.suffix.lower(), text_rows)
    try:
        text = decode(path.read_bytes())
        rows = [as_row(value, where, longest) for where, value in read(text)]
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error
    running.require(rows, f"{path} has no prompt: give one or more")
    return rows


def digest(rows: list[Row]) -> str:
    """A short text that tells lists of prompts apart."""
    prompts = json.dumps([row["prompt"] for row in rows])
    return hashlib.sha256(prompts.encode()).hexdigest()[:16]


def decode(data: bytes) -> str:
    """UTF-8 -> text, without its byte-order mark. ValueError: it is another encoding."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8: save the file as UTF-8") from error


def text_rows(text: str) -> Found:
    """The lines that are not blank, without the spaces about them.

    str.splitlines would also end lines at U+2028, U+0085 and form feeds, which prompts contain.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", line.strip()


def jsonl_rows(text: str) -> Found:
    """What the JSON in each line is."""
    for where, line in text_rows(text):
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is no JSON ({error.msg}, column {error.colno})") from error


def json_rows(text: str) -> Found:
    """What is in a list, or in the annotations of COCO."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {error.lineno} is no JSON ({error.msg}): give one list, or name the file"
            " .jsonl if each of its lines is a row"
        ) from error
    if isinstance(value, dict):
        keys = listed(value)
        value = value.get("annotations")
        running.require(
            isinstance(value, list),
            f"it is a dict with {keys}: give a list of prompts, or COCO's captions",
        )
    running.require(isinstance(value, list), f"it is of type {kind(value)}: give a list of prompts")
    for number, row in enumerate(value, 1):
        yield f"row {number}", row


def csv_rows(text: str) -> Found:
    """A dict for each row below the header, by its names. A row without any text is skipped.

    A row may have fewer fields than the header, and lacks the last names then. One with more is
    refused, for its prompt would be cut at a comma. strict refuses quotes that do not close, which
    would take all rows behind them for one prompt. Excel separates fields by semicolons where the
    comma is the decimal point, and others by tabs: what the header has is read, commas first.
    """
    first, *_ = text.lstrip().split("\n", 1)
    mark = next((mark for mark in ",\t;" if mark in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    header = None
    number = 1  # of a row's first line; quoted fields may go over several
    try:
        for fields in reader:
            where = f"line {number}"
            number = reader.line_num + 1
            if not any(field.strip() for field in fields):
                continue
            if header is None:
                header = [name.strip() for name in fields]
                require_a_prompt(header, f"{where}, the header,")
                continue
            running.require(
                len(fields) <= len(header),
                f"{where} has {len(fields)} fields, and the header {len(header)}:"
                f" put double quotes about a prompt that has {mark!r} in it",
            )
            yield where, dict(zip(header, fields, strict=False))
    except csv.Error as error:
        raise ValueError(f"line {number} is no csv ({error}): mend its quotes") from error


def as_row(value: object, where: str, longest: int) -> Row:
    """What a file has for a prompt -> a row."""
    running.require(
        isinstance(value, str | dict),
        f"{where} is of type {kind(value)}: give a text, or a dict with {KEYS[0]}",
    )
    row = dict(value) if isinstance(value, dict) else dict(prompt=value)
    key = require_a_prompt(row, where)
    given = row.pop(key)
    texts = given if isinstance(given, list) else [given]
    running.require(texts, f"{where}: its {key} is an empty list")
    for text in texts:
        running.require(
            isinstance(text, str), f"{where}: its {key} is of type {kind(text)}: give a text"
        )
        count = len(text.strip())
        running.require(
            0 < count <= longest,
            f"{where}: its {key} has {count:,} characters: give 1 to {longest:,}",
        )
        running.require(
            not re.search("[\ud800-\udfff]", text),
            f"{where}: its {key} has half a character, as of an emoji that was cut: mend it",
        )

    row = dict(prompt=texts[0]) | {k: v for k, v in row.items() if k != "prompts"}
    if isinstance(given, list):
        row["prompts"] = given
    return row


def require_a_prompt(names: list | Row, where: str) -> str:
    """The first of KEYS among names. ValueError: there is none."""
    for key in KEYS:
        if key in names:
            return key
    raise ValueError(f"{where} has no prompt, caption or text: it has {listed(names)}")


def listed(names: list | Row) -> str:
    """Names as a message has them."""
    return f"{', '.join(map(str, names)) or 'nothing':.200}"


def kind(value: object) -> str:
    """The type of a value, as a message has it."""
    return type(value).__name__


# ------------------------------------------------------------------------------- prompts of videos
def read_video_prompts(path: Path | None, images: Path | None = None) -> list[Row]:
    """The rows of a file of prompts for videos; OUR_VIDEOS if path is None. See read_prompts.

    A prompt may be long, up to LONGEST_VIDEO_PROMPT. A row of image to video has one of IMAGE_KEYS,
    a path beside the prompt file, or in the folder images, if that is given; its `image` is then
    the Path of the image. ValueError: as read_prompts, or an image is missing, or some rows have
    one and some have none.
    """
    if path is None:
        return [dict(prompt=prompt) for prompt in OUR_VIDEOS]
    rows = read_prompts(path, LONGEST_VIDEO_PROMPT)
    return with_images(rows, path, images or path.parent)


def with_images(rows: list[Row], path: Path, folder: Path) -> list[Row]:
    """Rows of the file path, whose images are named as in folder -> rows with the images' Paths."""
    found = []
    plain = [{k: v for k, v in row.items() if k not in IMAGE_KEYS} for row in rows]
    for i, row in enumerate(rows, 1):
        named = [row[key] for key in IMAGE_KEYS if row.get(key)]
        if not named:
            continue
        image = folder / str(named[0])
        running.require(
            image.is_file(),
            f"{path}, prompt {i}: there is no image {image}: give the folder of the images",
        )
        found.append(row | dict(image=image))
    running.require(
        len(found) in (0, len(rows)),
        f"{path}: {len(found)} of its {len(rows)} prompts have an image: give one to all, or none",
    )
    return found or plain


# --------------------------------------------------------------------------------------- benchmarks
def layout(name: str, prompts: Path | None = None) -> list[Row]:
    """The images that a benchmark wants -> rows {"file": its path, "of": its prompt's row}.

    name is one of LAYOUTS, and prompts a file of prompts. GenEval wants four images a prompt, and
    its own metadata for prompts; HPDv2 has a folder of four files, BENCHMARK if none is given.
    ValueError: as read_prompts, or these are not the prompts of the benchmark.
    """
    pattern = LAYOUTS[name]
    if name == "hpdv2":
        return hpdv2(pattern, prompts or BENCHMARK)
    rows = read_prompts(prompts)
    if name != "geneval":
        return images_of(pattern, rows)
    for i, row in enumerate(rows, 1):
        running.require(
            "tag" in row,
            f"{prompts or 'our list'}, prompt {i} has no tag, and GenEval's judge needs it:"
            " give GenEval's evaluation_metadata.jsonl",
        )
    return images_of(pattern, rows, count=4)


def hpdv2(pattern: str, folder: Path) -> list[Row]:
    """The images of all styles, one after another; each style counts from 0."""
    files = {style: folder / f"{style}.json" for style in STYLES}
    lost = [path.name for path in files.values() if not path.is_file()]
    running.require(
        not lost, f"{folder} lacks {', '.join(lost)}: give the folder benchmark of zhwang/HPDv2"
    )
    images = []
    for style, path in files.items():
        images += images_of(pattern, read_prompts(path), style=style)
    return images


def images_of(pattern: str, rows: list[Row], count: int = 1, style: str = "") -> list[Row]:
    """count images of each row, those of a prompt beside each other."""
    images = []
    for i, row in enumerate(rows):
        for k in range(count):
            images.append(dict(file=pattern.format(i=i, k=k, style=style), of=row))
    return images


def video_layout(
    name: str,
    prompts: Path | None,
    seeds: int,
    names: Path | None = None,
    images: Path | None = None,
) -> list[Row]:
    """The videos that a benchmark wants -> rows {"file": its path, "of": its prompt's row}.

    name is one of VIDEO_LAYOUTS, prompts a file of prompts, and seeds the videos of each, beside
    each other. VBench finds a video by its official prompt, which is short, whatever longer one it
    was made from. It is looked for in the row's `prompt_shorter`, or in the same line of the file
    names, as all_dimension.txt is for all_dimension_extended.txt; else it is the prompt itself. Of
    videos with one file the first counts, for VBench has some prompts twice. images is the folder
    of the images, as in read_video_prompts.

    ValueError: as read_video_prompts, or names has another number of lines, or the layout has no
    names in its files, or no file can have such a name.
    """
    pattern = VIDEO_LAYOUTS[name]
    rows = read_video_prompts(prompts, images)
    if "{name}" in pattern:
        titles = names_of(rows, prompts, names)
    else:
        running.require(names is None, f"--layout {name} has numbers for names: leave {names} out")
        titles = [""] * len(rows)
    videos = {}
    for i, (row, title) in enumerate(zip(rows, titles, strict=True)):
        for k in range(seeds):
            file = pattern.format(i=i, k=k, name=title)
            videos.setdefault(file, dict(file=file, of=row))
    return [*videos.values()]


def names_of(rows: list[Row], prompts: Path | None, names: Path | None) -> list[str]:
    """The short forms of prompts, by which their files are named, and which files can have."""
    if names is not None:
        titles = [row["prompt"] for row in read_prompts(names, LONGEST_VIDEO_PROMPT)]
        running.require(
            len(titles) == len(rows),
            f"{names} has {len(titles)} names, and {prompts or 'our list'} {len(rows)} prompts:"
            " give one name a prompt, in the same order",
        )
    else:
        titles = [short_form(row) for row in rows]
    for i, title in enumerate(titles, 1):
        running.require(
            not re.search(r"[/\0\n]", title) and len(title.encode()) <= LONGEST_NAME,
            f"{names or prompts or 'our list'}, prompt {i}: no file can be named"
            f" {title[:60]!r}: give a short form of it as prompt_shorter",
        )
    return titles


def short_form(row: Row) -> str:
    """A row's official, short prompt, or its prompt where it has none."""
    short = str(row.get("prompt_shorter") or "")
    return short if short.strip() else row["prompt"]


def videos_csv(rows: list[Row], folder: str = "videos") -> str:
    """The rows of video_layout, whose files lie in folder -> the csv that VideoAlign reads.

    It has path and prompt of each video, with quotes about them. A video of several prompts has
    them in a row. Lines of a prompt become one, for the csv has a video a line.
    """
    text = io.StringIO()
    text.write("path,prompt\n")
    table = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for row in rows:
        prompts = row["of"].get("prompts", [row["of"]["prompt"]])
        prompt = re.sub(r"[\r\n]+", " ", " ".join(prompts))
        table.writerow([f"{folder}/{row['file']}", prompt])
    return text.getvalue().removesuffix("\n")
