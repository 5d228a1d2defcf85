"""The one exception family: every message is one line that says what, where and the mend.

Messages are read in Python and on the command line, so an option stands in them by its name and value, ``layers 1, 2``,
and not as either world writes it. What only one of them can do says so: ``(of_stack in Python)``.
"""

from collections.abc import Iterable

LONGEST = 2000  # characters of a message


class LamellaError(Exception):
    """Something the user can mend; the command line prints the message and exits with 2.

    Messages quote names, texts and other programs' errors. However those look, the message is one line of printable
    characters, and a terminal takes no commands from it.
    """

    def __str__(self) -> str:
        line = " ".join(part.strip() for part in super().__str__().splitlines())
        if len(line) > LONGEST:  # the beginning says where, the end how to mend it
            line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
        return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


class NoteWarning(UserWarning):
    """A warning of a method that is among the notes of its result, too; whoever shows those need not show it."""


class ArchitectureError(LamellaError):
    """A model that the architecture table does not know, or a feature that its family does not have."""


class PlanError(LamellaError):
    """A plan that is malformed, or that does not fit the model it is applied to."""


class CacheError(LamellaError):
    """A key-value cache that the plan cannot run with."""


class CalibrationError(LamellaError):
    """Calibration or evaluation text that is missing, too short, or from the wrong split."""


class TaskError(LamellaError):
    """A task that is unknown or damaged, or that asks for what only its user can allow."""


class NumericsError(LamellaError):
    """Activations or distances that are not finite, named by site."""


class CheckpointError(LamellaError):
    """A model folder that is missing, damaged, unsafe or incomplete."""


class ExportError(LamellaError):
    """An output folder that cannot be written: it exists, or the disk has no room."""


class MethodError(LamellaError):
    """An unknown method, or an option that the method does not take."""


class DownloadError(LamellaError):
    """Something that must come from the network did not."""


class BudgetError(LamellaError):
    """A target that no plan of the series reaches."""


class TrainingError(LamellaError):
    """Training that cannot start, go on from its checkpoint, or stay finite."""


def listed(values: Iterable[object]) -> str:
    """Values of an option as a message shows them, in Python and on the command line alike."""
    return ", ".join(map(str, values)) or "none"


def reason_of(error: Exception, longest: int = 160) -> str:
    """What an error says, in one line: all of it for an error of this family, the beginning for any other."""
    if isinstance(error, LamellaError):
        return str(error)
    return " ".join(str(error).split())[:longest] or type(error).__name__
