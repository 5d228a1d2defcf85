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
    ConversationTurn,
    Templates,
    Tree,
    check_turns,
    draw_template,
    grow,
    key_of,
    made_turns,
    prompts_digest,
    read_turns,
    requests,
)
from lamella.registry import command
from lamella.results import IMAGES, ImageCorpus

SHOWN = 6  # sample turns on the page
TEMPLATES = "templates"  # writer of turns that no model has written


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
    """Generate from each image with its text a dialogue, recognitions, a caption and questions about its images.

    Example: lamella run kore augment items.jsonl --writer smollm2 -o augmented

    Args:
        knowledge: images with texts that describe what is new.
        writer: an instruction model, local or behind an endpoint; the paper uses GPT-4o. Without one, questions about
            the facts and sentences of the items are built from templates.
        tree: number of conversations per item.
        sampling: sampling settings of the writer; the paper's are not known.
        templates: a JSON file with lists of questions, in place of the built-in ones.
        work: folder from which an interrupted run resumes; nothing is generated twice.
        seed: random seed.

    Returns:
        Every turn and whether it is kept, the training conversations in random order, and one test conversation per
        item.

    Raises:
        MethodError: for negative counts, or invalid templates.
        LamellaError: for a writer that does not answer.
    """
    lists, items = Templates.open(templates), list(knowledge)
    began = time.perf_counter()
    texts: dict[str, Completion] = {}
    if writer is not None:
        texts = rollout(writer, requests(items, tree, seed), sampling, work.journal("written"))
    seconds = time.perf_counter() - began

    turns, train, test = forest(items, texts, tree, lists, seed)
    by = {
        "writer": TEMPLATES if writer is None else writer.name,
        "prompts": prompts_digest(),
        "templates": lists.digest,
    }
    rows = [asdict(turn) | {"kept": turn.why is None} | by for turn in turns]
    shots = sorted({each.shot for each in (*train, *test)})
    to_train, to_test = (list(map(row_of, each)) for each in (train, test))
    return ImageCorpus(
        items=rows,
        train=to_train,
        test=to_test,
        images={file_of(shot): partial(_image, items[shot[0]], shot[1], seed) for shot in shots},
        findings={
            "items": len(items),
            "images": len(shots),
            "turns": account(turns, items, tree),
            "conversations": dict(Counter(each.task for each in train)),
            "cost": {
                "tokens read": sum(each.read for each in texts.values()),
                "tokens written": sum(each.tokens for each in texts.values()),
                "seconds": seconds,
            },
            "corpus": hashlib.sha256(json.dumps([rows, to_train, to_test]).encode()).hexdigest(),
            "samples": shown(rows),
        },
    )


def forest(
    items: Sequence[Item], texts: Mapping[str, Completion], tree: Tree, templates: Templates, seed: int
) -> tuple[list[ConversationTurn], list[Conversation], list[Conversation]]:
    """Build the turns of all items, their training conversations in random order, and their test conversations.

    Args:
        items: the items.
        texts: texts of the writer by request; empty without a writer.
        tree: number of conversations per item.
        templates: question templates.
        seed: random seed.
    """
    subjects = {
        each.subject.casefold(): number for number, each in reversed(list(enumerate(items)))
    }  # the first item with a subject takes precedence
    turns: list[ConversationTurn] = []
    train: list[Conversation] = []
    test: list[Conversation] = []
    for number, item in enumerate(items):
        own = check_turns(turns_of(item, texts, templates, seed), item, tree, subjects)
        branches, test_conversation = grow(number, item, own, tree, templates, subjects, seed)
        turns += own
        train += branches
        test.append(test_conversation)
    train.sort(key=lambda each: seed_of("order", seed, each.id, each.task, each.shot, each.turns))
    return turns, train, test


def turns_of(item: Item, texts: Mapping[str, Completion], templates: Templates, seed: int) -> list[ConversationTurn]:
    """The turns of an item, from the writer's texts or from templates.

    Args:
        item: the item.
        texts: texts of the writer by request; empty without a writer.
        templates: question templates.
        seed: random seed.
    """
    caption = draw_template(templates.caption, item, "caption", seed)
    if not texts:
        return made_turns(item, templates, caption)
    return [turn for task in WRITTEN for turn in read_turns(item, task, texts[key_of(item, task)], caption)]


def account(turns: Sequence[ConversationTurn], items: Sequence[Item], tree: Tree) -> dict[str, dict[str, Any]]:
    """Count the turns of each task that were made, kept, and dropped by reason; those of templates are all kept.

    Args:
        turns: the turns.
        items: the items.
        tree: number of conversations per item.
    """
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
    """File name of an image in the result folder, made of indices only."""
    return f"{IMAGES}/{shot[0]:05d}-{shot[1]}.png"


def _image(item: Item, number: int, seed: int) -> Any:
    return item.image_at(number, seed_of("picture", item.id, seed))


def row_of(sample: Conversation) -> dict[str, Any]:
    """Convert a conversation into an output row, with the file of its image."""
    messages = [
        {"role": role, "content": text}
        for turn in sample.turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return {"id": sample.id, "task": sample.task, "image": file_of(sample.shot), "messages": messages}


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Select sample turns: kept ones, and a dropped one for each reason."""
    ranked = sorted(rows, key=lambda row: seed_of("shown", row["id"], row["task"], row["question"], row["answer"]))
    first = {row["why"]: row for row in reversed(ranked) if not row["kept"]}
    chosen = [row for row in ranked if row["kept"]][:SHOWN] + [first[why] for why in REASONS if why in first]
    return [{name: row[name] for name in ("id", "task", "question", "answer", "why")} for row in chosen]
