"""Models of the two kinds that the recipes train, small enough for a test: real tokenizer files in
the format of Llama-3-Instruct and of Zephyr (Mistral), and rows with the columns of the real data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

# Sizes that bitsandbytes' blocks of 64 divide.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LLAMA3_SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
]  # fmt: skip
# Llama-3's writes the BOS, as the real one does, and its tokenizer adds one as well.
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Zephyr's leaves the BOS to the tokenizer, and ends each turn with EOS and a newline.
ZEPHYR_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def llama3_prompt(user: str) -> str:
    """The prompt of one turn as the model sees it, BOS included."""
    return (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{user}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def zephyr_prompt(user: str) -> str:
    """The prompt of one turn as the model sees it, BOS included."""
    return f"<s><|user|>\n{user}</s>\n<|assistant|>\n"


def make_llama3(folder: Path, texts: list[str]) -> Path:
    """Byte-level BPE; BOS by the post-processor too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=LLAMA3_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = LLAMA3_SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 0)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": "<|eot_id|>",
        "chat_template": LLAMA3_TEMPLATE,
    }
    size = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=4, **SMALL
    )
    return save(folder, tokenizer, config, LlamaForCausalLM(size))


def make_zephyr(folder: Path, texts: list[str]) -> Path:
    """SentencePiece-like BPE with bytes to fall back on; BOS by the tokenizer alone."""
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(space)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The bytes are ordinary tokens there, not special ones.
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = written["added_tokens"][: len(specials)]
    tokenizer = Tokenizer.from_str(json.dumps(written))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "legacy": True,
        "chat_template": ZEPHYR_TEMPLATE,
    }
    size = MistralConfig(
        vocab_size=tokenizer.get_vocab_size(), bos_token_id=1, eos_token_id=2, **SMALL
    )
    return save(folder, tokenizer, config, MistralForCausalLM(size))


def save(folder: Path, tokenizer: Tokenizer, config: dict, model) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model.save_pretrained(folder)
    return folder


def rows(pairs: list[dict], like: str) -> Iterator[dict]:
    """The pairs with the columns of the data set that the paper trains ``like`` on."""
    for number, pair in enumerate(pairs):
        chosen, rejected = pair["chosen"], pair["rejected"]
        if like == "llama3":
            answers = [chosen[-1]["content"], rejected[-1]["content"]]
            yield {
                "prompt_id": str(number),
                "prompt": chosen[0]["content"],
                "all_generated_responses": answers,
                "all_rm_scores": [0.2, 0.1],
                "chosen": chosen,
                "rejected": rejected,
            }
        else:
            scores = {"score_chosen": 8.0, "score_rejected": 5.0}
            yield {"chosen": chosen, "rejected": rejected, **scores}
