"""README.md and docs/: their code runs, their links lead somewhere."""

import re
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    """The code blocks of a page, in order."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def test_the_readmes_snippets_run_beside_copies(tmp_path):
    """As a reader would paste them: one after the other, beside amd.py and running.py."""
    snippets = blocks(ROOT / "README.md", "python")
    assert len(snippets) >= 2
    for name in ("amd.py", "running.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-c", "\n".join(snippets)]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "runs/mine/checkpoints/step_10").exists()


def test_the_readme_has_two_commands_that_set_all_up():
    """CI runs the second one as it stands."""
    commands = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    install = "pip install -r requirements.txt && "
    assert any(line.startswith(f"{install}python toy2d.py --reward selective") for line in commands)
    assert any(line.startswith(f"{install}pytest") for line in commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    """Those within the repository; a link to a heading must name one."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if heading and file.suffix == ".md":
            assert heading in headings(file), target


def headings(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_and_flags_of_commands_exist(page):
    """Each `python X.py --flag` or torchrun line names a file and flags that it has."""
    commands = [line for block in blocks(page, "bash") for line in block.splitlines()]
    commands += re.findall(r"`((?:python|torchrun)[^`]*)`", page.read_text())
    for command in commands:
        for script in re.findall(r"(\S+\.py)", command):
            if script == "yours.py":
                continue
            assert (ROOT / script).exists(), command
            source = (ROOT / script).read_text() + (ROOT / "running.py").read_text()
            after = command.split(script, 1)[1].split("#")[0]
            for flag in re.findall(r"--([a-z0-9-]+)", after):
                names = (flag, flag.removeprefix("no-"))
                found = [f'"--{name}"' in source or f'"{name}"' in source for name in names]
                assert any(found), command
