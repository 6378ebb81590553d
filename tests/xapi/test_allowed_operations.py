"""vdi_revert.md 13.2 and section 4: which operation is allowed when, on a database made for the purpose."""

from __future__ import annotations

import pytest

from simsr.xapi import host
from simsr.xapi.checks import OLD_VDI_OPERATIONS, allowed, sr_error, vbd_error, vdi_error
from simsr.xapi.database import Database
from simsr.xapi.failure import XenError
from simsr.xapi.fields import ENUMS
from simsr.xapi.schema import NULL
from simsr.xapi.smapiv1 import KNOWN_FEATURES


class Fixture:
    """One VDI in an SR whose driver has all features unless said otherwise."""

    def __init__(self) -> None:
        self.db = Database(":memory:")
        host.bootstrap(self.db)
        [self.pool], [self.host] = self.db.all("pool"), self.db.all("host")
        self.dom0 = self.db.get("host", self.host)["control_domain"]
        self.sm = self.db.create("SM", type="all", features=dict.fromkeys(KNOWN_FEATURES, 1))
        self.sr = self.db.create("SR", type="all")
        self.vdi = self.db.create("VDI", SR=self.sr, managed=True, type="user")

    def set(self, **fields) -> None:
        self.db.set("VDI", self.vdi, **fields)

    def without(self, *features: str) -> None:
        left = {name: 1 for name in KNOWN_FEATURES - set(features)}
        self.db.set("SM", self.sm, features=left)

    def vbd(self, mode: str = "RW", *, attached: bool = True, reserved: bool = False, operation: str = "", vm: str | None = None):
        under_way = {"OpaqueRef:op": operation} if operation else {}
        return self.db.create(
            "VBD", VDI=self.vdi, VM=self.dom0 if vm is None else vm, mode=mode, currently_attached=attached,
            storage_lock=reserved, current_operations=under_way,
        )  # fmt: skip

    def code(self, operation: str) -> str | None:
        error = vdi_error(self.db, self.vdi, operation)
        return error and error.xenapi_code

    def description(self, operation: str) -> list[str]:
        error = vdi_error(self.db, self.vdi, operation)
        assert isinstance(error, XenError)
        return error.description


@pytest.fixture
def one():
    fixture = Fixture()
    yield fixture
    fixture.db.close()


def test_snapshot_can_be_reverted_to(one):
    one.set(is_a_snapshot=True)
    assert one.code("revert_to") is None


def test_snapshot_of_a_checkpoint_can_be_reverted_to(one):
    one.set(is_a_snapshot=True)
    one.vbd("RW")
    assert one.code("revert_to") is None


def test_plain_leaf_cannot_be_reverted_to(one):
    assert one.description("revert_to") == ["REVERT_ONLY_ALLOWED_ON_SNAPSHOT"]


def test_attached_leaf_cannot_be_reverted_from(one):
    one.vbd("RW")
    assert one.description("revert_from") == ["VDI_IN_USE", one.vdi, "revert_from"]


@pytest.mark.parametrize("operation", ["", "attach"])
@pytest.mark.parametrize(
    "state", [{"attached": True}, {"attached": False, "reserved": True}, {"attached": True, "reserved": True}]
)
def test_update_of_an_attached_or_reserved_vdi(one, state, operation):
    one.vbd(operation=operation, **state)
    assert one.code("update") == "VDI_IN_USE"


def test_update_while_a_vbd_is_being_attached(one):
    one.vbd(attached=False, operation="attach")
    assert one.description("update") == ["OTHER_OPERATION_IN_PROGRESS", "VDI", one.vdi, "attach", "OpaqueRef:op"]


def test_forget_of_an_idle_vdi(one):
    one.vbd(attached=False)
    assert one.code("forget") is None


@pytest.mark.parametrize(
    ("modes", "expected"), [(["RW"], "VDI_IN_USE"), (["RO"], None), ([], None), (["RW", "RO"], "VDI_IN_USE")]
)
def test_copy(one, modes, expected):
    for mode in modes:
        one.vbd(mode)
    assert one.code("copy") == expected


@pytest.mark.parametrize(("operation", "expected"), [("copy", None), ("clone", None), ("snapshot", "OPERATION_NOT_ALLOWED")])
def test_during_a_copy(one, operation, expected):
    one.vbd("RO")
    one.set(current_operations={"OpaqueRef:op": "copy"})
    assert one.code(operation) == expected


def test_plug_to_dom0_during_a_copy(one):
    vbd = one.vbd("RO", attached=False)
    one.set(current_operations={"OpaqueRef:op": "copy"})
    assert vbd_error(one.db, vbd, "plug") is None
    one.db.set("VBD", vbd, mode="RW")
    assert vbd_error(one.db, vbd, "plug").xenapi_code == "OTHER_OPERATION_IN_PROGRESS"


CBT = ["enable_cbt", "disable_cbt", "data_destroy", "list_changed_blocks"]


@pytest.mark.parametrize("operation", CBT)
def test_no_cbt_without_the_feature(one, operation):
    one.without("VDI_CONFIG_CBT")
    assert one.description(operation) == ["SR_OPERATION_NOT_SUPPORTED", one.sr]


@pytest.mark.parametrize("operation", ["enable_cbt", "disable_cbt"])
def test_cbt_of_disks_only(one, operation):
    for vdi_type, expected in (
        ("metadata", "VDI_INCOMPATIBLE_TYPE"),
        ("redo_log", "VDI_INCOMPATIBLE_TYPE"),
        ("user", None),
        ("system", None),
    ):
        one.set(type=vdi_type)
        assert one.code(operation) == expected, vdi_type
    one.vbd("RW")
    assert one.code(operation) is None
    one.set(on_boot="reset")
    assert one.code(operation) == "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION"
    one.set(is_a_snapshot=True, on_boot="persist")
    assert one.code(operation) == "OPERATION_NOT_ALLOWED"


@pytest.mark.parametrize(
    "operation", ["snapshot", "clone", "resize", "resize_online", "copy", "set_on_boot", "revert_to", "revert_from"]
)
def test_nothing_can_be_done_with_cbt_metadata(one, operation):
    one.set(type="cbt_metadata", is_a_snapshot=True)
    assert one.description(operation) == ["VDI_INCOMPATIBLE_TYPE", one.vdi, "cbt_metadata"]


def test_with_cbt_enabled(one):
    one.set(cbt_enabled=True)
    for operation in ("mirror", "set_on_boot"):
        assert one.code(operation) == "VDI_CBT_ENABLED"
    assert one.code("revert_from") is None
    one.set(is_a_snapshot=True)
    assert one.code("revert_to") is None


def test_data_destroy(one):
    one.set(cbt_enabled=True)
    assert one.code("data_destroy") == "OPERATION_NOT_ALLOWED"
    one.set(is_a_snapshot=True)
    assert one.code("data_destroy") is None
    one.vbd("RW")
    assert one.code("data_destroy") is None
    one.set(cbt_enabled=False)
    assert one.code("data_destroy") == "VDI_NO_CBT_METADATA"
    one.set(type="cbt_metadata")
    assert one.code("data_destroy") is None
    one.db.set("SR", one.sr, is_tools_sr=True)
    assert one.code("data_destroy") == "SR_OPERATION_NOT_SUPPORTED"


def test_list_changed_blocks(one):
    snapshot_vm = one.db.create("VM", is_a_snapshot=True)
    one.vbd("RW", vm=snapshot_vm)
    assert one.code("list_changed_blocks") is None
    one.vbd("RW", vm=one.db.create("VM", power_state="Running"))
    assert one.code("list_changed_blocks") == "VDI_IN_USE"


def test_mirror_during_a_rolling_upgrade(one):
    assert one.code("mirror") is None
    one.db.set("pool", one.pool, other_config={"rolling_upgrade_in_progress": "true"})
    for operation in ("mirror", "revert_to", "revert_from"):
        assert one.code(operation) == "NOT_SUPPORTED_DURING_UPGRADE"
    assert sr_error(one.db, one.sr, "vdi_revert").xenapi_code == "NOT_SUPPORTED_DURING_UPGRADE"
    assert one.code("snapshot") is None


@pytest.mark.parametrize("operation", ENUMS["vdi_operations"].split())
def test_vbd_without_vm_is_no_obstacle(one, operation):
    """It counts as that of a VM which is no snapshot."""
    vbd = one.vbd("RW", vm=NULL)
    without = one.code(operation)
    one.db.set("VBD", vbd, VM=one.dom0)
    assert without == one.code(operation)


def test_allowed_operations_of_a_vdi(one):
    vbd = one.vbd("RO")
    assert set(allowed(one.db, "VDI", one.vdi)) == {"snapshot", "clone", "copy"}
    one.db.set("VBD", vbd, currently_attached=False)
    assert set(allowed(one.db, "VDI", one.vdi)) == {
        "generate_config", "update", "forget", "destroy", "snapshot", "resize", "copy", "clone",
    }  # fmt: skip
    one.set(is_a_snapshot=True)
    assert not {"revert_to", "revert_from"} & (set(allowed(one.db, "VDI", one.vdi)) | set(OLD_VDI_OPERATIONS))


# Section 4: the rules in their order.


def test_first_failing_rule_wins(one):
    """From the last rule of 4.1 to the first: each new obstacle takes over from the one before."""
    assert one.code("revert_to") == "REVERT_ONLY_ALLOWED_ON_SNAPSHOT"
    one.set(type="cbt_metadata")
    assert one.code("revert_to") == "VDI_INCOMPATIBLE_TYPE"
    one.without("VDI_CLONE")
    assert one.code("revert_to") == one.code("revert_from") == "SR_OPERATION_NOT_SUPPORTED"
    vbd = one.vbd(attached=False, operation="plug")
    assert one.code("revert_to") == one.code("revert_from") == "OTHER_OPERATION_IN_PROGRESS"
    one.db.set("VBD", vbd, currently_attached=True)
    assert one.code("revert_from") == "VDI_IN_USE" and one.code("revert_to") == "OTHER_OPERATION_IN_PROGRESS"
    one.set(current_operations={"OpaqueRef:op": "resize"})
    assert one.description("revert_from") == ["OTHER_OPERATION_IN_PROGRESS", "VDI", one.vdi, "resize", "OpaqueRef:op"]
    one.db.set("pool", one.pool, other_config={"rolling_upgrade_in_progress": "true"})
    assert one.code("revert_from") == "NOT_SUPPORTED_DURING_UPGRADE"


def test_revert_from_has_the_rules_of_destroy(one):
    one.set(type="rrd")
    assert one.description("revert_from") == ["VDI_HAS_RRDS", one.vdi]
    one.set(type="redo_log")
    assert one.code("revert_from") is None
    one.db.set("pool", one.pool, ha_enabled=True)
    assert one.description("revert_from") == ["HA_IS_ENABLED"]
    one.db.set("SR", one.sr, is_tools_sr=True)
    assert one.description("revert_from") == ["SR_OPERATION_NOT_SUPPORTED", one.sr]
    udev = one.db.create("SR", type="udev")
    one.db.set("SM", one.sm, type="udev")
    one.set(SR=udev)
    assert one.description("revert_from") == ["VDI_IS_A_PHYSICAL_DEVICE", one.vdi]


def test_revert_is_not_stopped_by(one):
    one.set(is_a_snapshot=True, on_boot="reset", sharable=True, read_only=True)
    assert one.code("revert_to") is None and one.code("revert_from") is None


def test_sr_level(one):
    assert sr_error(one.db, one.sr, "vdi_revert") is None
    one.db.set("SR", one.sr, current_operations={"OpaqueRef:op": "plug"})
    assert sr_error(one.db, one.sr, "vdi_revert") is None
    one.db.set("SR", one.sr, current_operations={"OpaqueRef:op": "scan"})
    assert sr_error(one.db, one.sr, "vdi_revert").description == [
        "OTHER_OPERATION_IN_PROGRESS",
        "SR",
        one.sr,
        "scan",
        "OpaqueRef:op",
    ]
    assert "vdi_revert" not in allowed(one.db, "SR", one.sr)
    one.without("VDI_REVERT")
    assert sr_error(one.db, one.sr, "vdi_revert").description == ["SR_OPERATION_NOT_SUPPORTED", one.sr]
    assert sr_error(one.db, one.sr, "vdi_clone").xenapi_code == "OTHER_OPERATION_IN_PROGRESS"


def test_allowed_operations_of_an_sr_tell_who_can_revert(one):
    assert "vdi_revert" in allowed(one.db, "SR", one.sr)
    one.without("VDI_REVERT")
    assert "vdi_revert" not in allowed(one.db, "SR", one.sr) and "vdi_clone" in allowed(one.db, "SR", one.sr)
