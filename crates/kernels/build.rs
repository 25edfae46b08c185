//! With feature `cuda`: compiles `src/cuda/decode.cu` to PTX with nvcc (`$NVCC`, else `nvcc` on the
//! path) for compute capability `$CUDA_COMPUTE_CAP` (default 80).

#![expect(clippy::panic, reason = "a build script stops the build by panicking")]

use std::{env, path::PathBuf, process::Command};

fn main() {
    println!("cargo:rerun-if-changed=src/cuda/decode.cu");
    println!("cargo:rerun-if-env-changed=NVCC");
    println!("cargo:rerun-if-env-changed=CUDA_COMPUTE_CAP");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let nvcc = env::var("NVCC").unwrap_or_else(|_| "nvcc".into());
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "80".into());
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("decode.ptx");
    let status = Command::new(&nvcc)
        .args(["-O3", "-std=c++17", "-ptx", &format!("-arch=compute_{capability}"), "-o"])
        .arg(&out)
        .arg("src/cuda/decode.cu")
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{nvcc} failed on src/cuda/decode.cu: {status}"),
        Err(error) => {
            panic!("cannot run {nvcc}: {error}; set NVCC, or see CONTRIBUTING.md on building with CUDA")
        }
    }
}
