"""Build of the packages and of the optional C++ library; the metadata is in pyproject.toml.

The library is compiled against the stable ABI of libtorch, so one file loads on every torch from 2.11 on. It
is optional: without torch, without a compiler, or with DUALEDIT_NO_BUILD=1 the install succeeds, says what
was left out and why, and every operator runs in plain PyTorch.

Environment:
    DUALEDIT_NO_BUILD=1   do not compile
    CXX                   the C++ compiler
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
STABLE_ABI = "0x020b000000000000"  # torch 2.11


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


def extension():
    """(ext_modules, cmdclass) of the C++ library; both empty if it cannot be built."""
    reason = why_not()
    if reason is not None:
        note(f"the C++ library is NOT built: {reason}. Everything works without it, in plain PyTorch.")
        return [], {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        """Says in words what happened; a failure leaves the library out (it is optional)."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                self.leave_out(error)

        def build_extension(self, ext):
            try:
                super().build_extension(ext)
            except Exception as error:
                self.leave_out(error)
            else:
                note("the C++ library is built.")

        def leave_out(self, error):
            note(f"the C++ library is NOT built: {error}. Everything works without it, in plain PyTorch.")

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    flags = (
        ["/O2", "/std:c++17"]
        if sys.platform == "win32"
        else [
            "-O3",
            "-g0",
            "-std=c++17",
            "-fvisibility=hidden",
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
    return [library], {"build_ext": Build.with_options(use_ninja=False)}


EXTENSIONS, COMMANDS = extension()
setup(
    packages=find_packages(include=["dualedit_kernels", "dualedit_kernels.*"]) + find_packages("python"),
    package_dir={"dualedit_kernels": "dualedit_kernels", "dualedit": "python/dualedit"},
    package_data={
        "dualedit": [f"demo/weights/**/*.{end}" for end in ("safetensors", "json", "txt", "jinja")]
    },
    ext_modules=EXTENSIONS,
    cmdclass=COMMANDS,
    # The library does not use Python's C API beyond its limited part.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
)
