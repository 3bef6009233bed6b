#!/usr/bin/env bash
# FocalPO on made-up preferences, with OpenRLHF on a CPU: the settings of examples/tiny_focalpo.yml.
#
# Hardware: two CPU cores, no GPU; about 50 s from start to end, and a minute
#           more the first time, when DeepSpeed compiles its operators.
# Launch, after `python examples/make_tiny.py`:
#           bash examples/openrlhf/tiny_focalpo.sh
# Expected: first loss 0.6695 (2^-0.05 ln 2: every margin starts at 0); on the held-out pairs the
#           loss falls to 0.58, then 0.49 to 0.50, then 0.47 to 0.48 at steps 20, 40 and 60, with
#           0.80 to 0.83 of them ranked right, and focalpo/p rises to 0.55, then 0.61 to 0.62, then
#           0.63 to 0.64. So it was on two machines, of which each made its own model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

flags=(
  --loss focalpo
  --focalpo.gamma 0.05                # the paper's
  --focalpo.variant correct           # the paper's Eq. 4
  --model.beta 0.1

  --model.model_name_or_path examples/tiny/model
  --data.dataset examples/tiny/train.jsonl
  --data.apply_chat_template          # whole conversations in chosen and rejected
  --data.max_samples 960              # 60 steps of 16
  --data.max_len 128
  --eval.dataset examples/tiny/test.jsonl
  --eval.split train                  # a local file has no other split
  --eval.steps 20

  --adam.lr 2e-4
  --adam.betas 0.9 0.999
  --lr_scheduler cosine
  --lr_warmup_ratio 0.1
  --train.batch_size 16
  --train.micro_batch_size 8
  --train.max_epochs 1
  --train.seed 42

  --ds.zero_stage 3                   # as on the GPUs of the other scripts
  --ds.attn_implementation eager      # flash-attn's kernels need CUDA

  --ckpt.output_dir outputs/tiny_focalpo_openrlhf
  --logger.tensorboard_dir outputs/tiny_focalpo_openrlhf/tensorboard
)

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
exec torchrun --standalone --nproc_per_node 2 -m openrlhf.cli.train_dpo "${flags[@]}" "$@"
