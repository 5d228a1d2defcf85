"""The sweep over intervals against hybrids that are built by hand, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lamella.errors import MethodError, NumericsError
from lamella.methods.slr import answer_restored, intervals, layer_runs
from lamella.methods.slr.answers import ChoiceQuestion, EncodedQuestions, answer
from lamella.stack import Stack
from lamella.zoo.nano import NANO, nano

CAUSAL = [name for name in NANO if name != "vit"]


def encoded_questions() -> EncodedQuestions:
    generator = torch.Generator().manual_seed(0)
    questions = [ChoiceQuestion(f"question {x}", ("a", "b", "c")) for x in range(5)]
    prompts = [torch.randint(3, 128, (4 + 2 * x,), generator=generator).tolist() for x in range(5)]
    return EncodedQuestions.of(questions, prompts, [[[10], [11, 12], [13]]] * 5)


def hybrid(name: str, start: int, stop: int) -> Any:
    """The nano model with whole layers of the one of another seed, by its state dict."""
    model, other = nano(name), nano(name, 1)
    prefix = Stack(model).architecture.prefix
    inside = tuple(f"{prefix}{layer}." for layer in range(start, stop))
    theirs = {key: value for key, value in other.state_dict().items() if key.startswith(inside)}
    model.load_state_dict(model.state_dict() | theirs)
    return model


@pytest.mark.parametrize("name", CAUSAL)
def test_every_interval_is_what_the_built_model_answers(name: str) -> None:
    post, pre, questions = Stack(nano(name)), Stack(nano(name, 1)), encoded_questions()
    found = answer_restored(post, pre, questions, intervals(4))
    assert list(found) == intervals(4)
    for (start, stop), means in found.items():
        built = answer(Stack(hybrid(name, start, stop)), questions)
        assert means.quality == pytest.approx(float(built.quality.mean()), abs=1e-5)
        assert means.diversity == pytest.approx(float(built.diversity.mean()), abs=1e-5)


def test_two_equal_models_give_a_constant_table() -> None:
    post, pre = Stack(nano("llama")), Stack(nano("llama"))
    found = set(answer_restored(post, pre, encoded_questions(), intervals(4)).values())
    assert len(found) == 1


def test_there_are_as_many_intervals_as_the_paper_counts() -> None:
    assert [len(intervals(layers)) for layers in (28, 32, 42)] == [406, 528, 903]
    coarse = intervals(30, 3)
    assert len(coarse) == 55 and (0, 30) in coarse and all(i % 3 == 0 and j % 3 == 0 for i, j in coarse)
    assert intervals(5, 2)[-1] == (4, 5)


@pytest.mark.parametrize("layers", [4, 6, 30])
def test_prefixes_are_shared(layers: int) -> None:
    """The sheet's count: L + L (L + 1) / 2 + the sum of L - j; about a third of running each from the start."""
    wanted = intervals(layers)
    assert layer_runs(layers, wanted) == layers + layers * (layers + 1) // 2 + sum(layers - j for _, j in wanted)
    assert layers < 30 or layer_runs(layers, wanted) < 0.37 * layers * len(wanted)


def test_as_many_layers_run_as_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    post, pre, run, ran = Stack(nano("llama")), Stack(nano("llama", 1)), Stack.run, [0]

    def counting(stack: Stack, h: Any, start: int, stop: int, *questions: Any) -> Any:
        ran[0] += stop - start
        return run(stack, h, start, stop, *questions)

    monkeypatch.setattr(Stack, "run", counting)
    for wanted in (intervals(4), [(1, 3), (1, 4), (2, 3)], [(3, 4)]):
        ran[0] = 0
        answer_restored(post, pre, encoded_questions(), wanted)
        last = max(start for start, _ in wanted)
        assert ran[0] == len(list(encoded_questions().batches())) * (
            layer_runs(4, wanted) - 4 + last
        )  # the original not once more


def test_neither_model_changes() -> None:
    post, pre = Stack(nano("gpt2")), Stack(nano("gpt2", 1))
    before = [{key: value.clone() for key, value in each.model.state_dict().items()} for each in (post, pre)]
    answer_restored(post, pre, encoded_questions(), intervals(4))
    for each, kept in zip((post, pre), before, strict=True):
        assert all(torch.equal(value, kept[key]) for key, value in each.model.state_dict().items())


def test_an_interrupted_sweep_resumes_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    post, pre, questions, journal = (
        Stack(nano("llama")),
        Stack(nano("llama", 1)),
        encoded_questions(),
        tmp_path / "journal.jsonl",
    )
    whole = answer_restored(post, pre, questions, intervals(4))
    calls, own = [0], EncodedQuestions.scores

    def stop(self: EncodedQuestions, logits: torch.Tensor) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return own(self, logits)

    with monkeypatch.context() as patched:
        patched.setattr(EncodedQuestions, "scores", stop)
        with pytest.raises(KeyboardInterrupt):
            answer_restored(post, pre, questions, intervals(4), journal)
    again, counted = [], EncodedQuestions.scores
    monkeypatch.setattr(EncodedQuestions, "scores", lambda self, logits: again.append(1) or counted(self, logits))
    assert answer_restored(post, pre, questions, intervals(4), journal) == whole
    assert len(again) == 5  # of ten: the first five were known
    other = answer_restored(post, Stack(nano("llama", 2)), questions, intervals(4), journal)
    assert other != whole  # another base does not go on from it


def test_what_cannot_be_is_refused_in_one_line() -> None:
    post, pre = Stack(nano("llama")), Stack(nano("llama", 1))
    for wrong in [(0, 5), (2, 2), (3, 1), (-1, 2)]:
        with pytest.raises(MethodError, match="give 0 <= i < j <= 4"):
            answer_restored(post, pre, encoded_questions(), [wrong])
    with torch.no_grad():
        pre.model.model.layers[2].mlp.up_proj.weight.fill_(torch.inf)
    with pytest.raises(NumericsError, match=r"layers \[0, 3\) of .*: non-finite"):
        answer_restored(post, pre, encoded_questions(), intervals(4))
