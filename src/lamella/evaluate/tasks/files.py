"""Custom task files in lm-eval's YAML format; they execute nothing and refer to nothing outside the file's folder.

Such a file can name Python functions (``!function``), metrics and prompts that are loaded as code, and data anywhere.
An untrusted task consists of plain values: templates, numbers, names of lm-eval's own metrics and filters, and data
next to the file, as JSON lines::

    task: capitals
    dataset_path: json
    dataset_kwargs: {data_files: {test: capitals.jsonl}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "The capital of {{country}} is"
    doc_to_choice: "{{cities}}"
    doc_to_target: "{{answer}}"

Imported only where lm-eval is installed.
"""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.task import ConfigurableTask

from lamella.errors import TaskError
from lamella.evaluate.tasks.harness import CustomTask, task_errors
from lamella.reading import read_rows, read_text

ALLOW = "--trust-tasks (trusted=True in Python) allows it, if you trust the file's author"
TEMPLATES = {"doc_to_text", "doc_to_choice", "doc_to_target", "gen_prefix", "fewshot_delimiter", "target_delimiter"}
KEYS = TEMPLATES | {
    "dataset_kwargs",
    "dataset_name",
    "dataset_path",
    "description",
    "fewshot_config",
    "fewshot_split",
    "filter_list",
    "generation_kwargs",
    "include",
    "metadata",
    "metric_list",
    "num_fewshot",
    "output_type",
    "repeats",
    "tag",
    "task",
    "task_alias",
    "test_split",
    "training_split",
    "validation_split",
}
SHOTS = TEMPLATES | {"sampler", "samples", "split", "fewshot_indices"}
SAMPLERS = {"default", "first_n"}
METRICS = {
    "acc",
    "acc_bytes",
    "acc_mutual_info",
    "acc_norm",
    "bits_per_byte",
    "bleu",
    "brier_score",
    "byte_perplexity",
    "chrf",
    "exact_match",
    "f1",
    "likelihood",
    "mcc",
    "perplexity",
    "ter",
    "word_perplexity",
}
FILTERS = {
    "lowercase",
    "majority_vote",
    "map",
    "multi_choice_regex",
    "regex",
    "remove_whitespace",
    "take_first",
    "take_first_k",
    "uppercase",
}


def read_task(file: Path, trusted: bool = False) -> dict[str, Any]:
    """Return the task of a file, by its name.

    Args:
        file: lm-eval's YAML.
        trusted: it may name Python functions, other files and data of the hub, which lm-eval then runs and loads.

    Raises:
        TaskError: for a file that is damaged, defines no task, or is not limited to plain values.
    """
    config = read_config(file, trusted)
    name = config.get("task")
    if not isinstance(name, str) or not name:
        raise TaskError(f"{file}: has no name: add 'task: NAME'; for a group of tasks, give the file of each")
    with task_errors(str(file)):
        if trusted and config.get("dataset_path") != "json":
            return {name: ConfigurableTask(config=config)}
        return {name: CustomTask(config, _documents(config, file, trusted))}


def read_config(file: Path, trusted: bool = False) -> dict[str, Any]:
    """Return the values of a task file, merged with those of the files that it includes.

    Args:
        file: the task file.
        trusted: as for :func:`read_task`.
    """
    return _read(file, trusted, seen=())


def _read(file: Path, trusted: bool, seen: tuple[Path, ...]) -> dict[str, Any]:
    if file.resolve() in seen:
        raise TaskError(f"{file}: includes itself: remove the include")
    text = _text(file)
    try:
        config = yaml.load(text, Loader=_loader(file, trusted))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise TaskError(f"{file}: is not valid YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise TaskError(f"{file}: is not a task: write names and values, such as 'task: NAME'")
    if not trusted:
        _check(config, file)
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        merged |= _read(_next_to(file, name, trusted), trusted, (*seen, file.resolve()))
    return merged | config


def _text(file: Path) -> str:
    if not file.is_file():
        raise TaskError(f"no task file {file}: give an existing .yaml file")
    return read_text(file, "give a task file in YAML")


def _loader(file: Path, trusted: bool) -> type[yaml.SafeLoader]:
    """Return a YAML loader of plain values, and of functions if the file is trusted."""

    class Loader(yaml.SafeLoader):
        """The loader of one file."""

    def function(loader: Loader, node: yaml.ScalarNode) -> Any:
        name = str(loader.construct_scalar(node))
        if not trusted:
            raise TaskError(f"{file}: names the Python function {name}, which is not run by default: {ALLOW}")
        return _function(file, name)

    Loader.add_constructor("!function", function)
    return Loader


def _function(file: Path, full_name: str) -> Any:
    """Return ``module.function`` from a file next to the task file, which is executed for it."""
    module, _, name = full_name.rpartition(".")
    source = file.parent / f"{module.replace('.', '/')}.py"
    if not module or not source.is_file():
        raise TaskError(f"{file}: there is no file {source} for its function {full_name}")
    spec = util.spec_from_file_location(f"{file.stem}.{module}", source)
    assert spec is not None and spec.loader is not None
    loaded = util.module_from_spec(spec)
    with task_errors(str(source)):
        spec.loader.exec_module(loaded)
        return getattr(loaded, name)


def _check(config: dict[str, Any], file: Path) -> None:
    """Check that a file contains only plain values.

    Raises:
        TaskError: naming the unsupported entry.
    """
    for key in sorted(config.keys() - KEYS):
        raise TaskError(f"{file}: '{key}' is not a plain value of a task file: {ALLOW}, or remove it")
    shots = _dictionary(config.get("fewshot_config"), file, "fewshot_config")
    for key in sorted(shots.keys() - SHOTS):
        raise TaskError(f"{file}: fewshot_config has the unknown key '{key}': {ALLOW}, or remove it")
    _one_of(shots.get("sampler", "default"), SAMPLERS, f"{file}: the sampler")
    for each in _list(config.get("metric_list"), file, "metric_list"):
        _one_of(each.get("metric"), METRICS, f"{file}: the metric")
        if each.get("hf_evaluate"):
            raise TaskError(f"{file}: hf_evaluate loads a metric's code from the hub: {ALLOW}, or remove it")
    for each in _list(config.get("filter_list"), file, "filter_list"):
        for step in _list(each.get("filter"), file, "filter_list"):
            _one_of(step.get("function"), FILTERS, f"{file}: the filter")


def _one_of(value: Any, known: set[str], what: str) -> None:
    if not isinstance(value, str) or value not in known:
        raise TaskError(f"{what} '{value}' is not one of lm-eval's own without code: {', '.join(sorted(known))}")


def _dictionary(value: Any, file: Path, what: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise TaskError(f"{file}: {what} must be names and values")
    return value or {}


def _list(value: Any, file: Path, what: str) -> list[dict[str, Any]]:
    if value is not None and not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
        raise TaskError(f"{file}: {what} must be a list of names and values")
    return value or []


def _next_to(file: Path, name: Any, trusted: bool) -> Path:
    """Return a file that a task file names, in its folder or below.

    Raises:
        TaskError: for a name that leads elsewhere, also by a link, or to nothing.
    """
    if not isinstance(name, str):
        raise TaskError(f"{file}: names '{name}' instead of a file next to it")
    path = file.parent / name
    if not trusted and not path.resolve().is_relative_to(file.parent.resolve()):
        raise TaskError(f"{file}: {name} is outside its folder: put the file next to it, or {ALLOW}")
    if not path.is_file():
        raise TaskError(f"{file}: there is no file {path}")
    return path


def _documents(config: dict[str, Any], file: Path, trusted: bool) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of a task's data by split, from JSON lines next to its file."""
    if config.get("dataset_path") != "json":
        raise TaskError(
            f"{file}: dataset_path '{config.get('dataset_path')}' is not next to the file: give JSON lines there "
            f"(dataset_path: json, dataset_kwargs: {{data_files: {{test: FILE.jsonl}}}}); {ALLOW}"
        )
    named = _dictionary(config.get("dataset_kwargs"), file, "dataset_kwargs").get("data_files")
    files = (
        named if isinstance(named, dict) else {"train": named}
    )  # the datasets library's name for the split of a single file
    documents = {}
    for split, name in files.items():
        path = _next_to(file, name, trusted)
        rows = [row for _, row in read_rows(path, 'write one object a line, such as {"question": "...", "answer": 0}')]
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise TaskError(f"{path}: has no documents: write one object a line")
        documents[str(split)] = rows
    for key in ("test_split", "validation_split", "training_split", "fewshot_split"):
        if config.get(key) is not None and config[key] not in documents:
            raise TaskError(f"{file}: {key} is '{config[key]}', but its data contain {' and '.join(documents)}")
    if config.get("test_split") is None and config.get("validation_split") is None:
        raise TaskError(f"{file}: has no test_split: name one of {' and '.join(documents)}")
    return documents
