"""Two chat templates for ms-swift whose token ids are those of the other recipes.

A YAML in this folder has both keys:

    external_plugins: examples/swift/templates.py
    template: zephyr_empty_system

``zephyr_empty_system`` is for HuggingFaceH4/mistral-7b-sft-beta.  ms-swift's own ``zephyr`` lacks
the BOS and the empty system turn.  It also tokenizes each answer by itself, and the tokenizer puts
a space before the answer then.  ``llama3_trimmed`` is for Meta-Llama-3-8B-Instruct.  ms-swift's own
``llama3`` keeps the white space around a message, which the model's template cuts off.
"""

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate, groupby

from swift.template import TEMPLATE_MAPPING, Template, TemplateMeta, register_template


class WholeText(Template):
    """Tokenizes texts that follow each other as one."""

    def _encode_context_list(self, context_list, loss_scale_list=None):
        return super()._encode_context_list(self._tokenized(context_list), loss_scale_list)

    def _tokenized(self, parts):
        """The token ids of each part; a part that isn't text has token ids already."""
        found = [[] if isinstance(part, str) else part for part in parts]
        for is_text, group in groupby(enumerate(parts), lambda part: isinstance(part[1], str)):
            if not is_text:
                continue
            places, texts = zip(*group, strict=True)
            ends = [*accumulate(map(len, texts))]
            tokens = self.tokenizer(
                "".join(texts), add_special_tokens=False, return_offsets_mapping=True
            )
            for token, (start, _) in zip(tokens.input_ids, tokens.offset_mapping, strict=True):
                found[places[bisect_right(ends, start)]].append(token)
        return found


class Trimmed(Template):
    """Cuts off the white space around messages."""

    def _swift_encode(self, inputs):
        for message in inputs.messages:
            if isinstance(message["content"], str):
                message["content"] = message["content"].strip()
        return super()._swift_encode(inputs)


register_template(
    TemplateMeta(
        "zephyr_empty_system",
        prefix=[["bos_token_id"], "<|system|>\n</s>\n"],
        system_prefix=[["bos_token_id"], "<|system|>\n{{SYSTEM}}</s>\n"],
        prompt=["<|user|>\n{{QUERY}}</s>\n<|assistant|>\n"],
        chat_sep=["</s>\n"],
        suffix=["</s>"],
        template_cls=WholeText,
    )
)
LLAMA_3 = "llama3_trimmed"
register_template(replace(TEMPLATE_MAPPING["llama3"], template_type=LLAMA_3, template_cls=Trimmed))
