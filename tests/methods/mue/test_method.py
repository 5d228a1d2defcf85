"""Training, what exits save, and the search for thresholds, on small encoder-decoders that read rendered shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import lamella
from lamella.data import ImageText, ImageTextRow, Processing
from lamella.data.samples import NO_LOSS
from lamella.errors import MethodError
from lamella.methods.mue import (
    OFF,
    ExitCosts,
    ExitSettings,
    ModalityExits,
    TokenExits,
    best_trial,
    by_flops,
    by_layers,
    exit_plan,
    exit_view,
    histograms,
    layerwise_loss,
    measure_exits,
    mue,
    pareto_trials,
    quantile_thresholds,
    saturation,
    search_thresholds,
    thresholds,
    train,
)
from lamella.methods.mue.baselines import EntropyExits, FusedExits, PatienceExits, shuffled
from lamella.methods.mue.method import attempt
from lamella.methods.mue.recipe import random_exits
from lamella.methods.mue.reduction import Exits, executed
from lamella.methods.mue.search import ExitTrial
from lamella.plan import Plan
from lamella.runtime import traced, with_policies
from lamella.stack import Model, open_model
from lamella.train import TrainConfig
from lamella.zoo.nano import nano
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import examples

SMALL = {"encoder_layers": 3, "decoder_layers": 3}


@pytest.fixture(scope="module")
def model() -> Model:
    return open_model(shapes_vlm("patch_bart", **SMALL)[0].double())


@pytest.fixture(scope="module")
def rows() -> ImageText:
    """Rows with images, and one without."""
    processing = Processing(shapes_vlm("patch_bart", **SMALL)[1], encodes=True)
    found = [
        ImageTextRow((each.image,), turns(f"<image>\n{each.prompt}", each.answer), task=each.task)
        for each in examples(["entailment", "caption"], 6)
    ]
    return ImageText([*found, ImageTextRow((), turns("how many shapes are there?", "two"))], processing)


def turns(prompt: str, answer: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})


def batch_of(rows: ImageText) -> dict[str, Tensor]:
    batch = rows.batch(rows)
    return batch | {"pixel_values": batch["pixel_values"].double()}


def doubled(rows: ImageText) -> ImageText:
    """The same rows, with images in float64."""

    class Doubled(Processing):
        def batch(self, some: Any) -> dict[str, Tensor]:
            found = super().batch(some)
            return found | {"pixel_values": found["pixel_values"].double()} if "pixel_values" in found else found

    return ImageText(list(rows), Doubled(rows.processing.processor, encodes=True))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_gradient_is_that_of_a_backward_pass_for_each_layer(model: Model, rows: ImageText, reduction: Any) -> None:
    batch = batch_of(rows)
    view = exit_view(model, ExitSettings(), {})
    loss, parts = layerwise_loss(view, batch, ExitSettings(reduction=reduction))
    loss.backward()
    ours = {name: each.grad.clone() for name, each in view.named_parameters() if each.grad is not None}
    view.zero_grad()
    decoder = model.stacks["decoder"]
    labels, layers = batch["labels"], len(decoder)
    carries = labels != NO_LOSS
    start = torch.full((len(labels), 1), model.model.config.text_config.decoder_start_token_id)
    begun = torch.cat([start, labels[:, :-1].clamp(min=0)], 1)
    streams: list[Tensor] = []
    hooks = [each.register_forward_hook(lambda _, __, out: streams.append(out)) for each in view_layers(view, decoder)]
    losses = []
    for layer in range(layers):
        streams.clear()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        view(**inputs, decoder_input_ids=begun, use_cache=False)
        each = cross_entropy(view.lm_head(streams[layer][carries]).float(), labels[carries])
        (each if reduction == "sum" else each / layers).backward()
        losses.append(float(each.detach()))
    for hook in hooks:
        hook.remove()
    assert float(loss) == pytest.approx(sum(losses) if reduction == "sum" else sum(losses) / layers, rel=1e-6)
    assert float(parts["last layer"]) == pytest.approx(losses[-1], rel=1e-6)
    theirs = {name: each.grad for name, each in view.named_parameters() if each.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-8)
    view.zero_grad()


def view_layers(view: Any, decoder: Any) -> Any:
    return view.get_submodule(decoder.architecture.prefix.removesuffix("."))


def test_final_loss_is_that_of_the_last_layer_and_smoothing_is_torch_s(model: Model, rows: ImageText) -> None:
    batch, view = batch_of(rows), exit_view(model, ExitSettings(), {})
    final, parts = layerwise_loss(view, batch, ExitSettings(loss="final"))
    assert float(final) == float(parts["last layer"])
    smoothed, _ = layerwise_loss(view, batch, ExitSettings(loss="final", smoothing=0.1))
    logits = view(**{n: batch[n] for n in ("input_ids", "attention_mask", "pixel_values", "labels")}).logits
    carries = batch["labels"] != NO_LOSS
    expected = cross_entropy(logits[carries], batch["labels"][carries], label_smoothing=0.1)
    assert float(smoothed) == pytest.approx(float(expected), rel=1e-6)


def test_drawn_exits_lie_in_the_deeper_half_and_come_as_often_as_asked() -> None:
    torch.manual_seed(0)
    found = [random_exits(0.5, 6) for _ in range(400)]
    some = [each for each in found if each is not None]
    assert 150 < len(some) < 250
    for name in ("image", "text"):
        assert {each[name] for each in some} == {3, 4, 5, 6}
    assert random_exits(0.0, 6) is None


def test_training_lowers_every_layer_s_loss_and_leaves_the_original(rows: ImageText, tmp_path: Any) -> None:
    model = open_model(shapes_vlm("patch_bart", **SMALL)[0])
    before = {name: each.clone() for name, each in model.model.named_parameters()}
    config = TrainConfig(steps=12, lr=1e-3, batch=4, save_every=50, log_every=4)
    view, log = train(model, rows, ExitSettings(encoder_exits=0.5), config, tmp_path / "run")
    assert log.train[-1].loss < log.train[0].loss
    assert all(torch.equal(each, before[name]) for name, each in model.model.named_parameters())
    assert any(not torch.equal(each, before[name]) for name, each in view.named_parameters())
    assert view.lamella_policy_encoder.fixed_exits is None and view.lamella_policy.recorded_hidden is None


# What exits save


def taken(model: Model, rows: ImageText, q: float = 0.5) -> tuple[Any, Exits]:
    full = measure_exits(exit_view(model, ExitSettings(), {}), rows)
    view = exit_view(model, ExitSettings(), quantile_thresholds(full, q))
    return view, measure_exits(view, rows, batch=3)


def test_observed_exits_do_not_depend_on_the_batch(model: Model, rows: ImageText) -> None:
    view, found = taken(model, doubled(rows))
    again = measure_exits(view, doubled(rows), batch=1)
    for name in ("image", "text"):
        assert torch.equal(found.layers[name], again.layers[name])
    assert torch.equal(found.decoder, again.decoder) and torch.equal(found.row, again.row)
    assert found.tokens["image"].tolist() == [64] * 6 + [0] and found.layers["image"][-1] == 0
    assert found.loss == pytest.approx(again.loss, rel=1e-9)


def test_the_reduction_is_what_was_executed(model: Model, rows: ImageText) -> None:
    rows = doubled(rows)
    view, found = taken(model, rows)
    layers = (3, 3)
    used = full = 0.0
    traces = {name: traced(view, name) for name in ("encoder", "decoder")}
    for number, row in enumerate(rows):
        for trace in traces.values():
            for noted in (trace.ran, trace.prompt, trace.notes):
                noted.clear()
        alone = measure_exits(view, ImageText([row], rows.processing))
        ran = torch.from_numpy(traces["encoder"].ran[0])[0, :, :, 0]
        images = rows.batch([row])["input_ids"][0] == model.model.config.image_token_id
        streams = [int(ran[which].sum(1).unique()) for which in (images, ~images) if which.any()]
        wrote = torch.from_numpy(traces["decoder"].ran[0])[0]
        assert (wrote == wrote[..., :1]).all()
        used += sum(streams) / len(streams) + int(wrote[..., 0].sum())
        full += layers[0] + layers[1] * len(wrote)
        assert int(alone.decoder.sum()) == int(wrote[..., 0].sum()) == int(found.decoder[found.row == number].sum())
    assert by_layers(found, layers) == pytest.approx(1 - used / full, abs=1e-12)
    shares = executed(found, model.stacks)
    assert sum(shares["decoder"][layer][0] for layer in range(3)) == pytest.approx(float(found.decoder.double().mean()))


def test_flops_are_counted_from_sizes(model: Model) -> None:
    d, wide = 128, 512
    work = ExitCosts.of(model.stacks["encoder"], model.stacks["decoder"])
    assert (work.d, work.encoder, work.keys, work.memory) == (d, 4 * d * d + 2 * d * wide, 2 * d * d, 2 * d * d)
    assert work.decoder == 4 * d * d + 2 * d * d + 2 * d * wide and work.layers == (3, 3)
    one = Exits(
        {"image": torch.tensor([1]), "text": torch.tensor([3])},
        {"image": torch.tensor([64]), "text": torch.tensor([10])},
        torch.tensor([1, 2]),
        torch.tensor([0, 0]),
        torch.tensor([0, 1]),
        torch.tensor([True]),
        0.0,
        {},
    )
    stream = {n: n * work.encoder + 2 * n * n * d for n in (64, 10)}
    word = [work.decoder + 2 * d * (74 + seen) for seen in (1, 2)]
    used = stream[64] + 3 * stream[10] + word[0] + 2 * word[1] + (2 + 1) * work.keys + 2 * 74 * work.memory
    full = 3 * (stream[64] + stream[10] + sum(word) + 74 * work.memory)
    assert by_flops(one, work) == pytest.approx(1 - used / full, abs=1e-12)
    assert by_layers(one, (3, 3)) == pytest.approx(1 - ((1 + 3) / 2 + 3) / (3 + 6))
    assert histograms(one, (3, 3)) == {"image": [1, 0, 0], "text": [0, 0, 1], "decoder": [0.5, 0.5, 0]}


def test_quantiles_leave_that_fraction_above(model: Model, rows: ImageText) -> None:
    found = measure_exits(exit_view(model, ExitSettings(), {}), doubled(rows))
    for q in (0.25, 0.75):
        for name, tau in quantile_thresholds(found, q).items():
            s = found.cosines[name][:, :-1].flatten()
            s = s[~s.isnan()]
            assert float((s > tau).double().mean()) == pytest.approx(1 - q, abs=1 / len(s) + 1e-9)


# The search


def tried(reduction: float, right: float) -> ExitTrial:
    return ExitTrial({}, right, reduction, None)  # type: ignore[arg-type]


def test_the_front_is_what_nothing_beats_in_both() -> None:
    every = [tried(0.0, 0.9), tried(0.2, 0.9), tried(0.3, 0.7), tried(0.25, 0.6), tried(0.3, 0.8), tried(0.5, 0.1)]
    assert [(one.reduction, one.correct) for one in pareto_trials(every)] == [(0.2, 0.9), (0.3, 0.8), (0.5, 0.1)]
    for one in every:
        beaten = [o for o in pareto_trials(every) if o.reduction >= one.reduction and o.correct >= one.correct]
        assert beaten
    assert best_trial(every, 0.9, 0.85).reduction == 0.3 and best_trial(every, 0.9, 0.99).reduction == 0.2
    assert best_trial(every, 2.0, 0.99) is None


def test_a_search_sweeps_each_exit_and_then_tries_them_together(model: Model, rows: ImageText) -> None:
    params = ExitSettings().params({})
    found = search_thresholds(lambda tau: attempt(model, params, doubled(rows), tau), (0.8, 0.2))
    assert found[0].tau == {} and found[0].reduction == 0
    alone = [one for one in found if len(one.tau) == 1]
    assert {next(iter(one.tau)) for one in alone} == {"image", "text", "decoder"} and len(alone) == 6
    assert max(len(one.tau) for one in found) == 3
    again = attempt(model, params, doubled(rows), found[-1].tau)
    assert (again.reduction, again.correct) == (found[-1].reduction, found[-1].correct)


# Commands


@pytest.mark.slow
def test_the_method_trains_a_model_whose_plan_can_be_searched(rows: ImageText) -> None:
    model = open_model(shapes_vlm("patch_bart", **SMALL)[0])
    result = mue(model, rows, quantile=0.3, config=TrainConfig(steps=2, lr=1e-3, batch=2))
    assert set(result.plan.policies) == {"encoder", "decoder"} and result.plan.removed > 0
    findings = result.findings
    assert 0 < findings["reduction"]["by layers"] < 1 and set(findings["exits"]) <= {"image", "text", "decoder"}
    assert (
        result.view(**{k: v for k, v in rows.batch(rows[:2]).items() if k != "prompt_lengths"}).logits.isfinite().all()
    )
    series = thresholds(model, result.plan, rows)
    assert series.points[0].policies == {} and len(series.points) > 1
    assert [p.removed for p in series] == sorted({p.removed for p in series})
    study = saturation(model, rows)
    assert set(study["by quantile"]) == {"0.25", "0.5", "0.75", "0.9"}
    with pytest.raises(MethodError, match="needs a plan of mue"):
        thresholds(model, Plan(model=series.model, drop=["decoder.layers.1"]), rows)


def test_models_that_do_not_fit_are_refused_in_one_line(rows: ImageText) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (lamella.open(nano("bart")), {}, "works on models with image inputs; .* takes text only"),
        (lamella.open(nano("whisper")), {}, "works on models with image inputs; .* takes audio only"),
        (lamella.open(nano("llava")), {}, "works on encoder-decoders; .* is a clip_vision_model and llama"),
        (lamella.open(nano("llama")), {}, "mue works on decoders with cross-attention to an encoder; .* is a llama"),
    ]
    for wrong, options, match in cases:
        with pytest.raises(MethodError, match=match) as error:
            mue(wrong, rows, **options)
        assert "\n" not in str(error.value)


# Baselines


def test_confidence_and_patience_leave_where_their_rules_say(model: Model, rows: ImageText) -> None:
    encoder, decoder = model.stacks["encoder"], model.stacks["decoder"]
    plan = exit_plan(model, ExitSettings().params({}))
    full = exit_view(model, ExitSettings(), {})
    full.lamella_policy.recorded_hidden = streams = []
    measure_exits(full, doubled(rows), batch=16)
    p = torch.stack([decoder.head(h).softmax(-1) for h in streams], 2)  # [rows, time, layers, vocabulary]
    entropy, says = torch.special.entr(p).sum(-1), p.argmax(-1)
    below = float(entropy[..., :-1].detach().median())
    rules = {
        EntropyExits(decoder, below): lambda r, t: [e for e in range(1, 4) if float(entropy[r, t, e - 1]) < below],
        PatienceExits(decoder, 1): lambda r, t: [e for e in (2, 3) if says[r, t, e - 1] == says[r, t, e - 2]],
    }
    for policy, rule in rules.items():
        view = with_policies(model, plan, {"encoder": ModalityExits(encoder), "decoder": policy})
        first = measure_exits(view, doubled(rows), batch=16)
        for row, step, e in zip(first.row.tolist(), first.step.tolist(), first.decoder.tolist(), strict=True):
            if e == 1 or all(int(first.decoder[first.row == row][s]) == 3 for s in range(step)):
                assert e == min(rule(row, step), default=3)  # of tokens whose earlier ones are as in the full model


def test_one_fused_exit_is_the_model_as_it_was(model: Model, rows: ImageText) -> None:
    encoder, decoder = model.stacks["encoder"], model.stacks["decoder"]
    plan = exit_plan(model, ExitSettings().params({}))
    view = with_policies(model, plan, {"encoder": FusedExits(encoder), "decoder": TokenExits(decoder)})
    batch = batch_of(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels")}
    assert (view(**inputs).logits - model.model(**inputs).logits).abs().max() < 1e-9
    assert view.lamella_policy_encoder.exits["image"].tolist() == [3] * 6 + [0]
    early = with_policies(model, plan, {"encoder": FusedExits(encoder, -OFF), "decoder": TokenExits(decoder)})
    assert measure_exits(early, doubled(rows)).layers["text"].tolist() == [1] * 7


def test_shuffled_exits_have_the_same_histograms(model: Model, rows: ImageText) -> None:
    _, found = taken(model, doubled(rows))
    dealt = shuffled(found, 3)
    for name in ("image", "text"):
        assert dealt[name].sort().values.tolist() == found.layers[name].sort().values.tolist()
        assert (dealt[name] == 0).equal(found.layers[name] == 0)
    assert dealt["decoder"].sort().values.tolist() == found.decoder.sort().values.tolist()
