"""Small tokenizers of the two models' kinds."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def with_bos(tokenizer: Tokenizer, bos: str, **names: str) -> PreTrainedTokenizerFast:
    """The post-processor puts the BOS in front, as in both models' tokenizers."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, **names)


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3's kind: bytes, and the header tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    tokenizer.add_special_tokens([f"<|{name}|>" for name in names])
    return with_bos(tokenizer, "<|begin_of_text|>", eos_token="<|eot_id|>")


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Mistral 7B's kind: pieces in which a space is an underline, with an extra one before the text
    and after each special token; Zephyr's role names are plain text."""
    specials = ["<unk>", "<s>", "</s>"]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens(specials)
    return with_bos(tokenizer, "<s>", eos_token="</s>", unk_token="<unk>")
