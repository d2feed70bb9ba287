#!/usr/bin/env bash
# Is this GPU machine fine? Builds the extension in place, prints what there is, runs the whole test suite with nothing skipped for
# want of a GPU, compute-sanitizer over a reduced set, and the benchmarks. Logs and benchmark.csv go to the folder given
# (default: out/gpu). The tests against diffusers and vector_quantize_pytorch run where these are installed. SKIP_SANITIZER=1 and
# SKIP_BENCHMARK=1 leave these out, TESTS="tests -k cuda" chooses among the tests.
#
#     bash tests/gpu.sh [folder]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/gpu}
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0

step() { # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    echo "$name: exit $code in $((SECONDS - start)) s"
    [ $code -eq 0 ] || { status=1; tail -n 40 "$out/$name.log"; }
}

step build 300 env BLDM_BUILD_CPU=1 BLDM_BUILD_CUDA=1 "$python" setup.py build_ext --inplace
step doctor 60 "$python" -m bldm_kernels
cat "$out/doctor.log"
# Two threads a worker: with all of the machine's for each they spend their time waiting for one another.
step tests 600 env OMP_NUM_THREADS=2 BLDM_TEST_REQUIRE_GPU=1 BLDM_TEST_ALLOW_MISSING=diffusers,vector_quantize_pytorch,tokenizers \
    "$python" -m pytest -q -n "${WORKERS:-8}" --durations=15 ${TESTS:-tests}
tail -n 5 "$out/tests.log"
if [ -z "${SKIP_SANITIZER:-}" ]; then
    for tool in memcheck racecheck initcheck synccheck; do
        options=(--tool "$tool" --error-exitcode 1) of=()
        # One lane of a warp arrives for all of them, where they have met before. Three kernels are left out, as it does not follow who
        # arrives at a barrier that others wait for, or at another block's for all of its own, nor who waits for a copy that waited for
        # the rest; the emulated machine does (tests/emulator).
        [ "$tool" = racecheck ] && options+=(--racecheck-indirect-barrier-dependency) of=(--for-racecheck)
        step "$tool" 600 compute-sanitizer "${options[@]}" "$python" tests/sanitize.py "${of[@]}"
    done
fi
if [ -z "${SKIP_BENCHMARK:-}" ]; then
    rm -f "$out/benchmark.csv"
    step benchmark 600 "$python" -m bldm bench --size all --out "$out/benchmark.csv" ${COMMIT:+--commit "$COMMIT"}
    cat "$out/benchmark.log"
fi
exit $status
