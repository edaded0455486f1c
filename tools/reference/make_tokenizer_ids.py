"""Lines in many scripts with their ids by LLaMA's tokenizers.

    python make_tokenizer_ids.py LLAMA_TOKENIZER_MODEL

Writes tests/fixtures/tokenizer/: `lines.jsonl` (one JSON string a line), `llama.safetensors` (ids by the real LLaMA model, which
is not in the repository), `tiny.safetensors` (ids of the first lines by the tiny model beside it), and that tiny model as
`tokenizer.json` (as llava-hf repositories hold theirs) and `tokenizer_metaspace.json` (as transformers 5's LlamaTokenizer saves it).

Tensors, for `<set>` in slow_legacy, slow (legacy false), json, metaspace: `<set>.ids` u16, the ids of all lines end to end, without
BOS, and `<set>.lengths` u16, ids per line. Only slow_legacy is whole; of the others `<set>.lines` i32 names the lines that differ
from it and the tensors hold those alone. `decoded.lines` i32 and `decoded.text` u8 (UTF-8, each ended by a zero byte; see README.md)
hold what decoding slow_legacy's ids gives where that is not the line itself.
"""

import json
import sys
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import sentencepiece as spm
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from transformers import LlamaTokenizer

import tiny_tokenizer
from common import FIXTURES, rng
from llama_slow import SlowLlamaTokenizer

DIR = FIXTURES / "tokenizer"
TINY_LINES = 600

# Letters, with some words where real ones make longer pieces; a script's lines mix both.
SCRIPTS = {
    "latin": "the quick brown fox jumps over lazy dog international understanding picture describe photograph unbelievable don't "
             "I'm it's naïve façade Größe straße señor été œuvre Ærø łódź žluťoučký kůň İstanbul ığdır Đức nghĩa",
    "cyrillic": "привет мир картина что изображено на фотографии собака кошка человек объект ёлка їжак ўзнагарода љубав ђак",
    "greek": "γειά σου κόσμε εικόνα τι δείχνει η φωτογραφία άνθρωπος σκύλος ἀρχή ὁ λόγος ᾧ",
    "arabic": "مرحبا بالعالم صورة ماذا يوجد في الصورة كلب قطة إنسان السَّلَامُ ١٢٣ پارسی اردو گفتگو",
    "hebrew": "שלום עולם תמונה מה רואים בתמונה כלב חתול אדם בְּרֵאשִׁית",
    "devanagari": "नमस्ते दुनिया चित्र में क्या है कुत्ता बिल्ली आदमी क्षेत्र ज्ञान १२३ श्रृंखला",
    "bengali": "নমস্কার পৃথিবী ছবিতে কী আছে কুকুর বিড়াল মানুষ",
    "tamil": "வணக்கம் உலகம் படத்தில் என்ன இருக்கிறது நாய் பூனை மனிதன் ஸ்ரீ",
    "thai": "สวัสดีชาวโลก ภาพนี้แสดงอะไร สุนัข แมว มนุษย์ น้ำ ๑๒๓",
    "georgian": "გამარჯობა მსოფლიო სურათი რა ჩანს ძაღლი კატა ადამიანი",
    "armenian": "բարեւ աշխարհ նկար ինչ է երևում շուն կատու մարդ և",
    "amharic": "ሰላም ዓለም ሥዕል ምን ይታያል ውሻ ድመት ሰው",
    "khmer": "សួស្តី ពិភពលោក រូបភាព ឆ្កែ ឆ្មា មនុស្ស",
    "chinese": "你好 世界 图片 里 有 什么 狗 猫 人 的 一 是 不 了 在 繁體中文 顯示 龘 𠮷 𡃁",
    "japanese": "こんにちは 世界 この 写真 には 何が 写って いますか いぬ ネコ カタカナ ﾊﾝｶｸ ヶ月 々 〆",
    "korean": "안녕하세요 세계 이 사진에는 무엇이 있습니까 개 고양이 사람 뷁 ㅋㅋㅋ 한글",
    "symbols": "€ £ ¥ ₿ ± × ÷ ≤ ≥ ≠ ∑ ∫ √ ∞ → ← ⇒ ↔ ■ ● ★ ☂ ☃ ♥ ½ ¾ ² ³ ™ © ® § ¶ † ‡ • … « » „ “ ” ‘ ’ – — ﬁ ﬂ Ⅷ ① ㎏ ℃ ℡",
}
EMOJI = ["😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷", "❤️", "🤷🏿‍♂️", "🧑‍🚀", "1️⃣", "🦙", "☎︎", "🫠", "👁️‍🗨️"]
CODE = [
    "fn main() { println!(\"{}\", x); }", "for (int i = 0; i < n; ++i) {", "\tif x == None:\n\t\treturn -1", "a->b[c] |= 0xFF;",
    "SELECT * FROM t WHERE id = 42;", "<div class=\"a\">&nbsp;</div>", "https://example.com/a?b=c&d=%20#e", "C:\\Users\\x\\y.txt",
    "def f(x: list[int]) -> dict:", "    return {k: v for k, v in x}", "$\\frac{a}{b}$", "#include <stdio.h>\r\n", "1e-5", "3.14159",
    "__init__", "camelCaseName", "snake_case_name", "SCREAMING_CASE", "{{{}}}", "[[]]", "//", "/* */", "`code`", "***bold***", "~~~",
]
SPECIAL = [
    "</s>", "<s>", "<unk>", "<image>", "<pad>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<|im_start|>", "<|im_end|>", "###",
    "<im_start>", "<im_end>", "<im_patch>", "<0x0A>", "<0xFF>", "</s", "s>", "< s >", "<S>", "</S>", "<unk", "▁", "▁▁", "<s></s>", " </s> ",
]
SPACES = ["", " ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n", " \n", "\n ", "\u00a0", "\u2003", "\u200b", "\ufeff", "\u3000", "     ", " " * 16]
CONTROL = ["\x00", "\x01", "\x07", "\x08", "\x0b", "\x0c", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u2029", "\u200e", "\u202e", "\ufffd", "\uffff",
           "\U0010ffff", "\ue000", "\u0301", "a\u0301", "\u0300\u0301\u0302"]
PUNCTUATION = list(".,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`")


def fixed_lines() -> list[str]:
    """Edge cases by name; they come first so that the tiny tokenizer's lines hold them too."""
    lines = SPACES + CONTROL + SPECIAL + EMOJI + CODE + PUNCTUATION
    lines += [f"{space}word{space}" for space in SPACES] + [f"a{space}b" for space in SPACES]
    lines += [f"a{s}b" for s in SPECIAL] + [f"a {s} b" for s in SPECIAL] + [f"{s} a{s}" for s in SPECIAL]
    lines += ["".join(EMOJI), " ".join(EMOJI), "a" * 100, " " * 100, "ab" * 60, "1234567890" * 5, "0 00 000 0000", "1,234,567.89"]
    lines += ["USER: <image>\nWhat is this? ASSISTANT:", "[INST] <image>\nq [/INST] a </s><s>[INST] q2 [/INST]", "Hello", " Hello", "Hello ",
              "ASSISTANT: red</s>USER: blue", "a</s>", "</s>a", "</s> a", "</s></s>", "<s>a</s>\n<s>b</s>"]
    return lines


def make_lines() -> list[str]:
    r = rng("tokenizer-lines")

    def pick(values):
        return values[int(r.integers(len(values)))]

    words = {name: text.split() for name, text in SCRIPTS.items()}
    letters = {name: sorted({c for c in text if not c.isspace()}) for name, text in SCRIPTS.items()}
    names = list(SCRIPTS)

    def word(script):
        kind = r.random()
        if kind < 0.7:
            return pick(words[script])
        made = "".join(pick(letters[script]) for _ in range(int(r.integers(1, 9))))
        return made.upper() if kind > 0.93 else made.capitalize() if kind > 0.88 else made

    lines = fixed_lines()
    while len(lines) < 5200:
        kind = r.random()
        count = int(r.integers(1, 9))
        if kind < 0.62:  # one script
            script = names[len(lines) % len(names)]
            line = " ".join(word(script) for _ in range(count)) + pick(["", "", ".", "?", "!", "。", ":"])
        elif kind < 0.72:  # several scripts, odd spaces
            line = "".join(pick(SPACES[:8] + [" "] * 8) + word(pick(names)) for _ in range(count))
        elif kind < 0.80:
            line = "".join(pick([pick(CODE), word("latin"), " ", "  ", pick(PUNCTUATION)]) for _ in range(count))
        elif kind < 0.87:
            line = "".join(pick([pick(SPECIAL), word(pick(names)), " ", pick(SPECIAL), "\n"]) for _ in range(count))
        elif kind < 0.92:
            line = "".join(pick([pick(EMOJI), word("latin") + " ", pick(CONTROL), " "]) for _ in range(count))
        elif kind < 0.96:  # digits and punctuation
            line = "".join(pick([str(int(r.integers(0, 10 ** int(r.integers(1, 8))))), pick(PUNCTUATION), " "]) for _ in range(2 * count))
        else:  # any assigned code point
            line = ""
            while len(line) < count:
                c = chr(int(r.integers(0x20, 0x2FFFF)))
                if unicodedata.category(c) not in ("Cs", "Cn"):
                    line += c
        lines.append(line)
    for length in (500, 1500, 3000):  # very long
        lines.append(" ".join(word(pick(["latin", "latin", "cyrillic", "chinese"])) for _ in range(length // 6)))
    return lines


def packed(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    flat = [i for row in ids for i in row]
    return np.array(flat, np.uint16), np.array([len(row) for row in ids], np.uint16)


def json_tokenizers(model: Path):
    """The two encoders that come from a `tokenizer.json`; the tiny model's files are kept."""
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        classic = json.dumps(tiny_tokenizer.tokenizer_json_4x(model), ensure_ascii=False)
        (home / "tokenizer.json").write_text(classic, encoding="utf-8")
        (home / "tokenizer_config.json").write_text(json.dumps(tiny_tokenizer.tokenizer_config()))
        verbatim = Tokenizer.from_file(str(home / "tokenizer.json"))
        metaspace = LlamaTokenizer.from_pretrained(home).backend_tokenizer
        if model == tiny_tokenizer.MODEL_PATH:
            (DIR / "tokenizer.json").write_text(classic, encoding="utf-8")
            (DIR / "tokenizer_metaspace.json").write_text(metaspace.to_str(), encoding="utf-8")
    return [lambda text, t=t: t.encode(text, add_special_tokens=False).ids for t in (verbatim, metaspace)]


def ids_of(model: Path, lines: list[str]) -> dict[str, np.ndarray]:
    sp = spm.SentencePieceProcessor(model_file=str(model))
    legacy, newer = SlowLlamaTokenizer(model, True), SlowLlamaTokenizer(model, False)
    json_file, metaspace_file = json_tokenizers(model)

    whole = [legacy.tokenize(line) for line in lines]
    for line, ids in zip(lines, whole):  # SentencePiece itself is the ground truth for text without special tokens
        if not any(s in line for s in ("<s>", "</s>", "<unk>")):
            assert ids == sp.encode(line), line
    out = {}
    out["slow_legacy.ids"], out["slow_legacy.lengths"] = packed(whole)
    for name, encode in (("slow", newer.tokenize), ("json", json_file), ("metaspace", metaspace_file)):
        rows = [encode(line) for line in lines]
        differ = [k for k, (a, b) in enumerate(zip(rows, whole)) if a != b]
        out[f"{name}.lines"] = np.array(differ, np.int32)
        out[f"{name}.ids"], out[f"{name}.lengths"] = packed([rows[k] for k in differ])
        print(f"{model.name}: {name} differs from slow_legacy in {len(differ)} of {len(lines)} lines")
    decoded = [sp.decode(ids) for ids in whole]
    differ = [k for k, (a, b) in enumerate(zip(decoded, lines)) if a != b and "\0" not in a]
    out["decoded.lines"] = np.array(differ, np.int32)
    out["decoded.text"] = np.frombuffer("".join(decoded[k] + "\0" for k in differ).encode("utf-8"), np.uint8)
    return out


def main() -> None:
    lines = make_lines()
    with open(DIR / "lines.jsonl", "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    jobs = [("tiny.safetensors", tiny_tokenizer.ensure_model(), lines[:TINY_LINES])]
    if len(sys.argv) > 1:
        jobs.append(("llama.safetensors", Path(sys.argv[1]), lines))
    for name, model, some in jobs:
        save_file(ids_of(model, some), DIR / name)
        (DIR / name).chmod(0o644)


if __name__ == "__main__":
    main()
