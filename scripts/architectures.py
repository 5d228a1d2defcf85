"""Check which causal model types of transformers are supported, for the table of the documentation.

A small model of every type is created from its config, opened, pruned, run and exported; see :func:`check_type` for the
checks. The result is ``docs/architectures.json``; ``make architectures`` writes it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import lamella
from lamella.errors import LamellaError
from lamella.plan import ModelReference, Plan
from lamella.stack import Stack
from lamella.zoo import open_stack
from lamella.zoo.small import causal_types, image_types, small, small_with_images

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "architectures.json"
GENERATED = 6  # number of tokens
TOLERANCE = 1e-4  # for logits with and without a cache, relative to the largest


def check_type(model_type: str, make: Callable[[str], Any] = small) -> dict[str, Any]:
    """Check one type with a small model from ``make``; the first failure is reported under ``why``.

    - a small model can be created, and opens by an entry or by derivation and proof;
    - its sublayers compose to its logits, bitwise equal, on a left-padded ragged batch;
    - without the attention of layer 0 and the MLP of layer 2 it decodes the same tokens with and without a cache, and
    the
      same in a left-padded batch as for each row alone;
    - its experts are known, by the entry or by proof, so that the cost model counts those that a token uses;
    - each form of export is written, loaded again, and gives the logits of the view.

    Args:
        model_type: the type.
        make: creates a small model of a type.
    """
    found: dict[str, Any] = {"type": model_type, "opens": None, "decodes": False, "forms": [], "width": False}
    try:
        model = make(model_type)
    except Exception as error:  # classes of transformers may raise anything
        return found | {"why": f"cannot be built small: {_line(error)}"}
    try:
        opened = lamella.open(model, prove_again=True)
        stack = opened.stacks["text"] if "text" in opened.stacks else open_stack(opened)
    except LamellaError as error:
        return found | {"why": _line(error).removesuffix(" (see the documentation page 'Add an architecture')")}
    except Exception as error:
        return found | {"why": _line(error)}
    try:
        return found | _check_stack(stack, model_type)
    except Exception as error:
        return found | {"why": _line(error)}


def _check_stack(stack: Stack, model_type: str) -> dict[str, Any]:
    inputs = _batch(stack)
    if not _composes(stack, inputs):
        return {"why": "its sublayers do not compose to its logits"}
    opens = "derived" if stack.architecture.sources else "entry"
    found: dict[str, Any] = {"opens": opens, "sublayers": _kind(stack), "width": stack.architecture.cuttable}
    found["experts"] = stack.experts is not None
    plan = _plan(stack, ["layers.0.attn", "layers.2.mlp" if len(stack) > 2 else "layers.1.mlp"])
    view = lamella.apply(stack, plan)
    if (reason := _decodes(stack, plan, view, inputs)) is not None:
        return found | {"opens": opens, "decodes": False, "why": reason}
    found |= {"decodes": True, "forms": [], "refused": {}}
    shorter = _plan(stack, ["layers.1"])
    for form, chosen in (("plain", shorter), ("portable", plan), ("native", plan)):
        reason = _exports(stack, chosen, form, inputs)
        if reason is None:
            found["forms"].append(form)
        else:
            found["refused"][form] = reason
    return found


def _plan(stack: Stack, sites: list[str]) -> Plan:
    return Plan(model=ModelReference.of(stack), drop=sites)


def _kind(stack: Stack) -> str:
    """Return how the sublayers are connected, as determined by running one."""
    context = stack.context(_batch(stack)["input_ids"])
    parallel = not isinstance(
        stack.architecture["attn"].run(stack.layers[0], context.h, context.calls[0]), torch.Tensor
    )
    return "parallel" if parallel else "serial"


def _batch(stack: Stack) -> dict[str, torch.Tensor]:
    """Return two rows, the first one padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _composes(stack: Stack, inputs: dict[str, torch.Tensor]) -> bool:
    context, real = stack.context(inputs), inputs["attention_mask"].bool()
    ours = stack.head(stack.run(context.h, 0, len(stack), context))
    theirs = stack.model(**inputs, use_cache=False).logits
    return bool(torch.isfinite(theirs[real]).all()) and torch.equal(ours[real], theirs[real])


def _decodes(stack: Stack, plan: Plan, view: Any, inputs: dict[str, torch.Tensor]) -> str | None:
    """Compare the decoding of a pruned view with its logits without a cache; return None if they agree.

    The reference without a cache uses the same left-padded batch. If the whole model gives the same result for a row
    alone and in the batch (not so if positions count the padding), the view must, too.
    """
    options = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False, "pad_token_id": 0}
    prompt = inputs["input_ids"].shape[1]
    ids = view.generate(**inputs, **options, use_cache=True)
    extended = _extend(stack, inputs, ids)
    slow = _logits(stack, extended, dropped(plan))[:, prompt - 1 : -1]
    tokens, ends = ids[:, prompt:], view.generation_config.eos_token_id
    slow[..., [] if ends is None else ends] = -torch.inf  # end tokens must not be generated yet
    near = slow.max(dim=-1).values - slow.gather(2, tokens[:, :, None]).squeeze(2)
    if float(near.max()) > TOLERANCE * float(slow.abs().max()):
        note = _whole_model_note(stack, extended, prompt)
        return f"a cut view generates other tokens than it computes without a cache{note}"
    slow = _logits(stack, extended, dropped(plan))[:, prompt - 1 : -1]
    if not _close(_step_by_step(view, extended, prompt), slow):
        return f"a cut view gives other logits with a cache than without{_whole_model_note(stack, extended, prompt)}"
    single = {name: each[:1, 3:] for name, each in extended.items()}  # the first row without its padding

    def agrees(skip: Any) -> bool:
        return _close(_logits(stack, single, skip)[:, -1], _logits(stack, extended, skip)[:1, -1])

    if agrees(()) and not agrees(dropped(plan)):
        return "a cut view reads a row in a left-padded batch in another way than alone"
    return None


def _whole_model_note(stack: Stack, extended: dict[str, torch.Tensor], prompt: int) -> str:
    """Return a note if the whole model has the same problem."""
    own = _logits(stack, extended, ())[:, prompt - 1 : -1]
    return "" if _close(_step_by_step(stack.model, extended, prompt), own) else " (so does the whole model)"


def _extend(stack: Stack, inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the batch extended by the generated tokens, with positions as in ``generate``."""
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), more, dtype=torch.long)], dim=1)
    takes = "position_ids" in inspect.signature(type(stack.model).forward).parameters
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes else {}
    return {"input_ids": ids, "attention_mask": mask, **positions}


def _logits(stack: Stack, inputs: dict[str, torch.Tensor], skip: Any) -> torch.Tensor:
    context = stack.context(inputs)
    return stack.head(stack.run(context.h, 0, len(stack), context, skip=skip))


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


def dropped(plan: Plan) -> Any:
    """Return the sites that a plan drops."""
    return plan.chain(plan.model.default).dropped


def _step_by_step(model: Any, extended: dict[str, torch.Tensor], prompt: int) -> torch.Tensor:
    """Return the logits at the generated tokens, decoded one by one with a cache `[rows, generated, vocabulary]`."""
    ids, mask = extended["input_ids"], extended["attention_mask"]
    cache, logits = {}, []
    for begin, end in [(0, prompt), *((position, position + 1) for position in range(prompt, ids.shape[1] - 1))]:
        inputs = {name: each[:, begin:end] for name, each in extended.items()} | {"attention_mask": mask[:, :end]}
        out = model(**inputs, **cache, use_cache=True)
        cache = {"cache": out.cache}
        logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1)


def _exports(stack: Stack, plan: Plan, form: str, inputs: dict[str, torch.Tensor]) -> str | None:
    """Export in one form, load the result, and compare; return the reason if it is not supported or fails."""
    real = inputs["attention_mask"].bool()
    context = stack.context(inputs)
    wanted = stack.head(stack.run(context.h, 0, len(stack), context, skip=dropped(plan)))[real]
    with tempfile.TemporaryDirectory() as folder:
        try:
            if form == "plain":  # from disk to disk, as for whole layers
                stack.model.save_pretrained(Path(folder) / "whole")
                stack = open_stack(Path(folder) / "whole")
                plan = _plan(stack, ["layers.1"])
            out = lamella.export(stack, plan, Path(folder) / "export", form=form)
            again = lamella.load(out).model
            logits = again(**inputs, use_cache=False).logits[real]
        except Exception as error:
            return _line(error).replace(f"{folder}/", "")
    return None if torch.allclose(logits, wanted, rtol=1e-4, atol=1e-5) else "what is loaded again gives other logits"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


@torch.no_grad()
def main() -> int:
    """Parse the arguments and run the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="only check these types; the rows of the others are kept")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    known = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    result = {"machine": platform.machine(), "versions": versions}
    for part, types, make in (("types", causal_types(), small), ("with_images", image_types(), small_with_images)):
        rows = {row["type"]: row for row in known.get(part, []) if known["versions"] == versions}
        for model_type in [name for name in types if name in arguments.types] if arguments.types else types:
            started = time.process_time()
            found = check_type(model_type, make)
            rows[model_type] = found | {"seconds": round(time.process_time() - started, 1)}
            print(json.dumps(rows[model_type]), flush=True)
            result |= {each: known[each] for each in ("types", "with_images") if each in known}
            result[part] = known[part] = [rows[name] for name in types if name in rows]
            OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            known["versions"] = versions
        print(f"{part}: {sum(bool(row['decodes']) for row in rows.values())} of {len(rows)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
