"""The part of the control API about what disks were: snapshots, clones, reverts in all modes, undo and redo, tips, trees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import trio
from fastapi import APIRouter, Response
from pydantic import AfterValidator, BaseModel, Field

from simsr.daemon.api_parts import Body, Reference, timed
from simsr.daemon.host import Host, Mounted
from simsr.daemon.reverting import Reverting
from simsr.daemon.walks import Walks
from simsr.errors import BadRequest, NoVmSnapshots
from simsr.sr.history import Reverted, Wish
from simsr.sr.repository import GROUP_MAX, TEXT_MAX, check_uuid
from simsr.sr.tree import describe_tree
from simsr.sr.vdi import Vdi

__all__ = ["history_router"]

VmUuid = Annotated[str, AfterValidator(check_uuid)]
Text = Annotated[str, Field(max_length=4096)]
Label = Annotated[str, Field(max_length=TEXT_MAX)]
Describe = Callable[[Host, Vdi], dict]


class Descend(Body):
    name: Label | None = None
    description: Label | None = None
    uuid: Text | None = None
    sm_config: dict[str, str] | None = None


class Snapshot(Descend):
    group: Annotated[str, Field(min_length=1, max_length=256, description="snapshots with the same stamp can be reverted to together")] | None = None
    vm: Annotated[str, AfterValidator(check_uuid), Field(description="uuid of the VM that snapshots with this stamp are of")] | None = None


class GroupSnapshot(Body):
    vdis: Annotated[list[Text], Field(min_length=2, max_length=GROUP_MAX, description="disks of one SR")]
    name: Label | None = None


class VmSnapshot(Body):
    vdis: Annotated[list[Text], Field(min_length=1, max_length=GROUP_MAX, description="disks of one SR; none: those of its last snapshot")] | None = None
    name: Text | None = None


class Pin(Body):
    name: Label | None = None
    description: Label = ""


class _Change(Body):
    """What every request has that changes what a disk is."""

    live: Literal["hang", "disconnect", "error"] | None = Field(None, description="below clients that stay attached; for tests only")
    live_ms: Annotated[int, Field(ge=0, le=60_000, description="how long their requests wait or fail at least")] = 0
    dry_run: bool = Field(False, description="say what would become of it, and change nothing")
    may_lose: bool = Field(True, description="false: refuse with WouldLose if a snapshot, a tip or unsaved content would go")
    op_id: Annotated[str, Field(min_length=1, max_length=64, description="repeated with the same one it is done once")] | None = None
    expected: dict[str, int] | None = Field(None, description="uuid -> gen; GroupChanged if the disk has another one by now")


class VmRevert(_Change):
    mode: Literal["reset", "follow", "commit"] = "reset"
    discard: bool = Field(False, description="and the snapshot goes")
    prune: bool = Field(False, description="and the disk's snapshots and tips that descend from it go")
    keep_size: bool = Field(False, description="a disk that is larger than the snapshot stays so; the rest reads as zeros")


class Revert(VmRevert):
    group: bool = Field(False, description="all disks that were snapshotted together with it; all or none")
    target: Text | None = Field(None, description="uuid of the disk, if not the one the snapshot was taken of")


class VmUndo(_Change):
    pass


class Undo(_Change):
    group: bool = Field(False, description="all disks that were reverted together with it; all or none")


class GoingOut(BaseModel):
    uuid: str
    name: str
    kind: str = Field(description="snapshot or tip")
    time: str
    exclusive_bytes: int = Field(description="what nobody else holds: letting go of it, and of nothing else, gives back so much")


class MemberOut(BaseModel):
    vdi: str
    name: str
    gen: int
    mode: str
    changed: bool
    size_changed: bool
    size_bytes: int = Field(description="of the disk, afterwards")
    tip: str | None = Field(description="uuid of the tip that holds what the head was; with dry_run: of none that will be")
    removed: list[str] = Field(description="uuids of the snapshots and tips that went; undo brings them back while they are kept")
    lost: bool = Field(description="what the head was is gone, because the SR keeps no tips")
    unsaved_bytes: int | None = Field(description="with dry_run: in how much the head differs from the node it descends from; null if none is there")
    going: list[GoingOut] | None = Field(description="with dry_run: what would go")


class ChangeOut(BaseModel):
    vdi: Any
    changed: bool
    size_changed: bool
    dry_run: bool
    members: list[MemberOut] = Field(description="the disk, or all disks of the group")


class NodeOut(BaseModel):
    id: int
    parent: int | None = Field(description="id of the node that it descends from")
    kind: str = Field(description="snapshot, tip, head; ghost: replaced by a commit; disk: of another disk's history")
    uuid: str
    name: str
    time: str | None
    size_bytes: int
    used_bytes: int
    of: str | None = Field(description="uuid of the disk")
    consistency: str | None = Field(description="of a tip: clean, or crash: the disk was left without saying so")
    group: str | None


class StepOut(BaseModel):
    mode: str
    time: str
    disks: int


class TreeOut(BaseModel):
    vdi: str
    name: str
    gen: int
    base: str | None = Field(description="uuid of the node that the head descends from")
    dirty: bool = Field(description="whether the head is not what its base is")
    nodes: list[NodeOut] = Field(description="parents first")
    undo: list[StepOut] = Field(description="the next one first")
    redo: list[StepOut]


def history_router(host: Host, walks: Walks, vdi_out: type[BaseModel], describe: Describe) -> APIRouter:
    """The routes, for one host. ``describe`` gives what a ``vdi_out`` holds."""
    router = APIRouter()
    _add_making(router, host, vdi_out, describe)
    _add_making_of_groups(router, host, vdi_out, describe)
    _add_reverting(router, host, walks, describe)
    _add_looking(router, host, vdi_out, describe)
    return router


def _refuse_taken(host: Host, body: Descend | None) -> dict[str, Any]:
    """What the body says. Raises `VdiExists`, `BadRequest`."""
    host.refuse_known(body.uuid if body else None)
    return body.model_dump() if body else {}


def _add_making(router: APIRouter, host: Host, vdi_out: type[BaseModel], describe: Describe) -> None:
    @router.post("/v1/vdis/{vdi}/snapshot", response_model=vdi_out, status_code=201)
    async def snapshot(vdi: Reference, response: Response, body: Snapshot | None = None) -> dict:
        """Keep the content of a VDI as it is now, attached or not."""
        began = trio.current_time()
        mounted, found = host.find_vdi(vdi)
        new = mounted.repository.snapshot(found, **_refuse_taken(host, body))
        await mounted.engine.flush()
        timed(response, began)
        return describe(host, new)

    @router.post("/v1/vdis/{vdi}/clone", response_model=vdi_out, status_code=201)
    async def clone(vdi: Reference, response: Response, body: Descend | None = None) -> dict:
        """Make a disk with the content of a VDI."""
        began = trio.current_time()
        mounted, found = host.find_vdi(vdi)
        new = mounted.repository.clone(found, **_refuse_taken(host, body))
        host.added(new)
        await mounted.engine.flush()
        timed(response, began)
        return describe(host, new)


def _add_making_of_groups(router: APIRouter, host: Host, vdi_out: type[BaseModel], describe: Describe) -> None:
    class GroupOut(BaseModel):
        group: str
        snapshots: list[vdi_out]

    async def take(found: list[tuple[Mounted, Vdi]], name: str | None, vm: str | None, response: Response) -> dict:
        began, mounted = trio.current_time(), found[0][0]
        if any(other is not mounted for other, _ in found):
            raise BadRequest(what="the group", reason="its disks are in different SRs, which have no moment in common")
        new = mounted.repository.snapshot_group([vdi for _, vdi in found], name=name, vm=vm)
        await mounted.engine.flush()
        timed(response, began)
        return {"group": new[0].meta["group"]["id"], "snapshots": [describe(host, one) for one in new]}

    @router.post("/v1/snapshots", response_model=GroupOut, status_code=201)
    async def snapshot_group(body: GroupSnapshot, response: Response) -> dict:
        """Snapshot several disks of one SR at one moment: all or none."""
        return await take([host.find_vdi(reference) for reference in body.vdis], body.name, None, response)

    @router.post("/v1/vms/{vm}/snapshot", response_model=GroupOut, status_code=201)
    async def snapshot_vm(vm: VmUuid, response: Response, body: VmSnapshot | None = None) -> dict:
        """Snapshot the disks of a VM at one moment: all or none."""
        body = body or VmSnapshot()
        if body.vdis is not None:
            found = [host.find_vdi(reference) for reference in body.vdis]
        else:
            mounted = _home(host, vm)
            found = [(mounted, vdi) for vdi in mounted.repository.wishes.disks_of_vm(vm)]
        return await take(found, body.name, vm, response)


def _home(host: Host, vm: str) -> Mounted:
    """The SR with the snapshots of a VM. Raises `NoVmSnapshots`; `BadRequest` if there are several."""
    found = [mounted for mounted in host.mounted.values() if mounted.repository.wishes.of_vm(vm)]
    if not found:
        raise NoVmSnapshots(name=vm)
    if len(found) > 1:
        reason = "its disks are in different SRs, which have no moment in common; name a snapshot in each, with its group"
        raise BadRequest(what=f"VM {vm}", reason=reason)
    return found[0]


def _add_reverting(router: APIRouter, host: Host, walks: Walks, describe: Describe) -> None:
    reverting = Reverting(host)

    def answer(body: _Change, disk: Vdi, results: list[Reverted], members: list[dict]) -> dict:
        of_it = next((result for result in results if result.vdi is disk), results[0])
        return {
            "vdi": describe(host, of_it.vdi), "changed": of_it.changed, "size_changed": of_it.size_changed, "dry_run": body.dry_run,
            "members": members,
        }  # fmt: skip

    def answered(reference: str, mode: str, body: _Change) -> dict | None:
        """The answer to a request that is repeated. What it names may have gone with the first one."""
        for mounted in host.mounted.values() if body.op_id is not None else ():
            if results := mounted.repository.history.answers_to(body.op_id, mode):
                disk = next((result.vdi for result in results if result.vdi.uuid == reference), results[0].vdi)
                return answer(body, disk, results, [_member(result) for result in results])
        return None

    async def change(mounted: Mounted, disk: Vdi, wishes: list[Wish], body: _Change, response: Response) -> dict:
        began = trio.current_time()
        if body.dry_run:
            results = mounted.repository.history.plan(wishes)
            members = [await _planned(walks, mounted, result) for result in results]
        else:
            results = await reverting.carry_out(
                mounted, wishes, live=body.live, live_ms=body.live_ms, op_id=body.op_id, expected=body.expected, may_lose=body.may_lose
            )
            members = [_member(result) for result in results]
            timed(response, began)
        return answer(body, disk, results, members)

    @router.post("/v1/vdis/{vdi}/revert", response_model=ChangeOut)
    async def revert(vdi: Reference, response: Response, body: Revert | None = None) -> dict:
        """Take the disk of this snapshot back to it, or another of the modes; uuid, location and name of the disk stay."""
        body = body or Revert()
        if known := answered(vdi, body.mode, body):
            return known
        mounted, node = host.find_vdi(vdi)
        if body.group:
            if body.target is not None:
                raise BadRequest(what="target", reason="each disk of a group goes back to the snapshot that was taken of it")
            return await revert_group(mounted, node, body, response)
        target = None if body.target is None else check_uuid(body.target)
        wishes = [mounted.repository.wishes.one(node, body.mode, target=target, **_modifiers(body))]
        return await change(mounted, wishes[0].disk, wishes, body, response)

    async def revert_group(mounted: Mounted, node: Vdi, body: VmRevert, response: Response) -> dict:
        wishes = mounted.repository.wishes.group(node, body.mode, **_modifiers(body))
        return await change(mounted, next(wish.disk for wish in wishes if wish.node is node), wishes, body, response)

    @router.post("/v1/vms/{vm}/revert", response_model=ChangeOut)
    async def revert_vm(vm: VmUuid, response: Response, body: VmRevert | None = None) -> dict:
        """Take all disks of a VM back to its snapshots, if there is one group of them: all or none."""
        body = body or VmRevert()
        if known := answered(vm, body.mode, body):
            return known
        mounted = _home(host, vm)
        return await revert_group(mounted, mounted.repository.wishes.only_group_of_vm(vm), body, response)

    def taking_back(mode: str) -> None:
        @router.post(f"/v1/vdis/{{vdi}}/{mode}", response_model=ChangeOut, name=mode)
        async def take_back(vdi: Reference, response: Response, body: Undo | None = None) -> dict:
            body = body or Undo()
            if known := answered(vdi, mode, body):
                return known
            mounted, disk = host.find_vdi(vdi)
            if disk.is_a_snapshot:
                raise BadRequest(what=f"{mode} of VDI {disk.uuid}", reason="it is a snapshot; name the disk")
            wishes = mounted.repository.history.undo_wishes(disk, mode, body.group)
            return await change(mounted, disk, wishes, body, response)

        take_back.__doc__ = f"{mode.capitalize()} what was done to a disk last: a revert in any mode, or an undo of one."

        @router.post(f"/v1/vms/{{vm}}/{mode}", response_model=ChangeOut, name=f"{mode}_vm")
        async def take_vm_back(vm: VmUuid, response: Response, body: VmUndo | None = None) -> dict:
            body = body or VmUndo()
            if known := answered(vm, mode, body):
                return known
            mounted = _home(host, vm)
            wishes = mounted.repository.history.undo_wishes_of_vm(mounted.repository.wishes.disks_of_vm(vm), mode)
            return await change(mounted, wishes[0].disk, wishes, body, response)

        take_vm_back.__doc__ = f"{mode.capitalize()} what was done to the disks of a VM last, together or by one VM.revert of xapi."

    taking_back("undo")
    taking_back("redo")


def _modifiers(body: VmRevert) -> dict[str, bool]:
    return {"discard": body.discard, "prune": body.prune, "keep_size": body.keep_size}


def _member(result: Reverted) -> dict[str, Any]:
    return {
        "vdi": result.vdi.uuid, "name": result.vdi.name, "gen": result.vdi.gen, "mode": result.mode, "changed": result.changed,
        "size_changed": result.size_changed, "size_bytes": result.size_bytes, "tip": result.tip, "removed": list(result.removed),
        "lost": result.lost, "unsaved_bytes": None, "going": None,
    }  # fmt: skip


async def _planned(walks: Walks, mounted: Mounted, plan: Reverted) -> dict[str, Any]:
    """`_member` with how many bytes it is about; counting them looks at maps only."""
    repository = mounted.repository
    base, unsaved, going = repository.catalogue.node(plan.vdi.parent), None, []
    if base is not None:
        diff = await walks.run(mounted, lambda: repository.diff(base, plan.vdi))
        unsaved = sum(length for _, length, _ in diff.ranges)
    if plan.removed:
        survey = await walks.run(mounted, repository.survey)
        going = [
            {
                "uuid": space.meta["uuid"], "name": space.meta["name"], "kind": "tip" if "tip" in space.meta else "snapshot",
                "time": space.meta["snapshot_time"], "exclusive_bytes": repository.describe_volume_space(space)["exclusive_bytes"],
            }
            for space in survey.volumes
            if space.meta.get("uuid") in plan.removed and "role" not in space.meta
        ]  # fmt: skip
    return {**_member(plan), "tip": None, "unsaved_bytes": unsaved, "going": going}


def _add_looking(router: APIRouter, host: Host, vdi_out: type[BaseModel], describe: Describe) -> None:
    def disk_of(reference: str) -> tuple[Mounted, Vdi]:
        """The disk that is named, or the one that a snapshot or tip is of."""
        mounted, found = host.find_vdi(reference)
        return mounted, mounted.repository.get(found.snapshot_of) if found.is_a_snapshot else found

    @router.get("/v1/vdis/{vdi}/tree", response_model=TreeOut)
    async def show_tree(vdi: Reference) -> dict:
        """The snapshots and tips of a disk, what they descend from, where the head is, and what can be undone."""
        mounted, disk = disk_of(vdi)
        return describe_tree(mounted.repository.store, mounted.repository.catalogue, disk)

    @router.get("/v1/vdis/{vdi}/tips", response_model=list[vdi_out])
    async def list_tips(vdi: Reference) -> Iterable[dict]:
        """The tips of a disk, the oldest first."""
        mounted, disk = disk_of(vdi)
        tips = mounted.repository.catalogue.tips_of.get(disk.uuid, {}).values()
        return [describe(host, tip) for tip in sorted(tips, key=lambda tip: (tip.meta["snapshot_time"], tip.volume.ident))]

    @router.post("/v1/vdis/{vdi}/pin", response_model=vdi_out)
    async def pin_tip(vdi: Reference, response: Response, body: Pin | None = None) -> dict:
        """Make a snapshot of a tip; it keeps its uuid."""
        began = trio.current_time()
        mounted, tip = host.find_vdi(vdi)
        snapshot = mounted.repository.pin(tip, **(body.model_dump() if body else {}))
        await mounted.engine.flush()
        timed(response, began)
        return describe(host, snapshot)
