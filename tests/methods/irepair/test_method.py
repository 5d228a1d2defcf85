"""IRepair: what moves and what does not, its two losses, and what it says when it cannot."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lamella
from lamella.errors import LamellaError, TrainingError
from lamella.files import Work
from lamella.methods.irepair import (
    BASELINES,
    TRAINING,
    Choices,
    RepairSettings,
    layer_parameters,
    repair,
    repair_loss,
    utility_kl,
)
from lamella.plan.weights import read_tensors
from lamella.stack import Stack
from lamella.train import Sample, TrainingLog, blocks, collate, pairs
from lamella.zoo.nano import nano

DRAW = torch.Generator().manual_seed(5)
FAMILIES = ["llama", "gpt2", "gpt_neox", "opt", "gemma3_text", "qwen3_moe"]
BRIEF: dict[str, Any] = {"steps": 8, "warmup": 2, "lr": 3e-4, "eval_every": 2}


def drawn(*shape: int) -> Tensor:
    return torch.randint(3, 128, shape, generator=DRAW)


def paired(count: int = 20) -> tuple[list[Sample], list[Sample]]:
    """Pairs whose good continuations repeat one token and whose bad ones another, of many lengths."""
    prompts = [drawn(4 + n % 3) for n in range(count)]
    good = [torch.full((4 + n % 4,), 7) for n in range(count)]
    bad = [torch.full((3 + n % 5,), 9) for n in range(count)]
    return pairs(zip(prompts, good, strict=True), loss_on="all"), pairs(zip(prompts, bad, strict=True), loss_on="all")


GOOD, BAD = paired()
UTILITY = blocks(drawn(12, 10), loss_on="all")


def batch(count: int = 4) -> dict[str, dict[str, Tensor]]:
    return {"good": collate(GOOD[:count]), "bad": collate(BAD[:count]), "utility": collate(UTILITY[:count])}


def weights(model: Any) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def configured(options: dict[str, Any]) -> dict[str, Any]:
    """Options, those of the training and of the repair in one value each."""
    given = dict(options)
    config, settings = (
        replace(value, **{each.name: given.pop(each.name) for each in fields(value) if each.name in given})
        for value in (TRAINING, RepairSettings())
    )
    return {"config": config, "settings": settings, **given}


def repaired(stack: Stack, **options: Any) -> Any:
    return repair(stack, GOOD, BAD, **configured({"utility": UTILITY} | BRIEF | options))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_layers_that_were_chosen_differ_and_nothing_outside_the_layers(family: str, tmp_path: Path) -> None:
    stack = Stack(nano(family))
    before = weights(stack.model)
    plan = repaired(stack, work=Work(tmp_path), select="random", validation=0)
    assert all(torch.equal(each, before[name]) for name, each in weights(stack.model).items())
    view = lamella.apply(stack, plan)
    layers = layer_parameters(stack)
    touched = Choices.read(tmp_path / "trace.json").touched
    allowed = {name for number in touched for name in layers[number]}
    differ = {name for name, each in view.named_parameters() if not torch.equal(each, before[name])}
    assert differ and differ <= allowed
    assert {name.removeprefix(stack.architecture.prefix).split(".")[0] for name in differ} == {str(n) for n in touched}
    assert set(read_tensors(stack, plan.weights[0])) == differ
    shared = {name: each.data_ptr() for name, each in stack.model.named_parameters()}
    assert all(each.data_ptr() == shared[name] for name, each in view.named_parameters() if name not in differ)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_layer_of_each_step_is_the_one_with_the_largest_or_smallest_norm(family: str, tmp_path: Path) -> None:
    for select, pick in (("max", max), ("min", min)):
        repaired(Stack(nano(family)), work=Work(tmp_path / select), select=select)
        trace = Choices.read(tmp_path / select / "trace.json")
        assert len(trace.chosen) == len(trace.sensitivities) == 8
        for chosen, norms in zip(trace.chosen, trace.sensitivities, strict=True):
            assert norms[chosen] == pick(norms)


def test_fixed_is_chosen_once_by_averaged_gradients_and_random_by_the_seed(tmp_path: Path) -> None:
    stack = Stack(nano("gpt2"))
    repaired(stack, work=Work(tmp_path / "fixed"), select="fixed", validation=0)
    total: dict[str, Tensor] = {}
    order = torch.randperm(len(BAD), generator=torch.Generator().manual_seed(202)).tolist()
    for begin in range(0, len(order), 4):
        stack.model.zero_grad()
        given = collate([BAD[n] for n in order[begin : begin + 4]])
        logits = stack.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), given["labels"][:, 1:].flatten()).backward()
        for name, parameter in stack.model.named_parameters():
            total[name] = total.get(name, 0) + parameter.grad
    stack.model.zero_grad()
    norms = [sum(float(total[name].double().pow(2).sum()) for name in own) for own in layer_parameters(stack)]
    trace = Choices.read(tmp_path / "fixed" / "trace.json")
    assert trace.touched == [norms.index(max(norms))] and trace.sensitivities == []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        repaired(stack, work=Work(tmp_path / name), select="random", seed=seed)
    a, b, c = (Choices.read(tmp_path / name / "trace.json").chosen for name in "abc")
    assert a == b != c and len(set(a)) > 1


def test_kl_is_zero_with_no_gradient_at_the_start_and_has_the_reference_first() -> None:
    model, reference = nano("llama"), nano("llama", seed=1)
    given = batch()["utility"]
    kl = utility_kl(model, given, nano("llama"))
    gradients = torch.autograd.grad(kl, list(model.parameters()), allow_unused=True)
    assert (
        abs(float(kl.detach())) < 1e-6 and max(float(each.abs().max()) for each in gradients if each is not None) < 1e-6
    )
    logits = [each(given["input_ids"]).logits.double() for each in (reference, model)]
    p, log_p, log_q = logits[0].softmax(-1), logits[0].log_softmax(-1), logits[1].log_softmax(-1)
    with torch.no_grad():
        measured = float(utility_kl(model, given, reference))
    assert measured == pytest.approx(float((p * (log_p - log_q)).sum(-1).mean().detach()), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_padding_on_either_side_does_not_change_the_loss(family: str) -> None:
    model, reference = nano(family), nano(family, seed=1)
    given = batch()
    right, _ = repair_loss(model, given, reference=reference, beta=0.5, gamma=1.0)

    def left(rows: list[Sample]) -> Tensor:
        """Logits from rows padded on the left, each row's own positions [tokens of all rows, vocabulary] twice."""
        width = max(len(row["input_ids"]) for row in rows)
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, width - len(row["input_ids"]) :] = row["input_ids"]
            mask[number, width - len(row["input_ids"]) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = [each(ids, attention_mask=mask, position_ids=positions).logits for each in (model, reference)]
        return ids, mask.bool(), *out

    ids, mask, logits, _ = left(GOOD[:4])
    scored = mask[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits[:, :-1][scored], ids[:, 1:][scored])
    _, mask, ours, theirs = left(UTILITY[:4])
    p, q = theirs[mask].log_softmax(-1), ours[mask].log_softmax(-1)
    expected = 0.5 * nll + (p.exp() * (p - q)).sum(-1).mean()
    assert float(right) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.filterwarnings("ignore:no step lowered")
def test_without_weights_or_with_a_rate_of_zero_the_model_is_the_same_to_the_bit() -> None:
    stack = Stack(nano("llama"))
    for options in ({"beta": 0.0, "gamma": 0.0}, {"lr": 0.0}):
        assert repaired(stack, **options).weights == []


def test_with_one_layer_it_is_training_with_the_leash_restricted_to_that_layer(tmp_path: Path) -> None:
    stack = Stack(nano("llama", num_hidden_layers=1))
    chosen = [
        repaired(stack, work=Work(tmp_path / each), select=each, validation=0)
        for each in ("max", "min", "random", "fixed")
    ]
    tensors = [read_tensors(stack, plan.weights[0]) for plan in chosen]
    assert all(torch.equal(each[name], tensors[0][name]) for each in tensors for name in tensors[0])
    whole = read_tensors(stack, repaired(stack, select="all", validation=0, clip=1e9).weights[0])
    unclipped = read_tensors(stack, repaired(stack, validation=0, clip=1e9).weights[0])
    assert unclipped.keys() < whole.keys()  # which also moves the embedding, and so differs after the first step
    first = [
        read_tensors(stack, repaired(stack, select=s, validation=0, clip=1e9, steps=1, warmup=1).weights[0])
        for s in ("all", "max")
    ]
    assert all(torch.allclose(first[0][name], first[1][name], atol=1e-6) for name in first[1])


def test_a_strong_leash_keeps_the_model_where_it_was() -> None:
    """The rate is the longest step, so the KL that one step costs falls with its square, whatever pulls."""
    stack = Stack(nano("llama"))
    reached = {}
    for gamma in (0.0, 1.0, 1e4):
        view = lamella.apply(stack, repaired(stack, gamma=gamma, validation=0, steps=40, lr=1e-3))
        with torch.no_grad():
            reached[gamma] = float(utility_kl(view, collate(UTILITY), stack.model))
    assert reached[1e4] < reached[1.0] < reached[0.0]
    assert reached[1e4] < 0.2 * reached[0.0]


def test_it_learns_what_is_wanted_and_unlearns_what_is_not(tmp_path: Path) -> None:
    stack = Stack(nano("gpt2"))
    plan = repaired(stack, steps=40, lr=1e-3, work=Work(tmp_path))
    losses = [point["nll"] for point in plan.provenance["measured"]["held_out"]]
    assert losses[-1] < 0.6 * losses[0]
    view = lamella.apply(stack, plan)
    continuation = [each["input_ids"][int(each["prompt_lengths"])] for each in (GOOD[0], BAD[0])]
    prompt = GOOD[0]["input_ids"][: int(GOOD[0]["prompt_lengths"])]
    with torch.no_grad():
        before, after = (model(prompt[None]).logits[0, -1].log_softmax(-1) for model in (stack.model, view))
    wanted, unwanted = (after[token] - before[token] for token in continuation)
    assert wanted > 0.5 and wanted > unwanted


@pytest.mark.parametrize("name", BASELINES)
def test_the_baselines_train_everything(name: str) -> None:
    stack = Stack(nano("gpt2"))
    plan = repaired(stack, validation=0, **BASELINES[name])
    names = set(weights(stack.model))
    assert {"transformer.wte.weight", "transformer.ln_f.weight"} <= set(read_tensors(stack, plan.weights[0])) <= names
    assert plan.provenance["settings"]["objective"] == ("dpo" if name == "dpo" else "repair")


def test_the_plan_says_what_was_chosen_and_survives_its_json(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    plan = repaired(stack, work=Work(tmp_path), select="random")
    plan.write(tmp_path / "plan.json")
    again = lamella.Plan.read(tmp_path / "plan.json")
    ids = drawn(2, 9)
    with torch.no_grad():
        assert torch.equal(lamella.apply(stack, again)(ids).logits, lamella.apply(stack, plan)(ids).logits)
    measured = again.provenance["measured"]
    trace = Choices.read(tmp_path / "trace.json")
    assert sum(measured["chosen"].values()) == measured["steps"] == 8 == len(trace.chosen)
    log = TrainingLog.read(tmp_path / "training" / "log.json")
    assert (
        [point["step"] for point in measured["held_out"]] == [point.step for point in log.held_out] == [0, 2, 4, 6, 8]
    )
    assert json.loads((tmp_path / "plan.json").read_text())["weights"][0]["op"] == "replace"


def test_the_model_writes_its_own_utility_text_when_none_is_given() -> None:
    stack = Stack(nano("llama"))
    plans = [repair(stack, GOOD, BAD, **configured(BRIEF | {"seed": 3})) for _ in range(2)]
    assert plans[0].provenance["settings"]["samples"] == plans[1].provenance["settings"]["samples"]
    assert plans[0].provenance["settings"]["along"] == plans[1].provenance["settings"]["along"] != []
    free = repair(stack, GOOD, BAD, **configured(BRIEF | {"gamma": 0.0}))
    assert "along" not in free.provenance["settings"]


def test_half_precision_is_trained_in_float32_and_given_back_as_it_was() -> None:
    stack = Stack(nano("llama").to(torch.bfloat16))
    plan = repaired(stack, validation=0, lr=1e-3)
    tensors = read_tensors(stack, plan.weights[0])
    assert {each.dtype for each in tensors.values()} == {torch.bfloat16}
    assert {each.dtype for each in lamella.apply(stack, plan).parameters()} == {torch.bfloat16}


def test_what_was_run_is_gone_on_from_and_called_again_gives_the_same(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    plan = repaired(stack, work=Work(tmp_path))
    assert repaired(stack, work=Work(tmp_path)) == plan
    with pytest.raises(TrainingError, match="contains a run with"):
        repaired(stack, work=Work(tmp_path), beta=0.7)


def test_a_call_that_can_bring_nothing_is_warned_of() -> None:
    stack = Stack(nano("llama"))
    with pytest.warns(UserWarning, match="warm-up of 150 steps is longer than the 8 steps"):
        repaired(stack, warmup=150)
    with pytest.warns(UserWarning, match="no step lowered the loss on held-out pairs") as seen:
        repaired(stack, beta=0.0)  # at the start the KL is 0, which nothing lowers
    assert all("\n" not in str(each.message) for each in seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repaired(stack, validation=0)


def test_bad_input_is_refused_in_one_line(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    others, _ = paired()
    bare = blocks(drawn(20, 8), loss_on="all")
    long = pairs([(drawn(4), drawn(300)) for _ in range(20)], loss_on="all")
    cases: dict[str, Any] = {
        "20 good and 19 bad": lambda: repair(stack, GOOD, BAD[:-1]),
        "0 good and 0 bad": lambda: repair(stack, [], []),
        "pair 0: the prompt": lambda: repair(stack, others, BAD),
        "pair 0: the prompt is missing": lambda: repair(stack, bare, bare),
        "takes 256": lambda: repair(stack, long, long),
        "0 utility texts": lambda: repaired(stack, utility=[]),
        "batch 0": lambda: repaired(stack, batch=0),
        "steps 0": lambda: repaired(stack, steps=0),
        "rates": lambda: repaired(stack, lr=-1.0),
        "works on decoders": lambda: repaired(Stack(nano("vit"))),
        "non-finite": lambda: repaired(stack, lr=1e30, work=Work(tmp_path / "far")),
        "cannot be written": lambda: repaired(stack, work=Work(Path(__file__) / "x")),
    }  # fmt: skip
    for said, call in cases.items():
        with pytest.raises(LamellaError) as error:
            call()
        assert said in str(error.value) and "\n" not in str(error.value), said
