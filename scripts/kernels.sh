#!/bin/sh
# Runs the numerical tests with several kinds of llama.cpp kernels: the installed build, the same without repacked
# weights, a build for AVX2 only, and one for AVX-512 only if the CPU has it.
#
#     sh scripts/kernels.sh [PYTHON]
#
# The builds are cached by version and flags; each takes a few minutes the first time. PYTEST_ADDOPTS sets options of
# pytest.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$here"
python=${1:-python3}
pin=$(grep '^llama-cpp-python==' constraints.txt)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/loramix/kernels
tests='tests/test_golden.py tests/test_readme.py tests/test_margins.py tests/test_chunks.py tests/test_batch.py
    tests/test_batch_context.py tests/test_mixing.py'
failed=''

has() { # FLAG: whether the CPU has it
    grep -qw "$1" /proc/cpuinfo 2>/dev/null
}

build() { # NAME CMAKE-ARGUMENTS: prints the directory to put on PYTHONPATH
    where=$cache/${pin#*==}-$1
    log=$where.log
    if [ ! -e "$where/built" ] || [ "$(cat "$where/built")" != "$2" ]; then
        echo "==> $pin for $1: $2, a few minutes" >&2
        rm -rf "$where"
        mkdir -p "$cache"
        CMAKE_ARGS="$2" nice "$python" -m pip --disable-pip-version-check install --no-deps --no-cache-dir \
            --no-binary llama-cpp-python --target "$where" "$pin" >"$log" 2>&1 || {
            tail -n 25 "$log" >&2
            echo "error: $pin was not built for $1; the full log is in $log" >&2
            return 1
        }
        echo "$2" >"$where/built"
    fi
    echo "$where"
}

try() { # NAME OVERLAY [VARIABLE=VALUE]: runs the tests, prints one line
    name=$1 overlay=$2
    shift 2
    paths=$here${overlay:+:$overlay}${PYTHONPATH:+:$PYTHONPATH}
    [ -z "$overlay" ] || paths=$overlay:$here${PYTHONPATH:+:$PYTHONPATH}
    log=$cache/$name-tests.log
    features=$(env PYTHONPATH="$paths" "$python" - "$overlay" <<'PYTHON'
import sys

import llama_cpp

assert llama_cpp.__file__.startswith(sys.argv[1]), f"{llama_cpp.__file__} is used, not {sys.argv[1]}"
parts = llama_cpp.llama_print_system_info().decode().replace("CPU :", "").split("|")
print(*(part.split("=")[0].strip() for part in parts if part.strip().endswith("= 1")))
PYTHON
    ) || {
        failed="$failed $name"
        return
    }
    # shellcheck disable=SC2086 # a list of files
    if env PYTHONPATH="$paths" "$@" "$python" -m pytest $tests >"$log" 2>&1; then
        result=passed
    else
        result=FAILED failed="$failed $name"
        grep -E '^(FAILED|ERROR)' "$log" | cut -c1-200 >&2 || true
    fi
    echo "$name: $result: $(grep -E '[0-9]+ (passed|failed|error)' "$log" | tail -n 1) [$features]"
}

mkdir -p "$cache"
avx2=$(build avx2 '-DGGML_NATIVE=OFF')
avx512=''
if has avx512f && has avx512vl; then
    avx512=$(build avx512 '-DGGML_NATIVE=OFF -DGGML_AVX512=ON')
fi
try native ''
try unpacked '' LORAMIX_EXTRA_BUFTS=0
try avx2 "$avx2"
[ -z "$avx512" ] || try avx512 "$avx512"
[ -z "$failed" ] || {
    echo "error: failed under:$failed; the logs are in $cache" >&2
    exit 1
}
