"""LayRA: only the edges change, all its ways to several languages are what they say, and every language is measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, get_linear_schedule_with_warmup

from lamella.errors import CalibrationError, LamellaError, MethodError
from lamella.files import Work
from lamella.formatting import number
from lamella.methods.layra import TRAINING, AdapterShape, Added, Edges, Language, Matrix, average_ranks, layra, measure
from lamella.methods.layra.page import figures, summary, tradeoff
from lamella.methods.layra.recipe import learn, with_adapters
from lamella.results import Evidence
from lamella.runner import run
from lamella.stack import Stack, share
from lamella.train import (
    Adapter,
    Lora,
    Order,
    Task,
    TrainConfig,
    add_lora,
    blocks,
    collate,
    concatenate,
    fit,
    merge,
    response_loss,
)  # fmt: skip
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parents[2] / "models" / "nano-llama"
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
CONFIG = TrainConfig(lr=1e-2, schedule="linear", steps=6, batch=4)
EDGES = {"first": 1, "last": 1}


def language(seed: int, low: int) -> Language:
    """Rows that repeat a short random word of eight letters from ``low`` on."""
    words = torch.randint(low, low + 8, (24, 4), generator=torch.Generator().manual_seed(seed))
    rows = blocks(words.repeat(1, 3), loss_on="all")
    return Language(rows[:18], rows[18:], 100)


ENG, SWH, URD = language(0, 3), language(1, 40), language(2, 80)
NEW = {"swh": SWH, "urd": URD}


def opened(**options: Any) -> Stack:
    return Stack(nano("llama", num_hidden_layers=5, **options))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def weights(model: Any) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def stirred(stack: Stack) -> tuple[Any, Lora]:
    """Adapters at the edges that do something."""
    view, lora = with_adapters(stack, Edges(len(stack), 1, 1).sites, AdapterShape(), 0)
    with torch.no_grad():
        for name, each in view.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(each, std=0.1)
    return view, lora


@pytest.fixture(scope="module")
def added() -> Added:
    return layra(opened(), NEW, {"eng": ENG}, **EDGES, config=CONFIG)


# Where it trains


def test_before_training_the_view_is_the_model_to_the_bit() -> None:
    stack = opened()
    view, _ = with_adapters(stack, Edges(5, 2, 1).sites, AdapterShape(), 0)
    assert torch.equal(logits(view), logits(stack.model))


def test_adapters_stand_in_the_adapted_layers_alone_and_have_the_size_of_the_formula(added: Added) -> None:
    adapter = added.adapters["swh"]
    hidden, inner, narrow, r = 32, 64, 16, 8  # two key-value heads of 8
    one_layer = r * (2 * (hidden + hidden) + 2 * (hidden + narrow) + 3 * (hidden + inner))
    assert len(adapter.modules) == 2 * 7 and adapter.parameters == 2 * one_layer
    assert all(name.startswith(("model.layers.0.", "model.layers.4.")) for name in adapter.modules)


def test_nothing_else_changes_and_the_middle_is_the_same_function_of_another_input(added: Added) -> None:
    stack = opened()
    before, after = weights(stack.model), weights(added.stack.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in added.adapter.modules}
    with torch.no_grad():
        contexts = [each.context(IDS) for each in (stack, added.stack)]
        entering = [each.run(c.h, 0, 1, c) for each, c in zip((stack, added.stack), contexts, strict=True)]
        assert (entering[0] - entering[1]).abs().max() > 1e-3
        middle = [each.run(entering[1], 1, 4, c) for each, c in zip((stack, added.stack), contexts, strict=True)]
    assert torch.equal(*middle)


def test_the_callers_model_stays_as_it_is() -> None:
    stack = opened()
    before = weights(stack.model)
    layra(stack, {"swh": SWH}, **EDGES, config=CONFIG)
    after = weights(stack.model)
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert not stack.model.training and all(each.requires_grad for each in stack.model.parameters())


def test_all_layers_are_ordinary_lora(tmp_path: Path) -> None:
    """The same losses as LoRA without sites, and as a plain loop over plain peft."""
    stack = opened()
    made = layra(stack, {"swh": SWH}, first=4, last=1, config=replace(CONFIG, seed=3))
    view = share(stack.model)
    lora = add_lora(view, 8, 16, seed=3)
    log = fit(view, SWH.samples, Task(response_loss), replace(CONFIG, seed=3), out=tmp_path, trainable=lora.trains)
    ours, usual = made.adapters["swh"], lora.adapter()
    assert all(torch.equal(a, b) for n in usual.pairs for a, b in zip(ours.pairs[n], usual.pairs[n], strict=True))
    assert made.logs["swh"].train == log.train

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(usual.modules))
    model = peft.get_peft_model(nano("llama", num_hidden_layers=5), config)
    start = add_lora(share(stack.model), 8, 16, seed=3).tensors()
    with torch.no_grad():
        for name, each in start.items():
            model.get_parameter(f"base_model.model.{name}").copy_(each)
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.03 * 6), 6)
    order, losses = Order(SWH.samples, 6, 4, seed=3), []
    for step in range(6):
        batch = collate([order[4 * step + place] for place in range(4)])
        out = model(input_ids=batch["input_ids"]).logits[:, :-1]
        loss = F.cross_entropy(out.reshape(-1, 128), batch["input_ids"][:, 1:].reshape(-1))
        losses.append(float(loss))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert log.train[-1].loss == pytest.approx(sum(losses) / 6, abs=1e-5)
    theirs = model.merge_and_unload()
    torch.testing.assert_close(logits(made.stack.model), logits(theirs), atol=1e-3, rtol=1e-3)


# What comes out


def test_merged_is_unmerged_and_unmerging_restores() -> None:
    stack = opened()
    view, lora = stirred(stack)
    live = logits(view)
    torch.testing.assert_close(logits(merge(stack, lora.adapter()).model), live, atol=1e-5, rtol=1e-5)
    lora.merge()
    torch.testing.assert_close(logits(view), live, atol=1e-5, rtol=1e-5)
    lora.unmerge()
    assert torch.equal(logits(view), live)


def test_merging_one_after_the_other_is_one_adapter_of_the_sum_of_ranks(added: Added) -> None:
    stack = opened()
    first = merge(stack, added.adapters["swh"])
    both = merge(first, added.adapters["urd"])
    assert {len(a) for a, _ in added.adapter.pairs.values()} == {16}
    torch.testing.assert_close(logits(both.model), logits(merge(stack, added.adapter).model), atol=2e-5, rtol=1e-5)
    with pytest.raises(LamellaError, match="other weights"):
        merge(stack, added.adapters["urd"])  # it was trained on top of the first


def test_cached_decoding_is_uncached_decoding_with_adapters() -> None:
    stack = opened()
    stack.model.generation_config.eos_token_id = None
    view, _ = stirred(stack)
    out = view.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True,
                        return_dict_in_generate=True)  # fmt: skip
    with torch.no_grad():
        whole = view(out.sequences, use_cache=False).logits[:, 11:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, atol=1e-4, rtol=1e-4)


def test_the_written_folder_is_an_ordinary_peft_adapter(added: Added, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    added.save(folder, lambda: {"evidence.json": "{}"})
    model = peft.PeftModel.from_pretrained(nano("llama", num_hidden_layers=5), str(folder))
    torch.testing.assert_close(logits(model), logits(added.stack.model), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(added.stack.model), atol=1e-5, rtol=1e-5)
    first = Adapter.open(folder / "steps" / "swh")
    assert torch.equal(logits(merge(opened(), first).model), logits(merge(opened(), added.adapters["swh"]).model))


# Ways to several languages


def test_in_sequence_each_language_begins_with_those_before_it_merged(tmp_path: Path) -> None:
    stack = opened()
    made = layra(stack, NEW, **EDGES, config=replace(CONFIG, seed=5))
    alone = layra(stack, {"swh": SWH}, **EDGES, config=replace(CONFIG, seed=5))
    view, lora = with_adapters(alone.stack, Edges(5, 1, 1).sites, AdapterShape(), 6)
    second, _ = learn(view, lora, URD.samples, replace(CONFIG, seed=6), out=tmp_path)
    expected = merge(alone.stack, second)
    torch.testing.assert_close(logits(made.stack.model), logits(expected.model), atol=1e-5, rtol=1e-5)


def test_a_series_keeps_one_adapter_and_separate_ones_are_added_with_their_weight() -> None:
    stack = opened()
    series = layra(stack, NEW, **EDGES, protocol="series", config=CONFIG)
    assert series.adapter is series.adapters["urd"] and {len(a) for a, _ in series.adapter.pairs.values()} == {8}
    assert merge(stack, series.adapters["swh"])  # both belong to the original

    apart = layra(stack, NEW, **EDGES, protocol="separate", weight=0.5, config=CONFIG)
    dense = {name: each.clone().double() for name, each in weights(stack.model).items()}
    for adapter in apart.adapters.values():
        for name, (a, b) in adapter.pairs.items():
            dense[f"{name}.weight"] += 0.5 * 2.0 * (b.double() @ a.double())
    for name, each in apart.stack.model.named_parameters():
        torch.testing.assert_close(each.double(), dense[name], atol=1e-6, rtol=1e-6)
    alone = layra(stack, {"swh": SWH}, **EDGES, config=CONFIG)
    name = "model.layers.0.mlp.up_proj"
    assert all(map(torch.equal, apart.adapters["swh"].pairs[name], alone.adapters["swh"].pairs[name]))


def test_joint_is_one_adapter_on_the_mixture() -> None:
    made = layra(opened(), NEW, {"eng": ENG}, **EDGES, protocol="joint", config=replace(CONFIG, steps=None))
    assert list(made.adapters) == ["swh+urd"] and made.logs["swh+urd"].settings["steps"] == 9  # 36 samples by fours
    assert made.matrix.steps == ["before", "swh+urd"]


def test_left_out_steps_are_one_pass_over_the_samples() -> None:
    made = layra(opened(), {"swh": SWH}, **EDGES, config=replace(TRAINING, batch=4))
    assert made.logs["swh"].settings["steps"] == 4  # 18 samples by fours
    assert made.logs["swh"].settings["lr"] == 3e-4 and made.logs["swh"].settings["schedule"] == "linear"


def test_a_run_that_was_stopped_goes_on_to_the_same_result(tmp_path: Path) -> None:
    whole = layra(opened(), NEW, {"eng": ENG}, **EDGES, config=CONFIG)
    layra(
        opened(), {"swh": SWH}, {"eng": ENG}, **EDGES, config=CONFIG, work=Work(tmp_path)
    )  # killed after one language
    again = layra(opened(), NEW, {"eng": ENG}, **EDGES, config=CONFIG, work=Work(tmp_path))
    assert again.matrix == whole.matrix
    assert all(
        torch.equal(a, b) for n in whole.adapter.pairs
        for a, b in zip(whole.adapter.pairs[n], again.adapter.pairs[n], strict=True)
    )  # fmt: skip


# Languages and their matrix


def test_every_language_is_measured_before_and_after_each_step(added: Added) -> None:
    matrix = added.matrix
    assert matrix.steps == ["before", "swh", "urd"] and all(set(row) == {"eng", "swh", "urd"} for row in matrix.rows)
    assert matrix.rows[0] == measure(opened().model, {"eng": ENG} | NEW, 4)
    assert matrix.learning("swh", 1) > 0.1 and matrix.learning("urd") > 0.1


def test_learning_forgetting_and_their_difference_by_hand() -> None:
    matrix = Matrix(("eng", "fra"), ("swh", "urd"))
    for step, row in (("before", (1, 2, 8, 9)), ("swh", (2, 2.5, 4, 9)), ("urd", (3, 3, 5, 6))):
        matrix.add(step, dict(zip(("eng", "fra", "swh", "urd"), map(float, row), strict=True)))
    assert matrix.learning("swh") == 3 and matrix.learning("swh", 1) == 4
    assert matrix.forgetting() == 1.5 and matrix.forgetting(1) == 0.75 and matrix.forgetting(names=["fra"]) == 1
    assert matrix.tradeoff() == 3 - 1.5
    assert matrix.retention() == {"swh": 1.0, "urd": 0.0}
    with pytest.raises(MethodError, match="English first"):
        Matrix((), ("swh",)).forgetting()


def test_bits_per_byte_count_the_bytes_of_predicted_text_whatever_the_tokenizer_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(NANO_LLAMA)
    text = "Ein Wort, zwei Wörter. اردو میں " * 6
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    known = Language.of(tokenizer, ids)
    first = tokenizer.decode(ids[0, :1])
    assert known.size == len(text.encode()) - len(first.encode())
    model = nano("llama", vocab_size=len(tokenizer), max_position_embeddings=512).double()
    with torch.no_grad():
        nats = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    expected = float(nats) / math.log(2) / known.size
    assert measure(model.float(), {"x": known})["x"] == pytest.approx(expected, rel=1e-5)


def test_average_ranks_share_the_places_of_equal_scores() -> None:
    from scipy.stats import rankdata

    drawn = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (5, 7), generator=drawn).double()
    table = {str(m): {str(t): float(v) for t, v in enumerate(row)} for m, row in enumerate(scores)}
    expected = rankdata(scores.numpy(), axis=0).mean(1)
    assert list(average_ranks(table).values()) == pytest.approx(expected.tolist())


# Edges


@pytest.mark.parametrize(
    ("layers", "edges"),
    [(32, (10, 2)), (28, (10, 2)), (30, (10, 2)), (64, (20, 4)), (14, (5, 1)), (8, (3, 1)), (4, (1, 1)), (1, (0, 1))],
)
def test_edges_are_the_papers_of_28_and_32_layers_and_follow_the_depth(layers: int, edges: tuple[int, int]) -> None:
    found = Edges.of(layers)
    assert (found.first, found.last) == edges
    assert found.indices == (*range(edges[0]), *range(layers - edges[1], layers))
    assert found.sites[-1] == f"layers.{layers - 1}"


def test_given_edges_are_taken_and_those_that_overlap_refused() -> None:
    assert Edges.of(32, 10, 2).indices == (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 30, 31)
    assert Edges.of(8, 0, 3).indices == (5, 6, 7) and Edges.of(8, 3, 0).indices == (0, 1, 2)
    for first, last in ((5, 4), (0, 0)):
        with pytest.raises(MethodError, match=f"first {first} and last {last} of 8 layers"):
            Edges.of(8, first, last)


# What is said


def test_findings_are_json_and_notes_name_who_lost_most(added: Added) -> None:
    findings = json.loads(json.dumps(added.findings))
    assert findings["layers"] == {"layers": 5, "first": 1, "last": 1, "adapted": [0, 4]}
    assert any("most for eng" in note for note in added.notes)
    evidence = Evidence(
        kind="adapter", provenance=added.provenance, environment={}, findings=findings, notes=added.notes
    )
    (matrix,) = figures(evidence)
    assert matrix.rows == ["before", "swh", "urd"] and set(matrix.columns) >= {"swh", "urd"}
    assert matrix.values[0] == [0.0] * len(matrix.columns)  # changes since before
    row = findings["matrix"]["rows"][2]
    assert [each.split(" ")[0] for each in matrix.labels[2]] == [number(row[name]) for name in matrix.columns]
    told = summary(evidence)
    assert "added swh, urd" in told.verdict and len(told.tables[0].rows) == 3
    silent = layra(opened(), {"swh": SWH}, **EDGES, config=CONFIG)
    assert any("forgetting is unknown" in note for note in silent.notes)


def test_the_figure_has_a_point_for_each_rate() -> None:
    points = {"a": [(1.0, 2.0), (2.0, 1.0)], "b & c": [(3.0, 0.0)]}
    assert {name: each.at for name, each in tradeoff(points).points.items()} == points


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"languages": {}}, "no languages to learn"),
        ({"languages": {"eng": SWH}}, "'eng' is both a new and an old language"),
        ({"languages": {"swh": Language([], SWH.held_out, 10)}}, "'swh' has no samples"),
        ({"weight": 0.5}, "weight 0.5 is only for protocol 'separate'"),
        ({"shape": AdapterShape(targets=("c_attn",))}, "no linear module is named 'c_attn'"),
        ({"first": 9}, "first 9 and last 1 of 5 layers"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"languages": {"swh": SWH}, "old": {"eng": ENG}, "config": CONFIG, **EDGES} | change
    with pytest.raises(LamellaError, match=said) as error:
        layra(opened(), given.pop("languages"), given.pop("old"), **given)
    assert "\n" not in str(error.value)


def test_other_models_and_languages_without_held_out_text_are_refused() -> None:
    with pytest.raises(MethodError, match="layra works on decoders"):
        layra(Stack(nano("vit")), {"swh": SWH})
    with pytest.raises(CalibrationError, match="no held-out text"):
        Language(SWH.samples, [], 10)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3_moe"])
def test_other_families_learn_too(family: str) -> None:
    stack = Stack(nano(family))
    made = layra(stack, {"swh": SWH}, {"eng": ENG}, **EDGES, config=CONFIG)
    prefix = stack.architecture.prefix
    assert {name.removeprefix(prefix).split(".")[0] for name in made.adapter.modules} == {"0", "3"}
    assert made.matrix.learning("swh") > 0
    again = merge(stack, concatenate([Adapter(made.adapter.pairs, made.adapter.scales, made.adapter.transposed)]))
    assert torch.equal(logits(again.model), logits(made.stack.model))


def test_it_runs_from_files_to_a_folder_with_evidence_page_and_adapter(tmp_path: Path) -> None:
    text = tmp_path / "swh.txt"
    text.write_text("\n\n".join(f"Habari ya asubuhi, rafiki namba {number}." for number in range(200)))
    found = run("layra", NANO_LLAMA, {"swh": str(text)}, {"eng": "pydoc"}, out=tmp_path / "out", sequences=8, length=16,
                held_out_sequences=4, steps=2, lr=1e-3)  # fmt: skip
    evidence = json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert evidence["findings"]["matrix"]["steps"] == ["before", "swh"]
    assert evidence["provenance"]["inputs"]["languages"] and evidence["provenance"]["options"]["steps"] == 2
    assert "swh" in (tmp_path / "out" / "report.html").read_text()
    adapter = Adapter.open(tmp_path / "out")
    with torch.no_grad():
        merged = merge(Stack(found.result.stack.model.__class__.from_pretrained(NANO_LLAMA)), adapter)
        torch.testing.assert_close(merged.model(IDS).logits, found.result.stack.model(IDS).logits, atol=1e-5, rtol=1e-5)
