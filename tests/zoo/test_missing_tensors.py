"""Weights that lack a tensor, or have one of another shape, are refused by name, whichever library the model is of."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lamella as package
from lamella.errors import LamellaError
from lamella.runner import run
from lamella.zoo import open_model

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
Opener = tuple[Path, Callable[[], Any]]  # the file that holds the weights, and what opens them

CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
WAN = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 12, "freq_dim": 16, "ffn_dim": 40,
       "num_layers": 1}  # fmt: skip


def _transformers(folder: Path) -> Opener:
    shutil.copytree(NANO_LLAMA, folder)
    return folder / "model.safetensors", lambda: open_model(folder)


def _int8(folder: Path) -> Opener:
    pytest.importorskip("torchao")

    shutil.copytree(NANO_LLAMA, folder)
    return folder / "model.safetensors", lambda: run("quantize", folder, kind="int8", out=folder.parent / "int8")


def _pipeline(folder: Path, part: str) -> Opener:
    diffusers = pytest.importorskip("diffusers")
    from lamella.methods.laptop_diff import Denoiser

    torch.manual_seed(0)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3}
    channels: Any = {"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, cross_attention_dim=16, attention_head_dim=2, **channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **channels
    )
    config = transformers.CLIPTextConfig(max_position_embeddings=16, vocab_size=4, eos_token_id=1, **CLIP)
    diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=transformers.CLIPTextModel(config), scheduler=diffusers.DDIMScheduler(),
        tokenizer=transformers.CLIPTokenizer(vocab=words, merges=[], model_max_length=16), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return next((folder / part).glob("*.safetensors")), lambda: Denoiser.open(folder)


def _wan(folder: Path) -> Opener:
    diffusers = pytest.importorskip("diffusers")
    from lamella.methods.refacade import Base

    network = diffusers.WanTransformer3DModel(patch_size=(1, 4, 4), in_channels=3, out_channels=3, **WAN)
    network.save_pretrained(folder)
    return folder / "diffusion_pytorch_model.safetensors", lambda: Base.open(folder)


def _text_of_wan(folder: Path) -> Opener:
    from lamella.methods.refacade.base import encode_prompt

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 520}
    transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)).save_pretrained(folder / "text_encoder")
    transformers.AutoTokenizer.from_pretrained(NANO_LLAMA).save_pretrained(folder / "tokenizer")
    return folder / "text_encoder" / "model.safetensors", lambda: encode_prompt(folder, "a")


def _clip(folder: Path) -> Opener:
    from lamella.methods.caprecover import Victim

    config = transformers.CLIPVisionConfig(image_size=16, patch_size=4, projection_dim=8, **CLIP)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder / "model.safetensors", lambda: Victim.open(folder)


def _timm(folder: Path, opener: str) -> Opener:
    timm = pytest.importorskip("timm")
    from lamella.methods.caprecover import Victim
    from lamella.methods.iformer.vision import Vision

    folder.mkdir()
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": VIT}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(vit.state_dict(), folder / "model.safetensors")
    openers = {"caprecover": Victim.open, "iformer": Vision.open}
    return folder / "model.safetensors", lambda: openers[opener](folder)  # type: ignore[operator]


def _features_of_timm(folder: Path, opener: str) -> Opener:
    timm = pytest.importorskip("timm")
    from lamella.methods.agile3d.images import ImageEncoder
    from lamella.methods.muranet.encoder import of_timm

    folder.mkdir()
    file = folder / "model.safetensors"
    save_file(timm.create_model("resnet10t").state_dict(), file)
    openers = {
        "agile3d": lambda: ImageEncoder("resnet10t", weights=file),
        "muranet": lambda: of_timm("resnet10t", file),
    }
    return file, openers[opener]


def _iformer(folder: Path) -> Opener:
    pytest.importorskip("timm")
    from lamella.methods.iformer.folder import network
    from lamella.methods.iformer.network import StageShape
    from lamella.methods.iformer.result import IFormerClassifier
    from lamella.methods.iformer.vision import Vision
    from lamella.train import TrainingLog

    folder.mkdir()
    shape = StageShape(depths=(1, 1), widths=(16, 32), attention=(1, 3), head_dim=8)
    vision = Vision(network(shape, (32, 32), 3, 4), "made", (32, 32), 3, (0.5,) * 3, (0.5,) * 3)
    IFormerClassifier(vision=vision, shape=shape, classes=4, log=TrainingLog({})).write(folder)
    return folder / "model.safetensors", lambda: IFormerClassifier.read(folder)


def _slab(folder: Path) -> Opener:
    pytest.importorskip("timm")
    from lamella.methods.slab.networks import VisionConfig
    from lamella.methods.slab.vision import Classifier
    from lamella.train import TrainingLog

    folder.mkdir()
    shape = VisionConfig(size=8, patch=2, channels=1, width=16, depth=(2,), heads=2)
    Classifier(model=shape.build(10), network=shape, classes=10, merged=False, log=TrainingLog({})).write(folder)
    return folder / "model.safetensors", lambda: Classifier.read(folder)


def _cola(folder: Path) -> Opener:
    from lamella.methods.cola.predictor import PathPredictor, PredictorNetwork
    from lamella.plan import ModelReference
    from lamella.zoo import open_stack

    folder.mkdir()
    stack = open_stack(NANO_LLAMA)
    network = PredictorNetwork(stack.config.hidden_size, len(stack))
    PathPredictor(ModelReference.of(stack), network, chat=False).save(folder / "predictor.safetensors")
    return folder / "predictor.safetensors", lambda: PathPredictor.load(folder / "predictor.safetensors", stack)


OPENERS: dict[str, Callable[[Path], Opener]] = {
    "transformers": _transformers,
    "transformers, to be quantised": _int8,
    "transformers, text encoder of a pipeline": lambda folder: _pipeline(folder, "text_encoder"),
    "transformers, text encoder of Wan": _text_of_wan,
    "transformers, CLIP": _clip,
    "diffusers, UNet": lambda folder: _pipeline(folder, "unet"),
    "diffusers, autoencoder": lambda folder: _pipeline(folder, "vae"),
    "diffusers, Wan": _wan,
    "timm, caprecover": lambda folder: _timm(folder, "caprecover"),
    "timm, iformer": lambda folder: _timm(folder, "iformer"),
    "timm, agile3d": lambda folder: _features_of_timm(folder, "agile3d"),
    "timm, muranet": lambda folder: _features_of_timm(folder, "muranet"),
    "iformer": _iformer,
    "slab": _slab,
    "cola": _cola,
}


@pytest.mark.parametrize("damage", ["missing", "of another shape"])
@pytest.mark.parametrize("opener", OPENERS)
def test_weights_are_refused_in_one_line_that_names_the_tensor(opener: str, damage: str, tmp_path: Path) -> None:
    file, open_again = OPENERS[opener](tmp_path / "it")
    open_again()  # whole, it opens; of parameters that are tied, and of buffers, it holds what the library has written
    tensors = load_file(file)
    metadata = _metadata(file)
    name = [each for each, tensor in sorted(tensors.items()) if tensor.ndim and "running" not in each][1]
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(*tensors[name].shape, 3)
    save_file(tensors, file, metadata)
    shutil.rmtree(tmp_path / "int8", ignore_errors=True)
    with pytest.raises(LamellaError) as error:
        open_again()
    message = str(error.value)
    assert f"{name} is {'missing' if damage == 'missing' else '['}" in message
    assert "\n" not in str(error.value.args[0])


def _metadata(file: Path) -> dict[str, str] | None:
    content = file.read_bytes()
    found: dict[str, str] | None = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get(
        "__metadata__"
    )
    return found


def test_tied_weights_are_stored_once_and_both_missing_are_refused(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(NANO_LLAMA)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    opened = open_model(tmp_path).model
    assert torch.equal(opened.lm_head.weight, model.lm_head.weight)
    save_file({"lm_head.weight": tensors.pop("model.embed_tokens.weight"), **tensors}, tmp_path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    assert torch.equal(open_model(tmp_path).model.lm_head.weight, model.lm_head.weight)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LamellaError, match=r"(embed_tokens|lm_head)\.weight is missing"):
        open_model(tmp_path)


def test_no_module_loads_pretrained_weights_but_the_one_that_checks_them() -> None:
    home = Path(package.__file__).parent
    for file in (each for each in home.rglob("*.py") if each != home / "plan" / "filling.py"):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        called = (each.func for each in nodes if isinstance(each, ast.Call))
        for function in (each for each in called if isinstance(each, ast.Attribute) and each.attr == "from_pretrained"):
            kind = ast.unparse(function.value)
            assert kind.endswith(("Tokenizer", "Processor", "Config")), f"{file}: {kind}: load weights by pretrained()"
