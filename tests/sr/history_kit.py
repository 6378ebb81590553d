"""Kit of the tests of histories: short names for what `Repository.history` and `wishes` do, and the tree as text."""

from __future__ import annotations

from simsr.sr.history import FOLLOW, REDO, UNDO
from simsr.sr.tree import describe_tree


def go(sr, node, mode="reset", **options):
    """Carry out one wish; ``live``, ``op_id`` and ``expected`` go to the history."""
    how = {key: options.pop(key) for key in ("live", "op_id", "expected") if key in options}
    return sr.history.carry_out([sr.wishes.one(node, mode, **options)], **how)[0]


def go_together(sr, node, mode="reset", **options):
    how = {key: options.pop(key) for key in ("live", "op_id", "expected") if key in options}
    return sr.history.carry_out(sr.wishes.group(node, mode, **options), **how)


def follow(sr, node, **options):
    return go(sr, node, FOLLOW, **options)


def undo(sr, disk, group=False, **how):
    return sr.history.carry_out(sr.history.undo_wishes(disk, UNDO, group), **how)[0]


def redo(sr, disk, group=False, **how):
    return sr.history.carry_out(sr.history.undo_wishes(disk, REDO, group), **how)[0]


def tips(sr, disk):
    """The tips of ``disk``, the oldest first."""
    found = sr.catalogue.tips_of.get(disk.uuid, {}).values()
    return sorted(found, key=lambda tip: (tip.meta["snapshot_time"], tip.volume.ident))


def drawn(sr, disk) -> list[str]:
    """The tree of ``disk``, a line a node: one dot a level, the name; ``*`` behind the head: it is not what its base is."""
    described = describe_tree(sr.store, sr.catalogue, disk)
    depth, lines = {None: -1}, []
    for node in described["nodes"]:
        depth[node["id"]] = depth[node["parent"]] + 1
        name = {"head": "HEAD" + "*" * described["dirty"], "ghost": f"({node['name']})", "tip": "tip"}.get(node["kind"], node["name"])
        lines.append("." * depth[node["id"]] + name)
    return lines
