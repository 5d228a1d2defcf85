"""PASER: damage is measured on responses alone, budgets add up, and what is refused really conflicts."""

from __future__ import annotations

import json
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lamella.errors import CalibrationError, MethodError
from lamella.methods.paser import (
    ConceptGraph,
    InstructionExample,
    Selection,
    budgets,
    concepts,
    degradation,
    embed,
    paser,
    read_pool,
    spectral_clusters,
    take,
)
from lamella.methods.paser.method import _Cluster
from lamella.plan import ModelReference, Plan
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.train import pairs
from lamella.zoo import open_stack, open_tokenizer
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parents[2] / "models" / "nano-llama"
LN2 = math.log(2)
DROP = ["layers.1.mlp", "layers.2"]


# J.


def ids(rows: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (rows, 2), generator=generator).tolist()
    return [(torch.randint(3, 128, (a,), generator=generator), torch.randint(3, 128, (b,), generator=generator))
            for a, b in lengths]  # fmt: skip


def models() -> tuple[Any, Any]:
    stack = Stack(nano("llama"))
    return stack.model, apply(stack, Plan(model=ModelReference.of(stack), drop=DROP))


@torch.no_grad()
def by_hand(p_model: Any, q_model: Any, prompt: torch.Tensor, response: torch.Tensor) -> tuple[float, float]:
    """J and the entropy of one sample alone, from their definitions in float64."""
    row = torch.cat([prompt, response])[None]
    p, q = (model(row).logits[0, len(prompt) - 1 : -1].double().softmax(-1) for model in (p_model, q_model))
    m = (p + q) / 2
    divergence = 0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1)
    return float(divergence.mean()), float(-(p * p.log()).sum(-1).mean())


def test_j_is_the_mean_divergence_over_response_tokens() -> None:
    original, changed = models()
    examples = ids(7)
    found = np.stack(degradation(original, changed, pairs(examples), batch=3), axis=1)
    expected = np.array([by_hand(original, changed, *each) for each in examples])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert ((found[:, 0] > 0.01) & (found[:, 0] <= LN2)).all()


def test_j_is_0_without_a_change_and_the_same_in_both_directions() -> None:
    original, changed = models()
    rows = pairs(ids(5))
    assert np.abs(degradation(original, original, rows)[0]).max() <= 1e-6
    there, back = degradation(original, changed, rows)[0], degradation(changed, original, rows)[0]
    np.testing.assert_allclose(there, back, atol=1e-6)


def test_neither_padding_nor_the_batch_matters() -> None:
    original, changed = models()
    rows = pairs(ids(6))
    alone = degradation(original, changed, rows, batch=1)[0]
    long = pairs([(torch.arange(3, 40), torch.arange(40, 80))])  # pads every other row
    together = degradation(original, changed, [*rows, *long], batch=7)[0][:-1]
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_prompts_are_scored_by_their_sum_as_in_the_published_code() -> None:
    original, changed = models()
    [(prompt, response)] = ids(1)
    whole = degradation(original, changed, pairs([(prompt, response)]), tokens="prompt")[0]
    expected = by_hand(original, changed, prompt[:1], prompt[1:])[0] * (len(prompt) - 1)
    assert whole[0] == pytest.approx(expected, abs=1e-5)


# Budgets.


@pytest.mark.parametrize(
    ("scores", "sizes", "total", "expected"),
    [
        ([0.3, 0.2, 0.1], [100, 100, 100], 60, [30, 20, 10]),
        ([1.0, 1.0, 1.0], [10, 10, 10], 10, [4, 3, 3]),  # one is left over by floors
        ([0.9, 0.05, 0.05], [10, 100, 100], 40, [10, 15, 15]),  # a full cluster's rest goes to the others
        ([0.0, 0.0], [30, 10], 20, [15, 5]),  # no damage: sizes decide
        ([0.5, 0.0], [5, 50], 20, [5, 15]),  # undamaged ones take what nobody else can
        ([0.5, 0.5], [3, 4], 20, [3, 4]),  # more than there is
        ([0.5], [3], 0, [0]),
    ],
)
def test_budgets_by_hand(scores: list[float], sizes: list[int], total: int, expected: list[int]) -> None:
    assert budgets(scores, sizes, total) == expected


def test_budgets_always_add_up_and_are_never_above_a_size() -> None:
    drawn = random.Random(0)
    for _ in range(500):
        count = drawn.randrange(1, 8)
        sizes = [drawn.randrange(0, 30) for _ in range(count)]
        scores = [drawn.choice([0.0, drawn.random()]) for _ in range(count)]
        total = drawn.randrange(0, 120)
        found = budgets(scores, sizes, total)
        assert sum(found) == min(total, sum(sizes))
        assert all(0 <= given <= size for given, size in zip(found, sizes, strict=True))


# Concepts.


def test_only_pairs_that_are_known_apart_conflict() -> None:
    graph = ConceptGraph()
    assert graph.conflicts(["a", "b"]) == []  # both unknown
    graph.add(["a", "b"])
    assert graph.conflicts(["a", "c"]) == []  # one unknown
    assert graph.conflicts(["a", "b"]) == []  # known together
    graph.add(["c", "d"])
    assert graph.conflicts(["a", "c"]) == [("a", "c")]  # known apart
    assert graph.conflicts(["a", "b", "c", "new"]) == [("a", "c"), ("b", "c")]
    graph.add(["a", "c"])
    assert graph.conflicts(["a", "c"]) == [] and graph.conflicts(["b", "c"]) == [("b", "c")]


def test_concepts_are_phrases_between_stop_words_without_what_is_everywhere() -> None:
    texts = ["The Red Foxes of the forest. Answer it.", "Why is a red fox in the garden? Answer it."]
    texts += [f"Item{k} costs money. Answer it." for k in range(18)]
    found = concepts(texts)
    assert set(found[0]) == {"red foxe", "forest"} and set(found[1]) == {"red fox", "garden"}
    assert all("answer" not in each for each in found)
    assert len(concepts(["; ".join(f"word{k}" for k in range(50)), "x", "y"])[0]) == 8


def cluster(label: int, members: list[int], degraded: float, budget: int) -> _Cluster:
    return _Cluster(label, members, degraded, budget)


def test_samples_come_by_damage_then_efficiency_and_conflicts_are_refused() -> None:
    known = [("a", "b"), ("c", "d"), ("a", "c"), ("e",), ("a", "b"), ("f",)]
    groups = [cluster(0, [3, 5], 0.1, 1), cluster(1, [0, 1, 2, 4], 0.5, 3)]
    chosen, refused, relaxed = take(groups, known, True)
    assert chosen == [0, 1, 4, 3]
    assert refused == {2: [("a", "c")]} and relaxed == set()
    chosen, refused, _ = take([cluster(1, [0, 1, 2, 4], 0.5, 3)], known, False)
    assert chosen == [0, 1, 2] and refused == {}


def test_a_cluster_that_cannot_fill_up_takes_single_conflicts_and_then_leaves_its_rest_to_others() -> None:
    known = [("a", "b"), ("c", "d"), ("a", "c"), ("a", "b", "d"), ("x",), ("y",), ("z",)]
    groups = [cluster(0, [0, 1, 2, 3], 0.9, 4), cluster(1, [4, 5], 0.2, 1), cluster(2, [6], 0.1, 0)]
    chosen, refused, relaxed = take(groups, known, True)
    assert chosen == [0, 1, 2, 4, 5]  # the fourth of the first cluster pairs a and b with d
    assert relaxed == {2} and set(refused) == {3}
    assert [each.budget for each in groups] == [4, 2, 0]


# The whole.


SKILLS = {
    "sum": ("what is the sum of {a} and {b}", "give me the sum {a} plus {b}", "find the sum: {a} with {b}"),
    "reverse": ("reverse the letters of {w}", "reverse the word {w}", "write {w} in reverse"),
    "colour": ("which colour has the {o}", "name the colour of the {o}", "the colour of a {o} is"),
    "translate": ("translate {w} to french", "what is {w} in french", "the french for {w}, please"),
}


def pool(each: int, seed: int = 0) -> list[InstructionExample]:
    drawn = random.Random(seed)
    examples = []
    for skill, templates in SKILLS.items():
        for k in range(each):
            slots = {"a": drawn.randrange(99), "b": drawn.randrange(99), "o": drawn.choice(["ball", "kite", "lamp"]),
                     "w": "".join(drawn.choices("abcdefgh", k=5))}  # fmt: skip
            text = drawn.choice(templates).format(**slots)
            examples.append(InstructionExample(f"{skill}-{k:03d}", text, f"it is {drawn.randrange(50)}"))
    return examples


@cache
def opened() -> tuple[Stack, Any, Plan]:
    stack = open_stack(NANO_LLAMA)
    return stack, open_tokenizer(NANO_LLAMA), Plan(model=ModelReference.of(stack), drop=DROP)


def selected(examples: list[InstructionExample], **options: Any) -> Selection:
    stack, tokenizer, plan = opened()
    return paser(
        stack, examples, **{"plan": plan, "tokenizer": tokenizer, "embedder": "tfidf", "graph": "knn"} | options
    )


def test_skills_are_distinguished() -> None:
    examples = pool(40)
    stack, tokenizer, _ = opened()
    points = embed("tfidf", stack, tokenizer, [each.instruction for each in examples])
    labels = spectral_clusters(points, 10, graph="knn").labels  # one for each way of asking, or nearly
    pure = sum(np.bincount(np.repeat(range(4), 40)[labels == k]).max() for k in range(labels.max() + 1))
    assert pure / len(examples) >= 0.9


def test_the_original_s_own_states_embed_texts_by_their_mean() -> None:
    stack, tokenizer, _ = opened()
    texts = ["reverse the word", "a"]
    points = embed("hidden-mean", stack, tokenizer, texts)
    for point, text in zip(points, texts, strict=True):
        states = stack.model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states[-1]
        np.testing.assert_allclose(point, states[0].mean(0).detach(), atol=1e-5)
    assert (embed(lambda given: [[len(each)] for each in given], stack, tokenizer, texts) == [[16], [1]]).all()


def test_the_report_accounts_for_everything() -> None:
    examples = pool(15)
    chosen = selected(examples, budget=0.3)
    report = json.loads(json.dumps(chosen.findings))
    assert report["budget"] == 18 and report["selected"] == [each.id for each in chosen.examples]
    assert len(chosen.examples) <= 18 and len(set(report["selected"])) == len(chosen.examples)
    clusters = report["clusters"]
    assert sum(each["size"] for each in clusters) == 60 and sum(each["share"] for each in clusters) == 18
    assert sum(each["selected"] for each in clusters) == len(chosen.examples)
    assert all(each["selected"] <= each["budget"] <= each["size"] and each["entropy"] > 0 for each in clusters)
    for each in clusters:
        members = [sample for sample in report["samples"] if sample["cluster"] == each["cluster"]]
        assert each["cds"] == pytest.approx(np.mean([sample["j"] for sample in members]))
    for sample in report["samples"]:
        one = next(each for each in examples if each.id == sample["id"])
        [row] = pairs([(one.prompt, one.response)], opened()[1])
        assert sample["ies"] == pytest.approx(sample["j"] / (2 * math.log(len(row["input_ids"]))))
    assert not set(report["selected"]) & {each["id"] for each in report["refused"]}
    assert len(chosen.samples(opened()[1])) == len(chosen.examples)


def test_the_order_of_the_pool_does_not_matter() -> None:
    examples = pool(12)
    shuffled = random.Random(1).sample(examples, len(examples))
    assert selected(examples).findings == selected(shuffled).findings


def test_without_concepts_the_best_of_each_cluster_are_taken() -> None:
    chosen = selected(pool(12), ntem=False)
    report = chosen.findings
    assert len(chosen.examples) == report["budget"] and report["refused"] == []
    taken = set(report["selected"])
    for each in report["clusters"]:
        members = [sample for sample in report["samples"] if sample["cluster"] == each["cluster"]]
        best = sorted(members, key=lambda sample: -sample["ies"])[: each["selected"]]
        assert {sample["id"] for sample in best} <= taken


def test_without_damage_sizes_decide() -> None:
    stack, _, _ = opened()
    report = selected(pool(12), plan=Plan(model=ModelReference.of(stack)), clusters=4, ntem=False).findings
    shares = [each["share"] / each["size"] for each in report["clusters"]]
    assert max(shares) - min(shares) < 0.1 and sum(each["share"] for each in report["clusters"]) == 10


def test_prompts_that_are_too_long_are_left_out_and_named() -> None:
    examples = [*pool(12), InstructionExample("zz", "long " * 200, "no")]
    report = selected(examples, max_length=60).findings
    assert report["too_long"] == ["zz"] and report["pool"] == 48


def test_rows_as_alpaca_has_them_become_examples() -> None:
    rows = [{"instruction": "Do", "input": "this", "output": "done"}, {"instruction": "Go", "output": "gone"}]
    assert [(each.prompt, each.response) for each in read_pool(rows)] == [("Do\nthis\n", "done"), ("Go\n", "gone")]
    with pytest.raises(CalibrationError, match="row 0 of the pool"):
        read_pool([{"instruction": "Do"}])


def test_what_cannot_be_is_refused_in_one_line() -> None:
    _, tokenizer, plan = opened()
    cases = [
        ({"plan": None}, MethodError, "give plan and tokenizer"),
        ({"budget": 1e-9}, CalibrationError, "a fraction that selects some"),
        ({"embedder": "nonsense"}, MethodError, "choose hidden-mean, tfidf, minilm"),
    ]
    for change, kind, message in cases:
        with pytest.raises(kind, match=message) as error:
            selected(pool(4), **change)
        assert "\n" not in str(error.value)
    with pytest.raises(CalibrationError, match="with unique ids"):
        selected([*pool(4), *pool(4)])
    with pytest.raises(MethodError, match="works on decoders"):
        paser(Stack(nano("vit")), pool(4), plan=plan, tokenizer=tokenizer)
