#!/bin/sh
# Builds llama-server for the benchmarks from the source that llama-cpp-python vendors, in the cache directory, and
# prints its path. Version, compiler and flags are those of the runtime's llama.cpp.
#
#     sh scripts/llama_server.sh [PYTHON]
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${1:-python3}
pin=$(grep '^llama-cpp-python==' "$here/../constraints.txt")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/loramix/llama-server-${pin#*==}
server=$cache/build/bin/llama-server

if [ ! -x "$server" ]; then
    mkdir -p "$cache"
    flags=$(sh "$here/cflags.sh")
    {
        if ! ls "$cache"/llama_cpp_python-*/ >/dev/null 2>&1; then
            "$python" -m pip download -q --no-deps --no-binary :all: -d "$cache" "$pin"
            tar -xzf "$cache"/llama_cpp_python-*.tar.gz -C "$cache"
            rm "$cache"/llama_cpp_python-*.tar.gz
        fi
        cmake -S "$cache"/llama_cpp_python-*/vendor/llama.cpp -B "$cache/build" -DCMAKE_BUILD_TYPE=Release \
            -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" -DLLAMA_BUILD_TESTS=OFF \
            -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
        cmake --build "$cache/build" --target llama-server -j "${JOBS:-2}"
    } >"$cache/build.log" 2>&1 || {
        tail -n 20 "$cache/build.log" >&2
        echo "error: llama-server was not built; the full log is in $cache/build.log" >&2
        exit 1
    }
fi
echo "$server"
