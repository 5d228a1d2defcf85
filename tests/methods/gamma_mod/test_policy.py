"""Mixture of depths, against layers written out over lists of tokens, in float64; without cache, batch or padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from lamella.data import MARK, ImageTextRow, Processing
from lamella.errors import MethodError, PlanError
from lamella.evaluate.scored import read_inputs
from lamella.methods.gamma_mod.policy import MixtureOfDepths
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import PlanCache, apply, empty_cache, parallel, with_policy
from lamella.stack import Stack, open_model
from lamella.zoo.nano import nano
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import examples

PROMPT, LENGTH = 10, 15
IDS = torch.randint(3, 120, (3, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[2, :1] = 0
REAL = MASK.bool()
LENGTHS = torch.full((3,), PROMPT)
LAYERS = [1, 3]
TOLERANCE = 5e-6  # transformers computes rotary embeddings in float32, and the router is in float32 too


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str = "llama") -> Stack:
    model = nano(name)
    stack = Stack(model if "moe" in name else model.double())  # a grouped matrix product is not in float64
    stack.model.generation_config.eos_token_id = None
    return stack


def plan_of(stack: Stack, **params: Any) -> Plan:
    reference = PolicyReference(name="gamma-mod", params={"layers": LAYERS, **params})
    return Plan(model=ModelReference.of(stack), policies={stack.stack: reference})


def viewed(stack: Stack, **params: Any) -> tuple[Any, MixtureOfDepths]:
    policy = MixtureOfDepths(stack, layers=LAYERS, **params)
    with torch.no_grad():
        policy.router *= 8  # decided, one way or the other
    return with_policy(stack, plan_of(stack), policy), policy


def expected(stack: Stack, policy: MixtureOfDepths, ids: Tensor, prompt: int, compact: bool) -> Tensor:
    """The logits of one row without padding [time, vocabulary], of a Llama."""
    model: Any = stack.model.model
    h = model.embed_tokens(ids[None])
    causal = torch.full((len(ids), len(ids)), -1e9, dtype=h.dtype).triu(1)[None, None]
    for index, layer in enumerate(model.layers):
        places = list(range(len(ids)))
        p = torch.ones(len(ids), dtype=h.dtype)
        if index in LAYERS:
            z = layer.input_layernorm(h[0]).float() @ policy.router[0].T
            p = z.softmax(-1)[:, 1].double()
            places = [at for at in places if p[at] > (0.4 if at < prompt else 0.6)]
        if not places:
            continue
        at = torch.arange(len(places)) if compact and index in LAYERS else torch.tensor(places)
        g, among = h[:, places], causal[..., : len(places), : len(places)]
        attn, _ = layer.self_attn(
            layer.input_layernorm(g), position_embeddings=model.rotary_emb(h, at[None]), attention_mask=among
        )
        u = g + attn
        h = h.clone()
        h[:, places] = u + p[places, None] * layer.mlp(layer.post_attention_layernorm(u))
    return stack.model.lm_head(model.norm(h))[0]


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_steps_and_whole_sequences_are_what_the_paper_says(positions: Any) -> None:
    stack = opened()
    view, policy = viewed(stack, positions=positions, prefill=0.4, decode=0.6)
    wanted = torch.zeros(3, LENGTH, stack.config.vocab_size, dtype=torch.float64)
    for row in range(3):
        first = LENGTH - int(MASK[row].sum())
        wanted[row, first:] = expected(stack, policy, IDS[row, first:], PROMPT - first, positions == "compact")
    found = parallel(view, IDS, LENGTHS, MASK).logits
    assert (found - wanted)[REAL].abs().max() <= TOLERANCE
    for cuts in ((10, 11, 12, 13, 14), (4, 10, 12), (12,)):
        cache = PlanCache(view.config, view.lamella_plan, PROMPT)
        begin, parts = 0, []
        for end in (*cuts, LENGTH):
            given = {"input_ids": IDS[:, begin:end], "attention_mask": MASK[:, :end]}
            parts.append(view(**given, cache=cache, use_cache=True).logits)
            begin = end
        assert (torch.cat(parts, dim=1) - wanted)[REAL].abs().max() <= TOLERANCE
    lengths = {len(cache.sparse(layer).columns[0]) for layer in LAYERS}
    assert max(lengths) < LENGTH  # nothing is stored for those that pass


@pytest.mark.parametrize("layers", [[0], [0, 1], [1, 3]])
def test_steps_equal_whole_sequences_where_some_layers_have_a_sliding_window(layers: list[int]) -> None:
    stack = opened("gemma3_text")
    policy = MixtureOfDepths(stack, layers=layers, prefill=0.45)
    with torch.no_grad():
        policy.router *= 4
    view = with_policy(stack, plan_of(stack, layers=layers), policy)
    whole = parallel(view, IDS, LENGTHS, MASK).logits
    parts, cache, begin = [], None, 0
    for end in (PROMPT, 11, 13, LENGTH):
        out = view(input_ids=IDS[:, begin:end], attention_mask=MASK[:, :end], cache=cache, use_cache=True)
        parts.append(out.logits)
        cache, begin = out.cache, end
    assert (torch.cat(parts, dim=1) - whole)[REAL].abs().max() <= TOLERANCE


def test_tokens_move_up_within_the_positions_that_a_model_has() -> None:
    """GPT-2 adds positions to the embedding alone, so new positions within a layer change nothing."""
    stack = Stack(nano("gpt2", n_positions=16))
    views = []
    for positions in ("compact", "original"):
        policy = MixtureOfDepths(stack, layers=LAYERS, prefill=0.5, positions=positions)  # type: ignore[arg-type]
        views.append(with_policy(stack, plan_of(stack), policy))
    for length in (9, 14, 16):
        ids, lengths = torch.randint(3, 120, (1, length)), torch.tensor([length])
        compact, original = (parallel(view, ids, lengths).logits for view in views)
        torch.testing.assert_close(compact, original, rtol=0, atol=1e-6)
        assert not torch.allclose(compact, stack.model(ids).logits, atol=1e-4)  # some tokens skip


def test_generation_is_greedy_over_whole_sequences() -> None:
    stack = opened()
    view, _ = viewed(stack, prefill=0.4, decode=0.6)
    given = {"input_ids": IDS[:, :PROMPT], "attention_mask": MASK[:, :PROMPT]}
    ids = view.generate(**given, max_new_tokens=5, do_sample=False, pad_token_id=0)
    grown = torch.cat([MASK[:, :PROMPT], torch.ones(3, 5, dtype=MASK.dtype)], dim=1)
    logits = parallel(view, ids, LENGTHS, grown).logits
    assert torch.equal(logits[:, PROMPT - 1 : -1].argmax(-1), ids[:, PROMPT:])
    beams = view.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=0, num_beams=3)
    for row in range(3):
        alone = view.generate(
            input_ids=IDS[row : row + 1, :PROMPT][:, MASK[row, :PROMPT].bool()],
            max_new_tokens=4, do_sample=False, pad_token_id=0, num_beams=3,
        )  # fmt: skip
        assert torch.equal(alone[0, -4:], beams[row, -4:])


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "qwen3_moe"])
def test_a_router_that_keeps_all_changes_nothing(name: str) -> None:
    stack = opened(name)
    view = viewed(stack, start="keep")[0]
    assert torch.equal(parallel(view, IDS, LENGTHS).logits, stack.model(input_ids=IDS).logits)
    real = parallel(view, IDS, LENGTHS, MASK).logits[REAL]
    torch.testing.assert_close(real, stack.model(input_ids=IDS, attention_mask=MASK).logits[REAL], rtol=0, atol=2e-5)
    given = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(view.generate(**given), stack.model.generate(**given))


def test_where_no_token_is_processed_the_layer_is_the_identity() -> None:
    stack = opened()
    view = viewed(stack, prefill=1.0, decode=1.0)[0]
    context = stack.context({"input_ids": IDS, "attention_mask": MASK})
    without = stack.head(stack.execute(context, [0, 2]))
    assert torch.equal(parallel(view, IDS, LENGTHS, MASK).logits[REAL], without[REAL])


def test_training_looks_ahead_and_serving_does_not() -> None:
    stack = opened()
    view, policy = viewed(stack, prefill=0.4, decode=0.6)
    other = IDS.clone()
    other[:, -3:] = (other[:, -3:] + 7) % 120 + 3
    lengths = torch.full((3,), LENGTH)
    before, after = (parallel(view, ids, lengths).logits[:, :-3] for ids in (IDS, other))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-9)
    policy.training_share, policy.masks, policy.text_rows = 0.5, False, "half"
    policy._free = lambda real, run: real  # type: ignore[method-assign]
    before, after = (parallel(view, ids, lengths).logits[:, :-3] for ids in (IDS, other))
    assert (before - after).abs().max() > 1e-4


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_in_training_the_best_of_the_image_and_all_behind_it_are_processed(share: float) -> None:
    model = nano("llava")
    opened_model = Stack(model.double(), stack="text")
    image = int(model.config.image_token_id)
    ids = torch.randint(3, 100, (2, 30), generator=torch.Generator().manual_seed(2))
    ids[0, 2:18] = image
    ids[1, 5:21] = image
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    policy = MixtureOfDepths(opened_model, layers=LAYERS)
    policy.training_share = share
    seen: list[tuple[Tensor, Tensor]] = []
    best = policy.training_tokens
    policy.training_tokens = lambda odds, real, run: seen.append((odds.sigmoid(), best(odds, real, run))) or seen[-1][1]  # type: ignore
    reference = PolicyReference(name="gamma-mod", params={"layers": LAYERS})
    plan = Plan(model=ModelReference.of(opened_model), policies={"text": reference})
    view = with_policy(opened_model, plan, policy)
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    parallel(view, given, torch.tensor([25, 25]))
    free = torch.zeros_like(mask, dtype=torch.bool)
    free[0, :18] = True
    free[1, 3:21] = True
    losses = []
    for p, which in seen:
        assert bool(which[mask.bool() & ~free].all())
        for row in range(2):
            processed = which[row] & mask[row].bool()
            kept = int((processed & free[row]).sum())
            assert kept == int(free[row].sum()) - int(share * int(free[row].sum()))
            if kept and share:
                left = free[row] & ~processed
                assert p[row][processed & free[row]].min() >= p[row][left].max()
        real = mask.bool()
        right = torch.where(which, p, 1 - p)[real]
        losses.append(-right.log().mean())
    torch.testing.assert_close(policy.router_loss, torch.stack(losses).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen2_vl", "idefics3"])  # positions of three axes, and SmolVLM's architecture
def test_models_of_other_kinds_are_served_in_steps_as_in_whole_sequences(kind: str) -> None:
    model, processor = shapes_vlm(kind, num_hidden_layers=4)
    processing = Processing(processor)
    turns = ({"role": "user", "content": f"{MARK}\ncount the circles"}, {"role": "assistant", "content": "one"})
    images = [each.image for each in examples(("count",), 2)]
    batch = processing.batch([ImageTextRow((image,), turns) for image in images])
    given = {name: each for name, each in read_inputs(model, batch).items() if name != "attention_mask"}
    prompt, ids = int(batch["prompt_lengths"][0]), batch["input_ids"]
    stack = Stack(model, stack="text")
    policy = MixtureOfDepths(stack, layers=LAYERS)
    with torch.no_grad():
        policy.router *= 8
    reference = PolicyReference(name="gamma-mod", params={"layers": LAYERS})
    view = with_policy(stack, Plan(model=ModelReference.of(stack), policies={"text": reference}), policy)
    policy.thresholds = [torch.full((2,), 0.4, dtype=torch.float64)] * 2
    whole = parallel(view, given, batch["prompt_lengths"]).logits
    cache, parts = empty_cache(view, prompt), []
    for begin, end in ((0, prompt), *((at, at + 1) for at in range(prompt, ids.shape[1]))):
        some = {name: each[..., begin:end] for name, each in given.items() if each.shape[-1] == ids.shape[1]}
        shown = given | some if begin == 0 else some
        parts.append(view(**shown, cache=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-5)
    image = ids == model.config.image_token_id
    stored = {len(cache.sparse(layer).columns[0]) for layer in LAYERS}
    assert image.any() and max(stored) < ids.shape[1]


def test_the_shared_router_is_there_once() -> None:
    _, policy = viewed(opened())
    assert {name: tuple(each.shape) for name, each in policy.state_dict().items()} == {"router": (1, 2, 32)}


def test_gradients_of_the_task_reach_the_router() -> None:
    stack = opened()
    view, policy = viewed(stack, prefill=0.4, decode=0.6)
    with torch.enable_grad():
        parallel(view, IDS, LENGTHS, MASK).logits[REAL].square().mean().backward()
    assert policy.router.grad is not None and float(policy.router.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"layers": [9]}, "no layer 9"), ({"layers": []}, "give layers to convert"), ({"prefill": 2.0}, "from -1 to 1"),
     ({"decode": [0.5]}, "each of the 2 layers"), ({"routers": "none"}, "shared, layer or modality")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        MixtureOfDepths(opened(), **{"layers": LAYERS, **wrong})


def test_a_model_whose_image_tokens_see_those_behind_them_is_refused() -> None:
    text = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 16,
            "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}  # fmt: skip
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 16, "patch_size": 4}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4, image_token_index=120)
    stack = open_model(Gemma3ForConditionalGeneration(config)).stacks["text"]
    with pytest.raises(PlanError, match="see later tokens"):
        apply(stack, plan_of(stack))
