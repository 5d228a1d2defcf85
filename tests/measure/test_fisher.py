"""Importances: equal to the loop and to closed forms, however samples are split, stored and merged."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softmax
from torch.utils.data import DataLoader, TensorDataset

from lamella.errors import CalibrationError, LamellaError, MethodError, NumericsError
from lamella.measure import Fisher, check_disjoint, fisher
from lamella.measure.labelled import batches
from lamella.methods.ssd import percentile
from lamella.stack import weights
from lamella.train import blocks, collate
from lamella.zoo.nano import nano

SAMPLES = 70  # more than one chunk


class Residual(nn.Module):
    """Shortcuts, in-place activations, groups, strides: what real convolutional networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.deep = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False)
        self.group = nn.GroupNorm(2, 4)
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding="valid")
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.stem(x)))
        h = h + self.act(self.group(self.deep(h)))
        return self.head(self.down(h).mean((2, 3)))


class Words(nn.Module):
    """A classifier of token sequences, whose embedding is used at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head((h + self.mix(self.norm(h))).mean(1))


class Tied(Words):
    """The same linear layer twice, to which no rule for a single use may be applied."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.mix(self.embed(x))).mean(1))


class Hidden(Words):
    """A weight that is also used outside its module."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.norm(self.embed(x))).mean(1)) @ self.head.weight[:, :5]


class Mixing(Words):
    """Samples that interact with each other."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.norm(self.embed(x))).mean(1)
        return self.head(h + h.mean(0))


class Attending(Words):
    """Torch's attention, whose parameters are on its parent module; and a weight without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.token = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.norm(self.embed(x))) + self.token
        return self.head(self.attention(h, h, h, need_weights=False)[0].mean(1))


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "residual":
        model: nn.Module = Residual()
        model(torch.randn(20, 1, 8, 8))  # running statistics of their own
        return model.eval()
    if kind == "plain":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 5))
    kinds = {"words": Words, "tied": Tied, "hidden": Hidden, "mixing": Mixing, "attending": Attending}
    return kinds[kind]().eval()


def data(kind: str, samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (samples,), generator=generator)
    if kind in ("residual", "plain"):
        return torch.randn(samples, 1, 8, 8, generator=generator), labels
    return torch.randint(0, 11, (samples, 7), generator=generator), labels


def by_loop(model: nn.Module, x: Tensor, y: Tensor, size: int = 1, label_free: bool = False) -> dict[str, Tensor]:
    """The definition, one backward pass after the other, in float64."""
    model = copy.deepcopy(model).double().eval()
    names, parameters = zip(*model.named_parameters(), strict=True)
    totals = {name: torch.zeros_like(parameter) for name, parameter in zip(names, parameters, strict=True)}
    count = 0
    for start in range(0, len(x), size):
        inputs = x[start : start + size]
        logits = model(inputs.double() if inputs.is_floating_point() else inputs)
        loss = logits.square().sum(1).mean() if label_free else cross_entropy(logits, y[start : start + size])
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                totals[name] += gradient.abs() if label_free else gradient.square()
        count += 1
    return {name: total / count for name, total in totals.items()}


def assert_same(found: Fisher, expected: dict[str, Tensor], relative: float = 1e-6) -> None:
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max()
        assert (found.tensors[name].double() - tensor).abs().max() <= relative * scale + 1e-30, name


@pytest.mark.parametrize("label_free", [False, True])
@pytest.mark.parametrize("kind", ["residual", "plain", "words", "tied", "hidden", "mixing", "attending"])
def test_gradients_of_single_samples_are_those_of_the_loop(kind: str, label_free: bool) -> None:
    model, (x, y) = made(kind), data(kind)
    found = fisher(model, (x, y), kind="label-free" if label_free else "fisher")
    assert (found.samples, found.batches, found.estimator.order) == (SAMPLES, SAMPLES, "any")
    assert_same(found, by_loop(model, x, y, label_free=label_free), 2e-6)


@pytest.mark.parametrize(("kind", "at_once"), [("residual", True), ("words", True), ("plain", True), ("tied", False),
                                               ("hidden", False), ("mixing", False), ("attending", False)])  # fmt: skip
def test_only_what_is_the_same_runs_at_once(kind: str, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module: Any = sys.modules["lamella.measure.fisher"]
    alone: list[int] = []
    original = module._Sums.add
    monkeypatch.setattr(
        module._Sums, "add", lambda self, batch, first: (alone.append(first), original(self, batch, first))
    )
    fisher(made(kind), data(kind))
    assert (len(alone) <= 2) == at_once  # two are run both ways, to compare


@pytest.mark.parametrize("kind", ["residual", "tied"])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_square_the_mean_gradient(kind: str, batch: int) -> None:
    model, (x, y) = made(kind), data(kind)
    assert_same(fisher(model, (x, y), batch=batch), by_loop(model, x, y, batch), 2e-6)


def test_a_linear_softmax_model_has_the_closed_form() -> None:
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(6, 4), (torch.randn(40, 6), torch.randint(0, 4, (40,)))
    with torch.no_grad():
        error = softmax(model(x), 1) - torch.eye(4)[y]
    expected = (error[:, :, None] * x[:, None]).square().mean(0)
    found = fisher(model, (x, y))
    assert torch.allclose(found.tensors["weight"], expected, rtol=1e-5, atol=1e-9)
    assert torch.allclose(found.tensors["bias"], error.square().mean(0), rtol=1e-5, atol=1e-9)


def test_no_labels_are_needed_without_a_loss_of_labels() -> None:
    model, (x, y) = made("plain"), data("plain")
    with_labels, without = (fisher(model, each, kind="label-free") for each in ((x, y), x))
    assert all(torch.equal(with_labels.tensors[name], without.tensors[name]) for name in without.tensors)
    with pytest.raises(CalibrationError, match="needs labels"):
        fisher(model, x)


@pytest.mark.parametrize("size", [1, 5])
def test_a_loader_gives_what_its_tensors_give(size: int) -> None:
    model, (x, y) = made("residual"), data("residual")
    loader = DataLoader(TensorDataset(x, y), batch_size=9)
    streamed, whole = fisher(model, loader, batch=size), fisher(model, (x, y), batch=size)
    assert streamed.provenance == whole.provenance
    assert all(torch.equal(streamed.tensors[name], whole.tensors[name]) for name in whole.tensors)


def test_any_loss_that_is_a_mean_over_samples_will_do() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(20, 3), torch.randn(20)

    def squared_error(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0])[:, 0] - batch[1]).square().mean()

    found = fisher(model, (x, y), loss=squared_error)
    assert "squared_error" in found.estimator.loss
    parameters = list(model.parameters())
    grads = [torch.autograd.grad((model(a[None])[0, 0] - b).square(), parameters) for a, b in zip(x, y, strict=True)]
    for place, name in enumerate(found.tensors):
        expected = torch.stack([each[place].square() for each in grads]).mean(0)
        assert torch.allclose(found.tensors[name], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "opt"])
def test_sequences_of_a_decoder_are_samples_and_tied_weights_count_once(name: str) -> None:
    model = nano(name)
    rows = blocks(torch.randint(3, 128, (4, 9), generator=torch.Generator().manual_seed(0)), 3)
    found = fisher(model, rows)
    assert list(found.tensors) == list(weights(model)) == [n for n, _ in model.named_parameters()]
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    for row in rows:
        batch = collate([row])
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for n, g in zip(parameters, gradients, strict=True):
            expected[n] += 0 if g is None else g.square() / 4
    assert_same(found, expected, 1e-5)
    two = fisher(model, rows, batch=2)
    assert (two.samples, two.batches) == (4, 2)


def test_a_vision_transformer_of_transformers_is_measured_too() -> None:
    model, x, y = nano("vit"), torch.randn(5, 3, 16, 16), torch.tensor([0, 3, 9, 1, 1])
    found = fisher(model, (x, y))
    for name in ("vit.embeddings.cls_token", "classifier.weight"):
        grads = [torch.autograd.grad(cross_entropy(model(a[None]).logits, b[None]), model.get_parameter(name))[0]
                 for a, b in zip(x, y, strict=True)]  # fmt: skip
        assert torch.allclose(found.tensors[name], torch.stack(grads).square().mean(0), rtol=1e-4, atol=1e-9)


def test_half_precision_is_summed_in_single() -> None:
    model, (x, y) = made("plain").bfloat16(), data("plain")
    found = fisher(model, (x.bfloat16(), y))
    assert all(tensor.dtype == torch.float32 for tensor in found.tensors.values())


@pytest.mark.parametrize("kind", ["residual", "tied", "attending"])
def test_measuring_leaves_the_model_as_it_was(kind: str) -> None:
    model, (x, y) = made(kind).train(), data(kind)
    model.requires_grad_(False)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    found = fisher(model, (x, y))
    assert model.training and not any(each.requires_grad for each in model.parameters())
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1])
    assert all(each.grad is None for each in model.parameters())
    assert not any(each._forward_hooks for each in model.modules())
    assert_same(found, by_loop(made(kind), x, y), 2e-6)  # in eval mode


def test_some_parameters_are_measured_alone() -> None:
    model, some = made("residual"), ["down.weight", "norm.bias"]
    whole, few = fisher(model, data("residual")), fisher(model, data("residual"), names=some)
    assert list(few.tensors) == some
    assert all(torch.allclose(few.tensors[name], whole.tensors[name], rtol=1e-5) for name in some)
    with pytest.raises(MethodError, match=r"no parameter 'nothing'; a name is like 'stem\.weight'"):
        fisher(model, data("residual"), names=["nothing"])


# Keeping and joining


@pytest.mark.parametrize("batch", [1, 10])
def test_the_importance_of_all_data_is_the_mean_of_its_parts(batch: int) -> None:
    model, (x, y) = made("plain"), data("plain")
    first, second = (fisher(model, (x[part], y[part]), batch=batch) for part in (slice(0, 30), slice(30, None)))
    both, whole = first.joined(second), fisher(model, (x, y), batch=batch)
    assert (both.samples, both.batches) == (whole.samples, whole.batches)
    for name, tensor in whole.tensors.items():
        assert torch.allclose(both.tensors[name], tensor, rtol=1e-5, atol=1e-12)


def test_a_file_says_how_it_was_made_and_gives_the_same_again(tmp_path: Path) -> None:
    found = fisher(made("plain"), data("plain"), batch=8, order="by class")
    found.save(tmp_path / "new" / "f.safetensors")
    again = Fisher.read(tmp_path / "new" / "f.safetensors")
    assert again.provenance == found.provenance and again.estimator == found.estimator
    assert (again.estimator.batch, again.estimator.order, again.samples, again.batches) == (8, "by class", SAMPLES, 9)
    assert {*again.tensors} == {*found.tensors} and len(again.tensors) == 4
    assert all(torch.equal(again.tensors[name], found.tensors[name]) for name in found.tensors)


@pytest.mark.parametrize(
    "other",
    [{"batch": 8}, {"kind": "label-free"}, {"batch": 8, "order": "shuffled"}, {"batch": 8, "order": "by class"}],
)
def test_different_estimators_refuse_to_be_compared(other: dict[str, Any]) -> None:
    model, given = made("plain"), data("plain")
    ours, theirs = fisher(model, given), fisher(model, given, **other)
    for call in (ours.check_comparable, ours.joined):
        with pytest.raises(MethodError, match="different estimators") as error:
            call(theirs)
        assert "\n" not in str(error.value)
    orders = [fisher(model, given, batch=8, order=order) for order in ("given", "shuffled")]
    with pytest.raises(MethodError, match="different estimators"):
        orders[0].check_comparable(orders[1])


@pytest.mark.parametrize("content", ["nothing", "text", "tensors"])
def test_what_is_no_file_of_importances_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    if content == "text":
        file.write_text("hello")
    elif content == "tensors":
        save_file({"a": torch.ones(2)}, file)
    with pytest.raises(MethodError, match="is not a file of importances") as error:
        Fisher.read(file)
    assert "\n" not in str(error.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(MethodError, match="cannot be written there"):
        fisher(made("plain"), data("plain", 3)).save(tmp_path / "file" / "f.safetensors")


# Batches


def test_batches_have_the_requested_order() -> None:
    x, y = torch.arange(12.0), torch.tensor([2, 0, 1] * 4)
    pure = [labels.tolist() for _, labels in batches((x, y), 4, "by class")]  # type: ignore[union-attr, misc]
    assert pure == [[0] * 4, [1] * 4, [2] * 4]
    shuffled = torch.cat([inputs for inputs, _ in batches((x, y), 5, "shuffled", 3)])  # type: ignore[misc, arg-type]
    assert shuffled.tolist() != x.tolist() and sorted(shuffled.tolist()) == x.tolist()
    assert [len(inputs) for inputs, _ in batches((x, y), 5)] == [5, 5, 2]  # type: ignore[misc, arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x, y: fisher(m, (x[:0], y[:0])), CalibrationError, "there are no samples"),
        (lambda m, x, y: fisher(m, []), CalibrationError, "there are no samples"),
        (lambda m, x, y: fisher(m, (x, y[:5])), CalibrationError, "70 inputs have 5 labels"),
        (lambda m, x, y: fisher(m, (x, torch.where(y == y[66], 5, y))), CalibrationError, "label 5 of sample"),
        (lambda m, x, y: fisher(m, (x, y - 1)), CalibrationError, "label -1 of sample .* the outputs 0 to 4"),
        (lambda m, x, y: fisher(m, (x.index_fill(0, torch.tensor(67), torch.nan), y)), NumericsError, "sample 67 has"),
        (lambda m, x, y: fisher(m, (x * 1e38, y)), NumericsError, "the loss is|not finite"),
        (lambda m, x, y: fisher(m, (x, y), batch=0), MethodError, "batch 0"),
        (lambda m, x, y: fisher(m, (x, y), batch=4, order="sideways"), MethodError, "order 'sideways'"),
        (lambda m, x, y: fisher(m, (x, y), kind="odd"), MethodError, "kind 'odd'"),
        (lambda m, x, y: fisher(m, x, kind="label-free", batch=4, order="by class"), MethodError, "one label each"),
        (lambda m, x, y: fisher(m, [(x, y)], batch=4, order="shuffled"), MethodError, "instead of a loader"),
        (lambda m, x, y: check_disjoint((x[:5], y[:5]), (x[3:], y[3:])), CalibrationError, "2 samples are to be"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_in_one_line(call: Any, error: type[LamellaError], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        call(made("plain"), *data("plain"))
    assert "\n" not in str(raised.value)


def test_sequences_that_differ_in_their_labels_alone_are_different_samples() -> None:
    ids = torch.arange(6)
    kept, other = ({"input_ids": ids, "labels": labels} for labels in (ids, ids.flip(0)))
    check_disjoint([kept], [other])
    with pytest.raises(CalibrationError, match="1 samples are to be forgotten and retained"):
        check_disjoint([kept], [other, kept])


def test_importances_of_what_nothing_depends_on_vanish() -> None:
    model = made("words")
    model.spare = nn.Linear(2, 2)
    with pytest.raises(NumericsError, match="all importances are zero"):
        fisher(model, data("words"), names=["spare.weight"])


def test_importances_that_vanish_are_refused() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([1e4, -1e4]))
    with pytest.raises(NumericsError, match="all importances are zero"):
        fisher(model, (torch.randn(8, 3), torch.zeros(8, dtype=torch.long)))


def test_tokens_and_labels_beyond_the_vocabulary_are_refused() -> None:
    model = nano("llama")
    for ids, message in (([5, 128, 3], "up to 128"), ([5], "has 1 tokens")):
        row = {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}
        with pytest.raises(CalibrationError, match=message):
            fisher(model, [row])
    silent = {"input_ids": torch.tensor([4, 5]), "labels": torch.tensor([4, -100])}
    with pytest.raises(CalibrationError, match="no token with a label"):
        fisher(model, [silent])


# Percentiles


@pytest.mark.parametrize("percent", [0.0, 12.5, 50.0, 99.307, 100.0])
@pytest.mark.parametrize("kind", ["spread", "few values", "one"])
def test_a_streamed_percentile_is_that_of_sorting(kind: str, percent: float) -> None:
    import numpy as np

    generator = torch.Generator().manual_seed(0)
    numbers = {
        "spread": torch.exp(8 * torch.randn(5001, generator=generator)),
        "few values": torch.randint(0, 3, (997,), generator=generator).float(),
        "one": torch.tensor([3.5]),
    }[kind]
    parts = numbers.split(400)
    expected = np.percentile(numbers.double().numpy(), percent)
    assert percentile(lambda: iter(parts), percent) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="no values"):
        percentile(lambda: iter([]), percent)


@pytest.mark.parametrize("sequences", [True, False])
def test_progress_has_a_total_and_counts_single_sequences(sequences: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    totals: list[int | None] = []

    @contextmanager
    def tracker(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        totals.append(total)
        yield steps.append

    monkeypatch.setattr(sys.modules[fisher.__module__], "tracker", tracker)
    if sequences:
        fisher(nano("llama"), blocks(torch.randint(3, 128, (5, 8)), loss_on="all"))
        assert (totals, steps) == ([5], [1] * 5)
    else:
        fisher(nn.Linear(4, 3), (torch.randn(70, 4), torch.randint(3, (70,))))
        assert (totals, steps) == ([70], [64, 6])
