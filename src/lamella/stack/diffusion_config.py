"""The configs of masked-diffusion models that transformers does not have: LLaDA's, Dream's, and one for images.

This module imports transformers only, like :mod:`lamella.stack.diffusion`, to whose classes the configs belong.
"""

from typing import Any

from transformers import LlavaConfig, PreTrainedConfig, Qwen2Config

ONLY: dict[str, tuple[Any, ...]] = {  # settings of LLaDA's config that no checkpoint uses, with their values
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "bias_for_layer_norm": (False, None),
    "multi_query_attention": (False, None),
    "clip_qkv": (None,),
    "weight_tying": (False,),
    "block_group_size": (1,),
}


class LLaDAConfig(PreTrainedConfig):
    """The config of LLaDA with its own names; the usual names are accepted as well."""

    model_type = "llada"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
        "initializer_range": "init_std",
        "hidden_act": "activation_type",
    }

    vocab_size: int = 126464
    embedding_size: int = 0  # the vocabulary size if 0
    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 0  # the number of heads if 0
    mlp_hidden_size: int = 0  # mlp_ratio times d_model if 0
    mlp_ratio: int = 4
    max_sequence_length: int = 4096
    activation_type: str = "silu"
    include_bias: bool = False
    include_qkv_bias: bool | None = False
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_parameters: dict[str, Any] | None = None
    attention_dropout: float = 0.0
    weight_tying: bool = False
    init_std: float = 0.02
    use_cache: bool = False
    mask_token_id: int = 126336
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for usual, own in self.attribute_map.items():
            if usual in kwargs:
                setattr(self, own, kwargs.pop(usual))
        for name, values in ONLY.items():
            value = kwargs.get(name, getattr(self, name, values[0]))
            if value not in values:
                raise ValueError(f"{name} '{value}' is not supported: LLaDA's checkpoints have '{values[0]}'")
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.mlp_hidden_size = self.mlp_hidden_size or self.mlp_ratio * self.d_model
        self.embedding_size = self.embedding_size or self.vocab_size
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """The size of an attention head."""
        return self.d_model // self.n_heads


class DreamConfig(Qwen2Config):
    """The config of Dream: Qwen2's with a mask token and bidirectional attention."""

    model_type = "Dream"

    use_cache: bool = False
    mask_token_id: int = 151666
    is_causal: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.use_sliding_window:
            raise ValueError("a sliding window is not supported: Dream's checkpoints have none")
        super().__post_init__(**kwargs)


class LlavaDiffusionConfig(LlavaConfig):
    """The config of a masked-diffusion model that reads images: LLaVA's, around LLaDA or Dream.

    Attributes:
        image_grid_pinpoints: sizes in pixels [height, width] of the grids of tiles that a large image may be cut into;
            None for images of one tile, without a newline vector.
        max_tiles: number of tiles above which the features of a grid are interpolated; None for no limit.
        image_pooling: factor by which the features of a tile are interpolated in height and width.
    """

    model_type = "llava_diffusion"

    image_grid_pinpoints: list[Any] | None = None
    max_tiles: int | None = None
    image_pooling: int = 1

    @property
    def mask_token_id(self) -> int:
        """The mask token of the language model."""
        return int(self.text_config.mask_token_id)  # type: ignore[union-attr]
