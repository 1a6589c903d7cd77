"""Build of the packages and of the optional C++ library; the metadata is in pyproject.toml.

The library is compiled against the stable ABI of libtorch, so one file loads on every torch from 2.11 on. It
is optional: without torch, without a compiler, or with DUALEDIT_NO_BUILD=1 the install succeeds, says what
was left out and why, and every operator runs in plain PyTorch.

CUDA kernels are added where nvcc and a torch with CUDA are found. They need nothing of torch's CUDA headers:
nvcc compiles plain launchers, the C++ compiler a thin binding.

With ninja installed, files are compiled side by side, and only those that changed.

Environment:
    DUALEDIT_NO_BUILD=1   do not compile
    MAX_JOBS              how many files ninja compiles at a time
    FORCE_CUDA=1          add CUDA kernels although this torch has no CUDA (FORCE_CUDA=0: leave them out)
    CUDA_HOME, CXX        the CUDA toolkit, the C++ compiler
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
STABLE_ABI = "0x020b000000000000"  # torch 2.11
GPUS = ("arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90")


def note(message):
    """Print where both pip's log and a person see it."""
    print(f"dualedit-kernels: {message}", file=sys.stderr, flush=True)


def why_not():
    """The reason the C++ library cannot be built here, or None."""
    if os.environ.get("DUALEDIT_NO_BUILD", "0") not in ("", "0"):
        return "DUALEDIT_NO_BUILD is set"
    try:
        import torch
    except ImportError:
        return "torch is not installed here (install torch first and pass --no-build-isolation)"
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        return f"torch {torch.__version__} is older than 2.11"
    if sys.platform == "win32":
        return None  # setuptools finds MSVC by itself
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"no C++ compiler ({compiler}) on the PATH"
    return None


def find_nvcc():
    """The CUDA compiler to build with, or None if the CUDA kernels are left out; says why."""
    import torch

    wish = os.environ.get("FORCE_CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if wish == "0" or sys.platform != "linux":
        reason = "FORCE_CUDA=0" if wish == "0" else "they are built on Linux only"
    elif nvcc is None:
        reason = "no nvcc on the PATH or in CUDA_HOME"
    elif torch.version.cuda is None and wish != "1":
        reason = f"torch {torch.__version__} has no CUDA (FORCE_CUDA=1 builds them all the same)"
    else:
        return nvcc
    note(f"CUDA kernels are left out: {reason}.")
    return None


def add_cuda(extension, nvcc, folder):
    """Compile csrc/cuda/*.cu and add objects, binding and the static CUDA runtime to the extension."""
    objects, include = [], ["-I", str(ROOT / "csrc")]
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        target = Path(folder) / f"{source.stem}.cu.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", *include]
        command += [part for gpu in GPUS for part in ("-gencode", gpu)]
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        objects.append(str(target))
    # nvcc may be a wrapper: it knows itself where its toolkit is.
    plan = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    top = next(line.split("=", 1)[1] for line in plan.splitlines() if line.startswith("#$ TOP="))
    extension.extra_objects += objects
    extension.define_macros.append(("DUALEDIT_CUDA", None))
    extension.include_dirs.append(str(Path(top, "include")))
    extension.library_dirs += [
        str(Path(top, folder)) for folder in ("lib64", "lib", "targets/x86_64-linux/lib")
    ]
    extension.libraries += ["cudart_static", "rt", "pthread", "dl"]
    note("CUDA kernels are built.")


def extension():
    """(ext_modules, cmdclass) of the C++ library; both empty if it cannot be built."""
    reason = why_not()
    if reason is not None:
        note(f"the C++ library is NOT built: {reason}. Everything works without it, in plain PyTorch.")
        return [], {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # ninja is found where this Python's packages put it, though their folder may not be on the PATH.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])

    class Build(BuildExtension):
        """Says in words what happened; a failure leaves the library out (it is optional)."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                self.leave_out(error)

        def build_extension(self, ext):
            nvcc = find_nvcc()
            try:
                if nvcc is not None:
                    add_cuda(ext, nvcc, self.build_temp)
            except (OSError, StopIteration, subprocess.CalledProcessError) as error:
                note(f"CUDA kernels are left out: {error}.")
            try:
                super().build_extension(ext)
            except Exception as error:
                self.leave_out(error)
            else:
                note("the C++ library is built.")

        def leave_out(self, error):
            note(f"the C++ library is NOT built: {error}. Everything works without it, in plain PyTorch.")

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    others = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cu")]
    headers = sorted(str(path.relative_to(ROOT)) for path in others)
    flags = (
        ["/O2", "/std:c++17"]
        if sys.platform == "win32"
        else [
            "-O3",
            "-g0",
            "-std=c++17",
            "-fvisibility=hidden",
            "-ffp-contract=off",  # each instruction set rounds where its code says, and equal keys alike
            "-Wno-uninitialized",
            "-Wno-maybe-uninitialized",
        ]
    )
    library = CppExtension(
        "dualedit_kernels._C",
        sources,
        depends=headers,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI), ("Py_LIMITED_API", "0x030A0000")],
        extra_compile_args={"cxx": flags},
        py_limited_api=True,
        optional=True,
    )
    return [library], {"build_ext": Build}  # which says so where there is no ninja, and does without


EXTENSIONS, COMMANDS = extension()
setup(
    packages=find_packages(include=["dualedit_kernels", "dualedit_kernels.*"]) + find_packages("python"),
    package_dir={"dualedit_kernels": "dualedit_kernels", "dualedit": "python/dualedit"},
    package_data={
        "dualedit_kernels": ["py.typed"],
        "dualedit": ["py.typed"]
        + [f"toy/weights/**/*.{end}" for end in ("safetensors", "json", "txt", "jinja")]
        + ["training/launch/*.yaml", "smol/weights/*.safetensors", "datasets/facts.schema.json"]
        + [f"smol/weights/editors/*/*.{end}" for end in ("safetensors", "json")],
    },
    ext_modules=EXTENSIONS,
    cmdclass=COMMANDS,
    # The library does not use Python's C API beyond its limited part.
    options={"bdist_wheel": {"py_limited_api": "cp310"}, "build_ext": {"build_temp": "build/objects"}}
    if EXTENSIONS
    else {},
)
