#!/usr/bin/env bash
# The shipped head `heads/smollm2-135m`, from nothing: prompts, answers, training.
#
#   runs/smollm2-135m.sh OUT [PROMPTS.jsonl]
#
# Two sampling runs, one a core (the user's prompts, and instructions that the target invents), then
# one training run on all their answers. Everything resumes: run the script again after a kill.
#
# The shipped head came out of these steps, with one difference that keeps this script from giving the same
# bytes: its answers were drawn with other seeds (1500 and 2500), and sampling was stopped at 3,199 and 2,943.
set -euo pipefail
out=$1 prompts=${2:-}
mkdir -p "$out"

sample() { # directory, seed, more options
    local dir=$1 seed=$2; shift 2
    local resume=; [ -e "$dir/progress/settings.json" ] && resume=--resume
    dspark train smollm2-135m --out "$dir" --only-answers --threads 1 --seed "$seed" $resume "$@"
}
sample "$out/invented" 1 --num-prompts 3200 &
answers=(--answers "$out/invented/progress/answers.jsonl")
if [ -n "$prompts" ]; then
    sample "$out/given" 2 --num-prompts 0 --prompts "$prompts"
    answers+=(--answers "$out/given/progress/answers.jsonl")
fi
wait

resume=; [ -e "$out/head/progress/settings.json" ] && resume=--resume
dspark train smollm2-135m --out "$out/head" "${answers[@]}" --threads 2 --loss distil --lr 1.5e-3 --steps 3000 \
    --draft-vocab 8192 --block-size 5 --layers 2 --rank 96 --cache-gb 9 $resume
