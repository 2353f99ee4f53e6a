#!/usr/bin/env bash
# A fine-tuned target and the head of the target it came from: what that head still gives, what `dspark adapt` makes of it, and what a
# head from nothing gives after the same answers and as many steps, and after five times as many.
#
#   runs/adapt.sh OUT
#
# FINE_TUNE (its options), PROMPTS, STEPS, HELD_OUT, TOKENS, THREADS and MORE (options of all trainings) make it smaller or larger. Everything
# resumes but the fine-tune: run the script again after a kill. It ends with a table; times are of each training's last start.
set -euo pipefail
out=$1
here=$(dirname "$0")/..
fine_tune=${FINE_TUNE:---steps 300} num_prompts=${PROMPTS:-800} steps=${STEPS:-400} held_out=${HELD_OUT:-64} tokens=${TOKENS:-160}
threads=${THREADS:-2} more=${MORE:-}
not_better=3 # exit code of `dspark adapt` for a head that it did not write
mkdir -p "$out"

# shellcheck disable=SC2086
[ -e "$out/target/fine-tune.json" ] ||
    python "$here/bench/adapt/fine_tune.py" smollm2-135m --out "$out/target" --threads "$threads" $fine_tune

heads=(smollm2-135m)
run() { # folder, verb and options
    local dir=$out/$1 resume= code=0; shift
    [ -e "$dir/progress/settings.json" ] && resume=--resume
    # shellcheck disable=SC2086
    "$@" --out "$dir" --threads "$threads" --held-out "$held_out" $more $resume || code=$?
    if [ $code = 0 ]; then heads+=("$dir"); elif [ $code != $not_better ]; then exit $code; fi
}
run adapted dspark adapt smollm2-135m --target "$out/target" --num-prompts "$num_prompts" --max-answer-tokens "$tokens" --steps "$steps"
answers=$out/adapted/progress/answers.jsonl
run low-rank dspark adapt smollm2-135m --target "$out/target" --answers "$answers" --low-rank 16 --steps "$steps"
for times in 1 5; do
    run "from-nothing-$times" dspark train "$out/target" --answers "$answers" --loss distil --lr 1.5e-3 --block-size 7 --rank 160 \
        --steps $((steps * times))
done
python "$here/bench/adapt/compare.py" "$out/target" "$answers" "${heads[@]}" --held-out "$held_out" --threads "$threads"
