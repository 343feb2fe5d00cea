#!/bin/sh
# Prints the compiler flags for a safe build of llama.cpp on this machine, if any are needed.
#
# GCC can optimize away the stores that configure AMX tiles, and the first prompt then crashes the process. Without
# the AMX macros llama.cpp omits those kernels and keeps its AVX-512 ones.
set -eu

grep -qw amx_tile /proc/cpuinfo 2>/dev/null || exit 0
cxx=${CXX:-}
for name in c++ g++; do # the order in which CMake searches
    [ -n "$cxx" ] || cxx=$(command -v "$name" || true)
done
[ -n "$cxx" ] || exit 0
# shellcheck disable=SC2086 # CXX may hold arguments
if ! echo | $cxx -x c++ -dM -E - 2>/dev/null | grep -q __clang__; then
    echo "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
fi
