"""Skipped experts: nothing skipped, everything skipped, the counts, and the threshold of each modality."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lamella.errors import MethodError
from lamella.evaluate.scored import labelled_batches
from lamella.methods.modes import AnswerDistance, ExpertSkipping, layer_importance, method, modes
from lamella.methods.modes.method import BATCH, skipped
from lamella.needs import recording, without_values
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import apply, empty_cache, parallel, with_policy
from lamella.stack import Stack
from lamella.train import pairs
from lamella.zoo.nano import nano

IDS = torch.randint(3, 120, (3, 14), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
LENGTHS = torch.full((3,), 9)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str = "qwen3_moe") -> Stack:
    stack = Stack(nano(name))
    stack.model.generation_config.eos_token_id = None
    return stack


def planned(stack: Stack, text: float, image: float = 0.0, scale: float = 1.0) -> Plan:
    alpha = [scale * (1 + layer) / 10 for layer in range(len(stack))]
    params = {"alpha": {"text": alpha, "image": alpha}, "tau": {"text": scale * text, "image": scale * image}}
    return Plan(model=ModelReference.of(stack), policies={stack.stack: PolicyReference(name="modes", params=params)})


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_a_threshold_of_zero_is_the_model_bitwise(name: str) -> None:
    stack = opened(name)
    found = parallel(apply(stack, planned(stack, 0.0)), IDS, LENGTHS, MASK).logits
    assert torch.equal(found, stack.model(input_ids=IDS, attention_mask=MASK).logits)


def test_where_all_is_skipped_the_experts_give_nothing() -> None:
    stack = opened()
    found = parallel(apply(stack, planned(stack, 1e9)), IDS, LENGTHS, MASK).logits
    context = stack.context({"input_ids": IDS, "attention_mask": MASK})
    without = stack.head(stack.run(context.h, 0, len(stack), context, skip=[(i, "mlp") for i in range(len(stack))]))
    torch.testing.assert_close(found[MASK.bool()], without[MASK.bool()], rtol=0, atol=2e-5)


def test_only_the_ratio_of_importance_and_threshold_counts() -> None:
    stack = opened()
    one, other = (
        parallel(apply(stack, planned(stack, 0.12, scale=scale)), IDS, LENGTHS, MASK).logits for scale in (1.0, 8.0)
    )
    assert torch.equal(one, other)


def test_skipped_pairs_equal_weights_of_zero_in_the_models_own_experts() -> None:
    stack = opened()
    found = parallel(apply(stack, planned(stack, 0.12)), IDS, LENGTHS, MASK).logits

    def zeroed(layer: int) -> Any:
        def before(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            h, chosen, weights = args
            return h, chosen, weights * ((1 + layer) / 10 * weights >= 0.12)

        return before

    for index, layer in enumerate(stack.layers):
        layer.mlp.experts.register_forward_pre_hook(zeroed(index))
    masked = stack.model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found[MASK.bool()], masked[MASK.bool()], rtol=0, atol=1e-5)


def test_what_is_counted_is_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = opened()
    view = apply(stack, planned(stack, 0.12))
    ran = {layer: 0 for layer in range(len(stack))}
    for layer, module in enumerate(view.model.layers):
        own = type(module.mlp.experts).forward

        def counted(self: Any, h: Tensor, ids: Tensor, weights: Tensor, own: Any = own, layer: int = layer) -> Tensor:
            ran[layer] += ids.numel()
            return own(self, h, ids, weights)

        module.mlp.experts.forward = counted.__get__(module.mlp.experts)
    parallel(view, IDS, LENGTHS, MASK)
    counts = view.lamella_policy.counts
    assert counts[:, 0, 1].tolist() == list(ran.values()) and not counts[:, 1].any()
    assert counts[:, 0, 0].tolist() == [2 * int(MASK.sum())] * len(stack)
    assert 0 < skipped(counts) < 1 and skipped(counts) == 1 - sum(ran.values()) / (2 * int(MASK.sum()) * len(stack))


def test_steps_equal_whole_sequences_and_padding_changes_nothing() -> None:
    stack = opened()
    view = apply(stack, planned(stack, 0.12))
    whole = parallel(view, IDS, LENGTHS, MASK).logits
    cache = empty_cache(view, 9)
    parts, begin = [], 0
    for end in (9, 10, 11, 14):
        given = {"input_ids": IDS[:, begin:end], "attention_mask": MASK[:, :end]}
        parts.append(view(**given, cache=cache, use_cache=True).logits)
        begin = end
    torch.testing.assert_close(torch.cat(parts, 1)[MASK.bool()], whole[MASK.bool()], rtol=0, atol=2e-5)
    alone = parallel(view, IDS[:1, 4:], torch.tensor([5])).logits
    torch.testing.assert_close(whole[:1, 4:], alone, rtol=0, atol=2e-5)
    given = {"input_ids": IDS[:, :9], "attention_mask": MASK[:, :9]}
    ids = view.generate(**given, max_new_tokens=5, do_sample=False, pad_token_id=0)
    grown = torch.cat([MASK[:, :9], torch.ones(3, 5, dtype=MASK.dtype)], 1)
    assert torch.equal(parallel(view, ids, LENGTHS, grown).logits[:, 8:-1].argmax(-1), ids[:, 9:])


def with_images() -> tuple[Stack, dict[str, Tensor]]:
    """A LLaVA whose text model has experts, and a batch of which one row has no image."""
    text = nano("qwen3_moe").config.to_dict()
    model = nano("llava", text_config=text)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    ids = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    ids[0, 2:18] = model.config.image_token_id
    return Stack(model, stack="text"), {"input_ids": ids, "pixel_values": pixels}


def test_each_modality_has_its_threshold() -> None:
    stack, given = with_images()
    lengths = torch.full((2,), 20)

    def logits_and_counts(text: float, image: float) -> tuple[Tensor, Tensor]:
        view = apply(stack, planned(stack, text, image))
        return parallel(view, given, lengths).logits, view.lamella_policy.counts

    (whole, counts), (some, fewer) = logits_and_counts(0.0, 0.0), logits_and_counts(0.0, 1e9)
    assert int(counts[0, 1, 0]) == 16 * 2 and int(fewer[..., 1, 1].sum()) == 0
    assert torch.equal(fewer[:, 0, 0], fewer[:, 0, 1])
    torch.testing.assert_close(whole[1], some[1], rtol=0, atol=2e-5)  # the row without an image
    assert (whole[0, 18:] - some[0, 18:]).abs().max() > 1e-4
    assert torch.equal(whole, stack.model(**given).logits)


def test_importance_is_of_the_answers_and_sums_to_one() -> None:
    stack = opened("olmoe")
    drawn = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 120, (length,), generator=drawn) for length in (9, 12, 11, 8)]
    samples = pairs([(row[:5], row[5:]) for row in rows])
    stack.layers[2].mlp.experts.down_proj.zero_()
    alpha = layer_importance(AnswerDistance(stack, list(labelled_batches(samples, BATCH))))
    assert alpha["text"][2] == 0 and abs(sum(alpha["text"]) - 1) < 1e-12
    assert alpha["image"] == [0.25] * 4  # nothing is known of them
    moved = []
    for layer in (0, 1, 3):  # one row at a time, without padding, and the model's own sublayers
        total, count = 0.0, 0
        for row in rows:
            context = stack.context(row[None])
            before, after = (
                stack.head(stack.run(context.h, 0, 4, context, skip=skip))[0, 4:-1].log_softmax(-1)
                for skip in ((), [(layer, "mlp")])
            )
            total += float((before.exp() * (before - after)).sum())
            count += len(row) - 5
        moved.append(total / count)
    for layer, share in zip((0, 1, 3), moved, strict=True):
        assert alpha["text"][layer] == pytest.approx(share / sum(moved), rel=1e-4)


def test_the_series_skips_what_is_evaluated_for() -> None:
    stack = opened("olmoe")
    drawn = torch.Generator().manual_seed(3)
    samples = pairs([(row[:5], row[5:]) for row in torch.randint(3, 120, (6, 12), generator=drawn)])
    series = modes(stack, samples, points=12)
    shares = [point.scores["skipped pairs"] for point in series.points[1:]]
    assert all(share >= wanted - 1e-9 for share, wanted in zip(shares, [n / 10 for n in range(1, 10)], strict=True))
    policy = ExpertSkipping(stack, **series.points[5].policies["text"].params)
    view = with_policy(stack, planned(stack, 0.0), policy)
    counts = sum(
        (parallel(view, b["input_ids"], b["prompt_lengths"], b["attention_mask"]), policy.counts)[1]
        for b in labelled_batches(samples, BATCH)
    )
    assert skipped(counts) == pytest.approx(shares[4])


def labelled(count: int = 6) -> Any:
    """Samples of text."""
    drawn = torch.Generator().manual_seed(3)
    return pairs([(row[:5], row[5:]) for row in torch.randint(3, 120, (count, 12), generator=drawn)])


def test_of_text_alone_every_threshold_is_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[tuple[float, float]] = []
    own = method.skipping

    def counted(answers: Any, alpha: Any, tau: dict[str, float]) -> Any:
        evaluated.append((tau["text"], tau["image"]))
        return own(answers, alpha, tau)

    monkeypatch.setattr(method, "skipping", counted)
    for grid in ("quantile", "paper"):
        evaluated.clear()
        modes(opened("olmoe"), labelled(), skip=0.1, points=12, grid=grid)  # type: ignore[arg-type]
        assert len(evaluated) == len(set(evaluated)) <= 13


def test_tenths_that_the_papers_thresholds_cannot_skip_are_left_out() -> None:
    stack, samples = opened("olmoe"), labelled()
    shares = [point.scores["skipped pairs"] for point in modes(stack, samples, points=6, grid="paper").points[1:]]
    most = max(shares)
    assert 0.1 <= most < 0.9
    with pytest.raises(MethodError, match="lower skip"):
        modes(stack, samples, points=6, grid="paper", skip=0.95)


def test_an_expert_that_all_tokens_share_stays() -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=48, max_position_embeddings=128,
    )  # fmt: skip
    stack = Stack(transformers.Qwen2MoeForCausalLM(config).eval())
    found = parallel(apply(stack, planned(stack, 1e9)), IDS, LENGTHS, MASK).logits
    context = stack.context({"input_ids": IDS, "attention_mask": MASK})
    nothing = stack.head(stack.run(context.h, 0, len(stack), context, skip=[(i, "mlp") for i in range(len(stack))]))
    for layer in stack.layers:
        layer.mlp.experts.down_proj.zero_()
    shared = stack.model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found[MASK.bool()], shared[MASK.bool()], rtol=0, atol=2e-5)
    assert (shared - nothing)[MASK.bool()].abs().max() > 1e-3


def test_a_prefix_of_images_alone_does_not_see_the_threshold_of_text() -> None:
    stack, given = with_images()
    given["input_ids"] = given["input_ids"][:1, 2:]  # 16 tokens of the image, and text behind them
    logits = [
        parallel(apply(stack, planned(stack, text, 0.12)), given, torch.tensor([20])).logits for text in (0.0, 1e9)
    ]
    torch.testing.assert_close(logits[0][:, :16], logits[1][:, :16], rtol=0, atol=1e-6)
    assert (logits[0][:, 16:] - logits[1][:, 16:]).abs().max() > 1e-4


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(MethodError, match="no experts"):
        ExpertSkipping(opened("llama"), alpha={"text": [1.0] * 4, "image": [1.0] * 4})
    with pytest.raises(MethodError, match="each of 4 layers"):
        ExpertSkipping(opened(), alpha={"text": [1.0] * 3, "image": [1.0] * 4})
    with pytest.raises(MethodError, match="at least 0"):
        ExpertSkipping(opened(), alpha={"text": [1.0] * 4, "image": [1.0] * 4}, tau={"text": -1.0, "image": 0.0})


def test_memory_grows_by_hidden_states_and_not_by_distributions() -> None:
    model = nano("qwen3_moe", vocab_size=4096)
    row = torch.randint(3, 120, (24,), generator=torch.Generator().manual_seed(0))
    peaks = []
    for count in (BATCH, 9 * BATCH):
        batches = list(labelled_batches(pairs([(row[:8], row[8:])] * count), BATCH))
        with recording() as needs:
            AnswerDistance(Stack(without_values(model)), batches)
        peaks.append(needs.peak)
    answers = 8 * BATCH * 16  # of what was added
    assert peaks[1] - peaks[0] < 2 * 4 * answers * model.config.hidden_size < 4 * answers * 4096 / 8
