#!/usr/bin/env bash
# Trains on this machine: demo. Filled by launch/submit.py; each run of it goes on where the last one ended.
#
#   bash local.sh                                  Octant starts the ranks: one for each GPU, or the layout's on CPUs
#   bash local.sh --include localhost:0,1          words for DeepSpeed's launcher, which then starts the ranks
#   bash local.sh --hostfile hosts --no_ssh ...    several machines: the run folder lies on a disk that all share
#
# Exit code: 0 trained, 2 refused, 75 saved and stopped (SIGTERM, SIGUSR1): start it again.
set -euo pipefail
cd /here
python=/venv/bin/python
words=('logging.wandb_project="it'"'"'s $HOME"' model=gpt_tiny data=random train.device=cpu train.steps=10 run.name=demo parallel.pp=2 parallel.dp=2 run.resume=true)

if [ $# -gt 0 ]; then
  # Cores and memory of a rank on the same NUMA node, where numactl can tell.
  command -v numactl >/dev/null && set -- --bind_cores_to_rank "$@"
  exec "$python" -m deepspeed.launcher.runner "$@" --module engine.train "${words[@]}"
fi
exec "$python" -m engine.train "${words[@]}"
