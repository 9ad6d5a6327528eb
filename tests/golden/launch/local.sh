#!/usr/bin/env bash
# Trains on this machine: demo. Filled by launch/submit.py; each run of it goes on where the last one ended.
#
#   bash local.sh                                  Octant starts the ranks: one for each GPU, or the layout's on CPUs
#   bash local.sh --include localhost:0,1          words for DeepSpeed's launcher, which then starts the ranks
#   bash local.sh torchrun --nproc-per-node 2      words for torchrun
#   bash local.sh --hostfile hosts --no_ssh ...    several machines: the run folder lies on a disk that all share
#
# Exit code: 0 trained, 2 refused, 75 saved and stopped (SIGTERM, SIGUSR1): start it again.
set -euo pipefail
cd /here
python=/venv/bin/python
words=('logging.wandb_project="it'"'"'s $HOME"' model=gpt_tiny data=random train.device=cpu train.steps=10 run.name=demo parallel.pp=2 parallel.dp=2 run.resume=true)

if [ "${1:-}" = torchrun ]; then
  exec "$python" -m torch.distributed.run "${@:2}" -m engine.train "${words[@]}"
fi
if [ $# -gt 0 ]; then
  # Cores and memory of a rank on the same NUMA node, where numactl can tell and there are cores enough.
  if command -v numactl >/dev/null && [ "$(nproc)" -ge 8 ]; then
    set -- --bind_cores_to_rank "$@"
  fi
  exec "$python" -m deepspeed.launcher.runner "$@" --module engine.train "${words[@]}"
fi
exec "$python" -m engine.train "${words[@]}"
