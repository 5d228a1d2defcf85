"""What a recording has found, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamella.formatting import counted, number
from lamella.result import Summary, Table


@dataclass
class StageNeeds:
    """A stage of the work, as its progress is shown.

    Attributes:
        name: what is done.
        seconds: predicted time.
        multiplications: multiply-adds of matrix products and convolutions.
        peak: largest memory during the stage, in bytes.
        done, total: units of work that were recorded, and their number.
    """

    name: str
    seconds: float = 0.0
    multiplications: float = 0.0
    peak: int = 0
    done: int = 0
    total: int | None = None


@dataclass
class Needs:
    """What a command needs.

    Attributes:
        weights: bytes of the weights of all models that were opened.
        peak: largest memory of all tensors, in bytes.
        libraries: bytes of Python and the libraries.
        free: bytes of memory that are free now.
        stages: the stages of the work, in their order.
        cut: the stage in which the recording ended because of its time limit; empty if all was recorded.
    """

    weights: int = 0
    peak: int = 0
    libraries: int = 0
    free: int = 0
    stages: dict[str, StageNeeds] = field(default_factory=dict)
    cut: str = ""

    @property
    def seconds(self) -> float:
        """The predicted time."""
        return sum(each.seconds for each in self.stages.values())

    @property
    def total(self) -> int:
        """Bytes of memory in all."""
        return self.peak + self.libraries

    @property
    def fits(self) -> bool:
        """Whether the memory that is free now suffices."""
        return self.peak <= self.free

    def summary(self) -> Summary:
        """Return the needs in words and a table."""
        rows = [
            [each.name, gigabytes(each.peak), number(each.seconds), number(each.multiplications / 1e12)]
            for each in self.stages.values()
            if each.seconds >= 0.01
        ]
        columns = ["stage", "tensors, GB", "seconds", "multiply-adds, 10^12"]
        lines = [
            f"Of this the weights take {gigabytes(self.weights)} GB, and Python with its libraries "
            f"{gigabytes(self.libraries)} GB. {gigabytes(self.free)} GB are free.",
            "The time is that of this machine doing nothing else: expect it within a factor of two.",
        ]
        if self.cut:
            lines.append(
                f"The estimate ends in the stage '{self.cut}', because what follows depends on values or takes long to "
                "record: the whole takes at least this much."
            )
        verdict = f"{gigabytes(self.total)} GB of memory and about {duration(self.seconds)}"
        verdict += "." if self.fits else ", but too little memory is free."
        return Summary(verdict, [Table("What it needs", columns, rows)], lines)


def gigabytes(size: float) -> str:
    """Format a number of bytes in GB."""
    return number(size / 1e9)


def duration(seconds: float) -> str:
    """Format a time in the unit that suits it, such as ``12 minutes``."""
    for size, unit in ((3600, "hour"), (60, "minute")):
        if seconds >= 2 * size:
            return counted(round(seconds / size), unit)
    return counted(max(1, round(seconds)), "second")
