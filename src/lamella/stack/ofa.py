"""OFA: one encoder over patches and words, and one decoder, with norms inside their sublayers (NormFormer).

Wang et al., "OFA: Unifying Architectures, Tasks, and Modalities Through a Simple Sequence-to-Sequence Learning
Framework", ICML 2022, arXiv 2202.03052.

    image -> ResNet -> [ patch patch ... patch | what does the image show ? ] -> encoder -> decoder -> a red circle

    x = x + LN(Attention(LN(x)))      heads are scaled by c before the output projection
    x = x + W_2 LN(GELU(W_1 LN(x)))

Embeddings contain no positions. Positions are biases of the attention scores: with normalised position embeddings p,

    scores_ij = (q_i . k_j + (P_q p_i) . (P_k p_j)) / sqrt(2 d_head) + r_ij

where r has a table in each layer, by the distance of two words, or by rows and columns between two patches. It is 0
between a word and a patch, and in cross-attention. Words and patches are counted apart, and padding is not counted.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions, Seq2SeqLMOutput
from transformers.models.bart.modeling_bart import BartAttention, shift_tokens_right
from transformers.models.resnet.modeling_resnet import ResNetModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from lamella.errors import ArchitectureError
from lamella.stack.ofa_config import OFAConfig
from lamella.stack.towers import ofa_attn, ofa_cross, ofa_mlp

LONGEST = 1024  # positions for which distances are defined
TEXT, IMAGE = 0, 1  # rows of the type embedding


@dataclass
class OFAEncoderOutput(BaseModelOutput):
    """What the decoder reads.

    Attributes:
        position_keys: for the scores of the decoder's cross-attention, P_k p [batch, time, hidden].
    """

    position_keys: Tensor | None = None


@dataclass
class OFAOutput(Seq2SeqLMOutput):
    """What the model returns.

    Attributes:
        last_hidden_state: final states of the decoder [batch, time, hidden].
        encoder_outputs: what the decoder has read, for further calls.
    """

    last_hidden_state: Tensor | None = None
    encoder_outputs: OFAEncoderOutput | None = None


class FixedResNet(ResNetModel):
    """A ResNet whose batch norms use the stored statistics in training, too, since batches are small."""

    _supports_sdpa = True  # has no attention, and is part of a model that has

    def train(self, mode: bool = True) -> "FixedResNet":
        """Keep the evaluation mode."""
        super().train(False)
        return self


class ScaledHeads(nn.Linear):
    """An output projection that first scales each head: [..., heads * size] -> [..., hidden]."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__(hidden, hidden)
        self.c_attn = nn.Parameter(torch.ones(heads))

    def forward(self, input: Tensor) -> Tensor:
        """Return the projection of the scaled heads."""
        heads = input.unflatten(-1, (len(self.c_attn), -1)) * self.c_attn[:, None]
        return super().forward(heads.flatten(-2))


class OFAAttention(BartAttention):
    """BART's attention with a bias of the scores and scaled heads."""

    def __init__(self, config: Any, heads: int, layer: int) -> None:
        super().__init__(config.d_model, heads, config.attention_dropout, config=config, layer_idx=layer)
        self.scaling = (2 * self.head_dim) ** -0.5
        self.out_proj = ScaledHeads(config.d_model, heads)

    def forward(
        self, hidden_states: Tensor, position_bias: Tensor, attention_mask: Tensor | None = None, **given: Any
    ) -> Any:
        """Return the output [batch, queries, hidden], and the probabilities if the kernel returns them.

        Args:
            hidden_states: normalised hidden states [batch, queries, hidden].
            position_bias: added to the scores [batch or 1, heads, queries, keys].
            attention_mask: visible keys, bool or added to the scores [batch, 1, queries, keys].
            given: other arguments of BART's attention.
        """
        if attention_mask is None:
            bias = position_bias
        elif attention_mask.dtype == torch.bool:
            bias = position_bias.masked_fill(~attention_mask, torch.finfo(position_bias.dtype).min)
        else:
            bias = position_bias + attention_mask
        return super().forward(hidden_states, attention_mask=bias, **given)


class RelativePositions(nn.ModuleList):
    """The table r of a layer: biases of each head for pairs of words, and in an encoder for pairs of patches.

    Args:
        heads: number of heads.
        entries: number of different pairs of words, and of patches.
    """

    def __init__(self, heads: int, *entries: int) -> None:
        super().__init__(nn.Embedding(count, heads) for count in entries)

    def forward(self, pairs: Tensor) -> Tensor:
        """Return the biases [batch, heads, queries, keys].

        Args:
            pairs: entry of each pair in the joined tables, from 1 on, or 0 for no bias [batch, queries, keys].
        """
        tables: list[Tensor] = [each.weight for each in self]  # type: ignore[misc]
        joined = torch.cat([tables[0].new_zeros(1, tables[0].shape[1]), *tables])
        return joined[pairs].permute(0, 3, 1, 2).contiguous()


class OFAEncoderLayer(GradientCheckpointingLayer):
    """Attention and MLP; see :func:`lamella.stack.towers.ofa_attn` and :func:`lamella.stack.towers.ofa_mlp`."""

    sublayers: tuple[Any, ...] = (ofa_attn, ofa_mlp)

    def __init__(self, config: Any, heads: int, channels: int, entries: tuple[int, ...], layer: int) -> None:
        super().__init__()
        d = config.d_model
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.activation_fn = ACT2FN[config.activation_function]
        self.self_attn = OFAAttention(config, heads, layer)
        self.self_attn_layer_norm, self.self_attn_mid_layer_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.relative = RelativePositions(heads, *entries)
        self.fc1, self.fc2 = nn.Linear(d, channels), nn.Linear(channels, d)
        self.final_layer_norm, self.ffn_layer_norm = nn.LayerNorm(d), nn.LayerNorm(channels)

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        """Run the sublayers on ``hidden_states`` [batch, time, hidden]."""
        for sublayer in self.sublayers:
            hidden_states = sublayer(self, hidden_states, call)
        return hidden_states


class OFADecoderLayer(OFAEncoderLayer):
    """Attention, cross-attention and MLP."""

    sublayers = (ofa_attn, ofa_cross, ofa_mlp)

    def __init__(self, config: Any, heads: int, channels: int, entries: tuple[int, ...], layer: int) -> None:
        super().__init__(config, heads, channels, entries, layer)
        d = config.d_model
        self.cross_attn = OFAAttention(config, heads, layer)
        self.cross_attn_layer_norm, self.cross_attn_mid_layer_norm = nn.LayerNorm(d), nn.LayerNorm(d)


class OFAPreTrainedModel(PreTrainedModel):
    """Base class of OFA's modules."""

    config: Any  # an OFAConfig; some of its sizes are optional in BART's
    config_class = OFAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OFAEncoderLayer", "OFADecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True


class OFAEncoder(OFAPreTrainedModel):
    """Embeds patches and words, and runs the layers over both."""

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OFAEncoderLayer,
        "attentions": OFAAttention,
    }

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        d, side, vision = config.d_model, config.image_bucket_size, config.vision_config
        self.embed_tokens = nn.Embedding(config.vocab_size, d, config.pad_token_id)
        self.type_embedding = nn.Embedding(2, d)
        self.layernorm_embedding = nn.LayerNorm(d)
        self.embed_images = FixedResNet(vision)
        self.image_proj = nn.Linear(vision.hidden_sizes[-1], d)
        self.patch_layernorm_embedding = nn.LayerNorm(d)
        self.embed_positions = nn.Embedding(config.max_position_embeddings + 2, d)
        self.embed_image_positions = nn.Embedding(side**2 + 1, d)
        self.pos_ln, self.image_pos_ln = nn.LayerNorm(d), nn.LayerNorm(d)
        self.pos_q_linear, self.pos_k_linear = nn.Linear(d, d), nn.Linear(d, d)
        self.cross_pos_k_linear = nn.Linear(d, d)
        entries = 2 * config.token_bucket_size - 1, (2 * side - 1) ** 2 + 3
        sizes = config.encoder_attention_heads, config.encoder_ffn_dim, entries
        self.layers: Any = nn.ModuleList(
            OFAEncoderLayer(config, *sizes, layer) for layer in range(config.encoder_layers)
        )
        self.layer_norm = nn.LayerNorm(d)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> OFAEncoderOutput:
        """Return the final normalised states [batch, time, hidden], and the keys of their positions.

        Args:
            input_ids: tokens [batch, time], ``image_token_index`` at the positions of patches.
            attention_mask: 0 at padding [batch, time].
            pixel_values: one image [3, height, width] for each row that has placeholders.
            kwargs: passed on to the layers.

        Raises:
            ArchitectureError: if images do not fill their placeholders.
        """
        is_patch = input_ids == self.config.image_token_index
        is_word = ~is_patch if attention_mask is None else ~is_patch & attention_mask.bool()
        words = (is_word.cumsum(1) - 1).clamp(min=0)  # position of each word
        h = self.embed_tokens(input_ids.masked_fill(is_patch, self.config.pad_token_id))
        h = self.layernorm_embedding(h + self.type_embedding.weight[TEXT])
        p = self.pos_ln(self.embed_positions(words))
        pairs = _of_both(is_word, 1 + _pairs_of_words(words, words, self.config.token_bucket_size))
        if pixel_values is None:
            _check_images(is_patch, 0, 0)
        else:
            images, at = self.embed_image(pixel_values)
            _check_images(is_patch, *images.shape[:2])
            patches = torch.zeros_like(words).masked_scatter(is_patch, at.repeat(len(images)))
            h = h.masked_scatter(is_patch[..., None], images.to(h.dtype))
            p = torch.where(is_patch[..., None], self.image_pos_ln(self.embed_image_positions(patches)), p)
            of_patches = 2 * self.config.token_bucket_size + _pairs_of_patches(patches, self.config.image_bucket_size)
            pairs = pairs + _of_both(is_patch, of_patches)
        h = dropout(h, self.config.dropout, self.training)
        bias = _scores(self.pos_q_linear(p), self.pos_k_linear(p), self.config.encoder_attention_heads)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=h, attention_mask=attention_mask)
        for layer in self.layers:
            h = layer(h, attention_mask=mask, position_bias=bias + layer.relative(pairs), **kwargs)
        return OFAEncoderOutput(last_hidden_state=self.layer_norm(h), position_keys=self.cross_pos_k_linear(p))

    def embed_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return embedded patches [images, patches, hidden], and the entries of their positions [patches].

        Args:
            pixel_values: images [images, 3, height, width].

        Raises:
            ArchitectureError: for images with more rows or columns of patches than there are positions.
        """
        pixel_values = pixel_values.to(self.image_proj.weight.dtype)
        features = self.embed_images(pixel_values).last_hidden_state  # [images, channels, rows, columns]
        side, (rows, columns) = self.config.image_bucket_size, features.shape[2:]
        if max(rows, columns) > side:
            given = list(pixel_values.shape[2:])
            raise ArchitectureError(
                f"pixel_values of {given} pixels are {rows} x {columns} patches: give images of at most {side} x {side}"
            )
        h = self.image_proj(features.flatten(2).transpose(1, 2)) + self.type_embedding.weight[IMAGE]
        entries = 1 + side * torch.arange(rows)[:, None] + torch.arange(columns)
        return self.patch_layernorm_embedding(h), entries.flatten().to(h.device)


class OFADecoder(OFAPreTrainedModel):
    """Embeds words, and runs the layers over them and the encoder's states."""

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OFADecoderLayer,
        "attentions": OutputRecorder(OFAAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(OFAAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        d = config.d_model
        self.embed_tokens = nn.Embedding(config.vocab_size, d, config.pad_token_id)
        self.layernorm_embedding = nn.LayerNorm(d)
        self.embed_positions = nn.Embedding(config.max_position_embeddings + 2, d)
        self.pos_ln = nn.LayerNorm(d)
        self.self_pos_q_linear, self.self_pos_k_linear = nn.Linear(d, d), nn.Linear(d, d)
        self.cross_pos_q_linear = nn.Linear(d, d)
        sizes = config.decoder_attention_heads, config.decoder_ffn_dim, (2 * config.token_bucket_size - 1,)
        self.layers: Any = nn.ModuleList(
            OFADecoderLayer(config, *sizes, layer) for layer in range(config.decoder_layers)
        )
        self.layer_norm = nn.LayerNorm(d)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        encoder_position_keys: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Return the final normalised states [batch, time, hidden].

        Args:
            input_ids: tokens [batch, time].
            encoder_hidden_states: final states of the encoder [batch, source, hidden].
            encoder_position_keys: see :class:`OFAEncoderOutput` [batch, source, hidden].
            attention_mask: 0 at padding, for the tokens in the cache as well [batch, columns].
            encoder_attention_mask: 0 at padding of the encoder's input [batch, source].
            cache: key-value cache; None without one.
            use_cache: whether to make a cache if there is none.
            kwargs: passed on to the layers.
        """
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        past = 0 if cache is None else cache.get_seq_length()
        columns = past + input_ids.shape[1]
        if attention_mask is None:
            words = torch.arange(columns, device=input_ids.device)[None]
        else:
            words = (attention_mask[:, :columns].cumsum(1) - 1).clamp(min=0)
        h = self.layernorm_embedding(self.embed_tokens(input_ids))
        h = dropout(h, self.config.dropout, self.training)
        p, heads = self.pos_ln(self.embed_positions(words)), self.config.decoder_attention_heads
        own = p[:, past:]
        bias = _scores(self.self_pos_q_linear(own), self.self_pos_k_linear(p), heads)
        cross_bias = _scores(self.cross_pos_q_linear(own), encoder_position_keys, heads)
        pairs = 1 + _pairs_of_words(words[:, past:], words, self.config.token_bucket_size)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=h,
            attention_mask=attention_mask,
            cache=cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache,
            allow_is_causal_skip=False,
        )
        encoder_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=h,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        for layer in self.layers:
            h = layer(
                h,
                attention_mask=mask,
                position_bias=bias + layer.relative(pairs),
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_mask,
                encoder_decoder_position_bias=cross_bias,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.layer_norm(h), cache=cache)


class OFAModel(OFAPreTrainedModel):
    """Encoder and decoder, up to the final states."""

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder = OFAEncoder(config)
        self.decoder = OFADecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding of encoder and decoder."""
        self.encoder.embed_tokens = self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: OFAEncoderOutput | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> OFAOutput:
        """Return the final states; see :meth:`OFAForConditionalGeneration.forward`."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, **kwargs
            )
        states = encoder_outputs.last_hidden_state
        assert states is not None
        if decoder_input_ids is None:
            start = self.config.decoder_start_token_id
            decoder_input_ids = torch.full((len(states), 1), start, dtype=torch.long, device=states.device)
        out = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=states,
            encoder_position_keys=encoder_outputs.position_keys,
            encoder_attention_mask=attention_mask,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        return OFAOutput(
            last_hidden_state=out.last_hidden_state,
            cache=out.cache,
            decoder_hidden_states=out.hidden_states,
            decoder_attentions=out.attentions,
            cross_attentions=out.cross_attentions,
            encoder_last_hidden_state=states,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            encoder_outputs=encoder_outputs,
        )


class OFAForConditionalGeneration(OFAPreTrainedModel, GenerationMixin):
    """Generates text about images and text."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = OFAModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: OFAEncoderOutput | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> OFAOutput:
        """Return the logits of the decoder's tokens [batch, time, vocabulary], and with labels the loss.

        Args:
            input_ids: tokens of the encoder [batch, source], ``image_token_index`` at the positions of patches.
            pixel_values: one image [3, height, width] for each row that has placeholders, in the order of the rows.
            attention_mask: 0 at padding of the encoder's input [batch, source], on either side.
            decoder_input_ids: tokens of the decoder [batch, time]; if None, the labels shifted to the right, or the
                start token.
            decoder_attention_mask: 0 at padding of the decoder's tokens, with those in the cache [batch, columns].
            encoder_outputs: what the encoder has returned, in place of its inputs.
            cache: key-value cache; None without one.
            labels: tokens to be predicted [batch, time], -100 for none.
            use_cache: whether to make a cache if there is none.
            logits_to_keep: number of last tokens whose logits are computed; 0 for all.
            kwargs: passed on to the layers.

        Raises:
            ArchitectureError: if images do not fill their placeholders, one for a row.
        """
        if labels is not None and decoder_input_ids is None:
            pad, start = self.config.pad_token_id, self.config.decoder_start_token_id
            decoder_input_ids, use_cache = shift_tokens_right(labels, pad, start), False
        out: OFAOutput = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        assert out.last_hidden_state is not None
        logits, loss = self.lm_head(out.last_hidden_state[:, -logits_to_keep:]), None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, shift_labels=labels)
        return OFAOutput(**{**out, "loss": loss, "logits": logits})


def _scores(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Return the scores of positions [batch, heads, queries, keys] from their queries and keys [batch, ..., hidden]."""
    q, k = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k))
    return (2 * q.shape[-1]) ** -0.5 * q @ k.transpose(2, 3)


def _of_both(which: Tensor, pairs: Tensor) -> Tensor:
    """Return the entries of pairs [batch, time, time] whose tokens are both among these [batch, time], else 0."""
    return torch.where(which[:, :, None] & which[:, None, :], pairs, 0)


def _pairs_of_words(queries: Tensor, keys: Tensor, size: int) -> Tensor:
    """Return the entries of pairs of words, by their distance [batch, queries, keys].

    Up to ``size // 2`` each distance has an entry of its own, and beyond they are on a logarithmic scale.

    Args:
        queries: positions [batch, queries].
        keys: positions [batch, keys].
        size: number of entries for distances of the same sign, with 0.
    """
    middle, distance = size // 2, torch.arange(1 - LONGEST, LONGEST, device="cpu")
    scale = math.log((LONGEST - 1) / middle)
    far = torch.ceil(torch.log(distance.abs().clamp(min=middle) / middle) / scale * (middle - 1)).long() + middle
    entries = torch.where(distance.abs() <= middle, distance, distance.sign() * far) + size - 1
    return entries.to(queries.device)[queries[:, :, None] - keys[:, None, :] + LONGEST - 1]


def _pairs_of_patches(patches: Tensor, side: int) -> Tensor:
    """Return the entries of pairs of patches, by the rows and columns between them [batch, time, time].

    Args:
        patches: entries in the table of positions [batch, time], row by row from 1 on.
        side: number of positions in a row.
    """
    rows, columns = (patches - 1) // side, (patches - 1) % side
    down, right = (each[:, :, None] - each[:, None, :] + side - 1 for each in (rows, columns))
    return down * (2 * side - 1) + right


def _check_images(is_patch: Tensor, images: int, patches: int) -> None:
    """Check that each row with placeholders [batch, time] has one image of this many patches.

    Raises:
        ArchitectureError: otherwise.
    """
    counts = is_patch.sum(1)
    if int((counts > 0).sum()) != images or not bool(((counts == 0) | (counts == patches)).all()):
        raise ArchitectureError(
            f"the prompts have {int(counts.sum())} placeholder positions for images, but the images fill "
            f"{images * patches}: give one image to each row with placeholders, as the processor makes them"
        )
