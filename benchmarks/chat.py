"""A chat of several turns with methods that take decisions at run time, compared with the same chat without a cache.

SmolLM2 answers three questions in one conversation, greedily, once in the usual way (``generate`` with the plan's own
cache) and once without any cache: every new token runs the whole conversation so far with teacher forcing. Both must
generate the same tokens. The record contains the conversation.

    python benchmarks/chat.py            # about 10 minutes on 2 cores
    python benchmarks/chat.py --quick    # two turns of a few tokens
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor

import lamella
from lamella.plan import Plan
from lamella.results import Record
from lamella.stack import Stack
from lamella.zoo import chat_inputs, open_tokenizer

QUESTIONS = ("What is the capital of France?", "And of Italy?", "Which of the two is larger?")


def plans(stack: Stack, tokens: LongTensor, quick: bool) -> dict[str, Plan]:
    """Return one plan for each method, with about a fifth of the layers' work."""
    wanted = 0.8 * len(stack.positions)

    def nearest(series: Any) -> Plan:
        return min(series, key=lambda plan: abs(len(stack.positions) - plan.removed - wanted))

    return {
        "first": nearest(lamella.make_plan("first", stack, tokens, steps=5 if quick else 20)),
        "lora-drop": nearest(lamella.make_plan("lora-drop", stack, reuse="delta")),
        "ffn-skip": lamella.make_plan("ffn-skip", stack, tokens, max_skips=5, warmup=4)[-1],
        "unified-skip": nearest(lamella.make_plan("unified-skip", stack)),
    }


def without_cache(view: Any, prompt: LongTensor, tokens: int) -> LongTensor:
    """Return greedy tokens after a prompt [1, time], each from one forward pass over the whole sequence."""
    ids, length = prompt, torch.tensor([prompt.shape[1]])
    while ids.shape[1] < prompt.shape[1] + tokens:
        following = lamella.parallel(view, ids, length, logits_to_keep=1).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, following[None]], dim=1)
        if following.item() == view.generation_config.eos_token_id:
            break
    return ids[:, prompt.shape[1] :]


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two turns of a few tokens")
    arguments = parser.parse_args()
    turns, length = (2, 6) if arguments.quick else (3, 32)

    stack = lamella.open("smollm2")
    tokenizer = open_tokenizer("smollm2")
    calibration = lamella.windows(tokenizer, lamella.load_text("pydoc", "calibration"), 8, 128, 0)
    record = Record("chat", f"{turns} turns of at most {length} tokens, greedy", 0)
    for name, plan in plans(stack, calibration, arguments.quick).items():
        view = lamella.apply(stack, plan)
        messages: list[dict[str, str]] = []
        rows, same = [], True
        for question in QUESTIONS[:turns]:
            messages.append({"role": "user", "content": question})
            inputs = chat_inputs(tokenizer, messages, stack.device)
            begin = inputs["input_ids"].shape[1]
            answer = view.generate(
                **inputs, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )[:, begin:]
            reference = without_cache(view, inputs["input_ids"], length)
            same &= torch.equal(answer, reference)
            answer_text, expected = (
                tokenizer.decode(ids[0], skip_special_tokens=True).strip() for ids in (answer, reference)
            )
            messages.append({"role": "assistant", "content": answer_text})
            rows.append([question, answer_text, "the same" if answer_text == expected else expected, answer.shape[1]])
        print(f"{name}: {plan.removed:.1f} of {len(stack.positions)} sublayers skipped", file=sys.stderr, flush=True)
        record.table(
            f"{name}, {plan.removed:.1f} of 60 sublayers skipped",
            ["question", "answer", "without a cache", "tokens"],
            rows,
        )
        record.check(f"{name}: every token of every turn", "that of the chat without a cache", same, same)
    return record.finish(Path(__file__).parent / "results" / f"chat{'-quick' if arguments.quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
