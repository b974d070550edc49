"""README.md and docs/: their code runs, their links lead somewhere, their commands have such flags.

A page is read as text. So a file, a flag or a heading that is renamed breaks a test here, and not a
reader's first try.
"""

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


def test_the_readmes_snippets_run_beside_copies(tmp_path):
    """A reader pastes them one after the other, beside copies of amd.py and running.py.

    They run as they stand, in a process of their own, in a folder that has nothing else. The last
    of them must have saved a checkpoint where the README says.
    """
    snippets = blocks(README, "python")
    assert len(snippets) >= 2
    for name in ("amd.py", "running.py"):
        shutil.copy(ROOT / name, tmp_path)

    command = [sys.executable, "-c", "\n".join(snippets)]
    subprocess.run(
        command,
        cwd=tmp_path,
        check=True,
    )

    assert (tmp_path / "runs/mine/checkpoints/step_10").exists()


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
