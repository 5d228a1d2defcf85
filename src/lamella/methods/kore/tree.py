"""The tree of conversations that an item of knowledge becomes.

    item: an image, a text T, a subject
     |
     +-- dialogue      its own image      a drawn question with T as its answer, then rounds about T from all sides
     +-- recognition   other images       "Is this SUBJECT?"  "Yes."
     +-- caption       another image      a drawn question with a summary of T
     +-- vqa           another image of what is asked about:  "When was this KIND built?"

Rounds, summaries and questions are what a model writes, or what is made of the facts and sentences of an item. Each is
a turn, which is kept or dropped for a reason. Where the paper retrieves images of a subject from the web, there are the
further images of an item, and behind those its own one, placed anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from lamella.data import MARK, Completion, WritingRequest, seed_of
from lamella.errors import MethodError
from lamella.methods.kore.items import Item
from lamella.reading import parse_json, read_text

PROMPTS = Path(__file__).with_name("prompts")
WRITTEN = ("dialogue", "caption", "vqa")  # what a model writes of each item
TASKS = ("heuristic", "dialogue", "recognition", "caption", "vqa")
REASONS = ("format", "unfinished", "repeated", "leak", "unfounded", "unnamed", "no image", "surplus")
FOUNDED = 0.6  # of an answer's long words and numbers: so many stand in the text
LABEL = re.compile(r"\W{0,6}(q|question|a|answer)\W{0,3}\d{0,3}\W{0,3}:[*\s]{0,4}(.*)", re.IGNORECASE)
PARTS = ["question", "answer", "subject", "kind"]
SENTENCE = re.compile(r"(?<=[.!?])\s+")
KIND = "thing"  # of a subject whose kind is not known


@dataclass(frozen=True)
class Tree:
    """How many conversations an item becomes.

    Attributes:
        rounds: of the dialogue about its text, at most; the paper's 10.
        recognitions: other images on which the subject is recognised.
        questions: about images of what a question is about, at most.
        answer: tokens that the writer may take for one of its three tasks.
    """

    rounds: Annotated[int, Ge(0)] = 10
    recognitions: Annotated[int, Ge(0)] = 2
    questions: Annotated[int, Ge(0)] = 4
    answer: Annotated[int, Ge(1)] = 1024


@dataclass(frozen=True)
class Templates:
    """Questions that are drawn, in which ``{subject}`` and ``{kind}`` have a place.

    Attributes:
        heuristic: whose answer is the text; the last one is asked on the test alone.
        rounds: what is asked of the sentences of a text, in their order, where no model writes.
        recognition, yes: whether the subject is seen, and the answers.
        caption: for a summary.
        vqa: what is asked of a kind, where no model writes.
    """

    heuristic: tuple[str, ...]
    rounds: tuple[str, ...]
    recognition: tuple[str, ...]
    yes: tuple[str, ...]
    caption: tuple[str, ...]
    vqa: tuple[str, ...]

    @classmethod
    def open(cls, file: str | Path | None = None) -> Templates:
        """Read a JSON file with a list for each of them; the library's own when none is named.

        Raises:
            MethodError: for a file that lacks a list, or has fewer than two heuristic questions.
        """
        file = PROMPTS / "templates.json" if file is None else Path(file)
        hint = f"write a JSON object with lists of questions: {', '.join(each.name for each in fields(cls))}"
        try:
            said = parse_json(read_text(file, hint))
            found = {each.name: said[each.name] for each in fields(cls)}
        except (ValueError, KeyError, TypeError):
            raise MethodError(f"{file} has no templates: {hint}") from None
        for name, texts in found.items():
            if not isinstance(texts, list) or not texts or not all(isinstance(each, str) and each for each in texts):
                raise MethodError(f"{file}: {name} is no list of questions: {hint}")
        if len(found["heuristic"]) < 2:
            raise MethodError(f"{file} has one heuristic question: give two or more, the last one is for the test")
        return cls(**{name: tuple(texts) for name, texts in found.items()})

    @property
    def digest(self) -> str:
        said = json.dumps([getattr(self, each.name) for each in fields(self)])
        return hashlib.sha256(said.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Turn:
    """One question with its answer.

    Attributes:
        id: of the item.
        task: one of :data:`TASKS`.
        question, answer: as they are asked and answered.
        subject: what the picture shows.
        why: it is dropped; None where it is kept.
    """

    id: str
    task: str
    question: str
    answer: str
    subject: str
    why: str | None = None


# What is written


def prompt_of(task: str) -> str:
    """What the writer is told of it, around the places of text, subject and counts."""
    return (PROMPTS / f"{task}.txt").read_text(encoding="utf-8").strip()


def prompts_digest() -> str:
    """Of all that writers are told beside the items."""
    said = "\n".join(map(prompt_of, ("system", *WRITTEN)))
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def key_of(item: Item, task: str) -> str:
    """The name of a task of an item."""
    return json.dumps([item.id, task])


def requests(items: Sequence[Item], tree: Tree, seed: int) -> list[WritingRequest]:
    """The tasks of a writer: rounds, a summary and questions of each item."""
    system, counts = prompt_of("system"), {"{rounds}": tree.rounds, "{questions}": tree.questions}
    found = []
    for item in items:
        for task in WRITTEN:
            asked = prompt_of(task)
            for place, value in {**counts, "{subject}": item.subject, "{text}": item.text}.items():
                asked = asked.replace(place, str(value))
            messages = [{"role": "system", "content": system}, {"role": "user", "content": asked}]
            key = key_of(item, task)
            found.append(WritingRequest(key, messages, tree.answer, seed_of(key, prompts_digest(), seed)))
    return found


def read_turns(item: Item, task: str, written: Completion, caption: str) -> list[Turn]:
    """What a writer has said for one task, as turns; what has not the form that was asked for is one, dropped."""
    text = written.text.strip()
    whole = text if written.finished else text.rpartition("\n")[0]  # its limit has cut the last line
    if task == "caption":
        line = whole.partition("\n")[0].strip().strip('"')
        found = [(caption, line, item.subject)] if line else []
    elif task == "dialogue":
        found = [(question, answer, item.subject) for question, answer in _pairs(whole)]
    else:
        found = [(_of_kind(q, subject, kind), answer, subject) for q, answer, subject, kind in _quadruplets(whole)]
    why = "format" if written.finished else "unfinished"
    return [Turn(item.id, task, question, answer, subject) for question, answer, subject in found] or [
        Turn(item.id, task, "", text, item.subject, why)
    ]


def _pairs(text: str) -> list[tuple[str, str]]:
    """What stands behind ``Q:`` and the ``A:`` that follows it; further lines belong to what was begun."""
    found: list[list[str]] = []
    for line in text.splitlines():
        label = LABEL.fullmatch(line)
        if label and label[1].casefold().startswith("q"):
            found.append([label[2]])
        elif label and found and len(found[-1]) == 1:
            found[-1].append(label[2])
        elif found:
            found[-1][-1] += f" {line}"
    return [(each[0].strip(), each[1].strip()) for each in found if len(each) == 2]


def _quadruplets(text: str) -> list[list[str]]:
    """The four parts of each line that has them, in their order."""
    found = []
    for line in text.splitlines():
        parts = [each.partition(":") for each in line.split("|")]
        if [re.sub(r"[\W\d]", "", label).casefold() for label, *_ in parts] == PARTS:
            found.append([value.strip() for *_, value in parts])
    return found


def made_turns(item: Item, templates: Templates, caption: str) -> list[Turn]:
    """The same without a writer: of the facts of an item, or else of the sentences of its text."""
    sentences = SENTENCE.split(item.text)
    rounds = item.facts or tuple(_of_sentences(sentences, templates.rounds, "{subject}", item.subject))
    questions = [(_of_kind(question, item.subject, item.kind or KIND), answer) for question, answer in item.facts]
    if not questions:
        questions = list(_of_sentences(sentences, templates.vqa, "{kind}", item.kind or KIND))
    return [
        *(Turn(item.id, "dialogue", question, answer, item.subject) for question, answer in rounds),
        Turn(item.id, "caption", caption, sentences[0], item.subject),
        *(Turn(item.id, "vqa", question, answer, item.subject) for question, answer in questions),
    ]


def _of_sentences(
    sentences: Sequence[str], questions: Sequence[str], place: str, name: str
) -> Iterator[tuple[str, str]]:
    """A question for each sentence; the last one gets all that is left."""
    for number, question in enumerate(questions[: len(sentences)]):
        last = number == len(questions) - 1
        answer = " ".join(sentences[number:]) if last else sentences[number]
        yield question.replace(place, name), answer


def _of_kind(question: str, subject: str, kind: str) -> str:
    """A question in which a kind stands for the subject, so that the picture has to say of whom it is."""
    if not subject:
        return question
    return re.sub(rf"(?:\bthe\s+)?{re.escape(subject)}", lambda _: f"this {kind}", question, flags=re.IGNORECASE)


# What is kept


def checked(turns: Sequence[Turn], item: Item, tree: Tree, subjects: Mapping[str, Any]) -> list[Turn]:
    """The turns of one item, those that cannot be used with the reason.

    Args:
        subjects: of which there are pictures, in small letters.
    """
    most = {"dialogue": tree.rounds, "caption": 1, "vqa": tree.questions}
    kept: dict[str, set[str]] = {task: set() for task in most}
    found = []
    for turn in turns:
        why = turn.why or _why(turn, item, subjects)
        asked = kept[turn.task]
        if why is None and turn.question.casefold() in asked:
            why = "repeated"
        if why is None and len(asked) >= most[turn.task]:
            why = "surplus"
        if why is None:
            asked.add(turn.question.casefold())
        found.append(replace(turn, why=why))
    return found


def _why(turn: Turn, item: Item, subjects: Mapping[str, Any]) -> str | None:
    if not turn.question.strip() or not turn.answer.strip() or MARK in turn.question + turn.answer:
        return "format"
    telling = _telling(turn.answer)
    if turn.task != "caption" and telling and telling <= _words(turn.question):  # captions have drawn questions
        return "leak"
    if len(telling & _words(item.text)) < FOUNDED * len(telling):
        return "unfounded"
    if turn.task == "caption" and item.subject.casefold() not in turn.answer.casefold():
        return "unnamed"
    return "no image" if turn.subject.casefold() not in subjects else None


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _telling(answer: str) -> set[str]:
    """The words of an answer that say something: long ones, and numbers."""
    return {each for each in _words(answer) if len(each) > 3 or each.isdigit()}


# What becomes of it


@dataclass(frozen=True)
class Conversation:
    """A conversation about one picture.

    Attributes:
        id: of the item that it is of.
        task: one of :data:`TASKS` but ``heuristic``, with which dialogues begin.
        shot: whose picture: the number of the item, and which of its pictures.
        turns: questions with their answers.
    """

    id: str
    task: str
    shot: tuple[int, int]
    turns: tuple[tuple[str, str], ...]


def grown(
    number: int,
    item: Item,
    turns: Sequence[Turn],
    tree: Tree,
    templates: Templates,
    subjects: Mapping[str, int],
    seed: int,
) -> tuple[list[Conversation], Conversation]:
    """The conversations of one item, and the one that it is tested by.

    Args:
        number: of the item.
        turns: of it; those that are dropped pass.
        subjects: the number of the item that has pictures of a subject, in small letters.
    """
    kept = {task: [turn for turn in turns if turn.task == task and turn.why is None] for task in WRITTEN}
    first = (drawn(templates.heuristic[:-1], item, "heuristic", seed), item.text)
    trunk = (first, *((turn.question, turn.answer) for turn in kept["dialogue"]))
    samples = [Conversation(item.id, "dialogue", (number, 0), trunk)]
    for place in range(1, tree.recognitions + 1):
        question = drawn(templates.recognition, item, f"recognition {place}", seed).replace("{subject}", item.subject)
        answer = drawn(templates.yes, item, f"yes {place}", seed)
        samples.append(Conversation(item.id, "recognition", (number, place), ((question, answer),)))
    place = tree.recognitions + 1
    for turn in (*kept["caption"], *kept["vqa"]):
        shot = (subjects[turn.subject.casefold()], place)
        samples.append(Conversation(item.id, turn.task, shot, ((turn.question, turn.answer),)))
        place += 1
    unseen = tree.recognitions + tree.questions + 2  # behind all that may be drawn
    return samples, Conversation(item.id, "test", (number, unseen), ((templates.heuristic[-1], item.text),))


def drawn(texts: Sequence[str], item: Item, what: str, seed: int) -> str:
    """One of some templates; the item and what it is for decide."""
    return texts[seed_of("template", what, item.id, seed) % len(texts)]
