"""Prompt files as people have them, and the files that benchmarks want of their prompts.

    rows = read_prompts(Path("prompts.jsonl"))
    rows[0]["prompt"]  # "a red fox in snow"

    rows = layout("geneval", Path("evaluation_metadata.jsonl"))
    rows[5]["file"]  # "00001/samples/0001.png"
    rows[5]["of"]["prompt"]  # the prompt to draw there

Both say in one line what is wrong with a file, and where in it.
"""

import csv
import io
import json
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

LAYOUTS = {  # a prompt's number i, the number k of its sample, the style of its file
    "flat": "{i:06}.png",
    "coco": "{i:06}.png",
    "drawbench": "{i:05}.jpg",
    "hpdv2": "{style}/{i:05}.jpg",
    "geneval": "{i:05}/samples/{k:04}.png",
}
STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPDv2, a file each
BENCHMARK = Path("benchmark")  # the folder of these files, as HPDv2 names it


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
    readers = {".csv": csv_rows, ".jsonl": jsonl_rows, ".json": json_rows}
    read = readers.get(path.suffix.lower(), text_rows)
    try:
        text = decode(path.read_bytes())
        rows = [as_row(value, where, longest) for where, value in read(text)]
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error
    running.require(rows, f"{path} has no prompt: give one or more")
    return rows


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
    would take all rows behind them for one prompt.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
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
                " put double quotes about a prompt with commas",
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

    row = dict(prompt=texts[0]) | row
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
