"""A predictor that proposes paths for new prompts without their answers, trained on the paths found.

After Li, Li and Zhou, "Learning Program-of-Layers in LLMs", arXiv 2606.06574, the follow-up of CoLa (arXiv 2507.07996).

    path        0 1 2 3 | . . | 6 7 6 7 | 8 ...      a path is parsed into segments of consecutive layers,
    operation   keep    | skip| repeat  | keep       each at most 4 long: kept, skipped or run twice
    network     prompt's hidden states -> one query per layer -> does a segment begin here? which operation?

The paper encodes a prompt with a frozen sentence embedder. Here the features are the model's own hidden states after
the first quarter of its layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.nn.utils.rnn import pad_sequence

from lamella.errors import CalibrationError, CheckpointError, reason_of
from lamella.methods.cola.paths import PathStudy
from lamella.methods.cola.samples import Path, PathAnswerer, Problem, prompt_tokens, same
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.plan.filling import fill
from lamella.progress import track
from lamella.reading import parse_json
from lamella.stack import Stack, join
from lamella.zoo import open_tokenizer

Op = Literal["skip", "keep", "repeat"]
OPS: tuple[Op, ...] = ("skip", "keep", "repeat")
LONGEST = 4  # maximum number of layers in a segment
MOST_PATHS = 50  # maximum number of training paths per sample
IDENTITY_WEIGHT = 0.3  # weight of the unchanged model's path if a shorter one is correct too


class Segment(NamedTuple):
    """Consecutive layers and their operation.

    Attributes:
        start: the first layer.
        stop: one after the last layer.
        op: the operation.
    """

    start: int
    stop: int
    op: Op

    @property
    def layers(self) -> Path:
        """The layers that the segment executes."""
        once = tuple(range(self.start, self.stop))
        return {"skip": (), "keep": once, "repeat": once * 2}[self.op]


def compile_path(segments: Iterable[Segment]) -> Path:
    """Return the path of a sequence of segments."""
    return tuple(layer for segment in segments for layer in segment.layers)


def parse(path: Path, layers: int) -> list[Segment] | None:
    """Parse a path into its canonical segments: the fewest, then with the fewest skips, then with the most repeats.

    Args:
        path: the path.
        layers: number of layers of the model.

    Returns:
        The segments, or None for a path that segments cannot express, such as one that runs a layer three times.
    """
    # best[i, j]: the cost of expressing path[:j] with the layers before i, and the segments that do.
    best: dict[tuple[int, int], tuple[tuple[int, int, int], list[Segment]]] = {(0, 0): ((0, 0, 0), [])}
    for i in range(layers):
        for j in range(len(path) + 1):
            if (i, j) not in best:
                continue
            (count, skips, repeats), before = best[i, j]
            for stop in range(i + 1, min(i + LONGEST, layers) + 1):
                for op in OPS:
                    segment = Segment(i, stop, op)
                    end = j + len(segment.layers)
                    if path[j:end] != segment.layers:
                        continue
                    cost = (count + 1, skips + (op == "skip"), repeats - (op == "repeat"))
                    if (stop, end) not in best or cost < best[stop, end][0]:
                        best[stop, end] = cost, [*before, segment]
    found = best.get((layers, len(path)))
    return None if found is None else found[1]


class PredictorNetwork(nn.Module):
    """Predict for each layer, from the hidden states of a prompt, whether a segment begins there and its operation.

    Args:
        width: hidden size of the language model.
        layers: number of layers of the language model.
        hidden: hidden size of the predictor.
        heads: number of attention heads of the predictor.
    """

    def __init__(self, width: int, layers: int, hidden: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)  # unlike embeddings, hidden states have no common scale
        self.read = nn.Linear(width, hidden)
        self.queries = nn.Parameter(0.02 * torch.randn(layers, hidden))
        self.attend = nn.MultiheadAttention(hidden, heads, batch_first=True)
        block = nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.boundary = nn.Linear(hidden, 1)
        self.op = nn.Linear(hidden, len(OPS))

    def forward(self, features: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits of segment boundaries [batch, layers] and of operations [batch, layers, 3].

        Args:
            features: hidden states of prompts [batch, time, width].
            padding: True at padding [batch, time].
        """
        tokens = self.read(self.norm(features))
        queries = self.queries.expand(len(features), -1, -1)
        attended, _ = self.attend(queries, tokens, tokens, key_padding_mask=padding, need_weights=False)
        h = self.encoder(queries + attended)  # [batch, layers, hidden]
        return self.boundary(h).squeeze(-1), self.op(h)


class PredictorScore(NamedTuple):
    """Accuracy of a predictor on held-out samples, with every proposed path executed.

    Attributes:
        samples: number of samples.
        base: fraction that the unchanged model answers correctly.
        pass_1: fraction that the first proposed path answers correctly.
        pass_5: fraction that any of the first five answers correctly; choosing it needs the answer.
        mean_length: mean length of the first proposed paths.
    """

    samples: int
    base: float
    pass_1: float
    pass_5: float
    mean_length: float


@dataclass(frozen=True)
class PathPredictor:
    """Propose paths for prompts of one model; see :func:`train_predictor`.

    Attributes:
        model: the language model.
        network: the trained network.
        chat: whether prompts are formatted with the chat template.
    """

    model: ModelReference
    network: PredictorNetwork
    chat: bool

    @torch.no_grad()
    def propose(self, stack: Stack, prompt: str, tokenizer: Any = None, paths: int = 5) -> list[Path]:
        """Return the most likely paths for a prompt, most likely first.

        Args:
            stack: the language model.
            prompt: the prompt.
            tokenizer: the model's own tokenizer if None.
            paths: maximum number of paths.
        """
        tokenizer = tokenizer or open_tokenizer(stack.path or stack.name)
        features = prompt_features(stack, tokenizer, prompt, self.chat)[None]
        boundary, ops = self.network(features, torch.zeros(features.shape[:2], dtype=torch.bool))
        return decode(boundary[0], ops[0], paths)

    def plan(self, stack: Stack, prompt: str, tokenizer: Any = None) -> Plan:
        """Return the plan of the most likely path: it needs no answer, and is as good as the measured pass@1.

        Args:
            stack: the language model.
            prompt: the prompt.
            tokenizer: the model's own tokenizer if None.
        """
        path = list(self.propose(stack, prompt, tokenizer, 1)[0])
        phases = {stack.architecture.stack: PhasedPath(prefill=path, decode=path)}
        return Plan(model=self.model, path=phases, provenance={"method": "cola", "chosen_by": "path predictor"})

    def score(
        self, stack: Stack, samples: Iterable[Problem], tokenizer: Any = None, tokens: int = 10
    ) -> PredictorScore:
        """Evaluate the proposed paths on held-out samples.

        Args:
            stack: the language model.
            samples: held-out samples.
            tokenizer: the model's own tokenizer if None.
            tokens: maximum number of new tokens of an open answer.
        """
        tokenizer = tokenizer or open_tokenizer(stack.path or stack.name)
        identity = tuple(range(len(stack)))
        rows = []
        for sample in track(list(samples), "running proposed paths"):
            answerer = PathAnswerer(stack, tokenizer, sample, tokens, self.chat)
            proposed = self.propose(stack, sample.prompt, tokenizer)
            right = [same(answerer(path), sample.answer) for path in proposed]
            rows.append((same(answerer(identity), sample.answer), right[0], any(right), len(proposed[0])))
        if not rows:
            raise CalibrationError("no held-out samples: give at least one prompt with its answer")
        base, first, any_of, length = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        return PredictorScore(len(rows), base, first, any_of, length)

    def save(self, file: str | File) -> None:
        """Write the weights and metadata to one safetensors file."""
        about = {"model": self.model.model_dump_json(), "chat": json.dumps(self.chat)}
        save_file(self.network.state_dict(), file, metadata=about)

    @classmethod
    def load(cls, file: str | File, stack: Stack) -> PathPredictor:
        """Load a predictor for this model.

        Args:
            file: the safetensors file.
            stack: the language model.

        Raises:
            CheckpointError: if the file is not a predictor, or one of another model.
        """
        try:
            with safe_open(file, "pt") as stored:
                about = stored.metadata()
                model, chat = ModelReference.parse(about["model"]), bool(parse_json(about["chat"]))
                weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except Exception as error:
            reason = reason_of(error)
            raise CheckpointError(f"{file}: not a path predictor ({reason}): train one with `lamella cola`") from None
        if model.architecture != ModelReference.of(stack).architecture:
            raise CheckpointError(f"{file}: a path predictor for {model.name}, not for {stack.name}: train one for it")
        network = PredictorNetwork(stack.config.hidden_size, len(stack))
        fill(network, weights, str(file))
        return cls(model, network.eval(), chat)


@torch.no_grad()
def prompt_features(stack: Stack, tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """Return the features of a prompt: the model's hidden states after the first quarter of its layers [time, hidden].

    Args:
        stack: the language model.
        tokenizer: its tokenizer.
        prompt: the prompt.
        chat: whether to format it with the chat template.
    """
    context = stack.context(prompt_tokens(tokenizer, prompt, chat, stack.device))
    return join(stack.run(context.h, 0, 2 * max(1, len(stack) // 4), context))[0].float().cpu()


def decode(boundary: Tensor, ops: Tensor, paths: int, beam: int = 5) -> list[Path]:
    """Decode the most likely distinct paths: segments begin where p > 0.5, operations are chosen by beam search.

    Args:
        boundary: logits [layers]; layer 0 always begins a segment, and segments have at most 4 layers.
        ops: logits [layers, 3].
        paths: number of paths, at most ``beam``.
        beam: beam size; each segment is extended by its two most likely operations.
    """
    starts = [0]
    for layer in range(1, len(boundary)):
        if boundary[layer] > 0 or layer - starts[-1] == LONGEST:
            starts.append(layer)
    scores = ops.log_softmax(-1)
    beams: list[tuple[float, list[Segment]]] = [(0.0, [])]
    for start, stop in zip(starts, [*starts[1:], len(boundary)], strict=True):
        grown = [
            (score + float(scores[start, op]), [*segments, Segment(start, stop, OPS[op])])
            for score, segments in beams
            for op in scores[start].topk(2).indices.tolist()
        ]
        beams = sorted(grown, key=lambda pair: -pair[0])[:beam]
    found = dict.fromkeys(compile_path(segments) for _, segments in beams)
    # A path needs at least one layer; if all proposals are empty, propose the unchanged model.
    return [path for path in found if path][:paths] or [tuple(range(len(boundary)))]


class _Target(NamedTuple):
    """A training target: segment starts [layers], their operations (-1 elsewhere) [layers], and its weight."""

    sample: int
    begins: Tensor
    ops: Tensor
    weight: float


def targets(valid: Sequence[Path], layers: int, sample: int = 0) -> list[_Target]:
    """Return the training targets of the correct paths of one sample; their weights sum to 1.

    Args:
        valid: correct paths, shortest first.
        layers: number of layers of the model.
        sample: index of the sample.
    """
    identity = tuple(range(layers))
    parsed = [(path, parse(path, layers)) for path in valid[:MOST_PATHS]]
    usable = [(path, segments) for path, segments in parsed if segments is not None]
    shorter = any(len(path) < layers for path, _ in usable)
    weights = [IDENTITY_WEIGHT if path == identity and shorter else 1.0 for path, _ in usable]
    found = []
    for (_, segments), weight in zip(usable, weights, strict=True):
        begins, ops = torch.zeros(layers), torch.full((layers,), -1)
        for segment in segments:
            begins[segment.start] = 1.0
            ops[segment.start] = OPS.index(segment.op)
        found.append(_Target(sample, begins, ops, weight / sum(weights)))
    return found


def train_predictor(
    stack: Stack,
    study: PathStudy,
    tokenizer: Any = None,
    *,
    epochs: int = 10,
    batch: int = 128,
    lr: float = 5e-4,
    warmup: int = 10,
    seed: int = 42,
) -> PathPredictor:
    """Train a predictor on the correct paths of a study.

    Args:
        stack: the model of the study.
        study: the study; its samples are training data, so evaluate the predictor on others.
        tokenizer: the model's own tokenizer if None.
        epochs: number of epochs.
        batch: number of paths per batch.
        lr: learning rate of AdamW, with a cosine schedule.
        warmup: number of warm-up steps.
        seed: random seed of the initial weights, the order of samples and dropout.

    Raises:
        CalibrationError: if no sample has a correct path that can be parsed.
    """
    tokenizer = tokenizer or open_tokenizer(stack.path or stack.name)
    layers, chat = len(stack), study.settings.chat
    features, examples = [], []
    for index, each in enumerate(study.samples):
        features.append(prompt_features(stack, tokenizer, each.sample.prompt, chat))
        examples += targets(each.searches["tree"].valid, layers, index)
    if not examples:
        raise CalibrationError("no correct path to learn from: give more samples, or more simulations")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = PredictorNetwork(stack.config.hidden_size, layers).train()
        steps = epochs * math.ceil(len(examples) / batch)
        optimizer = torch.optim.AdamW(network.parameters(), lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        for _ in track(range(epochs), "training the path predictor"):
            for chosen in torch.randperm(len(examples)).split(batch):
                loss = _loss(network, [examples[i] for i in chosen.tolist()], features)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return PathPredictor(study.model, network.eval(), chat)


def _loss(network: PredictorNetwork, examples: Sequence[_Target], features: Sequence[Tensor]) -> Tensor:
    """Compute the weighted cross-entropy of boundaries (except layer 0) and of operations where segments begin."""
    tokens = [features[example.sample] for example in examples]
    padded = pad_sequence(tokens, batch_first=True)  # [batch, time, width]
    lengths = torch.tensor([len(each) for each in tokens])
    boundary, ops = network(padded, torch.arange(padded.shape[1]) >= lengths[:, None])
    begins = torch.stack([example.begins for example in examples])
    wanted = torch.stack([example.ops for example in examples])
    of_begins = binary_cross_entropy_with_logits(boundary[:, 1:], begins[:, 1:], reduction="none").mean(1)
    of_ops = cross_entropy(ops.transpose(1, 2), wanted, ignore_index=-1, reduction="none").sum(1) / begins.sum(1)
    weight = torch.tensor([example.weight for example in examples])
    return ((of_begins + of_ops) * weight).sum() / weight.sum()
