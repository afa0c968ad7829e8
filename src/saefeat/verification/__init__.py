"""Does a dictionary fit its site and its model? ``sf.verify`` asks.

* ``verify``: what is measured where, and when it is an error.
* ``measure``: how well a dictionary explains a site, with outlier tokens set apart.
* ``null``: what any dictionary would do: tokens mixed at random.
* ``check``: the verdict on one dictionary, and the table.
"""

from .check import Check, Finding, Verification
from .verify import verify

__all__ = [
    "Check",
    "Finding",
    "Verification",
    "verify",
]
