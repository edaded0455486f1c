"""Runs a LLaVA put together of transformers' own modules and keeps the output of every stage."""

from dataclasses import dataclass
from typing import Callable

import torch
from torch import nn

NEW_TOKENS = 24


@dataclass
class Reference:
    vision: nn.Module  # CLIPVisionModel
    select_layer: int  # as in the config: negative counts from the last layer
    keep_cls: bool
    project: Callable[[torch.Tensor], torch.Tensor]
    text: nn.Module  # LlamaModel
    lm_head: nn.Module
    image_token_id: int


def capture(store: dict, name: str):
    def hook(_module, _args, output):
        store[name] = (output[0] if isinstance(output, tuple) else output).detach()

    return hook


@torch.no_grad()
def encode_images(model: Reference, pixels: torch.Tensor, out: dict) -> torch.Tensor:
    """pixels [images, 3, h, w] -> features [images * n, text_hidden]"""
    kept = {}
    layers = model.vision.encoder.layers
    handles = [
        model.vision.embeddings.patch_embedding.register_forward_hook(capture(kept, "patch")),
        model.vision.embeddings.register_forward_hook(capture(kept, "embeddings")),
        model.vision.pre_layrnorm.register_forward_hook(capture(kept, "hidden.0")),
    ] + [layer.register_forward_hook(capture(kept, f"hidden.{k + 1}")) for k, layer in enumerate(layers)]
    model.vision(pixels)
    for handle in handles:
        handle.remove()
    layer = model.select_layer if model.select_layer >= 0 else len(layers) + 1 + model.select_layer
    selected = kept[f"hidden.{layer}"]
    if not model.keep_cls:
        selected = selected[:, 1:]
    features = model.project(selected).flatten(0, 1)
    out["pixel_values"] = pixels
    out["patch_embedding"] = kept["patch"].flatten(2).transpose(1, 2)
    out["clip_embeddings"] = kept["embeddings"]
    for k in range(layer + 1):
        out[f"clip_hidden.{k}"] = kept[f"hidden.{k}"]
    out["clip_selected"] = selected
    out["image_features"] = features
    return features


@torch.no_grad()
def run_case(model: Reference, input_ids: list[int], pixels: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """`input_ids` already holds the image token id once per image feature."""
    out = {"input_ids": torch.tensor(input_ids)}
    ids = out["input_ids"]
    is_image = ids == model.image_token_id
    embeds = model.text.embed_tokens(ids.masked_fill(is_image, 0))
    if pixels is not None:
        features = encode_images(model, pixels, out)
        assert int(is_image.sum()) == features.shape[0], "image positions and features differ in number"
        embeds = embeds.clone()
        embeds[is_image] = features.to(embeds.dtype)
    out["inputs_embeds"] = embeds

    kept = {}
    handles = [
        layer.register_forward_hook(capture(kept, f"decoder_hidden.{k + 1}")) for k, layer in enumerate(model.text.layers)
    ]
    logits = model.lm_head(model.text(inputs_embeds=embeds[None], use_cache=False).last_hidden_state)[0]
    for handle in handles:
        handle.remove()
    out.update({name: value[0] for name, value in kept.items()})
    out["logits"] = logits
    logprobs = logits.float().log_softmax(-1)[:-1]
    targets = ids[1:]
    in_vocab = targets >= 0
    picked = logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    out["logprobs"] = torch.where(in_vocab, picked, torch.zeros_like(picked))
    out["last_logits"] = logits[-1]

    # Greedy by recomputing the whole sequence: slow, and free of any cache that could hide a mistake.
    greedy, margins, row = [], [], logits[-1]
    for _ in range(NEW_TOKENS):
        top = row.float().topk(2)
        greedy.append(int(top.indices[0]))
        margins.append(float(top.values[0] - top.values[1]))
        embeds = torch.cat([embeds, model.text.embed_tokens(torch.tensor(greedy[-1:]))])
        row = model.lm_head(model.text(inputs_embeds=embeds[None], use_cache=False).last_hidden_state)[0, -1]
    out["greedy"] = torch.tensor(greedy)
    out["margins"] = torch.tensor(margins)
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in out.items()}
