"""Mixtures: shares of tokens, whole items, and a limit on epochs."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamella.data import Blend, Mixture, Pick, mix
from lamella.errors import MethodError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def seen(mixture: Mixture, picks: list[Pick]) -> dict[str, int]:
    return {name: sum(mixture.sizes[name][n] for source, n in picks if source == name) for name in mixture.sizes}


@given(real=SIZES, rephrased=SIZES, share=st.floats(0.1, 0.9), epochs=st.floats(0.5, 5), seed=st.integers(0, 9))
def test_shares_are_kept_at_every_moment_and_no_source_is_seen_too_often(
    real: list[int], rephrased: list[int], share: float, epochs: float, seed: int
) -> None:
    mixture = Mixture({"real": real, "rephrased": rephrased}, {"real": share, "rephrased": 1 - share}, epochs, seed)
    picks = mixture.picks(mixture.once())
    largest = max(*real, *rephrased)
    count = {"real": 0, "rephrased": 0}
    for source, number in picks:
        count[source] += mixture.sizes[source][number]
        total = sum(count.values())
        assert abs(count["real"] - share * total) <= largest
    for name, tokens in seen(mixture, picks).items():
        assert tokens <= epochs * sum(mixture.sizes[name])
    assert sum(count.values()) >= mixture.once() - 2 * largest / min(share, 1 - share)


def test_half_and_half_of_many_documents_is_half_to_half_a_percent() -> None:
    drawn = random.Random(0)
    sizes = {
        "real": [drawn.randrange(20, 900) for _ in range(400)],
        "rephrased": [drawn.randrange(20, 300) for _ in range(400)],
    }
    mixture = Mixture(sizes, {"real": 0.5, "rephrased": 0.5})
    told = mixture.account(mixture.picks(mixture.once()))
    assert abs(told["real"]["share"] - 0.5) < 0.005
    assert told["real"]["epochs"] == pytest.approx(1, abs=0.01) and 1 < told["rephrased"]["epochs"] <= 4


def test_each_pass_over_a_source_sees_every_item_once_before_any_again() -> None:
    mixture = Mixture({"a": [10] * 7, "b": [10] * 21}, {"a": 0.5, "b": 0.5}, epochs=3)
    numbers = [n for source, n in mixture.picks(mixture.most()) if source == "a"]
    assert len(numbers) == 21
    assert all(sorted(numbers[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert numbers[:7] != numbers[7:14]


def test_real_text_alone_is_real_text_as_it_is() -> None:
    rows = [{"id": str(n), "text": "x" * n} for n in range(1, 9)]
    shares = {"real": 1.0, "other": 0.0}
    told, said = mix({"real": rows, "other": rows}, shares, lambda row: len(row["text"]), epochs=4, tokens=None, seed=3)
    assert [each["id"] for each in told] == [row["id"] for row in rows]
    assert said["sources"]["real"] == {
        "share": 1.0,
        "target": 1.0,
        "tokens": 36,
        "unique": 36,
        "epochs": 1.0,
        "items": 8,
    }
    assert said["sources"]["other"]["tokens"] == 0


def test_the_same_seed_gives_the_same_order_and_another_seed_another_one() -> None:
    sizes = {"a": [3] * 20, "b": [5] * 20}
    first, again, other = (Mixture(sizes, {"a": 0.5, "b": 0.5}, seed=seed).picks(100) for seed in (0, 0, 1))
    assert first == again != other and Counter(s for s, _ in first) == Counter(s for s, _ in other)


def test_epochs_of_the_paper_add_up() -> None:
    """28.8B tokens seen: raw alone 4 epochs of 7.2B; with as much rewritten text 2 of each (here in millions)."""
    raw, rewritten = [100] * 72, [100] * 72
    assert (
        Mixture({"raw": raw}, {"raw": 1.0}).account(Mixture({"raw": raw}, {"raw": 1.0}).picks(28_800))["raw"]["epochs"]
        == 4
    )
    both = Mixture({"raw": raw, "syn": rewritten}, {"raw": 0.5, "syn": 0.5})
    assert {each["epochs"] for each in both.account(both.picks(28_800)).values()} == {2}


@pytest.mark.parametrize(
    ("shares", "tokens", "said"),
    [
        ({"a": 0.5, "b": 0.4}, 10, "add up to 0.9"),
        ({"a": 0.5}, 10, "give each source a share"),
        ({"a": 1.5, "b": -0.5}, 10, "at least 0"),
        ({"a": 0.5, "b": 0.5}, 81, "above 4: ask for 80"),
        ({"a": 0.0, "b": 1.0}, None, "no tokens"),
    ],
)
def test_what_cannot_be_mixed_is_refused_in_one_line(shares: dict[str, float], tokens: int | None, said: str) -> None:
    with pytest.raises(MethodError, match=said) as error:
        mixture = Mixture({"a": [5, 5], "b": [] if tokens is None else [10]}, shares)
        mixture.picks(tokens or 1)
    assert "\n" not in str(error.value)


class Words:
    """A writer as far as it counts: a token for each word."""

    @staticmethod
    def tokenizer(text: str, **_: bool) -> dict[str, list[str]]:
        return {"input_ids": text.split()}


def rows(name: str, count: int, words: int) -> list[dict[str, str]]:
    return [{"id": f"{name}{n}", "text": " ".join([name] * words)} for n in range(count)]


def test_what_is_written_shares_its_part_evenly_and_a_source_without_rows_is_left_out() -> None:
    sources = {"real": rows("real", 40, 10), "a": rows("a", 60, 4), "b": rows("b", 60, 4), "c": []}
    train, said = Blend(synthetic=0.6, tokens=400).mix(sources, Words(), 0)  # type: ignore[arg-type]
    told = said["sources"]
    assert set(told) == {"real", "a", "b"} and {row["source"] for row in train} == set(told)
    for name, share in (("real", 0.4), ("a", 0.3), ("b", 0.3)):
        assert told[name]["share"] == pytest.approx(share, abs=10 / 400)
    train, said = Blend().mix({"real": sources["real"], "c": []}, Words(), 0)  # type: ignore[arg-type]
    assert [row["id"] for row in train] == [row["id"] for row in sources["real"]]
