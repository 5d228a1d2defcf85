"""LAC against norms in float64 of the untouched transformers model, and against a loop of its layers written out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from lamella.errors import CacheError, CalibrationError, MethodError, PlanError
from lamella.methods.void import Activity, activity, lac_plan, void
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import apply, parallel, traced
from lamella.stack import Stack
from lamella.zoo.nano import nano

NAMES = ["llama", "qwen2", "qwen3", "gpt2"]
LAYERS, PROMPT, LENGTH = 8, 6, 16
PADS = (3, 1, 5, 0)
IDS = torch.randint(3, 128, (4, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
for row, pads in enumerate(PADS):
    MASK[row, :pads] = 0
REAL = MASK.bool()
FIRST = torch.zeros_like(REAL)
FIRST[torch.arange(4), torch.tensor(PADS)] = True  # the sink of each row
LENGTHS = torch.full((4,), PROMPT)
ALPHAS = [0.0, 0.1, 0.2, 0.4, 0.8, 1.0]
CUTS = tuple(range(PROMPT, LENGTH))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str, layers: int = LAYERS) -> Stack:
    stack = Stack(nano(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": layers}))
    stack.model.generation_config.eos_token_id = None
    return stack


def base_of(model: Any) -> tuple[Any, Any, Any]:
    """The base model of a causal language model, its layers and its final norm."""
    base = getattr(model, model.base_model_prefix)
    return (base, base.h, base.ln_f) if hasattr(base, "h") else (base, base.layers, base.norm)


def hidden_states(model: Any, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    """The residual stream before each layer and after the last one [layers + 1, batch, time, hidden]."""
    last = []
    handle = base_of(model)[2].register_forward_pre_hook(lambda _, given: last.append(given[0]))
    states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    handle.remove()
    return torch.stack([*states[:-1], last[0]])  # transformers' own last entry is behind the final norm


def lac(norms: list[float], alpha: float, first: int = 0) -> list[bool]:
    """Which layers are active for one token, from the norms of its residual stream [layers + 1], in plain Python.

    Args:
        first: number of layers that are excluded from the range.
    """
    active, growths = [], []
    for layer, (before, after) in enumerate(pairwise(norms)):
        growth = after - before
        threshold = alpha * (max(growths) - min(growths)) if growths else 0.0
        assert growth == threshold or abs(growth - threshold) > 1e-5, "a decision hangs on rounding"
        active.append(growth >= threshold)
        if layer >= first:
            growths.append(growth)
    return active


def reference(h: Tensor, alpha: float, first: int = 0) -> np.ndarray:
    """:func:`lac` for every token of hidden states [layers + 1, batch, time, hidden], as [batch, time, layers]."""
    norms = h.double().norm(dim=-1).permute(1, 2, 0)
    return np.array([[lac(token, alpha, first) for token in row] for row in norms.tolist()])


def active_of(trace: Any) -> np.ndarray:
    return trace.joined()[2]["active"].astype(bool)


def steps(view: Any, cuts: tuple[int, ...] = CUTS, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    """The logits of a raw continuation computed in the given number of calls."""
    parts, cache, begin = [], None, 0
    for end in (*cuts, ids.shape[1]):
        out = view(input_ids=ids[:, begin:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        parts.append(out.logits)
        cache, begin = out.cache, end
    return torch.cat(parts, 1)


def greedy(model: Any, ids: Tensor = IDS[:, :PROMPT], mask: Tensor = MASK[:, :PROMPT], tokens: int = 8) -> Any:
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


def carried(stack: Stack, alpha: float, ids: Tensor = IDS, counted: bool = False) -> tuple[Tensor, np.ndarray]:
    """Carry mode written out: row by row without padding, token by token, layer by layer, with a plain cache."""
    model: Any = stack.model
    base, layers, norm = base_of(model)
    logits = torch.zeros(*ids.shape, model.config.vocab_size)
    active = np.zeros((*ids.shape, len(layers)), dtype=bool)
    for row, pads in enumerate(PADS):
        cache = DynamicCache(config=model.config)
        for column in range(pads, ids.shape[1]):
            where = torch.tensor([[column - pads if counted else column]])
            token = ids[row : row + 1, column : column + 1]
            h, given = base.get_input_embeddings()(token), {}
            if hasattr(base, "wpe"):
                h = h + base.wpe(where)
            else:
                given = {"position_embeddings": base.rotary_emb(h, position_ids=where)}
            growths: list[float] = []
            for index, layer in enumerate(layers):
                out = layer(h, cache=cache, **given)
                growth = float(out.double().norm() - h.double().norm())
                threshold = alpha * (max(growths) - min(growths)) if growths else 0.0
                assert abs(growth - threshold) > 1e-5, "a decision hangs on rounding"
                growths.append(growth)
                active[row, column, index] = growth >= threshold
                if active[row, column, index] or column == pads:
                    h = out
            logits[row, column] = model.lm_head(norm(h))[0, 0]
    return logits, active


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_layer_is_active_where_the_norm_grows_by_alpha_of_the_range_so_far(name: str, alpha: float) -> None:
    stack = opened(name)
    view = apply(stack, lac_plan(stack, alpha=alpha, mode="trace"))
    expected = reference(hidden_states(stack.model), alpha)
    trace = traced(view)
    logits = parallel(view, IDS, LENGTHS, MASK).logits
    assert np.array_equal(active_of(trace)[REAL], expected[REAL])
    assert torch.equal(logits, stack.model(input_ids=IDS, attention_mask=MASK).logits)
    if alpha > 0:
        assert 0 < expected[REAL].mean() < 1


@pytest.mark.parametrize("name", NAMES)
def test_tracing_leaves_generation_the_base_model_s_bitwise(name: str) -> None:
    stack = opened(name)
    view = apply(stack, lac_plan(stack, mode="trace"))
    assert torch.equal(steps(view), steps(stack.model))
    ours, theirs = greedy(view), greedy(stack.model)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_active_set_at_0_is_where_norms_do_not_fall_and_it_shrinks_as_alpha_grows(name: str) -> None:
    stack = opened(name)
    sets = {}
    for alpha in (-1e6, *ALPHAS):
        trace = traced(view := apply(stack, lac_plan(stack, alpha=alpha, mode="trace")))
        parallel(view, IDS, LENGTHS, MASK)
        sets[alpha] = active_of(trace)[REAL]
    growth = trace.joined()[2]["growth"][REAL]
    assert np.array_equal(sets[0.0], growth >= 0)
    assert sets[-1e6][:, 2:].all() and np.array_equal(sets[-1e6][:, :2], growth[:, :2] >= 0)
    for lower, higher in pairwise(ALPHAS):
        assert (sets[higher] <= sets[lower]).all()
        assert sets[higher].sum() < sets[lower].sum()


def test_a_norm_that_stays_is_no_void() -> None:
    stack = opened("llama")
    layer: Any = stack.layers[1]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    trace = traced(view := apply(stack, lac_plan(stack, mode="trace")))
    parallel(view, IDS, LENGTHS, MASK)
    notes = trace.joined()[2]
    assert (notes["growth"][REAL][:, 1] == 0).all() and (notes["threshold"][REAL][:, 1] == 0).all()
    assert (notes["active"][REAL][:, 1] == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_scaling_every_residual_leaves_the_active_set_alone(name: str) -> None:
    sets = []
    for scale in (1, 64):
        stack = opened(name)
        base, layers, _ = base_of(stack.model)
        base.get_input_embeddings().weight.mul_(scale)
        if name == "gpt2":
            base.wpe.weight.mul_(scale)
        for layer in layers:
            ends = (
                (layer.attn.c_proj, layer.mlp.c_proj)
                if name == "gpt2"
                else (layer.self_attn.o_proj, layer.mlp.down_proj)
            )
            for parameter in (parameter for end in ends for parameter in end.parameters()):
                parameter.mul_(scale)
        trace = traced(view := apply(stack, lac_plan(stack, alpha=0.2, mode="trace")))
        parallel(view, IDS, LENGTHS, MASK)
        sets.append(active_of(trace)[REAL])
    assert np.array_equal(*sets)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", [0.2, 0.8, 50.0])
def test_readout_is_the_lens_at_the_last_active_layer_in_every_execution(name: str, alpha: float) -> None:
    stack = opened(name)
    model: Any = stack.model
    view = apply(stack, lac_plan(stack, alpha=alpha, mode="readout"))
    norm = base_of(model)[2]

    def lens(ids: Tensor, mask: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        active = torch.from_numpy(reference(h, alpha))
        depths = torch.arange(1, LAYERS + 1) * active
        last = depths.max(-1).values  # how many layers until the end of the last active one; 0 for none
        state = h.gather(0, last[None, ..., None].expand(1, *h.shape[1:]))[0]
        return model.lm_head(norm(state)), last

    expected, last = lens(IDS, MASK, hidden_states(model))
    whole = model(input_ids=IDS, attention_mask=MASK).logits
    logits = parallel(view, IDS, LENGTHS, MASK).logits
    assert furthest(logits, expected) <= 1e-5
    assert torch.equal(logits[last == LAYERS], whole[last == LAYERS])
    assert (last[REAL] < LAYERS).any() and furthest(logits, whole) > 0.01
    assert furthest(steps(view), expected) <= 1e-4
    assert furthest(steps(view, (PROMPT, 8, 11)), expected) <= 1e-4

    out = greedy(view)
    ids, mask = out.sequences, torch.cat([MASK[:, :PROMPT], torch.ones_like(out.sequences[:, PROMPT:])], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    forced = parallel(view, ids, LENGTHS, mask, position_ids=positions).logits[:, PROMPT - 1 : -1]
    assert (torch.stack(out.logits, 1) - forced).abs().max() <= 1e-4
    assert torch.equal(forced.argmax(-1), ids[:, PROMPT:])


@pytest.mark.parametrize("mode", ["trace", "readout", "carry"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_records_of_single_steps_equal_those_of_the_whole_sequence(name: str, mode: str) -> None:
    stack = opened(name)
    view = apply(stack, lac_plan(stack, alpha=0.2, mode=mode))
    trace = traced(view)
    steps(view)
    one = trace.joined()
    trace = traced(view)
    parallel(view, IDS, LENGTHS, MASK)
    other = trace.joined()
    assert np.array_equal(one[1], other[1]) and one[1].sum() == 4 * PROMPT
    for note in ("norm", "growth", "threshold"):
        assert np.abs(one[2][note] - other[2][note])[REAL].max() <= 1e-4
    assert np.array_equal(one[2]["active"][REAL], other[2]["active"][REAL])
    norms = np.stack([n for n in hidden_states(stack.model).double().norm(dim=-1)[1:].numpy()], axis=-1)
    if mode != "carry":
        assert np.abs(one[2]["norm"] - norms)[REAL].max() <= 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", [0.1, 0.4])
def test_carry_is_the_loop_written_out_in_every_execution(name: str, alpha: float) -> None:
    stack = opened(name)
    view = apply(stack, lac_plan(stack, alpha=alpha, mode="carry"))
    expected, active = carried(stack, alpha)
    trace = traced(view)
    assert furthest(parallel(view, IDS, LENGTHS, MASK).logits, expected) <= 1e-4
    sublayers, _, notes = trace.joined()
    assert np.array_equal(notes["active"][REAL].astype(bool), active[REAL])
    used = active | FIRST.numpy()[..., None]  # position 0 is never skipped
    assert np.array_equal(sublayers[REAL], np.stack([used[REAL]] * 2, axis=-1))
    assert not active[FIRST].all() and not active[REAL & ~FIRST].all()
    assert furthest(steps(view), expected) <= 1e-4
    assert furthest(steps(view, (2, PROMPT, 11)), expected) <= 1e-4
    out = greedy(view)
    expected, _ = carried(stack, alpha, out.sequences, counted=True)
    assert (torch.stack(out.logits, 1) - expected[:, PROMPT - 1 : -1]).abs().max() <= 1e-4


@pytest.mark.parametrize("mode", ["trace", "readout", "carry"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_batch_equals_its_rows_alone(name: str, mode: str) -> None:
    stack = opened(name)
    view = apply(stack, lac_plan(stack, alpha=0.2, mode=mode))
    trace = traced(view)
    together = steps(view)
    active = active_of(trace)
    for row, pads in enumerate(PADS):
        trace = traced(view)
        cuts = tuple(cut - pads for cut in CUTS)
        alone = steps(view, cuts, IDS[row : row + 1, pads:], MASK[row : row + 1, pads:])
        assert (alone[0] - together[row, pads:]).abs().max() <= 1e-4  # the base model's own rows are 1e-5 apart
        assert np.array_equal(active_of(trace)[0], active[row, pads:])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layer_0_can_be_left_out_of_the_range(name: str) -> None:
    stack = opened(name)
    trace = traced(view := apply(stack, lac_plan(stack, alpha=0.4, mode="trace", stats="skip_first")))
    parallel(view, IDS, LENGTHS, MASK)
    h = hidden_states(stack.model)
    expected = reference(h, 0.4, first=1)
    assert np.array_equal(active_of(trace)[REAL], expected[REAL])
    assert not np.array_equal(expected[REAL], reference(h, 0.4)[REAL])


def test_norms_are_float32_in_a_bfloat16_model_unless_the_model_s_own_are_asked_for() -> None:
    stack = opened("llama")
    stack.model.to(torch.bfloat16)
    h = hidden_states(stack.model).float()
    fine = (h[1:].norm(dim=-1) - h[:-1].norm(dim=-1)).permute(1, 2, 0).numpy()
    for dtype in ("float32", "model"):
        trace = traced(view := apply(stack, lac_plan(stack, mode="trace", dtype=dtype)))
        parallel(view, IDS, LENGTHS, MASK)
        growth = trace.joined()[2]["growth"]
        coarse = torch.from_numpy(growth).bfloat16().float().numpy()
        assert np.array_equal(growth, coarse) == (dtype == "model")
        error = np.abs(growth - fine)[REAL].max()
        assert error <= 1e-4 if dtype == "float32" else error > 1e-3


@pytest.mark.parametrize("mode", ["trace", "readout"])
def test_what_runs_every_layer_is_not_counted_as_saving_any(mode: str) -> None:
    stack = opened("llama")
    plan = void(stack, IDS, mode=mode, alpha=0.8)[1]
    assert plan.work == [(1.0, 1.0)] * LAYERS
    trace = traced(view := apply(stack, plan))
    parallel(view, IDS, LENGTHS, MASK)
    sublayers, _, notes = trace.joined()
    assert sublayers.all() and notes["active"].mean() < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_activity_tells_prompt_answer_and_sink_apart_and_leaves_padding_out(name: str) -> None:
    stack = opened(name)
    prompts = {"input_ids": IDS[:, :PROMPT], "attention_mask": MASK[:, :PROMPT]}
    seen = activity(stack, prompts, alpha=0.2, max_new_tokens=5)
    expected: dict[str, list[np.ndarray]] = {"prompt": [], "response": [], "sink": []}
    for row, pads in enumerate(PADS):
        ids = IDS[row : row + 1, pads:PROMPT]
        ids = greedy(stack.model, ids, torch.ones_like(ids), tokens=5).sequences
        active = reference(hidden_states(stack.model, ids, torch.ones_like(ids)), 0.2)[0]
        expected["sink"].append(active[:1])
        expected["prompt"].append(active[1 : PROMPT - pads])
        expected["response"].append(active[PROMPT - pads :])
    for phase, rows in expected.items():
        joined = np.concatenate(rows)
        assert np.array_equal(getattr(seen, phase).numpy(), joined)
        assert seen.usage()[phase] == pytest.approx(100 * joined.mean())
    assert seen.frequency("response").tolist() == pytest.approx(np.concatenate(expected["response"]).mean(0).tolist())
    assert (len(seen.sink), len(seen.response), len(seen.prompt)) == (4, 20, sum(PROMPT - pads - 1 for pads in PADS))


def test_plans_skip_the_least_active_layers_first_and_never_the_protected() -> None:
    stack = opened("llama")
    series = void(stack, IDS, max_new_tokens=6)
    seen = activity(stack, IDS[:, : LENGTH // 2], alpha=0.2, max_new_tokens=6)
    often = seen.frequency("response").tolist()
    assert series[0].is_static and len(series) == 1 + LAYERS - 3
    gone: list[int] = []
    for plan, point in zip(list(series)[1:], series.points[1:], strict=True):
        path = plan.path["text"]
        assert path.prefill == list(range(LAYERS)) and {0, 1, LAYERS - 1} <= set(path.decode)
        new = [layer for layer in range(LAYERS) if layer not in path.decode and layer not in gone]
        assert len(new) == 1 and (not gone or often[new[0]] >= often[gone[-1]])
        gone += new
        assert point.scores["answer layers"] == LAYERS - len(gone)
        assert point.scores["least activity kept"] == pytest.approx(min(often[layer] for layer in path.decode))
    assert series.provenance["usage"] == pytest.approx(seen.usage())
    fewest = void(stack, IDS, protect=(3,), max_new_tokens=6)[-1].path["text"].decode
    assert fewest == [3]


@pytest.fixture
def seen_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers 0 to 5 are active for the given number of ten tokens."""
    prompt, response = torch.zeros(10, 6, dtype=torch.bool), torch.zeros(10, 6, dtype=torch.bool)
    for layer, count in enumerate((0, 10, 4, 5, 9, 10)):
        prompt[:count, layer] = True
    for layer, count in enumerate((0, 10, 9, 4, 5, 0)):
        response[:count, layer] = True
    seen = Activity(prompt=prompt, response=response, sink=prompt[:1])
    monkeypatch.setattr("lamella.methods.void.activity", lambda *_, **__: seen)


@pytest.mark.usefixtures("seen_by_hand")
def test_a_frequency_below_rho_skips_a_layer_in_its_phase_alone() -> None:
    stack = opened("llama", 6)
    path = void(stack, IDS, below=0.5)[1].path["text"]
    assert (path.prefill, path.decode, path.keys) == ([0, 1, 3, 4, 5], [0, 1, 2, 4, 5], "fill")
    path = void(stack, IDS, below=0.5, keys="intersect")[1].path["text"]
    assert (path.prefill, path.decode) == ([0, 1, 3, 4, 5], [0, 1, 4, 5])
    with pytest.warns(UserWarning, match="changes the model"):
        plan = void(stack, IDS, below=0.5, keys="local")[1]
    assert plan.path["text"].keys == "local"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert void(stack, IDS, below=0.05, keys="local")[1].is_static


@pytest.mark.usefixtures("seen_by_hand")
@pytest.mark.filterwarnings("ignore:keys 'local' changes the model")
@pytest.mark.parametrize("keys", ["fill", "local", "intersect"])
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_s_steps_equal_its_parallel_execution_whatever_becomes_of_the_keys(name: str, keys: Any) -> None:
    stack = opened(name, 6)
    plan = void(stack, IDS, below=0.5, keys=keys)[1]
    view = apply(stack, plan)
    whole = parallel(view, IDS, LENGTHS, MASK).logits
    assert furthest(steps(view), whole) <= 1e-4
    assert furthest(whole, stack.model(input_ids=IDS, attention_mask=MASK).logits) > 0.01
    out = greedy(view)
    mask = torch.cat([MASK[:, :PROMPT], torch.ones_like(out.sequences[:, PROMPT:])], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    forced = parallel(view, out.sequences, LENGTHS, mask, position_ids=positions).logits[:, PROMPT - 1 : -1]
    assert (torch.stack(out.logits, 1) - forced).abs().max() <= 1e-4


def test_protected_layers_that_the_stack_does_not_have_are_refused() -> None:
    with pytest.raises(MethodError, match="protect 0, 8: name layers of a stack of 8"):
        void(opened("llama"), IDS, protect=(0, 8))


@pytest.mark.parametrize("params", [{"alpha": "much"}, {"beta": 1}], ids=str)
def test_a_plan_with_wrong_settings_is_refused_in_one_line(params: dict[str, Any]) -> None:
    stack = opened("llama")
    with pytest.raises(PlanError) as error:
        apply(
            stack,
            Plan(model=ModelReference.of(stack), policies={stack.stack: PolicyReference(name="void", params=params)}),
        )
    assert "policy 'void'" in str(error.value) and "\n" not in str(error.value)


def test_too_little_text_another_depth_and_an_empty_prompt_are_refused_in_one_line() -> None:
    stack = opened("llama")
    mask = MASK[:, :PROMPT].clone()
    mask[1] = 0
    lone = {"input_ids": IDS[:, :2], "attention_mask": torch.tensor([[0, 1]] * 4)}
    plan = lac_plan(stack)
    for attempt, kind, message in (
        (lambda: void(stack, IDS[:, :3]), CalibrationError, "calibration tokens must be .*: give more text"),
        (lambda: activity(stack, lone), CalibrationError, "every prompt is a single token"),
        (lambda: apply(opened("llama", 6), plan), PlanError, "is for a llama of 8 layers .* is a llama of 6 layers"),
        (lambda: greedy(apply(stack, plan), mask=mask), CacheError, "a prompt of this batch is empty"),
    ):
        with pytest.raises(kind, match=message) as error:
            attempt()
        assert type(error.value) is kind and "\n" not in str(error.value)
