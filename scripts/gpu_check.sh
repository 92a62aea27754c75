#!/usr/bin/env bash
# Everything that needs a CUDA device, in under eight minutes on one H200; one JSON file at the end.
#
#   scripts/gpu_check.sh [--json gpu.json]              on a machine with a device
#   scripts/gpu_check.sh --dry-run [--json dry.json]    the same steps on the CPU, with tiny sizes: does the script itself work
#
# PYTHON=... chooses the interpreter; it needs compressm with its `bench` and `test` extras, and a PyTorch for CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
