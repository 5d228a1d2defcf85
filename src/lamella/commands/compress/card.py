"""The model card of an exported checkpoint."""

from __future__ import annotations

import json
from typing import Any

from lamella import formatting
from lamella.commands.compress import tasks, tradeoff
from lamella.commands.compress.report import COSTS, fate, gone, guaranteed, narrower, verdict
from lamella.report.drawing import STRIPED
from lamella.report.page import finite
from lamella.results.page import inline

LOADING = {
    "plain": (
        "An ordinary checkpoint: any tool that supports the original's architecture opens it, without Lamella.",
        'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("FOLDER")',
    ),
    "portable": (
        "An ordinary checkpoint whose removed sublayers are zeroed: the same function in any tool, at the original's "
        "size and speed. The speed-ups below are those of the native form.",
        'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("FOLDER")',
    ),
    "native": (
        "The folder contains its own modelling file, which transformers executes with trust_remote_code=True; it does "
        "not need Lamella.",
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)',
    ),
    "llama.cpp": (
        "The GGUF file runs in llama.cpp and in programs that are based on it. It has the weights of the checkpoint "
        "beside it, which any tool opens that supports the original's architecture.",
        "llama-cli -m FOLDER/FILE",
    ),
    "phased": (
        "The plan treats the prompt and the generated tokens differently, so Lamella applies it. Without Lamella the "
        "weights load as the unchanged original.",
        'import lamella\n\nmodel = lamella.load("FOLDER").model',
    ),
}


def model_card(evidence: dict[str, Any]) -> str:
    """Return the ``README.md`` of an exported checkpoint: YAML front matter, changes, measurements and limits.

    Args:
        evidence: the evidence of ``lamella compress``, schema ``lamella.evidence/2``.
    """
    evidence = finite(evidence)
    chosen = evidence["chosen"]
    phased = any(state in STRIPED for layer in evidence["layers"] for state in layer.values())
    is_file = evidence["runtime"]["name"] == "llama.cpp"
    note, code = LOADING["llama.cpp" if is_file else "phased" if phased else chosen["form"]]
    language = "console" if is_file else "python"
    code = code.replace("FILE", evidence.get("quantised", {}).get("output", ""))
    reached = "reached" if chosen["reached"] else "**not reached**"
    method = f"`{inline(chosen['method'])}`"
    sections = [
        _front_matter(evidence),
        f"# {inline(evidence['model']['name'])}, compressed with {inline(chosen['method'])}",
        inline(" ".join(filter(None, [tradeoff.reason(evidence), verdict(evidence)]))),
        "## What was done",
        f"{method} planned for {evidence['goal']['text']}, which was {reached}. "
        f"{_planned(evidence)} {_trained(evidence)}",
        "## Loading",
        f"{note} FOLDER is this folder.",
        f"```{language}\n{code}\n```",
        "## Measured",
        _table(evidence),
        f"Fidelity on {chosen['fidelity']['positions']} positions of {chosen['fidelity']['sequences']} sequences, "
        "± one standard error. Speed-ups are medians of interleaved runs in one process, with their quartiles.",
        *tradeoff.where(evidence),
        *([guaranteed(evidence)] if evidence.get("agreement") else []),
        *_scored(evidence),
        *_routes(evidence),
        *(inline(note) for note in evidence["notes"]),
        "## Limits",
        "- The figures hold for the text, the machine and the batch sizes named here; a speed-up is smaller where the "
        "head or the loop around the model takes a larger share of the time.\n"
        "- Perplexity on one text says little about skills: evaluate the tasks that you need before you rely on it.\n"
        "- It inherits the original's licence, its intended uses and its biases.",
        "## Reproducing",
        _reproduction(evidence),
    ]
    return "\n\n".join(sections) + "\n"


def _planned(evidence: dict[str, Any]) -> str:
    sentences = [f"Layers are narrower than in the original: {narrower(evidence)}."] if narrower(evidence) else []
    if gone(evidence) or not sentences:
        sentences.append(
            f"{gone(evidence)} of {sum(map(len, evidence['layers']))} sublayers are {fate(evidence)}: "
            f"{inline(', '.join(_sites(evidence)) or 'none')}. (A sublayer is a layer's attention or its MLP, with "
            "its norm and residual addition.)"
        )
    return " ".join(sentences)


def _trained(evidence: dict[str, Any]) -> str:
    if "healing" not in evidence:
        return "No weight was trained."
    healing = evidence["healing"]
    text, steps = inline(healing["data"]["training"]["data"]), healing.get("settings", {}).get("steps")
    return f"Then `{inline(healing['method'])}` healed it on {text}{f', in {steps} steps' if steps else ''}."


def _front_matter(evidence: dict[str, Any]) -> str:
    """Return the front matter; JSON strings are valid YAML strings."""
    pruning = "width-pruning" if narrower(evidence) else "layer-pruning"
    tags = ["lamella", "compressed", pruning, evidence["chosen"]["method"]]
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    lines += [
        f"base_model: {json.dumps(evidence['model']['name'])}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    return "\n".join(["---", *lines, "---"])


def _sites(evidence: dict[str, Any]) -> list[str]:
    sites = []
    for index, layer in enumerate(evidence["layers"]):
        cut = [name for name, state in layer.items() if state != "kept"]
        sites += [f"layers.{index}"] if len(cut) == len(layer) else [f"layers.{index}.{name}" for name in cut]
    return sites


def _table(evidence: dict[str, Any]) -> str:
    base, chosen = evidence["base"], evidence["chosen"]
    fidelities = [each["fidelity"] for each in (chosen, evidence.get("healing")) if each]
    rows: list[tuple[str, ...]] = [
        (
            "perplexity",
            formatting.estimate(chosen["fidelity"]["base_perplexity"]),
            *(formatting.estimate(each["perplexity"]) for each in fidelities),
        ),
        ("KL from the original, nats", "", *(formatting.estimate(each["kl"]) for each in fidelities)),
        ("same top token", "", *(formatting.percent(each["top1"]["mean"]) for each in fidelities)),
    ]
    for other in evidence.get("healing", {}).get("unseen", ()):
        kls = [formatting.estimate(other["fidelity"][when]["kl"]) for when in ("cut", "healed")]
        rows.append((f"KL on {inline(other['text']['data'])}, not seen in training", "", *kls))
    for before, after in zip(base["timings"], chosen["timings"], strict=True):
        for what, seconds in (("decode", "decode_seconds_per_step"), ("prefill", "prefill_seconds")):
            speed = after[f"{what}_speedup"]
            ratio = f"{formatting.ratio(speed['median'])} ({formatting.spread(speed)})"
            measured = f"{formatting.duration(after[seconds])}: {ratio}"
            rows.append((f"{what}, batch {after['batch']}", formatting.duration(before[seconds]), measured))
    rows.append(("decode speed-up by the cost model", "", formatting.ratio(chosen["predicted_speedup"])))
    rows += [(label, unit(base["cost"][name]), unit(chosen["cost"][name])) for name, label, unit in COSTS]
    if base.get("memory") and chosen.get("memory"):
        original, ours = (formatting.size(each["memory"]["peak_bytes"]) for each in (base, chosen))
        rows.append(("peak memory, without that of the libraries", original, ours))
    columns = ["", "original", "cut", "healed: this model"] if "healing" in evidence else ["", "original", "this model"]
    filled = [[*row, *[""] * (len(columns) - len(row))] for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in filled)


def _scored(evidence: dict[str, Any]) -> list[str]:
    """Return the section on tasks, if there were any."""
    rows = [[inline(cell) for cell in row] for row in tasks.rows(evidence)]
    if not rows:
        return []
    lines = [tasks.columns(evidence), ["---"] * len(rows[0]), *rows]
    return ["## Tasks", "\n".join(f"| {' | '.join(row)} |" for row in lines)]


def _routes(evidence: dict[str, Any]) -> list[str]:
    """Return the section on all routes, if they were measured."""
    rows = tradeoff.rows(evidence)
    if not rows:
        return []
    lines = [tradeoff.columns(evidence), ["---"] * len(rows[0]), *rows]
    table = "\n".join(f"| {' | '.join(row)} |" for row in lines)
    return ["## Routes", table, " ".join(tradeoff.notes(evidence))]


def _size(text: dict[str, Any]) -> str:
    """Return the size of a text, or of images with text."""
    return f"{text['rows']} rows with {text['images']} images" if "images" in text else f"{text['tokens']} tokens"


def _reproduction(evidence: dict[str, Any]) -> str:
    data, environment = evidence["data"], evidence["environment"]
    lines = [
        f"- {role}: {inline(text['data'])}, {text['split']} split, {_size(text)}, sha256 `{text['sha256']}`"
        for role, text in data.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    options = ", ".join(f"{name}={value}" for name, value in evidence["options"].items()) or "defaults"
    lines += [
        f"- seed {evidence['seed']}; options: {inline(options)}",
        f"- {inline(environment['machine'])}, {environment['threads']} threads; {versions}; {environment['date']}",
        "- `plan.json` is the plan, `evidence.json` holds every measurement, `report.html` shows them.",
    ]
    return "\n".join(lines)
