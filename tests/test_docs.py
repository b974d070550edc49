"""README.md and docs/: their code runs, their links lead somewhere, their commands have such flags.

A page is read as text. So a file, a flag or a heading that is renamed breaks a test here, and not a
reader's first try.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

each_page = pytest.mark.parametrize(
    "page",
    PAGES,
    ids=lambda page: page.name,
)


def blocks(page, language):
    """The code blocks of a page that are marked as this language, in order."""
    return re.findall(
        rf"```{language}\n(.*?)```",
        page.read_text(),
        re.S,
    )


def shell_lines(page):
    """The lines of a page's bash blocks: each is a command, or a comment."""
    return [line for block in blocks(page, "bash") for line in block.splitlines()]


GUIDE = ROOT / "docs/guide.md"
COPIED = [(README, 0, []), (GUIDE, 0, []), (GUIDE, 1, ["running.py"])]  # page, block, what it needs


@pytest.mark.parametrize("page, number, more", COPIED, ids=["flow", "ddpm", "run"])
def test_a_snippet_runs_beside_a_copy_of_amd(tmp_path, page, number, more):
    """A reader pastes it into a file of their own, beside a copy of amd.py.

    It runs as it stands, in a process of its own, in a folder that has nothing else. The whole run
    must have saved a checkpoint and a log, and goes on from them when it is started again.
    """
    snippets = blocks(page, "python")
    assert len(snippets) == len([of_page for of_page, *_ in COPIED if of_page == page])
    for name in ("amd.py", *more):
        shutil.copy(ROOT / name, tmp_path)

    def paste():
        command = [sys.executable, "-c", snippets[number]]
        one_thread = dict(os.environ, OMP_NUM_THREADS="1")  # other tests have the other cores
        subprocess.run(command, cwd=tmp_path, env=one_thread, check=True)

    paste()
    if "running.py" in more:
        out = tmp_path / "runs/mine"
        assert (out / "checkpoints/step_10").exists()
        paste()
        steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 11))
        assert (out / "student.pt").exists()


@each_page
def test_a_link_to_a_line_leads_to_what_it_names(page):
    """The text of a link to a line of code is what that line has, so it must move with the code."""
    links = re.findall(r"\[`([^`]+)`\]\((\S+\.py)#L(\d+)\)", page.read_text())
    assert links or page != README
    for text, file, number in links:
        lines = (page.parent / file).read_text().splitlines()
        found = [i for i, line in enumerate(lines, 1) if text in line]
        assert found == [int(number)], f"{page.name}: {text} is in line {found} of {file}"


def test_the_readme_links_every_equation_to_its_line():
    """Those of Sec. 3 that AMD is made of."""
    text = README.read_text()

    rows = [line for line in text.splitlines() if "amd.py#L" in line]
    for equation in ("Eq. 6", "Eq. 9", "Eq. 10", "Eq. 12", "Eq. 13", "Eq. 14"):
        assert [row for row in rows if row.startswith(f"| {equation} |")], equation


def test_the_readme_is_short_and_counts_its_files():
    """Its table says how long each file is, within a tenth."""
    text = README.read_text()

    assert len(text.split()) <= 2300
    assert len(text.splitlines()) <= 250
    counted = re.findall(r"^\| (`.*`) \| ([\d,]+) \|", text, re.M)
    assert len(counted) >= 9
    for names, count in counted:
        lines = 0
        for name in re.findall(r"`([^`]+)`", names):
            path = ROOT / name
            files = path.glob("*.py") if path.is_dir() else [path]
            lines += sum(len(file.read_text().splitlines()) for file in files)
        assert int(count.replace(",", "")) == pytest.approx(lines, rel=0.1), names


def test_the_readme_has_two_commands_that_set_all_up():
    """One line installs and draws a picture, another one installs and tests.

    CI runs the second one as it stands, so a reader who copies it gets what CI gets.
    """
    commands = shell_lines(README)
    install = "pip install -r requirements.txt && "

    for command in ("python toy2d.py --reward selective", "pytest"):
        found = [line.startswith(install + command) for line in commands]
        assert any(found)


def headings(page):
    """The anchors of a page's headings, as GitHub makes them.

    A title is in lower case, loses its punctuation, and has a hyphen for each space.
    """
    titles = re.findall(
        r"^#+ (.*)$",
        page.read_text(),
        re.M,
    )
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.strip().replace(" ", "-") for title in plain}


@each_page
def test_links_and_pictures_exist(page):
    """Each link within the repository leads to a file; one to a heading must name one.

    Links to the web are not looked at, for the tests need no internet.
    """
    targets = re.findall(
        r"\]\(([^)\s]+)\)",
        page.read_text(),
    )
    for target in targets:
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if heading and file.suffix == ".md":
            assert heading in headings(file), target


def check_flags(command, script):
    """Check that a script has the flags that a command gives it.

    A flag is known if its name is a string in the script itself, or in running.py, which has those
    that all scripts share. --no-NAME is what argparse makes of a switch NAME.
    """
    source = (ROOT / script).read_text() + (ROOT / "running.py").read_text()
    after = command.split(script, 1)[1]
    flags = after.split("#")[0]
    for flag in re.findall(r"--([a-z0-9-]+)", flags):
        names = (flag, flag.removeprefix("no-"))
        found = [f'"--{name}"' in source or f'"{name}"' in source for name in names]
        assert any(found), command


@each_page
def test_scripts_and_flags_of_commands_exist(page):
    """Each `python X.py --flag` or torchrun line names a file and flags that it has.

    Such lines stand in bash blocks, and within a sentence between backticks. Only yours.py is a
    reader's own.
    """
    commands = shell_lines(page)
    commands += re.findall(
        r"`((?:python|torchrun)[^`]*)`",
        page.read_text(),
    )
    for command in commands:
        for script in re.findall(r"(\S+\.py)", command):
            if script == "yours.py":
                continue
            assert (ROOT / script).exists(), command
            check_flags(command, script)
