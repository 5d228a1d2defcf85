"""FFN-SkipLLM against its pseudocode, run token by token on the untouched transformers modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from lamella.errors import CacheError, MethodError, PlanError
from lamella.methods.ffn_skip import cold_layers, expected_threshold, ffn_skip, saturation
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import PlanCache, apply, parallel, traced
from lamella.stack import Stack
from lamella.zoo.nano import nano

NAMES = ["llama", "qwen2", "qwen3", "gpt2"]
LAYERS, PROMPT, LENGTH = 8, 6, 20
PADS = (3, 1, 5, 0)
IDS = torch.randint(3, 128, (4, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
for row, pads in enumerate(PADS):
    MASK[row, :pads] = 0
REAL = MASK.bool()
ORDER = [max(column - PROMPT + 1, 0) for column in range(LENGTH)]  # how far into the answer a column is
WINDOW = {"cold": (2, 1), "warmup": 2, "interleave": (2, 1)}
SETTINGS = [  # of window 2..6; thresholds at which nano models start early, late and never
    {"max_skips": 1, "threshold": 0.6} | WINDOW,
    {"max_skips": 3, "threshold": 0.7} | WINDOW,
    {"max_skips": 3, "threshold": 0.8} | WINDOW | {"warmup": 0, "interleave": (1, 0)},
    {"max_skips": 5, "threshold": -1.0} | WINDOW | {"warmup": 0, "interleave": (5, 1)},
    {"max_skips": 4, "threshold": 0.65} | WINDOW | {"cold": (0, 0), "warmup": 1},
]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str, layers: int = LAYERS) -> Stack:
    stack = Stack(nano(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": layers}))
    stack.model.generation_config.eos_token_id = None
    return stack


def planned(stack: Stack, **params: Any) -> Plan:
    return Plan(model=ModelReference.of(stack), policies={stack.stack: PolicyReference(name="ffn-skip", params=params)})


class Pseudocode:
    """One row, one token after the other, one layer after the other, with Python numbers."""

    def __init__(
        self, model: Any, *, max_skips: int, threshold: float, cold: Any, warmup: int, interleave: Any
    ) -> None:
        self.model, self.max_skips, self.threshold, self.cold = model, max_skips, threshold, cold
        self.warmup, self.interleave = warmup, interleave
        self.cache = DynamicCache(config=model.config)
        self.nearest = 1.0  # how near a cosine ever came to the threshold

    def token(self, token: int, position: int, order: int) -> tuple[Tensor, list[int]]:
        """Logits [vocabulary] and skipped layers of one token, the ``order``-th of the answer or 0 in the prompt."""
        base: Any = getattr(self.model, self.model.base_model_prefix)
        layers, gpt2 = (base.h, True) if hasattr(base, "h") else (base.layers, False)
        where = torch.tensor([[position]])
        if gpt2:
            h = base.wte(torch.tensor([[token]])) + base.wpe(where)
        else:
            h = base.embed_tokens(torch.tensor([[token]]))
            angles = base.rotary_emb(h, position_ids=where)
        turn = order - self.warmup - 1
        allowed = order > 0 and turn >= 0 and turn % sum(self.interleave) < self.interleave[0]
        remaining, last, running, skipped = self.max_skips if allowed else 0, 0.0, False, []
        for index, layer in enumerate(layers):
            if gpt2:
                u = h + layer.attn(layer.ln_1(h), self.cache)[0]
            else:
                read = layer.input_layernorm(h)
                u = h + layer.self_attn(read, position_embeddings=angles, attention_mask=None, cache=self.cache)[0]
            skip = False
            if self.cold[0] <= index < len(layers) - self.cold[1]:
                if remaining > 0 and not running:
                    self.nearest = min(self.nearest, abs(last - self.threshold))
                running = running or (last > self.threshold and remaining > 0)
                skip = running and remaining > 0
            if skip:
                h, last = u, 1.0
                remaining -= 1
                skipped.append(index)
            else:
                h = u + (layer.mlp(layer.ln_2(u)) if gpt2 else layer.mlp(layer.post_attention_layernorm(u)))
                a, b = u.double().flatten(), h.double().flatten()
                last = float(a @ b) / float(a.norm() * b.norm())
        h = base.ln_f(h) if gpt2 else base.norm(h)
        return self.model.lm_head(h)[0, 0], skipped


def reference(
    stack: Stack, params: dict[str, Any], counted: bool = False, ids: Tensor = IDS, order: list[int] = ORDER
) -> tuple[Tensor, np.ndarray]:
    """Logits and which MLPs run [batch, time, layers], every row alone and without its padding.

    Args:
        counted: whether positions are counted from the first real token, as ``generate`` does.
    """
    logits = torch.zeros(*ids.shape, stack.config.vocab_size)
    ran = np.ones((*ids.shape, len(stack)), dtype=bool)
    for row, pads in enumerate(PADS[: len(ids)]):
        alone = Pseudocode(stack.model, **params)
        for column in range(pads, ids.shape[1]):
            position = column - pads if counted else column
            logits[row, column], skipped = alone.token(int(ids[row, column]), position, order[column])
            ran[row, column, skipped] = False
        assert alone.nearest > 1e-5, "a decision hangs on rounding: choose another threshold"
    return logits, ran


def steps(view: Any, cuts: tuple[int, ...], ids: Tensor = IDS, mask: Tensor = MASK) -> tuple[Tensor, Any]:
    """Return the logits of a raw continuation in several calls, and the resulting cache."""
    parts, cache, begin = [], None, 0
    for end in (*cuts, ids.shape[1]):
        out = view(input_ids=ids[:, begin:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        parts.append(out.logits)
        cache, begin = out.cache, end
    return torch.cat(parts, 1), cache


def greedy(model: Any, ids: Tensor, mask: Tensor, tokens: int = 10) -> Any:
    return model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


def furthest(one: Tensor, other: Tensor, real: Tensor = REAL) -> float:
    return float((one - other)[real].abs().max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_steps_and_parallel_follow_the_pseudocode_on_a_left_padded_ragged_batch(
    name: str, params: dict[str, Any]
) -> None:
    stack = opened(name)
    view = apply(stack, planned(stack, **params))
    expected, ran = reference(stack, params)
    assert not ran.all() and furthest(expected, stack.model(IDS, attention_mask=MASK).logits) > 0.01
    trace = traced(view)
    whole = parallel(view, IDS, torch.full((4,), PROMPT), MASK).logits
    assert furthest(whole, expected) <= 1e-4
    assert np.array_equal(trace.joined()[0][REAL][..., 1], ran[REAL])
    for cuts in (tuple(range(PROMPT, LENGTH)), (PROMPT, 9, 15)):  # one token at a time, and several at once
        trace = traced(view)
        assert furthest(steps(view, cuts)[0], expected) <= 1e-4
        sublayers = trace.joined()[0]
        assert sublayers[..., 0].all()  # attention is never skipped
        assert np.array_equal(sublayers[REAL][..., 1], ran[REAL])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("params", SETTINGS[1:4], ids=str)
def test_generate_follows_the_pseudocode(name: str, params: dict[str, Any]) -> None:
    stack = opened(name)
    view = apply(stack, planned(stack, **params))
    trace = traced(view)
    out = greedy(view, IDS[:, :PROMPT], MASK[:, :PROMPT])
    ids = out.sequences
    order = [max(column - PROMPT + 1, 0) for column in range(ids.shape[1])]
    expected, ran = reference(stack, params, counted=True, ids=ids, order=order)
    assert (torch.stack(out.logits, 1) - expected[:, PROMPT - 1 : -1]).abs().max() <= 1e-4
    assert torch.equal(expected[:, PROMPT - 1 : -1].argmax(-1), ids[:, PROMPT:])
    real = torch.cat([REAL[:, :PROMPT], torch.ones_like(ids[:, PROMPT:-1]).bool()], dim=1)
    assert np.array_equal(trace.joined()[0][real][..., 1], ran[:, :-1][real])


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_its_own_prompt_length(name: str) -> None:
    stack = opened(name)
    params = SETTINGS[2]
    view = apply(stack, planned(stack, **params))
    lengths = torch.tensor([6, 9, 13, LENGTH])
    whole = parallel(view, IDS, lengths, MASK).logits
    for row, length in enumerate(lengths.tolist()):
        order = [max(column - length + 1, 0) for column in range(LENGTH)]
        expected, _ = reference(stack, params, order=order)
        assert furthest(whole[row], expected[row], REAL[row]) <= 1e-4
    cache = PlanCache(view.config, view.lamella_plan, lengths)
    parts = [
        view(input_ids=IDS[:, begin:end], attention_mask=MASK[:, :end], cache=cache).logits
        for begin, end in ((0, 5), (5, 12), (12, 13), (13, LENGTH))
    ]
    assert furthest(torch.cat(parts, 1), whole) <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_decides_as_its_rows_alone(name: str) -> None:
    stack = Stack(copy.deepcopy(opened(name).model).double())  # in float32 rows and batches round differently
    view = apply(stack, planned(stack, **SETTINGS[1]))
    cuts = tuple(range(PROMPT, LENGTH))
    trace = traced(view)
    together, _ = steps(view, cuts)
    ran = trace.joined()[0]
    assert len({row[PROMPT:].tobytes() for row in ran}) > 2  # rows skip differently
    for row, pads in enumerate(PADS):
        trace = traced(view)
        ids, mask = IDS[row : row + 1, pads:], MASK[row : row + 1, pads:]
        if name == "gpt2":  # its positions are learned, so the row keeps its padding
            ids, mask, pads = IDS[row : row + 1], MASK[row : row + 1], 0
        alone, _ = steps(view, tuple(cut - pads for cut in cuts), ids, mask)
        real = REAL[row, pads:]
        assert (alone[0] - together[row, pads:])[real].abs().max() <= 1e-5
        assert np.array_equal(trace.joined()[0][0][real], ran[row, pads:][real])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change",
    [{"max_skips": 0}, {"threshold": 1.0}, {"warmup": LENGTH}, {"warmup": LENGTH, "placement": "random"}],
    ids=str,
)
def test_no_skips_a_threshold_of_1_and_a_long_warm_up_give_the_base_model_to_the_bit(
    name: str, change: dict[str, Any]
) -> None:
    stack = opened(name)
    model: Any = stack.model
    view = apply(stack, planned(stack, **SETTINGS[3] | change))
    whole = model(input_ids=IDS, attention_mask=MASK).logits
    assert torch.equal(parallel(view, IDS, torch.full((4,), PROMPT), MASK).logits, whole)
    cuts = tuple(range(PROMPT, LENGTH))
    assert torch.equal(steps(view, cuts)[0], steps(model, cuts)[0])
    ours, theirs = (greedy(each, IDS[:, :PROMPT], MASK[:, :PROMPT]) for each in (view, model))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


def test_a_threshold_of_1_skips_nothing_where_mlps_add_next_to_nothing() -> None:
    stack = opened("llama")
    for layer in stack.layers:
        layer.mlp.down_proj.weight.mul_(1e-5)  # cosines round to 1 and above
    view = apply(stack, planned(stack, **SETTINGS[3] | {"threshold": 1.0}))
    whole = parallel(view, IDS, torch.full((4,), PROMPT), MASK).logits
    assert torch.equal(whole, stack.model(input_ids=IDS, attention_mask=MASK).logits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("placement", ["saturated", "random", "anywhere"])
def test_the_cache_is_as_long_as_the_base_model_s_in_every_layer(name: str, placement: str) -> None:
    stack = opened(name)
    cuts = (PROMPT, 7, 8, 12)
    base = steps(stack.model, cuts)[1]
    for params in SETTINGS[1:4]:
        cache = steps(apply(stack, planned(stack, **params, placement=placement)), cuts)[1]
        assert [layer.keys.shape for layer in cache.layers] == [layer.keys.shape for layer in base.layers]
        assert not cache.has_holes and cache.get_seq_length() == LENGTH


def test_a_second_turn_goes_on_with_the_old_cache() -> None:
    stack, params = opened("llama"), SETTINGS[2]
    view = apply(stack, planned(stack, **params))
    cache = None
    turns = [(0, 6), (6, 9), (9, 10), (10, 15), (15, 18), (18, LENGTH)]
    parts = []
    for begin, end in turns:
        if begin == 10:
            cache.new_turn()  # 10 to 14 are the second prompt
        out = view(input_ids=IDS[:, begin:end], attention_mask=MASK[:, :end], cache=cache, use_cache=True)
        parts.append(out.logits)
        cache = out.cache
    order = [0] * 6 + [1, 2, 3, 4] + [0] * 5 + [1, 2, 3, 4, 5]
    expected, ran = reference(stack, params, order=order)
    assert not ran[:, 6:10].all() and not ran[:, 15:].all()
    assert furthest(torch.cat(parts, 1), expected) <= 1e-4


def test_a_cache_is_cropped_anywhere_and_beams_reorder_it() -> None:
    stack, params = opened("llama"), SETTINGS[2]
    view = apply(stack, planned(stack, **params))
    expected, _ = reference(stack, params)
    cache = steps(view, (PROMPT, 12))[1]
    cache.crop(-(LENGTH - 9))
    rows = torch.tensor([2, 0, 3, 1])
    cache.reorder_cache(rows)
    rest = view(input_ids=IDS[rows, 9:], attention_mask=MASK[rows], cache=cache).logits
    assert furthest(rest, expected[rows, 9:], REAL[rows, 9:]) <= 1e-4


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("placement", ["saturated", "random"])
def test_a_token_skips_one_run_of_at_most_k_mlps_between_the_cold_layers(
    params: dict[str, Any], placement: str
) -> None:
    stack = opened("qwen3")
    view = apply(stack, planned(stack, **params, placement=placement))
    trace = traced(view)
    parallel(view, IDS, torch.full((4,), PROMPT), MASK)
    ran, prompt, _ = trace.joined()
    skipped = ~ran[..., 1]
    first, last = params["cold"]
    assert skipped.any() and not skipped[prompt].any()
    assert not skipped[..., :first].any() and not skipped[..., LAYERS - last :].any()
    for token in skipped.reshape(-1, LAYERS):
        layers = np.flatnonzero(token)
        assert len(layers) <= params["max_skips"]
        assert len(layers) == 0 or layers[-1] - layers[0] + 1 == len(layers)
    whole = skipped.any(-1)[:, PROMPT:].all(0) if params["threshold"] == -1 or placement == "random" else None
    if whole is not None:  # all tokens skip but for the warm-up and the full turns
        turns = [order - params["warmup"] - 1 for order in ORDER[PROMPT:]]
        on, off = params["interleave"]
        assert whole.tolist() == [turn >= 0 and turn % (on + off) < on for turn in turns]


@pytest.mark.parametrize("name", NAMES)
def test_the_mlp_is_executed_for_the_tokens_that_run_it_and_for_no_others(name: str) -> None:
    stack = opened(name)
    view = apply(stack, planned(stack, **SETTINGS[1]))
    executed = torch.zeros(LAYERS, dtype=torch.long)
    layers: Any = view.get_submodule(stack.architecture.base).get_submodule(stack.architecture.layers)
    for index, layer in enumerate(layers):

        def count(_: Any, given: Any, index: int = index) -> None:
            executed[index] += given[0].numel() // given[0].shape[-1]

        layer.mlp.register_forward_pre_hook(count)
    trace = traced(view)
    steps(view, tuple(range(PROMPT, LENGTH)))
    ran = trace.joined()[0][..., 1]
    assert executed.tolist() == ran.sum(axis=(0, 1)).tolist()
    assert ran.sum() < ran.size


def test_random_runs_start_all_over_the_window_alike_in_every_row_and_anywhere_outside_it_too() -> None:
    stack = opened("llama")
    starts = {}
    for placement in ("random", "anywhere"):
        params = SETTINGS[2] | {"max_skips": 2, "placement": placement}
        view = apply(stack, planned(stack, **params))
        ids = IDS[:2].repeat(1, 8)
        trace = traced(view)
        parallel(view, ids, torch.tensor([PROMPT, PROMPT]))
        skipped = ~trace.joined()[0][:, PROMPT:, :, 1]
        assert np.array_equal(skipped[0], skipped[1]) and (skipped.sum(-1) == 2).all()
        starts[placement] = set(skipped[0].argmax(-1).tolist())
    assert starts == {"random": {2, 3, 4, 5}, "anywhere": {0, 1, 2, 3, 4, 5, 6}}


@pytest.mark.parametrize("name", [*NAMES, "gpt_neox", "gpt_neox_serial"])
def test_saturation_is_the_cosine_of_the_stream_before_and_after_the_mlp_s_addition(name: str) -> None:
    stack = Stack(nano(name))
    hidden: dict[tuple[str, int], Tensor] = {}
    handles = []
    for index, layer in enumerate(stack.layers):
        for kind, module in (("mlp", layer.mlp), ("layer", layer)):

            def keep(_: Any, __: Any, out: Any, key: tuple[str, int] = (kind, index)) -> None:
                hidden[key] = (out[0] if isinstance(out, tuple) else out).double()

            handles.append(module.register_forward_hook(keep))
    expected = []
    for row, pads in enumerate(PADS):
        stack.model(IDS[row : row + 1], attention_mask=MASK[row : row + 1])
        columns = []
        for index in range(len(stack)):
            after = hidden["layer", index][0, pads + 1 :]  # the first token is a sink
            before = after - hidden["mlp", index][0, pads + 1 :]
            columns.append((before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1)))
        expected.append(torch.stack(columns, dim=1))
    for handle in handles:
        handle.remove()
    found = saturation(stack, {"input_ids": IDS, "attention_mask": MASK})
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [range(2, 8), range(0, 7), range(1, 9)], ids=str)
@pytest.mark.parametrize("skips", [1, 3, 6])
def test_the_expected_threshold_is_the_largest_that_skips_95_percent_of_what_is_wanted(
    window: range, skips: int
) -> None:
    cosines = torch.rand(300, 9, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.6

    def skipped(threshold: float) -> float:
        """Per token, by the rule with Python numbers."""
        total = 0
        for token in cosines.tolist():
            remaining, last, running = skips, 0.0, False
            for layer, cosine in enumerate(token):
                if layer in window and remaining and (running or last > threshold):
                    running = True
                    remaining -= 1
                else:
                    last = cosine
            total += skips - remaining
        return total / len(cosines)

    found = expected_threshold(cosines, window, skips)
    assert 0 < found < 1
    assert skipped(found) >= 0.95 * skips > skipped(found + 0.003)  # candidates are about 0.001 apart


def test_where_no_cosine_lets_enough_be_skipped_every_layer_counts_as_saturated() -> None:
    assert expected_threshold(torch.full((10, 8), 0.5), range(1, 7), 6) == -1.0


@pytest.mark.parametrize("interleave", [(5, 1), (1, 0)])
def test_a_series_holds_every_number_of_skips_and_what_each_skips_of_calibration_text(
    interleave: tuple[int, int],
) -> None:
    stack = opened("llama")
    series = ffn_skip(stack, IDS, cold=(2, 1), interleave=interleave)
    assert series[0].is_static and len(series) == 6
    assert [plan.policy.params["max_skips"] for plan in list(series)[1:]] == [1, 2, 3, 4, 5]
    for plan, point in zip(list(series)[1:], series.points[1:], strict=True):
        params = dict(plan.policy.params)
        del params["placement"], params["seed"]
        skips = np.zeros((4, LENGTH, LAYERS))
        for row in range(4):
            alone = Pseudocode(stack.model, **params | {"warmup": 0, "interleave": (1, 0)})
            for column in range(LENGTH):
                skips[row, column, alone.token(int(IDS[row, column]), column, order=column)[1]] = 1
        skipped = skips[:, 1:].mean(axis=(0, 1))  # the first token is the prompt
        assert 0.95 * params["max_skips"] <= skipped.sum() <= params["max_skips"]
        share = skipped * interleave[0] / sum(interleave)
        assert np.allclose(np.array(plan.work), np.stack([np.ones(LAYERS), 1 - share], axis=1))
        assert point.scores["skipped MLPs"] == pytest.approx(share.mean())
        assert point.scores["threshold"] == params["threshold"]


def test_a_threshold_is_calibrated_on_tokens_that_really_skip_and_close_to_95_percent() -> None:
    stack = opened("llama", 12)
    ids = torch.randint(3, 128, (4, 64), generator=torch.Generator().manual_seed(2))
    plain = expected_threshold(saturation(stack, ids), range(2, 10), 4)
    plan = ffn_skip(stack, ids, max_skips=4, cold=(2, 2), interleave=(1, 0))[1]
    skipped = sum(1 - mlp for _, mlp in plan.work)
    assert 0.95 * 4 <= skipped < 0.97 * 4 and plan.policy.params["threshold"] <= plain


def test_padding_of_calibration_text_does_not_count() -> None:
    stack = opened("llama")
    padded = ffn_skip(stack, {"input_ids": IDS[:1], "attention_mask": MASK[:1]}, max_skips=2)[1]
    alone = ffn_skip(stack, IDS[:1, PADS[0] :], max_skips=2)[1]
    assert padded.policy.params["threshold"] == pytest.approx(alone.policy.params["threshold"], abs=1e-5)
    assert padded.work == alone.work


def test_the_defaults_are_the_paper_s() -> None:
    assert cold_layers(32) == cold_layers(40) == cold_layers(30) == (5, 5)
    params = ffn_skip(opened("llama", 32), IDS[:1], max_skips=8, threshold=0.95)[1].policy.params
    assert params == {
        "max_skips": 8, "threshold": 0.95, "cold": [5, 5], "warmup": 16, "interleave": [5, 1],
        "placement": "saturated", "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_skips": 6}, "max_skips 6 is more than the 5 layers between the cold ones"),
        ({"max_skips": -1}, "must be at least 0"),
        ({"warmup": -1}, "must be at least 0"),
        ({"interleave": (0, 1)}, "interleave must start with at least 1"),
        ({"interleave": (5,)}, "two numbers each"),
        ({"cold": (5,)}, "two numbers each"),
        ({"cold": (4, 4)}, "leaves none of 8 layers to skip"),
        ({"threshold": 1.5}, "threshold 1.5 is no cosine"),
        ({"threshold": float("nan")}, "is no cosine"),
        ({"placement": "elsewhere"}, "unknown placement 'elsewhere'; known are saturated, random, anywhere"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_in_one_line(params: dict[str, Any], message: str) -> None:
    stack = opened("llama")
    given = SETTINGS[1] | params
    with pytest.raises(MethodError) as error:
        apply(stack, planned(stack, **given))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_skips": 6}, "max_skips 6 is more than the 5 layers between the cold ones"),
        ({"cold": (4, 4)}, "leaves none of 8 layers to skip"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_model_are_refused_in_one_line(params: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError) as error:
        ffn_skip(opened("llama"), IDS, **SETTINGS[1] | params)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "params",
    [{}, SETTINGS[1] | {"threshold": "auto"}, SETTINGS[1] | {"max_skips": "3"}, SETTINGS[1] | {"skips": 3}],
    ids=str,
)
def test_a_plan_with_wrong_settings_is_refused_in_one_line(params: dict[str, Any]) -> None:
    stack = opened("llama")
    with pytest.raises(PlanError) as error:
        apply(stack, planned(stack, **params))
    assert "policy 'ffn-skip'" in str(error.value) and "\n" not in str(error.value)


def test_an_empty_prompt_another_depth_and_another_plan_s_cache_are_refused_in_one_line() -> None:
    stack = opened("llama")
    plan = planned(stack, **SETTINGS[1])
    view = apply(stack, plan)
    mask = MASK[:, :PROMPT].clone()
    mask[1] = 0
    other = steps(apply(stack, planned(stack, **SETTINGS[2])), (PROMPT,))[1]
    for attempt, kind, message in (
        (lambda: greedy(view, IDS[:, :PROMPT], mask), CacheError, "a prompt of this batch is empty"),
        (lambda: apply(opened("llama", 6), plan), PlanError, "is for a llama of 8 layers .* is a llama of 6 layers"),
        (lambda: view(input_ids=IDS[:, :1], cache=other, use_cache=True), CacheError, "belongs to another plan"),
    ):
        with pytest.raises(kind, match=message) as error:
            attempt()
        assert type(error.value) is kind and "\n" not in str(error.value)
