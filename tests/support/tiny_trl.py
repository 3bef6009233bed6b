"""A tiny model, its tokenizer and pairs, and TRL's trainers on them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import forked
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer

from focalpo_plugins import FocalPOConfig, FocalPOTrainer

WORDS = [f"w{i}" for i in range(40)]
PAIRS = [  # completions of different lengths, so that rows are padded
    {
        "prompt": f"w{i} w{i + 1}",
        "chosen": " " + " ".join(WORDS[i + 2 : i + 4 + i % 3]),
        "rejected": " " + " ".join(WORDS[i + 9 : i + 10 + i % 4]),
    }
    for i in range(8)
]
GAMMA = 0.5  # far enough from DPO that a mix-up shows
# Three steps of four pairs on a CPU, each logged.
SHORT = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9}


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model(seed: int = 0, kind: str = "llama", tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 43,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,  # wide, so that margins are far from 0
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    if kind == "mixtral":
        config = MixtralConfig(
            **sizes, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True
        )
        return MixtralForCausalLM(config)
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=16))
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))


def on_disk(pairs: Dataset, folder: Path) -> Dataset:
    """The same from a file in its own folder: TRL up to 1.8 can't precompute for data in memory."""
    folder.mkdir(exist_ok=True)
    own = tempfile.mkdtemp(dir=folder)
    pairs.save_to_disk(own)
    return Dataset.load_from_disk(own)


def trainer(
    cls: type[DPOTrainer],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    policy: Any = None,
    reference: Any = "another",
    peft_config: Any = None,
    eval_dataset: Any = None,
    compute_metrics: Any = None,
    pairs: Any = None,
    data_collator: Any = None,
    **arguments: Any,
) -> DPOTrainer:
    """A trainer whose policy and reference differ, as they do after some steps."""
    config = FocalPOConfig if issubclass(cls, FocalPOTrainer) else DPOConfig
    arguments = {**SHORT, "beta": 0.3, **arguments}
    pairs = Dataset.from_list(PAIRS) if pairs is None else pairs
    if arguments.get("precompute_ref_log_probs"):
        pairs = on_disk(pairs, folder)
        eval_dataset = eval_dataset and on_disk(eval_dataset, folder)
    return cls(
        policy if policy is not None else model(0),
        model(1) if reference == "another" else reference,
        args=config(str(folder), **arguments),
        processing_class=tokenizer,
        train_dataset=pairs,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        compute_metrics=compute_metrics,
        data_collator=data_collator,
    )


def batch(host: DPOTrainer) -> dict[str, torch.Tensor]:
    return next(iter(host.get_train_dataloader()))


def loss_and_grads(host: DPOTrainer, inputs: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    host.model.zero_grad()
    loss = host.compute_loss(host.model, inputs)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in host.model.parameters() if p.grad is not None]


def logps(network: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """Log-probabilities of the completions ``(2B,)`` in float64, from the logits."""
    with torch.no_grad():
        logits = network(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    log_probs = logits[:, :-1].double().log_softmax(-1)
    tokens = log_probs.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    return (tokens * inputs["completion_mask"][:, 1:]).sum(-1)


def margins_of(host: DPOTrainer, inputs: dict, per_token: bool = False) -> torch.Tensor:
    """beta times the difference of log-ratios ``(B,)``, in float64."""
    ratios = logps(host.model, inputs) - logps(host.ref_model, inputs)
    if per_token:
        ratios = ratios / inputs["completion_mask"].sum(1)
    chosen, rejected = ratios.chunk(2)
    return host.beta * (chosen - rejected)


def without_triton() -> dict[str, Any]:
    """transformers also swaps in Liger's Triton layers, which no CPU runs; the loss is not one."""
    layers = ("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy")
    return {"use_liger_kernel": True, "liger_kernel_config": dict.fromkeys(layers, False)}


FUSED = {"focalpo_fused": {"focalpo_fused": True}, "use_liger_kernel": without_triton()}


# Without torch's tear-down, in which gloo's threads abort the process now and then.
LEAVE = """
import os
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""


def on_two_ranks(script: str, folder: Path, *words: str) -> str:
    """What the script prints on both, given the folder and ``words``, with the variables that
    torchrun sets."""
    code, stdout, stderr = run_forked(script + LEAVE, folder, *words, ranks=2)
    assert code == 0, stderr[-4000:]
    return stdout


def run_forked(
    script: str, folder: Path, *words: str, path: Path | None = None, ranks: int | None = None
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; ``path`` is before everything else that it imports from."""
    (folder / "script.py").write_text(script)
    command = str(folder / "script.py")
    return forked.run(command, [folder, *words], folder, ranks, path=[path] if path else [])
