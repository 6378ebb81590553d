"""The pool and its one host: what is in a fresh database, and the calls about them."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import trio

from simsr import __version__
from simsr.xapi.database import Database
from simsr.xapi.failure import XenError
from simsr.xapi.registry import method
from simsr.xapi.schema import NULL, now

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["bootstrap"]

MEMORY_BYTES = 16 * 2**30
TEMPLATE_MEMORY_BYTES = 256 * 2**20


def bootstrap(db: Database) -> None:
    """Make pool, host, control domain and the template for VMs, unless the database has them."""
    if db.count("pool"):
        return
    name = socket.gethostname()
    with db.transaction():
        metrics = db.create("host_metrics", live=True, memory_total=MEMORY_BYTES, memory_free=MEMORY_BYTES, last_updated=now())
        host = db.create(
            "host", name_label=name, name_description="model of a host", hostname=name, address="127.0.0.1", metrics=metrics,
            enabled=True, API_version_vendor="simsr", edition="free",
            software_version={"product_brand": "simsr", "product_version": __version__, "xapi": "model", "platform_version": "3.4.0"},
        )  # fmt: skip
        domain = db.create(
            "VM", name_label=f"Control domain on host: {name}", name_description="The domain which manages physical devices",
            is_control_domain=True, power_state="Running", resident_on=host, affinity=host, domid=0, VCPUs_max=1, VCPUs_at_startup=1,
            metrics=db.create("VM_metrics", start_time=now(), install_time=now(), state=["running"]),
        )  # fmt: skip
        db.set("host", host, control_domain=domain)
        db.create("pool", master=host)
        memory = dict.fromkeys(
            ("memory_static_max", "memory_dynamic_max", "memory_dynamic_min", "memory_target"), TEMPLATE_MEMORY_BYTES
        )
        db.create(
            "VM", name_label="Other install media", name_description="Template which allows VM installation from install media",
            is_a_template=True, is_default_template=True, VCPUs_max=1, VCPUs_at_startup=1, HVM_boot_policy="BIOS order",
            HVM_boot_params={"order": "dc"}, other_config={"default_template": "true"}, memory_static_min=TEMPLATE_MEMORY_BYTES,
            metrics=db.create("VM_metrics", install_time=now()), actions_after_crash="restart", **memory,
        )  # fmt: skip


@method("pool.set_default_SR", "self pool ref; value SR ref")
def set_default_sr(call: Call, pool: str, sr: str) -> None:
    _set_sr(call, pool, "default_SR", sr)


@method("pool.set_suspend_image_SR", "self pool ref; value SR ref")
def set_suspend_image_sr(call: Call, pool: str, sr: str) -> None:
    _set_sr(call, pool, "suspend_image_SR", sr)


def _set_sr(call: Call, pool: str, field: str, sr: str) -> None:
    if sr != NULL:
        call.db.get("SR", sr)
    call.db.set("pool", pool, **{field: sr})


@method("host.call_plugin", "host host ref; plugin string; fn string; args map")
async def call_plugin(call: Call, host: str, plugin: str, function: str, arguments: dict[str, str]) -> str:
    call.db.get("host", host)
    functions = call.model.host_plugins.get(plugin)
    if functions is None:
        raise XenError("XENAPI_MISSING_PLUGIN", plugin)
    if function not in functions:
        raise XenError("UNKNOWN_XENAPI_PLUGIN_FUNCTION", function)
    try:
        return str(await trio.to_thread.run_sync(functions[function], call.session, arguments))
    except Exception as error:
        raise XenError("XENAPI_PLUGIN_FAILURE", function, type(error).__name__, str(error)) from None


@method("host.get_servertime", "host host ref")
def get_servertime(call: Call, host: str) -> Any:
    call.db.get("host", host)
    return now()
