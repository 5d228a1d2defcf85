"""One suite for every method in the registry: what each must have and do, whoever wrote it."""

from __future__ import annotations

import copy
import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import lamella
from lamella.data import Pairs, Questions, Records, Triple
from lamella.errors import LamellaError, MethodError
from lamella.files import Work
from lamella.measure import Asked, Question
from lamella.methods.irepair import Utility
from lamella.plan import ModelReference, Plan, PlanSeries
from lamella.registry import Method, Purpose, get_method, methods
from lamella.results import Edit
from lamella.runtime import apply, parallel
from lamella.stack import ARCHITECTURES, Stack
from lamella.train import Healed, blocks
from lamella.zoo.nano import NANO, nano

ROOT = Path(__file__).parent.parent.parent
METHODS = methods()
OURS = [slug for slug, entry in METHODS.items() if entry.module.startswith("lamella.")]  # not those of plugins
PLANNING = [slug for slug, entry in METHODS.items() if entry.result == "PlanSeries"]
TRAINING = [slug for slug, entry in METHODS.items() if entry.result == "Healed"]
EDITING = [slug for slug, entry in METHODS.items() if entry.result in ("Edit", "Plan")]
POLICIES = [slug for slug in PLANNING if METHODS[slug].purpose == "skip"]
CAUSAL = [name for name in NANO if name != "vit"]
DIFFERENT = ("llama", "gpt_neox", "gemma3_text")  # one after the other, side by side, and between two norms


def by_default(*given: Any) -> Any:
    """Parameters with a name of a model at their end: all but the three different ones run in `make test-all` alone."""
    return pytest.param(*given, marks=() if given[-1] in DIFFERENT else pytest.mark.exhaustive)


FAMILY = {name: Stack(nano(name)).architecture.name for name in NANO}
ON_CAUSAL = [(slug, name) for slug in PLANNING for name in CAUSAL if METHODS[slug].takes(FAMILY[name], True)]
CALIBRATION = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
IDS = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(0))
RETAIN = blocks(torch.randint(3, 128, (8, 12), generator=torch.Generator().manual_seed(3)), loss_on="all")
SAMPLES = blocks(torch.randint(3, 128, (10, 12), generator=torch.Generator().manual_seed(2)), loss_on="all")
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, :2] = 0


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def opened(name: str) -> Stack:
    stack = Stack(nano(name))
    if stack.architecture.causal:
        stack.model.generation_config.eos_token_id = None
    return stack


def planned(slug: str, stack: Stack, **options: Any) -> PlanSeries:
    return lamella.make_plan(slug, stack, CALIBRATION, **METHODS[slug].brief | options)


def trained(slug: str, stack: Stack, **options: Any) -> Healed:
    with torch.enable_grad():
        return METHODS[slug](stack, SAMPLES, **{"steps": 3} | options)


def edited(slug: str, stack: Stack, name: str = "llama", **options: Any) -> Plan:
    """What an edit makes of what it needs, and of options where it has them."""
    entry = METHODS[slug]
    rows = [row.roll(shift) for shift in (0, 3) for row in IDS]
    triples = [
        Triple(row[:4], row[4 : 8 + n % 3].flip(0), row[4 : 8 + n % 3].flip(0) + 1) for n, row in enumerate(rows)
    ]
    questions = [Question(f"question {x}", ("a", "b", "c")) for x in range(4)]
    prompts = [row[mask.bool()].tolist() for row, mask in zip(IDS[[0, 1, 2, 2]], MASK[[0, 1, 2, 2]], strict=True)]
    inputs = {
        "base": Stack(nano(name, 1)),
        "questions": Questions(Asked.of(questions, prompts, [[[10], [11, 12], [13]]] * 4)),
        "forget": Records(SAMPLES),
        "retain": Records(RETAIN),
        "rows": Pairs(triples),
        "utility": Utility(),
    }
    given = {need: inputs[need] for need in entry.inputs if need in inputs}
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # a random model has its oddities
        made = entry(stack, **given, **METHODS[slug].brief | options)
    return made.plan if isinstance(made, Edit) else made


def kept_in(slug: str, folder: Path) -> dict[str, Any]:
    """Where an edit keeps its tensors."""
    return {METHODS[slug].signature.work: Work(folder)}


def weights(stack: Stack) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in stack.model.named_parameters()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("slug", METHODS)
def test_metadata_is_complete(slug: str) -> None:
    entry = METHODS[slug]
    assert entry.slug == slug and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
    assert entry.title.strip() == entry.title != ""
    assert entry.purpose in get_args(Purpose) and all(entry.inputs.values()) and entry.result
    assert entry.on in ("decoder", "any") or set(entry.on) <= set(ARCHITECTURES)
    assert entry.paper is None or re.fullmatch(r"\d{4}\.\d{4,5}", entry.paper)
    assert set(entry.brief) <= set(entry.options)


@pytest.mark.parametrize("slug", METHODS)
def test_the_first_line_of_the_docstring_says_what_it_does(slug: str) -> None:
    summary = METHODS[slug].summary
    assert summary.endswith(".") and 20 <= len(summary) <= 120
    module = inspect.getmodule(METHODS[slug].call).__doc__ or ""
    if METHODS[slug].paper:
        assert METHODS[slug].paper in module


@pytest.mark.parametrize("slug", METHODS)
def test_options_are_given_by_name_have_defaults_and_are_documented(slug: str) -> None:
    entry = METHODS[slug]
    parameters = inspect.signature(entry.call).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(entry.inputs) != []
    assert ("Stack" in entry.inputs.values()) <= (entry.inputs[positional[0]] == "Stack")  # the model comes first
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters.values())
    for name, option in entry.options.items():
        assert option.default is not inspect.Parameter.empty and (option.hint is not Any or name == "tokenizer"), name
        assert name == "seed" or option.help, name


@pytest.mark.parametrize("slug", OURS)
def test_it_has_a_page_and_a_module_of_its_own(slug: str) -> None:
    assert (ROOT / "docs" / "methods" / f"{slug}.md").is_file()
    assert METHODS[slug].module.startswith("lamella.methods.")


@pytest.mark.parametrize("slug", [slug for slug in OURS if not METHODS[slug].baseline])
def test_it_has_a_reproduction(slug: str) -> None:
    assert (ROOT / "reproductions" / f"{slug.replace('-', '_')}.py").is_file()


@pytest.mark.parametrize("slug", METHODS)
def test_an_unknown_option_is_refused_with_the_known_ones(slug: str) -> None:
    with pytest.raises(MethodError, match=f"{slug} has no option 'nonsense'; its options are: ") as error:
        METHODS[slug](opened("llama"), nonsense=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("slug", PLANNING)
def test_inputs_are_not_mutated(slug: str) -> None:
    stack, calibration = opened("llama"), CALIBRATION.clone()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in stack.model.state_dict().items()}
    config = copy.deepcopy(stack.model.config.to_dict())
    attributes = {name: sorted(module.__dict__) for name, module in stack.model.named_modules()}
    logits = stack.model(IDS).logits
    lamella.make_plan(slug, stack, calibration)
    assert torch.equal(calibration, CALIBRATION)
    for name, tensor in stack.model.state_dict().items():
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1])
    assert stack.model.config.to_dict() == config
    assert {name: sorted(module.__dict__) for name, module in stack.model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stack.model.modules())
    assert torch.equal(stack.model(IDS).logits, logits)


@pytest.mark.parametrize("slug", PLANNING)
def test_the_same_seed_gives_the_same_result(slug: str) -> None:
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # what is drawn elsewhere must not matter
        runs.append(planned(slug, opened("llama")).dump())
    assert runs[0] == runs[1]
    if "seed" in METHODS[slug].options:
        assert planned(slug, opened("llama"), seed=1).dump() != runs[0]


@pytest.mark.parametrize("slug", PLANNING)
def test_a_series_survives_json_and_names_its_method_and_model(slug: str) -> None:
    stack = opened("llama")
    series = planned(slug, stack)
    assert isinstance(series, PlanSeries) and PlanSeries.parse(series.dump()) == series
    assert series.provenance["method"] == slug
    assert series.model == ModelReference.of(stack)
    if METHODS[slug].text:
        assert series.provenance["inputs"][METHODS[slug].text]["shape"] == list(CALIBRATION.shape)


@pytest.mark.parametrize("slug", PLANNING)
def test_the_series_runs_from_the_whole_model_to_smaller_ones(slug: str) -> None:
    plans = list(planned(slug, opened("llama")))
    sizes = [plan.masked if METHODS[slug].dense else plan.removed for plan in plans]
    assert sizes[0] == 0 and len(sizes) > 1
    assert sizes == sorted(set(sizes)) and plans[-1].removed < 8
    assert not METHODS[slug].dense or not any(plan.removed for plan in plans)


@pytest.mark.parametrize(("slug", "name"), [by_default(slug, name) for slug, name in ON_CAUSAL])
def test_the_first_point_is_the_identity_to_the_bit(slug: str, name: str) -> None:
    stack = opened(name)
    view = apply(stack, planned(slug, stack)[0])
    given = {"input_ids": IDS, "attention_mask": MASK}
    assert torch.equal(view(**given).logits, stack.model(**given).logits)


@pytest.mark.parametrize(("slug", "name"), [by_default(slug, name) for slug, name in ON_CAUSAL])
def test_every_family_works_from_plan_to_generation(slug: str, name: str) -> None:
    stack = opened(name)
    series = planned(slug, stack)
    for plan in (series[1], series[-1]):
        view = apply(stack, plan)
        for rows in (slice(0, 1), slice(None)):  # a batch of one, and a ragged one
            given = {"input_ids": IDS[rows], "attention_mask": MASK[rows]}
            out = view.generate(
                **given, max_new_tokens=4, do_sample=False, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            assert out.sequences.shape == (len(IDS[rows]), 16)
            assert all(torch.isfinite(step).all() for step in out.logits)
    assert torch.isfinite(parallel(apply(stack, series[-1]), IDS, torch.full((3,), 6), MASK).logits[MASK.bool()]).all()


@pytest.mark.parametrize("slug", [slug for slug in PLANNING if METHODS[slug].on == "decoder"])
def test_a_model_that_is_no_decoder_is_refused_in_one_line(slug: str) -> None:
    with pytest.raises(LamellaError, match=f"{slug} works on decoders") as error:
        planned(slug, opened("vit"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("slug", "name"),
    [(slug, name) for slug in PLANNING for name in NANO if isinstance(METHODS[slug].on, tuple)
     and not METHODS[slug].takes(FAMILY[name], name != "vit")],
)  # fmt: skip
def test_a_family_that_a_method_does_not_name_is_refused_by_name_in_one_line(slug: str, name: str) -> None:
    with pytest.raises(LamellaError, match=rf"{slug} works on .*; .* is a {FAMILY[name]}$") as error:
        planned(slug, opened(name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("slug", [slug for slug in PLANNING if METHODS[slug].text])
def test_missing_and_too_little_calibration_is_refused_in_one_line(slug: str) -> None:
    stack = opened("llama")
    with pytest.raises(MethodError, match=f"{slug} needs calibration"):
        lamella.make_plan(slug, stack)
    for tokens in (CALIBRATION[:0], CALIBRATION[:, :1]):
        with pytest.raises(LamellaError, match="give more text") as error:
            lamella.make_plan(slug, stack, tokens)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [by_default(name) for name in CAUSAL])
@pytest.mark.parametrize("slug", POLICIES)
def test_step_equals_parallel_through_generate_and_raw_continuation(slug: str, name: str) -> None:
    stack = opened(name)
    series = planned(slug, stack)
    real = MASK.bool()
    for plan in list(series)[1:]:
        view = apply(stack, plan)
        whole = parallel(view, IDS, torch.full((3,), 8), MASK).logits
        parts, cache, begin = [], None, 0
        for end in (8, 9, 11, 12):
            out = view(input_ids=IDS[:, begin:end], attention_mask=MASK[:, :end], cache=cache, use_cache=True)
            parts.append(out.logits)
            cache, begin = out.cache, end
        assert (torch.cat(parts, 1) - whole)[real].abs().max() <= 1e-4

        prompt = {"input_ids": IDS[:, :8], "attention_mask": MASK[:, :8]}
        out = view.generate(
            **prompt,
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        mask = torch.cat([MASK[:, :8], torch.ones_like(out.sequences[:, 8:])], dim=1)
        positions: Tensor = (mask.cumsum(-1) - 1).clamp(min=0)
        whole = parallel(view, out.sequences, torch.full((3,), 8), mask, position_ids=positions).logits
        assert (torch.stack(out.logits, 1) - whole[:, 7:-1]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", [by_default(name) for name in CAUSAL])
@pytest.mark.parametrize("slug", EDITING)
def test_an_edit_leaves_the_model_as_it_is_and_is_undone_with_its_view(slug: str, name: str, tmp_path: Path) -> None:
    stack = opened(name)
    before, config, logits = weights(stack), copy.deepcopy(stack.config.to_dict()), stack.model(IDS).logits
    samples = [{key: each.clone() for key, each in sample.items()} for sample in SAMPLES]
    plan = edited(slug, stack, name, **kept_in(slug, tmp_path))
    assert plan.provenance["method"] == slug and plan.model == ModelReference.of(stack)
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    view = apply(stack, plan)
    out = view.generate(IDS, attention_mask=MASK, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert out.shape == (3, 14) and torch.equal(view(IDS).logits, logits) == (not plan.weights)
    assert torch.isfinite(view(IDS, attention_mask=MASK).logits).all()
    del view
    assert equal(weights(stack), before) and stack.config.to_dict() == config
    assert all(each.grad is None and each.requires_grad for each in stack.model.parameters())
    assert torch.equal(stack.model(IDS).logits, logits)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(SAMPLES, samples, strict=True) for key in a)


@pytest.mark.parametrize("slug", EDITING)
def test_an_edit_from_the_same_seed_is_the_same(slug: str, tmp_path: Path) -> None:
    plans = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        kept = kept_in(slug, tmp_path / str(noise))
        plans.append(edited(slug, opened("gpt2"), "gpt2", **kept).dump())  # with dropout
    assert plans[0] == plans[1]


@pytest.mark.parametrize("slug", [slug for slug in EDITING if METHODS[slug].on == "decoder"])
def test_editing_something_that_is_no_decoder_is_refused_in_one_line(slug: str) -> None:
    with pytest.raises(LamellaError, match=f"{slug} works on decoders") as error:
        edited(slug, opened("vit"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("slug", TRAINING)
def test_training_leaves_its_inputs_as_they_are(slug: str) -> None:
    stack = opened("llama")
    before, config = weights(stack), copy.deepcopy(stack.model.config.to_dict())
    samples = [{name: each.clone() for name, each in sample.items()} for sample in SAMPLES]
    modes = [module.training for module in stack.model.modules()]
    healed = trained(slug, stack)
    assert equal(weights(stack), before) and stack.model.config.to_dict() == config
    assert [module.training for module in stack.model.modules()] == modes
    assert all(each.grad is None and each.requires_grad for each in stack.model.parameters())
    assert all(torch.equal(a[name], b[name]) for a, b in zip(SAMPLES, samples, strict=True) for name in a)
    assert not equal(weights(healed.stack), before)


@pytest.mark.parametrize("slug", TRAINING)
def test_training_from_the_same_seed_gives_the_same_weights(slug: str) -> None:
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        runs.append(weights(trained(slug, opened("gpt2")).stack))  # with dropout
    assert equal(*runs)
    assert not equal(weights(trained(slug, opened("gpt2"), seed=1).stack), runs[0])


@pytest.mark.parametrize("slug", TRAINING)
def test_interrupted_training_goes_on_to_the_bit(slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(slug, opened("gpt2"), steps=5, save_every=2, work=Work(tmp_path / "whole"))

    def stop_in_step_4(callback: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("transformers.TrainerCallback.on_optimizer_step", stop_in_step_4)
        with pytest.raises(KeyboardInterrupt):
            trained(slug, opened("gpt2"), steps=5, save_every=2, work=Work(tmp_path / "cut"))
    assert list((tmp_path / "cut").rglob("checkpoint-2"))
    torch.rand(3)  # what is drawn in between must not matter
    again = trained(slug, opened("gpt2"), steps=5, save_every=2, work=Work(tmp_path / "cut"))
    assert equal(weights(again.stack), weights(whole.stack)) and again.log == whole.log


@pytest.mark.parametrize("name", [by_default(name) for name in CAUSAL])
@pytest.mark.parametrize("slug", TRAINING)
def test_every_family_trains_and_then_runs(slug: str, name: str) -> None:
    stack = opened(name)
    healed = trained(slug, stack)
    assert not equal(weights(healed.stack), weights(stack))
    view = apply(healed.stack, healed.plan)
    out = view.generate(IDS, attention_mask=MASK, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert out.shape == (3, 14)
    assert torch.isfinite(view(IDS, attention_mask=MASK).logits).all()


@pytest.mark.parametrize("slug", [slug for slug in TRAINING if METHODS[slug].on == "decoder"])
def test_training_something_that_is_no_decoder_is_refused_in_one_line(slug: str) -> None:
    with pytest.raises(LamellaError, match=f"{slug} works on decoders") as error:
        trained(slug, opened("vit"))
    assert "\n" not in str(error.value)


def test_an_unknown_method_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(MethodError, match="unknown method 'finrcut'; did you mean finercut") as error:
        get_method("finrcut")
    assert "\n" not in str(error.value)
    with pytest.raises(MethodError, match="unknown method 'zzzzzz'"):
        get_method("zzzzzz")


def test_the_registry_is_sorted_and_holds_the_methods_of_this_version() -> None:
    assert list(METHODS) == sorted(METHODS)
    assert {"finercut", "unified-skip", "shortgpt", "window", "sleb", "random"} <= set(METHODS)
    assert {slug for slug, entry in METHODS.items() if entry.baseline} == {"shortgpt", "window", "sleb", "random"}


PLUGIN = '''"""Of a plugin: a method from outside."""

from lamella.registry import command, method
from lamella.stack import Stack


@method("of-a-plugin", purpose="measure", on="any", brief={"much": 1})
def of_a_plugin(stack: Stack, *, much: int = 3) -> int:
    """Do nothing at all, but from outside."""
    return much


@command("of-a-plugin", "twice")
def twice(stack: Stack, *, much: int = 3) -> int:
    """Do the same, twice as much, from outside too."""
    return 2 * much
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a package with a method of its own as pip would: its module, and the entry point in its metadata."""

    def install(slug: str = "of-a-plugin", source: str = PLUGIN) -> None:
        (tmp_path / "from_outside.py").write_text(source)
        metadata = tmp_path / "from_outside-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: from-outside\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[lamella.methods]\n{slug} = from_outside\n")

    monkeypatch.syspath_prepend(tmp_path)
    return install


def test_a_plugin_s_methods_are_found_through_entry_points(plugin: Callable[..., None]) -> None:
    plugin()
    assert "of-a-plugin" in methods() and "from_outside" not in sys.modules  # read, not imported
    found = get_method("of-a-plugin")
    assert isinstance(found, Method) and found.summary == "Do nothing at all, but from outside."
    assert (found.inputs, found.result, found.purpose) == ({"stack": "Stack"}, "int", "measure")
    assert found(opened("llama"), much=2) == 2 and get_method("of-a-plugin", "twice")(opened("llama"), much=2) == 4
    with pytest.raises(MethodError, match="has no command 'thrice'; it has: twice"):
        get_method("of-a-plugin", "thrice")
    with pytest.raises(MethodError, match="returns a int and makes no plan"):
        lamella.make_plan("of-a-plugin", opened("llama"))
    del sys.modules["from_outside"]


@pytest.mark.parametrize(
    ("slug", "source", "said"),
    [
        ("finercut", PLUGIN, "two packages have the method 'finercut'"),
        ("another", PLUGIN, "declares no method 'another'"),
        ("of-a-plugin", PLUGIN.replace('on="any"', "on=any()"), "must be literals"),
        ("of-a-plugin", PLUGIN.replace('on="any"', 'off="any"'), "no 'off'"),
    ],
)
def test_a_plugin_that_declares_what_cannot_be_is_refused_in_one_line(
    plugin: Callable[..., None], slug: str, source: str, said: str
) -> None:
    plugin(slug, source)
    with pytest.raises(MethodError, match=said) as error:
        methods()
    assert "\n" not in str(error.value)


def test_listing_the_methods_imports_neither_them_nor_torch() -> None:
    code = "import sys, lamella.registry as r; r.methods(); print({name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'torch'" not in done.stdout and "'lamella'" in done.stdout


def test_warnings_of_a_plain_run_are_none() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for slug in PLANNING:
            planned(slug, opened("llama"))
        for slug in TRAINING:
            trained(slug, opened("llama"))
