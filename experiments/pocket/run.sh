#!/usr/bin/env bash
# Render the data and train variants side by side on one GPU (or on the CPU, see README.md):
#     VARIANTS="deep shallow" NUM_SCENES=250000 experiments/pocket/run.sh WORK_DIR MINUTES [more arguments for train.py]
set -euo pipefail
work=$1 minutes=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="${PYTHONPATH:-$here/../..}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$work/tokenizer"
python3 -c "import sys; sys.path.insert(0, '$here'); import model; model.build_tokenizer().save_pretrained('$work/tokenizer')"
OMP_NUM_THREADS=1 python3 "$here/shards.py" --tokenizer "$work/tokenizer" --data "$work/data" --num-scenes "${NUM_SCENES:-250000}" &
rendering=$!
training=()
for variant in ${VARIANTS:-deep shallow}; do
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} python3 "$here/train.py" --variant "$variant" --data "$work/data" --out "$work/$variant" \
        --minutes "$minutes" "$@" &
    training+=($!)
done
wait "${training[@]}"
wait "$rendering"
