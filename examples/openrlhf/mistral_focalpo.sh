#!/usr/bin/env bash
# FocalPO on Mistral-Base 7B after supervised fine-tuning: the paper's Mistral run
# (arXiv 2501.06645, section 4 and appendix C), with OpenRLHF.
#
# Hardware: 8 GPUs of 40 GB or more (the paper: 8 A100-40GB), ZeRO-3; about 485 steps.
# Launch:   bash examples/openrlhf/mistral_focalpo.sh
#           Further flags go after it, and the last of two wins: ... --train.micro_batch_size 1
# Resume:   the same command with --ckpt.load_enable continues from the last checkpoint.
# Expected: first loss 0.6695 (2^-0.05 ln 2: every margin starts at 0), and the line
#           "focalpo_plugins: active." on the first rank.  The paper evaluates the result with
#           AlpacaEval 2 and Arena-Hard.
# Not run by the authors of this file, who have no such GPUs. OpenRLHF's parser accepts every flag, and
# tiny_focalpo.sh runs the same code on a CPU.
#
# OpenRLHF adds no special tokens to the text of the chat template, and this model's own template
# writes no BOS: zephyr.jinja is the same format with the one BOS that TRL would put, and with the
# empty system turn that the handbook put before each prompt.
#
# Sources: [P] the paper; [Z] the Zephyr DPO recipe of the alignment-handbook, where the paper is
# silent; [T] to be as TRL, which [P] trained with, where OpenRLHF's default differs; [H] a matter
# of hardware or taste, no effect on what is learned.
set -euo pipefail

flags=(
  --loss focalpo
  --focalpo.gamma 0.05                # [P]
  --focalpo.variant correct           # [P] Eq. 4
  --model.beta 0.01                   # [P]

  --model.model_name_or_path HuggingFaceH4/mistral-7b-sft-beta # [P]
  --data.dataset trl-lib/ultrafeedback_binarized               # [P]
  --data.dataset_split train
  --data.apply_chat_template          # whole conversations in chosen and rejected
  --data.tokenizer_chat_template "$(cat "$(dirname "$0")/zephyr.jinja")" # [T, Z]
  # A longer sequence loses its end, and its last token becomes EOS (RESULTS.md, "Long pairs").
  --data.max_len 1024                 # [Z]; OpenRLHF has no separate limit for the prompt ([Z] 512)
  --eval.dataset trl-lib/ultrafeedback_binarized
  --eval.split test
  --eval.steps 100                    # [H]

  --adam.lr 5e-7                      # [P]
  --adam.betas 0.9 0.999              # [T] OpenRLHF's default is 0.9 0.95
  --lr_scheduler cosine               # [Z]
  --lr_warmup_ratio 0.1               # [Z]
  --max_norm 1.0                      # [T]
  --train.batch_size 128              # [P]
  --train.micro_batch_size 2          # [H] so 8 accumulation steps on 8 GPUs
  --train.max_epochs 1                # [P]
  --train.seed 42                     # [Z]

  --ds.zero_stage 3                   # [P]
  --ds.param_dtype bf16               # [Z]
  --ds.attn_implementation flash_attention_2 # [P]
  --model.gradient_checkpointing_enable      # [Z] non-reentrant, OpenRLHF's default

  --ckpt.output_dir outputs/mistral_focalpo_openrlhf       # [H]
  --ckpt.path outputs/mistral_focalpo_openrlhf/checkpoints # [H] each run its own
  --ckpt.save_steps 100               # [H] with the optimizer's state, to resume from
  --ckpt.max_num 2                    # [H] the previous one stays until the next is complete
  --logger.tensorboard_dir outputs/mistral_focalpo_openrlhf/tensorboard # [H]

  # To uncomment: wandb (any word as the key, after `wandb login`), and a prompt computed once for
  # both answers, which is not yet tried on a GPU.
  # --logger.wandb.key logged-in
  # --logger.wandb.project focalpo
  # --logger.wandb.run_name mistral_focalpo_openrlhf
  # --focalpo.shared_prompts
)

# DEEPSPEED replaces the launcher, for several nodes (examples/multinode.md).
# shellcheck disable=SC2086
exec ${DEEPSPEED:-deepspeed --num_gpus 8} --module openrlhf.cli.train_dpo "${flags[@]}" "$@"
