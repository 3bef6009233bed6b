"""The models of ``focalpo score``, whole or adapters over their bases, and their tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging
from transformers.utils import find_adapter_config_file

from ..errors import InvalidValue

_NAMED = 3  # weights in a message


@dataclass(frozen=True)
class Source:
    """A model to load.

    Attributes:
        name: folder or hub name of the model, or of an adapter if ``base`` is set.
        base: folder or hub name of the model that the adapter is loaded over.
        note: a remark for the user.
    """

    name: str
    base: str | None = None
    note: str = ""


def resolve(policy: str, reference: str) -> tuple[Source, Source]:
    """Tell adapters from whole models, and find the base model of each adapter.

    The base is the model that the adapter's config names, or the reference if that is missing.

    Raises:
        ValueError: an adapter has no base.
    """
    ref = _resolve(reference, "--ref", None)
    return _resolve(policy, "MODEL", None if ref.base else ref.name), ref


def _resolve(name: str, role: str, otherwise: str | None) -> Source:
    try:
        path = find_adapter_config_file(name)
    except (OSError, ValueError):  # not a hub's name: the error comes when it is loaded
        path = None
    if path is None:
        return Source(name)
    try:
        named = json.loads(Path(path).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidValue(
            f"{role} must be a model or an adapter, got {name!r}: its adapter_config.json can't be "
            "read or doesn't name a base_model_name_or_path."
        ) from None
    if named and _is_there(named):
        if find_adapter_config_file(named) is not None:
            raise InvalidValue(
                f"{role} must be an adapter of a whole model, got {name!r}: its base {named!r} is "
                "an adapter itself. Merge that one into its model first."
            )
        return Source(name, named, f"{role} is an adapter, loaded over {named}, which it names")
    if otherwise is None:
        raise InvalidValue(
            f"{role} must be a model, or an adapter whose base can be found, got {name!r}: it is "
            f"an adapter of {named!r}, which wasn't found. Change base_model_name_or_path in its "
            "adapter_config.json, or give a whole model as --ref."
        )
    why = f"the base that it names, {named}, wasn't found"
    return Source(name, otherwise, f"{role} is an adapter, loaded over --ref {otherwise}: {why}")


def _is_there(name: str) -> bool:
    if Path(name).is_dir():
        return True
    try:
        AutoConfig.from_pretrained(name)
    except Exception:  # not a hub's name, not on the hub, or no connection
        return False
    return True


def load_model(source: Source, role: str, dtype: str) -> Any:
    """The model; its weights and the weights in its files must be the same set."""
    verbosity = transformers_logging.get_verbosity()
    # Our error replaces transformers' table of missing weights.
    transformers_logging.set_verbosity_error()
    try:
        name = source.base or source.name
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, info = loaded
        what = type(model).__name__
        wrong = {
            "lack": list(info["missing_keys"]),
            "also have": list(info["unexpected_keys"]),
            "have in another shape": [key for key, *_ in info["mismatched_keys"]],
        }
        if source.base and not any(wrong.values()):
            name, what = source.name, "adapter"
            model, wrong["lack"], wrong["also have"] = _with_adapter(model, name)
    except Exception as error:  # broken files raise errors of many kinds
        lines = str(error).splitlines() if isinstance(error, OSError) else []
        why = lines[0] if lines else f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InvalidValue(
            f"{role} must be a model that can be loaded, got {source.name!r}: {why}"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if any(wrong.values()):
        found = [f"{verb} {_listed(keys)}" for verb, keys in wrong.items() if keys]
        raise InvalidValue(
            f"{role} must have exactly the weights of its {what}, got {name!r}: its files "
            f"{' and '.join(found)}. Missing weights would be random. Give a whole model, or the "
            "folder of an adapter."
        )
    return model


def _listed(keys: list[str]) -> str:
    few = sorted(keys)[:_NAMED]
    return f"{len(keys)} ({', '.join(few)}{', ...' * (len(keys) > len(few))})"


def _with_adapter(model: Any, name: str) -> tuple[Any, list[str], list[str]]:
    """The adapter over its base, the weights its files lack, and the unexpected ones in them."""
    try:
        from peft import PeftConfig, get_peft_model
        from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
    except ImportError:
        raise InvalidValue(
            "it is an adapter, which needs the package peft. Install it: pip install peft."
        ) from None
    config = PeftConfig.from_pretrained(name)
    if config.is_prompt_learning:
        raise InvalidValue(
            f"it is a {config.peft_type.value} adapter, which puts its own tokens before a text. "
            "Only adapters on the model's layers can be scored."
        )
    config.inference_mode = False  # the files have to hold the weights that the adapter trains
    model = get_peft_model(model, config)
    trained = {key for key, weight in model.named_parameters() if weight.requires_grad}
    found: Any = set_peft_model_state_dict(model, load_peft_weights(name, device="cpu"))
    return model, sorted(trained & set(found.missing_keys)), list(found.unexpected_keys)


def tokenizer_of(policy: Source, reference: Source) -> PreTrainedTokenizerBase:
    """The policy's tokenizer if it has one, else the reference's; their vocabularies must agree.

    One may have tokens more: LLaMA-Factory adds some to the tokenizers that it saves.
    """
    found = [each for each in (_own_tokenizer(policy), _own_tokenizer(reference)) if each]
    if not found:
        raise InvalidValue(f"neither {policy.name} nor {reference.name} has a tokenizer.")
    fewer, more = sorted((each.get_vocab() for each in (found[0], found[-1])), key=len)
    if not fewer.items() <= more.items():
        raise InvalidValue(
            f"MODEL and --ref must have the same vocabulary, got {policy.name!r} and "
            f"{reference.name!r}, which differ: a reward compares the two on the same tokens."
        )
    return found[0]


def _own_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    for name in (source.name, source.base):
        if name is not None:
            try:
                return AutoTokenizer.from_pretrained(name)
            except Exception:  # it has no tokenizer: the kind of error depends on its files
                continue
    return None
