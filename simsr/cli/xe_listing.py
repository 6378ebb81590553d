"""Listing for ``simsr xe``: records in xe's layout, filters, and single parameters of objects."""

from __future__ import annotations

from typing import Any

from simsr.cli.xe import Arguments, belongs, find, show_value
from simsr.cli.xe_client import XenApi
from simsr.errors import BadRequest

__all__ = ["CLASSES", "list_objects", "param_get", "param_list", "param_set", "param_add", "param_remove"]

CLASSES = {
    "vm": "VM", "template": "VM", "snapshot": "VM", "vdi": "VDI", "vbd": "VBD", "sr": "SR", "pbd": "PBD", "sm": "SM",
    "host": "host", "pool": "pool", "task": "task", "message": "message",
}  # fmt: skip

_DEFAULT_FIELDS = {
    "VM": "uuid name-label power-state",
    "VDI": "uuid name-label name-description sr-uuid virtual-size read-only",
    "VBD": "uuid vm-uuid vm-name-label vdi-uuid empty device",
    "SR": "uuid name-label name-description host type content-type",
    "PBD": "uuid host-uuid sr-uuid device-config currently-attached",
    "SM": "uuid type name-label features",
    "host": "uuid name-label name-description",
    "pool": "uuid name-label master default-SR",
    "task": "uuid name-label status progress",
    "message": "uuid name priority class timestamp body",
}

_LINKS = {
    "VBD": {"vm": "VM", "vdi": "VDI"},
    "VDI": {"sr": "SR", "snapshot-of": "VDI"},
    "PBD": {"host": "host", "sr": "SR"},
    "VM": {"resident-on": "host", "snapshot-of": "VM", "parent": "VM", "suspend-VDI": "VDI"},
}
"""Fields that are references: ``X-uuid`` and ``X-name-label`` show what they point to, the plain name shows the uuid as well."""

_WRITABLE = {
    "VM": "name_label name_description user_version is_a_template affinity VCPUs_params VCPUs_max VCPUs_at_startup"
    " memory_static_max memory_dynamic_max memory_dynamic_min memory_static_min actions_after_softreboot actions_after_shutdown"
    " actions_after_reboot actions_after_crash PV_bootloader PV_kernel PV_ramdisk PV_args PV_bootloader_args PV_legacy_args"
    " HVM_boot_policy HVM_boot_params HVM_shadow_multiplier platform PCI_bus other_config recommendations xenstore_data tags"
    " blocked_operations suspend_SR hardware_platform_version ha_always_run ha_restart_priority start_delay shutdown_delay order",
    "VDI": "name_label name_description other_config xenstore_data sm_config tags on_boot allow_caching sharable read_only",
    "VBD": "userdevice bootable mode type unpluggable other_config qos_algorithm_type qos_algorithm_params",
    "SR": "name_label name_description other_config sm_config tags",
    "host": "name_label name_description other_config logging suspend_image_sr crash_dump_sr hostname address tags",
    "pool": "name_label name_description default_SR suspend_image_SR crash_dump_SR other_config tags gui_config"
    " health_check_config wlb_enabled",
    "PBD": "other_config",
    "SM": "other_config",
    "task": "other_config",
    "message": "",
}
"""Fields that the API has setters for."""


_REFERRED_TO = [*dict.fromkeys(CLASSES.values()), "VM_metrics", "VM_guest_metrics", "host_metrics"]


class _Objects:
    """The objects of a pool as xe shows them; records are fetched once for each class."""

    def __init__(self, api: XenApi) -> None:
        self._api = api
        self._records: dict[str, dict[str, dict[str, Any]]] = {}

    def records(self, cls: str) -> dict[str, dict[str, Any]]:
        if cls not in self._records:
            self._records[cls] = self._api(f"{cls}.get_all_records")
        return self._records[cls]

    def value(self, cls: str, record: dict[str, Any], name: str) -> Any:
        """Return what xe calls field ``name``. Raises BadRequest if there is no such field."""
        for link, target in _LINKS.get(cls, {}).items():
            if name in (link, f"{link}-uuid", f"{link}-name-label"):
                ref = record[_field_name(record, link)]
                pointed = self.records(target).get(ref)
                if pointed is None:
                    return "<not in database>"
                return pointed["name_label" if name.endswith("-name-label") else "uuid"]
        if cls == "SR" and name == "host":
            hosts = [self.records("PBD")[pbd]["host"] for pbd in record["PBDs"] if pbd in self.records("PBD")]
            return (
                self.records("host")[hosts[0]]["name_label"] if len(hosts) == 1 else "<shared>" if hosts else "<not in database>"
            )
        if cls == "message" and name == "class":
            return record["cls"]
        value = record[_field_name(record, name)]
        if name == "power-state":
            return value.lower()
        return self._uuids(value)

    def _uuids(self, value: Any) -> Any:
        """Replace references, which mean nothing to people, by uuids."""
        if isinstance(value, list):
            return [self._uuids(item) for item in value]
        if isinstance(value, str) and value.startswith("OpaqueRef:"):
            for records in self._records.values():
                if value in records:
                    return records[value]["uuid"]
            for cls in _REFERRED_TO:
                if value in self.records(cls):
                    return self.records(cls)[value]["uuid"]
            return "<not in database>"
        return value

    def ref(self, name: str, uuid: str) -> str:
        """Return the reference of the object ``uuid``, for setting field ``name``; of none if the uuid is empty."""
        if not uuid:
            return "OpaqueRef:NULL"
        for cls in _REFERRED_TO:
            for ref, record in self.records(cls).items():
                if record["uuid"] == uuid:
                    return ref
        raise BadRequest(what=f"{name}={uuid}", reason="it must be the uuid of an object, and there is none with this")


def _field_name(record: dict[str, Any], name: str) -> str:
    """Return the name in the API of what xe calls ``name``; xe is not strict about case."""
    wanted = name.replace("-", "_").lower()
    for key in record:
        if key.lower() == wanted:
            return key
    raise BadRequest(what=f"parameter {name}", reason="there is no such field")


def list_objects(noun: str, api: XenApi, arguments: Arguments) -> list[str]:
    cls, objects = CLASSES[noun], _Objects(api)
    minimal, params = arguments.flag("minimal"), arguments.get("params")
    filters = {key: value for key, value in arguments.values.items() if key != "params"}
    arguments.used |= filters.keys()
    arguments.finish()
    records = [record for record in objects.records(cls).values() if belongs(noun, record)]
    for name, wanted in filters.items():
        records = [record for record in records if _matches(objects, cls, record, name, wanted)]
    names = _DEFAULT_FIELDS[cls].split() if not params else [name.strip() for name in params.split(",")]
    if params == "all":
        names = ["uuid", *(key.replace("_", "-") for key in (records[0] if records else {}) if key != "uuid")]
    if minimal:
        shown = names[0] if params else "uuid"
        return [",".join(show_value(objects.value(cls, record, shown)) for record in records)]
    lines: list[str] = []
    for record in records:
        lines += [*_block(_fields(objects, cls, record, names)), ""]
    return lines


def _matches(objects: _Objects, cls: str, record: dict[str, Any], name: str, wanted: str) -> bool:
    field_name, colon, key = name.partition(":")
    value = objects.value(cls, record, field_name)
    if colon:
        return isinstance(value, dict) and value.get(key) == wanted
    return show_value(value) == wanted


def _mark(cls: str, name: str, value: Any) -> str:
    """Return how xe marks a field: S for sets, M for maps, RO or RW."""
    kind = "S" if isinstance(value, list) else "M" if isinstance(value, dict) else ""
    return kind + ("RW" if name.replace("-", "_") in _WRITABLE[cls].split() else "RO")


def _fields(objects: _Objects, cls: str, record: dict[str, Any], names: list[str]) -> list[tuple[str, str, str]]:
    """Return (name, text, mark) of the fields ``names`` of a record."""
    values = [(name, objects.value(cls, record, name)) for name in names]
    return [(name, show_value(value), _mark(cls, name, value)) for name, value in values]


def _block(fields: list[tuple[str, str, str]]) -> list[str]:
    """Return one record in xe's layout: the first name to the left, the others to the right, values under one another."""
    width = max(len(name) for name, _, _ in fields) + 4
    first, *others = [(f"{name} ({mark:>3})", value) for name, value, mark in fields]
    lines = [f"{first[0]:<{width + 6}}: {first[1]}"]
    return lines + [f"{label:>{width + 6}}: {value}" for label, value in others]


def param_get(noun: str, api: XenApi, arguments: Arguments) -> list[str]:
    cls = CLASSES[noun]
    ref = find(api, cls, arguments)
    name, key = arguments.need("param-name"), arguments.get("param-key")
    arguments.flag("minimal")
    arguments.finish()
    value = _Objects(api).value(cls, api(f"{cls}.get_record", ref), name)
    if key is None:
        return [show_value(value)]
    if not isinstance(value, dict) or key not in value:
        raise BadRequest(what=f"param-key={key}", reason=f"{name} has no such key")
    return [show_value(value[key])]


def param_list(noun: str, api: XenApi, arguments: Arguments) -> list[str]:
    cls, objects = CLASSES[noun], _Objects(api)
    record = api(f"{cls}.get_record", find(api, cls, arguments))
    arguments.finish()
    names = ["uuid", *(key.replace("_", "-") for key in record if key != "uuid")]
    return _block(_fields(objects, cls, record, names))


def param_set(noun: str, api: XenApi, arguments: Arguments) -> list[str]:
    cls, objects = CLASSES[noun], _Objects(api)
    ref = find(api, cls, arguments)
    record = api(f"{cls}.get_record", ref)
    for name, value in list(arguments.values.items()):
        if name == "uuid":
            continue
        arguments.get(name)
        field_name, colon, key = name.partition(":")
        api_name = _field_name(record, field_name)
        if colon:
            api(f"{cls}.remove_from_{api_name}", ref, key)
            api(f"{cls}.add_to_{api_name}", ref, key, value)
        else:
            is_ref = isinstance(record[api_name], str) and record[api_name].startswith("OpaqueRef:")
            api(f"{cls}.set_{api_name}", ref, objects.ref(name, value) if is_ref else value)
    arguments.finish()
    return []


def param_add(noun: str, api: XenApi, arguments: Arguments) -> list[str]:
    """Add to a set (``param-key=``) or to a map (``key=value``)."""
    cls = CLASSES[noun]
    ref = find(api, cls, arguments)
    name = arguments.need("param-name")
    api_name = _field_name(api(f"{cls}.get_record", ref), name)
    if key := arguments.get("param-key"):
        arguments.finish()
        api(f"{cls}.add_{api_name}", ref, key)
        return []
    added = {key: value for key, value in arguments.values.items() if key not in ("uuid", "param-name")}
    if not added:
        raise BadRequest(what="the command", reason="param-key=, or key=value for a map, is missing")
    arguments.used |= added.keys()
    arguments.finish()
    for key, value in added.items():
        api(f"{cls}.add_to_{api_name}", ref, key, value)
    return []


def param_remove(noun: str, api: XenApi, arguments: Arguments) -> list[str]:
    cls = CLASSES[noun]
    ref = find(api, cls, arguments)
    name, key = arguments.need("param-name"), arguments.need("param-key")
    arguments.finish()
    record = api(f"{cls}.get_record", ref)
    api_name = _field_name(record, name)
    api(f"{cls}.{'remove' if isinstance(record[api_name], list) else 'remove_from'}_{api_name}", ref, key)
    return []
