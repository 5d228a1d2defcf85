"""A model, or a view with a plan, behind lm-evaluation-harness's interface.

Imported only where lm-eval is installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from lamella.errors import ArchitectureError, NumericsError, TaskError
from lamella.evaluate.fidelity import causal_stack
from lamella.progress import tracker
from lamella.runtime import phase_options
from lamella.stack import Model, open_model

LONGEST = 2048  # tokens, for models without a limit in their config
ANSWER = 256  # maximum new tokens of an answer, by default
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "num_beams")


class PlannedLM(TemplateLM):
    """A model for the harness: log-likelihoods of answers given a context, and generation.

    The context is prompt and the answer is generated, for plans that distinguish them.

    Args:
        model: a model of Lamella or of transformers, or a view.
        tokenizer: the model's tokenizer.
        batch: rows that run together.
        writer: generates in place of the model, such as :class:`~lamella.runtime.Drafted`.

    Raises:
        ArchitectureError: for a model that does not continue text by itself.
    """

    def __init__(self, model: Any, tokenizer: Any, batch: int = 16, writer: Any = None) -> None:
        super().__init__()
        opened = model if isinstance(model, Model) else open_model(model)
        self.stack = causal_stack(opened)
        self.view: Any = self.stack.model
        self.writer = writer or self.view
        self.tokenizer, self.batch = tokenizer, batch
        self._device = self.stack.device
        self.max_length = int(getattr(self.stack.config, "max_position_embeddings", None) or LONGEST)

    @property
    def eot_token_id(self) -> int:
        """The id of the end-of-text token."""
        if self.tokenizer.eos_token_id is None:
            raise ArchitectureError(f"the tokenizer of {self.stack.name} has no end-of-text token: set eos_token")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The id of the begin token, or else of the end-of-text token."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """The name or path of the tokenizer."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text, without a second begin token if it has one, as in chat templates."""
        begin = self.tokenizer.bos_token
        special = not (begin and string.startswith(begin)) if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, using the tokenizer's chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise TaskError(f"the tokenizer of {self.stack.name} has no chat template: omit chat")
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each request's answer, and whether greedy decoding generates it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return for each context and answer the log-likelihood in nats, and whether greedy decoding writes it.

        Answers that differ only in their last token share a row, since that token is only predicted. Rows are padded on
        the right, which no token before can see.
        """
        rows: dict[tuple[int, tuple[int, ...]], list[int]] = {}  # the prompt's length and all tokens but the last
        for index, (_, context, answer) in enumerate(requests):
            tokens = (context + answer)[-(self.max_length + 1) :]
            rows.setdefault((len(tokens) - len(answer), tuple(tokens[:-1])), []).append(index)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        longest_first = sorted(rows, key=lambda row: -len(row[1]))
        with tracker("tasks: answers", len(rows)) as count:
            for batch in _batches(longest_first, self.batch):
                for (prompt, tokens), states in zip(batch, self._states(batch), strict=True):
                    logits = self.stack.logits(states[prompt - 1 : len(tokens)]).float()
                    if not torch.isfinite(logits).all():
                        raise NumericsError(f"non-finite logits of {self.stack.name}: try float32, check the weights")
                    for index in rows[prompt, tokens]:
                        target = torch.tensor(requests[index][2], device=logits.device)
                        each = logits.log_softmax(-1).gather(1, target[:, None])
                        found[index] = float(each.sum()), bool((logits.argmax(-1) == target).all())
                count(len(batch))
        return found

    def _states(self, batch: Sequence[tuple[int, tuple[int, ...]]]) -> Tensor:
        """Return the final states of some rows [rows, time, hidden], each with its own prompt length."""
        longest = max(len(tokens) for _, tokens in batch)
        ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for _, tokens in batch], device=self._device)
        prompts = torch.tensor([prompt for prompt, _ in batch], device=self._device)
        return self.stack.hidden(ids, **phase_options(self.view, prompts))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of whole texts, in nats; a whole text counts as generated."""
        windows, of = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            parts = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for context, scored in map(make_disjoint_window, parts):
                windows.append((None, list(context), list(scored)))
                of.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(of, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    @torch.no_grad()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the model's continuation of each context, up to the first of the request's stop strings."""
        asked: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            asked.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        answers = [""] * len(requests)
        with tracker("tasks: writing", len(requests)) as count:
            for options, group in asked.items():
                stops, settings = self._settings(json.loads(options))
                room = self.max_length - settings["max_new_tokens"]
                if room < 1:
                    raise TaskError(
                        f"a task asks for {settings['max_new_tokens']} new tokens, more than the {self.max_length} "
                        f"of the context of {self.stack.name}: give max_gen_toks in its generation_kwargs"
                    )
                prompts = {index: self.tok_encode(requests[index].args[0])[-room:] for index in group}
                for batch in _batches(sorted(group, key=lambda index: -len(prompts[index])), self.batch):
                    written = self._write([prompts[index] for index in batch], stops, settings)
                    for index, text in zip(batch, written, strict=True):
                        answers[index] = text
                    count(len(batch))
        return answers

    def _settings(self, asked: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Return the stop strings of a request, and the arguments of ``generate``.

        Raises:
            TaskError: for any other setting: ``generate`` accepts some that load code.
        """
        until = asked.pop("until", [])
        stops = [until] if isinstance(until, str) else list(until)
        settings: dict[str, Any] = {"max_new_tokens": int(asked.pop("max_gen_toks", ANSWER))}
        for name, value in asked.items():
            if name not in SAMPLING or not isinstance(value, bool | int | float):
                known = ", ".join(("until", "max_gen_toks", *SAMPLING))
                raise TaskError(f"a task generates with '{name}': supported generation_kwargs are {known}")
            settings[name] = value
        settings.setdefault("do_sample", settings.get("temperature", 0.0) > 0)
        if not settings["do_sample"]:  # these are only for sampling
            settings = {name: each for name, each in settings.items() if name not in ("temperature", "top_p", "top_k")}
        return [each for each in stops if each], settings

    def _write(self, prompts: Sequence[list[int]], stops: list[str], settings: dict[str, Any]) -> list[str]:
        """Return continuations of some prompts, which are padded on the left to run together."""
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        pad = self.eot_token_id if pad is None else pad
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts], device=self._device)
        real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=self._device)
        stopping = {"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}
        out = self.writer.generate(input_ids=ids, attention_mask=real, pad_token_id=pad, **settings, **stopping)
        texts = self.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        return [min((text.split(stop)[0] for stop in stops), key=len, default=text) for text in texts]


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
