"""The tiny SentencePiece model of the checkpoints, trained with LLaMA's own settings, and its `tokenizer.json` twins."""

import io
import json
from pathlib import Path

import sentencepiece as spm

from common import FIXTURES, rng

# 3 control pieces + 256 bytes + 61 learnt pieces: small, yet merges, byte fallback and whitespace pieces all occur.
VOCAB_SIZE = 320
IMAGE_TOKEN_ID = VOCAB_SIZE
PAD_TOKEN_ID = VOCAB_SIZE + 1
# llava-hf pads its vocabulary past the last added token (32002 -> 32064); the rows between are never produced by text.
HF_VOCAB_SIZE = 328

MODEL_PATH = FIXTURES / "tokenizer" / "tokenizer.model"

# Words of the prompts below plus some others; enough for the trainer to find merges of length 2 to 6.
WORDS = (
    "the a an is are in on of and to user assistant image picture what shows colour red green blue left right above "
    "describe this that there many how where who cat dog house tree water sky person people USER ASSISTANT What Where "
    "How The In It A Describe one two three 1 2 3 10 42 été naïve привет мир"
).split()


def train() -> bytes:
    """Trains with the settings LLaMA's own model carries (its trainer_spec and normalizer_spec)."""
    r = rng("tokenizer")
    lines = []
    for _ in range(800):
        words = [WORDS[int(r.integers(len(WORDS)))] for _ in range(int(r.integers(3, 12)))]
        lines.append(" ".join(words) + ["", ".", "?", ":", "!"][int(r.integers(5))])
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        character_coverage=0.98,
        unk_surface=" \u2047 ",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def ensure_model() -> Path:
    """The committed model is kept if it is there: a SentencePiece release may train another one from the same text."""
    if not MODEL_PATH.exists():
        MODEL_PATH.parent.mkdir(parents=True, exist_ok=True)
        MODEL_PATH.write_bytes(train())
    return MODEL_PATH


def bpe_vocab_and_merges(sp: spm.SentencePieceProcessor):
    """SentencePiece BPE as (vocab, merges): each way to cut a piece in two known pieces is a merge, ranked by the piece.

    Pieces are numbered in the order they were learnt (score = -rank), so the rank of a merge is the id of its result;
    ties between cuts of one piece are ordered by the ids of the parts, as transformers' converter orders them.
    """
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    merges = []
    for piece, rank in vocab.items():
        if sp.is_control(rank) or sp.is_unknown(rank) or sp.is_byte(rank):
            continue
        cuts = [(vocab[piece[:i]], vocab[piece[i:]], i) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        for _, _, i in sorted(cuts):
            merges.append((sp.get_score(rank), piece[:i], piece[i:]))
    merges.sort(key=lambda m: -m[0])
    return vocab, [f"{a} {b}" for _, a, b in merges]


def added_token(token_id: int, content: str) -> dict:
    return {
        "id": token_id, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }


def tokenizer_json_4x(model_path: Path) -> dict:
    """The `tokenizer.json` that transformers 4.x wrote and that the llava-hf repositories on the hub still hold.

    Its normalizer prepends "▁" to *every* stretch between added tokens, not only to the first. Merges are strings "a b";
    files of transformers 4.45 and later hold pairs ["a", "b"].
    """
    sp = spm.SentencePieceProcessor(model_file=str(model_path))
    vocab, merges = bpe_vocab_and_merges(sp)
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(0, "<unk>"), added_token(1, "<s>"), added_token(2, "</s>"),
            added_token(sp.get_piece_size(), "<image>"), added_token(sp.get_piece_size() + 1, "<pad>"),
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocab, "merges": merges,
        },
    }


def tokenizer_config(**extra) -> dict:
    """`tokenizer_config.json` as the llava-hf repositories hold it."""
    decoder = {
        str(i): {"content": c, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        for i, c in [(0, "<unk>"), (1, "<s>"), (2, "</s>"), (IMAGE_TOKEN_ID, "<image>"), (PAD_TOKEN_ID, "<pad>")]
    }
    return {
        "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": decoder, "bos_token": "<s>",
        "clean_up_tokenization_spaces": False, "eos_token": "</s>", "legacy": False, "model_max_length": 2048,
        "pad_token": "<pad>", "padding_side": "left", "processor_class": "LlavaProcessor", "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "use_default_system_prompt": False, **extra,
    }
