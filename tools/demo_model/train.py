"""Train the demo model from scratch on a CPU.

    torchrun --nproc-per-node 2 train.py --out run

Two phases: the vision tower alone learns to tell what each patch of crowded scenes shows (an auxiliary task),
then tower, projector and decoder learn to answer. The auxiliary losses fade out towards the end of phase two.
Every random choice follows from the seed and the step; --resume goes on from its checkpoint.pt.
Under torchrun each process takes its share of every batch; one process per core beats one with many threads.
"""

import argparse
import json
import os
import random
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from make_data import EVAL_SEED, model_input
from model import ANSWER_HEADS, AUX, N_PATCHES, TURN_HEADS, VOCAB_SIZE, WORD_HEADS, AuxHead, Look, align_loss, answer_logits, build_model, hidden_states, vision_features
from scenes import BACKGROUNDS, COLOUR_NAMES, NUMBER, SHAPES, SIZE_NAMES, TRAINING_WEIGHTS, conversation, plural, render, sample_scene
from tokenizer import SYSTEM, build as build_tokenizer

EOS = 2
IGNORE = -100
PICTURE_SEED = 500_000_000
GRID = int(N_PATCHES**0.5)
# Turns are parted by "</s>" in the original code; llava-hf's chat template leaves a space instead.
SPACE_SHARE = 0.35
AUX_WEIGHT = 0.5
LOOK_WEIGHT = 1.0
# "A" or "An", "," or "and", "is" or "are" are one guess of two each, a word or more ahead of what decides them: learnt last, if they
# count no more than others.
JOINT_WEIGHT = 4.0
# The tokens that a patch's projected features are drawn to, in the order of patch_labels' columns.
PATCH_WORDS = {"shape": SHAPES, "colour": COLOUR_NAMES, "size": SIZE_NAMES, "order": ["one", "two", "three"]}
PATCH_MARKS = {
    "objects": "123", "background": "pgn",
    "height": "xyz", "from_right": "abc", "from_bottom": "def",  # places counted from the other ends: "rightmost" is one mark, not three
    "same_shape": "456", "same_colour": "789",  # how many objects share it: counting what looks alike is learnt very late without
}  # fmt: skip
STRIDE = 64  # seeds between the first items of two steps: what a step sees depends on no batch size but its own
PAD_SHARE = 0.25  # pictures padded to square (original profile); the others are cropped (hf profile)


class Encoder:
    """Conversation -> ids and targets. Pieces are cached, because a scene world has few sentences."""

    def __init__(self, tokenizer):
        self.tokenizer, self.cache = tokenizer, {}
        self.image = [tokenizer.token_to_id("<image>")] * N_PATCHES
        # token of an attribute word -> (column, value) of patch_labels
        columns = enumerate([SHAPES, COLOUR_NAMES, SIZE_NAMES])
        self.attributes = {self.ids(word)[0]: (k, i + 1) for k, words in columns for i, word in enumerate(words)}
        self.words = self.attributes | {self.ids(plural(shape))[-1]: (0, i + 1) for i, shape in enumerate(SHAPES)}
        self.verdicts = {self.ids(word)[0] for word in ("Yes", "No", *NUMBER, "is", "are")}
        # These agree with what comes after them: an article with its colour, a comma or "and" with how many objects are left.
        self.joints = {self.ids(word)[-1] for word in ("A", "An", "a", "an", "and", "square,")}
        self.weights = torch.ones(VOCAB_SIZE)
        self.weights[[*self.joints, self.ids("is")[0], self.ids("are")[0]]] = JOINT_WEIGHT

    def ids(self, text):
        # Each piece begins with "▁" or a special token follows, so pieces tokenize as they do in the whole.
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.cache[text]

    def __call__(self, turns, system, space):
        """Targets stand at the position that predicts them."""
        ids, targets, spans = [1], [IGNORE], []

        def feed(piece):
            ids.extend(piece)
            targets.extend([IGNORE] * len(piece))

        for k, (_, question, answer, *_) in enumerate(turns):
            head = f"{SYSTEM} USER: " if system and k == 0 else "USER: "
            if k == 0:
                feed(self.ids(head) + self.image + self.ids(f"\n{question} ASSISTANT:"))
            else:
                feed(self.ids(f"{head}{question} ASSISTANT:"))
            reply = self.ids(answer)
            start = len(ids) - 1
            feed(reply)
            # The answer ends with </s> even where the next turn's text does not show it.
            targets[start : start + len(reply) + 1] = reply + [EOS]
            spans.append((start, start + len(reply) + 1))
            if not space:
                feed([EOS])
        return ids, targets, spans


def patch_labels(scene, pad):
    """int64 [patches, kinds]: AUX, then those that only align_loss reads, in the order of PATCH_WORDS and PATCH_MARKS."""
    labels = np.zeros((GRID, GRID, len(PATCH_WORDS) + len(PATCH_MARKS)), np.int64)
    labels[..., 4] = min(len(scene.objects), 3) - 1
    labels[..., 5] = BACKGROUNDS.index(scene.background)
    scale = min(scene.width, scene.height) / max(scene.width, scene.height) if pad else 1.0
    centres = (np.arange(GRID) + 0.5) / GRID
    for k, o in enumerate(scene.objects):
        u, v = ((1 - scale) / 2 + c * scale for c in (o.x, o.y))
        distance = np.hypot(centres[None, :] - u, centres[:, None] - v)
        on = (distance < 0.45 * o.diameter * scale) | (distance == distance.min())
        counts = [
            sum(other.y < o.y for other in scene.objects) + 1,
            len(scene.objects) - k,
            sum(other.y > o.y for other in scene.objects) + 1,
            sum(other.shape == o.shape for other in scene.objects),
            sum(other.colour == o.colour for other in scene.objects),
        ]
        labels[on, len(AUX) :] = np.minimum(counts, 3)
        labels[on, :4] = [SHAPES.index(o.shape) + 1, COLOUR_NAMES.index(o.colour) + 1, SIZE_NAMES.index(o.size) + 1, min(k, 2) + 1]
    return labels.reshape(N_PATCHES, -1)


def picture_batch(items, crowd_share):
    """Pictures with patch labels and no text; the first `crowd_share` of every two hundred items are crowded."""
    pixels, labels = [], []
    for item in items:
        crowded = (item // 2) % 100 < 100 * crowd_share
        scene = sample_scene(PICTURE_SEED + item, crowded=crowded)
        pad = random.Random(~item).random() < PAD_SHARE
        pixels.append(torch.from_numpy(model_input(render(scene), pad).copy()))
        labels.append(patch_labels(scene, pad))
        if crowded:
            labels[-1][:, [3, 4]] = labels[-1][:, len(AUX) :] = IGNORE  # order and numbers mean nothing in a crowd
    return torch.stack(pixels), torch.from_numpy(np.stack(labels))


def batch_of(encoder, items, turns):
    pixels, labels, rows, answer_looks, word_looks, turn_looks = [], [], [], [], [], []
    for item in items:
        scene, rng = sample_scene(item), random.Random(~item)
        pad = rng.random() < PAD_SHARE
        system = rng.random() < (0.6 if pad else 0.15)
        space = not system and rng.random() < SPACE_SHARE
        pixels.append(torch.from_numpy(model_input(render(scene), pad).copy()))
        labels.append(patch_labels(scene, pad))
        talk = conversation(scene, item, turns, with_objects=True, weights=TRAINING_WEIGHTS)
        rows.append(encoder(talk, system, space))
        answer_looks += answer_targets(encoder, len(rows) - 1, rows[-1], talk, scene, labels[-1])
        word_looks += word_targets(encoder, len(rows) - 1, rows[-1][0], labels[-1])
        turn_looks += turn_targets(encoder, len(rows) - 1, rows[-1])
    ids, targets = stack(rows)
    looks = [stack_looks(found, ids.shape[1]) for found in (answer_looks, word_looks, turn_looks)]
    return torch.stack(pixels), torch.from_numpy(np.stack(labels)), ids, targets, looks


def stack_looks(found, tokens):
    row, position, seen = zip(*found)
    patches = torch.zeros(len(found), tokens, dtype=torch.bool)
    for i, where in enumerate(seen):
        patches[i, where] = True
    return torch.tensor(row), torch.tensor(position), patches


def word_targets(encoder, row, ids, labels):
    """(row, position, image tokens) for each word of the text that names a shape, colour or size.

    Words in a row narrow each other down: the last of "small red star" looks at the small red star.
    Where the picture shows nothing of the kind, it looks at <s>.
    """
    first, out, fits = ids.index(encoder.image[0]), [], None
    for position, token in enumerate(ids):
        if token not in encoder.words:
            fits = None
            continue
        column, value = encoder.words[token]
        fits = (labels[:, column] == value) & (True if fits is None else fits)
        patches = np.flatnonzero(fits)
        out.append((row, position, first + patches if len(patches) else [0]))
    return out


def turn_targets(encoder, row, encoded):
    """(row, position, text positions): the attribute words of the turn so far, for each attribute, number, yes or no to predict."""
    ids, targets, spans = encoded
    out, begin = [], 0
    for start, end in spans:
        for position in range(start, end):
            if targets[position] in encoder.attributes or targets[position] in encoder.verdicts:
                words = [p for p in range(begin, position + 1) if ids[p] in encoder.words]
                if words:
                    out.append((row, position, words))
        begin = end
    return out


def answer_targets(encoder, row, encoded, talk, scene, labels):
    """(row, position, image tokens) for each attribute word of the answers, and for what agrees with it: where to look when predicting it."""
    ids, targets, spans = encoded
    first = ids.index(encoder.image[0])
    out = []
    for (_, _, _, objects), (start, end) in zip(talk, spans):
        if not objects:
            continue
        turn = iter(objects)
        now = next(turn)
        for position in range(start, end):
            target = targets[position]
            if target not in encoder.attributes and target not in encoder.joints:
                continue
            patches = np.flatnonzero(labels[:, 3] == scene.objects.index(now) + 1)
            out.append((row, position, first + patches))
            if encoder.attributes.get(target, (None,))[0] == 0 and len(objects) > 1:  # the shape ends a phrase
                now = next(turn, now)
    return out


def stack(rows):
    length = max(len(ids) for ids, _, _ in rows)
    ids = torch.full((len(rows), length), EOS)
    targets = torch.full((len(rows), length), IGNORE)
    for i, (row, target, _) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        targets[i, : len(row)] = torch.tensor(target)
    return ids, targets


@torch.no_grad()
def held_out_accuracy(model, encoder, count=192, turns=6):
    """{type: share of answers that greedy decoding gets right to the last token}, given the true history.

    Greedy decoding gives the reference exactly where the argmax is right at each of its positions.
    """
    model.eval()
    right, seen = defaultdict(int), defaultdict(int)
    for start in range(0, count, 32):
        rows, pixels, kinds = [], [], []
        for seed in range(EVAL_SEED + 500_000 + start, EVAL_SEED + 500_000 + start + 32):
            scene = sample_scene(seed)
            talk = conversation(scene, seed, turns)
            kinds.append([kind for kind, _, _ in talk])
            pixels.append(torch.from_numpy(model_input(render(scene), False).copy()))
            rows.append(encoder(talk, False, False))
        ids, targets = stack(rows)
        image = model.model.multi_modal_projector(vision_features(model, torch.stack(pixels)))
        hidden = hidden_states(model, ids, image)
        good = torch.ones_like(targets, dtype=torch.bool)
        where = targets >= 0
        good[where] = model.lm_head(hidden[where]).argmax(-1) == targets[where]
        for i, (_, _, spans) in enumerate(rows):
            for kind, (a, b) in zip(kinds[i], spans):
                seen[kind] += 1
                right[kind] += bool(good[i, a:b].all())
    model.train()
    accuracy = {kind: right[kind] / seen[kind] for kind in sorted(seen)}
    accuracy["all"] = sum(right.values()) / sum(seen.values())
    return accuracy


def learning_rate(step, warmup, total, peak, decay_share):
    """Warm up, hold, then fall linearly to 2 % (so that a run can be lengthened before its fall)."""
    fall = int(total * (1 - decay_share))
    rise = min(1.0, (step + 1) / warmup)
    return peak * rise * (1.0 if step < fall else max(0.02, (total - step) / max(1, total - fall)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--vision-steps", type=int, default=400)
    parser.add_argument("--vision-batch", type=int, default=64)
    parser.add_argument("--extra", type=int, default=8, help="pictures without text beside each batch of conversations")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--vision-lr", type=float, default=1e-3)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--decay-share", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("gloo")
    run = Path(args.out)
    run.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer)
    model = build_model(tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<pad>"), args.seed)
    aux = AuxHead(model.config.vision_config.hidden_size)
    parameters = [*model.parameters(), *aux.parameters()]

    def new_optimizer():
        """No decay on norms and biases; a tower that has been taught moves at a smaller rate than the rest."""
        groups = defaultdict(list)
        for name, p in [*model.named_parameters(), *aux.named_parameters()]:
            groups[0.05 if p.ndim > 1 else 0.0, 0.4 if phase == "answers" and "vision_tower" in name else 1.0].append(p)
        groups = [{"params": ps, "weight_decay": decay, "scale": scale} for (decay, scale), ps in groups.items()]
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    tokens = {kind: [encoder.ids(word)[0] for word in words] for kind, words in PATCH_WORDS.items()}
    # these three are single characters, which encode as "▁" and themselves
    tokens |= {kind: [tokenizer.token_to_id(c) for c in word] for kind, word in PATCH_MARKS.items()}
    phase, first = "vision", 0
    if args.resume:
        saved = torch.load(run / "checkpoint.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        aux.load_state_dict(saved["aux"])
        phase, first = saved["phase"], saved["step"]
    optimizer = new_optimizer()
    if first > 0:
        optimizer.load_state_dict(saved["optimizer"])
    began = time.time()
    log = open(run / "log.jsonl", "a") if rank == 0 else None

    def report(**row):
        if rank:
            return
        row["minutes"] = round((time.time() - began) / 60, 2)
        log.write(json.dumps(row) + "\n")
        log.flush()
        print(json.dumps(row), flush=True)

    def share(step, size):
        """Items of batch `step` that this process works on."""
        return range(step * STRIDE + rank, step * STRIDE + size, world)

    def save(phase, step):
        if rank:
            return
        state = {"model": model.state_dict(), "aux": aux.state_dict(), "optimizer": optimizer.state_dict(), "phase": phase, "step": step}
        torch.save(state, run / "checkpoint.tmp")
        (run / "checkpoint.tmp").rename(run / "checkpoint.pt")

    def update(loss, rate):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.zero_grad()
        loss.backward()
        grads = [p.grad for p in parameters if p.grad is not None]
        if world > 1:
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for g, part in zip(grads, flat.split([g.numel() for g in grads])):
                g.copy_(part.view_as(g) / world)
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        optimizer.step()

    look = Look(model)
    model.train()
    if phase == "vision":
        for step in range(first, args.vision_steps):
            pixels, labels = picture_batch(share(step, args.vision_batch), 1)
            loss, accuracy = aux.loss(vision_features(model, pixels), labels)
            update(loss, learning_rate(step, 100, args.vision_steps, args.vision_lr, 0.2))
            if step % 25 == 0:
                report(phase="vision", step=step, loss=round(loss.item(), 4), **{k: round(v, 3) for k, v in accuracy.items()})
            if (step + 1) % 100 == 0:
                save("vision", step + 1)
        phase, first = "answers", 0
        optimizer = new_optimizer()
        save(phase, first)

    for step in range(first, args.steps):
        pixels, labels, ids, targets, looks = batch_of(encoder, share(step, args.batch), args.turns)
        weight = AUX_WEIGHT * min(1.0, max(0.0, 0.95 - step / args.steps) / 0.2)
        n = len(pixels)
        if weight > 0:
            # pictures without text go on teaching the tower, at a quarter of the cost of those with
            more, more_labels = picture_batch(share(args.vision_steps + step, args.extra), 0.5)
            pixels, labels = torch.cat([pixels, more]), torch.cat([labels, more_labels])
        features = vision_features(model, pixels)
        image = model.model.multi_modal_projector(features)
        logits, wanted = answer_logits(model, hidden_states(model, ids, image[:n]), targets)
        loss = answer_loss = torch.nn.functional.cross_entropy(logits, wanted, weight=encoder.weights)
        accuracy = {}
        if weight > 0:
            aux_loss, accuracy = aux.loss(features, labels)
            look_losses = [look.loss(heads, *where) for heads, where in zip((ANSWER_HEADS, WORD_HEADS, TURN_HEADS), looks)]
            loss = answer_loss + weight * (aux_loss + align_loss(model, image, labels, tokens) + LOOK_WEIGHT * sum(look_losses))
            accuracy |= dict(zip(("look", "word_look", "turn_look"), (part.item() for part in look_losses)))
        update(loss, learning_rate(step, 100, args.steps, args.lr, args.decay_share))
        if step % 25 == 0:
            token_accuracy = (logits.argmax(-1) == wanted).float().mean().item()
            report(
                phase="answers", step=step, loss=round(answer_loss.item(), 4), token_accuracy=round(token_accuracy, 4),
                **{k: round(v, 3) for k, v in accuracy.items()},
            )  # fmt: skip
        if rank == 0 and ((step + 1) % 200 == 0 or step + 1 == args.steps):
            save("answers", step + 1)
            report(held_out=step + 1, **{k: round(v, 3) for k, v in held_out_accuracy(model, encoder).items()})


if __name__ == "__main__":
    main()
