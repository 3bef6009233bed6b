"""A row of each format that docs/data.md lists, and the settings that it needs."""

USER, GOOD, BAD = (
    {"role": "user", "content": "Say one word."},
    {"role": "assistant", "content": "good"},
    {"role": "assistant", "content": "bad"},
)
TEMPLATE, ARGILLA = "chat_template.default", "chat_template.argilla_chat"
OF_PROMPT = {"type": TEMPLATE, "field_messages": "prompt"}
APPLY, KEY = "--data.apply_chat_template", "--data.prompt_key"
# Format: row, what Axolotl's dataset needs, and OpenRLHF's flags (None: it reads no such row).
FORMATS = {
    "whole conversations": (
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"type": ARGILLA},
        [APPLY],
    ),
    "prompt and answers as message lists": (
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        OF_PROMPT,
        [APPLY, KEY, "prompt"],
    ),
    "a prompt beside whole conversations": (
        {"prompt": "Say one word.", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"type": ARGILLA},
        [APPLY],
    ),
    "messages, and one message an answer": (
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"type": TEMPLATE},
        None,
    ),
    "strings": (
        {"prompt": "Say one word.", "chosen": "good", "rejected": "bad"},
        OF_PROMPT,
        [KEY, "prompt"],
    ),
    "two texts without a prompt": (
        {"chosen": "Say one word. good", "rejected": "Say one word. bad"},
        {"type": "passthrough"},
        [],
    ),
}
