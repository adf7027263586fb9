#!/usr/bin/env bash
# Carry out a recipe in CI, and keep what it says: release.sh RECIPE push|check [option of lora-deploy run]...
#   push   everything, to the targets that the recipe names
#   check  everything but the push
# Writes run.json, junit.xml, summary.md (a table) and every cell's evidence, report and manifest to $REPORTS
# (reports), and ends with the status of lora-deploy run: 0 done, 10 could not be checked, else what failed.
set -euo pipefail

if [[ $# -lt 2 || ! "$2" =~ ^(push|check)$ ]]; then
    echo "usage: ${0##*/} RECIPE push|check [option of lora-deploy run]..." >&2
    exit 2
fi
recipe=$1 mode=$2
shift 2
reports=${REPORTS:-reports}
mkdir -p -- "$reports"
rm -f -- "$reports"/{run.json,junit.xml,summary.md}

until=()
[[ "$mode" == push ]] || until=(--until release)

# The job's page is written by the run itself; it goes through a file so that a comment can have it, too.
page=${GITHUB_STEP_SUMMARY:-}
status=0
GITHUB_STEP_SUMMARY=$reports/summary.md \
    lora-deploy run "$recipe" "${until[@]}" --junit "$reports/junit.xml" --json "$@" >"$reports/run.json" || status=$?

if [[ -f "$reports/summary.md" ]]; then
    cat -- "$reports/summary.md"
    [[ -z "$page" ]] || cat -- "$reports/summary.md" >>"$page"
fi

# Options may move the output: only --set changes what a recipe says.
settings=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --set) settings+=("$1" "${2:-}"); shift $(($# > 1 ? 2 : 1)) ;;
        --set=*) settings+=("$1"); shift ;;
        *) shift ;;
    esac
done
list='import json, sys
for cell in json.load(sys.stdin)["cells"]:
    print(cell["name"], cell["folder"], sep="\t")'
cells=$(lora-deploy recipe show "$recipe" "${settings[@]}" --json 2>/dev/null | python3 -c "$list" 2>/dev/null) || cells=
while IFS=$'\t' read -r name folder; do
    [[ -n "$name" ]] || continue
    for file in "$folder"/merged/{evidence,merge}.json \
        "$folder/release/$name"/{README.md,report.html,lora_deploy.json}; do
        [[ -f "$file" ]] || continue
        mkdir -p -- "$reports/$name"
        cp -- "$file" "$reports/$name/"
    done
done <<<"$cells"
exit "$status"
