#!/usr/bin/env bash
# Replays the records in golden/records where there is no GPU, and leaves the report in report/.
set -euo pipefail
cd "$(dirname "$0")/.."
tox run -e conformance -- -m "fp32_alignment or fp16_alignment or int8_alignment"
