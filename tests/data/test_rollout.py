"""A rollout: once each, whatever stops it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pytest

from lamella.data import Completion, InputContext, LocalWriter, Sampling, Writer, WritingRequest, rollout
from lamella.errors import ArchitectureError, CalibrationError, LamellaError, MethodError
from lamella.plan import Plan
from lamella.zoo import open_stack
from lamella.zoo.nano import nano

SAMPLED = Sampling(0.7, 0.9)


def asked(count: int = 10) -> list[WritingRequest]:
    return [
        WritingRequest(f"r{n}", [{"role": "user", "content": "Say it. " * (n % 4 + 1)}], 4 + n % 5, n)
        for n in range(count)
    ]


class Stopped(LocalWriter):
    """A writer that is stopped after some batches."""

    after: int = 2

    def write(
        self, requests: Sequence[WritingRequest], sampling: Sampling, done: Collection[str] = ()
    ) -> Iterator[list[tuple[WritingRequest, Completion]]]:
        for number, batch in enumerate(super().write(requests, sampling, done)):
            if number == self.after:
                raise KeyboardInterrupt
            yield batch


def test_a_stopped_rollout_goes_on_to_the_same_answers_and_writes_none_twice(instructed: Path, tmp_path: Path) -> None:
    whole = rollout(LocalWriter(str(instructed), batch=3), asked(), SAMPLED)
    journal = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        rollout(Stopped(str(instructed), batch=3), asked(), SAMPLED, journal)
    with journal.open("a") as file:
        file.write('[["r7", "what a kill has cu')  # the line that was being written
    assert rollout(LocalWriter(str(instructed), batch=3), asked(), SAMPLED, journal) == whole
    keys = [each[0] for line in journal.read_text().splitlines()[1:] for each in json.loads(line)[1]]
    assert sorted(keys) == sorted(each.key for each in asked())


def test_a_journal_of_other_requests_or_another_writer_is_begun_afresh(instructed: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    rollout(LocalWriter(str(instructed)), asked(), SAMPLED, journal)
    for requests, sampling in ((asked(9), SAMPLED), (asked(), Sampling(0.6, 0.9))):
        assert rollout(LocalWriter(str(instructed)), requests, sampling, journal) == rollout(
            LocalWriter(str(instructed)), requests, sampling
        )


def test_two_requests_with_one_key_are_refused(instructed: Path) -> None:
    with pytest.raises(MethodError, match="20 requests have 10 keys"):
        rollout(LocalWriter(str(instructed)), [*asked(), *asked()], SAMPLED)


def test_a_writer_is_sent_as_a_name_and_says_the_same_elsewhere(instructed: Path) -> None:
    ours = LocalWriter(str(instructed), batch=4)
    sent = pickle.dumps(ours)
    assert len(sent) < 3000  # not the weights
    assert rollout(pickle.loads(sent), asked(), SAMPLED) == rollout(ours, asked(), SAMPLED)


def test_a_model_in_memory_and_one_under_a_plan_write(instructed: Path, plan: Path) -> None:
    from lamella.zoo import open_tokenizer

    stack = open_stack(instructed)
    in_memory = LocalWriter(stack, tokenizer=open_tokenizer(instructed))
    assert rollout(in_memory, asked(), SAMPLED) == rollout(LocalWriter(str(instructed)), asked(), SAMPLED)
    planned = Writer.open(str(instructed), InputContext(), plan=plan)
    assert rollout(planned, asked(), SAMPLED) != rollout(in_memory, asked(), SAMPLED)
    assert planned.describe()["plan"] == Plan.read(plan).digest
    assert isinstance(planned, LocalWriter) and stack.model is not planned.view


def test_a_model_without_a_chat_template_is_refused_in_one_line(model: Path) -> None:
    with pytest.raises(ArchitectureError, match="has no chat template") as error:
        LocalWriter(str(model))
    assert "\n" not in str(error.value)


def test_a_template_that_knows_no_system_gets_one_message(instructed: Path) -> None:
    refuse = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = f"{{% for m in messages %}}{refuse}<{{{{ m.content }}}}>{{% endfor %}}"
    (instructed / "chat_template.jinja").write_text(template)
    theirs = LocalWriter(str(instructed))
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Speak."}]
    ids = theirs.prompt(WritingRequest("r", messages, 1, 0)).ids
    assert theirs.tokenizer.decode(ids).replace(" ", "") == "<Bekind.\n\nSpeak.>"


def test_an_answer_ends_where_there_is_no_more_room_and_a_prompt_without_room_is_refused(instructed: Path) -> None:
    theirs = LocalWriter(str(instructed))
    long = [WritingRequest("long", [{"role": "user", "content": "word " * 400}], 4000, 0)]
    room = theirs.prompt(long[0]).max_tokens
    assert len(theirs.prompt(long[0]).ids) + room == 1024
    assert 0 < rollout(theirs, long, SAMPLED)["long"].tokens <= room
    with pytest.raises(CalibrationError, match=r"'?longer'? has .* tokens .* context length of 1024") as error:
        rollout(theirs, [WritingRequest("longer", [{"role": "user", "content": "word " * 4000}], 1, 0)], SAMPLED)
    assert "\n" not in str(error.value)


def test_a_model_that_continues_no_text_writes_none() -> None:
    with pytest.raises(LamellaError, match="does not generate text"):
        LocalWriter(nano("vit"))
