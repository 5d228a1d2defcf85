"""The attacker who writes captions: features become a few tokens, a Q-Former asks them, and a language model speaks.

    F_k --projection--> z [places, width] --Q-Former--> [queries, width] --linear--> | caption, by a frozen decoder

Only projection, Q-Former and the last linear map are trained. The decoder is frozen, and so are the queries, as in the
published code; loss is on words and never on padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lamella.data import Lazy, batches
from lamella.methods.caprecover.audit import BATCH, FIRST
from lamella.methods.caprecover.guard import Guard
from lamella.methods.caprecover.readers import Standardised
from lamella.train import NO_LOSS, Task, TrainConfig, fit
from lamella.train.supervised import count_rows, stacked

WIDTH, QUERIES, LAYERS = 128, 8, 2
PLACES = 4  # on a side, of maps
LONGEST = 50  # tokens of a caption
BEAMS = 4


class Projection(nn.Module):
    """Features as tokens: of maps a convolution each time they are halved, down to 4 x 4 places; of vectors one token.

    Args:
        shape: of the features of one picture.
    """

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.standardised = Standardised(shape)
        body: list[nn.Module] = []
        channels = shape[0] if len(shape) == 3 else shape[-1]
        if len(shape) == 3:
            side = shape[1]
            while side > PLACES:
                body += [nn.Conv2d(channels, WIDTH, 3, 2, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
                channels, side = WIDTH, (side + 1) // 2
            body += [nn.Conv2d(channels, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
            channels = WIDTH
        self.body, self.linear = nn.Sequential(*body), nn.Linear(channels, WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        h = self.standardised(features)
        if h.ndim == 4:
            h = self.body(h).flatten(2).transpose(1, 2)
        tokens: Tensor = self.linear(h if h.ndim == 3 else h[:, None])
        return tokens


class Captioner(nn.Module):
    """The attacker.

    Args:
        shape: of the features of one picture.
        writer: a decoder of transformers; it stays as it is.
        tokenizer: that of the writer.
        seed: of everything that is drawn.
    """

    def __init__(self, shape: torch.Size, writer: Any, tokenizer: Any, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection = Projection(shape)
            config = transformers.Blip2QFormerConfig(
                hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=2 * WIDTH,
                encoder_hidden_size=WIDTH, cross_attention_frequency=1, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )  # fmt: skip
            self.former = transformers.Blip2QFormerModel(config)
            self.queries = nn.Parameter(torch.randn(1, QUERIES, WIDTH) * config.initializer_range, requires_grad=False)
            self.language = nn.Linear(WIDTH, writer.get_input_embeddings().embedding_dim)
        self.writer, self.tokenizer = writer, tokenizer

    def train(self, mode: bool = True) -> Captioner:
        super().train(mode)
        self.writer.eval()
        return self

    def trains(self, name: str) -> bool:
        """Whether a parameter of that name is the attacker's to train."""
        return not name.startswith("writer.") and name != "queries"

    def prefix(self, features: Tensor) -> Tensor:
        """What stands before the caption [batch, queries, the writer's width]."""
        seen = self.projection(features)
        asked = self.former(query_embeds=self.queries.expand(len(seen), -1, -1), encoder_hidden_states=seen)
        found: Tensor = self.language(asked.last_hidden_state)
        return found

    def forward(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The mean nats of captions.

        Args:
            features: [batch, ...].
            ids, mask: of the captions, padded on the right [batch, time].
        """
        before = self.prefix(features)
        told = torch.cat([before, self.writer.get_input_embeddings()(ids).to(before)], dim=1)
        ones = mask.new_ones(len(mask), before.shape[1])
        logits = self.writer(inputs_embeds=told, attention_mask=torch.cat([ones, mask], dim=1), use_cache=False).logits
        said = logits[:, before.shape[1] - 1 : -1].float()
        return cross_entropy(said.flatten(0, 1), ids.masked_fill(mask == 0, NO_LOSS).flatten(), ignore_index=NO_LOSS)

    @torch.no_grad()
    def write(self, features: Tensor, beams: int = BEAMS, longest: int = LONGEST) -> list[str]:
        """Captions of some pictures, by their features."""
        before = self.prefix(features)
        ends = self.tokenizer.eos_token_id
        ids = self.writer.generate(
            inputs_embeds=before,
            attention_mask=before.new_ones(before.shape[:2], dtype=torch.long),
            max_new_tokens=longest,
            num_beams=beams,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


class Spoken:
    """The loss of a captioner on what is sent, with the defence's noise drawn anew."""

    def __init__(self, guard: Guard, cut: str, scale: float) -> None:
        self.guard, self.cut, self.scale = guard, cut, scale

    def __call__(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        sent = self.guard.send(self.cut, batch["x"], self.scale, int(torch.randint(FIRST, ())))
        loss: Tensor = model(sent, batch["ids"], batch["mask"])
        return loss


def captions_as_rows(tokenizer: Any, texts: Sequence[str]) -> list[dict[str, Tensor]]:
    """Ids and mask of each caption with its end, at most 50 tokens, padded on the right to one length."""
    ends = tokenizer.eos_token_id
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"][: LONGEST - 1], ends] for text in texts]
    most = max(map(len, ids))
    filled = [each + [ends] * (most - len(each)) for each in ids]
    masks = [[1] * len(each) + [0] * (most - len(each)) for each in ids]
    return [{"ids": torch.tensor(i), "mask": torch.tensor(m)} for i, m in zip(filled, masks, strict=True)]


def taught(
    captioner: Captioner, features: Sequence[Tensor], texts: Sequence[str], loss: Spoken, config: TrainConfig, out: Path
) -> Captioner:
    """Train an attacker on features and what their pictures show."""
    rows = captions_as_rows(captioner.tokenizer, texts)
    samples = Lazy(range(len(rows)), lambda number: {"x": features[number], **rows[number]})
    task = Task(loss, collate=stacked, weight=count_rows)
    config = replace(config, save_every=config.steps or len(samples))
    settings = {"cut": loss.cut, "guard": str(loss.guard)}
    fit(captioner, samples, task, config, out=out, trainable=captioner.trains, settings=settings)
    captioner.eval()
    return captioner


def recovered(captioner: Captioner, features: Sequence[Tensor], loss: Spoken, beams: int = BEAMS) -> list[str]:
    """What an attacker writes of features that nobody has seen, under requests that nobody has seen."""
    texts = []
    for number, part in enumerate(batches(features, BATCH, torch.stack)):
        texts += captioner.write(loss.guard.send(loss.cut, part, loss.scale, FIRST + number), beams)
    return texts
