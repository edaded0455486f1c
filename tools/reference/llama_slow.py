"""The SentencePiece-backed ("slow") LlamaTokenizer of transformers 4.x, which transformers 5 no longer has.

Behaviour from its documentation and checked against transformers 4.37.2 (the version LLaVA pins) by `check_original.py`.
"""

import re

import sentencepiece as spm

IMAGE_TOKEN_INDEX = -200


class SlowLlamaTokenizer:
    """`legacy` comes from tokenizer_config.json; absent there it means True."""

    def __init__(self, model_path, legacy: bool = True):
        self.sp = spm.SentencePieceProcessor(model_file=str(model_path))
        self.legacy = legacy
        self.special = {self.sp.id_to_piece(i): i for i in (self.sp.unk_id(), self.sp.bos_id(), self.sp.eos_id())}
        self.splitter = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")
        if not legacy:
            # Same model without its dummy prefix: the caller places the one "▁" itself. In protobuf a message given twice is
            # merged, so `normalizer_spec { add_dummy_prefix: false }` can be put behind the file.
            self.sp = spm.SentencePieceProcessor(model_proto=self.sp.serialized_model_proto() + b"\x1a\x02\x18\x00")

    def tokenize(self, text: str) -> list[int]:
        """Ids without BOS. The strings `<unk>`, `<s>`, `</s>` in a text become their ids."""
        if not text:
            return []
        if not self.legacy:
            text = "▁" + text.replace("▁", " ")
        ids = []
        for part in self.splitter.split(text):
            if part in self.special:
                ids.append(self.special[part])
            elif part:
                ids.extend(self._segment(part))
        space = self.sp.piece_to_id("▁")
        if not self.legacy and len(ids) > 1 and ids[0] == space and ids[1] in self.special.values():
            ids = ids[1:]
        return ids

    def _segment(self, part: str) -> list[int]:
        if self.legacy or not part.startswith(("▁", " ")):
            return self.sp.encode(part)
        # Without the dummy prefix SentencePiece would swallow a leading "▁"; text in front of it keeps it.
        guard = self.sp.encode("<unk>")
        return self.sp.encode("<unk>" + part)[len(guard):]

    def decode(self, ids: list[int]) -> str:
        """As decode(ids, skip_special_tokens=True): the special pieces left out, one "▁" taken from the front."""
        pieces = [self.sp.id_to_piece(i) for i in ids if i not in self.special.values()]
        if pieces and pieces[0].startswith("▁"):
            pieces[0] = pieces[0][1:]
        return self.sp.decode_pieces(pieces)

    def __call__(self, text: str) -> list[int]:
        return [self.sp.bos_id()] + self.tokenize(text)


def encode_with_images(prompt: str, tokenizer: SlowLlamaTokenizer) -> list[int]:
    """The original's rule: every stretch between `<image>` marks is encoded as a text of its own, with one BOS in all."""
    ids = []
    for i, chunk in enumerate(prompt.split("<image>")):
        chunk_ids = tokenizer(chunk)
        ids += chunk_ids if i == 0 else [IMAGE_TOKEN_INDEX] + chunk_ids[1:]
    return ids
