"""FocalPO with only TRL, on made-up preferences: the settings of tiny_focalpo.yml.

Hardware: two CPU cores, no GPU; 40 s of one core. If there is a GPU, it trains there.
Make the data and the model once, then launch, both from the repository root:
  python examples/make_tiny.py
  HF_HUB_OFFLINE=1 python examples/trl_focalpo.py
Expected: the first loss is 0.6695 (2^-0.05 ln 2). On the held-out pairs the loss falls to 0.61,
  0.56 and 0.54 at steps 20, 40 and 60, with 0.77 to 0.81 of them ranked right, and the margin
  rises to 0.14, 0.35 and 0.45. Axolotl draws other batches, and other machines make another model.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from focalpo_plugins import FocalPOConfig, FocalPOTrainer, focalpo_loss

TINY = Path(__file__).resolve().parent / "tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gamma", type=float, default=0.05, help="0 is DPO (default: 0.05)")
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--out", default="outputs/tiny_focalpo_trl")
    args = parser.parse_args()
    if not (TINY / "made.json").is_file():
        parser.error(f"{TINY} doesn't exist: run python examples/make_tiny.py first")
    if args.max_steps < 1:  # TRL would train whole epochs
        parser.error(f"--max-steps must be at least 1, got {args.max_steps}")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        parser.error(f"--out must be a folder, got {args.out}")
    try:
        focalpo_loss(torch.zeros(1), args.gamma)
    except ValueError as error:
        parser.error(str(error).replace("gamma", "--gamma", 1))

    # Whole conversations in chosen and rejected, no prompt column: TRL splits the prompt off.
    files = {split: str(TINY / f"{split}.jsonl") for split in ("train", "test")}
    pairs = load_dataset("json", data_files=files)
    gpu = torch.cuda.is_available()
    config = FocalPOConfig(
        args.out,
        focalpo_gamma=args.gamma,
        focalpo_variant="correct",
        beta=0.1,
        max_length=128,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        max_steps=args.max_steps,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=args.max_steps // 10,
        weight_decay=0.0,
        seed=42,
        # TRL's defaults are a GPU's: bf16, and recomputing activations to save memory.
        use_cpu=not gpu,
        bf16=gpu,
        gradient_checkpointing=gpu,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=20,
        eval_on_start=True,
        save_steps=args.max_steps,
        save_only_model=True,
        report_to="none",
    )
    trainer = FocalPOTrainer(
        AutoModelForCausalLM.from_pretrained(TINY / "model"),
        args=config,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=AutoTokenizer.from_pretrained(TINY / "model"),
    )
    trainer.train()
    trainer.save_model()
    print(f"the model is in {args.out}; focalpo report {args.out} shows the run")


if __name__ == "__main__":
    main()
