#!/usr/bin/env bash
# Heads of every kind trained alike (answers, steps, seed and rates), and tokens a round of each by set of prompts.
#
#   runs/heads.sh OUT ANSWERS.jsonl STEPS [PROMPTS.jsonl ...]
#
# DSpark with its three sequential heads and one to three layers, DFlash, a multi-token-prediction module trained on one step and on as many
# as a draft has (mtp-1, mtp-chain), EAGLE-3. ANSWERS is what `dspark train --only-answers` writes. To go on after a kill, say the same again:
# runs resume, and what was measured is kept. In the environment: TARGET, DEVICE, THREADS; HEADS, names of those to train; TRAIN and BENCH,
# more options for `dspark train` and `dspark bench`. OUT/table.md is the end.
set -euo pipefail
here=$(dirname "$0")/..
out=$1 answers=$2 steps=$3
shift 3
[ $# -gt 0 ] || set -- "$here/src/dspark/demo_prompts.jsonl"
target=${TARGET:-smollm2-135m} device=${DEVICE:-cpu} threads=${THREADS:-2} block=5
read -ra more_train <<< "${TRAIN:-}"
read -ra more_bench <<< "${BENCH:-}"
heads=${HEADS:-vanilla-1 vanilla-2 vanilla-3 gated-1 gated-2 gated-3 rnn-1 rnn-2 rnn-3 dflash-2 mtp-1 mtp-chain eagle3}

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

others=() modes=plain
for head in $heads; do
    case $head in
        vanilla-* | gated-* | rnn-*) train "$head" five --sequential "${head%-*}" --layers "${head#*-}" ;;
        dflash-*) train "$head" five --kind dflash --layers "${head#*-}" ;;
        mtp-1) train mtp-1 last --kind mtp --chain 1 ;;
        mtp-chain) train mtp-chain last --kind mtp --chain "$block" ;;
        eagle3) train eagle3 three --kind eagle3 ;;
        *) echo "error: HEADS names $head" >&2 && exit 2 ;;
    esac
    others+=(--other "$head=$out/$head")
    modes+=,$head@fixed
    [ "$head" != mtp-1 ] || modes+=,mtp-1@length:1 # as it was trained
done

measured=()
for prompts in "$@"; do
    for temperature in 0 1; do
        file=$out/$(basename "$prompts" .jsonl)-t$temperature.json
        if [ ! -e "$file" ]; then
            dspark bench "$target" --device "$device" --threads "$threads" --head none --prompts "$prompts" --temperature "$temperature" \
                --compare "$modes" "${others[@]}" --json "${more_bench[@]}" > "$file.partial"
            mv "$file.partial" "$file"
        fi
        measured+=("$file")
    done
done
python "$here/bench/heads.py" "${measured[@]}" | tee "$out/table.md"
