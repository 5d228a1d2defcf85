"""Slots that store different columns in each row, compared with attention computed from its definition, in float64.

The reference uses neither a cache nor batches: every token of a row goes through the transformers layers as plain
modules, which are given the hidden states of the columns that it may attend to, at their positions, with its own last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lamella.errors import CacheError
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.runtime import LayerCall, Pass, PlanCache, Policy, PositionInputs, apply, parallel, with_policy
from lamella.runtime.cache import SparseSlot
from lamella.stack import Stack
from lamella.zoo.nano import nano

NAMES = ["llama", "gemma3_text", "gpt2", "gpt_neox", "opt"]
PROMPT, LENGTH = 10, 15  # longer than the sliding window of 8
IDS = torch.randint(3, 128, (4, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, :2] = 0
MASK[2, :9] = 0  # a prompt of one real token
REAL = MASK.bool()
LENGTHS = torch.tensor([8, 5, 10, 13])
CUTS = [tuple(range(1, LENGTH)), (4, 9, 14), (12,), (3, 4, 6)]  # one token at a time; calls in which some prompts end
PREFILL, DECODE = [0, 2, 3], [0, 1, 3]
TOLERANCE = 1e-8
Where = Callable[[int, int], bool]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str) -> Stack:
    stack = Stack(nano(name).double())
    stack.model.generation_config.eos_token_id = None
    return stack


def planned(stack: Stack, keys: Literal["fill", "local"] = "local") -> Plan:
    path = {"text": PhasedPath(prefill=PREFILL, decode=DECODE, keys=keys)}
    return Plan(model=ModelReference.of(stack), path=path)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def reference(
    stack: Stack, ids: Tensor, mask: Tensor, runs: Where, stores: Where, counted: bool = False, moves: bool = False
) -> Tensor:
    """The logits of one row [1, time, vocabulary], zero at its padding.

    Args:
        runs, stores: of a layer and a column: whether its token runs the layer, and whether later ones see it there.
        counted: whether positions are counted from the first real token, as ``generate`` does.
        moves: whether in every layer tokens take the positions that those leave which are not seen there.
    """
    given = {"input_ids": ids, "attention_mask": mask}
    if counted and stack.architecture.name != "opt":  # which always counts so by itself
        given["position_ids"] = positions(mask)
    context = stack.context(given)
    inputs: list[dict[int, Tensor]] = [{} for _ in stack.layers]
    logits = torch.zeros(*ids.shape, stack.config.vocab_size, dtype=torch.float64)
    for column in mask[0].nonzero().flatten().tolist():
        h = context.h[:, column : column + 1]
        for layer, module in enumerate(stack.layers):
            inputs[layer][column] = h
            if runs(layer, column):
                window = getattr(getattr(module, "self_attn", None), "sliding_window", None) or LENGTH
                back = [c for c in inputs[layer] if column - window < c < column and stores(layer, c)]
                places = columns = [*back, column]
                if moves:
                    seen = [c for c in inputs[layer] if stores(layer, c)]
                    places = [sum(each < c for each in seen) for c in columns]
                h = last_of(module, [inputs[layer][c] for c in columns], context.calls[layer], places)
        logits[:, column] = stack.head(h)[:, 0]
    return logits


def last_of(module: Any, streams: list[Tensor], call: dict[str, Any], columns: list[int]) -> Tensor:
    """Return a layer's output for the last of these hidden states, which attends to all of them, at these positions."""

    def pick(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(pick, value))
        by_column = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == LENGTH
        return value[:, columns] if by_column else value

    given = {name: pick(value) for name, value in call.items()}
    given["attention_mask"] = torch.full((len(columns),) * 2, -1e9, dtype=torch.float64).triu(1)[None, None]
    return module(torch.cat(streams, dim=1), **given)[:, -1:]


def phased(length: int, keys: str = "local") -> tuple[Where, Where]:
    """Which layers a token runs, and where it is seen, under the plan of these tests and with that prompt."""

    def runs(layer: int, column: int) -> bool:
        return layer in (PREFILL if column < length else DECODE)

    return runs, runs if keys == "local" else lambda layer, column: True


def expected_of(stack: Stack, keys: str = "local", rows: range = range(4)) -> Tensor:
    every = [reference(stack, IDS[r : r + 1], MASK[r : r + 1], *phased(int(LENGTHS[r]), keys)) for r in rows]
    return torch.cat(every)


def stepped(view: Any, cache: PlanCache, cuts: tuple[int, ...], begin: int = 0, end: int = LENGTH) -> Tensor:
    parts = []
    for stop in (*(cut for cut in cuts if cut < end), end):
        given = {"input_ids": IDS[:, begin:stop], "attention_mask": MASK[:, :stop]}
        parts.append(view(**given, cache=cache, use_cache=True).logits)
        begin = stop
    return torch.cat(parts, dim=1)


def furthest(one: Tensor, other: Tensor, real: Tensor = REAL) -> float:
    return float((one - other)[real].abs().max())


@pytest.mark.parametrize("keys", ["local", "fill"])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_may_end_anywhere_in_a_call(name: str, keys: Literal["fill", "local"]) -> None:
    stack = opened(name)
    view, expected = apply(stack, planned(stack, keys)), expected_of(stack, keys)
    assert furthest(parallel(view, IDS, LENGTHS, MASK).logits, expected) <= TOLERANCE
    for cuts in CUTS:
        cache = PlanCache(view.config, view.lamella_plan, LENGTHS)
        assert furthest(stepped(view, cache, cuts), expected) <= TOLERANCE
    assert furthest(stack.model(input_ids=IDS, attention_mask=MASK).logits, expected) > 0.05


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_single_tokens_of_rows_without_padding_look_back_on_their_own_columns_alone(name: str) -> None:
    stack = opened(name)
    view, whole = apply(stack, planned(stack)), torch.ones_like(MASK[:1])
    expected = torch.cat([reference(stack, IDS[r : r + 1], whole, *phased(int(LENGTHS[r]))) for r in range(4)])
    cache = PlanCache(view.config, view.lamella_plan, LENGTHS)
    steps = [view(input_ids=IDS[:, at : at + 1], cache=cache).logits for at in range(LENGTH)]
    assert (torch.cat(steps, dim=1) - expected).abs().max() <= TOLERANCE


def test_a_slot_holds_the_columns_that_the_plan_says_and_no_more() -> None:
    stack = opened("llama")
    view = apply(stack, planned(stack))
    for cuts in CUTS:
        cache = PlanCache(view.config, view.lamella_plan, LENGTHS)
        stepped(view, cache, cuts, end=14)
        own = [list(range(length, 14)) for length in LENGTHS.tolist()]
        longest = max(map(len, own))
        columns = cache.sparse(1).columns.tolist()
        assert columns == [[-1] * (longest - len(each)) + each for each in own]
        assert cache.layers[1].keys.shape[-2] == longest and cache.layers[0].keys.shape[-2] == 14
        assert cache.has_holes and cache.get_seq_length() == 14


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_equals_the_reference(name: str, beams: int) -> None:
    stack = opened(name)
    view = apply(stack, planned(stack))
    settings = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    beam = {"num_beams": beams, "num_return_sequences": beams}
    outputs = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    out = view.generate(input_ids=IDS[:, :PROMPT], attention_mask=MASK[:, :PROMPT], **settings, **beam, **outputs)
    ids, new = out.sequences, torch.ones(4 * beams, 5, dtype=torch.long)
    mask = torch.cat([MASK[:, :PROMPT].repeat_interleave(beams, dim=0), new], dim=1)
    rows = range(4 * beams)
    logits = torch.cat(
        [reference(stack, ids[r : r + 1], mask[r : r + 1], *phased(PROMPT), counted=True) for r in rows]
    )[:, PROMPT - 1 : -1]
    if beams == 1:
        assert (torch.stack(out.logits, dim=1) - logits).abs().max() <= 1e-6  # generate hands them on in float32
        assert torch.equal(logits.argmax(-1), ids[:, PROMPT:])
    else:
        likely = logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).squeeze(-1)
        torch.testing.assert_close(out.sequences_scores.double(), likely.mean(-1), rtol=1e-5, atol=1e-5)


def test_rows_are_reordered_selected_and_repeated_with_their_columns() -> None:
    stack = opened("llama")
    view, expected = apply(stack, planned(stack)), expected_of(stack)
    cases = {
        "reorder_cache": (torch.tensor([2, 0, 3, 1]), torch.tensor([2, 0, 3, 1])),
        "batch_select_indices": (torch.tensor([3, 0]), torch.tensor([3, 0])),
        "batch_repeat_interleave": (2, torch.arange(4).repeat_interleave(2)),
    }
    for operation, (argument, rows) in cases.items():
        for cut in (3, 7, 12):  # before any prompt ends, and behind one, and three
            cache = PlanCache(view.config, view.lamella_plan, LENGTHS)
            stepped(view, cache, (), end=cut)
            getattr(cache, operation)(argument)
            for begin, end in ((cut, 13), (13, LENGTH)):
                given = {"input_ids": IDS[rows, begin:end], "attention_mask": MASK[rows, :end]}
                logits = view(**given, cache=cache).logits
                assert furthest(logits, expected[rows, begin:end], REAL[rows, begin:end]) <= TOLERANCE


def test_a_cache_is_cropped_to_columns_behind_all_prompts_alone() -> None:
    stack = opened("llama")
    view, expected = apply(stack, planned(stack)), expected_of(stack)
    cache = PlanCache(view.config, view.lamella_plan, LENGTHS)
    stepped(view, cache, (9,))
    cache.crop(-1)
    assert int(cache.sparse(1).columns.max()) == 13 and cache.get_seq_length() == 14
    assert furthest(stepped(view, cache, (), begin=14), expected[:, 14:], REAL[:, 14:]) <= TOLERANCE
    with pytest.raises(CacheError, match="cannot be cropped into the prompt"):
        cache.crop(-3)


def test_prompt_lookup_gives_the_tokens_of_plain_greedy() -> None:
    stack = opened("llama")
    view = apply(stack, planned(stack))
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False}
    plain = view.generate(**given, pad_token_id=0)
    assert torch.equal(view.generate(**given, pad_token_id=0, prompt_lookup_num_tokens=3), plain)


class Woven(Policy):
    """Layer 1 keeps every other column, even ones in one row and odd ones in the next; layer 2 likewise.

    Behind the prompt, layer 2 is run by the first and the last row of four alone, whose keys are all that is kept.
    """

    sparse = frozenset({1, 2})
    takes = "phase"

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        if call.index not in self.sparse:
            return call(h)
        row = torch.arange(4) if run.cache is None else run.cache.state.setdefault("row", torch.arange(4))
        keys = (torch.arange(run.phase.start, run.phase.end) + row[:, None]) % 2 == 0
        stays = (row == 0) | (row == 3)
        if call.index == 1:
            return call(h, keys=keys)
        if run.cache is None:
            return run.choose(call, run.phase.response(h.device) & ~stays[:, None], h, call(h, keys=keys))
        if run.phase.any_prompt:
            out = call(h, keys=keys)
            run.cache.keep_rows(2, stays)
            return out
        rows = run.cache.rows_of(2)
        out = h.clone()
        if rows is None:  # all that are left stay
            return call(h, keys=keys)
        if len(rows):
            out[rows] = call.rows(rows)(h[rows], keys=keys[rows])
        return out


@pytest.mark.parametrize("name", NAMES)
def test_a_slot_may_hold_some_rows_and_of_them_some_columns(name: str) -> None:
    stack = opened(name)
    view = with_policy(stack, planned(stack), Woven(stack))

    def of(row: int) -> tuple[Where, Where]:
        def runs(layer: int, column: int) -> bool:
            return layer != 2 or column < PROMPT or row in (0, 3)

        return runs, lambda layer, column: layer not in (1, 2) or (column + row) % 2 == 0

    expected = torch.cat([reference(stack, IDS[r : r + 1], MASK[r : r + 1], *of(r)) for r in range(4)])
    assert furthest(parallel(view, IDS, torch.full((4,), PROMPT), MASK).logits, expected) <= TOLERANCE
    for cuts in ((PROMPT,), tuple(range(PROMPT, LENGTH)), (PROMPT, 12)):
        cache = PlanCache(view.config, view.lamella_plan, PROMPT)
        assert furthest(stepped(view, cache, cuts), expected) <= TOLERANCE
        assert cache.rows_of(2).tolist() == [0, 3] and len(cache.sparse(1).columns) == 4
    for rows in (torch.tensor([3, 1, 1]), torch.tensor([1, 2])):
        cache = PlanCache(view.config, view.lamella_plan, PROMPT)
        stepped(view, cache, (PROMPT,), end=12)
        cache.reorder_cache(rows)
        logits = view(input_ids=IDS[rows, 12:], attention_mask=MASK[rows], cache=cache).logits
        assert furthest(logits, expected[rows, 12:], REAL[rows, 12:]) <= TOLERANCE
    assert cache.rows_of(2).tolist() == []  # neither of the last two rows runs it: its keys are removed
    cache.reset()
    assert cache.sparse(1) is None and not cache.has_holes and cache.get_seq_length() == 0


class Thinned(Policy):
    """In layers 1 and 2 a token runs or passes by what it is, and those that run see each other alone."""

    sparse = frozenset({1, 2})

    def __init__(self, stack: Stack, moves: bool, share: float = 0.5) -> None:
        super().__init__(stack)
        self.runs = torch.rand(2, 4, LENGTH, generator=torch.Generator().manual_seed(1)) < share
        self.runs[:, 0, 12:] = False  # a call in which a row has none, and one in which no row has any
        self.runs[1, :, 13] = False
        self.position_inputs = PositionInputs(stack) if moves else None

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        if call.index not in self.sparse:
            return call(h)
        row = torch.arange(4) if run.cache is None else run.cache.state.setdefault("row", torch.arange(4))
        which = self.runs[call.index - 1, row, run.phase.start : run.phase.end]
        which = which if run.real is None else which & run.real
        if not which.any():
            return h
        some = call.tokens(which, self.position_inputs)
        stream = some.gather(h)
        return some.scatter(h, some.mlp(some.attn(stream)))


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_some_tokens_of_each_row_run_a_layer(name: str, moves: bool) -> None:
    stack = opened(name)
    if name in ("gpt2", "opt") and moves:
        pytest.skip("its layers know no positions")
    tolerance = 5e-6 if moves else TOLERANCE  # transformers computes rotary embeddings in float32
    policy = Thinned(stack, moves)
    view = with_policy(stack, planned(stack), policy)

    def of(row: int) -> Where:
        return lambda layer, column: layer not in (1, 2) or bool(policy.runs[layer - 1, row, column])

    expected = torch.cat(
        [reference(stack, IDS[r : r + 1], MASK[r : r + 1], of(r), of(r), moves=moves) for r in range(4)]
    )
    assert furthest(parallel(view, IDS, LENGTHS, MASK).logits, expected) <= tolerance
    for cuts in CUTS:
        cache = PlanCache(view.config, view.lamella_plan, LENGTHS)
        assert furthest(stepped(view, cache, cuts), expected) <= tolerance
    rows = torch.tensor([3, 1, 1])
    cache = PlanCache(view.config, view.lamella_plan, LENGTHS)
    stepped(view, cache, (10,), end=12)
    cache.reorder_cache(rows)
    logits = view(input_ids=IDS[rows, 12:], attention_mask=MASK[rows], cache=cache).logits
    assert furthest(logits, expected[rows, 12:], REAL[rows, 12:]) <= tolerance


def test_a_sparse_slot_holds_what_lists_of_columns_hold() -> None:
    """Many operations in sequence, compared with a list of the stored columns of each row."""
    generator = torch.Generator().manual_seed(0)
    slot, seen = SparseSlot(3, torch.device("cpu")), 0
    lists: list[list[tuple[int, float]]] = [[] for _ in range(3)]
    for _ in range(60):
        rows = len(lists)
        tokens = int(torch.randint(1, 4, (), generator=generator))
        new = torch.randn(rows, 1, tokens, 1, generator=generator)
        slot.columns = slot.columns_with(seen, tokens)
        slot.update(new, 2 * new)
        which = torch.rand(rows, tokens, generator=generator) < 0.5
        slot.keep(which)
        for row, held in enumerate(lists):
            held += [(seen + at, float(new[row, 0, at, 0])) for at in range(tokens) if which[row, at]]
        seen += tokens
        assert slot.columns.shape[1] == max(map(len, lists))
        assert slot.ragged == (len({len(held) for held in lists}) > 1)
        if torch.rand((), generator=generator) < 0.3:
            taken = torch.randint(0, rows, (3,), generator=generator)
            slot.batch_select_indices(taken)
            lists = [list(lists[row]) for row in taken.tolist()]
        if torch.rand((), generator=generator) < 0.2:
            slot.keep(slot.columns < seen - 2)
            lists = [[each for each in held if each[0] < seen - 2] for held in lists]
        found = [
            [(c, k) for c, k in zip(columns.tolist(), keys.tolist(), strict=True) if c >= 0]
            for columns, keys in zip(slot.columns, slot.keys[:, 0, :, 0], strict=True)
        ]
        assert found == [[(c, pytest.approx(k)) for c, k in held] for held in lists]
        assert torch.equal(slot.values, 2 * slot.keys)
        assert slot.ragged or bool((slot.columns >= 0).all())
