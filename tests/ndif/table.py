"""The matrix as text: a row a verb, a column a way, in each cell one sign a deployment."""

from __future__ import annotations

from dataclasses import dataclass, field

from cells import VERBS, WAYS
from served import PLACES

EQUAL, REFUSED, WRONG, UNTRIED = "=", "r", "X", "."


@dataclass
class Table:
    """What became of each cell.

    Attributes:
        signs: (isolation, dtype, way, verb) → a sign.
        reasons: why cells were refused → how many.
        seconds: how long the server's parts took to come up.
    """

    signs: dict[tuple[str, str, str, str], str] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def refuse(self, cell: tuple[str, str, str, str], reason: str) -> None:
        """Note a cell that was refused by name, and why."""
        self.signs[cell] = REFUSED
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def text(self) -> str:
        """The table; empty if no cell was tried."""
        if not self.signs:
            return ""
        width = max(map(len, VERBS))
        lines = [" " * width + "".join(f" {way:>10}" for way in WAYS)]
        for verb in VERBS:
            cells = (
                "".join(self.signs.get((*place, way, verb), UNTRIED) for place in PLACES)
                for way in WAYS
            )
            lines.append(f"{verb:<{width}}" + "".join(f" {cell:>10}" for cell in cells))
        places = ", ".join(f"{isolation} {dtype}" for isolation, dtype in PLACES)
        lines += ["", f"A cell's signs: {places}."]
        lines.append(
            f"{EQUAL} as here, {REFUSED} refused by name, {WRONG} wrong, {UNTRIED} left out"
        )
        lines += [f"{REFUSED} {count} times: {reason}" for reason, count in self.reasons.items()]
        spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.seconds.items())
        return "\n".join([*lines, f"seconds: {spent}"])
