"""Out-of-core exports: the same bytes in another location, and no output from a damaged source."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lamella.errors import ArchitectureError, CheckpointError, ExportError, PlanError
from lamella.plan import ModelReference, PhasedPath, Plan, apply_static, checkpoint
from lamella.plan.export import export_out_of_core
from lamella.stack import Stack
from lamella.zoo.nano import nano

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))


def saved(folder: Path, name: str = "llama", shard: str = "20KB", dtype: torch.dtype = torch.float32) -> Path:
    nano(name).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def opened(folder: Path) -> Stack:
    return Stack(transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), folder)


def make_plan(stack: Stack, drop=(), path=None) -> Plan:
    paths = {} if path is None else {"text": PhasedPath(prefill=path, decode=path)}
    return Plan(model=ModelReference.of(stack), drop=list(drop), path=paths)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("path", [[1, 3], [2, 0, 0, 1, 3]], ids=["removed", "repeated and moved"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_a_sharded_checkpoint_loads_with_the_logits_of_the_view(name: str, path: list[int], tmp_path: Path) -> None:
    stack = opened(saved(tmp_path / "source", name))
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    out = export_out_of_core(stack.path, make_plan(stack, path=path), tmp_path / "out")
    with torch.no_grad():
        expected = apply_static(stack, make_plan(stack, path=path))(input_ids=IDS).logits
        assert torch.equal(opened(out).model(input_ids=IDS).logits, expected)


def test_every_dtype_is_copied_bit_by_bit(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", shard="1GB", dtype=torch.bfloat16)
    whole = tensors(source)
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.down_proj"
        whole[f"{name}.weight"] = whole[f"{name}.weight"].to(torch.float8_e4m3fn)
        whole[f"{name}.flag"] = torch.tensor([True])  # one byte, so that what follows would lie askew
        whole[f"{name}.scale"] = torch.rand(1, dtype=torch.float64)
    save_file(whole, source / "model.safetensors")
    out = export_out_of_core(source, make_plan(opened(source), ["layers.1"]), tmp_path / "out")
    found = tensors(out)
    for new, old in enumerate((0, 2, 3)):
        for name, tensor in whole.items():
            if name.startswith(f"model.layers.{old}."):
                copy = found.pop(name.replace(f"layers.{old}.", f"layers.{new}."))
                assert copy.dtype == tensor.dtype and torch.equal(copy.view(torch.uint8), tensor.view(torch.uint8))
    assert set(found) == {name for name in whole if ".layers." not in name}


def test_shards_respect_the_maximum_size_and_are_listed_in_an_index(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    read = checkpoint.read(source)
    (tmp_path / "out").mkdir()
    calls: list[tuple[int, int]] = []
    checkpoint.write(read.tensors, tmp_path / "out", lambda done, total: calls.append((done, total)), shard_size=30_000)
    total = sum(tensor.size for tensor in read.tensors)
    assert calls[-1] == (total, total)
    assert all(
        sum(t.nbytes for t in load_file(file).values()) <= 30_000 for file in (tmp_path / "out").glob("*.safetensors")
    )
    index = json.loads((tmp_path / "out" / checkpoint.INDEX).read_text())
    assert index["metadata"]["total_size"] == total and set(index["weight_map"]) == {t.name for t in read.tensors}
    again = tensors(tmp_path / "out")
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors(source).items())


def test_a_checkpoint_saved_without_the_head_prefix_is_read(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "gpt2", shard="1GB")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors(source).items()}
    save_file(bare, source / "model.safetensors", {"format": "pt"})
    stack = opened(source)
    plan = make_plan(stack, ["layers.0", "layers.2"])
    out = export_out_of_core(source, plan, tmp_path / "out")
    assert "h.1.ln_1.weight" in tensors(out) and "h.2.ln_1.weight" not in tensors(out)
    with torch.no_grad():
        assert torch.equal(opened(out).model(input_ids=IDS).logits, apply_static(stack, plan)(input_ids=IDS).logits)


def test_tokenizer_and_licence_come_along(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        (source / name).write_text(name)
    (source / "pytorch_model.bin").write_text("no")
    out = export_out_of_core(source, make_plan(opened(source), ["layers.1"]), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "pytorch_model.bin").exists()


def truncate(source: Path) -> None:
    file = sorted(source.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(source: Path) -> None:
    file = sorted(source.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes() + b"x")


def lose_a_shard(source: Path) -> None:
    sorted(source.glob("*.safetensors"))[-1].unlink()


def garble_a_header(source: Path) -> None:
    file = sorted(source.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:8] + b"}" + file.read_bytes()[9:])


def empty_a_shard(source: Path) -> None:
    sorted(source.glob("*.safetensors"))[0].write_bytes(b"")


def _without(source: Path, part: str) -> None:
    whole = {name: tensor for name, tensor in tensors(source).items() if not name.startswith(part)}
    for file in source.glob("*.safetensors*"):
        file.unlink()
    save_file(whole, source / "model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "header describes"),
    "too long": (lengthen, "header describes"),
    "shard missing": (lose_a_shard, r"00\d+-of-.*is missing"),
    "header garbled": (garble_a_header, "header is damaged"),
    "shard empty": (empty_a_shard, "truncated"),
    "layer missing": (lambda source: _without(source, "model.layers.3."), "lacks layer 3"),
    "tensor missing": (lambda source: _without(source, "model.layers.2.mlp.up"), "layers 0 and 2.*mlp.up_proj.weight"),
    "embedding missing": (lambda source: _without(source, "model.embed_tokens"), "lacks a tensor such as"),
    "config missing": (lambda source: (source / "config.json").unlink(), "config.json: is missing"),
    "config garbled": (lambda source: (source / "config.json").write_text("{"), "cannot be read as JSON"),
    "no weights": (lambda source: [file.unlink() for file in source.glob("*.safetensors*")], "no model.safetensors"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_source_is_refused_before_anything_is_written(damage: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    plan = make_plan(opened(source), ["layers.1"])
    harm, message = DAMAGE[damage]
    harm(source)
    with pytest.raises(CheckpointError, match=message) as error:
        export_out_of_core(source, plan, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_a_plain_checkpoint_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    stack = opened(source)
    with pytest.raises(PlanError, match="portable or native"):
        export_out_of_core(source, make_plan(stack, ["layers.1.attn"]), tmp_path / "out")
    with pytest.raises(PlanError, match="this plan is for a gpt2"):
        export_out_of_core(source, make_plan(Stack(nano("gpt2")), ["layers.1"]), tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "fp8", "ignore": ["model.layers.3.mlp"]}}
    (source / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ExportError, match="names single layers"):
        export_out_of_core(source, make_plan(stack, ["layers.1"]), tmp_path / "out")
    (source / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(ArchitectureError, match="unknown architecture 'mamba'"):
        export_out_of_core(source, make_plan(stack, ["layers.1"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_made_on_other_weights_only_warns(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    plan = make_plan(opened(source), ["layers.1"])
    shutil.rmtree(source)
    nano("llama", seed=1).save_pretrained(source)
    with pytest.warns(UserWarning, match="other weights"):
        export_out_of_core(source, plan, tmp_path / "out")


# Linux's own high-water mark of this program alone: ru_maxrss of a child begins with the memory of its parent.
MEASURE = """
import sys
from pathlib import Path
from lamella.plan import Plan
from lamella.plan.export import export_out_of_core
export_out_of_core(sys.argv[1], Plan.read(sys.argv[2]), sys.argv[3])
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """100 MB of weights more cost less than 40 MB of memory more."""
    peaks = []
    for name, size in (("small", 128), ("large", 400_000)):
        source = tmp_path / name
        nano("llama", vocab_size=size).save_pretrained(source)
        with torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(source)
            stack = Stack(transformers.AutoModelForCausalLM.from_config(config))
        make_plan(stack, ["layers.1"]).write(tmp_path / f"{name}.json")
        command = [sys.executable, "-c", MEASURE, source, tmp_path / f"{name}.json", tmp_path / f"{name}-out"]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024)
    assert (tmp_path / "large-out" / "model.safetensors").stat().st_size > 100e6
    assert peaks[1] - peaks[0] < 40, peaks
