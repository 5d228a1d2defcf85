"""The exception family of Lamella: every message is one line with the problem, its location and how to fix it.

Messages are read in Python and on the command line, so an option is written by its name and value, ``layers 1, 2``, and
not in the syntax of either. What applies to one of them only says so: ``(of_stack in Python)``.
"""

from collections.abc import Iterable

LONGEST = 2000  # maximum number of characters of a message


class LamellaError(Exception):
    """An error that the user can fix; the command line prints the message and exits with code 2.

    Messages quote names, texts and errors of other programs. The message is always one line of printable characters, so
    that it cannot contain terminal control sequences.
    """

    def __str__(self) -> str:
        line = " ".join(part.strip() for part in super().__str__().splitlines())
        if len(line) > LONGEST:  # the beginning has the location, the end has the fix
            line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
        return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


class NoteWarning(UserWarning):
    """A warning of a method that is also among the notes of its result, so it need not be shown twice."""


class ArchitectureError(LamellaError):
    """A model that the architecture table does not know, or a feature that its family does not have."""


class PlanError(LamellaError):
    """A plan that is malformed, or that does not fit the model it is applied to."""


class CacheError(LamellaError):
    """A key-value cache that the plan cannot run with."""


class CalibrationError(LamellaError):
    """Calibration or evaluation data that are missing, too short, or from the wrong split."""


class TaskError(LamellaError):
    """A task that is unknown or damaged, or that needs a permission of the user."""


class NumericsError(LamellaError):
    """Activations or distances that are not finite, named by site."""


class CheckpointError(LamellaError):
    """A model folder that is missing, damaged, unsafe or incomplete."""


class ExportError(LamellaError):
    """An output folder that cannot be written: it exists, or the disk is full."""


class MethodError(LamellaError):
    """An unknown method, or an option that the method does not take."""


class DownloadError(LamellaError):
    """A failed download."""


class BudgetError(LamellaError):
    """A target that no plan of the series reaches."""


class TrainingError(LamellaError):
    """Training that cannot start, resume from its checkpoint, or stay finite."""


def listed(values: Iterable[object]) -> str:
    """Format the values of an option for messages, the same in Python and on the command line."""
    return ", ".join(map(str, values)) or "none"


def reason_of(error: Exception, longest: int = 160) -> str:
    """Return the message of an error in one line: unabridged for an error of this family, truncated for any other.

    Args:
        error: the error.
        longest: maximum number of characters for other errors.
    """
    if isinstance(error, LamellaError):
        return str(error)
    return " ".join(str(error).split())[:longest] or type(error).__name__
