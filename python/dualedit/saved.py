"""What a model knows of the folder that its edits are saved in, and the two brought together."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from .folder import Damaged, View, Writer, read_folder
from .folder.journal import Kept
from .folder.manifest import WEIGHTS
from .folder.reading import UNREAD, newer, own_edits, own_radius
from .memory import EditMemory, MemoryGroup
from .memory.budget import Tiers
from .memory.filling import fill
from .memory.rows import Rows, file_of
from .memory.values import Spill, saved_tables
from .records import uid_of
from .runtime.context import runtime_of
from .tuners.adapter import EditAdapter, adapter_of
from .tuners.config import EditConfig

log = logging.getLogger("dualedit.storage")
_SAMPLED = 1 << 16  # values of an unchanged parameter that are looked at
Marks = dict[str, list[tuple]]


def places_of(names: Sequence[str]) -> dict[str, str]:
    """Adapter's name to its folder inside the saved one, as PEFT lays them out."""
    return {name: "" if name == "default" else name for name in names}


@dataclass(frozen=True)
class Origin:
    """The folder that a model's edits were loaded from or last saved to.

    Attributes:
        view: the folder as this model knows it.
        places: adapter's name to its folder inside.
        settings, params: of the adapters, as they are saved there.
        based: whether each adapter's own file holds edits.
    """

    view: View
    places: dict[str, str]
    settings: dict[str, str]
    params: Marks
    based: Mapping[str, bool] = ()  # type: ignore[assignment]

    def is_in(self, folder: Path) -> bool:
        """Whether this is the folder."""
        return self.view.folder.resolve() == folder.resolve()

    def refresh(self, model: PeftModel) -> tuple[int, View]:
        """Take over what others have saved; how many edits changed, and the folder as it is then."""
        found = newer(self.view)
        if found is None:
            view = read_folder(self.view.folder)
            return _compare(model, view, list(self.places)), view
        entries, view = found
        return sum(_take_entry(model, view, entry.changes) for entry in entries), view


def origin_of(model: PeftModel) -> Origin | None:
    """The folder that a model's edits are saved in; None: none yet."""
    runtime = runtime_of(model.get_base_model())
    return None if runtime is None else runtime.saved_in


def settle(model: PeftModel, origin: Origin, names: Sequence[str]) -> None:
    """Note that the edits of adapters are saved as they are."""
    base = model.get_base_model()
    runtime = runtime_of(base)
    assert runtime is not None
    runtime.saved_in = origin
    for name in names:
        adapter_of(base, name).group.first.settled()


# ---------------------------------------------------------------------- what others have saved


def take_over(model: PeftModel, writer: Writer, origin: Origin | None) -> None:
    """Bring what others have saved in a folder into a model's memories, before the model is saved there.

    Raises:
        ValueError: the folder holds edits that did not come from this model, nor this model's from it.
    """
    view = writer.view
    if view is None:
        return
    if origin is not None and origin.is_in(view.folder):
        was = origin.view.manifest
        if was is None or view.manifest is None or was.store == view.manifest.store:
            if was is not None and view.manifest is not None and was.generation == view.manifest.generation:
                for entry in writer.news:
                    _take_entry(model, view, entry.changes)
            elif was is not None or view.manifest is not None or _changed(origin.view, view):
                _compare(model, read_folder(view.folder), list(origin.places))
            return
    refuse_foreign(model, read_folder(view.folder))


def refuse_foreign(model: PeftModel, view: View) -> None:
    """Raise ValueError where a folder holds edits that a model does not have."""
    held = view.contents
    base = model.get_base_model()
    known = set()
    for name, config in model.peft_config.items():
        if isinstance(config, EditConfig):
            known |= {uid_of(record, i) for i, record in adapter_of(base, name).group.records().items()}
    lost = [
        (i, kept)
        for edits in held.values()
        for i, kept in edits.items()
        if uid_of(kept.record, i) not in known
    ]
    if lost:
        number, kept = lost[0]
        raise ValueError(
            f"folder={str(view.folder)!r} holds {len(lost)} edits that this model does not have (number "
            f"{number}, {kept.record.get('prompt', '')!r}). Load them first (load_edits), save to another "
            "folder, or pass overwrite=True to lose them."
        )


def _changed(before: View, now: View) -> bool:
    """Whether a folder without a journal holds other edits than it did."""
    return {n: list(e) for n, e in before.contents.items()} != {n: list(e) for n, e in now.contents.items()}


def _groups(model: PeftModel, names: Sequence[str]) -> dict[str, MemoryGroup]:
    return {name: adapter_of(model.get_base_model(), name).group for name in names}


def _take_entry(model: PeftModel, view: View, changes: Sequence[Mapping[str, Any]]) -> int:
    """Make the changes of somebody else's commit in a model's memories; how many were made."""
    made = 0
    groups = _groups(model, list(view.adapters))
    for change in changes:
        group, number = groups[change["adapter"]], change["id"]
        if change["op"] == "add":
            if number in group:
                _renumber(groups, group, number, view.highest_id)
            rows = _rows(model, view, change["adapter"], change["from"], number)
            group.add(rows, change["record"], number)
        elif change["op"] == "remove" and number in group:
            group.remove(number)
        elif change["op"] == "note" and number in group:
            if number in group.first.touched:
                continue  # changed here, too: what is here is saved later
            group.note(number, change["record"])
        group.first.settled([number])
        made += 1
    for group in groups.values():
        group.first.reserve(view.highest_id)
    return made


def _compare(model: PeftModel, view: View, names: Sequence[str]) -> int:
    """Make a model's memories what a folder holds, but for what was changed here; how many edits changed."""
    made = 0
    groups = _groups(model, names)
    for name, group in groups.items():
        theirs = view.contents.get(name, {})
        for number in group.ids():
            if number not in theirs and number not in group.first.touched:
                group.remove(number)
                group.first.settled([number])
                made += 1
        for number, kept in theirs.items():
            made += _take_edit(model, view, groups, name, number, kept)
        group.first.reserve(view.highest_id)
    return made


def _take_edit(
    model: PeftModel, view: View, groups: Mapping[str, MemoryGroup], name: str, number: int, kept: Kept
) -> int:
    group, uid = groups[name], uid_of(kept.record, number)
    touched = group.first.touched
    if number in group and uid_of(group.first.record(number), number) == uid:
        if number in touched or group.first.record(number) == kept.record:
            return 0
        group.note(number, kept.record)
    elif number not in group and touched.get(number) == uid:
        return 0  # removed here
    else:
        if number in group and number in touched:
            _renumber(groups, group, number, view.highest_id)
        elif number in group:
            group.remove(number)
        group.add(_rows(model, view, name, kept.source, number), kept.record, number)
    group.first.settled([number])
    return 1


def _renumber(groups: Mapping[str, MemoryGroup], group: MemoryGroup, number: int, highest: int) -> None:
    """Give an edit that is not saved yet another number: somebody else has saved one of this number."""
    new = max([highest + 1, *(each.next_id() for each in groups.values())])
    rows, record = group.rows(group.everything(), number), group.first.record(number)
    group.remove(number)
    group.first.settled([number])
    group.add(rows, record, new)
    log.warning("edit %d has number %d now: another process has saved an edit %d", number, new, number)


def _rows(model: PeftModel, view: View, name: str, source: int, number: int) -> dict[str, dict[str, Tensor]]:
    """An edit's rows out of a folder, as `MemoryGroup.add` takes them."""
    state = load_file(str(view.own_file(name, WEIGHTS) if source == 0 else view.segment(source)))
    prefix = "" if source == 0 else f"{name}:"
    keys = memory_keys(model, name)
    return {layer: Rows(state, prefix + key).edit(number) for layer, key in keys.items()}


def fill_adapter(model: PeftModel, name: str, own: Path, view: View | None, place: str) -> None:
    """Put a folder's edits on a model whose adapter was loaded without them; values stay in its files.

    Args:
        name: the adapter's on the model, whose settings have a budget.
        own: the adapter's own file.
        view: the folder; None: it is that file alone.
        place: the adapter's name in the folder.

    Raises:
        ValueError: tables that do not fit the model. Damaged: files that do not fit together.
    """
    adapter = adapter_of(model.get_base_model(), name)
    budget = adapter.config.budget
    assert budget is not None
    tiers, spill = Tiers(budget), Spill()
    edits = own_edits(own, False) if view is None else view.contents[place]
    tables = saved_tables(own)
    for layer, key in memory_keys(model, name).items():
        start = f"{key}."
        mine = {n.removeprefix(start): table for n, table in tables.items() if n.startswith(start)}
        if set(mine) != set(adapter.group.memories[layer].saved_tables):
            raise ValueError(f"{own} lacks tables of {layer}: it has {sorted(mine)}. Restore it from a copy.")
        segments: dict[int, Rows] = {}

        def rows_of(source: int, number: int, key: str = key, segments: dict[int, Rows] = segments) -> Any:
            assert view is not None
            if source not in segments:
                segments[source] = Rows(load_file(str(view.segment(source))), f"{place}:{key}")
            return segments[source].edit(number)

        try:
            fill(adapter.group.memories[layer], mine, edits, UNREAD, rows_of, tiers, spill)
        except (KeyError, IndexError, TypeError) as error:
            raise Damaged(
                f"{own}: the segments do not fit it ({error}). Restore the folder from a copy."
            ) from error
    adapter.group.tiers, adapter.group.spill = tiers, spill


# ---------------------------------------------------------------------- what is to be saved


def memory_keys(model: PeftModel, name: str) -> dict[str, str]:
    """Layer name to what stands in front of its memory's tables in an adapter's saved file."""
    tuner = adapter_of(model.get_base_model(), name).method.tuner_class
    return {
        layer: tuner._remove_adapter_name_from_key(f"{path}.edit_ids", name).removesuffix(".edit_ids")
        for layer, path in _memory_paths(model, name).items()
    }


def _memory_paths(model: PeftModel, name: str) -> dict[str, str]:
    """Layer name to the name of its memory as a module of the model."""
    memories = adapter_of(model.get_base_model(), name).group.memories
    layers = {id(memory): layer for layer, memory in memories.items()}
    return {
        layers[id(module)]: path
        for path, module in model.named_modules()
        if isinstance(module, EditMemory) and id(module) in layers
    }


def memory_state(model: PeftModel, names: Sequence[str]) -> dict[str, Tensor]:
    """The memories' part of a model's state, of adapters; of a trial where this thread is in one."""
    found = {}
    for name in names:
        paths = _memory_paths(model, name)
        for layer, tensors in adapter_of(model.get_base_model(), name).group.state().items():
            found |= {f"{paths[layer]}.{table}": tensor for table, tensor in tensors.items()}
    return found


def changes_of(
    model: PeftModel, origin: Origin, view: View, settings: Mapping[str, str], params: Marks
) -> list[dict[str, Any]] | None:
    """What a commit has to say about a model's edits; None: the adapters' files have to be written anew."""
    fits = view.manifest is not None and view.adapters == origin.places == places_of(list(settings))
    if not fits or settings != origin.settings or not _alike(origin.params, params):
        return None
    changes: list[dict[str, Any]] = []
    for name, group in _groups(model, list(origin.places)).items():
        for number, saved in sorted(group.first.touched.items()):
            record = group.first.record(number) if number in group else None
            uid = None if record is None else uid_of(record, number)
            what = {"adapter": name, "id": number}
            if saved is not None and uid != saved:
                changes.append({**what, "op": "remove"})
            if record is not None and uid != saved:
                snapshot = group.first.snapshot()
                radius = own_radius(float(snapshot.tables["radius"][snapshot.row_of(number)]))
                changes.append({**what, "op": "add", "radius": radius, "record": record})
            elif record is not None:
                changes.append({**what, "op": "note", "record": record})
        added = any(change["op"] == "add" and change["adapter"] == name for change in changes)
        # A loader that knows settings alone tells by the adapter's own file whether there are edits.
        if added and not dict(origin.based).get(name, True):
            return None
    return changes


def commit_rows(
    model: PeftModel, origin: Origin | None, changes: Sequence[Mapping[str, Any]]
) -> bytes | None:
    """The segment with the edits that changes add; None: they add none."""
    edits: dict[str, dict[int, dict[str, Tensor]]] = {}
    token_tables: dict[str, set[str]] = {}
    for name in dict.fromkeys(change["adapter"] for change in changes if change["op"] == "add"):
        adapter: EditAdapter = adapter_of(model.get_base_model(), name)
        snapshots = adapter.group.everything()
        numbers = [change["id"] for change in changes if change["op"] == "add" and change["adapter"] == name]
        keys = memory_keys(model, name)
        for number in numbers:
            for layer, rows in adapter.group.rows(snapshots, number).items():
                memory = f"{name}:{keys[layer]}"
                edits.setdefault(memory, {})[number] = rows
                token_tables[memory] = set(adapter.group.memories[layer].token_tables)
    return file_of(edits, token_tables) if edits else None


def marks_of(model: PeftModel, names: Sequence[str]) -> Marks:
    """By what it is seen whether adapters' own parameters have changed."""
    base = model.get_base_model()
    found: Marks = {}
    for name in names:
        marks = found[name] = []
        for layer_name, layer in adapter_of(base, name).layers.items():
            for container in layer.adapter_layer_names:
                held = getattr(layer, container)
                if name in held:
                    for key, parameter in held[name].named_parameters():
                        marks.append(
                            (layer_name, container, key, parameter, parameter._version, _digest(parameter))
                        )
    return found


def _digest(parameter: Tensor) -> tuple[int, int]:
    """A checksum of some of a parameter's values and of their sum; all of them where there are not many."""
    if parameter.device.type == "meta":
        return 0, parameter.numel()
    # Of a parameter in pieces (FSDP2) this process's piece.
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    flat = local.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLED)
    sample = flat[::step].float().cpu().contiguous()
    return zlib.crc32(sample.numpy().tobytes()), flat.numel()


def _alike(one: Marks, other: Marks) -> bool:
    def plain(marks: Marks) -> Any:
        return {n: [(a, b, c, id(p), v, d) for a, b, c, p, v, d in each] for n, each in marks.items()}

    return plain(one) == plain(other)
