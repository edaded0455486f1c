"""A LLaMA-style tokenizer (BPE over "▁"-marked text, byte fallback), trained on the scenes' own sentences.

Ids: 0 <unk>, 1 <s>, 2 </s>, 3..258 the bytes <0x00>..<0xFF>, then characters and merges; last <image>, <pad>.
"""

import string

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from scenes import conversation, sample_scene

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def _corpus():
    for seed in range(4000):
        for _, question, answer in conversation(sample_scene(seed), seed, 8):
            yield f"▁USER:▁{question}▁ASSISTANT:▁{answer}".replace(" ", "▁")
            # after "<image>\n" a question starts without its "▁"
            yield question.replace(" ", "▁")
        if seed % 20 == 0:
            yield ("▁" + SYSTEM).replace(" ", "▁")


def build():
    trained = Tokenizer(models.BPE())
    # Words with their "▁" stay whole and punctuation stands alone, as in LLaMA's own vocabulary.
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("▁"), "merged_with_next"), pre_tokenizers.Punctuation("isolated")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=768 - len(BYTES) - 2,
        special_tokens=SPECIAL,
        min_frequency=20,
        initial_alphabet=sorted(set(string.printable[:95]) - {" "}) + ["▁"],
        show_progress=False,
    )
    trained.train_from_iterator(_corpus(), trainer)

    import json

    learnt = json.loads(trained.to_str())["model"]
    words = sorted(learnt["vocab"], key=learnt["vocab"].get)[len(SPECIAL) :]
    vocab = {token: i for i, token in enumerate(SPECIAL + BYTES + words)}
    merges = [tuple(m) for m in learnt["merges"]]

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    special = [AddedToken(t, special=True, normalized=False) for t in SPECIAL + ["<image>", "<pad>"]]
    tokenizer.add_special_tokens(special)
    return tokenizer


if __name__ == "__main__":
    tokenizer = build()
    print(tokenizer.get_vocab_size())
    for text in ["USER: <image>\nWhat color is the star? ASSISTANT:", SYSTEM + " USER: Is it so? ASSISTANT: Yes.</s>USER: Grüße 你好?"]:
        print(tokenizer.encode(text).tokens)
        print(repr(tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)))
