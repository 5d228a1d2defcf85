"""report.html: complete, self-contained, and safe whatever the evidence says."""

from __future__ import annotations

import copy
import html
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from lamella.commands.compress.card import model_card
from lamella.commands.compress.report import render
from lamella.commands.compress.tradeoff import reason

VOID = {"meta", "input", "br", "link", "img", "hr"}
LOADING = ("src", "href", "xlink:href", "action", "data", "poster", "srcset")


class Page(HTMLParser):
    """Reads a page strictly: every tag closed, in order; keeps its elements and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.elements if name in (attrs.get("class") or "").split()]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    def traces(self, name: str) -> dict[str, dict[str, Any]]:
        """The traces of a plot, by their names."""
        return {trace["name"]: trace for trace in self.data["plots"][name]["data"]}


def sublayers(page: Page) -> list[dict[str, str | None]]:
    return [attrs for attrs in page.of_class("sublayer") if "data-site" in attrs]


@pytest.mark.parametrize("variant", ["evidence", "all_methods", "phased", "null_errors"])
def test_every_variant_is_a_well_formed_page_that_loads_nothing(variant: str, request: pytest.FixtureRequest) -> None:
    evidence = request.getfixturevalue(variant)
    before = copy.deepcopy(evidence)
    document = render(evidence)
    page = Page(document)
    assert evidence == before
    for tag, attrs in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not [name for name in LOADING if name in attrs]
    own = document.replace(max(page.scripts, key=len), "")
    assert not re.search(r"https?://|@import|url\(\s*['\"]?(?!#)", own)
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'")
    assert sum("plotly.js" in script for script in page.scripts) == 1


def test_every_sublayer_of_all_30_layers_is_drawn_with_its_state_and_step(evidence: dict[str, Any]) -> None:
    drawn = sublayers(Page(render(evidence)))
    assert [each["data-site"] for each in drawn] == [f"layers.{i}.{h}" for i in range(30) for h in ("attn", "mlp")]
    cut = {each["data-site"] for each in drawn if "cut" in (each["class"] or "")}
    assert cut == set(evidence["chosen"]["drop"])
    first = next(each for each in drawn if each["data-site"] == "layers.29.mlp")
    assert "cut, removed in step 1" in (first["aria-label"] or "")
    kept = next(each for each in drawn if each["data-site"] == "layers.0.attn")
    assert "kept" in (kept["aria-label"] or "") and "removed in step" not in (kept["aria-label"] or "")


def test_the_drawing_can_be_coloured_by_three_scores(evidence: dict[str, Any]) -> None:
    page = Page(render(evidence))
    names = {"removed_alone", "sublayer_influence", "block_influence"}
    assert {attrs["value"] for tag, attrs in page.elements if attrs.get("name") == "score"} == names
    levels = [json.loads(each["data-levels"] or "") for each in sublayers(page)]
    for name in names:
        shown = [level[name] for level in levels]
        assert min(shown) == 0 and max(shown) == 1
    alone = evidence["scores"]["removed_alone"]
    shown = [level["removed_alone"] for level in levels]
    assert shown.index(1) == alone.index(max(alone)) and shown.index(0) == alone.index(min(alone))
    assert all(levels[2 * i]["block_influence"] == levels[2 * i + 1]["block_influence"] for i in range(30))


def test_the_verdict_and_the_big_numbers_say_what_was_measured(evidence: dict[str, Any]) -> None:
    text = Page(render(evidence)).text
    perplexity = evidence["chosen"]["fidelity"]["perplexity"]["mean"]
    assert "smollm2 now generates text with a speed-up of 1.32×, with 14 of 60 sublayers removed" in text  # noqa: RUF001
    assert f"perplexity goes from 18.2 to {perplexity:.1f}." in text
    for number in ("1.30 to 1.34", "134.5 M", "109.7 M", "−18.4 %", "31.2 ms", "571.0 MB", "468.0 MB", "538.1 MB"):  # noqa: RUF001
        assert number in text
    assert "was reached" in text
    for provenance in ("bf" * 32, "46" * 32, "A processor, 2 cores", "torch 2.13.0", "strategy greedy"):
        assert provenance in text


def test_the_guarantee_is_rounded_down_and_left_out_of_older_evidence(evidence: dict[str, Any]) -> None:
    sentence = "With 95 % confidence, the top token agrees on at least 41.2 % of positions"
    assert sentence in Page(render(evidence)).text and sentence in model_card(evidence)
    del evidence["agreement"]
    assert "anytime-valid" not in Page(render(evidence)).text and "anytime-valid" not in model_card(evidence)


def test_a_missed_target_is_said(evidence: dict[str, Any]) -> None:
    evidence["chosen"]["reached"] = False
    evidence["notes"] = ["The target of 1.3 was not reached."]
    page = Page(render(evidence))
    assert page.text.count("was not reached") == 2 and page.of_class("missed")


def test_the_curve_carries_every_point_and_the_choice(evidence: dict[str, Any]) -> None:
    page = Page(render(evidence))
    points = evidence["curves"][0]["points"]
    for measure in ("kl", "perplexity"):
        curve, ring = page.traces(f"{measure}-sublayers").values()
        means = [point["fidelity"][measure]["mean"] for point in points]
        assert (curve["name"], curve["x"], curve["y"]) == ("finercut", [0, 3, 6, 9, 12, 14], means)
        assert curve["error_y"]["array"] == pytest.approx([point["fidelity"][measure]["error"] for point in points])
        assert (ring["name"], ring["x"], ring["y"]) == ("chosen plan", [14], means[-1:])
    measured = page.traces("kl-measured")["finercut"]
    assert measured["x"] == [point["measured_speedup"]["median"] for point in points]
    ends = [point["measured_speedup"] for point in points]
    assert measured["error_x"]["array"] == pytest.approx([each["high"] - each["median"] for each in ends])
    assert measured["error_x"]["arrayminus"] == pytest.approx([each["median"] - each["low"] for each in ends])
    for axis, lines in (("measured", [1.3]), ("predicted", [1.3]), ("sublayers", [])):
        shapes = page.data["plots"][f"kl-{axis}"]["layout"].get("shapes", [])
        assert [each["x0"] for each in shapes] == lines  # the target


def test_the_cost_model_predicts_decoding_at_batch_1_alone(evidence: dict[str, Any]) -> None:
    page = Page(render(evidence))
    layout, traces = page.data["plots"]["speed"]["layout"], page.traces("speed")
    names = [layout["yaxis"]["ticktext"][int(row)] for row in traces["measured"]["y"]]
    assert names == ["decode, batch 1", "prefill, batch 1", "decode, batch 8", "prefill, batch 8"]
    timings = evidence["chosen"]["timings"]
    medians = [each[f"{phase}_speedup"]["median"] for each in timings for phase in ("decode", "prefill")]
    assert traces["measured"]["x"] == medians
    assert [layout["yaxis"]["ticktext"][int(row)] for row in traces["cost model"]["y"]] == ["decode, batch 1"]
    assert traces["cost model"]["x"] == [evidence["chosen"]["predicted_speedup"]]


def test_all_methods_stand_side_by_side_the_chosen_first(all_methods: dict[str, Any]) -> None:
    document = render(all_methods)
    page = Page(document)
    table = document[document.index('<table class="methods">') :]
    table = table[: table.index("</table>")]
    rows = re.findall(r'<th scope="row" title="[^"]*">([a-z-]+)', table)
    assert rows == ["finercut", "sleb", "shortgpt", "unified-skip", "window", "random"]
    traces = page.traces("kl-measured")
    assert set(traces) == {*rows, "chosen plan", "Pareto front"}
    dashed = {name for name, each in traces.items() if each.get("line", {}).get("dash") == "dot"}
    assert dashed == {"sleb", "shortgpt", "window", "random"}  # the baselines
    ring = traces["chosen plan"]
    assert (ring["x"], ring["y"]) == (traces["finercut"]["x"][-1:], traces["finercut"]["y"][-1:])
    assert all_methods["notes"][0] in page.text
    assert '<table class="methods">' not in render(all_methods | {"curves": all_methods["curves"][:1]})


def test_a_phased_plan_shows_sublayers_that_run_on_the_prompt_only(phased: dict[str, Any]) -> None:
    page = Page(render(phased))
    prompt = {each["data-site"] for each in sublayers(page) if "prompt" in (each["class"] or "")}
    assert prompt == {f"layers.{i}.{sublayer}" for i in (3, 8, 13, 18, 23, 27) for sublayer in ("attn", "mlp")}
    assert "12 of 60 sublayers skipped on generated tokens" in page.text
    assert "the prompt still runs through all of them" in page.text


def test_unmeasured_values_are_dashes_and_never_nan(null_errors: dict[str, Any]) -> None:
    null_errors["chosen"]["fidelity"]["jsd"]["error"] = float("nan")
    page = Page(render(null_errors))
    assert not re.search(r"\b(nan|none|null|inf)\b", page.text, re.IGNORECASE)
    assert not [script for script in page.scripts[:1] if "NaN" in script]
    axes = [attrs["value"] for tag, attrs in page.elements if attrs.get("name") == "axis"]
    assert axes == ["sublayers", "predicted"]
    assert "Peak memory" not in page.text
    assert {a["value"] for _, a in page.elements if a.get("name") == "score"} == {
        "sublayer_influence",
        "block_influence",
    }


ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{7*7}}"


def test_markup_in_names_samples_and_notes_stays_text(all_methods: dict[str, Any]) -> None:
    plain = [tag for tag, _ in Page(render(all_methods)).elements]
    all_methods["model"]["name"] = ATTACK
    all_methods["notes"] = [ATTACK]
    all_methods["options"]["distance"] = ATTACK
    all_methods["environment"]["machine"] = ATTACK
    all_methods["curves"][1] |= {"method": ATTACK, "label": ATTACK}
    all_methods["samples"][0] |= {"prompt": ATTACK, "base": ATTACK, "changed": f"other {ATTACK}"}
    page = Page(render(all_methods))
    assert sorted(tag for tag, _ in page.elements) == sorted(plain)
    assert page.text.count(ATTACK) >= 8
    assert html.unescape(page.data["plots"]["kl-measured"]["data"][2]["name"]) == ATTACK  # Plotly reads a little HTML


def test_all_routes_are_compared(evidence: dict[str, Any]) -> None:
    page = Page(render(evidence))
    traces = page.traces("routes")
    plain, quantised, front = (traces[name] for name in ("not quantised", "quantised", "Pareto front"))
    assert (front["x"], front["y"]) == ([1.0, 1.61, 2.02], [0.0, 0.004, 0.36])
    assert (plain["text"], quantised["text"]) == (["original", "cut"], ["original, int8", "cut, int8"])  # with a speed
    assert (plain["x"], quantised["x"]) == ([1.0, 1.317], [1.61, 2.02])
    assert (plain["y"], quantised["y"]) == ([0.0, 0.35], [0.004, 0.36])
    areas = [(size / plain["marker"]["size"][0]) ** 2 for size in quantised["marker"]["size"]]
    assert areas == pytest.approx([163 / 538, 134 / 538])
    for said in ("original, q8_0", "143.0 MB", "2.02\u00d7 (2.00 to 2.04)", "int8: how int8 ran. q8_0: how q8_0 ran."):
        assert said in page.text


INT8 = {"speedup": 1.61, "weights": 163_200_000, "kl": 0.004}
ALONE = "reaches 1.61\u00d7 with 163.2 MB of weights and costs 0.004 nats"


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({"alternatives": {}}, ""),
        (
            {"cut": False, "quantised": "int8", "alternatives": {"int8": INT8}},
            f"int8 alone is enough for a decode speed-up of 1.30\u00d7: it {ALONE}.",
        ),
        (
            {
                "cut": False,
                "quantised": "int8",
                "alternatives": {"int8": INT8, "cut": {"speedup": 1.3, "weights": 412e6, "kl": 0.86}},
            },
            f"int8 alone is enough for a decode speed-up of 1.30\u00d7: it {ALONE}; a cut alone would cost 0.86.",
        ),
        (
            {"cut": True, "alternatives": {"int8": INT8}},
            f"A cut is needed for a decode speed-up of 1.30\u00d7: int8 alone {ALONE}.",
        ),
    ],
)
def test_the_page_says_first_why_a_route_was_chosen(
    evidence: dict[str, Any], chosen: dict[str, Any], sentence: str
) -> None:
    evidence["chosen"] |= chosen
    assert reason(evidence) == sentence
    assert sentence in Page(render(evidence)).text


def test_samples_are_marked_from_where_they_part(evidence: dict[str, Any]) -> None:
    document = render(evidence)
    assert '<mark class="was">its museums, its river and the Eiffel Tower.</mark>' in document
    assert "<mark>the tower that Eiffel built there.</mark>" in document
    assert document.count("</mark>") == 2 and "same answer" in document
