"""Arguments of public functions against their annotations, where they are given.

An annotation is what the documentation shows and what a type checker reads, so it is also what a
call is held to: ``@checked`` on a function, or on a class for its constructor and public methods.
A name, a number or a class where an object belongs would otherwise be taken for the default, or
fail far from the call that gave it. What an annotation cannot say (a range, a shape, one of a few
words) the function checks itself, with ``saefeat.checks``.

An annotation whose name is imported for type checkers alone fits anything.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import numbers
import types
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import fields, is_dataclass
from typing import (
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import nnsight
from torch import Tensor, nn

from .errors import DictionaryError, LatentError, ModelError, PromptError, SaefeatError, SiteError

T = TypeVar("T", bound=Callable[..., Any])


class Kind(NamedTuple):
    """What is said where an object of some class was wanted."""

    error: type[SaefeatError]
    name: str
    example: str


KINDS = {
    "Envoy": Kind(
        ModelError, "an nnsight TransformersModel", "TransformersModel(module, tokenizer=tokenizer)"
    ),
    "Site": Kind(SiteError, "a Site", 'Site.parse("resid_post.3")'),
    "Dictionary": Kind(DictionaryError, "a dictionary", 'load_sae("folder")'),
    "Dictionaries": Kind(DictionaryError, "Dictionaries", 'load_saes("folder")'),
    "Latents": Kind(LatentError, "Latents", "sae.latents([3, 5])"),
    "Tokens": Kind(PromptError, "a Tokens rule", "Tokens.last(1)"),
    "When": Kind(LatentError, "a When", "When(latents, above=1.0)"),
    "Intervention": Kind(LatentError, "an intervention", "Ablate(latents)"),
    "Fixed": Kind(LatentError, "Fixed", "Fixed(latents, readings.mean())"),
    "Paired": Kind(PromptError, "Paired", "Paired(prompts)"),
    "Metric": Kind(SaefeatError, "a metric", 'logit_diff(" yes", " no")'),
    "Method": Kind(SaefeatError, "a method such as AtP() or IG()", "IG(10)"),
    "Backward": Kind(SaefeatError, "RelP() or GradDrop()", "RelP()"),
    "Attribute": Kind(SaefeatError, "an Attribute", "Attribute(saes, metric)"),
    "Attribution": Kind(SaefeatError, "an Attribution", "attribute(model, prompts)"),
    "Readings": Kind(LatentError, "Readings", "run(model, prompts, Probe(latents)).readings[0]"),
    "Greedy": Kind(SaefeatError, "Greedy()", "Greedy()"),
    "Sample": Kind(SaefeatError, "Sample()", "Sample(0.8, seed=0)"),
    "Beams": Kind(SaefeatError, "Beams()", "Beams(4)"),
    "Server": Kind(SaefeatError, "a Server", "Server()"),
    "Tensor": Kind(SaefeatError, "a tensor", "torch.as_tensor(values)"),
}
"""By a class's name. The classes stand above this module, so it cannot import them."""

NUMBERS = {bool: "True or False", int: "an integer", float: "a number", str: "text"}

OPERATORS = {"__or__": " | other", "__and__": " & other", "__sub__": " - other"}
OPERATORS |= {"__init__": "", "__call__": ""}


@overload
def checked(given: T) -> T: ...


@overload
def checked(
    *, error: type[SaefeatError] = SaefeatError, own: tuple[str, ...] = ()
) -> Callable[[T], T]: ...


def checked(
    given: Any = None,
    *,
    error: type[SaefeatError] = SaefeatError,
    own: tuple[str, ...] = (),
) -> Any:
    """Hold calls to their annotations: of a function, or of a class's constructor and methods.

    Args:
        given: the function or class; without it a decorator comes back.
        error: what such a call raises; ``SaefeatError`` leaves it to ``KINDS``.
        own: parameters that the function checks itself, since it can say more about them.
    """
    if given is None:
        return functools.partial(checked, error=error, own=own)
    if not isinstance(given, type):
        return _checked(given, error, own)
    for name, member in list(vars(given).items()):
        if name.startswith("_") and name not in OPERATORS:
            continue
        if isinstance(member, (classmethod, staticmethod)):
            setattr(given, name, type(member)(_checked(member.__func__, error, own)))
        elif inspect.isfunction(member) and not getattr(member, "__isabstractmethod__", False):
            converted = _converted(given) if name == "__init__" else ()
            setattr(given, name, _checked(member, error, (*own, *converted)))
    return given


def _converted(made: type) -> tuple[str, ...]:
    """Fields with a converter, which says itself what it takes."""
    declared = fields(made) if is_dataclass(made) else ()
    return tuple(field.name for field in declared if "converter" in field.metadata)


def _checked(function: Any, error: type[SaefeatError], but: tuple[str, ...]) -> Any:
    signature = inspect.signature(function)
    wanted = functools.cache(functools.partial(_annotations, function, but))

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs).arguments
        except TypeError:  # a missing or unknown argument, of which Python's own error speaks
            return function(*args, **kwargs)
        for parameter, hint in wanted().items():
            if parameter not in bound:
                continue
            several = signature.parameters[parameter].kind is inspect.Parameter.VAR_POSITIONAL
            for value in bound[parameter] if several else (bound[parameter],):
                if not fits(value, hint):
                    raise _error(function.__qualname__, parameter, value, hint, error)
        return function(*args, **kwargs)

    return called


def _annotations(function: Any, but: tuple[str, ...]) -> dict[str, Any]:
    """What each parameter of a function takes."""
    scope = vars(inspect.getmodule(function)) | getattr(function, "__globals__", {})
    spelled = {
        name: hint
        for name, hint in inspect.get_annotations(function).items()
        if name != "return" and name not in but
    }
    named = {
        part.id
        for hint in spelled.values()
        if isinstance(hint, str)
        for part in ast.walk(ast.parse(hint, mode="eval"))
        if isinstance(part, ast.Name)
    }
    for_checkers = {
        name: Any for name in named if name not in scope and not hasattr(builtins, name)
    } | {"TransformersModel": nnsight.Envoy}
    stand_in = types.SimpleNamespace(__annotations__=spelled)
    return get_type_hints(stand_in, globalns=scope, localns=for_checkers)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says.

    A boolean is no number; text and tensors are no sequences: where they will do, it names them.
    """
    origin, inner = get_origin(hint), list(get_args(hint))
    if hint is None or hint is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if hint in NUMBERS:
        return _is_number(value, hint)
    kind = hint if origin is None else origin
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if origin is None:
        return hint is Any or isinstance(value, hint)
    if not isinstance(value, kind) or isinstance(value, (str, bytes, Tensor)):
        return False
    return _inside_fits(value, inner)


def _is_number(value: Any, hint: type) -> bool:
    if hint in (bool, str):
        return isinstance(value, hint)
    kind = numbers.Integral if hint is int else numbers.Real
    return isinstance(value, kind) and not isinstance(value, bool)


def _inside_fits(value: Any, inner: list[Any]) -> bool:
    """The elements of a sequence or mapping; what can be gone through only once is left."""
    if isinstance(value, Mapping) and len(inner) == 2:
        return all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if isinstance(value, (list, tuple, Set)) and inner:
        if isinstance(value, tuple) and len(inner) > 1 and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return all(fits(one, inner[0]) for one in value)
    return True


def _error(
    qualified: str, parameter: str, value: Any, hint: Any, error: type[SaefeatError]
) -> SaefeatError:
    owner, _, name = qualified.rpartition(".")
    function = owner + OPERATORS[name] if name in OPERATORS else qualified
    kinds = [KINDS[name] for name in _classes(hint) if name in KINDS]
    if fits("", hint):  # text will do, which is plainer than a tensor
        kinds = [kind for kind in kinds if kind is not KINDS["Tensor"]]
    cause, example = _cause(value, hint, bool(kinds)), kinds[0].example if kinds else None
    if isinstance(value, type) and _makes(value, hint):
        example = f"{value.__name__}(...)"
    elif inspect.isroutine(value) and not _takes_functions(hint):
        example = f"{value.__qualname__}(...)"
    odd = _misfit(value, hint)
    entries: Any = value
    if odd is not None and isinstance(value, Mapping) and example:
        example = f"{{{odd!r}: {example}, ...}}"
    if " other" in OPERATORS.get(name, ""):
        call = f" Try: {owner.lower()}{OPERATORS[name].replace('other', example or 'another')}"
    else:
        call = "" if example is None else f" Try: {function}(..., {parameter}={example})"
    given = got(value) + ("" if odd is None else f", whose entry {odd!r} is {got(entries[odd])}")
    said = f"{function}: `{parameter}` is {given}, wanted {words(hint)}.{cause}{call}"
    return (kinds[0].error if kinds and error is SaefeatError else error)(said)


def _misfit(value: Any, hint: Any) -> Any:
    """The key or number of the first entry that a mapping or list is refused for."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        origin, inner = get_origin(kind), get_args(kind)
        if not isinstance(origin, type) or not isinstance(value, origin):
            continue
        if isinstance(value, Mapping) and len(inner) == 2:
            return next((k for k, v in value.items() if not fits(v, inner[1])), None)
        if isinstance(value, (list, tuple)) and inner:
            return next((n for n, one in enumerate(value) if not fits(one, inner[0])), None)
    return None


def _cause(value: Any, hint: Any, object_wanted: bool) -> str:
    if isinstance(value, type):
        cause = "the class, where an object made by it belongs"
    elif inspect.isroutine(value) and not _takes_functions(hint):
        cause = "a function that was not called"
    elif isinstance(value, nn.Module) and "Envoy" in _classes(hint):
        cause = "the module itself, which is what model.eval(), train() and to() give back"
    elif isinstance(value, str) and object_wanted:
        cause = "a name, where the object itself belongs"
    else:
        return ""
    return f" Likely cause: {cause}."


def _classes(hint: Any) -> list[str]:
    """The names of the classes that an annotation speaks of, in order."""
    if isinstance(hint, type) and get_origin(hint) is None:
        return [hint.__name__]
    if get_origin(hint) is Callable:
        return []  # what it takes and gives is no class that is wanted here
    return [name for inner in get_args(hint) for name in _classes(inner)]


def _makes(made: type, hint: Any) -> bool:
    """Whether an instance of a class would fit."""
    if isinstance(hint, type) and get_origin(hint) is None:
        return issubclass(made, hint)
    return any(_makes(made, inner) for inner in get_args(hint))


def _takes_functions(hint: Any) -> bool:
    return get_origin(hint) is Callable or any(map(_takes_functions, get_args(hint)))


def got(value: Any) -> str:
    """A value in a few words: its shape, its kind, or as it prints."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__qualname__}"
    shown = repr(value)
    return shown if len(shown) <= 60 and "\n" not in shown else f"a {type(value).__name__}"


def words(hint: Any) -> str:
    """An annotation in words, as an error says what it wanted."""
    origin, inner = get_origin(hint), list(get_args(hint))
    if hint is None or hint is type(None):
        return "None"
    if origin in (Union, types.UnionType):
        *most, last = dict.fromkeys(words(one) for one in inner)
        return f"{', '.join(most)} or {last}" if most else last
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if hint in NUMBERS:
        return NUMBERS[hint]
    if origin is Callable:
        return "a function"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping, {words(inner[0])}: {words(inner[1])}"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return "a list" if inner[0] is Any else f"a list, each {words(inner[0])}"
    name = getattr(hint if origin is None else origin, "__name__", str(hint))
    return KINDS[name].name if name in KINDS else name
