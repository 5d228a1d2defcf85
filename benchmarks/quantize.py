"""Quantisation compared with pruning, on SmolLM2: the original and a model without some layers, each also in 8 bits.

Quantisation is the usual way to a smaller model, so both are measured in the same way: decode speed, size and
divergence from the original. This is done twice, since the program matters as much as the model: with llama.cpp, from
GGUF files written by Lamella, and with torch.

- llama.cpp is installed as a wheel, in a virtual environment in the cache folder. Its output is checked: it must
  tokenise text identically, and the file in 32 bits must continue it as transformers does. Divergences are over its
  whole vocabulary, from the original in 32 bits.
- In torch, int8 is measured in all available forms: with torchao, eager and compiled, and with torch's own kernel, as
  used by ``lamella.load``. Compiled forms decode with a static cache, so they are compared among themselves.

All models of a table alternate, and a speed is a ratio to the first with its quartiles. Finished parts are kept in the
cache folder, so that an interrupted run resumes.

    python benchmarks/quantize.py                 # about 15 minutes on 2 idle cores, most of it compiling
    python benchmarks/quantize.py --healed DIR    # also a healed checkpoint of the same pruned model
    python benchmarks/quantize.py --quick         # a nano model
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compiled import PROMPT, Decoder
from peers import environment_for, output_of, say
from torch import nn

import lamella
from lamella.evaluate import FidelityTest, Ratio, bench
from lamella.files import Finished
from lamella.plan import ModelReference, Plan
from lamella.plan.export import export
from lamella.plan.quantize import int8_copy
from lamella.results import Record
from lamella.stack import share
from lamella.zoo import open_tokenizer, resolve
from lamella.zoo.cache import cache_folder

HERE = Path(__file__).parent
MODEL = "smollm2"
KINDS = ("f32", "bf16", "q8_0")
CONTINUED = 24  # tokens of a continuation that must be equal in llama.cpp and transformers
SCORED = (4, 48, 12)  # texts, tokens of each, and compared tokens at the end of each

# Queries of llama.cpp; a server's threads wait for requests, so a process that opens one ends with os._exit.
ASKING = """
import json, math, os, sys, time, urllib.request
import xllamacpp
def opened(path, flash=True):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = path, 512, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given["threads"]
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if not flash:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)
def ask(server, ids, count, **more):
    request = {"prompt": ids, "max_tokens": count, "temperature": 0.0, "ignore_eos": True}
    return server.handle_completions({**request, **more})
def predicted(server, ids):
    answer = ask(server, ids, 1, logprobs=given["vocabulary"], n_probs=given["vocabulary"])
    tops = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {each["id"]: each["logprob"] for each in tops}
def continued(server, ids, count):
    answer = ask(server, ids, count, logprobs=1, n_probs=1)
    return [each["id"] for each in answer["choices"][0]["logprobs"]["content"]]
"""
# Reads JSON from stdin: files by name, tokens and texts; prints JSON as its last line.
LLAMA_CPP = (
    ASKING
    + """
given = json.load(sys.stdin)
def tokens_of(server, text):
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    request = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["tokens"]
servers = {name: opened(path) for name, path in given["files"].items()}
seconds = {name: [] for name in servers}
for round_ in range(given["rounds"] + 1):
    for name, server in servers.items():
        timings = ask(server, given["prompt"], given["steps"], cache_prompt=False)["timings"]
        if round_:
            seconds[name].append(timings["predicted_ms"] / 1e3 / timings["predicted_n"])
first = next(iter(servers))
found = {name: {"kl": [], "nats": [], "top1": []} for name in servers}
for text in given["scored"]:
    for place in range(len(text) - given["last"], len(text)):
        base = predicted(servers[first], text[:place])
        for name, server in servers.items():
            ours = base if name == first else predicted(server, text[:place])
            lowest = min(ours.values())
            found[name]["kl"].append(sum(math.exp(p) * (p - ours.get(i, lowest)) for i, p in base.items()))
            found[name]["nats"].append(-ours.get(text[place], lowest))
            found[name]["top1"].append(max(ours, key=ours.get) == max(base, key=base.get))
print()
print(json.dumps({
    "seconds": seconds, "found": found,
    "tokens": [tokens_of(servers[first], text) for text in given["texts"]],
    "continued": continued(servers[first], given["prompt"], given["continued"]),
}))
sys.stdout.flush()
os._exit(0)
"""
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healed", type=Path, help="a checkpoint of the cut that was healed")
    parser.add_argument("--quick", action="store_true", help="a nano model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    name = f"quantize{'-quick' if arguments.quick else ''}"
    work = cache_folder() / "benchmarks" / name
    work.mkdir(parents=True, exist_ok=True)
    source = HERE.parent / "tests" / "models" / "nano-llama" if arguments.quick else Path(resolve(MODEL))
    steps, rounds = (16, 3) if arguments.quick else (32, 9)

    python = environment_for(HERE / "quantize-requirements.txt")
    stack, tokenizer = lamella.open(source), open_tokenizer(source)
    text = lamella.load_text("pydoc", "test")
    windows = lamella.windows(tokenizer, text, 8, 256, arguments.seed)
    folders = {"original": source, "cut": cut(stack, work / "cut", tokenizer)}
    if arguments.healed:
        folders["healed"] = arguments.healed
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the start"
    record = Record("quantize", f"test: {text.provenance(windows)}; {load}", arguments.seed)

    files = {
        f"{model}, {kind}": gguf_file(folder, work / f"{model}-{kind}", kind)
        for model, folder in folders.items()
        for kind in KINDS
    }
    finished = Finished(work / "finished.jsonl", {"text": text.provenance(windows), "healed": bool(arguments.healed)})
    by_llama = finished.once("llama.cpp", lambda: llama_cpp(python, files, stack, windows, text, steps, rounds))
    report_llama(record, by_llama, files, version_of(python))
    check_answers(record, by_llama, stack, tokenizer, windows, text)
    by_torch = finished.once("torch", lambda: eagerly(folders, windows, steps // 2, rounds))
    report_torch(record, by_torch)
    report_compiled(record, finished.once("compiled", lambda: compiled(folders, steps)))
    status = record.finish(HERE / "results" / f"{name}.json")
    shutil.rmtree(work)
    return status


def cut(stack: lamella.Stack, folder: Path, tokenizer: Any) -> Path:
    """Return the checkpoint of `make demo`: without some layers, 1.3 times as fast; for a nano model, its second."""
    if not folder.exists():
        chosen = json.loads((HERE / "results" / "demo.json").read_text(encoding="utf-8"))["chosen"]
        drop = chosen["drop"] if len(stack) > len(chosen["drop"]) else ["layers.1"]
        export(stack, Plan(model=ModelReference.of(stack), drop=drop), folder, tokenizer=tokenizer)
    return folder


def gguf_file(folder: Path, out: Path, kind: str) -> Path:
    if not out.exists():
        say(f"writing {out.name}")
        lamella.run("quantize", folder, kind=kind, out=out)
    [file] = out.glob("*.gguf")
    return file


# With llama.cpp.


def version_of(python: Path) -> str:
    code = "from importlib.metadata import version; print(version('xllamacpp'))"
    return output_of([str(python), "-c", code]).strip()


def llama_cpp(
    python: Path,
    files: dict[str, Path],
    stack: lamella.Stack,
    windows: torch.Tensor,
    text: str,
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    count, length, last = SCORED
    given = {
        "files": {name: str(file) for name, file in files.items()},
        "threads": torch.get_num_threads(),
        "vocabulary": stack.config.vocab_size,
        "prompt": windows[0, :PROMPT].tolist(),
        "steps": steps,
        "rounds": rounds,
        "continued": CONTINUED,
        "scored": windows[:count, :length].tolist(),
        "last": last,
        "texts": samples(text),
    }
    answer: dict[str, Any] = json.loads(output_of([str(python), "-c", LLAMA_CPP], json.dumps(given)).splitlines()[-1])
    return answer


def samples(text: str) -> list[str]:
    """Return texts that must be tokenised identically."""
    pieces = [text[at : at + 2000] for at in range(0, 20_000, 2000)]
    unusual = [
        "naïve café, 日本語, 😀",
        "  two  spaces\n\n\tand 12345.678",
        "don't I'LL",
        "<|im_start|>user\nHi<|im_end|>",
    ]
    return pieces + unusual


def report_llama(record: Record, found: dict[str, Any], files: dict[str, Path], version: str) -> None:
    first = next(iter(files))
    rows, ratios = [], {}
    for name, file in files.items():
        seconds = found["seconds"]
        ratios[name] = Ratio.of([a / b for a, b in zip(seconds[first], seconds[name], strict=True)])
        kl, nats, top1 = (torch.tensor(found["found"][name][what]).double() for what in ("kl", "nats", "top1"))
        rows.append(
            [
                name,
                file.stat().st_size / 1e6,
                file_ratio(files[first], file),
                1 / float(torch.tensor(seconds[name]).median()),
                str(ratios[name]),
                float(kl.mean()),
                float(nats.mean().exp()),
                100 * float(top1.mean()),
            ]
        )
    columns = ["model", "MB on disk", "reduction factor", "tokens/s", "decode speed-up (quartiles)"]
    columns += ["KL (nats)", "perplexity", "same top token (%)"]
    positions = SCORED[0] * SCORED[2]
    record.table(f"By llama.cpp (xllamacpp {version}), {positions} positions scored", columns, rows)
    both, cut_alone, alone = (ratios[name].median for name in ("cut, q8_0", "cut, f32", "original, q8_0"))
    record.check("q8_0 of the original", "faster than 32 bits", str(ratios["original, q8_0"]), alone > 1)
    record.check("cut and q8_0", "faster than either alone", str(ratios["cut, q8_0"]), both > max(alone, cut_alone))


def file_ratio(first: Path, file: Path) -> float:
    return first.stat().st_size / file.stat().st_size


@torch.no_grad()
def check_answers(
    record: Record, found: dict[str, Any], stack: lamella.Stack, tokenizer: Any, windows: torch.Tensor, text: str
) -> None:
    ours = [tokenizer(each, add_special_tokens=False).input_ids for each in samples(text)]
    same = sum(a == b for a, b in zip(ours, found["tokens"], strict=True))
    record.check("texts that llama.cpp tokenises identically", f"{len(ours)}", same, same == len(ours))
    prompt = windows[:1, :PROMPT]
    settings = {"max_new_tokens": CONTINUED, "min_new_tokens": CONTINUED, "do_sample": False}
    written = stack.model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, PROMPT:].tolist()
    agreeing = next((i for i, (a, b) in enumerate(zip(written, found["continued"], strict=True)) if a != b), CONTINUED)
    name = "equal tokens of llama.cpp's and transformers' continuations, in 32 bits"
    record.check(name, str(CONTINUED), agreeing, agreeing == CONTINUED)


# With torch.


def torchao_copy(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy with its linear layers quantised by torchao, except the head."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    copied = in_precision(model, dtype)
    head = copied.get_output_embeddings()
    quantize_(copied, Int8WeightOnlyConfig(), filter_fn=lambda each, name: type(each) is nn.Linear and each is not head)
    return copied


def in_precision(model: Any, dtype: torch.dtype) -> Any:
    keep = {id(each): nn.Parameter(each.detach().to(dtype), requires_grad=False) for each in model.parameters()}
    return share(model, keep=keep)


FORMS: dict[str, Callable[[Any], Any]] = {
    "float32": lambda model: model,
    "bfloat16": lambda model: in_precision(model, torch.bfloat16),
    "int8, torch's kernel, bfloat16": int8_copy,
    "int8, torchao, float32": lambda model: torchao_copy(model, torch.float32),
    "int8, torchao, bfloat16": lambda model: torchao_copy(model, torch.bfloat16),
}


def eagerly(folders: dict[str, Path], windows: torch.Tensor, steps: int, rounds: int) -> dict[str, Any]:
    opened = {name: lamella.open(folder) for name, folder in folders.items()}
    models = {f"{name}, {form}": make(each.model) for name, each in opened.items() for form, make in FORMS.items()}
    timings = bench(models, prompt=PROMPT, tokens=steps, rounds=rounds)
    test = FidelityTest(opened["original"], windows)
    found = {}
    for name, model in models.items():
        timing, fidelity = timings[name][0], test.of(model)
        found[name] = {
            "megabytes": sum(each.numel() * element_size(each) for each in model.parameters()) / 1e6,
            "milliseconds": 1e3 * timing.as_dict()["decode_seconds_per_step"],
            "decode": str(timing.decode_speedup),
            "prefill": str(timing.prefill_speedup),
            "kl": str(fidelity.kl),
            "perplexity": str(fidelity.perplexity),
            "median": timing.decode_speedup.median,
        }
    return found


def element_size(parameter: Any) -> int:
    """Return the size in bytes; torchao's tensors report that of the dequantised values."""
    return 1 if hasattr(parameter, "qdata") else int(parameter.element_size())


def report_torch(record: Record, found: dict[str, Any]) -> None:
    whats = ("megabytes", "milliseconds", "decode", "prefill", "kl", "perplexity")
    columns = ["model", "MB of weights", "ms per step", "decode speed-up (quartiles)", "prefill speed-up", "KL (nats)"]
    rows = [[name, *(each[what] for what in whats)] for name, each in found.items()]
    record.table("By torch, eagerly", [*columns, "perplexity"], rows)
    ours, eager = (found[f"original, int8, {how}"] for how in ("torch's kernel, bfloat16", "torchao, float32"))
    record.check("int8 on torch's kernel", "faster than float32", ours["decode"], ours["median"] > 1)
    record.check(
        "int8 on torch's kernel, and by torchao eagerly", "the kernel is faster",
        f"{ours['decode']} and {eager['decode']}", ours["median"] > eager["median"],
    )  # fmt: skip


@torch.no_grad()
def compiled(folders: dict[str, Path], steps: int) -> dict[str, Any]:
    """Return the seconds of each step with a static cache, of all models alternately."""
    warm = 8  # the first steps compile
    prompt = torch.randint(256, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    decoders, compile_seconds = {}, {}
    for name, folder in folders.items():
        model = lamella.open(folder).model
        forms: dict[str, tuple[Any, bool]] = {
            "float32, eager": (model, False),
            "float32, compiled": (model, True),
            "bfloat16, compiled": (in_precision(model, torch.bfloat16), True),
            "int8, torchao, bfloat16, compiled": (torchao_copy(model, torch.bfloat16), True),
        }
        for form, (changed, fast) in forms.items():
            begin = time.perf_counter()
            decoder = Decoder(changed, prompt, warm + steps, fast)
            for _ in range(warm):
                decoder.decode()
            decoders[f"{name}, {form}"], compile_seconds[f"{name}, {form}"] = decoder, time.perf_counter() - begin
    for _ in range(steps):
        for decoder in decoders.values():
            decoder.decode()
    return {
        name: {"seconds": decoder.seconds[warm:], "first": compile_seconds[name]} for name, decoder in decoders.items()
    }


def report_compiled(record: Record, found: dict[str, Any]) -> None:
    first = next(iter(found.values()))["seconds"]
    rows = []
    for name, each in found.items():
        ratio = Ratio.of([a / b for a, b in zip(first, each["seconds"], strict=True)])
        rows.append([name, 1e3 * float(torch.tensor(each["seconds"]).median()), str(ratio), each["first"]])
    columns = ["model", "ms per step", "decode speed-up (quartiles)", "seconds to the first step"]
    record.table("By torch, with a static cache", columns, rows)


if __name__ == "__main__":
    raise SystemExit(main())
