#!/usr/bin/env bash
# What this machine's GPU does, in under ten minutes and one table:  scripts/gpu_bench.sh
#   --model-name DIRECTORY   whose tokenizer and chat template to use (configs/tiny); --data FILE  chats for it (generated)
#   --quick                  tiny sizes, which any CPU can run, to see that the script works
# Models have the shapes of Qwen2.5 and Llama 3.1 and random weights; nothing is downloaded but packages.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=()
[[ " $* " == *" --quick "* ]] || extra=(--extra cuda)
exec uv run "${extra[@]}" python scripts/gpu_bench.py "$@"
