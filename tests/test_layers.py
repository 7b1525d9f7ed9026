"""Which folder may import which: read from the imports themselves."""

import ast
from pathlib import Path

import pytest

import deltasam_fairseq

PACKAGE = Path(deltasam_fairseq.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What a folder may import of this package beside itself; anything else of it is forbidden.
ALLOWED = {
    "algorithms": set(),
    "options.py": set(),
    "fairseq_patches": set(),
    "optim": {"algorithms", "options"},
    "criterions": {"algorithms", "checkpoints", "options"},
    "lr_schedulers": {"algorithms", "options"},
    "models": set(),
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
        found = own - ALLOWED[layer] - {layer}
        assert not found, f"{path.name} imports {found}"
    if layer == "algorithms":
        roots = {m.split(".")[0] for m in imports(path)}
        assert not roots & {"fairseq", "omegaconf", "logging"}, roots
    if layer not in ("__init__.py", "plugin.py"):
        assert not own & {"plugin"}


def test_examples_and_scripts_are_not_imported_by_the_package():
    roots = {m.split(".")[0] for path in FILES for m in imports(path)}
    assert not roots & {"examples", "scripts", "tests"}
