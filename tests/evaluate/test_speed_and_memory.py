"""Speed is a ratio of interleaved rounds with its spread; memory is measured in a separate process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lamella.errors import CheckpointError
from lamella.evaluate import Ratio, bench, measure_step, memory, peak_memory
from lamella.evaluate import speed as module
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.provenance import environment
from lamella.results import Record
from lamella.results.record import VERDICTS
from lamella.runtime import apply
from lamella.stack import Stack, open_model, share
from lamella.zoo import prefer
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parent.parent / "models" / "nano-llama"


def test_a_ratio_is_a_median_with_quartiles() -> None:
    ratio = Ratio.of([1.0, 2.0, 3.0, 4.0, 10.0])
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 3.0, 4.0)
    assert Ratio.of([1.5]) == Ratio(1.5, 1.5, 1.5)
    assert str(Ratio(1.234, 1.2, 1.3)) == "1.23 (1.20-1.30)"


def test_bench_divides_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    seconds = {
        "a": [(9.0, 9.0), (4.0, 2.0), (6.0, 3.0), (8.0, 4.0)],
        "b": [(9.0, 9.0), (2.0, 1.0), (2.0, 1.0), (2.0, 1.0)],
    }

    def one_round(models: dict[str, str], batch: int, *_: int) -> dict[str, tuple[float, float]]:
        calls.append(batch)
        return {model: seconds[model][(len(calls) - 1) % 4] for model in models}

    monkeypatch.setattr(module, "_one_round", one_round)
    found = bench({"a": "a", "b": "b"}, batches=(1, 8), rounds=3)
    assert calls == [1] * 4 + [8] * 4
    timing = found["b"][0]
    assert timing.decode == (1.0, 1.0, 1.0) and timing.variation == 0.0  # the warm-up round is excluded
    assert timing.prefill_speedup == Ratio(3.0, 2.5, 3.5) and timing.decode_speedup == Ratio(3.0, 2.5, 3.5)
    assert found["a"][0].decode_speedup == Ratio(1.0, 1.0, 1.0)
    assert found["a"][0].variation == pytest.approx(math.sqrt(2 / 3) / 3)
    assert [timing.batch for timing in found["b"]] == [1, 8]


@pytest.mark.parametrize(
    ("noise", "elapsed", "rounds"),
    [
        (0.0, 0.0, 3),  # quartiles that coincide
        (0.5, 0.0, 9),  # a wide interval, and time left
        (0.5, 10.0, 2),  # a wide interval, and no time left
        (0.0, 100.0, 2),
    ],
)
def test_bench_stops_when_its_interval_is_narrow_or_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch, noise: float, elapsed: float, rounds: int
) -> None:
    """``elapsed``: seconds that a round takes, of 20."""
    now = [0.0]

    def one_round(models: dict[str, str], *_: int) -> dict[str, tuple[float, float]]:
        now[0] += elapsed
        return {"a": (1.0, 1.0), "b": (1.0, 0.5 + noise * (len(seen) % 3)) if not seen.append(1) else (0.0, 0.0)}

    seen: list[int] = []
    monkeypatch.setattr(module, "_one_round", one_round)
    monkeypatch.setattr(module, "now", lambda: now[0])
    found = bench({"a": "a", "b": "b"}, rounds=9, seconds=20.0)
    assert len(found["b"][0].decode) == rounds == len(seen) - 1  # and a round that warms up


def test_bench_lets_the_models_take_each_step_in_turn() -> None:
    stack = Stack(nano("llama"))
    order: list[str] = []
    models = {"a": share(stack.model), "b": share(stack.model)}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    bench(models, prompt=8, tokens=3, rounds=2)
    assert order == ["a", "b"] * (1 + 3) * (2 + 1)


def test_bench_times_static_and_phased_views() -> None:
    stack = Stack(nano("llama"))
    reference = ModelReference.of(stack)
    path = {"text": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 3])}
    models = {
        "base": stack.model,
        "static": apply(stack, Plan(model=reference, drop=["layers.0.attn", "layers.1"])),
        "phased": apply(stack, Plan(model=reference, path=path)),
    }
    found = bench(models, batches=(1, 2), prompt=8, tokens=3, rounds=2)
    assert list(found) == list(models)
    for timings in found.values():
        assert [timing.batch for timing in timings] == [1, 2]
        for timing in timings:
            assert len(timing.prefill) == len(timing.decode) == 2
            assert min(*timing.prefill, *timing.decode, timing.decode_speedup.low, timing.prefill_speedup.low) > 0
            assert timing.decode_speedup.low <= timing.decode_speedup.median <= timing.decode_speedup.high
            assert json.loads(json.dumps(timing.as_dict()))["batch"] == timing.batch
    assert found["base"][0].decode_speedup == Ratio(1.0, 1.0, 1.0)


def test_bench_times_denoising_steps_of_models_that_predict_masked_tokens() -> None:
    stack = Stack(nano("llada"))
    thin = apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.1", "layers.2"]))
    seen: list[tuple[int, int]] = []
    stack.model.register_forward_pre_hook(
        lambda _, args, given: seen.append((given["input_ids"].shape[1], int((given["input_ids"] == 127).sum()))),
        with_kwargs=True,
    )
    found = bench({"whole": stack.model, "thin": thin}, batches=(1,), prompt=8, tokens=3, rounds=2)
    assert all(columns == 11 and masks >= 3 for columns, masks in seen)
    assert len(seen) == 3 * (1 + 3) and found["thin"][0].decode_speedup.median > 0
    times = measure_step(stack, prompt=8, steps=3)
    assert times.attn > 0 and times.mlp > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["bart", "ofa"])  # OFA's decoder reads more than the final states
def test_bench_encodes_a_prompt_once_and_decodes_word_by_word(name: str) -> None:
    model = nano(name)
    path = {"decoder": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 3])}
    view = apply(open_model(model), Plan(model=ModelReference.of(open_model(model)), path=path))
    read: list[int] = []
    written: list[int] = []
    for each in (model, view):
        each.model.encoder.register_forward_pre_hook(
            lambda _, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        each.model.decoder.register_forward_pre_hook(
            lambda _, args, given: written.append(given["input_ids"].shape[1]), with_kwargs=True
        )
    found = bench({"whole": model, "phased": view}, batches=(2,), prompt=8, tokens=3, rounds=2)
    assert read == [8] * 2 * 3 and written == [1] * 2 * 3 * (1 + 3)
    assert found["phased"][0].decode_speedup.median > 0


@pytest.mark.slow
def test_peak_memory_is_of_the_requested_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    child = memory._CHILD.replace("print(json", "assert model.dtype == torch.bfloat16; print(json")
    monkeypatch.setattr(memory, "_CHILD", child)
    with pytest.raises(CheckpointError, match="AssertionError"):
        peak_memory(NANO_LLAMA, prompt=8, tokens=2)
    prefer("bfloat16")
    try:
        assert peak_memory(NANO_LLAMA, prompt=8, tokens=2).peak > 0
    finally:
        prefer()


@pytest.mark.slow
def test_peak_memory_counts_at_least_the_weights() -> None:
    found = peak_memory(NANO_LLAMA, prompt=8, tokens=2)
    assert 0 < found.peak < 2**30 < 2**40
    assert found.libraries > 2**20
    assert set(found.as_dict()) == {"peak_bytes", "libraries_bytes"}


@pytest.mark.slow
def test_a_folder_that_cannot_be_loaded_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="could not be loaded to measure its memory") as error:
        peak_memory(tmp_path)
    assert "\n" not in str(error.value)


def test_the_environment_records_the_origin_of_measurements() -> None:
    found = environment()
    assert set(found) == {"machine", "threads", "versions", "date"}
    assert "\n" not in found["machine"] and "cores" in found["machine"]
    assert {"python", "torch", "transformers", "lamella"} <= set(found["versions"])


@pytest.mark.parametrize(("verdicts", "code"), [([True, True], 0), ([True, False], 1), ([True, None], 1), ([], 1)])
def test_a_record_without_kinds_fails_unless_every_check_holds(
    verdicts: list[bool | None], code: int, tmp_path: Path
) -> None:
    record = Record("x", data="text", seed=3)
    record.table("numbers", ["name", "value"], [["a", 1.23456789], ["b", 2]])
    for index, verdict in enumerate(verdicts):
        record.check(f"claim {index}", "<= 1", 0.5, verdict)
    assert record.finish(tmp_path / "results" / "x.json") == code
    document = json.loads((tmp_path / "results" / "x.json").read_text())
    assert document["verdict"] == VERDICTS[None if None in verdicts else code == 0]
    assert document["tables"][0]["rows"] == [["a", 1.235], ["b", 2]]
    assert [check["passed"] for check in document["checks"]] == verdicts
    assert document["seed"] == 3 and document["data"] == "text" and document["machine"]


@pytest.mark.parametrize(
    ("exact", "main", "further", "claim", "code"),
    [
        ([True], [True], [True, None], True, 0),
        ([True], [True, True], [], True, 0),
        ([True], [True], [False], True, 1),
        ([False], [True], [], True, 1),
        ([True], [True, None], [True], None, 1),
        ([True], [None, False], [True], False, 1),
    ],
)
def test_the_main_claim_decides_and_nothing_may_fail(
    exact: list[bool],
    main: list[bool | None],
    further: list[bool | None],
    claim: bool | None,
    code: int,
    tmp_path: Path,
) -> None:
    record = Record("x", data="text", seed=0)
    for add, verdicts in ((record.exact, exact), (record.main, main), (record.further, further)):
        for verdict in verdicts:
            add("claim", "<= 1", 0.5, verdict)
    assert record.finish(tmp_path / "x.json") == code
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["verdict"] == VERDICTS[claim]
    kinds = ["exactness"] * len(exact) + ["main"] * len(main) + ["further"] * len(further)
    assert [(each["kind"], each["passed"]) for each in document["checks"]] == list(
        zip(kinds, [*exact, *main, *further], strict=True)
    )
