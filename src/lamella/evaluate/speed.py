"""Speed: ratios of interleaved runs in one process, with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from lamella.data import ImageText
from lamella.needs import extrapolate, now
from lamella.progress import tracker
from lamella.stack import last_stack

NARROW = 0.01  # distance of the quartiles relative to the median at which a timing loop ends
SECONDS = 30.0  # time limit of a timing loop for one batch size, after its minimum number of rounds
MIN_ROUNDS = 2  # of a timing loop, so that a ratio has a spread


@dataclass(frozen=True)
class Ratio:
    """A ratio over interleaved rounds: its median, and the lower and upper quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Ratio:
        """Return the median and quartiles of the ratios of several rounds."""
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [*ratios] * 3
        return cls(median, low, high)

    @property
    def is_narrow(self) -> bool:
        """Whether the quartiles are so close that further rounds add no information."""
        return self.high - self.low <= NARROW * self.median

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def turns(calls: Mapping[str, Callable[[], Any]], first: str, rounds: int) -> dict[str, Ratio]:
    """Return the time of each call relative to the first one's: they alternate, after two warm-up rounds.

    Args:
        calls: by name, on one device; each returns after its work is done.
        first: the name of the reference.
        rounds: number of timed rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            begin = now()
            call()
            if number > 1:
                seconds[name].append(now() - begin)
    reference = seconds[first]
    return {name: Ratio.of([a / b for a, b in zip(each, reference, strict=True)]) for name, each in seconds.items()}


@dataclass(frozen=True)
class Timing:
    """The timing of one model at one batch size.

    Attributes:
        batch: rows that run together.
        prefill, decode: seconds of each round; ``decode`` is the median step of the round (for policies with a period,
            the mean of such medians over the period).
        prefill_speedup, decode_speedup: relative to the first model, round by round.
        variation: coefficient of variation of the decoding steps over rounds.
    """

    batch: int
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    prefill_speedup: Ratio
    decode_speedup: Ratio
    variation: float

    def as_dict(self) -> dict[str, Any]:
        """Return the timing as JSON values."""
        return {
            "batch": self.batch,
            "prefill_seconds": statistics.median(self.prefill),
            "decode_seconds_per_step": statistics.median(self.decode),
            "prefill_speedup": vars(self.prefill_speedup),
            "decode_speedup": vars(self.decode_speedup),
            "decode_variation": self.variation,
        }


@torch.no_grad()
def bench(
    models: Mapping[str, Any],
    batches: Sequence[int] = (1,),
    prompt: int | ImageText = 128,
    tokens: int = 32,
    rounds: int = 5,
    seconds: float = SECONDS,
) -> dict[str, list[Timing]]:
    """Time models relative to the first: in every round they alternate step by step; the first round is a warm-up.

    All models read the same random prompt and decode the same number of steps, so none gains by stopping early, and
    changes in the machine's speed affect all of them. A model that predicts masked tokens processes the prompt and a
    whole answer of masks in every pass: its steps are denoising steps. An encoder-decoder encodes the prompt in its
    prefill, which generates the first token. If a policy has a warm-up, all models decode that many steps before the
    timed ones.

    Args:
        models: models by name, the reference first; they must share a vocabulary.
        batches: batch sizes.
        prompt: tokens of the prompt; or images with text, of which the first rows are read up to their answers.
        tokens: decoding steps per round, rounded up to whole periods of policies.
        rounds: maximum number of interleaved rounds. Timing ends earlier if the quartiles of every decode speed-up are
            within 1 % of its median after at least three, or if the time is over after at least two.
        seconds: time limit for each batch size, for busy machines.

    Returns:
        For each model one :class:`Timing` per batch size.
    """
    results: dict[str, list[Timing]] = {name: [] for name in models}
    policies = [getattr(model, "lamella_policy", None) for model in models.values()]
    steady_after = max((policy.steady_after for policy in policies if policy is not None), default=0)
    period = math.lcm(*(policy.period for policy in policies if policy is not None))
    tokens = math.ceil(tokens / period) * period
    for batch in batches:
        one_round = partial(_one_round, models, batch, prompt, tokens, steady_after, period)
        for name, timing in alternate(one_round, batch, rounds, seconds).items():
            results[name].append(timing)
    return results


def alternate(
    one_round: Callable[[], Mapping[str, tuple[float, float]]],
    batch: int = 1,
    rounds: int = 5,
    seconds: float = SECONDS,
) -> dict[str, Timing]:
    """Repeat rounds in which models run in turns, until their ratios are known; the first round is a warm-up.

    Args:
        one_round: runs every model once, the reference first, and returns seconds of the prefill and of a decoding step
            by name.
        batch: batch size of the rounds.
        rounds: maximum number of rounds; see :func:`bench` for an earlier end.
        seconds: time limit.
    """
    begin = now()
    times: dict[str, list[tuple[float, float]]] = {}
    with tracker("speed", rounds + 1) as count:
        one_round()
        count()
        for done in extrapolate(range(1, rounds + 1)):
            for name, measured in one_round().items():
                times.setdefault(name, []).append(measured)
            count()
            timings = _timings(batch, times)
            is_over = done >= MIN_ROUNDS and now() - begin >= seconds
            if is_over or (done > MIN_ROUNDS and all(each.decode_speedup.is_narrow for each in timings.values())):
                count(rounds - done)
                break
    return timings


def _timings(batch: int, times: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Timing]:
    """Return the timings of some rounds.

    Args:
        batch: batch size of the rounds.
        times: of each model, seconds of the prefill and of the median decoding step, round by round; the first model is
            the reference.
    """
    first = next(iter(times.values()))
    found = {}
    for name, rows in times.items():
        prefill, decode = zip(*rows, strict=True)
        found[name] = Timing(
            batch,
            prefill,
            decode,
            Ratio.of([a[0] / b[0] for a, b in zip(first, rows, strict=True)]),
            Ratio.of([a[1] / b[1] for a, b in zip(first, rows, strict=True)]),
            statistics.pstdev(decode) / statistics.mean(decode),
        )
    return found


def _read(models: Mapping[str, Any], batch: int, prompt: int | ImageText) -> dict[str, Tensor]:
    """Return the prompt of all models: the first of some rows, or random tokens that all of them have."""
    if isinstance(prompt, ImageText):
        return prompt.prompts(prompt[:batch])
    return {"input_ids": random_tokens(models.values(), batch, prompt)}


def random_tokens(models: Iterable[Any], batch: int, time: int) -> Tensor:
    """Return random token ids that are in all vocabularies and are no image, video or audio tokens [batch, time].

    Args:
        models: the transformers models.
        batch: number of sequences.
        time: tokens per sequence.
    """
    models = list(models)
    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    ids = torch.randint(vocabulary, (batch, time), generator=torch.Generator().manual_seed(0))
    names = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
    images = [getattr(model.config, name, None) for model in models for name in names]
    return ids.masked_fill(torch.isin(ids, torch.tensor([each for each in images if each is not None])), 0)


def _one_round(
    models: Mapping[str, Any], batch: int, prompt: int | ImageText, tokens: int, steady_after: int, period: int
) -> dict[str, tuple[float, float]]:
    """Return for each model the seconds of one prefill and of the median decoding step, averaged over a period."""
    given = _read(models, batch, prompt)
    passes = {name: _Passes.of(model, given, tokens) for name, model in models.items()}
    prefill = {name: each.timed() for name, each in passes.items()}
    steps: dict[str, list[float]] = {name: [] for name in models}
    for _ in extrapolate(range(steady_after + tokens), steady_after + period):
        for name, each in passes.items():
            steps[name].append(each.timed())
    return {name: (prefill[name], _mean_over_period(steps[name][steady_after:], period)) for name in models}


@dataclass
class _Passes:
    """The forward passes of a model: the prompt, then token by token; for masked tokens, each time all of it.

    Attributes:
        given: the inputs of the next pass.
        padding: the mask of a padded prompt [batch, columns so far].
        denoises: whether the model predicts masked tokens.
        encodes: whether an encoder reads the prompt, and the decoder begins with its start token.
    """

    model: Any
    given: dict[str, Any]
    padding: Tensor | None
    denoises: bool = False
    encodes: bool = False

    @classmethod
    def of(cls, model: Any, prompt: Mapping[str, Tensor], tokens: int) -> _Passes:
        device = model.get_input_embeddings().weight.device
        given: dict[str, Any] = {name: each.to(device) for name, each in prompt.items()}
        mask = given.get("attention_mask")
        padding = None if mask is None or bool(mask.all()) else mask
        if model.config.is_encoder_decoder:
            start = model.config.get_text_config().decoder_start_token_id
            start_tokens = given["input_ids"].new_full((len(given["input_ids"]), 1), start)
            return cls(model, given | {"decoder_input_ids": start_tokens, "use_cache": True}, mask, encodes=True)
        if not denoises(model):
            return cls(model, given | {"use_cache": True, "logits_to_keep": 1}, padding)
        ids = given["input_ids"]
        masks = ids.new_full((len(ids), tokens), model.config.mask_token_id)
        keep = torch.arange(ids.shape[1], ids.shape[1] + tokens, device=device)
        return cls(model, {"input_ids": torch.cat([ids, masks], dim=1), "logits_to_keep": keep}, padding, denoises=True)

    def timed(self) -> float:
        """Return the seconds of a pass."""
        device = self.model.get_input_embeddings().weight.device
        begin = clock(device)
        output = self.model(**self.given)
        seconds = clock(device) - begin
        following = None if self.denoises else output.logits[:, -1:].argmax(-1)
        if self.encodes:
            read = output.get("encoder_outputs")  # of a decoder that reads more than the final states
            read = read or BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
            self.given = {"decoder_input_ids": following, "encoder_outputs": read, "cache": output.cache}
            self.given |= {"use_cache": True} | ({} if self.padding is None else {"attention_mask": self.padding})
        elif not self.denoises:
            self.given = {"input_ids": following, "cache": output.cache, "use_cache": True}
            if self.padding is not None:
                self.padding = torch.cat([self.padding, self.padding[:, -1:]], dim=1)
                self.given["attention_mask"] = self.padding
        return seconds


def denoises(model: Any) -> bool:
    """Return whether a transformers model predicts masked tokens."""
    return hasattr(model.config, "mask_token_id") and last_stack(model).architecture.denoises


def _mean_over_period(steps: Sequence[float], period: int) -> float:
    """Return the mean over a period of the median step at each of its positions."""
    return statistics.mean(statistics.median(steps[index::period]) for index in range(period))


def clock(device: torch.device) -> float:
    """Return the time in seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now()
