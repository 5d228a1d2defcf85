"""The time of norms, and the gain of a model from changing them: LayerNorm, RMSNorm and CRMSNorm, eager and compiled.

First norms alone, at two widths: torch's fused kernels, the same written in plain operations, and CRMSNorm. Then whole
models that differ only in their norms, and without any norm as the bound on possible savings. All alternate in one
process, and every value is a ratio to torch's own LayerNorm. There is no claim, so the only check is that the results
agree.

    python benchmarks/pre_rmsnorm.py            # about six minutes on one core, most of it compiling
    python benchmarks/pre_rmsnorm.py --quick    # one model of two layers, a few rounds
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from lamella.evaluate import turns
from lamella.methods.pre_rmsnorm import CRMSNorm, Form, RMSNorm
from lamella.methods.pre_rmsnorm.checking import output
from lamella.methods.pre_rmsnorm.rewrite import find_branches
from lamella.plan import RewriteReference
from lamella.plan.rewriting import wirings_of, with_rewrite
from lamella.results import Record
from lamella.stack import Model, open_model, share

WIDTHS = (576, 2048)
REFERENCE = "LayerNorm, fused"


class ByHand(nn.Module):
    """LayerNorm or RMSNorm in plain operations."""

    def __init__(self, centred: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.centred, self.eps = centred, eps

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def norms(record: Record, rounds: int) -> None:
    rows: dict[str, list[str]] = {}
    for width in WIDTHS:
        x = torch.randn(8, 256, width)
        x = x - x.mean(-1, keepdim=True)
        modules: dict[str, tuple[nn.Module, Tensor]] = {
            REFERENCE: (nn.LayerNorm(width, elementwise_affine=False), x),
            "LayerNorm, written out": (ByHand(True), x),
            "RMSNorm, fused": (nn.RMSNorm(width, eps=1e-5, elementwise_affine=False), x),
            "RMSNorm, written out": (ByHand(False), x),
            "CRMSNorm": (CRMSNorm(width - 1, 1e-5), x[..., :-1].contiguous()),
        }
        same = all(torch.allclose(m(u), modules[REFERENCE][0](x)[..., : u.shape[-1]], atol=1e-4)
                   for m, u in modules.values())  # fmt: skip
        record.check(f"outputs of the norms, width {width}", "the same", str(same), same)
        for compiled in (False, True):
            torch.compiler.reset()
            calls = {}
            for name, (module, given) in modules.items():
                run = torch.compile(module) if compiled else module
                calls[name] = lambda run=run, given=given: run(given)
            for name, ratio in turns(calls, REFERENCE, rounds).items():
                rows.setdefault(name, []).append(str(ratio))
    columns = [f"{width}, {how}" for width in WIDTHS for how in ("eager", "compiled")]
    record.table("Time of a norm on [8, 256, width], relative to LayerNorm: median (quartiles)",
                 ["", *columns], [[name, *cells] for name, cells in rows.items()])  # fmt: skip


def variants(model: Model) -> dict[str, Any]:
    """Return the original model, the rewritten one, and one without norms."""

    def written(form: Form) -> Any:
        return with_rewrite(model, RewriteReference(name="pre-rmsnorm", params=vars(form))).model

    bare = share(model.model)
    for branch in find_branches(bare, wirings_of(model.architectures)):
        for norm in branch.norms:
            bare.set_submodule(norm.path, nn.Identity())
    plain = written(Form(fold="affine", tied="untie"))
    by_hand = share(plain)
    for branch in find_branches(by_hand, wirings_of(model.architectures), RMSNorm):
        for norm in branch.norms:
            by_hand.set_submodule(norm.path, ByHand(False, norm.module.eps))
    return {
        REFERENCE: model.model,
        "RMSNorm, gain and bias kept": written(Form()),
        "RMSNorm, affine folded": plain,
        "RMSNorm written out, affine folded": by_hand,
        "CRMSNorm": written(Form(norm="crms", fold="affine", tied="untie")),
        "no norm": bare,
    }


def models(record: Record, layers: int, rounds: int, quick: bool) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2Config(n_embd=576, n_layer=layers, n_head=9, vocab_size=4096, bos_token_id=None, eos_token_id=None)
    vit = ViTConfig(hidden_size=192, num_hidden_layers=layers, num_attention_heads=3, intermediate_size=768)
    ids, pixels = torch.randint(4096, (1, 128)), torch.randn(1, 3, 224, 224)
    cases = {
        "GPT-2 of width 576, a prompt of 128": (GPT2LMHeadModel(gpt2), {"input_ids": ids, "use_cache": False}),
        "GPT-2 of width 576, a single token": (GPT2LMHeadModel(gpt2), {"input_ids": ids[:, :1], "use_cache": False}),
        "ViT-Tiny, an image of 224": (ViTForImageClassification(vit), {"pixel_values": pixels}),
    }
    if quick:
        cases = dict(list(cases.items())[-1:])
    rows: dict[str, list[str]] = {}
    for case, (plain, given) in cases.items():
        forms = variants(open_model(plain.eval()))
        expected = output(plain, given)
        same = all(torch.allclose(output(each, given), expected, atol=1e-3)
                   for name, each in forms.items() if name != "no norm")  # fmt: skip
        record.check(f"outputs of the models: {case}", "the same", str(same), same)
        for compiled in (False, True):
            torch.compiler.reset()
            calls = {}
            for name, each in forms.items():
                run = torch.compile(each.forward) if compiled else each
                calls[name] = lambda run=run, given=given: run(**given)
            for name, ratio in turns(calls, REFERENCE, rounds).items():
                rows.setdefault(name, []).append(str(ratio))
    columns = [f"{case}, {how}" for case in cases for how in ("eager", "compiled")]
    record.table(f"Time of a forward pass, {layers} layers, relative to LayerNorm: median (quartiles)",
                 ["", *columns], [[name, *cells] for name, cells in rows.items()])  # fmt: skip


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model of two layers, a few rounds")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    record = Record("pre_rmsnorm", "random inputs, random weights, float32", 0)
    norms(record, 5 if chosen.quick else 30)
    models(record, 2 if chosen.quick else 12, 5 if chosen.quick else 30, chosen.quick)
    return record.finish(Path(__file__).parent / "results" / f"pre_rmsnorm{'-quick' if chosen.quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
