"""algorithms <- {optim, criterions, lr_schedulers} <- trainer <- __init__, models <- tasks <-
__init__: read from the imports themselves."""

import ast
from pathlib import Path

import pytest

import deltasam_fairseq

PACKAGE = Path(deltasam_fairseq.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What a layer may import of this package; anything else of it is forbidden.
ALLOWED = {
    "algorithms": {"algorithms"},
    "optim": {"algorithms", "optim"},
    "criterions": {"algorithms", "criterions"},
    "lr_schedulers": {"algorithms", "lr_schedulers"},
    "models": {"models"},
    "tasks": {"models", "tasks"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "deltasam_fairseq":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layer_imports_only_what_is_below_it(path):
    layer = path.relative_to(PACKAGE).parts[0]
    own = {m.split(".")[1] for m in imports(path) if m.startswith("deltasam_fairseq.")}
    if layer in ALLOWED:
        assert own <= ALLOWED[layer], f"{path.name} imports {own - ALLOWED[layer]}"
    if layer == "algorithms":
        roots = {m.split(".")[0] for m in imports(path)}
        assert not roots & {"fairseq", "omegaconf", "logging"}, roots
    if layer not in ("__init__.py", "install.py"):
        assert not own & {"install"}


def test_examples_and_scripts_are_not_imported_by_the_package():
    roots = {m.split(".")[0] for path in FILES for m in imports(path)}
    assert not roots & {"examples", "scripts", "tests", "tiny"}
