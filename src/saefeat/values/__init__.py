"""What an edit sets latents to, where that depends on the token or the prompt.

* ``base``: what each such value must answer.
* ``schedule``: from one generated token to the next.
* ``patch``: as in another run of the same prompts.
* ``resample``: drawn from data.
* ``per_prompt``: one selection a prompt.
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
