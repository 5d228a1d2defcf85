"""Untrusted plans and side files: each is applied completely, or rejected in one line."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from strategies import (
    EVIL,
    answered,
    damaged,
    dumped,
    mutated,
    parts_of,
    refusal,
    safetensors_file,
    safetensors_files,
    share,
)

import lamella
from lamella.errors import LamellaError, PlanError
from lamella.measure.fisher import Fisher
from lamella.methods.cola import PathPredictor, PredictorNetwork
from lamella.methods.minitron import Importance
from lamella.plan import (
    Factors,
    HeadWidth,
    HiddenWidth,
    ModelReference,
    PhasedPath,
    Plan,
    PlanSeries,
    PolicyReference,
    mask_edit,
    read_factors,
    read_masks,
    replace_edit,
    restore_edit,
    scale_edit,
)
from lamella.plan.export import export, export_out_of_core, natural_form
from lamella.registry import submodule
from lamella.runtime import keep_policy
from lamella.runtime.policy import policies
from lamella.stack import Stack, matrices
from lamella.zoo import open_stack

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
KINDS = ("drop", "width", "heads", "path", "mask", "scale", "replace", "restore", "policy", "trained policy")
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stack() -> Stack:
    return open_stack(NANO_LLAMA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder, next to a secret file."""
    around = tmp_path_factory.mktemp("around")
    for name in ("canary", "canary.safetensors"):
        shutil.copyfile(NANO_LLAMA / "model.safetensors", around / name)
    (around / "plans").mkdir()
    return around / "plans"


@pytest.fixture(scope="module")
def plans(stack: Stack, folder: Path) -> dict[str, Plan]:
    """A valid plan of every kind, with its side files in the folder."""
    model, generator = ModelReference.of(stack), torch.Generator().manual_seed(0)
    some = {name: w.of(stack.model) for name, w in list(matrices(stack.model).items())[:2]}
    keep = {name: torch.rand(each.shape, generator=generator) < 0.5 for name, each in some.items()}
    factors = {name: Factors(bits, torch.rand(int(bits.sum()), generator=generator)) for name, bits in keep.items()}
    tensors = {"model.norm.weight": torch.ones(96), "model.layers.1.input_layernorm.weight": torch.zeros(96)}
    base = Stack(stack.model, Path(shutil.copytree(NANO_LLAMA, folder / "base")))
    found = {
        "drop": Plan(model=model, drop=["layers.2", "layers.4.mlp"], provenance={"method": "random", "seed": 0}),
        "width": Plan(
            model=model,
            width={"layers.1.mlp.channels": [3, 1, 2], "hidden.channels": HiddenWidth(keep=[*range(48)], rescale=True)},
        ),
        "heads": Plan(
            model=model,
            width={f"layers.{n}.attn.heads": HeadWidth(keep=[0, 2], kv_of=[0, 1], merge=[1, None]) for n in range(6)},
        ),
        "path": Plan(
            model=model, path={"text": PhasedPath(prefill=[0, 1, 2, 3, 4, 5], decode=[0, 1, 3, 5], keys="fill")}
        ),
        "mask": Plan(model=model, weights=[mask_edit(stack, keep, folder)]),
        "scale": Plan(model=model, weights=[scale_edit(stack, factors, folder)]),
        "replace": Plan(model=model, weights=[replace_edit(stack, tensors, folder)]),
        "restore": Plan(model=model, weights=[restore_edit(stack, base, ["layers.1", "norm"], folder)]),
        "policy": Plan(model=model, policies={"text": PolicyReference(name="void", params={}, work=[(1.0, 0.5)] * 6)}),
    }
    trained = Plan(model=model, policies={"text": PolicyReference(name="first", params={"threshold": 0.5})})
    policy = policies(submodule("first", "policy"))[0]
    found["trained policy"] = keep_policy(trained, policy(stack, threshold=0.5), folder)
    return found


@pytest.fixture(scope="module")
def documents(plans: dict[str, Plan]) -> dict[str, Any]:
    return {kind: json.loads(plan.dump()) for kind, plan in plans.items()}


def carried_out(stack: Stack, file: Path) -> None:
    """Read a plan, run the model under it, and write it again."""
    plan = Plan.read(file)
    assert Plan.parse(plan.dump()).dump() == plan.dump()
    view = lamella.apply(stack, plan)
    with torch.no_grad():
        if plan.is_static:
            view(input_ids=IDS, use_cache=False)
        else:
            lamella.parallel(view, IDS, torch.tensor([6, 6]))
    out = file.parent / "out"
    try:
        export(stack, plan, out, form=natural_form(plan, stack))
        assert Plan.read(out / "plan.json").digest == plan.digest
    finally:
        shutil.rmtree(out, ignore_errors=True)
        assert not [path for path in file.parent.iterdir() if path.name.startswith(".out")]


# Documents.


@pytest.mark.parametrize("kind", KINDS)
def test_the_valid_plans_that_are_damaged_below_are_carried_out(
    stack: Stack, plans: dict[str, Plan], folder: Path, kind: str
):
    plans[kind].write(folder / "plan.json")
    carried_out(stack, folder / "plan.json")


@share(5)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_plan_that_is_almost_one_is_carried_out_or_refused(
    stack: Stack, documents: dict[str, Any], folder: Path, kind: str, data: st.DataObject
):
    text = data.draw(mutated(documents[kind]).map(dumped))
    (folder / "plan.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with answered(folder):
        carried_out(stack, folder / "plan.json")


@given(data=st.data())
def test_bytes_that_are_almost_a_plan_are_refused(documents: dict[str, Any], folder: Path, data: st.DataObject):
    text = dumped(documents[data.draw(st.sampled_from(KINDS))]).encode()
    (folder / "plan.json").write_bytes(data.draw(damaged(text)))
    for document in (Plan, PlanSeries):
        with answered(folder):
            document.read(folder / "plan.json")


@given(data=st.data())
def test_a_series_that_is_almost_one_gives_plans_or_is_refused(
    documents: dict[str, Any], folder: Path, data: st.DataObject
):
    points = [{"drop": [], "scores": {"loss": 0.0}}]
    for kind in KINDS:
        fields = ("drop", "width", "path", "weights", "modules", "policies")
        points.append({name: documents[kind][name] for name in fields} | {"scores": {"loss": 0.5}})
    series = {"schema": "lamella.series/2", "model": documents["drop"]["model"], "points": points, "provenance": {}}
    (folder / "series.json").write_text(dumped(data.draw(mutated(series))), encoding="utf-8", errors="surrogatepass")
    with answered(folder):
        found = PlanSeries.read(folder / "series.json")
        assert PlanSeries.parse(found.dump()).dump() == found.dump()
        for place in (0, len(found) - 1, len(found) // 2):
            with answered(folder):
                plan = found[place]
                assert plan.digest and len(plan.work) == plan.model.layers and plan.removed is not None
        found.at_ratio(0.3).dump()


@pytest.mark.parametrize("layers", [10**9, 2**63, 10**40])
def test_a_plan_for_more_layers_than_any_model_has_is_refused(folder: Path, layers: int):
    stack = {"family": "llama", "layers": layers}
    document = {"schema": "lamella.plan/2", "model": {"architecture": "a", "stacks": {"text": stack}}}
    with answered(folder, seconds=5, gigabytes=1), pytest.raises(PlanError):
        Plan.parse(json.dumps(document))


@pytest.mark.parametrize("name", EVIL, ids=ascii)
@pytest.mark.parametrize("kind", ["mask", "restore", "trained policy"])
def test_a_side_file_of_any_other_name_is_not_followed(
    stack: Stack, documents: dict[str, Any], folder: Path, kind: str, name: str
):
    document = json.loads(json.dumps(documents[kind]))
    part = document["policies"].get("text") or document["weights"][0]
    part |= {"file": name, "sha256": hashlib.sha256((folder.parent / "canary").read_bytes()).hexdigest()}
    (folder / "plan.json").write_text(json.dumps(document), encoding="utf-8", errors="surrogatepass")
    with answered(folder):
        with pytest.raises(LamellaError) as error:
            carried_out(stack, folder / "plan.json")
        refusal(error.value)
    (folder / "copies").mkdir(exist_ok=True)
    before = sorted(folder.rglob("*"))
    with answered(folder):  # nor is it copied, to wherever the name says
        Plan.read(folder / "plan.json").write(folder / "copies" / "plan.json")
        assert sorted(folder.rglob("*")) in (before, sorted([*before, folder / "copies" / "plan.json"]))
    shutil.rmtree(folder / "copies")


POLICIES = ("void", "ffn-skip", "lora-drop", "first")
VALUES = [10**12, -1, 0, 1e308, "x", None, [], {}, [[1]], True, "\n", [0, 0], [-1, 9]]


@share(2)
@given(method=st.sampled_from(POLICIES), place=st.integers(0, 9), value=st.sampled_from(VALUES))
def test_no_setting_of_a_policy_ends_in_anything_but_a_refusal(
    stack: Stack, documents: dict[str, Any], folder: Path, method: str, place: int, value: Any
):
    policy = policies(submodule(method, "policy"))[0]
    names = [name for name in inspect.signature(policy).parameters if name != "stack"]
    document = documents["policy"] | {
        "policies": {"text": {"name": method, "params": {names[place % len(names)]: value}}}
    }
    (folder / "plan.json").write_text(json.dumps(document))
    with answered(folder, gigabytes=2):
        carried_out(stack, folder / "plan.json")


# Side files.


def side_file(plan: Plan, folder: Path) -> Path:
    part = plan.policy or plan.weights[0]
    assert part.file is not None
    return folder / part.file


@st.composite
def side_files(draw: st.DrawFn, header: dict[str, Any], data: bytes) -> bytes:
    """Draw side files with almost valid tensors, or with wrong shapes in the metadata."""
    about = header.get("__metadata__", {})
    if about and draw(st.booleans()):
        [(schema, shapes)] = about.items()
        text = draw(mutated(json.loads(shapes)).map(dumped))
        return safetensors_file(header | {"__metadata__": {draw(st.sampled_from([schema, "x"])): text}}, data)
    return draw(safetensors_files(header, data))


@share(5)
@pytest.mark.parametrize("kind", ["mask", "scale", "replace", "trained policy"])
@given(data=st.data())
def test_a_side_file_that_is_almost_one_is_carried_out_or_refused(
    stack: Stack, plans: dict[str, Plan], documents: dict[str, Any], folder: Path, kind: str, data: st.DataObject
):
    content = data.draw(side_files(*parts_of(side_file(plans[kind], folder))))
    (folder / "side.safetensors").write_bytes(content)
    document = json.loads(json.dumps(documents[kind]))
    part = document["policies"].get("text") or document["weights"][0]
    part |= {"file": "side.safetensors", "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "plan.json").write_text(json.dumps(document))
    with answered(folder):
        plan = Plan.read(folder / "plan.json")
        view = lamella.apply(stack, plan)
        with torch.no_grad():
            lamella.parallel(view, IDS, torch.tensor([6, 6]))


HUGE = [
    [2**62, 4],
    [0, 2**62],
    [2**40, 2**40],
    [10**30],
    [-8],
    [-1, -8],
    [8.0],
    [True] * 3,
    ["8"],
    [[8]],
    None,
    8,
    [],
    [8, 0],
]


@pytest.mark.parametrize("shape", HUGE, ids=repr)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_bits_of_another_shape_than_the_metadata_say_are_refused(folder: Path, shape: Any, count: int):
    file = folder / "bits.safetensors"
    for schema, names, read in (("masks", ["a"], read_masks), ("factors", ["a.where", "a.values"], read_factors)):
        bits = dict.fromkeys(names, torch.zeros(count, dtype=torch.uint8))
        save_file(
            {name: each.clone() for name, each in bits.items()}, file, {f"lamella.{schema}/1": json.dumps({"a": shape})}
        )
        with answered(folder, gigabytes=1):
            read(file)


def test_factors_of_another_shape_are_refused_before_they_are_spread(stack: Stack, folder: Path):
    name, weight = next(iter(matrices(stack.model).items()))
    size = weight.of(stack.model).numel()
    for values in (torch.ones(size, 1), torch.ones(1, size), torch.ones(size, dtype=torch.int64), torch.ones(size - 1)):
        where = torch.ones(weight.of(stack.model).shape, dtype=torch.bool)
        edit = scale_edit(stack, {name: Factors(where, torch.ones(size))}, folder)
        header, _ = parts_of(folder / edit.file)
        save_file(
            {f"{name}.where": torch.full((-(-size // 8),), 255, dtype=torch.uint8), f"{name}.values": values},
            folder / "factors.safetensors",
            header["__metadata__"],
        )
        with answered(folder, gigabytes=1), pytest.raises(PlanError):
            read_factors(folder / "factors.safetensors")


@share(4)
@given(data=st.data())
def test_a_restored_checkpoint_that_is_damaged_is_used_or_refused(
    stack: Stack, documents: dict[str, Any], folder: Path, data: st.DataObject
):
    header, tensors = parts_of(NANO_LLAMA / "model.safetensors")
    (folder / "base" / "model.safetensors").write_bytes(data.draw(safetensors_files(header, tensors)))
    (folder / "plan.json").write_text(json.dumps(documents["restore"]))
    with answered(folder):
        lamella.apply(stack, Plan.read(folder / "plan.json"))
    with answered(folder):
        try:
            export_out_of_core(folder / "base", Plan.read(folder / "plan.json"), folder / "out")
        finally:
            shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.copyfile(NANO_LLAMA / "model.safetensors", folder / "base" / "model.safetensors")


# What was measured.


DIMS = ("channels", "heads", "hidden")
READERS: dict[str, Callable[[Path, Stack], Any]] = {
    "importance": lambda file, stack: Importance.load(file),
    "fisher": lambda file, stack: [Fisher.read(file).tensors[name] for name in Fisher.read(file).tensors],
    "predictor": PathPredictor.load,
}


def measured(reader: str, stack: Stack, file: Path) -> Path:
    """A valid file of measurements."""
    estimator = {"kind": "gradient", "loss": "ce", "batch": 1, "order": "data"}
    about: dict[str, dict[str, Any]] = {
        "importance": {"lamella.importance/1": {name: {"name": "l2", "provenance": {}} for name in DIMS}},
        "fisher": {
            "lamella.importance/1": {"estimator": estimator, "samples": 1, "batches": 1, "data": "a", "weights": "b"}
        },
        "predictor": {"model": json.loads(ModelReference.of(stack).model_dump_json()), "chat": False},
    }
    tensors = {"channels": torch.ones(6, 8), "heads": torch.ones(6, 4), "hidden": torch.ones(96)}
    if reader == "predictor":
        tensors = PredictorNetwork(stack.config.hidden_size, len(stack)).state_dict()
    save_file(tensors, file, {name: json.dumps(value) for name, value in about[reader].items()})
    return file


@pytest.mark.parametrize("reader", READERS)
def test_the_valid_measurements_that_are_damaged_below_are_read(stack: Stack, folder: Path, reader: str):
    READERS[reader](measured(reader, stack, folder / "measured.safetensors"), stack)


@share(2)
@pytest.mark.parametrize("reader", READERS)
@given(data=st.data())
def test_measurements_that_are_almost_some_are_read_or_refused(
    stack: Stack, folder: Path, reader: str, data: st.DataObject
):
    file = measured(reader, stack, folder / "measured.safetensors")
    header, tensors = parts_of(file)
    if data.draw(st.booleans()):
        about = header["__metadata__"]
        name = data.draw(st.sampled_from(sorted(about)))
        header["__metadata__"] = about | {name: dumped(data.draw(mutated(json.loads(about[name]))))}
        file.write_bytes(safetensors_file(header, tensors))
    else:
        file.write_bytes(data.draw(safetensors_files(header, tensors)))
    with answered(folder):
        READERS[reader](file, stack)


@pytest.mark.parametrize("reader", READERS)
def test_measurements_that_are_nested_too_deeply_are_refused(stack: Stack, folder: Path, reader: str):
    file = measured(reader, stack, folder / "measured.safetensors")
    header, tensors = parts_of(file)
    deep = dict.fromkeys(header["__metadata__"], "[" * 50_000)
    file.write_bytes(safetensors_file(header | {"__metadata__": deep}, tensors))
    with answered(folder):
        READERS[reader](file, stack)
