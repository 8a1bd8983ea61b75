"""MultimodalLM: image encoder + connector + decoder as one transformers model.

    images (N, 3, H, H) uint8 -> image encoder -> (N, P, C) patches -> connector -> (N, M, D) image tokens
    input_ids (B, S) -> embeddings (B, S, D), image tokens written over the <image> marks -> decoder -> logits

`save_pretrained`, `from_pretrained`, safetensors and `generate` are transformers' own. Documents packed into one sequence are
kept apart by `document_ids` and restarting `position_ids` (see data_pipelines/batch.py). Logits are computed only where a label
stands: with image tokens and padding left out that is about half the positions, and the vocabulary is the widest matrix of a
small decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from configs.errors import UserError
from data_pipelines.batch import IGNORE
from mm1.model.connector import build_connector
from mm1.model.image_encoder import ImageEncoder, build_image_encoder
from mm1.model.loss import chunked_losses, token_losses
from mm1.model.packed_attention import documents_apart


class MultimodalConfig(PretrainedConfig):
    """Everything needed to rebuild the architecture without the files it was first made from.

    image_encoder, connector: their own `settings()`; text_config: the decoder's transformers configuration.
    """

    model_type = "mm1"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers' own convention)

    def __init__(
        self,
        image_encoder: dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        image_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        self.image_encoder = image_encoder or {}
        self.connector = connector or {}
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.image_token_id = image_token_id
        for name in ("eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings"):
            if text_config is not None and name not in kwargs:
                kwargs[name] = getattr(text_config, name, None)
        # Without this, transformers resets the decoder's choice of attention to none, which means eager.
        kwargs.setdefault("attn_implementation", getattr(text_config, "_attn_implementation", None))
        super().__init__(**kwargs)

    @property
    def image_size(self) -> int:
        """Side of the square input images, in pixels."""
        return int(self.image_encoder["image_size"])

    @property
    def num_image_tokens(self) -> int:
        """Tokens of the decoder's sequence that one image takes."""
        return int(self.connector["num_tokens"])


@dataclass
class MultimodalOutput(CausalLMOutputWithPast):
    """With labels: `loss` is the mean over labelled positions; `token_losses` float32 (T,) are theirs in row-major order, and
    `token_z` the squared log-partition at each (for z-loss). With a loss in chunks there are no logits."""

    token_losses: torch.Tensor | None = None
    token_z: torch.Tensor | None = None


class MultimodalLM(PreTrainedModel, GenerationMixin):
    config_class = MultimodalConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: MultimodalConfig,
        image_encoder: ImageEncoder | None = None,
        decoder: PreTrainedModel | None = None,
    ) -> None:
        """Parts given are taken as they are (with their weights); parts not given are built from the configuration."""
        super().__init__(config)
        self.image_encoder = image_encoder or build_image_encoder(config.image_encoder, load_weights=False)
        self.decoder = decoder if decoder is not None else AutoModelForCausalLM.from_config(config.text_config)
        embeddings: Any = self.decoder.get_input_embeddings()
        self.connector = build_connector(
            config.connector,
            in_width=self.image_encoder.width,
            grid=self.image_encoder.grid,
            out_width=embeddings.embedding_dim,
        )
        self._keep: torch.Tensor | None = None
        self.loss_chunk = 0
        """Positions whose logits are in memory at once while training; 0: all labelled ones. See mm1/model/loss.py."""
        self._labelled_states: torch.Tensor | None = None
        self._head_is_last = False
        head = self.decoder.get_output_embeddings()
        if head is None:
            raise UserError(f"decoder {type(self.decoder).__name__} has no output embeddings: it is not a causal language model.")
        head.register_forward_pre_hook(self._keep_labelled)
        self._tie()

    def _tie(self) -> None:
        """What transformers' post_init does but for initialising weights: the parts have done that themselves."""
        prefix = "decoder."
        keys = getattr(self.decoder, "_tied_weights_keys", None) or {}
        if isinstance(keys, dict) and self.decoder.config.tie_word_embeddings:
            self._tied_weights_keys = {prefix + a: prefix + b for a, b in keys.items()}
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Encoder, connector and decoder initialise themselves when they are built."""

    def _keep_labelled(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        # Before the output embeddings: whatever a decoder does to its logits (scaling, soft-capping) still happens to them.
        if self._keep is None:
            return None
        states = args[0][self._keep]
        if self.loss_chunk:
            self._labelled_states = states
            states = states[:1].detach()
        return (states,)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.decoder.get_output_embeddings()

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, H) -> image tokens (N, M, D) in the decoder's dtype."""
        frozen = not any(p.requires_grad for p in self.image_encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            patches = self.image_encoder(images)
        return self.connect(patches)

    def connect(self, patches: torch.Tensor) -> torch.Tensor:
        """The image encoder's patches (N, P, C) -> image tokens (N, M, D) in the decoder's dtype."""
        return self.connector(patches).to(self.get_input_embeddings().weight.dtype)

    def embed(
        self, input_ids: torch.Tensor, image_features: torch.Tensor | None, image_slots: torch.Tensor | None
    ) -> torch.Tensor:
        """Token embeddings (B, S, D) with the image tokens (N, M, D) written over their slots.

        Without `image_slots` the slots are the runs of <image> marks in `input_ids`, row by row. Raises UserError if marks and
        images do not agree in number.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        if image_features is None or len(image_features) == 0:
            return embeddings
        length = image_features.shape[1]
        if image_slots is None:
            rows, columns = (input_ids == self.config.image_token_id).nonzero(as_tuple=True)
            if len(rows) != len(image_features) * length:
                raise UserError(
                    f"input_ids hold {len(rows)} <image> marks; {len(image_features)} images of {length} tokens need "
                    f"{len(image_features) * length}."
                )
        else:
            if len(image_slots) != len(image_features):
                raise UserError(f"{len(image_slots)} image slots for {len(image_features)} images.")
            rows = image_slots[:, 0].repeat_interleave(length)
            columns = (image_slots[:, 1, None] + torch.arange(length, device=image_slots.device)).flatten()
        return embeddings.index_put((rows, columns), image_features.flatten(0, 1).to(embeddings.dtype))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        image_slots: torch.Tensor | None = None,
        image_patches: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MultimodalOutput:
        """Shapes as in data_pipelines/batch.py. Where images are already encoded, `image_features` (N, M, D), the connector's, or
        `image_patches` (N, P, C), the image encoder's, replace `images`.

        `document_ids` (B, S) restricts attention to within documents; `attention_mask` (B, S) marks padding, for generation.
        `labels` are already shifted (labels[b, s] is what position s must predict); with them, logits are (T, V) over the T
        labelled positions.
        """
        unused = None
        if inputs_embeds is None:
            assert input_ids is not None
            if image_features is None and image_patches is not None:
                if len(image_patches):
                    image_features = self.connect(image_patches)
                elif self.training:  # as below, but for the tower
                    unused = self.connect(image_patches.new_zeros(1, *image_patches.shape[1:])).sum() * 0
            elif image_features is None and images is not None and len(images):
                image_features = self.encode_images(images)
            elif image_features is None and self.training:
                # No image in this micro-batch: the tower still runs, on a blank picture of no effect, because under ZeRO-3 (and
                # with gradient hooks in general) a rank that skips it leaves the others waiting for its collectives.
                size = self.config.image_size
                unused = self.encode_images(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=input_ids.device)).sum() * 0
            inputs_embeds = self.embed(input_ids, image_features, image_slots)
            if unused is not None:
                inputs_embeds = inputs_embeds + unused
        if document_ids is not None:
            attention_mask = documents_apart(document_ids, self.decoder.config, inputs_embeds.dtype)
        labelled = None if labels is None else labels != IGNORE
        self._keep = labelled
        try:
            output = self.decoder(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache if use_cache is not None else labels is None,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        finally:
            self._keep = None
        if labels is None or labelled is None:
            return MultimodalOutput(logits=output.logits, past_key_values=output.past_key_values)
        logits, states = output.logits, self._labelled_states
        self._labelled_states = None
        if states is None:
            losses, log_partition = token_losses(logits, labels[labelled])
        else:
            self._check_head(states, logits)
            logits, chunks = None, -(-labels.numel() // self.loss_chunk)
            losses, log_partition = chunked_losses(self.get_output_embeddings(), states, labels[labelled], chunks)
        return MultimodalOutput(
            loss=losses.mean() if len(losses) else losses.sum(),
            logits=logits,
            token_losses=losses,
            token_z=log_partition.square(),
        )

    @torch.no_grad()
    def _check_head(self, states: torch.Tensor, logits: torch.Tensor) -> None:
        """UserError if the decoder does more to its logits than its head: chunks would lack it. Tried once, on one position."""
        if self._head_is_last or not len(states):
            return
        if not torch.equal(self.get_output_embeddings()(states[:1]), logits):
            raise UserError(
                f"engine.loss_chunk={self.loss_chunk}: {type(self.decoder).__name__} scales or caps its logits after its output "
                "embeddings, so they cannot be made in chunks. Set engine.loss_chunk=0."
            )
        self._head_is_last = True

    # transformers types its ids as LongTensor and its self as a protocol that no PreTrainedModel meets
    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Images go in with the prompt and are part of the cache from then on."""
        first = kwargs.get("is_first_iteration", False)
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc, arg-type]
        if not first:
            for name in ("images", "image_slots", "image_patches", "image_features"):
                inputs.pop(name, None)
        return inputs


AutoConfig.register("mm1", MultimodalConfig)
AutoModelForCausalLM.register(MultimodalConfig, MultimodalLM)
