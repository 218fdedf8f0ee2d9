#!/usr/bin/env bash
# An artifact of the embedded model, from a text and from samples of the model itself, with a Budget Predictor.
#
#     examples/train_your_own.sh TEXT OUT
#
# The first four fifths of TEXT are trained on, and the rest is what the artifact is scored on.
#
# As it stands, a trial of the steps. For a real one set TOKENS=800000 SAMPLED=300000 SEARCH=2560 EXAMPLES=600,
# which takes hours on two CPU cores, and give text of the kind that will be served. recipes/ has the settings of the
# shipped artifacts.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: examples/train_your_own.sh TEXT OUT" >&2; exit 2; }
text=$(realpath "$1") out=$2
tokens=${TOKENS:-20000} sampled=${SAMPLED:-8000} search=${SEARCH:-1024} examples=${EXAMPLES:-16}
mkdir -p "$out/data"
lines=$(wc -l < "$text")
[ "$lines" -ge 5 ] || { echo "$text has $lines lines, too few to hold out a fifth" >&2; exit 2; }
head -n $((lines * 4 / 5)) "$text" > "$out/data/text.txt"
tail -n +$((lines * 4 / 5 + 1)) "$text" > "$out/held_out.txt"

vllm-buddy sample "$out/data/sampled.jsonl" --tokens "$sampled" --batch 16

cat > "$out/stage1.yaml" <<EOF
recipe: bypass
paths: searched
data:
  - {file: text.txt, weight: 1}
  - {file: sampled.jsonl, weight: 1}
rank: 32
length: 128
batch: 4
learning_rate: 0.0015
min_budget: 0.5
tokens: $tokens
explore_tokens: $((tokens / 4))
search_tokens: $search
router_windows: 8
library: 2
decide_every: 0
EOF
vllm-buddy train "$out/stage1.yaml" data_dir="$out/data" out="$out/repaired"

cat > "$out/stage2.yaml" <<EOF
artifact: $out/repaired
data:
  - {file: text.txt}
  - {file: sampled.jsonl}
depths: [15, 19, 23, 30]
examples: $examples
EOF
vllm-buddy train-budget "$out/stage2.yaml" data_dir="$out/data" out="$out/artifact"

vllm-buddy eval --artifact "$out/artifact" --text "$out/held_out.txt" --text-tokens 2048 --budgets 0.75,0.5 \
    --policy buddy,shortgpt
echo "serve it: vllm-buddy serve --additional-config '{\"buddy\": {\"artifact\": \"$out/artifact\"}}'"
