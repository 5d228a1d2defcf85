"""What `lamella compress` returns for two real models and several goals, with its default eight minutes of healing.

Each goal is reached as the command chooses, and one by cutting alone. Reported are the route, the measured speed-up,
the divergence from the original on text that neither planning nor healing has seen, the accuracy on questions with
known answers (lm-evaluation-harness), and greedy answers to ten prompts.

    python benchmarks/outcomes.py smollm2    # an hour on two idle cores; resumes after an interruption
    python benchmarks/outcomes.py --quick    # a nano model, healed for a few seconds
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lamella
from lamella.files import Finished
from lamella.formatting import counted, estimate, ratio
from lamella.results import Record
from lamella.zoo import open_tokenizer
from lamella.zoo.cache import cache_folder
from lamella.zoo.opening import chat_inputs

NANO = Path(__file__).parents[1] / "tests" / "models" / "nano-llama"
TASK, TOKENS = "definitions", 64
BY_CUTTING: dict[str, Any] = {"speedup": 1.3, "allow": ("cut",)}
GOALS: dict[str, list[dict[str, Any]]] = {
    "smollm2": [{"speedup": 1.3}, BY_CUTTING, {"size": 142}],  # MB, of 163 in 8 bits
    "gemma3-270m": [{"size": 415}],  # MB, of 436 in 8 bits; two thirds of its weights are the vocabulary
}
MOST = {"gsm8k": 0.75, "humaneval": 0.5}  # nats: the goal by cutting alone
CHATS = "smollm2"  # an instruction model; Gemma 3 270M is the base model here
PROMPTS = (
    "What is the capital of Japan?",
    "What is a lighthouse?",
    "Write one sentence about the sea.",
    "List three fruits that are red.",
    "Explain in two sentences why the sky is blue.",
    "Tom has 12 apples and gives 5 away. How many does he have left?",
    "Translate to French: Good morning, my friend.",
    "Write a Python function that returns the larger of two numbers.",
    "Summarise in one sentence: The meeting was moved from Monday to Thursday because the room was taken.",
    "Give me a short name for a cat, and say why it fits.",
)


@torch.no_grad()
def answers(model: Any, tokenizer: Any) -> list[str]:
    """Return greedy answers to the prompts."""
    found = []
    for prompt in PROMPTS:
        given = chat_inputs(tokenizer, [{"role": "user", "content": prompt}], model.device)
        ids = model.generate(**given, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        found.append(tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def answers_of(model: Any) -> list[str]:
    return answers(lamella.open(model).model, open_tokenizer(model))


def outcome(model: Any, chats: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Return what a compression chose and measured, and the answers of its result."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        evidence = lamella.run("compress", model, out=out, tasks=(TASK,), seed=0, **options).evidence.model_dump()
        said = answers(lamella.load(out).model, open_tokenizer(model)) if chats else []
    chosen, healing = evidence["chosen"], evidence["healing"]
    return {
        "route": chosen["route"],
        "layers": len(chosen["drop"]),  # by default whole ones are removed
        "speedup": chosen["timings"][0]["decode_speedup"],
        "kl": (healing or chosen)["fidelity"]["kl"],
        "unseen": {
            each["text"]["data"]: list(each["fidelity"].values())[-1]["kl"]["mean"]
            for each in (healing or {}).get("unseen", ())
        },
        "scores": evidence["tasks"][0]["scores"],
        "answers": said,
    }


def words(options: dict[str, Any]) -> str:
    """Return a goal as in the command."""
    given = options | ({"allow": ",".join(options["allow"])} if "allow" in options else {})
    return " ".join(f"--{name} {value}" for name, value in given.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*GOALS, []], help="the models; all by default")
    parser.add_argument("--quick", action="store_true", help="a nano model, healed for a few seconds")
    given = parser.parse_args()
    if given.quick:
        return measured(NANO, [BY_CUTTING | {"heal_minutes": 0.05}], "-quick")
    return max(measured(model, GOALS[model], "") for model in given.models or GOALS)


def measured(model: str | Path, goals: list[dict[str, Any]], suffix: str) -> int:
    """Reach the goals with one model, and write their record; return the exit code.

    Args:
        model: the model.
        goals: the options of each compression.
        suffix: of the names of journal and record.
    """
    name = Path(model).name
    depends = {"prompts": PROMPTS, "task": TASK}
    finished = Finished(cache_folder() / "benchmarks" / f"outcomes-{name}{suffix}.jsonl", depends)
    chats = model == CHATS
    said = {"original": finished.once("answers of the original", partial(answers_of, CHATS))} if chats else {}
    record = Record(
        f"outcomes-{name}", "calibration on pydoc, healing on general, tests on stdlib, gsm8k, humaneval", 0
    )
    rows, by_cutting = [], None
    for options in goals:
        goal = words(options)
        found = finished.once(goal, partial(outcome, model, chats, options))
        by_cutting = found if options.get("allow") == BY_CUTTING["allow"] else by_cutting
        first, *_, last = found["scores"].values()
        unseen = [f"{found['unseen'][text]:.3f}" if text in found["unseen"] else "" for text in MOST]
        rows.append(
            [
                name,
                goal,
                f"{found['route']}, {counted(found['layers'], 'layer')} removed",
                ratio(found["speedup"]["median"]),
                f"{found['kl']['mean']:.3f}",
                *unseen,
                estimate(first),
                estimate(last),
            ]
        )
        least, reached = options.get("speedup", 1.0), found["speedup"]["median"]
        record.check(f"{goal}: decode speed-up", f"at least {least:g}", ratio(reached), reached >= least)
        if found["answers"]:
            said[goal] = found["answers"]
    on = [f"KL on {text}" for text in ("stdlib, nats", *MOST)]
    columns = ["model", "goal", "route", "speed-up", *on, f"{TASK}, original", f"{TASK}, result"]
    record.table("What compress returns, healed for eight minutes where layers are cut", columns, rows)
    if by_cutting is not None:
        for text, most in MOST.items():
            kl = by_cutting["unseen"][text]
            record.check(f"KL on {text} by cutting alone, nats", f"at most {most:g}", kl, kl <= most)
        before, cut, healed = (each["mean"] for each in by_cutting["scores"].values())
        back = (healed - cut) / (before - cut)
        record.check(f"{TASK}: accuracy lost by cutting that healing brings back", "at least half", back, back >= 0.5)
    if said:
        lines = [[prompt, who, each[number]] for number, prompt in enumerate(PROMPTS) for who, each in said.items()]
        record.table(f"Greedy answers, at most {TOKENS} tokens", ["prompt", "model", "answer"], lines)
    return record.finish(Path(__file__).parent / "results" / f"outcomes-{name}{suffix}.json")


if __name__ == "__main__":
    raise SystemExit(main())
