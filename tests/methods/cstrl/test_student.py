"""Tests of the student: its shape, its loss, and the note on a collapsed student."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from radiology import reports, word_tokenizer
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import T5Config, T5ForConditionalGeneration

from lamella.data.samples import collate
from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.cstrl import Summaries, TextLengths, distil, new_student, student_config, student_loss
from lamella.stack import Model, Stack, open_model
from lamella.train import TrainConfig, pairs
from lamella.zoo.nano import nano

DRAWN = torch.Generator().manual_seed(0)
SAMPLES = [
    {
        "input_ids": torch.randint(3, 100, (5 + number,), generator=DRAWN),
        "labels": torch.randint(3, 100, (3 + number % 2,), generator=DRAWN),
    }
    for number in range(4)
]
KINDS = {"t5": SAMPLES, "llama": pairs([(each["input_ids"], each["labels"]) for each in SAMPLES])}


@pytest.mark.parametrize(
    ("parts", "sizes"), [(8, (4, 4, 181, 256, 6)), (16, (3, 3, 128, 128, 4)), (32, (2, 2, 90, 64, 2))]
)
def test_students_of_t5_small_are_the_paper_s_with_encoder_and_decoder_alike(
    parts: int, sizes: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        teacher = Model(T5ForConditionalGeneration(T5Config()))
    before = teacher.model.config.to_dict()
    config = student_config(teacher, parts)
    assert (config.num_layers, config.num_decoder_layers, config.d_model, config.d_ff, config.num_heads) == sizes
    assert teacher.model.config.to_dict() == before and config.vocab_size == 32128
    with torch.device("meta"):
        student = T5ForConditionalGeneration(config)
    assert len(student.decoder.block) == sizes[1] and len(student.encoder.block) == sizes[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt", "qwen3", "gemma3_text", "t5", "bart"])
def test_a_student_of_every_kind_runs(kind: str) -> None:
    teacher = open_model(nano(kind))
    student = new_student(teacher, 8, 0)
    ids = torch.randint(3, 100, (2, 6), generator=DRAWN)
    given = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if len(teacher.stacks) > 1 else {})
    with torch.no_grad():
        assert torch.isfinite(student.model(**given).logits).all()
    sizes = [sum(each.numel() for each in model.model.parameters()) for model in (student, teacher)]
    assert sizes[0] < sizes[1]
    again = new_student(teacher, 8, 0)
    assert all(torch.equal(a, b) for a, b in zip(student.model.parameters(), again.model.parameters(), strict=True))
    assert all(len(student.stacks[name]) < len(stack) for name, stack in teacher.stacks.items() if len(stack) > 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_published_sum_over_unpadded_positions(kind: str) -> None:
    model, teacher = nano(kind).eval(), nano(kind, seed=1).eval()
    options = {"teacher": teacher, "temperature": 20.0, "alpha": 0.7, "divergence": 0.7 / 4**2}
    with torch.no_grad():
        loss, parts = student_loss(model, collate(KINDS[kind]), **options)
        ce, kl, count = 0.0, 0.0, 0
        for each in KINDS[kind]:
            if kind == "t5":
                ours, theirs = (
                    m(input_ids=each["input_ids"][None], labels=each["labels"][None]).logits[0]
                    for m in (model, teacher)
                )
                labels = each["labels"]
            else:
                start = int(each["prompt_lengths"])
                ours, theirs = (m(each["input_ids"][None]).logits[0, start - 1 : -1] for m in (model, teacher))
                labels = each["input_ids"][start:]
            ce += float(cross_entropy(ours, labels, reduction="sum"))
            logs = [log_softmax(z.double() / 20, -1) for z in (ours, theirs)]
            kl += float(kl_div(logs[0], logs[1], reduction="sum", log_target=True))
            count += len(labels)
    assert float(parts["ce"]) == pytest.approx(ce / count, rel=1e-4)
    assert float(parts["kl"]) == pytest.approx(400 * kl / count, rel=1e-3)
    assert float(loss) == pytest.approx(0.3 * ce / count + 0.7 * 400 / 16 * kl / count, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_teacher_as_student_and_a_of_1_there_is_no_gradient(kind: str) -> None:
    model = nano(kind).eval()
    with torch.enable_grad():
        loss, _ = student_loss(
            model, collate(KINDS[kind]), teacher=nano(kind), temperature=20.0, alpha=1.0, divergence=1.0
        )
        loss.backward()
    assert abs(float(loss.detach())) < 1e-5
    assert max(float(each.grad.abs().max()) for each in model.parameters() if each.grad is not None) < 1e-5


def teacher() -> Model:
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(word_tokenizer()), d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4,
                      decoder_start_token_id=0)  # fmt: skip
    return open_model(T5ForConditionalGeneration(config).eval())


def test_a_student_learns_and_is_judged_beside_teacher_and_constant_answer(tmp_path: Path) -> None:
    data = Summaries([each.pair for each in reports(40, 0)], word_tokenizer())
    model = teacher()
    config = TrainConfig(steps=6, lr=3e-3, batch=8, log_every=1, warmup=0.0)
    found = distil(
        model, data, parts=8, test_samples=3, lengths=TextLengths(96, 24), config=config, work=Work(tmp_path)
    )
    assert set(found.findings["scores"]) == {"teacher", "student", "constant answer"}
    assert found.findings["divergence"] == pytest.approx(0.7 / 64)
    assert found.findings["parameters"]["student"] < found.findings["parameters"]["teacher"]
    assert found.log.train[-1].loss < found.log.train[0].loss
    assert found.stack.stacks["decoder"].model.config.num_decoder_layers == 2
    other = Model(nano("t5", vocab_size=64))
    with pytest.raises(MethodError, match="of the same type and vocabulary") as error:
        distil(model, data, other, work=Work(tmp_path / "other"))
    assert "\n" not in str(error.value) and math.isfinite(found.findings["scores"]["student"]["rouge1"])


def test_a_given_student_is_where_it_begins(tmp_path: Path) -> None:
    data = Summaries([each.pair for each in reports(20, 0)], word_tokenizer())
    model = Stack(nano("llama", vocab_size=len(word_tokenizer())))
    config = TrainConfig(steps=1, lr=0.0, batch=8, warmup=0.0)
    found = distil(model, data, Stack(nano("llama", seed=1, vocab_size=len(word_tokenizer()))), test_samples=1,
                   lengths=TextLengths(96, 24), config=config, work=Work(tmp_path))  # fmt: skip
    theirs = dict(nano("llama", seed=1, vocab_size=len(word_tokenizer())).named_parameters())
    assert all(torch.equal(each, theirs[name]) for name, each in found.stack.model.named_parameters())
