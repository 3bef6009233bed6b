#!/usr/bin/env bash
# FocalPO with LoRA on Llama-3-Instruct 8B, with OpenRLHF: llama3_focalpo.sh for fewer GPUs.  The
# paper trains all weights; this reproduces none of its numbers.
#
# Licence:  the model is gated: accept the Meta Llama 3 Community License on its page, then
#           `hf auth login`. A model published from it has a name that begins with "Llama 3", and
#           "Built with Meta Llama 3" on its page.
# Hardware: GPUS (default 4) of 80 GB, ZeRO-2: a copy of policy and reference, 16 GB each, on each;
#           about 468 steps. Add --ds.load_in_4bit for smaller ones.
# Launch:   GPUS=2 bash examples/openrlhf/llama3_focalpo_lora.sh
# Resume:   the same command with --ckpt.load_enable continues from the last checkpoint.
# Expected: first loss 0.6695 (2^-0.05 ln 2: every margin starts at 0; LoRA starts as the
#           reference), and the line "focalpo_plugins: active." on the first rank.  The output
#           folder holds only the adapter.
# Not run by the authors of this file, who have no such GPUs. OpenRLHF's parser accepts every flag.
#
# Sources: [P] the paper; [S] the SimPO repository, whose setting the paper says it follows for
# Llama-3; [Q] the Zephyr QLoRA DPO recipe of the alignment-handbook, as of its commit 95dc472; [T]
# to be as TRL, where OpenRLHF's default differs; [H] a matter of hardware or taste, no effect on
# what is learned.
set -euo pipefail

flags=(
  --loss focalpo
  --focalpo.gamma 0.05                # [P]
  --focalpo.variant correct           # [P] Eq. 4
  --model.beta 0.01                   # [S] the paper gives none for Llama-3

  --ds.lora.rank 128                  # [Q]
  --ds.lora.alpha 128                 # [Q]
  --ds.lora.dropout 0.05              # [Q]
  --ds.lora.target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj # [Q]

  --model.model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct # [P]
  --data.dataset princeton-nlp/llama3-ultrafeedback-armorm       # [P]
  --data.dataset_split train
  --data.apply_chat_template          # whole conversations in chosen and rejected
  # A longer sequence loses its end, and its last token becomes EOS (RESULTS.md, "Long pairs").
  --data.max_len 2048                 # [S]; OpenRLHF has no separate limit for the prompt ([S] 1800)
  --eval.dataset princeton-nlp/llama3-ultrafeedback-armorm
  --eval.split test
  --eval.steps 100                    # [H]

  --adam.lr 5e-6                      # [Q] ten times that of the full fine-tuning, as usual for LoRA
  --adam.betas 0.9 0.999              # [T] OpenRLHF's default is 0.9 0.95
  --lr_scheduler cosine               # [S]
  --lr_warmup_ratio 0.1               # [S]
  --max_norm 1.0                      # [T]
  --train.batch_size 128              # [P]
  --train.micro_batch_size 1          # [H]
  --train.max_epochs 1                # [P]
  --train.seed 42                     # [S]

  --ds.zero_stage 2                   # [H]
  --ds.param_dtype bf16               # [S]
  --ds.attn_implementation flash_attention_2 # [P]
  --model.gradient_checkpointing_enable      # [S] non-reentrant, OpenRLHF's default

  --ckpt.output_dir outputs/llama3_focalpo_lora_openrlhf       # [H]
  --ckpt.path outputs/llama3_focalpo_lora_openrlhf/checkpoints # [H] each run its own
  --ckpt.save_steps 100               # [H] with the optimizer's state, to resume from
  --ckpt.max_num 2                    # [H] the previous one stays until the next is complete
  --logger.tensorboard_dir outputs/llama3_focalpo_lora_openrlhf/tensorboard # [H]

  # To uncomment: wandb (any word as the key, after `wandb login`), and a prompt computed once for
  # both answers, which is not yet tried on a GPU.
  # --logger.wandb.key logged-in
  # --logger.wandb.project focalpo
  # --logger.wandb.run_name llama3_focalpo_lora_openrlhf
  # --focalpo.shared_prompts
)

exec deepspeed --num_gpus "${GPUS:-4}" --module openrlhf.cli.train_dpo "${flags[@]}" "$@"
