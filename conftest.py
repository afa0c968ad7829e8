"""Pytest's set-up: import order, shape types, and the same conditions for every test.

beartype comes first. nnsight mounts ``.save`` on ``object``, and importing beartype after that
crashes; the package itself never imports beartype.
"""

import beartype  # noqa: F401, I001  (before anything that may import nnsight)

import ast
import inspect
import os
import random
import sys
import types
from importlib.abc import MetaPathFinder

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
from jaxtyping import install_import_hook  # noqa: E402

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


class AnnotationNames(MetaPathFinder):
    """Makes the names in a hooked module's annotations exist when it runs.

    The kernel imports jaxtyping only under ``TYPE_CHECKING``, since no server has it. Then its
    annotations cannot be resolved, and beartype lets every argument pass without a word. So the
    guarded imports run first, in the module's own namespace, and the hook has types to check.
    """

    def __init__(self, hooked: MetaPathFinder) -> None:
        self.hooked = hooked

    def find_spec(self, fullname, path=None, target=None):
        spec = self.hooked.find_spec(fullname, path, target)
        if spec is None:
            return None
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module):
            exec(type_checking_imports(loader.get_source(fullname)), vars(module))
            execute(module)

        loader.exec_module = exec_module
        return spec


# SAEFEAT_UNTYPED=1 runs the tests on the functions as users have them.
if "SAEFEAT_UNTYPED" not in os.environ:
    hook = install_import_hook(TYPED, "beartype.beartype").hook
    sys.meta_path.remove(hook)
    sys.meta_path.insert(0, AnnotationNames(hook))


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


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
