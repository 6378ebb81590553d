"""What is done to SRs that no daemon has open: `simsr check` and `simsr salvage`. Nothing in them is changed.

A directory is that of one SR, or the root of a daemon with several. Both functions return what they found as JSON has it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from simsr.errors import BadRequest, SimsrError, StoreFormat
from simsr.sr.damage import damage_lines, vdi_of
from simsr.sr.hidden import BOOT_BASE, is_hidden
from simsr.store.check import Check, Problem
from simsr.store.node_table import MapMemory
from simsr.store.readonly import ReadOnlyDirectory
from simsr.store.salvage import Salvage, Saved
from simsr.store.volume import Volume

__all__ = ["check", "salvage", "CLEAN", "NOT_DONE", "CORRUPT", "LEAKS"]

CLEAN, NOT_DONE, CORRUPT, LEAKS = 0, 1, 2, 3
"""The outcome of a check, as the exit status of ``qemu-img check`` has it."""

Progress = Callable[[str, int, int], None]
"""Told what is being looked at, and how many bytes of how many are done."""


def _stores(path: str) -> list[str]:
    """The SR directories at ``path``. Raises `StoreFormat` if there are none, or it cannot be looked at; OSError."""
    try:
        names = os.listdir(path)
    except OSError as error:
        raise _no_store(path, error.strerror or str(error)) from None
    if any(name.startswith(("super.", "seg-", "table-", "map-")) for name in names):
        return [path]
    below = os.path.join(path, "sr")
    found = [os.path.join(below, name) for name in sorted(os.listdir(below)) if name[0] != "."] if "sr" in names else []
    found = [one for one in found if os.path.isdir(one)]
    if not found:
        raise _no_store(path, "there is neither an SR nor the root of a daemon with SRs in this directory")
    return found


def _no_store(path: str, reason: str) -> StoreFormat:
    error = StoreFormat(path=path, reason=reason)
    error.hint = "Name the root of a daemon, or the directory of an SR below it (ROOT/sr/UUID)."
    return error


# Check.


def check(path: str, progress: Progress) -> dict:
    """Check everything at ``path``. Raises `SimsrError` or OSError if that cannot be done."""
    stores = [_check_one(one, progress) for one in _stores(path)]
    outcomes = {store["outcome"] for store in stores}
    outcome = next(worst for worst in (CORRUPT, LEAKS, CLEAN) if worst in outcomes)
    return {"outcome": outcome, "stores": stores}


def _check_one(path: str, progress: Progress) -> dict:
    found = Check(ReadOnlyDirectory(path), MapMemory())
    try:
        for step in found.work():
            if step is not None:
                step()
            progress(path, found.scrub.bytes_done, max(found.scrub.bytes_total, found.scrub.bytes_done))
        store, scrub = found.store, found.scrub

        def lines(problems: list[Problem]) -> list[dict]:
            if store is None:
                return [{"vdi": None, "name": "", "offset": 0, "length": 0, "text": problem.text} for problem in problems]
            return [line for p in problems for line in damage_lines(store, p.volumes, p.offset, p.length, text=p.text)]

        return {
            "path": path,
            "uuid": str(store.uuid) if store else None,
            "name": store.meta.get("name", "") if store else "",
            "outcome": CORRUPT if found.corruptions else LEAKS if found.leaks else CLEAN,
            "vdis": sum(not is_hidden(volume.meta) for volume in store.volumes.values()) if store else 0,
            "nodes": scrub.nodes if scrub else 0,
            "blocks": scrub.blocks if scrub else 0,
            "bytes": scrub.bytes_done if scrub else 0,
            "damaged_blocks": scrub.damaged_blocks if scrub else 0,
            "damaged_nodes": scrub.damaged_nodes if scrub else 0,
            "corruptions": lines(found.corruptions),
            "leaks": lines(found.leaks),
        }
    finally:
        found.close()


# Salvage.


def salvage(path: str, out: str, progress: Progress) -> dict:
    """Copy everything that can be read at ``path`` into ``out``, which must be empty, or not there. Raises `SimsrError`, OSError."""
    stores = _stores(path)
    inside, outside = os.path.realpath(path), os.path.realpath(out)
    if os.path.commonpath((inside, outside)) == inside:
        raise BadRequest(what=f"output directory {out}", reason=f"it lies in {path}, where nothing may be changed")
    os.makedirs(out, mode=0o700, exist_ok=True)
    if os.listdir(out):
        raise BadRequest(what=f"output directory {out}", reason="it is not empty")
    report: dict = {"stores": []}
    for one in stores:
        try:
            report["stores"].append(_salvage_one(one, out, progress))
        except SimsrError as error:
            if len(stores) == 1:
                raise
            report["stores"].append({"path": one, "error": str(error), "notes": [], "vdis": [], "missing": []})
    lost = any("error" in store or store["missing"] or any(v["lost"] for v in store["vdis"]) for store in report["stores"])
    report["complete"] = not lost and not any(store["older_state"] for store in report["stores"])
    with open(os.path.join(out, "report.json"), "x") as file:
        json.dump(report, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    return report


def _salvage_one(path: str, out: str, progress: Progress) -> dict:
    found = Salvage(ReadOnlyDirectory(path), MapMemory())
    try:
        store, done = found.store, 0
        wanted = [volume for volume in store.volumes.values() if _is_worth_it(volume.meta)]
        total = sum(volume.mapped_bytes for volume in wanted)
        vdis = []
        for volume in wanted:
            base = ".at-boot" if is_hidden(volume.meta) else ""
            name = f"{vdi_of(volume)['vdi'].replace('/', '_').replace(' ', '-')}{base}.raw"
            saved = _write(found, volume, os.path.join(out, name), lambda count, done=done: progress(path, done + count, total))
            done += saved.data_bytes
            vdis.append(_describe(saved, name))
        return {
            "path": path, "uuid": str(store.uuid), "name": store.meta.get("name", ""), "state_after_record": found.rescued.seq,
            "older_state": found.rescued.is_older, "notes": found.notes, "second_copies": found.second_copies, "vdis": vdis,
            "missing": [{"volume": ident, "reason": reason} for ident, reason in sorted(found.rescued.missing.items())],
        }  # fmt: skip
    finally:
        found.close()


def _is_worth_it(meta: dict) -> bool:
    """Neither what an operation left half built, nor a snapshot whose data was destroyed."""
    return meta.get("role", BOOT_BASE) == BOOT_BASE and meta.get("type") != "cbt_metadata"


def _write(found: Salvage, volume: Volume, path: str, progress: Callable[[int], None]) -> Saved:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    written = 0

    def put(offset: int, data: memoryview) -> None:
        nonlocal written
        while data:
            count = os.pwrite(fd, data, offset)
            data, offset, written = data[count:], offset + count, written + count
        progress(written)

    try:
        os.ftruncate(fd, volume.size_bytes)
        saved = found.save(volume, put)
        os.fsync(fd)
    finally:
        os.close(fd)
    return saved


def _describe(saved: Saved, name: str) -> dict:
    meta = saved.volume.meta
    links = {key: meta.get(key) for key in ("snapshot_of", "snapshot_time", "family", "type", "description", "sm_config")}
    return {
        **vdi_of(saved.volume), "file": name, "size_bytes": saved.volume.size_bytes, **links, "data_bytes": saved.data_bytes,
        "lost_bytes": saved.lost_bytes, "lost": [{"offset": offset, "length": length} for offset, length in saved.lost],
    }  # fmt: skip
