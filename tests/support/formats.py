"""Models of the kinds that the recipes train, small enough for a test: real tokenizer files in the
format of Llama-3-Instruct, of Zephyr (Mistral) and of Qwen3, and rows with the columns of the real
data."""

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
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# Pairs of the public sets' `train`; the Hub's viewer shows 59.9k and 62.1k rows.
PAIRS = {
    "princeton-nlp/llama3-ultrafeedback-armorm": 59_876,
    "trl-lib/ultrafeedback_binarized": 62_135,
}
# Sizes that are divisible by bitsandbytes' blocks of 64.
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
QWEN3_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
# Llama-3's template writes the BOS, as the real one does, and its tokenizer also adds one.
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
# Qwen3's has no BOS; without enable_thinking=False a prompt has no thought, the last answer has one.
QWEN3_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def llama3_prompt(user: str) -> str:
    """The prompt of one turn as the model sees it, BOS included."""
    return (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{user}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def zephyr_prompt(user: str) -> str:
    """The prompt of one turn as the model sees it, BOS and the empty system turn included."""
    return f"<s><|system|>\n</s>\n<|user|>\n{user}</s>\n<|assistant|>\n"


def qwen3_prompt(user: str) -> str:
    """The prompt of one turn as the model sees it when it doesn't think."""
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def byte_level(texts: list[str], specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_qwen3(folder: Path, texts: list[str]) -> Path:
    """Byte-level BPE without a BOS; a pad token of its own."""
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": QWEN3_TEMPLATE,
    }
    tokenizer = byte_level(texts, QWEN3_SPECIALS)
    size = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        head_dim=16,
        bos_token_id=None,
        eos_token_id=2,
        **SMALL,
    )
    return save(folder, tokenizer, config, Qwen3ForCausalLM(size))


def make_llama3(folder: Path, texts: list[str]) -> Path:
    """Byte-level BPE; BOS by the post-processor too."""
    tokenizer = byte_level(texts, LLAMA3_SPECIALS)
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
    """SentencePiece-like BPE with bytes to fall back on; only the tokenizer adds the BOS."""
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
