"""What writing a corpus costs: for each token that is kept, and beside the training that it is for."""

from __future__ import annotations

from typing import Any

from lamella.data import Local, Writer
from lamella.evaluate.cost import cost
from lamella.zoo import parameters_of


def writing_cost(
    writer: Writer, student: str | None, *, read: int, written: int, kept: int, seen: int, seconds: float
) -> dict[str, Any]:
    """The cost of writing as JSON values; None for what is not known of an endpoint.

    A token that is read or written takes two operations for each multiply-accumulate of the writer, as its plan leaves
    them; one that is trained on takes six for each of the student's parameters.

    Args:
        student: the model that will be trained; the writer, whole, when left out.
        read, written: tokens of all requests, also of those whose answer was dropped.
        kept: tokens of the answers that were kept.
        seen: tokens of the training.
        seconds: that writing took.
    """
    flops, size = None, 0
    if isinstance(writer, Local):
        flops = 2 * cost(writer.stack, writer.plan).macs * (read + written)
        size = writer.stack.describe()["parameters"]
    size = parameters_of(student) if student else size
    training = 6 * size * seen or None
    return {
        "tokens read": read,
        "tokens written": written,
        "tokens kept": kept,
        "tokens seen": seen,
        "seconds": seconds,
        "seconds for each kept token": seconds / kept if kept else None,
        "written for each kept token": written / kept if kept else None,
        "generation flops": flops,
        "flops for each kept token": flops / kept if flops and kept else None,
        "training flops": training,
        "generation / training": flops / training if flops and training else None,
    }
