"""Methods that adapt, under ``accelerate launch``: two processes share each step, and one of them speaks and writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lamella.methods.cstrl import Summaries
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
TEXT = ("--sequences", "8", "--length", "48", "--steps", "3")
GIVEN = {
    "lora": ("--train", "pydoc"),
    "switchlora": ("--train", "pydoc"),
    "kore": ("--train", "pydoc", "--old", "stdlib", "--r", "8"),
    "smora": ("--train", "pydoc", "--r", "8", "--k", "2"),
}
LEARNT = ("--gap-epochs", "1", "--gap-length", "48", "--source-length", "48", "--summary-length", "16",
          "--test-samples", "1", "--normalize", "mean", "--steps", "3")  # fmt: skip

DIGEST = re.compile("-[0-9a-f]{12}")  # of what is in a file, in its name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{DIGEST.sub('', str(file.relative_to(folder)))}: {name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("slug", "shard"),
    [(slug, shard) for slug in GIVEN for shard in ((), ("--shard",))],
)
def test_two_processes_train_what_one_does(
    slug: str, shard: tuple[str, ...], lamella: Any, in_two_processes: Callable[..., Any], tmp_path: Path
) -> None:
    given = ("run", slug, NANO_LLAMA, *GIVEN[slug], *TEXT)
    assert lamella(*given, "--batch", "4", "-o", tmp_path / "one").code == 0
    ran = in_two_processes("-m", "lamella.cli", *given, *shard, "--batch", "2", "-o", tmp_path / "two")
    assert ran.returncode == 0, ran.stderr
    same(tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("shard", [(), ("--shard",)])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_two_processes_learn_to_summarise_as_one_does_and_keep_one_file_of_importances(
    kind: str, shard: tuple[str, ...], lamella: Any, in_two_processes: Callable[..., Any], tmp_path: Path
) -> None:
    model = NANO_LLAMA if kind == "llama" else t5(tmp_path / "t5")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(Summaries.example.content)
    for folder, size in (("one", "4"), ("two", "2")):
        given = ("run", "cstrl", model, "--pairs", pairs, *LEARNT, "--gap-batch", size, "--batch", size,
                 "-o", tmp_path / folder, "--save-fisher", tmp_path / f"{folder}.safetensors")  # fmt: skip
        ran = lamella(*given) if folder == "one" else in_two_processes("-m", "lamella.cli", *given, *shard)
        assert (ran.code if folder == "one" else ran.returncode) == 0, ran
    same(tmp_path, atol=1e-3)  # AdamW divides gradients that are nearly 0 by their own size, in two runs
    files = [load_file(tmp_path / f"{folder}.safetensors") for folder in ("one", "two")]
    assert all(torch.allclose(files[1][name], each, atol=1e-6) for name, each in files[0].items())


def t5(folder: Path) -> Path:
    """A small encoder-decoder without dropout, with the tokenizer of the decoder."""
    tokenizer = AutoTokenizer.from_pretrained(NANO_LLAMA)
    tokenizer.save_pretrained(folder)
    nano("t5", vocab_size=len(tokenizer), dropout_rate=0.0).save_pretrained(folder)
    return folder


def same(tmp_path: Path, atol: float = 1e-4) -> None:
    """Whether what two have written is what one has."""
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one and one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=atol, rtol=0, msg=lambda said, name=name: f"{name}: {said}")
        assert (two[name] - tensor).double().abs().mean() < 1e-5, name
