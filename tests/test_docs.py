"""docs/: the map names every file; links and names of files lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
PAGES += sorted((ROOT / "examples").rglob("README.md"))
FOLDERS = ("deltasam_fairseq", "examples", "scripts", "tests")

OF_OTHERS = {"average_checkpoints.py", "evaluate-v1.1.py", "evaluate-v2.0.py"}


def test_the_map_has_every_file_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.split("```")[1]
    listed, folder = set(), []
    for line in tree.strip("\n").splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folder = folder[:depth]
        if name.endswith("/"):
            folder.append(name[:-1])
        else:
            listed.add("/".join([*folder, name]))
    there = {
        str(path.relative_to(ROOT))
        for top in ("deltasam_fairseq", "examples", "scripts")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed == there


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    there = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    named = set(re.findall(r"[\w.-]*\w\.py\b", text))
    assert named <= there | OF_OTHERS | {"setup.py"}, named - there
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
