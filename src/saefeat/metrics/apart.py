"""That a metric gives every row one number, and each row its own.

A metric is a function of rows that no one else has seen, and it is asked for more than the prompts
once: exact effects, and the checks of ``validation``, put copies of one prompt in a batch. So the
rule is the same for one prompt as for many, whether or not there is a gradient: **a row's number
does not change with the rows beside it.** ``Evaluator.read`` is the one place that asks.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SaefeatError
from .base import Metric, Reader, Seen

LARGE = 1 << 26
"""Logits of every token may be gigabytes: of more than these no gradient is taken for a check."""


class Asker(NamedTuple):
    """Who reads which metric, and how it says no."""

    function: str
    metric: Metric
    error: type[SaefeatError]

    def refused(self, is_: str, wanted: str, cause: str) -> SaefeatError:
        """The error, to be raised."""
        return self.error(
            f"{self.function}: `metric` is {self.metric!r}, {is_}, wanted {wanted}. Likely cause:"
            f" {cause}. Try: metrics.custom(lambda logits: logits[:, 5])"
        )


def one_a_row(asker: Asker, reader: Reader, seen: Seen) -> Tensor:
    """[b], floating: the metric of these rows; truths and whole numbers become float32."""
    read = [x for x in (seen.logits, seen.value) if x is not None and not x.is_inference()]
    before = [x._version for x in read]
    values: Any = _asked(asker, reader, seen)
    count = len(seen.numbers)
    if not isinstance(values, Tensor) or values.is_complex():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise asker.refused(
            f"which gives {kind}",
            f"a tensor of real numbers, [batch], here [{count}]",
            "tolist, numpy, item or a complex number in it",
        )
    if values.shape != (count,):
        raise asker.refused(
            f"of shape {tuple(values.shape)}",
            f"one number a prompt, [batch], here [{count}]",
            "a mean over prompts in it, or a dimension that was kept",
        )
    if [x._version for x in read] != before:  # it is read again, and by others
        raise asker.refused(
            "which changes what it is given",
            "a function that leaves it as it is",
            "an operation in place, as x[:, 5] = 0 or x.mul_(2)",
        )
    return values if values.is_floating_point() else values.float()


def _asked(asker: Asker, reader: Reader, seen: Seen) -> Any:
    """What the metric gives; errors of a function of the user's are told as that."""
    try:
        return reader(seen)
    except Exception as error:
        ours = asker.metric.apart or isinstance(error, (SaefeatError, torch.OutOfMemoryError))
        if ours:
            raise
        given = seen.logits[:, -1] if asker.metric.columns == "last" else seen.logits
        what = f"logits {list(given.shape)}"
        if seen.value is not None:
            what = f"a site's value {list(seen.value.shape)}"
        if seen.value is not None or asker.metric.columns == "all":
            what += f" and a mask {list(seen.view.real.shape)}"
        raise asker.refused(
            f"whose function raised {type(error).__name__}: {error}",
            f"one number a prompt from {what}",
            "an index outside the vocabulary, values kept for another number of rows, or a function"
            " of other arguments",
        ) from error


# ---------------------------------------------------------------- each row's own


def require_apart(asker: Asker, reader: Reader, seen: Seen, values: Tensor) -> bool:
    """Refuse a metric whose number for one row depends on the others.

    Held against each other are the first and the last row as they are, alone, and as a pair. A
    single row is paired with itself. Then of two rows one is altered, and the other's number must
    stay; and neither may have a gradient at the other. It takes no pass of the model.

    Returns:
        Whether the function knows its prompts by their place: it cannot be asked about fewer rows,
        as when it holds a target for each prompt. That is right only for all prompts in order.
    """
    count = len(values)
    ends = [0, count - 1]
    with torch.no_grad():
        pair = _tried(asker, reader, _rows(seen, ends))
        alone = [_tried(asker, reader, _rows(seen, [end])) for end in ends]
    by_place = pair is None or any(one is None for one in alone)
    if by_place and count == 1:
        raise _mixed(asker, "it gives no number each for two prompts")
    some = seen if by_place else _rows(seen, ends)
    if pair is not None and not by_place:
        now, loose = values.detach()[ends], _slack(some)
        singles = torch.cat([one for one in alone if one is not None])
        if not (_same(pair, now, loose) and _same(singles, now, loose)):
            raise _mixed(asker, "it changes with the number of prompts")
    if _moved_by_others(asker, reader, some) or _sloped_to_others(asker, reader, some):
        raise _mixed(asker, "one prompt's number moves when another prompt does")
    return by_place


def require_in_order(asker: Asker, numbers: Tensor) -> None:
    """Refuse rows that are not all prompts in order, for a function that knows them by place."""
    if numbers.tolist() == list(range(len(numbers))):
        return
    raise asker.refused(
        "whose function holds one value a prompt, of all prompts in order",
        f"each row's own number, for the prompts {numbers.tolist()[:8]}",
        "a target for each prompt inside it, where prompts come in several batches or several"
        " times. PerPrompt([...]) in logit, logit_diff and log_prob follows them",
    )


def _mixed(asker: Asker, how: str) -> SaefeatError:
    return asker.refused(
        f"whose number for one prompt depends on another prompt: {how}",
        "each prompt's own",
        "a mean, sum or normalization over the first dimension, the prompts, or a random number",
    )


def _tried(asker: Asker, reader: Reader, seen: Seen) -> Tensor | None:
    """The metric of some rows; None if it cannot be asked about that many."""
    try:
        return one_a_row(asker, reader, seen)
    except SaefeatError:
        return None


def _moved_by_others(asker: Asker, reader: Reader, seen: Seen) -> bool:
    """Whether rows' numbers change while every other row beside them is altered."""
    every = torch.arange(len(seen.numbers))
    slack, part = _slack(seen), 0.01  # the same shapes add in the same order
    with torch.no_grad():
        before = one_a_row(asker, reader, seen)
        for odd, sign in product((0, 1), (1.0, -1.0)):  # up and down: a threshold sees one of them
            after = _tried(asker, reader, _altered(seen, every % 2 == odd, sign))
            kept = every[every % 2 != odd]
            if after is not None and not _same(after[kept], before[kept], slack, part):
                return True
    return False


def _sloped_to_others(asker: Asker, reader: Reader, seen: Seen) -> bool:
    """Whether the first or the last row's number has a gradient at another row."""
    read = {"logits": seen.logits, "value": seen.value}
    read = {name: x.detach() for name, x in read.items() if x is not None}
    if torch.is_inference_mode_enabled() or sum(x.numel() for x in read.values()) > LARGE:
        return False
    with torch.enable_grad():
        leaves = {name: x.clone().requires_grad_() for name, x in read.items()}
        values = one_a_row(asker, reader, seen._replace(**leaves))
        if not values.requires_grad:
            return False
        for own in (0, len(values) - 1):
            slopes = torch.autograd.grad(
                values[own], list(leaves.values()), materialize_grads=True, retain_graph=True
            )
            for slope in slopes:
                slope[own] = 0.0
                if bool(slope.nan_to_num(0.0, 0.0, 0.0).any()):  # NaN is refused by name
                    return True
    return False


def _rows(seen: Seen, rows: list[int]) -> Seen:
    """Some rows, repeated as wanted."""
    view = seen.view
    names = ("ids", "position", "shown", "real", "lengths")
    cut = {name: x if x is None else x[rows] for name in names for x in (getattr(view, name),)}
    own = {n: x[rows] for n, x in seen._asdict().items() if isinstance(x, Tensor)}
    return seen._replace(**own, view=view.replace(**cut, selected={}))


def _altered(seen: Seen, rows: Tensor, sign: float) -> Seen:
    """Other values in some rows, above or below all of theirs, the largest elsewhere; and a real
    token fewer.
    """

    def other(x: Tensor) -> Tensor:
        x, at = x.clone(), rows.to(x.device)
        x[at] = x[at].roll(1, -1) / 2 + sign * (2 * _largest(x[at]) + 1)
        return x

    real = seen.view.real.clone()
    fewer = real & (real.cumsum(1) > 1)
    at = rows.to(real.device) & fewer.any(1)
    real[at] = fewer[at]
    value = None if seen.value is None else other(seen.value)
    view = seen.view.replace(real=real, selected={})
    return seen._replace(logits=other(seen.logits), value=value, view=view)


def _slack(seen: Seen) -> tuple[float, float]:
    """What rounding may do, where other shapes add in another order: a share of the numbers, and
    what is left where large ones cancel.
    """
    read = seen.logits if seen.value is None else seen.value
    share, left = (1e-3, 1e-5) if torch.finfo(read.dtype).bits > 16 else (2e-2, 8e-3)
    return share, left * _largest(read)


def _same(one: Tensor, other: Tensor, slack: tuple[float, float], part: float = 1.0) -> bool:
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    share, left = slack
    most = part * (share * max(_largest(one), _largest(other)) + left)
    return torch.allclose(one, other, rtol=0.0, atol=most, equal_nan=True)


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().nan_to_num(0.0, 0.0, 0.0).amax())
