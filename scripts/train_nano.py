"""Train the nano models of the tests from scratch, on text that every Python includes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import LongTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lamella.data.sources import load_text, windows

SPECIAL = ["<pad>", "<bos>", "<eos>"]  # ids 0, 1, 2
VOCABULARY, CONTEXT, BATCH = 512, 256, 8
MODELS = {
    "nano-llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4 * CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a vocabulary of 512, so any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, model_max_length=4 * CONTEXT
    )


def train(model: PreTrainedModel, tokens: LongTensor, steps: int, seed: int) -> None:
    """Train with AdamW, a linear warm-up and a cosine decay, on random crops of one long row of tokens.

    Args:
        model: the model, which is changed.
        tokens: the training tokens.
        steps: the number of steps.
        seed: random seed.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=steps // 20)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - steps // 20, eta_min=1e-4)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[steps // 20])
    model.train()
    started = time.monotonic()
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])  # [BATCH, CONTEXT]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step}/{steps}  train loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def losses(model: PreTrainedModel, train_tokens: LongTensor, test: LongTensor) -> tuple[float, float]:
    """Return the mean test loss of the model and of a unigram model fitted on the training tokens, in nats per token.

    Args:
        model: the model.
        train_tokens: the training tokens.
        test: the test windows.
    """
    counts = torch.bincount(train_tokens, minlength=VOCABULARY) + 1.0
    unigram = -(counts / counts.sum()).log()[test[:, 1:]].mean()
    return model(test, labels=test).loss.item(), unigram.item()


def main() -> None:
    """Parse the arguments and run the script."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="The text is Python's language reference and the docstrings of its library: the calibration splits "
        "train, the test split of the reference is only measured. About 3 minutes on two cores. The same seed on the "
        "same machine gives the same weights.",
    )
    parser.add_argument("model", nargs="?", default="nano-llama", choices=MODELS, help="default: nano-llama")
    parser.add_argument(
        "-o", "--output", type=Path, help="folder for the checkpoint (default: tests/models/MODEL, what the tests load)"
    )
    parser.add_argument("--steps", type=int, default=900, help="optimizer steps of 8 x 256 tokens (default: 900)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights and batches (default: 0)")
    parser.add_argument("--quick", action="store_true", help="30 steps only, to check that training runs")
    options = parser.parse_args()
    output = options.output or Path(__file__).parents[1] / "tests" / "models" / options.model

    text = load_text("pydoc", "calibration") + "\n\n" + load_text("stdlib", "calibration")
    tokenizer = train_tokenizer(text)
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    test = windows(tokenizer, load_text("pydoc", "test"), count=32, length=CONTEXT)
    torch.manual_seed(options.seed)
    model = MODELS[options.model]()
    print(f"{options.model}: {model.num_parameters():,} parameters, {len(tokens):,} training tokens")
    train(model, tokens, 30 if options.quick else options.steps, options.seed)
    loss, unigram = losses(model, tokens, test)
    print(f"final test loss {loss:.3f} nats per token (unigram {unigram:.3f})")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"saved to {output}")


if __name__ == "__main__":
    main()
