"""Kit of the model's tests: a repository on a directory in memory, with a clock and uuids that are the same in every run.

`World` is one SR and what may happen to the machine below it. `photo` is everything that somebody could see of it, so two
photos compare whole states, and `unchanged` says that an operation that was refused left nothing behind.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from simsr.sr.repository import Repository
from simsr.sr.vdi import Vdi
from simsr.store.layout import Geometry
from simsr.store.memory import MemoryDirectory
from simsr.store.store import Store

TINY = Geometry(32, 2, 2)
"""30 data blocks and 8 KiB of records a segment, 4 entries a map node: a few writes reach every edge."""

WIDE = Geometry(256, 128, 4)
"""The record area of real stores, for metadata that does not fit into a tiny one."""

BLOCK = 4096
STYLES = ("none", "all", "some", "some", "some")
SR_UUID = "00000000-0000-4000-8000-000000000001"


class Kill(BaseException):
    """The process dies here. Not an `Exception`, so nothing in between takes it for an I/O error."""


class World:
    """A repository, its clock and its source of uuids, and the directory that it lives in."""

    def __init__(self, geometry: Geometry = TINY, name: str = "sr") -> None:
        self.directory = MemoryDirectory()
        self._ticks = 0
        self._uuids = random.Random("uuids")
        meta = {"uuid": SR_UUID, "name": name, "description": "", "sm_config": {}}
        store = Store.create(self.directory, bytes.fromhex(SR_UUID.replace("-", "")), geometry, meta)
        self.repository = Repository(store, self.now, self.new_uuid)

    def now(self) -> str:
        self._ticks += 1
        return f"2026-11-{21 + self._ticks // 86400:02}T{self._ticks // 3600 % 24:02}:{self._ticks // 60 % 60:02}:{self._ticks % 60:02}Z"

    def new_uuid(self) -> str:
        digits = f"{self._uuids.getrandbits(128):032x}"
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))

    @property
    def log(self):
        return self.repository.store.log

    def open(self, directory: MemoryDirectory) -> Repository:
        """Go on with what is in ``directory``."""
        self.directory = directory
        self.repository = Repository(Store.open(directory), self.now, self.new_uuid)
        check(self.repository)
        return self.repository

    def reopen(self) -> Repository:
        """Stop cleanly and start again."""
        self.repository.store.close()
        return self.open(self.directory)

    def kill(self) -> Repository:
        """The process dies, the machine lives."""
        return self.open(self.directory.after_kill())

    def cut(self, rng: random.Random, style: str = "none") -> Repository:
        """The machine loses power."""
        return self.open(self.directory.after_cut(rng, style))


def check(repository: Repository) -> None:
    repository._check()
    repository.store._check()


def content(vdi: Vdi) -> bytes:
    return vdi.volume.read_bytes(0, vdi.size_bytes)


def put(vdi: Vdi, offset: int, data: bytes) -> None:
    batch = [(offset, len(data), memoryview(data))]
    assert vdi.volume.write(batch) == 1


def fill(vdi: Vdi, tag: int, blocks: range | None = None) -> None:
    """Write content that no other ``tag`` has, to some blocks or to all."""
    rng = random.Random(tag)
    for block in blocks if blocks is not None else range(-(-vdi.size_bytes // BLOCK)):
        offset = block * BLOCK
        put(vdi, offset, rng.randbytes(min(BLOCK, vdi.size_bytes - offset)))


def zero(vdi: Vdi, offset: int, length: int) -> None:
    assert vdi.volume.write([(offset, length, None)]) == 1


Photo = dict[str, tuple[dict, bytes]]


def photo(repository: Repository) -> Photo:
    """Everything there is to see, tips too, the SR under the key ''."""
    own = repository.describe()
    for key in ("statistics", "space", "physical_size_bytes", "physical_utilisation_bytes"):
        del own[key]
    return {"": (own, b"")} | {
        uuid: (vdi.describe(), content(vdi)) for uuid, vdi in (*repository.vdis.items(), *repository.tips.items())
    }


def tree(repository: Repository) -> dict[int, dict]:
    """What is kept of each volume beside its content: the tree, what can be undone, hidden nodes."""
    return {ident: volume.meta for ident, volume in repository.store.volumes.items()}


@contextmanager
def unchanged(repository: Repository) -> Iterator[None]:
    """What happens inside changes nothing and logs nothing."""
    before, seq = (photo(repository), tree(repository)), repository.store.log.seq
    yield
    assert (photo(repository), tree(repository)) == before
    assert repository.store.log.seq == seq, f"{repository.store.log.seq - seq} records were appended"
    check(repository)
