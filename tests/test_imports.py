"""Imports point one way, and `import dspark` is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dspark

PACKAGE = Path(dspark.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
# A file may import from a lower layer, and from its own part of the package.
LAYERS = [
    {"errors", "config", "limits", "prompts", "text", "warpers", "core"},
    {"target", "head"},
    {"drafters"},
    {"profiling"},
    {"generation", "grafting"},
    {"train", "measure", "engine", "formats"},
    {"server", "cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
WITHIN_A_LAYER = {
    ("prompts", "errors"),
    ("config", "errors"),
    ("core", "errors"),
    ("limits", "core"),
    ("limits", "errors"),
    ("head", "target"),
    ("grafting", "generation"),
    ("train", "measure"),
    ("server", "cli"),
    ("cli", "server"),
}
CORE_MAY_LOAD = {"torch", "numpy", "dspark", "collections", "dataclasses", "typing", "math", "itertools", "operator"}


def imports(file: str) -> set[str]:
    """Dotted names that a file imports anywhere, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import, line {node.lineno}"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def part_of(file: str) -> str:
    return file.split("/", maxsplit=1)[0].removesuffix(".py")


def file_behind(name: str) -> str | None:
    """The package's own file behind a dotted name, which may end in what that file defines."""
    steps = name.split(".")[1:]
    for length in range(len(steps), -1, -1):
        stem = "/".join(steps[:length])
        for file in (f"{stem}.py", f"{stem}/__init__.py".lstrip("/")):
            if file in FILES:
                return file
    return None


EDGES = {file: {file_behind(name) for name in imports(file) if name.split(".")[0] == "dspark"} - {None} for file in FILES}


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_imports_point_down(file):
    part = part_of(file)
    assert part in LEVEL, f"{file}: {part} has no layer"
    for imported in EDGES[file] - {"__init__.py"}:
        other = part_of(imported)
        allowed = other == part or (part, other) in WITHIN_A_LAYER or LEVEL[other] < LEVEL[part]
        assert allowed, f"{file} imports {imported}"


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("core/")])
def test_core_loads_torch_and_numpy_at_most(file):
    allowed = CORE_MAY_LOAD - ({"torch", "numpy"} if file in ("core/planner.py", "core/calibration.py") else set())
    foreign = {name for name in imports(file) if name.split(".")[0] not in allowed}
    assert not foreign, f"{file} imports {', '.join(sorted(foreign))}"


def test_imports_make_no_cycle():
    finished: set[str] = set()

    def visit(file: str, path: tuple[str, ...]) -> None:
        assert file not in path, f"cycle: {' -> '.join([*path[path.index(file) :], file])}"
        if file not in finished:
            for imported in EDGES[file]:
                visit(imported, (*path, file))
            finished.add(file)

    for file in FILES:
        visit(file, ())


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_import_dspark_loads_no_torch():
    done = run_python(
        "import sys, dspark, dspark.errors, dspark.config, dspark.prompts; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_stay_functions_in_any_order_of_use():
    code = """
import itertools, sys, dspark
names = [name for name in dspark.PUBLIC if name != "UserError"]
for first, second in itertools.permutations(names, 2):
    for module in [m for m in sys.modules if m.startswith("dspark.")]:
        del sys.modules[module]
    for name in [n for n in vars(dspark) if n in dspark.PUBLIC]:
        delattr(dspark, name)
    getattr(dspark, first)
    assert callable(getattr(dspark, second)), f"dspark.{second} is a module once dspark.{first} was used"
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["load_target", "graft"])
def test_the_library_is_imported_quietly(name):
    done = run_python(f"import dspark, logging; dspark.{name}; print(logging.getLogger('torchao').level)")
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = dspark.nonsense
