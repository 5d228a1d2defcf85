"""The captioning attacker: features are projected to tokens, read by a Q-Former, and decoded by a language model.

    F_k --projection--> z [tokens, width] --Q-Former--> [queries, width] --linear--> | caption, by a frozen decoder

Only the projection, the Q-Former and the last linear layer are trained. The decoder and the queries are frozen, as in
the published code; the loss covers caption tokens and never padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lamella.data import Lazy, batches
from lamella.methods.caprecover.attackers import Standardise
from lamella.methods.caprecover.audit import BATCH, EVALUATION_REQUEST
from lamella.methods.caprecover.convergence import Strength, train_to_convergence
from lamella.methods.caprecover.guard import LinkDefence
from lamella.train import NO_LOSS, Task, TrainConfig
from lamella.train.supervised import count_rows, stacked

WIDTH, QUERIES, LAYERS = 128, 8, 2
GRID = 4  # height and width of the projected feature map
MAX_LENGTH = 50  # maximum length of a caption in tokens
BEAMS, LENGTH_PENALTY = 10, 2.0  # the published code's; its sampling is omitted, so that captions are reproducible
RATES = (1e-3, 1e-4)


class Projection(nn.Module):
    """Project features to tokens: feature maps by strided convolutions down to 4 x 4, vectors to one token.

    Args:
        shape: shape of the features of one image.
    """

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.standardise = Standardise(shape)
        body: list[nn.Module] = []
        channels = shape[0] if len(shape) == 3 else shape[-1]
        if len(shape) == 3:
            side = shape[1]
            while side > GRID:
                body += [nn.Conv2d(channels, WIDTH, 3, 2, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
                channels, side = WIDTH, (side + 1) // 2
            body += [nn.Conv2d(channels, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
            channels = WIDTH
        self.body, self.linear = nn.Sequential(*body), nn.Linear(channels, WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        """Project features [batch, ...] to tokens [batch, tokens, width]."""
        h = self.standardise(features)
        if h.ndim == 4:
            h = self.body(h).flatten(2).transpose(1, 2)
        tokens: Tensor = self.linear(h if h.ndim == 3 else h[:, None])
        return tokens


class Captioner(nn.Module):
    """The captioning attacker.

    Args:
        shape: shape of the features of one image.
        writer: a frozen decoder of transformers.
        tokenizer: the decoder's tokenizer.
        seed: random seed of the initial weights.
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
        """Set the training mode; the decoder stays in evaluation mode."""
        super().train(mode)
        self.writer.eval()
        return self

    def trains(self, name: str) -> bool:
        """Return whether a parameter of that name is trained."""
        return not name.startswith("writer.") and name != "queries"

    def prefix(self, features: Tensor) -> Tensor:
        """Compute the embeddings in front of the caption [batch, queries, hidden size of the decoder]."""
        features = self.projection(features)
        attended = self.former(query_embeds=self.queries.expand(len(features), -1, -1), encoder_hidden_states=features)
        found: Tensor = self.language(attended.last_hidden_state)
        return found

    def logits(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of each caption token, given the features and all tokens before it [batch, time, tokens].

        Args:
            features: transmitted features [batch, ...].
            ids: token ids of the captions, padded on the right [batch, time].
            mask: 1 at tokens and 0 at padding [batch, time].
        """
        before = self.prefix(features)
        embeddings = torch.cat([before, self.writer.get_input_embeddings()(ids).to(before)], dim=1)
        ones = mask.new_ones(len(mask), before.shape[1])
        logits: Tensor = self.writer(
            inputs_embeds=embeddings, attention_mask=torch.cat([ones, mask], dim=1), use_cache=False
        ).logits
        return logits[:, before.shape[1] - 1 : -1].float()

    def forward(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the mean loss of captions in nats per token.

        Args:
            features: transmitted features [batch, ...].
            ids: token ids of the captions, padded on the right [batch, time].
            mask: 1 at tokens and 0 at padding [batch, time].
        """
        text = self.logits(features, ids, mask)
        return cross_entropy(text.flatten(0, 1), ids.masked_fill(mask == 0, NO_LOSS).flatten(), ignore_index=NO_LOSS)

    @torch.no_grad()
    def write(
        self,
        features: Tensor,
        beams: int = BEAMS,
        length_penalty: float = LENGTH_PENALTY,
        longest: int = MAX_LENGTH,
    ) -> list[str]:
        """Generate captions from features.

        Args:
            features: transmitted features [batch, ...].
            beams: number of beams.
            length_penalty: exponent of the length by which the log-likelihood of a beam is divided.
            longest: maximum number of new tokens.
        """
        before = self.prefix(features)
        ends = self.tokenizer.eos_token_id
        penalty = {"length_penalty": length_penalty} if beams > 1 else {}  # there is nothing to compare with one beam
        ids = self.writer.generate(
            inputs_embeds=before,
            attention_mask=before.new_ones(before.shape[:2], dtype=torch.long),
            max_new_tokens=longest,
            num_beams=beams,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            **penalty,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


class CaptionLoss:
    """The loss of a captioner on transmitted features, with fresh noise of the defence in every step.

    Args:
        guard: the defence.
        cut: name of the cut.
        scale: standard deviation of the features at the cut.
    """

    def __init__(self, guard: LinkDefence, cut: str, scale: float) -> None:
        self.guard, self.cut, self.scale = guard, cut, scale

    def __call__(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a captioner on a batch of features ``x`` and tokenised captions."""
        sent = self.guard.send(self.cut, batch["x"], self.scale, int(torch.randint(EVALUATION_REQUEST, ())))
        loss: Tensor = model(sent, batch["ids"], batch["mask"])
        return loss


def tokenise_captions(tokenizer: Any, texts: Sequence[str]) -> list[dict[str, Tensor]]:
    """Tokenise captions with their end token, at most 50 tokens, padded on the right to one length.

    Args:
        tokenizer: the decoder's tokenizer.
        texts: the captions.
    """
    ends = tokenizer.eos_token_id
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"][: MAX_LENGTH - 1], ends] for text in texts]
    longest = max(map(len, ids))
    filled = [each + [ends] * (longest - len(each)) for each in ids]
    masks = [[1] * len(each) + [0] * (longest - len(each)) for each in ids]
    return [{"ids": torch.tensor(i), "mask": torch.tensor(m)} for i, m in zip(filled, masks, strict=True)]


def train_captioner(
    captioner: Captioner,
    features: Sequence[Tensor],
    texts: Sequence[str],
    loss: CaptionLoss,
    config: TrainConfig,
    out: Path,
) -> Strength:
    """Train a captioner in place on features and captions, until it stops improving on held-out images.

    Args:
        captioner: the attacker.
        features: features of each image.
        texts: caption of each image.
        loss: the loss.
        config: training configuration; see :func:`lamella.methods.caprecover.convergence.train_to_convergence`.
        out: folder for checkpoints.
    """
    rows = tokenise_captions(captioner.tokenizer, texts)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    strength = train_to_convergence(
        captioner,
        Lazy(order, lambda number: {"x": features[number], **rows[number]}),
        Task(loss, collate=stacked, weight=count_rows),
        config,
        out,
        rates=RATES,
        trainable=captioner.trains,
        settings={"cut": loss.cut, "guard": str(loss.guard)},
    )
    captioner.eval()
    return strength


def recover_captions(
    captioner: Captioner,
    features: Sequence[Tensor],
    loss: CaptionLoss,
    beams: int = BEAMS,
    length_penalty: float = LENGTH_PENALTY,
) -> list[str]:
    """Generate captions from features of test images, with request numbers not used in training.

    Args:
        captioner: the trained attacker.
        features: features of each image.
        loss: its loss, with cut and defence.
        beams: number of beams.
        length_penalty: exponent of the length by which the log-likelihood of a beam is divided.
    """
    texts = []
    for number, part in enumerate(batches(features, BATCH, torch.stack)):
        sent = loss.guard.send(loss.cut, part, loss.scale, EVALUATION_REQUEST + number)
        texts += captioner.write(sent, beams, length_penalty)
    return texts
