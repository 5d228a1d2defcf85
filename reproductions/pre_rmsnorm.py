"""Pre-RMSNorm at small scale: real transformers classes, a character-level GPT-2, and properties of both forms.

Checks that Pre-LN models of eighteen kinds compute the same with RMSNorm and CRMSNorm, with random affines and an
offset of 30 in the embedding; that replacing the norms alone does not; that a trained model keeps its perplexity, its
tokens and the predicted number of parameters; that the trainable form trains like the Pre-LN model, and the form that
is recentred only once does not; and that the residual stream can be rotated then, and only then.

    python reproductions/pre_rmsnorm.py            # about half an hour on one core; an interrupted run resumes
    python reproductions/pre_rmsnorm.py --quick    # smaller models, under a minute
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import Run, main
from harness.nano import LETTERS, from_scratch, nats, prose, taught, whole
from torch import Tensor, nn

from lamella.errors import LamellaError
from lamella.methods.pre_rmsnorm import Form, RMSNorm, pre_rmsnorm, rotate, trainable
from lamella.methods.pre_rmsnorm.checking import means, output, probe
from lamella.methods.pre_rmsnorm.rewrite import find_branches
from lamella.plan import RewriteReference
from lamella.plan.rewriting import wirings_of, with_rewrite
from lamella.report.figures import Bars
from lamella.stack import Model, open_model, share
from lamella.zoo.cache import build_once
from lamella.zoo.nano import randomise

SIZES, DEPTHS = (32, 48, 128), (2, 6)
OFFSET = 30.0
FORMS = {
    "RMS": Form(),
    "RMS, bias folded": Form(fold="bias"),
    "RMS, untied": Form(tied="untie"),
    "RMS, affine folded": Form(fold="affine", tied="untie"),
    "CRMS": Form(norm="crms", fold="affine", tied="untie"),
}
FOLDED, CRMS = FORMS["RMS, affine folded"], FORMS["CRMS"]
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def written(model: Model, form: Form) -> Any:
    return with_rewrite(model, RewriteReference(name="pre-rmsnorm", params=vars(form))).model


# The models


def kinds(d: int, layers: int) -> dict[str, transformers.PreTrainedModel]:
    """Return real classes with random weights, which cover the variants of Pre-LN models.

    They are tied and untied, with and without biases, with sequential and parallel sublayers that share a norm or have
    their own, with a norm on embeddings, class and distillation tokens, registers, vectors that scale, a norm behind
    the pooling, and an encoder for cross-attention.
    """
    heads, wide = 4, 2 * d
    stream = {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads}
    text = {**stream, **TOKENS, "vocab_size": 128, "max_position_embeddings": 64}
    image = {**stream, "intermediate_size": wide, "image_size": 16, "patch_size": 4}
    dino = {**stream, "mlp_ratio": 2, "image_size": 16, "patch_size": 4}
    gpt2 = {"n_embd": d, "n_layer": layers, "n_head": heads, "n_positions": 64, "vocab_size": 128, **TOKENS}
    sound = {"d_model": d, "encoder_layers": layers, "decoder_layers": layers, "encoder_ffn_dim": wide, **TOKENS}
    sound |= {"decoder_ffn_dim": wide, "encoder_attention_heads": heads, "decoder_attention_heads": heads}
    sound |= {"vocab_size": 128, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64}
    opt = {**text, "ffn_dim": wide, "word_embed_proj_dim": d}
    neox = {**text, "intermediate_size": wide}
    bloom = {"vocab_size": 128, "hidden_size": d, "n_layer": layers, "n_head": heads, **TOKENS}
    falcon, gptj = {**stream, **TOKENS, "vocab_size": 128}, {**gpt2, "rotary_dim": d // heads // 2}
    fused = {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}
    beit = {**image, "use_absolute_position_embeddings": True, "use_relative_position_bias": True, "num_labels": 10}
    t = transformers
    return {
        "GPT-2, tied": t.GPT2LMHeadModel(t.GPT2Config(**gpt2)),
        "GPT-2, untied": t.GPT2LMHeadModel(t.GPT2Config(**gpt2, tie_word_embeddings=False)),
        "OPT": t.OPTForCausalLM(t.OPTConfig(**opt)),
        "OPT, no biases": t.OPTForCausalLM(t.OPTConfig(**opt, enable_bias=False)),
        "GPT-NeoX, parallel": t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**neox)),
        "GPT-NeoX, serial": t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**neox, use_parallel_residual=False)),
        "BLOOM": t.BloomForCausalLM(t.BloomConfig(**bloom)),
        "GPT-J": t.GPTJForCausalLM(t.GPTJConfig(**gptj)),
        "Phi": t.PhiForCausalLM(t.PhiConfig(**neox)),
        "Falcon, one norm": t.FalconForCausalLM(t.FalconConfig(**falcon)),
        "Falcon, two norms": t.FalconForCausalLM(t.FalconConfig(**falcon, **fused)),
        "Falcon, serial": t.FalconForCausalLM(t.FalconConfig(**falcon, parallel_attn=False, multi_query=False)),
        "DeiT": t.DeiTForImageClassification(t.DeiTConfig(**image, num_labels=10)),
        "BEiT": t.BeitForImageClassification(t.BeitConfig(**beit)),
        "ViT": t.ViTForImageClassification(t.ViTConfig(**image, num_labels=10)),
        "CLIP vision": t.CLIPVisionModel(t.CLIPVisionConfig(**image)),
        "DINOv2": t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**dino)),
        "Whisper": t.WhisperForConditionalGeneration(t.WhisperConfig(**sound, decoder_start_token_id=1)),
    }


@torch.no_grad()
def perturbed(model: Any, seed: int) -> Model:
    """Return the model with random weights and an offset in the embeddings that start its residual stream.

    Every norm has g ~ N(1, 0.3) and b ~ N(0, 0.2); linear layers, biases and scales are random.
    """
    randomise(model, seed)  # the default initialisation is so small that branches hardly contribute
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.copy_(1 + 0.3 * noise(module.weight))
            module.bias.copy_(0.2 * noise(module.bias))
        elif getattr(module, "bias", None) is not None:
            module.bias.copy_(0.1 * noise(module.bias))
        elif hasattr(module, "lambda1"):
            module.lambda1.copy_(1 + 0.3 * noise(module.lambda1))
    first_table(model).add_(OFFSET)
    return open_model(model.eval())


def first_table(model: Any) -> Tensor:
    """Return the token embedding; for a vision model, its position embedding."""
    if model.main_input_name == "pixel_values":
        return next(each for name, each in model.named_parameters() if "position_embedding" in name)
    return model.get_input_embeddings().weight


def swapped(model: Model) -> Any:
    """Make the naive conversion: RMSNorm in place of LayerNorm, without recentring."""
    naive = copy.deepcopy(model.model)
    for branch in find_branches(naive, wirings_of(model.architectures)):
        for norm in branch.norms:
            old = norm.module
            naive.set_submodule(norm.path, RMSNorm(old.normalized_shape[0], old.eps, old.weight, old.bias))
    return naive


@torch.no_grad()
def distance(model: Any, other: Any, given: dict[str, Tensor]) -> float:
    """Return the largest difference between outputs, relative to the largest output, on inputs that fit the model."""

    def of(each: Any) -> Tensor:
        inputs = {name: value.to(each.dtype) if value.is_floating_point() else value for name, value in given.items()}
        return output(each, inputs)

    expected, found = of(model), of(other)
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


# 1 and 3: exactness


def exactness(run: Run, sizes: tuple[int, ...], depths: tuple[int, ...]) -> None:
    columns = ["RMS", "CRMS", "in float32", "LN in float32", "swapped"]
    found: dict[str, dict[str, list[float]]] = {}
    for d in sizes:
        for layers in depths:
            torch.manual_seed(run.seed)
            for kind, plain in kinds(d, layers).items():
                row = found.setdefault(kind, {name: [] for name in columns})
                single = perturbed(plain, run.seed)
                double = open_model(copy.deepcopy(single.model).double())
                given = probe(double, run.seed)
                for form in FORMS.values():
                    row[form.norm.upper()].append(distance(double.model, written(double, form), given))
                    row["in float32"].append(distance(double.model, written(single, form), given))
                row["LN in float32"].append(distance(double.model, single.model, given))
                row["swapped"].append(distance(double.model, swapped(double), given))
    worst = {kind: [max(row[name]) for name in columns[:-1]] + [min(row["swapped"])] for kind, row in found.items()}
    title = (
        "Largest difference from the model in float64, relative to its largest output; for replacing the norms only, "
        "the smallest"
    )
    run.table(title, ["", *columns], [[kind, *(f"{each:.1e}" for each in row)] for kind, row in worst.items()])
    shown = {"replaced by RMSNorm, weights as they are": "swapped", "LayerNorm, in float32": "LN in float32",
             "rewritten, in float32": "in float32", "rewritten": "RMS"}  # fmt: skip
    series = {label: [row[columns.index(name)] for row in worst.values()] for label, name in shown.items()}
    bars = Bars("model", "largest difference over largest output", series, tuple(worst), horizontal=True, log_y=True)
    run.figure("pre-rmsnorm-differences", bars)
    rms, crms, single_, _, _ = (max(column) for column in zip(*worst.values(), strict=True))
    ours, naive = max(rms, crms), min(row[-1] for row in worst.values())
    run.main("in float64, all kinds, widths, depths and forms", "at most 1e-10", f"{ours:.1e}", ours <= 1e-10)
    run.exact("in float32", "at most 1e-4", f"{single_:.1e}", single_ <= 1e-4)
    run.exact("norms replaced only", "more than 100 times as far", f"{naive:.1e}", naive > 100 * ours)


def refusals(run: Run) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    llama = {**sizes, "intermediate_size": 64}
    text = {**sizes, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64, **TOKENS}
    models = {
        "BERT": transformers.BertForMaskedLM(transformers.BertConfig(**llama)),
        "OPT, Post-LN as OPT-350m": transformers.OPTForCausalLM(
            transformers.OPTConfig(**text, do_layer_norm_before=False)
        ),
        "Llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)),
    }
    rows = []
    for name, model in models.items():
        try:
            pre_rmsnorm(open_model(model.eval()))
            rows.append([name, "rewritten"])
        except LamellaError as error:
            rows.append([name, str(error)])
    run.table("What is refused", ["model", "with"], rows)
    kept = all(said != "rewritten" and "\n" not in said for _, said in rows)
    run.exact("Post-LN models and models with RMSNorm", "refused in one line each", kept, kept)


# 2: a trained model


def speller(run: Run, d: int, layers: int, steps: int) -> Model:
    """Train a character-level GPT-2 from scratch on documentation, with biases and a tied head."""
    samples = whole(prose("calibration", 4000, 128, run.seed))

    def build(folder: Path) -> dict[str, Any]:
        torch.manual_seed(run.seed)
        config = transformers.GPT2Config(
            vocab_size=len(LETTERS), n_embd=d, n_layer=layers, n_head=4, n_positions=512, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
        taught(model, samples, from_scratch(steps, lr=1e-3, batch=16, seed=run.seed)).save_pretrained(folder)
        return {"recipe": "gpt2 of characters", "steps": steps, "seed": run.seed}

    folder = build_once(f"reproduction-gpt2-letters-{layers}x{d}-{steps}-{run.seed}", build, 60)
    return open_model(transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval())


@torch.no_grad()
def trained_model(run: Run, d: int, layers: int, steps: int, new: int) -> None:
    model = speller(run, d, layers, steps)
    config = model.model.config
    test = prose("test", 64, 128, run.seed + 1)
    before = torch.tensor(nats(model.model, test)).exp()
    ids = torch.stack([sample["input_ids"][:32] for sample in test[:4]])
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    expected = model.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    whole_ = sum(each.numel() for each in model.model.parameters())
    table = config.vocab_size * d
    affine = 2 * (2 * layers + 1) * d
    columns = layers * (3 * d + d + 1 + 4 * d + 4 * d + 1) + 2 * config.vocab_size + config.n_positions
    predicted = {
        "RMS": whole_,
        "RMS, untied": whole_ + table,
        "RMS, affine folded": whole_ + table - affine + config.vocab_size,
        "CRMS": whole_ + table - affine + config.vocab_size - columns,
    }
    rows, same, close, counted = [], True, True, True
    for name, count in predicted.items():
        view = written(model, FORMS[name])
        after = torch.tensor(nats(view, test)).exp()
        tokens = bool(torch.equal(view.generate(ids, attention_mask=torch.ones_like(ids), **options), expected))
        found = sum(each.numel() for each in view.parameters())
        rows.append([name, f"{before:.4f}", f"{after:.4f}", tokens, found, count])
        same, close, counted = same and tokens, close and f"{before:.4f}" == f"{after:.4f}", counted and found == count
    columns_ = ["form", "perplexity before", "after", f"the same {new} tokens", "parameters", "predicted"]
    run.table(f"A GPT-2 of {whole_ / 1e6:.1f} M parameters, trained", columns_, rows)
    run.further("perplexity", "the same to four decimals", close, close)
    run.further(f"{new} tokens, greedily, with a cache", "the same", same, same)
    run.exact("parameters", "exactly those that follow from the shapes", counted, counted)


# 4: training


def trajectories(run: Run, d: int, steps: int) -> None:
    def fresh(dropout: float = 0.0) -> Model:
        torch.manual_seed(run.seed)
        config = transformers.GPT2Config(
            vocab_size=len(LETTERS), n_embd=d, n_layer=3, n_head=4, n_positions=64, resid_pdrop=dropout,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return open_model(transformers.GPT2LMHeadModel(config).double().eval())

    batches = [torch.stack([each["input_ids"] for each in prose("calibration", 8, 64, seed)]) for seed in range(steps)]

    def losses(model: Any, decay: float) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=decay)
        found = []
        with torch.enable_grad():
            for ids in batches:
                logits = model(input_ids=ids).logits  # the model's own loss would be in float32
                loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(float(loss.detach()))
        return found

    rows, ours, left = [], 0.0, 1.0
    for decay in (0.0, 0.1):
        expected = losses(fresh().model, decay)
        forms = {"reparametrised": trainable(fresh()), "recentred once": _own(written(fresh(), FORMS["RMS"]))}
        for name, model in forms.items():
            gap = max(abs(a - b) for a, b in zip(expected, losses(model, decay), strict=True))
            mean = "" if name == "reparametrised" else max(means(open_model(model), {"input_ids": batches[0]})["text"])
            rows.append([decay, name, gap, mean])
            ours, left = (max(ours, gap), left) if name == "reparametrised" else (ours, min(left, gap))
    run.table(f"{steps} steps of AdamW in float64, against Pre-LN",
              ["weight decay", "form", "largest difference of losses", "|mean| / rms at the end"], rows)  # fmt: skip
    run.main("losses of the reparametrised form", "within 1e-8 of Pre-LN's", f"{ours:.1e}", ours <= 1e-8)
    run.further("losses of the one recentred once", "leave those of Pre-LN", f"{left:.1e}", left > 1e-6)

    model = fresh(dropout=0.1)
    form, given = trainable(model), {"input_ids": batches[0]}
    still = distance(model.model, form, given)
    outputs = []
    for each in (model.model.train(), form.train()):
        torch.manual_seed(run.seed)
        with torch.no_grad():
            outputs.append(each(**given).logits)
    apart = float((outputs[0] - outputs[1]).abs().max())
    run.exact("with dropout, while evaluated", "at most 1e-10", f"{still:.1e}", still <= 1e-10)
    run.further("with dropout, while training", "another function", f"{apart:.2g}", apart > 1e-3)


def _own(model: Any) -> Any:
    return copy.deepcopy(model)


# 6: rotating the residual stream


def turning(run: Run, d: int) -> None:
    torch.manual_seed(run.seed)
    rows, good, bad = [], 0.0, float("inf")
    generator = torch.Generator().manual_seed(run.seed)
    turned, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))
    for kind, plain in kinds(d, 2).items():
        model = open_model(perturbed(plain, run.seed).model.double())
        given = probe(model, run.seed)
        rms = open_model(written(model, FOLDED))
        ours = distance(model.model, rotate(rms, turned), given)
        theirs = distance(model.model, rotate(_centring(rms), turned, nn.LayerNorm), given)
        rows.append([kind, f"{ours:.1e}", f"{theirs:.1e}"])
        good, bad = max(good, ours), min(bad, theirs)
    run.table("Rotated residual stream: relative difference of outputs", ["", "RMSNorm", "LayerNorm"], rows)
    run.further("turned with RMSNorm", "at most 1e-10", f"{good:.1e}", good <= 1e-10)
    run.further("turned with LayerNorm", "another function, above 1e-3", f"{bad:.1e}", bad > 1e-3)


def _centring(model: Model) -> Model:
    """Return the same model with LayerNorms, which are equivalent before any rotation."""
    view = share(model.model)
    for branch in find_branches(view, wirings_of(model.architectures), RMSNorm):
        for norm in branch.norms:
            layer = nn.LayerNorm(norm.module.normalized_shape, eps=norm.module.eps, elementwise_affine=False)
            # Both are None, except for a norm that no branch reads.
            layer.weight, layer.bias = norm.module.weight, norm.module.bias
            view.set_submodule(norm.path, layer)
    return open_model(view)


def experiment(run: Run) -> None:
    run.data = "random weights of real classes, with random affines; pydoc topics, by characters"
    sizes, depths = ((32,), (2,)) if run.quick else (SIZES, DEPTHS)
    run.part("exactness", exactness, sizes, depths)
    run.part("refusals", refusals)
    run.part("a trained model", trained_model, *((64, 2, 60, 50) if run.quick else (192, 6, 1500, 200)))
    run.part("training", trajectories, 32 if run.quick else 48, 12 if run.quick else 50)
    run.part("turning", turning, 32)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="one width and depth, a smaller trained model, fewer steps"))
