#!/bin/sh
# Everything that needs a GPU, in three parts of at most four minutes each: tests, speed and memory, training.
#
#     benchmarks/gpu.sh --output outputs/gpu --wheels wheels             # on a machine with one GPU and no network
#     benchmarks/gpu.sh --output outputs/gpu --parts 2                   # the second part alone
#     benchmarks/gpu.sh --output /tmp/rehearsal --device cpu --tiny      # every line of it, on a CPU
#
# Started again it goes on: finished steps and passed tests are not repeated. --help lists the options; the page
# docs/results/gpu.md describes what is measured. PYTHON names the interpreter that has torch (default: python3).
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -u benchmarks/gpu_run.py "$@"
