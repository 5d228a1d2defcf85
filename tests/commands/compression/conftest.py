"""Evidence as the main job writes it, for a model of 30 layers; the numbers are made up, their shape is not."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

LAYERS = 30
SITES = [f"layers.{layer}.{name}" for layer in range(30) for name in ("attn", "mlp")]
CUT = [59, 57, 20, 46, 22, 44, 42, 48, 38, 50, 36, 53, 16, 24]  # of those, in the order of removal
METHODS = {
    "finercut": (False, 1.0),
    "unified-skip": (False, 1.9),
    "shortgpt": (True, 1.7),
    "window": (True, 2.1),
    "sleb": (True, 1.3),
    "random": (True, 3.2),
}


def estimate(mean: float, share: float = 0.05) -> dict[str, float]:
    return {"mean": mean, "error": share * mean}


def fidelity(kl: float) -> dict[str, Any]:
    return {
        "kl": estimate(kl),
        "jsd": estimate(kl / 4.2),
        "top1": estimate(math.exp(-1.1 * kl), 0.01),
        "perplexity": estimate(18.21 * math.exp(0.9 * kl)),
        "base_perplexity": estimate(18.21),
        "sequences": 8,
        "positions": 1536,
    }


def ratio(median: float) -> dict[str, float]:
    return {"median": median, "low": median - 0.016, "high": median + 0.021}


def timing(batch: int, speedup: float) -> dict[str, Any]:
    return {
        "batch": batch,
        "prefill_seconds": 0.171 * batch**0.9 / speedup,
        "decode_seconds_per_step": 0.0312 * batch**0.5 / speedup,
        "prefill_speedup": ratio(speedup * 1.02 if speedup != 1 else 1.0),
        "decode_speedup": ratio(speedup),
        "decode_variation": 0.013,
    }


def cost(share: float) -> dict[str, int]:
    return {
        "sublayers": round(60 * share),
        "parameters": round(28_311_552 + 106_203_456 * share),
        "macs": round(28_311_552 + 115_000_000 * share),
        "bytes_per_token": round(113_246_208 + 424_813_824 * share),
        "kv_bytes_per_token": round(46_080 * share),
    }


def curve(slug: str, steps: tuple[int, ...] = (0, 3, 6, 9, 12, 14)) -> dict[str, Any]:
    baseline, harm = METHODS[slug]
    points = [
        {
            "point": gone,
            "sublayers_removed": gone,
            "predicted_speedup": 1 + 0.0225 * gone,
            "measured_speedup": ratio(1 + (0.0235 - 0.001 * harm) * gone),
            "fidelity": fidelity(0.0035 * harm * gone**1.75),
            "chosen": gone == steps[-1],
            "pareto": slug == "finercut" or (slug == "sleb" and gone == 14),
        }
        for gone in steps
    ]
    return {"method": slug, "label": f"{slug}, in full", "baseline": baseline, "seconds": 80.2 * harm, "points": points}


def route(name: str, form: str | None, size: float, kl: float, speed: float | None, pareto: bool) -> dict[str, Any]:
    measured = None if speed is None else ratio(speed)
    run = "as it is" if form is None else f"how {form} ran"
    found = {"name": name, "form": form, "run": run, "bytes": int(size), "fidelity": fidelity(kl)}
    return found | {"decode_speedup": measured, "pareto": pareto}


@pytest.fixture
def evidence() -> dict[str, Any]:
    """A single static method whose target was reached."""
    return make_evidence()


def make_evidence() -> dict[str, Any]:
    draw = random.Random(0)
    influence = [0.02 + 0.3 * math.exp(-sublayer / 4) + 0.03 * draw.random() for sublayer in range(2 * LAYERS)]
    alone = [0.0006 + 0.2 * value**1.4 * draw.uniform(0.5, 1.5) for value in influence]
    for step, sublayer in enumerate(CUT):
        alone[sublayer] = 0.0004 * (1 + 0.2 * step)
    layers = [
        {name: "cut" if 2 * layer + which in CUT else "kept" for which, name in enumerate(("attn", "mlp"))}
        for layer in range(LAYERS)
    ]
    chosen = curve("finercut")["points"][-1]
    return {
        "schema": "lamella.evidence/1",
        "model": {"name": "smollm2", "family": "llama", "layers": LAYERS, "parameters": 134_515_008},
        "goal": {"name": "speedup", "value": 1.3, "text": "a decode speed-up of 1.30\u00d7"},
        "target_speedup": 1.3,
        "method": "finercut",
        "options": {"distance": "jsd", "exclude_front": 0.2, "strategy": "greedy"},
        "seed": 0,
        "environment": {
            "machine": "A processor, 2 cores, 24 GiB",
            "threads": 2,
            "versions": {"python": "3.11.7", "lamella": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"},
            "date": "2026-11-25",
        },
        "data": {
            "calibration": {"data": "pydoc", "split": "calibration", "sha256": "bf" * 32, "tokens": 1024},
            "test": {"data": "pydoc", "split": "test", "sha256": "46" * 32, "tokens": 2048},
        },
        "step_seconds": {"attn": 0.0005, "mlp": 0.0004, "rest": 0.006},
        "base": {
            "cost": cost(1.0),
            "timings": [timing(1, 1.0), timing(8, 1.0)],
            "memory": {"peak_bytes": 571_000_000, "libraries_bytes": 447_000_000},
        },
        "chosen": {
            "route": "finercut",
            "method": "finercut",
            "quantised": None,
            "cut": True,
            "alternatives": {},
            "point": 14,
            "drop": [SITES[sublayer] for sublayer in sorted(CUT)],
            "path": {},
            "predicted_speedup": chosen["predicted_speedup"],
            "cost": cost(46 / 60),
            "fidelity": chosen["fidelity"],
            "timings": [timing(1, 1.317), timing(8, 1.284)],
            "memory": {"peak_bytes": 468_000_000, "libraries_bytes": 447_000_000},
            "reached": True,
            "form": "native",
            "search_seconds": 80.2,
        },
        "layers": layers,
        "scores": {
            "block_influence": [influence[2 * layer] + influence[2 * layer + 1] for layer in range(LAYERS)],
            "sublayer_influence": influence,
            "removed_alone": alone,
            "removal_order": [[SITES[sublayer]] for sublayer in CUT],
        },
        "curves": [curve("finercut")],
        "runtime": {"name": "torch"},
        "agreement": {"lower": 0.41279, "upper": 0.981, "confidence": 0.95},
        "routes": [
            route("original", None, 538e6, 0.0, 1.0, True),
            route("original, int8", "int8", 163e6, 0.004, 1.61, True),
            route("original, q8_0", "q8_0", 143e6, 0.002, None, False),
            route("cut", None, 412e6, 0.35, 1.317, False),
            route("cut, int8", "int8", 134e6, 0.36, 2.02, True),
        ],
        "samples": [
            {
                "prompt": "What is the capital of France, and why is it famous?",
                "base": "The capital of France is Paris. It is famous for its museums, its river and the Eiffel Tower.",
                "changed": "The capital of France is Paris. It is famous for the tower that Eiffel built there.",
            },
            {"prompt": "Count to three.", "base": "One, two, three.", "changed": "One, two, three."},
        ],
        "notes": [],
    }


@pytest.fixture
def all_methods(evidence: dict[str, Any]) -> dict[str, Any]:
    """``--method all``: a curve for each, finercut chosen."""
    evidence["curves"] = [curve(slug) for slug in METHODS]
    evidence["notes"] = ["random did not reach the target; its smallest model was measured instead."]
    return evidence


@pytest.fixture
def phased(evidence: dict[str, Any]) -> dict[str, Any]:
    """Whole layers that read the prompt and are skipped on generated tokens."""
    skipped = {3, 8, 13, 18, 23, 27}
    thin = [layer for layer in range(LAYERS) if layer not in skipped]
    for layer in range(LAYERS):
        evidence["layers"][layer] = dict.fromkeys(("attn", "mlp"), "prompt" if layer in skipped else "kept")
    evidence["chosen"] |= {"route": "unified-skip", "method": "unified-skip", "drop": [], "point": 6}
    evidence["chosen"]["path"] = {"text": {"prefill": list(range(LAYERS)), "decode": thin}}
    evidence["chosen"]["cost"]["parameters"] = evidence["base"]["cost"]["parameters"]
    evidence["curves"] = [curve("unified-skip")]
    evidence["scores"]["removal_order"] = [SITES[2 * layer : 2 * layer + 2] for layer in sorted(skipped)]
    return evidence


@pytest.fixture
def null_errors(evidence: dict[str, Any]) -> dict[str, Any]:
    """One test sequence: no standard error; nothing measured along the curve; no memory yet."""
    measured = [point["fidelity"] for point in evidence["curves"][0]["points"]] + [evidence["chosen"]["fidelity"]]
    for each in measured:
        for name in ("kl", "jsd", "top1", "perplexity", "base_perplexity"):
            each[name]["error"] = None
    for point in evidence["curves"][0]["points"]:
        point["measured_speedup"] = None
    evidence["scores"]["removed_alone"] = None
    del evidence["base"]["memory"], evidence["chosen"]["memory"]
    return evidence
