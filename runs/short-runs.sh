#!/usr/bin/env bash
# Short runs that differ in one setting each: what depth, rank, vocabulary, block length and loss are worth.
#
#   runs/short-runs.sh OUT ANSWERS.jsonl [STEPS]
#
# All of them read one feature cache. bench/results/smollm2-135m-training.md holds the table.
set -euo pipefail
out=$1 answers=$2 steps=${3:-150}
mkdir -p "$out/base/progress/cache"
run() { # name, options that differ
    local dir=$out/$1 resume=; shift
    mkdir -p "$dir/progress"
    [ -e "$dir/progress/cache" ] || ln -s ../../base/progress/cache "$dir/progress/cache"
    [ -e "$dir/model.safetensors" ] && return
    [ -e "$dir/progress/settings.json" ] && resume=--resume
    dspark train smollm2-135m --out "$dir" --answers "$answers" --threads 2 --lr 1.5e-3 --steps "$steps" --anchors 32 \
        --cache-gb 9 --loss distil --draft-vocab 8192 --block-size 5 --layers 2 --rank 96 $resume "$@"
}
run base
run layers-1 --layers 1
run layers-3 --layers 3
run rank-32 --rank 32
run rank-256 --rank 256
run vocab-4096 --draft-vocab 4096
run vocab-16384 --draft-vocab 16384
run block-7 --block-size 7
run loss-paper --loss paper
