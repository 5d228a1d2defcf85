"""Rollouts: each request of a list is answered once, however often the run is stopped and restarted."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lamella.data.decoding import Sampling
from lamella.data.writer import Completion, Writer, WritingRequest
from lamella.errors import MethodError
from lamella.files import Journal
from lamella.progress import tracker
from lamella.reading import read_journal


def rollout(
    writer: Writer, requests: Sequence[WritingRequest], sampling: Sampling, journal: Path | None = None
) -> dict[str, Completion]:
    """Answer all requests, and return the completions by the keys of their requests.

    Answers that arrive together, such as those of a batch, form one line of the journal, with the seconds that they
    took. A kill either loses a line or does not, so a batch is repeated as a whole and gives the same result.

    Args:
        writer: the model that answers.
        requests: requests with unique keys.
        sampling: how tokens are sampled.
        journal: file of finished answers; none is kept if None. A journal of other requests, or of another writer, is
            started again.

    Raises:
        MethodError: if two requests have the same key.
    """
    keys = {each.key for each in requests}
    if len(keys) < len(requests):
        raise MethodError(f"{len(requests)} requests have {len(keys)} keys: give each a key of its own")
    kept = Journal(journal, _is_line, _header(writer, requests, sampling))
    found = {key: Completion(*rest) for _, answers in kept.found for key, *rest in answers}
    with tracker("writing", len(requests)) as count:
        count(len(found))
        began = time.perf_counter()
        for answered in writer.write(requests, sampling, found.keys()):
            kept.add([time.perf_counter() - began, [[request.key, *written] for request, written in answered]])
            found |= {request.key: written for request, written in answered}
            count(len(answered))
            began = time.perf_counter()
    return found


def seconds_of(journal: Path) -> float:
    """Return the total time in seconds of the answers in a journal, including those from before an interruption."""
    lines = read_journal(journal, lambda line: isinstance(line, dict) or _is_line(line))
    return float(sum(line[0] for line in lines if isinstance(line, list)))


def _header(writer: Writer, requests: Sequence[WritingRequest], sampling: Sampling) -> str:
    """Return all that the answers depend on, as one line of JSON."""
    digest = hashlib.sha256(json.dumps(requests).encode()).hexdigest()
    return json.dumps({"writer": writer.describe(), "sampling": asdict(sampling), "requests": digest})


def _is_line(line: Any) -> bool:
    if not (isinstance(line, list) and len(line) == 2 and isinstance(line[0], float) and isinstance(line[1], list)):
        return False
    return all(isinstance(each, list) and len(each) == 5 for each in line[1])
