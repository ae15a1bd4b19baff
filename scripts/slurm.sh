#!/usr/bin/env bash
# A training run as a SLURM job that resumes by itself after preemption and its time limit:
#   sbatch scripts/slurm.sh sft @ configs/sft_qwen.toml --run-name qwen
# Options of sbatch before the script win over those below: sbatch --nodes 4 --time 2-00:00 scripts/slurm.sh sft …
# Submit it from this repository's root, on a file system that all nodes share, after `uv sync --extra cuda` there.
#
# JAX takes one GPU for each SLURM task, by the task's number on its node: as many tasks as GPUs on a node, each of which
# must see them all, hence --gpus-per-node and never --gpus-per-task.
#SBATCH --job-name=lacuna
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
# Without B: in front, that signal goes to the tasks alone, 120 s (and up to a minute more) before the time limit: they
# save and end well, and this script requeues the job if steps are left. After preemption, or when the node of this
# script is lost, SLURM requeues the job itself. scancel ends this script too, and a failure ends it at srun's line, so
# neither comes back; once the failure is fixed, submit the same line again.
set -euo pipefail
directory=$(uv run python -c '
import sys
from lacuna.cli import COMMANDS, parse
command, *arguments = sys.argv[1:]
print(parse(COMMANDS[command], arguments, command).run_directory)
' "$@" --resume)
PATH=$PWD/.venv/bin:$PATH # the tasks do without uv, which would check the environment once for each
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
srun "$@" --resume
if tail -n 5 "$directory/run.log" | grep -q '^stopped after step'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
