"""The rules of CONTRIBUTING.md: who may import whom, what is public, what src never contains.

Most of it reads the source and runs nothing, so a broken module is reported by name.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
import types
import typing
import zipfile
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import NamedTuple

import jaxtyping
import pytest
import torch
from jaxtyping import Float

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"

# The map of CONTRIBUTING.md. A module may import from its own level and from those below it. A
# name covers the modules under it as well; the longest name that fits decides.
LEVELS: dict[str, int] = {
    "saefeat.errors": 0,
    "saefeat.checks": 0,
    "saefeat.arguments": 0,
    "saefeat.files": 1,
    "saefeat.model": 1,
    "saefeat.text": 1,
    "saefeat.dictionaries": 2,
    "saefeat.results": 3,
    "saefeat.values": 4,
    "saefeat.controls": 4,
    "saefeat.loading": 4,
    "saefeat.shipping": 4,
    "saefeat.verbs": 5,
    "saefeat.hub": 6,
    "saefeat.generation": 6,
    "saefeat.metrics": 7,
    "saefeat.attribution": 7,
    "saefeat.running": 8,
    "saefeat.remote": 8,
    "saefeat.validation": 9,
    "saefeat.verification": 9,
    "saefeat": 10,  # the package's own __init__ and nothing else
    "saefeat.studies": 11,
}
# The kernel travels to servers: torch, nnsight and the standard library are all there is.
# Names needed only for its annotations belong under `if TYPE_CHECKING:`.
KERNEL = "saefeat.kernel"
KERNEL_MAY_IMPORT = {"torch", "nnsight", *sys.stdlib_module_names}
KERNEL_MAY_NAME_IN_TYPES = {"jaxtyping"}

PUBLIC = ("attribution", "controls", "dictionaries", "errors", "generation", "hub")
PUBLIC += ("metrics", "remote", "results", "validation", "values", "verification")
"""The public submodules: each has an ``__all__``, and a page of the API."""
MOST_NAMES = 25

LOOSE = {"saefeat.errors", "saefeat.checks", "saefeat.arguments"}
"""The only modules at the top that are not rooms."""
MOST_PARAMETERS = 11

STUDIES = "saefeat.studies"
SAE_LENS_IMPORTERS = ("saefeat.loading", STUDIES)
NEVER_AT_MODULE_LEVEL = {"sae_lens", "transformer_lens", "pandas", "matplotlib", "beartype"}
NEVER_CALLED = {"print", "torch.load", "eval", "exec", "breakpoint"}
LONGEST_FUNCTION = 45


typed_run = pytest.mark.skipif(
    "SAEFEAT_UNTYPED" in os.environ, reason="SAEFEAT_UNTYPED leaves the import hook out"
)


class Import(NamedTuple):
    """One imported module: where the statement stands, and when it runs."""

    module: str
    names: tuple[str, ...]
    line: int
    at_module_level: bool
    for_types_only: bool


# ------------------------------------------------------------------ reading the source


@cache
def sources() -> dict[str, Path]:
    """Every module of the package: dotted name → file."""
    found = {}
    for path in sorted((SRC / "saefeat").rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(encoding="utf-8"), str(sources()[module]))


def where(module: str, line: int) -> str:
    return f"{sources()[module].relative_to(ROOT)}:{line}"


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def absolute(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of what ``from ..x import y`` imports from."""
    if not node.level:
        return node.module or ""
    package = module.split(".")
    climbs = node.level - (sources()[module].name == "__init__.py")
    base = package[: len(package) - climbs] if climbs else package
    return ".".join([*base, *([node.module] if node.module else [])])


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def dynamically_imported(node: ast.AST) -> str | None:
    """The name in ``import_module("name")`` or ``__import__("name")``."""
    if not isinstance(node, ast.Call) or not node.args:
        return None
    function, name = ast.unparse(node.func), node.args[0]
    if function.endswith(("import_module", "__import__")) and isinstance(name, ast.Constant):
        return str(name.value)
    return None


@cache
def imported_by(module: str) -> list[Import]:
    """All imports of a module: nested ones, guarded ones and import_module("…") too."""
    found: list[Import] = []

    def add(name: str, names: tuple[str, ...], node: ast.AST, state: tuple[bool, bool]) -> None:
        found.append(Import(name, names, node.lineno, *state))

    def visit(node: ast.AST, top: bool, typed: bool) -> None:
        state = (top, typed)
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name, (), node, state)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                add(inner, (), node, state) if inner in sources() else add(
                    base, (alias.name,), node, state
                )
        elif name := dynamically_imported(node):
            add(name, (), node, state)
        inside = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = set(map(id, node.body)) if is_type_checking(node) else set()
        for child in ast.iter_child_nodes(node):
            visit(child, inside, typed or id(child) in guarded)

    visit(tree(module), True, False)
    return found


def at_import_time(item: Import) -> bool:
    return item.at_module_level and not item.for_types_only


def level(module: str) -> int | None:
    """The level of a module, or None when the table has no room for it."""
    names = module.split(".")
    for end in range(len(names), 1, -1):
        room = ".".join(names[:end])
        if room in LEVELS:
            return LEVELS[room]
    return LEVELS["saefeat"] if module == "saefeat" else None


def qualified_functions(module: str) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    found = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    found.append((name, child))
                visit(child, f"{name}.")
            else:
                visit(child, prefix)

    visit(tree(module), "")
    return found


def fail_with(problems: list[str], rule: str) -> None:
    if problems:
        pytest.fail(
            "\n".join([rule, *(f"  {problem}" for problem in dict.fromkeys(problems))]),
            pytrace=False,
        )


def room(module: str) -> str:
    """``saefeat.kernel`` for everything in it."""
    return ".".join(module.split(".")[:2])


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The nodes that reach each other, group by group."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        reached[start] = seen
    return {
        frozenset(other for other in reached[node] if node in reached.get(other, ()))
        for node in graph
        if node in reached[node]
    }


# ------------------------------------------------------------------ (a) rooms


def test_the_source_is_there():
    assert "saefeat" in sources(), f"no package under {SRC}"


def test_every_module_has_a_room():
    missing = [
        f"{name}: add it to LEVELS in tests/test_house.py, at the level of its room"
        for name in sources()
        if level(name) is None and not within(name, KERNEL)
    ]
    fail_with(missing, "Modules that belong to no room of DESIGN section 4:")


def test_no_room_imports_upward():
    problems = []
    for module in sources():
        own = level(module)
        if own is None or within(module, KERNEL):
            continue  # reported by the two tests beside this one
        for item in imported_by(module):
            if not within(item.module, "saefeat") or within(item.module, KERNEL):
                continue
            other = level(item.module)
            if other is None or other > own:
                problems.append(
                    f"{where(module, item.line)}: {module} (level {own}) imports "
                    f"{item.module} (level {other})"
                )
    fail_with(problems, "Imports that point upward:")


def test_no_files_and_no_rooms_import_in_a_circle():
    """Imports for types count: who reads one file of a circle has to read them all."""
    files: dict[str, set[str]] = {module: set() for module in sources()}
    rooms: dict[str, set[str]] = {}
    for module in filter(lambda name: name != "saefeat", sources()):
        for item in imported_by(module):
            if item.module in files:
                files[module] |= {item.module} - {module}
                rooms.setdefault(room(module), set()).update({room(item.module)} - {room(module)})
    problems = [
        ", ".join(sorted(circle)) for circle in sorted(circles(files) | circles(rooms), key=sorted)
    ]
    fail_with(problems, "Files or rooms that import each other:")


def test_a_circle_would_show():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {frozenset("bc")}
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == set()


def test_what_is_at_the_top_is_a_room():
    loose = {m for m in sources() if m.count(".") == 1 and sources()[m].name != "__init__.py"}
    assert loose == LOOSE


def test_contributing_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {room(m).removeprefix("saefeat.") for m in sources() if m not in {"saefeat", *LOOSE}}
    assert {name for name in rooms if f"| `{name}" not in text} == set()


def test_a_room_lists_its_files():
    """Each room's docstring names every file in it, and no bullet a file that is gone."""
    problems = []
    for init in sorted((SRC / "saefeat").glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        inside = {path.stem for path in init.parent.iterdir() if path.suffix in ("", ".py")}
        inside -= {"__init__", "__pycache__"}
        named = set(re.findall(r"``([a-z_]+)``", text))
        public = set(vars(import_module(f"saefeat.{init.parent.name}")))
        bullets = re.findall(r"^\* (.*?):", text, re.MULTILINE | re.DOTALL)
        gone = {name for head in bullets for name in re.findall(r"``([a-z_]+)``", head)}
        problems += [f"{init.parent.name} lacks {name}" for name in sorted(inside - named)]
        problems += [f"{init.parent.name} names {n}" for n in sorted(gone - inside - public)]
    fail_with(problems, "A room's docstring and its files differ:")


def test_files_that_are_named_are_there():
    """Comments, docstrings and pages name files and modules; those move."""
    rooms = "|".join(path.parent.name for path in (SRC / "saefeat").glob("*/__init__.py"))
    pattern = re.compile(rf"\bsaefeat\.({rooms})\.([a-z_]+)|`({rooms})/([a-z_]+)\.py`")
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    problems = []
    for path in [*pages, *(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for match in pattern.finditer(path.read_text(encoding="utf-8")):
            folder, name = match[1] or match[3], match[2] or match[4]
            place, known = SRC / "saefeat" / folder, vars(import_module(f"saefeat.{folder}"))
            if not ((place / f"{name}.py").is_file() or (place / name).is_dir() or name in known):
                problems.append(f"{path.relative_to(ROOT)}: {match[0]}")
    fail_with(problems, "Named, and not there:")


def test_pages_name_tests_that_are_there():
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    named = {
        name
        for page in pages
        for name in re.findall(r"\btests/\w+\.py", page.read_text(encoding="utf-8"))
    }
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_the_kernel_imports_only_what_a_server_has():
    problems = []
    for module in sources():
        if not within(module, KERNEL):
            continue
        for item in imported_by(module):
            root = item.module.split(".")[0]
            allowed = within(item.module, KERNEL) or root in KERNEL_MAY_IMPORT
            if item.for_types_only:
                allowed = allowed or root in KERNEL_MAY_NAME_IN_TYPES
            if not allowed:
                problems.append(f"{where(module, item.line)}: imports {item.module}")
    fail_with(
        problems,
        "The kernel may import torch, nnsight, the standard library and itself; jaxtyping only "
        "under `if TYPE_CHECKING:`:",
    )


def kernel_functions(name: str) -> list[types.FunctionType]:
    """The functions that a kernel module defines; none for other modules."""
    values = vars(import_module(name)).values() if within(name, KERNEL) else ()
    return [value for value in values if inspect.isfunction(value) and value.__module__ == name]


@typed_run
def test_kernel_annotations_can_be_checked():
    """beartype skips, without a word, an annotation whose names it cannot resolve."""
    problems = []
    for name in sources():
        for function in kernel_functions(name):
            try:
                typing.get_type_hints(inspect.unwrap(function))
            except NameError as error:
                problems.append(f"{name}.{function.__qualname__}: {error}")
    fail_with(problems, "Kernel annotations that name nothing:")


@typed_run
def test_kernel_annotations_are_checked():
    """The import hook of conftest.py is at work: what is no tensor is refused by name."""
    unchecked = []
    for name in sources():
        for function in kernel_functions(name):
            arguments = inspect.signature(function).parameters.values()
            shaped = [a.name for a in arguments if "Tensor, " in str(a.annotation)]
            if not shaped:
                continue
            try:
                function(**{a.name: "no tensor" for a in arguments})
            except jaxtyping.TypeCheckError:
                continue
            except Exception as error:
                unchecked.append(f"{function.__qualname__}: {error!r} instead of TypeCheckError")
            else:
                unchecked.append(f"{function.__qualname__}: accepts text for {shaped}")
    fail_with(unchecked, "Kernel functions whose shape types are not checked:")


def same_size(x: Float[torch.Tensor, "n d"], y: Float[torch.Tensor, "d"]) -> Shaped:
    return y if len(x) else x


Shaped = Float[torch.Tensor, "d"]


def test_sizes_are_checked_within_a_call_and_not_between_calls(pytestconfig):
    checked = pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py")).checked
    typed = checked(same_size)
    for size in (2, 3):  # each call's own
        assert len(typed(torch.ones(1, size), torch.ones(size))) == size
    for wrong in (
        (torch.ones(1, 2), torch.ones(3)),  # a parameter
        (torch.ones(1, 2), torch.ones(2).long()),
        (torch.ones(0, 2), torch.ones(2)),  # the result
    ):
        with pytest.raises(jaxtyping.TypeCheckError, match="same_size"):
            typed(*wrong)
    assert inspect.unwrap(typed) is same_size


# ------------------------------------------------------------------ (b) studies


def public_names(module: str = "saefeat") -> list[str]:
    """A module's ``__all__`` read from the source, so that this needs no import."""
    for node in tree(module).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return list(ast.literal_eval(node.value))
    return []


def test_studies_use_only_the_public_surface():
    """``sf.name`` for the names at the top, ``sf.room.name`` for those of public submodules."""
    top, problems = {*public_names(), "__version__", "studies", *PUBLIC}, []
    inside = {room: set(public_names(f"saefeat.{room}")) for room in PUBLIC}
    for module in filter(lambda name: within(name, STUDIES), sources()):
        for item in imported_by(module):
            if within(item.module, "saefeat") and not within(item.module, STUDIES):
                bad = item.module != "saefeat" or not set(item.names) <= top
                problems += [f"{where(module, item.line)}: imports {item.module}"] if bad else []
        for node in ast.walk(tree(module)):
            if not isinstance(node, ast.Attribute):
                continue
            text = ast.unparse(node).split(".")
            if text[0] not in {"sf", "saefeat"} or not isinstance(
                node.value, ast.Name | ast.Attribute
            ):
                continue
            public = text[1] in top
            if public and text[1] in inside and len(text) > 2:
                public = text[2] in inside[text[1]]
            if not public:
                problems.append(f"{where(module, node.lineno)}: {'.'.join(text)} is not public")
    fail_with(problems, "A study needs something that the public surface does not offer:")


# ------------------------------------------------------------------ (c) what src never contains


def test_forbidden_calls():
    problems = [
        f"{where(module, node.lineno)}: {ast.unparse(node.func)}(…)"
        for module in sources()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in NEVER_CALLED
    ]
    fail_with(problems, f"Never called in src ({', '.join(sorted(NEVER_CALLED))}):")


def test_no_bare_except():
    problems = [
        where(module, node.lineno)
        for module in sources()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    fail_with(problems, "A bare except swallows Ctrl-C; name the exception:")


def test_forbidden_imports():
    problems = []
    for module in sources():
        for item in imported_by(module):
            root = item.module.split(".")[0]
            at = f"{where(module, item.line)}: {item.module}"
            if root in {"pickle", "cPickle", "dill", "joblib"}:
                problems.append(f"{at} (pickle runs what it reads; use safetensors and JSON)")
            elif root == "beartype":
                problems.append(f"{at} (crashes after nnsight; it belongs to the tests)")
            elif item.module == "torch" and "load" in item.names:
                problems.append(f"{at}.load (it unpickles)")
            elif root in NEVER_AT_MODULE_LEVEL and at_import_time(item):
                problems.append(f"{at} (heavy or optional: import it where it is used)")
            if root == "sae_lens" and not any(within(module, r) for r in SAE_LENS_IMPORTERS):
                problems.append(f"{at} (only saefeat.loading and the studies import sae_lens)")
    fail_with(problems, "Imports that src does without:")


def test_functions_are_short():
    problems = []
    for module in sources():
        for name, node in qualified_functions(module):
            body = node.body[0]
            documented = ast.get_docstring(node, clean=False) is not None
            docstring = body.end_lineno - body.lineno + 1 if documented else 0
            length = node.end_lineno - node.lineno + 1 - docstring
            if length > LONGEST_FUNCTION:
                problems.append(f"{where(module, node.lineno)}: {name} has {length} lines")
    fail_with(problems, f"Functions longer than {LONGEST_FUNCTION} lines (docstrings not counted):")


def test_public_functions_take_few_parameters():
    """Methods of public classes too. What needs more has values that belong together."""
    problems = []
    for module in ["saefeat", *(f"saefeat.{name}" for name in PUBLIC)]:
        for name in public_names(module):
            value = getattr(import_module(module), name)
            own = vars(value).items() if inspect.isclass(value) else [("", value)]
            for inner, function in own:
                function = getattr(function, "__func__", function)
                if inner.startswith("_") or not inspect.isfunction(function):
                    continue
                count = len(inspect.signature(function).parameters)
                if count > MOST_PARAMETERS:
                    problems.append(f"{module}.{name}{inner and f'.{inner}'} takes {count}")
    fail_with(problems, f"Functions of more than {MOST_PARAMETERS} parameters:")


# ------------------------------------------------------------------ (d) import in a new process


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        cwd=SRC,  # importable here even where the package is not installed
        timeout=600,
    )


IMPORTED = """
import saefeat, sys, json, warnings
loaded, error = sorted(sys.modules), ""
warnings.simplefilter("ignore")  # what beartype says is not saefeat's
try:
    import beartype
except Exception as found:
    error = f"{type(found).__name__}: {found}"
print(json.dumps([loaded, error]))
"""


@pytest.fixture(scope="module")
def imported():
    """The modules that ``import saefeat`` loads, and what ``import beartype`` says after it."""
    done = python(IMPORTED, "-Werror")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    loaded, error = json.loads(done.stdout)
    return {name.split(".")[0] for name in loaded}, error


def test_import_is_light_and_silent(imported):
    loaded, _ = imported
    assert "saefeat" in loaded
    assert loaded & NEVER_AT_MODULE_LEVEL == set()


def test_beartype_may_be_imported_first():
    done = python("import beartype, saefeat")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_beartype_imported_second_fails_for_nnsights_reason_alone(imported):
    """nnsight 0.8.1 mounts .save on object; after that beartype cannot be imported.

    When nnsight mends it this test fails: then conftest.py need not import beartype first.
    """
    nnsight = python("import nnsight; import beartype")
    assert nnsight.returncode != 0, "nnsight then beartype works now: conftest.py can say so"
    assert "TypeError: unhashable type: 'instancemethod'" in nnsight.stderr

    loaded, error = imported
    assert error == (nnsight.stderr.splitlines()[-1] if "nnsight" in loaded else "")


# ------------------------------------------------------------------ (e) the public surface


def test_the_top_has_few_names():
    assert len(public_names()) <= MOST_NAMES


def is_submodule(value: object) -> bool:
    """Submodules import themselves into the namespace, and so do __future__'s features."""
    return isinstance(value, types.ModuleType | __future__._Feature)


@pytest.mark.parametrize("module", ["saefeat", *(f"saefeat.{room}" for room in PUBLIC)])
def test_all_is_sorted_and_is_the_namespace(module):
    listed, space = public_names(module), import_module(module)
    assert listed == sorted(set(listed)), "write __all__ as one plain list, sorted"
    assert all(hasattr(space, name) for name in listed)
    shadowed = [name for name in listed if is_submodule(getattr(space, name))]
    assert shadowed == [], "a submodule stands where the public name should be"
    if module == "saefeat.errors":
        return  # its own file: what is private there begins with an underscore or is `explain`
    found = {n for n in dir(space) if not n.startswith("_") and not is_submodule(getattr(space, n))}
    assert set(listed) == found


def test_public_submodules_are_reached_from_the_top():
    import saefeat

    assert all(isinstance(getattr(saefeat, room), types.ModuleType) for room in PUBLIC)


def test_every_public_name_has_a_docstring_with_an_example():
    example = re.compile(r"^\s*(>>> |```python)", re.MULTILINE)
    problems = []
    for module in ["saefeat", *(f"saefeat.{room}" for room in PUBLIC)]:
        for name in public_names(module):
            value = getattr(import_module(module), name)
            # A class must have its own: inherited text is about something else.
            text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
            if not text:
                problems.append(f"{module}.{name}: no docstring")
            elif not example.search(text):
                problems.append(f"{module}.{name}: no example (`>>>` or a ```python block)")
    fail_with(problems, "Public names that do not show how they are used:")


def test_every_public_name_has_its_place_in_the_api():
    """One page a public module; a name of two modules is shown once, and linked from the other."""
    pages = {room: (ROOT / "docs" / "api" / f"{room}.md").read_text() for room in ("top", *PUBLIC)}
    missing = []
    for room in ("top", *PUBLIC):
        module = "saefeat" if room == "top" else f"saefeat.{room}"
        for name in public_names(module):
            shown, linked = f"::: {module}.{name}\n", f"[{name}](top.md)"
            if shown not in pages[room] and linked not in pages[room]:
                missing.append(f"docs/api/{room}.md: {name}")
    fail_with(missing, "Public names without a place in the API's pages:")


def test_one_version():
    import saefeat

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation is not None
    assert citation[1] == version
    assert metadata.version("saefeat") == version, "install again: pip install -e ."
    assert getattr(saefeat, "__version__", version) == version


def test_the_wheel_carries_the_data(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(SRC))
        for path in (SRC / "saefeat").rglob("*")
        if path.suffix in {".py", ".typed", ".json", ".safetensors", ".jinja"}
    }
    assert "saefeat/py.typed" in expected
    assert expected - packed == set(), "files that the wheel left out"
    more = {name for name in packed - expected if ".dist-info/" not in name}
    assert more == set(), "files that belong to no user"
    assert [name for name in packed if "train" in name or "loopback" in name] == []
