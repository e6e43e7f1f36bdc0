"""The house rules, read from the source: who may import whom, and what nobody may write."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# From the ground up: a room imports from the floors below its own only, so two rooms of one floor know nothing of each other.
ORDER = "errors values | config console | folders | data | model | infer | evaluate | train export | hub serve cloud board | cli | __main__"
FLOOR = {room: number for number, rooms in enumerate(ORDER.split(" | ")) for room in rooms.split()}
PACKAGE = Path(__file__).parent.parent / "qwenvl_ft"
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py") if path.stem != "__init__"}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(tree: ast.Module) -> list[tuple[str, str]]:
    """(module, name here) of everything that is imported anywhere; `from qwenvl_ft import config` is qwenvl_ft.config."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, alias.asname or alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            whole = node.module == "qwenvl_ft"
            found += [(f"{node.module}.{alias.name}" if whole else node.module, alias.asname or alias.name) for alias in node.names]
    return found


def nodes(kind: type) -> list[tuple[str, ast.AST]]:
    return [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kind)]


def room_of(name: str) -> str:
    return name.split("/")[0]


def test_every_room_has_its_floor():
    assert FLOOR.keys() == {room_of(name) for name in FILES}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_room_imports_only_from_rooms_below_it(name):
    room = room_of(name)
    ours = {module.split(".")[1] for module, _ in imports(TREES[name]) if module.startswith("qwenvl_ft.")} & FLOOR.keys() - {room}
    assert [other for other in ours if FLOOR[other] >= FLOOR[room]] == []


def test_no_file_is_too_long_for_one_thought():
    long = {name: lines for name, path in FILES.items() if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 500}
    assert not long


def test_nobody_prints_but_the_console():
    printing = [
        (name, node.lineno) for name, node in nodes(ast.Call) if isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert [place for place in printing if place[0] != "console"] == []


def test_whoever_catches_everything_raises_it_again():
    for name, node in nodes(ast.ExceptHandler):
        everything = node.type is None or any(
            isinstance(part, ast.Name) and part.id in ("Exception", "BaseException") for part in ast.walk(node.type)
        )
        raises = any(isinstance(part, ast.Raise) for part in ast.walk(node))
        assert not everything or raises, f"{name}.py:{node.lineno}"


def test_no_function_of_ours_takes_arguments_without_names():
    assert [
        (name, node.lineno) for name, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) if node.args.kwarg
    ] == []


def test_nobody_writes_into_what_others_wrote():
    """media.py once set PIL.Image.MAX_IMAGE_PIXELS to None, for whoever imported it."""
    written = []
    for name, tree in TREES.items():
        theirs = {here for module, here in imports(tree) if not module.startswith("qwenvl_ft")}
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
            owners = [target.value for target in targets if isinstance(target, ast.Attribute | ast.Subscript)]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                owners = node.args[:1]
            roots = {part.id for owner in owners for part in ast.walk(owner) if isinstance(part, ast.Name)}
            if roots & theirs:
                written.append(f"{name}.py:{node.lineno}")
    assert written == []


def test_what_is_imported_is_declared():
    """Four packages were here only because others brought them, and whoever leaves one out next breaks us."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {canonicalize_name(Requirement(text).name) for of in lists for text in of}
    of_alipai = {"oss2", "Tea", "alibabacloud_credentials"}  # of the versions that it pins
    wanted = {module.split(".")[0] for tree in TREES.values() for module, _ in imports(tree)}
    wanted -= {"qwenvl_ft", *of_alipai, *sys.stdlib_module_names}
    known = packages_distributions()
    lacking = {name for name in wanted if declared.isdisjoint(map(canonicalize_name, known.get(name, [name])))}
    assert len(wanted) > 25 and not lacking


def test_every_import_of_the_package_that_stands_in_a_text_is_there():
    """A benchmark that hands Python a program as text imported a module that had moved, and no test read it."""
    root = PACKAGE.parent
    files = [path for pattern in ("scripts/*.py", "tests/**/*.py", "docs/**/*.md", "*.md") for path in root.glob(pattern)]
    wanted = {
        (module, name.split(" as ")[0].strip("() \"',;"))
        for path in files
        for module, names in re.findall(r"from (qwenvl_ft(?:\.\w+)*) import ([\w ,]+)", path.read_text(encoding="utf-8"))
        for name in names.split(",")
        if name.strip()
    }
    assert len(wanted) > 100
    lacking = [f"{module}.{name}" for module, name in sorted(wanted) if not defines(module, name)]
    assert lacking == []


def defines(module: str, name: str) -> bool:
    """Whether a module of the package has this name at its top, or a module below it is called so."""
    at = PACKAGE.parent / module.replace(".", "/")
    if (at / f"{name}.py").is_file() or (at / name).is_dir():
        return True
    file = at / "__init__.py" if at.is_dir() else at.with_suffix(".py")
    return file.is_file() and re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) is not None
