"""Which keys of a configuration are computed with, and which change nothing.

A configuration may say more than this version reads: a library adds an option, and a file that
uses it is another function of its tensors. So a layout lists the keys it computes with and those
that tell of training and origin alone; a key in neither list is refused by name, unless it is null.
For tensors the same holds in ``Mapped`` and ``SAE``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from .declaration import refuse

_TRAINING = (
    "device", "dtype", "seed", "name", "model_name", "lm_name", "description", "run_name",
    "wandb_*", "log_to_*", "log_*_to_wandb", "logger", "verbose", "*checkpoint*", "*_version",
    "lr", "lr_*", "lp", "lp_norm", "l1_*", "l0_coefficient", "l0_warm_up_steps", "target_l0",
    "adam_*", "steps", "training_*", "total_training_*", "*warmup*", "*warm_up*", "*decay_steps",
    "*anneal*", "*batch_size*", "*_batches*", "tokens_per_buffer", "context_size", "eval_*",
    "*ghost_grads", "dead_feature_*", "*resampl*", "*reinit*", "*_init", "*_init_*", "init_*",
    "aux_loss_*", "auxk_*", "top_k_aux", "*penalty*", "*_loss_*", "dataset_path", "dataset_name",
    "dataset_trust_remote_code", "bandwidth",
)  # fmt: skip
"""Names, and patterns of them, that say where an SAE comes from and how it was trained. No pattern
may be so wide that an option of tomorrow's encoder or decoder could have such a name."""


@dataclass(frozen=True)
class Known:
    """The keys of one library's configuration.

    Attributes:
        used: keys that are computed with, or checked.
        harmless: keys, or patterns of them, that change nothing that is computed.
        fixed: key → the values at which it changes nothing; others are refused.
    """

    used: Iterable[str]
    harmless: Iterable[str] = ()
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    def require(self, config: Mapping[str, Any], path: object) -> None:
        """Refuse a configuration that says what this version would leave out.

        Raises:
            DictionaryError: for an unknown key, a value that is not computed with, or a number
                that is NaN or infinite.
        """
        for key, value in config.items():
            if key in self.used:
                _require_finite(key, value, path)
            elif key in self.fixed:
                _require_fixed(key, value, self.fixed[key], path)
            elif value is not None and not self._is_harmless(key):
                got = f"whose configuration has {key} = {value!r:.60}"
                cause = "a newer version or a fork of the library, with an option of its own"
                call = f"drop {key} from the configuration, if it tells of training alone"
                raise refuse(path, got, "keys that this version knows", cause, call)

    def _is_harmless(self, key: str) -> bool:
        patterns = (*_TRAINING, *self.harmless)
        return any(fnmatchcase(key, pattern) for pattern in patterns)


def _require_fixed(key: str, value: object, wanted: tuple[object, ...], path: object) -> None:
    # 1 == True in Python, so types are compared too
    if value is None or any(value == one and type(value) is type(one) for one in wanted):
        return
    got = f"whose configuration has {key} = {value!r:.60}"
    cause = f"an SAE that is computed with {key}, which this version does not"
    call = "an SAE of the same site without it"
    raise refuse(path, got, " or ".join(map(repr, wanted)), cause, call)


def _require_finite(key: str, value: object, path: object) -> None:
    if all(math.isfinite(number) for number in _numbers(value)):
        return
    got = f"whose configuration has {key} = {value!r:.60}"
    cause = "a value that was never measured, or a training run that diverged"
    raise refuse(path, got, "finite numbers", cause, "the configuration of a finished training")


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, float):
        yield value
