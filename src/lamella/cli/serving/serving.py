"""One model behind transformers' serving code, which otherwise opens and closes models by the names in requests."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState

from lamella.cli.generator import open_generator
from lamella.cli.serving.batching import SEED, Batching
from lamella.data.decoding import takes_proposals
from lamella.errors import MethodError
from lamella.evaluate.speed import denoises
from lamella.runtime import Drafted

PLAIN = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}"


class OneModel(ModelManager):
    """Has one model, which is open already.

    Args:
        name: its name in requests; they may leave it out.
        model: the model, or what generates in its place.
        tokenizer: its tokenizer.
    """

    def __init__(self, name: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.force_model, self._served = name, (model, tokenizer)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Return the name as it is."""
        return model_id

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Return the model and its tokenizer."""
        return self._served

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """Return the model in the form of the protocol."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "lamella"}]

    def shutdown(self) -> None:
        """Keep the model: it ends with the process."""


class Answering(Drafted):
    """A model with a draft that answers requests one by one, in place of the model."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, input_ids: Any, *, generation_config: Any, tokenizer: Any = None, **given: Any) -> Any:  # type: ignore[override]
        """Generate as transformers' serving code asks for it."""
        settings = generation_config.to_diff_dict()
        for name in ("transformers_version", SEED):
            settings.pop(name, None)
        if "stop_strings" in settings:
            settings["tokenizer"] = tokenizer
        return super().generate(input_ids, **given, **settings)


def seeded(handler: type) -> type:
    """Return a handler of requests that samples where a request names a temperature, with the seed of that request.

    transformers' handler seeds all of torch, and samples only if the model does by default.
    """

    class Seeded(handler):
        def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            config = super()._build_generation_config({**body, "seed": None}, *args, **kwargs)
            if body.get("temperature") is not None:
                config.do_sample = float(body["temperature"]) > 0
            if body.get("seed") is not None:
                setattr(config, SEED, int(body["seed"]))
            return config

    return Seeded


class Together(GenerationState):
    """Answers all requests in one place.

    Args:
        batching: the place.
    """

    def __init__(self, batching: Batching) -> None:
        super().__init__()
        self._batching = batching

    def get_manager(self, *_: Any, **__: Any) -> Batching:
        """Return the place."""
        return self._batching


def open_served(name: str, plan: str | None, draft: str | None, rows: int) -> dict[str, Any]:
    """Open a model to serve.

    Args:
        name: the model.
        plan: a plan for it.
        draft: what proposes tokens.
        rows: maximum number of requests that are answered together.

    Returns:
        The arguments that transformers' handlers of requests share.

    Raises:
        MethodError: for a model that does not continue text, or a draft that does not fit.
    """
    whole, view, tokenizer, proposed = open_generator(name, plan, draft)
    images = any(each.architecture.images for each in whole.stacks.values())
    if denoises(view) or view.config.is_encoder_decoder or images:
        raise MethodError(f"{name} does not continue text by itself, but serve answers text with text")
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = PLAIN
    together = proposed is None or (proposed.model is None and takes_proposals(view))
    answers = view if together or proposed is None else Answering(view, proposed)
    batching = Batching(view, rows, draft=proposed is not None, alone=not together)
    return {"model_manager": OneModel(name, answers, tokenizer), "generation_state": Together(batching)}
