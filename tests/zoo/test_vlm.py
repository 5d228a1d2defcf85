"""Small vision-language models: opened from a folder with their stacks, tokenizer and processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lamella
from lamella.data import ImageText, ImageTextRow, InputContext, Processing
from lamella.errors import ArchitectureError, LamellaError
from lamella.evaluate.scored import scored_states
from lamella.stack import last_stack
from lamella.zoo import open_processor, open_tokenizer
from lamella.zoo.vlm import SHAPES_SEQ2SEQ, SHAPES_VLM, shapes_vlm

TABLES = ("position_embedding.weight", "pos_embed.weight")
STACKS = {"llava": ["vision", "text"], "qwen2_vl": ["vision", "text"], "qwen3_vl_moe": ["text"], "idefics3": ["text"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in SHAPES_VLM:
        found[kind] = tmp_path_factory.mktemp("models") / kind
        for part in shapes_vlm(kind, num_hidden_layers=2):
            part.save_pretrained(found[kind])
    return found


@pytest.mark.parametrize("kind", SHAPES_VLM)
@torch.no_grad()
def test_a_folder_gives_model_tokenizer_and_processor(kind: str, folders: dict[str, Path]) -> None:
    original, processor = shapes_vlm(kind, num_hidden_layers=2)
    opened = lamella.open(folders[kind])
    assert list(opened.stacks) == STACKS[kind]
    again = open_processor(folders[kind])
    assert type(again) is type(processor)
    assert open_tokenizer(folders[kind]).get_vocab() == processor.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    rows = ImageText.open("shapes", reader_of(Processing(again)), rows=4)
    batch, ours = rows.batch(rows), Processing(processor).batch(rows)
    assert set(batch) == set(ours) and all(torch.equal(batch[name], ours[name]) for name in batch)
    inputs = {name: each for name, each in batch.items() if name not in ("labels", "prompt_lengths")}
    assert torch.equal(opened.model(**inputs).logits, original(**inputs).logits)


@pytest.mark.parametrize("kind", SHAPES_SEQ2SEQ)
@torch.no_grad()
def test_an_encoder_decoder_opens_from_its_folder_and_is_scored_as_its_own_forward(kind: str, tmp_path: Path) -> None:
    original, processor = shapes_vlm(kind)
    for part in (original, processor):
        part.save_pretrained(tmp_path / kind)
    opened = lamella.open(tmp_path / kind)
    assert list(opened.stacks) == ["encoder", "decoder"] and not list((tmp_path / kind).glob("*.py"))
    again = open_processor(tmp_path / kind)
    assert type(again) is type(processor)
    processing = Processing(again, encodes=True)
    rows = ImageText.open("shapes:entailment+caption", reader_of(processing), rows=4)
    if not processing.inserts_images:  # which puts an image into every row
        rows = ImageText(
            [*rows, ImageTextRow((), tuple({**m, "content": "red"} for m in rows[0].messages))], processing
        )
    batch, ours = rows.batch(rows), Processing(processor, encodes=True).batch(rows)
    assert set(batch) == set(ours) and all(torch.equal(batch[name], ours[name]) for name in batch)
    inputs = {name: each for name, each in batch.items() if name != "prompt_lengths"}
    theirs = original(**inputs)
    states, labels = scored_states(opened.model, batch)
    carries = batch["labels"] != -100
    torch.testing.assert_close(last_stack(opened.model).logits(states), theirs.logits[carries])
    assert torch.equal(labels, batch["labels"][carries])
    read = {name: each for name, each in inputs.items() if name != "labels"}
    images = opened.stacks["encoder"].context(read).modalities["image"]
    assert torch.equal(images, rows.kinds(batch)["image"]) and images.any()
    prompts = {name: each for name, each in rows.prompts(rows).items()}
    assert opened.model.generate(**prompts, max_new_tokens=3, do_sample=False, num_beams=2).shape[0] == len(rows)


def reader_of(processing: Processing) -> InputContext:
    return InputContext(lambda: processing.tokenizer, 0, "calibration", lambda: processing)


@pytest.mark.parametrize("kind", SHAPES_VLM)
@torch.no_grad()
def test_a_context_tells_image_and_text_apart_as_the_data_do(kind: str) -> None:
    model, processor = shapes_vlm(kind, num_hidden_layers=2)
    processing = Processing(processor)
    rows = ImageText.open("shapes", reader_of(processing), rows=3)
    batch = rows.batch(rows)
    inputs = {name: each for name, each in batch.items() if name not in ("labels", "prompt_lengths")}
    places, stack = rows.kinds(batch), last_stack(model)
    context = stack.context(inputs)
    assert torch.equal(context.modalities["image"], places["image"]) and places["image"].any()
    assert torch.equal(context.modalities["text"], places["prompt"] | places["answer"])
    logits = stack.head(stack.run(context.h, 0, len(stack), context))
    real = batch["attention_mask"].bool()
    assert torch.equal(logits[real], model(**inputs, use_cache=False).logits[real])
    assert torch.equal(stack.logits(stack.hidden(inputs))[real], logits[real])


@pytest.mark.parametrize(
    ("kind", "millions"), [("llava", 2.5), ("qwen3_vl_moe", 6), ("patch_bart", 3), ("patch_t5", 3)]
)
def test_they_have_about_as_many_weights_as_they_should(kind: str, millions: float) -> None:
    model, _ = shapes_vlm(kind)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.2)


def test_larger_images_have_more_positions() -> None:
    for kind in ("llava", "qwen3_vl_moe"):
        _, processor = shapes_vlm(kind, size=64, num_hidden_layers=2)
        rows = ImageText.open("shapes", reader_of(Processing(processor)), rows=2, pixels=64)
        assert int(rows.kinds(rows.batch(rows))["image"].sum()) == 2 * 256


def test_experts_are_known_with_their_number() -> None:
    model, _ = shapes_vlm("qwen3_vl_moe", num_hidden_layers=2)
    experts = last_stack(model).experts
    assert experts is not None and experts.counts(model.config.get_text_config()) == (8, 4)


def test_the_seed_fixes_the_weights_and_another_kind_is_refused() -> None:
    weights = [shapes_vlm("llava", seed, num_hidden_layers=2)[0].state_dict() for seed in (1, 1, 2)]
    first, same, other = (each["model.language_model.layers.0.self_attn.q_proj.weight"] for each in weights)
    assert torch.equal(first, same) and not torch.equal(first, other)
    with pytest.raises(ArchitectureError, match="no small 'bert' for shapes; there are: llava"):
        shapes_vlm("bert")


def test_a_processor_that_asks_for_code_of_its_folder_is_refused(folders: dict[str, Path], tmp_path: Any) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(folders["llava"], tmp_path / "model"))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Mine: pass\n")
    for file in ("processor_config.json", "tokenizer_config.json"):
        document = json.loads((folder / file).read_text())
        document |= {"processor_class": "Mine", "auto_map": {"AutoProcessor": "mine.Mine"}}
        (folder / file).write_text(json.dumps(document))
    with pytest.raises(LamellaError) as error:
        open_processor(folder)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_a_model_of_text_has_its_tokenizer_for_a_processor() -> None:
    folder = Path(__file__).parents[1] / "models" / "nano-llama"
    assert open_processor(folder).get_vocab() == open_tokenizer(folder).get_vocab()


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl_moe", "idefics3"])
def test_patches_of_a_row_or_a_column_begin_with_half_of_their_place_in_common(kind: str) -> None:
    model, _ = shapes_vlm(kind)
    table = next(each for name, each in model.named_parameters() if name.endswith(TABLES))
    grid = table[-64:].view(8, 8, -1)
    rows, columns = grid.chunk(2, dim=2)
    assert torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(columns, columns[:1].expand_as(columns))
    assert len(grid.flatten(0, 1).unique(dim=0)) == 64


def test_patches_without_a_tower_begin_at_the_same_places() -> None:
    front = shapes_vlm("patch_mbart")[0].model.front
    table = next(each for name, each in shapes_vlm("llava")[0].named_parameters() if name.endswith(TABLES))
    assert torch.equal((front.row.weight[:, None] + front.column.weight).flatten(0, 1), table[-64:])
