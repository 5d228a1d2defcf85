"""The tree of conversations generated from an item of knowledge.

    item: an image, a text T, a subject
     |
     +-- dialogue      its own image      a template question with T as its answer, then rounds about all aspects of T
     +-- recognition   other images       "Is this SUBJECT?"  "Yes."
     +-- caption       another image      a template question with a summary of T
     +-- vqa           another image of the subject of a question:    "When was this KIND built?"

Rounds, summaries and questions are written by a model, or built from the facts and sentences of an item. Each is a
turn, which is kept or dropped for a reason. Where the paper retrieves images of a subject from the web, the further
images of an item are used, and then its own one, repositioned.
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
WRITTEN = ("dialogue", "caption", "vqa")  # tasks of the writer for each item
TASKS = ("heuristic", "dialogue", "recognition", "caption", "vqa")
REASONS = ("format", "unfinished", "repeated", "leak", "unfounded", "unnamed", "no image", "surplus")
FOUNDED = 0.6  # minimum fraction of an answer's long words and numbers that occur in the text
LABEL = re.compile(r"\W{0,6}(q|question|a|answer)\W{0,3}\d{0,3}\W{0,3}:[*\s]{0,4}(.*)", re.IGNORECASE)
PARTS = ["question", "answer", "subject", "kind"]
SENTENCE = re.compile(r"(?<=[.!?])\s+")
KIND = "thing"  # of a subject without a known kind


@dataclass(frozen=True)
class Tree:
    """Number of conversations per item.

    Attributes:
        rounds: maximum number of rounds in the dialogue about its text; the paper's 10.
        recognitions: number of other images on which the subject is recognised.
        questions: maximum number of questions about further images.
        answer: maximum number of tokens per task of the writer.
    """

    rounds: Annotated[int, Ge(0)] = 10
    recognitions: Annotated[int, Ge(0)] = 2
    questions: Annotated[int, Ge(0)] = 4
    answer: Annotated[int, Ge(1)] = 1024


@dataclass(frozen=True)
class Templates:
    """Question templates, with placeholders ``{subject}`` and ``{kind}``.

    Attributes:
        heuristic: questions whose answer is the text; the last one is only used in the test.
        rounds: questions for the sentences of a text, in order, without a writer.
        recognition, yes: whether the subject is shown, and the answers.
        caption: requests for a summary.
        vqa: questions about a kind, without a writer.
    """

    heuristic: tuple[str, ...]
    rounds: tuple[str, ...]
    recognition: tuple[str, ...]
    yes: tuple[str, ...]
    caption: tuple[str, ...]
    vqa: tuple[str, ...]

    @classmethod
    def open(cls, file: str | Path | None = None) -> Templates:
        """Read a JSON file with a list for each of them; defaults to the built-in templates.

        Raises:
            MethodError: for a file that lacks a list, or has fewer than two heuristic questions.
        """
        file = PROMPTS / "templates.json" if file is None else Path(file)
        hint = f"write a JSON object with lists of questions: {', '.join(each.name for each in fields(cls))}"
        try:
            content = parse_json(read_text(file, hint))
            found = {each.name: content[each.name] for each in fields(cls)}
        except (ValueError, KeyError, TypeError):
            raise MethodError(f"{file} has no templates: {hint}") from None
        for name, texts in found.items():
            if not isinstance(texts, list) or not texts or not all(isinstance(each, str) and each for each in texts):
                raise MethodError(f"{file}: {name} is not a list of questions: {hint}")
        if len(found["heuristic"]) < 2:
            raise MethodError(f"{file} has one heuristic question: give at least two; the last one is for the test")
        return cls(**{name: tuple(texts) for name, texts in found.items()})

    @property
    def digest(self) -> str:
        """Digest of all templates."""
        content = json.dumps([getattr(self, each.name) for each in fields(self)])
        return hashlib.sha256(content.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class ConversationTurn:
    """One question with its answer.

    Attributes:
        id: id of the item.
        task: one of :data:`TASKS`.
        question: the question.
        answer: the answer.
        subject: the subject of the image.
        why: reason for dropping it; None if it is kept.
    """

    id: str
    task: str
    question: str
    answer: str
    subject: str
    why: str | None = None


# Writing


def prompt_of(task: str) -> str:
    """The prompt template of a task, with placeholders for text, subject and counts."""
    return (PROMPTS / f"{task}.txt").read_text(encoding="utf-8").strip()


def prompts_digest() -> str:
    """Digest of all prompt templates."""
    content = "\n".join(map(prompt_of, ("system", *WRITTEN)))
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def key_of(item: Item, task: str) -> str:
    """Key of a task of an item.

    Args:
        item: the item.
        task: name of the task.
    """
    return json.dumps([item.id, task])


def requests(items: Sequence[Item], tree: Tree, seed: int) -> list[WritingRequest]:
    """Build the requests to the writer: rounds, a summary and questions for each item.

    Args:
        items: the items.
        tree: number of conversations per item.
        seed: random seed.
    """
    system, counts = prompt_of("system"), {"{rounds}": tree.rounds, "{questions}": tree.questions}
    found = []
    for item in items:
        for task in WRITTEN:
            prompt = prompt_of(task)
            for placeholder, value in {**counts, "{subject}": item.subject, "{text}": item.text}.items():
                prompt = prompt.replace(placeholder, str(value))
            messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
            key = key_of(item, task)
            found.append(WritingRequest(key, messages, tree.answer, seed_of(key, prompts_digest(), seed)))
    return found


def read_turns(item: Item, task: str, written: Completion, caption: str) -> list[ConversationTurn]:
    """Parse a text of the writer into turns; a text in another format becomes one dropped turn.

    Args:
        item: the item.
        task: task of the writer.
        written: the text.
        caption: question for the summary.
    """
    text = written.text.strip()
    whole = text if written.finished else text.rpartition("\n")[0]  # the token limit has truncated the last line
    if task == "caption":
        line = whole.partition("\n")[0].strip().strip('"')
        found = [(caption, line, item.subject)] if line else []
    elif task == "dialogue":
        found = [(question, answer, item.subject) for question, answer in _pairs(whole)]
    else:
        found = [(_of_kind(q, subject, kind), answer, subject) for q, answer, subject, kind in _quadruplets(whole)]
    why = "format" if written.finished else "unfinished"
    return [ConversationTurn(item.id, task, question, answer, subject) for question, answer, subject in found] or [
        ConversationTurn(item.id, task, "", text, item.subject, why)
    ]


def _pairs(text: str) -> list[tuple[str, str]]:
    """Pairs of the texts after ``Q:`` and the following ``A:``; further lines are appended to the current one."""
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
    """The four parts of each line that has them, in order."""
    found = []
    for line in text.splitlines():
        parts = [each.partition(":") for each in line.split("|")]
        if [re.sub(r"[\W\d]", "", label).casefold() for label, *_ in parts] == PARTS:
            found.append([value.strip() for *_, value in parts])
    return found


def made_turns(item: Item, templates: Templates, caption: str) -> list[ConversationTurn]:
    """Build turns without a writer, from the facts of an item or else from the sentences of its text.

    Args:
        item: the item.
        templates: question templates.
        caption: question for the summary.
    """
    sentences = SENTENCE.split(item.text)
    rounds = item.facts or tuple(_of_sentences(sentences, templates.rounds, "{subject}", item.subject))
    questions = [(_of_kind(question, item.subject, item.kind or KIND), answer) for question, answer in item.facts]
    if not questions:
        questions = list(_of_sentences(sentences, templates.vqa, "{kind}", item.kind or KIND))
    return [
        *(ConversationTurn(item.id, "dialogue", question, answer, item.subject) for question, answer in rounds),
        ConversationTurn(item.id, "caption", caption, sentences[0], item.subject),
        *(ConversationTurn(item.id, "vqa", question, answer, item.subject) for question, answer in questions),
    ]


def _of_sentences(
    sentences: Sequence[str], questions: Sequence[str], placeholder: str, name: str
) -> Iterator[tuple[str, str]]:
    """Assign a question to each sentence; the last question gets all remaining ones."""
    for number, question in enumerate(questions[: len(sentences)]):
        last = number == len(questions) - 1
        answer = " ".join(sentences[number:]) if last else sentences[number]
        yield question.replace(placeholder, name), answer


def _of_kind(question: str, subject: str, kind: str) -> str:
    """Replace the subject in a question by its kind, so that the image determines the subject."""
    if not subject:
        return question
    return re.sub(rf"(?:\bthe\s+)?{re.escape(subject)}", lambda _: f"this {kind}", question, flags=re.IGNORECASE)


# Filtering


def check_turns(
    turns: Sequence[ConversationTurn], item: Item, tree: Tree, subjects: Mapping[str, Any]
) -> list[ConversationTurn]:
    """Check the turns of one item, and set the reason of those that are dropped.

    Args:
        turns: the turns.
        item: the item.
        tree: number of conversations per item.
        subjects: subjects with images, in lower case.
    """
    most = {"dialogue": tree.rounds, "caption": 1, "vqa": tree.questions}
    kept: dict[str, set[str]] = {task: set() for task in most}
    found = []
    for turn in turns:
        why = turn.why or _why(turn, item, subjects)
        questions = kept[turn.task]
        if why is None and turn.question.casefold() in questions:
            why = "repeated"
        if why is None and len(questions) >= most[turn.task]:
            why = "surplus"
        if why is None:
            questions.add(turn.question.casefold())
        found.append(replace(turn, why=why))
    return found


def _why(turn: ConversationTurn, item: Item, subjects: Mapping[str, Any]) -> str | None:
    if not turn.question.strip() or not turn.answer.strip() or MARK in turn.question + turn.answer:
        return "format"
    telling = _telling(turn.answer)
    if turn.task != "caption" and telling and telling <= _words(turn.question):  # captions have template questions
        return "leak"
    if len(telling & _words(item.text)) < FOUNDED * len(telling):
        return "unfounded"
    if turn.task == "caption" and item.subject.casefold() not in turn.answer.casefold():
        return "unnamed"
    return "no image" if turn.subject.casefold() not in subjects else None


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _telling(answer: str) -> set[str]:
    """The informative words of an answer: long ones, and numbers."""
    return {each for each in _words(answer) if len(each) > 3 or each.isdigit()}


# Conversations


@dataclass(frozen=True)
class Conversation:
    """A conversation about one image.

    Attributes:
        id: id of the item.
        task: one of :data:`TASKS` except ``heuristic``, which starts the dialogues.
        shot: index of the item whose image it is about, and index of the image.
        turns: questions with their answers.
    """

    id: str
    task: str
    shot: tuple[int, int]
    turns: tuple[tuple[str, str], ...]


def grow(
    number: int,
    item: Item,
    turns: Sequence[ConversationTurn],
    tree: Tree,
    templates: Templates,
    subjects: Mapping[str, int],
    seed: int,
) -> tuple[list[Conversation], Conversation]:
    """Build the training conversations of one item, and its test conversation.

    Args:
        number: index of the item.
        item: the item.
        turns: its turns; dropped ones are ignored.
        tree: number of conversations per item.
        templates: question templates.
        subjects: index of the item with images of a subject, by subject in lower case.
        seed: random seed.
    """
    kept = {task: [turn for turn in turns if turn.task == task and turn.why is None] for task in WRITTEN}
    first = (draw_template(templates.heuristic[:-1], item, "heuristic", seed), item.text)
    trunk = (first, *((turn.question, turn.answer) for turn in kept["dialogue"]))
    samples = [Conversation(item.id, "dialogue", (number, 0), trunk)]
    for index in range(1, tree.recognitions + 1):
        question = draw_template(templates.recognition, item, f"recognition {index}", seed).replace(
            "{subject}", item.subject
        )
        answer = draw_template(templates.yes, item, f"yes {index}", seed)
        samples.append(Conversation(item.id, "recognition", (number, index), ((question, answer),)))
    index = tree.recognitions + 1
    for turn in (*kept["caption"], *kept["vqa"]):
        shot = (subjects[turn.subject.casefold()], index)
        samples.append(Conversation(item.id, turn.task, shot, ((turn.question, turn.answer),)))
        index += 1
    unseen = tree.recognitions + tree.questions + 2  # after all images used in training
    return samples, Conversation(item.id, "test", (number, unseen), ((templates.heuristic[-1], item.text),))


def draw_template(texts: Sequence[str], item: Item, what: str, seed: int) -> str:
    """Choose a template, determined by item and purpose.

    Args:
        texts: the templates.
        item: the item.
        what: purpose.
        seed: random seed.
    """
    return texts[seed_of("template", what, item.id, seed) % len(texts)]
