#!/usr/bin/env bash
# Merge, measure with gates, push: one CI job, for any CI system.
#
#   BASE=org/base MODELS="org/a@1f2e3d org/b@4c5b6a" TARGET=org/merged ./merge-and-push.sh
#
# Exit codes are those of basis: 4 where a gate failed (nothing is pushed then), 5 for the Hub and the network.
# The token comes from HF_TOKEN, as huggingface_hub reads it; no command sees it.
set -euo pipefail

: "${BASE:?the model that all were tuned from}"
: "${MODELS:?the models to merge, separated by spaces; pin revisions with @}"
: "${METHOD:=ortho}"
: "${OUT:=merged}"
: "${TEXT:=}"                                  # a held-out text; a small built-in mix by default
: "${GATES:=perplexity_increase > 0.10}"       # one a line
: "${TARGET:=}"                                # org/name or org/name@branch; empty for a run that pushes nothing

gates=()
while IFS= read -r gate; do
  [[ -z "$gate" ]] || gates+=(--fail-if "$gate")
done <<< "$GATES"

# shellcheck disable=SC2086  # MODELS is a list of words
basis merge $MODELS --base "$BASE" --method "$METHOD" --output "$OUT" --progress json --json > merge.json
basis eval "$OUT" --against "$BASE" ${TEXT:+--text "$TEXT"} "${gates[@]}" --progress json --json > eval.json

if [[ -n "$TARGET" ]]; then
  basis push "$OUT" "$TARGET" --message "${MESSAGE:-Merge of $MODELS}" --progress json
fi
