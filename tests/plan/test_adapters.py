"""Adapters of a plan on linear layers: stored as names and tensors only, moved with their layers, never merged."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.cache_utils import DynamicCache

import lamella
from lamella import registry
from lamella.errors import CacheError, PlanError
from lamella.plan import (
    AdapterReference,
    ModelReference,
    PhasedPath,
    Plan,
    PolicyReference,
    SiteAdapter,
    attach,
    compose,
    keep_adapters,
    sidefile,
)
from lamella.plan.export import export, export_out_of_core, natural_form
from lamella.plan.fingerprint import revision
from lamella.stack import Position, Stack, share
from lamella.train import add_lora, linear_at
from lamella.zoo.nano import NANO, nano, nano_inputs

SOURCE = '''
"""A method with an adapter of its own."""

import torch
from torch import nn

from lamella.plan import SiteAdapter
from lamella.registry import method


class Bent(SiteAdapter):
    """y + s tanh(x A^T) B^T, which cannot be merged into weights."""

    def __init__(self, inputs: int, outputs: int, *, rank: int, scale: float = 1.0) -> None:
        super().__init__(inputs, outputs)
        if rank > min(inputs, outputs):
            raise ValueError(f"rank={rank}: the map is {inputs} to {outputs}")
        self.scale = scale
        self.a = nn.Parameter(torch.randn(rank, inputs) / 4)
        self.b = nn.Parameter(torch.randn(outputs, rank) / 4)

    def forward(self, x, y):
        return y + self.scale * torch.tanh(x @ self.a.T) @ self.b.T


@method("bent-test", purpose="adapt", baseline=True)
def bent(model, *, rank: int = 2):
    """Nothing."""
'''
CAUSAL = [name for name in NANO if name != "vit"]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A method in a package outside Lamella, as an entry point would name it."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "bent_test.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(place))
    entry = EntryPoint("bent-test", "bent_test", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    yield
    sys.modules.pop("bent_test", None)


def bent(rank: int = 2) -> Any:
    kind = registry.submodule("bent-test", "modules").Bent
    return lambda inputs, outputs: kind(inputs, outputs, rank=rank)


def trained(stack: Stack, folder: Path, sites: list[str], plan: Plan | None = None) -> tuple[Plan, Any]:
    """Return a plan with adapters at some sites, and the view with these adapters."""
    plan = plan or Plan(model=ModelReference.of(stack))
    view = lamella.apply(stack, plan)
    adapters = attach(view, linear_at(view, sites=sites), bent())
    settings = {"name": "bent-test", "params": {"rank": 2}, "sites": sites, "base": revision(stack.model)}
    return keep_adapters(plan, adapters, folder, **settings), view


@pytest.mark.parametrize("name", CAUSAL)
def test_a_plan_restores_the_adapters_of_the_view(name: str, tmp_path: Path) -> None:
    stack, given = Stack(nano(name)), nano_inputs(name)
    before = {each for each, _ in stack.model.named_parameters()}
    plan, view = trained(stack, tmp_path, ["layers.1", "layers.2.mlp"])
    (tmp_path / "there").mkdir()
    plan.write(tmp_path / "there" / "plan.json")
    again = Plan.read(tmp_path / "there" / "plan.json")
    assert again == plan and again.digest == plan.digest != Plan(model=plan.model).digest
    opened = lamella.apply(stack, again)
    expected = view(**given, use_cache=False).logits
    assert torch.equal(opened(**given, use_cache=False).logits, expected)
    assert not torch.allclose(expected, stack.model(**given, use_cache=False).logits, atol=1e-3)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(opened.generate(**given, **options), opened.generate(**given, **options, use_cache=False))
    assert {each for each, _ in stack.model.named_parameters()} == before
    assert "forward" not in vars(next(m for _, m in stack.model.named_modules() if isinstance(m, torch.nn.Linear)))


def test_an_adapter_is_added_to_its_linear_layer() -> None:
    linear, x = torch.nn.Linear(6, 4), torch.randn(2, 3, 6)
    view = torch.nn.ModuleDict({"map": linear})
    adapter = attach(view, ["map"], bent())["map"]
    expected = x @ linear.weight.T + linear.bias + torch.tanh(x @ adapter.a.T) @ adapter.b.T
    torch.testing.assert_close(view["map"](x), expected)
    assert [name for name, _ in view.named_parameters()] == [
        "map.weight", "map.bias", "map.lamella_adapter.a", "map.lamella_adapter.b"
    ]  # fmt: skip
    with pytest.raises(PlanError, match="has an adapter already"):
        attach(view, ["map"], bent())


def test_the_seed_decides_what_fresh_adapters_draw() -> None:
    def drawn(seed: int) -> Tensor:
        torch.rand(3)
        view = lamella.apply(Stack(nano("llama")), Plan(model=ModelReference.of(Stack(nano("llama")))))
        adapters = attach(view, linear_at(view, ["up_proj"]), bent(), seed=seed)
        return torch.cat([each.a.flatten() for each in adapters.values()])

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_it_learns_through_the_view_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    stack, given = Stack(nano("llama")), nano_inputs("llama")
    old = {name: each.clone() for name, each in stack.model.named_parameters()}
    _, view = trained(stack, tmp_path, ["layers.1"])
    with torch.enable_grad():
        view(**given, labels=given["input_ids"]).loss.backward()
    assert view.model.layers[1].mlp.up_proj.lamella_adapter.b.grad.abs().max() > 0
    assert all(torch.equal(each, old[name]) for name, each in stack.model.named_parameters())


# With the rest of a plan: the sites follow the cut, or it is refused.


def test_an_adapter_is_dropped_moved_and_repeated_with_its_layer(tmp_path: Path) -> None:
    stack, given = Stack(nano("llama")), nano_inputs("llama")
    adapts, view = trained(stack, tmp_path, ["layers.1", "layers.2"])
    dropped = compose(adapts, Plan(model=adapts.model, drop=["layers.2.attn"]))
    by_hand = lamella.apply(Stack(view), Plan(model=ModelReference.of(Stack(view)), drop=["layers.2.attn"]))
    assert torch.equal(lamella.apply(stack, dropped)(**given).logits, by_hand(**given).logits)
    order = PhasedPath(prefill=[0, 2, 1, 2, 3], decode=[0, 2, 1, 2, 3])
    moved = compose(adapts, Plan(model=adapts.model, path={"text": order}))
    hidden = stack.context(given)
    h: Any = hidden.h
    ours = Stack(view)
    for layer in order.prefill:
        for position in (Position(layer, "attn"), Position(layer, "mlp")):
            h = ours.run(h, position, ours.after(position), hidden)
    torch.testing.assert_close(lamella.apply(stack, moved)(**given).logits, stack.head(h), rtol=1e-5, atol=1e-5)


def test_an_adapter_runs_under_a_policy(tmp_path: Path) -> None:
    stack, given = Stack(nano("llama")), nano_inputs("llama")
    adapts, view = trained(stack, tmp_path, ["layers.1", "layers.3"])
    decides = Plan(model=adapts.model, path={"text": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 1, 3])})
    plan = compose(adapts, decides)
    expected = lamella.apply(Stack(view), Plan(model=ModelReference.of(Stack(view)), path=decides.path))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(lamella.apply(stack, plan).generate(**given, **options), expected.generate(**given, **options))
    routed = Plan(model=adapts.model, policies={"text": PolicyReference(name="void")})
    assert compose(adapts, routed).policies and compose(routed, adapts).adapters
    with pytest.raises(PlanError, match="it can be composed with adapters only"):
        compose(routed, decides)


def test_widths_are_followed_where_the_adapter_was_trained_under_them_and_refused_elsewhere(tmp_path: Path) -> None:
    stack, given = Stack(nano("llama")), nano_inputs("llama")
    narrow = Plan(model=ModelReference.of(stack), width={"layers.1.mlp.channels": list(range(40))})
    plan, view = trained(stack, tmp_path, ["layers.1.mlp"], narrow)
    assert torch.equal(lamella.apply(stack, plan)(**given).logits, view(**given).logits)
    whole, _ = trained(stack, tmp_path, ["layers.1.mlp"])
    with pytest.raises(PlanError, match=r"at model\.layers\.1\.mlp\.down_proj: 'a' is \[2, 64\] .* needs \[2, 40\]"):
        lamella.apply(stack, compose(whole, narrow))
    cost = lamella.cost(stack, plan)
    assert cost.parameters == lamella.cost(stack, narrow).parameters + 3 * 2 * (32 + 40)


def test_a_cache_of_the_plain_model_is_refused(tmp_path: Path) -> None:
    stack, given = Stack(nano("llama")), nano_inputs("llama")
    plan, _ = trained(stack, tmp_path, ["layers.2"])
    cache = DynamicCache()
    named = {stack.architecture.cache: cache}
    stack.model(**given, **named, use_cache=True)
    with pytest.raises(CacheError, match="filled without this plan"):
        lamella.apply(stack, plan)(given["input_ids"][:, :1], **named, use_cache=True)


def test_lora_can_be_added_to_a_linear_layer_with_an_adapter(tmp_path: Path) -> None:
    stack, given = Stack(nano("llama")), nano_inputs("llama")
    _, view = trained(stack, tmp_path, ["layers.1"])
    before = view(**given).logits
    add_lora(view, 2, targets=["up_proj"])
    assert torch.equal(view(**given).logits, before)  # its B is 0


def test_two_adapters_at_one_site_are_refused(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    one, _ = trained(stack, tmp_path, ["layers.1"])
    other, _ = trained(stack, tmp_path, ["layers.1.mlp"])
    apart, _ = trained(stack, tmp_path, ["layers.2"])
    with pytest.raises(PlanError, match=r"two of them are at 'layers\.1\.mlp'"):
        compose(one, other)
    assert len(compose(one, apart).adapters) == 2
    lamella.apply(stack, compose(one, apart))


# On disk


def test_it_cannot_be_merged_and_a_native_export_keeps_it(tmp_path: Path) -> None:
    stack, given = Stack(nano("llama")), nano_inputs("llama")
    plan, view = trained(stack, tmp_path, ["layers.1"])
    assert natural_form(plan, stack) == "native"
    for form in ("plain", "portable"):
        with pytest.raises(PlanError, match=f"^{form}: the adapter of bent-test cannot be merged into its linear"):
            export(stack, plan, tmp_path / form, form=form)
    stack.model.save_pretrained(tmp_path / "model")
    with pytest.raises(PlanError, match="load the model"):
        export_out_of_core(tmp_path / "model", plan, tmp_path / "copied")
    export(stack, plan, tmp_path / "out", form="native")
    assert torch.equal(lamella.load(tmp_path / "out").model(**given).logits, view(**given).logits)
    assert not [path for path in ("plain", "portable", "copied") if (tmp_path / path).exists()]


def changed(plan: Plan, folder: Path, **change: Any) -> Plan:
    """Return the plan with another reference, whose side file has the tensors returned by ``change``."""
    [reference] = plan.adapters
    edit = change.pop("tensors", None)
    if edit is not None:
        tensors = edit(load_file(reference.located))
        file, digest = sidefile.named(folder, "bent-test", tensors)
        change |= {"file": file, "sha256": digest}
    other = reference.model_copy(update=change)
    other._folder = folder
    return plan.model_copy(update={"adapters": [other]})


AT = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "0" * 16}, "has other weights than the model that it was trained with: give that revision"),
        ({"sha256": "0" * 64}, "its hash differs"),
        ({"file": "none.safetensors"}, "none.safetensors cannot be read"),
        ({"name": "finercut"}, "finercut is a method without adapters of its own"),
        ({"kind": "os"}, "kind is os, but there are: Bent"),
        ({"params": {"ranks": 2}}, "no parameter 'ranks'; its parameters are: rank, scale"),
        ({"params": {"rank": "2"}}, "make the plan again"),
        ({"params": {"rank": 99}}, "rank=99: the map is 64 to 32"),
        ({"params": {"rank": 3}}, "but this model needs [3, 64]"),
        ({"tensors": lambda t: t | {f"{AT}.a": t[f"{AT}.a"] * torch.nan}}, f"'{AT}.a' of"),
        ({"tensors": lambda t: t | {"model.layers.3.mlp.up_proj.a": t[f"{AT}.a"].clone()}}, "to no linear layer"),
        ({"tensors": lambda t: t | {"../../etc/passwd.a": t[f"{AT}.a"].clone()}}, "to no linear layer"),
        ({"tensors": lambda t: {n: e for n, e in t.items() if n != f"{AT}.a"}}, "'a' is None"),
        ({"tensors": lambda t: {}}, "is empty"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    stack = Stack(nano("llama"))
    plan, _ = trained(stack, tmp_path, ["layers.1"])
    with pytest.raises(PlanError) as error:
        lamella.apply(stack, changed(plan, tmp_path, **change))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_pickle_is_no_side_file(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    plan, _ = trained(stack, tmp_path, ["layers.1"])
    torch.save({f"{AT}.a": torch.zeros(2, 32)}, tmp_path / "adapter.bin")
    with pytest.raises(PlanError, match=r"adapter\.bin cannot be read"):
        lamella.apply(stack, changed(plan, tmp_path, file="adapter.bin"))
    for name in ("../out.safetensors", "/etc/passwd"):
        with pytest.raises(ValueError, match="not a plain file name"):
            AdapterReference(name="bent-test", sites=["layers.1"], file=name, sha256="0")


def test_site_adapters_are_for_methods_to_define() -> None:
    with pytest.raises(NotImplementedError):
        SiteAdapter(2, 2)(torch.zeros(1, 2), torch.zeros(1, 2))


def test_a_shared_view_shares_the_tensors_of_its_adapters(tmp_path: Path) -> None:
    _, view = trained(Stack(nano("llama")), tmp_path, ["layers.1"])
    again = share(view)
    ours, theirs = (each.model.layers[1].mlp.up_proj.lamella_adapter for each in (view, again))
    assert ours is not theirs and ours.a is theirs.a
