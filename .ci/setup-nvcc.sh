#!/usr/bin/env bash
# Installs nvcc 13.0 (compiler only: no GPU, no driver, no root) from PyPI wheels,
# plus link-time stand-ins for the CUDA libraries that candle-core's `cuda` feature names.
#   usage:  eval "$(.ci/setup-nvcc.sh [DIR])"      DIR defaults to ~/.cache/locket-cuda
# Idempotent; prints only `export` lines on stdout, everything else on stderr.
set -euo pipefail
DIR=${1:-$HOME/.cache/locket-cuda}; mkdir -p "$DIR"; DIR=$(cd "$DIR" && pwd)
CAP=${CUDA_COMPUTE_CAP:-90}; CUDARC=${CUDARC_CRATE_VERSION:-0.19.10}
# 13.0 on purpose: the target's driver is a CUDA 13.0 one, and it refuses PTX from a newer nvcc.
PKGS="nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
      nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85"
STAMP=$DIR/.done-$(echo $PKGS $CUDARC v2 | cksum | cut -d' ' -f1)
ROOT=$DIR/nvidia/cu13
if [ ! -e "$STAMP" ]; then
  command -v g++ >/dev/null || { echo "setup-nvcc: g++ is missing" >&2; exit 1; }
  exec 9>"$DIR/.lock"; flock 9
  if [ ! -e "$STAMP" ]; then
    rm -rf "$DIR/nvidia"
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install -q --no-deps --no-compile --only-binary=:all: --upgrade --target "$DIR" $PKGS >&2
    chmod +x "$ROOT"/bin/* "$ROOT"/nvvm/bin/* 2>/dev/null || true
    ln -sfn lib "$ROOT/lib64"                                  # build scripts look in lib64
    ln -sf libcudart.so.13 "$ROOT/lib/libcudart.so"
    # Stand-ins: shared objects with the real sonames and cudarc's symbol names, empty bodies.
    # They satisfy the linker only; never put this folder in LD_LIBRARY_PATH.
    SRC=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-"$CUDARC" 2>/dev/null | head -1 || true)
    if [ -z "$SRC" ]; then
      T=$(mktemp -d); mkdir -p "$T/src"; : >"$T/src/lib.rs"
      printf '[package]\nname="f"\nversion="0.1.0"\nedition="2021"\n[dependencies]\ncudarc={version="=%s",default-features=false}\n[workspace]\n' "$CUDARC" >"$T/Cargo.toml"
      cargo fetch -q --manifest-path "$T/Cargo.toml" >&2; rm -rf "$T"
      SRC=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-"$CUDARC" | head -1)
    fi
    mkdir -p "$ROOT/lib/stubs"
    for e in driver:cuda:1 nvrtc:nvrtc:13 curand:curand:10 cublas:cublas:13 cublaslt:cublasLt:13; do
      IFS=: read -r mod lib ver <<<"$e"
      grep -ohE '\bpub (unsafe )?fn (cu|nvrtc)[A-Za-z0-9_]+' "$SRC/src/$mod/sys/mod.rs" | awk '{print $NF}' | sort -u |
        awk '{print "void " $1 "(void){}"}' >"$DIR/stub.c"
      g++ -x c -w -O0 -shared -fPIC -fno-builtin -Wl,-soname,lib$lib.so.$ver -o "$ROOT/lib/stubs/lib$lib.so" "$DIR/stub.c"
    done
    rm -f "$DIR/stub.c"; touch "$STAMP"
  fi
fi
"$ROOT/bin/nvcc" --version | grep release >&2
cat <<X
export CUDA_HOME="$ROOT" CUDA_PATH="$ROOT" NVCC="$ROOT/bin/nvcc" CUDA_COMPUTE_CAP=$CAP
export CUDAFORGE_THREADS=${CUDAFORGE_THREADS:-$(nproc)} PATH="$ROOT/bin:\$PATH"
X
