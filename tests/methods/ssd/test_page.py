"""The page of forgetting: complete and safe, whichever sites changed and whatever they are called."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from lamella.methods.ssd.page import page as render
from lamella.results import EditEvidence

VOID = {"meta", "input", "br", "link", "img", "hr"}
ATTACK = "</script><script>alert(1)</script>{{7*7}}"


class Page(HTMLParser):
    """Every tag closed in order; the scripts and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.words).append(data)


def site(name: str, selected: int) -> dict[str, Any]:
    return {"name": name, "weights": 1000, "selected": selected, "mass": 50.0, "removed": selected / 25,
            "share": selected / 1000, "removed_share": selected / 1250}  # fmt: skip


@pytest.fixture
def evidence() -> dict[str, Any]:
    def figures(loss: float) -> dict[str, Any]:
        known = {"accuracy": 0.5, "loss": loss}
        return {"forget": known, "retain": known, "test": None, "membership": None, "zrf": 0.4}

    findings = {
        "alpha": 3.2, "bound": 5.0, "total": site("all", 60),
        "sites": [site("embed", 10), site("layers.0.attn", 20), site("layers.1.mlp", 30), site("layers.2", 0)],
        "estimator": {"kind": "fisher", "loss": "cross-entropy", "batch": 1, "order": "any"},
        "samples": {"forget": 2, "reference": 10},
        "before": figures(1.0), "after": figures(4.0),
        "guard": {"measure": "perplexity", "before": 3.0, "after": 3.1, "most": 0.05, "lost": 0.033},
        "seconds": {"forget": 0.2, "reference": 1.5},
    }  # fmt: skip
    options = {"variant": "assd", "lam": 1.0, "reference_of": "full", "layers": [], "skip": []}
    gone = {"data": "gone.txt", "split": "whole", "tokens": 20, "sha256": "ab" * 32}
    return {
        "kind": "edit",
        "model": {"name": "a-model", "family": "llama", "layers": 3},
        "findings": findings,
        "provenance": {"method": "ssd", "version": "0", "options": options, "inputs": {"forget": gone}, "seed": 0},
        "environment": {"machine": "A processor", "threads": 2, "versions": {"torch": "2.13.0"}, "date": "2026-01-01"},
    }


def rendered(evidence: dict[str, Any]) -> str:
    return render(EditEvidence(**evidence))


def test_the_page_says_what_was_forgotten_and_draws_where(evidence: dict[str, Any]) -> None:
    html = rendered(evidence)
    page = Page(html)
    text = re.sub(r"\s+", " ", "".join(page.words))
    for part in (
        "forget 2 samples",
        "goes from 1.00 to 4.00 nats",
        "no ratio exceeds 5.00",
        "The guard held",
        "6.00 % of the weights",
    ):
        assert part in text
    assert "unseen text, nats" not in text  # a row without numbers is left out
    data = json.loads(page.scripts[0])
    bars = {name: plot["data"][0]["y"] for name, plot in data["plots"].items()}
    assert bars["selected"] == [2.0, 3.0, 0.0] and bars["removed"] == pytest.approx([1.6, 2.4, 0.0])
    assert set(data["scores"]) == {"share", "removed_share"}
    own = html.replace(max(page.scripts, key=len), "")
    assert not re.search(r"https?://|@import", own)


def test_sites_outside_the_layers_alone_are_enough(evidence: dict[str, Any]) -> None:
    evidence["findings"] |= {"sites": [site("head", 5)], "bound": None, "guard": None}
    evidence["notes"] = ["Nothing guarded it."]
    page = Page(rendered(evidence))
    assert json.loads(page.scripts[0])["scores"] == {} and "Nothing guarded it." in "".join(page.words)


def test_markup_in_names_stays_text(evidence: dict[str, Any]) -> None:
    plain = Page(rendered(evidence)).tags
    evidence["model"]["name"] = evidence["provenance"]["inputs"]["forget"]["data"] = ATTACK
    evidence["findings"]["retrained"] = evidence["findings"]["before"]
    page = Page(rendered(evidence))
    assert page.tags.count("script") == plain.count("script") and ATTACK in "".join(page.words)
