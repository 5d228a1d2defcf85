"""Compatibility of exports with other programs: each opens them in its own environment and must match Lamella's output.

A model is pruned by whole layers and by single sublayers, and one of the results is healed with merged adapters; each
is exported in its supported forms. Every program is given the folder, or the result of its own conversion: a GGUF file
written by ``lamella quantize``, an ONNX file written by ``optimum`` or torch. It returns the log-probability of each
next token of a text and a greedy continuation, in 32 bits. Both are compared with Lamella's own model: the original
with the plan applied, independent of any export. This detects programs that open an export but compute a different
model, which is worse than refusing it.

Every program runs in a virtual environment in the cache folder, made from a requirements file in this folder. A program
that cannot be installed, or does not read an export, is listed with the reason.

Programs may depend on config values that differ from the defaults of another version, so the nano model has the rotary
base of larger ones.

    python benchmarks/outside.py                                        # after installing, some minutes
    python benchmarks/outside.py --model nano-llama --model smollm2     # also a real model
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import HERE, PeerFailed, environment_for, output_of, run_child, say
from quantize import ASKING
from torch import Tensor

import lamella
from lamella.errors import LamellaError
from lamella.plan import ModelReference, Plan
from lamella.plan.export import export
from lamella.results import Record
from lamella.zoo import open_config, open_tokenizer, resolve

SAME = 1e-3  # nats, maximum difference of a log-probability from Lamella's
LENGTH, CONTINUED = 48, 16  # tokens of the text, and of its greedy continuation
ROTARY = 100_000.0  # base of the nano model's rotary embedding; the default of transformers 4 is 10,000
LAYERS = ["layers.2", "layers.4"]
SUBLAYERS = ["layers.0.attn", "layers.3.mlp", "layers.4"]
NANO = "nano-llama"
CASES = {  # the exports: pruning and form
    "plain": (LAYERS, "plain"),
    "plain, healed": (LAYERS, "plain"),
    "portable": (SUBLAYERS, "portable"),
    "native": (SUBLAYERS, "native"),
}
EVERYWHERE = ("plain", "plain, healed", "portable")  # ordinary checkpoints of their family
HEALING = {"sequences": 16, "length": 64, "steps": 4, "batch": 2, "lora": 4, "lr": 1e-3}

# Children read JSON from stdin and define answers(source, ids), which gives the log-probability of every token of ids
# but the first, and the greedy continuation, or None if the program has none. See peers.PRELUDE.
ANSWERING = """
try:
    found, written = answers(given["source"], given["ids"])
except Exception as error:
    lines = [line.strip() for line in str(error)[:2000].splitlines() if line.strip()]
    answer(refused=f"{type(error).__name__}: {(lines or [''])[0]}")
else:
    answer(logprobs=found, continued=written)
sys.stdout.flush()
os._exit(0)  # even if threads are still running
"""
SCORING = """
import torch
torch.set_num_threads(given["threads"])
settings = {"max_new_tokens": given["count"], "min_new_tokens": given["count"], "do_sample": False}
def score(logits, ids):
    return torch.as_tensor(logits)[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
@torch.no_grad()
def both(model, ids):
    row = torch.tensor([ids])
    written = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **settings)
    return score(model(input_ids=row, attention_mask=torch.ones_like(row)).logits, ids), written[0, len(ids):].tolist()
"""
TRANSFORMERS = (
    SCORING
    + """
from transformers import AutoModelForCausalLM
def opened(source):
    return AutoModelForCausalLM.from_pretrained(source, trust_remote_code=given["native"]).eval().float()
def answers(source, ids):
    return both(opened(source), ids)
"""
)
OPTIMUM = (
    SCORING
    + """
import tempfile
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
def answers(source, ids):
    with tempfile.TemporaryDirectory() as out:
        task = "text-generation-with-past"
        main_export(source, out, task=task, do_validation=False, trust_remote_code=given["native"])
        return both(ORTModelForCausalLM.from_pretrained(out), ids)
"""
)
ONNX = (
    TRANSFORMERS
    + """
import tempfile
import onnxruntime
class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits
def answers(source, ids):
    row = torch.tensor([ids])
    with tempfile.TemporaryDirectory() as out:
        file = f"{out}/model.onnx"
        shapes = {"input_ids": {1: torch.export.Dim("length", max=4096)}}
        program = torch.onnx.export(Logits(opened(source)), (row[:, :-3],), dynamo=True, dynamic_shapes=shapes)
        program.save(file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return score(session.run(None, {"input_ids": row.numpy()})[0], ids), None
"""
)
LLAMA_CPP = (
    ASKING
    + """
def answers(source, ids):
    server = opened(source, flash=False)  # which computes in half precision
    found = [predicted(server, ids[:place])[ids[place]] for place in range(1, len(ids))]
    return found, continued(server, ids, given["count"])
"""
)
VLLM = """
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
from vllm import LLM, SamplingParams
def answers(source, ids):
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "skip_tokenizer_init": True}
    model = LLM(source, trust_remote_code=given["native"], **settings)
    asked = SamplingParams(
        temperature=0.0, max_tokens=given["count"], ignore_eos=True, prompt_logprobs=0, detokenize=False
    )
    output = model.generate({"prompt_token_ids": ids}, asked)[0]
    found = [output.prompt_logprobs[place][ids[place]].logprob for place in range(1, len(ids))]
    return found, list(output.outputs[0].token_ids)
"""


@dataclass(frozen=True)
class Program:
    """A program that opens exports.

    Attributes:
        packages: packages whose versions are recorded, the program's own first.
        requirements: the requirements file of its environment.
        code: the code that it runs; see ``ANSWERING``.
        reads: the cases that it should support.
        gguf: whether it is given the export as a GGUF file.
    """

    packages: tuple[str, ...]
    requirements: str
    code: str
    reads: tuple[str, ...] = EVERYWHERE
    gguf: bool = False


PROGRAMS = {
    "transformers 5": Program(("transformers", "torch"), "peers-requirements.txt", TRANSFORMERS, tuple(CASES)),
    "transformers 4": Program(("transformers", "torch"), "peers-requirements-short-transformers.txt", TRANSFORMERS),
    "vLLM": Program(("vllm-cpu", "torch", "transformers"), "outside-requirements-vllm.txt", VLLM),
    "llama.cpp": Program(("xllamacpp",), "quantize-requirements.txt", LLAMA_CPP, gguf=True),
    "optimum": Program(("optimum-onnx", "onnxruntime", "transformers"), "outside-requirements-optimum.txt", OPTIMUM),
    "ONNX Runtime": Program(
        ("onnxruntime", "torch", "transformers"), "outside-requirements-onnx.txt", ONNX, tuple(CASES)
    ),
}


@dataclass(frozen=True)
class Case:
    """An export, with the reference output of Lamella's own model.

    Attributes:
        folder: the export.
        logprobs: of every token of the text but the first, in nats.
        continued: the greedy continuation.
    """

    folder: Path
    logprobs: list[float]
    continued: list[int]


@dataclass(frozen=True)
class Read:
    """The result of one program on one export.

    Attributes:
        difference: the largest difference of a log-probability, in nats; None if it was not read.
        alike: number of equal tokens at the start of the continuation; None without one.
        why: the reason if it was not read.
    """

    difference: float | None = None
    alike: int | None = None
    why: str = ""

    @property
    def same(self) -> bool:
        """Whether it was read, and matches Lamella's model."""
        return self.difference is not None and self.difference <= SAME and self.alike in (None, CONTINUED)

    @property
    def state(self) -> str:
        return "no" if self.difference is None else "yes" if self.same else "as another model"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="another model: a zoo name or a folder; repeat it for several")
    parser.add_argument("--seed", type=int, default=0, help="of the text and of the healing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = Record("outside", "", arguments.seed)
    record.data = "; ".join(measure(record, model) for model in arguments.model or [NANO])
    return record.finish(HERE / "results" / "outside.json")


def measure(record: Record, model: str) -> str:
    """Let every program read the exports of one model, and return a description of the run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = nano(folder / NANO) if model == NANO else Path(resolve(model))
        text = lamella.load_text("pydoc", "test")
        tokens = lamella.windows(open_tokenizer(source), text, 1, LENGTH, record.seed)
        cases = exported(source, folder, tokens, record.seed)
        report(record, model, {program: run_program(program, cases, tokens) for program in PROGRAMS})
    return f"{model}: {text.provenance(tokens)}"


# Exports and reference outputs.


def nano(folder: Path) -> Path:
    """Return the nano model of the tests with another rotary base."""
    shutil.copytree(HERE.parent / "tests" / "models" / NANO, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"]["rope_theta"] = ROTARY
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def exported(source: Path, folder: Path, tokens: Tensor, seed: int) -> dict[str, Case]:
    """Export every case, with the reference output of the original under its plan, or of the healed checkpoint."""
    model, tokenizer, cases = lamella.open(source), open_tokenizer(source), {}
    for case, (drop, form) in CASES.items():
        say(f"writing {case}")
        plan, out = Plan(model=ModelReference.of(model), drop=drop), folder / re.sub(r"\W+", "-", case)
        if case == "plain, healed":
            lamella.run("heal", model, plan=plan, out=out, seed=seed, **HEALING)
            cut = lamella.open(out).model
        else:
            export(model, plan, out, form=form, tokenizer=tokenizer)
            cut = lamella.apply(model, plan)
        cases[case] = Case(out, *own_answers(cut, tokens))
    return cases


@torch.no_grad()
def own_answers(model: Any, tokens: Tensor) -> tuple[list[float], list[int]]:
    """Return log-probabilities of a text [1, length] from its second token on, and its greedy continuation."""
    mask = torch.ones_like(tokens)
    logprobs = model(input_ids=tokens, attention_mask=mask).logits[0, :-1].float().log_softmax(-1)
    settings = {"max_new_tokens": CONTINUED, "min_new_tokens": CONTINUED, "do_sample": False}
    written = model.generate(tokens, attention_mask=mask, **settings)
    return logprobs.gather(1, tokens[0, 1:, None])[:, 0].tolist(), written[0, tokens.shape[1] :].tolist()


# Results of the programs.


@dataclass(frozen=True)
class ProgramResults:
    """The results of one program on every case; ``version`` is empty if it could not be installed."""

    version: str
    read: dict[str, Read]


def run_program(name: str, cases: dict[str, Case], tokens: Tensor) -> ProgramResults:
    """Install a program and let it read every case."""
    program = PROGRAMS[name]
    try:
        python = environment_for(HERE / program.requirements)
        version = versions_in(python, program.packages)
    except PeerFailed as failure:
        return ProgramResults("", dict.fromkeys(cases, Read(why=f"cannot be installed: {failure}")))
    found = {}
    for case in cases:
        found[case] = read(python, program, cases[case], case, tokens[0].tolist())
        say(f"{name}, {case}: {found[case]}")
    return ProgramResults(version, found)


def versions_in(python: Path, packages: tuple[str, ...]) -> str:
    """Return the versions of packages in an environment, without the first one's name."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    own, *others = output_of([str(python), "-c", code, *packages]).split()
    further = ", ".join(f"{name} {version}" for name, version in zip(packages[1:], others, strict=True))
    return f"{packages[0]} {own}" + (f" with {further}" if further else "")


def read(
    python: Path, program: Program, case: Case, form: str, ids: list[int], run: Callable[..., Any] = run_child
) -> Read:
    """Let a program read an export and compare its answers."""
    source = case.folder
    try:
        if program.gguf:
            out = case.folder.with_name(f"{case.folder.name}-f32")
            source = out / lamella.run("quantize", case.folder, kind="f32", out=out).result.findings["file"]
        inputs = {"source": str(source), "ids": ids, "count": CONTINUED, "native": form == "native"}
        output = run(
            python, program.code + ANSWERING, threads=1, vocabulary=open_config(case.folder).vocab_size, **inputs
        )
    except LamellaError as error:
        return Read(why=f"lamella quantize: {one_line(str(error), case.folder)}")
    except PeerFailed as failure:
        return Read(why=one_line(str(failure), case.folder))
    if "refused" in output:
        return Read(why=one_line(output["refused"], case.folder))
    return compared(case, output["logprobs"], output["continued"])


def compared(case: Case, logprobs: list[float], continued: list[int] | None) -> Read:
    """Return the differences between a program's and Lamella's answers."""
    pairs = list(zip(case.logprobs, logprobs, strict=True))
    difference = max(abs(ours - theirs) for ours, theirs in pairs)
    if not all(theirs == theirs for _, theirs in pairs):
        difference = float("inf")
    if continued is None:
        return Read(difference)
    same = [ours == theirs for ours, theirs in zip(case.continued, continued, strict=True)]
    return Read(difference, same.index(False) if False in same else len(same))


def one_line(reason: str, folder: Path) -> str:
    """Return a reason without paths of this machine, shortened for a table."""
    here = reason.replace(f"{folder}/", "").replace(str(folder), "FOLDER")
    here = re.sub(r"\s*\(/[^)]*\)?", "", here)
    return re.sub(r"(?<!\S)/\S*/", "", here)[:200]  # other paths are shortened to their last part


def report(record: Record, model: str, results: dict[str, ProgramResults]) -> None:
    """Add the table of results and the checks on them."""
    rows = [
        [name, each.version, case, found.state, found.difference, found.alike, found.why]
        for name, each in results.items()
        for case, found in each.read.items()
    ]
    columns = ["program", "version", "export", "reads it", "largest difference (nats)"]
    columns += [f"same tokens of {CONTINUED}", "reason"]
    what = f"{LENGTH - 1} log-probabilities and {CONTINUED} greedy tokens, in 32 bits"
    record.table(f"What each program reads of {model}: {what}", columns, rows)
    for name, each in results.items():
        if not each.version:
            continue
        expected = PROGRAMS[name].reads
        right = [case for case in expected if each.read[case].same]
        record.check(
            f"{name} reads {model}", "; ".join(expected), "; ".join(right) or "none", len(right) == len(expected)
        )
        wrong = [case for case, found in each.read.items() if found.state == "as another model"]
        record.check(f"{name} reads {model} as another model", "none", "; ".join(wrong) or "none", not wrong)


if __name__ == "__main__":
    raise SystemExit(main())
