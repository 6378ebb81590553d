"""What other types of SR are like, for SRs that imitate them: one table.

The daemon's model enforces what is about storage: sizes, formats, accounting, chains, what dies with a disk. The SMAPIv1 plug-in enforces what is
about SMAPIv1: which capabilities xapi is told, which commands are there at all. Both, the installer and the command line read this table.

A personality with ``+revert`` behind its name is the same type with VDI_REVERT, as the design of VDI.revert promises it for the
types that can clone; no stock driver has it so far. It then reverts the formats that the table says, and answers "not implemented" for the others.

Sources: the CAPABILITIES lists, size limits (2 MiB to 2040 GiB for VHD) and the longest chain (30) of xapi-project/sm and xcp-ng/sm. Simplified:
the space that a format needs for its own metadata counts as nothing; an array is no particular product.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from simsr.errors import UnknownPersonality

__all__ = ["Format", "Personality", "PERSONALITIES", "SIM", "find_personality", "personality_names"]

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40

REVERT_SUFFIX = "+revert"


@dataclass(frozen=True)
class Format:
    """An image format of disks. ``clones``: it has snapshots and clones. ``reverts``: a type with VDI_REVERT reverts it.

    Sizes are bytes; ``size_unit_bytes`` is what sizes are rounded up to.
    """

    clones: bool
    reverts: bool
    size_unit_bytes: int
    size_min_bytes: int
    size_max_bytes: int


VHD = Format(True, True, 2 * MIB, 2 * MIB, 2040 * GIB)
VHD_ON_LVM = replace(VHD, size_unit_bytes=4 * MIB)
QCOW2 = Format(True, False, 64 << 10, MIB, 16 * TIB)
RAW_FILE = Format(False, False, 512, 512, 16 * TIB)
RAW_VOLUME = Format(False, False, 4 * MIB, 4 * MIB, 16 * TIB)
LUN = Format(False, False, 512, 512, 64 * TIB)
ARRAY_VOLUME = Format(True, True, MIB, MIB, 256 * TIB)
OWN = Format(True, True, 512, 512, 1 << 48)


@dataclass(frozen=True)
class Personality:
    """A type of SR.

    ``driver``: the executable that xapi knows the real one by, None if there is none. ``capabilities``: as the real driver prints
    them. ``formats``: those that a disk may have; the first is the one it gets unless its sm_config says otherwise. ``thick``: a disk takes its
    whole size from the SR when it is made, in units of ``allocation_unit_bytes``. ``chain_max``: at this length a chain takes no further
    snapshot; None: there is no such limit. ``read_only``: hosts attach disks for reading only. ``snapshots_die``: deleting a disk deletes its snapshots.
    ``attach``: what real drivers answer to vdi_attach: a ``tapdisk`` in front, a block ``device``, a ``file``, or an ``nbd`` socket.
    """

    name: str
    description: str
    driver: str | None
    capabilities: tuple[str, ...]
    formats: dict[str, Format] = field(default_factory=lambda: {"vhd": VHD})
    thick: bool = False
    allocation_unit_bytes: int = 4096
    chain_max: int | None = 30
    read_only: bool = False
    snapshots_die: bool = False
    attach: str = "tapdisk"
    content_type: str = ""

    @property
    def can_revert(self) -> bool:
        return "VDI_REVERT" in self.capabilities

    @property
    def could_revert(self) -> bool:
        """Whether there is a variant with ``+revert``: it takes a clone to revert to."""
        return "VDI_CLONE" in self.capabilities and any(form.reverts for form in self.formats.values())

    def describe(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return asdict(self) | {"capabilities": list(self.capabilities), "formats": {n: asdict(f) for n, f in self.formats.items()}}


_BASE = "VDI_CREATE VDI_DELETE VDI_ATTACH VDI_DETACH "
_FILE = (
    "SR_PROBE SR_UPDATE VDI_CLONE VDI_SNAPSHOT VDI_RESIZE VDI_MIRROR VDI_GENERATE_CONFIG ATOMIC_PAUSE VDI_CONFIG_CBT"
    " VDI_ACTIVATE VDI_DEACTIVATE THIN_PROVISIONING "
)
_EXT = _FILE + "SR_SUPPORTS_LOCAL_CACHING VDI_UPDATE VDI_RESET_ON_BOOT/2 VDI_READ_CACHING"
_NFS = _FILE + "SR_CACHING VDI_UPDATE VDI_RESET_ON_BOOT/2 VDI_READ_CACHING"
_LVM = (
    "SR_PROBE SR_UPDATE SR_TRIM VDI_MIRROR VDI_CLONE VDI_SNAPSHOT VDI_RESIZE ATOMIC_PAUSE VDI_RESET_ON_BOOT/2 VDI_UPDATE"
    " VDI_CONFIG_CBT VDI_ACTIVATE VDI_DEACTIVATE "
)
_SAN = _LVM + "SR_METADATA SR_CACHING VDI_GENERATE_CONFIG"
_CLUSTER = (
    "SR_PROBE SR_UPDATE VDI_UPDATE VDI_CLONE VDI_SNAPSHOT VDI_RESIZE VDI_MIRROR VDI_GENERATE_CONFIG VDI_RESET_ON_BOOT/2"
    " ATOMIC_PAUSE VDI_ACTIVATE VDI_DEACTIVATE"
)
_ZFS = (
    "SR_UPDATE VDI_CLONE VDI_SNAPSHOT VDI_RESIZE VDI_MIRROR VDI_GENERATE_CONFIG ATOMIC_PAUSE VDI_CONFIG_CBT VDI_ACTIVATE"
    " VDI_DEACTIVATE THIN_PROVISIONING"
)
_LINSTOR = (
    "SR_UPDATE VDI_UPDATE VDI_ACTIVATE VDI_DEACTIVATE VDI_CLONE VDI_MIRROR VDI_RESIZE VDI_SNAPSHOT VDI_GENERATE_CONFIG ATOMIC_PAUSE"
)
_ARRAY = (
    "SR_PROBE SR_UPDATE VDI_CLONE VDI_SNAPSHOT VDI_REVERT VDI_RESIZE VDI_UPDATE VDI_ACTIVATE VDI_DEACTIVATE LARGE_VDI THIN_PROVISIONING"
)
_SIM = (
    "SR_PROBE SR_UPDATE VDI_ACTIVATE VDI_DEACTIVATE VDI_UPDATE VDI_INTRODUCE VDI_SNAPSHOT VDI_CLONE VDI_REVERT VDI_RESIZE"
    " VDI_RESIZE_ONLINE VDI_RESET_ON_BOOT/2 VDI_CONFIG_CBT LARGE_VDI THIN_PROVISIONING"
)

_FILES = {"vhd": VHD, "qcow2": QCOW2, "raw": RAW_FILE}
_VOLUMES = {"vhd": VHD_ON_LVM, "qcow2": replace(QCOW2, size_unit_bytes=4 * MIB), "raw": RAW_VOLUME}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _file(name: str, driver: str, description: str, capabilities: str) -> Personality:
    return Personality(name, description, driver, _words(_BASE + capabilities), _FILES)


def _lvm(name: str, driver: str, description: str, capabilities: str) -> Personality:
    return Personality(
        name, description, driver, _words(_BASE + capabilities), _VOLUMES, thick=True, allocation_unit_bytes=4 * MIB
    )


def _luns(name: str, driver: str, description: str, capabilities: str) -> Personality:
    return Personality(
        name, description, driver, _words(capabilities), {"raw": LUN}, thick=True, allocation_unit_bytes=512, chain_max=None,
        attach="device",
    )  # fmt: skip


SIM = Personality(
    "sim", "simsr's own: no limits, every operation", None, _words(_BASE + _SIM), {"own": OWN}, chain_max=None, attach="nbd"
)

PERSONALITIES = {
    personality.name: personality
    for personality in (
        SIM,
        _file("file", "FileSR", "files in a directory", _FILE),
        _file("ext", "EXTSR", "files on a local ext file system", _EXT),
        _file("nfs", "NFSSR", "files on an NFS share", _NFS),
        _file("smb", "SMBSR", "files on an SMB share", _NFS),
        _lvm("lvm", "LVMSR", "volumes of a local volume group", _LVM),
        _lvm("lvmoiscsi", "LVMoISCSISR", "volumes of a volume group on an iSCSI LUN", _SAN),
        _lvm("lvmohba", "LVMoHBASR", "volumes of a volume group on a fibre channel LUN", _SAN),
        _lvm("lvmofcoe", "LVMoFCoESR", "volumes of a volume group on an FCoE LUN", _SAN.replace("SR_CACHING ", "")),
        Personality(
            "iso", "a library of ISO images", "ISOSR", _words(_BASE + "SR_SCAN SR_ATTACH SR_DETACH"),
            {"raw": replace(RAW_FILE, size_unit_bytes=512)}, chain_max=None, read_only=True, attach="file", content_type="iso",
        ),
        _luns("udev", "udevSR", "devices plugged into the host; xapi makes and deletes none",
              "VDI_ATTACH VDI_DETACH VDI_INTRODUCE VDI_UPDATE SR_UPDATE"),
        _luns("hba", "HBASR", "a fibre channel LUN for each disk", _BASE + "SR_PROBE VDI_INTRODUCE"),
        _luns("iscsi", "RawISCSISR", "an iSCSI LUN for each disk", _BASE + "SR_PROBE VDI_INTRODUCE"),
        _file("cephfs", "CephFSSR", "files on CephFS (XCP-ng)", _CLUSTER),
        _file("glusterfs", "GlusterFSSR", "files on GlusterFS (XCP-ng)", _CLUSTER),
        _file("moosefs", "MooseFSSR", "files on MooseFS (XCP-ng)", _CLUSTER),
        _file("xfs", "XFSSR", "files on a local XFS file system (XCP-ng)", _EXT),
        _file("largeblock", "LargeBlockSR", "files on a disk with blocks of 4 KiB (XCP-ng)", _EXT),
        _file("zfs", "ZFSSR", "files on a ZFS dataset (XCP-ng)", _ZFS),
        _lvm("linstor", "LinstorSR", "replicated volumes (XCP-ng)", _LINSTOR),
        Personality(
            "array", "a storage array: its snapshots belong to their disk and go with it", None, _words(_BASE + _ARRAY),
            {"raw": ARRAY_VOLUME}, allocation_unit_bytes=MIB, chain_max=None, snapshots_die=True, attach="device",
        ),
    )
}  # fmt: skip


def personality_names() -> list[str]:
    """All names that `find_personality` knows, the variants with ``+revert`` behind their type."""
    names = []
    for personality in PERSONALITIES.values():
        names.append(personality.name)
        if personality.could_revert and not personality.can_revert:
            names.append(personality.name + REVERT_SUFFIX)
    return names


def find_personality(name: str) -> Personality:
    """Return the personality of that name. Raises `UnknownPersonality`, with the nearest name there is."""
    base = PERSONALITIES.get(name.removesuffix(REVERT_SUFFIX))
    if base is not None and name == base.name:
        return base
    if base is not None and base.could_revert and not base.can_revert:
        return replace(base, name=name, capabilities=(*base.capabilities, "VDI_REVERT"))
    if base is not None:
        reason = "it reverts as it is" if base.can_revert else "such an SR cannot clone, so it cannot revert"
        raise UnknownPersonality(name=name, hint=f"Use {base.name}: {reason}.")
    near = difflib.get_close_matches(name.lower(), personality_names(), n=1)
    meant = f"Did you mean {near[0]}? " if near else ""
    raise UnknownPersonality(name=name[:80], hint=meant + "'simsr personality list' shows them.")
