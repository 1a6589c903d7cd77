"""The commands on a folder of edits that need no model: listing, removing, noting, undoing, files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..records import moment, noted
from .saved_folder import (
    Saved,
    SavedEdit,
    note_saved,
    read_config,
    read_saved,
    record_of,
    records_of,
    remove_saved,
)


def plain(text: str) -> str:
    """A text of somebody else's on one line of the terminal, without what would steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def say(content: Any) -> None:
    """Print JSON."""
    print(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))


def heading(folder: Path, saved: Saved) -> str:
    """How many edits there are, by the method that holds them."""
    counts = Counter(edit.method for edit in saved.edits)
    count = len(saved.edits)
    plural = "" if count == 1 else "s"
    if len(counts) > 1:
        return f"{count} edits in {folder} ({', '.join(f'{n} {name}' for name, n in counts.most_common())})"
    return f"{count} {next(iter(counts), saved.method)} edit{plural} in {folder}"


def show_list(
    folder: Path,
    as_json: bool = False,
    text: str | None = None,
    tag: str | None = None,
    author: str | None = None,
    since: str | None = None,
    failed: bool = False,
    off: bool = False,
) -> None:
    """Print the edits of a folder, or those that fit what is asked for."""
    saved = read_saved(folder)
    first, wanted = moment(since, "--since"), None if text is None else text.casefold()
    chosen = [
        edit
        for edit in saved.edits
        if (wanted is None or wanted in f"{edit.prompt}\n{edit.target}\n{edit.note}".casefold())
        and (tag is None or tag in edit.tags)
        and (author is None or edit.author == author)
        and (first is None or edit.created >= first)
        and (edit.failed or not failed)
        and (not edit.enabled or not off)
    ]
    if as_json:
        edits = [edit.as_dict() for edit in chosen]
        say({"folder": str(folder), "method": saved.method, "base": saved.base, "bytes": saved.bytes,
             "notes": saved.notes, "edits": edits})  # fmt: skip
        return
    sizes = {
        "adapters": saved.bytes["own"],
        "segments": saved.bytes["segments"],
        "journal": saved.bytes["journal"],
    }
    told = ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())
    shown = "" if len(chosen) == len(saved.edits) else f", {len(chosen)} of them shown"
    print(f"{heading(folder, saved)}{shown}; {_size(sum(sizes.values()))} on the disk ({told})")
    print(
        f"Loaded: keys {_size(saved.bytes['keys'])}, always in memory; values "
        f"{_size(saved.bytes['values'])}, in memory or, with a budget, as far as it goes and else on the disk"
    )
    for note in saved.notes:
        print(f"Note: {note}")
    if chosen:
        _print_table(chosen)


def _print_table(edits: Sequence[SavedEdit]) -> None:
    rows = [("id", "question", "answer", "radius", "stored", "method", "check", "by", "tags", "note")]
    rows += [
        (
            str(e.id), e.prompt, e.target, f"{e.radius:.3g}", e.created, e.method, e.check, e.author,
            ", ".join(e.tags), e.note,
        )
        for e in edits
    ]  # fmt: skip
    rows = [tuple(map(plain, row)) for row in rows]
    filled = [i for i in range(len(rows[0])) if i < 7 or any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in filled}
    for row in rows:
        print("  ".join(row[i].ljust(widths[i]) for i in filled).rstrip())


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def show(folder: Path, edit_id: int, as_json: bool = False, picture: Path | None = None) -> None:
    """Print all that is noted about an edit; write its picture, or else its thumbnail, to a file."""
    record = record_of(folder, edit_id)
    edit = next(edit for edit in read_saved(folder).edits if edit.id == edit_id)
    if picture is not None:
        _write_picture(picture, edit_id, record)
    if as_json:
        say({**record, **edit.as_dict()})
        return
    shown = {**edit.as_dict(), **{n: v for n, v in record.items() if n not in ("picture", "thumbnail")}}
    for name, value in shown.items():
        if value not in (None, "", [], ()):
            told = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=list)
            print(f"{plain(name)}: {plain(told)}")


def _write_picture(file: Path, edit_id: int, record: dict[str, Any]) -> None:
    from ..models.images import noted_picture

    image = noted_picture(record) or noted_picture(record, thumbnail=True)
    if image is None:
        raise ValueError(f"edit {edit_id} has no picture.")
    try:
        image.save(file)
    except (ValueError, KeyError) as error:
        raise ValueError(f"--picture {file}: {error}.") from error


def tell(as_json: bool, words: str, **facts: Any) -> None:
    """Print what was done, in words or as JSON."""
    if as_json:
        say(facts)
    else:
        print(words)


def remove(folder: Path, edit_ids: Sequence[int], as_json: bool = False) -> None:
    """Forget edits of a saved folder."""
    read_config(folder)
    left = 0
    for edit_id in edit_ids:
        left = remove_saved(folder, edit_id)
        if not as_json:
            print(f"edit {edit_id} is removed; {left} left in {folder}")
    if as_json:
        say({"removed": list(edit_ids), "left": left})


def switch(folder: Path, edit_id: int, on: bool, as_json: bool = False) -> None:
    """Let an edit answer, or not."""
    note_saved(folder, edit_id, {"disabled": None if on else True})
    if as_json:
        say({"id": edit_id, "disabled": not on})
        return
    print(f"edit {edit_id} in {folder} is {'on' if on else 'off: it answers nothing until it is enabled'}")


def annotate(
    folder: Path,
    edit_id: int,
    author: str | None,
    note: str | None,
    tags: Sequence[str] | None,
    expires: str | None,
    as_json: bool = False,
) -> None:
    """Change what people noted about an edit; an empty text takes it away."""
    changed: dict[str, Any] = noted(
        author, note, None if tags is None else [t for t in tags if t], expires or None
    )
    if expires == "":
        changed["expires"] = None
    if not changed:
        raise ValueError("nothing to note: pass --author, --note, --tag or --expires.")
    note_saved(folder, edit_id, changed)
    tell(as_json, f"noted with edit {edit_id} in {folder}", id=edit_id, noted=changed)


def step(folder: Path, kind: str, as_json: bool = False) -> None:
    """Take the last change of a folder back, or do the one that was taken back last again."""
    from ..folder.undoing import step as work

    read_config(folder)
    words = {"add": "is stored", "remove": "is removed", "note": "is noted otherwise"}
    changes = work(folder, kind)
    if as_json:
        say([{"id": change["id"], "change": change["op"]} for change in changes])
        return
    for change in changes:
        print(f"edit {change['id']} {words[change['op']]}")


def export(folder: Path, file: Path, as_json: bool = False) -> None:
    """Write all edits to one file of JSON lines, with their pictures where they are kept."""
    from ..exchange import write_export

    records = records_of(folder)
    write_export(file, records)
    kept = sum("picture" in record for _, record in records)
    words = f"{len(records)} edits in {file}, {kept} of them with their whole pictures"
    tell(as_json, words, file=str(file), edits=len(records), pictures=kept)


def verify(folder: Path, as_json: bool = False) -> None:
    """Read every byte of a folder and compare it with what was written."""
    from ..folder.verifying import verify as work

    read_config(folder)
    report = work(folder)
    if as_json:
        say(report)
        return
    edits = ", ".join(f"{count} in {plain(name)}" for name, count in report["edits"].items())
    print(f"{folder} is whole: {edits}; {report['commits']} commits since its files were written")
    for note in report["notes"]:
        print(f"Note: {note}")


def migrate(folder: Path, as_json: bool = False) -> None:
    """Give a folder a manifest of what is in it."""
    from ..folder.sealing import migrate as work
    from ..version import __version__

    done = work(folder, __version__)
    words = f"{folder} {'has a manifest now' if done else 'has a manifest that fits already'}"
    tell(as_json, words, folder=str(folder), changed=done)


def compact(folder: Path, as_json: bool = False) -> None:
    """Put all edits into the adapters' own files."""
    from ..storage import compact_edits

    commits = compact_edits(folder)
    words = f"{folder}: {commits} commits are in the adapters' own files now"
    tell(as_json, words, folder=str(folder), commits=commits)
