"""Masked-diffusion language models that transformers does not have, in the layout of the public checkpoints.

Such a model predicts all masked tokens at once from the others: its tokens attend to one another in both directions,
and there is no growing cache.

    LLaDA (Nie et al., 2025, arXiv 2502.09992)    trained from scratch; the logits at i predict token i
    Dream (Ye et al., 2025, arXiv 2508.15487)     initialised from Qwen2.5; the logits at i predict token i + 1

Modules have the names of the checkpoints, which therefore open without renaming: LLaDA's ``blocks.N.attn_out``, and
Qwen2's names for Dream. The code that comes with the checkpoints is never run.

This module and that of the configs import torch and transformers only: native exports include their source verbatim. It
is imported only when such a model is needed, since transformers' classes take seconds to load.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from lamella.stack.diffusion_config import DreamConfig, LLaDAConfig


class LLaDABlock(GradientCheckpointingLayer):
    """One pre-norm layer, which contains the projections of attention and MLP directly."""

    is_causal = False

    def __init__(self, config: LLaDAConfig, layer_idx: int) -> None:
        super().__init__()
        width, biased = config.d_model, bool(config.include_bias or config.include_qkv_bias)
        keys, channels = config.n_kv_heads * config.head_dim, config.mlp_hidden_size
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.attn_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=biased)
        self.k_proj = nn.Linear(width, keys, bias=biased)
        self.v_proj = nn.Linear(width, keys, bias=biased)
        self.attn_out = nn.Linear(width, width, bias=config.include_bias)
        self.ff_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, channels, bias=config.include_bias)
        self.up_proj = nn.Linear(width, channels, bias=config.include_bias)
        self.ff_out = nn.Linear(channels, width, bias=config.include_bias)
        self.act = ACT2FN[config.activation_type]

    def attend(
        self,
        h: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the output of bidirectional attention to normalised hidden states [batch, time, hidden].

        Args:
            h: normalised hidden states [batch, time, hidden].
            position_embeddings: cosines and sines of the rotary embedding.
            attention_mask: the mask, if some positions are hidden.
            cache: key-value cache; None without one.
            kwargs: passed on to the attention function.
        """
        return self.attend_with_probabilities(h, position_embeddings, attention_mask, cache, **kwargs)[0]

    def attend_with_probabilities(
        self,
        h: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output of the attention and its probabilities, if the kernel returns them.

        Args:
            h: normalised hidden states [batch, time, hidden].
            position_embeddings: cosines and sines of the rotary embedding.
            attention_mask: the mask, if some positions are hidden.
            cache: key-value cache; None without one.
            kwargs: passed on to the attention function.
        """
        shape = (*h.shape[:-1], -1, self.config.head_dim)
        q, k, v = (each(h).view(shape).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        scaling = self.config.head_dim**-0.5
        out, weights = attention(self, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return self.attn_out(out.reshape(*h.shape[:-1], -1).contiguous()), weights

    def feed_forward(self, h: Tensor) -> Tensor:
        """Return the output of the gated MLP for normalised hidden states [batch, time, hidden]."""
        return self.ff_out(self.act(self.ff_proj(h)) * self.up_proj(h))

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        """Run the layer on ``hidden_states`` [batch, time, hidden]."""
        h = hidden_states
        h = h + self.attend(self.attn_norm(h), **call)
        return h + self.feed_forward(self.ff_norm(h))


class LLaDAPreTrainedModel(PreTrainedModel):
    """Base class of LLaDA's modules."""

    config: LLaDAConfig
    config_class = LLaDAConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LLaDABlock}  # noqa: RUF012


class LLaDATransformer(LLaDAPreTrainedModel):
    """Embedding, layers and final norm; the output projection is next to them, as in the checkpoints."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.embedding_size, config.d_model)
        self.blocks = nn.ModuleList(LLaDABlock(config, index) for index in range(config.n_layers))
        self.ln_f = LlamaRMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.ff_out = nn.Linear(config.d_model, config.embedding_size, bias=config.include_bias)
        rotary: Any = LlamaRotaryEmbedding
        self.rotary_emb = rotary(config=config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.wte

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding."""
        self.wte = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the final normalised states [batch, time, hidden].

        Args:
            input_ids: tokens [batch, time].
            attention_mask: 0 at padding [batch, columns].
            position_ids: positions [batch or 1, time]; 0, 1, 2, ... if None.
            cache: key-value cache; None without one.
            inputs_embeds: embedded tokens [batch, time, hidden], in place of ``input_ids``.
            use_cache: ignored; accepted for compatibility.
            kwargs: passed on to the layers.
        """
        h = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(h.shape[1], device=h.device)[None]
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=h, attention_mask=attention_mask, cache=cache
        )
        turns = self.rotary_emb(h, position_ids=position_ids)
        for block in self.blocks:
            h = block(h, attention_mask=mask, position_embeddings=turns, cache=cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(h))


class LLaDAForMaskedLM(LLaDAPreTrainedModel):
    """LLaDA: the logits at a masked position predict the token at this position."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = nn.ModuleDict({"transformer": LLaDATransformer(config)})
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model["transformer"].wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model["transformer"].wte = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the output projection."""
        return self.model["transformer"].ff_out

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output projection."""
        self.model["transformer"].ff_out = value

    def forward(self, input_ids: Tensor | None = None, **given: Any) -> MaskedLMOutput:
        """Return the logits of every position [batch, time, vocabulary].

        Args:
            input_ids: tokens [batch, time], ``config.mask_token_id`` where a token is to be predicted.
            given: see :class:`LLaDATransformer`; padding is 0 in ``attention_mask`` [batch, columns], and with
                ``logits_to_keep`` [positions] only the logits of these positions are computed.
        """
        return _read(self.model["transformer"], self.get_output_embeddings(), input_ids, given)


class DreamForMaskedLM(Qwen2PreTrainedModel):
    """Dream: Qwen2 with bidirectional attention; the logits at a position predict the next token."""

    config: DreamConfig
    config_class = DreamConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        for layer in self.model.layers:
            layer.self_attn.is_causal = False
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, **given: Any) -> MaskedLMOutput:
        """Return the logits; see :meth:`LLaDAForMaskedLM.forward`."""
        return _read(self.model, self.lm_head, input_ids, given)


def _read(base: Any, head: Any, input_ids: Tensor | None, given: dict[str, Any]) -> MaskedLMOutput:
    keep = given.pop("logits_to_keep", None)
    out = base(input_ids=input_ids, **given)
    states = out.last_hidden_state if keep is None else out.last_hidden_state[:, keep]
    return MaskedLMOutput(logits=head(states), hidden_states=out.hidden_states)
