#!/usr/bin/env bash
# Gates the run in report/, against the last release's in baseline/ where there is one.
# Leaves summary.md, for the pull request, and gate.json.
set -euo pipefail
cd "$(dirname "$0")/.."
against=()
if [ -f baseline/alignment.json ]; then
    against=(--baseline baseline)
fi
tox exec -e conformance --skip-pkg-install -- \
    align gate report "${against[@]}" --policy ci/policy.yaml --summary summary.md --json gate.json
