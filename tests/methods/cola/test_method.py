"""Tests of CoLa: execution of paths, the search as in the paper, and controls with every result."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.errors import CalibrationError, CheckpointError, LamellaError, MethodError
from lamella.methods.cola import (
    OPS,
    PathAnswerer,
    PathPredictor,
    PathSearchResult,
    PathSettings,
    PathStudy,
    Problem,
    ProblemStudy,
    Segment,
    compile_path,
    decode,
    edits,
    find_paths,
    layer_scores,
    parse,
    plain,
    rates,
    read_samples,
    repeat,
    report,
    same,
    search_paths,
    skip,
    study_sample,
    targets,
    train_predictor,
)
from lamella.methods.cola.page import describe_path
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.registry import get_method
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.workers import Workers
from lamella.zoo import open_stack, open_tokenizer
from lamella.zoo.nano import nano

NANO = File(__file__).parents[2] / "models" / "nano-llama"
IDS = torch.randint(3, 128, (3, 14), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, :2] = 0
POSITIONS = (MASK.cumsum(1) - 1).clamp(min=0)
PROMPT = 9
LOOPED = (0, 1, 2, 1, 2, 3, 3)
SMALL = PathSettings(simulations=12, tokens=3)
SAMPLES = [
    Problem("choice", "The list is a", " b", (" a", " b", " c")),
    Problem("two", "A class is", " a", (" a", " b")),
    Problem("open", "def f(x): return", " x", wrong=(" y", " z")),
]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def stack() -> Stack:
    return open_stack(NANO)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return open_tokenizer(NANO)


def opened(name: str, **overrides: Any) -> Stack:
    return Stack(nano(name, **overrides))


def view(stack: Stack, path: tuple[int, ...]) -> Any:
    phases = PhasedPath(prefill=list(path), decode=list(path))
    return apply(stack, Plan(model=ModelReference.of(stack), path={"text": phases}))


# Paths


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_the_identity_path_is_the_model(name: str) -> None:
    stack = opened(name)
    logits = view(stack, (0, 1, 2, 3))(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(logits, stack.model(IDS, attention_mask=MASK).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layers"), [("llama", "model.layers."), ("gpt2", "transformer.h."), ("qwen2", "model.layers.")]
)
def test_a_skipping_path_is_a_model_rebuilt_from_the_kept_layers(name: str, layers: str) -> None:
    stack = opened(name)
    kept = (0, 2, 3)
    small = nano(name, seed=5, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 3})
    weights = stack.model.state_dict()

    def source(key: str) -> str:
        if not key.startswith(layers):
            return key
        index, rest = key.removeprefix(layers).split(".", 1)
        return f"{layers}{kept[int(index)]}.{rest}"

    small.load_state_dict({key: weights[source(key)] for key in small.state_dict()})
    torch.testing.assert_close(view(stack, kept)(IDS).logits, small(IDS).logits, rtol=0, atol=1e-5)


def uncached(view: Any) -> Tensor:
    return view(IDS, attention_mask=MASK, position_ids=POSITIONS, use_cache=False).logits[:, PROMPT:]


def cached(view: Any) -> Tensor:
    """The tokens behind the prompt one by one, on the left-padded ragged batch [batch, time - PROMPT, vocabulary]."""
    steps, cache, begin = [], None, 0
    for end in range(PROMPT, IDS.shape[1] + 1):
        given = {"attention_mask": MASK[:, :end], "position_ids": POSITIONS[:, begin:end]}
        out = view(IDS[:, begin:end], **given, cache=cache, use_cache=True)
        steps.append(out.logits)
        cache, begin = out.cache, end
    return torch.cat(steps[1:], dim=1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_cached_decoding_of_a_looped_path_is_the_uncached_forward_on_a_left_padded_batch(name: str) -> None:
    looped = view(opened(name), LOOPED)
    assert (cached(looped) - uncached(looped)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_a_cache_with_one_slot_per_layer_fails_that_test(name: str) -> None:
    looped = view(opened(name), LOOPED)
    slots = iter(LOOPED)
    for module in looped.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "config"):  # the attentions, in the order of execution
            module.layer_idx = next(slots)
    assert next(slots, None) is None
    with pytest.raises(RuntimeError, match=rf"tensor a \({2 * PROMPT}\) must match the size of tensor b \({PROMPT}\)"):
        cached(looped)  # the second execution finds the keys of the first one, for which there is no mask


def test_one_slot_per_layer_gives_other_logits_where_no_mask_stops_it() -> None:
    stack = opened("llama")
    looped = view(stack, LOOPED)
    whole = looped(IDS, use_cache=False).logits[:, -1]
    for module, slot in zip(looped.model.layers, LOOPED, strict=True):
        module.self_attn.layer_idx = slot
    cache = None
    for token in IDS.T:
        context = {"attention_mask": None}  # single tokens of an unpadded batch need no mask
        out = looped(token[:, None], **context, cache=cache, use_cache=True)
        cache = out.cache
    assert (out.logits[:, -1] - whole).abs().max() > 1e-2
    assert cache.layers[1].keys.shape[-2] == 2 * IDS.shape[1]  # twice the tokens that there are


# Edits


def test_edits_leave_out_or_run_again_a_block_in_place() -> None:
    assert skip((0, 1, 2, 3, 4), 1, 3) == (0, 4)
    assert repeat((0, 1, 2, 3, 4), 1, 2) == (0, 1, 2, 1, 2, 3, 4)
    assert repeat((0, 1, 2), 2, 1, times=3) == (0, 1, 2, 2, 2, 2)


def test_the_root_has_212_edits_at_28_layers_and_other_nodes_only_single_ones() -> None:
    root = tuple(range(28))
    settings = PathSettings(length=(16, 32))
    at_root = edits(root, True, layers=28, settings=settings)
    assert len(at_root) == len(set(at_root)) == 212  # 2 * (28 + 27 + 26 + 25)
    inner = edits(root, False, layers=28, settings=settings)
    assert sorted({len(path) for path in inner}) == [27, 29] and len(inner) == 56


def test_edits_keep_to_the_bounds_and_run_no_layer_more_than_twice() -> None:
    settings = PathSettings()
    assert settings.bounds(30) == (18, 36) and settings.bounds(28) == (17, 33)
    root = tuple(range(5))  # 3 to 6 layers
    assert {len(path) for path in edits(root, True, layers=5, settings=settings)} == {3, 4, 6}
    twice = (0, 1, 1, 2, 3)
    assert (0, 1, 1, 1, 2, 3) not in edits(twice, False, layers=5, settings=settings)
    thrice = edits(twice, False, layers=5, settings=PathSettings(most_visits=3))
    assert (0, 1, 1, 1, 2, 3) in thrice
    assert (0, 1, 2, 3) in edits(twice, False, layers=5, settings=settings)


def test_protected_layers_are_neither_skipped_nor_repeated() -> None:
    found = edits(tuple(range(10)), True, layers=10, settings=PathSettings(protect=(2, 1)))
    assert found
    for path in found:
        counts = Counter(path)
        assert counts[0] == counts[1] == counts[9] == 1


def test_actions_and_times_say_which_edits_there_are() -> None:
    root = tuple(range(10))
    skips = edits(root, True, layers=10, settings=PathSettings(), actions=("skip",))
    repeats = edits(root, True, layers=10, settings=PathSettings(), actions=("repeat",))
    assert all(len(path) < 10 for path in skips) and all(len(path) > 10 for path in repeats)
    assert {*skips, *repeats} == set(edits(root, True, layers=10, settings=PathSettings()))
    wide = PathSettings(times=(1, 2), most_visits=3)
    assert repeat(root, 4, 1, 2) in edits(root, False, layers=10, settings=wide)


@pytest.mark.parametrize("wrong", [{"length": (7, 9)}, {"length": (2, 5)}, {"protect": (3, 3)}])
def test_settings_that_do_not_fit_the_model_are_refused(stack: Stack, tokenizer: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=r"^cola: "):
        search_paths(stack, SAMPLES, tokenizer=tokenizer, settings=PathSettings(**wrong))


# Problems and answers


def test_answers_are_compared_without_case_spaces_and_what_follows_the_first_line() -> None:
    assert plain("  Paris.\nIt is") == "paris" and plain("") == ""
    assert same(" 12\nQ:", "12") and same("B", " b") and not same("12", "13") and not same("", "")


def test_a_choice_is_the_likeliest_option_of_the_next_token(stack: Stack, tokenizer: Any) -> None:
    sample = SAMPLES[0]
    answerer = PathAnswerer(stack, tokenizer, sample)
    for path in [tuple(range(6)), (0, 1, 3, 4, 5), (0, 1, 1, 2, 3, 4, 5)]:
        logits = view(stack, path)(tokenizer(sample.prompt, return_tensors="pt")["input_ids"]).logits[0, -1]
        first = [tokenizer.encode(option, add_special_tokens=False)[0] for option in sample.options]
        assert answerer(path) == sample.options[int(logits[first].argmax())]


def test_an_open_answer_is_what_generate_writes_up_to_the_end_of_the_line(stack: Stack, tokenizer: Any) -> None:
    sample = SAMPLES[2]
    answerer = PathAnswerer(stack, tokenizer, sample, tokens=6)
    ids = tokenizer(sample.prompt, return_tensors="pt")
    for path in [tuple(range(6)), (0, 1, 3, 4, 5), (0, 1, 1, 2, 3, 4, 5)]:
        generated = view(stack, path).generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answerer(path) == tokenizer.decode(generated, skip_special_tokens=True).split("\n")[0]


def test_an_output_that_is_not_finite_is_no_answer(tokenizer: Any) -> None:
    broken = open_stack(NANO)
    broken.model.model.norm.weight.data.fill_(float("nan"))
    assert PathAnswerer(broken, tokenizer, SAMPLES[0])((0, 1)) == ""


def test_samples_are_read_from_lines(tmp_path: File) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text('{"prompt": "1 + 1 =", "answer": 2, "wrong": [3]}\n\n{"id": 7, "prompt": "p", "answer": "A", '
                    '"options": ["A", "B"]}\n')  # fmt: skip
    first, second = read_samples(file)
    assert first == Problem("1", "1 + 1 =", "2", wrong=("3",)) and second == Problem("7", "p", "A", ("A", "B"))
    assert first.wrong_targets == ["3"] and second.wrong_targets == ["B"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is not JSON .*; write"),
        ("[1]", "line 1: write"),
        ('{"prompt": "p"}', "line 1: write"),
        ('{"prompt": "p", "answer": "a", "nonsense": 1}', "line 1: write"),
        ('{"prompt": "", "answer": "a"}', "must not be empty"),
        ('{"prompt": "p", "answer": "C", "options": ["A", "B"]}', "none of its options"),
        ('{"id": 1, "prompt": "p", "answer": "a"}\n' * 2, "2 samples have the id '1'"),
        ("", "no samples"),
    ],
)
def test_a_bad_file_of_samples_is_refused_in_one_line(tmp_path: File, text: str, message: str) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(text)
    with pytest.raises(CalibrationError, match=message) as error:
        read_samples(file)
    assert "\n" not in str(error.value)
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_samples(tmp_path / "nothing.jsonl")


def test_options_that_one_token_cannot_tell_apart_are_refused(stack: Stack, tokenizer: Any) -> None:
    token = tokenizer.decode([tokenizer.encode(" the", add_special_tokens=False)[0]])
    with pytest.raises(CalibrationError, match="begin with the same token"):
        PathAnswerer(stack, tokenizer, Problem("x", "p", f"{token}q", (f"{token}q", f"{token}z")))


# The search


def test_prefix_sharing_changes_no_result_and_executes_at_most_half(stack: Stack, tokenizer: Any) -> None:
    sample, layers = SAMPLES[0], 12
    deep = Stack(nano("llama", num_hidden_layers=layers, vocab_size=512))
    plainly, sharing = (PathAnswerer(deep, tokenizer, sample) for _ in range(2))
    plainly.tree.budget = 0
    for target in sample.options:
        plain_outcome, shared = (
            find_paths(answerer, target, layers, PathSettings(simulations=60)) for answerer in (plainly, sharing)
        )
        assert plain_outcome == shared
    assert plainly.answers == sharing.answers
    assert plainly.tree.executed == plainly.tree.unshared == sum(map(len, plainly.answers))
    assert plainly.unshared == sharing.unshared  # what three searches would run that share nothing
    assert sharing.tree.executed <= sharing.unshared / 2


def test_the_tree_is_deep_its_paths_unique_within_bounds_and_the_same_for_a_seed() -> None:
    layers = 30

    def answerer(path: tuple[int, ...]) -> str:
        return "yes" if sum(path) % 3 == 0 else "no"

    one, two, other = (
        find_paths(answerer, "yes", layers, PathSettings(simulations=60, seed=seed)) for seed in (42, 42, 43)
    )
    assert one == two != other
    paths = [*one.valid, *one.invalid]
    assert len(set(paths)) == len(paths) == one.evaluations and one.depth > 3
    assert all(18 <= len(path) <= 36 and max(Counter(path).values()) <= 2 for path in paths)
    assert all(answerer(path) == "yes" for path in one.valid) and all(answerer(path) == "no" for path in one.invalid)
    assert one.best is not None and len(one.best) == min(map(len, one.valid))


@pytest.fixture(scope="module")
def study(stack: Stack, tokenizer: Any) -> PathStudy:
    return search_paths(stack, SAMPLES, tokenizer=tokenizer, settings=SMALL)


def test_every_search_comes_with_its_controls(study: PathStudy) -> None:
    assert [each.sample for each in study.samples] == SAMPLES
    for each in study.samples:
        assert list(each.searches) == ["tree", "random", "skip", "repeat"]
        assert [outcome.target for outcome in each.wrong] == each.sample.wrong_targets
        assert all(outcome.target == each.sample.answer for outcome in each.searches.values())
        assert each.searches["random"].evaluations == each.searches["tree"].evaluations
        for path in (*each.searches["skip"].valid, *each.searches["skip"].invalid):
            assert max(Counter(path).values()) == 1
        for path in (*each.searches["repeat"].valid, *each.searches["repeat"].invalid):
            assert set(path) == set(range(6))
        assert 0 < each.executed < each.unshared


def test_a_study_is_the_same_twice_and_survives_json(stack: Stack, tokenizer: Any, study: PathStudy) -> None:
    torch.manual_seed(7)
    again = search_paths(stack, SAMPLES, tokenizer=tokenizer, settings=SMALL)
    assert again == study
    document = json.loads(json.dumps(study.as_dict()))
    first = document["samples"][0]["searches"]["tree"]
    outcome = study.samples[0].searches["tree"]
    assert first["valid"] == [list(path) for path in outcome.valid]
    assert first["invalid"] == [list(path) for path in outcome.invalid]
    assert document["settings"]["penalty"] == 5.0


def test_a_plan_carried_out_gives_the_answer_that_it_was_found_for(
    stack: Stack, tokenizer: Any, study: PathStudy
) -> None:
    plans = study.plans()
    assert "two" in plans
    for each in study.samples:
        best = each.searches["tree"].best
        assert (each.sample.id in plans) == (best is not None)
        if best is None or not each.sample.options:
            continue
        plan = Plan.parse(plans[each.sample.id].dump())
        assert [run.layer for run in plan.runs("decode")] == [run.layer for run in plan.runs("prefill")] == list(best)
        assert plan.provenance["method"] == "cola" and plan.provenance["chosen_by"] == "the answer"
        ids = tokenizer(each.sample.prompt, return_tensors="pt")["input_ids"]
        logits = apply(stack, plan)(ids).logits[0, -1]
        first = [tokenizer.encode(option, add_special_tokens=False)[0] for option in each.sample.options]
        assert each.sample.options[int(logits[first].argmax())] == each.sample.answer


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_it_works_on_other_families(name: str, tokenizer: Any) -> None:
    other = opened(name, vocab_size=512)
    study = search_paths(other, SAMPLES, tokenizer=tokenizer, settings=SMALL)
    for each in study.samples:
        for path in each.searches["tree"].valid:
            assert same(PathAnswerer(other, tokenizer, each.sample, SMALL.tokens)(path), each.sample.answer)


def test_an_interrupted_study_goes_on_from_its_journal_with_the_same_result(
    stack: Stack, tokenizer: Any, study: PathStudy, tmp_path: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "answers.jsonl"
    real, calls = PathAnswerer._choose, 0

    def killed(self: PathAnswerer, path: tuple[int, ...]) -> str:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise KeyboardInterrupt
        return real(self, path)

    monkeypatch.setattr(PathAnswerer, "_choose", killed)
    with pytest.raises(KeyboardInterrupt):
        search_paths(stack, SAMPLES, tokenizer=tokenizer, settings=SMALL, journal=journal)
    monkeypatch.undo()
    assert len(journal.read_text().splitlines()) == 9
    journal.write_text(journal.read_text()[:-4])  # and the last line was torn
    resumed = search_paths(stack, SAMPLES, tokenizer=tokenizer, settings=SMALL, journal=journal)
    assert resumed == study and report(resumed) == report(study)
    assert resumed.samples[0].executed < study.samples[0].executed
    complete = search_paths(stack, SAMPLES, tokenizer=tokenizer, settings=SMALL, journal=journal)
    assert complete == study and all(each.executed == 0 for each in complete.samples)


@pytest.mark.parametrize("changed", ["weights", "prompt", "tokens", "id"])
def test_a_journal_s_answers_are_not_taken_for_anything_else(tokenizer: Any, tmp_path: File, changed: str) -> None:
    journal = tmp_path / "answers.jsonl"
    sample, settings, model = SAMPLES[2], SMALL, open_stack(NANO)
    search_paths(model, [sample], tokenizer=tokenizer, settings=settings, journal=journal)
    if changed == "weights":
        model.model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    if changed == "prompt":
        sample = Problem(sample.id, "def g(x): return", sample.answer, wrong=sample.wrong)
    if changed == "id":
        sample = Problem("another", sample.prompt, sample.answer, wrong=sample.wrong)
    if changed == "tokens":
        settings = PathSettings(simulations=12, tokens=2)
    again = search_paths(model, [sample], tokenizer=tokenizer, settings=settings, journal=journal)
    assert again == search_paths(model, [sample], tokenizer=tokenizer, settings=settings)
    assert again.samples[0].executed > 0


def test_other_searches_over_the_same_samples_do_share_answers(stack: Stack, tokenizer: Any, tmp_path: File) -> None:
    journal = tmp_path / "answers.jsonl"
    search_paths(stack, SAMPLES[:1], tokenizer=tokenizer, settings=SMALL, journal=journal)
    free = PathSettings(simulations=12, tokens=3, penalty=0.0, seed=42)
    shared = search_paths(stack, SAMPLES[:1], tokenizer=tokenizer, settings=free, journal=journal)
    alone = search_paths(stack, SAMPLES[:1], tokenizer=tokenizer, settings=free)
    assert shared == alone and shared.samples[0].executed < alone.samples[0].executed


def test_what_it_cannot_search_is_refused_in_one_line(stack: Stack, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="no samples"):
        search_paths(stack, [], tokenizer=tokenizer)
    with pytest.raises(CalibrationError, match="2 samples have the id 'choice'"):
        search_paths(stack, SAMPLES[:1] * 2, tokenizer=tokenizer)
    with pytest.raises(MethodError, match="cola works on decoders"):
        search_paths(opened("vit"), SAMPLES, tokenizer=tokenizer)
    with pytest.raises(MethodError, match="without a plan"):
        search_paths(Stack(view(stack, (0, 2, 3))), SAMPLES, tokenizer=tokenizer)


def test_a_cluster_without_ray_is_refused_with_what_to_install(
    stack: Stack, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(LamellaError, match=r"needs ray: pip install 'lamella\[cluster\]'"):
        search_paths(stack, SAMPLES, tokenizer=tokenizer, workers=Workers(cluster="ray", address="local"))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_ray_cluster_gives_the_result_of_one_process(
    stack: Stack, tokenizer: Any, study: PathStudy, tmp_path: File
) -> None:
    journal = tmp_path / "answers.jsonl"
    spread = search_paths(
        stack,
        SAMPLES,
        tokenizer=tokenizer,
        settings=SMALL,
        journal=journal,
        workers=Workers(cluster="ray", address="local"),
    )
    assert spread == study
    assert [each.executed for each in spread.samples] == [each.executed for each in study.samples]
    here = search_paths(
        stack, SAMPLES, tokenizer=tokenizer, settings=SMALL, journal=journal
    )  # the journal came back too
    assert here == study and all(each.executed == 0 for each in here.samples)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_several_processes_give_the_result_of_one(
    stack: Stack, tokenizer: Any, study: PathStudy, tmp_path: File
) -> None:
    journal = tmp_path / "answers.jsonl"
    several = search_paths(
        stack, SAMPLES, tokenizer=tokenizer, settings=SMALL, journal=journal, workers=Workers(processes=2)
    )
    assert several == study
    again = search_paths(stack, SAMPLES, tokenizer=tokenizer, settings=SMALL, journal=journal)
    assert again == study and all(each.executed == 0 for each in again.samples)


@pytest.mark.slow
def test_an_address_where_no_cluster_is_is_refused_in_one_line(stack: Stack, tokenizer: Any) -> None:
    with pytest.raises(LamellaError, match="no Ray cluster at 'auto'") as error:
        search_paths(stack, SAMPLES, tokenizer=tokenizer, workers=Workers(cluster="ray", address="auto"))
    assert "\n" not in str(error.value)


def test_it_is_registered_as_a_study_that_needs_samples() -> None:
    entry = get_method("cola")
    assert (entry.result, list(entry.inputs), entry.paper) == ("Paths", ["stack", "samples", "held_out"], "2507.07996")


# The report, on a study made by hand: a model of 4 layers, 2 samples that it answers correctly and 2 that it does not.

MODEL = ModelReference.single("x", "llama", 4)
WHOLE = (0, 1, 2, 3)


def outcome(target: str, *valid: tuple[int, ...], invalid: tuple[tuple[int, ...], ...] = ()) -> PathSearchResult:
    return PathSearchResult(target, 5, 2, valid, invalid)


def C(*valid: tuple[int, ...]) -> PathSearchResult:
    return outcome("C", *valid)


NO_A, NO_B, LOOP = outcome("A"), outcome("B"), (0, 1, 1, 2, 3)


def by_hand() -> PathStudy:
    def sample(
        name: str, base: str, tree: PathSearchResult, random: PathSearchResult, *wrong: PathSearchResult
    ) -> ProblemStudy:
        searches = {"tree": tree, "random": random, "skip": NO_A, "repeat": NO_A}
        return ProblemStudy(Problem(name, "p", "A", ("A", "B", "C")), base, searches, wrong)

    return PathStudy(
        MODEL,
        "text",
        PathSettings(),
        (
            sample("1", "A", outcome("A", (0, 3), (0, 1, 3), WHOLE), outcome("A", (0, 1, 3), WHOLE), NO_B, C((0, 3))),
            sample("2", "A", outcome("A", WHOLE, LOOP), outcome("A", WHOLE), NO_B, C()),
            sample("3", "B", outcome("A", LOOP, (0, 0, 1, 2, 3)), NO_A, outcome("B", (1, 2), WHOLE), C((0,))),
            sample("4", "C", NO_A, outcome("A", (0, 2, 3)), outcome("B", (0, 1), (0, 2), (0, 3)), C(WHOLE)),
        ),
    )


def test_the_report_counts_what_it_says() -> None:
    numbers = report(by_hand())
    assert (numbers["samples"], numbers["right"]) == (4, 2)
    assert numbers["shorter"] == {"tree": 0.5, "random": 0.5, "skip": 0, "repeat": 0, "wrong target": 0.5}
    # Flips: 1 to B, 1 to C (found), 2 to B, 2 to C, 3 to C (found), 4 to B (found).
    assert numbers["repaired"] == {"tree": 0.5, "random": 0.5, "skip": 0, "repeat": 0, "wrong target": 0.5}
    assert numbers["valid_paths"] == {
        "right answer": (3 + 2 + 2 + 0) / 4,
        "wrong answers": (0.5 + 0 + 1.5 + 2) / 4,
        "right answer, flips": (2 + 0) / 2,
        "wrong answers, flips": (0 + 1 + 0 + 0 + 1 + 3) / 6,
    }
    assert numbers["excess"]["samples"] == 2
    assert numbers["excess"]["mean"] == ((2 - 1) + (0 - 3)) / 2
    assert numbers["excess"]["standard_error"] == pytest.approx(2.0)  # of 1 and -3
    assert numbers["excess"]["p"] == pytest.approx(3 / 4, abs=0.02)  # of the 4 signs, all but one reach -1
    assert numbers["best_length"] == {"tree": (2 + 4) / 2, "random": (3 + 4) / 2}
    assert numbers["lengths"] == {2: 1, 4: 1, 5: 1}
    assert numbers["categories"] == {
        "right to right, same length": 1,
        "right to right, shorter": 1,
        "wrong to right, longer": 1,
        "wrong to wrong": 1,
    }
    assert numbers["skip_rate"]["right to right, shorter"] == [0, 1, 1, 0]
    assert numbers["repeat_rate"]["wrong to right, longer"] == [0, 1, 0, 0]
    # Correct paths but the model itself: of 1: 03 and 013, of 2: 01123, of 3: 01123 and 00123.
    assert numbers["valid_skip_rate"] == pytest.approx([0, 0.5 / 3, 1 / 3, 0])
    assert numbers["valid_repeat_rate"] == pytest.approx([0.5 / 3, (1 + 0.5) / 3, 0, 0])
    json.dumps(numbers, allow_nan=False)
    skipped, repeated = layer_scores(by_hand())
    assert skipped.dims == ("layer",) and skipped.values.tolist() == pytest.approx(numbers["valid_skip_rate"])
    assert repeated.values.tolist() == pytest.approx(numbers["valid_repeat_rate"])


def test_a_report_without_finds_has_no_numbers_rather_than_wrong_ones() -> None:
    nothing = {name: outcome("A", invalid=(WHOLE,)) for name in ("tree", "random", "skip", "repeat")}
    lonely = PathStudy(MODEL, "text", PathSettings(), (ProblemStudy(Problem("1", "p", "A"), "B", nothing, ()),))
    numbers = report(lonely)
    assert numbers["shorter"]["tree"] is None and numbers["repaired"]["wrong target"] is None
    assert numbers["valid_skip_rate"] is None and numbers["excess"]["p"] is None
    json.dumps(numbers, allow_nan=False)


def test_rates_count_paths_not_executions() -> None:
    skipped, repeated = rates([(0, 1, 1, 1), (1, 2)], 4)
    assert skipped.tolist() == [0.5, 0, 0.5, 1] and repeated.tolist() == [0, 0.5, 0, 0]


# The predictor


def test_paths_are_parsed_into_the_fewest_segments() -> None:
    whole = parse((0, 1, 2, 3, 4, 5), 6)
    assert whole is not None and [segment.op for segment in whole] == ["keep", "keep"]
    assert parse((0, 1, 4, 5, 4, 5), 6) == [Segment(0, 2, "keep"), Segment(2, 4, "skip"), Segment(4, 6, "repeat")]
    assert parse((0, 0, 0), 1) is None and parse((1, 0), 2) is None


def all_segmentations(layers: int) -> Iterator[list[Segment]]:
    for cuts in itertools.product((False, True), repeat=layers - 1):
        starts = [0, *(layer for layer, cut in enumerate(cuts, start=1) if cut)]
        spans = list(itertools.pairwise([*starts, layers]))
        if max(stop - start for start, stop in spans) <= 4:
            for ops in itertools.product(OPS, repeat=len(spans)):
                yield [Segment(*span, op) for span, op in zip(spans, ops, strict=True)]


def test_the_parse_is_the_best_of_all_segmentations_tried_out() -> None:
    best: dict[tuple[int, ...], tuple[int, int, int]] = {}
    for segments in all_segmentations(6):
        ops = [segment.op for segment in segments]
        cost = (len(ops), ops.count("skip"), -ops.count("repeat"))
        path = compile_path(segments)
        best[path] = min(best.get(path, cost), cost)
    for path, cost in best.items():
        segments = parse(path, 6)
        assert segments is not None and compile_path(segments) == path
        ops = [segment.op for segment in segments]
        assert (len(ops), ops.count("skip"), -ops.count("repeat")) == cost
        assert all(segment.stop - segment.start <= 4 for segment in segments)


def test_the_whole_model_counts_less_where_a_shorter_path_is_right_too() -> None:
    identity = tuple(range(6))
    learned = targets([identity, (0, 1, 2, 3, 4), (0, 0, 0)], 6)  # the last one does not parse
    assert [target.weight for target in learned] == pytest.approx([0.3 / 1.3, 1 / 1.3])
    assert learned[1].begins.tolist()[0] == 1 and len(learned) == 2
    longer = targets([identity, (0, 0, 1, 2, 3, 4, 5)], 6)
    assert [target.weight for target in longer] == [0.5, 0.5]
    starts = learned[1].begins.bool()
    assert (learned[1].ops[starts] >= 0).all() and (learned[1].ops[~starts] == -1).all()
    assert len(targets([identity] * 80, 6)) == 50


def test_decoding_ranks_operations_and_lets_no_segment_grow_beyond_four() -> None:
    boundary = torch.tensor([-9.0, -9, -9, -9, -9, -9])
    ops = torch.zeros(6, 3)
    ops[0] = torch.tensor([0.0, 5.0, 1.0])  # layers 0 to 3: keep, then repeat
    ops[4] = torch.tensor([3.0, 0.0, 2.5])  # layers 4 and 5: skip, then repeat
    assert decode(boundary, ops, 5) == [
        (0, 1, 2, 3),
        (0, 1, 2, 3, 4, 5, 4, 5),
        (0, 1, 2, 3, 0, 1, 2, 3),
        (0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 4, 5),
    ]
    assert decode(boundary, ops, 1) == [(0, 1, 2, 3)]
    nothing = torch.tensor([9.0, -9.0, -9.0]).expand(6, 3)
    assert decode(boundary, nothing, 1)  # never an empty path


def one_path_study(stack: Stack, path: tuple[int, ...]) -> PathStudy:
    found = {"tree": PathSearchResult("x", 1, 1, (path,), ())}
    samples = tuple(ProblemStudy(sample, "", found, ()) for sample in SAMPLES)
    return PathStudy(ModelReference.of(stack), "text", SMALL, samples)


def test_a_predictor_learns_the_path_it_is_shown(stack: Stack, tokenizer: Any, tmp_path: File) -> None:
    path = (0, 1, 3, 4, 5, 4, 5)
    noise = torch.get_rng_state()
    predictor = train_predictor(stack, one_path_study(stack, path), tokenizer, epochs=60)
    assert torch.equal(torch.get_rng_state(), noise)  # the caller's randomness is left alone
    assert predictor.propose(stack, "Some other prompt", tokenizer)[0] == path
    plan = predictor.plan(stack, "Some other prompt", tokenizer)
    assert [run.layer for run in plan.runs("decode")] == list(path)
    assert plan.provenance["chosen_by"] == "path predictor"

    predictor.save(tmp_path / "predictor.safetensors")
    loaded = PathPredictor.load(tmp_path / "predictor.safetensors", stack)
    for prompt in ("Some other prompt", "x"):
        assert loaded.propose(stack, prompt, tokenizer) == predictor.propose(stack, prompt, tokenizer)
    again = train_predictor(stack, one_path_study(stack, path), tokenizer, epochs=60)
    for one, other in zip(again.network.parameters(), predictor.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_its_score_runs_the_proposed_paths(stack: Stack, tokenizer: Any) -> None:
    path = (0, 1, 3, 4, 5)
    predictor = train_predictor(stack, one_path_study(stack, path), tokenizer, epochs=60)
    answer = PathAnswerer(stack, tokenizer, SAMPLES[0])(path)
    base = PathAnswerer(stack, tokenizer, SAMPLES[0])(tuple(range(6)))
    questions = [
        Problem(str(number), SAMPLES[0].prompt, target, SAMPLES[0].options)
        for number, target in enumerate(SAMPLES[0].options)
    ]
    score = predictor.score(stack, questions, tokenizer)
    assert score.samples == 3 and score.mean_length == 5
    # One prompt with each of three answers as the right one: exactly one of them is what the path says.
    assert score.pass_1 == pytest.approx(1 / 3) and answer in SAMPLES[0].options
    assert score.base == pytest.approx(1 / 3) and base in SAMPLES[0].options
    assert score.pass_1 <= score.pass_5 <= 1
    with pytest.raises(CalibrationError, match="no held-out samples"):
        predictor.score(stack, [], tokenizer)


def test_a_predictor_for_another_model_or_a_broken_file_is_refused(
    stack: Stack, tokenizer: Any, tmp_path: File
) -> None:
    file = tmp_path / "predictor.safetensors"
    train_predictor(stack, one_path_study(stack, (0, 1)), tokenizer, epochs=1).save(file)
    with pytest.raises(CheckpointError, match="a path predictor for nano-llama, not for"):
        PathPredictor.load(file, opened("llama"))
    file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a path predictor") as error:
        PathPredictor.load(file, stack)
    assert "\n" not in str(error.value)
    hopeless = PathStudy(ModelReference.of(stack), "text", SMALL, (study_sample(stack, tokenizer, SAMPLES[2], SMALL),))
    if not hopeless.samples[0].searches["tree"].valid:
        with pytest.raises(CalibrationError, match="no correct path to learn from"):
            train_predictor(stack, hopeless, tokenizer)


# The command line


def run(*arguments: object) -> Any:
    from typer.testing import CliRunner

    from lamella.cli import app

    return CliRunner().invoke(app, ["cola", *map(str, arguments)])


@pytest.fixture
def questions(tmp_path: File) -> File:
    file = tmp_path / "questions.jsonl"
    lines = [
        {"id": each.id, "prompt": each.prompt, "answer": each.answer, "options": each.options, "wrong": each.wrong}
        for each in SAMPLES
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_the_command_writes_paths_report_plans_and_predictor(questions: File, tmp_path: File, study: PathStudy) -> None:
    out = tmp_path / "out"
    options = ("--samples", questions, "--sims", 12, "--tokens", 3, "--held-out", questions, "-o", out)
    done = run(NANO, *options, "--json")
    assert done.exit_code == 0, done.output
    numbers = json.loads((out / "evidence.json").read_text())["findings"]
    assert numbers.pop("predictor")["samples"] == 3
    assert numbers == json.loads(json.dumps(report(study)))
    assert json.loads((out / "study.json").read_text())["samples"] == json.loads(json.dumps(study.as_dict()))["samples"]
    plans = [Plan.read(file) for file in sorted((out / "plans").iterdir())]
    assert [plan.path for plan in plans] == [plan.path for plan in study.plans().values()]
    PathPredictor.load(out / "predictor.safetensors", open_stack(NANO))
    page = (out / "report.html").read_text()
    for each in study.samples:
        assert each.sample.id in page
        assert describe_path(each.searches["tree"].best, study.model.layers) in page

    refused = run(NANO, *options)
    assert isinstance(refused.exception, LamellaError) and "exists" in str(refused.exception)
    shown = run(NANO, *options, "--overwrite")
    assert shown.exit_code == 0 and "a wrong answer (control)" in shown.output and "pass@1" in shown.output


def test_a_path_is_described_by_what_it_leaves_out_and_repeats() -> None:
    assert describe_path((0, 1, 2, 3), 4) == "the model itself"
    assert describe_path((0, 3), 4) == "without 1, 2"
    assert describe_path((0, 1, 2, 1, 2), 4) == "without 3; repeats 1 (2 times), 2 (2 times)"
    assert describe_path(None, 4) == "none found"


def test_the_command_refuses_what_it_cannot_use(questions: File, tmp_path: File) -> None:
    out = tmp_path / "out"
    bad = run(NANO, "--samples", questions, "--protect", "2", "-o", out)
    assert "--protect 2: cola expects 2 numbers separated by commas" in str(bad.exception)
    nothing = run(NANO, "--samples", tmp_path / "nothing.jsonl", "-o", out)
    assert "there is no file" in str(nothing.exception)
    assert not out.exists()
