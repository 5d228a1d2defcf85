"""Published checkpoints: their configs and names are those of the classes that Lamella opens, and small copies run.

A record in ``published_configs`` has the config of a checkpoint and what is public of its files: the names of its
tensors, their number, and their size. At full size, the class is created without weights and compared with the record.
With small sizes, and all other settings as published, a folder in the published layout is opened by its path, and a
method that needs such a model runs. In names, ``{text}`` stands for the number of a layer, as counted in the record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import lamella
from lamella.data import ImageText, InputContext, Processing
from lamella.errors import ArchitectureError, LamellaError, MethodError
from lamella.methods.laptop_diff import Denoiser
from lamella.methods.pre_rmsnorm import RMSNorm, rewrite_timm
from lamella.methods.refacade import Base
from lamella.methods.slab.networks import VisionConfig
from lamella.plan import checkpoint
from lamella.stack import auto_class, last_stack
from lamella.zoo.configs import open_config
from lamella.zoo.opening import open_processor
from lamella.zoo.worlds.words import word_tokenizer

diffusers = pytest.importorskip("diffusers")
timm = pytest.importorskip("timm")

Record = Mapping[str, Any]
HOME = Path(__file__).parent / "published_configs"
RECORDS = sorted(file.stem for file in HOME.glob("*.json"))
DENSE = ["internvl3-1b", "llava-1.5-7b", "llava-onevision-0.5b", "qwen2.5-vl-3b", "qwen2.5-vl-7b"]
EXPERTS = ["internvl3.5-30b-a3b", "qwen3-vl-30b-a3b"]
DENOISERS = ["sd-1.5-unet", "sdxl-unet", "ssd-1b-unet", "dit-xl-2-256"]
WIDTHS = {"F32": 4, "F16": 2}  # bytes of a value


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def record(name: str) -> dict[str, Any]:
    """A record, completed by the ones that it extends."""
    found: dict[str, Any] = json.loads((HOME / f"{name}.json").read_text())
    if "names_of" in found:
        found["names"] = record(found["names_of"])["names"] + found["names"]
    if "config_of" in found:
        found["config"] = record(found["config_of"])["config"] | found["config"]
    return found


def changed(config: Record, changes: Record) -> dict[str, Any]:
    """A config with other values, also inside its parts."""
    inside = {name: changed(config[name], each) for name, each in changes.items() if isinstance(config.get(name), dict)}
    return {**config, **changes, **inside}


def expanded(names: Sequence[str], counts: Mapping[str, int]) -> list[str]:
    """All names for which these stand."""
    found: list[str] = []
    for name in names:
        part = re.search(r"\{(\w+)\}", name)
        numbers = range(counts[part[1]]) if part else ()
        found += expanded([name.replace(part[0], str(n), 1) for n in numbers], counts) if part else [name]
    return found


def tensor_of(name: str, known: Record, state: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """What the class calls a published tensor, and the tensor: written out here, independently of transformers."""
    for theirs, ours in known.get("prefixes", {}).items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    theirs, ours = next(((a, b) for a, b in known.get("parts", {}).items() if a in name), ("", ""))
    name = name.replace(theirs, ours) if theirs else name
    expert = re.fullmatch(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)  # the class holds them together
    if expert is not None:
        whole = f"{expert[1]}.{'down' if expert[3] == 'down' else 'gate_up'}_proj"
        one = state[whole][int(expert[2])]
        return whole, one if expert[3] == "down" else one.chunk(2)[expert[3] == "up"]
    if known.get("experts") == "transposed" and ".experts." in name:
        return name, state[name].transpose(1, 2)
    return name, state[name]


def without_weights(config: Record, folder: Path) -> Any:
    """The class that Lamella opens for a config, on the meta device."""
    with torch.device("meta"):
        if "_class_name" in config:
            return getattr(diffusers, config["_class_name"]).from_config(config)
        if "architecture" in config:
            return timm.create_model(config["architecture"], num_classes=config["num_classes"])
        (folder / "config.json").write_text(json.dumps(config))
        read = open_config(folder)
        return getattr(transformers, auto_class(read)).from_config(read)


def file_sizes(state: Mapping[str, Tensor], kind: str) -> tuple[int, int]:
    """The size in bytes of a safetensors file of these names and shapes: as old versions wrote it, and as new ones."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, each in sorted(state.items()):
        start, end = end, end + WIDTHS[kind] * each.numel()
        header[name] = {"dtype": kind, "shape": list(each.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + end, 8 + length + -length % 8 + end


@pytest.mark.parametrize("name", RECORDS)
def test_names_and_size_are_those_of_the_class_at_full_size(name: str, tmp_path: Path) -> None:
    known = record(name)
    state = dict(without_weights(known["config"], tmp_path).state_dict())
    for tied in known.get("tied", ()):
        del state[tied]
    parameters = sum(each.numel() for each in state.values())
    if "names" in known:
        names = expanded(known["names"], known["counts"])
        found = [tensor_of(each, known, state) for each in names]
        assert {own for own, _ in found} == set(state)
        assert sum(each.numel() for _, each in found) == parameters
        assert len(set(names)) == known.get("tensors", len(names))
    if "parameters" in known:
        assert parameters == known["parameters"]
    if "index_characters" in known:
        shards = dict.fromkeys(names, "model-00001-of-00001.safetensors")
        index = {"metadata": {"total_size": 2 * parameters}, "weight_map": shards}
        assert len(json.dumps(index, indent=2)) + 1 == known["index_characters"]
    if "rounded" in known:
        text, unit = known["rounded"]
        assert f"{parameters / unit:.{len(text.partition('.')[2])}f}" == text
    for kind, size in known.get("files", {}).items():
        assert size in file_sizes(state, kind)
    assert {"names", "parameters", "rounded", "files"} & set(known)


# Models of images and text


def tokens_of(model_type: str) -> Any:
    """A tokenizer for the built-in shapes, with the names of special tokens that a processor asks for."""
    tokenizer = word_tokenizer()
    if model_type != "internvl":
        return tokenizer
    names = {"context_image_token": "<image>", "start_image_token": "<vision>", "end_image_token": "</vision>"}
    named = tokenizer.special_tokens_map | {"extra_special_tokens": names | {"video_token": "<video>"}}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **named)


def processor_of(config: Record, tokenizer: Any) -> Any:
    """The processor of a type of model, for images of the size in its config."""
    kind, vision = config["model_type"], config["vision_config"]
    patch = vision["patch_size"]
    if kind == "llava":
        side = vision["image_size"]
        crop = {"height": side, "width": side}
        images = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop)
        how = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return transformers.LlavaProcessor(images, tokenizer, **how)
    if kind == "llava_onevision":
        size = {"height": vision["image_size"], "width": vision["image_size"]}
        images = transformers.LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=config["image_grid_pinpoints"]
        )
        return transformers.LlavaOnevisionProcessor(
            images, tokenizer, transformers.LlavaOnevisionVideoProcessor(size=size),
            num_image_tokens=(vision["image_size"] // patch) ** 2, vision_feature_select_strategy="full",
            vision_aspect_ratio=config["vision_aspect_ratio"],
        )  # fmt: skip
    if kind == "internvl":
        height, width = vision["image_size"]
        images = transformers.GotOcr2ImageProcessor(size={"height": height, "width": width})
        videos = transformers.InternVLVideoProcessor(size={"height": height, "width": width})
        return transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=config["image_seq_length"])
    pixels = {"shortest_edge": (4 * patch) ** 2, "longest_edge": (4 * patch) ** 2}
    squares = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2, "size": pixels}
    line = "Qwen3VL" if kind == "qwen3_vl_moe" else "Qwen2_5_VL"
    videos = transformers.Qwen3VLVideoProcessor if line == "Qwen3VL" else transformers.Qwen2VLVideoProcessor
    return getattr(transformers, f"{line}Processor")(
        transformers.Qwen2VLImageProcessor(**squares), tokenizer, videos(**squares)
    )


def tokens_in(config: Record, tokenizer: Any) -> dict[str, Any]:
    """The changes of a config that a small tokenizer asks for."""
    special = {f"{each}_token_id": getattr(tokenizer, f"{each}_token_id") for each in ("pad", "bos", "eos")}
    text = {"vocab_size": len(tokenizer), **special}
    marks = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in {
        "image_token_id": "<image>", "image_token_index": "<image>", "video_token_id": "<video>",
        "video_token_index": "<video>", "vision_start_token_id": "<vision>", "vision_end_token_id": "</vision>",
    }.items() if name in config}  # fmt: skip
    return marks | ({"text_config": text} if "text_config" in config else text)


Written = Callable[[str], Path]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Write the small copy of a transformers checkpoint in the published layout, once."""
    known: dict[str, Path] = {}

    def written(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp("published") / name
            known[name].mkdir()
            write(record(name), known[name])
        return known[name]

    return written


def write(known: Record, folder: Path) -> None:
    """A folder in the published layout, with random weights under the published names."""
    config = changed(known["config"], known["small"])
    if "vision_config" in config:
        tokenizer = tokens_of(config["model_type"])
        config = changed(config, tokens_in(config, tokenizer))
        processor_of(config, tokenizer).save_pretrained(folder)
    state = without_weights(config, folder).state_dict()
    torch.manual_seed(0)
    drawn = {name: 0.2 * torch.randn(each.shape) for name, each in state.items()}
    names = expanded(known["names"], known["small_counts"])
    tensors = {each: tensor_of(each, known, drawn)[1].clone().contiguous() for each in names}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", [*DENSE, *EXPERTS, "deit-tiny"])
def test_a_small_copy_opens_with_every_tensor_under_its_published_name(name: str, small: Written) -> None:
    folder, known = small(name), record(name)
    stored = checkpoint.read(folder).tensors
    opened = lamella.open(folder)
    state = opened.model.state_dict()
    weights = load_file(folder / "model.safetensors")
    assert len(stored) == len(weights)
    for each, value in weights.items():
        assert torch.equal(tensor_of(each, known, state)[1], value), each
    assert {tensor_of(each, known, state)[0] for each in weights} | set(known.get("tied", ())) == set(state)


def rows_of(folder: Path) -> tuple[ImageText, dict[str, Tensor]]:
    processing = Processing(open_processor(folder))
    context = InputContext(lambda: processing.tokenizer, 0, "calibration", lambda: processing)
    rows = ImageText.open("shapes:colour", context, rows=2)
    batch = rows.batch(rows)
    return rows, {name: each for name, each in batch.items() if name not in ("labels", "prompt_lengths")}


@pytest.mark.parametrize("name", [*DENSE, *EXPERTS])
def test_layers_that_are_run_one_by_one_yield_the_models_logits_for_images(name: str, small: Written) -> None:
    folder = small(name)
    model = lamella.open(folder).model
    rows, inputs = rows_of(folder)
    stack = last_stack(model)
    context = stack.context(inputs)
    images = context.modalities["image"]
    around = rows.kinds(rows.batch(rows))["image"]  # in InternVL, also the tokens before and after an image
    assert images.any() and not (images & ~around).any()
    real = inputs["attention_mask"].bool()
    logits = stack.head(stack.run(context.h, 0, len(stack), context))
    assert torch.equal(logits[real], model(**inputs, use_cache=False).logits[real])


@pytest.mark.parametrize("name", DENSE)
def test_gamma_mod_ranks_the_layers_of_a_model_of_images(name: str, small: Written) -> None:
    done = lamella.run("gamma-mod", small(name), "shapes:colour", command="arank", rows=2, protect=())
    record_of = done.result.findings["arank"]
    assert record_of["images"] and len(record_of["by_layer"]) == 2


@pytest.mark.parametrize("name", EXPERTS)
def test_modes_skips_experts_of_images_and_text(name: str, small: Written) -> None:
    done = lamella.run("modes", small(name), "shapes:colour", rows=2, points=3, skip=0.3)
    point = done.result.points[-1]
    assert point.scores["skipped pairs"] >= 0.3 and "skipped pairs of image" in point.scores


def test_kimi_vl_is_refused_since_transformers_has_no_class_for_it(tmp_path: Path) -> None:
    config = {
        "architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl",
        "auto_map": {
            "AutoConfig": "configuration_kimi_vl.KimiVLConfig",
            "AutoModelForCausalLM": "modeling_kimi_vl.KimiVLForConditionalGeneration",
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_kimi_vl.py").write_text("raise SystemExit")
    (tmp_path / "configuration_kimi_vl.py").write_text("raise SystemExit")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ArchitectureError, match="needs code that comes with it, which Lamella never runs") as error:
        lamella.open(tmp_path)
    assert "\n" not in str(error.value)


# Denoising networks


def autoencoder() -> Any:
    """The autoencoder of Stable Diffusion, with small widths."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return diffusers.AutoencoderKL(block_out_channels=[32] * 4, latent_channels=4, sample_size=64, **blocks)


def text_encoder(kind: Any) -> tuple[Any, Any]:
    """A text encoder and its tokenizer, which knows letters and digits."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in letters), *letters]
    vocabulary = {word: number for number, word in enumerate(words)}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(words)}
    config = transformers.CLIPTextConfig(max_position_embeddings=16, projection_dim=16, **sizes, **ids)
    return kind(config).eval(), transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def pipeline_of(network: Any) -> Any:
    """The pipeline of a denoising network, with small other parts."""
    vae, noise = autoencoder(), diffusers.DDIMScheduler(num_train_timesteps=100)
    if not hasattr(network, "down_blocks"):
        return diffusers.DiTPipeline(transformer=network, vae=vae, scheduler=noise)
    first, tokenizer = text_encoder(transformers.CLIPTextModel)
    if network.config.addition_embed_type is None:
        return diffusers.StableDiffusionPipeline(
            vae=vae, text_encoder=first, tokenizer=tokenizer, unet=network, scheduler=noise, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    second, further = text_encoder(transformers.CLIPTextModelWithProjection)
    return diffusers.StableDiffusionXLPipeline(
        vae=vae, text_encoder=first, tokenizer=tokenizer, text_encoder_2=second, tokenizer_2=further, unet=network,
        scheduler=noise,
    )  # fmt: skip


@pytest.mark.parametrize("name", DENOISERS)
def test_laptop_diff_prunes_a_small_copy_of_a_published_pipeline(name: str, tmp_path: Path) -> None:
    known = record(name)
    config = changed(known["config"], known["small"])
    torch.manual_seed(0)
    network = getattr(diffusers, config["_class_name"]).from_config(config)
    for each in network.parameters():
        each.add_(0.05 * torch.randn_like(each))
    pipeline_of(network).save_pretrained(tmp_path / name)
    part = "unet" if hasattr(network, "down_blocks") else "transformer"
    (tmp_path / name / part / "config.json").write_text(json.dumps(config))  # as published, not as this version writes
    index = json.loads((tmp_path / name / "model_index.json").read_text())
    index[part] = ["diffusers", config["_class_name"]]
    (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    opened = Denoiser.open(tmp_path / name)
    assert all(torch.equal(each, network.state_dict()[name]) for name, each in opened.network.state_dict().items())
    done = lamella.run(
        "laptop-diff", tmp_path / name, "digits", count=10, tuples=1, bins=1, sets=0, batch=2, draws=0, remove=0.1
    )
    parameters = done.result.findings["parameters"]
    assert parameters["after"] <= 0.9 * parameters["before"]
    assert opened.blocks.sites == [each["site"] for each in done.result.findings["blocks"]]


def test_dit_from_a_pickle_is_refused_with_advice(tmp_path: Path) -> None:
    known = record("dit-xl-2-256")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(known["config"]))
    torch.save({}, tmp_path / "transformer" / "diffusion_pytorch_model.bin")  # the only file of the published folder
    with pytest.raises(LamellaError, match="with safetensors") as error:
        lamella.open(tmp_path / "transformer")
    assert "\n" not in str(error.value)


def test_refacade_opens_a_small_copy_of_vace_and_predicts_a_velocity(tmp_path: Path) -> None:
    folder = tmp_path / "vace"
    written: dict[str, Any] = {}
    for part, name in {"transformer": "wan2.1-vace-1.3b", "vae": "wan2.1-vae"}.items():
        known = record(name)
        config = changed(known["config"], known["small"])
        torch.manual_seed(0)
        written[part] = getattr(diffusers, config["_class_name"]).from_config(config)
        written[part].save_pretrained(folder / part)
        (folder / part / "config.json").write_text(json.dumps(config))
    known = record("wan2.1-vace-1.3b")
    names = expanded(known["names"], known["small_counts"])
    assert set(names) == set(written["transformer"].state_dict())
    base = Base.open(folder)
    assert (base.depth, base.channels, base.spatial, base.control_channels) == (3, 16, 8, (96, 80))
    assert base.vace_layers == (0, 2) and all(each.startswith("vace_blocks") for each in base.vace)
    stored = written["transformer"].state_dict()
    assert all(torch.equal(each, stored[name]) for name, each in base.network.state_dict().items())
    frames = base.encode(torch.rand(5, 3, 32, 32) * 2 - 1)
    assert frames.shape == (16, 2, 4, 4)
    assert base.velocity(frames[None], torch.tensor([0.5])).isfinite().all()
    assert base.decode(frames).shape == (5, 3, 32, 32)


# Vision


def timm_folder(name: str, folder: Path) -> Path:
    """A small copy in the layout that timm publishes, written by timm."""
    known = record(name)
    config = known["config"]
    torch.manual_seed(0)
    arguments = known["small"] | {"num_classes": 20}
    model = timm.create_model(config["architecture"], **arguments).eval()
    for each in model.parameters():
        each.add_(0.1 * torch.randn_like(each))
    timm.models._hub.save_for_hf(model, folder, model_args=known["small"], safe_serialization=True)
    return folder


@pytest.mark.parametrize("name", ["timm-deit-tiny", "timm-swin-tiny", "timm-pvt-v2-b0"])
def test_a_small_copy_of_a_vision_model_opens_as_timm_publishes_it(name: str, tmp_path: Path) -> None:
    opened = lamella.open(timm_folder(name, tmp_path / name))
    assert opened.library == "timm" and opened.model.pretrained_cfg["crop_pct"] == 0.9
    if name == "timm-deit-tiny":
        known = record(name)
        assert set(expanded(known["names"], known["small_counts"])) == set(opened.model.state_dict())


def test_iformer_measures_spectra_of_a_deit_and_refuses_stages_of_several_sizes(tmp_path: Path) -> None:
    folder = timm_folder("timm-deit-tiny", tmp_path / "deit")
    done = lamella.run("iformer", folder, images="textures", command="spectra", count=10)
    assert len(done.result.findings["layers"]) == 2
    for name in ("timm-swin-tiny", "timm-pvt-v2-b0"):
        with pytest.raises(MethodError) as error:
            lamella.run("iformer", timm_folder(name, tmp_path / name), images="textures", command="spectra", count=10)
        assert "\n" not in str(error.value)


def test_pre_rmsnorm_rewrites_a_deit_of_timm_and_of_transformers(tmp_path: Path, small: Written) -> None:
    model = lamella.open(timm_folder("timm-deit-tiny", tmp_path / "deit")).model
    assert isinstance(rewrite_timm(model).blocks[0].norm1, RMSNorm)
    done = lamella.run("pre-rmsnorm", small("deit-tiny"))
    assert done.result.plan.rewrite is not None


@pytest.mark.parametrize(
    ("shape", "millions"),
    [(VisionConfig(), 5.72), (VisionConfig("swin", patch=4, width=96, depth=(2, 2, 6, 2)), 28.29),
     (VisionConfig("pvt", patch=4, width=64, depth=(2, 2, 2, 2), heads=1), 13.2)],
)  # fmt: skip
def test_slab_trains_networks_of_the_published_sizes(shape: VisionConfig, millions: float) -> None:
    with torch.device("meta"):
        model = shape.build(1000)
    parameters = sum(each.numel() for each in model.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_documentation_lists_every_checkpoint() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for name in RECORDS:
        assert f"`{record(name)['checkpoint'].partition(',')[0]}`" in page, name
