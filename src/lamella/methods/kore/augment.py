"""KORE's augmentation: from one image and one text to conversations of five types, so that a fact is understood."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from lamella.data import Completion, Sampling, Writer, rollout, seed_of
from lamella.files import Work
from lamella.methods.kore.items import Item, Knowledge
from lamella.methods.kore.tree import (
    REASONS,
    TASKS,
    WRITTEN,
    Conversation,
    Templates,
    Tree,
    Turn,
    checked,
    drawn,
    grown,
    key_of,
    made_turns,
    prompts_digest,
    read_turns,
    requests,
)
from lamella.registry import command
from lamella.results import IMAGES, ImageCorpus

SHOWN = 6  # turns that the page shows
TEMPLATES = "templates"  # who has written what no model has


@command("kore", "augment", on="any", brief={"rounds": 3, "answer": 12, "batch": 2})
def augment(
    knowledge: Knowledge,
    writer: Writer | None = None,
    *,
    tree: Tree = Tree(),  # noqa: B008, frozen
    sampling: Sampling = Sampling(),  # noqa: B008, frozen
    templates: Path | None = None,
    work: Work = Work(),
    seed: Annotated[int, Ge(0)] = 0,
) -> ImageCorpus:
    """Make of each image with its text a dialogue, recognitions, a caption and questions about its pictures.

    Example: lamella run kore augment items.jsonl --writer smollm2 -o augmented

    Args:
        knowledge: images with what is to be known of them.
        writer: an instruction model, here or behind an endpoint; the paper has GPT-4o. Without one, facts and sentences
            of the items are asked for by templates.
        tree: how many conversations an item becomes.
        sampling: how the writer draws; the paper's numbers are not known.
        templates: a JSON file with lists of questions, in place of the library's own.
        work: where a run that was stopped goes on from; nothing is written twice.
        seed: of what is drawn.

    Returns:
        Every turn and whether it is kept, conversations in a drawn order, and for each item one to test by.

    Raises:
        MethodError: for counts below 0, or templates that are none.
        LamellaError: for a writer that does not answer.
    """
    lists, items = Templates.open(templates), list(knowledge)
    began = time.perf_counter()
    said: dict[str, Completion] = {}
    if writer is not None:
        said = rollout(writer, requests(items, tree, seed), sampling, work.journal("written"))
    seconds = time.perf_counter() - began

    turns, train, test = forest(items, said, tree, lists, seed)
    by = {
        "writer": TEMPLATES if writer is None else writer.name,
        "prompts": prompts_digest(),
        "templates": lists.digest,
    }
    rows = [asdict(turn) | {"kept": turn.why is None} | by for turn in turns]
    shots = sorted({each.shot for each in (*train, *test)})
    to_train, to_test = (list(map(written_row, each)) for each in (train, test))
    return ImageCorpus(
        items=rows,
        train=to_train,
        test=to_test,
        images={file_of(shot): partial(_picture, items[shot[0]], shot[1], seed) for shot in shots},
        findings={
            "items": len(items),
            "pictures": len(shots),
            "turns": account(turns, items, tree),
            "conversations": dict(Counter(each.task for each in train)),
            "cost": {
                "tokens read": sum(each.read for each in said.values()),
                "tokens written": sum(each.tokens for each in said.values()),
                "seconds": seconds,
            },
            "corpus": hashlib.sha256(json.dumps([rows, to_train, to_test]).encode()).hexdigest(),
            "samples": shown(rows),
        },
    )


def forest(
    items: Sequence[Item], said: Mapping[str, Completion], tree: Tree, templates: Templates, seed: int
) -> tuple[list[Turn], list[Conversation], list[Conversation]]:
    """The turns of all items, their conversations in a drawn order, and those to test by in that of the items."""
    subjects = {
        each.subject.casefold(): number for number, each in reversed(list(enumerate(items)))
    }  # the first counts
    turns: list[Turn] = []
    train: list[Conversation] = []
    test: list[Conversation] = []
    for number, item in enumerate(items):
        own = checked(turns_of(item, said, templates, seed), item, tree, subjects)
        branches, asked = grown(number, item, own, tree, templates, subjects, seed)
        turns += own
        train += branches
        test.append(asked)
    train.sort(key=lambda each: seed_of("order", seed, each.id, each.task, each.shot, each.turns))
    return turns, train, test


def turns_of(item: Item, said: Mapping[str, Completion], templates: Templates, seed: int) -> list[Turn]:
    """The turns of an item: what the writer said, or what templates make."""
    caption = drawn(templates.caption, item, "caption", seed)
    if not said:
        return made_turns(item, templates, caption)
    return [turn for task in WRITTEN for turn in read_turns(item, task, said[key_of(item, task)], caption)]


def account(turns: Sequence[Turn], items: Sequence[Item], tree: Tree) -> dict[str, dict[str, Any]]:
    """How many turns of each task were made, kept, and dropped for which reason; those of templates are all kept."""
    drawn_ones = {"heuristic": len(items), "recognition": tree.recognitions * len(items)}
    found: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        own = [turn.why for turn in turns if turn.task == task]
        reasons = Counter(why for why in own if why is not None)
        made = drawn_ones.get(task, len(own))
        dropped = {why: reasons[why] for why in REASONS if reasons[why]}
        found[task] = {"made": made, "kept": made - sum(dropped.values()), "dropped": dropped}
    return found


def file_of(shot: tuple[int, int]) -> str:
    """The file of a picture in the folder of results: numbers, whatever items are called."""
    return f"{IMAGES}/{shot[0]:05d}-{shot[1]}.png"


def _picture(item: Item, number: int, seed: int) -> Any:
    return item.picture(number, seed_of("picture", item.id, seed))


def written_row(sample: Conversation) -> dict[str, Any]:
    """A conversation as it is written, with the file of its picture."""
    messages = [
        {"role": role, "content": text}
        for turn in sample.turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return {"id": sample.id, "task": sample.task, "image": file_of(sample.shot), "messages": messages}


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some turns to look at: kept ones, and one that was dropped for each reason."""
    ranked = sorted(rows, key=lambda row: seed_of("shown", row["id"], row["task"], row["question"], row["answer"]))
    first = {row["why"]: row for row in reversed(ranked) if not row["kept"]}
    chosen = [row for row in ranked if row["kept"]][:SHOWN] + [first[why] for why in REASONS if why in first]
    return [{name: row[name] for name in ("id", "task", "question", "answer", "why")} for row in chosen]
