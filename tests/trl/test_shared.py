"""Shared prompts in real models and in TRL's trainer: the plain path's numbers, or a refusal."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_trl
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_trl import GAMMA, PAIRS, SGD
from transformers import TrainerCallback
from transformers.masking_utils import create_causal_mask, sliding_window_overlay
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from focalpo_plugins import FocalPOTrainer
from focalpo_plugins.sharing import SharedPrompts

KEY = "focalpo_shared_prompts"
SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama, dynamic RoPE": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            "max_position_embeddings": 64,
        },
    ),
    "Mistral, window 16": ("Mistral", {"sliding_window": 16}),
    "Qwen 2": ("Qwen2", {}),
    "Qwen 2, window 16 in half of the layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    "Qwen 3": ("Qwen3", {"head_dim": 16}),
    "Gemma": ("Gemma", {"head_dim": 16}),
    "Gemma 3, window 16": ("Gemma3Text", {"head_dim": 16, "sliding_window": 16}),
    "Phi 3": ("Phi3", {}),
    "OLMo 2": ("Olmo2", {}),
    "Cohere 2, window 16": ("Cohere2", {"sliding_window": 16}),
    "Granite": ("Granite", {}),
    "SmolLM 3": ("SmolLM3", {}),
    "GPT-NeoX": ("GPTNeoX", {}),
    "GPT-2": ("GPT2", {"n_positions": 512, "n_embd": 64, "n_layer": 4, "n_head": 4}),
    "Mixtral": ("Mixtral", {"num_local_experts": 4}),
    "Qwen 3 MoE": ("Qwen3Moe", {**EXPERTS, "head_dim": 16}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "soft caps": ("Gemma2", {"head_dim": 16, "sliding_window": 16}, "the argument softcap of "),
    "sinks": (
        "GptOss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
        "the argument s_aux of ",
    ),
    "alibi": ("Bloom", {"n_layer": 4, "n_head": 4}, "whose attention can be replaced"),
    "its own attention": ("StableLm", {}, "whose attention can be replaced"),
    "a state space": ("Mamba", {}, "got linear_attention"),
    "convolutions": ("Lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "got conv"),
    "a window in the mask alone": (
        "Qwen2Moe",
        {**EXPERTS, "shared_expert_intermediate_size": 64, "use_sliding_window": True,
         "sliding_window": 16, "max_window_layers": 4},
        "attention that gets its window as an argument, got none in Qwen2MoeAttention",
    ),
    "a window in the mask alone, by another config": (
        "Phimoe",
        {"num_local_experts": 2, "sliding_window": 16},
        "attention that gets its window as an argument, got none in PhimoeAttention",
    ),
    "two calls a layer": (
        "DiffLlama",
        {},
        "needs 4 calls of transformers' attention, one for each layer of DiffLlamaModel, got 8",
    ),
    "an error": ("Nemotron", {}, "NemotronModel, which fails on a row of shared prompts \\(Runtime"),
}  # fmt: skip


def of_family(name: str, sizes: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | sizes))
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() > 1:
                weight.mul_(12)  # so that it matters which tokens a token sees
    return network


def inputs() -> dict[str, torch.Tensor]:
    """Two pairs whose common starts are 25 and 40 tokens long, longer than the windows."""
    ids = torch.randint(6, 512, (4, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[2, :25], ids[3, :40] = ids[0, :25], ids[1, :40]
    mask[0, 50:] = mask[1, 57:] = mask[3, 45:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def short_inputs() -> dict[str, torch.Tensor]:
    """The same two pairs, cut to their first 12 tokens: a row of 12 + 12, because each pair starts
    alike."""
    return {name: tensor[:, :12] for name, tensor in inputs().items()}


def logps(network: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The log-probabilities of whole sequences, in float64 from the logits on."""
    logits = network(**given, use_cache=False).logits.double()
    found = logits.log_softmax(-1)[:, :-1].gather(-1, given["input_ids"][:, 1:, None])
    return (found.squeeze(-1) * given["attention_mask"][:, 1:]).sum(1)


def sharing(network: torch.nn.Module) -> SharedPrompts:
    found = SharedPrompts(KEY, lambda check: check())
    found.attach(network)
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_log_probs_and_gradients(family: str, attention: str):
    network = of_family(*FAMILIES[family])
    network.set_attn_implementation(attention)
    given = inputs()
    found = []
    for ours in (False, True):
        network.zero_grad()
        if ours:
            shared = sharing(network)
        with shared.of(2) if ours else nullcontext():
            values = logps(network, given)
        (values[:2] - values[2:]).sum().backward()
        gradients = [w.grad.clone() for w in network.parameters() if w.grad is not None]
        found.append((values.detach(), gradients))
    (plain, of_plain), (ours, of_ours) = found
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-3)
    whole = torch.cat([g.flatten() for g in of_plain])
    off = torch.cat([g.flatten() for g in of_ours]) - whole
    assert off.norm() < 1e-4 * whole.norm()
    # 50 + 60 tokens of the first pair less its start of 25, 57 + 45 of the second less 40.
    assert (shared.tokens, shared.tokens_before) == (50 + 60 - 25 + 57 + 45 - 40, 4 * 60)
    # Outside, the model is unchanged.
    with torch.no_grad():
        assert torch.equal(logps(network, given), plain)


def test_inputs_are_as_the_docstring_says():
    given = inputs()
    lengths = given["attention_mask"].sum(1).tolist()
    assert lengths == [50, 57, 60, 45]


@pytest.mark.parametrize("start, tokens", [(0, 240), (5, 240), (7, 226)])
def test_a_batch_that_saves_little_goes_as_it_is(start: int, tokens: int):
    """Four sequences of 60 tokens without padding: a start of 7 saves 14 of 240, 5.8 %, and one of
    5 saves 4.2 %, less than the cost of forming a row."""
    network = of_family("Llama", {})
    ids = torch.randint(6, 512, (4, 60), generator=torch.Generator().manual_seed(0))
    ids[2:, :start] = ids[:2, :start]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        plain = logps(network, given)
        shared = sharing(network)
        with shared.of(2):
            ours = logps(network, given)
    assert (shared.tokens, shared.tokens_before) == (tokens, 240)
    assert torch.equal(ours, plain) or tokens < 240
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_is_refused(family: str):
    name, sizes, message = REFUSED[family]
    with pytest.raises(ValueError, match=message) as error:
        network = of_family(name, sizes)
        shared = sharing(network)
        with shared.of(2):
            network(**inputs(), use_cache=False)
    assert str(error.value).startswith(KEY) and str(error.value).endswith(f"Set {KEY} to false.")


def test_flex_attention_is_refused():
    network = of_family("Llama", {})
    network.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="needs attn_implementation to be one of eager, sdpa, "
                       "flash_attention_2, flash_attention_3, got 'flex_attention'"):  # fmt: skip
        sharing(network)


def test_a_packed_batch():
    """As OpenRLHF packs it: one row, no mask, positions that restart, the chosen ones first."""
    network = of_family("Llama", {})
    given = inputs()
    real, lengths = given["attention_mask"].bool(), given["attention_mask"].sum(1).tolist()
    packed = {
        "input_ids": given["input_ids"][real][None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "attention_mask": None,
    }
    with torch.no_grad():
        padded = network(**given, use_cache=False).logits[real]
        shared = sharing(network)
        with shared.of(2, lengths):
            ours = network(**packed, use_cache=False).logits[0]
    torch.testing.assert_close(ours, padded, rtol=0, atol=1e-4)
    assert (shared.tokens, shared.tokens_before) == (50 + 60 - 25 + 57 + 45 - 40, sum(lengths))


def test_another_attention_in_some_layer_is_stopped():
    """Like a package that replaces a layer's forward; the other layers are counted."""
    network = of_family("Llama", {})
    given, shared = inputs(), sharing(network)
    layer = network.model.layers[1].self_attn
    layer.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    shared._compared[network.model] = 60  # tokens  # the count of calls has to see it by itself
    with (
        pytest.raises(ValueError, match="needs 4 calls .* one for each layer of LlamaModel, got 3"),
        shared.of(2),
    ):
        network(**given)


def test_an_attention_that_computes_something_else_is_stopped(monkeypatch):
    network = of_family("Llama", {})
    given, shared = inputs(), sharing(network)
    followed = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def wrong(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        """As if the rejected answer did not see the prompt."""
        if "focalpo_layout" in kwargs:
            value = value * (kwargs["focalpo_layout"].positions > 5)[:, None, :, None]
        return followed(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", wrong)
    with pytest.raises(ValueError, match="hidden states differ by .* of their"), shared.of(2):
        network(**given)


def rotated(**more: Any) -> torch.nn.Module:
    """A Llama whose frequencies depend on the last position, if that exceeds 30."""
    sizes = {"rope_parameters": {"rope_theta": 100.0, **more}, "max_position_embeddings": 30}
    return of_family("Llama", sizes)


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "long": {
        "rope_type": "longrope", "original_max_position_embeddings": 30, "factor": 4.0,
        "short_factor": [1.0] * 8, "long_factor": [3.0] * 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_the_order_of_pairs_does_not_matter(rope: str):
    """The first pair is shorter than 30 tokens, the batch is longer."""
    given = inputs()
    given["attention_mask"][0, 28:] = given["attention_mask"][2, 29:] = 0
    given = {name: (tensor * given["attention_mask"])[:, :57] for name, tensor in given.items()}
    with torch.no_grad():
        plain = logps(rotated(**ROPES[rope]), given)
        network = rotated(**ROPES[rope])
        shared = sharing(network)
        with shared.of(2):
            ours = logps(network, given)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-3)
    assert (shared.tokens, shared.tokens_before) == (28 + 29 - 25 + 57 + 45 - 40, 4 * 57)


@pytest.mark.parametrize("rope", ROPES)
def test_padding_beyond_the_longest_sequence(rope: str):
    """Padded to 64 places, whose last position the model takes: the batch stays as it is. Without
    such a RoPE the padding doesn't matter."""
    given = {name: torch.nn.functional.pad(tensor, (0, 4)) for name, tensor in inputs().items()}
    for network, tokens in ((rotated(**ROPES[rope]), 256), (rotated(rope_type="default"), 147)):
        with torch.no_grad():
            plain = logps(copy.deepcopy(network), given)
            shared = sharing(network)
            with shared.of(2):
                ours = logps(network, given)
        assert (shared.tokens, shared.tokens_before) == (tokens, 256)
        assert torch.equal(ours, plain) or tokens < 256
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-3)


def windowed(network: torch.nn.Module, monkeypatch) -> None:
    """Give a Llama a window of 16 only by its mask, under another name in the config."""

    def mask(*args: Any, **kwargs: Any) -> Any:
        return create_causal_mask(*args, **kwargs, and_mask_function=sliding_window_overlay(16))

    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", mask)
    network.config.reach = 16


def test_a_window_that_only_a_later_batch_shows(monkeypatch):
    """Sequences of 12 tokens are within the window, those of 60 are not."""
    network = of_family("Llama", {})
    windowed(network, monkeypatch)
    with torch.no_grad():
        shared = sharing(network)
        plain = logps(network, short_inputs())
        with shared.of(2):
            ours = logps(network, short_inputs())
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-3)
        assert shared.tokens < shared.tokens_before
        differ = pytest.raises(ValueError, match="hidden states differ by .* of their")
        with differ, shared.of(2):
            network(**inputs())


def test_how_often_a_pair_is_compared():
    """Numbers of the config that are lengths between two batches' longest sequences: 16, 32 ... of
    its sizes.  A batch that passes none is not compared, and no batch is compared twice."""
    network = of_family("Llama", {})
    compared: list[None] = []

    def together(check: Callable[[], None]) -> None:
        compared.append(None)
        check()

    shared = SharedPrompts(KEY, together)
    shared.attach(network)
    counts = []
    with torch.no_grad():
        for given in (short_inputs(), short_inputs(), inputs(), inputs(), short_inputs()):
            with shared.of(2):
                network(**given)
            counts.append(len(compared))
    assert counts == [1, 1, 2, 2, 2]


RANKS = """
import sys
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from focalpo_plugins.sharing import SharedPrompts
from focalpo_plugins.guards.ranks import together

class Two:
    def gather(self, thing):
        found = [None] * 2
        dist.all_gather_object(found, thing)
        return found

dist.init_process_group("gloo")
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
network = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
compared = []
shared = SharedPrompts("the key", lambda check: (compared.append(1), together(Two(), check)))
shared.attach(network)
for lengths in ((12, 12), (12, 18), (18, 12), (12, 40)):
    length = lengths[dist.get_rank()]
    ids = torch.arange(3, 3 + length)[None].repeat(2, 1)
    ids[1, -4:] = 2
    with shared.of(1), torch.no_grad():
        network(input_ids=ids, attention_mask=torch.ones_like(ids))
    print(f"rank {dist.get_rank()}: {len(compared)}", flush=True)
"""


@pytest.mark.xdist_group("forked")
def test_ranks_compare_in_the_same_step(tmp_path: Path):
    """The first step; the second, in which rank 1 exceeds the 16 of the sizes; not the third, which
    gives rank 0 the lengths that rank 1 has had; the fourth, in which rank 1 exceeds 20."""
    lines = tiny_trl.on_two_ranks(RANKS, tmp_path).splitlines()
    for rank in range(2):
        own = [line for line in lines if line.startswith(f"rank {rank}")]
        assert own == [f"rank {rank}: {count}" for count in (1, 2, 2, 3)]


@pytest.mark.parametrize("where", ["GPU", "CPU"])
def test_out_of_memory_is_no_fault_of_the_models(where: str, monkeypatch):
    network = of_family("Llama", {})
    given, shared = inputs(), sharing(network)
    followed = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def greedy(*args: Any, **kwargs: Any) -> Any:
        if "focalpo_layout" in kwargs and where == "GPU":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if "focalpo_layout" in kwargs:
            torch.empty(2**60, dtype=torch.uint8)
        return followed(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", greedy)
    with pytest.raises(RuntimeError, match="allocate") as error, shared.of(2):
        network(**given)
    assert KEY not in str(error.value)


def test_an_error_of_the_model_by_itself_is_its_own():
    """A token that the model doesn't have, which has nothing to do with shared prompts."""
    network = of_family("Llama", {})
    given, shared = inputs(), sharing(network)
    given["input_ids"][0, 3] = 512
    with pytest.raises(IndexError, match="index out of range"), shared.of(2):
        network(**given)


@pytest.mark.parametrize("training", [True, False])
def test_noise_on_the_embeddings(training: bool):
    """Noise as NEFTune adds it, but from a user's hook; a hook that adds nothing is fine."""
    network = of_family("Llama", {})
    given, shared = inputs(), sharing(network)

    def noisy(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * torch.rand_like(output) if module.training and training else output

    network.get_input_embeddings().register_forward_hook(noisy)
    refused = pytest.raises(ValueError, match="noise on the embeddings, such as NEFTune's, got a")
    with torch.no_grad(), refused if training else nullcontext(), shared.of(2):
        network(**given)
    assert not network.get_input_embeddings().training


def test_a_step_without_the_backbone_is_stopped():
    shared = sharing(of_family("Llama", {}))
    with pytest.raises(RuntimeError, match="did not run the model's backbone"), shared.of(2):
        pass


def test_a_batch_that_one_rank_cannot_lay_out_ends_all_ranks():
    """Padded in front. The check that all ranks run together finds it, also if sequences of this
    length were compared before."""
    network = of_family("Llama", {})
    given, checks = inputs(), []

    def together(check: Callable[[], None]) -> None:
        checks.append(check)
        check()

    shared = SharedPrompts(KEY, together)
    shared.attach(network)
    with torch.no_grad(), shared.of(2):
        network(**given)
    assert len(checks) == 1
    turned = {name: values.flip(1) for name, values in given.items()}
    refused = pytest.raises(
        ValueError, match="with the padding after each sequence, got another mask"
    )
    with refused, torch.no_grad(), shared.of(2):
        network(**turned)
    assert len(checks) == 2


def test_an_adapter_s_model_is_attached_below_the_adapter():
    network = of_family("Llama", {})
    adapted = get_peft_model(network, LoraConfig(target_modules=["q_proj"]))
    shared = sharing(adapted)
    with torch.no_grad(), shared.of(2):
        adapted(**inputs())
    assert 0 < shared.tokens < shared.tokens_before


def test_a_step_within_a_step():
    """As if a host computed the reference's log-probs in the middle of one."""
    network = of_family("Llama", {})
    given, shared = inputs(), sharing(network)
    with torch.no_grad():
        plain = logps(network, given)
        with shared.of(2):
            with shared.of(2):
                inner = logps(network, given)
            outer = logps(network, given)
            assert shared.tokens < shared.tokens_before
    torch.testing.assert_close(inner, plain, rtol=0, atol=1e-3)
    assert torch.equal(inner, outer)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"output_hidden_states": True}, "the model's input output_hidden_states, got True"),
        ({"token_type_ids": torch.zeros(4, 60)}, "the model's input token_type_ids, got (4, 60)"),
        (
            {"attention_mask": None},
            "needs an attention mask of the batch's shape (4, 60), got None",
        ),
    ],
    ids=["states", "types", "no mask"],
)
def test_inputs_that_a_row_has_no_place_for(given: dict[str, Any], message: str):
    network = of_family("Llama", {})
    shared = sharing(network)
    with pytest.raises(ValueError) as error, shared.of(2):
        network.model(**{**inputs(), **given})
    assert message in str(error.value)


def test_generation_copies_and_files_are_as_without(tmp_path: Path):
    before = of_family("Llama", {})
    ours = copy.deepcopy(before)
    for network in (before, ours):
        network.set_attn_implementation("eager")
    shared = sharing(ours)
    with shared.of(2):
        ours(**inputs())
    ids = inputs()["input_ids"][:1, :7]
    asked = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(ours.generate(ids, **asked), before.generate(ids, **asked))
    for name, network in (("before", before), ("ours", ours), ("copy", copy.deepcopy(ours))):
        network.save_pretrained(tmp_path / name)
    for file in sorted((tmp_path / "before").iterdir()):
        for name in ("ours", "copy"):
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_trainer_is_freed_and_its_hooks_go(tokenizer, tmp_path: Path):
    policy = tiny_trl.model(0)
    host = tiny_trl.trainer(
        FocalPOTrainer, tokenizer, tmp_path, policy=policy, focalpo_shared_prompts=True, max_steps=1
    )
    host.train()
    gone = {
        "trainer": weakref.ref(host),
        "optimizer": weakref.ref(host.optimizer.optimizer),
        "reference": weakref.ref(host.ref_model),
    }
    del host
    gc.collect()
    assert [name for name, of in gone.items() if of() is not None] == []
    assert not policy.model._forward_hooks and not policy.model._forward_pre_hooks


def test_two_trainers_of_one_model():
    """The second trainer's hooks replace the first one's, until that is used again."""
    network = of_family("Llama", {})
    given = inputs()
    trainers = [sharing(network), sharing(network)]
    with torch.no_grad():
        plain = logps(copy.deepcopy(network), given)
        for shared in (trainers[1], trainers[0], trainers[0], trainers[1]):
            shared.attach(network)
            assert len(network.model._forward_hooks) == len(network.model._forward_pre_hooks) == 1
            with shared.of(2):
                ours = logps(network, given)
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-3)
            assert shared.tokens < shared.tokens_before


def test_a_copy_of_a_model_belongs_to_nobody():
    network = of_family("Llama", {})
    given, shared = inputs(), sharing(network)
    theirs = copy.deepcopy(network)
    with torch.no_grad(), pytest.raises(RuntimeError, match="did not run"), shared.of(2):
        theirs(**given)
    shared.attach(theirs)
    with torch.no_grad(), shared.of(2):
        ours = logps(theirs, given)
    with torch.no_grad():
        torch.testing.assert_close(ours, logps(network, given), rtol=0, atol=1e-3)


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused": {"focalpo_fused": True},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "precomputed": {"precompute_ref_log_probs": True},
    "precomputed and fused": {"precompute_ref_log_probs": True, "focalpo_fused": True},
    "cut": {"max_length": 6},
    "with sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    "by length": {"loss_type": ["sigmoid_norm"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "label smoothing": {"label_smoothing": 0.1},
    "WPO": {"use_weighting": True},
    "LD-DPO": {"ld_alpha": 0.5},
    "LoRA": {"lora": True},
    "LoRA, fused and checkpointing": {
        "lora": True,
        "focalpo_fused": True,
        "gradient_checkpointing": True,
    },
    "DPO": {"focalpo_gamma": 0.0},
}
FUSED_RUNS = {name for name, run in RUNS.items() if "focalpo_fused" in run}
LOGGED = ("loss", "grad_norm", "rewards/margins", "rewards/chosen", "logps/rejected", "focalpo/p")


@pytest.fixture
def train(tokenizer, tmp_path: Path) -> Callable[..., list[dict[str, float]]]:
    """Trains three steps, with an evaluation after each, and returns the logs."""

    def run(lora: bool = False, **arguments: Any) -> list[dict[str, float]]:
        torch.manual_seed(0)  # for the adapter's weights
        models: dict[str, Any] = {"peft_config": LORA, "reference": None} if lora else {}
        arguments = {"focalpo_gamma": GAMMA, "eval_strategy": "steps", "eval_steps": 1} | arguments
        pairs = Dataset.from_list(PAIRS[:3])
        host = tiny_trl.trainer(
            FocalPOTrainer, tokenizer, tmp_path, eval_dataset=pairs, **models, **SGD, **arguments
        )
        host.train()
        return host.state.log_history

    return run


def values(log: list[dict[str, float]]) -> list[float]:
    return [
        entry[prefix + name]
        for entry in log
        for prefix in ("", "eval_")
        for name in LOGGED
        if prefix + name in entry
    ]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.fused] * (name in FUSED_RUNS)) for name in RUNS],
)
def test_the_same_run(train: Callable, name: str):
    """Step for step, in training and in evaluation."""
    plain, shared = train(**RUNS[name]), train(**RUNS[name], focalpo_shared_prompts=True)
    assert len(values(plain)) > 25
    assert values(shared) == pytest.approx(values(plain), rel=1e-5, abs=2e-5)


def test_the_same_run_in_bfloat16(train: Callable):
    plain, shared = train(bf16=True), train(bf16=True, focalpo_shared_prompts=True)
    assert values(shared) == pytest.approx(values(plain), rel=0.02, abs=0.02)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"focalpo_shared_prompts": True},
    "fused": {"focalpo_fused": True},
    "both": {"focalpo_shared_prompts": True, "focalpo_fused": True},
}
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "none": {},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


class Missing(TrainerCallback):
    """For each step, the trained parameters without a gradient."""

    def __init__(self) -> None:
        self.steps: list[list[str]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        trained = [(n, w) for n, w in given["model"].named_parameters() if w.requires_grad]
        assert trained
        self.steps.append([name for name, weight in trained if weight.grad is None])


@pytest.mark.releases
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[pytest.mark.fused] * ("focalpo_fused" in WAYS[way])) for way in WAYS],
)
def test_every_parameter_has_a_gradient(
    way: str, lora: bool, checkpointing: str, tokenizer, tmp_path: Path
):
    """In mixed precision, from the first step on: torch before 2.11 keeps casts made without a
    gradient."""
    missing = Missing()
    models: dict[str, Any] = {"peft_config": LORA, "reference": None} if lora else {}
    host = tiny_trl.trainer(
        FocalPOTrainer, tokenizer, tmp_path, **models, **WAYS[way],
        **{"bf16": True, "gradient_checkpointing": checkpointing != "none"},
        **CHECKPOINTING[checkpointing],
    )  # fmt: skip
    host.add_callback(missing)
    host.train()
    assert missing.steps == [[], [], []]


@pytest.mark.releases
def test_the_same_run_in_every_release(train: Callable):
    plain, shared = train(), train(focalpo_shared_prompts=True)
    assert values(shared) == pytest.approx(values(plain), rel=1e-5, abs=2e-5)
    assert any("focalpo/tokens" in entry for entry in shared)


def test_tokens_in_the_log(train: Callable, tokenizer):
    """By hand, for all pairs of one step: the prompt's two tokens, then the answers with their EOS;
    logged per step, whatever the batches and the steps between two logs."""
    chosen, rejected = (
        [len(pair[side].split()) + 1 for pair in PAIRS] for side in ("chosen", "rejected")
    )
    tokens = sum(2 + c + r for c, r in zip(chosen, rejected, strict=True))
    longest = 2 + max(*chosen, *rejected)
    asked = {
        "focalpo_shared_prompts": True,
        "per_device_train_batch_size": 8,
        "eval_strategy": "no",
    }
    for more in ({}, {"logging_steps": 3}):
        log = [entry for entry in train(**asked, **more) if "focalpo/tokens" in entry]
        assert len(log) == (1 if more else 3)
        for entry in log:
            assert entry["focalpo/tokens"] == tokens
            assert entry["focalpo/tokens_saved"] == pytest.approx(1 - tokens / (16 * longest))
    assert not any("focalpo/tokens" in entry for entry in train())


def test_predict_returns_its_outputs(tokenizer, tmp_path: Path):
    """The padded batch's logits, at its places."""
    pairs = Dataset.from_list(PAIRS[:4])
    found = []
    for shared in (False, True):
        host = tiny_trl.trainer(
            FocalPOTrainer, tokenizer, tmp_path, eval_dataset=pairs, focalpo_shared_prompts=shared
        )
        output = host.predict(host.eval_dataset)
        found.append((output.metrics["test_loss"], output.predictions))
    (loss, logits), (ours, of_ours) = found
    assert ours == pytest.approx(loss, abs=1e-6)
    batch = host.data_collator([host.eval_dataset[i] for i in range(4)])
    real = batch["attention_mask"][: len(logits)].bool().numpy()
    assert of_ours.shape == logits.shape == (*real.shape, 43)
    assert of_ours[real] == pytest.approx(logits[real], abs=1e-4)


def test_resumed_run_is_the_uninterrupted_one(tokenizer, tmp_path: Path):
    """To the last bit."""
    logs = []
    for resume in (False, True):
        host = tiny_trl.trainer(
            FocalPOTrainer, tokenizer, tmp_path, focalpo_shared_prompts=True, save_strategy="steps",
            save_steps=2, max_steps=4, **SGD,
        )  # fmt: skip
        host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        logs.append([[e["loss"], e["grad_norm"]] for e in host.state.log_history if "loss" in e])
    assert len(logs[0]) == 4 and logs[0] == logs[1]


# Acts only from the invocation's tokens on, which PEFT's forward looks for in the batch.
ALORA = LoraConfig(
    r=4, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=[3, 4]
)


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"torch_compile": True},
            "can't be combined with torch_compile, got True: each batch would",
        ),
        (
            {"policy": "mixtral"},
            "can't be combined with router_aux_loss_coef, got 0.001: the routers would count a row",
        ),
        (
            {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
            "can't be combined with prompt learning, got 'PromptTuningConfig'",
        ),
        ({"policy": "gemma2"}, "the argument softcap of "),
        ({"neftune_noise_alpha": 5.0}, "can't be combined with neftune_noise_alpha, got 5.0: its"),
        ({"peft_config": ALORA}, "adapters that act in PEFT's own forward, as aLoRA, X-LoRA and"),
    ],
    ids=["compile", "experts", "prompt learning", "soft caps", "NEFTune", "aLoRA"],
)
def test_refused_by_the_trainer(tokenizer, tmp_path: Path, given: dict[str, Any], message: str):
    if "policy" in given:
        given = {"policy": tiny_trl.model(0, given["policy"])}
    with pytest.raises(ValueError) as error:
        host = tiny_trl.trainer(
            FocalPOTrainer, tokenizer, tmp_path, focalpo_shared_prompts=True,
            **({"reference": None} if "peft_config" in given else {}), **given,
        )  # fmt: skip
        host.train()
    assert message in str(error.value)
