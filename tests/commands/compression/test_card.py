"""The model card: valid front matter, and what a reader needs to load and to judge the model."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from lamella.commands.compress.card import model_card


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_front_matter_is_yaml_that_the_hub_reads(evidence: dict[str, Any]) -> None:
    matter = front_matter(model_card(evidence))
    assert matter["library_name"] == "transformers"
    assert matter["base_model"] == "smollm2"
    assert {"lamella", "finercut"} <= set(matter["tags"])


@pytest.mark.parametrize("name", ['a: "b" #c', "x\n---\ntags: [evil]", "*ref", "model | name `code`"])
def test_no_name_breaks_the_front_matter_or_the_page(evidence: dict[str, Any], name: str) -> None:
    evidence["model"]["name"] = name
    card = model_card(evidence)
    assert front_matter(card)["base_model"] == name
    assert card.count("\n---\n") == 1


def loading_code(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize(("form", "trusted"), [("plain", False), ("portable", False), ("native", True)])
def test_each_form_is_loaded_in_its_way(evidence: dict[str, Any], form: str, trusted: bool) -> None:
    evidence["chosen"]["form"] = form
    code = loading_code(model_card(evidence))
    compile(code, "card", "exec")
    assert "AutoModelForCausalLM.from_pretrained" in code
    assert ("trust_remote_code=True" in code) == trusted


def test_phased_plans_load_through_lamella(phased: dict[str, Any]) -> None:
    card = model_card(phased)
    assert "lamella.load" in loading_code(card)
    assert "layers.3, layers.8" in card and "12 of 60 sublayers are skipped on generated tokens" in card


def test_the_table_holds_the_measurements(evidence: dict[str, Any]) -> None:
    card = model_card(evidence)
    rows = [line for line in card.partition("## Routes")[0].splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {4}
    table = "\n".join(rows)
    for text in ("| decode, batch 1 | 31.2 ms | 23.7 ms: 1.32× (1.30 to 1.34) |", "| parameters | 134.5 M | 109.7 M |"):  # noqa: RUF001
        assert text in table
    for text in ("bf" * 32, "seed 0", "torch 2.13.0", "strategy=greedy", "## Limits"):
        assert text in card


def test_a_missed_target_and_unknown_errors_are_said(null_errors: dict[str, Any]) -> None:
    null_errors["chosen"]["reached"] = False
    card = model_card(null_errors)
    assert "**not reached**" in card
    assert "nan" not in card and "None" not in card and "peak memory" not in card


def test_narrower_layers_are_said_instead_of_sublayers_that_are_all_kept(evidence: dict[str, Any]) -> None:
    evidence["chosen"]["narrower"] = "stream 448 of 576, MLP channels 1152 to 1216 of 1536"
    evidence["layers"] = [{"attn": "kept", "mlp": "kept"} for _ in evidence["layers"]]
    card = model_card(evidence)
    assert "with narrower layers (stream 448 of 576, MLP channels 1152 to 1216 of 1536);" in card
    assert "Layers are narrower than in the original: stream 448 of 576" in card
    assert "0 of 60" not in card and "width-pruning" in front_matter(card)["tags"]
    evidence["layers"][3] = {"attn": "cut", "mlp": "cut"}
    card = model_card(evidence)
    assert "1536) and 2 of 60 sublayers removed;" in card and "are removed: layers.3." in card


def test_quantisation_has_a_table_of_its_own(evidence: dict[str, Any]) -> None:
    card = model_card(evidence)
    assert "| cut, int8 | 134.0 MB | 2.02\u00d7 (2.00 to 2.04) | 0.360 ± 0.018 |" in card
    assert "| original, q8_0 | 143.0 MB | \u2013 |" in card  # not run, so no speed


def test_healing_is_a_column_of_its_own(evidence: dict[str, Any]) -> None:
    after = {name: dict(value) for name, value in evidence["chosen"]["fidelity"].items() if isinstance(value, dict)}
    after["perplexity"]["mean"] = 21.0
    training = {"training": {"data": "pydoc"}}
    evidence["healing"] = {"method": "minitron", "data": training, "fidelity": after, "curve": []}
    lines = model_card(evidence).partition("## Routes")[0].splitlines()
    assert "|  | original | cut | healed: this model |" in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert next(line for line in lines if line.startswith("| perplexity")).split("|")[4].startswith(" 21.0")
