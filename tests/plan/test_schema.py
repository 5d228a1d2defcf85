"""A plan is a small document: it survives JSON, and errors in it are reported in one line with the fix."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeModel

import lamella
from lamella.errors import PlanError
from lamella.plan import ModelReference, PhasedPath, Plan, PlanSeries, Point, PolicyReference, Run, compose, fingerprint
from lamella.plan.config import reindex
from lamella.plan.export import export
from lamella.stack import ARCHITECTURES, Stack, positions_of
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parent.parent / "models" / "nano-llama"
MODEL = ModelReference.single("a" * 64, "llama", 4, name="small")


def path(prefill: list[int], decode: list[int] | None = None) -> dict[str, PhasedPath]:
    return {"text": PhasedPath(prefill=prefill, decode=prefill if decode is None else decode)}


BOTH = ("attn", "mlp")
EVERY = positions_of(4)


def series(count: int = 4, layers: int = 4) -> PlanSeries:
    order = [[(3, "mlp")], [(1, "attn")], [(2, "attn"), (2, "mlp")]][: count - 1]
    scores = [{"jsd": 0.1 * index} for index in range(count)]
    model = ModelReference.single("a" * 64, "llama", layers, name="small")
    return PlanSeries.of_removals(model, order, scores, method="test", seed=3)


def document(**changes: Any) -> str:
    stacks = {"text": {"family": "llama", "layers": 4}}
    model = {"architecture": "a" * 64, "weights": None, "stacks": stacks, "name": "small"}
    return json.dumps({"schema": "lamella.plan/2", "model": model} | changes)


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    "plan",
    [
        Plan(model=MODEL),
        Plan(model=MODEL, drop=["layers.2.mlp", "layers.0"], provenance={"method": "x", "nested": {"seed": 0}}),
        Plan(model=MODEL, path=path([0, 1, 1, 3])),
        Plan(model=MODEL, path=path([0, 1, 2, 3], [0, 3]), drop=["layers.3.attn"]),
    ],
)
def test_a_plan_survives_json(plan: Plan, tmp_path: Path) -> None:
    assert Plan.parse(plan.dump()) == plan
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    assert again == plan and again.digest == plan.digest
    assert json.loads(plan.dump())["schema"] == "lamella.plan/2"


def test_a_series_survives_json_to_the_last_digit(tmp_path: Path) -> None:
    made = series()
    made.points[1].scores["jsd"] = 0.1 + 0.2
    made.write(tmp_path / "series.json")
    again = PlanSeries.read(tmp_path / "series.json")
    assert again == made and [plan.dump() for plan in again] == [plan.dump() for plan in made]
    assert json.loads(made.dump())["schema"] == "lamella.series/2"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (document(dropp=["layers.1"]), ["dropp", "Extra inputs are not permitted"]),
        (document(drop=["layers.4"]), ["entry 0", "layers.4", "0 to 3"]),
        (document(drop=["layers.1", "layers.1.ffn"]), ["entry 1", "layers.1.ffn", "write layers.7"]),
        (document(drop=[f"layers.{i}" for i in range(4)]), ["nothing is left to run", "drop fewer"]),
        (document(path={"text": {"prefill": [0, 4], "decode": [0]}}), ["path.text.prefill", "layer 4", "0 to 3"]),
        (document(path={"text": {"prefill": [0], "decode": [0, 9]}}), ["path.text.decode", "layer 9", "0 to 3"]),
        (document(path={"text": {"prefill": [0], "decode": [-1]}}), ["path.text.decode.0", "greater than or equal"]),
        (document(path={"text": {"prefill": [], "decode": []}}), ["path.text.prefill", "at least 1 item"]),
        (document(path={"text": {"prefill": [0], "decode": [0], "x": 1}}), ["path.text.x", "Extra inputs"]),
        (document(schema="lamella.plan/3"), ["schema", "lamella.plan/2"]),
        (
            document(model={"stacks": {"text": {"family": "llama", "layers": 4}}}),
            ["model.architecture", "Field required"],
        ),
        (document(model={"architecture": "a", "stacks": {"text": {"family": "llama", "layers": 0}}}), ["text.layers"]),
        ("{", ["Invalid JSON"]),
        ("[]", ["document"]),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line_that_names_the_field(text: str, parts: list[str]) -> None:
    with pytest.raises(PlanError) as error:
        Plan.parse(text, where="my.json")
    one_line(error, "my.json", *parts)


def test_a_path_and_a_drop_that_together_leave_nothing_are_refused() -> None:
    text = document(path={"text": {"prefill": [0, 1], "decode": [1]}}, drop=["layers.1"])
    with pytest.raises(PlanError) as error:
        Plan.parse(text)
    one_line(error, "nothing is left to run")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_scores_that_are_not_finite_are_refused(value: str) -> None:
    made = json.loads(series().dump())
    made["points"][2]["scores"]["jsd"] = 123456789
    with pytest.raises(PlanError) as error:
        PlanSeries.parse(json.dumps(made).replace("123456789", value))
    one_line(error, "points.2.scores", "'jsd' is not finite", "plan again")


def test_the_file_of_a_series_is_read_as_its_last_plan(tmp_path: Path) -> None:
    made = series()
    made.write(tmp_path / "series.json")
    assert Plan.read(tmp_path / "series.json") == made[-1] != made[0]


def test_an_empty_series_is_refused() -> None:
    made = json.loads(series().dump()) | {"points": []}
    with pytest.raises(PlanError) as error:
        PlanSeries.parse(json.dumps(made))
    one_line(error, "points", "at least 1 item")


def test_a_plan_is_no_series_and_the_other_way_round() -> None:
    with pytest.raises(PlanError) as error:
        PlanSeries.parse(Plan(model=MODEL).dump())
    one_line(error)
    with pytest.raises(PlanError) as error:
        Plan.parse(series().dump())
    one_line(error)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as error:
        Plan.read(tmp_path / "none.json")
    one_line(error, "none.json", "cannot be read", "give the path of a JSON plan")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError) as error:
        Plan.read(tmp_path / "binary.json")
    one_line(error, "binary.json", "cannot be read")
    with pytest.raises(PlanError) as error:
        Plan.read(tmp_path)
    one_line(error, "cannot be read")


def test_a_plan_for_another_model_is_refused_with_a_fix() -> None:
    stack = Stack(nano("llama"))
    reference = ModelReference.of(stack)
    Plan(model=reference, drop=["layers.1"]).check_fits(stack)
    wrong = {
        "6 layers": ModelReference.single(reference.architecture, "llama", 6),
        "a gpt2": ModelReference.single(reference.architecture, "gpt2", 4),
        "another architecture": reference.model_copy(update={"architecture": "b" * 64}),
    }
    for part, model in wrong.items():
        with pytest.raises(PlanError) as error:
            Plan(model=model).check_fits(stack)
        one_line(error, part, "`lamella plan`")


def test_a_path_for_another_stack_is_refused() -> None:
    text = document(path={"vision": {"prefill": [0], "decode": [0]}})
    with pytest.raises(PlanError) as error:
        Plan.parse(text)
    one_line(error, "'vision'", "'text'")


def test_other_weights_of_the_same_architecture_only_warn(tmp_path: Path) -> None:
    shutil.copytree(NANO_LLAMA, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(NANO_LLAMA)
    stack, same = Stack(model, NANO_LLAMA), Stack(model, tmp_path / "other")
    plan = Plan(model=ModelReference.of(stack), drop=["layers.1"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan.check_fits(stack)
        plan.check_fits(same)  # the same weights in another folder
        plan.check_fits(Stack(model))  # weights that no file is known of
    model.model.norm.weight.data += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="other weights of the same architecture"):
        plan.check_fits(Stack(model, tmp_path / "other"))


def test_the_architecture_s_fingerprint_sees_shapes_and_config_and_not_weights_or_places(tmp_path: Path) -> None:
    base = fingerprint.architecture(nano("llama"))
    assert fingerprint.architecture(nano("llama", seed=5)) == base
    nano("llama").save_pretrained(tmp_path)
    assert fingerprint.architecture(AutoModelForCausalLM.from_pretrained(tmp_path)) == base
    changed = [{"rms_norm_eps": 1e-3}, {"intermediate_size": 32}, {"num_hidden_layers": 3}, {"hidden_act": "gelu"}]
    assert len({base, *(fingerprint.architecture(nano("llama", **change)) for change in changed)}) == 5
    assert fingerprint.architecture(nano("mistral")) != base


def test_the_weights_fingerprint_is_of_the_tensors_on_disk_however_they_are_divided_among_files(tmp_path: Path) -> None:
    model = nano("llama")
    assert Stack(model).files_digest is None and Stack(model, path=tmp_path).files_digest is None
    model.save_pretrained(tmp_path / "whole")
    first = Stack(model, path=tmp_path / "whole")
    assert first.files_digest == ModelReference.of(first).weights is not None
    model.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    tensors = dict(sorted(load_file(tmp_path / "whole" / "model.safetensors").items(), reverse=True))
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt", "more": "metadata"})
    save_file({"a": torch.zeros(1)}, tmp_path / "other" / "plan.abc.safetensors")  # of a plan in the same folder
    for same in ("parts", "other"):
        assert Stack(model, path=tmp_path / same).files_digest == first.files_digest
    name = min(tensors)
    changed = tensors[name].clone()
    changed.view(-1)[-1] += 1
    for other in (
        tensors | {name: changed},
        tensors | {name: tensors[name].half()},
        {key: each for key, each in tensors.items() if key != name},
        {f"{key}s" if key == name else key: each for key, each in tensors.items()},
        tensors | {name: tensors[name].reshape(1, *tensors[name].shape)},
    ):
        save_file(other, tmp_path / "other" / "model.safetensors")
        assert Stack(model, path=tmp_path / "other").files_digest != first.files_digest


def test_the_normal_form_lists_every_execution_in_order() -> None:
    plan = Plan(model=MODEL, path=path([0, 2, 2, 1]), drop=["layers.2.mlp", "layers.1"])
    assert plan.runs("prefill") == (Run(0, BOTH), Run(2, ("attn",)), Run(2, ("attn",)))
    assert plan.is_static and not plan.in_order
    assert plan.skipped == {*EVERY[2:4], *EVERY[5:]}


def test_the_normal_form_of_a_phased_plan_tells_the_phases_apart() -> None:
    plan = Plan(model=MODEL, path=path([0, 1, 2, 3], [0, 3]), drop=["layers.0.attn"])
    assert [run.layer for run in plan.runs("prefill")] == [0, 1, 2, 3]
    assert plan.runs("decode") == (Run(0, ("mlp",)), Run(3, BOTH))
    assert not plan.is_static and plan.in_order
    assert plan.skipped == {EVERY[0], *EVERY[2:6]}
    assert Plan(model=MODEL, path=path([0, 3], [0, 3])).is_static


def test_the_digest_is_of_the_decision_and_of_nothing_else() -> None:
    dropped = Plan(model=MODEL, drop=["layers.1"])
    assert dropped.digest == Plan(model=MODEL, path=path([0, 2, 3]), provenance={"seed": 9}).digest
    assert dropped.digest == Plan(model=MODEL, drop=["layers.1.mlp", "layers.1.attn"]).digest
    others = [Plan(model=MODEL), Plan(model=MODEL, drop=["layers.2"]), Plan(model=MODEL, path=path([0, 2, 3], [0, 3]))]
    assert len({dropped.digest, *(plan.digest for plan in others)}) == 4


def test_drop_composes_with_drop() -> None:
    first, second = Plan(model=MODEL, drop=["layers.1.attn", "layers.3"]), Plan(model=MODEL, drop=["layers.1.mlp"])
    both = compose(first, second)
    assert both.drop == ["layers.1", "layers.3"]
    assert both.dropped == compose(second, first).dropped == {*EVERY[2:4], *EVERY[6:]}


def test_drop_composes_with_path() -> None:
    both = compose(Plan(model=MODEL, path=path([0, 1, 2, 3], [0, 3])), Plan(model=MODEL, drop=["layers.3.mlp"]))
    assert both.runs("decode") == (Run(0, BOTH), Run(3, ("attn",)))


def test_compositions_without_a_plain_meaning_are_refused() -> None:
    with pytest.raises(PlanError) as error:
        compose(Plan(model=MODEL, path=path([0])), Plan(model=MODEL, path=path([1])))
    one_line(error, "both plans choose a path")
    other = MODEL.model_copy(update={"architecture": "c" * 64})
    with pytest.raises(PlanError) as error:
        compose(Plan(model=MODEL), Plan(model=other))
    one_line(error, "two different models")
    with pytest.raises(PlanError) as error:
        compose(Plan(model=MODEL, drop=["layers.0", "layers.1"]), Plan(model=MODEL, drop=["layers.2", "layers.3"]))
    one_line(error, "composed plan", "nothing is left to run")


def test_a_series_of_removals_grows_by_one_removal_a_point() -> None:
    made = series()
    assert [plan.dropped for plan in made] == [
        set(),
        {EVERY[7]},
        {EVERY[7], EVERY[2]},
        {EVERY[7], EVERY[2], *EVERY[4:6]},
    ]
    assert [point.scores["jsd"] for point in made.points] == [0.0, 0.1, 0.2, 0.1 * 3]
    assert made[-1].provenance == {"method": "test", "seed": 3, "point": 3, "scores": {"jsd": 0.1 * 3}}
    assert len(made) == 4


def test_a_budget_picks_the_most_that_does_not_pass_it() -> None:
    made = series()
    removed = [len(made.removing(sublayers).skipped) for sublayers in range(9)]
    assert removed == [0, 1, 2, 2, 4, 4, 4, 4, 4]
    assert [len(made.at_ratio(ratio).skipped) for ratio in (0, 0.125, 0.2, 0.25, 0.49, 0.5, 0.99)] == [
        0, 1, 1, 2, 2, 4, 4,
    ]  # fmt: skip
    assert len(series(layers=30).at_ratio(0.1).skipped) == 4  # of 60: 6 may go, the series ends at 4
    for ratio in (-0.1, 1.0):
        with pytest.raises(PlanError) as error:
            made.at_ratio(ratio)
        one_line(error, "out of range", "at least 0 and below 1")


def test_a_budget_counts_in_decimal_not_in_binary() -> None:
    """0.1 of 60 sublayers are 6, although 0.1 * 60 is not in every order of rounding."""
    points = [Point(drop=[f"layers.{29 - i}.attn" for i in range(count)]) for count in range(30)]
    long = PlanSeries(model=ModelReference.single("a" * 64, "llama", 30), points=points)
    for sublayers in range(30):
        assert len(long.at_ratio(sublayers / 60).skipped) == sublayers


def test_the_config_s_lists_follow_the_layers() -> None:
    gemma = reindex(nano("gemma3_text").config, [0, 3, 3], ARCHITECTURES["gemma3_text"])
    assert gemma.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert gemma.num_hidden_layers == 3
    moe = nano("qwen3_moe").config
    moe.mlp_only_layers, moe.decoder_sparse_step = [2], 1
    again = reindex(moe, [2, 0, 1], ARCHITECTURES["qwen3_moe"])
    assert again.mlp_only_layers == [0] and moe.mlp_only_layers == [2]
    moe.mlp_only_layers, moe.decoder_sparse_step = [], 2
    experts = [type(layer.mlp).__name__ == "Qwen3MoeSparseMoeBlock" for layer in Qwen3MoeModel(moe).layers]
    order = [1, 2, 3]
    moved = Qwen3MoeModel(reindex(moe, order, ARCHITECTURES["qwen3_moe"]))
    assert [type(layer.mlp).__name__ == "Qwen3MoeSparseMoeBlock" for layer in moved.layers] == [
        experts[layer] for layer in order
    ]


def test_a_document_is_found_under_its_public_name() -> None:
    assert lamella.Plan is Plan and lamella.PlanSeries is PlanSeries and lamella.compose is compose


DECIDING = {"text": PolicyReference(name="first", params={}, work=[(0.5, 0.25)] * 4)}


@pytest.mark.parametrize(
    ("decision", "effect"),
    [
        ({}, "no sublayers removed, of 8"),
        ({"drop": ["layers.1.mlp"]}, "1 sublayer removed, of 8"),
        ({"drop": ["layers.1", "layers.3"]}, "4 sublayers removed, of 8"),
        ({"path": path([0, 0, 1, 2, 3])}, "no sublayers removed, of 8, 2 run again"),
        ({"path": path([0, 0, 3])}, "4 sublayers removed, of 8, 2 run again"),
        ({"path": path([0, 1, 2, 3], [0, 3])}, "4 sublayers skipped for generated tokens, of 8"),
        ({"policies": DECIDING}, "about 5 sublayers skipped for generated tokens, of 8"),
    ],
    ids=str,
)
def test_removed_sites_are_described_in_words(decision: dict[str, Any], effect: str) -> None:
    assert Plan(model=MODEL, **decision).effect == effect


def test_the_card_of_an_export_says_the_same_as_the_plan(tmp_path: Path) -> None:
    stack = Stack(nano("llama"), name="small")
    plan = Plan(model=ModelReference.of(stack), path=path([0, 1, 2, 3], [0, 3]))
    readme = (export(stack, plan, tmp_path / "out", form="native") / "README.md").read_text()
    assert "4 sublayers skipped for generated tokens, of 8; `plan.json` has the details." in readme
