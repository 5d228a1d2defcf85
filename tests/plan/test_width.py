"""Width plans: exactly what the plan removes is cut from the tensors, in every supported family."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers.cache_utils import DynamicCache

import lamella
from lamella.errors import LamellaError, PlanError
from lamella.plan import (
    HeadWidth,
    HiddenWidth,
    ModelReference,
    PhasedPath,
    Plan,
    PlanSeries,
    Point,
    compose,
    materialise,
)
from lamella.plan.export import export, export_out_of_core, natural_form
from lamella.plan.width import Heads, counter
from lamella.stack import Stack
from lamella.stack.wiring import Sizes
from lamella.zoo.nano import nano

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "seed_oss", "gpt2"]
ROTARY = FAMILIES[:-1]
LAYERS, HEAD = 4, 8
IDS = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, :2] = 0
GIVEN = {"input_ids": IDS, "attention_mask": MASK}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str, **overrides: Any) -> Stack:
    stack = Stack(nano(name, **overrides))
    stack.model.generation_config.eos_token_id = None
    return stack


def shuffled(count: int, seed: int = 0) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def heads(stack: Stack, keep: list[int]) -> HeadWidth:
    """These query heads, each with the key-value head that it has always read."""
    group = 1 if stack.architecture.name == "gpt2" else 2
    return HeadWidth(keep=keep, kv_of=[head // group for head in keep])


def sizes(stack: Stack) -> Sizes:
    found = ModelReference.of(stack).sizes
    assert found is not None
    return found


def plan_of(stack: Stack, width: dict[str, Any], **more: Any) -> Plan:
    return Plan(model=ModelReference.of(stack), width=width, **more)


def uneven(stack: Stack) -> dict[str, Any]:
    """Return different heads and channels in every layer: odd groups, a missing group, one head, a whole layer."""
    width: dict[str, Any] = {
        "layers.0.attn.heads": heads(stack, [3, 0, 1]),
        "layers.1.attn.heads": heads(stack, [1, 0]),
    }
    width["layers.2.attn.heads"] = heads(stack, [2])
    for layer, count in ((0, 40), (1, 17), (3, 1)):
        width[f"layers.{layer}.mlp.channels"] = shuffled(sizes(stack).channels, layer)[:count]
    return width


def even(stack: Stack, hidden: int | None = None) -> dict[str, Any]:
    """Two heads and 40 channels in every layer, other ones in each, and some of the hidden channels."""
    width: dict[str, Any] = {} if hidden is None else {"hidden.channels": shuffled(32, 9)[:hidden]}
    for layer in range(LAYERS):
        width[f"layers.{layer}.attn.heads"] = heads(stack, [[3, 0], [0, 2], [1, 3], [2, 1]][layer])
        width[f"layers.{layer}.mlp.channels"] = shuffled(sizes(stack).channels, layer)[:40]
    return width


def down(layer: Any) -> Any:
    return layer.mlp.c_proj if hasattr(layer.mlp, "c_proj") else layer.mlp.down_proj


def out(layer: Any) -> Any:
    return layer.attn.c_proj if hasattr(layer, "attn") else layer.self_attn.o_proj


def silence(weight: Tensor, inputs: list[int], transposed: bool) -> None:
    """Make these inputs of a linear layer have no effect."""
    if transposed:
        weight[inputs] = 0
    else:
        weight[:, inputs] = 0


def masked(stack: Stack, width: dict[str, Any]) -> Stack:
    """Return a full-size copy in which everything that the plan removes is multiplied by zero: heads and channels."""
    model = copy.deepcopy(stack.model)
    transposed = stack.architecture.name == "gpt2"
    for number, layer in enumerate(Stack(model).layers):
        if f"layers.{number}.mlp.channels" in width:
            gone = set(range(sizes(stack).channels)) - set(width[f"layers.{number}.mlp.channels"])
            silence(down(layer).weight, sorted(gone), transposed)
        if f"layers.{number}.attn.heads" in width:
            gone = set(range(4)) - set(width[f"layers.{number}.attn.heads"].keep)
            entries = [entry for head in gone for entry in range(head * HEAD, (head + 1) * HEAD)]
            silence(out(layer).weight, entries, transposed)
    return Stack(model)


def real(logits: Tensor) -> Tensor:
    return logits[MASK.bool()]


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def exactly(norm: Any, h: Tensor) -> Tensor:
    """Compute an RMS norm without the models' intermediate cast to float32."""
    return norm.weight * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm.variance_epsilon)


@pytest.mark.parametrize("name", FAMILIES)
def test_reordering_every_axis_changes_nothing(name: str) -> None:
    stack = opened(name)
    stack.model.double()  # so that only a wrong order, not the order of summation, can be seen
    for module in stack.model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(exactly, module)
    width: dict[str, Any] = {"hidden.channels": HiddenWidth(keep=shuffled(32, 7))}
    for layer in range(LAYERS):
        width[f"layers.{layer}.attn.heads"] = heads(stack, shuffled(4, layer))
        width[f"layers.{layer}.mlp.channels"] = shuffled(sizes(stack).channels, layer)
    view = lamella.apply(stack, plan_of(stack, width))
    close(real(view(**GIVEN).logits), real(stack.model(**GIVEN).logits), atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("which", [even, uneven])
def test_a_narrow_view_equals_the_model_with_the_rest_masked(which: Any, name: str, implementation: str) -> None:
    stack = opened(name)
    stack.model.set_attn_implementation(implementation)
    width = which(stack)
    view, reference = lamella.apply(stack, plan_of(stack, width)), masked(stack, width).model
    close(real(view(**GIVEN).logits), real(reference(**GIVEN).logits))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_left_padded_batch_and_a_raw_continuation_use_the_narrow_cache(name: str) -> None:
    stack = opened(name)
    width = uneven(stack)
    view, reference = lamella.apply(stack, plan_of(stack, width)), masked(stack, width).model
    whole = view(**GIVEN).logits
    cache = DynamicCache(config=view.config)
    parts, begin = [], 0
    for end in (6, 7, 12):
        parts.append(view(input_ids=IDS[:, begin:end], attention_mask=MASK[:, :end], cache=cache).logits)
        begin = end
    close(real(torch.cat(parts, 1)), real(whole))
    kept = [2, 1, 1, 2] if name != "gpt2" else [3, 2, 1, 4]
    assert [layer.keys.shape[1] for layer in cache.layers] == kept
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(view.generate(**GIVEN, **settings), reference.generate(**GIVEN, **settings))


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_of_the_original_changes_and_what_is_not_cut_is_shared(name: str) -> None:
    stack = opened(name)
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in stack.model.state_dict().items()}
    config, logits = copy.deepcopy(stack.config.to_dict()), stack.model(**GIVEN).logits
    view = lamella.apply(stack, plan_of(stack, {"layers.1.mlp.channels": [3, 1, 2]}))
    view(**GIVEN)
    for key, tensor in stack.model.state_dict().items():
        assert tensor.data_ptr() == before[key][0] and torch.equal(tensor, before[key][1])
    assert stack.config.to_dict() == config and torch.equal(stack.model(**GIVEN).logits, logits)
    assert not any(module._forward_pre_hooks for module in stack.model.modules())
    own = {key for key, tensor in view.state_dict().items() if tensor.data_ptr() != before[key][0]}
    assert own and all(".1.mlp." in key for key in own)


def zeroed(name: str, gone: list[int]) -> Stack:
    """Return a model in which some hidden channels are zero everywhere."""
    stack = opened(name)
    stack.base.embed_tokens.weight[:, gone] = 0
    for layer in stack.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[gone] = 0
            if linear.bias is not None:
                linear.bias[gone] = 0
    return stack


@pytest.mark.parametrize("name", ROTARY)
def test_removing_zero_hidden_channels_reproduces_the_model_when_norms_are_rescaled(name: str) -> None:
    gone = [1, 4, 5, 17, 30, 31]
    stack, keep = zeroed(name, gone), [channel for channel in range(32) if channel not in gone]
    expected = real(stack.model(**GIVEN).logits)
    rescaled = plan_of(stack, {"hidden.channels": HiddenWidth(keep=keep, rescale=True)})
    close(real(lamella.apply(stack, rescaled)(**GIVEN).logits), expected)
    plain = real(lamella.apply(stack, plan_of(stack, {"hidden.channels": keep}))(**GIVEN).logits)
    assert (plain - expected).abs().max() > 1e-2  # the root mean square is over fewer channels


@pytest.mark.parametrize("name", ROTARY)
def test_a_smaller_hidden_size_equals_the_small_model_with_manually_sliced_weights(name: str) -> None:
    stack, keep = opened(name), shuffled(32, 3)[:20]
    view = lamella.apply(stack, plan_of(stack, {"hidden.channels": keep}))
    settings = stack.config.to_dict() | {"hidden_size": 20, "head_dim": HEAD}
    small = type(stack.model)(type(stack.config)(**settings)).eval()
    state = {}
    for key, tensor in stack.model.state_dict().items():
        if any(part in key for part in ("layernorm", "model.norm", "o_proj", "down_proj")):
            tensor = tensor[keep]
        elif tensor.ndim == 2:
            tensor = tensor[:, keep]
        state[key] = tensor
    small.load_state_dict(state)
    close(real(view(**GIVEN).logits), real(small(**GIVEN).logits), atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tied_embedding_is_cut_once(name: str) -> None:
    stack = opened(name, tie_word_embeddings=True)
    stack.model.tie_weights()
    view = Stack(lamella.apply(stack, plan_of(stack, {"hidden.channels": shuffled(32)[:24]})))
    embedding = view.base.get_submodule(view.architecture.embedding)
    assert view.unembedding.weight is embedding.weight and embedding.weight.shape == (128, 24)


def test_merging_adds_the_difference_of_a_head_that_goes_to_queries_alone_where_they_are_grouped() -> None:
    stack = opened("qwen2")
    width = HeadWidth(keep=[1, 2], kv_of=[0, 1], merge=[0, None])
    layer = Stack(lamella.apply(stack, plan_of(stack, {"layers.0.attn.heads": width}))).layers[0].self_attn
    old = stack.layers[0].self_attn
    for kind in ("weight", "bias"):
        before, after = getattr(old.q_proj, kind), getattr(layer.q_proj, kind)
        close(after[:HEAD], 2 * before[HEAD : 2 * HEAD] - before[:HEAD], atol=1e-6)
        assert torch.equal(after[HEAD:], before[2 * HEAD : 3 * HEAD])
    assert layer.k_proj.weight is old.k_proj.weight or torch.equal(layer.k_proj.weight, old.k_proj.weight)
    assert torch.equal(layer.o_proj.weight, old.o_proj.weight[:, HEAD : 3 * HEAD])


def test_merging_reaches_keys_and_values_where_every_query_head_has_its_own() -> None:
    stack = opened("gpt2")
    width = HeadWidth(keep=[1, 2], kv_of=[1, 2], merge=[0, None])
    after = Stack(lamella.apply(stack, plan_of(stack, {"layers.0.attn.heads": width}))).layers[0].attn.c_attn
    before = stack.layers[0].attn.c_attn
    for place in range(3):  # queries, keys, values: columns, since the linear maps of GPT-2 are transposed
        old = before.weight[:, 32 * place : 32 * place + 32]
        new = after.weight[:, 16 * place : 16 * place + 16]
        close(new[:, :HEAD], 2 * old[:, HEAD : 2 * HEAD] - old[:, :HEAD], atol=1e-6)
        assert torch.equal(new[:, HEAD:], old[:, 2 * HEAD : 3 * HEAD])


def test_dropped_layers_go_with_widths_and_a_path_too() -> None:
    stack = opened("llama")
    width = even(stack, hidden=24)
    whole = lamella.apply(stack, plan_of(stack, width))
    both = compose(plan_of(stack, width), Plan(model=ModelReference.of(stack), drop=["layers.2", "layers.0.mlp"]))
    narrow = Stack(whole)
    context = narrow.context(GIVEN)
    expected = narrow.head(narrow.run(context.h, 0, 4, context, skip=[(0, "mlp"), (2, "attn"), (2, "mlp")]))
    close(real(lamella.apply(stack, both)(**GIVEN).logits), real(expected))
    path = PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 3])
    view = lamella.apply(stack, plan_of(stack, uneven(stack), path={"text": path}))
    reference = lamella.apply(
        reference_stack := masked(stack, uneven(stack)),
        Plan(model=ModelReference.of(reference_stack), path={"text": path}),
    )
    lengths = torch.full((3,), 7)
    found = [lamella.parallel(each, IDS, lengths, MASK).logits for each in (view, reference)]
    close(real(found[0]), real(found[1]))
    out = view.generate(**GIVEN, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (3, 16)


@pytest.mark.parametrize("name", ROTARY)
def test_plain_transformers_loads_an_even_export_with_the_logits_of_the_view(name: str, tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    mixed = {"layer_types": types, "sliding_window": 4, "use_sliding_window": True} if "qwen" in name else {}
    stack = opened(name, **mixed)
    for number, drop in enumerate(([], ["layers.1"])):
        plan = plan_of(stack, even(stack, hidden=20), drop=drop)
        assert natural_form(plan) == "plain"
        view = lamella.apply(stack, plan)
        folder = export(stack, plan, tmp_path / str(number))
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        close(real(loaded.eval()(**GIVEN).logits), real(view(**GIVEN).logits))
        written = json.loads((folder / "config.json").read_text())
        sizes_in_config = [
            written[key] for key in ("hidden_size", "head_dim", "intermediate_size", "num_attention_heads")
        ]
        assert sizes_in_config == [20, HEAD, 40, 2] and written["num_hidden_layers"] == LAYERS - len(drop)
        assert not {"auto_map", "lamella"} & set(written)
        if mixed:
            assert written["layer_types"] == ([types[0], *types[2:]] if drop else types)
        own = materialise(stack, plan)
        close(real(own.model(**GIVEN).logits), real(view(**GIVEN).logits), atol=1e-6)
        assert own.config.hidden_size == 20 and len(own) == written["num_hidden_layers"]


def test_gpt2_exports_plain_if_its_heads_fill_the_hidden_size_and_native_otherwise(tmp_path: Path) -> None:
    stack = opened("gpt2")
    channels = {f"layers.{layer}.mlp.channels": shuffled(128, layer)[:50] for layer in range(LAYERS)}
    filled = even(stack, hidden=16)
    for number, width in enumerate((channels, filled)):
        plan = plan_of(stack, width, drop=["layers.0"])
        folder = export(stack, plan, tmp_path / str(number), form=natural_form(plan))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        assert type(loaded).__name__ == "GPT2LMHeadModel"
        close(real(loaded(**GIVEN).logits), real(lamella.apply(stack, plan)(**GIVEN).logits))
    plan = plan_of(stack, even(stack))
    assert natural_form(plan) == "native"
    with pytest.raises(
        PlanError, match=r"plain: the config of gpt2 models cannot express a head size.*use --form native"
    ):
        export(stack, plan, tmp_path / "refused")


@pytest.mark.parametrize(("name", "form"), [("llama", "native"), ("mistral", "plain"), ("qwen2", "plain")])
def test_a_hidden_size_not_divisible_by_heads_is_exported_as_the_config_allows(
    name: str, form: str, tmp_path: Path
) -> None:
    stack = opened(name)
    plan = plan_of(stack, {"hidden.channels": HiddenWidth(keep=list(range(stack.config.hidden_size - 1)))})
    assert natural_form(plan) == form
    if form == "native":
        why = "needs a hidden size that is a multiple of the query heads: 31 is not a multiple of 4"
        with pytest.raises(PlanError, match=why):
            export(stack, plan, tmp_path / "refused")
    folder = export(stack, plan, tmp_path / "out", form=form)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    close(real(loaded(**GIVEN).logits), real(lamella.apply(stack, plan)(**GIVEN).logits))


RUN = """
import sys, torch
from transformers import AutoModelForCausalLM
given, *folders = sys.argv[1:]
found = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        found[folder] = model(**torch.load(given)).logits
assert "lamella" not in sys.modules
torch.save(found, given + ".out")
"""


def test_the_sizes_of_uneven_layers_follow_the_layers(tmp_path: Path) -> None:
    stack = opened("llama")
    plan = plan_of(stack, uneven(stack), drop=["layers.0"])
    folder = export(stack, plan, tmp_path / "native", form="native")
    close(real(lamella.open(folder).model(**GIVEN).logits), real(lamella.apply(stack, plan)(**GIVEN).logits))


@pytest.mark.slow
def test_uneven_exports_run_in_transformers_alone(tmp_path: Path) -> None:
    views = {}
    for name in FAMILIES:
        stack = opened(name)
        width = uneven(stack) | {"hidden.channels": shuffled(32, 1)[:28]}
        if name in ROTARY:
            width["hidden.channels"] = HiddenWidth(keep=width["hidden.channels"], rescale=True)
        plan = plan_of(stack, width, drop=["layers.1", "layers.3.attn"])
        with pytest.raises(PlanError, match=r"plain: .*use --form (native|portable or native)"):
            export(stack, plan, tmp_path / "refused")
        folder = export(stack, plan, tmp_path / name, form=natural_form(plan))
        views[str(folder)] = lamella.apply(stack, plan)
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert stored < 0.8 * sum(4 * tensor.numel() for tensor in stack.model.parameters())
    given = tmp_path / "given.pt"
    torch.save(GIVEN, given)
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    child = subprocess.run(
        [sys.executable, "-c", RUN, given, *views], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr[-2000:]
    for folder, logits in torch.load(f"{given}.out").items():
        close(real(logits), real(views[folder](**GIVEN).logits))


@pytest.mark.parametrize("name", FAMILIES)
def test_cost_and_counter_agree_with_the_tensors_of_the_view(name: str) -> None:
    stack = opened(name, tie_word_embeddings=True)
    stack.model.tie_weights()
    width = uneven(stack) | {"hidden.channels": shuffled(32)[:20]}
    plan = plan_of(stack, width)
    view = lamella.apply(stack, plan)
    found = lamella.cost(stack, plan)
    assert found.parameters == sum(parameter.numel() for parameter in view.parameters())
    keys = sum([3, 2, 1, 4] if name == "gpt2" else [2, 1, 1, 2])
    assert found.kv_bytes_per_token == 2 * 4 * HEAD * keys
    queries, channels = [3, 2, 1, 4], [40, 17, sizes(stack).channels, 1]
    kv = [3, 2, 1, 4] if name == "gpt2" else [2, 1, 1, 2]
    by_layer = [Sizes(20, c, q, k, HEAD) for c, q, k in zip(channels, queries, kv, strict=True)]
    assert counter(stack.model, stack.layers, stack.architecture.wiring)(by_layer, 20) == found.parameters


def test_work_is_the_share_of_weights_that_is_left() -> None:
    stack = opened("llama")
    width = {"layers.0.mlp.channels": list(range(16)), "layers.1.attn.heads": heads(stack, [0, 1])}
    plan = plan_of(stack, width, drop=["layers.3.mlp"])
    assert plan.work == [(1.0, 0.25), (0.5, 1.0), (1.0, 1.0), (1.0, 0.0)]
    assert plan.removed == pytest.approx(0.75 + 0.5 + 1)
    halved = plan_of(stack, {"hidden.channels": list(range(16))})
    assert halved.work == [(0.5, 0.5)] * LAYERS and halved.skipped == frozenset()


def test_a_width_plan_survives_json_on_few_lines_and_is_part_of_the_digest() -> None:
    stack = opened("llama")
    plan = plan_of(stack, uneven(stack) | {"hidden.channels": HiddenWidth(keep=[2, 0, 1], rescale=True)})
    assert Plan.parse(plan.dump()) == plan and plan.dump().count("\n") < 100
    other = plan_of(stack, {"layers.0.mlp.channels": [0, 1]})
    assert len({plan.digest, other.digest, plan_of(stack, {}).digest}) == 3
    series = PlanSeries(model=plan.model, points=[Point(), Point(width=plan.width)])
    assert PlanSeries.parse(series.dump()) == series and series[1].widths == plan.widths


def test_heads_know_whether_their_grouping_is_the_ordinary_one() -> None:
    assert Heads([0, 1, 2, 3], [0, 0, 1, 1]).regular and Heads([2, 0], [1, 0]).regular and Heads([5], [2]).regular
    assert Heads([3, 2], [1, 1]).kv_keep == [1] and Heads([3, 2], [1, 1]).regular
    assert not Heads([0, 2, 1], [0, 1, 0]).regular and not Heads([0, 1, 2], [0, 0, 1]).regular
    assert Heads([3, 0, 1], [1, 0, 0]).new_kv_of == [0, 1, 1]


@pytest.mark.parametrize(
    ("width", "words"),
    [
        ({"layers.0.mlp.heads": [0]}, "'layers.0.mlp.heads' cannot be cut; write layers.7.mlp.channels"),
        ({"layers.4.mlp.channels": [0]}, "'layers.4.mlp.channels' is out of range: the stack has the layers 0 to 3"),
        ({"layers.0.mlp.channels": [0, 64]}, "64 is out of range; there are 0 to 63"),
        ({"hidden.channels": [0, 1, 0]}, "an index occurs twice"),
        ({"layers.0.attn.heads": [0, 1]}, "for heads an object with keep and kv_of"),
        ({"layers.0.mlp.channels": HiddenWidth(keep=[0])}, "write a list of indices"),
        ({"layers.0.attn.heads": HeadWidth(keep=[0, 1], kv_of=[0])}, "kv_of has 1 entries for 2 heads"),
        (
            {"layers.0.attn.heads": HeadWidth(keep=[0], kv_of=[2])},
            "a head is out of range; there are 4, and 2 for",
        ),
        ({"layers.0.attn.heads": HeadWidth(keep=[0], kv_of=[0], merge=[4])}, "a head is out of range"),
        ({"layers.0.mlp.channels": []}, "at least 1"),
    ],
)
def test_a_wrong_width_is_refused_in_one_line(width: dict[str, Any], words: str) -> None:
    model = ModelReference.of(opened("llama"))
    document = json.dumps(
        {"schema": "lamella.plan/2", "model": model.model_dump()}
        | {"width": {site: kept if isinstance(kept, list) else kept.model_dump() for site, kept in width.items()}}
    )
    with pytest.raises(PlanError) as error:
        Plan.parse(document)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_neox", "opt", "qwen3_moe", "olmoe", "vit"])
def test_a_family_that_cannot_be_cut_is_named(name: str) -> None:
    model = ModelReference.of(Stack(nano(name)))
    document = json.dumps({"schema": "lamella.plan/2", "model": model.model_dump(), "width": {"hidden.channels": [0]}})
    with pytest.raises(PlanError, match=rf"{model.family} models cannot be cut in width; known are llama, ") as error:
        Plan.parse(document)
    assert "\n" not in str(error.value)


def test_what_has_no_plain_meaning_is_refused_with_the_reason(tmp_path: Path) -> None:
    stack = opened("llama")
    plan = plan_of(stack, {"layers.0.mlp.channels": [0]})
    with pytest.raises(PlanError, match="both plans choose widths of the original"):
        compose(plan, plan)
    with pytest.raises(LamellaError, match="rescale cannot be exact"):
        Plan.parse(
            json.dumps(
                {"schema": "lamella.plan/2", "model": ModelReference.of(opened("gpt2")).model_dump()}
                | {"width": {"hidden.channels": {"keep": [0], "rescale": True}}}
            )
        )
    view = Stack(lamella.apply(stack, plan))
    assert ModelReference.of(view).sizes is None
    with pytest.raises(ValueError, match="has layers of different widths"):
        plan_of(view, {"layers.0.mlp.channels": [0]})
    with pytest.raises(PlanError, match="whole layers"):
        materialise(stack, plan_of(stack, {}, drop=["layers.0.mlp"]))
    stack.model.save_pretrained(tmp_path / "source")
    rescaled = plan_of(stack, {"hidden.channels": HiddenWidth(keep=[0, 1, 2, 3], rescale=True)})
    with pytest.raises(PlanError, match="changes weights"):
        export_out_of_core(tmp_path / "source", rescaled, tmp_path / "out")
    path = PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 1])
    with pytest.raises(PlanError, match="export the widths first"):
        export(stack, plan_of(stack, even(stack), path={"text": path}), tmp_path / "out", form="native")


@pytest.mark.parametrize("drop", [[], ["layers.1"]])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "untied", "headless"])
def test_out_of_core_and_in_memory_exports_are_bitwise_equal(name: str, drop: list[str], tmp_path: Path) -> None:
    stack = opened({"untied": "llama", "headless": "gpt2"}.get(name, name), tie_word_embeddings=name != "untied")
    model = stack.base if name == "headless" else stack.model  # whose tensors have shorter names
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source", max_shard_size="20KB")
    stack.model.to(torch.bfloat16)
    plan = plan_of(stack, even(stack, 16), drop=drop)  # GPT-2's config needs heads that fill the hidden size
    expected = export(stack, plan, tmp_path / "expected", form="plain")
    found = export_out_of_core(tmp_path / "source", plan, tmp_path / "out")
    ours, theirs = (
        {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
        for folder in (found, expected)
    )
    prefix = "transformer." if name == "headless" else ""
    assert {prefix + key for key in ours} == set(theirs)
    assert all(
        value.dtype == torch.bfloat16 and torch.equal(value, theirs[prefix + key]) for key, value in ours.items()
    )
    configs = [json.loads((folder / "config.json").read_text()) for folder in (found, expected)]
    differ = {key for key in configs[0].keys() | configs[1].keys() if configs[0].get(key) != configs[1].get(key)}
    assert differ <= {"dtype", "architectures", "max_window_layers"}  # the last is redundant with layer_types
    assert transformers.AutoModelForCausalLM.from_pretrained(found)(**GIVEN).logits.isfinite().all()
