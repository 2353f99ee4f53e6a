#!/usr/bin/env bash
# A head for the demo target on two CPU cores, from nothing: prompts, answers, training. It was shipped until the one of
# runs/smollm2-135m-gpu.sh took its place.
#
#   runs/smollm2-135m.sh OUT [PROMPTS.jsonl]
#
# Two sampling runs, one a core (the user's prompts, and instructions that the target invents), then
# one training run on all their answers. Then a second stage: more invented code, chat and structured text, less of the
# mathematics that the given prompts are full of, and training that goes on with a larger rank.
# Everything resumes: run the script again after a kill.
#
# That head came out of these steps, with one difference that keeps this script from giving the same
# bytes: the first stage's answers were drawn with other seeds (1500 and 2500), and sampling was stopped at 3,199 and 2,943.
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

resume=; [ -e "$out/first/progress/settings.json" ] && resume=--resume
dspark train smollm2-135m --out "$out/first" "${answers[@]}" --threads 2 --loss distil --lr 1.5e-3 --steps 3000 \
    --draft-vocab 8192 --block-size 5 --layers 2 --rank 96 --cache-gb 9 $resume

sample "$out/more" 31 --num-prompts 1536 --kinds code,chat,structured
[ -e "$out/mixed.jsonl" ] || python - "$out" <<'PYTHON'
import json, random, sys
from pathlib import Path

out = Path(sys.argv[1])
records = [json.loads(line) for file in sorted(out.glob("[ig]*/progress/answers.jsonl")) for line in file.open()]
math, rest = ([r for r in records if (r["kind"] == "math") == wanted] for wanted in (True, False))
rng = random.Random(0)
rng.shuffle(math)
mixed = math[:1400] + rest + [json.loads(line) for line in (out / "more/progress/answers.jsonl").open()]
rng.shuffle(mixed)
(out / "mixed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in mixed))
PYTHON

resume=; [ -e "$out/head/progress/settings.json" ] && resume=--resume
dspark train smollm2-135m --out "$out/head" --answers "$out/mixed.jsonl" --threads 1 --start-from "$out/first" --rank 160 \
    --loss distil --lr 1e-3 --steps 1600 --cache-gb 9 $resume
dspark calibrate "$out/head" --target smollm2-135m --dtype bfloat16 --bias --num-prompts 128
