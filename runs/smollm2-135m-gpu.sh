#!/usr/bin/env bash
# The shipped head `heads/smollm2-135m`, and the DFlash head it was compared with, from nothing, on one GPU.
#
#   runs/smollm2-135m-gpu.sh OUT PROMPTS.jsonl
#
# On an NVIDIA H200 the first command took 363 s: 21 to invent 18,000 instructions, 64 to answer them and the given prompts twice
# (3,417: 3,000 of mathematics, 417 of chat; none of the evaluation prompts), 28 for features, 53 to compile and time the steps, 100 for the
# DSpark head's 6,232 steps, 94 for the DFlash head's. How many steps fit into the seconds given depends on the machine; so does each bit.
# Then, on a CPU: held-out prompts, which training never saw, calibrate the confidences.
#
# The shipped head has its block of 7, rank 160 and all the rest from here. It replaced the one of runs/smollm2-135m.sh.
set -euo pipefail
out=$1 prompts=$2
here=$(dirname "$0")/..
python "$here/bench/gpu/train_pair.py" smollm2-135m --out "$out" --prompts "$prompts" --seconds 415 --num-prompts 9000 \
    --max-answer-tokens 256
python "$here/bench/gpu/held_out.py" "$out/answers.jsonl" --target smollm2-135m --held-out 256 > "$out/held-out.jsonl"
dspark calibrate "$out/dspark" --target smollm2-135m --dtype bfloat16 --margin --prompts "$out/held-out.jsonl"

# The same with one command a head, from the answers:
#   dspark train smollm2-135m --device cuda --out OUT/again --answers OUT/answers.jsonl --loss distil --lr 2e-3 --steps 6232 \
#       --sequences 64 --anchors 64 --block-size 7 --rank 160 --held-out 256
