"""Ids and label masks of training rows, by running the original's own `preprocess_*` functions.

    python make_masks.py --llava CHECKOUT --mpt TRAIN_PY [--llama TOKENIZER_MODEL]

Writes tests/fixtures/masks/: `rows.jsonl` (conversations as LLaVA's instruction data has them), `tiny.json` (what becomes of them with
the tiny tokenizer of the fixtures), `bytes.json` (with a byte-level one without BOS, in the manner of MPT's, in `bytes/`), `llama.json`
(with LLaMA's own), `sampler.json` and `schedules.json`. The checkout (haotian-liu/LLaVA, commit c121f04) is only run, nothing of it is
kept. TRAIN_PY is `git show 879ef31^:llava/train/train.py`, for `preprocess_mpt`: since that commit it counts neither BOS nor the
separator after a round, so that its sum never meets the length and every row is masked.

Of a row a fixture holds the number of ids, their FNV-1a hash, and the runs of supervised positions `[start, end)`; an empty list of runs
is what the original makes of a "tokenization mismatch". `null`: the original cannot process such a row (an assertion fails).

The original was made for transformers 4.37.2; its modules are imported under transformers 5.24.0 with these shims: `llava.model` and
`llava.train.llava_trainer` are empty (no model is needed), and the tokenizer is `llama_slow.py`, checked against 4.37.2's.
"""

import argparse
import ast
import copy
import io
import json
import math
import sys
import types
from contextlib import redirect_stdout
from pathlib import Path

import tokenizers
import torch

import tiny_tokenizer
from common import FIXTURES, rng
from llama_slow import SlowLlamaTokenizer

DIR = FIXTURES / "masks"
N_ROWS = 300
N_CAPTIONS = 200  # rows of one exchange with a picture, for `plain`, which takes no others
MAX_LENGTH = 2048

WORDS = {
    "latin": "the cat sits on a red mat and looks at two birds near the old house by the river while it rains".split(),
    "cyrillic": "кот сидит на красном ковре и смотрит на двух птиц у старого дома".split(),
    "han": "这 只 猫 坐 在 红色 的 垫子 上 看着 两 只 鸟 飞过 房子".split(),
    "arabic": "القط يجلس على السجادة الحمراء وينظر إلى الطيور".split(),
    "devanagari": "बिल्ली लाल चटाई पर बैठी है और पक्षियों को देखती है".split(),
    "emoji": "😀 🐈 🏠 👩‍👩‍👧 ❤️ 🇫🇷 ½ № ﬁ e\u0301".split(),
    "code": "if x == 0: return f(a, b)[1] # 3.14 {\"k\": -7} </div> <br> && || $$ ## ### ####".split(),
    "spaces": ["two  spaces", " leading", "trailing ", "\ttab", "line\nbreak", "\n\n", "x\u00a0y", "▁"],
}
# What is put into some text of a row to confuse whoever looks for separators.
TRAPS = {
    "assistant": [" ASSISTANT: ", "ASSISTANT:", "the ASSISTANT: said"],
    "user": [" USER: ", "USER:", "Human: ", "### Human: x"],
    "eos": ["</s>", " </s> ", "<s>"],
    "inst": ["[/INST] ", "[INST] x [/INST]", "<<SYS>>"],
    "chatml": ["<|im_end|>", "<|im_start|>assistant\n"],
    "mark": ["<image>"],
}


def load(checkout: Path, mpt: Path):
    """The original's training module, without its models, with `preprocess_mpt` from another version of it."""
    sys.path.insert(0, str(checkout))
    model = types.ModuleType("llava.model")
    model.LlavaLlamaForCausalLM = None
    trainer = types.ModuleType("llava.train.llava_trainer")
    trainer.LLaVATrainer = None
    sys.modules.update({"llava.model": model, "llava.train.llava_trainer": trainer})
    import llava.conversation
    import llava.train.train
    assert llava.train.train.IS_TOKENIZER_GREATER_THAN_0_14
    functions = functions_of(mpt, ["preprocess_mpt"])
    exec(compile(functions, str(mpt), "exec"), llava.train.train.__dict__)
    older = llava.train.train.preprocess_mpt
    llava.train.train.preprocess_mpt = lambda sources, tokenizer, has_image: older(sources, tokenizer)
    return llava.train.train, llava.conversation


def functions_of(file: Path, names: list[str]) -> ast.Module:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return ast.Module([n for n in body if isinstance(n, ast.FunctionDef) and n.name in names], [])


class Encoded:
    def __init__(self, ids):
        self.input_ids = ids


class Tokenizer:
    """What the original asks of a tokenizer, over the slow LLaMA tokenizer."""

    bos_token_id, pad_token_id = 1, 0

    def __init__(self, model: Path, legacy: bool):
        self.slow = SlowLlamaTokenizer(model, legacy)
        self.legacy = legacy
        self.model_max_length = MAX_LENGTH

    def __call__(self, text, return_tensors=None, padding=None, max_length=None, truncation=False):
        if isinstance(text, str) and return_tensors is None:
            return Encoded(self.encode(text))
        texts = [text] if isinstance(text, str) else text
        ids = [self.encode(t)[: max_length if truncation else None] for t in texts]
        assert len(ids) == 1  # so that nothing is padded
        return Encoded(torch.tensor(ids))

    def encode(self, text: str) -> list[int]:
        return self.slow(text)


class ByteTokenizer(Tokenizer):
    """A byte-level BPE without BOS, as MPT's is. `<|endoftext|>` is all of its special tokens in one, and fills up."""

    bos_token_id, pad_token_id, legacy = 0, 0, False

    def __init__(self, folder: Path):
        self.model_max_length = MAX_LENGTH
        path = folder / "tokenizer.json"
        if not path.exists():  # kept if it is there: another version of the library may train another one
            folder.mkdir(parents=True, exist_ok=True)
            self.train().save(str(path))
            config = {"add_bos_token": False, "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        assert len(self.encode("###")) == 2  # as LLaMA's, which the rules of v0 count on

    @staticmethod
    def train() -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=420, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        lines = [" ".join(words) for words in WORDS.values()] + ["## user assistant system Human Assistant"] * 20
        tokenizer.train_from_iterator([line.replace("###", "") for line in lines], trainer)
        return tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def text(r, n: int) -> str:
    script = list(WORDS)[int(r.integers(len(WORDS)))] if r.random() < 0.6 else "latin"
    words = [WORDS[script][int(r.integers(len(WORDS[script])))] for _ in range(n)]
    glue = "" if script == "han" else " "
    return glue.join(words) + ["", ".", "?", "!", "\n", " "][int(r.integers(6))]


def make_row(k: int) -> dict:
    r = rng(f"mask row {k}")
    kind = ["plain", "plain", "plain", "empty", "long", *TRAPS][k % (5 + len(TRAPS))]
    n_exchanges = int(r.integers(1, 7)) if k % 4 and k < N_ROWS else 1
    turns = []
    for i in range(n_exchanges):
        turns.append(["human", text(r, int(r.integers(1, 16)))])
        turns.append(["gpt", text(r, int(r.integers(1, 24)))])
    if kind == "empty":
        # An answer, now and then a question.
        turns[int(r.integers(len(turns))) | int(r.random() < 0.8)][1] = ""
    if kind == "long":
        turns[int(r.integers(len(turns)))][1] = text(r, int(r.integers(200, 1500)))
    if kind in TRAPS:
        trap = TRAPS[kind][int(r.integers(len(TRAPS[kind])))]
        place = int(r.integers(len(turns)))
        words = turns[place][1].split(" ")
        at = int(r.integers(len(words) + 1))
        turns[place][1] = " ".join(words[:at] + [trap] + words[at:])
    row = {"id": f"{kind}_{k}"}
    if k % 3 or k >= N_ROWS:
        row["image"] = f"{k:06}.jpg"
        # Marks before, behind or amidst the words of the first question, or of a later one.
        place = 0 if r.random() < 0.8 else 2 * int(r.integers(n_exchanges))
        words = turns[place][1]
        turns[place][1] = ["<image>\n" + words, words + "\n<image>", " <image> " + words, "<image>", words + "<image>" + words][k % 5]
    if r.random() < 0.08 and k < N_ROWS:
        turns.insert(0, ["gpt", text(r, 3)])
    row["conversations"] = [{"from": who, "value": value} for who, value in turns]
    return row


def fnv1a(ids: list[int]) -> str:
    """Over the ids as i64, little-endian."""
    h = 0xCBF29CE484222325
    for i in ids:
        for byte in i.to_bytes(8, "little", signed=True):
            h = (h ^ byte) * 0x100000001B3 % (1 << 64)
    return f"{h:016x}"


def runs(ids, labels) -> list:
    assert all(label in (-100, i) for i, label in zip(ids, labels))
    out = []
    for k, label in enumerate(labels):
        if label != -100 and out and out[-1][1] == k:
            out[-1][1] = k + 1
        elif label != -100:
            out.append([k, k + 1])
    return out


def masks(train, conversation, version: str, tokenizer: Tokenizer, row: dict):
    conversation.default_conversation = conversation.conv_templates[version]
    args = types.SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
    sources = [copy.deepcopy(row["conversations"])]
    try:
        with redirect_stdout(io.StringIO()):
            if "image" in row:
                sources = train.preprocess_multimodal(sources, args)
            made = train.preprocess(sources, tokenizer, has_image="image" in row)
    except (AssertionError, IndexError):
        return None
    ids, labels = made["input_ids"][0].tolist(), made["labels"][0].tolist()
    return [len(ids), fnv1a(ids), runs(ids, labels)]


VERSIONS = ["v1", "v1_mmtag", "plain", "llava_llama_2", "mistral_instruct", "llava_v0", "v0_mmtag"]


def make(train, conversation, named: dict, rows: list[dict], versions: list[str]) -> dict:
    """For each of the named tokenizers and each version a list over the rows; captions for `plain` alone."""
    out = {"max_length": MAX_LENGTH}
    for version in versions:
        for name, tokenizer in named.items():
            some = rows if version == "plain" else rows[:N_ROWS]
            made = [masks(train, conversation, version, tokenizer, row) for row in some]
            out[f"{version}.{name}"] = made
            n = sum(m is not None for m in made)
            print(f"{version}.{name}: {n} rows, {sum(bool(m and m[2]) for m in made)} with labels")
    return out


def both(model: Path) -> dict:
    return {"legacy": Tokenizer(model, True), "new": Tokenizer(model, False)}


def write(name: str, value) -> None:
    """One line for each element of each list, so that a change can be read."""
    DIR.mkdir(parents=True, exist_ok=True)
    compact = lambda v: json.dumps(v, separators=(",", ":"))
    parts = []
    for key, v in value.items():
        body = "[\n" + ",\n".join(map(compact, v)) + "\n]" if isinstance(v, list) else compact(v)
        parts.append(f"{json.dumps(key)}: {body}")
    (DIR / name).write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def make_sampler(checkout: Path) -> dict:
    """The original's grouping, with the permutations that it drew."""
    file = checkout / "llava" / "train" / "llava_trainer.py"
    wanted = ["split_to_even_chunks", "get_modality_length_grouped_indices", "get_length_grouped_indices"]
    drawn = []

    def randperm(n, generator=None):
        permutation = torch.randperm(n)
        drawn.append(permutation.tolist())
        return permutation

    space = {"torch": types.SimpleNamespace(randperm=randperm)}
    exec(compile(functions_of(file, wanted), str(file), "exec"), space)
    cases = []
    torch.manual_seed(5)
    for k, (n, batch, world, share) in enumerate([
        (1, 1, 1, 1.0), (2, 1, 1, 0.5), (3, 2, 1, 1.0), (40, 4, 2, 0.6), (111, 4, 3, 0.5), (97, 3, 4, 0.0), (64, 8, 2, 0.9), (50, 16, 8, 0.5),
    ]):
        r = rng(f"sampler {k}")
        lengths = [int(r.integers(1, 500)) * (1 if i < share * n else -1) for i in r.permutation(n).tolist()]
        drawn.clear()
        # Of text alone the original sorts negative lengths, and shares them out unevenly; what it means is what it does with pictures.
        given = [abs(n) for n in lengths] if all(n < 0 for n in lengths) else lengths
        order = space["get_modality_length_grouped_indices"](given, batch, world)
        cases.append({
            "lengths": lengths, "batch_size": batch, "world_size": world, "permutations": copy.deepcopy(drawn), "order": order,
        })
    return {"cases": cases}


def make_schedules() -> dict:
    """Factors of the learning rate by transformers' schedulers."""
    import transformers

    made = []
    for kind, name in (("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")):
        for steps, ratio, warmup in ((1, 0.03, 0), (10, 0.0, 0), (100, 0.07, 0), (577, 0.03, 0), (989, 0.03, 111), (3, 1.0, 0), (5, 0.0, 9)):
            n_warmup = warmup if warmup > 0 else math.ceil(steps * ratio)  # TrainingArguments.get_warmup_steps of 4.37.2
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
            scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=n_warmup, num_training_steps=steps)
            factors = []
            for _ in range(steps):
                factors.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
            at = sorted({0, 1, 2, n_warmup - 1, n_warmup, n_warmup + 1, steps // 2, steps - 2, steps - 1})
            at = [s for s in at if 0 <= s < steps]
            made.append({
                "kind": kind, "steps": steps, "warmup_ratio": ratio, "warmup_steps": warmup, "n_warmup": n_warmup,
                "at": at, "factors": [factors[s] for s in at],
            })
    print("schedules by transformers", transformers.__version__)
    return {"cases": made}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--llava", type=Path, required=True)
    parser.add_argument("--mpt", type=Path, required=True)
    parser.add_argument("--llama", type=Path)
    args = parser.parse_args()
    train, conversation = load(args.llava, args.mpt)
    rows = [make_row(k) for k in range(N_ROWS + N_CAPTIONS)]
    DIR.mkdir(parents=True, exist_ok=True)
    with open(DIR / "rows.jsonl", "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write("tiny.json", make(train, conversation, both(tiny_tokenizer.ensure_model()), rows, VERSIONS))
    named = {"bytes": ByteTokenizer(DIR / "bytes")}
    write("bytes.json", make(train, conversation, named, rows, ["mpt", "chatml_direct", "plain", "llava_v0", "v0_mmtag"]))
    if args.llama:
        write("llama.json", make(train, conversation, both(args.llama), rows, VERSIONS))
    write("sampler.json", make_sampler(args.llava))
    write("schedules.json", make_schedules())


if __name__ == "__main__":
    main()
