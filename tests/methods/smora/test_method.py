"""The method as a whole: what it trains, writes and refuses, and that routing is the same in every way to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import lamella
from lamella.data import InputContext, Sample
from lamella.errors import CacheError, CalibrationError, CheckpointError, LamellaError, MethodError, PlanError
from lamella.files import Work
from lamella.methods.smora import ExpertSettings, RankExperts, TaskExamples, Usage, smora, with_prompts
from lamella.methods.smora.page import figures
from lamella.plan import ModelReference, PhasedPath, Plan, compose, sidefile
from lamella.plan.export import export
from lamella.report.figures import Heatmap
from lamella.runner import run
from lamella.runtime import apply, parallel
from lamella.stack import Stack
from lamella.train import Adapter, TrainConfig, pairs
from lamella.zoo.nano import nano

NANO = Path(__file__).parents[2] / "models" / "nano-llama"
SMALL = ExpertSettings(r=8, k=2)
CONFIG = TrainConfig(steps=6, lr=1e-2, batch=4)
IDS = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, :2] = 0


def examples(count: int = 12) -> TaskExamples:
    """Two tasks on token ids: to repeat a prompt, and to turn it round."""
    generator = torch.Generator().manual_seed(0)
    rows: list[Sample] = []
    for number in range(count):
        prompt = torch.randint(8, 100, (4,), generator=generator)
        answer = prompt if number % 2 else prompt.flip(0)
        rows += pairs([([3 + number % 2, *prompt.tolist()], answer.tolist())])
    return TaskExamples(rows, tasks=["turn", "repeat"] * (count // 2))


def trained(kind: str = "llama", **given: Any) -> Any:
    told = {"experts": SMALL, "config": CONFIG} | given
    return smora(Stack(nano(kind)), examples(), **told)


def heavy(plan: Plan, folder: Path, seed: int = 0) -> Plan:
    """The same plan whose experts are random and far from 0, so that whatever differs shows."""
    [reference] = plan.adapters
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: each + 0.3 * torch.randn(each.shape, generator=generator)
               for name, each in load_file(reference.located).items()}  # fmt: skip
    for name, each in tensors.items():
        if name.endswith("lora_biases"):
            each /= 10
    file, digest = sidefile.named(folder, "smora", tensors)
    other = reference.model_copy(update={"file": file, "sha256": digest})
    other._folder = folder
    return plan.model_copy(update={"adapters": [other]})


FAMILIES = ["llama", "qwen2", "gpt2"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_learns_beside_every_linear_map_and_the_model_stays_as_it_was(kind: str) -> None:
    stack = Stack(nano(kind))
    before = {name: each.clone() for name, each in stack.model.state_dict().items()}
    config = TrainConfig(steps=40, lr=1e-2, batch=4)
    result = smora(stack, examples(), experts=SMALL, config=config, held_out=0.0)
    assert all(torch.equal(each, before[name]) for name, each in stack.model.state_dict().items())
    assert result.stack is stack and result.log.train[-1].loss < result.log.train[0].loss
    view = result.view
    beside = [name for name, each in view.named_modules() if isinstance(each, RankExperts)]
    linear = [name for name, each in stack.model.named_modules()
              if type(each).__name__ in ("Linear", "Conv1D") and name != "lm_head"]  # fmt: skip
    assert beside == [f"{name}.lamella_adapter" for name in linear] != []
    found = result.findings
    assert found["layers"] == len(linear) and set(found["tasks"]) == {"turn", "repeat"}
    assert all(each["after"] < each["before"] for each in found["tasks"].values())
    inputs_outputs = [stack.model.get_submodule(name).weight.shape for name in linear]
    assert found["parameters"]["experts"] == sum(8 * sum(shape) for shape in inputs_outputs)


@pytest.mark.parametrize("kind", FAMILIES)
def test_cached_steps_are_the_whole_sequence_on_a_ragged_batch(kind: str, tmp_path: Path) -> None:
    stack = Stack(nano(kind))
    view = apply(stack, heavy(trained(kind).plan, tmp_path))
    assert not torch.allclose(
        view(IDS, attention_mask=MASK).logits, stack.model(IDS, attention_mask=MASK).logits, atol=0.1
    )
    options = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = view.generate(IDS, **options, output_logits=True, return_dict_in_generate=True)
    plain = view.generate(IDS, **options, use_cache=False, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(cached.sequences, plain.sequences)
    mask = torch.cat([MASK, torch.ones(3, 8, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = parallel(view, cached.sequences, torch.full((3,), 12), mask, position_ids=positions).logits
    for step, (one, other) in enumerate(zip(cached.logits, plain.logits, strict=True)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
        torch.testing.assert_close(one, whole[:, 11 + step], rtol=0, atol=1e-4)
    cache, logits, named = None, [], stack.architecture.cache  # a raw continuation, token by token
    for place in range(12, 20):
        given = cached.sequences[:, :12] if cache is None else cached.sequences[:, place - 1 : place]
        at = positions[:, :12] if cache is None else positions[:, place - 1 : place]
        out = view(given, attention_mask=mask[:, :place], position_ids=at, **{named: cache}, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(logits, 1), torch.stack(cached.logits, 1), rtol=0, atol=1e-4)
    with pytest.raises(CacheError, match="without this plan"):
        view(IDS[:, :1], **{named: stack.model(IDS, use_cache=True).past_key_values}, use_cache=True)


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_decodes_alike_with_and_without_a_cache(tmp_path: Path) -> None:
    from lamella.methods.smora.method import active_sites
    from lamella.plan import attach
    from lamella.train import linear_at

    stack = lamella.open("smollm2")
    plan = Plan(model=ModelReference.of(stack))
    view = apply(stack, plan)
    made: Any = attach(view, linear_at(view, sites=active_sites(stack, plan)), RankExperts)
    with torch.no_grad():
        for each in made.values():
            each.lora_B.normal_(std=0.02)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (view.generate(IDS[:1] + 1000, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=0, atol=1e-4)


def test_what_is_saved_gives_the_same_logits_with_its_balance(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    result = trained(balance=0.01)
    expected = result.view(IDS).logits
    result.save(tmp_path / "out", lambda: {"README.md": "# it\n"})
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".json", ".md", ".safetensors"]
    plan = Plan.read(tmp_path / "out" / "plan.json")
    assert torch.equal(apply(stack, plan)(IDS).logits, expected)
    tensors = load_file(plan.adapters[0].located)
    vectors = [each for name, each in tensors.items() if name.endswith(".lora_biases")]
    assert vectors and any(each.any() for each in vectors)
    at = "model.layers.0.mlp.down_proj"
    assert {name.removeprefix(f"{at}."): list(each.shape) for name, each in tensors.items() if name.startswith(at)} == {
        "lora_A": [8, 64], "lora_B": [32, 8], "lora_router": [8, 64], "lora_biases": [8]
    }  # fmt: skip


def test_blocks_say_so_in_the_file_and_run(tmp_path: Path) -> None:
    result = trained(experts=ExpertSettings(r=8, k=4, p=2))
    reference = result.plan.adapters[0]
    assert reference.params["p"] == 2
    view, at = result.view, "model.layers.0.mlp.down_proj"
    linear, seen = view.get_submodule(at), {}
    linear.register_forward_hook(lambda module, args, out: seen.update(x=args[0].double(), y=out.double()))
    with torch.no_grad():
        view(IDS)
    tensors = load_file(reference.located)
    a, b, router, bias = (tensors[f"{at}.lora_{name}"].double() for name in ("A", "B", "router", "biases"))
    z = torch.sigmoid(seen["x"] @ router.T)  # [..., 4 blocks]
    chosen = torch.zeros_like(z).scatter(-1, (z + bias[::2]).topk(2, dim=-1).indices, 1)
    gates = 2 * chosen * (z + bias[::2]) / (chosen * (z + bias[::2])).sum(-1, keepdim=True)
    experts = ((seen["x"] @ a.T) * gates.repeat_interleave(2, dim=-1)) @ b.T
    expected = seen["x"] @ linear.weight.double().T + reference.params["alpha"] / 4 * experts
    torch.testing.assert_close(seen["y"], expected, rtol=1e-5, atol=1e-5)


def test_loss_is_on_prompts_too_or_on_answers_alone() -> None:
    sample = examples()[0]
    assert with_prompts(sample)["labels"].tolist() == [-100, *sample["input_ids"][1:].tolist()]
    everywhere, answers = trained(), trained(loss_on="response")
    assert everywhere.log.train[0].loss != answers.log.train[0].loss
    assert everywhere.log != answers.log


def test_the_balance_is_gone_on_with_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(steps=6, lr=1e-2, batch=2, accumulate=2, save_every=2)
    given = {"balance": 0.05, "config": config, "experts": ExpertSettings(r=8, k=2, dropout=0.1)}
    whole = trained(**given)

    def stop(callback: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("transformers.TrainerCallback.on_optimizer_step", stop)
        with pytest.raises(KeyboardInterrupt):
            trained(**given, work=Work(tmp_path))
    again = trained(**given, work=Work(tmp_path))
    assert again.log == whole.log and again.findings == whole.findings
    ours, theirs = (load_file(each.plan.adapters[0].located) for each in (again, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(each, theirs[name]) for name, each in ours.items())
    steps = {float(each) for name, b in ours.items() if name.endswith("biases") for each in (b / 0.05).abs().unique()}
    assert max(steps) <= 12.001 and len(steps) > 2  # once for each of two passes in six steps


def test_gradient_checkpointing_of_the_model_changes_nothing() -> None:
    found = []
    for checkpointed in (False, True):
        stack = Stack(nano("llama"))
        if checkpointed:
            stack.model.gradient_checkpointing_enable({"use_reentrant": False})
        result = smora(stack, examples(), experts=SMALL, config=CONFIG, balance=0.05)
        found.append(load_file(result.plan.adapters[0].located))
    assert all(torch.equal(each, found[1][name]) for name, each in found[0].items())


def test_it_trains_under_a_cut_and_goes_where_the_plan_goes(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    cut = Plan(model=ModelReference.of(stack), drop=["layers.1", "layers.2.attn"])
    result = smora(stack, examples(), cut, experts=SMALL, config=CONFIG)
    assert result.plan.adapters[0].sites == ["layers.0", "layers.2.mlp", "layers.3"]
    assert result.plan.drop == cut.drop and not any(".layers.1." in name for name in result.findings["load"])
    only = trained(targets=("q_proj", "v_proj"), sites=("layers.3.attn",))
    assert list(only.findings["load"]) == [f"model.layers.3.self_attn.{each}_proj" for each in "qv"]
    moved = Plan(model=cut.model, path={"text": PhasedPath(prefill=[0, 3, 1], decode=[0, 3, 1])})
    assert torch.isfinite(apply(stack, compose(only.plan, moved))(IDS).logits).all()
    with pytest.raises(MethodError, match="give a plan that only removes"):
        smora(stack, examples(), moved, experts=SMALL, config=CONFIG)
    with pytest.raises(MethodError, match=r"nothing at layers\.1 runs under the plan:"):
        smora(stack, examples(), cut, experts=SMALL, config=CONFIG, sites=("layers.1",))


def test_usage_counts_k_ranks_for_each_token_and_parts_tasks_by_what_they_choose() -> None:
    result = trained(config=TrainConfig(steps=40, lr=1e-2, batch=4))
    view = result.view
    made = {name.removesuffix(".lamella_adapter"): each
            for name, each in view.named_modules() if isinstance(each, RankExperts)}  # fmt: skip
    given = examples().by_task()
    usage = Usage.of(view, made, given)
    tokens = {task: sum(len(each["input_ids"]) for each in samples) for task, samples in given.items()}
    assert all(torch.equal(usage.counts[task].sum(1), torch.full((28,), 2.0 * count)) for task, count in tokens.items())
    same = Usage.of(view, made, {"one": given["turn"], "other": given["turn"]})
    assert float(same.similarity()[0, 1]) == pytest.approx(1, abs=1e-6)
    assert float(usage.similarity()[0, 1]) < 1
    answers = Usage.of(view, made, given, answers=True)
    assert float(answers.counts["turn"].sum()) == 28 * 2 * 4 * 6
    load = usage.load()
    counts = usage.total[0]
    assert load[0][0] == pytest.approx(float(counts.std(correction=0) / counts.mean()), rel=1e-5)
    assert load[0][1] == int((counts == 0).sum())


def test_losses_are_reported_for_held_out_examples_and_routing_is_counted_on_many() -> None:
    given = examples(40).by_task()
    result = smora(Stack(nano("llama")), examples(40), experts=SMALL, config=CONFIG)
    assert {task: each["examples"] for task, each in result.findings["tasks"].items()} == {"turn": 1, "repeat": 1}
    counts = json.loads(result.files["usage.json"])["counts"]
    for task, samples in given.items():
        tokens = sum(len(each["input_ids"]) for each in samples)
        assert all(sum(of_map) == SMALL.k * tokens for of_map in counts[task])


# Data


def context() -> InputContext:
    return InputContext(lambda: AutoTokenizer.from_pretrained(NANO))


def rows(file: Path, *given: Any) -> Path:
    file.write_text("".join(json.dumps(each) + "\n" for each in given))
    return file


def test_a_task_is_called_as_its_file_or_as_its_rows_say(tmp_path: Path) -> None:
    record = {"prompt": "What purrs?", "completion": "A cat."}
    one = rows(tmp_path / "animals.jsonl", record, record)
    other = rows(tmp_path / "mixed.jsonl", record | {"task": "sounds"}, {"messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})  # fmt: skip
    found = TaskExamples.open([one, other], context())
    assert found.tasks == ["animals", "animals", "sounds", "mixed"] and len(found) == 4
    assert [each["data"] for each in found.describe()["files"]] == [str(one), str(other)]
    train, held_out = found.split(0.01, seed=0)
    assert len(train) == 3 and {task: len(each) for task, each in held_out.items()} == {
        "animals": 1, "sounds": 0, "mixed": 0
    }  # fmt: skip
    with pytest.raises(CalibrationError, match="line 2 has no prompt with an answer"):
        TaskExamples.open(rows(tmp_path / "bad.jsonl", record, {"prompt": "What?"}), context())


# Bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"experts": ExpertSettings(r=17, k=2)},
            r"r 17 exceeds the size of model\.layers\.0\.self_attn\.k_proj, which is 32 to 16",
        ),
        ({"experts": ExpertSettings(r=4, k=8)}, "k 8 of r 4: give the number of ranks per token,"),
        ({"experts": ExpertSettings(r=8, k=4, p=3)}, "p 3: the size of blocks of ranks"),
        ({"targets": ("nothing",)}, "no linear module is named 'nothing'"),
        ({"sites": ("layers.9",)}, "out of range"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(LamellaError, match=message) as error:
        trained(**given, work=Work(tmp_path / "work"))
    assert "\n" not in str(error.value) and not list((tmp_path / "work").rglob("checkpoint-*"))


def test_it_cannot_be_merged_which_is_an_error(tmp_path: Path) -> None:
    result = trained()
    for form in ("plain", "portable"):
        with pytest.raises(PlanError, match="the adapter of smora cannot be merged into its linear layers"):
            export(result.stack, result.plan, tmp_path / "merged", form=form)
    result.save(tmp_path / "out", dict)
    with pytest.raises(CheckpointError, match="is not the folder of a LoRA adapter"):
        Adapter.open(tmp_path / "out")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: e * torch.nan if "lora_B" in n else e for n, e in t.items()}, "values that are not finite"),
        (lambda t: {n: e[:4] if "lora_A" in n else e for n, e in t.items()}, r"'lora_A' is \[4, 64\]"),
        (lambda t: {n: e for n, e in t.items() if "lora_biases" not in n}, "'lora_biases' is None"),
    ],
)
def test_a_damaged_adapter_is_refused_in_one_line(change: Any, message: str, tmp_path: Path) -> None:
    stack, plan = Stack(nano("llama")), trained().plan
    file, digest = sidefile.named(tmp_path, "smora", change(load_file(plan.adapters[0].located)))
    other = plan.adapters[0].model_copy(update={"file": file, "sha256": digest})
    other._folder = tmp_path
    with pytest.raises(PlanError, match=message) as error:
        apply(stack, plan.model_copy(update={"adapters": [other]}))
    assert "\n" not in str(error.value)


def test_an_adapter_for_another_base_is_refused() -> None:
    plan, other = trained().plan, nano("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight += 1
    with pytest.raises(PlanError, match="has other weights than the model that it was trained with"):
        apply(Stack(other), plan)
    with pytest.raises(PlanError, match="this plan is for"):
        apply(Stack(nano("gpt2")), plan)


def test_a_run_of_lamella_writes_a_page_with_routing_and_load(tmp_path: Path) -> None:
    done = run("smora", NANO, train=str(rows(tmp_path / "tasks.jsonl", *(
        {"task": "ab"[n % 2], "prompt": f"number {n}", "completion": f"is {n}"} for n in range(8)))),
        out=tmp_path / "out", r=4, k=2, steps=2, batch=2, accumulate=1, test="pydoc")  # fmt: skip
    page, readme = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    assert "Usage of ranks by task" in page and "variation of the load" in page
    usage = next(each for each in figures(done.evidence) if isinstance(each, Heatmap))
    sharpest = done.evidence.findings["sharpest"]["shares"]
    assert usage.rows == list(sharpest) == ["a", "b"] and usage.values == list(sharpest.values())
    assert "lamella.apply" in readme and done.evidence.findings["layers"] == 42
    usage = json.loads((tmp_path / "out" / "usage.json").read_text())
    assert set(usage["counts"]) == {"a", "b"} and len(usage["layers"]) == 42
