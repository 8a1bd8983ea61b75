"""The peer of benchmarks/train.py: transformers' LlavaForConditionalGeneration under its Trainer, with a run's own weights.

    our model's tower -> as timm or transformers made it     our connector -> in the projector's place     our decoder -> as it is
    packed batches    position_ids restart with each document: transformers makes the mask of it (S x S)
    padded batches    one document a row, rows filled up to the longest of their micro-batch, documents in random order

Images come ready and normalised, and are not counted. Everything else is Trainer's: its loop, loss, clipping, AdamW (fused),
schedule.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from typing import Any

import torch
from torch import nn

from benchmarks.train_step import Measured, Settings, memory, optimiser_seconds, setting
from data_pipelines.batch import IGNORE, PackedBatch
from mm1.model.multimodal import MultimodalLM

Inputs = dict[str, torch.Tensor]


class Tower(nn.Module):
    """Our image encoder as LLaVA expects one: hidden states, from pixels that are normalised already."""

    def __init__(self, encoder: Any, channels_last: bool) -> None:
        super().__init__()
        self.encoder, self.channels_last = encoder, channels_last

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        from mm1.model.towers.from_timm import TimmEncoder, read_patches

        if isinstance(self.encoder, TimmEncoder) and not self.channels_last:
            patches = read_patches(self.encoder.tower, pixel_values, self.encoder.stage)
        else:
            patches = self.encoder.patches(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=patches, hidden_states=(patches,))


def llava(model: MultimodalLM, channels_last: bool = False) -> Any:
    """LLaVA with `model`'s very modules; `model` is not to be used any more. `channels_last`: with our layout of feature maps."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    unused = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32)
    settings = LlavaConfig(
        vision_config=unused,
        text_config=model.config.get_text_config(),
        image_token_index=model.config.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=model.decoder.config.tie_word_embeddings,
    )
    peer = LlavaForConditionalGeneration(settings)
    peer.model.vision_tower = Tower(model.image_encoder, channels_last)
    peer.model.multi_modal_projector = model.connector
    peer.model.language_model = model.decoder.base_model
    peer.lm_head = model.get_output_embeddings()
    for part in (peer, peer.model, peer.model.language_model):
        part.config.use_cache = False  # with a cache transformers does not look for packed documents in the position ids
    return peer.train()


def packed_inputs(model: MultimodalLM, batch: PackedBatch) -> Inputs:
    """A packed batch as LLaVA takes it."""
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "labels": batch.labels}
    inputs["shift_labels"] = batch.labels  # already shifted
    return inputs | ({"pixel_values": model.image_encoder.normalise(batch.images)} if len(batch.images) else {})


def padded_inputs(model: MultimodalLM, batches: list[PackedBatch], pad: int, at_once: int) -> list[Inputs]:
    """The documents of all the batches, one a row, `at_once` in a micro-batch, shuffled with seed 0."""
    documents = []
    for batch in batches:
        slots = batch.image_slots.tolist()
        for row in range(len(batch.input_ids)):
            for number in range(1, int(batch.document_ids[row].max()) + 1):
                where = (batch.document_ids[row] == number).nonzero()[:, 0]
                first, last = int(where[0]), int(where[-1]) + 1
                its = [n for n, (r, start, _) in enumerate(slots) if r == row and first <= start < last]
                documents.append((batch.input_ids[row, where], batch.labels[row, where], batch.images[its]))
    random.Random(0).shuffle(documents)
    made = []
    for i in range(0, len(documents), at_once):
        rows = documents[i : i + at_once]
        size = (len(rows), max(len(own) for own, _, _ in rows))
        ids, labels, mask = torch.full(size, pad), torch.full(size, IGNORE), torch.zeros(size, dtype=torch.int64)
        for row, (own, its_labels, _) in enumerate(rows):
            ids[row, : len(own)], mask[row, : len(own)] = own, 1
            labels[row, 1 : len(own)] = its_labels[:-1]
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        images = torch.cat([pictures for _, _, pictures in rows])
        made.append(inputs | ({"pixel_values": model.image_encoder.normalise(images)} if len(images) else {}))
    return made


def train_seconds(
    peer: Any, inputs: list[Inputs], passes: int, folder: str, *, accumulate: int, device: str, precision: str
) -> list[float]:
    """Seconds of each pass of Trainer over `inputs`, after one that warms up."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    steps = len(inputs) // accumulate
    used = inputs[: steps * accumulate]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps * (passes + 1),
        per_device_train_batch_size=1,  # an item is a whole batch already
        gradient_accumulation_steps=accumulate,
        lr_scheduler_type="cosine",
        use_cpu=device == "cpu",
        bf16=precision == "bf16",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = InOrder(
        model=peer,
        args=arguments,
        train_dataset=used * (passes + 1),  # type: ignore[arg-type]
        data_collator=lambda items: items[0],
        callbacks=[Clock()],
    )
    trainer.train()
    return [ends[(k + 1) * steps - 1] - ends[k * steps - 1] for k in range(1, passes + 1)]


def measure_peer(settings: Settings) -> Measured:
    """Trainer's steps on the same batches, or on the same documents one a row; and, packed, its parts."""
    import torch
    from transformers.utils import logging

    from benchmarks.step_parts import Catcher, decoder_parts, measure

    logging.set_verbosity_error()
    config, model, tokenizer, _, steps = setting(settings)
    flat = [batch for batches in steps for batch in batches]
    per_step = len(steps[0])
    tokens = sum(int((b.document_ids > 0).sum()) for b in flat) / len(steps)
    images = sum(len(b.images) for b in flat) / len(steps)
    if settings.padded:
        inputs = padded_inputs(model, flat, tokenizer.pad_token_id, settings.rows)
        accumulate = max(1, round(len(inputs) / len(steps)))
        used = inputs[: len(inputs) // accumulate * accumulate]
        positions = sum(i["input_ids"].numel() for i in inputs)
        real = sum(int(i["attention_mask"].sum()) for i in used)
        padding = 1 - sum(int(i["attention_mask"].sum()) for i in inputs) / positions
        whole = real / tokens  # in steps of ours
    else:
        inputs, accumulate, padding, whole = [packed_inputs(model, b) for b in flat], per_step, math.nan, float(len(steps))
    peer = llava(model, settings.channels_last).to(settings.device)
    loss = float("nan")
    if not settings.padded:
        with torch.no_grad():
            first = [{k: v.to(settings.device) for k, v in i.items()} for i in inputs[:per_step]]
            labelled = [int((i["labels"] >= 0).sum()) for i in first]
            loss = sum(float(peer(**i).loss) * n for i, n in zip(first, labelled, strict=True)) / sum(labelled)
    with tempfile.TemporaryDirectory() as folder:
        passes = train_seconds(
            peer,
            inputs,
            settings.repeats,
            folder,
            accumulate=accumulate,
            device=settings.device,
            precision=config.engine.precision,
        )
    out = Measured(min(passes) / whole, tokens, images, loss=loss, padding=padding, memory=memory(settings.device))
    if settings.padded:
        return out
    index = max(range(len(flat)), key=lambda i: len(flat[i].images))
    batch = {k: v.to(settings.device) for k, v in inputs[index].items()}
    modules = {"vision": [peer.model.vision_tower], "connector": [peer.model.multi_modal_projector]}
    catcher = Catcher({**modules, **decoder_parts(peer.model.language_model), "head": [peer.lm_head]})
    peer(**batch)
    head, args, _ = catcher.calls.pop("head")[0]
    for call in catcher.calls["vision"]:
        call[2].pop("return_dict", None)
    vision = catcher.calls["vision"][0]
    catcher.calls["vision"] = [(_Patches(vision[0]), vision[1], vision[2])]
    found = catcher.parts(settings.repeats)
    states, vocabulary = args[0].detach().requires_grad_(), model.config.get_text_config().vocab_size
    found["loss"] = measure(
        lambda: [
            peer.loss_function(logits=head(states), labels=batch["labels"], shift_labels=batch["labels"], vocab_size=vocabulary)
        ],
        settings.repeats,
    )
    share = images / max(len(flat[index].images), 1)
    out.parts = {n: (p.seconds * (share if n in modules else 1), p.saved) for n, p in found.items()}
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-5, fused=True)
    out.parts["optimiser"] = (optimiser_seconds(optimizer, settings.repeats), 0)
    return out


class _Patches:
    """The tower as a function to patches."""

    def __init__(self, tower: Any) -> None:
        self.tower = tower

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tower(*args, **kwargs).last_hidden_state
