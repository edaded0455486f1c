"""Exact-match accuracy on an evaluation set of make_data.py, by Hugging Face transformers or of given answers.

    python evaluate.py --model ../../models/demo --data eval                 # also with images shuffled and blanked
    python evaluate.py --data eval --write-questions questions.jsonl         # LLaVA's question file, single-turn questions
    python evaluate.py --data eval --score answers.jsonl                     # any engine's answers to that file

Greedy, in f32 on the stored weights. In a conversation the model reads its own earlier answers.
Pictures go through the PIL image processor, whose bicubic is the one LLaVA was trained with.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from PIL import Image

PAD_COLOUR = (122, 116, 104)


def load_rows(folder):
    return json.loads((Path(folder) / "questions.json").read_text())


def turns_of(row):
    """[(type, question, answer)] without the image mark."""
    talk = row["conversations"]
    return [
        (kind, q["value"].removeprefix("<image>\n"), a["value"]) for kind, q, a in zip(row["types"], talk[0::2], talk[1::2])
    ]


def pad_to_square(image):
    side = max(image.size)
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class Engine:
    """transformers, loaded as any llava-hf checkpoint."""

    def __init__(self, folder, threads=2):
        import torch
        from transformers import AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = LlavaProcessor(
            image_processor=CLIPImageProcessorPil.from_pretrained(folder),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            patch_size=self.model.config.vision_config.patch_size,
            vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
            num_additional_image_tokens=1,
        )

    def answer(self, images, prompts):
        inputs = self.processor(images=images, text=prompts, return_tensors="pt", padding=True)
        with self.torch.no_grad():
            out = self.model.generate(**inputs, do_sample=False, max_new_tokens=64)
        new = out[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def prompt_of(questions, answers, style):
    """`hf`: no system prompt. `template`: what llava-hf's chat template renders. `original`: LLaVA's v1."""
    from tokenizer import SYSTEM

    text = SYSTEM + " " if style == "original" else ""
    end = " " if style == "template" else "</s>"
    for k, question in enumerate(questions):
        text += "USER: " + ("<image>\n" if k == 0 else "") + question + " ASSISTANT:"
        if k < len(answers):
            text += " " + answers[k] + end
    return text


def ask_all(engine, rows, images, style, batch=50):
    """answers[row][turn], each conversation with its own history."""
    answers = [[] for _ in rows]
    for turn in range(max(len(turns_of(r)) for r in rows)):
        todo = [i for i, r in enumerate(rows) if turn < len(turns_of(r))]
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            prompts = [prompt_of([q for _, q, _ in turns_of(rows[i])][: turn + 1], answers[i], style) for i in part]
            for i, text in zip(part, engine.answer([images[i] for i in part], prompts)):
                answers[i].append(text)
    return answers


def table(rows, answers):
    """{type: (right, asked)}; answers[row][turn], None where a question was not asked."""
    counts = defaultdict(lambda: [0, 0])
    for row, given in zip(rows, answers):
        for (kind, _, wanted), text in zip(turns_of(row), given):
            if text is None:
                continue
            for key in (kind, "all"):
                counts[key][0] += text == wanted
                counts[key][1] += 1
    return dict(counts)


def show(title, counts):
    print(title)
    for kind in sorted(counts, key=lambda k: (k == "all", k)):
        right, asked = counts[kind]
        print(f"  {kind:<12} {right:>5} / {asked:<5} {100 * right / asked:6.1f} %")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model")
    parser.add_argument("--style", choices=["hf", "template", "original"], default="hf")
    parser.add_argument("--quick", action="store_true", help="no shuffled and blanked runs")
    parser.add_argument("--wrong", action="store_true", help="print the wrong answers")
    parser.add_argument("--answers", help="write questions.json with hf_answers to this file")
    parser.add_argument("--write-questions")
    parser.add_argument("--score")
    args = parser.parse_args()
    rows = load_rows(args.data)

    if args.write_questions:
        with open(args.write_questions, "w") as out:
            for row in rows:
                for k, (kind, question, _) in enumerate(turns_of(row)):
                    if kind != "follow_up":  # needs the turn before
                        line = {"question_id": f"{row['id']}-{k}", "image": row["image"], "text": question, "category": kind}
                        out.write(json.dumps(line) + "\n")
        return
    if args.score:
        given = {a["question_id"]: a["text"].strip() for a in map(json.loads, open(args.score))}
        answers = [[given.get(f"{row['id']}-{k}") for k in range(len(turns_of(row)))] for row in rows]
        show("given answers", table(rows, answers))
        return

    engine = Engine(args.model)
    images = [Image.open(Path(args.data) / row["image"]).convert("RGB") for row in rows]
    if args.style == "original":
        images = [pad_to_square(image) for image in images]
    answers = ask_all(engine, rows, images, args.style)
    show(f"{args.style} profile", table(rows, answers))
    if args.wrong:
        for row, given in zip(rows, answers):
            for (kind, question, wanted), text in zip(turns_of(row), given):
                if text != wanted:
                    print(f"  {row['image']} {kind}: {question} | wanted {wanted} | got {text}")
    if args.answers:
        out = [
            {"image": r["image"], "turns": [{"question": q, "answer": a} for _, q, a in turns_of(r)], "hf_answers": given}
            for r, given in zip(rows, answers)
        ]
        Path(args.answers).write_text(json.dumps(out, indent=1) + "\n")
    if not args.quick:
        show("images shuffled (each row sees the next row's picture)", table(rows, ask_all(engine, rows, images[1:] + images[:1], args.style)))
        blank = [Image.new("RGB", image.size, (128, 128, 128)) for image in images]
        blind = ask_all(engine, rows, blank, args.style)
        show("images blanked (grey)", table(rows, blind))
        changed = sum(a != b for given, other in zip(answers, blind) for a, b in zip(given, other))
        print(f"  answers that change when the image is blanked: {100 * changed / sum(map(len, answers)):.1f} %")


if __name__ == "__main__":
    main()
