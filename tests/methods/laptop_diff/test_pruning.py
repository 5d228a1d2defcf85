"""Measuring, pruning and writing: identities, and what plain diffusers makes of what is written."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lamella.data import Captioned
from lamella.errors import ArchitectureError, CheckpointError, ExportError, MethodError, NumericsError, PlanError
from lamella.files import Work
from lamella.methods.laptop_diff import (
    Denoiser,
    EvaluationSettings,
    PrunedDenoiser,
    ScoringSettings,
    Tuples,
    additivity,
    convert,
    error,
    joint,
    laptop_diff,
    magnitudes,
    measure_blocks,
    natural_form,
    predictions,
    random_sets,
    targets,
    taylor,
)
from lamella.plan import ModelReference, Plan
from lamella.runner import needs_of
from lamella.runtime import apply
from lamella.stack import Blocks

from .pipelines import MADE, denoiser, digits, tuples

NAMES = ("untrained", *MADE)
WRITES = {"ResnetBlock2D": ("conv2",), "Attention": ("to_out.0",), "Transformer2DModel": ("proj_out",),
          "BasicTransformerBlock": ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")}  # fmt: skip


def some(name: str) -> list[str]:
    """Some blocks of each kind that a network has; of parted ones all parts of one, and one of another."""
    sites = denoiser(name).blocks.sites
    if name == "classes":
        return ["dit.layers.2", "dit.layers.3"]
    if name == "text":
        parts = [each for each in sites if "attentions" in each]
        return [*parts[:2], parts[2], "unet.mid.resnets.1", "unet.up.0.resnets.0"]
    return ["unet.mid.resnets.0", "unet.down.1.resnets.0", "unet.up.0.attentions.1"]


def pruned(name: str, dropped: list[str], form: Any = "native") -> PrunedDenoiser:
    whole = denoiser(name)
    plan = Plan(model=ModelReference.of(whole.blocks), drop=dropped)
    network = convert(whole.blocks, apply(whole.blocks, plan).eval(), dropped, form)
    return PrunedDenoiser(denoiser=whole.with_network(network), plan=plan, form=form)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_dropped_is_the_network_to_the_bit(name: str) -> None:
    whole = denoiser(name)
    before = predictions(whole, whole.network, tuples(name), 3)
    assert torch.equal(predictions(whole, whole.blocks.without([]), tuples(name), 3), before)
    assert before.shape == tuples(name).clean.shape


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_block_adds_nothing_and_its_parameters_are_gone(name: str) -> None:
    whole, rows = denoiser(name), tuples(name)
    every = sum(each.numel() for each in whole.network.parameters())
    for site in whole.blocks.sites:
        block = whole.blocks[site]
        parts = [dict(block.named_modules()).get(part) for part in WRITES[type(block).__name__]]
        hooks = [part.register_forward_hook(lambda m, a, out: torch.zeros_like(out)) for part in parts if part]
        expected = predictions(whole, whole.network, rows, 6)
        for hook in hooks:
            hook.remove()
        view = whole.blocks.without([site])
        torch.testing.assert_close(predictions(whole, view, rows, 6), expected, rtol=1e-5, atol=1e-5)
        assert sum(each.numel() for each in view.parameters()) == every - whole.blocks.savings()[site]


def test_a_block_that_changes_shapes_keeps_its_shortcut() -> None:
    blocks = denoiser("untrained").blocks
    changing = [site for site in blocks.sites if getattr(blocks[site], "conv_shortcut", None) is not None]
    assert len(changing) == 7  # one down, and all six up, which read what was put beside the stream
    for site in changing:
        assert blocks.savings()[site] == blocks.sizes()[site] - sum(
            each.numel() for each in blocks[site].conv_shortcut.parameters()
        )


def test_of_a_transformer_the_first_layer_stays() -> None:
    assert denoiser("classes").blocks.sites == ["dit.layers.1", "dit.layers.2", "dit.layers.3"]


FORMS = ("native", "portable", "plain")
ALONE = """
import sys
sys.modules["lamella"] = None  # it is not there
from pathlib import Path
import diffusers, torch
for file in sorted(Path(sys.argv[1]).glob("*.rows")):
    rows = torch.load(file)
    path = file.with_suffix("")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(path, trust_remote_code=path.name.startswith("native"))
    scheduler = diffusers.DDPMScheduler.from_config(rows["noising"])
    noisy = scheduler.add_noise(rows["clean"], rows["noise"], rows["timesteps"])
    with torch.no_grad():
        network = getattr(pipeline, rows["part"]).eval().double()
        said = network(noisy, timestep=rows["timesteps"], **rows["conditions"]).sample
    torch.save(said[:, : noisy.shape[1]], path.with_suffix(".said"))
"""


def dropped_in(form: str, name: str) -> list[str]:
    """What is removed: in the plain form, what a config can express."""
    sites = denoiser(name).blocks.sites
    if form == "plain" and name == "untrained":
        return [each for each in sites if "mid" in each or "up.0.attentions" in each]
    if form == "plain" and name == "text":
        return [each for each in sites if "mid" in each or "attentions" in each]
    return some(name)


def in_double(rows: Tuples) -> Tuples:
    """The same rows in a precision in which two processes may round otherwise without being seen."""
    conditions = {name: each.double() if each.is_floating_point() else each for name, each in rows.conditions.items()}
    return Tuples(rows.clean.double(), rows.timesteps, rows.noise.double(), conditions)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pruned pipelines in all forms, and of what they predict in plain diffusers; one process opens all."""
    folder = tmp_path_factory.mktemp("written")
    for form, name in product(FORMS, NAMES):
        whole, rows = denoiser(name), in_double(tuples(name))
        pruned(name, dropped_in(form, name), form).write(folder / f"{form}-{name}")
        given = {**vars(rows), "noising": dict(whole.noising.config), "part": whole.part}
        torch.save(given, folder / f"{form}-{name}.rows")
    subprocess.run([sys.executable, "-c", ALONE, folder], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_gives_the_same_in_plain_diffusers(name: str, form: str, written: Path) -> None:
    whole, rows, out = denoiser(name), tuples(name), written / f"{form}-{name}"
    expected = predictions(whole, whole.blocks.without(dropped_in(form, name)), rows, 6)
    again = Denoiser.open(out)
    torch.testing.assert_close(predictions(whole, again.network, rows, 6), expected, rtol=1e-5, atol=1e-6)
    view = copy.deepcopy(whole.blocks.without(dropped_in(form, name))).double()
    expected = predictions(whole, view, in_double(rows), 6)
    torch.testing.assert_close(torch.load(out.with_suffix(".said")), expected, rtol=0, atol=1e-9)
    left, every = (sum(each.numel() for each in n.parameters()) for n in (again.network, whole.network))
    assert left == every if form == "portable" else left < every


def test_the_form_is_plain_where_a_config_can_say_what_is_gone() -> None:
    blocks = denoiser("untrained").blocks
    middle = [each for each in blocks.sites if "mid" in each]
    assert natural_form(blocks, middle) == "plain" == natural_form(blocks, ["unet.mid.attentions.0"])
    assert natural_form(blocks, middle[1:]) == "native" == natural_form(blocks, [*middle, "unet.down.0.resnets.0"])
    with pytest.raises(ExportError, match="no config of a UNet2DModel can express"):
        pruned("untrained", ["unet.down.0.resnets.0"], "plain")


def test_scores_are_what_a_loop_over_rows_finds() -> None:
    whole, rows = denoiser("untrained"), tuples("untrained")
    found = measure_blocks(whole, rows, bins=2, batch=4, work=Work())
    original = predictions(whole, whole.network, rows, 1)
    for site in whole.blocks.sites[::5]:
        view = whole.blocks.without([site])
        each = [
            (predictions(whole, view, one, 1) - original[n]).double().square().mean()
            for n, one in enumerate(rows.batches(1))
        ]
        each = torch.stack(each)
        early = rows.timesteps < 100
        assert found.output[site] == pytest.approx(float(each.mean()), rel=1e-4) and found.output[site] >= 0
        assert found.by_time[site] == pytest.approx([float(each[early].mean()), float(each[~early].mean())], rel=1e-4)
        loss = error(predictions(whole, view, rows, 6), targets(whole, rows)).mean()
        assert found.task[site] + found.whole == pytest.approx(float(loss), rel=1e-4)


def test_times_are_spread_evenly_and_the_same_for_every_question() -> None:
    one, other = (Tuples.of(denoiser("untrained"), digits(), 40, seed=3) for _ in range(2))
    assert torch.equal(one.timesteps, other.timesteps) and torch.equal(one.noise, other.noise)
    assert one.bins(denoiser("untrained"), 4).bincount().tolist() == [10] * 4
    assert not torch.equal(Tuples.of(denoiser("untrained"), digits(), 40, seed=4).noise, one.noise)


def test_sums_of_scores_are_compared_with_what_is_measured() -> None:
    whole, rows = denoiser("untrained"), tuples("untrained")
    scores = measure_blocks(whole, rows, bins=1, batch=6, work=Work()).output
    sets = random_sets(whole.blocks.sites, 6, seed=0)
    assert [len(each) for each in sets] == [2, 4, 6, 2, 4, 6] and all(len(set(each)) == len(each) for each in sets)
    found = additivity(whole, rows, scores, sets, 6)
    for (total, at_once), each in zip(found["points"], sets, strict=True):
        assert total == pytest.approx(sum(scores[site] for site in each))
        assert at_once == joint(whole, rows, each, 6)[0]
    assert found["worst"]["sites"] in sets and len(found["worst"]["sites"]) == 2


def test_first_order_scores_are_gradients_times_weights() -> None:
    whole, rows = denoiser("untrained"), tuples("untrained")
    found = taylor(whole, rows, 6)
    assert all(each.grad is None for each in whole.network.parameters())
    network = copy.deepcopy(whole.network).double()
    doubled = in_double(rows)
    block, step, losses = network.down_blocks[1].resnets[0], 1e-5, []
    weights = [each for name, each in block.named_parameters() if not name.startswith("conv_shortcut")]
    for scale in (1 + step, (1 - step) / (1 + step)):
        for each in weights:
            each.data *= scale
        losses.append(float(error(predictions(whole, network, doubled, 6), targets(whole, doubled)).mean()))
    assert found["unet.down.1.resnets.0"] == pytest.approx(abs(losses[0] - losses[1]) / (2 * step), rel=1e-3)
    assert set(found) == set(magnitudes(whole)) == set(whole.blocks.sites)


@pytest.mark.parametrize("name", NAMES)
def test_enough_is_gone_and_the_report_says_what_that_costs(name: str) -> None:
    done = laptop_diff(
        denoiser(name),
        digits(),
        remove=0.2,
        scoring=ScoringSettings(sets=3, batch=6),
        evaluation=EvaluationSettings(tuples=6, bins=2, draws=2),
    )
    told = done.findings
    assert told["parameters"]["before"] - told["parameters"]["after"] >= told["parameters"]["target"]
    assert told["measured"] == pytest.approx(joint(denoiser(name), tuples(name), done.plan.drop, 6)[0])
    assert told["predicted"] == pytest.approx(sum(e["output"] for e in told["blocks"] if e["dropped"]))
    assert told["cost"]["exact"] <= told["cost"]["greedy"] and set(told["generated"]) == {"original", "pruned"}
    assert done.denoiser.network is not denoiser(name).network


def test_a_plan_of_blocks_is_read_back_and_fits_its_model_alone(tmp_path: Path) -> None:
    blocks = denoiser("untrained").blocks
    plan = Plan(model=ModelReference.of(blocks), drop=["unet.mid.resnets.1"])
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    assert again == plan and again.digest == plan.digest and again.removed == 1
    assert Plan(model=plan.model, drop=["unet.mid.resnets.0"]).digest != plan.digest
    with pytest.raises(PlanError, match="a UNet2DModel of 18 blocks"):
        apply(denoiser("text").blocks, again)
    said = json.loads((tmp_path / "plan.json").read_text())
    for change, message in (
        ({"drop": ["unet.mid.resnets.7"]}, "'unet.mid.resnets.7' is not a block of the model"),
        ({"path": {"text": {"prefill": [0], "decode": [0]}}}, "blocks can be dropped and nothing else"),
    ):
        (tmp_path / "wrong.json").write_text(json.dumps(said | change))
        with pytest.raises(PlanError, match=message):
            Plan.read(tmp_path / "wrong.json")


def test_pictures_are_made_what_the_network_reads() -> None:
    pixels = [np.full((12, 9 + number, 3), 10 * number, np.uint8) for number in range(4)]
    found = [Captioned(each, f"picture {number}") for number, each in enumerate(pixels)]
    grey = denoiser("untrained").clean(found)
    assert grey.shape == (4, 1, 8, 8)
    assert grey[1].mean() == pytest.approx(10 / 127.5 - 1, abs=1e-5)
    assert denoiser("text").clean(found).shape == (4, 4, 8, 8)
    told = denoiser("text").conditions(found)["encoder_hidden_states"]
    assert told.shape == (4, 16, 16) and not told[0].equal(told[1])
    with pytest.raises(ArchitectureError, match="is conditioned on classes, but these images have none"):
        denoiser("classes").conditions(found)
    with pytest.raises(ArchitectureError, match=r"has \d+ classes, but these images have 5001"):
        denoiser("classes").conditions([found[0]._replace(label=5000)])


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"remove 0.95: blocks hold 0.9\d\d\d of the parameters"):
        laptop_diff(denoiser("untrained"), digits(), remove=0.95)
    with pytest.raises(CheckpointError, match="give the folder of a diffusers pipeline"):
        Denoiser.open(tmp_path)
    folder = tmp_path / "hostile"
    pruned("untrained", ["unet.mid.resnets.0"]).write(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for change, message in (
        ({"scheduler": ["os", "system"]}, "needs os.system, which is not supported"),
        ({"scheduler": ["diffusers", "nothing"]}, "which is not supported"),
        ({"scheduler": ["diffusers", "DiffusionPipeline"]}, "which is not supported"),
        ({"../scheduler": ["diffusers", "DDPMScheduler"]}, "is not a valid part of a pipeline"),
        ({"_class_name": "UNet2DModel"}, "'UNet2DModel' is not a pipeline of diffusers"),
        ({"_class_name": ["code", "Pipeline"]}, "is not a pipeline of diffusers"),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(CheckpointError, match=message):
            Denoiser.open(folder)


def test_sizes_that_no_weights_have_are_refused_before_they_are_made(tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    pruned("untrained", ["unet.mid.resnets.0"]).write(folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [2**20, 2**20]}))
    with pytest.raises(CheckpointError, match=r"where the network has \[1048576"):
        Denoiser.open(folder)


def test_a_text_encoder_that_asks_for_code_of_the_hub_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    denoiser("text").pipeline.save_pretrained(folder)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"_attn_implementation": "some/kernel"}))
    with pytest.raises(CheckpointError, match="asks to run code of 'some/kernel'"):
        Denoiser.open(folder)


def test_the_file_beside_a_native_network_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    pruned("untrained", ["unet.mid.resnets.0"]).write(folder)
    (folder / "unet" / "cut_network.py").write_text("raise SystemExit('it was run')")
    assert isinstance(Denoiser.open(folder).blocks, Blocks)


def test_a_block_without_which_numbers_are_none_is_named() -> None:
    broken = copy.deepcopy(denoiser("untrained"))
    broken.network.up_blocks[1].resnets[2].conv_shortcut.weight.data[:] = float("nan")
    with pytest.raises(NumericsError, match="output is not finite"):
        measure_blocks(broken, tuples("untrained"), bins=1, batch=6, work=Work())


def test_a_pipeline_is_estimated_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MADE["text"]().save_pretrained(tmp_path / "pipeline")
    size = sum(each.numel() for each in MADE["text"]().unet.parameters())
    for name in ("load_file", "pretrained"):
        monkeypatch.setattr(f"lamella.zoo.pipelines.{name}", lambda *_, **__: pytest.fail("weights are loaded"))
    needs = needs_of("laptop-diff", tmp_path / "pipeline", images="digits", count=12, tuples=6)
    assert needs.weights >= 4 * size and needs.peak > needs.weights and needs.seconds > 0
