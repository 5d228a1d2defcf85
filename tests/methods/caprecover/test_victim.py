"""Split models: where they can be cut, what leaves the device, and what a defence changes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from lamella.data import Captioned, CaptionedImages, InputContext
from lamella.errors import ArchitectureError, CheckpointError, MethodError
from lamella.methods.caprecover import FourStages, LinkDefence, Victim, measure_defences, of_timm, scales
from lamella.methods.caprecover.digits import CUTS, prepare
from lamella.stack import Stack, open_model
from lamella.zoo import nano

NAMES = ("digits", "timm resnet", "timm vit", "vit", "llava")


@cache
def victim(name: str) -> Victim:
    """A model of random weights; nobody changes it."""
    torch.manual_seed(0)
    if name == "digits":
        model = FourStages()
        for each in model.modules():
            if isinstance(each, torch.nn.BatchNorm2d):
                each.running_mean.uniform_(-0.1, 0.1)
                each.running_var.uniform_(0.5, 2)
        return Victim(model.eval(), CUTS, prepare, name)
    if name == "vit":
        return Victim.of(Stack(nano("vit")))
    if name == "llava":
        return Victim.of(open_model(nano("llava")))
    if name == "timm vit":
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
        return of_timm(timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, **sizes), name)
    return of_timm(timm.create_model("resnet10t", pretrained=False, num_classes=10), name)


@cache
def images() -> CaptionedImages:
    return CaptionedImages.open("digits", InputContext(), count=6)


@cache
def read(name: str) -> Tensor:
    return victim(name).prepare(images().items)


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_behind_a_cut_reads_what_is_sent_and_nothing_else(name: str) -> None:
    """With the features of one batch behind the front of another, the output is that of the first."""
    split, x = victim(name), read(name)
    split.check_cuts(x, split.select_cuts(()))
    expected = split.output(x)
    for cut in split.cuts:
        features = split.features(x, [cut])[cut]
        found = split.output_through(torch.zeros_like(x), [cut], lambda _, values, f=features: f)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_features_are_what_a_hook_sees() -> None:
    split, x = victim("digits"), read("digits")
    found = split.features(x, ["stage2", "pooled"])
    with torch.no_grad():
        h = split.model.stage2(split.model.stage1(x))
        assert torch.equal(found["stage2"], h)
        assert torch.equal(found["pooled"], split.model.pool(split.model.stage4(split.model.stage3(h))))


def test_a_place_that_is_passed_by_is_no_cut() -> None:
    whole = victim("timm resnet")
    inside = next(path for path, each in whole.model.named_modules() if path.endswith("1.0.conv2"))
    wrong = Victim(whole.model, {"inside": inside}, whole.prepare)
    with pytest.raises(ArchitectureError, match="cannot be cut at inside: later layers use earlier features too"):
        wrong.check_cuts(read("timm resnet"), ["inside"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guard", ["uniform", "gaussian:10", "gaussian:100", "fixed:10"])
def test_noise_that_both_ends_know_changes_nothing_but_digits(name: str, guard: str) -> None:
    split, x = victim(name), read(name)
    plain = split.output(x)
    cuts = split.select_cuts(())
    spread = scales(split.features(x, cuts))
    mask = LinkDefence.parse(guard)

    def link(cut: str, values: Tensor) -> Tensor:
        return mask.receive(cut, mask.send(cut, values, spread[cut], 7), spread[cut], 7)

    found = split.output_through(x, cuts, link)  # at every stage, as published
    assert float((found - plain).abs().max()) <= 1e-4 * max(1.0, float(plain.abs().max()))


def test_without_noise_a_link_changes_nothing() -> None:
    split, x = victim("digits"), read("digits")
    for guard in (LinkDefence(), LinkDefence("gaussian", 0.0)):
        rows = measure_defences(split, x, torch.zeros(len(x), dtype=torch.long), ["stage1", "pooled"], [guard])
        assert [row["output_change"] for row in rows] == [0.0, 0.0]


def test_noise_is_new_for_each_request_and_the_same_at_both_ends() -> None:
    shape = torch.Size((2, 3, 4, 4))
    one, other = LinkDefence("gaussian", 1.0, "a"), LinkDefence("gaussian", 1.0, "b")
    e = one.noise("stage1", shape, 0.5, 1)
    assert torch.equal(e, one.noise("stage1", shape, 0.5, 1)) and e.std() == pytest.approx(0.5, rel=0.15)
    for different in (
        one.noise("stage1", shape, 0.5, 2),
        one.noise("stage2", shape, 0.5, 1),
        other.noise("stage1", shape, 0.5, 1),
    ):
        assert abs(float(torch.corrcoef(torch.stack([e.flatten(), different.flatten()]))[0, 1])) < 0.35
    assert not torch.equal(e[0], e[1])  # nor do two images of one request share a mask
    fixed = LinkDefence("fixed", 1.0)
    assert torch.equal(fixed.noise("stage1", shape, 0.5, 1), fixed.noise("stage1", shape, 0.5, 2))
    uniform = LinkDefence("uniform").noise("stage1", torch.Size((50, 100)), 9.0, 1)
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1
    assert uniform.std() == pytest.approx(12**-0.5, rel=0.02)  # whatever the features' scale


def test_what_is_sent_in_fewer_numbers() -> None:
    features = torch.randn(4, 6, 5, 5)
    for bits in (1, 4, 8):
        sent = LinkDefence("bits", bits).send("cut", features, 1.0, 0)
        assert all(len(row.unique()) <= 2**bits for row in sent)
        step = (features.flatten(1).amax(1) - features.flatten(1).amin(1)) / (2**bits - 1)
        assert ((sent - features).abs().flatten(1).amax(1) <= step / 2 + 1e-6).all()
    kept = LinkDefence("top", 0.1).send("cut", features, 1.0, 0)
    assert [int((row != 0).sum()) for row in kept] == [15] * 4
    assert torch.equal(kept[kept != 0], features[kept != 0])
    pooled = LinkDefence("pooled").send("cut", features, 1.0, 0)
    torch.testing.assert_close(pooled[..., 0, 0], features.mean((2, 3)))
    shape = features.shape
    sizes = [LinkDefence.parse(each).sent(shape) for each in ("none", "gaussian:3", "bits:8", "top:0.1", "pooled")]
    assert sizes == [600, 600, 158, 120.0, 24]
    assert LinkDefence("gaussian", 10.0).ratio(0.3) == pytest.approx(0.01) and LinkDefence("bits", 8).ratio(0.3) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("loud", "unknown defence 'loud': give none, uniform"), ("gaussian:much", "unknown defence 'gaussian:much'"),
     ("gaussian:-1", "gaussian:-1: give 0 to"), ("bits:0", "bits:0: give 1 to 16"), ("top:2", "give 1e-06 to 1")],
)  # fmt: skip
def test_defences_that_there_are_not(text: str, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        LinkDefence.parse(text)


def test_models_that_read_no_images_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="takes no images: see `lamella run caprecover tokens`"):
        Victim.of(Stack(nano("llama")))
    with pytest.raises(MethodError, match="digits has no cut 'stage9': it has stage1, stage2"):
        victim("digits").select_cuts(["stage9"])


def test_a_tower_that_reads_more_than_pixels_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="takes other inputs beside pixels"):
        Victim.of(open_model(nano("qwen2_vl")))


def test_what_the_model_was_trained_on_attacks_nobody() -> None:
    from lamella.methods.caprecover.digits import digest

    whole = victim("digits")
    seen = frozenset(map(digest, images().items[:4]))
    known = Victim(whole.model, whole.cuts, whole.prepare, "digits", seen)
    assert [digest(each) for each in known.unseen(images())] == [digest(each) for each in images().items[4:]]


def state(model: Any) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def saved(model: Any, folder: Path, **settings: Any) -> Path:
    """A folder in the layout in which timm's models lie on the hub."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet10t", "num_classes": 10} | settings))
    return folder


def test_a_folder_of_timm_is_opened_with_its_weights_and_its_colours(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", pretrained=False, num_classes=10).eval()
    config = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}
    config |= {
        "custom_load": True,
        "hf_hub_id": "someone/else",
        "url": "https://example.org/weights",
    }  # which nobody asks
    read = Victim.open(saved(model, tmp_path / "net", pretrained_cfg=config))
    image = np.full((64, 64, 3), 255, np.uint8)
    x = read.prepare([Captioned(image, "", 0)])
    assert x.shape == (1, 3, 64, 64) and torch.allclose(x, torch.tensor(2.0))
    assert torch.equal(read.output(x), model(x))


@pytest.mark.parametrize(
    "settings", [{"architecture": "hf-hub:someone/else"}, {"num_classes": 10**9}, {"num_classes": "ten"}]
)
def test_a_folder_of_timm_that_claims_something_else_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = timm.create_model("resnet10t", pretrained=False, num_classes=10)
    with pytest.raises(CheckpointError, match="not a timm model"):
        Victim.open(saved(model, tmp_path / "net", **settings))


@pytest.mark.parametrize("whole", [True, False])
def test_clip_is_cut_behind_its_layers_what_is_pooled_and_what_is_projected(whole: bool, tmp_path: Path) -> None:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    seen = {**tower, "image_size": 16, "patch_size": 4, "projection_dim": 12}
    ends = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config=seen, text_config={**tower, **ends}, projection_dim=12)
    clip = transformers.CLIPModel(config).eval()
    saved = clip if whole else transformers.CLIPVisionModelWithProjection(config.vision_config).eval()
    saved.save_pretrained(tmp_path / "clip")
    split = Victim.open(tmp_path / "clip")
    assert list(split.cuts) == ["layers.0", "layers.1", "pooled", "projected"]
    x = split.prepare(images().items)
    with torch.no_grad():
        expected = clip.get_image_features(x).pooler_output if whole else saved(x).image_embeds
        before = saved.vision_model(x).pooler_output
    torch.testing.assert_close(split.output(x), expected)  # 12 wide, not 32
    split.check_cuts(x, split.select_cuts(()))
    found = split.features(x, ["pooled", "projected"])
    torch.testing.assert_close(found["pooled"], before)
    torch.testing.assert_close(found["projected"], expected)


def test_a_damaged_clip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    save_file({"logit_scale": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="12 layers do not fit the weights in the folder"):
        Victim.open(tmp_path)
    save_file({f"text_model.{number}": torch.zeros(1) for number in range(12)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"class_embedding is missing, and 199 more"):
        Victim.open(tmp_path)


VIT = '{"image_processor_type": "ViTImageProcessor"'
PROCESSORS = {
    "not JSON": "[" * 20_000,
    "no object": "[]",
    "of an unknown type": '{"image_processor_type": "Nothing"}',
    "of a type that is none": '{"image_processor_type": 7}',
    "of a gigantic size": VIT + ', "size": {"height": 1000000000, "width": 1000000000}}',
    "of a negative size": VIT + ', "size": {"height": -1, "width": 8}}',
    "of a size in words": VIT + ', "size": "large"}',
    "of another mean": VIT + ', "size": {"height": 8, "width": 8}, "image_mean": [0.5, 0.5]}',
    "with code": '{"image_processor_type": "Theirs", "auto_map": {"AutoImageProcessor": "theirs.Theirs"}}',
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_damaged_image_processor_beside_a_clip_is_refused(name: str, tmp_path: Path) -> None:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.CLIPVisionConfig(**tower, image_size=16, patch_size=4, projection_dim=12)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    (tmp_path / "theirs.py").write_text("raise SystemExit")
    (tmp_path / "preprocessor_config.json").write_text(PROCESSORS[name])
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: not a valid image processor") as error:
        Victim.open(tmp_path)
    assert "\n" not in str(error.value)


def test_an_image_processor_beside_a_clip_prepares_its_pictures(tmp_path: Path) -> None:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.CLIPVisionConfig(**tower, image_size=16, patch_size=4, projection_dim=12)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.0] * 3).save_pretrained(tmp_path)
    black = Captioned(np.zeros((8, 8, 3), np.uint8))
    assert not Victim.open(tmp_path).prepare([black]).any()  # of the usual mean, it would not be 0
