"""Programs name themselves as they are started: ``python -m MODULE``, in --help and in errors."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for folder in ("deltasam_fairseq", "examples", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "argparse.ArgumentParser(" in path.read_text()
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_parsers_have_a_program(path):
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        call = ast.get_source_segment(text, node) if isinstance(node, ast.Call) else ""
        if not call.startswith("argparse.ArgumentParser("):
            continue
        given = {k.arg: ast.get_source_segment(text, k.value) for k in node.keywords}
        if given.get("add_help") == "False":  # reads options for another parser
            continue
        program = given.get("prog", "").lstrip("f").strip("'\"")
        assert program.startswith("python -m "), f"line {node.lineno}: prog={program!r}"
        name = program.split()[-1]
        assert "{" in name or importlib.util.find_spec(name), f"line {node.lineno}: no {name}"
