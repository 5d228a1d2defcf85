"""What people give: pictures, folders, videos, masks, references and networks; each fault has its line."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from PIL import Image
from safetensors.torch import load_file, save_file

import lamella
from lamella.data import InputContext
from lamella.errors import CalibrationError, CheckpointError, LamellaError, MethodError
from lamella.methods.refacade import (
    Base,
    Frames,
    Masks,
    Objects,
    Reference,
    Remover,
    Retexturer,
    SamplerSettings,
    refacade,
    textured_object,
)
from lamella.methods.refacade.frames import to_float, to_uint8

from .pipelines import folder, latents, pixels


def image_file(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def noise(height: int = 20, width: int = 24, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (height, width, channels), dtype=np.uint8)


def test_images_folders_and_videos_are_frames(tmp_path: Path) -> None:
    one = image_file(tmp_path / "one.png", noise())
    np.testing.assert_array_equal(Frames.open(one).pixels, noise()[None])
    clip = tmp_path / "clip"
    clip.mkdir()
    for number in (2, 10, 1):
        image_file(clip / f"{number:03}.png", noise() // number)
    np.testing.assert_array_equal(Frames.open(clip).pixels, [noise(), noise() // 2, noise() // 10])
    first, *others = (Image.fromarray(each) for each in Frames.open(clip).pixels)
    first.save(tmp_path / "clip.webp", save_all=True, append_images=others, lossless=True)
    np.testing.assert_array_equal(Frames.open(tmp_path / "clip.webp").pixels, Frames.open(clip).pixels)


def test_a_video_file_is_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for level in (40, 120, 200):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), level, np.uint8), format="rgb24")
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    found = Frames.open(tmp_path / "clip.mp4").pixels
    assert found.shape == (3, 16, 32, 3)
    np.testing.assert_allclose(found.mean(axis=(1, 2, 3)), [40, 120, 200], atol=4)


def test_links_and_pipes_in_a_folder_of_frames_are_refused(tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    clip.mkdir()
    image_file(clip / "1.png", noise())
    (clip / "2.png").symlink_to(image_file(tmp_path / "secret.png", noise()))
    for kind in (Frames, Masks):
        with pytest.raises(CalibrationError, match=r"2\.png: links in a folder are not followed"):
            kind.open(clip)
    (clip / "2.png").unlink()
    os.mkfifo(clip / "2.png")
    with pytest.raises(CalibrationError, match="is not a regular file"):
        Frames.open(clip)
    (clip / "2.png").unlink()
    (tmp_path / "link.png").symlink_to(clip / "1.png")  # named by the user, not found in a folder
    assert len(Frames.open(tmp_path / "link.png").pixels) == len(Frames.open(clip).pixels) == 1


@pytest.mark.parametrize("linked", ["0", "0.mask", "0.untextured", "1.mask/0.png"])
def test_links_in_a_folder_of_clips_are_refused(linked: str, tmp_path: Path) -> None:
    root = clip_folder(tmp_path)
    (root / linked).rename(tmp_path / "secret")
    (root / linked).symlink_to(tmp_path / "secret")
    with pytest.raises(CalibrationError, match=f"{linked}: links in a folder are not followed"):
        Objects.open(root, InputContext(), frames=3)


def test_a_reference_is_what_is_neither_white_nor_transparent(tmp_path: Path) -> None:
    on_white = np.full((16, 16, 3), 255, np.uint8)
    on_white[4:9, 3:12] = noise(5, 9)
    found = Reference.open(image_file(tmp_path / "white.png", on_white))
    expected = np.zeros((16, 16), bool)
    expected[4:9, 3:12] = True
    np.testing.assert_array_equal(found.shown, expected)
    clear = np.concatenate([noise(16, 16), np.where(expected, 255, 0).astype(np.uint8)[..., None]], axis=-1)
    np.testing.assert_array_equal(Reference.open(image_file(tmp_path / "clear.png", clear)).shown, expected)
    assert Reference.open(image_file(tmp_path / "all.png", noise())).shown.all()


def test_pixels_and_numbers_are_each_other() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    np.testing.assert_array_equal(to_uint8(to_float(pixels)), pixels)


def test_faults_of_images_are_one_line(tmp_path: Path) -> None:
    good = image_file(tmp_path / "good.png", noise())
    torn = tmp_path / "torn.png"
    torn.write_bytes(good.read_bytes()[:200])
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    image_file(mixed / "1.png", noise())
    image_file(mixed / "2.png", noise(20, 28))
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.mp4").write_bytes(b"nothing")
    dark = image_file(tmp_path / "dark.png", 0 * noise())
    white = image_file(tmp_path / "white.png", np.full((8, 8, 3), 255, np.uint8))
    for opened, path, message in (
        (Frames, torn, "the image torn.* cannot be read"),
        (Frames, mixed, "frames of 20 x 24 and 20 x 28 pixels: give frames of one size"),
        (Frames, tmp_path / "empty", "holds no frames"),
        (Frames, tmp_path / "nothing.png", "no frames"),
        (Frames, tmp_path / "torn.mp4", "the video cannot be read|pip install"),
        (Masks, dark, "the mask is empty"),
        (Masks, torn, "the image torn.* cannot be read"),
        (Reference, white, "the reference has no object:"),
    ):
        with pytest.raises(LamellaError, match=message) as error:
            opened.open(path)
        assert "\n" not in str(error.value) and (path.name in str(error.value) or "pip" in str(error.value))
    with pytest.raises(CalibrationError, match="give a mask of the same size"):
        Masks.open(image_file(tmp_path / "m.png", 0 * noise(8, 8) + 255)).fitted(Frames.open(good), 8, 8)
    with pytest.raises(CalibrationError, match="give one for all, or one per frame"):
        clip = image_file(tmp_path / "m2.webp", noise())
        first = Image.fromarray(0 * noise() + 255)
        first.save(clip, save_all=True, append_images=[Image.fromarray(noise())], lossless=True)
        Masks.open(clip).fitted(Frames.open(good), 20, 24)
    with pytest.raises(CalibrationError, match="give a mask of the same size"):
        Reference.open(good).masked(Masks.open(image_file(tmp_path / "m3.png", 0 * noise(8, 8) + 255)))


def test_nothing_is_left_half_written(tmp_path: Path) -> None:
    good = image_file(tmp_path / "good.png", noise())
    small = image_file(tmp_path / "small.png", 0 * noise(8, 8) + 255)
    with pytest.raises(CalibrationError, match="give a mask of the same size"):
        lamella.run(
            "refacade", "untrained", image=good, mask=small, reference=good, reference_mask=None, out=tmp_path / "out"
        )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["good.png", "small.png"]


def test_a_clip_is_written_and_read_back(tmp_path: Path) -> None:
    done = lamella.run(
        "refacade", "untrained", image="textured", mask="textured", reference="textured", steps=2, out=tmp_path / "out"
    )
    made = done.result
    assert made.frames.shape == (3, 32, 32, 3)
    names = {each.name for each in (tmp_path / "out").iterdir()}
    assert {"frames", "untextured", "reference", "result.webp", "report.html", "evidence.json"} <= names
    again = type(made).read(tmp_path / "out")
    for part in made.PARTS:
        np.testing.assert_array_equal(getattr(again, part), getattr(made, part))
    np.testing.assert_array_equal(Frames.open(tmp_path / "out" / "result.webp").pixels, made.frames)


def test_what_is_not_jigsawed_is_reported(tmp_path: Path) -> None:
    thin = np.full((32, 32, 3), 255, np.uint8)
    thin[:, 15:17] = 10
    given = {"image": "textured", "mask": "textured", "reference": image_file(tmp_path / "thin.png", thin), "steps": 1}
    done = lamella.run("refacade", "untrained", ratio=0.5, **given)
    assert done.result.findings["fallback"] and "not jigsawed" in " ".join(done.result.notes)
    assert "not jigsawed" in " ".join(map(str, done.evidence.notes))


def test_pasting_puts_back_what_lies_outside_the_hole() -> None:
    given = {"image": "textured", "mask": "textured", "reference": "textured", "steps": 1}
    pasted = lamella.run("refacade", "untrained", paste=True, **given).result
    plain = lamella.run("refacade", "untrained", **given).result
    original = Frames.open("textured").pixels
    same = (pasted.frames == original).all(axis=-1)
    assert same[:, 0].all() and not same.all()
    assert pasted.findings["background"] == plain.findings["background"] < 40  # measured before


# Objects to learn from


def clip_folder(tmp_path: Path) -> Path:
    root = tmp_path / "clips"
    for number in range(2):
        found = textured_object(number, 40, 3)
        for ending, frames in (("", found.composite), (".mask", 2 * found.mask - 1), (".untextured", found.untextured)):
            (root / f"{number}{ending}").mkdir(parents=True)
            for frame, each in enumerate(to_uint8(frames)):
                image_file(
                    root / f"{number}{ending}" / f"{frame}.png", each.repeat(3, -1) if each.shape[-1] == 1 else each
                )
    return root


def test_a_folder_of_clips_is_objects(tmp_path: Path) -> None:
    found = Objects.open(clip_folder(tmp_path), InputContext(), frames=3)
    truth = textured_object(1, 40, 3)
    assert len(found) == 2
    np.testing.assert_allclose(found.clips[1].frames, truth.composite, atol=1 / 127)
    np.testing.assert_array_equal(found.clips[1].mask, truth.mask)
    np.testing.assert_allclose(found.clips[1].plain, truth.untextured, atol=1 / 127)
    fitted = found.fitted(pixels())
    assert fitted[0].frames.shape == (3, 3, 32, 32) and fitted[0].mask.shape == (3, 1, 32, 32)


def test_clips_without_what_is_needed_are_refused(tmp_path: Path) -> None:
    root = clip_folder(tmp_path)
    with pytest.raises(CalibrationError, match="give longer clips"):
        Objects.open(root, InputContext(), frames=4)
    with pytest.raises(MethodError, match="needs a multiple of 4 plus one"):
        Objects.open(root, InputContext(), frames=3).fitted(latents())
    shutil.rmtree(root / "0.untextured")
    with pytest.raises(CalibrationError, match="render each clip in plain grey"):
        from lamella.methods.refacade import removal_samples

        removal_samples(pixels(), Objects.open(root, InputContext(), frames=1).clips)
    shutil.rmtree(root / "0.mask")
    with pytest.raises(CalibrationError, match=r"has no 0\.mask: give a mask"):
        Objects.open(root, InputContext())


def test_an_object_that_is_not_seen_at_first_is_refused_by_its_name(tmp_path: Path) -> None:
    root = clip_folder(tmp_path)
    image_file(root / "1.mask" / "0.png", np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(CalibrationError, match=r"1\.mask: no object in the first frame,") as error:
        Objects.open(root, InputContext(), frames=3)
    assert "\n" not in str(error.value)
    dot = np.zeros((40, 40, 3), np.uint8)
    dot[2, 2] = 255  # between the places that 32 x 32 pixels are read from
    image_file(root / "1.mask" / "0.png", dot)
    found = Objects.open(root, InputContext(), frames=3)
    with pytest.raises(CalibrationError, match=r"clips/1: in 32 x 32 pixels its object vanishes") as error:
        found.fitted(pixels())
    assert "\n" not in str(error.value)


def test_provenance_knows_other_plain_twins(tmp_path: Path) -> None:
    root = clip_folder(tmp_path)
    before = Objects.open(root, InputContext(), frames=3).describe()
    assert Objects.open(root, InputContext(), frames=3).describe() == before
    image_file(root / "0.untextured" / "0.png", np.zeros((40, 40, 3), np.uint8))
    assert Objects.open(root, InputContext(), frames=3).describe() != before


# Networks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "is not WanTransformer3DModel"),
        ({"num_layers": 10**9}, "which does not fit the weights"),
        ({"rope_max_seq_len": 10**9}, "which does not fit the weights"),
        ({"ffn_dim": 41}, r"is \[40, 48\] where the network has \[41, 48\]"),
        ({"num_layers": 4}, "lacks tensors of the network"),
        ({"num_layers": "three"}, "cannot be opened"),
        ({"num_layers": 2**17}, "more layers than the weights have"),
        ({"vace_layers": [0] * 2**17}, "more layers than the weights have"),
        ({"rope_max_seq_len": 2**17}, "which does not fit the weights"),
        (
            {"num_attention_heads": 1, "attention_head_dim": 2**17},
            r"is \[1, 2, 48\] where the network has \[1, 2, 131072\]",
        ),
    ],
)
def test_a_config_that_its_weights_do_not_bear_out_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    where = tmp_path / "pipeline"
    shutil.copytree(folder(), where)
    config = where / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as error:
        Base.open(where)
    assert "\n" not in str(error.value)


def test_an_autoencoder_of_more_blocks_than_its_weights_is_refused(tmp_path: Path) -> None:
    where = tmp_path / "pipeline"
    shutil.copytree(folder(), where)
    config = where / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_res_blocks": 2**17}))
    with pytest.raises(CheckpointError, match="more layers than the weights have"):
        Base.open(where)


def test_positions_are_made_when_the_weights_fit_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = tmp_path / "pipeline"
    shutil.copytree(folder(), where)
    config = where / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_head_dim": 4096}))
    made, rope = [], WanRotaryPosEmbed.__init__

    def noted(self: object, *given: object) -> None:
        rope(self, *given)
        made.extend(each.device.type for each in self.buffers())  # type: ignore[attr-defined]

    monkeypatch.setattr(WanRotaryPosEmbed, "__init__", noted)
    with pytest.raises(CheckpointError, match=r"where the network has \[1, 2, 8192\]"):
        Base.open(where)
    assert set(made) == {"meta"}
    found = Base.open(folder()).network.rope
    assert torch.equal(found.freqs_cos, WanRotaryPosEmbed(24, (1, 2, 2), 1024).freqs_cos)


def test_weights_in_parts_are_read_and_lead_nowhere_else(tmp_path: Path) -> None:
    where = tmp_path / "pipeline"
    shutil.copytree(folder(), where)
    part = where / "transformer"
    weights = load_file(part / "diffusion_pytorch_model.safetensors")
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in shards.items():
        save_file({name: weights[name] for name in some}, part / file)
    (part / "diffusion_pytorch_model.safetensors").unlink()
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, some in shards.items() for name in some}}))
    assert Base.open(where).digest == latents().digest
    (part / "a.safetensors").rename(tmp_path / "a.safetensors")
    index.write_text(index.read_text().replace("a.safetensors", "../../a.safetensors"))
    with pytest.raises(CheckpointError, match="which is not in its folder"):
        Base.open(where)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    where = tmp_path / "pipeline"
    shutil.copytree(folder(), where)
    weights = where / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), where / "transformer" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no diffusion_pytorch_model\.safetensors"):
        Base.open(where)


def test_a_remover_of_other_latents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="give --remover a"):
        lamella.run("refacade", folder(), command="train", objects="textured", remover="untrained", count=2, steps=1)


def test_a_distilled_removers_steps_are_kept_and_its_lessons_need_no_twins(tmp_path: Path) -> None:
    root = clip_folder(tmp_path)
    for number in range(2):
        shutil.rmtree(root / f"{number}.untextured")
    given = {"objects": root, "batch": 1, "out": tmp_path / "quick"}
    lamella.run("refacade", "untrained", command="distil", base="untrained", removal=1, steps=1, **given)
    quick = Remover.read(tmp_path / "quick").network
    assert quick.steps == 1 and Remover.read("untrained").network.steps == 3
    given = {"objects": root, "batch": 1, "remover": tmp_path / "quick", "layers": (0,), "out": tmp_path / "model"}
    lamella.run("refacade", "untrained", command="train", steps=1, **given)
    model = Retexturer.read(tmp_path / "model")
    assert model.remover.steps == 1
    passes: list[object] = []
    model.remover.network.register_forward_pre_hook(lambda module, branch_inputs: passes.append(branch_inputs))
    shown = {"image": Frames.open("textured"), "mask": Masks.open("textured"), "reference": Reference.open("textured")}
    refacade(model, **shown, base=Base.open("untrained"), sampling=SamplerSettings(steps=1))  # type: ignore[arg-type]
    assert len(passes) == 1
    (tmp_path / "quick" / "removal.json").write_text('{"steps": 0}')
    with pytest.raises(CheckpointError, match="no number of steps from 1 to 1000"):
        Remover.read(tmp_path / "quick")


@pytest.mark.parametrize("built_in", [True, False])
def test_the_built_in_branch_is_reported_as_such(built_in: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = Retexturer.read("untrained")
    named = replace(model, adapter=model.adapter.model_copy(update={"name": "nano"}), built_in=built_in)
    shown = {"image": Frames.open("textured"), "mask": Masks.open("textured"), "reference": Reference.open("textured")}
    made = refacade(named, **shown, base=Base.open("untrained"), sampling=SamplerSettings(steps=1))  # type: ignore[arg-type]
    assert ("built-in model" in " ".join(made.notes)) == built_in


def test_a_remover_is_read_back(tmp_path: Path) -> None:
    made = lamella.run(
        "refacade", folder(), command="remover", objects="textured", count=2, steps=1, out=tmp_path / "r"
    )
    again = Remover.read(tmp_path / "r")
    assert again.describe() == made.result.describe()
    assert again.network.kind == "WanVACETransformer3DModel"
