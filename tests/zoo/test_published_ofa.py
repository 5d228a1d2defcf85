"""OFA's published layout: every tensor is mapped, and the model computes what the published equations say.

The reference reads the tensors by their published names, one row without padding at a time, in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, gelu, layer_norm, max_pool2d

import lamella
from lamella.data import MARK, ImageTextRow, Processing
from lamella.errors import CheckpointError
from lamella.stack.ofa import OFAForConditionalGeneration
from lamella.zoo.opening import open_processor
from lamella.zoo.published import IMAGE, config_of, renamed

SIDE, PATCHES = 48, 9  # pixels, and patches of 16 x 16 pixels
WORDS, BUCKETS, GRID, LAYERS, HEADS, WIDTH = 261 + 8192 + 1000, 8, 4, 2, 4, 32
CONFIG: dict[str, Any] = {
    "model_type": "ofa",
    "architectures": ["OFAModel"],
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "image_size": SIDE,
    "resnet_type": "resnet18",
    "token_bucket_size": BUCKETS,
    "image_bucket_size": GRID,
    "max_position_embeddings": 1024,
    "activation_function": "gelu",
    "dropout": 0.1,
    "normformer": True,
    "attn_scale_factor": 2.0,
    "entangle_position_embedding": False,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": 2,
    "torch_dtype": "float32",
    **{f"{stack}_layers": LAYERS for stack in ("encoder", "decoder")},
    **{f"{stack}_attention_heads": HEADS for stack in ("encoder", "decoder")},
    **{f"{stack}_ffn_dim": 2 * WIDTH for stack in ("encoder", "decoder")},
}
SIZES = {  # published: hidden size, layers of both stacks, heads, ResNet, millions of parameters by the authors
    "tiny": (256, (4, 4), 4, "resnet50", 33),
    "medium": (512, (4, 4), 8, "resnet101", 93),
    "base": (768, (6, 6), 12, "resnet101", 180),
    "large": (1024, (12, 12), 16, "resnet152", 470),
    "huge": (1280, (24, 12), 16, "resnet152", 930),
}
DEPTHS = {"resnet18": (2, 2, 2), "resnet50": (3, 4, 6), "resnet101": (3, 4, 23), "resnet152": (3, 8, 36)}
EOS, PAD = 2, 1


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def published(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all tensors in a published file, as the modules of the port define them."""
    d, bucket, grid = config["d_model"], config["token_bucket_size"], config["image_bucket_size"]
    words, patches = 2 * bucket - 1, (2 * grid - 1) ** 2 + 3
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"] = found[f"{name}.bias"] = (width,)

    def table(name: str, entries: int, width: int) -> None:
        found[f"{name}.weight"] = (entries, width)

    def batch(name: str, width: int) -> None:
        norm(name, width)
        found[f"{name}.running_mean"] = found[f"{name}.running_var"] = (width,)
        found[f"{name}.num_batches_tracked"] = ()

    def convolution(name: str, inputs: int, outputs: int, side: int) -> None:
        found[f"{name}.weight"] = (outputs, inputs, side, side)

    for stack, kinds in (("encoder", ("self",)), ("decoder", ("self", "cross"))):
        layers, heads = config[f"{stack}_layers"], config[f"{stack}_attention_heads"]
        table(f"{stack}.embed_tokens", config["vocab_size"], d)
        table(f"{stack}.embed_positions", config["max_position_embeddings"] + 2, d)
        table(f"{stack}.embed_image_positions", grid**2 + 1, d)
        for each in ("layernorm_embedding", "pos_ln", "image_pos_ln", "layer_norm"):
            norm(f"{stack}.{each}", d)
        for layer in range(layers):
            table(f"{stack}.token_rel_pos_table_list.{layer}", words, heads)
            table(f"{stack}.image_rel_pos_table_list.{layer}", patches, heads)
            inside = f"{stack}.layers.{layer}"
            for kind in kinds:
                for each in ("q", "k", "v", "out"):
                    linear(f"{inside}.{kind}_attn.{each}_proj", d, d)
                found[f"{inside}.{kind}_attn.c_attn"] = (heads,)
                norm(f"{inside}.{kind}_attn_layer_norm", d)
                norm(f"{inside}.{kind}_attn_mid_layer_norm", d)
            linear(f"{inside}.fc1", d, config[f"{stack}_ffn_dim"])
            linear(f"{inside}.fc2", config[f"{stack}_ffn_dim"], d)
            norm(f"{inside}.ffn_layer_norm", config[f"{stack}_ffn_dim"])
            norm(f"{inside}.final_layer_norm", d)
        found[f"{stack}.token_rp_bucket"] = (1024, 1024)
        found[f"{stack}.image_rp_bucket"] = (grid**2 + 1, grid**2 + 1)
    table("encoder.type_embedding", 2, d)
    norm("encoder.patch_layernorm_embedding", d)
    linear("encoder.image_proj", 1024, d)
    norm("decoder.code_layernorm_embedding", d)
    found["decoder.image_position_idx"] = (16 * 16 + 1 + 768,)
    found["decoder.output_projection.weight"] = (config["vocab_size"], d)
    for name in ("encoder.pos", "decoder.self_pos", "decoder.cross_pos"):
        linear(f"{name}_q_linear", d, d)
        linear(f"{name}_k_linear", d, d)
    images = "encoder.embed_images"
    convolution(f"{images}.conv1", 3, 64, 7)
    batch(f"{images}.bn1", 64)
    inputs = 64
    for stage, depth in enumerate(DEPTHS[config["resnet_type"]], 1):
        width = 32 * 2**stage
        for block in range(depth):
            inside = f"{images}.layer{stage}.{block}"
            for part, sizes in enumerate(((inputs, width, 1), (width, width, 3), (width, 4 * width, 1)), 1):
                convolution(f"{inside}.conv{part}", *sizes)
                batch(f"{inside}.bn{part}", sizes[1])
            if block == 0:
                convolution(f"{inside}.downsample.0", inputs, 4 * width, 1)
                batch(f"{inside}.downsample.1", 4 * width)
            inputs = 4 * width
    return found


def drawn(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random tensors in a published layout, none of them trivial."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in published(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("rp_bucket", "image_position_idx", "num_batches_tracked")):
            tensors[name] = torch.zeros(shape, dtype=torch.long)
        elif "embed_images" in name:
            fan = math.prod(shape[1:]) if len(shape) == 4 else 1
            one = name.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight", "downsample.1.weight"))
            tensors[name] = noise.abs() * 0.2 + 0.8 if one else noise * (fan**-0.5 if fan > 1 else 0.2)
        else:
            one = name.endswith(("norm.weight", "ln.weight", "embedding.weight", "c_attn")) and len(shape) == 1
            tensors[name] = noise * 0.2 + one
    for name in ("decoder.embed_tokens.weight", "decoder.output_projection.weight"):
        tensors[name] = tensors["encoder.embed_tokens.weight"].clone()
    return tensors


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return drawn(CONFIG)


@pytest.fixture(scope="module")
def folder(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = described(tmp_path_factory.mktemp("ofa") / "published")
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


def described(place: Path, **changes: Any) -> Path:
    """A folder with config and tokenizer, but without weights: the bytes as BART's vocabulary has them, no merges."""
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(CONFIG | changes))
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as themselves; other bytes from 256 on
    hidden = [each for each in range(256) if each not in shown]
    letters = [chr(each) for each in shown] + [chr(256 + index) for index in range(len(hidden))]
    words = ["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"]
    (place / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> OFAForConditionalGeneration:
    opened = lamella.open(folder)
    assert list(opened.stacks) == ["encoder", "decoder"] and isinstance(opened.model, OFAForConditionalGeneration)
    return opened.model.double()


# The reference


class Reference:
    """The published computation of one row, from tensors with their published names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: each.double() for name, each in tensors.items()}

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.of(name)
        return x @ weight.T + bias

    def norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], *self.of(name), eps=1e-5)

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        statistics = (self.tensors[f"{name}.running_{each}"] for each in ("mean", "var"))
        return batch_norm(x, *statistics, *self.of(name), eps=1e-5)

    def convolved(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        return conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def patches(self, pixels: Tensor) -> Tensor:
        """The embedded patches of an image [3, height, width], row by row [patches, d]."""
        images = "encoder.embed_images"
        x = self.batch_norm(f"{images}.bn1", self.convolved(f"{images}.conv1", pixels[None], 2)).relu()
        x = max_pool2d(x, 3, 2, 1)
        for stage in (1, 2, 3):
            for block in range(DEPTHS[CONFIG["resnet_type"]][stage - 1]):
                name, stride = f"{images}.layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                out = self.batch_norm(f"{name}.bn1", self.convolved(f"{name}.conv1", x)).relu()
                out = self.batch_norm(f"{name}.bn2", self.convolved(f"{name}.conv2", out, stride)).relu()
                out = self.batch_norm(f"{name}.bn3", self.convolved(f"{name}.conv3", out))
                if block == 0:
                    x = self.batch_norm(f"{name}.downsample.1", self.convolved(f"{name}.downsample.0", x, stride))
                x = (out + x).relu()
        x = self.linear("encoder.image_proj", x[0].flatten(1).T)
        return self.norm("encoder.patch_layernorm_embedding", x + self.tensors["encoder.type_embedding.weight"][1])

    def attended(self, name: str, x: Tensor, read: Tensor, bias: Tensor) -> Tensor:
        """The attention of x [queries, d] to other states [keys, d], with a bias [heads, queries, keys]."""
        inputs = {"q": x, "k": read, "v": read}
        q, k, v = (self.linear(f"{name}.{each}_proj", y).unflatten(1, (HEADS, -1)) for each, y in inputs.items())
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(2 * WIDTH / HEADS) + bias
        out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v) * self.tensors[f"{name}.c_attn"][:, None]
        return self.linear(f"{name}.out_proj", out.flatten(1))

    def attention(self, layer: str, kind: str, x: Tensor, read: Tensor | None, bias: Tensor) -> Tensor:
        normed = self.norm(f"{layer}.{kind}_attn_layer_norm", x)
        out = self.attended(f"{layer}.{kind}_attn", normed, normed if read is None else read, bias)
        return x + self.norm(f"{layer}.{kind}_attn_mid_layer_norm", out)

    def fed(self, layer: str, x: Tensor) -> Tensor:
        out = gelu(self.linear(f"{layer}.fc1", self.norm(f"{layer}.final_layer_norm", x)))
        return x + self.linear(f"{layer}.fc2", self.norm(f"{layer}.ffn_layer_norm", out))

    def scored(self, names: str, queries: Tensor, keys: Tensor) -> Tensor:
        q = self.linear(f"{names}_q_linear", queries).unflatten(1, (HEADS, -1))
        k = self.linear(f"{names}_k_linear", keys).unflatten(1, (HEADS, -1))
        return torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(2 * WIDTH / HEADS)

    def of_words(self, name: str, count: int) -> Tensor:
        """The biases of pairs of words by their distance [heads, count, count]."""
        table, middle = self.tensors[f"{name}.weight"], BUCKETS // 2
        bias = torch.zeros(HEADS, count, count, dtype=torch.float64)
        for i in range(count):
            for j in range(count):
                entry = i - j
                if abs(entry) > middle:
                    far = math.log(abs(entry) / middle) / math.log(1023 / middle) * (middle - 1)
                    entry = int(math.copysign(middle + math.ceil(far), entry))
                bias[:, i, j] = table[entry + BUCKETS - 1]
        return bias

    def of_patches(self, name: str) -> Tensor:
        """The biases of pairs of patches by their rows and columns [heads, patches, patches]."""
        table, columns = self.tensors[f"{name}.weight"], math.isqrt(PATCHES)
        bias = torch.zeros(HEADS, PATCHES, PATCHES, dtype=torch.float64)
        for i in range(PATCHES):
            for j in range(PATCHES):
                down, right = i // columns - j // columns, i % columns - j % columns
                bias[:, i, j] = table[(down + GRID - 1) * (2 * GRID - 1) + right + GRID - 1]
        return bias

    def encoded(self, words: Tensor, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The final states of the encoder and the normed positions, patches first [patches + words, d]."""
        x = self.tensors["encoder.embed_tokens.weight"][words] + self.tensors["encoder.type_embedding.weight"][0]
        x = self.norm("encoder.layernorm_embedding", x)
        p = self.norm("encoder.pos_ln", self.tensors["encoder.embed_positions.weight"][: len(words)])
        count = 0
        if pixels is not None:
            count, columns = PATCHES, math.isqrt(PATCHES)
            entries = [1 + row * GRID + column for row in range(columns) for column in range(columns)]
            at = self.tensors["encoder.embed_image_positions.weight"][entries]
            x, p = torch.cat([self.patches(pixels), x]), torch.cat([self.norm("encoder.image_pos_ln", at), p])
        absolute = self.scored("encoder.pos", p, p)
        for layer in range(LAYERS):
            bias = absolute.clone()
            bias[:, count:, count:] += self.of_words(f"encoder.token_rel_pos_table_list.{layer}", len(words))
            if count:
                bias[:, :count, :count] += self.of_patches(f"encoder.image_rel_pos_table_list.{layer}")
            x = self.attention(f"encoder.layers.{layer}", "self", x, None, bias)
            x = self.fed(f"encoder.layers.{layer}", x)
        return self.norm("encoder.layer_norm", x), p

    def logits(self, words: Tensor, pixels: Tensor | None, answer: Tensor) -> Tensor:
        """The logits of the tokens of the decoder [answer, vocabulary]."""
        memory, source = self.encoded(words, pixels)
        x = self.norm("decoder.layernorm_embedding", self.tensors["decoder.embed_tokens.weight"][answer])
        p = self.norm("decoder.pos_ln", self.tensors["decoder.embed_positions.weight"][: len(answer)])
        absolute, cross = self.scored("decoder.self_pos", p, p), self.scored("decoder.cross_pos", p, source)
        future = torch.full((len(answer), len(answer)), -math.inf, dtype=torch.float64).triu(1)
        for layer in range(LAYERS):
            bias = absolute + self.of_words(f"decoder.token_rel_pos_table_list.{layer}", len(answer)) + future
            x = self.attention(f"decoder.layers.{layer}", "self", x, None, bias)
            x = self.attention(f"decoder.layers.{layer}", "cross", x, memory, cross)
            x = self.fed(f"decoder.layers.{layer}", x)
        return self.norm("decoder.layer_norm", x) @ self.tensors["decoder.output_projection.weight"].T


# A ragged batch: two rows with an image, one without.

GENERATOR = torch.Generator().manual_seed(1)
TEXTS = [torch.randint(4, 250, (count,), generator=GENERATOR) for count in (14, 6, 9)]
ANSWERS = [torch.randint(4, 250, (count,), generator=GENERATOR) for count in (3, 7, 12)]
PIXELS = torch.randn(2, 3, SIDE, SIDE, generator=GENERATOR).double()
SHOWN = {0: 0, 2: 1}  # the image of each row that has one


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        at = slice(width - len(tokens), width) if side == "left" else slice(0, len(tokens))
        ids[row, at], mask[row, at] = tokens, 1
    return ids, mask


def batch(side: str, image: int) -> dict[str, Tensor]:
    """The encoder's inputs; an image stands after the first word."""
    marks = torch.full((PATCHES,), image)
    rows = [torch.cat([text[:1], marks, text[1:]]) if row in SHOWN else text for row, text in enumerate(TEXTS)]
    ids, mask = padded(rows, side)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": PIXELS}


@pytest.fixture(scope="module")
def expected(tensors: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [
            Reference(tensors).logits(text, PIXELS[SHOWN[row]] if row in SHOWN else None, answer)
            for row, (text, answer) in enumerate(zip(TEXTS, ANSWERS, strict=True))
        ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_the_equations(
    model: OFAForConditionalGeneration, expected: list[Tensor], side: str, attention: str
) -> None:
    model.set_attn_implementation(attention)
    ids, mask = padded(ANSWERS, side)
    given = batch(side, model.config.image_token_index)
    logits = model(**given, decoder_input_ids=ids, decoder_attention_mask=mask).logits
    for row, wanted in enumerate(expected):
        torch.testing.assert_close(logits[row, mask[row].bool()], wanted, rtol=0, atol=1e-9)
    model.set_attn_implementation("sdpa")


def test_steps_with_a_cache_are_whole_sequences(model: OFAForConditionalGeneration) -> None:
    given = batch("left", model.config.image_token_index)
    ids, mask = padded(ANSWERS, "left")
    whole = model(**given, decoder_input_ids=ids, decoder_attention_mask=mask, use_cache=False).logits
    parts, cache, known, begin = [], None, given, 0
    for end in (3, 4, 5, 9, 12):
        words = {"decoder_input_ids": ids[:, begin:end], "decoder_attention_mask": mask[:, :end]}
        out = model(**known, **words, cache=cache, use_cache=True)
        parts.append(out.logits)
        cache, begin = out.cache, end
        known = {"encoder_outputs": out.encoder_outputs, "attention_mask": given["attention_mask"]}
    difference = (torch.cat(parts, dim=1) - whole)[mask.bool()]
    assert difference.abs().max() <= 1e-9


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_predicts_as_whole_sequences_do(model: OFAForConditionalGeneration, beams: int) -> None:
    given = batch("left", model.config.image_token_index)
    ids, mask = padded([answer[:3] for answer in ANSWERS[:1]] + [answer[:2] for answer in ANSWERS[1:]], "left")
    ids[0, 0] = model.config.decoder_start_token_id  # else generate puts one in front of all rows
    settings = {"do_sample": False, "max_new_tokens": 5, "num_beams": beams, "num_return_sequences": beams}
    shown = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    out = model.generate(
        **given, decoder_input_ids=ids, decoder_attention_mask=mask, **settings, **shown, eos_token_id=None,
        forced_eos_token_id=None,
    )  # fmt: skip
    repeated = {name: each.repeat_interleave(beams, 0) for name, each in given.items()}
    more = torch.ones_like(out.sequences[:, ids.shape[1] :])
    mask = torch.cat([mask.repeat_interleave(beams, 0), more], dim=1)
    whole = model(**repeated, decoder_input_ids=out.sequences, decoder_attention_mask=mask).logits
    whole = whole[:, ids.shape[1] - 1 : -1]
    if beams == 1:
        assert (torch.stack(list(out.logits), dim=1) - whole).abs().max() <= 1e-5  # they come in float32
    else:
        likely = whole.log_softmax(-1).gather(-1, out.sequences[:, ids.shape[1] :, None]).squeeze(-1)
        torch.testing.assert_close(out.sequences_scores.double(), likely.mean(-1), rtol=1e-5, atol=1e-5)


# The layout


@pytest.mark.parametrize("size", SIZES)
def test_every_published_tensor_is_mapped_and_every_parameter_is_published(size: str) -> None:
    d, layers, heads, resnet, millions = SIZES[size]
    both = {"attention_heads": heads, "ffn_dim": 4 * d}
    sizes = {f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in both.items()}
    sizes |= {"encoder_layers": layers[0], "decoder_layers": layers[1]}
    config = CONFIG | sizes | {"d_model": d, "resnet_type": resnet, "vocab_size": 59457}
    config |= {"token_bucket_size": 256, "image_bucket_size": 42}
    shapes = published(config)
    with torch.device("meta"):
        model = OFAForConditionalGeneration(config_at(config))
    model.tie_weights()
    own = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    tied = {"model.decoder.embed_tokens.weight", "lm_head.weight"}
    mapped = [(renamed(name, "ofa"), shape) for name, shape in shapes.items()]
    kept = {name: shape for name, shape in mapped if name is not None}
    assert len(kept) == sum(name is not None for name, _ in mapped)
    assert kept == {name: shape for name, shape in own.items() if name not in tied}
    left_out = [name for name in shapes if renamed(name, "ofa") is None and ".image_" not in name]
    assert left_out == [
        *("encoder.token_rp_bucket", "decoder.embed_tokens.weight", "decoder.embed_image_positions.weight"),
        *("decoder.token_rp_bucket", "decoder.code_layernorm_embedding.weight"),
        *("decoder.code_layernorm_embedding.bias", "decoder.output_projection.weight"),
    ]
    computed = ("rp_bucket", "position_idx", "running_mean", "running_var", "num_batches_tracked")
    counted = {name: shape for name, shape in shapes.items() if not name.endswith(computed)}
    twice = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")
    count = sum(math.prod(shape) for name, shape in counted.items() if name not in twice)
    assert count / 1e6 == pytest.approx(millions, rel=0.02)


def config_at(config: dict[str, Any]) -> Any:
    """The config of Lamella's class, without a folder."""
    from lamella.stack.ofa_config import OFAConfig
    from lamella.zoo.published.ofa import SETTINGS

    vision = {"model_type": "resnet", "hidden_sizes": [256, 512, 1024], "depths": list(DEPTHS[config["resnet_type"]])}
    return OFAConfig(vision_config=vision, **{name: config[name] for name in SETTINGS if name in config})


def test_pickles_open_only_with_permission(
    tensors: dict[str, Tensor], model: OFAForConditionalGeneration, tmp_path: Path
) -> None:
    place = described(tmp_path / "pickled")
    torch.save(tensors, place / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        lamella.open(place)
    opened = lamella.open(place, allow_pickle=True).model.state_dict()
    assert all(torch.equal(opened[name].double(), value.double()) for name, value in model.state_dict().items())


def test_a_missing_tensor_is_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    place = described(tmp_path / "incomplete")
    left = {name: each for name, each in tensors.items() if name != "encoder.layers.1.self_attn.c_attn"}
    save_file(left, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.1\.self_attn\.out_proj\.c_attn is missing"):
        lamella.open(place)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("normformer", False), ("entangle_position_embedding", True), ("attn_scale_factor", 1.0), ("resnet_type", "vit")],
)
def test_other_settings_are_refused_in_one_line(setting: str, value: Any, tmp_path: Path) -> None:
    place = described(tmp_path / "other", **{setting: value})
    with pytest.raises(CheckpointError, match=f"{setting} .*is not supported") as error:
        config_of(place)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("width", "size"), [(256, 256), (768, 384), (1024, 480)])
def test_images_have_the_size_of_pretraining(width: int, size: int, tmp_path: Path) -> None:
    place = described(tmp_path / "sized", d_model=width)
    settings = json.loads((place / "config.json").read_text())
    del settings["image_size"]
    (place / "config.json").write_text(json.dumps(settings))
    assert config_of(place).image_size == size


def row(height: int, width: int) -> ImageTextRow:
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    question = {"role": "user", "content": f"{MARK} what colour is it?"}
    return ImageTextRow((image,), (question, {"role": "assistant", "content": " red"}))


def test_the_processor_scales_images_and_the_model_is_saved_under_its_own_names(folder: Path, tmp_path: Path) -> None:
    processing = Processing(open_processor(folder), encodes=True)
    given = processing.batch([row(40, 90), row(64, 64)])
    model = lamella.open(folder).model
    assert model.config.image_token_index == WORDS == processing.tokenizer.convert_tokens_to_ids(IMAGE)
    assert given["pixel_values"].shape == (2, 3, SIDE, SIDE) and given["pixel_values"].abs().max() <= 1
    assert (given["input_ids"] == WORDS).sum(1).tolist() == [PATCHES] * 2
    words = given["input_ids"][0][given["input_ids"][0] != WORDS]
    assert processing.tokenizer.decode(words) == "<s> what colour is it?</s>"
    assert given["labels"][0, -1] == EOS
    inputs = {name: given[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels")}
    out = model(**inputs)
    assert torch.isfinite(out.loss)
    model.save_pretrained(tmp_path / "saved")
    processing.processor.save_pretrained(tmp_path / "saved")
    again = lamella.open(tmp_path / "saved").model
    assert torch.equal(again(**inputs).logits, out.logits)
    more = Processing(open_processor(tmp_path / "saved"), encodes=True).batch([row(40, 90), row(64, 64)])
    assert all(torch.equal(more[name], each) for name, each in given.items())


def test_mue_runs_on_a_published_folder(folder: Path, tmp_path: Path) -> None:
    rows = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "prompt": f"{MARK} what is it?", "answer": " red"[: 2 + number % 3]})
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    with torch.enable_grad():
        lamella.run("mue", str(folder), train=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "early"), steps=1)
    early = lamella.load(tmp_path / "early").model
    assert isinstance(early, OFAForConditionalGeneration) and set(early.lamella_plan.policies) == {"encoder", "decoder"}
    given = Processing(open_processor(tmp_path / "early"), encodes=True).prompts([row(40, 90), row(30, 30)])
    assert early.generate(**given, max_new_tokens=3, do_sample=False, num_beams=2).shape[0] == 2
    assert early.lamella_policy_encoder.exits["image"].min() >= 1
