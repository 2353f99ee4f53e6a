#!/usr/bin/env bash
# Heads of every kind trained alike (answers, steps, seed and rates): tokens a round and speed of each, and of their compositions, by set of prompts.
#
#   runs/heads.sh OUT ANSWERS.jsonl STEPS [PROMPTS.jsonl ...]
#
# DSpark with its three sequential heads and one to three layers, DFlash, a multi-token-prediction module trained on one step and on as many
# as a draft has (mtp-1, mtp-chain), EAGLE-3, DSpark begun as the module (warm-2). ANSWERS is what `dspark train --only-answers` writes. To go on
# after a kill, say the same again: runs resume, and what was measured is kept. In the environment: TARGET, DEVICE, THREADS; HEADS, names of those
# to train; TRAIN and BENCH, more options for `dspark train` and `dspark bench`; RUNS, of fixed-t0, fixed-t1 (every head alone, whole blocks) and
# planned-t0 (each with its planner, and compositions; needs vanilla-2, mtp-chain, dflash-2 and eagle3). OUT/table.md is the end.
set -euo pipefail
here=$(dirname "$0")/..
out=$1 answers=$2 steps=$3
shift 3
[ $# -gt 0 ] || set -- "$here/src/dspark/demo_prompts.jsonl"
target=${TARGET:-smollm2-135m} device=${DEVICE:-cpu} threads=${THREADS:-2} block=5
read -ra more_train <<< "${TRAIN:-}"
read -ra more_bench <<< "${BENCH:-}"
heads=${HEADS:-vanilla-1 vanilla-2 vanilla-3 gated-1 gated-2 gated-3 rnn-1 rnn-2 rnn-3 dflash-2 mtp-1 mtp-chain eagle3 warm-2}

train() { # name, which features it reads, its options
    local dir=$out/$1 features=$out/features-$2 resume=
    shift 2
    grep -qs held_out_rounds "$dir/provenance.json" && return
    mkdir -p "$dir/progress" "$features"
    [ -e "$dir/progress/cache" ] || ln -s "$(realpath "$features")" "$dir/progress/cache"
    [ -e "$dir/progress/settings.json" ] && resume=--resume
    dspark train "$target" --out "$dir" --answers "$answers" --device "$device" --threads "$threads" --steps "$steps" --block-size "$block" \
        --loss distil --lr 1.5e-3 --cache-gb 9 $resume "${more_train[@]}" "$@"
}

for head in $heads; do
    case $head in
        vanilla-* | gated-* | rnn-*) train "$head" five --sequential "${head%-*}" --layers "${head#*-}" ;;
        dflash-*) train "$head" five --kind dflash --layers "${head#*-}" ;;
        warm-*) train "$head" five --layers "${head#*-}" --warm-start mtp --mtp "$out/mtp-1" ;;
        mtp-1) train mtp-1 last --kind mtp --chain 1 ;;
        mtp-chain) train mtp-chain last --kind mtp --chain "$block" ;;
        eagle3) train eagle3 three --kind eagle3 ;;
        *) echo "error: HEADS names $head" >&2 && exit 2 ;;
    esac
done

measured=()
bench() { # name of the run, its options
    local file=$out/$1.json
    shift
    if [ ! -e "$file" ]; then
        dspark bench "$target" --device "$device" --threads "$threads" "${prompts[@]}" --json "${more_bench[@]}" "$@" > "$file.partial"
        mv "$file.partial" "$file"
    fi
    measured+=("$file")
}
prompts=() others=() alone=plain
for file in "$@"; do prompts+=(--prompts "$file"); done
for head in $heads; do
    others+=(--other "$head=$out/$head")
    alone+=,$head@fixed
    [ "$head" != mtp-1 ] || alone+=,mtp-1@length:1 # as it was trained
done
for run in ${RUNS:-fixed-t0 fixed-t1 planned-t0}; do
    case $run in
        fixed-t*) bench "$run" --head none --temperature "${run#fixed-t}" --compare "$alone" "${others[@]}" ;;
        planned-t*)
            bench "$run" --head "$out/vanilla-2" --mtp "$out/mtp-chain" --temperature "${run#planned-t}" \
                --compare "plain,lookup,dspark,mtp,mtp+dspark,auto,dflash-2,eagle3" --other "dflash-2=$out/dflash-2" --other "eagle3=$out/eagle3"
            ;;
        *) echo "error: RUNS names $run" >&2 && exit 2 ;;
    esac
done
for file in "${measured[@]}"; do
    printf '## %s\n\n' "$(basename "$file" .json)"
    python "$here/bench/heads.py" "$file"
    echo
done | tee "$out/table.md"
