"""Task scores, compared with transformers alone, one answer at a time, without batches and padding."""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import lamella as package
from lamella.data import load_text, windows
from lamella.errors import ArchitectureError, DownloadError, LamellaError, TaskError
from lamella.evaluate.tasks import TaskScore, open_tasks, score
from lamella.evaluate.tasks.language_model import PlannedLM
from lamella.evaluate.tasks.own import questions
from lamella.evaluate.tasks.running import passes
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.runtime import Draft, Drafted, apply
from lamella.stack import Model, Stack
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parent.parent / "models" / "nano-llama"
KEPT = [0, 2, 5]
CONTEXTS = ("Definition: a tower by the sea\nWord:", "The", "one two three four five six seven", "")
ANSWERS = (" lighthouse", " x", " a rather long answer, in several words")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(AutoModelForCausalLM.from_pretrained(NANO_LLAMA))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(NANO_LLAMA)


class Request:
    """As the harness hands them over."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def pair(tokenizer: Any, context: str, answer: str) -> tuple[list[int], list[int]]:
    begin = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    if not context:
        return begin, tokenizer(answer, add_special_tokens=False)["input_ids"]
    before, whole = tokenizer(context)["input_ids"], tokenizer(context + answer)["input_ids"]
    return before, whole[len(before) :]


def static_logits(model: Any, context: list[int], answer: list[int]) -> Tensor:
    """Of a copy of the model that has the kept layers only, for every token of the answer."""
    thin = only(model, KEPT)
    return thin(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]


def phased_logits(model: Any, context: list[int], answer: list[int]) -> Tensor:
    """The context through the whole model, the answer token by token through the kept layers and their cache."""
    cache = DynamicCache(config=model.config)
    parts = [model(torch.tensor([context]), cache=cache, use_cache=True).logits[0, -1:]]
    cache.layers = [cache.layers[layer] for layer in KEPT]
    thin = only(model, KEPT)
    for token in answer[:-1]:
        parts.append(thin(torch.tensor([[token]]), cache=cache, use_cache=True).logits[0])
    return torch.cat(parts)


def only(model: Any, kept: list[int]) -> Any:
    thin = copy.deepcopy(model)
    thin.model.layers = nn.ModuleList(thin.model.layers[layer] for layer in kept)
    for slot, layer in enumerate(thin.model.layers):
        layer.self_attn.layer_idx = slot
    thin.config.num_hidden_layers = thin.model.config.num_hidden_layers = len(kept)
    return thin


def likelihood(logits: Tensor, answer: list[int]) -> tuple[float, bool]:
    log_p = logits.double().log_softmax(-1)
    each = log_p[range(len(answer)), answer]
    return float(each.sum()), log_p.argmax(-1).tolist() == answer


def plans(stack: Stack) -> dict[str, tuple[Plan, Any]]:
    gone = [f"layers.{layer}" for layer in range(len(stack)) if layer not in KEPT]
    path = {"text": PhasedPath(prefill=list(range(len(stack))), decode=KEPT)}
    reference = ModelReference.of(stack)
    return {
        "static": (Plan(model=reference, drop=gone), static_logits),
        "phased": (Plan(model=reference, path=path), phased_logits),
    }


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("kind", ["static", "phased"])
def test_the_likelihood_of_an_answer_is_that_of_transformers_alone(
    stack: Stack, tokenizer: Any, kind: str, batch: int
) -> None:
    plan, logits = plans(stack)[kind]
    asked = [(context, answer) for context in CONTEXTS for answer in ANSWERS]
    found = PlannedLM(apply(stack, plan), tokenizer, batch).loglikelihood([Request(*each) for each in asked])
    for (context, answer), (value, greedy) in zip(asked, found, strict=True):
        tokens = pair(tokenizer, context, answer)
        expected = likelihood(logits(stack.model, *tokens), tokens[1])
        assert (value, greedy) == (pytest.approx(expected[0], abs=1e-3), expected[1]), (context, answer)


def test_a_prompt_at_full_depth_and_a_thin_answer_are_not_a_thin_model(stack: Stack, tokenizer: Any) -> None:
    requests = [Request(CONTEXTS[0], ANSWERS[2])]
    values = [PlannedLM(apply(stack, plan), tokenizer).loglikelihood(requests) for plan, _ in plans(stack).values()]
    assert abs(values[0][0][0] - values[1][0][0]) > 0.1


@pytest.mark.parametrize("method", ["ffn-skip", "lora-drop", "unified-skip", "void"])
def test_a_policy_decides_in_a_batch_of_answers_as_it_does_step_by_step(
    stack: Stack, tokenizer: Any, method: str
) -> None:
    tokens = windows(tokenizer, load_text("pydoc", "calibration"), 2, 64)
    series = package.make_plan(method, stack, tokens)
    view = apply(stack, series[-1])
    assert not series[-1].is_static
    asked = [(context, answer) for context in CONTEXTS[:3] for answer in ANSWERS]
    found = PlannedLM(view, tokenizer, batch=4).loglikelihood([Request(*each) for each in asked])
    for (context, answer), (value, _) in zip(asked, found, strict=True):
        before, behind = pair(tokenizer, context, answer)
        out = view(torch.tensor([before]), use_cache=True)
        steps = [out.logits[0, -1:]]
        for token in behind[:-1]:
            out = view(torch.tensor([[token]]), cache=out.cache, use_cache=True)
            steps.append(out.logits[0])
        assert value == pytest.approx(likelihood(torch.cat(steps), behind)[0], abs=1e-3), (context, answer)


def test_a_text_longer_than_the_model_holds_is_scored_in_windows_each_token_once(tokenizer: Any) -> None:
    small = nano("llama", max_position_embeddings=16, vocab_size=len(tokenizer))
    text = "a text that has more tokens than the model can hold, so that it is read in several windows, one by one"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) > 32
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    expected = 0.0
    for start in range(0, len(tokens), 16):  # as the harness cuts: the last window reaches back to be whole
        stop = min(start + 16, len(tokens))
        reach = [begin, *tokens][max(0, stop - 16) : stop] if start else [begin, *tokens][:stop]
        log_p = small(torch.tensor([reach])).logits[0].double().log_softmax(-1)
        scored = tokens[start:stop]
        expected += float(log_p[range(len(reach) - len(scored), len(reach)), scored].sum())
    (found,) = PlannedLM(small, tokenizer).loglikelihood_rolling([Request(text)])
    assert found == pytest.approx(expected, abs=1e-3)


def test_what_is_written_is_what_generate_writes_alone_up_to_the_stop(stack: Stack, tokenizer: Any) -> None:
    view = apply(stack, plans(stack)["phased"][0])
    contexts = [context for context in CONTEXTS if context]
    texts = []
    for context in contexts:
        ids = torch.tensor([tokenizer(context)["input_ids"]])
        out = view.generate(input_ids=ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    stop = texts[0][3:5]
    for until in ([], [stop]):
        settings = {"until": until, "max_gen_toks": 24, "temperature": 0.0}
        found = PlannedLM(view, tokenizer, 3).generate_until([Request(context, settings) for context in contexts])
        assert found == [text.split(stop)[0] if until else text for text in texts]


def test_answers_with_a_draft_are_those_without_it(stack: Stack, tokenizer: Any) -> None:
    requests = [Request(context, {"until": ["."], "max_gen_toks": 24, "temperature": 0.0}) for context in CONTEXTS[:3]]
    writer = Drafted(stack.model, Draft())
    found = PlannedLM(stack, tokenizer, 3, writer).generate_until(requests)
    assert found == PlannedLM(stack, tokenizer, 3).generate_until(requests)
    assert writer.counted.tokens > 0


def test_generation_takes_no_setting_that_loads_code(stack: Stack, tokenizer: Any) -> None:
    for asked in ({"custom_generate": "somebody/code", "trust_remote_code": True}, {"top_k": "os.system"}):
        with pytest.raises(TaskError, match="supported generation_kwargs are until"):
            PlannedLM(stack, tokenizer).generate_until([Request("a", asked)])


def test_definitions_score_what_argmax_over_the_four_words_says(stack: Stack, tokenizer: Any) -> None:
    (found,) = score(stack, tokenizer, ["definitions"], limit=12)
    right = []
    for row in questions()[:12]:
        context = f"Definition: {row['definition']}\nWord:"
        values = []
        for word in row["words"]:
            before, behind = pair(tokenizer, context, f" {word}")
            logits = stack.model(torch.tensor([before + behind])).logits[0, len(before) - 1 : -1]
            values.append(likelihood(logits, behind)[0])
        right.append(float(values.index(max(values)) == row["answer"]))
    assert found.each == tuple(right) and 0 < sum(right) < 12
    assert found.value.mean == pytest.approx(statistics.mean(right))
    assert found.value.error == pytest.approx(statistics.stdev(right) / math.sqrt(12))
    assert (found.task, found.metric, found.questions) == ("definitions", "acc", 12)


def test_the_difference_of_two_models_is_taken_question_by_question(stack: Stack, tokenizer: Any) -> None:
    (whole,) = score(stack, tokenizer, ["definitions"], limit=20)
    (thin,) = score(apply(stack, plans(stack)["static"][0]), tokenizer, ["definitions"], limit=20)
    gaps = [b - a for a, b in zip(whole.each, thin.each, strict=True)]
    since = thin.since(whole)
    assert since is not None and since.mean == pytest.approx(statistics.mean(gaps))
    assert since.error == pytest.approx(statistics.stdev(gaps) / math.sqrt(20))
    (fewer,) = score(stack, tokenizer, ["definitions"], limit=5)
    assert fewer.since(whole) is None and whole.each[:5] == fewer.each


def test_definitions_are_three_hundred_questions_and_more_with_one_right_answer() -> None:
    rows = questions()
    kinds: dict[str, str] = {}
    for row in rows:
        kinds[row["word"]] = "verb" if row["definition"].startswith("to ") else "other"
    assert len(rows) >= 300 and len(kinds) == len(rows) == len({row["definition"] for row in rows})
    for row in rows:
        assert len(set(row["words"])) == 4 and row["words"][row["answer"]] == row["word"]
        assert len({kinds[word] for word in row["words"]}) == 1  # grammar does not give it away
        assert row["word"] not in row["definition"].lower().replace(",", "").split()
    for place in range(4):  # nor does the position
        assert sum(row["answer"] == place for row in rows) / len(rows) == pytest.approx(0.25, abs=0.07)


def test_no_definition_stands_in_the_text_that_models_are_healed_on() -> None:
    for name in ("pydoc", "stdlib"):
        text = " ".join(" ".join(load_text(name, split)[:] for split in ("calibration", "test")).split())
        assert not [row["word"] for row in questions() if row["definition"] in text]


def test_a_model_that_does_not_continue_text_and_one_without_a_template_are_refused(
    stack: Stack, tokenizer: Any
) -> None:
    with pytest.raises(ArchitectureError, match="does not continue text by itself"):
        score(Model(nano("t5")), tokenizer, ["definitions"])
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(TaskError, match="no chat template"):
        score(stack, bare, ["definitions"], limit=2, chat=True)


def test_questions_use_the_chat_template_on_request(stack: Stack, tokenizer: Any) -> None:
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}<assistant>"
    (found,) = score(stack, talking, ["definitions"], limit=2, chat=True)
    row = questions()[0]
    context = f"<user>Definition: {row['definition']}\nWord:<assistant>"
    values = [
        likelihood(static_whole(stack, *pair(tokenizer, context, word)), pair(tokenizer, context, word)[1])[0]
        for word in row["words"]
    ]
    assert found.chat and found.each[0] == float(values.index(max(values)) == row["answer"])


def static_whole(stack: Stack, context: list[int], answer: list[int]) -> Tensor:
    return stack.model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]


# Task files.

ROWS = [
    {"country": "France", "cities": ["Paris", "Rome"], "answer": 0},
    {"country": "Italy", "cities": ["Bonn", "Rome"], "answer": 1},
]
TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: capitals.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: "{{cities}}"
doc_to_target: "{{answer}}"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "tasks"
    place.mkdir()
    (place / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (place / "capitals.yaml").write_text(TASK, encoding="utf-8")
    (place / "beside.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "def text(row):\n    return 'The capital of ' + row['country']\n",
        encoding="utf-8",
    )
    (tmp_path / "secret.jsonl").write_text('{"country": "a", "cities": ["b", "c"], "answer": 0}\n', encoding="utf-8")
    (tmp_path / "secret.yaml").write_text("num_fewshot: 1\n", encoding="utf-8")
    return place


def test_a_task_file_is_scored_with_the_data_in_its_folder(folder: Path, stack: Stack, tokenizer: Any) -> None:
    found = score(stack, tokenizer, [str(folder / "capitals.yaml")])
    right = []
    for row in ROWS:
        context = f"The capital of {row['country']} is"
        values = [
            likelihood(
                static_whole(stack, *pair(tokenizer, context, f" {city}")), pair(tokenizer, context, f" {city}")[1]
            )
            for city in row["cities"]  # type: ignore[attr-defined]
        ]
        right.append(float(values.index(max(values)) == row["answer"]))
    assert [each.metric for each in found] == ["acc", "acc_norm"]
    assert found[0].each == tuple(right) and found[0].questions == 2


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("doc_to_text: !function beside.text", "names the Python function beside.text, which is not run by default"),
        ("x: !!python/object/apply:os.system [echo]", "is not valid YAML"),
        ("process_docs: beside.text", "'process_docs' is not a plain value"),
        ("class: beside.text", "'class' is not a plain value"),
        ("custom_dataset: beside.text", "'custom_dataset' is not a plain value"),
        ("use_prompt: promptsource:all", "'use_prompt' is not a plain value"),
        ("unsafe_code: true", "'unsafe_code' is not a plain value"),
        ("metric_list: [{metric: ./beside.py}]", "the metric './beside.py' is not one of"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "loads a metric's code"),
        ("filter_list: [{name: a, filter: [{function: custom, filter_fn: beside.text}]}]", "the filter 'custom'"),
        ("filter_list: [{name: a, filter: [{function: decontaminate, path: /etc/passwd}]}]", "the filter 'decontamin"),
        ("fewshot_config: {process_docs: beside.text}", "fewshot_config has the unknown key 'process_docs'"),
        ("fewshot_config: {sampler: beside.Sampler}", "the sampler"),
        ("include: ../secret.yaml", "is outside its folder"),
        ("include: /etc/hostname", "is outside its folder"),
        ("include: capitals.yaml", "includes itself"),
        ("dataset_path: somebody/dataset", "'somebody/dataset' is not next to the file"),
        ("dataset_kwargs: {data_files: {test: ../secret.jsonl}}", "is outside its folder"),
        ("dataset_kwargs: {data_files: {test: /etc/passwd}}", "is outside its folder"),
        ("dataset_kwargs: {data_files: {test: link.jsonl}}", "is outside its folder"),
        ("dataset_kwargs: {data_files: {test: 'https://host/x.jsonl'}}", "there is no file"),
        ("dataset_kwargs: {data_files: {train: capitals.jsonl}}", "test_split is 'test', but its data contain train"),
        ("test_split: null", "has no test_split"),
        ("task: [a, b]", "has no name"),
        ("output_type: poetry", "lm-eval cannot use it"),
        ("doc_to_text: '{{nothing_there}}'", "lm-eval cannot use it"),
    ],
)
def test_a_task_file_that_asks_for_more_than_its_values_is_refused_and_nothing_of_it_runs(
    folder: Path, line: str, why: str
) -> None:
    (folder / "link.jsonl").symlink_to(folder.parent / "secret.jsonl")
    key = line.partition(":")[0]
    kept = [each for each in TASK.splitlines() if not each.startswith(f"{key}:")]
    (folder / "capitals.yaml").write_text("\n".join([*kept, line]) + "\n", encoding="utf-8")
    with pytest.raises(TaskError, match=why.replace("(", r"\(")) as refusal:
        open_tasks([str(folder / "capitals.yaml")])
    assert str(folder) in str(refusal.value) and not (folder.parent / "ran").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ country.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ [].append.__self__.__class__.__base__.__subclasses__() }}",
        "{% for i in range(10000000000) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
@pytest.mark.parametrize("key", ["doc_to_text", "description", "gen_prefix"])
def test_a_template_reaches_nothing_but_its_document(
    folder: Path, stack: Stack, tokenizer: Any, template: str, key: str
) -> None:
    template = template.replace("RAN", str(folder.parent / "ran"))
    kept = [each for each in TASK.splitlines() if not each.startswith(f"{key}:")]
    text = "\n".join([*kept, f"{key}: {json.dumps(template)}"])
    (folder / "capitals.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(TaskError, match="lm-eval cannot use it"):
        score(stack, tokenizer, [str(folder / "capitals.yaml")])
    assert not (folder.parent / "ran").exists()


def test_a_trusted_task_file_may_name_functions_and_other_folders(folder: Path, stack: Stack, tokenizer: Any) -> None:
    text = TASK.replace('"The capital of {{country}} is"', "!function beside.text").replace(
        "capitals.jsonl", "../secret.jsonl"
    )
    (folder / "capitals.yaml").write_text(text, encoding="utf-8")
    found = score(stack, tokenizer, [str(folder / "capitals.yaml")], trusted=True)
    assert found[0].questions == 1 and (folder.parent / "ran").exists()


def test_what_a_task_file_includes_stands_below_what_it_says(folder: Path) -> None:
    (folder / "parts").mkdir()
    (folder / "parts" / "base.yaml").write_text(TASK.replace("capitals\n", "other\n"), encoding="utf-8")
    (folder / "capitals.yaml").write_text("include: parts/base.yaml\ntask: mine\n", encoding="utf-8")
    assert list(open_tasks([str(folder / "capitals.yaml")])) == ["mine"]


# What the model writes is run.


def test_a_program_passes_when_it_comes_to_its_end() -> None:
    assert passes("import math\nassert math.gcd(12, 18) == 6")
    assert not passes("assert False")
    assert not passes("def broken(:")
    for leave in ("import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"):
        assert not passes(leave)


def test_a_program_has_little_time_and_memory() -> None:
    assert not passes("while True: pass", seconds=1)
    assert not passes("import time; time.sleep(60)", seconds=1)
    assert not passes(f"bytearray({1 << 33})")
    assert not passes("import os\nfor file in range(3, 9):\n    while True: os.write(file, b'x' * 4096)", seconds=1)


@pytest.mark.skipif(sys.platform != "linux", reason="what is taken away from a program is Linux's")
def test_a_program_reaches_neither_files_nor_the_network_nor_other_processes(tmp_path: Path) -> None:
    from lamella.evaluate.tasks.running import WANTED, _run

    if missing := WANTED.keys() - set(_run("")[0]):
        pytest.skip(f"this system takes no {' and '.join(sorted(missing))} away")
    file = tmp_path / "file"
    file.write_text("kept", encoding="utf-8")
    for attack in (
        f"open({str(file)!r}, 'w')",
        f"import os; os.remove({str(file)!r})",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)",
        "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)",
    ):
        assert not passes(attack), attack
    assert file.read_text(encoding="utf-8") == "kept" and list(tmp_path.iterdir()) == [file]
    assert passes("import os\nassert os.getpid() == 1 and not os.environ.get('HOME')")
    assert passes("import socket\ns = socket.socket()\nassert s.connect_ex(('127.0.0.1', 9)) == 101")  # unreachable


def test_humaneval_is_run_only_where_that_is_allowed() -> None:
    with pytest.raises(TaskError, match="humaneval runs code that the model generates: allow it with --run-generated"):
        open_tasks(["humaneval"])


@pytest.mark.network
def test_the_solutions_of_humaneval_pass_and_wrong_ones_do_not() -> None:
    task = open_tasks(["humaneval"], run_generated_code=True)["humaneval"]
    for row in list(task.test_docs())[:5]:
        assert task.process_results(row, [row["canonical_solution"]]) == {"pass@1": 1.0}
        assert task.process_results(row, ["    return None\n"]) == {"pass@1": 0.0}


@pytest.mark.network
def test_gsm8k_asks_behind_eight_worked_examples_and_takes_the_number(stack: Stack, tokenizer: Any) -> None:
    task = open_tasks(["gsm8k"])["gsm8k"]
    row = task.test_docs()[0]
    context = task.fewshot_context(row, 8)
    assert context.count("Q: ") == 9 and context.endswith(f"Q: {row['question']}\nA:")
    assert task.doc_to_target(row) == row["answer"].split("#### ")[-1]


# Asking for tasks.


def test_unknown_tasks_and_no_limit_are_refused_in_one_line(stack: Stack, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no task file .*mine.yaml: give an existing"):
        open_tasks([str(tmp_path / "mine.yaml")])
    with pytest.raises(TaskError, match="no task is named"):
        open_tasks([])
    with pytest.raises(TaskError, match="a limit of 0"):
        score(stack, tokenizer, ["definitions"], limit=0)


@pytest.mark.slow
def test_a_name_of_lm_evals_is_looked_up_there_and_a_wrong_one_is_refused_with_the_nearest() -> None:
    with pytest.raises(TaskError, match=r"no task 'hellaswagg': there are definitions.*did you mean hellaswag\?"):
        open_tasks(["hellaswagg"])
    with pytest.raises(DownloadError, match=r"cannot load lm-eval's task 'hellaswag'.*need no network"):
        open_tasks(["hellaswag"])


def test_without_lm_eval_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, stack: Stack, tokenizer: Any
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LamellaError, match=r"scoring on tasks needs lm_eval: pip install 'lamella\[eval\]'"):
        score(stack, tokenizer, ["definitions"])


def test_the_record_of_a_score_says_its_error_version_and_questions(stack: Stack, tokenizer: Any) -> None:
    (found,) = score(stack, tokenizer, ["definitions"], limit=4)
    assert isinstance(found, TaskScore)
    document = found.as_dict()
    assert document.keys() == {"task", "metric", "mean", "error", "questions", "version", "shots", "chat"}
    assert (document["questions"], document["version"], document["chat"]) == (4, "1", False) and json.dumps(document)
