#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Evaluate Qwen3-ASR on the Open ASR Leaderboard's sets, as jobs of Hugging Face on an H200.
#
#   SPACE=you/open-asr-qwen3-asr-vllm RESULTS_BUCKET=you/results bash submit_jobs.sh
#   MODELS=Qwen/Qwen3-ASR-0.6B ONLY_DATASETS="librispeech spgispeech" ... bash submit_jobs.sh
#
# In a folder of the leaderboard's repository; elsewhere, set NORMALIZER to its normalizer/.
set -euo pipefail

: "${SPACE:?the Space with our Dockerfile}" "${RESULTS_BUCKET:?the bucket for results}"
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NORMALIZER=${NORMALIZER:-$HERE/../normalizer}
MODELS=${MODELS:-Qwen/Qwen3-ASR-0.6B Qwen/Qwen3-ASR-1.7B}
[[ -d $NORMALIZER ]] || { echo "$NORMALIZER: no such folder; set NORMALIZER" >&2; exit 1; }

# label, split, repository, and its configuration where it has several
SETS="\
ami_cleaned test hf-audio/open-asr-leaderboard ami_cleaned
earnings22 test ArtificialAnalysis/Earnings22-Cleaned-AA-chunked
gigaspeech_cleaned test hf-audio/open-asr-leaderboard gigaspeech_cleaned
librispeech test.clean hf-audio/open-asr-leaderboard librispeech
librispeech test.other hf-audio/open-asr-leaderboard librispeech
monsoon_en_in test VoiceArena/Monsoon_en_IN_test
spgispeech test hf-audio/open-asr-leaderboard spgispeech
voxpopuli_cleaned_aa test hf-audio/open-asr-leaderboard voxpopuli_cleaned_aa"

evaluate() { # MODEL SPLIT REPOSITORY CONFIGURATION: one job, which returns at its end
    hf jobs run --flavor "${FLAVOR:-h200}" --timeout 8h --secrets HF_TOKEN \
        ${ORG_NAME:+--namespace "$ORG_NAME"} \
        --volume "$NORMALIZER:/app/normalizer" \
        --volume "hf://buckets/$RESULTS_BUCKET:/results" \
        "hf.co/spaces/$SPACE" bash -c "
            python3 run_eval.py --model_id=$1 --split=$2 --dataset_path=$3 --dataset=$4 \
                --device=0 --batch_size=${BATCH_SIZE:-2048} &&
            mkdir -p /results/${1//\//-} && cp results/*.jsonl /results/${1//\//-}/"
}

for model in $MODELS; do
    jobs=()
    while read -r label split repository configuration; do
        [[ " ${ONLY_DATASETS:-$label} " == *" $label "* ]] || continue
        echo "$model on $label $split"
        evaluate "$model" "$split" "$repository" "$configuration" </dev/null >/dev/null &
        jobs+=($!)
    done <<<"$SETS"
    ((${#jobs[@]})) || { echo "ONLY_DATASETS='$ONLY_DATASETS' names none of the sets" >&2; exit 1; }
    failed=0
    for job in "${jobs[@]}"; do wait "$job" || failed=$((failed + 1)); done
    ((failed == 0)) || echo "$failed of ${#jobs[@]} jobs of $model failed" >&2
    folder=results/${model//\//-}
    hf buckets sync "hf://buckets/$RESULTS_BUCKET/${model//\//-}" "$folder"
    PYTHONPATH=$(dirname "$NORMALIZER") python3 -c "
from normalizer.eval_utils import score_results
score_results('$folder', '$model')"
    ((failed == 0)) || exit 1
done
