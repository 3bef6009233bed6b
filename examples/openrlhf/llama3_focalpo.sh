#!/usr/bin/env bash
# FocalPO on Llama-3-Instruct 8B: the paper's Llama-3 run (arXiv 2501.06645, section 4 and
# appendix C), with OpenRLHF.
#
# Licence:  the model is gated: accept the Meta Llama 3 Community License on its page, then
#           `hf auth login`. A model published from it has a name that begins with "Llama 3", and
#           "Built with Meta Llama 3" on its page.
# Hardware: 8 GPUs of 40 GB or more (the paper: 8 A100-40GB), ZeRO-3; about 468 steps.
# Launch:   bash examples/openrlhf/llama3_focalpo.sh
#           Further flags go after it, and the last of two wins: ... --train.micro_batch_size 2
# Resume:   the same command with --ckpt.load_enable continues from the last checkpoint.
# Expected: first loss 0.6695 (2^-0.05 ln 2: every margin starts at 0), and the line
#           "focalpo_plugins: active." on the first rank.  The paper evaluates the result with
#           AlpacaEval 2 and Arena-Hard.
# Not run by the authors of this file, who have no such GPUs. OpenRLHF's parser accepts every flag, and
# tiny_focalpo.sh runs the same code on a CPU.
#
# Sources: [P] the paper; [S] the SimPO repository, whose setting the paper says it follows for
# Llama-3; [T] to be as TRL, which [P] trained with, where OpenRLHF's default differs; [H] a matter
# of hardware or taste, no effect on what is learned.
set -euo pipefail

flags=(
  --loss focalpo
  --focalpo.gamma 0.05                # [P]
  --focalpo.variant correct           # [P] Eq. 4
  --model.beta 0.01                   # [S] the paper gives none for Llama-3

  --model.model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct # [P]
  --data.dataset princeton-nlp/llama3-ultrafeedback-armorm       # [P]
  --data.dataset_split train
  --data.apply_chat_template          # whole conversations in chosen and rejected
  # A longer sequence loses its end, and its last token becomes EOS (RESULTS.md, "Long pairs").
  --data.max_len 2048                 # [S]; OpenRLHF has no separate limit for the prompt ([S] 1800)
  --eval.dataset princeton-nlp/llama3-ultrafeedback-armorm
  --eval.split test
  --eval.steps 100                    # [H]

  --adam.lr 6e-7                      # [P], chosen from 3e-7, 5e-7, 6e-7, 1e-6
  --adam.betas 0.9 0.999              # [T] OpenRLHF's default is 0.9 0.95
  --lr_scheduler cosine               # [S]
  --lr_warmup_ratio 0.1               # [S]
  --max_norm 1.0                      # [T]
  --train.batch_size 128              # [P]
  --train.micro_batch_size 1          # [H] so 16 accumulation steps on 8 GPUs
  --train.max_epochs 1                # [P]
  --train.seed 42                     # [S]

  --ds.zero_stage 3                   # [P]
  --ds.param_dtype bf16               # [S]
  --ds.attn_implementation flash_attention_2 # [P]
  --model.gradient_checkpointing_enable      # [S] non-reentrant, OpenRLHF's default

  --ckpt.output_dir outputs/llama3_focalpo_openrlhf       # [H]
  --ckpt.path outputs/llama3_focalpo_openrlhf/checkpoints # [H] each run its own
  --ckpt.save_steps 100               # [H] with the optimizer's state, to resume from
  --ckpt.max_num 2                    # [H] the previous one stays until the next is complete
  --logger.tensorboard_dir outputs/llama3_focalpo_openrlhf/tensorboard # [H]

  # To uncomment: wandb (any word as the key, after `wandb login`), and a prompt computed once for
  # both answers, which is not yet tried on a GPU.
  # --logger.wandb.key logged-in
  # --logger.wandb.project focalpo
  # --logger.wandb.run_name llama3_focalpo_openrlhf
  # --focalpo.shared_prompts
)

# DEEPSPEED replaces the launcher, for several nodes (examples/multinode.md).
# shellcheck disable=SC2086
exec ${DEEPSPEED:-deepspeed --num_gpus 8} --module openrlhf.cli.train_dpo "${flags[@]}" "$@"
