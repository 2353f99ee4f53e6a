#!/usr/bin/env bash
# A DSpark head and a DFlash head (rank 0) trained alike: same answers, steps, seed and settings.
#
#   runs/dflash-comparison.sh OUT ANSWERS.jsonl [STEPS]
set -euo pipefail
out=$1 answers=$2 steps=${3:-400}
# Both read one feature cache: it depends on the answers and the target only.
mkdir -p "$out/rank-0/progress/cache" "$out/rank-96/progress"
ln -sfn ../../rank-0/progress/cache "$out/rank-96/progress/cache"
for rank in 0 96; do
    resume=; [ -e "$out/rank-$rank/progress/settings.json" ] && resume=--resume
    dspark train smollm2-135m --out "$out/rank-$rank" --answers "$answers" --threads 2 --loss distil --lr 1.5e-3 --steps "$steps" \
        --draft-vocab 8192 --block-size 5 --layers 2 --rank "$rank" --cache-gb 9 $resume
done
