"""Plans that mask weights: their files, the view's own tensors, and exports as ordinary checkpoints."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lamella
from lamella.errors import PlanError
from lamella.plan import (
    Factors,
    ModelReference,
    PhasedPath,
    Plan,
    PlanSeries,
    Point,
    apply_factors,
    apply_masks,
    apply_tensors,
    compose,
    mask_edit,
    masks_of,
    parameters_at,
    read_factors,
    read_masks,
    replace_edit,
    restore_edit,
    scale_edit,
    touched,
    write_masks,
)
from lamella.plan.export import export, export_out_of_core, natural_form
from lamella.stack import Stack, matrices
from lamella.zoo.nano import NANO, nano

CAUSAL = [name for name in NANO if name != "vit"]
NANO_LLAMA = Path(__file__).parent.parent / "models" / "nano-llama"
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def drawn(model: nn.Module, seed: int = 0, keep: float = 0.6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(m.of(model).shape, generator=generator) < keep for n, m in matrices(model).items()}


def masked_plan(stack: Stack, folder: Path, seed: int = 0, **rest: Any) -> Plan:
    edit = mask_edit(stack, drawn(stack.model, seed), folder)
    return Plan(model=ModelReference.of(stack), weights=[edit], **rest)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def by_hand(name: str, *masks: dict[str, Tensor], **overrides: Any) -> Any:
    """The nano model with its weights multiplied by masks, in place."""
    model = nano(name, **overrides)
    for each in masks:
        for parameter, keep in each.items():
            model.get_parameter(parameter).mul_(keep)
    return model


def test_masks_survive_their_file_one_bit_a_weight(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = {f"m{k}": torch.rand(shape, generator=generator) > 0.5 for k, shape in enumerate([(3, 5), (1,), (4, 2, 3)])}
    digest = write_masks(masks, tmp_path / "a.safetensors")
    again = read_masks(tmp_path / "a.safetensors", digest)
    assert again.keys() == masks.keys() and all(torch.equal(again[name], keep) for name, keep in masks.items())
    large = {"w": torch.ones(1000, 1000, dtype=torch.bool)}
    write_masks(large, tmp_path / "large.safetensors")
    assert 125_000 <= (tmp_path / "large.safetensors").stat().st_size < 126_000


def test_the_same_masks_always_make_the_same_file(tmp_path: Path) -> None:
    """Plans name the file by its hash; the order of several metadata keys would differ from one write to the next."""
    masks = {name: torch.arange(9) > 4 for name in "cab"}
    assert len({write_masks(masks, tmp_path / "m.safetensors") for _ in range(20)}) == 1


@pytest.mark.parametrize("name", CAUSAL)
def test_a_view_computes_with_masked_weights_and_shares_all_the_others(name: str, tmp_path: Path) -> None:
    stack = Stack(nano(name))
    before = {key: value.clone() for key, value in stack.model.state_dict().items()}
    plan = masked_plan(stack, tmp_path)
    view = lamella.apply(stack, plan)
    assert torch.equal(logits(view), logits(by_hand(name, drawn(stack.model))))
    assert all(torch.equal(value, before[key]) for key, value in stack.model.state_dict().items())
    masked = masks_of(plan)
    for key, parameter in view.named_parameters():
        theirs = stack.model.get_parameter(key)
        assert (parameter is theirs) == (key not in masked)
        assert parameter.requires_grad == theirs.requires_grad
    assert plan.masked == sum(int((~keep).sum()) for keep in masked.values())
    assert all(not view.get_parameter(key)[~keep].any() for key, keep in masked.items())


def test_a_vision_transformer_of_the_family_table_takes_a_plan_too(tmp_path: Path) -> None:
    stack, pixels = Stack(nano("vit")), torch.randn(2, 3, 16, 16)
    plan = masked_plan(stack, tmp_path)
    with torch.no_grad():
        ours, theirs = lamella.apply(stack, plan)(pixels).logits, by_hand("vit", drawn(stack.model))(pixels).logits
    assert torch.equal(ours, theirs)


def test_any_module_is_masked_on_a_copy_that_shares_the_rest() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    keep = torch.arange(24).view(3, 8) % 3 > 0
    copy = apply_masks(model, {"3.weight": keep})
    assert torch.equal(copy[3].weight, model[3].weight * keep)
    assert copy[0].weight is model[0].weight and copy[3].bias is model[3].bias
    assert copy[1].running_mean is model[1].running_mean and (model[3].weight != 0).all()


def test_a_plan_and_a_series_survive_json_with_their_files(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    (tmp_path / "made").mkdir()
    plan = masked_plan(stack, tmp_path / "made")
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    assert again == plan == Plan.parse(plan.dump()) and again.digest == plan.digest
    assert masks_of(again).keys() == masks_of(plan).keys() and (tmp_path / plan.weights[0].file).is_file()
    series = PlanSeries(model=plan.model, points=[Point(), Point(weights=plan.weights, scores={"sparsity": 0.4})])
    (tmp_path / "series").mkdir()
    series.write(tmp_path / "series" / "series.json")
    read = PlanSeries.read(tmp_path / "series" / "series.json")
    assert read == series and [point.masked for point in read] == [0, plan.masked]
    assert torch.equal(logits(lamella.apply(stack, read[1])), logits(lamella.apply(stack, plan)))


def test_the_digest_sees_the_masks(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    plans = [masked_plan(stack, tmp_path, seed) for seed in (0, 1)]
    assert len({Plan(model=plans[0].model).digest, *(plan.digest for plan in plans)}) == 3
    assert masked_plan(stack, tmp_path).digest == plans[0].digest


def test_sites_name_the_sublayers_that_masks_touch(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    masks = drawn(stack.model)

    def sites(*parts: str) -> list[str]:
        return mask_edit(stack, {n: k for n, k in masks.items() if any(p in n for p in parts)}, tmp_path).sites

    assert sites("layers.1.self_attn.q_proj") == ["layers.1.attn"]
    assert sites("layers.1", "layers.3.mlp.up") == ["layers.1", "layers.3.mlp"]
    assert sites("lm_head", "layers.0.mlp.down") == ["layers.0.mlp", "head"]
    assert mask_edit(stack, masks, tmp_path).sites == [f"layers.{layer}" for layer in range(4)] + ["head"]


def test_masks_compose_with_masks_cuts_and_paths(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    first, second = masked_plan(stack, tmp_path, 0), masked_plan(stack, tmp_path, 1)
    both = by_hand("llama", drawn(stack.model, 0), drawn(stack.model, 1))
    assert torch.equal(logits(lamella.apply(stack, compose(first, second))), logits(both))
    for other in (
        Plan(model=first.model, drop=["layers.1.mlp", "layers.2"]),
        Plan(model=first.model, path={"text": PhasedPath(prefill=[0, 2, 2, 3], decode=[0, 2, 2, 3])}),
    ):
        plan = compose(first, other)
        masked = Stack(by_hand("llama", drawn(stack.model, 0)))
        expected = lamella.apply(masked, other.model_copy(update={"model": ModelReference.of(masked)}))
        assert torch.equal(logits(lamella.apply(stack, plan)), logits(expected))


def test_masks_hold_where_a_plan_decides_by_phase_and_where_a_policy_does(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    masked = Stack(by_hand("llama", drawn(stack.model)))
    path = {"text": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 3])}
    plans = [
        (masked_plan(stack, tmp_path, path=path), Plan(model=ModelReference.of(masked), path=path)),
    ]
    policy = lamella.make_plan("ffn-skip", stack, IDS)[-1]
    plans.append((masked_plan(stack, tmp_path, policies=policy.policies), policy))
    for ours, theirs in plans:
        out = [
            view.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
            for view in (lamella.apply(stack, ours), lamella.apply(masked, theirs))
        ]
        assert torch.equal(*out)


def test_a_plain_export_is_an_ordinary_checkpoint_with_zeros(tmp_path: Path) -> None:
    stack = lamella.open(NANO_LLAMA)
    plan = masked_plan(stack, tmp_path)
    assert natural_form(plan) == "plain"
    export(stack, plan, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(exported), logits(lamella.apply(stack, plan)))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert Plan.read(tmp_path / "out" / "plan.json") == plan
    assert f"{plan.masked} of its weights are zero" in (tmp_path / "out" / "README.md").read_text()
    cut = compose(plan, Plan(model=plan.model, drop=["layers.1"]))
    export(stack, cut, tmp_path / "cut")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert torch.equal(logits(exported), logits(lamella.apply(stack, cut)))
    with pytest.raises(PlanError, match="changes weights") as error:
        export_out_of_core(NANO_LLAMA, plan, tmp_path / "never")
    assert "\n" not in str(error.value) and not (tmp_path / "never").exists()


def test_a_phased_plan_with_masks_exports_natively(tmp_path: Path) -> None:
    stack = lamella.open(NANO_LLAMA)
    plan = masked_plan(stack, tmp_path, path={"text": PhasedPath(prefill=[0, 1, 2, 3, 4, 5], decode=[0, 2, 5])})
    export(stack, plan, tmp_path / "out", form="native")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the weights are not the whole model's any more
        loaded = lamella.load(tmp_path / "out").model
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(loaded.generate(IDS, **settings), lamella.apply(stack, plan).generate(IDS, **settings))


def test_an_invalid_edit_is_refused_in_one_line(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    plan = masked_plan(stack, tmp_path)
    good = json.loads(plan.dump())

    def refused(message: str, **changes: Any) -> None:
        text = json.dumps(good | {"weights": [good["weights"][0] | changes]})
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(PlanError, match=message) as error:
            lamella.apply(stack, Plan.read(tmp_path / "plan.json"))
        assert "\n" not in str(error.value)

    refused(r"weights\.0\.op", op="shuffle")
    refused("layers.4", sites=["layers.4.mlp"])
    refused("write layers.7", sites=["embeddings"])
    refused(r"weights\.0\.sites", sites=[])
    refused(r"weights\.0\.zeros", zeros=-1)
    refused(r"weights\.0\.more: Extra inputs", more=1)
    refused("cannot be read", file="none.safetensors")
    refused("hash differs", sha256="0" * 64)
    (tmp_path / "text.safetensors").write_text("text")
    refused("cannot be read", file="text.safetensors")

    def with_file(masks: dict[str, Tensor] | None) -> None:
        if masks is None:
            save_file({"x": torch.zeros(1)}, str(tmp_path / "w.safetensors"))
            refused("not a file of masks", file="w.safetensors", sha256=_sha(tmp_path / "w.safetensors"))
            return
        digest = write_masks(masks, tmp_path / "w.safetensors")
        refused(r"masks: ", file="w.safetensors", sha256=digest)

    with_file(None)
    with_file({"model.layers.9.mlp.up_proj.weight": torch.ones(3, 3, dtype=torch.bool)})
    with_file({"model.layers.1.mlp.up_proj.weight": torch.ones(3, 3, dtype=torch.bool)})
    with_file({"model.norm.weight": torch.ones(32, dtype=torch.bool)})


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_series_of_masks_is_not_picked_by_a_ratio_of_sublayers(tmp_path: Path) -> None:
    plan = masked_plan(Stack(nano("llama")), tmp_path)
    series = PlanSeries(model=plan.model, points=[Point(), Point(weights=plan.weights)], provenance={"method": "mine"})
    with pytest.raises(PlanError, match="mine masks weights and removes no sublayers") as error:
        series.at_ratio(0.5)
    assert "\n" not in str(error.value)


# Factors, tensors, and the weights of another checkpoint.


def factors(model: nn.Module, seed: int = 0) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in model.named_parameters():
        where = torch.rand(parameter.shape, generator=generator) < 0.3
        found[name] = Factors(where, torch.rand(int(where.sum()), generator=generator))
    return found


def scaled_by_hand(model: Any, changes: dict[str, Factors]) -> Any:
    with torch.no_grad():
        for name, each in changes.items():
            parameter = model.get_parameter(name)
            for place, factor in zip(each.where.nonzero().tolist(), each.values.tolist(), strict=True):
                parameter[tuple(place)] *= factor
    return model


@pytest.mark.parametrize("name", NANO)
def test_factors_survive_their_file_and_reach_every_parameter(name: str, tmp_path: Path) -> None:
    stack = Stack(nano(name))
    before = {key: value.clone() for key, value in stack.model.state_dict().items()}
    some = {key: each for index, (key, each) in enumerate(factors(stack.model).items()) if index % 4 == 0}
    edit = scale_edit(stack, some, tmp_path)
    again = read_factors(edit.located, edit.sha256)
    assert again.keys() == some.keys()
    assert all(torch.equal(again[key].where, each.where) for key, each in some.items())
    assert all(torch.equal(again[key].values, each.values) for key, each in some.items())
    view = lamella.apply(stack, Plan(model=ModelReference.of(stack), weights=[edit]))
    expected = scaled_by_hand(nano(name), some)
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in view.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in stack.model.state_dict().items())
    assert all((p is stack.model.get_parameter(key)) == (key not in some) for key, p in view.named_parameters())


def test_a_tied_weight_is_scaled_once_and_stays_tied() -> None:
    model = nano("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    changes = {"model.embed_tokens.weight": factors(model)["model.embed_tokens.weight"]}
    copy = apply_factors(model, changes)
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    expected = scaled_by_hand(nano("llama", tie_word_embeddings=True), changes)
    assert torch.equal(copy.lm_head.weight, expected.lm_head.weight)


def test_factors_below_one_never_grow_a_weight_nor_turn_it_in_low_precision() -> None:
    model = nano("llama").bfloat16()
    copy = apply_factors(model, factors(model))
    for name, weight in copy.named_parameters():
        original = model.get_parameter(name)
        assert weight.dtype == torch.bfloat16
        assert (weight.abs() <= original.abs()).all() and (weight * original >= 0).all()


def test_the_sites_of_parameters_and_the_parameters_of_sites_agree() -> None:
    for name in NANO:
        stack = Stack(nano(name))
        everything = [key for key, _ in stack.model.named_parameters()]
        sites = touched(stack, everything)
        assert set(parameters_at(stack, sites)) == set(everything)
        assert {"embed", "layers.3"} <= set(sites) and ("norm" in sites) == (name != "opt_post_norm")
    stack = Stack(nano("llama"))
    assert touched(stack, ["model.norm.weight", "lm_head.weight"]) == ["norm", "head"]
    assert parameters_at(stack, ["norm"]) == ["model.norm.weight"]
    attention = parameters_at(stack, ["layers.2.attn"])
    assert attention and all(key.startswith("model.layers.2.") and "mlp" not in key for key in attention)


def saved_pair(folder: Path) -> tuple[Stack, Stack]:
    for seed, name in enumerate(("post", "pre")):
        nano("llama", seed).save_pretrained(folder / name)
    return lamella.open(folder / "post"), lamella.open(folder / "pre")


def hybrid_by_hand(layers: set[int]) -> Any:
    """The nano model with layers of the one of another seed."""
    model, other = nano("llama", 0), nano("llama", 1)
    for layer in layers:
        model.model.layers[layer].load_state_dict(other.model.layers[layer].state_dict())
    return model


@pytest.mark.parametrize("on_disk", [True, False])
def test_layers_are_restored_from_another_checkpoint(on_disk: bool, tmp_path: Path) -> None:
    post, pre = saved_pair(tmp_path)
    base = pre if on_disk else Stack(nano("llama", 1))
    edit = restore_edit(post, base, ["layers.1", "layers.2"], tmp_path)
    assert edit.sites == ["layers.1", "layers.2"] and edit.located.is_dir() == on_disk
    plan = Plan(model=ModelReference.of(post), weights=[edit])
    plan.write(tmp_path / "plan.json")
    plan = Plan.read(tmp_path / "plan.json")
    assert torch.equal(logits(lamella.apply(post, plan)), logits(hybrid_by_hand({1, 2})))
    assert torch.equal(logits(post.model), logits(nano("llama", 0)))
    export(post, plan, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(exported), logits(hybrid_by_hand({1, 2})))
    twice = compose(plan, plan)
    assert torch.equal(logits(lamella.apply(post, twice)), logits(hybrid_by_hand({1, 2})))
    if on_disk:
        cut = compose(plan, Plan(model=plan.model, drop=["layers.0"]))
        export_out_of_core(tmp_path / "post", cut, tmp_path / "cut")
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
        assert torch.equal(logits(exported), logits(lamella.apply(post, cut)))
    else:
        with pytest.raises(PlanError, match="changes weights"):
            export_out_of_core(tmp_path / "post", plan, tmp_path / "never")


def test_a_base_that_changed_or_went_away_is_refused(tmp_path: Path) -> None:
    post, pre = saved_pair(tmp_path)
    plan = Plan(model=ModelReference.of(post), weights=[restore_edit(post, pre, ["layers.1"], tmp_path)])
    nano("llama", 2).save_pretrained(tmp_path / "pre")
    for act in (lambda: lamella.apply(post, plan), lambda: export_out_of_core(tmp_path / "post", plan, tmp_path / "x")):
        with pytest.raises(PlanError, match="has other weights") as error:
            act()
        assert "\n" not in str(error.value) and not (tmp_path / "x").exists()
    (tmp_path / "pre" / "model.safetensors").unlink()
    with pytest.raises(PlanError, match="cannot be used"):
        lamella.apply(post, plan)
    with pytest.raises(PlanError, match="no parameters"):
        restore_edit(post, pre, [], tmp_path)


def test_tensors_are_replaced_in_a_view_and_in_its_export(tmp_path: Path) -> None:
    stack, other = lamella.open(NANO_LLAMA), lamella.open(NANO_LLAMA)
    name = "model.layers.2.mlp.up_proj.weight"
    changed = {name: other.model.get_parameter(name) * 0.5, "model.norm.weight": other.model.model.norm.weight + 0.1}
    edit = replace_edit(stack, changed, tmp_path)
    assert edit.sites == ["layers.2.mlp", "norm"]
    plan = Plan(model=ModelReference.of(stack), weights=[edit])
    with torch.no_grad():
        for key, tensor in changed.items():
            other.model.get_parameter(key).copy_(tensor)
    assert torch.equal(logits(lamella.apply(stack, plan)), logits(other.model))
    export(stack, plan, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(exported), logits(other.model), rtol=0, atol=1e-5)
    with pytest.raises(PlanError, match="no parameter 'nothing'"):
        apply_tensors(stack.model, {"nothing": torch.zeros(1)})
    with pytest.raises(PlanError, match=r"is \[1\], but the parameter"):
        apply_tensors(stack.model, {name: torch.zeros(1)})


def test_a_plan_that_travels_scales_the_weights_once(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    weight = stack.model.get_parameter("model.layers.1.mlp.up_proj.weight")
    factors = {
        "model.layers.1.mlp.up_proj.weight": Factors(
            torch.ones_like(weight, dtype=torch.bool), torch.full((weight.numel(),), 0.5)
        )
    }
    path = {"text": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 1])}
    plan = Plan(model=ModelReference.of(stack), path=path, weights=[scale_edit(stack, factors, tmp_path)])
    export(stack, plan, tmp_path / "out", form="native")
    lengths = torch.full((IDS.shape[0],), 4)
    expected, found = (
        lamella.parallel(view, IDS, lengths).logits
        for view in (lamella.apply(stack, plan), lamella.load(tmp_path / "out").model)
    )
    assert torch.equal(found, expected)
