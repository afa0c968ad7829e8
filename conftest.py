"""Pytest's set-up: import order, shape types, and the same conditions for every test.

beartype comes first. nnsight mounts ``.save`` on ``object``, and importing beartype after that
crashes; the package itself never imports beartype.
"""

import beartype  # noqa: I001  (before anything that may import nnsight)

import ast
import functools
import inspect
import os
import random
import sys
import types
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader

# Under xdist every worker gets one thread; alone, a run gets two. Subprocesses inherit this.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
os.environ.update(
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS=str(THREADS),
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
)

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from beartype.roar import BeartypeCallHintViolation  # noqa: E402
from jaxtyping import TypeCheckError, jaxtyped  # noqa: E402

torch.set_num_threads(THREADS)

# The same examples in every run, and no time limit that a busy machine could break.
hypothesis.settings.register_profile(
    "saefeat",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("saefeat")

TYPED = ["saefeat.kernel"]


def type_checking_imports(source: str) -> str:
    """The imports that a module makes only under ``if TYPE_CHECKING:``, as source."""
    guarded = [
        statement
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
    ]
    return "\n".join(ast.unparse(statement) for statement in guarded)


def checked(function):
    """A function whose shape types are checked: parameters as it begins, the result as it ends.

    What jaxtyping's own decorator does, at half the cost: that one binds the arguments, and checks
    the parameters a second time together with the result. In the tests the kernel is called some
    hundred thousand times.
    """
    if inspect.isgeneratorfunction(function):  # sizes would hold for longer than the call
        return jaxtyped(function, typechecker=beartype.beartype)
    strict = beartype.beartype(function)

    @functools.wraps(function)
    def typed(*args, **kwargs):
        with jaxtyped("context"):  # the names of sizes mean the same within one call
            try:
                return strict(*args, **kwargs)
            except BeartypeCallHintViolation as error:
                raise TypeCheckError(str(error)) from error

    return typed


class TypedLoader(SourceFileLoader):
    """Loads a module with every function in it ``checked``, whatever its body is nested in.

    The kernel imports jaxtyping only under ``TYPE_CHECKING``, since no server has it. Then its
    annotations cannot be resolved, and beartype lets every argument pass without a word. So the
    guarded imports run first, in the module's own namespace, and there are types to check.
    """

    def get_code(self, fullname):  # never from a file of bytecode, and never into one
        tree = ast.parse(self.get_source(fullname), self.path)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                # On the line of the `def`: `inspect.getsource` reads from a code's first line.
                name = ast.Name("__checked__", ast.Load())
                node.decorator_list.append(ast.copy_location(name, node))
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module):
        module.__checked__ = checked
        exec(type_checking_imports(self.get_source(module.__name__)), vars(module))
        super().exec_module(module)


class TypedFinder(MetaPathFinder):
    """Finds the modules of ``TYPED``, for ``TypedLoader`` to load."""

    def find_spec(self, fullname, path=None, target=None):
        if not any(fullname == name or fullname.startswith(f"{name}.") for name in TYPED):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = TypedLoader(fullname, spec.origin)
        return spec


# SAEFEAT_UNTYPED=1 runs the tests on the functions as users have them.
if "SAEFEAT_UNTYPED" not in os.environ:
    sys.meta_path.insert(0, TypedFinder())


def ship_plain_functions() -> None:
    """Let the kernel travel to a server as users' does: without the checks put around it here.

    A server has neither jaxtyping nor beartype. The names that exist here for annotations' sake
    must stay here too.
    """
    from nnsight.intervention.serialization import CustomCloudPickler

    reduce = CustomCloudPickler._dynamic_function_reduce

    def plain(self, function):
        bare = inspect.unwrap(function)
        names = {
            name: value
            for name, value in bare.__globals__.items()
            if "jaxtyping" not in (getattr(value, "__module__", None) or "")
            and value is not checked
        }
        if (bare.__module__ or "").startswith("saefeat."):  # none if it came in a request
            copy = types.FunctionType(
                bare.__code__, names, bare.__name__, bare.__defaults__, bare.__closure__
            )
            copy.__kwdefaults__, copy.__module__ = bare.__kwdefaults__, bare.__module__
            bare = copy
        return reduce(self, bare)

    CustomCloudPickler._dynamic_function_reduce = plain


if "SAEFEAT_UNTYPED" not in os.environ:
    ship_plain_functions()


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many random cases tests/test_differential.py runs, from which seed on."""
    parser.addoption("--cases", type=int, default=200, help="random cases of the differential test")
    parser.addoption("--first-seed", type=int, default=0, help="the seed of the first of them")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
