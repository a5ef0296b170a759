#!/usr/bin/env bash
# Runs the cases on the GPUs here, one worker a GPU, and leaves their records in golden/records, their report in gpu/.
# For the container of ci/Dockerfile, from the root of a checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
align doctor
python -m pytest -n auto \
    conformance/test_fp32_alignment.py conformance/test_fp16_alignment.py conformance/test_int8_alignment.py \
    -p no:cacheprovider --records golden/records --report gpu
