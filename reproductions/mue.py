"""MuE at small scale: a nano vision-language encoder-decoder with early exits by image, by text and by token.

The exactness checks come first, and the time of one request against the prediction from multiplications. Then a model
of 6 and 6 layers, trained on rendered shapes, is fine-tuned for two tasks: entailment (one token, which needs the
image; also with a description of the scene in the text) and captions (many tokens, a constant instruction). With
separate modalities, image and text meet in the decoder only, which must learn again to find the objects that a sentence
names: in every arm, sentences are about two objects first, then about up to four. There are three arms: the loss of the
last layer, of every layer, and of every layer with separate modalities. For the last arm: retention at a reduction of
40 %, with thresholds chosen on other rows slightly beyond that mark; the same histogram shuffled; exits by entropy and
by patience; fixed depths; exits of one stack alone; which modality can be limited; whether simple rows exit earlier.
For the second: one exit for both modalities. Answers count as correct if they match exactly, and exits are measured
with teacher forcing; the token F1 of captions is that of free generation. Intervals are over test rows, which all seeds
share. Tasks that are not learned at full depth, or that one decoder layer solves, are excluded from the claims.

    python reproductions/mue.py            # about two hours on one thread; an interrupted run resumes
    python reproductions/mue.py --quick    # exactness, and the time of a request
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from harness.vlm import opened_vlm, rows_of, shown_row, trained_vlm
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutput

from lamella.data import ImageText, Processing
from lamella.data.samples import NO_LOSS
from lamella.evaluate import Ratio, answered
from lamella.methods.mue import (
    OFF,
    ExitCosts,
    Exits,
    ExitSettings,
    ModalityExits,
    TokenExits,
    best_trial,
    by_flops,
    by_layers,
    decayed,
    exit_view,
    histograms,
    layerwise_loss,
    measure_exits,
    pareto_trials,
    quantile_thresholds,
    search_thresholds,
)
from lamella.methods.mue.baselines import EntropyExits, FusedExits, PatienceExits, shuffled
from lamella.methods.mue.method import attempt, depths, exact_match
from lamella.methods.mue.policy import MODALITIES, by_token, cosines, saturation
from lamella.methods.mue.recipe import exit_plan, train_view
from lamella.methods.mue.search import ExitTrial
from lamella.report.figures import Scatter
from lamella.results.record import together
from lamella.runtime import empty_cache, parallel, traced, with_policies
from lamella.stack import Model, open_model
from lamella.train import TrainConfig, with_weights_of
from lamella.zoo.nano import nano
from lamella.zoo.opening import open_processor
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import MOST, examples

KIND = "patch_mbart"  # its layers are pre-norm, like those of OFA
LAYERS = (6, 6)
TUNING = TrainConfig(batch=32, weight_decay=0.01, schedule="linear", warmup=0.06, save_every=50, bf16=True)
SENTENCES = (
    (2, replace(TUNING, steps=1000, lr=1e-3, schedule="constant")),
    (MOST, replace(TUNING, steps=2000, lr=1e-3)),
)
TUNED = {  # maximum number of objects in a scene, and number of steps
    "entailment": SENTENCES,
    "premise": SENTENCES,
    "caption": ((MOST, replace(TUNING, steps=300, lr=3e-4)),),
}
SEEDS = (0, 1, 2)
VALIDATION, TEST = 200, 300
LEARNT = 0.8
SWEPT = (0.8, 0.6, 0.4, 0.2)  # quantiles of S
AIM, RETAINED = 0.4, 0.96  # target reduction by layers, and required fraction of retained correct answers
AIMED = 0.42  # required reduction on held-out rows, with a margin for test rows
# Retained fraction at which exits of both stacks are compared with those of one, and the same on held-out rows.
KEPT, KEPT_AIMED = 0.98, 0.99
ALONE = ("both", "decoder alone", "encoder alone")
CUT = 2.5  # mean layers of a limited modality, of six: a third to a half
ARMS = ("last layer", "every layer", "apart")
TASKS = ("entailment", "premise", "caption")


# Exactness


def exactness(run: Run) -> None:
    torch.manual_seed(run.seed)
    for kind in ("patch_bart", "patch_mbart", "patch_t5", "florence2"):
        model = open_model(nano(kind).double())
        given, ids, mask = ragged(kind)
        full = exit_view(model, ExitSettings(), {})
        memory, apart = encoded(full, given), by_hand(model, given)
        far = float((memory - apart)[given["attention_mask"].bool()].abs().max())
        run.exact(f"{kind}: separate modalities, against each alone", "below 1e-5", f"{far:.1e}", far < 1e-5)
        ours = full(**given, decoder_input_ids=ids, decoder_attention_mask=mask).logits
        theirs = model.model(**over(memory, given), decoder_input_ids=ids, decoder_attention_mask=mask).logits
        same = torch.equal(ours, theirs)
        run.exact(f"{kind}: no exits, against the decoder itself", "bitwise equal", "yes" if same else "no", same)
        names, original = ([name for name, _ in each.named_parameters()] for each in (full, model.model))
        run.exact(f"{kind}: parameters", "those of the original", str(len(names)), names == original)
        early(run, kind, model, given, ids, mask)
    formulas(run)


def early(run: Run, kind: str, model: Model, given: dict[str, Tensor], ids: Tensor, mask: Tensor) -> None:
    """Compare, with exits at quantiles, batches with rows, steps with whole sequences, and layers run with exits."""
    lengths, real = torch.full((len(ids),), 3), mask.bool()
    full = exit_view(model, ExitSettings(), {})
    told = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    parallel(full, given | told, lengths)
    tau = {name: float(s[~s.isnan()].quantile(0.45)) for name, s in full.lamella_policy_encoder.cosines.items()}
    tau["decoder"] = float(full.lamella_policy.cosines[real][:, :-1].double().quantile(0.45))
    view = exit_view(model, ExitSettings(decay=(0.9, 1.0), answer=6), tau)
    trace = traced(view)
    whole = parallel(view, given | told, lengths).logits
    exits, streams = view.lamella_policy.exits.clone(), dict(view.lamella_policy_encoder.exits)
    ran = torch.from_numpy(trace.ran[0])[..., 0].sum(-1)
    same = torch.equal(ran[real], exits[real])
    run.exact(f"{kind}: layers that ran", "equal to the recorded exits", "yes" if same else "no", same)
    together, far = view(**given, **told).logits, 0.0
    for row in range(len(ids)):
        one = {name: each[row : row + 1] for name, each in told.items()}
        alone = view(**row_of(given, row), **one).logits[0]
        far = max(far, float((alone - together[row])[real[row]].abs().max()))
        taken = view.lamella_policy_encoder.exits
        same = same and all(int(taken[name][0]) == int(streams[name][row]) for name in MODALITIES)
    run.exact(f"{kind}: a batch against single rows", "below 1e-5, the same exits", f"{far:.1e}", far < 1e-5 and same)
    cache, parts, memory = empty_cache(view, lengths), [], encoded(view, given)
    for at in range(ids.shape[1]):
        one = {"decoder_input_ids": ids[:, at : at + 1], "decoder_attention_mask": mask[:, : at + 1]}
        out = view(**over(memory, given), **one, cache=cache, use_cache=True)
        parts.append(out.logits)
    far = float((torch.cat(parts, 1) - whole)[real].abs().max())
    run.exact(f"{kind}: cached steps against whole sequences", "below 1e-5", f"{far:.1e}", far < 1e-5)
    own = cache.self_attention_cache
    held = {layer.keys.shape[2] for layer in own.layers[: len(model.stacks["decoder"])]}
    run.exact(f"{kind}: keys in every layer's cache", str(ids.shape[1]), str(held), held == {ids.shape[1]})
    with left_at(model, exits):
        anew = model.model(**over(memory, given), **told).logits
    far = float((whole - anew)[real].abs().max())
    run.exact(f"{kind}: exits, against a full recomputation", "below 1e-5", f"{far:.1e}", far < 1e-5)


@contextmanager
def left_at(model: Model, exits: Tensor) -> Iterator[None]:
    """Make tokens of the unmodified model bypass the layers after their exits [batch, time], as a context."""

    def hook(gone: Tensor, _: Any, given: Any, out: Any) -> Any:
        chosen = torch.where(gone[..., None], given[0], out[0] if isinstance(out, tuple) else out)
        return (chosen, *out[1:]) if isinstance(out, tuple) else chosen

    layers = model.stacks["decoder"].layers
    hooks = [layer.register_forward_hook(partial(hook, exits <= index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def ragged(kind: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return three rows of prompts, the last one without an image, and left-padded decoder inputs."""
    places = {"florence2": 5}.get(kind, 16)
    ids, mask = torch.randint(3, 120, (3, places + 8)), torch.ones(3, places + 8, dtype=torch.long)
    ids[:2, 1 : places + 1] = 127
    mask[1, places + 5 :] = mask[2, 6:] = 0
    written, real = torch.randint(3, 120, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    real[0, :2] = 0
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 16, 16).double()}
    return given, written, real


def row_of(given: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    real = given["attention_mask"][row].bool()
    found = {name: given[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    return found | ({"pixel_values": given["pixel_values"][row : row + 1]} if row < 2 else {})


def encoded(view: Any, given: Mapping[str, Tensor]) -> Tensor:
    start = torch.full((len(given["input_ids"]), 1), 2)
    return view(**given, decoder_input_ids=start).encoder_last_hidden_state


def over(memory: Tensor, given: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the decoder's inputs for a given encoder output."""
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=memory), "attention_mask": given["attention_mask"]}


def by_hand(model: Model, given: Mapping[str, Tensor]) -> Tensor:
    """Run the encoder on each modality of each row separately, without masks."""
    encoder = model.stacks["encoder"]
    h = encoder.context(given).h
    out = h.clone()
    for row in range(len(h)):
        real, images = given["attention_mask"][row].bool(), given["input_ids"][row] == 127
        for which in (real & images, real & ~images):
            if which.any():
                stream, bias = h[row : row + 1, which], None
                for layer in encoder.layers:
                    if hasattr(layer, "layer"):  # T5's
                        if bias is None:
                            bias = layer.layer[0].SelfAttention.compute_bias(h.shape[1], h.shape[1])
                            bias = bias[:, :, which][..., which]
                        stream = layer(stream, None, bias)[0]
                    else:
                        stream = layer(stream, None)
                out[row, which] = stream[0]
    return encoder.normed(out)


def formulas(run: Run) -> None:
    before, after = torch.randn(2, 5, 7, 16).double().unbind(0)
    held = torch.rand(5, 7) < 0.7
    held[:, 0] = True
    weights = before.norm(dim=-1) * after.norm(dim=-1) * held
    norms = [(each * held[..., None]).flatten(1).norm(dim=1) for each in (before, after)]
    weighed = (weights * cosines(before, after)).sum(1) / (norms[0] * norms[1])
    far = float((saturation(by_token(before, after), held) - weighed).abs().max())
    run.exact("flat cosine against cosines weighted by norms", "below 1e-6", f"{far:.1e}", far < 1e-6)
    t = torch.arange(16)
    formula = (0.95 * 0.99 + 0.05 * torch.exp(-t / 16)).clamp(0, 1)
    far = float((decayed(0.99, t, 0.95, 1.0, 16) - formula).abs().max())
    far = max(far, float((decayed(0.7, t, 1.0, 1.0, 16) - 0.7).abs().max()))
    run.exact("thresholds that fall; beta = 1 stays", "the formula", f"{far:.1e}", far < 1e-6)
    far = gradients()
    run.exact("gradient of the loss of every layer against one pass for each", "below 1e-5", f"{far:.1e}", far < 1e-5)


@torch.enable_grad()
def gradients() -> float:
    """Return the difference between the gradient of the sum and the sum of gradients."""
    model = open_model(nano(KIND).double())
    given, ids, _ = ragged(KIND)
    batch = given | {"labels": ids.masked_fill(torch.arange(9) > torch.tensor([[5], [8], [3]]), NO_LOSS)}
    view = exit_view(model, ExitSettings(), {})
    layerwise_loss(view, batch, ExitSettings())[0].backward()
    ours = {name: each.grad for name, each in view.named_parameters() if each.grad is not None}
    view.zero_grad()
    carries, decoder = batch["labels"] != NO_LOSS, model.stacks["decoder"]
    begun = torch.cat([torch.full((3, 1), 2), batch["labels"][:, :-1].clamp(min=0)], 1)
    for layer in range(len(decoder)):
        streams: list[Tensor] = []
        view.lamella_policy.recorded_hidden = streams
        view(**given, decoder_input_ids=begun, use_cache=False)
        cross_entropy(decoder.head(streams[layer][carries]), batch["labels"][carries]).backward()
    return max(float((ours[name] - each.grad).abs().max()) for name, each in view.named_parameters() if name in ours)


# The time of a request


def request_times(run: Run) -> dict[str, Any]:
    """Time one request at SmolLM2's width, whole and with fixed exits at 40 % of the layers."""
    changes = {"d_model": 576, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536, "encoder_attention_heads": 9}
    made, processor = shapes_vlm(KIND, run.seed, 64, **changes, decoder_attention_heads=9)
    model = open_model(made)
    row = rows_like(processor, 64)
    inputs = row.prompts(row)
    written = 4
    e, j = 2, 4  # (2 + 4 * written) of (6 + 6 * written) layers are left: 60 %
    views = {"whole": exit_view(model, ExitSettings(), {}),
             "early": with_policies(model, exit_plan(model, ExitSettings().params({})), {
                 "encoder": ModalityExits(model.stacks["encoder"], image=-OFF, text=-OFF, min_layer=e),
                 "decoder": TokenExits(model.stacks["decoder"], threshold=-OFF, min_layer=j)})}  # fmt: skip
    ratios = []
    for _ in range(4 if run.quick else 20):
        took = {}
        for name, view in views.items():
            began = time.perf_counter()
            view.generate(**inputs, max_new_tokens=written, min_new_tokens=written, do_sample=False)
            took[name] = time.perf_counter() - began
        ratios.append(took["early"] / took["whole"])
    image = int((inputs["input_ids"] == made.config.image_token_id).sum())
    taken = Exits(
        {"image": torch.tensor([e]), "text": torch.tensor([e])},
        {"image": torch.tensor([image]), "text": torch.tensor([inputs["input_ids"].shape[1] - image])},
        torch.full((written,), j), torch.zeros(written, dtype=torch.long), torch.arange(written), torch.tensor([True]),
        0.0, {},
    )  # fmt: skip
    ratio = Ratio.of(ratios[1:])
    predicted = by_flops(taken, ExitCosts.of(model.stacks["encoder"], model.stacks["decoder"]))
    return {"ratio": [ratio.median, ratio.low, ratio.high], "flops": predicted, "layers": by_layers(taken, LAYERS)}


def rows_like(processor: Any, size: int) -> ImageText:
    """Return one question about an image of another size."""
    return ImageText(
        [shown_row(each) for each in examples(["entailment"], 1, "test", 0, size)], Processing(processor, True)
    )


# The nano model


def tuned(run: Run, task: str, arm: str, seed: int) -> dict[str, Any]:
    """Run one arm: fine-tune from the same weights, evaluate every decoder depth, and search thresholds if separate."""
    folder = trained_vlm(KIND, seed=run.seed)
    model = open_model(opened_vlm(folder))
    settings = ExitSettings(
        loss="final" if arm == "last layer" else "layerwise", decay=(0.95, 1.0) if task == "caption" else None
    )
    view = viewed(model, settings, fused=arm != "apart")
    work = run.work / f"{task}-{arm}-{seed}".replace(" ", "-")
    processing = Processing(open_processor(folder), encodes=True)
    for number, (most, config) in enumerate(TUNED[task]):
        count = (config.steps or 0) * config.batch
        lessons = examples([task], count, "calibration", 100 + seed + 10 * number, most=most)
        rows = ImageText([shown_row(each) for each in lessons], processing)
        train_view(view, rows, settings, replace(config, seed=seed), work / str(number))
    trained = open_model(carried(model, view))
    test, held_out = (
        rows_of(folder, [task], count, part, 7) for count, part in ((TEST, "test"), (VALIDATION, "calibration"))
    )
    with torch.no_grad():
        full = measure_exits(viewed(trained, settings, fused=arm != "apart"), test)
        by_depth = [
            exact_match(measure_exits(fixed(trained, settings, LAYERS[0], j, arm != "apart"), test))
            for j in range(1, 7)
        ]
        found = {"right": full.correct.tolist(), "by decoder depth": by_depth}
        if task == "caption":
            found["f1"] = token_f1(viewed(trained, settings, fused=arm != "apart"), test)
        if arm == "every layer":
            found["fused"] = one_exit(trained, settings, test, held_out)
        return found | searches(trained, settings, test, held_out) if arm == "apart" else found


def viewed(model: Model, settings: ExitSettings, fused: bool = False, **policies: Any) -> Any:
    """Return a view with exits disabled, or with the given policies."""
    encoder = FusedExits(model.stacks["encoder"]) if fused else ModalityExits(model.stacks["encoder"])
    given = {"encoder": encoder, "decoder": TokenExits(model.stacks["decoder"])} | policies
    return with_policies(model, exit_plan(model, settings.params({})), given)


def fixed(model: Model, settings: ExitSettings, e: int, j: int, fused: bool = False) -> Any:
    """Return a view in which all tokens exit after the same layers."""
    encoder, decoder = model.stacks["encoder"], model.stacks["decoder"]
    first = FusedExits(encoder, -OFF, e) if fused else ModalityExits(encoder, image=-OFF, text=-OFF, min_layer=e)
    return viewed(model, settings, encoder=first, decoder=TokenExits(decoder, threshold=-OFF, min_layer=j))


def carried(model: Model, view: Any) -> Any:
    """Return the model with the weights of a trained view."""
    return with_weights_of(model.stacks["decoder"], view).model


def token_f1(view: Any, rows: ImageText, batch: int = 50) -> float:
    """Return the mean token F1 of free generations and references, as bags of tokens."""
    found = []
    tokenizer = rows.processing.tokenizer
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        written = view.generate(**rows.prompts(some), max_new_tokens=24, do_sample=False)
        for row, ids in zip(some, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            ours, theirs = (Counter(text.split()) for text in (ids, row.answer))
            found.append(2 * (ours & theirs).total() / max(ours.total() + theirs.total(), 1))
    return float(np.mean(found))


def one_exit(model: Model, settings: ExitSettings, test: ImageText, held_out: ImageText) -> dict[str, Any]:
    """Evaluate MuE without decomposition: a joint exit of all encoder tokens, and the decoder's exits."""

    def tried(rows: ImageText, tau: Mapping[str, float]) -> ExitTrial:
        encoder = FusedExits(model.stacks["encoder"], tau.get("fused", OFF))
        decoder = TokenExits(model.stacks["decoder"], **settings.params(tau)["decoder"])
        taken = measure_exits(viewed(model, settings, encoder=encoder, decoder=decoder), rows)
        cosines = {"fused": taken.cosines["text"], "decoder": taken.cosines["decoder"]}  # equal for both modalities
        taken = replace(taken, cosines=cosines)
        return ExitTrial(dict(tau), exact_match(taken), by_layers(taken, LAYERS), taken)

    return said(tried(test, aimed(search_thresholds(partial(tried, held_out), SWEPT, kept=2)).tau), model)


def aimed(some: Sequence[ExitTrial]) -> ExitTrial:
    """Return the best attempt on held-out rows whose reduction is at least the target."""
    beyond = [one for one in some if one.reduction >= AIMED]
    return max(beyond, key=lambda one: (one.correct, -one.reduction), default=pareto_trials(some)[-1])


def searches(model: Model, settings: ExitSettings, test: ImageText, held_out: ImageText) -> dict[str, Any]:
    """Choose thresholds on held-out rows, and evaluate them and the baselines on test rows."""
    params = settings.params({})
    tried = search_thresholds(partial(attempt, model, params, held_out), SWEPT, kept=2)
    full = tried[0].correct
    limits = {
        "mue": aimed(tried),
        "both": best_trial(tried, full, KEPT_AIMED),
        "decoder alone": best_trial([one for one in tried if set(one.tau) <= {"decoder"}], full, KEPT_AIMED),
        "encoder alone": best_trial([one for one in tried if "decoder" not in one.tau], full, KEPT_AIMED),
    }
    told: dict[str, Any] = {}
    for name, one in limits.items():
        assert one is not None
        told[name] = said(attempt(model, params, test, one.tau), model)
    mue = attempt(model, params, test, limits["mue"].tau)  # type: ignore[union-attr]
    if settings.decay is not None:
        told["mue"]["f1"] = token_f1(exit_view(model, settings, mue.tau), test)
    told["front"] = [said(attempt(model, params, test, one.tau), model) for one in pareto_trials(tried)]
    told["by chance"] = by_chance(model, settings, test, mue.exits)
    told["fixed"] = [
        [e, j, *scored(measure_exits(fixed(model, settings, e, j), test))]
        for e in (2, 3, 4, 6)
        for j in (1, 2, 3, 4, 6)
    ]
    told["confidence"] = confidence(model, settings, test)
    told["cut"] = cut(model, settings, params, test, held_out)
    told["simple"] = simple(mue, test)
    return told


def said(one: ExitTrial, model: Model) -> dict[str, Any]:
    work = ExitCosts.of(model.stacks["encoder"], model.stacks["decoder"])
    return {
        "tau": one.tau,
        "right": one.exits.correct.tolist(),
        "layers": one.reduction,
        "used": used(one.exits),
        "flops": by_flops(one.exits, work),
        "exits": histograms(one.exits, depths(model)),
        "means": means(one.exits),
    }


def used(exits: Exits) -> list[list[float]]:
    """Return the executed and the total layers of each row; the modalities of a row share one encoder."""
    there = torch.stack([exits.tokens[name] > 0 for name in MODALITIES])
    ran = torch.stack([exits.layers[name] for name in MODALITIES]).double().sum(0) / there.sum(0)
    words = torch.zeros(2, len(ran), dtype=torch.double)
    words[0].index_add_(0, exits.row, exits.decoder.double())
    words[1].index_add_(0, exits.row, torch.full_like(exits.decoder, LAYERS[1]).double())
    return torch.stack([ran + words[0], LAYERS[0] + words[1]]).tolist()


def means(exits: Exits) -> list[float]:
    there = [exits.layers[name][exits.tokens[name] > 0] for name in MODALITIES]
    return [float(each.double().mean()) for each in (*there, exits.decoder)]


def scored(exits: Exits) -> tuple[float, float]:
    return by_layers(exits, LAYERS), exact_match(exits)


def by_chance(model: Model, settings: ExitSettings, test: ImageText, exits: Exits) -> list[list[bool]]:
    """Return which rows are correct when the same exits are assigned to other rows and tokens."""
    view, batch, found = viewed(model, settings), 16, []
    for seed in range(3):
        dealt, some = shuffled(exits, seed), []
        for start in range(0, len(test), batch):
            rows = slice(start, start + batch)
            here = (exits.row >= start) & (exits.row < start + batch)
            row, step = exits.row[here] - start, exits.step[here]
            words = torch.full((len(test[rows]), int(step.max()) + 1), LAYERS[1])
            words[row, step] = dealt["decoder"][here]
            view.lamella_policy_encoder.fixed_exits = {name: dealt[name][rows] for name in MODALITIES}
            view.lamella_policy.fixed_exits = words
            some += measure_exits(view, ImageText(test[rows], test.processing)).correct.tolist()
        found.append(some)
    return found


def confidence(model: Model, settings: ExitSettings, test: ImageText) -> dict[str, list[tuple[float, float]]]:
    """Return reduction and exact match of decoder exits by entropy and by patience."""
    decoder = model.stacks["decoder"]
    rules = {
        "entropy": [EntropyExits(decoder, below) for below in (0.01, 0.05, 0.2, 0.5, 1.0)],
        "patience": [PatienceExits(decoder, patience) for patience in (4, 3, 2, 1)],
    }
    return {name: [scored(measure_exits(viewed(model, settings, decoder=each), test)) for each in some]
            for name, some in rules.items()}  # fmt: skip


def cut(
    model: Model, settings: ExitSettings, params: dict[str, Any], test: ImageText, held_out: ImageText
) -> dict[str, dict[str, Any]]:
    """Return the two-by-two table: each modality whole, or limited by its threshold to a third to a half of them."""
    full = measure_exits(viewed(model, settings), held_out)
    tau = {}
    for place, name in enumerate(MODALITIES):
        limits = [quantile_thresholds(full, q)[name] for q in np.linspace(0.02, 0.98, 9)]
        depth = [means(attempt(model, params, held_out, {name: limit}).exits)[place] for limit in limits]
        tau[name] = limits[int(np.argmin(np.abs(np.array(depth) - CUT)))]
    cases: dict[str, Sequence[str]] = {
        "whole": (),
        "image limited": ("image",),
        "text limited": ("text",),
        "both limited": MODALITIES,
    }
    found = {}
    for name, those in cases.items():
        one = attempt(model, params, test, {each: tau[each] for each in those})
        found[name] = {"right": one.correct, "means": means(one.exits)}
    return found


def simple(one: ExitTrial, test: ImageText) -> dict[str, Any]:
    """Compare text exits of rows about one object with those of rows about two."""
    texts = [row.messages[0]["content"] for row in test]
    related = torch.tensor([any(side in text for side in ("above", "below", "left", "right")) for text in texts])
    e = one.exits.layers["text"].double()
    groups = [e[~related], e[related]]
    if min(map(len, groups)) < 2:
        return {}
    spread = float(torch.cat([each - each.mean() for each in groups]).std()) or float("nan")
    gap = float(groups[1].mean() - groups[0].mean())
    return {"one": float(groups[0].mean()), "two": float(groups[1].mean()), "effect": gap / spread if gap else 0.0}


def learnt(run: Run) -> dict[str, float]:
    folder = trained_vlm(KIND, seed=run.seed)
    model = opened_vlm(folder)
    return {task: float(answered(model, rows_of(folder, [task], TEST, "test", 7)).float().mean()) for task in TASKS}


def claims(run: Run) -> None:
    known = run.arm("what the model has learnt", learnt, run)
    run.table(
        "The model before it is tuned", ["task", "right"], [[task, f"{value:.1%}"] for task, value in known.items()]
    )
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for task in TASKS:
        for arm in ARMS if task != "premise" else ARMS[-1:]:
            seeds = SEEDS if (task, arm) == ("entailment", "apart") else SEEDS[:1]
            found[task, arm] = [run.arm(f"{task}, {arm}, {seed}", tuned, run, task, arm, seed) for seed in seeds]
    able = trained(run, found)
    shown = {task: found[task, "apart"][0]["mue"]["exits"] for task in ("entailment", "caption")}
    lines = {f"{task}, {name}": [(layer, 100 * share) for layer, share in enumerate(shares, 1)]
             for task, streams in shown.items() for name, shares in streams.items()}  # fmt: skip
    run.figure("mue-exits", Scatter("exit after layer", "rows or tokens, percent", lines, joined=True))
    for task in TASKS:
        exits(run, task, found[task, "apart"], found.get((task, "every layer"), ()), able[task])
    saved(run, found, able)


def percent(values: Sequence[bool]) -> float:
    return 100 * float(np.mean(values))


def trained(run: Run, found: Mapping[tuple[str, str], Sequence[dict[str, Any]]]) -> dict[str, bool]:
    """Report the cost of per-layer losses and of separate modalities at full depth, and the results at other depths.

    Returns:
        The tasks on which the models can support further claims: those learnt, and not solved by the first layer.
    """
    run.table(
        "Exact match in %, by decoder exit, with the full encoder",
        ["task", "arm", "full depth", *map(str, range(1, 7))],
        [[task, arm, np.mean([percent(one["right"]) for one in some]),
          *(100 * np.mean([one["by decoder depth"] for one in some], 0))] for (task, arm), some in found.items()],
    )  # fmt: skip

    def first(task: str, arm: str) -> dict[str, Any]:
        return found[task, arm][0]

    able = {}
    for task in TASKS:
        usual = percent(first(task, "last layer" if (task, "last layer") in found else "apart")["right"])
        learnt = usual >= 100 * LEARNT
        run.exact(f"{task}, gate: exact match at full depth", f"at least {LEARNT:.0%}", f"{usual:.1f} %", learnt)
        by_depth = first(task, "apart")["by decoder depth"]
        lost = 100 * (by_depth[-1] - by_depth[0])
        deep = lost > 2
        run.exact(f"{task}, gate: points lost with the first decoder layer only", "above 2", f"{lost:.1f}", deep)
        able[task] = learnt and deep
    for task in ("entailment", "caption"):
        cost = percent(first(task, "every layer")["right"]) - percent(first(task, "last layer")["right"])
        said = f"{task}: every layer less last layer, full depth, points"
        run.further(said, "at least -2", f"{cost:.1f}", cost >= -2 if able[task] else None)
        price = percent(first(task, "apart")["right"]) - percent(first(task, "every layer")["right"])
        run.table(f"{task}: the price of decomposing", ["points"], [[price]])
    third = [100 * first("caption", arm)["by decoder depth"][2] for arm in ("every layer", "last layer")]
    gain = third[0] - third[1]
    said = "caption: every layer less last layer, after layer 3, points"
    run.further(said, "at least 20", f"{gain:.1f}", gain >= 20 if able["caption"] else None)
    freely = [[arm, first("caption", arm)["f1"]] for arm in ARMS]
    freely.append(["apart, exits of MuE", first("caption", "apart")["mue"]["f1"]])
    run.table(f"caption: token F1 of what is written freely, {TEST} test rows, seed 0", ["arm", "F1"], freely)
    return able


def exits(run: Run, task: str, some: Sequence[dict[str, Any]], fused: Sequence[dict[str, Any]], able: bool) -> None:
    """Report one task: retention beside the baselines, one of which processes the modalities together."""
    one = some[0]
    rows = [
        [
            "MuE, aiming at 40 %",
            one["mue"]["layers"],
            one["mue"]["flops"],
            percent(one["mue"]["right"]),
            *one["mue"]["means"],
        ]
    ]
    rows += [
        ["MuE's front", each["layers"], each["flops"], percent(each["right"]), *each["means"]] for each in one["front"]
    ]
    chance = np.mean([percent(each) for each in one["by chance"]])
    rows += [
        ["one exit for both modalities, aiming at 40 %", each["fused"]["layers"], "", percent(each["fused"]["right"]),
         *each["fused"]["means"]]
        for each in fused[:1]
    ]  # fmt: skip
    rows += [["the same exits, shuffled", one["mue"]["layers"], one["mue"]["flops"], chance, *one["mue"]["means"]]]
    rows += [
        [name, reduction, "", 100 * value, "", "", ""]
        for name, each in one["confidence"].items()
        for reduction, value in each
    ]
    rows += [[f"fixed, {e} and {j}", reduction, "", 100 * value, e, e, j] for e, j, reduction, value in one["fixed"]]
    columns = ["exits", "reduction by layers", "by FLOPs", "% exact match", "image", "text", "decoder"]
    run.table(f"{task}: reduction and exact match, {TEST} test rows, seed 0, teacher forcing", columns, rows)
    run.table(
        f"{task}: the most reduction that keeps {KEPT_AIMED:.0%} of the exact matches on held-out rows, on test rows",
        ["exits", "reduction by layers", "by FLOPs", "% exact match", "retained", *MODALITIES, "decoder"],
        [[name, *(np.mean([one[name][each] for one in some]) for each in ("layers", "flops")),
          np.mean([percent(one[name]["right"]) for one in some]), str(retained(some, name, run.seed)),
          *np.mean([one[name]["means"] for one in some], 0)] for name in ALONE],
    )  # fmt: skip
    run.table(f"{task}: modalities limited to about {CUT} layers", ["encoder", "% exact match", "image", "text"],
              [[name, 100 * each["right"], *each["means"][:2]] for name, each in one["cut"].items()])  # fmt: skip
    run.table(f"{task}: exits of MuE, in % of rows or words", ["exit", *map(str, range(1, 7))],
              [[name, *(100 * share for share in shares)] for name, shares in one["mue"]["exits"].items()])  # fmt: skip
    if one["simple"]:
        run.table(
            f"{task}: mean exit of the text",
            ["one object", "two related", "effect size"],
            [list(one["simple"].values())],
        )
        effect = one["simple"]["effect"]
        said = f"{task}: text about one object exits earlier, effect size"
        run.further(said, "above 0", f"{effect:.2f}", effect > 0 if able else None)


def saved(run: Run, found: Mapping[tuple[str, str], Sequence[dict[str, Any]]], able: Mapping[str, bool]) -> None:
    """Check the claims on exits and on modalities, on the tasks that can support them."""

    def claim(task: str, name: str, expected: str, measured: Any, verdict: bool | None) -> None:
        run.main(f"{task}: {name}", expected, str(measured), verdict if able[task] else None)

    some = found["entailment", "apart"]
    least = min(one["mue"]["layers"] for one in some)
    kept = retained(some, "mue", run.seed)
    claim("entailment", f"retained at a reduction of {least:.0%} by layers", f"at least {RETAINED}", kept,
          kept.at_least(RETAINED))  # fmt: skip
    claim("entailment", "reduction by layers", f"at least {AIM:.0%}", f"{least:.1%}", least >= AIM)
    for task in ("entailment", "caption"):
        some = found[task, "apart"]
        ahead = paired(some, run.seed)
        claim(task, "MuE less the same exits, shuffled, points", "at least 0", ahead, ahead.at_least(0))
        gain = more_saved(some, "both", "decoder alone", run.seed)
        quality = retained(some, "both", run.seed)
        measured = f"{gain}, retained {quality}"
        verdict = together([gain.at_least(1e-9), quality.at_least(KEPT)])
        said = f"exits of both stacks less the decoder's alone, reduction, at {KEPT:.0%} retained"
        claim(task, said, f"above 0, and at least {KEPT}", measured, verdict)
        encoder = more_saved(some, "encoder alone", None, run.seed)
        told = f"{encoder}, retained {retained(some, 'encoder alone', run.seed)}"
        run.further(
            f"{task}: reduction by exits of the encoder alone",
            "above 0",
            told,
            encoder.at_least(1e-9) if able[task] else None,
        )
    one = found["entailment", "apart"][0]["mue"], found["entailment", "every layer"][0]["fused"]
    ahead = over_rows([100 * np.subtract(*(np.array(each["right"], dtype=float) for each in one))], np.mean, run.seed)
    told = f"{ahead}, at {one[0]['layers']:.0%} and {one[1]['layers']:.0%}"
    run.further("entailment: MuE less one exit for both modalities, points, seed 0", "at least 0", told,
                ahead.at_least(0) if able["entailment"] else None)  # fmt: skip
    for task, cheap, dear in (
        ("premise", "image limited", "text limited"),
        ("caption", "text limited", "image limited"),
    ):
        table = found[task, "apart"][0]["cut"]
        loss = {name: 100 * (table["whole"]["right"] - table[name]["right"]) for name in (cheap, dear)}
        measured, less = f"{loss[cheap]:.1f} and {loss[dear]:.1f} points", loss[cheap] < loss[dear]
        run.further(f"{task}: {cheap} costs less than {dear}", "less", measured, less if able[task] else None)


def paired(some: Sequence[dict[str, Any]], seed: int) -> Measured:
    """Return the retention of MuE minus that of random exits, in points."""
    gaps = [np.array(one["mue"]["right"], dtype=float) - np.mean(np.array(one["by chance"], dtype=float), 0)
            for one in some]  # fmt: skip
    return over_rows([100 * np.mean(gaps, 0)], np.mean, seed)


def retained(some: Sequence[dict[str, Any]], name: str, seed: int) -> Measured:
    """Return the fraction of correct answers that remain with some exits."""
    both = [np.mean([each["right"] for each in rows], 0) for rows in ([one[name] for one in some], some)]
    return over_rows(both, lambda ours, full: ours.mean() / max(full.mean(), 1e-9), seed)


def more_saved(some: Sequence[dict[str, Any]], name: str, other: str | None, seed: int) -> Measured:
    """Return the difference in reduction by layers between two sets of exits."""
    names = [name] if other is None else [name, other]
    parts = [each for one in some for which in names for each in np.array(one[which]["used"])]

    def gap(*ran: np.ndarray) -> float:
        left = np.array([a.sum() / b.sum() for a, b in zip(ran[::2], ran[1::2], strict=True)])
        left = left.reshape(len(some), len(names)).mean(0)
        return float(1 - left[0] if other is None else left[1] - left[0])

    return over_rows(parts, gap, seed)


def over_rows(parts: Sequence[np.ndarray], figure: Callable[..., Any], seed: int, draws: int = 2000) -> Measured:
    """Return a statistic of row values [rows], with its bootstrap interval over rows.

    Seeds are evaluated on the same rows, so they are averaged within a row and do not count as further rows.
    """
    drawn = np.random.default_rng(seed).integers(len(parts[0]), size=(draws, len(parts[0])))
    low, high = np.quantile([figure(*(each[rows] for each in parts)) for rows in drawn], (0.025, 0.975))
    return Measured(float(figure(*parts)), float(low), float(high))


def experiment(run: Run) -> None:
    run.data = "rendered shapes: captions, questions, sentences that an image entails or not; held-out test scenes"
    with torch.no_grad():
        run.part("exactness", exactness)
        found = run.arm("time of a request", request_times, run)
    ratio = Measured(*found["ratio"])
    run.table(
        "One request of 256 image tokens, 4 generated tokens, SmolLM2's width, exits after layers 2 and 4 of 6 and 6",
        ["layers skipped", "multiplications skipped", "time left"],
        [[found["layers"], found["flops"], str(ratio)]],
    )
    if run.quick:  # a few rounds are not conclusive
        return
    median, low, high = (1 - each for each in found["ratio"])
    reduction = Measured(*(each / found["flops"] for each in (median, high, low)))
    told = "reduction of time, by the reduction that multiplications predict"
    run.further(told, "0.85 to 1.15", str(reduction), reduction.within(0.85, 1.15))
    claims(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="what is exact, and the time of a request"))
