"""Which causal types of transformers open, and what can be done with them: the table of the documentation.

Every type is built small from its config, opened, cut, run and exported; see :func:`looked_at` for what is checked. The
result is ``docs/architectures.json``; ``make architectures`` writes it.
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
GENERATED = 6  # tokens
TOLERANCE = 1e-4  # of logits with a cache and without one, beside their largest


def looked_at(model_type: str, make: Callable[[str], Any] = small) -> dict[str, Any]:
    """What is true of one type, of which ``make`` makes a small model; what fails first stands under ``why``.

    - it is built small, and opens by an entry or by derivation and proof;
    - its sublayers compose to its logits, to the bit, on a left-padded ragged batch;
    - without the attention of layer 0 and the MLP of layer 2 it decodes with a cache what it decodes without one, from
      a left-padded batch what it does from each row alone;
    - its experts are known, by the entry or by proof, so that the cost model counts those that a token uses;
    - each form of export is written, loaded again, and gives the logits of the view.
    """
    found: dict[str, Any] = {"type": model_type, "opens": None, "decodes": False, "forms": [], "width": False}
    try:
        model = make(model_type)
    except Exception as error:  # of any class of transformers, anything
        return found | {"why": f"cannot be built small: {_line(error)}"}
    try:
        opened = lamella.open(model, prove_again=True)
        stack = opened.stacks["text"] if "text" in opened.stacks else open_stack(opened)
    except LamellaError as error:
        return found | {"why": _line(error).removesuffix(" (see the documentation page 'Add an architecture')")}
    except Exception as error:
        return found | {"why": _line(error)}
    try:
        return found | _checked(stack, model_type)
    except Exception as error:
        return found | {"why": _line(error)}


def _checked(stack: Stack, model_type: str) -> dict[str, Any]:
    given = _batch(stack)
    if not _composes(stack, given):
        return {"why": "its sublayers do not compose to its logits"}
    opens = "derived" if stack.architecture.sources else "entry"
    found: dict[str, Any] = {"opens": opens, "sublayers": _kind(stack), "width": stack.architecture.cuttable}
    found["experts"] = stack.experts is not None
    plan = _plan(stack, ["layers.0.attn", "layers.2.mlp" if len(stack) > 2 else "layers.1.mlp"])
    view = lamella.apply(stack, plan)
    if (reason := _decodes(stack, plan, view, given)) is not None:
        return found | {"opens": opens, "decodes": False, "why": reason}
    found |= {"decodes": True, "forms": [], "refused": {}}
    shorter = _plan(stack, ["layers.1"])
    for form, chosen in (("plain", shorter), ("portable", plan), ("native", plan)):
        reason = _exports(stack, chosen, form, given)
        if reason is None:
            found["forms"].append(form)
        else:
            found["refused"][form] = reason
    return found


def _plan(stack: Stack, sites: list[str]) -> Plan:
    return Plan(model=ModelReference.of(stack), drop=sites)


def _kind(stack: Stack) -> str:
    """How the layers hang together, as running one shows."""
    context = stack.context(_batch(stack)["input_ids"])
    parallel = not isinstance(
        stack.architecture["attn"].run(stack.layers[0], context.h, context.calls[0]), torch.Tensor
    )
    return "parallel" if parallel else "serial"


def _batch(stack: Stack) -> dict[str, torch.Tensor]:
    """Two rows, the first one padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _composes(stack: Stack, given: dict[str, torch.Tensor]) -> bool:
    context, real = stack.context(given), given["attention_mask"].bool()
    ours = stack.head(stack.run(context.h, 0, len(stack), context))
    theirs = stack.model(**given, use_cache=False).logits
    return bool(torch.isfinite(theirs[real]).all()) and torch.equal(ours[real], theirs[real])


def _decodes(stack: Stack, plan: Plan, view: Any, given: dict[str, torch.Tensor]) -> str | None:
    """What a cut view decodes, compared with what its sublayers give without a cache; None where it is right.

    The slow reference reads the same left-padded batch. Where the whole model reads a row alone as it reads it in the
    batch (not so where positions count the padding), the view must, too.
    """
    options = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False, "pad_token_id": 0}
    prompt = given["input_ids"].shape[1]
    ids = view.generate(**given, **options, use_cache=True)
    longer = _longer(stack, given, ids)
    slow = _logits(stack, longer, dropped(plan))[:, prompt - 1 : -1]
    tokens, ends = ids[:, prompt:], view.generation_config.eos_token_id
    slow[..., [] if ends is None else ends] = -torch.inf  # which are not to be generated yet
    near = slow.max(dim=-1).values - slow.gather(2, tokens[:, :, None]).squeeze(2)
    if float(near.max()) > TOLERANCE * float(slow.abs().max()):
        return f"a cut view generates other tokens than it computes without a cache{_also(stack, longer, prompt)}"
    slow = _logits(stack, longer, dropped(plan))[:, prompt - 1 : -1]
    if not _close(_step_by_step(view, longer, prompt), slow):
        return f"a cut view gives other logits with a cache than without{_also(stack, longer, prompt)}"
    alone = {name: each[:1, 3:] for name, each in longer.items()}  # the first row without its padding

    def alike(skip: Any) -> bool:
        return _close(_logits(stack, alone, skip)[:, -1], _logits(stack, longer, skip)[:1, -1])

    if alike(()) and not alike(dropped(plan)):
        return "a cut view reads a row in a left-padded batch in another way than alone"
    return None


def _also(stack: Stack, longer: dict[str, torch.Tensor], prompt: int) -> str:
    """Whether the whole model does so, too."""
    own = _logits(stack, longer, ())[:, prompt - 1 : -1]
    return "" if _close(_step_by_step(stack.model, longer, prompt), own) else " (so does the whole model)"


def _longer(stack: Stack, given: dict[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch with what was generated, positions as ``generate`` counts them."""
    more = ids.shape[1] - given["input_ids"].shape[1]
    mask = torch.cat([given["attention_mask"], torch.ones(len(ids), more, dtype=torch.long)], dim=1)
    takes = "position_ids" in inspect.signature(type(stack.model).forward).parameters
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes else {}
    return {"input_ids": ids, "attention_mask": mask, **positions}


def _logits(stack: Stack, given: dict[str, torch.Tensor], skip: Any) -> torch.Tensor:
    context = stack.context(given)
    return stack.head(stack.run(context.h, 0, len(stack), context, skip=skip))


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


def dropped(plan: Plan) -> Any:
    return plan.chain(plan.model.default).dropped


def _step_by_step(model: Any, longer: dict[str, torch.Tensor], prompt: int) -> torch.Tensor:
    """The logits of rows at their generated tokens, read one by one with a cache [rows, generated, vocabulary]."""
    ids, mask = longer["input_ids"], longer["attention_mask"]
    cache, logits = {}, []
    for begin, end in [(0, prompt), *((place, place + 1) for place in range(prompt, ids.shape[1] - 1))]:
        given = {name: each[:, begin:end] for name, each in longer.items()} | {"attention_mask": mask[:, :end]}
        out = model(**given, **cache, use_cache=True)
        cache = {"cache": out.cache}
        logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1)


def _exports(stack: Stack, plan: Plan, form: str, given: dict[str, torch.Tensor]) -> str | None:
    """Write one form, load it again, and compare; the reason where it is refused or fails."""
    real = given["attention_mask"].bool()
    context = stack.context(given)
    wanted = stack.head(stack.run(context.h, 0, len(stack), context, skip=dropped(plan)))[real]
    with tempfile.TemporaryDirectory() as folder:
        try:
            if form == "plain":  # from disk to disk, as whole layers are
                stack.model.save_pretrained(Path(folder) / "whole")
                stack = open_stack(Path(folder) / "whole")
                plan = _plan(stack, ["layers.1"])
            out = lamella.export(stack, plan, Path(folder) / "export", form=form)
            again = lamella.load(out).model
            logits = again(**given, use_cache=False).logits[real]
        except Exception as error:
            return _line(error).replace(f"{folder}/", "")
    return None if torch.allclose(logits, wanted, rtol=1e-4, atol=1e-5) else "what is loaded again gives other logits"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="these alone; what the table says of the others stays")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    known = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    result = {"machine": platform.machine(), "versions": versions}
    for part, types, make in (("types", causal_types(), small), ("with_images", image_types(), small_with_images)):
        rows = {row["type"]: row for row in known.get(part, []) if known["versions"] == versions}
        for model_type in [name for name in types if name in asked.types] if asked.types else types:
            begun = time.process_time()
            found = looked_at(model_type, make)
            rows[model_type] = found | {"seconds": round(time.process_time() - begun, 1)}
            print(json.dumps(rows[model_type]), flush=True)
            result |= {each: known[each] for each in ("types", "with_images") if each in known}
            result[part] = known[part] = [rows[name] for name in types if name in rows]
            OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            known["versions"] = versions
        print(f"{part}: {sum(bool(row['decodes']) for row in rows.values())} of {len(rows)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
