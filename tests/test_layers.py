"""Which folder may import which: read from the imports themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    shipped: sorted((ROOT / shipped).rglob("*.py"))
    for shipped in ("deltasam_fairseq", "examples", "scripts")
}

# What a plain PyTorch loop uses.
WITHOUT_FAIRSEQ = {"algorithms", "core", "pytorch"}

# Folders and loose modules of the package. Each may import what is on lower floors, and itself:
# nothing of its own floor, so that no circle of folders is possible.
FLOORS = [
    {"algorithms", "fairseq_patches", "markdown", "options"},
    {"bpe", "checkpoints", "core", "models"},
    {"criterions", "data", "lr_schedulers", "optim", "pytorch"},
    {"config_checks", "glue", "squad", "sts", "trainer"},
    {"average", "command_line", "convert", "sharpness"},
    {"plugin"},
    {"__init__", "__main__"},
]


def imports(path):
    """Full names of the modules, or of names in them, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path):
    """The folder, or loose module, right under its root that a file belongs to."""
    return path.relative_to(ROOT).parts[1].replace(".py", "")


def floor(name):
    found = [number for number, rooms in enumerate(FLOORS) if name in rooms]
    assert len(found) == 1, f"{name} is not in FLOORS once: put it on the lowest floor that fits"
    return found[0]


def cases(*shipped):
    return pytest.mark.parametrize(
        "path", [p for s in shipped for p in FILES[s]], ids=lambda p: str(p.relative_to(ROOT))
    )


@cases("deltasam_fairseq")
def test_package_imports_only_what_is_below(path):
    own = {m.split(".")[1] for m in imports(path) if m.startswith("deltasam_fairseq.")}
    higher = {name for name in own - {room(path)} if floor(name) >= floor(room(path))}
    assert not higher, f"{room(path)} imports {higher}, which is not below it"
    roots = {m.split(".")[0] for m in imports(path)}
    assert not roots & {"examples", "scripts", "tests"}
    if room(path) in WITHOUT_FAIRSEQ:
        assert not roots & {"fairseq", "omegaconf"}
    if room(path) == "algorithms":
        assert "logging" not in roots


@cases("examples")
def test_examples_import_themselves_common_and_the_package(path):
    for name in imports(path):
        root, _, rest = name.partition(".")
        assert root not in ("scripts", "tests"), name
        assert root != "examples" or rest.split(".")[0] in ("", "common", room(path)), name


@cases("scripts")
def test_scripts_import_themselves_and_the_package(path):
    assert not {m.split(".")[0] for m in imports(path)} & {"examples", "tests"}


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES["deltasam_fairseq"]} == set().union(*FLOORS)


def test_no_import_runs_in_a_circle():
    """Between files, within a folder too: removing those that import no other leaves none."""
    paths = [path for shipped in FILES.values() for path in shipped]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    names = [name.replace(".__init__", "") for name in names]
    left = {
        name: {m if m in names else m.rpartition(".")[0] for m in imports(path)} - {name}
        for name, path in zip(names, paths)
    }
    while left:
        above = {name: own & left.keys() for name, own in left.items() if own & left.keys()}
        assert len(above) < len(left), f"a circle among {sorted(left)}"
        left = above
