"""Studies of depth, against whole forward passes of the transformers models with hooks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lamella
from lamella.data import MARK, ImageText, ImageTextRow, Processing
from lamella.errors import CalibrationError, MethodError
from lamella.measure import angular_distance, block_influence, hidden_norms, sublayer_influence
from lamella.methods.depth_efficiency import (
    TokenMean,
    deepest_use,
    depth_efficiency,
    depth_profile,
    depth_score,
    integrated_gradients,
    linear_maps,
    local_effect,
    mean_hidden,
    refinement,
    residual_erasure,
    skip_effect,
    split_points,
    study,
    turning_point,
)
from lamella.methods.depth_efficiency.contributions import run_once
from lamella.methods.depth_efficiency.effects import _skip_each
from lamella.registry import get_method, methods
from lamella.stack import Stack, open_model
from lamella.zoo.nano import NANO, nano
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import examples

CAUSAL = [name for name in NANO if name != "vit"]
LAYERS = 4
IDS = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(0))


class Hooked:
    """A transformers model whose layers' inputs and outputs are seen, and may be changed."""

    def __init__(self, stack: Stack) -> None:
        self.stack, self.model = stack, stack.model
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.change: dict[int, Any] = {}
        for index, layer in enumerate(stack.layers):
            layer.register_forward_hook(self._hook(index), with_kwargs=True)

    def _hook(self, index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            after = out[0] if isinstance(out, tuple) else out
            if index in self.change:
                after = self.change[index](before, after)
            self.inputs.append(before[0])
            self.outputs.append(after[0])
            return (after, *out[1:]) if isinstance(out, tuple) else after

        return hook

    @torch.no_grad()
    def __call__(self, ids: Tensor, change: dict[int, Any] | None = None) -> tuple[Tensor, Tensor]:
        """Contributions [layers, time, hidden] and output probabilities [time, vocabulary]."""
        self.inputs, self.outputs, self.change = [], [], change or {}
        logits = self.model(input_ids=ids[None], use_cache=False).logits[0]
        self.change = {}
        return torch.stack(self.outputs) - torch.stack(self.inputs), logits.softmax(-1)


def relative(now: Tensor, clean: Tensor) -> Tensor:
    return (now - clean).norm(dim=-1) / clean.norm(dim=-1)


@pytest.mark.parametrize("name", CAUSAL)
def test_contributions_rebuild_the_stream(name: str) -> None:
    stack = Stack(nano(name))
    run = run_once(stack, IDS[0])
    c, y = Hooked(stack)(IDS[0])
    torch.testing.assert_close(run.c, c, rtol=0, atol=1e-5)
    torch.testing.assert_close(run.h[0] + run.c.sum(0), run.h[-1], rtol=1e-5, atol=1e-5)
    if name != "opt_post_norm":  # whose norms stand behind the additions
        torch.testing.assert_close(run.attn + run.mlp, run.c, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stack.head(run.h[-1:])[0].softmax(-1), y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CAUSAL)
def test_skipping_for_all_tokens_equals_whole_passes_with_a_layer_taken_out(name: str) -> None:
    stack = Stack(nano(name))
    effect = skip_effect(stack, IDS, scope="current")
    hooked = Hooked(stack)
    most, total = np.zeros((LAYERS, LAYERS)), np.zeros((LAYERS, LAYERS))
    outputs = np.zeros((LAYERS, 2))
    for ids in IDS:
        c, y = hooked(ids)
        for skipped in range(LAYERS):

            def identity(before: Tensor, after: Tensor) -> Tensor:
                return torch.cat([after[:, :1], before[:, 1:]], dim=1)

            now, changed = hooked(ids, {skipped: identity})
            changes = relative(now, c)[:, 1:]
            most[skipped] = np.maximum(most[skipped], changes.amax(-1).numpy())
            total[skipped] += changes.mean(-1).numpy() / 2
            distance = (changed - y)[1:].norm(dim=-1)
            outputs[skipped] = max(outputs[skipped, 0], distance.max()), outputs[skipped, 1] + distance.mean() / 2
    np.testing.assert_allclose(effect.later["max"].values, most, rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(effect.later["mean"].values, total, rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(effect.output["max"].values, outputs[:, 0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(effect.output["mean"].values, outputs[:, 1], rtol=1e-3, atol=1e-6)
    assert (np.tril(effect.later["max"].values, -1) == 0).all()
    np.testing.assert_allclose(effect.later["mean"].values.diagonal(), 1, rtol=1e-6)


@pytest.mark.parametrize("part", ["layer", "attn", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "gpt_neox", "qwen3_moe"])
def test_skipping_in_the_past_equals_whole_passes_and_is_measured_behind_the_split(name: str, part: str) -> None:
    stack, ids, point = Stack(nano(name)), IDS[0], 9
    run = run_once(stack, ids)
    later, output = TokenMean(LAYERS, LAYERS), TokenMean(LAYERS)
    _skip_each(stack, run, part, point, 1, later, output)
    hooked = Hooked(stack)
    c, y = hooked(ids)
    for skipped in range(LAYERS):
        kept = {"layer": 0, "attn": run.mlp[skipped], "mlp": run.attn[skipped]}[part]

        def without(before: Tensor, after: Tensor, kept: Any = kept) -> Tensor:
            return torch.cat([after[:, :1], (before + kept)[:, 1:point], after[:, point:]], dim=1)

        now, changed = hooked(ids, {skipped: without})
        expected = relative(now, c)[:, point:].amax(-1).numpy()
        np.testing.assert_allclose(later.maximum[skipped], expected, rtol=1e-3, atol=2e-5)
        np.testing.assert_allclose(
            output.maximum[skipped], (changed - y)[point:].norm(dim=-1).max(), rtol=1e-3, atol=1e-6
        )
    assert (later.maximum.diagonal() == 0).all()  # a layer does not read what it adds itself


def test_skipping_nothing_changes_nothing_to_the_bit() -> None:
    stack = Stack(nano("llama"))
    later, output = TokenMean(LAYERS, LAYERS), TokenMean(LAYERS)
    _skip_each(stack, run_once(stack, IDS[0]), "layer", 1, 1, later, output)  # no token lies between front and split
    assert (later.maximum == 0).all() and (output.maximum == 0).all()


def test_what_is_the_same_has_a_distance_of_zero_in_long_sequences_too() -> None:
    """Whole and in pieces a matrix product may round differently."""
    stack = Stack(nano("llama", vocab_size=2048))
    silence(stack, range(1, 3), 0)
    ids = torch.randint(3, 2048, (1, 150), generator=torch.Generator().manual_seed(4))
    for scope in ("current", "future"):
        effect = skip_effect(stack, ids, scope=scope, splits=2)  # type: ignore[arg-type]
        assert (effect.output["max"].values[1:3] == 0).all()


def test_a_split_behind_the_sequence_measures_nothing() -> None:
    stack = Stack(nano("llama"))
    later, output = TokenMean(LAYERS, LAYERS), TokenMean(LAYERS)
    _skip_each(stack, run_once(stack, IDS[0]), "layer", 21, 1, later, output)
    assert (later.count == 0).all() and (output.count == 0).all()
    assert np.isnan(later.scores("x", ("a", "b"), {})["mean"].values).all()


def test_changing_late_tokens_leaves_early_ones_alone() -> None:
    stack = Stack(nano("llama"))
    run = run_once(stack, IDS[0])
    h = run.h[1].clone()
    h[9:] += 1.0
    after = stack.run(h[None], 1, LAYERS, run.context)[0]
    torch.testing.assert_close(after[:9], run.h[-1, :9], rtol=0, atol=1e-6)
    assert not torch.allclose(after[9:], run.h[-1, 9:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_the_direct_effect_gives_each_layer_the_stream_without_one_contribution(name: str) -> None:
    stack = Stack(nano(name))
    found = local_effect(stack, IDS, splits=1, seed=3)
    hooked, drawn = Hooked(stack), random.Random(3)
    expected = np.full((LAYERS, LAYERS), np.nan)
    for ids in IDS:
        (point,) = split_points(len(ids), 1, 8, 1, drawn)
        c, _ = hooked(ids)
        h = torch.stack(hooked.inputs)
        for skipped in range(LAYERS):
            for layer in range(skipped + 1, LAYERS):
                given = h[layer].clone()
                given[1:point] -= c[skipped, 1:point]
                now, _ = hooked(ids, {layer - 1: lambda before, after, given=given: given[None]})
                most = relative(now[layer], c[layer])[point:].max()
                expected[skipped, layer] = np.nanmax([expected[skipped, layer], most])
    np.testing.assert_allclose(found["max"].values, expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3_text"])
def test_the_profile_equals_its_definitions_in_float64(name: str) -> None:
    stack = Stack(nano(name))
    profile = depth_profile(stack, IDS)
    hooked = Hooked(stack)
    layer = 2
    ratios, cosines, kls, overlaps = [], [], [], []
    for ids in IDS:
        c, y = hooked(ids)
        h = torch.stack([*hooked.inputs, hooked.outputs[-1]])[:, 1:].double()
        c = c[layer, 1:].double()
        ratios += (c.norm(dim=-1) / h[layer].norm(dim=-1)).tolist()
        cosines += torch.cosine_similarity(c, h[layer], dim=-1).tolist()
        q = stack.head(h[layer].float()[None])[0].double().softmax(-1)
        kls += (y[1:].double() * (y[1:].double().log() - q.log())).sum(-1).tolist()
        pairs = zip(y[1:].topk(5).indices.tolist(), q.topk(5).indices.tolist(), strict=True)
        overlaps += [len(set(ours) & set(theirs)) / 5 for ours, theirs in pairs]
    assert profile["ratio_layer"].values[layer] == pytest.approx(np.mean(ratios), rel=1e-4)
    assert profile["ratio_layer_max"].values[layer] == pytest.approx(np.max(ratios), rel=1e-4)
    assert profile["cosine_layer"].values[layer] == pytest.approx(np.mean(cosines), abs=1e-4)
    assert profile["lens_kl"].values[layer] == pytest.approx(np.mean(kls), rel=1e-3)
    assert profile["lens_top5"].values[layer] == pytest.approx(np.mean(overlaps))
    assert profile["lens_kl"].values[-1] < 1e-6 and profile["lens_top5"].values[-1] == 1


def test_means_are_over_tokens_not_over_sequences_and_padding_does_not_count() -> None:
    stack = Stack(nano("llama"))
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    padded = depth_profile(stack, {"input_ids": IDS, "attention_mask": mask})
    first, second = depth_profile(stack, IDS[:1]), depth_profile(stack, IDS[1:, 9:])
    for name in ("ratio_attn", "norm_residual", "lens_kl"):
        expected = (20 * first[name].values + 11 * second[name].values) / 31
        np.testing.assert_allclose(padded[name].values, expected, rtol=1e-5, atol=1e-6)


def test_estimates_of_the_phases() -> None:
    assert refinement(np.array([5.0, 6.0, 4.0, 4.5, 2.0, 0.0])) == 3
    assert refinement(np.array([3.0, 2.0, 1.0])) == 0
    assert turning_point(np.array([-0.2, 0.5, -0.1, 0.01, 0.2])) == 3
    assert turning_point(np.array([0.1, 0.2])) is None


@torch.no_grad()
def silence(stack: Stack, layers: range, scale: float) -> None:
    for layer in layers:
        stack.layers[layer].self_attn.o_proj.weight *= scale
        stack.layers[layer].mlp.down_proj.weight *= scale


def test_silent_layers_have_no_effect_and_no_depth() -> None:
    stack = Stack(nano("llama", num_hidden_layers=8))
    silence(stack, range(4, 7), 0)
    found = study(stack, IDS, splits=2)
    for effect in (found.current, found.future):
        assert (effect.later["max"].values[4:7] == 0).all() and (effect.output["max"].values[4:7] == 0).all()
    assert (found.profile["ratio_layer_max"].values[4:7] == 0).all()
    assert (np.nan_to_num(found.local["max"].values[4:7]) == 0).all()
    assert found.effective_depth <= 4


def test_the_depth_score_lies_where_the_effect_is() -> None:
    for loud in (1, 5):
        stack = Stack(nano("llama", num_hidden_layers=8))
        silence(stack, [layer for layer in range(7) if layer != loud], 0)  # type: ignore[arg-type]
        score = depth_score(stack, IDS[0], 12)
        assert score.later == pytest.approx(loud) and score.output == pytest.approx(loud)


def test_the_same_seed_draws_the_same_splits() -> None:
    stack = Stack(nano("llama"))
    first, again, other = (skip_effect(stack, IDS, splits=1, seed=seed) for seed in (1, 1, 5))
    assert np.array_equal(first.later["mean"].values, again.later["mean"].values)
    assert not np.array_equal(first.later["mean"].values, other.later["mean"].values)


@pytest.mark.parametrize("name", CAUSAL)
def test_attributions_of_a_layer_sum_to_what_the_answer_loses_without_it(name: str) -> None:
    stack = Stack(nano(name))
    found = integrated_gradients(stack, IDS[0], 15, steps=64)
    assert found.values.values.shape == (LAYERS, 15)
    if not name.endswith("moe"):  # tokens jump between experts along the path
        assert found.completeness_error.max() < 0.02
    hooked = Hooked(stack)
    _, y = hooked(IDS[0, :15])

    def identity(before: Tensor, after: Tensor) -> Tensor:
        return torch.cat([after[:, :1], before[:, 1:]], dim=1)

    _, without = hooked(IDS[0, :15], {2: identity})
    wanted = IDS[0, 15]
    expected = float(y[-1, wanted].log() - without[-1, wanted].log())
    assert found.removed[2] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_attributions_of_a_trained_model_are_complete_with_the_default_steps() -> None:
    stack = lamella.open(Path(__file__).parents[2] / "models" / "nano-llama")
    assert integrated_gradients(stack, IDS[0], 15).completeness_error.max() < 0.02


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "gemma3_text"])
def test_erasing_a_token_equals_a_whole_pass_with_the_mean_in_its_place(name: str) -> None:
    stack = Stack(nano(name))
    mean = mean_hidden(stack, IDS)
    lost = residual_erasure(stack, IDS[0], 15, mean)
    hooked, token = Hooked(stack), 6
    _, y = hooked(IDS[0, :15])
    expected_mean = torch.cat([torch.stack(hooked.inputs)[2, 1:]])
    assert mean.shape == (LAYERS + 1, 32) and expected_mean.shape[-1] == 32

    def erase(before: Tensor, after: Tensor) -> Tensor:
        after = after.clone()
        after[0, token] = mean[2]
        return after

    _, changed = hooked(IDS[0, :15], {1: erase})
    wanted = IDS[0, 15]
    assert lost.values[2, token] == pytest.approx(float(y[-1, wanted] - changed[-1, wanted]), rel=1e-3, abs=1e-7)
    assert np.isnan(lost.values[:, 0]).all()


def test_the_mean_stream_is_that_of_all_tokens_behind_the_front() -> None:
    stack = Stack(nano("llama"))
    hooked, seen = Hooked(stack), []
    for ids in IDS:
        hooked(ids)
        seen.append(torch.stack([*hooked.inputs, hooked.outputs[-1]])[:, 1:])
    torch.testing.assert_close(mean_hidden(stack, IDS), torch.cat(seen, 1).mean(1), rtol=1e-4, atol=1e-5)


def test_the_deepest_use_is_the_last_layer_that_matters() -> None:
    lost = lamella_scores(np.array([[np.nan, 0.2, 0.0], [np.nan, -0.3, 0.0], [np.nan, 0.001, 0.0]]))
    assert deepest_use(lost).tolist() == [-1, 1, -1]


def lamella_scores(values: np.ndarray) -> Any:
    from lamella.measure import Scores

    return Scores("lost", ("layer", "token"), values)


def many(count: int = 40, time: int = 40) -> Tensor:
    return torch.randint(3, 128, (count, time), generator=torch.Generator().manual_seed(2))


def test_a_model_maps_to_itself_along_the_diagonal() -> None:
    stack = Stack(nano("llama"))
    maps = linear_maps(stack, stack, many(), ridge=1e-9)
    assert maps.errors.values.shape == (LAYERS + 1, LAYERS + 1) and not maps.few
    assert maps.errors.values.diagonal().max() < 1e-3
    assert maps.best.tolist() == list(range(LAYERS + 1)) and maps.correlation == pytest.approx(1) and maps.offset == 0
    assert maps.along() < maps.along(reverse=True)


def test_maps_equal_a_ridge_regression_by_scikit_learn() -> None:
    from sklearn.linear_model import Ridge

    source, target = Stack(nano("llama")), Stack(nano("gpt2", n_embd=40, n_layer=3))
    rows = many(20, 30)
    maps = linear_maps(source, target, rows, ridge=0.01)
    h = [torch.cat([run_once(stack, ids).h[:, 1:] for ids in rows], 1).double().numpy() for stack in (source, target)]
    x, y, fit = h[0][2], h[1][1], 16 * 29
    centred = x[:fit] - x[:fit].mean(0)
    alpha = 0.01 * np.trace(centred.T @ centred) / x.shape[1]
    predicted = Ridge(alpha=alpha).fit(x[:fit], y[:fit]).predict(x[fit:])
    expected = np.mean(np.linalg.norm(y[fit:] - predicted, axis=1) / np.linalg.norm(y[fit:], axis=1))
    assert maps.errors.values[2, 1] == pytest.approx(expected, rel=1e-4)
    assert maps.few  # 464 tokens for 32 channels


def test_nothing_is_written_to_the_model_and_the_registry_knows_the_study() -> None:
    stack = Stack(nano("llama"))
    before = {name: value.clone() for name, value in stack.model.state_dict().items()}
    entry = get_method("depth-efficiency")
    study = entry(stack, IDS, splits=1)["study"]
    assert (entry.result, entry.paper) == ("Study", "2505.13898")
    assert all(torch.equal(value, before[name]) for name, value in stack.model.state_dict().items())
    assert 1 <= study["effective_depth"] <= LAYERS
    assert len(study["skip_future"]["later_max"]["values"]) == LAYERS
    assert study["profile"]["norm_residual"]["dims"] == ["point"]
    assert methods()["depth-efficiency"] == entry


def test_the_front_counts_in_no_measurement_of_the_stream() -> None:
    stack = Stack(nano("llama"))
    scores, all_tokens = (depth_efficiency(stack, IDS, brief=True, front=each)["scores"] for each in (3, 0))
    for name, measure in (
        ("block_influence", block_influence),
        ("sublayer_influence", sublayer_influence),
        ("residual_norm", hidden_norms),
        ("angular_distance", angular_distance),
    ):
        assert scores[name]["values"] == measure(stack, IDS, front=3).as_dict()["values"]
        assert scores[name]["values"] != all_tokens[name]["values"]
    with pytest.raises(CalibrationError, match="leaves no token of a sequence"):
        depth_efficiency(stack, IDS, brief=True, front=IDS.shape[1])


def test_what_cannot_be_studied_is_refused_in_one_line() -> None:
    stack = Stack(nano("llama"))
    for act, error, message in (
        (lambda: skip_effect(stack, IDS, part="norm"), MethodError, "part norm"),  # type: ignore[arg-type]
        (lambda: skip_effect(stack, IDS, scope="past"), MethodError, "scope past"),  # type: ignore[arg-type]
        (lambda: skip_effect(stack, IDS[:, :10]), CalibrationError, "no split point: give at least 13"),
        (lambda: depth_score(stack, IDS[0], 40), CalibrationError, "answer 40"),
        (lambda: integrated_gradients(stack, IDS[0], 0), CalibrationError, "answer 0"),
        (lambda: linear_maps(stack, stack, IDS[:1]), CalibrationError, "at least two"),
        (lambda: linear_maps(stack, Stack(nano("llama", vocab_size=64)), many()), CalibrationError, "common tokenizer"),
        (lambda: depth_profile(stack, IDS[:0]), CalibrationError, "give more text"),
    ):
        with pytest.raises(error, match=message) as refused:
            act()
        assert "\n" not in str(refused.value)


# Images with text


def seeing(kind: str = "llava") -> tuple[Any, ImageText]:
    model, processor = shapes_vlm(kind, num_hidden_layers=LAYERS)
    messages = ({"role": "user", "content": f"{MARK}\ncount the circles"}, {"role": "assistant", "content": "one"})
    rows = [ImageTextRow((each.image,), messages) for each in examples(("count",), 2)]
    return open_model(model), ImageText(rows, Processing(processor))


def test_each_modality_has_a_profile_of_its_own_tokens() -> None:
    model, rows = seeing()
    stack = model.stacks["text"]
    found = {name: depth_profile(stack, rows, modality=name)["norm_residual"].values for name in ("text", "image")}
    sums = {name: np.zeros(LAYERS + 1) for name in found}
    counts = dict.fromkeys(found, 0)
    hidden: list[Tensor] = []
    for row in rows.batches(1):
        given = {name: each for name, each in row.items() if name not in ("labels", "prompt_lengths")}
        with torch.no_grad():
            states = model.model.model.language_model.layers
            hidden.clear()
            hooks = [each.register_forward_pre_hook(lambda _, args: hidden.append(args[0][0])) for each in states]
            last = states[-1].register_forward_hook(lambda _, args, out: hidden.append(out[0]))
            model.model(**given)
            for hook in (*hooks, last):
                hook.remove()
        image = row["input_ids"][0] == model.model.config.image_token_id
        for name, here in (("text", ~image), ("image", image)):
            here[0] = False
            sums[name] += torch.stack(hidden)[:, here].norm(dim=-1).sum(-1).numpy()
            counts[name] += int(here.sum())
    for name, values in found.items():
        np.testing.assert_allclose(values, sums[name] / counts[name], rtol=1e-4)


def test_text_misses_what_image_tokens_skip_only_where_text_reads_it() -> None:
    model, rows = seeing()
    stack = model.stacks["text"]
    effect = skip_effect(stack, rows, scope="current", modality="image")
    output = effect.output["mean"].values
    assert output[-1] == 0 and (output[:-1] > 0).all()  # nothing reads the image behind the last layer
    both = [skip_effect(stack, rows, scope="current", modality=each).output["max"].values for each in ("text", None)]
    assert (both[0] > 0).all() and (both[1] > 0).all()
    with pytest.raises(MethodError, match="scope current"):
        skip_effect(stack, rows, modality="image")
    with pytest.raises(MethodError, match="text and image"):
        depth_profile(stack, rows, modality="audio")


@pytest.mark.parametrize(("kind", "name"), [("llava", "text"), ("qwen2_vl", "text"), ("llava", "vision")])
def test_a_study_of_images_with_text_is_of_a_stack_and_of_its_modalities(kind: str, name: str) -> None:
    model, rows = seeing(kind)
    stack = model.stacks[name]
    found = depth_efficiency(stack, rows, splits=1, brief=kind != "llava").findings
    assert len(found["scores"]["layer_removed"]["values"]) == len(stack)
    if name == "vision":
        assert set(found) == {"scores"} and "features" in found["scores"]["layer_removed"]["name"]
        assert min(found["scores"]["layer_removed"]["values"]) > 0
        return
    assert set(found["modalities"]) == {"text", "image"} and ("study" in found) == (kind == "llava")
    assert all(("skip" in each) == (kind == "llava") for each in found["modalities"].values())
    with pytest.raises(MethodError, match="need text"):
        depth_efficiency(stack, rows, stack)
