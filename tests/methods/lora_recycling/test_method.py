"""The method: what trains and what is kept, what is judged on what, its controls, and what plain peft loads."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import lamella
from lamella.data import Sample
from lamella.errors import LamellaError, MethodError
from lamella.files import Work
from lamella.methods.lora_recycling import (
    FITTING,
    AdapterPool,
    AnswerScores,
    MergeVerdict,
    Mixing,
    Target,
    TaskSplits,
    Trial,
    adaptive,
    lora_recycling,
    lorahub,
    mixture,
    pi_tuning,
    updates,
)
from lamella.methods.lora_recycling import merge as merge_command
from lamella.methods.lora_recycling.controls import derangement
from lamella.methods.lora_recycling.recipe import entropy_loss
from lamella.methods.lora_recycling.trial import TrialArm, mismatch_answers
from lamella.stack import Stack, share
from lamella.train import Adapter, add_lora, collate, mean_loss, merge, pairs, response_loss
from lamella.train.adapters import with_updates
from lamella.train.log import Logged
from lamella.zoo.nano import nano

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
BRIEF = replace(FITTING, steps=4, batch=4, eval_every=2, save_every=2)
SMALL = Target(target_r=2, target_steps=4)


def some(seed: int, size: float = 0.3, **options: Any) -> Adapter:
    found = add_lora(share(nano("llama")), **{"r": 3, "alpha": 6} | options, seed=seed).adapter()
    generator = torch.Generator().manual_seed(seed)
    pairs_ = {name: (a, size * torch.randn(b.shape, generator=generator)) for name, (a, b) in found.pairs.items()}
    return replace(found, pairs=pairs_)


def examples(count: int, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(3, 128, (count, 9), generator=generator)
    return pairs([(row[:6], row[6 : 7 + number % 3]) for number, row in enumerate(draws)])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(nano("llama"))


@pytest.fixture(scope="module")
def found(stack: Stack):
    pool = AdapterPool.of({"one": some(1), "two": some(2, targets=["up_proj"]), "three": some(3, r=5)})
    return lora_recycling(stack, pool, examples(24), examples(9, seed=1), k=2, target=SMALL, config=BRIEF)


# What trains


def test_coefficients_alone_train_and_the_best_point_by_held_out_loss_is_restored(stack: Stack, tmp_path: Path) -> None:
    samples, held_out = examples(16), examples(8, seed=1)
    before = [(a.clone(), b.clone()) for a, b in some(1).pairs.values()]
    config = replace(FITTING, steps=12, batch=4, eval_every=1, lr=0.5)  # so high that it gets worse again
    fitted, log = adaptive(stack, [some(1), some(2)], samples, held_out, Mixing(), config, out=tmp_path)
    losses = [point.loss for point in log.held_out]
    assert losses[-1] > min(losses) and len(losses) == 13
    model = merge(stack, fitted.adapter()).model
    judged = mean_loss(model, held_out)
    assert judged == pytest.approx(min(losses), abs=1e-4)
    first = fitted.model.get_submodule(fitted.modules[0])
    assert torch.equal(first.factor_a[:3], before[0][0]) and torch.equal(first.factor_b[:, :3], 2 * before[0][1])
    assert torch.equal(logits(stack.model), logits(nano("llama")))


def test_held_out_loss_that_never_falls_leaves_the_model_itself(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rising = iter(range(100))
    monkeypatch.setattr("lamella.train.watch.Watch._held_out_point", lambda self, step, _: Logged(step, next(rising)))
    config = replace(FITTING, steps=6, batch=8, eval_every=1)
    fitted, _ = adaptive(stack, [some(1)], examples(8), examples(2, seed=1), Mixing(), config, out=tmp_path)
    assert torch.equal(logits(fitted.model), logits(stack.model))


def test_from_w_0_the_first_step_is_adam_s_whatever_the_slope(stack: Stack, tmp_path: Path) -> None:
    config = replace(FITTING, steps=1, warmup=0.0, schedule="constant", batch=8, eval_every=1)
    samples = examples(8)
    fitted, _ = adaptive(stack, [some(1), some(2)], samples, (), Mixing(), config, out=tmp_path)
    steps = torch.cat([each.detach().abs() for each in fitted.tensors.values()])
    torch.testing.assert_close(steps, torch.full_like(steps, 5e-2), atol=2e-3, rtol=0)


def test_entropy_needs_no_answers(stack: Stack, tmp_path: Path) -> None:
    samples = examples(8)
    with torch.no_grad():
        said = [torch.log_softmax(stack.model(each["input_ids"][None, :6]).logits[0, -1], -1) for each in samples]
        wanted = float(torch.stack([-(each.exp() * each).sum() for each in said]).mean())
        assert float(entropy_loss(stack.model, collate(samples))) == pytest.approx(wanted, rel=1e-5)
    _, log = adaptive(stack, [some(1)], samples, samples, Mixing(objective="entropy"), BRIEF, out=tmp_path)
    assert min(point.loss for point in log.held_out) < log.held_out[0].loss


def test_pi_tuning_trains_adapters_and_softmax_weights_from_the_mean_of_the_neighbours(
    stack: Stack, tmp_path: Path
) -> None:
    neighbours, samples = [some(1), some(2)], examples(8)
    fitted, log = pi_tuning(stack, neighbours, samples, samples, BRIEF, out=tmp_path)
    assert all(
        float(each.sum()) == pytest.approx(1, abs=1e-5) and len(each) == 3 for each in fitted.coefficients().values()
    )
    first = fitted.model.get_submodule(fitted.modules[0])
    assert not torch.equal(first.factor_a[3:6], some(1).pairs[fitted.modules[0]][0])
    assert log.settings["lr"] == 1e-4


def test_lorahub_finds_the_weights_of_a_bowl_within_its_bounds_and_budget(stack: Stack) -> None:
    mixed = mixture(stack, [some(1), some(2), some(3)], Mixing("model", "identity", "zero"), 0)
    (weights,) = mixed.tensors.values()
    goal, asked = torch.tensor([1.0, -0.5, 9.0]), []

    def bowl(model: Any) -> float:
        asked.append(weights.detach().clone())
        return float(((weights.detach() - goal) ** 2).sum())

    memo: dict[str, float] = {}
    best = lorahub(mixed, bowl, memo, budget=100)
    assert len(asked) <= 100 and asked[0].tolist() == [0, 0, 0]
    assert all(each.abs().max() <= 1.5 for each in asked)
    assert best == pytest.approx([1.0, -0.5, 1.5], abs=0.25) and weights.tolist() == pytest.approx(best)
    count = len(asked)
    assert lorahub(mixed, bowl, memo, budget=100) == best and len(asked) == count  # all of it is known


# What is judged


def test_exact_match_from_one_pass_is_what_greedy_generation_writes(stack: Stack) -> None:
    generator = torch.Generator().manual_seed(3)
    samples = []
    for number in range(6):
        prompt = torch.randint(3, 128, (1, 4 + number), generator=generator)
        written = stack.model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
        answer = written[prompt.shape[1] :].clone()
        if number % 2:
            answer[number % 4] = (answer[number % 4] + 1) % 128
        samples += pairs([(prompt[0], answer)])
    found = AnswerScores.of(stack.model, samples, batch=4)
    assert found.exact == (1.0, 0.0) * 3 and found.accuracy == 0.5
    for each, nats in zip(samples, found.nats, strict=True):
        assert nats == pytest.approx(float(response_loss(stack.model, collate([each])).detach()), rel=1e-4)


def test_splits_share_no_example_but_among_few_and_the_test_is_kept_apart() -> None:
    def names(part: Any) -> set[bytes]:
        return {each["input_ids"].numpy().tobytes() for each in part}

    whole = TaskSplits.of(examples(100), examples(7, seed=1), 0)
    assert [len(each) for each in (whole.train, whole.held_out, whole.test)] == [80, 20, 7]
    assert not names(whole.train) & names(whole.held_out) and not whole.set_aside
    aside = TaskSplits.of(examples(100), None, 0)
    parts = [names(each) for each in (aside.train, aside.held_out, aside.test)]
    assert aside.set_aside and sum(map(len, parts)) == len(set.union(*parts)) == 100 and len(parts[2]) == 25
    few = TaskSplits.of(examples(10), examples(7, seed=1), 0)
    assert names(few.train) == names(few.held_out) == names(examples(10))
    with pytest.raises(MethodError, match="3 examples of the target task"):
        TaskSplits.of(examples(3), None, 0)


def arm(name: str, of_pool: bool, held_out: float, exact: list[float]) -> TrialArm:
    return TrialArm(
        name, of_pool, None, AnswerScores((0.0,), (held_out,)), AnswerScores(tuple(exact), tuple(1 - e for e in exact))
    )


def test_the_verdict_is_between_arms_that_held_out_examples_chose_and_needs_more_than_noise() -> None:
    good, bad, mixed = [1.0] * 30, [0.0] * 30, [1.0, 0.0] * 15
    arms = [arm("base", False, 3.0, good), arm("own", False, 1.0, bad), arm("pool", True, 2.0, good),
            arm("lucky", True, 9.0, bad)]  # fmt: skip
    verdict = MergeVerdict.of(arms)
    assert (verdict.ours.name, verdict.other.name, verdict.worth) == ("pool", "own", True)
    assert "was worthwhile" in verdict.sentence
    assert MergeVerdict.of([arm("own", False, 1.0, good), arm("pool", True, 2.0, bad)]).worth is False
    undecided = MergeVerdict.of([arm("own", False, 1.0, mixed), arm("pool", True, 2.0, mixed[::-1])])
    assert undecided.worth is None and "was not shown" in undecided.sentence


def test_shuffled_answers_leave_none_at_its_place() -> None:
    for count in (2, 3, 10):
        order = derangement(count, seed=1)
        assert sorted(order) == list(range(count)) and all(place != each for place, each in enumerate(order))
    samples = examples(9)
    mixed = mismatch_answers(samples, 0)
    for ours, theirs in zip(mixed, samples, strict=True):
        assert torch.equal(ours["input_ids"][:6], theirs["input_ids"][:6])
        assert ours["labels"].tolist() != theirs["labels"].tolist()


# The whole


def test_all_controls_stand_beside_the_merge(found: Any) -> None:
    names = [row["arm"] for row in found.findings["arms"]]
    assert names == [
        "base", "target LoRA", "target LoRA, regularised", "target LoRA, answers shuffled", "target, coefficients only",
        "best single member", "uniform average", "pool", "random weights", "target + pool", "target + random weights",
    ]  # fmt: skip
    assert {row["arm"] for row in found.findings["arms"] if row["of_pool"]} == {
        "best single member", "uniform average", "pool", "target + pool"
    }  # fmt: skip
    assert found.notes[0] == found.verdict.sentence and len(found.selected) == 2
    assert any("With random weights, the same adapters answer" in note for note in found.notes)


def test_random_weights_have_nothing_of_the_pool_but_its_shapes(found: Any) -> None:
    arms = {each.name: each for each in found.arms}
    ours, theirs = arms["target + pool"].adapter, arms["target + random weights"].adapter
    for name in ours.modules:
        (_, b), (_, drawn) = ours.pairs[name], theirs.pairs[name]
        own = arms["target LoRA"].adapter.pairs[name][1].shape[1]
        assert b.shape == drawn.shape
        assert torch.equal(b[:, :own], drawn[:, :own]) and not torch.isclose(b[:, own:], drawn[:, own:]).any(0).all()


def test_plain_peft_loads_and_merges_what_is_written(found: Any, stack: Stack, tmp_path: Path) -> None:
    for each in (each for each in found.arms if each.of_pool):
        folder = each.adapter.write(tmp_path / each.name)
        wanted = logits(merge(stack, each.adapter).model)
        read = peft.PeftModel.from_pretrained(nano("llama"), str(folder))
        torch.testing.assert_close(logits(read), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits(read.merge_and_unload()), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(found.stack.model), logits(merge(stack, found.adapter).model))


@pytest.mark.parametrize("select", ["random", "rank", "closeness", "quasi-fim", "l2"])
def test_members_are_selected_as_they_are_asked_for(select: str, stack: Stack) -> None:
    pool = AdapterPool.of({"one": some(1), "two": some(2, r=2), "large": some(3, r=7)})
    got = lora_recycling(stack, pool, examples(8), examples(2, seed=1), k=1, select=select,
                         target=replace(SMALL, target_steps=1), config=replace(BRIEF, steps=1))  # fmt: skip
    assert len(got.selected) == 1 and (select != "rank" or got.selected == ["large"])


def test_the_best_single_member_is_the_best_of_the_pool_even_if_it_is_not_selected(stack: Stack) -> None:
    data, pool = examples(40), {"large": some(1, r=8, size=3.0), "small": some(2, r=2, size=0.001)}
    got = lora_recycling(stack, AdapterPool.of(pool), data, examples(9, seed=1), k=1, select="rank",
                         target=replace(SMALL, target_steps=1), config=replace(BRIEF, steps=1))  # fmt: skip
    held_out = TaskSplits.of(data, (), BRIEF.seed).held_out
    losses = {name: AnswerScores.of(merge(stack, each).model, held_out).loss for name, each in pool.items()}
    best = min(losses, key=losses.__getitem__)
    assert (got.selected, best) == (["large"], "small")
    assert any("best single member by held-out loss is small," in note for note in got.notes)


@pytest.mark.parametrize("how", ["lorahub", "pi-tuning"])
def test_other_ways_to_find_coefficients_have_the_same_controls(how: str, stack: Stack, monkeypatch: Any) -> None:
    monkeypatch.setattr("lamella.methods.lora_recycling.trial.HUB_BUDGET", 10)
    pool = AdapterPool.of({"one": some(1), "two": some(2)})
    got = lora_recycling(stack, pool, examples(8), examples(2, seed=1), how=how, target=replace(SMALL, target_steps=1),
                         config=replace(BRIEF, steps=1))  # fmt: skip
    assert len(got.arms) == 11


def test_a_search_without_its_package_says_which(stack: Stack, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    mixed = mixture(stack, [some(1)], Mixing("model", "identity", "zero"), 0)
    with pytest.raises(LamellaError, match=r"pip install 'lamella\[recycle\]'"):
        lorahub(mixed, lambda model: 0.0, {})


def test_a_journal_is_of_one_task(stack: Stack, tmp_path: Path) -> None:
    pool = AdapterPool.of({"one": some(1)})
    quick = {"target": replace(SMALL, target_steps=1), "config": replace(BRIEF, steps=1)}
    lora_recycling(stack, pool, examples(8), examples(2, seed=1), work=Work(tmp_path), **quick)
    journal = (tmp_path / "judged.jsonl").read_text().splitlines()
    assert len(journal) == 1 + 1 + 11  # a header, the member, the arms
    assert {json.loads(line)[0] for line in journal[1:]} >= {"member one", "base", "target + pool"}


# The dense merge


@pytest.mark.parametrize("how", ["average", "arithmetic", "ties", "dare", "dare-ties", "magnitude", "tsv", "core"])
def test_a_dense_merge_adds_to_the_weights_what_it_says(how: str, stack: Stack) -> None:
    adapters = {"one": some(1), "two": some(2, targets=["up_proj"])}
    done = merge_command(stack, AdapterPool.of(adapters), how=how, weight=None if how == "average" else 0.5)
    wanted = with_updates(stack, updates(list(adapters.values()), 0.5, how=how))
    assert torch.equal(logits(done.stack.model), logits(wanted.model))
    assert not torch.equal(logits(done.stack.model), logits(stack.model)) and done.weight == 0.5
    changed = {
        name for name, each in done.stack.model.named_parameters() if each is not stack.model.get_parameter(name)
    }
    assert changed == {f"{name}.weight" for name in adapters["one"].modules}


def test_the_weight_of_a_dense_merge_is_chosen_by_the_examples(stack: Stack) -> None:
    own = examples(6)
    done = merge_command(stack, AdapterPool.of({"one": some(1)}), own, how="arithmetic")
    losses = {weight: AnswerScores.of(merge(stack, some(1), weight).model, own).loss for weight in done.losses}
    assert done.weight == min(losses, key=lambda each: losses[each]) and list(losses) == [n / 10 for n in range(1, 11)]
    assert done.losses == pytest.approx(losses, rel=1e-5)


def test_a_member_that_is_not_there_is_refused(stack: Stack) -> None:
    with pytest.raises(MethodError, match="'three' cannot be merged: the pool has no such adapter"):
        merge_command(stack, AdapterPool.of({"one": some(1)}), names=("one", "three"))


def test_the_command_line_reads_a_folder_of_peft_and_writes_one(tmp_path: Path) -> None:
    model = Path(__file__).parents[2] / "models" / "nano-llama"
    base = lamella.open(model)
    for seed in (1, 2):
        lora = add_lora(share(base.model), 2, 4, seed=seed)
        drawn = lora.adapter()
        filled = {name: (a, torch.full_like(b, 0.1 * seed)) for name, (a, b) in drawn.pairs.items()}
        replace(drawn, pairs=filled).write(tmp_path / "pool" / str(seed))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {n}.", "completion": str(n)}) + "\n" for n in range(8)))
    done = lamella.run(
        "lora-recycling", model, pool=tmp_path / "pool", data=data, out=tmp_path / "out", steps=1, target_steps=1,
        target_r=2,
    )  # fmt: skip
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "used as the test split" in " ".join(done.evidence.notes)
    read = peft.PeftModel.from_pretrained(lamella.open(model).model, str(tmp_path / "out"))
    torch.testing.assert_close(logits(read), logits(done.result.stack.model), atol=1e-5, rtol=1e-5)


def test_what_another_pool_or_selection_found_is_not_gone_on_from(stack: Stack, tmp_path: Path) -> None:
    def journal(pool: AdapterPool, **options: Any) -> list[str]:
        splits = TaskSplits.of(examples(8), examples(2, seed=1), 0)
        members = pool.members(stack)
        told = {"norms": dict(members.norms), **options}
        trial = Trial(stack, splits, "adaptive", Mixing(), SMALL, BRIEF, Work(tmp_path), told)
        known = sorted(trial._known)
        trial.member("one", lambda: members.load("one"))
        return known

    ours, theirs = AdapterPool.of({"one": some(1)}), AdapterPool.of({"one": some(2)})
    assert journal(ours, k=1) == [] and journal(ours, k=1) == ["member one"]
    assert journal(ours, k=2) == [] and journal(theirs, k=2) == []
