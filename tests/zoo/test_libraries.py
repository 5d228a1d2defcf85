"""Models of every library open through ``lamella.open``, and nothing in a folder is ever executed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lamella
from lamella.errors import ArchitectureError, CheckpointError, LamellaError
from lamella.stack import Model, Stack
from lamella.zoo import Pipeline

diffusers = pytest.importorskip("diffusers")
timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (4, 8), "norm_num_groups": 2,
    "layers_per_block": 1, "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}  # fmt: skip
FILES = {"timm": "model.safetensors", "diffusers": "diffusion_pytorch_model.safetensors"}


def vit() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT).eval()


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**UNET).eval()


def pipeline() -> Any:
    return diffusers.DDPMPipeline(unet=unet(), scheduler=diffusers.DDPMScheduler(num_train_timesteps=10))


def timm_folder(folder: Path, **config: Any) -> Path:
    """A folder in the layout of timm's models on the hub."""
    folder.mkdir(parents=True)
    save_file(vit().state_dict(), folder / "model.safetensors")
    document = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": VIT}
    document["pretrained_cfg"] = {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5] * 3,
        "crop_pct": 0.8,
        "url": "https://example.org",
    }
    (folder / "config.json").write_text(json.dumps(document | config))
    return folder


def unet_folder(folder: Path, **config: Any) -> Path:
    unet().save_pretrained(folder)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | config))
    return folder


def pipeline_folder(folder: Path, **index: Any) -> Path:
    pipeline().save_pretrained(folder)
    document = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(document | index))
    return folder


def same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    mine, other = ours.state_dict(), theirs.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(each, other[name]) for name, each in mine.items())


def count(module: torch.nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def test_a_timm_folder_opens_with_its_weights_and_its_settings_for_images(tmp_path: Path) -> None:
    opened = lamella.open(timm_folder(tmp_path / "vit"))
    assert type(opened.model) is type(vit()) and same_weights(opened.model, vit())
    assert not opened.model.training
    found = opened.describe()
    assert (found["name"], found["library"], found["parameters"]) == ("vit", "timm", count(vit()))
    settings = opened.model.pretrained_cfg
    assert (list(settings["mean"]), settings["crop_pct"]) == ([0.1, 0.2, 0.3], 0.8)
    assert settings["url"] != "https://example.org"


def test_a_network_of_diffusers_opens_in_the_requested_precision(tmp_path: Path) -> None:
    opened = lamella.open(unet_folder(tmp_path / "unet"))
    assert isinstance(opened.model, diffusers.UNet2DModel) and same_weights(opened.model, unet())
    assert opened.describe() == {"name": "unet", "library": "diffusers", "parameters": count(unet())}
    unet().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    types = {dtype: lamella.open(tmp_path / "half", dtype=dtype).model.dtype for dtype in ("auto", torch.float16)}
    assert types == {"auto": torch.bfloat16, torch.float16: torch.float16}


def test_weights_of_several_types_are_kept_as_they_are_stored(tmp_path: Path) -> None:
    network = unet().to(torch.bfloat16)
    network.conv_in.float().weight.data.fill_(1 / 3)
    network.save_pretrained(tmp_path / "mixed")
    assert same_weights(lamella.open(tmp_path / "mixed", dtype="auto").model, network)
    assert lamella.open(tmp_path / "mixed", dtype="auto").model.conv_in.weight.dtype == torch.float32


def test_a_pipeline_opens_its_parts_when_they_are_used(tmp_path: Path) -> None:
    folder = pipeline_folder(tmp_path / "ddpm")
    (folder / "scheduler" / "scheduler_config.json").rename(tmp_path / "scheduler_config.json")
    opened = lamella.open(folder)
    assert isinstance(opened, Pipeline) and opened.has("unet") and not opened.has("vae")
    assert same_weights(opened.part("unet"), unet())
    with pytest.raises(LamellaError, match="cannot be opened"):
        _ = opened.model
    (tmp_path / "scheduler_config.json").rename(folder / "scheduler" / "scheduler_config.json")
    opened = lamella.open(folder)
    assert isinstance(opened.model, diffusers.DDPMPipeline)
    assert opened.model.unet is opened.part("unet") and opened.model.scheduler.config.num_train_timesteps == 10
    assert opened.describe() == {"name": "ddpm", "library": "diffusers", "parameters": count(unet())}


def test_a_part_that_a_pipeline_does_not_have_is_named() -> None:
    with pytest.raises(CheckpointError, match="has no vae"):
        lamella.open(pipeline()).part("vae")  # type: ignore[attr-defined]


def test_models_of_timm_and_torchvision_open_by_name_without_any_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "torch.hub.load_state_dict_from_url",
        "torchvision._internally_replaced_utils.load_state_dict_from_url",
    ):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("something was downloaded"))
    opened = lamella.open("torchvision:resnet18")
    assert isinstance(opened.model, torchvision.models.ResNet)
    found = {"name": "resnet18", "library": "torchvision", "parameters": count(torchvision.models.resnet18())}
    assert opened.describe() == found
    assert isinstance(lamella.open("torchvision:fcn_resnet50").model, torchvision.models.segmentation.FCN)
    save_file(opened.model.state_dict(), tmp_path / "resnet.safetensors")
    again = lamella.open(f"torchvision:resnet18@{tmp_path / 'resnet.safetensors'}")
    assert same_weights(again.model, opened.model)
    assert lamella.load("torchvision:resnet18").library == "torchvision"
    named = lamella.open("timm:resnet10t")
    assert isinstance(named.model, timm.models.resnet.ResNet) and named.library == "timm"


@pytest.mark.parametrize(
    ("make", "library"), [(vit, "timm"), (unet, "diffusers"), (torchvision.models.resnet18, "torchvision")]
)
def test_a_model_in_memory_opens_as_it_is(make: Callable[[], Any], library: str) -> None:
    model = make()
    opened = lamella.open(model)
    assert opened.model is model and opened.library == library and type(opened) is Model
    assert lamella.open(opened) is opened and opened.device.type == "cpu"
    assert opened.describe() == {"name": type(model).__name__, "library": library, "parameters": count(model)}
    assert repr(opened) == f"Model({type(model).__name__}: {library})"


def test_a_pipeline_in_memory_opens_as_it_is() -> None:
    made = pipeline()
    opened = lamella.open(made)
    assert isinstance(opened, Pipeline) and opened.model is made and opened.part("unet") is made.unet
    assert opened.describe() == {"name": "DDPMPipeline", "library": "diffusers", "parameters": count(made.unet)}


@pytest.mark.parametrize("make", [vit, pipeline, torchvision.models.resnet18])
def test_models_without_stacks_are_refused_where_a_stack_is_needed(make: Callable[[], Any]) -> None:
    for take in (Stack, lambda model: lamella.open(model).stacks):
        with pytest.raises(ArchitectureError, match="not divided into stacks of layers: give a transformers") as error:
            take(make())
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("whole", [True, False])
def test_a_clip_opens_as_its_tower_with_the_projection_on_request(whole: bool, tmp_path: Path) -> None:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    seen = {**tower, "image_size": 16, "patch_size": 4, "projection_dim": 12}
    read = {**tower, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(vision_config=seen, text_config=read, projection_dim=12)
    kind = transformers.CLIPModel if whole else transformers.CLIPVisionModelWithProjection
    model = kind(config if whole else config.vision_config).eval()
    model.save_pretrained(tmp_path / "clip")
    opened = lamella.open(tmp_path / "clip", classes=("CLIPVisionModelWithProjection",))
    assert isinstance(opened, Stack) and len(opened) == 2 and opened.architecture.modality == "image"
    x = torch.randn(1, 3, 16, 16)
    expected = model.get_image_features(x).pooler_output if whole else model(x).image_embeds
    torch.testing.assert_close(opened.model(x).image_embeds, expected)
    if whole:
        with pytest.raises(ArchitectureError, match="unknown architecture 'clip'"):
            lamella.open(tmp_path / "clip")
    else:
        assert isinstance(lamella.open(tmp_path / "clip").model, transformers.CLIPVisionModel)


# Refusals


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet10", "timm has no model 'resnet10'; did you mean resnet10t"),
        ("timm:local-dir:/tmp", "timm has no model 'local-dir:/tmp'"),
        ("timm:hf-hub:someone/else", "timm has no model 'hf-hub:someone/else'"),
        ("torchvision:resnet", "torchvision has no model 'resnet'; did you mean resnet"),
        ("torchvision:__import__", "torchvision has no model '__import__'"),
        ("torchvision:resnet18@weights.pth", "weights.pth is not a safetensors file"),
        ("torchvision:resnet18@missing.safetensors", "missing.safetensors is not a safetensors file"),
    ],
)
def test_names_that_a_library_does_not_have_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(LamellaError, match=message) as error:
        lamella.open(name)
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused_by_the_name_of_a_tensor(tmp_path: Path) -> None:
    save_file(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "three.safetensors")
    with pytest.raises(CheckpointError, match=r"fc\.weight is \[3, 512\] where the network has \[1000, 512\]"):
        lamella.open(f"torchvision:resnet18@{tmp_path / 'three.safetensors'}")


@pytest.mark.parametrize("library", FILES)
def test_a_tensor_that_is_missing_is_named(library: str, tmp_path: Path) -> None:
    folder = {"timm": timm_folder, "diffusers": unet_folder}[library](tmp_path / "model")
    tensors = load_file(folder / FILES[library])
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, folder / FILES[library], {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        lamella.open(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "hf-hub:someone/else"}, "timm has no model 'hf-hub:someone/else'"),
        ({"architecture": ["os", "system"]}, "timm has no model"),
        ({"model_args": {**VIT, "checkpoint_path": "evil.pth"}}, "its checkpoint_path is not a valid size"),
        ({"model_args": {**VIT, "pretrained_cfg": {"file": "evil.pth"}}}, "its pretrained_cfg is not a valid size"),
        ({"model_args": {**VIT, "pretrained": True}}, "pretrained"),
        ({"model_args": {**VIT, "depth": 10_000}}, "more layers than the weights have"),
        ({"model_args": {**VIT, "depth": 10**12}}, "its depth is not a valid size"),
        ({"model_args": [1]}, "not a timm model"),
        ({"num_classes": 10**9}, "its num_classes is out of range"),
        ({"pretrained_cfg": {"crop_pct": 1e-9}}, "its crop_pct is out of range"),
        ({"pretrained_cfg": {"interpolation": "evil"}}, "its interpolation is out of range"),
    ],
)
def test_a_timm_folder_that_claims_what_cannot_be_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        lamella.open(timm_folder(tmp_path / "vit", **config))
    assert "not a timm model" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDPMPipeline"}, "'DDPMPipeline' is not a network of diffusers"),
        ({"_class_name": "DDPMScheduler"}, "'DDPMScheduler' is not a network of diffusers"),
        ({"_class_name": "os.system"}, "'os.system' is not a network of diffusers"),
        ({"_class_name": ["os", "system"]}, "is not a network of diffusers"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "its weights are quantised"),
        ({"layers_per_block": 10_000}, "more layers than the weights have"),
        ({"layers_per_block": 10**9}, "which does not fit the weights"),
        ({"block_out_channels": [4, 16]}, "where the network has"),
        ({"act_fn": "evil"}, "cannot be opened"),
    ],
)
def test_a_network_of_diffusers_that_claims_what_cannot_be_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        lamella.open(unet_folder(tmp_path / "unet", **config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"unet": ["transformers", "AutoModel"]}, "needs transformers.AutoModel, which is not supported"),
        ({"unet": ["evil", "Network"]}, "needs evil.Network, which is not supported"),
        ({"unet": ["diffusers", "DiffusionPipeline"]}, "which is not supported"),
        ({"unet": ["diffusers.loaders", "FromSingleFileMixin"]}, "which is not supported"),
        ({"_class_name": ["evil", "Pipeline"]}, "is not a pipeline of diffusers"),
        ({"_class_name": "DiffusionPipeline"}, "cannot be opened"),
    ],
)
def test_a_pipeline_that_asks_for_other_classes_is_refused(index: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = pipeline_folder(tmp_path / "ddpm", **index)
    for name in ("evil", "pipeline", "unet/evil"):
        (folder / f"{name}.py").write_text("raise SystemExit('it was executed')")
    with pytest.raises(CheckpointError, match=message) as error:
        _ = lamella.open(folder).model
    assert "\n" not in str(error.value)


class Evil:
    """What writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.write_text, (self.file, "it was executed")


@pytest.mark.parametrize("library", FILES)
def test_code_and_pickles_next_to_a_config_are_never_executed(library: str, tmp_path: Path) -> None:
    folder = {"timm": timm_folder, "diffusers": unet_folder}[library](
        tmp_path / "model", auto_map={"AutoModel": "evil.Model"}, custom_load=True
    )
    (folder / "evil.py").write_text("raise SystemExit('it was executed')")
    opened = lamella.open(folder)
    assert opened.library == library
    (folder / FILES[library]).unlink()
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pth"):
        (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    with pytest.raises(CheckpointError, match=f"has no {FILES[library]}"):
        lamella.open(folder)
    assert not (tmp_path / "executed").exists()


def test_an_index_of_weights_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    folder = unet_folder(tmp_path / "unet")
    shutil.move(folder / FILES["diffusers"], tmp_path / "other.safetensors")
    names = load_file(tmp_path / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../other.safetensors")}
    (folder / f"{FILES['diffusers']}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names \.\./other\.safetensors, which is not in its folder"):
        lamella.open(folder)
    with pytest.raises(CheckpointError, match="not a valid part of a pipeline"):
        _ = lamella.open(pipeline_folder(tmp_path / "ddpm", **{"../unet": ["diffusers", "UNet2DModel"]})).model


# Views


def test_a_view_takes_models_of_its_libraries_in_every_form(tmp_path: Path) -> None:
    from lamella.methods.iformer import Vision
    from lamella.methods.laptop_diff import Denoiser

    folder, empty = timm_folder(tmp_path / "vit"), tmp_path / "empty"
    empty.mkdir()
    model = lamella.open(folder)
    for given in (folder, str(folder), model, model.model):
        assert same_weights(Vision.open(given).model, vit())
    whole = pipeline()
    assert Denoiser.open(whole).network is whole.unet and Denoiser.of(lamella.open(whole)).network is whole.unet
    for given, message in (
        (unet(), "a model of diffusers, where one of timm is needed"),
        (unet_folder(tmp_path / "unet"), "a model of diffusers, where one of timm is needed"),
        (empty, "has no config.json or model_index.json"),
        ("torchvision:resnet18", "a model of torchvision, where one of timm is needed"),
        ("someone/else", "there is no folder someone/else"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            Vision.open(given)
        line = str(error.value)
        assert "is no vision transformer of timm" in line and "a folder written by iformer" in line
        assert "\n" not in line
    with pytest.raises(ArchitectureError, match="is a network without a pipeline"):
        Denoiser.open(unet())


def test_a_command_takes_a_model_in_memory_for_its_view() -> None:
    torch.manual_seed(0)
    vit32 = timm.create_model("vit_tiny_patch16_224", num_classes=20, **(VIT | {"img_size": 32, "patch_size": 8}))
    found = lamella.run("iformer", vit32, images="textures", command="spectra", count=16)
    assert len(found.result.findings["layers"]) == 2
