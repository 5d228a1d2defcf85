"""What writing a corpus costs: for each token that is kept, and beside the training that it is for."""

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
    """The cost of writing as JSON values; None for what is not known of an endpoint.

    A token that is read or written takes two operations for each multiply-accumulate of the writer, as its plan leaves
    them; one that is trained on takes six for each of the student's parameters.

    Args:
        student: the model that will be trained; the writer, whole, when left out.
        rows: all that was asked for, each with the tokens that were read and written for it, ``n_read`` and
            ``n_written``.
        kept: those of them that were kept, with the tokens of what is kept, ``n_out_tok``.
        mixture: what will be trained on, with the tokens of each of its ``sources``.
        seconds: that writing took, of all workers together.
    """
    read, written = (sum(row[name] for row in rows) for name in ("n_read", "n_written"))
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
