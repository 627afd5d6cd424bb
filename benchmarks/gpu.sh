#!/usr/bin/env bash
# Runs everything that needs a CUDA machine, without network: installs this checkout with the packages that are there,
# runs the gpu tests, compute-sanitizer, the benchmarks beside their peers and the sweep of configurations. Logs,
# records and a summary are left in OUT.
#
#     benchmarks/gpu.sh OUT [SECONDS]
#
# Takes at most about SECONDS, 540 by default. Every step has a share of them. A step that fails or runs out of time
# does not stop the others, and the exit status is 1 then. The variable PYTHON names the interpreter.
set -uo pipefail

if [[ $# -lt 1 || $# -gt 2 ]]; then
    echo "usage: $0 OUT [SECONDS]" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
total=${2:-540}
python=${PYTHON:-python}
summary=$out/summary.txt
failed=0
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
: >"$summary"

# step NAME PERCENT COMMAND... writes the output of the command to NAME.log.
step() {
    local name=$1 limit start=$SECONDS code result
    limit=$(printf '%d.%03d' $((total * $2 / 100)) $((total * $2 % 100 * 10)))
    shift 2
    # If it is interrupted and not terminated, pytest reports the failures so far.
    timeout --signal=INT --kill-after=2 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    case $code in
        0) result="ok" ;;
        124 | 137) result="out of time after $limit s" ;;
        *) result="failed" ;;
    esac
    if ((code != 0)); then failed=1; fi
    printf '%-12s exit %3d  %4d s  %s\n' "$name" "$code" $((SECONDS - start)) "$result" | tee -a "$summary"
}

# sanitizer TOOL PERCENT. racecheck sees shared memory only, and memcheck sees global memory, too.
sanitizer() {
    if command -v compute-sanitizer >/dev/null; then
        # Each tensor is an allocation of its own, so that an access beyond its end is seen.
        step "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$1" --error-exitcode 99 "$python" -m benchmarks sanitize
    else
        printf '%-12s not run: compute-sanitizer is not installed\n' "$1" | tee -a "$summary"
    fi
}

step install 5 "$python" -m pip install -e . --no-deps --no-build-isolation
step nvidia-smi 1 nvidia-smi
step environment 3 "$python" -m sago
step tests 25 "$python" -m pytest -m gpu -q -p no:cacheprovider --maxfail=20
# Compiles the kernels, so that the sanitizer has its time for their launches.
step updates 5 "$python" -m benchmarks sanitize
sanitizer memcheck 10
sanitizer racecheck 10
# A new cache makes the first calls compile, so that their time is that of a new installation.
step speed 25 env TRITON_CACHE_DIR="$scratch" "$python" -m benchmarks speed --device cuda --json "$out"
step sweep 8 "$python" -m benchmarks sweep --json "$out"
step training 8 "$python" -m benchmarks step --device cuda --repeats 5 --json "$out"

printf 'in all %d s, %s\n' "$SECONDS" "$( ((failed)) && echo "with failures" || echo "all well")" | tee -a "$summary"
exit "$failed"
