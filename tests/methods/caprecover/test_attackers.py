"""Attackers: what they learn, what they leave alone, and what they can not know."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy

from lamella.data import Captioned
from lamella.errors import CalibrationError
from lamella.files import Work
from lamella.methods.caprecover import (
    ATTACKERS,
    AuditData,
    Captioner,
    CaptionLoss,
    LinkDefence,
    accuracy,
    nearest,
    recommend_cut,
    recover_captions,
    run_attacks,
    small_writer,
    train_attacker,
    train_captioner,
)
from lamella.methods.caprecover.captioner import BEAMS, LENGTH_PENALTY, tokenise_captions
from lamella.methods.caprecover.captions import captions
from lamella.methods.caprecover.method import TRAINING
from lamella.methods.caprecover.page import summary
from lamella.methods.caprecover.tokens import RidgeRegression, hidden_states
from lamella.stack import Stack
from lamella.train import TrainConfig
from lamella.zoo import nano

from .test_victim import images, state, victim

CONFIG = TrainConfig(steps=60, lr=5e-3, schedule="cosine", batch=32, warmup=0.1)
SHAPES = [torch.Size((6, 4, 4)), torch.Size((9, 12)), torch.Size((12,))]


def sets(noise: float = 0.5, count: int = 240, classes: int = 3) -> AuditData:
    """Features of three linearly separable classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    means = torch.randn(classes, 6, 4, 4, generator=generator) + torch.randn(classes, 6, 1, 1, generator=generator)
    features = means[labels] + noise * torch.randn(count, 6, 4, 4, generator=generator)
    half = count // 2
    scale = float(features.std())
    return AuditData({"cut": features[:half]}, labels[:half], {"cut": features[half:]}, labels[half:], {"cut": scale})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attacker", ATTACKERS)
def test_attackers_take_maps_tokens_and_vectors(attacker: str, shape: torch.Size) -> None:
    assert ATTACKERS[attacker](shape, 5)(torch.randn(3, *shape)).shape == (3, 5)


@pytest.mark.parametrize("attacker", ATTACKERS)
def test_an_attacker_learns_the_classes_and_from_other_images_only_the_prior(attacker: str, tmp_path: Path) -> None:
    values, config = sets(), replace(CONFIG, lr=5e-2 if attacker == "gap" else 5e-3)  # it has 21 weights
    read = train_attacker(values, "cut", attacker, LinkDefence(), config, tmp_path / "real").model
    assert accuracy(read, values, "cut", LinkDefence()) > 0.9
    prior = train_attacker(values.shuffled(1), "cut", attacker, LinkDefence(), config, tmp_path / "shuffled").model
    assert accuracy(prior, values, "cut", LinkDefence()) < 0.6  # a random guess is right for a third
    assert values.majority == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.slow
def test_a_fixed_mask_hides_nothing_and_fresh_noise_does(tmp_path: Path) -> None:
    values = sets()
    scores = {}
    for guard in ("none", "fixed:10", "gaussian:10"):
        attacker = train_attacker(
            values, "cut", "linear", LinkDefence.parse(guard), CONFIG, tmp_path / guard.replace(":", "-")
        ).model
        scores[guard] = accuracy(attacker, values, "cut", LinkDefence.parse(guard))
    assert scores["fixed:10"] > 0.9 and scores["none"] > 0.9
    assert scores["gaussian:10"] < 0.75
    clean = train_attacker(values, "cut", "linear", LinkDefence(), CONFIG, tmp_path / "clean").model
    assert accuracy(clean, values, "cut", LinkDefence("fixed", 10.0)) < 0.75  # to one who does not know of it


def test_text_draws_the_first_map_of_a_linear_reader(tmp_path: Path) -> None:
    values, texts = sets(), torch.nn.functional.normalize(torch.randn(3, 20), dim=1)
    read = train_attacker(values, "cut", "linear", LinkDefence(), CONFIG, tmp_path / "run", texts).model
    v = read.first(read.standardise(values.test["cut"]).flatten(1))
    near = torch.nn.functional.normalize(v, dim=1) @ texts.T
    assert float((near.argmax(1) == values.test_labels).double().mean()) > 0.9
    assert accuracy(read, values, "cut", LinkDefence()) > 0.9


@pytest.mark.slow
def test_an_audit_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    values = sets()
    how = {
        "cuts": ["cut"], "attackers": ["gap", "linear"], "guards": [LinkDefence(), LinkDefence("gaussian", 3.0)],
        "seeds": [0, 1], "config": replace(CONFIG, steps=5), "depends": "these",
    }  # fmt: skip
    whole = run_attacks(values, work=Work(tmp_path / "one"), **how)
    (tmp_path / "two").mkdir()
    lines = (tmp_path / "one" / "attackers.jsonl").read_text().splitlines()
    assert len(lines) == 5
    (tmp_path / "two" / "attackers.jsonl").write_text("\n".join(lines[:3]) + "\n")
    assert run_attacks(values, work=Work(tmp_path / "two"), **how) == whole
    assert len(whole) == 4 and {len(row["adaptive"]["values"]) for row in whole} == {2}


def test_attackers_are_trained_until_they_improve_no_more(tmp_path: Path) -> None:
    """By default the weakest attacker reaches the optimum of its loss, at whatever scale its features are."""
    values = sets(noise=8.0, count=600)
    small = replace(values, train={"cut": 1e-2 * values.train["cut"]}, test={"cut": 1e-2 * values.test["cut"]})
    x, y = (each["cut"].mean((2, 3)).numpy() for each in (values.train, values.test))
    best = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000)).fit(x, values.train_labels.numpy())
    optimum = best.score(y, values.test_labels.numpy())
    assert 0.5 < optimum < 0.99  # there is something to miss
    found = train_attacker(small, "cut", "gap", LinkDefence(), TRAINING, tmp_path / "run")
    assert accuracy(found.model, small, "cut", LinkDefence()) >= optimum - 0.03
    assert found.strength.converged
    short = train_attacker(small, "cut", "gap", LinkDefence(), replace(TRAINING, steps=5), tmp_path / "short")
    assert not short.strength.converged and short.strength.steps == 10  # five at each rate


def test_a_verdict_names_the_attack_that_it_is_about() -> None:
    figure = {"mean": 0.2, "low": 0.2, "high": 0.2, "values": [0.2]}
    attack = {"cut": "late", "attacker": "gap", "guard": "none", "adaptive": figure, "static": figure, "steps": 700}
    link = {"cut": "late", "guard": "none", "bytes": 9, "ratio": None, "output_change": 0.0, "task": 0.9}
    found: dict[str, Any] = {
        "attacks": [attack | {"converged": True}], "links": [link], "nearest": {"late": 0.5}, "majority": 0.1,
        "images": {"attacker": 575, "judge": 90}, "task": 0.9, "recommended": link | {"leak": 0.2}, "max_leak": 0.3,
    }  # fmt: skip
    told = summary(SimpleNamespace(findings=found)).verdict  # type: ignore[arg-type]
    assert "attackers (gap) with 575 images, trained until they stopped improving, name no more than 30 %" in told
    found |= {"attacks": [attack | {"converged": False}], "recommended": None}
    told = summary(SimpleNamespace(findings=found)).verdict  # type: ignore[arg-type]
    assert told.startswith("No cut is recommended. Some attackers were still improving")


def test_the_cut_that_is_recommended_holds_what_was_asked() -> None:
    def attack(cut: str, guard: str, leak: float) -> dict[str, object]:
        figure = {"mean": leak, "low": leak, "high": leak + 0.02}
        both = {"adaptive": figure, "static": {**figure, "high": leak - 0.1}}
        return {"cut": cut, "guard": guard, **both, "converged": True}

    attacks = [attack("a", "none", 0.9), attack("a", "g", 0.29), attack("b", "none", 0.5), attack("b", "g", 0.1)]
    links = [
        {"cut": cut, "guard": guard, "bytes": size, "task": 0.98}
        for cut, size in (("a", 100), ("b", 50))
        for guard in ("none", "g")
    ]
    best = recommend_cut(attacks, links, max_leak=0.3, max_bytes=None)
    assert best is not None and (best["cut"], best["guard"]) == ("b", "g")  # a's interval goes above
    assert recommend_cut(attacks, links, max_leak=0.32, max_bytes=None)["cut"] == "a"  # type: ignore[index]
    assert recommend_cut(attacks, links, max_leak=0.05, max_bytes=None) is None
    assert recommend_cut(attacks, links, max_leak=0.32, max_bytes=60)["cut"] == "b"  # type: ignore[index]
    early = [{**row, "converged": row["cut"] != "a"} for row in attacks]  # attackers at a were still improving
    assert recommend_cut(early, links, max_leak=0.32, max_bytes=None)["cut"] == "b"  # type: ignore[index]
    worse = [{**row, "task": 0.9} if row["guard"] == "g" else row for row in links]
    assert recommend_cut(attacks, worse, max_leak=0.3, max_bytes=None) is None


def test_the_most_similar_picture_is_found() -> None:
    train, test = torch.randn(50, 3, 4), torch.randn(20, 3, 4)
    a, b = (each.flatten(1).double().numpy() for each in (train, test))
    cosines = b @ a.T / np.linalg.norm(b, axis=1)[:, None] / np.linalg.norm(a, axis=1)
    assert nearest(train, test).tolist() == cosines.argmax(1).tolist()


def test_pictures_without_classes_are_refused() -> None:
    plain = [Captioned(each.image) for each in images().items]
    with pytest.raises(CalibrationError, match="have no classes"):
        AuditData.of(victim("digits"), plain, plain, ["pooled"])
    with pytest.raises(
        CalibrationError, match="6 images for the attacker and 6 for the evaluation are too few: give more"
    ):
        AuditData.of(victim("digits"), images().items, images().items, ["pooled"])


# Captions

TEXTS = ["a red circle", "a blue square and a red circle", "a green cross"] * 8


def attacker(shape: torch.Size = SHAPES[0]) -> Captioner:
    speaker, tokenizer = small_writer(TEXTS, 2, 0, Work().directory("writer"))
    return Captioner(shape, speaker, tokenizer, seed=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_that_of_words_and_of_no_padding(shape: torch.Size) -> None:
    model = attacker(shape).eval()
    features = torch.randn(3, *shape)
    rows = tokenise_captions(model.tokenizer, TEXTS[:3])
    ids, mask = (torch.stack([row[name] for row in rows]) for name in ("ids", "mask"))
    found = float(model(features, ids, mask).detach())
    nats, words = 0.0, 0
    with torch.no_grad():
        prefix = model.prefix(features)
        for row, (caption, here) in enumerate(zip(ids, mask, strict=True)):
            text = caption[: int(here.sum())]
            results = torch.cat([prefix[row], model.writer.get_input_embeddings()(text)])[None]
            logits = model.writer(inputs_embeds=results).logits[0, prefix.shape[1] - 1 : -1]
            nats += float(cross_entropy(logits, text, reduction="sum"))
            words += len(text)
    assert found == pytest.approx(nats / words, rel=1e-4)
    likely = model.logits(features, ids, mask)
    for row, here in enumerate(mask.bool()):
        nats_of_row = cross_entropy(likely[row][here], ids[row][here], reduction="sum")
        nats -= float(nats_of_row.detach())
    assert nats == pytest.approx(0, abs=1e-3)
    more = [torch.nn.functional.pad(each, (0, 5), value=value) for each, value in ((ids, 1), (mask, 0))]
    assert float(model(features, *more).detach()) == pytest.approx(found, rel=1e-5)


def test_writer_queries_and_victim_stay_as_they_are(tmp_path: Path) -> None:
    split = victim("digits")
    before = state(split.model)
    x = split.prepare([*images().items] * 4)
    features = split.features(x, ["stage2"])["stage2"]
    model = attacker(features.shape[1:])
    writer, queries = state(model.writer), model.queries.clone()
    learnt = state(model.former)
    loss = CaptionLoss(LinkDefence("gaussian", 1.0), "stage2", float(features.std()))
    train_captioner(model, features, TEXTS, loss, TrainConfig(steps=3, lr=1e-3, batch=4), tmp_path / "run")
    assert all(torch.equal(each, writer[name]) for name, each in model.writer.state_dict().items())
    assert torch.equal(model.queries, queries) and not model.queries.requires_grad
    assert all(torch.equal(each, before[name]) for name, each in split.model.state_dict().items())
    assert any(not torch.equal(each, learnt[name]) for name, each in model.former.state_dict().items())
    written = recover_captions(model, features[:3], loss, beams=2)
    assert len(written) == 3 and all(isinstance(each, str) for each in written)


def test_captions_are_searched_for_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = attacker(torch.Size((12,))).eval(), list[dict[str, Any]]()
    generate = model.writer.generate

    def recorded(**options: Any) -> Tensor:
        calls.append(options)
        found: Tensor = generate(**options)
        return found

    monkeypatch.setattr(model.writer, "generate", recorded)
    recover_captions(model, torch.randn(2, 12), CaptionLoss(LinkDefence(), "cut", 1.0))
    assert (calls[0]["num_beams"], calls[0]["length_penalty"]) == (10, 2.0)
    given = {each.name: each.default for each in signature(captions).parameters.values()}
    assert (given["beams"], given["length_penalty"]) == (BEAMS, LENGTH_PENALTY) == (10, 2.0)


@pytest.mark.slow
def test_captions_of_features_that_tell_them_are_recovered(tmp_path: Path) -> None:
    kinds = torch.tensor([n % 3 for n in range(24)])
    features = torch.randn(3, 12)[kinds] + 0.05 * torch.randn(24, 12)
    speaker, tokenizer = small_writer(TEXTS, 60, 0, tmp_path / "writer")
    model = Captioner(features.shape[1:], speaker, tokenizer)
    loss = CaptionLoss(LinkDefence(), "pooled", float(features.std()))
    train_captioner(model, features, TEXTS, loss, TrainConfig(steps=400, lr=3e-3, batch=12), tmp_path / "run")
    right = [ours == theirs for ours, theirs in zip(recover_captions(model, features, loss), TEXTS, strict=True)]
    assert sum(right) >= 22


# Tokens


def test_the_linear_reader_of_tokens_is_a_ridge_regression() -> None:
    x, y = torch.randn(60, 5), torch.randn(60, 3)
    found = RidgeRegression.of(x, y)
    a, b = (each.double().numpy() - each.double().numpy().mean(0) for each in (x, y))
    gram = a.T @ a
    expected = np.linalg.solve(gram + 1e-3 * np.trace(gram) / 5 * np.eye(5), a.T @ b)
    np.testing.assert_allclose(found.weight.numpy(), expected, rtol=1e-8)
    means = [each.double().numpy().mean(0) for each in (x, y)]
    np.testing.assert_allclose(found.bias.numpy(), means[1] - means[0] @ expected, rtol=1e-6, atol=1e-9)


def test_streams_behind_layers_are_what_the_model_has_there() -> None:
    stack = Stack(nano("llama"))
    ids = torch.randint(3, 100, (2, 8))
    found = hidden_states(stack, ids, [0, 2])
    with torch.no_grad():
        states: tuple[Tensor, ...] = stack.model(ids, output_hidden_states=True).hidden_states
    for layer in (0, 2):
        torch.testing.assert_close(found.h[layer], states[layer + 1].flatten(0, 1))
    assert found.ids.tolist() == ids.flatten().tolist()


def test_tokens_are_read_near_the_embedding_and_hidden_by_noise() -> None:
    torch.manual_seed(0)
    stack = Stack(nano("llama"))
    train, test = (hidden_states(stack, torch.randint(3, 100, (40, 16)), [0]) for _ in range(2))
    embedding = stack.vocabulary[0].weight.detach()
    read = RidgeRegression.of(train.h[0], embedding[train.ids])
    assert float((read.tokens(test.h[0], embedding) == test.ids).double().mean()) > 0.15  # of 97
    guard, scale = LinkDefence("gaussian", 30.0), float(train.h[0].std())
    knows = RidgeRegression.of(guard.send("layers.0", train.h[0], scale, 0), embedding[train.ids])
    test_text = guard.send("layers.0", test.h[0], scale, 1)
    assert float((knows.tokens(test_text, embedding) == test.ids).double().mean()) < 0.05
