"""Prompts of every conversation template, by running the original's own `Conversation.get_prompt()`.

    python make_templates.py PATH_TO_LLAVA_CHECKOUT

Writes tests/fixtures/templates.json. The checkout (haotian-liu/LLaVA, commit c121f04) is only run, nothing of it is kept.
"""

import importlib.util
import sys
from pathlib import Path

from common import FIXTURES, write_json

Q, Q2 = "What is shown in the image?", "How many?"
A, A2 = "A red cat.", "Two."
# Each turn list ends with None where the model is to speak. A tuple marks the original's (text, image, mode) message form,
# for which get_prompt() itself places the image mark; there the text is what the user typed.
CASES = {
    "one_turn_image": {"turns": ["<image>\n" + Q, None]},
    "one_turn_image_message": {"turns": [(Q,), None]},
    "one_turn_image_message_with_mark": {"turns": [("look <image> " + Q,), None]},
    "one_turn_text": {"turns": [Q, None]},
    "two_turns": {"turns": ["<image>\n" + Q, A, Q2, None]},
    "three_turns_finished": {"turns": [Q, A, Q2, A2, "Why?", "Because."]},
    "custom_system": {"turns": ["<image>\n" + Q, None], "system": "Be brief. "},
    "empty_system": {"turns": [Q, None], "system": ""},
    "empty_answer": {"turns": [Q, ""]},
}


def load(checkout: Path):
    spec = importlib.util.spec_from_file_location("conversation", checkout / "llava" / "conversation.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["conversation"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def main() -> None:
    module = load(Path(sys.argv[1]))
    rows, aliases, seen = [], {}, {}
    for name, template in module.conv_templates.items():
        if id(template) in seen:
            aliases[name] = seen[id(template)]
            continue
        seen[id(template)] = name
        for case, content in CASES.items():
            conversation = template.copy()
            if "system" in content:
                conversation.system = content["system"]
            for k, turn in enumerate(content["turns"]):
                message = (turn[0], None, "Default") if isinstance(turn, tuple) else turn
                conversation.append_message(conversation.roles[k % 2], message)
            try:
                prompt = conversation.get_prompt()
            except TypeError:
                prompt = None  # `plain` has no second separator: an answered turn is an error in the original
            rows.append({
                "template": name,
                "case": case,
                "system": content.get("system"),
                "image_message": isinstance(content["turns"][0], tuple),
                "turns": [t[0] if isinstance(t, tuple) else t for t in content["turns"]],
                "prompt": prompt,
            })
    settings = {
        name: {
            "system": t.system, "roles": list(t.roles), "style": t.sep_style.name, "sep": t.sep, "sep2": t.sep2,
            "version": t.version, "offset": t.offset, "seed_messages": [list(m) for m in t.messages],
        }
        for name, t in module.conv_templates.items()
        if name not in aliases
    }
    same = [name for name, t in module.conv_templates.items() if t is module.default_conversation]
    write_json(FIXTURES / "templates.json", {
        "oracle": "haotian-liu/LLaVA c121f04, llava/conversation.py, Conversation.get_prompt()",
        "default_conversation": same[0],
        "aliases": aliases,
        "templates": settings,
        "cases": rows,
    })


if __name__ == "__main__":
    main()
