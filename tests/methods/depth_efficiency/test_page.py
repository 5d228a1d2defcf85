"""The depth report, end to end on the trained nano model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lamella.data import load_text, windows
from lamella.errors import CalibrationError
from lamella.methods.depth_efficiency import depth_efficiency
from lamella.methods.depth_efficiency.page import page
from lamella.plan import ModelReference, Plan
from lamella.results import Evidence, Study
from lamella.runner import run
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.zoo import nano, open_stack, open_tokenizer
from lamella.zoo.vlm import shapes_vlm

NANO = Path(__file__).parents[2] / "models" / "nano-llama"
LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("depth")


@pytest.fixture(scope="module")
def evidence(folder: Path) -> Evidence:
    return run("depth-efficiency", NANO, sequences=2, compare=NANO, out=folder / "depth").evidence


@pytest.fixture(scope="module")
def report(evidence: Evidence) -> dict[str, Any]:
    return evidence.findings


def test_every_score_has_its_shape(evidence: Evidence, report: dict[str, Any]) -> None:
    shapes = {name: (score["dims"], len(score["values"])) for name, score in report["scores"].items()}
    assert shapes == {
        "block_influence": (["layer"], LAYERS),
        "sublayer_influence": (["sublayer"], 2 * LAYERS),
        "residual_norm": (["point"], LAYERS + 1),
        "angular_distance": (["start", "length"], LAYERS + 1),
        "sublayer_removed": (["sublayer"], 2 * LAYERS),
        "layer_removed": (["layer"], LAYERS),
    }
    metadata = {"name": "nano-llama", "family": "llama", "layers": LAYERS, "parameters": 658_656}
    assert metadata.items() <= evidence.model.items()
    text = evidence.provenance["inputs"]["calibration"]
    assert text["tokens"] == 2 * 256 and text["split"] == "calibration"


def test_removal_costs_what_the_whole_model_says_without_the_site(report: dict[str, Any]) -> None:
    """An independent computation: the Jensen-Shannon divergence of whole forward passes of a view."""
    stack = open_stack(NANO)
    tokens = windows(open_tokenizer(NANO), load_text("pydoc", "calibration"), 2, 256, 0)
    for name, index, site in (("sublayer_removed", 7, "layers.3.mlp"), ("layer_removed", 4, "layers.4")):
        view = apply(stack, Plan(model=ModelReference.of(stack), drop=[site]))
        with torch.no_grad():
            p, q = (model(tokens).logits.double().softmax(-1) for model in (stack.model, view))
        middle = (p + q) / 2
        divergence = sum((each * (each / middle).log()).sum(-1).mean() / 2 for each in (p, q))
        assert report["scores"][name]["values"][index] == pytest.approx(float(divergence), rel=1e-3)


def test_the_folder_holds_the_page_and_the_same_numbers(evidence: Evidence, folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == ["depth"]  # and no folder of work
    written = ["README.md", "evidence.json", "report.html", "run.yaml"]
    assert sorted(file.name for file in (folder / "depth").iterdir()) == written
    assert Evidence.read(folder / "depth").dump() == evidence.dump()
    assert Study.read(folder / "depth")["scores"].keys() == evidence.findings["scores"].keys()
    html = (folder / "depth" / "report.html").read_text(encoding="utf-8")
    assert html.count('data-site="layers.') == 2 * LAYERS
    for plot in ("plot-layer_removed", "plot-block_influence", "plot-residual_norm", "plot-angles"):
        assert f'id="{plot}"' in html


def test_the_study_and_the_maps_stand_in_the_report_and_on_the_page(report: dict[str, Any], folder: Path) -> None:
    study, maps = report["study"], report["maps"]
    assert 1 <= study["effective_depth"] <= LAYERS and 0 <= study["refinement"] <= LAYERS
    assert len(study["skip_future"]["later_max"]["values"]) == LAYERS
    assert len(study["profile"]["lens_kl"]["values"]) == LAYERS + 1
    assert maps["best"] == list(range(LAYERS + 1)) and maps["target"] == "nano-llama"  # it is the model itself
    html = (folder / "depth" / "report.html").read_text(encoding="utf-8")
    for plot in ("ratio", "cosine", "lens", "top5", "current", "future", "direct", "output_mean", "maps"):
        assert f'id="plot-{plot}"' in html
    assert f"come from the first {study['effective_depth']} of {LAYERS}" in html


def test_a_brief_look_takes_less_than_a_dozen_passes() -> None:
    stack = Stack(nano("llama", num_hidden_layers=24))
    tokens, ran = torch.randint(3, 128, (4, 256), generator=torch.Generator().manual_seed(0)), 0

    def count(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal ran
        ran += inputs[0].shape[:-1].numel()

    for layer in stack.layers:
        for name in stack.architecture.wiring.norms:  # each sublayer that runs, whoever runs it
            layer.get_submodule(name).register_forward_pre_hook(count)
    depth_efficiency(stack, tokens, brief=True)
    assert 0 < ran < 12 * tokens.numel() * len(stack.positions)


def test_a_brief_report_leaves_the_study_out() -> None:
    brief = run("depth-efficiency", NANO, sequences=1, brief=True).evidence
    assert "study" not in brief.findings and "maps" not in brief.findings
    assert 'id="the-effects"' not in page(brief)


def test_models_with_different_tokenizers_are_not_compared(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(NANO, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(CalibrationError, match="have different tokenizers") as error:
        run("depth-efficiency", NANO, sequences=1, brief=True, compare=other)
    assert "\n" not in str(error.value)


def test_the_page_names_the_layers_that_matter_least_and_most(evidence: Evidence) -> None:
    removed = evidence.findings["scores"]["layer_removed"]["values"]
    least, most = removed.index(min(removed)), removed.index(max(removed))
    assert f"layer {least} matters least and layer {most} most" in page(evidence)


def test_names_stay_text(evidence: Evidence) -> None:
    named = {"model": evidence.model | {"name": "<script>alert(1)</script>"}}
    html = page(evidence.model_copy(update=named))
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A short text.\n\nNothing more.")
    with pytest.raises(CalibrationError, match="too little text"):
        run("depth-efficiency", NANO, calibration=str(tmp_path / "short.txt"))


@pytest.mark.parametrize("stack", ["text", "vision"])
def test_a_model_of_images_and_text_has_a_page_of_each_stack(tmp_path: Path, stack: str) -> None:
    for each in shapes_vlm("llava", num_hidden_layers=3):
        each.save_pretrained(tmp_path / "vlm")
    given = {"calibration": "shapes:colour", "rows": 4, "brief": True, "of_stack": stack, "out": tmp_path / "seen"}
    found = run("depth-efficiency", tmp_path / "vlm", **given)
    html = page(found.evidence)
    assert ("Text and images" in html) == (stack == "text")
    assert ("1 - cosine of the features" in html) == (stack == "vision")
    assert ("contribution / input norm, image" in str(found.summary)) == (stack == "text")
