"""Stub libraries on which torch's CUDA build runs without a GPU and computes nothing.

    python -m tests.tools.stub_libraries DIR             # compile them, for this Python's torch
    python -m tests.tools.stub_libraries DIR COMMAND...  # run a command over them

Each library has every function of the real one; those without source do nothing and return 0.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "support" / "stub_cuda"
# The stub, its source, and the package with the real library, from which names are taken.
LIBRARIES = {
    "libcuda.so.1": ("driver.c", None),
    "libcudart.so.13": ("runtime.c", "nvidia"),
    "libcublas.so.13": ("cublas.c", "nvidia"),
    "libcublasLt.so.13": ("cublaslt.c", "nvidia"),
}


def package(name):
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"{name} is not installed: this needs the CUDA build of torch")
    return Path(next(iter(spec.submodule_search_locations)))


def exported(library):
    """Names of the functions that a library defines."""
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True
    ).stdout
    found = (line.split() for line in listing.splitlines())
    return {fields[2].partition("@")[0] for fields in found if fields[1] in "TW"}


def compile_library(name, folder, *sources):
    """Compile a library whose symbols have its name as version, as those of NVIDIA have."""
    versions = folder / f"{name}.map"
    version = "" if name == "libcuda.so.1" else name
    versions.write_text(f"{version} {{ global: *; }};\n")
    include = package("triton") / "backends" / "nvidia" / "include"
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-O2", "-w", f"-I{include}"]
    command += [f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}", "-o", folder / name]
    subprocess.run([*command, *sources, "-ldl"], check=True)


def build(folder):
    """Compile all of `LIBRARIES` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for library, (source, vendor) in LIBRARIES.items():
        compile_library(library, folder, SOURCES / source)
        if vendor is not None:
            real = next(package(vendor).rglob(library))
            missing = sorted(exported(real) - exported(folder / library) - {"_init", "_fini"})
            rest = folder / f"rest_of_{source}"
            rest.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in missing))
            compile_library(library, folder, SOURCES / source, rest)
    (folder / "libcuda.so").unlink(missing_ok=True)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")


def environment(folder):
    """Variables under which a process loads the stubs in place of NVIDIA's libraries."""
    preloaded = [str(folder / name) for name in LIBRARIES if name != "libcuda.so.1"]
    return {
        "LD_LIBRARY_PATH": str(folder), "LD_PRELOAD": ":".join(preloaded),
        "TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def main():
    folder, *command = sys.argv[1:]
    folder = Path(folder).resolve()
    if not command:
        build(folder)
        return
    os.execvpe(command[0], command, os.environ | environment(folder))


if __name__ == "__main__":
    main()
