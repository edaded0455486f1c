"""The demo model's shape, and a training forward over Hugging Face's own modules (so the weights are theirs)."""

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from make_data import IMAGE_SIZE

PATCH_SIZE = 14
N_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
# More rows than the tokenizer has tokens, as in llava-hf's checkpoints (64 | rows).
VOCAB_SIZE = 768
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


# A patch is first taught to look like the words for what it shows; cosines of a few tenths must then suffice.
ALIGN_SCALE = 30.0


def build_config(image_token_id, pad_token_id):
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="quick_gelu",
        projection_dim=256,
    )
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        hidden_act="silu",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=pad_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=N_PATCHES,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=pad_token_id,
        tie_word_embeddings=False,
    )


def build_model(image_token_id, pad_token_id, seed):
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(image_token_id, pad_token_id))
    with torch.no_grad():
        _start_local(vision_tower(model))
        _start_matching(model.model.language_model, model.lm_head)
    return model


def vision_tower(model):
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def _start_local(tower):
    """Let each patch attend to its neighbours from the first step on.

    A shape spans a few patches; from CLIP's own initial values, finding out which patches are
    neighbours takes most of a short training. Positions start as 2-D sines, and queries equal to
    keys (with weights large enough for attention to be uneven), so like attends to like.
    """
    side, width = int(N_PATCHES**0.5), tower.embeddings.embed_dim
    frequency = 0.5 ** torch.linspace(0, 3, width // 4) * 1.5
    angle = torch.arange(side)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], 1)  # [side, width / 2]
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    tower.embeddings.position_embedding.weight[1:] = torch.cat([rows, columns], -1).reshape(N_PATCHES, width)
    for layer in tower.encoder.layers:
        layer.self_attn.q_proj.weight.normal_(std=0.05)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def _start_matching(decoder, lm_head):
    """Half the heads start out attending to tokens like their own, and the output layer as the input's transpose.

    Finding the patches that look like a word of the question, and saying a word that was attended to,
    are what most answers need.
    """
    lm_head.weight.copy_(decoder.embed_tokens.weight)
    generator = torch.Generator().manual_seed(0)
    for layer in decoder.layers:
        attention = layer.self_attn
        group = attention.q_proj.out_features // attention.k_proj.out_features * attention.head_dim
        key = torch.randn(attention.head_dim, attention.q_proj.in_features, generator=generator) * 0.08
        attention.k_proj.weight[: attention.head_dim] = key
        attention.q_proj.weight[:group] = key.repeat(group // attention.head_dim, 1)


def vision_features(model, pixels):
    """hidden_states[-2] without the class token: [batch, patches, hidden].

    pixels: uint8 [batch, height, width, 3]. The last layer is skipped, as nothing reads it.
    """
    x = ((pixels.float() / 255 - CLIP_MEAN) / CLIP_STD).permute(0, 3, 1, 2)
    tower = vision_tower(model)
    h = tower.pre_layrnorm(tower.embeddings(x))
    for layer in tower.encoder.layers[:-1]:
        h = layer(h, None)
    return h[:, 1:]


def hidden_states(model, ids, image):
    """Decoder output [batch, tokens, hidden]; `image`, the projector's output, stands in for the image tokens."""
    x = model.model.language_model.embed_tokens(ids)
    x = x.masked_scatter((ids == model.config.image_token_id)[..., None], image)
    return model.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state


def answer_logits(model, hidden, targets):
    """Logits and targets at the positions that have a target."""
    where = targets >= 0
    return model.lm_head(hidden[where]), targets[where]


# ---------------------------------------------------------------- auxiliary task

# What each patch should know, as (name, number of classes, weight); class 0 is "no object here".
# Shape is by far the last to be learnt.
AUX = [("shape", 8, 3), ("colour", 9, 1), ("size", 3, 1), ("order", 4, 1), ("objects", 3, 1), ("background", 3, 1)]


class AuxHead(torch.nn.Linear):
    """Linear read-out of the scene from each patch; thrown away after training."""

    def __init__(self, hidden_size):
        super().__init__(hidden_size, sum(n for _, n, _ in AUX))

    def loss(self, features, labels):
        """labels: int64 [batch, patches, len(AUX)]. Returns the mean loss and {name: accuracy on objects}."""
        logits = self(features)
        on_object = labels[..., 0] > 0
        total, start, accuracy = 0.0, 0, {}
        for k, (name, n, weight) in enumerate(AUX):
            part, target = logits[..., start : start + n], labels[..., k]
            start += n
            if (target < 0).all():
                continue
            # objects cover a seventh of the patches: without halves, "nothing here" is learnt for long
            total = total + weight * (F.cross_entropy(part[on_object], target[on_object]) + F.cross_entropy(part[~on_object], target[~on_object])) / 2
            with torch.no_grad():
                accuracy[name] = (part.argmax(-1) == target)[on_object & (target >= 0)].float().mean().item()
        return total / sum(weight for _, _, weight in AUX), accuracy


def align_loss(model, image, labels, tokens):
    """Cross-entropy of each patch's projected features against the input embeddings of the tokens for what it shows.

    image: [batch, patches, hidden]; tokens: for each kind of label a list of token ids. Only patches on
    objects have shape, colour, size, order and height; number and background hold for every patch.
    """
    on_object = labels[..., 0] > 0
    embeddings = model.model.language_model.embed_tokens.weight
    total = 0.0
    for k, (name, ids) in enumerate(tokens.items()):
        target, x = labels[..., k], image
        if name not in ("objects", "background"):
            target, x = target[on_object] - 1, image[on_object]
        valid = target >= 0
        total = total + F.cross_entropy(ALIGN_SCALE * x[valid] @ embeddings[ids].T, target[valid])
    return total / len(tokens)


# Heads that are taught where to look, as (layer, head).
# A word of the text looks at the patches that show it;
WORD_HEADS = [(1, 0), (1, 1)]
# the position that predicts an answer's word looks at the turn's own words for shapes, colours and sizes; ...
TURN_HEADS = [(1, 2), (1, 3), (2, 0), (2, 1)]
# ... and the position that predicts an answer's word looks at the object the word is about.
ANSWER_HEADS = [(2, 2), (2, 3), (3, 2), (3, 3)]


class Look:
    """Teaches a few heads where to look: -log of their attention on the right places.

    Which object a word is about is what is learnt last of all; from the answers alone it takes
    many times as long.
    """

    def __init__(self, model):
        self.decoder, self.seen = model.model.language_model, {}
        for layer in {layer for layer, _ in WORD_HEADS + ANSWER_HEADS}:
            attention = self.decoder.layers[layer].self_attn
            for name in ("q_proj", "k_proj"):
                getattr(attention, name).register_forward_hook(
                    lambda module, inputs, output, key=(layer, name): self.seen.__setitem__(key, output)
                )

    def loss(self, heads, rows, positions, right):
        """After a forward. rows, positions: int64 [words]; right: bool [words, tokens], where to look."""
        total, tokens = 0.0, right.shape[1]
        ahead = torch.arange(tokens)[None] > positions[:, None]
        for layer, head in heads:
            attention = self.decoder.layers[layer].self_attn
            q, k = (self.seen[layer, name].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for name in ("q_proj", "k_proj"))
            cos, sin = self.decoder.rotary_emb(q, torch.arange(tokens)[None])
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            key = k[:, head * k.shape[1] // q.shape[1]]
            scores = (key[rows] @ q[rows, head, positions][..., None])[..., 0] * attention.scaling
            share = scores.masked_fill(ahead, -torch.inf).log_softmax(-1)
            total = total - torch.logsumexp(share.masked_fill(~right, -torch.inf), -1).mean()
        return total / len(heads)
