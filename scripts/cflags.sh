#!/bin/sh
# Prints the compiler flags that a safe build of llama.cpp needs on this machine; nothing where it needs none.
#
# GCC can drop the stores that set up AMX tiles, and the first prompt then kills the process. Without the AMX
# macros llama.cpp leaves those kernels out and keeps its AVX-512 ones.
set -eu

grep -qw amx_tile /proc/cpuinfo 2>/dev/null || exit 0
cxx=${CXX:-}
for name in c++ g++; do # the order in which CMake looks
    [ -n "$cxx" ] || cxx=$(command -v "$name" || true)
done
[ -n "$cxx" ] || exit 0
# shellcheck disable=SC2086 # CXX may hold arguments
if ! echo | $cxx -x c++ -dM -E - 2>/dev/null | grep -q __clang__; then
    echo "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
fi
