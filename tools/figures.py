"""The figures of the house, printed: python tools/figures.py.

How much code there is, how it hangs together, and how much of it one call passes through. The
bars are those of the issue that asked for the house; CONTRIBUTING.md says what they are for.
"""

from __future__ import annotations

import ast
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "saefeat"
sys.path.insert(0, str(SRC.parent))  # the figures of the tree that this file is in
LINES_BEFORE = 24_877
"""Lines of source without the studies at commit 6d8666f, before the house was moved."""


class Figure(NamedTuple):
    """One line of the report; ``bar`` is the most that is wanted, None where none was set."""

    name: str
    value: float
    bar: float | None

    def __str__(self) -> str:
        value = f"{self.value:,.1f}".removesuffix(".0")
        bar = "" if self.bar is None else f"  (bar {self.bar:,})".replace(".0)", ")")
        over = self.bar is not None and self.value > self.bar
        return f"{self.name:58}{value:>9}{bar}{'  OVER' if over else ''}"


# ---------------------------------------------------------------- reading the source


def sources(studies: bool = True) -> dict[str, Path]:
    """Dotted module name → file."""
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        parts = ("saefeat", *path.relative_to(SRC).with_suffix("").parts)
        if studies or "studies" not in parts:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of ours that a module imports anywhere: nested and for types only as well."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{start}.{alias.name}"
                yield inner if inner in known else start if start in known else ""


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan), of at least two."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def file_graph() -> dict[str, set[str]]:
    """Which file imports which. A room's ``__init__`` only lists, and is left out."""
    known = sources()
    return {
        module: {m for m in imports(module, path, known) if m and m != module}
        for module, path in known.items()
        if path.name != "__init__.py"
    }


def room_of(module: str) -> str:
    """The room a module lies in: ``saefeat.verbs.edits`` → ``verbs``; the studies are one."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "saefeat"


def room_graph() -> dict[str, set[str]]:
    """Which room imports which."""
    graph: dict[str, set[str]] = {}
    for module, others in file_graph().items():
        rooms = {room_of(other) for other in others} - {room_of(module), "saefeat"}
        graph.setdefault(room_of(module), set()).update(rooms)
    return graph


def function_lengths() -> list[int]:
    """Lines of every function outside the studies, without its docstring."""
    lengths = []
    for path in sources(studies=False).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node, clean=False)
                body = node.body[0]
                documented = (body.end_lineno or 0) - body.lineno + 1 if text is not None else 0
                lengths.append((node.end_lineno or 0) - node.lineno + 1 - documented)
    return sorted(lengths)


def lines_in_raise(path: Path) -> int:
    """Lines of ``raise`` statements."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return sum((n.end_lineno or 0) - n.lineno + 1 for n in nodes if isinstance(n, ast.Raise))


def comments(path: Path) -> int:
    """Lines with a comment."""
    with path.open("rb") as file:
        tokens = tokenize.tokenize(file.readline)
        return sum(token.type == tokenize.COMMENT for token in tokens)


def parameters() -> tuple[int, str]:
    """The most parameters that a public function has, and its name."""
    import inspect

    import saefeat

    rooms = [saefeat, *(v for v in vars(saefeat).values() if inspect.ismodule(v))]
    counts = []
    for room in rooms:
        for name in getattr(room, "__all__", ()):
            value = getattr(room, name)
            if inspect.isfunction(value):
                counts.append((len(inspect.signature(value).parameters), name))
    return max(counts)


# ---------------------------------------------------------------- what one call passes through


def passed(call: Callable[[], Any]) -> tuple[int, int]:
    """Distinct functions of ours that a call enters, by file and name, and their files."""
    seen: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(SRC)):
            seen.add((code.co_filename, code.co_name))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(seen), len({file for file, _ in seen})


def calls() -> dict[str, Callable[[], Any]]:
    """The calls that are followed, on the tiny model."""
    import nnsight

    import saefeat as sf
    from saefeat.studies.refusal import tiny

    model = tiny.model("chat")
    saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
    ablate, metric = sf.Ablate(saes.latents({2: [7]})), sf.logit_diff(5, 6)

    def traced() -> None:
        with model.trace("hello"):
            log = nnsight.save(ablate(model))  # noqa: F841  (the block must leave a value)

    return {
        "one ablated latent in one trace": traced,
        "run, three tokens": lambda: sf.run(model, ["hello"], ablate, max_new_tokens=3),
        "AtP": lambda: sf.Attribute(saes, metric)(model, ["hello"]),
    }


BARS = {"one ablated latent in one trace": (60, 12), "AtP": (120, 20)}


def walks() -> Iterator[Figure]:
    """Functions and files that each call passes."""
    for name, call in calls().items():
        functions, files = passed(call)
        most = BARS.get(name, (None, None))
        yield Figure(f"{name}: functions", functions, most[0])
        yield Figure(f"{name}: files", files, most[1])


def shipped() -> int:
    """Bytes of code that one ablated latent adds to an empty block's request."""
    import nnsight

    import saefeat as sf
    from saefeat.remote.preflight import Capture
    from saefeat.shipping.payload import weight
    from saefeat.studies.refusal import tiny
    from saefeat.verbs.lower import lower

    model = tiny.model("chat")
    latent = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post").latents({2: [7]})
    ablate, bare, edited = sf.Ablate(latent), Capture(), Capture()
    with model.trace("hello", backend=bare):
        nnsight.save(model.output.logits)
    bound = ablate.bind(model)
    with model.trace("hello", backend=edited):
        nnsight.save(bound(model))
    return len(edited.raw) - len(bare.raw) - weight(lower(ablate, model).actions)


# ---------------------------------------------------------------- the report


def figures() -> Iterator[Figure]:
    """Every figure, in the order of the report."""
    import saefeat

    files = sources(studies=False)
    text = "\n".join(path.read_text(encoding="utf-8") for path in files.values())
    lines, lengths = text.count("\n") + 1, function_lengths()
    most, name = parameters()
    yield Figure("names at the top", len(saefeat.__all__), 25)
    yield Figure(f"parameters of a public function, at most ({name})", most, 11)
    yield from walks()
    yield Figure("code that one ablated latent ships, bytes", shipped(), 40_000)
    raised = sum(map(lines_in_raise, files.values()))
    yield Figure("lines inside raise, percent", 100 * raised / lines, 5)
    yield Figure("circles between files", len(circles(file_graph())), 0)
    yield Figure("circles between rooms", len(circles(room_graph())), 0)
    yield Figure("lines of source without the studies", lines, round(0.85 * LINES_BEFORE))
    yield Figure("functions, 90th percentile of lines", lengths[int(0.9 * len(lengths))], 30)
    yield Figure("type: ignore", len(re.findall(r"# type: ignore", text)), 15)
    yield Figure(": Any", len(re.findall(r": Any\b", text)), 176)
    noted = sum(map(comments, files.values()))
    yield Figure("comments in 100 lines", 100 * noted / lines, None)


def main() -> None:
    """Print the report, and the circles if there are any."""
    for figure in figures():
        sys.stdout.write(f"{figure}\n")
    for group in (*circles(file_graph()), *circles(room_graph())):
        sys.stdout.write(f"circle: {', '.join(group)}\n")


if __name__ == "__main__":
    main()
