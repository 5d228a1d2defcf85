"""The cost of generating a corpus: per token that is kept, and relative to the training on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.data import LocalWriter, Writer
from lamella.evaluate.cost import cost
from lamella.zoo import parameters_of


def writing_cost(
    writer: Writer,
    student: str | None,
    rows: Sequence[Mapping[str, Any]],
    kept: Sequence[Mapping[str, Any]],
    mixture: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Return the cost of generating a corpus as JSON values; None for values that are unknown for an endpoint.

    A token that is read or generated costs two operations per multiply-accumulate of the generator under its plan; a
    token that is trained on costs six per parameter of the student.

    Args:
        writer: the generator.
        student: the model to be trained; by default the generator without a plan.
        rows: all requests, each with the numbers of read and generated tokens, ``n_read`` and ``n_written``.
        kept: the rows that were kept, with the number of kept tokens, ``n_out_tok``.
        mixture: the training mixture, with the tokens of each of its ``sources``.
        seconds: generation time, summed over all workers.
    """
    read = written = 0
    for row in rows:
        read, written = read + row["n_read"], written + row["n_written"]
    tokens = sum(row["n_out_tok"] for row in kept)
    seen = sum(each["tokens"] for each in mixture["sources"].values())
    flops, size = None, 0
    if isinstance(writer, LocalWriter):
        flops = 2 * cost(writer.stack, writer.plan).macs * (read + written)
        size = writer.stack.describe()["parameters"]
    size = parameters_of(student) if student else size
    training = 6 * size * seen or None
    return {
        "tokens read": read,
        "tokens written": written,
        "tokens kept": tokens,
        "tokens seen": seen,
        "seconds": seconds,
        "seconds for each kept token": seconds / tokens if tokens else None,
        "written for each kept token": written / tokens if tokens else None,
        "generation flops": flops,
        "flops for each kept token": flops / tokens if flops and tokens else None,
        "training flops": training,
        "generation / training": flops / training if flops and training else None,
    }
