"""Exports: the output in plain transformers equals the view's, and appears atomically."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lamella
from lamella.errors import ExportError, PlanError
from lamella.files import check_free, discard, new_folder, recover
from lamella.plan import ModelReference, PhasedPath, Plan, PolicyReference, apply_static
from lamella.plan.export import export
from lamella.stack import Stack
from lamella.zoo.nano import NANO, nano

TEXT = [name for name in NANO if name != "vit"]
IDS = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, :2] = 0


def opened(name: str, **overrides) -> Stack:
    stack = Stack(nano(name, **overrides))
    if stack.architecture.causal:
        stack.model.generation_config.eos_token_id = None
    return stack


def make_plan(stack: Stack, drop=(), prefill=None, decode=None) -> Plan:
    path = {} if prefill is None else {stack.architecture.stack: PhasedPath(prefill=prefill, decode=decode or prefill)}
    return Plan(model=ModelReference.of(stack), drop=list(drop), path=path)


def inputs(stack: Stack) -> dict:
    if stack.architecture.stack == "vision":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": IDS, "attention_mask": MASK}


@torch.no_grad()
def logits(model, stack: Stack) -> torch.Tensor:
    out = model(**inputs(stack)).logits
    return out if stack.architecture.stack == "vision" else out[MASK.bool()]


def plain_load(folder: Path, stack: Stack):
    auto = (
        transformers.AutoModelForCausalLM if stack.architecture.causal else transformers.AutoModelForImageClassification
    )
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def same(model, view, stack: Stack) -> None:
    torch.testing.assert_close(logits(model, stack), logits(view, stack), rtol=0, atol=1e-6)


@pytest.mark.parametrize("on_disk", [False, True], ids=["from memory", "from disk"])
@pytest.mark.parametrize("name", NANO)
def test_a_plain_depth_export_computes_what_the_view_computes(name: str, on_disk: bool, tmp_path: Path) -> None:
    stack = opened(name)
    if on_disk:
        stack.model.save_pretrained(tmp_path / "source")
        stack = Stack(plain_load(tmp_path / "source", stack), tmp_path / "source")
    plans = make_plan(stack, ["layers.0", "layers.2"]), make_plan(stack, prefill=[2, 0, 0, 1, 3])
    for index, plan in enumerate(plans):
        out = export(stack, plan, tmp_path / f"out{index}")
        loaded = plain_load(out, stack)
        assert loaded.config.num_hidden_layers == len(plan.runs("decode"))
        same(loaded, apply_static(stack, plan), stack)
        assert Plan.read(out / "plan.json") == plan


def test_lists_per_layer_follow_the_layers(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    stack = opened("gemma3_text", layer_types=kinds)
    out = export(stack, make_plan(stack, ["layers.1"]), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["layer_types"] == [kinds[0], *kinds[2:]]


def test_dense_layers_among_experts_follow_the_layers(tmp_path: Path) -> None:
    stack = opened("qwen3_moe", mlp_only_layers=[2])
    plan = make_plan(stack, ["layers.0"])
    same(plain_load(export(stack, plan, tmp_path / "plain"), stack), apply_static(stack, plan), stack)
    plan = make_plan(stack, ["layers.2.mlp", "layers.1.mlp"])
    same(plain_load(export(stack, plan, tmp_path / "out", form="portable"), stack), apply_static(stack, plan), stack)


@pytest.mark.parametrize("name", [name for name in NANO if name != "opt_post_norm"])
def test_a_portable_export_computes_what_the_view_computes(name: str, tmp_path: Path) -> None:
    stack = opened(name)
    plan = make_plan(stack, ["layers.0.attn", "layers.1", "layers.2.mlp"])
    out = export(stack, plan, tmp_path / "out", form="portable")
    same(plain_load(out, stack), apply_static(stack, plan), stack)
    assert "save neither time nor memory" in (out / "README.md").read_text()


# Run by a Python that cannot import Lamella: loads each native export and says what it computes.
RUN_NATIVE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lamella":
            raise ImportError("lamella is not here")
sys.meta_path.insert(0, Block())
import torch, transformers
given, folders = torch.load(sys.argv[1]), sys.argv[2:]
out = {}
for folder in folders:
    auto = transformers.AutoModelForImageClassification if folder.endswith("vit") else transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model.eval()
    inputs = given["vit" if folder.endswith("vit") else "text"]
    with torch.no_grad():
        result = {"logits": model(**inputs).logits}
        if model.can_generate():
            for cached in (True, False):
                result[cached] = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=cached)
    out[folder] = result
assert not any(name.split(".")[0] == "lamella" for name in sys.modules)
torch.save(out, sys.argv[1] + ".out")
"""


@pytest.mark.slow
def test_native_exports_compute_what_the_views_compute_where_lamella_is_not_installed(tmp_path: Path) -> None:
    views, stacks = {}, {}
    for name in NANO:
        stack = opened(name)
        drop = ["layers.1.mlp", "layers.2"] if name == "vit" else ["layers.0.attn", "layers.1.mlp", "layers.2"]
        plan = make_plan(stack, drop)
        folder = export(stack, plan, tmp_path / name, form="native")
        views[str(folder)], stacks[str(folder)] = apply_static(stack, plan), stack
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert size < sum(4 * tensor.numel() for tensor in stack.model.parameters())
        config = json.loads((folder / "config.json").read_text())
        assert config["lamella"]["sublayers"] == [["attn", "mlp"][name != "vit" :], ["attn"], ["attn", "mlp"]]
    given = tmp_path / "given.pt"
    torch.save({"vit": inputs(opened("vit")), "text": {"input_ids": IDS, "attention_mask": MASK}}, given)
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    child = subprocess.run(
        [sys.executable, "-c", RUN_NATIVE, given, *views], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr[-3000:]
    for folder, found in torch.load(f"{given}.out").items():
        view, stack = views[folder], stacks[folder]
        real = found["logits"] if stack.architecture.stack == "vision" else found["logits"][MASK.bool()]
        # Another process rounds differently: its threads and the addresses of its tensors choose other kernels.
        torch.testing.assert_close(real, logits(view, stack), rtol=0, atol=1e-5)
        if stack.architecture.causal:
            expected = view.generate(**inputs(stack), max_new_tokens=8, do_sample=False, use_cache=False)
            assert torch.equal(found[True], expected) and torch.equal(found[False], expected), folder


def test_a_native_export_holds_no_tensor_of_a_removed_sublayer(tmp_path: Path) -> None:
    stack = opened("llama")
    out = export(stack, make_plan(stack, ["layers.0.attn", "layers.3.mlp"]), tmp_path / "out", form="native")
    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {name for name in names if name.startswith("model.layers.0.")} == {
        "model.layers.0.post_attention_layernorm.weight",
        *(f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }
    assert not any(name.startswith("model.layers.3.mlp") for name in names)


def test_lamella_loads_what_it_exported(tmp_path: Path) -> None:
    stack = opened("llama")
    plan = make_plan(stack, ["layers.0.attn", "layers.2"])
    for form in ("portable", "native"):
        loaded = lamella.load(export(stack, plan, tmp_path / form, form=form))
        same(loaded.model, apply_static(stack, plan), stack)
        context = loaded.context(inputs(stack))  # the stack knows which sublayers are removed
        through = loaded.head(loaded.run(context.h, 0, len(loaded), context))[MASK.bool()]
        torch.testing.assert_close(through, logits(loaded.model, stack), rtol=0, atol=1e-6)


def test_plain_transformers_refuses_a_native_export_rather_than_inventing_weights(tmp_path: Path) -> None:
    stack = opened("llama")
    out = export(stack, make_plan(stack, ["layers.1.mlp"]), tmp_path / "out", form="native")
    with pytest.raises(ValueError, match="custom code"):
        transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)


def test_a_plan_per_phase_is_exported_as_the_whole_model_with_its_plan(tmp_path: Path) -> None:
    stack = opened("llama")
    plan = make_plan(stack, prefill=[0, 1, 2, 3], decode=[0, 3])
    for form in ("plain", "portable"):
        with pytest.raises(PlanError, match=r"prompt and generated tokens differently.*native"):
            export(stack, plan, tmp_path / "out", form=form)
    out = export(stack, plan, tmp_path / "out", form="native")
    assert torch.equal(logits(plain_load(out, stack), stack), logits(stack.model, stack))
    assert Plan.read(out / "plan.json") == plan
    assert json.loads((out / "config.json").read_text())["lamella"] == {"form": "native", "plan": "plan.json"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", ["one file", "several files"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "llava"])
def test_an_unchanged_export_opens_without_a_word_on_its_weights(
    name: str, shards: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    size = {} if shards == "one file" else {"max_shard_size": "20KB"}
    nano(name).to(dtype).save_pretrained(tmp_path / "source", **size)
    text = lamella.zoo.open_stack(tmp_path / "source", stack="text" if name == "llava" else None, device="cpu")
    params = {"droppable": [1], "rank": 2}
    first = Plan(model=ModelReference.of(text), policies={"text": PolicyReference(name="lora-drop", params=params)})
    export(text, first, tmp_path / "first", form="native")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = lamella.load(tmp_path / "first", device="cpu")
        first.check_fits(text)  # as the plan of the original still is
    assert again.model.lamella_plan.digest == first.digest
    tensors = {file: load_file(file) for file in (tmp_path / "first").glob("model*.safetensors")}
    file, some = next((file, each) for file, each in tensors.items() if each)
    some[min(some)] = some[min(some)] + 1
    save_file(some, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="made for other weights"):
        lamella.load(tmp_path / "first", device="cpu")


def test_what_a_form_cannot_express_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    stack = opened("llama")
    with pytest.raises(PlanError, match=r"layers\.1 lacks its mlp sublayer.*portable or native"):
        export(stack, make_plan(stack, ["layers.1.mlp"]), tmp_path / "out")
    stack = opened("opt_post_norm")
    with pytest.raises(PlanError, match="norms after"):
        export(stack, make_plan(stack, ["layers.1.mlp"]), tmp_path / "out", form="portable")
    stack = opened("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(PlanError, match="layer's index"):
        export(stack, make_plan(stack, ["layers.1"]), tmp_path / "out")
    plan = make_plan(stack, ["layers.3"])
    same(plain_load(export(stack, plan, tmp_path / "last"), stack), apply_static(stack, plan), stack)
    with pytest.raises(ExportError, match="unknown form 'zip'"):
        export(stack, plan, tmp_path / "out", form="zip")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"cannot be named 'config\.json'"):
        export(stack, plan, tmp_path / "out", files={"config.json": "{}"})
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_the_callers_model_is_not_changed(tmp_path: Path) -> None:
    stack = opened("llama")
    before = {name: tensor.clone() for name, tensor in stack.model.state_dict().items()}
    config, expected = stack.config.to_dict(), logits(stack.model, stack)
    plan = make_plan(stack, ["layers.0.attn", "layers.2"])
    for form in ("portable", "native"):
        export(stack, plan, tmp_path / form, form=form)
    assert stack.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in stack.model.state_dict().items())
    assert torch.equal(logits(stack.model, stack), expected)


def test_files_and_card_come_with_the_export(tmp_path: Path) -> None:
    stack = opened("llama")
    plan, files = make_plan(stack, ["layers.1"]), {"evidence.json": "{}"}
    out = export(stack, plan, tmp_path / "out", card="# Mine\n", files=files)
    assert (out / "evidence.json").read_text() == "{}"
    card = (out / "README.md").read_text()
    assert card.startswith("# Mine\n") and "AutoModelForCausalLM.from_pretrained" in card


def test_an_output_that_exists_is_kept_unless_it_is_a_model_to_overwrite(tmp_path: Path) -> None:
    stack = opened("llama")
    one, two = make_plan(stack, ["layers.1"]), make_plan(stack, ["layers.1", "layers.2"])
    out = export(stack, one, tmp_path / "out")
    with pytest.raises(ExportError, match=r"exists.*--overwrite"):
        export(stack, two, out)
    assert Plan.read(out / "plan.json") == one
    export(stack, two, out, overwrite=True)
    assert Plan.read(out / "plan.json") == two
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.json").write_text('{"editor": "vi"}')
    with pytest.raises(ExportError, match="is not a model"):
        export(stack, one, home, overwrite=True)
    assert (home / "config.json").exists()
    with pytest.raises(ExportError, match="is a file"):
        export(stack, one, home / "config.json", overwrite=True)
    smaller = Stack(plain_load(out, stack), out)
    with pytest.raises(ExportError, match="the model that is being exported"):
        export(smaller, make_plan(smaller, ["layers.0"]), out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]


def test_a_full_disk_is_refused_before_the_write(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"needs .* GB, but its disk has"), new_folder(tmp_path / "out", size=10**18):
        pytest.fail("nothing must be written")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_version_and_nothing_else(tmp_path: Path) -> None:
    stack = opened("llama")
    out = export(stack, make_plan(stack, ["layers.1"]), tmp_path / "out")

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(stack, make_plan(stack), out, overwrite=True, progress=fail)
    assert Plan.read(out / "plan.json") == make_plan(stack, ["layers.1"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_version_that_was_moved_aside_is_brought_back(tmp_path: Path) -> None:
    stack = opened("llama")
    out = export(stack, make_plan(stack, ["layers.1"]), tmp_path / "out")
    out.rename(tmp_path / ".out.aside-123")
    (tmp_path / ".out.partial-123").mkdir()
    recover(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "config.json").exists()


def test_work_that_is_done_is_deleted_and_what_a_kill_left_of_it_is_swept_away(tmp_path: Path) -> None:
    work, out = tmp_path / ".out.training", tmp_path / "out"
    work.mkdir()
    (work / "log.json").touch()
    (tmp_path / ".out.deleted-123").mkdir()  # as after a kill
    discard(work, out)
    discard(work, out)  # it is already deleted
    check_free(out, overwrite=False)
    assert not list(tmp_path.iterdir())


# The process that is killed is a fork of one that has already imported torch, so that many kills take little time.
EXPORT_AND_DIE = """
import os
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lamella.plan import Plan
from lamella.plan.export import export_out_of_core
source, out, *plans = map(Path, sys.argv[1:])
plans = [Plan.read(plan) for plan in plans]
print("ready", flush=True)
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        while True:
            for plan in plans:
                export_out_of_core(source, plan, out, overwrite=True)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_one_complete_version_exists(tmp_path: Path) -> None:
    stack = opened("llama")
    source, out = tmp_path / "source", tmp_path / "place" / "out"
    stack.model.save_pretrained(source)
    plans = [make_plan(stack, ["layers.1"]), make_plan(stack, ["layers.1", "layers.2"])]
    for index, plan in enumerate(plans):
        plan.write(tmp_path / f"plan{index}.json")
    export(stack, plans[0], out)
    arguments = [source, out, tmp_path / "plan0.json", tmp_path / "plan1.json"]
    parent = subprocess.Popen(
        [sys.executable, "-c", EXPORT_AND_DIE, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdin is not None and parent.stdout is not None
    draw = random.Random(0)
    try:
        assert parent.stdout.readline() == "ready\n"
        for _ in range(40):
            parent.stdin.write("\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            time.sleep(draw.uniform(0.0, 0.25))
            subprocess.run(["kill", "-KILL", str(child)], check=True)
            assert parent.stdout.readline() == "dead\n"
            recover(out)
            assert [path.name for path in out.parent.iterdir()] == ["out"]
            plan = Plan.read(out / "plan.json")
            assert plan in plans
            weights = load_file(out / "model.safetensors")
            layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
            config = json.loads((out / "config.json").read_text())
            assert len(layers) == config["num_hidden_layers"] == len(plan.runs("decode"))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
