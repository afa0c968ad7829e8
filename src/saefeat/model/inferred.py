"""Site tables of models of an unknown type, found by running them and kept only where they hold.

The blocks are the list of modules as long as the model has layers. What attention and MLP are is
told by their names; where each value lies is told by numbers alone, in one pass over random
tokens: what is added to the stream must add up, and a norm must be its own formula. Then each is
held causally: a vector added there must arrive in the stream as it is, and move nothing before.
A kind that fails in one layer that has its module is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import InferredSitesWarning, ModelError
from .aside import hooks_aside
from .sites import HOOKS
from .tables import OWN, SKIP, Table

ROWS, TOKENS = 2, 5
_NAME = "_saefeat_sites"
_ATTENTION = ("attn", "attention", "self_attn", "self_attention")
_MLP = ("mlp", "ffn", "feed_forward", "feedforward", "moe", "block_sparse_moe", "mlp_block")


def inferred(module: nn.Module, config: Any) -> tuple[str, Table] | None:
    """The blocks and sites of a model whose type is not in the table; None if it shows none.

    It is looked for once a model, with a warning.

    Raises:
        ModelError: for a model without weights, or with dropout in train mode.
    """
    held = vars(module)
    if _NAME in held:
        return held[_NAME]
    if _drops_out(module):
        raise ModelError(
            f"saefeat: `model` is of type {config.model_type!r}, of which no table tells where"
            " sites lie, and in train mode with dropout, where no two passes are alike, wanted eval"
            " mode. Likely cause: the model was built in this process. Try: model.eval()"
        )
    found = _infer(module, config)
    if found is None:
        return None
    held[_NAME] = found
    warnings.warn(
        f"saefeat: `model` is of type {config.model_type!r}, of which no table tells where"
        f" sites lie. Inferred from its modules and a pass: {', '.join(found[1])}."
        " Each adds up and acts as it should on this model; say so where results are"
        " reported. Sites by a module's path need no table",
        InferredSitesWarning,
        stacklevel=4,
    )
    return found


def _drops_out(module: nn.Module) -> bool:
    parts = module.modules()
    return any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in parts)


def is_inferred(module: nn.Module) -> bool:
    """Whether this model's sites were inferred."""
    return vars(module).get(_NAME) is not None


def _infer(module: nn.Module, config: Any) -> tuple[str, Table] | None:
    container = _container(module, config)
    if container is None:
        return None
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ModelError(
            f"saefeat: `model` is of type {config.model_type!r}, of which no table tells where"
            " sites lie, and its weights are not loaded, so they cannot be looked for. Likely"
            " cause: nnsight loads a name's weights at the first trace. Try:"
            " TransformersModel(..., dispatch=True), or a site by its module's path"
        )
    ids = torch.randint(0, int(config.vocab_size), (ROWS, TOKENS), generator=_generator())
    trial = Trial(module, container, ids.to(next(module.parameters()).device))
    try:
        seen = trial.run()
    except Exception:  # a model that is not run so, whatever it raises, has no sites here
        return None
    table = _proposed(seen, trial.layers)
    sure = {kind: place for kind, place in table.items() if _holds(trial, seen, kind, table)}
    ordered = {kind: sure[kind] for kind in HOOKS if kind in sure}
    return (container, ordered) if "resid_post" in ordered else None


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _container(module: nn.Module, config: Any) -> str | None:
    """The one list of modules that is as long as the model has layers."""
    layers = getattr(config, "num_hidden_layers", None)
    lists = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == layers
    ]
    outer = [name for name in lists if not any(name.startswith(f"{one}.") for one in lists)]
    return outer[0] if len(outer) == 1 else None


class Value(NamedTuple):
    """What one module of a block was given and returned."""

    given: Tensor | None
    returned: Tensor | None
    begun: int
    done: int
    kept: bool  # whether nobody wrote into the value it returned
    kind: str  # the name of the module's class


class Trial:
    """Passes over the same few tokens, and what the modules of the blocks were given and gave."""

    def __init__(self, module: nn.Module, container: str, ids: Tensor) -> None:
        self.module, self.container, self.ids = module, container, ids
        blocks = cast("nn.ModuleList", module.get_submodule(container))
        self.layers = len(blocks)
        self._parts = {
            (layer, name): part
            for layer, block in enumerate(blocks)
            for name, part in block.named_modules()
        }

    def run(self, add: tuple[int, str, str, Tensor] | None = None) -> dict[tuple, Value]:
        """(layer, module within the block) → what was seen; ``add`` (layer, module, end, vector)
        is added to every token there.
        """
        seen: dict[tuple, list[Any]] = {}
        clock = iter(range(10**9))
        with hooks_aside(self.module), ExitStack() as stack, torch.no_grad():
            for key, part in self._parts.items():
                vector = add[3] if add is not None and add[:2] == key else None
                at = add[2] if add is not None else ""
                before = partial(_before, seen, key, clock, vector if at == "input" else None)
                after = partial(_after, seen, key, clock, vector if at == "output" else None)
                hook = part.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(hook.remove)
                stack.callback(part.register_forward_hook(after).remove)
            mask = torch.ones_like(self.ids)
            out = self.module(input_ids=self.ids, attention_mask=mask, use_cache=False)
        found = {key: _value(self._parts[key], entry) for key, entry in seen.items()}
        logits = out[0] if isinstance(out, tuple) else out.logits
        return {**found, (-1, "logits"): Value(None, logits, 0, next(clock), True, "")}


def _before(seen: dict, key: tuple, clock: Iterator[int], vector: Tensor | None, *call: Any) -> Any:
    _, args, kwargs = call
    name = None if args else next(iter(kwargs), None)
    x = args[0] if args else kwargs.get(name)
    new = x + vector if vector is not None and isinstance(x, Tensor) else x
    seen[key] = [*([None] if key in seen else []), _flat(new), next(clock)]  # twice is unusable
    if vector is None:
        return None
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, name: new})


def _after(seen: dict, key: tuple, clock: Iterator[int], vector: Tensor | None, *call: Any) -> Any:
    out = call[2]
    x = out[0] if isinstance(out, tuple) and out else out
    new = x + vector if vector is not None and isinstance(x, Tensor) else x
    seen[key] += [new, _flat(new), next(clock)]
    if vector is None:
        return None
    return (new, *out[1:]) if isinstance(out, tuple) else new


def _flat(x: Any) -> Tensor | None:
    """A copy of a value, one row a token; None for anything else."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    if tuple(x.shape[:2]) == (ROWS, TOKENS) and x.ndim == 3:
        return x.detach().flatten(0, 1).clone()
    return x.detach().clone() if x.ndim == 2 and len(x) == ROWS * TOKENS else None


def _value(part: nn.Module, entry: list[Any]) -> Value:
    kind = type(part).__name__
    if len(entry) != 5:  # called several times, or left half-way
        return Value(None, None, 0, 0, False, kind)
    given, begun, tensor, returned, done = entry
    kept = returned is None or torch.equal(cast("Tensor", _flat(tensor)), returned)
    return Value(given, returned, begun, done, kept, kind)


# ---------------------------------------------------------------- what is proposed


def _proposed(seen: dict[tuple, Value], layers: int) -> Table:
    """Kinds that are the same module in every layer that has one."""
    each = [_in_layer({k[1]: v for k, v in seen.items() if k[0] == n}) for n in range(layers)]
    table: Table = {}
    for kind in HOOKS:
        places = {found[kind] for found in each if kind in found}
        if len(places) == 1:
            table[kind] = places.pop()
    return table


def _in_layer(parts: dict[str, Value]) -> dict[str, tuple]:
    """Kind → place, as the numbers of one block say."""
    pre, post = parts[""].given, parts[""].returned
    if pre is None or post is None or pre.shape != post.shape:
        return {}
    found: dict[str, tuple] = {"resid_pre": ("", "input"), "resid_post": ("", "output")}
    attention, mlp = _child(parts, _ATTENTION), _child(parts, _MLP)
    if mlp is None:
        return found
    first, last = _summands(parts, post - pre, attention, mlp)
    if last is not None:
        found["mlp_out"] = (last, "output") if parts[last].kept else (last, "output", OWN)
        found |= _before_projection("mlp_post", parts, last, mlp)
    if attention is not None and first is not None and parts[first].kept:
        found["attn_out"] = (first, "output")
        found |= _before_projection("z", parts, first, attention)
        middle = pre + cast("Tensor", parts[first].returned)
        if any(_same(v.given, middle) for v in parts.values() if v.begun > parts[first].done):
            found["resid_mid"] = (first, "output", SKIP)
    if parts[mlp].given is not None:
        found["mlp_in"] = (mlp, "input")
        found |= _norm("mlp_norm", parts, cast("Tensor", parts[mlp].given))
    if attention is not None and parts[attention].given is not None:
        found |= _norm("attn_norm", parts, cast("Tensor", parts[attention].given), pre)
    if "mlp_norm" in found and "attn_norm" in found and found["mlp_norm"] == found["attn_norm"]:
        del found["mlp_norm"]  # one norm for both, as in parallel blocks
    return found


def _child(parts: dict[str, Value], names: tuple[str, ...]) -> str | None:
    """The block's own module of one of these names, if it has exactly one."""
    found = [name for name in parts if name in names]
    return found[0] if len(found) == 1 else None


def _summands(
    parts: dict[str, Value], total: Tensor, attention: str | None, mlp: str
) -> tuple[str | None, str | None]:
    """The modules of which the sum is added to the stream: attention's side, and the MLP's."""
    start = parts[mlp].begun
    late = _outer_first(parts, total, lambda v: v.done > start)
    if attention is None:
        return None, None
    early = _outer_first(parts, total, lambda v: parts[attention].begun < v.done < start)
    for first, a in early.items():
        for last, b in late.items():
            if _same(a + b, total):
                return first, last
    return None, None


def _outer_first(
    parts: dict[str, Value], total: Tensor, which: Callable[[Value], bool]
) -> dict[str, Tensor]:
    """What modules returned that is as wide as the stream, those nearest to the block first."""
    some = {name: v.returned for name, v in parts.items() if name and which(v)}
    names = sorted(some, key=lambda name: (name.count("."), parts[name].done))
    fit = ((name, some[name]) for name in names)
    return {name: x for name, x in fit if x is not None and x.shape == total.shape}


def _before_projection(
    kind: str, parts: dict[str, Value], name: str, inside: str
) -> dict[str, tuple]:
    """What the last projection of attention or MLP is given: it returns what the module adds."""
    out = parts[inside].returned
    wanted = parts[name].returned if _is_projection(parts[name]) else out
    for path, value in parts.items():
        linear = _is_projection(value) and path.startswith(inside)
        if linear and value.given is not None and _same(value.returned, wanted):
            return {kind: (path, "input")}
    return {}


def _is_projection(value: Value) -> bool:
    return value.kind.endswith(("Linear", "Conv1D"))


def _norm(
    kind: str, parts: dict[str, Value], out: Tensor, of: Tensor | None = None
) -> dict[str, tuple]:
    """The norm that returned this value, and which of the two it is."""
    for path, value in parts.items():
        x, given = value.returned, value.given
        if "Norm" not in value.kind or x is None or given is None or not _same(x, out):
            continue
        if of is not None and not _same(given, of):
            continue
        for name, center in (("rms", False), ("layer", True)):
            if _is_norm(given.double(), x.double(), center):
                return {kind: (path, "input", name)}
    return {}


def _is_norm(x: Tensor, out: Tensor, center: bool) -> bool:
    """Whether each column of the output is the normalized one times a weight, plus a bias."""
    x = x - x.mean(-1, keepdim=True) if center else x
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    deviations = x - x.mean(0), out - out.mean(0)
    weight = (deviations[0] * deviations[1]).sum(0) / deviations[0].square().sum(0)
    rest = deviations[1] - deviations[0] * weight
    return bool(rest.abs().max() <= 1e-3 * deviations[1].abs().max())


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return False
    close = 1e-5 if a.dtype in (torch.float32, torch.float64) else 2e-2
    return bool((a - b).abs().max() <= close * (1 + b.abs().max()))


# ---------------------------------------------------------------- what holds


def _holds(trial: Trial, seen: dict[tuple, Value], kind: str, table: Table) -> bool:
    """Whether a vector added at this kind does what it should, in every layer that has it."""
    name, end, *_ = table[kind]
    layers = [layer for layer in range(trial.layers) if (layer, name) in seen]
    return all(_acts(trial, seen, kind, layer, name, end) for layer in layers)


def _acts(
    trial: Trial, seen: dict[tuple, Value], kind: str, layer: int, name: str, end: str
) -> bool:
    at = seen[layer, name]
    value = at.given if end == "input" else at.returned
    if value is None:
        return False
    if kind in ("attn_norm", "mlp_norm"):  # read, never written
        return True
    vector = torch.randn(value.shape[-1], generator=_generator()).to(value) * value.std()
    new = trial.run((layer, name, end, vector))
    earlier = [(key, v) for key, v in seen.items() if v.done < at.begun and key[0] >= 0]
    if not all(_equal(new[key].returned, v.returned) for key, v in earlier):
        return False
    logits = seen[-1, "logits"].returned, new[-1, "logits"].returned
    if _equal(*logits):
        return False
    post, moved = seen[layer, ""].returned, new[layer, ""].returned
    added = kind in ("mlp_out", "resid_post")
    if added and not _same(moved, cast("Tensor", post) + vector):
        return False
    if kind == "resid_post" and layer + 1 < trial.layers:
        after = trial.run((layer + 1, "", "input", vector))
        return _equal(seen[layer + 1, ""].given, post) and _equal(
            after[-1, "logits"].returned, logits[1]
        )
    return True


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
