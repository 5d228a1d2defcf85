"""Networks that a plan inserts at a site, in place of its sublayers or in addition, as names and tensors only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear

import lamella
from lamella import registry
from lamella.errors import MethodError, PlanError
from lamella.plan import (
    ModelReference,
    ModuleReference,
    PhasedPath,
    Plan,
    PolicyReference,
    SiteModule,
    keep_modules,
    modules_of,
)
from lamella.plan.export import export, natural_form
from lamella.stack import Stack
from lamella.zoo.nano import NANO, nano, nano_inputs

SOURCE = '''
"""A method with two networks of its own."""

import torch
from torch import nn

from lamella.plan import SiteModule
from lamella.registry import method


class Low(SiteModule):
    """h + B A h, of some rank, plus the output of kept sublayers."""

    def __init__(self, stack, positions, *, rank: int) -> None:
        super().__init__(stack, positions)
        width = stack.architecture.sizes_of(stack.config).hidden
        self.a, self.b = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, h, out, call):
        return (h if out is None else out) + self.b(self.a(h))


class Pass(SiteModule):
    """Hands on what is there."""

    def forward(self, h, out, call):
        return h if out is None else out


@method("low-test", purpose="prune", baseline=True)
def low(model, *, rank: int = 2):
    """Nothing."""
'''
CAUSAL = [name for name in NANO if name != "vit"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A method in a package outside Lamella, as an entry point would name it."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "low_test.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(place))
    entry = EntryPoint("low-test", "low_test", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    yield
    sys.modules.pop("low_test", None)


def planned(stack: Stack, modules: dict[str, ModuleReference], **more: Any) -> Plan:
    return Plan(model=ModelReference.of(stack), modules=modules, **more)


def trained(folder: Path, width: int = 32, rank: int = 2) -> ModuleReference:
    """A network with its parameters in a side file."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": 0.2 * torch.randn(rank, width, generator=generator),
        "b.weight": 0.2 * torch.randn(width, rank, generator=generator),
    }
    save_file(tensors, folder / "low.safetensors")
    reference = ModuleReference(name="low-test", kind="Low", params={"rank": rank}, file="low.safetensors")
    reference._folder = folder
    return reference


def by_hand(stack: Stack, given: dict[str, Tensor], replaced: dict[tuple[int, str], Any]) -> Tensor:
    """Return the logits with functions ``f(h, out)`` at these positions."""
    context = stack.context(given)
    h: Any = context.h
    for position in stack.positions:
        out = stack.run(h, position, stack.after(position), context)
        h = replaced[position](h, out) if position in replaced else out
    return stack.head(h)


SERIAL = [name for name in CAUSAL if name not in ("gpt_neox",)]  # a parallel layer has no intermediate hidden states


@pytest.mark.parametrize("name", SERIAL)
@pytest.mark.parametrize("beside", [False, True])
def test_a_network_replaces_a_sublayer_or_is_added_to_it(name: str, beside: bool, tmp_path: Path) -> None:
    stack, given = Stack(nano(name)), nano_inputs(name)
    reference = trained(tmp_path).model_copy(update={"keep_sublayers": beside})
    view = lamella.apply(stack, planned(stack, {"layers.1.mlp": reference, "layers.2.attn": reference}))
    weights = load_file(tmp_path / "low.safetensors")

    def low(h: Tensor, out: Tensor) -> Tensor:
        return (out if beside else h) + linear(linear(h, weights["a.weight"]), weights["b.weight"])

    expected = by_hand(stack, given, {(1, "mlp"): low, (2, "attn"): low})
    torch.testing.assert_close(view(**given, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, stack.model(**given, use_cache=False).logits, atol=1e-3)


@pytest.mark.parametrize("name", CAUSAL)
def test_an_identity_added_to_a_whole_layer_is_bit_exact(name: str) -> None:
    stack, given = Stack(nano(name)), nano_inputs(name)
    reference = ModuleReference(name="low-test", kind="Pass", keep_sublayers=True)
    view = lamella.apply(stack, planned(stack, {"layers.1": reference, "layers.3": reference}))
    assert torch.equal(view(**given, use_cache=False).logits, stack.model(**given, use_cache=False).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(view.generate(**given, **options), stack.model.generate(**given, **options))


@pytest.mark.parametrize("name", CAUSAL)
def test_in_place_of_a_layer_what_hands_on_is_a_dropped_layer(name: str) -> None:
    stack, given = Stack(nano(name)), nano_inputs(name)
    plan = planned(stack, {"layers.0": ModuleReference(name="low-test", kind="Pass")})
    dropped = lamella.apply(stack, Plan(model=plan.model, drop=["layers.0"]))
    view = lamella.apply(stack, plan)
    assert torch.equal(view(**given, use_cache=False).logits, dropped(**given, use_cache=False).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = view.generate(**given, **options)
    assert torch.equal(cached, view.generate(**given, **options, use_cache=False))
    assert torch.equal(cached, dropped.generate(**given, **options))


def test_networks_stand_in_every_stack(tmp_path: Path) -> None:
    model, given = lamella.open(nano("whisper")), nano_inputs("whisper")
    reference = trained(tmp_path)
    sites = {"encoder.layers.1.mlp": reference, "decoder.layers.2.cross": reference}
    view = lamella.apply(model, Plan(model=ModelReference.of(model), modules=sites))
    without = lamella.apply(model, Plan(model=ModelReference.of(model), drop=list(sites)))
    assert not torch.allclose(view(**given).logits, without(**given).logits, atol=1e-4)
    names = [name for name, _ in view.named_parameters() if "lamella_modules" in name]
    assert names == [
        "model.encoder.layers.1.lamella_modules.mlp.a.weight",
        "model.encoder.layers.1.lamella_modules.mlp.b.weight",
        "model.decoder.layers.2.lamella_modules.cross.a.weight",
        "model.decoder.layers.2.lamella_modules.cross.b.weight",
    ]


def test_the_model_stays_as_it_was_and_a_network_learns_through_the_view(tmp_path: Path) -> None:
    stack, given = Stack(nano("llama")), nano_inputs("llama")
    before = {name for name, _ in stack.model.named_parameters()}
    view = lamella.apply(stack, planned(stack, {"layers.1.mlp": trained(tmp_path)}))
    with torch.enable_grad():
        view(**given, labels=given["input_ids"]).loss.backward()
    assert view.model.layers[1].lamella_modules["mlp"].b.weight.grad.abs().max() > 0
    assert {name for name, _ in stack.model.named_parameters()} == before
    assert "lamella_modules" not in dict(stack.model.model.layers[1].named_children())


def test_a_plan_with_networks_survives_json_and_travels_as_a_plan(tmp_path: Path) -> None:
    stack, given = Stack(nano("llama")), nano_inputs("llama")
    plan = planned(stack, {"layers.1.mlp": trained(tmp_path)})
    (tmp_path / "there").mkdir()
    plan.write(tmp_path / "there" / "plan.json")
    again = Plan.read(tmp_path / "there" / "plan.json")
    assert again == plan and (tmp_path / "there" / "low.safetensors").is_file()
    expected = lamella.apply(stack, plan)(**given).logits
    assert torch.equal(lamella.apply(stack, again)(**given).logits, expected)
    assert natural_form(plan, stack) == "native"
    for form in ("plain", "portable"):
        with pytest.raises(PlanError, match=rf"^{form}: no config can express the network at layers\.1\.mlp"):
            export(stack, plan, tmp_path / form, form=form)
    export(stack, plan, tmp_path / "out", form="native")
    assert torch.equal(lamella.load(tmp_path / "out").model(**given).logits, expected)


@pytest.mark.parametrize("whole", [False, True])
def test_trained_networks_of_a_view_are_saved_with_the_plan(whole: bool, tmp_path: Path) -> None:
    stack, given = Stack(nano("llama")), nano_inputs("llama")
    site = "layers.2" if whole else "layers.1.mlp"
    plan = planned(stack, {site: trained(tmp_path), "layers.3.attn": trained(tmp_path)})
    view = lamella.apply(stack, plan)
    networks = modules_of(view, stack)
    assert list(networks) == list(plan.modules)
    networks[site].b.weight += 1
    (tmp_path / "kept").mkdir()
    kept = keep_modules(plan, networks, tmp_path / "kept")
    assert torch.equal(lamella.apply(stack, kept)(**given).logits, view(**given).logits)
    assert kept.modules[site].file != plan.modules[site].file and plan.modules[site].sha256 is None
    assert not torch.equal(lamella.apply(stack, plan)(**given).logits, view(**given).logits)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"name": "low-test"}, "module 'low-test': kind is None, but there are: Low, Pass"),
        ({"name": "low-test", "kind": "os"}, "module 'low-test': kind is os, but there are: Low, Pass"),
        ({"name": "low-test", "kind": "Low"}, "make the plan again"),
        ({"name": "low-test", "kind": "Low", "params": {"ranks": 2}}, "no parameter 'ranks'; its parameters are: rank"),
        ({"name": "low-test", "kind": "Low", "params": {"rank": "2"}}, "must be tuple of ints"),
        ({"name": "low-test", "kind": "Low", "params": {"rank": 2}, "file": "none.st"}, "none.st cannot be read"),
        ({"name": "finercut"}, "finercut is a method without networks"),
    ],
)
def test_a_network_that_cannot_be_made_is_refused_in_one_line(reference: dict[str, Any], message: str) -> None:
    stack = Stack(nano("llama"))
    with pytest.raises(PlanError) as error:
        lamella.apply(stack, planned(stack, {"layers.1.mlp": ModuleReference(**reference)}))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_side_file_of_another_shape_or_hash_is_refused(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    reference = trained(tmp_path, rank=3)
    for change, message in (
        ({"params": {"rank": 2}}, "'a.weight' is [3, 32]"),
        ({"params": {"rank": 3}, "sha256": "0" * 64}, "its hash differs"),
    ):
        with pytest.raises(PlanError, match="module 'low-test'") as error:
            lamella.apply(stack, planned(stack, {"layers.1.mlp": reference.model_copy(update=change)}))
        assert message in str(error.value)


def test_an_unknown_method_is_refused() -> None:
    stack = Stack(nano("llama"))
    with pytest.raises(MethodError, match="unknown method 'nowhere'"):
        lamella.apply(stack, planned(stack, {"layers.1.mlp": ModuleReference(name="nowhere")}))
    with pytest.raises(ValueError, match="String should match pattern"):
        ModuleReference(name="../outside")


@pytest.mark.parametrize(
    ("modules", "more", "message"),
    [
        (["layers.9.mlp"], {}, "modules: site 'layers.9.mlp' is out of range"),
        (["layers.1", "layers.1.mlp"], {}, "'layers.1' and 'layers.1.mlp' overlap"),
        (["layers.1.mlp"], {"drop": ["layers.1"]}, "'layers.1.mlp' is dropped as well"),
        (["layers.1.mlp"], {"path": {"text": PhasedPath(prefill=[0, 1], decode=[0, 1])}}, "whose path changes"),
        (
            ["layers.1.mlp"],
            {"policies": {"text": PolicyReference(name="void")}},
            "path and modules must be empty",
        ),
    ],
)
def test_networks_that_contradict_the_rest_are_refused(modules: list[str], more: dict[str, Any], message: str) -> None:
    stack = Stack(nano("llama"))
    with pytest.raises(ValueError) as error:
        planned(stack, {site: ModuleReference(name="low-test", kind="Pass") for site in modules}, **more)
    assert message in str(error.value)


def test_site_modules_are_for_methods_to_define() -> None:
    with pytest.raises(NotImplementedError):
        SiteModule(Stack(nano("llama")), [])(torch.zeros(1, 1, 32), None, {})


def test_a_network_costs_its_parameters_and_what_it_replaces_nothing(tmp_path: Path) -> None:
    stack, reference = Stack(nano("llama")), trained(tmp_path)
    whole = lamella.cost(stack)
    dropped = lamella.cost(stack, Plan(model=ModelReference.of(stack), drop=["layers.1.mlp"]))
    instead = lamella.cost(stack, planned(stack, {"layers.1.mlp": reference}))
    beside = lamella.cost(
        stack, planned(stack, {"layers.1.mlp": reference.model_copy(update={"keep_sublayers": True})})
    )
    size = 2 * 2 * 32
    assert (instead.parameters, instead.macs) == (dropped.parameters + size, dropped.macs + size)
    assert (beside.parameters, beside.macs) == (whole.parameters + size, whole.macs + size)
