#!/usr/bin/env bash
# Builds llama.cpp's server, the peer of compare_llama_cpp.py, out of the source distribution of
# llama-cpp-python: the Python package itself serves one request at a time and would be no fair peer.
# Native instructions, static, no web page, no TLS. Takes about 15 minutes on two cores.
#
#     benches/build_llama_server.sh FOLDER [JOBS]      # leaves FOLDER/llama-server and FOLDER/llama-bench
set -euo pipefail

version=0.3.36
folder=$(mkdir -p "${1:?usage: build_llama_server.sh FOLDER [JOBS]}" && cd "$1" && pwd)
jobs=${2:-$(nproc)}

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet cmake ninja
"$folder/venv/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python \
    --dest "$folder" "llama-cpp-python==$version"
tar --extract --gzip --directory "$folder" --file "$folder/llama_cpp_python-$version.tar.gz"

export PATH="$folder/venv/bin:$PATH"
source=$folder/llama_cpp_python-$version/vendor/llama.cpp
cmake -S "$source" -B "$folder/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DLLAMA_OPENSSL=OFF
nice cmake --build "$folder/build" --target llama-server llama-bench --parallel "$jobs"
cp "$folder/build/bin/llama-server" "$folder/build/bin/llama-bench" "$folder/"
echo "$folder/llama-server"
