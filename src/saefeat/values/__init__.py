"""What an edit sets latents to, where that depends on the token or the prompt.

* ``base``: what each such value must answer.
* ``schedule``: from one generated token to the next.
* ``patch``: as in another run of the same prompts.
* ``resample``: drawn from data.
* ``per_prompt``: one selection a prompt.
* ``columns``: which of a reading's columns hold the latents of an edit.
* ``declared``: what verbs, conditions and values have in common: they are their fields.
"""

from .patch import Patch
from .per_prompt import per_prompt
from .resample import Resample
from .schedule import Schedule

__all__ = [
    "Patch",
    "Resample",
    "Schedule",
    "per_prompt",
]
