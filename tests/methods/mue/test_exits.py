"""Exits give what the transformers model gives by hand: streams run apart, layers left out, keys made of kept states.

References are the untouched layers: of the encoder one stream of one row at a time, without padding; of the decoder the
whole model without a cache, in which a hook hands on what a layer was given where a token has left. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import lamella
from lamella.errors import LamellaError, MethodError, PlanError
from lamella.methods.mue import OFF, ExitSettings, ModalityExits, TokenExits, decayed, exit_plan, exit_view
from lamella.methods.mue.policy import by_token, saturation
from lamella.plan import Plan
from lamella.runtime import PlanCache, empty_cache, parallel, traced, untraced
from lamella.stack import Context, Model
from lamella.stack.ofa import OFAEncoder
from lamella.zoo.nano import IMAGE_POSITIONS, nano

NAMES = list(IMAGE_POSITIONS)
ROWS, LENGTH, PROMPT = 3, 9, 4
IMAGE, START = 127, {"florence2": 2, "patch_bart": 2, "patch_mbart": 2, "patch_t5": 0, "ofa": 2}
DRAWN = torch.Generator().manual_seed(5)
IDS = torch.randint(3, 120, (ROWS, LENGTH), generator=DRAWN)
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
MASK[1, :1] = 0
LENGTHS = torch.tensor([4, 3, 6])
TOLERANCE = 1e-9


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str, **overrides: Any) -> Model:
    model = nano(name, **overrides).double()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return lamella.open(model)


def source(name: str) -> dict[str, Tensor]:
    """A ragged batch, of which the last row has no image."""
    places = IMAGE_POSITIONS[name]
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 120, (ROWS, places + 8), generator=drawn)
    mask = torch.ones_like(ids)
    ids[:2, 1 : places + 1] = IMAGE
    mask[1, places + 5 :] = 0
    mask[2, 6:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(2, 3, 16, 16, generator=drawn).double(),
    }


def row_of(given: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row alone, without its padding."""
    real = given["attention_mask"][row].bool()
    found = {
        "input_ids": given["input_ids"][row : row + 1, real],
        "attention_mask": given["attention_mask"][row : row + 1, real],
    }
    return found | ({"pixel_values": given["pixel_values"][row : row + 1]} if row < 2 else {})


def words(ids: Tensor = IDS, mask: Tensor = MASK) -> dict[str, Tensor]:
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def run_layers(model: Model, context: Context, row: int, which: Tensor, layers: int) -> Iterator[Tensor]:
    """Of a row the stream of some tokens [time] alone, before and after each of so many layers of the encoder.

    They are run by their own modules. The bias of T5 and of OFA is that of the places which the tokens have in the row.
    """
    encoder = model.stacks["encoder"]
    h = context.h[row : row + 1, which]
    time, bias = context.h.shape[1], None
    yield h
    for layer, call in zip(list(encoder.layers)[:layers], context.calls, strict=False):
        if hasattr(layer, "layer"):  # T5's
            if bias is None:
                bias = layer.layer[0].SelfAttention.compute_bias(time, time)[:, :, which][..., which]
            h = layer(h, None, bias)[0]
        elif "position_bias" in call:  # OFA's, of each layer
            h = layer(h, position_bias=call["position_bias"][row : row + 1, :, which][..., which])
        else:
            h = layer(h, None)
        yield h


def by_hand(
    model: Model, given: dict[str, Tensor], exits: dict[str, list[int]]
) -> tuple[Tensor, list[dict[str, list[float]]]]:
    """The encoder's final states with streams apart, and S of each stream of each row."""
    encoder = model.stacks["encoder"]
    context = encoder.context(given)
    out, cosines = context.h.clone(), []
    for row in range(len(out)):
        real, images = given["attention_mask"][row].bool(), given["input_ids"][row] == IMAGE
        found = {}
        for name, which in (("image", real & images), ("text", real & ~images)):
            if which.any():
                streams = list(run_layers(model, context, row, which, exits[name][row]))
                out[row, which] = streams[-1][0]
                pairs = pairwise(streams)
                found[name] = [float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in pairs]
        cosines.append(found)
    return encoder.normed(out), cosines


def read(model: Model, memory: Tensor, given: dict[str, Tensor]) -> dict[str, Any]:
    """What a decoder reads of an encoder whose final states are these: OFA's also reads its positions."""
    encoder, found = model.stacks["encoder"].base, BaseModelOutput(last_hidden_state=memory)
    if isinstance(encoder, OFAEncoder):
        found = replace(encoder(**given), last_hidden_state=memory)
    return {"encoder_outputs": found, "attention_mask": given["attention_mask"]}


def answered(model: Model, memory: Tensor, given: dict[str, Tensor], ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    """The logits of the untouched decoder over this memory."""
    return model.model(**read(model, memory, given), **words(ids, mask), use_cache=False).logits


def all_layers(model: Model) -> dict[str, list[int]]:
    return dict.fromkeys(("image", "text"), [len(model.stacks["encoder"])] * ROWS)


def view_of(model: Model, settings: ExitSettings | None = None, **tau: float) -> Any:
    return exit_view(model, settings or ExitSettings(), tau)


def middle(model: Model, given: dict[str, Tensor], q: float = 0.45) -> dict[str, float]:
    """Thresholds at which some streams and tokens leave, and others do not."""
    view = view_of(model)
    parallel(view, given | words(), LENGTHS)
    found = {name: seen[:, :-1] for name, seen in view.lamella_policy_encoder.cosines.items()}
    found["decoder"] = view.lamella_policy.cosines[MASK.bool()][:, :-1]
    return {name: float(s[~s.isnan()].double().quantile(q)) for name, s in found.items()}


# The encoder


@pytest.mark.parametrize("name", NAMES)
def test_without_exits_the_modalities_run_apart(name: str) -> None:
    model, given = opened(name), source(name)
    view = view_of(model)
    memory, cosines = by_hand(model, given, all_layers(model))
    logits = view(**given, **words()).logits
    real = MASK.bool()
    assert (logits - answered(model, memory, given))[real].abs().max() <= TOLERANCE
    assert (logits - model.model(**given, **words()).logits)[real].abs().max() > 1e-3, "they saw each other"
    seen = view.lamella_policy_encoder.cosines
    for row, found in enumerate(cosines):
        for modality, s in found.items():
            assert seen[modality][row].tolist() == pytest.approx(s, abs=1e-6)
    assert view.lamella_policy_encoder.exits["image"].tolist() == [len(model.stacks["encoder"])] * 2 + [0]


@pytest.mark.parametrize("reduce", ["flat", "mean", "min"])
@pytest.mark.parametrize("name", NAMES)
def test_each_modality_of_each_row_leaves_by_itself_and_nothing_runs_behind(name: str, reduce: Any) -> None:
    model, given = opened(name), source(name)
    settings = ExitSettings(reduce=reduce)
    full = view_of(model, settings)
    full(**given, **words())
    seen = {key: s[:, :-1] for key, s in full.lamella_policy_encoder.cosines.items()}
    tau = {key: float(s[~s.isnan()].quantile(0.7)) for key, s in seen.items()}
    view = view_of(model, settings, **tau)
    trace = traced(view, "encoder")
    logits = view(**given, **words()).logits
    exits = view.lamella_policy_encoder.exits
    layers = len(model.stacks["encoder"])
    for key, s in seen.items():
        for row in range(ROWS):
            over = [e for e, value in enumerate(s[row].tolist(), 1) if value > tau[key]]
            expected = 0 if math.isnan(float(s[row, 0])) else min(over, default=layers)
            assert int(exits[key][row]) == expected
    assert len({int(e) for key in exits for e in exits[key] if e}) > 1, "all leave behind one layer"
    memory, _ = by_hand(model, given, {key: each.tolist() for key, each in exits.items()})
    assert (logits - answered(model, memory, given))[MASK.bool()].abs().max() <= TOLERANCE
    real, images = given["attention_mask"].bool(), given["input_ids"] == IMAGE
    ran = torch.from_numpy(trace.ran[0])
    for key, which in (("image", real & images), ("text", real & ~images)):
        for row in range(ROWS):
            assert torch.equal(ran[row, which[row]].sum(1), exits[key][row].expand(int(which[row].sum()), 2))
    untraced(view, "encoder")


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_rows_alone_and_padding_changes_no_exit(name: str) -> None:
    model, given = opened(name), source(name)
    view = view_of(model, **middle(model, given))
    together = view(**given, **words()).logits
    exits = {key: each.tolist() for key, each in view.lamella_policy_encoder.exits.items()}
    tokens = view.lamella_policy.exits
    for row in range(ROWS):
        real = MASK[row].bool()
        alone = view(**row_of(given, row), **words(IDS[row : row + 1], MASK[row : row + 1])).logits
        assert (alone[0] - together[row])[real].abs().max() <= TOLERANCE
        assert {key: int(each) for key, each in view.lamella_policy_encoder.exits.items()} == {
            key: each[row] for key, each in exits.items()
        }
        assert torch.equal(view.lamella_policy.exits[0, real], tokens[row, real])


@pytest.mark.parametrize("min_layer", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_threshold_below_all_cosines_is_a_model_with_the_first_layers_alone(name: str, min_layer: int) -> None:
    model, given = opened(name), source(name)
    view = view_of(model, ExitSettings(min_layer=min_layer), image=-OFF, text=-OFF, decoder=-OFF)
    logits = view(**given, **words()).logits
    memory, _ = by_hand(model, given, dict.fromkeys(("image", "text"), [min_layer] * ROWS))
    decoder = model.stacks["decoder"]
    context = decoder.context(read(model, memory, given) | words())
    expected = decoder.head(decoder.run(context.h, 0, min_layer, context))
    assert (logits - expected)[MASK.bool()].abs().max() <= TOLERANCE
    assert set(view.lamella_policy.exits[MASK.bool()].tolist()) == {min_layer}


# The decoder


@contextmanager
def left_at(model: Model, exits: Tensor) -> Iterator[Any]:
    """The untouched model, in which a token [batch, time] passes by the layers behind its exit."""
    hooks = []
    for index, layer in enumerate(model.stacks["decoder"].layers):

        def hook(_: nn.Module, given: Any, out: Any, gone: Tensor = exits <= index) -> Any:
            selected = torch.where(gone[..., None], given[0], out[0] if isinstance(out, tuple) else out)
            return (selected, *out[1:]) if isinstance(out, tuple) else selected

        hooks.append(layer.register_forward_hook(hook))
    try:
        yield model.model
    finally:
        for each in hooks:
            each.remove()


def reference(model: Model, view: Any, given: dict[str, Tensor], ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """All positions computed anew with the exits that the parallel execution has recorded."""
    ours = parallel(view, given | words(ids, mask), lengths).logits
    found = {key: each.tolist() for key, each in view.lamella_policy_encoder.exits.items()}
    memory, _ = by_hand(model, given, found)
    with left_at(model, view.lamella_policy.exits):
        expected = answered(model, memory, given, ids, mask)
    assert (ours - expected)[mask.bool()].abs().max() <= TOLERANCE
    return expected


def stepped(view: Any, given: dict[str, Tensor], cuts: tuple[int, ...], cache: Any = None) -> Tensor:
    parts, known, begin = [], given, 0
    for end in (*cuts, LENGTH):
        out = view(**known, **words(IDS[:, begin:end], MASK[:, :end]), cache=cache, use_cache=True)
        parts.append(out.logits)
        encoded = out.get("encoder_outputs") or BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
        known = {"encoder_outputs": encoded, "attention_mask": given["attention_mask"]}
        cache, begin = out.cache, end
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("decay", [None, (0.7, 1.0)])
@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_all_positions_recomputed(name: str, decay: Any) -> None:
    model, given = opened(name), source(name)
    view = view_of(model, ExitSettings(decay=decay, answer=5), **middle(model, given))
    expected = reference(model, view, given, IDS, MASK, LENGTHS)
    assert len(view.lamella_policy.exits[MASK.bool()].unique()) > 1, "all leave behind one layer"
    for cuts in (tuple(range(1, LENGTH)), (4, 5, 6), (7,), ()):
        ours = stepped(view, given, cuts, empty_cache(view, LENGTHS))
        assert (ours - expected)[MASK.bool()].abs().max() <= TOLERANCE


@pytest.mark.parametrize("propagate", ["state", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_whoever_has_left_is_seen_in_all_layers_or_in_none_of_the_deeper_ones(name: str, propagate: Any) -> None:
    model, given = opened(name), source(name)
    view = view_of(model, ExitSettings(propagate=propagate), **middle(model, given))
    whole = parallel(view, given | words(), LENGTHS).logits
    exits = view.lamella_policy.exits
    cache = empty_cache(view, LENGTHS)
    assert (stepped(view, given, tuple(range(1, LENGTH)), cache) - whole)[MASK.bool()].abs().max() <= TOLERANCE
    own = cache.self_attention_cache
    assert isinstance(own, PlanCache) and own.seen == LENGTH
    for layer in range(len(model.stacks["decoder"])):
        if propagate == "state":
            assert own.layers[layer].keys.shape[2] == LENGTH
        elif layer > 0:
            for row in range(ROWS):
                held = [int(c) for c in own.layers[layer].columns[row] if c >= 0 and MASK[row, c]]
                assert held == [c for c in range(LENGTH) if MASK[row, c] and exits[row, c] > layer]
    if propagate == "none":
        assert (
            whole - parallel(view_of(model, **middle(model, given)), given | words(), LENGTHS).logits
        ).abs().max() > 1e-3


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_generate_equals_all_positions_recomputed_beam_by_beam(name: str, beams: int) -> None:
    model, given = opened(name), source(name)
    view = view_of(model, ExitSettings(decay=(0.8, 1.0), answer=5), **middle(model, given))
    start = IDS[:, :PROMPT].clone()
    start[2, 0] = START[name]
    inputs = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    settings = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "num_beams": beams}
    out = view.generate(**given, **words(start, MASK[:, :PROMPT]), **settings, **inputs, num_return_sequences=beams)
    ids = out.sequences
    assert torch.equal(ids[:, :PROMPT], start.repeat_interleave(beams, 0))
    repeated = {key: each.repeat_interleave(beams, 0) for key, each in given.items()}
    mask = torch.cat([MASK[:, :PROMPT].repeat_interleave(beams, 0), torch.ones_like(ids[:, PROMPT:])], 1)
    lengths = torch.full((len(ids),), PROMPT)
    expected = parallel(view, repeated | words(ids, mask), lengths).logits
    found = {key: each.tolist() for key, each in view.lamella_policy_encoder.exits.items()}
    memory, _ = by_hand(model, repeated, found)
    with left_at(model, view.lamella_policy.exits):
        recomputed = answered(model, memory, repeated, ids, mask)
    assert (expected - recomputed)[mask.bool()].abs().max() <= TOLERANCE
    expected = recomputed[:, PROMPT - 1 : -1]
    if beams == 1:
        assert (torch.stack(list(out.logits), dim=1) - expected).abs().max() <= 1e-6  # they come in float32
        assert torch.equal(expected.argmax(-1), ids[:, PROMPT:])
    else:
        likely = expected.log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).squeeze(-1)
        torch.testing.assert_close(out.sequences_scores.double(), likely.mean(-1), rtol=1e-5, atol=1e-5)
        assert len({tuple(each) for each in view.lamella_policy.exits.tolist()}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_without_exits_the_decoder_is_the_model_s_own_bitwise(name: str) -> None:
    model, given = opened(name), source(name)
    view = view_of(model)
    settings = {
        "do_sample": False,
        "max_new_tokens": 5,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    for beams in (1, 2):
        ours = view.generate(**given, **words(IDS[:, :PROMPT], MASK[:, :PROMPT]), **settings, num_beams=beams)
        memory = view(**given, **words()).encoder_last_hidden_state
        inputs = read(model, memory, given) | words(IDS[:, :PROMPT], MASK[:, :PROMPT])
        theirs = model.model.generate(**inputs, **settings, num_beams=beams)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_what_has_run_is_what_exits_say_and_two_generations_do_not_meet(name: str) -> None:
    model, given = opened(name), source(name)
    view = view_of(model, **middle(model, given))
    settings = {
        "do_sample": False,
        "max_new_tokens": 5,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    first = view.generate(**given, **settings)
    trace = traced(view)
    other = row_of(given, 0)
    view.generate(**other, **settings)
    for taken in (trace.ran, trace.prompt, trace.notes):
        taken.clear()
    again = view.generate(**given, **settings)
    assert all(torch.equal(a, b) for a, b in zip(first.logits, again.logits, strict=True))
    ran, _, _ = trace.joined()
    untraced(view)
    ids = again.sequences
    parallel(view, given | words(ids, torch.ones_like(ids)), torch.ones(ROWS, dtype=torch.long))
    exits = view.lamella_policy.exits[:, :-1]
    layers = torch.arange(len(model.stacks["decoder"]))
    expected = (layers < exits[..., None])[..., None].expand(-1, -1, -1, 3)
    assert torch.equal(torch.from_numpy(ran), expected)
    assert not expected.all()


# Numbers


def test_the_flat_cosine_is_the_sum_of_cosines_weighted_by_norms() -> None:
    before, after = torch.randn(2, 4, 7, 16, generator=torch.Generator().manual_seed(0)).double().unbind(0)
    held = torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) < 0.7
    held[:, 0] = True
    tokens = by_token(before, after)
    for row in range(4):
        h, other = before[row, held[row]], after[row, held[row]]
        weights = h.norm(dim=1) * other.norm(dim=1) / (h.norm() * other.norm())
        each = (h * other).sum(1) / (h.norm(dim=1) * other.norm(dim=1))
        assert float(weights.sum()) <= 1
        assert float(saturation(tokens, held)[row]) == pytest.approx(float((weights * each).sum()), abs=1e-9)
        assert float(saturation(tokens, held, "mean")[row]) == pytest.approx(float(each.mean()), abs=1e-9)
        assert float(saturation(tokens, held, "min")[row]) == pytest.approx(float(each.min()), abs=1e-9)


def test_decayed_thresholds_are_those_of_the_formula() -> None:
    stack = opened("patch_bart").stacks["decoder"]
    falls = TokenExits(stack, threshold=0.99, decay=(0.95, 1.0), steps=16).tau(torch.arange(20))
    for t, value in enumerate(falls.tolist()):
        assert value == pytest.approx(min(1.0, 0.95 * 0.99 + 0.05 * math.exp(-t / 16)), abs=1e-6)
    stays = TokenExits(stack, threshold=0.6, decay=(1.0, 1.0), steps=16).tau(torch.arange(20))
    torch.testing.assert_close(stays, TokenExits(stack, threshold=0.6).tau(torch.arange(20)))
    assert decayed(2.0, torch.tensor([0]), 1.0, 1.0, 4).tolist() == [1.0]


@pytest.mark.parametrize("name", NAMES)
def test_the_decomposed_model_has_the_parameters_of_the_original(name: str) -> None:
    model = opened(name)
    ours = dict(view_of(model).named_parameters())
    theirs = dict(model.model.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[each] is theirs[each] for each in ours)


# Plans


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_written_applied_exported_and_loaded(name: str, tmp_path: Any) -> None:
    model, given = opened(name), source(name)
    params = ExitSettings(decay=(0.9, 1.0), answer=6).params(middle(model, given))
    plan = exit_plan(model, params)
    assert Plan.parse(plan.dump()) == plan and not plan.is_static
    view = lamella.apply(model, plan)
    folder = lamella.export(model, plan, tmp_path / "out", form="native")
    loaded = lamella.load(folder, dtype=torch.float64).model
    ours, theirs = (parallel(each, given | words(), LENGTHS).logits for each in (view, loaded))
    # mapped weights lie otherwise in memory, so products may round otherwise
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_an_encoder_alone_may_decide_beside_the_model_s_own_decoder() -> None:
    model, given = opened("patch_bart"), source("patch_bart")
    params = {"encoder": ExitSettings().params(middle(model, given))["encoder"]}
    view = lamella.apply(model, exit_plan(model, params))
    memory = view(**given, **words()).encoder_last_hidden_state
    expected = answered(model, memory, given)
    assert (view(**given, **words()).logits - expected)[MASK.bool()].abs().max() <= TOLERANCE
    assert view.generate(**given, max_new_tokens=3, do_sample=False).shape == (ROWS, 4)


BAD = [
    ("encoder", {"image": 3.0}, "image 3.0 is a threshold on cosines: give -1 to 1, or 2 for no exit"),
    ("encoder", {"reduce": "most"}, "reduce is flat, mean or min, not most"),
    ("encoder", {"min_layer": 0}, "min_layer 0 is out of range: give 1 to 3"),
    ("decoder", {"min_layer": 5}, "min_layer 5 is out of range: give 1 to 4"),
    ("decoder", {"threshold": math.nan}, "threshold on cosines"),
    ("decoder", {"decay": [0.9, 1.0]}, "with steps of at least 1"),
    ("decoder", {"decay": [1.9, 1.0], "steps": 4}, "beta from 0 to 1"),
    ("decoder", {"propagate": "copy"}, "propagate is state or none, not copy"),
    ("decoder", {"image": 0.5}, "has no parameter 'image'"),
    ("encoder", {"threshold": 0.5}, "has no parameter 'threshold'"),
]


@pytest.mark.parametrize(("stack", "params", "message"), BAD)
def test_settings_that_cannot_be_are_refused_in_one_line(stack: str, params: dict[str, Any], message: str) -> None:
    model = opened("patch_bart")
    with pytest.raises(LamellaError, match=message) as error:
        lamella.apply(model, exit_plan(model, {stack: params}))
    assert "\n" not in str(error.value)


def test_images_and_placeholders_that_differ_are_refused_in_one_line() -> None:
    model, given = opened("patch_bart"), source("patch_bart")
    view = view_of(model)
    fewer = given | {"pixel_values": given["pixel_values"][:1]}
    none = {key: each for key, each in given.items() if key != "pixel_values"}
    for wrong, filled in ((fewer, 16), (none, 0)):
        for call in (lambda g: view(**g, **words()), lambda g: view.generate(**g, max_new_tokens=2)):
            with pytest.raises(LamellaError, match=f"32 placeholder positions .* the images fill {filled}") as error:
                call(wrong)
            assert "\n" not in str(error.value)


def test_an_encoder_takes_no_policy_of_another_method_and_a_decoder_none_of_the_encoder() -> None:
    model = opened("patch_bart")
    encoder, decoder = model.stacks.values()
    with pytest.raises(PlanError, match="does not generate, so its tokens have no phases"):
        lamella.runtime.with_policy(encoder, exit_plan(model, {"encoder": {}}), TokenExits(encoder))
    with pytest.raises(PlanError, match="reads an encoder, which this policy does not support"):
        lamella.runtime.with_policy(decoder, exit_plan(model, {"decoder": {}}), ModalityExits(decoder))
    for wrong in (lamella.open(nano("bart")), lamella.open(nano("llama"))):
        with pytest.raises(MethodError, match="mue works on"):
            exit_view(wrong, ExitSettings(), {})
