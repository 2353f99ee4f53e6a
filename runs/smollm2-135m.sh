#!/usr/bin/env bash
# The shipped head `heads/smollm2-135m`, from nothing: prompts, answers, training.
#
#   runs/smollm2-135m.sh OUT [PROMPTS.jsonl]
#
# Two sampling runs, one a core (the user's prompts, and instructions that the target invents), then
# one training run on a mix of both. Everything resumes: run the script again after a kill.
#
# The shipped head came out of these steps, with two differences that keep this script from giving the
# same bytes: its answers were drawn with other seeds (1500 and 2500) and stopped at 3,199 and 2,943, and
# it was trained on the 1,501 of the mix whose features were in the cache when training began.
set -euo pipefail
out=$1 prompts=${2:-}
mkdir -p "$out"

sample() { # directory, seed, more options
    local dir=$1 seed=$2; shift 2
    local resume=; [ -e "$dir/progress/settings.json" ] && resume=--resume
    dspark train smollm2-135m --out "$dir" --only-answers --threads 1 --seed "$seed" $resume "$@"
}
sample "$out/invented" 1 --num-prompts 3200 &
if [ -n "$prompts" ]; then sample "$out/given" 2 --num-prompts 0 --prompts "$prompts"; fi
wait

# A quarter of mathematics, the rest as it comes: the given prompts are mostly mathematics.
python3 - "$out" <<'PY'
import json, pathlib, random, sys
out = pathlib.Path(sys.argv[1])
records = [json.loads(line) for file in sorted(out.glob("*/progress/answers.jsonl")) for line in file.open()]
random.Random(2).shuffle(records)
kept, limits = [], {"math": 800, "chat": 600, "free": 200}
for record in records:
    limits[record["kind"]] = limits.get(record["kind"], 10**9) - 1
    if limits[record["kind"]] >= 0:
        kept.append(record)
random.Random(3).shuffle(kept)
(out / "answers.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))
PY

resume=; [ -e "$out/head/progress/settings.json" ] && resume=--resume
dspark train smollm2-135m --out "$out/head" --answers "$out/answers.jsonl" --threads 2 \
    --loss distil --lr 1.5e-3 --steps 1400 --draft-vocab 8192 --block-size 5 --layers 2 --rank 96 --cache-gb 6 $resume
