"""All five stages on real encoder-decoders and decoders, from files to a checkpoint, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from radiology import ParsedImpression, reports, score_impressions, word_tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration
from transformers.trainer_callback import TrainerCallback

import lamella
from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.cstrl import (
    Anchor,
    GapTraining,
    PairEncoder,
    Summaries,
    SummaryPair,
    SummarySplits,
    TextLengths,
    cstrl,
    encoder_names,
    fill,
    gap_sentences,
    unfrozen_fraction,
)
from lamella.methods.cstrl.baselines import Unfreezing
from lamella.methods.cstrl.page import figures
from lamella.runner import run
from lamella.stack import Model, Stack, open_model
from lamella.train import Task, TrainConfig, fit, response_loss
from lamella.zoo.nano import nano

REPORTS = reports(40, 0)
SHORT = {
    "filling": GapTraining(gap_epochs=1, gap_batch=8),
    "lengths": TextLengths(96, 24, 96),
    "test_samples": 3,
    "config": TrainConfig(lr=2e-3, batch=8, steps=6, save_every=2, log_every=1, schedule="linear", warmup=0.0),
}


def small_t5(seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(word_tokenizer()), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def pairs() -> Summaries:
    return Summaries([each.pair for each in REPORTS], word_tokenizer())


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with its tokenizer, and pairs, as a user has them."""
    folder = tmp_path / "t5"
    small_t5().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"findings": r.source, "impression": r.summary}) + "\n" for r in REPORTS))
    return folder, data


def test_a_t5_from_a_folder_is_trained_and_opens_in_plain_transformers(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, data = files
    options = {"gap_epochs": 1, "gap_batch": 8, "steps": 4, "batch": 8, "test_samples": 3, "summary_length": 24}
    done = run("cstrl", str(folder), str(data), out=tmp_path / "out", **options)
    found = done.evidence.findings
    assert set(found["scores"]) == {
        "initial model",
        "after gap sentences",
        "after summaries",
        "constant answer",
    }
    assert found["gaps"]["sources"] == 32 and found["gaps"]["unlabelled"] == 0  # of 40: 4 test, 4 watched
    lines = [json.loads(line) for line in (tmp_path / "out" / "gaps.jsonl").read_text().splitlines()]
    assert len(lines) == 32 and all("<extra_id_0>" in line["source"] for line in lines)
    assert found["scores"]["constant answer"]["distinct"] == 1
    assert {"bleu", "bleu1_precision"} <= set(found["scores"]["after summaries"])
    assert (tmp_path / "out" / "report.html").read_text().count("<figure>") == 4
    gap, losses, drift, kept = figures(done.evidence)
    assert gap.series["gap sentences, training"] == [(point["step"], point["loss"]) for point in found["gap losses"]]
    assert {"training", "held-out: summaries", "held-out: gap sentences"} == set(losses.series)
    assert [len(values) for values in drift.series.values()] == [len(found["importance"]["sums"])] * len(drift.series)
    assert kept.series["by epoch"][0][1] == 0.0  # nothing is forgotten before the first step
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = done.result.stack.model
    ids = tokenizer("summarize: " + REPORTS[0].source, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits,
                           ours(input_ids=ids, decoder_input_ids=ids[:, :4]).logits)  # fmt: skip
    assert "the heart is normal" in tokenizer.decode(tokenizer("the heart is normal")["input_ids"])


def test_stages_one_by_one_are_the_whole(files: tuple[Path, Path], tmp_path: Path) -> None:
    folder, data = files
    keep = tmp_path / "f.safetensors"
    same = {"gap_length": 96, "seed": 0}
    run("cstrl", str(folder), str(data), command="gaps", out=tmp_path / "filled", epochs=1, batch=8, fisher_batch=8,
        save_fisher=keep, **same)  # fmt: skip
    options = {"steps": 4, "batch": 8, "test_samples": 2, "summary_length": 24, **same}
    learnt = {json.loads(line)["target"] for line in (tmp_path / "filled" / "gaps.jsonl").read_text().splitlines()}
    splits = SummarySplits.of([each.pair for each in REPORTS], None, 0)
    kept = gap_sentences([*splits.held_out, *splits.test]).gaps
    assert len(splits.test) == 4 and not learnt & {gap.target for gap in kept}  # of the whole, too
    apart = run("cstrl", str(tmp_path / "filled"), str(data), fisher=keep, **options, out=tmp_path / "apart")
    assert "after gap sentences" not in apart.evidence.findings["scores"]
    assert apart.evidence.findings["importance"]["measured"]["batches"] > 0
    assert apart.evidence.findings["epochs"][0]["lambda"] == 0.9
    with pytest.raises(MethodError, match="belongs to other weights than"):
        run("cstrl", str(folder), str(data), fisher=keep, **options, out=tmp_path / "no")
    assert not (tmp_path / "no").exists() and not (tmp_path / ".no.work").exists()


def test_it_is_stopped_in_the_second_training_and_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = open_model(small_t5()), pairs()
    whole = cstrl(model, data, work=Work(tmp_path / "whole"), **SHORT)
    calls = [0]

    def stop(callback: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        calls[0] += 1
        if "summaries" in args.output_dir and state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(TrainerCallback, "on_optimizer_step", stop)
        cstrl(model, data, work=Work(tmp_path / "work"), **SHORT)
    assert (tmp_path / "work" / "fisher.safetensors").exists() and calls[0] > 0
    again = cstrl(model, data, work=Work(tmp_path / "work"), **SHORT)
    theirs = dict(whole.stack.model.named_parameters())
    assert all(torch.equal(each, theirs[name]) for name, each in again.stack.model.named_parameters())
    assert again.findings == whole.findings and again.log == whole.log and again.files == whole.files


def test_the_tokenizer_knows_all_that_reports_and_impressions_say() -> None:
    tokenizer = word_tokenizer()
    for each in reports(500, 0):
        for text in (each.source, each.summary):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids).replace(" ,", ",").replace(" .", ".") == text


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_it_learns_and_leaves_the_model_as_it_is(kind: str, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    model = open_model(small_t5()) if kind == "t5" else Stack(nano("llama", vocab_size=len(tokenizer), eos_token_id=1))
    before = {name: each.clone() for name, each in model.model.named_parameters()}
    found = cstrl(model, pairs(), work=Work(tmp_path), **SHORT)
    assert all(torch.equal(each, before[name]) for name, each in model.model.named_parameters())
    assert type(found.stack.model) is type(model.model)
    rows = found.findings["epochs"]
    assert rows[-1]["task"] < rows[0]["task"] and rows[0]["lambda"] == 0.9
    watched = found.findings["held_out_losses"]
    assert set(watched[0]) == {"step", "summaries", "gap sentences"}
    assert watched[-1]["summaries"] < watched[0]["summaries"]
    curve = found.findings["gap losses"]
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_an_anchor_that_does_nothing_is_said_to_do_nothing(tmp_path: Path) -> None:
    options = SHORT | {"anchor": Anchor(lam=1e-9, floor=0.0)}
    found = cstrl(open_model(small_t5()), pairs(), work=Work(tmp_path), **options)
    assert any("The anchor had almost no effect" in note for note in found.notes)


def test_what_trains_no_model_of_text_is_refused(tmp_path: Path) -> None:
    for kind in ("whisper", "llava"):
        with pytest.raises(MethodError, match="cstrl trains models that take and generate text") as error:
            cstrl(Model(nano(kind)), pairs(), work=Work(tmp_path))
        assert "\n" not in str(error.value)
    with pytest.raises(MethodError, match=r"works on decoders; .* is a vit"):
        cstrl(Stack(nano("vit")), pairs(), work=Work(tmp_path))
    with pytest.raises(MethodError, match="leave no space for a source in a context of 256"):
        cstrl(Stack(nano("llama", vocab_size=200)), pairs(), work=Work(tmp_path))


def test_masks_that_a_tokenizer_cannot_tell_apart_are_refused() -> None:
    class Blind:
        eos_token_id = 1

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [2 for _ in text.split()]}

    with pytest.raises(MethodError, match="to the same tokens, so gaps cannot be distinguished"):
        PairEncoder(open_model(small_t5()), Blind()).gaps([], 32)


def test_samples_are_what_each_kind_of_model_reads() -> None:
    tokenizer, text = word_tokenizer(), [("the heart is normal.", NORMAL)]
    [of_t5] = PairEncoder(open_model(small_t5()), tokenizer).samples(text, "summarize: ", 64, 24)
    assert tokenizer.decode(of_t5["input_ids"]) == "summarize : the heart is normal . </s>"
    assert tokenizer.decode(of_t5["labels"]) == "no acute cardiopulmonary process . </s>"
    [of_llama] = PairEncoder(Stack(nano("llama")), tokenizer).samples(text, "summarize: ", 64, 24)
    head = int(of_llama["prompt_lengths"])
    assert tokenizer.decode(of_llama["input_ids"][:head]) == "summarize : the heart is normal . </s>"  # no line break
    assert tokenizer.decode(of_llama["input_ids"][head:]) == "no acute cardiopulmonary process . </s>"
    assert (of_llama["labels"][:head] == -100).all() and torch.equal(
        of_llama["labels"][head:], of_llama["input_ids"][head:]
    )
    long = [("the heart is normal. " * 40, "the heart is normal. " * 40)]
    [cut] = PairEncoder(open_model(small_t5()), tokenizer).samples(long, "", 16, 8)
    assert (len(cut["input_ids"]), len(cut["labels"])) == (16, 8) and cut["labels"][-1] == cut["input_ids"][-1] == 1
    [cut] = PairEncoder(Stack(nano("llama")), tokenizer).samples(long, "", 16, 8)
    assert (int(cut["prompt_lengths"]), len(cut["input_ids"])) == (16, 24)


NORMAL = "no acute cardiopulmonary process."


def test_reports_say_what_their_impressions_say() -> None:
    assert len({each.source for each in REPORTS}) == 40 and reports(5, 0) == reports(5, 0) != reports(5, 1)
    many = reports(600, 3)
    assert 0.25 < sum(not each.findings for each in many) / 600 < 0.35
    assert {len([s for s in each.source.split(". ") if s]) for each in many} <= {6, 7, 8, 9}
    assert score_impressions([each.summary for each in many], many) == {"recall": 1.0, "invented": 0.0, "exact": 1.0}
    sick = [each for each in many if each.findings]
    assert score_impressions([NORMAL] * len(sick), sick) == {"recall": 0.0, "invented": 0.0, "exact": 0.0}
    assert score_impressions(["severe scoliosis, bad news."], [sick[0]])["invented"] == 1.0
    assert ParsedImpression.of("mild scoliosis , severe left rib fracture .").findings == (
        ("scoliosis", "mild", ""),
        ("rib fracture", "severe", "left"),
    )
    assert ParsedImpression.of("mild left scoliosis.").findings == ()  # a spine has no side
    for each in sick[:50]:  # what the impression says is in the report, in one sentence each
        assert all(found.finding in each.source and found.severity in each.source for found in each.findings)


def test_the_encoder_is_unfrozen_from_its_embedding_on(tmp_path: Path) -> None:
    assert [round(unfrozen_fraction(epoch, 20), 3) for epoch in (0, 1, 15, 19)] == [0.1, 0.16, 1.0, 1.0]
    model = small_t5()
    names, tokenizer = encoder_names(model), word_tokenizer()
    assert names[0].startswith("encoder.block.0") and not any(name.startswith("decoder") for name in names)
    data = PairEncoder(open_model(model), tokenizer).samples([each.pair for each in REPORTS[:8]], "", 96, 24)
    before = {name: each.clone() for name, each in model.named_parameters()}
    hook = Unfreezing(names, samples=8, size=8, epochs=20)
    fit(
        model,
        data,
        Task(response_loss),
        TrainConfig(steps=1, lr=1e-2, batch=8, warmup=0.0, weight_decay=0.1),
        out=tmp_path,
        hooks=[hook],
    )
    moved = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    first = names[: round(0.1 * len(names))]
    assert moved & set(names) == set(first) and any(name.startswith("decoder") for name in moved)


def test_gap_sentences_alone_keep_their_importances(tmp_path: Path) -> None:
    config = TrainConfig(lr=3e-3, batch=8, steps=3, log_every=1)
    found = fill(
        open_model(small_t5()),
        pairs(),
        save_fisher=tmp_path / "f",
        gap_length=96,
        config=config,
        work=Work(tmp_path / "w"),
    )
    assert (tmp_path / "f").exists() and sum(found.findings["importance"]["sums"].values()) > 0
    assert found.findings["importance"]["measured"]["estimator"]["batch"] == 32


def test_it_is_found_by_its_name_and_its_commands() -> None:
    from lamella.registry import commands

    assert set(commands("cstrl")) == {"", "gaps", "distil"}
    assert isinstance(lamella.open(small_t5()), Model)
    assert SummaryPair("a", "b").summary == "b"
