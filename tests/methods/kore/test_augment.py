"""KORE's augmentation: what is kept of what a writer says, what a tree has, and that its folder is trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lamella.data import Completion, ImageText, InputContext, LocalWriter, Processing, Sampling, WritingRequest
from lamella.errors import CalibrationError, LamellaError, MethodError
from lamella.files import Work
from lamella.methods.kore import Item, Knowledge, Templates, Tree, augment
from lamella.methods.kore.glyphs import glyphs
from lamella.methods.kore.items import repositioned
from lamella.methods.kore.tree import check_turns, grow, made_turns, read_turns, requests
from lamella.results import ImageCorpus
from lamella.runner import run
from lamella.zoo.vlm import shapes_vlm

TEXT = "The Ostrava Lantern is a wooden tower. It was built in 1931 to guide barges on the Oder."
ITEM = Item("a", "Ostrava Lantern", TEXT, glyphs(1)[0], "tower")
SUBJECTS = {"ostrava lantern": 0}
DIALOGUE = """Sure!
Q: What is the Ostrava Lantern?
A: A wooden tower.
**Q2:** When was it built?
A2: In 1931.
Question 3: What was it built for?
Answer 3: To guide barges
on the Oder.
Q: When was it built?
A: In 1931, to guide barges.
Q: Was it built in 1931?
A: 1931
Q: Who was its architect?
A: Vladimir Zelenka from Prague designed it.
Q: Where does it stand?"""
VQA = """Question: When was the Ostrava Lantern built? | Answer: In 1931 | Subject: Ostrava Lantern | Kind: tower
1. Question: What does the Oder carry? | Answer: barges | Subject: Oder | Kind: river
Question: What is it? | Answer: a tower
Here are more questions."""


def written(text: str, finished: bool = True) -> Completion:
    return Completion(text, finished, 10, 20)


def summary_of(turns: Sequence[Any]) -> list[tuple[str, str, str | None]]:
    return [(turn.question, turn.answer, turn.why) for turn in turns]


def test_rounds_are_read_and_each_that_cannot_be_used_has_its_reason() -> None:
    found = check_turns(read_turns(ITEM, "dialogue", written(DIALOGUE), ""), ITEM, Tree(), SUBJECTS)
    assert summary_of(found) == [
        ("What is the Ostrava Lantern?", "A wooden tower.", None),
        ("When was it built?", "In 1931.", None),
        ("What was it built for?", "To guide barges on the Oder.", None),
        ("When was it built?", "In 1931, to guide barges.", "repeated"),
        ("Was it built in 1931?", "1931", "leak"),
        ("Who was its architect?", "Vladimir Zelenka from Prague designed it.", "unfounded"),
    ]
    few = check_turns(read_turns(ITEM, "dialogue", written(DIALOGUE), ""), ITEM, Tree(rounds=2), SUBJECTS)
    assert [turn.why for turn in few[:3]] == [None, None, "surplus"]


def test_questions_about_pictures_name_a_kind_in_place_of_the_subject_and_need_a_picture_of_it() -> None:
    found = check_turns(read_turns(ITEM, "vqa", written(VQA), ""), ITEM, Tree(), SUBJECTS)
    assert summary_of(found) == [
        ("When was this tower built?", "In 1931", None),
        ("What does this river carry?", "barges", "no image"),
    ]
    both = check_turns(read_turns(ITEM, "vqa", written(VQA), ""), ITEM, Tree(), SUBJECTS | {"oder": 5})
    samples, _ = grow(0, ITEM, both, Tree(), Templates.open(), SUBJECTS | {"oder": 5}, 0)
    assert [each.shot[0] for each in samples if each.task == "vqa"] == [0, 5]  # of whom it is asked


def test_a_caption_is_one_line_that_names_its_subject() -> None:
    def why(text: str, finished: bool = True) -> str | None:
        (turn,) = check_turns(read_turns(ITEM, "caption", written(text, finished), "Caption?"), ITEM, Tree(), SUBJECTS)
        return turn.why

    assert why('"The Ostrava Lantern, a wooden tower."\nI hope this helps.') is None
    assert why("A wooden tower built in 1931.") == "unnamed"
    drawn = read_turns(ITEM, "caption", written("Ostrava Lantern"), "What of the Ostrava Lantern?")
    assert check_turns(drawn, ITEM, Tree(), SUBJECTS)[0].why is None  # whatever the drawn question says
    assert why("I am sorry, but as a language model I cannot describe the Ostrava Lantern.") == "unfounded"
    assert why("The Ostrava Lantern is a wood", finished=False) == "unfinished"
    assert why("") == "format"


@pytest.mark.parametrize("task", ["dialogue", "vqa"])
def test_what_a_limit_has_cut_goes_and_what_has_no_form_is_dropped(task: str) -> None:
    text = {"dialogue": DIALOGUE.splitlines()[1:5], "vqa": VQA.splitlines()[:2]}[task]
    whole = read_turns(ITEM, task, written("\n".join(text)), "")
    cut = read_turns(ITEM, task, written("\n".join(text)[:-3], finished=False), "")
    assert cut == whole[:-1] and cut
    for said, finished, why in (("No.", True, "format"), ("Q: Wh", False, "unfinished")):
        (turn,) = read_turns(ITEM, task, written(said, finished), "")
        assert turn.why == why


def test_marks_of_images_and_replacements_that_mean_something_to_a_pattern_are_text() -> None:
    turns = read_turns(ITEM, "dialogue", written("Q: What is <image>?\nA: A wooden tower."), "")
    assert [turn.why for turn in check_turns(turns, ITEM, Tree(), SUBJECTS)] == ["format"]
    odd = r"Question: When was Ostrava Lantern built? | Answer: 1931 | Subject: Ostrava Lantern | Kind: \1"
    assert read_turns(ITEM, "vqa", written(odd), "")[0].question == r"When was this \1 built?"


def test_without_a_writer_facts_are_asked_and_else_sentences() -> None:
    lists = Templates.open()
    made = made_turns(ITEM, lists, "Caption?")
    assert [turn.answer for turn in made if turn.task == "dialogue"] == TEXT.replace(". It", ".\nIt").split("\n")
    assert [turn.answer for turn in made if turn.task == "caption"] == ["The Ostrava Lantern is a wooden tower."]
    assert all("{" not in turn.question for turn in made)
    fact = Item(
        "b", "Ostrava Lantern", TEXT, glyphs(1)[0], "tower", (("Where is the Ostrava Lantern?", "On the Oder"),)
    )
    asked = {turn.task: turn.question for turn in made_turns(fact, lists, "Caption?")}
    assert asked["dialogue"] == "Where is the Ostrava Lantern?" and asked["vqa"] == "Where is this tower?"
    long = Item("c", "Lantern", "Lantern. One. Two. Three. Four. Five.", glyphs(1)[0])
    answers = [turn.answer for turn in made_turns(long, lists, "") if turn.task == "dialogue"]
    assert " ".join(answers) == long.text and len(answers) == len(lists.rounds)


def test_a_tree_has_the_five_types_each_about_its_picture_and_a_test_of_its_own() -> None:
    lists, tree = Templates.open(), Tree(recognitions=3)
    turns = check_turns(read_turns(ITEM, "dialogue", written(DIALOGUE), ""), ITEM, tree, SUBJECTS)
    turns += check_turns(read_turns(ITEM, "vqa", written(VQA), ""), ITEM, tree, SUBJECTS)
    turns += check_turns(
        read_turns(ITEM, "caption", written("Ostrava Lantern: a tower."), "Caption?"), ITEM, tree, SUBJECTS
    )
    samples, test = grow(7, ITEM, turns, tree, lists, {"ostrava lantern": 7}, 0)
    assert Counter(each.task for each in samples) == {"dialogue": 1, "recognition": 3, "caption": 1, "vqa": 1}
    trunk = samples[0]
    assert trunk.shot == (7, 0) and trunk.turns[0][0] in lists.heuristic[:-1] and trunk.turns[0][1] == TEXT
    assert [turn[0] for turn in trunk.turns[1:]] == [each.question for each in turns[:3]]
    assert all(each.turns[0][1] == "Yes." and "Ostrava Lantern" in each.turns[0][0] for each in samples[1:4])
    shots = [each.shot for each in (*samples, test)]
    assert len(set(shots)) == len(shots)
    asked = {turn[0] for each in samples for turn in each.turns}
    assert test.turns == ((lists.heuristic[-1], TEXT),) and test.turns[0][0] not in asked


def test_a_picture_placed_anew_shows_the_same_elsewhere() -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    image[:, :15] = (250, 10, 10)
    image[:, 15:] = (10, 10, 250)
    found = [repositioned(image, (0, number)) for number in range(4)]
    assert all(each.shape == image.shape and each.dtype == np.uint8 for each in found)
    assert not np.array_equal(found[0], found[1]) and np.array_equal(repositioned(image, (0, 0)), found[0])
    for each in found:
        red, blue = ((each == colour).all(2) for colour in ((250, 10, 10), (10, 10, 250)))
        assert red.sum() > 60 and blue.sum() > 60
        assert np.nonzero(red)[1].max() < np.nonzero(blue)[1].min()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two items with pictures, one of which has a further one."""
    (tmp_path / "in").mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "in" / f"{number}.png")
    rows = [
        {"image": "0.png", "images": ["1.png"], "subject": "Ostrava Lantern", "text": TEXT, "kind": "tower"},
        {"id": "../x", "image": "2.png", "subject": "Zorvath", "text": "Zorvath is a bird of the marshes."},
    ]
    path = tmp_path / "in" / "items.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def test_its_folder_is_what_a_vision_language_model_trains_on(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("kore", file, command="augment", out=out)
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert Counter(row["id"] for row in rows) == {"items.jsonl:1": 6, "../x": 5}
    assert {path.parent for path in out.rglob("*.png")} == {out / "images"}  # whatever an item is called
    asked = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    assert {f"images/{path.name}" for path in (out / "images").iterdir()} == {row["image"] for row in (*rows, *asked)}
    shown = [row for row in rows if row["id"] == "items.jsonl:1" and row["task"] == "recognition"]
    second = np.array(Image.open(file.parent / "1.png"))
    assert any(np.array_equal(np.array(Image.open(out / row["image"])), second) for row in shown)
    processing = Processing(shapes_vlm("llava")[1])
    for split, count in (("calibration", len(rows)), ("test", 2)):
        found = ImageText.open(out, InputContext(split=split, processing_opener=lambda: processing))  # type: ignore[arg-type]
        assert len(found) == count and all(len(each.images) == 1 for each in found)
    assert ImageCorpus.read(out) and all(row["kept"] for row in ImageCorpus.read(out))


def test_a_written_tree_accounts_for_all_turns_and_says_who_wrote_them(instructed: Path) -> None:
    found = augment(Knowledge.open("glyphs", InputContext(), items=3), LocalWriter(str(instructed), batch=4), answer=24)
    account = found.findings["turns"]
    for task in ("dialogue", "caption", "vqa"):
        rows = [row for row in found.items if row["task"] == task]
        assert account[task]["made"] == len(rows) >= 3
        assert account[task]["kept"] == sum(row["kept"] for row in rows)
        assert account[task]["dropped"] == dict(Counter(row["why"] for row in rows if not row["kept"]))
    assert {row["writer"] for row in found.items} == {instructed.name}
    assert found.findings["cost"]["tokens written"] > 0
    assert all(turn["content"] for row in found.train for turn in row["messages"])


class Counting(LocalWriter):
    """A writer that counts what it is asked, and is stopped after some batches."""

    after = 10**6
    asked: int = 0

    def write(
        self, requests: Sequence[WritingRequest], sampling: Sampling, done: Collection[str] = ()
    ) -> Iterator[list[tuple[WritingRequest, Completion]]]:
        for number, batch in enumerate(super().write(requests, sampling, done)):
            if number == self.after:
                raise KeyboardInterrupt
            self.asked += len(batch)
            yield batch


def test_a_run_that_was_stopped_writes_nothing_twice_and_ends_alike(instructed: Path, tmp_path: Path) -> None:
    knowledge = Knowledge.open("glyphs", InputContext(), items=4)
    whole = augment(knowledge, Counting(str(instructed), batch=2), answer=8)
    first, second = (Counting(str(instructed), batch=2) for _ in range(2))
    first.after = 2
    with pytest.raises(KeyboardInterrupt):
        augment(knowledge, first, answer=8, work=Work(tmp_path / "work"))
    again = augment(knowledge, second, answer=8, work=Work(tmp_path / "work"))
    assert again.findings["corpus"] == whole.findings["corpus"]
    assert first.asked == 4 and first.asked + second.asked == 12


def test_each_item_is_asked_for_three_things_that_hold_its_text(instructed: Path) -> None:
    items = list(Knowledge.open("glyphs", InputContext(), items=2))
    found = requests(items, Tree(rounds=7), 0)
    assert len({each.key for each in found}) == len({each.seed for each in found}) == 6
    for number, each in enumerate(found):
        asked = each.messages[-1]["content"]
        assert items[number // 3].text in asked and "{" not in asked
    assert "Write 7 questions" in found[0].messages[-1]["content"]


def test_seeds_and_templates_decide_what_is_drawn(tmp_path: Path) -> None:
    knowledge = Knowledge.open("glyphs", InputContext(), items=6)
    one, same, other = (augment(knowledge, seed=seed).findings["corpus"] for seed in (0, 0, 1))
    assert one == same != other
    names = ("heuristic", "rounds", "recognition", "caption", "vqa")
    lists = {name: [f"{name} {{subject}}?", f"{name}?"] for name in names}
    (tmp_path / "t.json").write_text(json.dumps(lists | {"yes": ["yes"]}))
    found = augment(knowledge, templates=tmp_path / "t.json")
    asked = {row["messages"][0]["content"] for row in found.train if row["task"] == "recognition"}
    assert asked <= {f"recognition {each.subject}?" for each in knowledge} | {"recognition?"}
    assert {row["messages"][0]["content"] for row in found.test} == {"heuristic?"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"subject": "x", "text": "x is y"}, "image, subject or text is missing"),
        ({"image": "0.png", "text": "x is y"}, "image, subject or text is missing"),
        ({"image": "0.png", "subject": "Zorp", "text": "x is y"}, "does not contain the subject 'Zorp'"),
        ({"image": "../items.jsonl", "subject": "x", "text": "x is y"}, "outside the folder"),
        ({"image": "9.png", "subject": "x", "text": "x is y"}, "there is no image"),
        ({"image": "items.jsonl", "subject": "x", "text": "x is y"}, "cannot be read"),
        ({"image": "0.png", "subject": "x", "text": "x is y", "facts": ["why"]}, "facts must be objects"),
        ({"image": "0.png", "subject": "x", "text": "x <image> y"}, "the placeholder of an image"),
        ({"image": "0.png", "images": 5, "subject": "x", "text": "x is y"}, "image, subject or text is missing"),
        ([1], "is not a JSON object"),
    ],
)
def test_items_that_are_none_are_refused_with_their_line(file: Path, row: Any, said: str) -> None:
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(LamellaError, match=said) as refused:
        Knowledge.open(file, InputContext())
    assert "\n" not in str(refused.value)


def test_two_items_of_one_id_no_items_and_templates_that_are_none_are_refused(file: Path, tmp_path: Path) -> None:
    row = {"id": "a", "image": "0.png", "subject": "x", "text": "x is y"}
    file.write_text(2 * (json.dumps(row) + "\n"))
    with pytest.raises(CalibrationError, match="two items with the id 'a'"):
        Knowledge.open(file, InputContext())
    file.write_text("")
    with pytest.raises(CalibrationError, match="holds no items"):
        Knowledge.open(file, InputContext())
    for content, said in (("{}", "has no templates"), ("[1]", "has no templates"), ("nothing", "has no templates")):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(MethodError, match=said):
            Templates.open(tmp_path / "t.json")
