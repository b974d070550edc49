"""parts/prompts.py: prompt files of every kind, what is refused, and the layouts of benchmarks.

Each file is written byte by byte, as people's editors and programs write it.
"""

import csv
import io
import json
import re

import pytest

from parts import prompts

COCO = [
    dict(image_id=1, id=7, caption="A man rides a horse on a beach."),
    dict(image_id=1, id=8, caption="Two dogs, one ball."),
]


def read(path, content, **options):
    """The rows of a file with this content: bytes, or text that is written in UTF-8."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return prompts.read_prompts(path, **options)


def texts(rows):
    """The prompts of rows that have nothing else."""
    assert all(row.keys() == {"prompt"} for row in rows)
    return [row["prompt"] for row in rows]


# ---------------------------------------------------------------------------------- kinds of files
def test_without_a_file_the_prompts_are_ours():
    rows = prompts.read_prompts(None)
    assert texts(rows) == prompts.OURS
    assert len({*prompts.OURS}) == 36
    assert prompts.OURS[0] == "a photograph of a red fox in snow"


@pytest.mark.parametrize("name", ["p.txt", "p", "p.prompts"])
def test_a_text_has_a_prompt_a_line(tmp_path, name):
    """Empty lines do not count, nor do spaces about a prompt; all else stays, as commas do."""
    content = '\n  a red fox, deep snow \n\n \t\n"an owl"\nthe last one'
    assert texts(read(tmp_path / name, content)) == [
        "a red fox, deep snow",
        '"an owl"',
        "the last one",
    ]


ODD_SPACES = {"U+2028": "\u2028", "U+0085": "\x85", "form feed": "\f", "FS": "\x1c"}
FILES = {
    ".txt": "a fox{odd}in snow\nan owl\n",
    ".jsonl": '{{"text": "a fox{odd}in snow"}}\n{{"text": "an owl"}}\n',
    ".json": '["a fox{odd}in snow", "an owl"]',
    ".csv": "prompt\na fox{odd}in snow\nan owl\n",
}


@pytest.mark.parametrize("suffix", FILES)
@pytest.mark.parametrize("odd", ODD_SPACES.values(), ids=ODD_SPACES)
def test_only_a_line_feed_ends_a_line(tmp_path, suffix, odd):
    """str.splitlines makes two prompts of one here, which shifts all prompts behind it.

    In json the odd ones that are control characters must be escaped, and the others may be.
    """
    inside = odd
    if suffix.startswith(".json"):
        inside = json.dumps(odd)[1:-1] if odd < " " else odd
    rows = read(tmp_path / f"p{suffix}", FILES[suffix].format(odd=inside))
    assert texts(rows) == [f"a fox{odd}in snow", "an owl"]


@pytest.mark.parametrize("suffix", FILES)
def test_windows_adds_a_mark_and_carriage_returns(tmp_path, suffix):
    """Neither is part of a prompt: with the mark in it, a text encoder draws something else."""
    content = FILES[suffix].format(odd=" ").replace("\n", "\r\n").encode()
    rows = read(tmp_path / f"p{suffix.upper()}", b"\xef\xbb\xbf" + content)
    assert texts(rows) == ["a fox in snow", "an owl"]


@pytest.mark.parametrize("key", ["prompt", "caption", "text", "prompt_en"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_row_keeps_what_else_it_has(tmp_path, key, suffix):
    """The keys are those of DMD2, COCO, image folders and VBench's image to video."""
    row = {"file_name": "0.png", key: "a fox, a hen"}
    content = {
        ".jsonl": f"{json.dumps(row)}\n\n{json.dumps(row)}\n",
        ".json": json.dumps([row, row]),
        ".csv": f'file_name, {key}\n0.png,"a fox, a hen"\n\n,\n0.png,"a fox, a hen"\n',
    }
    rows = read(tmp_path / f"p{suffix}", content[suffix])
    assert rows == [dict(prompt="a fox, a hen", file_name="0.png")] * 2


EXCEL = ["prompt", "prompt_shorter"], ['a red; "old" fox, deep snow', "fox"], ["an owl", ""]


@pytest.mark.parametrize("mark", [",", ";"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_csv_is_read_as_excel_saves_it_again(tmp_path, mark, quoting):
    """It separates fields by semicolons where the comma is the decimal point."""
    text = io.StringIO()
    csv.writer(text, delimiter=mark, quoting=quoting, lineterminator="\r\n").writerows(EXCEL)
    assert read(tmp_path / "p.csv", b"\xef\xbb\xbf" + text.getvalue().encode()) == [
        dict(prompt='a red; "old" fox, deep snow', prompt_shorter="fox"),
        dict(prompt="an owl", prompt_shorter=""),
    ]


def test_semicolons_separate_only_where_the_header_has_them(tmp_path):
    """Prompts may have both, and a header of one name tells nothing of either."""
    content = "\nprompt\na fox; deep snow\n"
    assert texts(read(tmp_path / "p.csv", content)) == ["a fox; deep snow"]
    content = "id,prompt; long\n7,a fox\n"
    with pytest.raises(ValueError, match="has no prompt, caption or text: it has id, prompt; long"):
        read(tmp_path / "p.csv", content)


def test_a_prompt_comes_before_a_caption_and_a_caption_before_a_text(tmp_path):
    """The others stay, in whatever order the row has them."""
    lines = [
        '{"text": "c", "caption": "b", "prompt": "a"}',
        '{"text": "c", "caption": "b"}',
        '"a text alone"',
    ]
    assert read(tmp_path / "p.jsonl", "\n".join(lines)) == [
        dict(prompt="a", text="c", caption="b"),
        dict(prompt="b", text="c"),
        dict(prompt="a text alone"),
    ]


@pytest.mark.parametrize("key", ["prompt", "prompts"])
def test_a_list_of_prompts_is_kept(tmp_path, key):
    """LongLive's rows for a video whose prompt changes in mid-stream; and wan.py's."""
    row = {key: ["a fox runs", "the fox lies down"], "seed": 3}
    assert read(tmp_path / "p.jsonl", json.dumps(row)) == [
        dict(prompt="a fox runs", prompts=["a fox runs", "the fox lies down"], seed=3)
    ]


def test_a_csv_is_read_by_its_quotes(tmp_path):
    """Commas, quotes and ends of lines within quotes belong to a prompt, and short names stay.

    A row may lack its last names: then it has none, rather than None.
    """
    content = (
        "prompt,prompt_shorter\n"
        '"A sign that says ""open"", in the wind","a ""sign"""\n'
        '"a fox\nand\r\na hen",\n'
        "an owl\n"
    )
    assert read(tmp_path / "p.csv", content) == [
        dict(prompt='A sign that says "open", in the wind', prompt_shorter='a "sign"'),
        dict(prompt="a fox\nand\r\na hen", prompt_shorter=""),
        dict(prompt="an owl"),
    ]


def test_cocos_captions_are_read(tmp_path):
    """captions_val2014.json is a dict with the captions among other things."""
    content = json.dumps(dict(info=dict(year=2014), images=[dict(id=1)], annotations=COCO))
    assert read(tmp_path / "captions_val2014.json", content) == [
        dict(prompt="A man rides a horse on a beach.", image_id=1, id=7),
        dict(prompt="Two dogs, one ball.", image_id=1, id=8),
    ]


@pytest.mark.parametrize("longest", [2000, 5000])
def test_a_prompt_has_1_to_so_many_characters(tmp_path, longest):
    """Wan's text encoder reads more than CLIP, so the limit is an argument."""
    options = {} if longest == 2000 else dict(longest=longest)
    content = "x\n" + "y" * longest
    assert texts(read(tmp_path / "p.txt", content, **options)) == content.split("\n")
    with pytest.raises(ValueError, match=rf"line 2: .* {longest + 1:,} characters: give 1 to"):
        read(tmp_path / "p.txt", content + "y", **options)


# ------------------------------------------------------------------------------------ what is wrong
BROKEN_QUOTES = 'prompt\na fox\n"an owl\na hen\n'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", "", "has no prompt"),
        ("p.txt", "\n \r\n", "has no prompt"),
        ("p.csv", "prompt\n", "has no prompt"),
        ("p.json", "[]", "has no prompt"),
        ("p.txt", "a fox\ncafé".encode("latin1"), "line 2 is not UTF-8"),
        ("p.txt", "a fox\nan owl".encode("utf-16"), "line 1 is not UTF-8"),
        ("p.txt", b"\xef\xbb\xbf\n\n\xff", "line 3 is not UTF-8"),
        ("p.jsonl", '"a fox"\n\n{"prompt": ', "line 3 is no JSON"),
        ("p.json", '["a fox",\n"an owl"', "line 2 is no JSON"),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}', "name the file .jsonl"),
        ("p.json", '{"info": 1, "images": []}', "a dict with info, images"),
        ("p.json", '{"annotations": {}}', "a dict with annotations"),
        ("p.json", '"a fox"', "it is of type str"),
        ("p.json", '{"annotations": [{"image_id": 1, "bbox": []}]}', "row 1 has no prompt, cap"),
        ("p.jsonl", '"a"\n{"Prompt": "b", "id": 1}', "line 2 has no prompt, caption or text"),
        ("p.jsonl", '"a"\n{"Prompt": "b", "id": 1}', "it has Prompt, id"),
        ("p.jsonl", "{}", "it has nothing"),
        ("p.jsonl", "3", "line 1 is of type int"),
        ("p.json", '["a", null]', "row 2 is of type NoneType"),
        ("p.json", '["a", ["b", "c"]]', "row 2 is of type list"),
        ("p.jsonl", '{"text": null}', "line 1: its text is of type NoneType"),
        ("p.jsonl", '{"prompts": []}', "line 1: its prompts is an empty list"),
        ("p.jsonl", '"ok"\n"a fox \\ud83d"', "line 2: its prompt has half a character"),
        ("p.jsonl", '{"prompts": ["a", 1]}', "line 1: its prompts is of type int"),
        ("p.jsonl", '{"prompts": ["a", ""]}', "line 1: its prompts has 0 characters"),
        ("p.json", '["a", " "]', "row 2: its prompt has 0 characters: give 1 to 2,000"),
        ("p.csv", "id,file,words\n7,a.jpg,a fox", "line 1, the header, has no prompt"),
        ("p.csv", "7,a.jpg,a fox\n", "it has 7, a.jpg, a fox"),
        ("p.csv", "prompt\na fox\n\na hen, film grain\n", "line 4 has 2 fields, and the header 1"),
        ("p.csv", 'prompt\n"a\nb"\na hen, film grain\n', "line 4 has 2 fields, and the header 1"),
        ("p.csv", 'prompt\n"a\nb",c\n', "line 2 has 2 fields, and the header 1"),
        ("p.csv", "prompt,id\na fox,1\n,2\n", "line 3: its prompt has 0 characters"),
        ("p.csv", "prompt;id\na fox; a hen;1\n", "a prompt that has ';' in it"),
        ("p.csv", BROKEN_QUOTES, "line 3 is no csv"),
        ("p.csv", 'prompt\n"open" sign\n', "line 2 is no csv"),
    ],
)
def test_a_bad_file_is_refused_by_its_name_and_the_place(tmp_path, name, content, message):
    """One line says what is wrong where, and nothing of it is drawn as a prompt."""
    path = tmp_path / name
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        read(path, content)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_names_of_a_row_are_cut_short(tmp_path):
    """A csv without a header may have a whole story for a name."""
    with pytest.raises(ValueError) as refused:
        read(tmp_path / "p.csv", "x" * 10_000 + ",y\n1,2\n")
    assert len(str(refused.value)) < 300 + len(str(tmp_path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("missing.csv")):
        prompts.read_prompts(tmp_path / "missing.csv")


# --------------------------------------------------------------------------------------- benchmarks
def files(rows):
    """The files of a layout."""
    return [row["file"] for row in rows]


@pytest.mark.parametrize(
    "name, last",
    [("flat", "000011.png"), ("coco", "000011.png"), ("drawbench", "00011.jpg")],
)
def test_a_file_has_the_number_of_its_prompt(tmp_path, name, last):
    """Numbers count from 0, in the file's order, and are of one width, so that names sort so."""
    content = "".join(f"prompt {i}\n" for i in range(12))
    (tmp_path / "p.txt").write_text(content)

    rows = prompts.layout(name, tmp_path / "p.txt")

    assert [row["of"] for row in rows] == [dict(prompt=f"prompt {i}") for i in range(12)]
    assert files(rows)[-1] == last
    assert files(rows) == sorted({*files(rows)})


def test_a_layout_without_a_file_is_of_our_prompts():
    rows = prompts.layout("flat")
    assert [row["of"]["prompt"] for row in rows] == prompts.OURS


METADATA = [
    dict(tag="single_object", include=[{"class": "bench", "count": 1}], prompt="a bench"),
    dict(tag="colors", include=[{"class": "cow", "count": 1}], prompt="a red cow"),
]


def test_geneval_wants_four_images_and_its_metadata(tmp_path):
    """Its folder of a prompt has samples, and what the row was, to which GenEval compares them."""
    content = "\n".join(map(json.dumps, METADATA))
    (tmp_path / "evaluation_metadata.jsonl").write_text(content)

    rows = prompts.layout("geneval", tmp_path / "evaluation_metadata.jsonl")

    assert files(rows) == [
        *(f"00000/samples/000{k}.png" for k in range(4)),
        *(f"00001/samples/000{k}.png" for k in range(4)),
    ]
    assert [row["of"] for row in rows] == [METADATA[0]] * 4 + [METADATA[1]] * 4


@pytest.mark.parametrize("given", ["p.jsonl", None])
def test_geneval_refuses_prompts_without_its_metadata(tmp_path, given):
    row = json.dumps(METADATA[0])
    (tmp_path / "p.jsonl").write_text(f'{row}\n{{"prompt": "a fox"}}\n')
    number = 2 if given else 1
    with pytest.raises(ValueError, match=f"prompt {number} has no tag.*evaluation_metadata.jsonl"):
        prompts.layout("geneval", given and tmp_path / given)


def write_hpdv2(folder):
    """HPDv2's folder, with two prompts a style."""
    folder.mkdir()
    for style in ("anime", "concept-art", "paintings", "photo"):
        (folder / f"{style}.json").write_text(json.dumps([f"{style} 0", f"{style} 1"]))


@pytest.mark.parametrize("given", [True, False])
def test_hpdv2_has_a_folder_for_each_style(tmp_path, monkeypatch, given):
    """Its evaluator finds a style's images by their number in its file."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ("elsewhere" if given else "benchmark")
    write_hpdv2(folder)

    rows = prompts.layout("hpdv2", folder if given else None)

    assert [(row["file"], row["of"]["prompt"]) for row in rows] == [
        ("anime/00000.jpg", "anime 0"),
        ("anime/00001.jpg", "anime 1"),
        ("concept-art/00000.jpg", "concept-art 0"),
        ("concept-art/00001.jpg", "concept-art 1"),
        ("paintings/00000.jpg", "paintings 0"),
        ("paintings/00001.jpg", "paintings 1"),
        ("photo/00000.jpg", "photo 0"),
        ("photo/00001.jpg", "photo 1"),
    ]


def test_hpdv2_says_which_style_is_missing(tmp_path):
    write_hpdv2(tmp_path / "benchmark")
    (tmp_path / "benchmark/photo.json").unlink()
    with pytest.raises(ValueError, match=r"benchmark lacks photo.json: give"):
        prompts.layout("hpdv2", tmp_path / "benchmark")
    with pytest.raises(ValueError, match=r"anime.json lacks anime.json, concept-art.json"):
        prompts.layout("hpdv2", tmp_path / "benchmark/anime.json")


# ------------------------------------------------------------------------------- prompts of videos
def write(path, content):
    """A file of this text, or of a dict a line -> its path."""
    if not isinstance(content, str):
        content = "".join(f"{json.dumps(row)}\n" for row in content)
    path.write_text(content, encoding="utf-8")
    return path


def test_without_a_file_the_prompts_of_videos_are_ours():
    """They are of what moves."""
    rows = prompts.read_video_prompts(None)
    assert texts(rows) == prompts.OUR_VIDEOS
    assert len({*prompts.OUR_VIDEOS}) == 12
    assert prompts.OUR_VIDEOS[0] == "A red fox runs through falling snow"


def test_prompts_of_videos_may_be_longer_and_change(tmp_path):
    """Wan's extended ones have some hundred words; a list is of a stream, as LongLive's."""
    path = write(tmp_path / "p.jsonl", [dict(prompts=["y" * 5000, "b"]), dict(text="c")])
    assert prompts.read_video_prompts(path) == [
        dict(prompt="y" * 5000, prompts=["y" * 5000, "b"]),
        dict(prompt="c"),
    ]
    with pytest.raises(ValueError, match="line 1: its prompt has 5,001 characters: give 1 to"):
        prompts.read_video_prompts(write(tmp_path / "p.jsonl", [dict(prompt="y" * 5001)]))


@pytest.mark.parametrize("key", ["image", "image_name"])
@pytest.mark.parametrize("folder", ["", "crop/16-9"])
def test_images_are_beside_the_prompts_or_in_a_folder_of_their_own(tmp_path, key, folder):
    """VBench-I2V's json has the names of its images, which lie in a folder for each ratio."""
    images = tmp_path / folder
    images.mkdir(parents=True, exist_ok=True)
    for name in ("a fox, red.jpg", "b.png"):
        (images / name).touch()
    rows = [{"prompt_en": "fox", key: "a fox, red.jpg"}, {"prompt_en": "owl", key: "b.png"}]
    path = write(tmp_path / "vbench2_i2v_full_info.json", json.dumps(rows))

    found = prompts.read_video_prompts(path, images=images if folder else None)

    assert [(row["prompt"], row["image"]) for row in found] == [
        ("fox", images / "a fox, red.jpg"),
        ("owl", images / "b.png"),
    ]


def test_a_missing_image_is_named(tmp_path):
    (tmp_path / "a.png").touch()
    rows = [dict(prompt="a", image="a.png"), dict(prompt="b", image="b.png")]
    path = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"p.jsonl, prompt 2: there is no image .*/b.png: give the"
    ):
        prompts.read_video_prompts(path)


@pytest.mark.parametrize("none", [{}, dict(image=""), dict(image=None)])
def test_all_prompts_have_an_image_or_none(tmp_path, none):
    """A model is of text to video or of image to video. An empty field of a csv is no image."""
    (tmp_path / "a.png").touch()
    row, other = dict(prompt="a", image="a.png"), dict(prompt="b") | none
    with pytest.raises(ValueError, match="2 of its 3 prompts have an image: give one to all"):
        prompts.read_video_prompts(write(tmp_path / "p.jsonl", [row, other, row]))
    path = write(tmp_path / "p.jsonl", [other, other])
    assert prompts.read_video_prompts(path) == [dict(prompt="b")] * 2


# ------------------------------------------------------------------------------- layouts of videos
SHORT = 'prompt,prompt_shorter\n"A long, ""red"" fox",fox\nAn owl,owl\nA hen,\nA cow," "\n'


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("flat", ["000000.mp4", "000001.mp4", "000002.mp4", "000003.mp4"]),
        ("vbench", ["fox-0.mp4", "owl-0.mp4", "A hen-0.mp4", "A cow-0.mp4"]),
        ("vbench_i2v", ["fox-0.mp4", "owl-0.mp4", "A hen-0.mp4", "A cow-0.mp4"]),
        ("videogen_eval", ["0000-0.mp4", "0001-0.mp4", "0002-0.mp4", "0003-0.mp4"]),
        ("ta_hard", ["0000-0.mp4", "0001-0.mp4", "0002-0.mp4", "0003-0.mp4"]),
    ],
)
def test_a_video_has_the_name_that_its_benchmark_looks_for(tmp_path, name, wanted):
    """VBench's are official, short prompts, and the prompt itself where a row has none."""
    path = write(tmp_path / "p.csv", SHORT)

    rows = prompts.video_layout(name, path, 1)

    assert files(rows) == wanted
    assert [row["of"] for row in rows] == prompts.read_prompts(path)


def test_a_prompt_has_a_video_for_each_seed(tmp_path):
    path = write(tmp_path / "p.csv", SHORT)
    rows = prompts.video_layout("vbench", path, 5)
    assert files(rows)[:6] == [*(f"fox-{k}.mp4" for k in range(5)), "owl-0.mp4"]
    assert len(rows) == 4 * 5
    assert files(prompts.video_layout("ta_hard", path, 2))[2:4] == ["0001-0.mp4", "0001-1.mp4"]


def test_videos_without_a_file_are_of_our_prompts():
    rows = prompts.video_layout("flat", None, 1)
    assert [row["of"]["prompt"] for row in rows] == prompts.OUR_VIDEOS
    assert files(rows)[-1] == "000011.mp4"


def test_the_first_of_two_videos_with_one_name_counts(tmp_path):
    """VBench has some prompts twice, and two that differ by one capital."""
    content = "A fantasy landscape\nan owl\na fantasy landscape\nan owl\n"
    rows = prompts.video_layout("vbench", write(tmp_path / "p.txt", content), 2)
    names = ["A fantasy landscape", "an owl", "a fantasy landscape"]
    assert files(rows) == [f"{name}-{k}.mp4" for name in names for k in (0, 1)]

    twins = "prompt,prompt_shorter\nfirst,owl\nsecond,owl\n"
    rows = prompts.video_layout("vbench", write(tmp_path / "p.csv", twins), 1)
    assert [row["of"]["prompt"] for row in rows] == ["first"]

    rows = prompts.video_layout("flat", write(tmp_path / "p.txt", content), 1)
    assert len(rows) == 4, "files with numbers have no twins"


def test_vbenchs_names_may_be_in_a_file_of_their_own(tmp_path):
    """all_dimension_extended.txt has long prompts, line by line in all_dimension.txt's order."""
    long = write(tmp_path / "all_dimension_extended.txt", "A long, red fox.\n\nA white owl.\n")
    short = write(tmp_path / "all_dimension.txt", 'a "fox"\nan owl, white\n')

    rows = prompts.video_layout("vbench", long, 1, names=short)

    assert rows == [
        dict(file='a "fox"-0.mp4', of=dict(prompt="A long, red fox.")),
        dict(file="an owl, white-0.mp4", of=dict(prompt="A white owl.")),
    ]


def test_as_many_names_as_prompts_are_wanted(tmp_path):
    """With one more all behind it would have the names of others."""
    long = write(tmp_path / "long.txt", "a\nb\n")
    short = write(tmp_path / "short.txt", "a\nb\nc\n")
    with pytest.raises(ValueError, match=r"short.txt has 3 names, and .*long.txt 2 prompts: give"):
        prompts.video_layout("vbench", long, 1, names=short)
    with pytest.raises(ValueError, match=r"short.txt has 3 names, and our list 12 prompts: give"):
        prompts.video_layout("vbench", None, 1, names=short)


def test_names_are_refused_where_files_have_numbers(tmp_path):
    path = write(tmp_path / "p.txt", "a\n")
    with pytest.raises(ValueError, match=r"--layout ta_hard has numbers for names: leave .*p.txt"):
        prompts.video_layout("ta_hard", path, 1, names=path)


@pytest.mark.parametrize("name", ["a fox/owl", "a\nfox", "a\0fox", "x" * 241, "狐" * 81])
@pytest.mark.parametrize("where", ["prompt", "prompt_shorter"])
def test_a_name_that_no_file_can_have_is_refused_in_a_line(tmp_path, name, where):
    """A slash is a folder, and a name has at most 255 bytes, three for each Chinese letter."""
    rows = [dict(prompt="an owl"), dict(prompt="a cow") | {where: name}]
    path = write(tmp_path / "p.jsonl", rows)

    with pytest.raises(ValueError) as refused:
        prompts.video_layout("vbench", path, 1)

    said = str(refused.value)
    assert said.startswith(f"{path}, prompt 2: no file can be named")
    assert "give a short form of it as prompt_shorter" in said
    assert "\n" not in said
    assert len(said) < len(str(path)) + 200
    assert len(prompts.video_layout("flat", path, 1)) == 2


@pytest.mark.parametrize("name", ["x" * 240, "狐" * 80, 'a sign, "open"', " ", "a\\b: c?"])
def test_any_other_name_is_kept_as_it_is(tmp_path, name):
    """A file of the longest one can be made, and VBench finds it by each of its letters."""
    path = write(tmp_path / "p.jsonl", [dict(prompt=f"{name}.")])
    if len(name.encode()) == 240:
        path = write(tmp_path / "p.jsonl", [dict(prompt="long", prompt_shorter=name)])
    (row,) = prompts.video_layout("vbench", path, 1)
    assert row["file"] in (f"{name}-0.mp4", f"{name}.-0.mp4")
    (tmp_path / row["file"]).touch()


def test_a_layout_has_the_images_of_its_rows(tmp_path):
    (tmp_path / "crop").mkdir()
    (tmp_path / "crop/a.jpg").touch()
    path = write(tmp_path / "p.jsonl", [dict(prompt_en="a fox", image_name="a.jpg")])
    (row,) = prompts.video_layout("vbench_i2v", path, 1, images=tmp_path / "crop")
    assert row["file"] == "a fox-0.mp4"
    assert row["of"]["image"] == tmp_path / "crop/a.jpg"


def test_the_table_of_videos_is_one_line_a_video_with_all_fields_quoted(tmp_path):
    """VideoAlign's own reader and pandas find the same paths and prompts in it as csv does."""
    rows = [
        dict(prompt='A long, "red" fox\r\nin snow', prompt_shorter='a "red", fox'),
        dict(prompts=["an owl sits", "the owl\nflies"]),
    ]
    layout = prompts.video_layout("vbench", write(tmp_path / "p.jsonl", rows), 1)

    table = prompts.videos_csv(layout)

    assert table == (
        "path,prompt\n"
        '"videos/a ""red"", fox-0.mp4","A long, ""red"" fox in snow"\n'
        '"videos/an owl sits-0.mp4","an owl sits the owl flies"'
    )
    assert [*csv.DictReader(io.StringIO(table))] == [
        dict(path='videos/a "red", fox-0.mp4', prompt='A long, "red" fox in snow'),
        dict(path="videos/an owl sits-0.mp4", prompt="an owl sits the owl flies"),
    ]


def test_prompts_are_those_that_were_read(tmp_path):
    """A column `prompts` beside the prompt may hold anything, and is no list of prompts."""
    rows = [dict(prompt="a fox", prompts="an owl"), dict(caption="a boat", prompts=None)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert prompts.read_prompts(path) == [dict(prompt="a fox"), dict(prompt="a boat")]


def test_an_empty_image_is_none(tmp_path):
    """As a csv has it that was made for both kinds of models."""
    path = tmp_path / "rows.csv"
    path.write_text("prompt,image\na fox,\nan owl,\n")
    assert prompts.read_video_prompts(path) == [dict(prompt="a fox"), dict(prompt="an owl")]


def test_a_table_with_tabs_is_read(tmp_path):
    """As COCO's lists of captions are kept; its header is none of the prompts."""
    path = tmp_path / "rows.tsv"
    path.write_text("id\tprompt\n1\ta fox, red\n")
    assert prompts.read_prompts(path) == [dict(prompt="a fox, red", id="1")]
