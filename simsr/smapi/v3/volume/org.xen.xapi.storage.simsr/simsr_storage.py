"""simsr_storage: the methods of simsr's SMAPIv3 plug-in, volume and datapath.

xapi-storage-script runs one script per method (``Volume.revert --json``), with the parameters as a JSON object on standard
input, and reads the result as JSON from standard output. The scripts beside this file are all the same few lines, which
hand their own name to `main`. What methods share is in simsr_common; the two files need nothing else of simsr.
"""

from simsr_common import (
    CLIENT_PREFIX, CLONE_ON_BOOT, DEFAULT_SOCKET, KEY_PREFIX, SCHEME, TYPE, VERSION, Daemon, Disk, Failure, Repository,
    boolean, configuration_socket, domain_name, inherited, integer, log, main, mapping, method, repository, size_bytes,
    stored_keys, string, uuid_text,
)

SECTOR_BYTES = 512
VOLUME_FEATURES = ["VDI_REVERT", "VDI_RESIZE_ONLINE", "VDI_ACTIVATE_READONLY", "VDI_CONFIG_CBT", "VDI_COMPOSE",
                   "LARGE_VDI", "THIN_PROVISIONING"]
DATAPATH_FEATURES = ["NONPERSISTENT"]
CONFIGURATION = {
    "socket": "path of simsrd's control socket (default " + DEFAULT_SOCKET + ")",
    "sr_uuid": "uuid of the SR; SR.create fills it in, SR.probe lists what there is",
}

__all__ = ["main"]

# --- Plugin --------------------------------------------------------------------------------------------------------

def query(plugin, name, features, configuration):
    return {
        "plugin": plugin, "name": name, "description": "Disks with snapshots and uuid-stable revert, served by simsrd",
        "vendor": "simsr", "copyright": "(C) simsr authors", "version": VERSION, "required_api_version": "5.0",
        "features": features, "configuration": configuration, "required_cluster_stack": [],
    }


@method("Plugin.Query")
def plugin_query():
    return query(TYPE, "Simulated copy-on-write store", VOLUME_FEATURES, CONFIGURATION)


@method("Datapath.Query")
def datapath_query():
    """Plugin.Query of the datapath directory."""
    return query(SCHEME, "NBD export of simsrd", DATAPATH_FEATURES, {})


@method("Plugin.diagnostics")
def plugin_diagnostics():
    try:
        daemon = Daemon(DEFAULT_SOCKET).call("GET", "/v1/daemon")
        return "simsrd %(version)s, pid %(pid)d, root %(root)s: %(sr_count)d SRs, %(vdi_count)d VDIs" % daemon
    except Failure as failure:
        return str(failure)


# --- SR ------------------------------------------------------------------------------------------------------------

@method("SR.probe", configuration=mapping)
def sr_probe(configuration):
    path = configuration_socket(configuration)
    wanted = configuration.get("sr_uuid")
    results = []
    for sr in sorted(Daemon(path).call("GET", "/v1/srs"), key=lambda sr: sr["uuid"]):
        if wanted is None or wanted.lower() == sr["uuid"]:
            results.append({"configuration": dict(configuration, sr_uuid=sr["uuid"]), "complete": True,
                            "sr": Repository(sr["uuid"], path).stat(), "extra_info": {}})
    return results


@method("SR.create", uuid=uuid_text, configuration=mapping, name=string, description=string)
def sr_create(uuid, configuration, name, description):
    """Make the SR. One that is there and empty is taken as it is, so that a create which broke off can be repeated."""
    if configuration.get("sr_uuid", uuid).lower() != uuid:
        raise Failure(91, "device_config:sr_uuid is %r but the new SR is %s; leave it out"
                      % (configuration["sr_uuid"][:80], uuid))
    here = Repository(uuid, configuration_socket(configuration))
    for sr in here.daemon.call("GET", "/v1/srs"):
        if sr["uuid"] == uuid:
            if sr["vdi_count"]:
                raise Failure(42, "SR %s exists already and holds %d VDIs; introduce it instead" % (uuid, sr["vdi_count"]))
            break
    else:
        here.name_for(name, lambda name: here.daemon.call(
            "POST", "/v1/srs", {"uuid": uuid, "name": name, "description": description}))
    return dict(configuration, sr_uuid=uuid)


@method("SR.attach", configuration=mapping)
def sr_attach(configuration):
    if "sr_uuid" not in configuration:
        raise Failure(90, "device_config:sr_uuid is missing; SR.create fills it in, SR.probe lists what there is")
    here = Repository(uuid_text(configuration["sr_uuid"], "device_config:sr_uuid"), configuration_socket(configuration))
    here.show()
    return str(here)


@method("SR.detach", sr=repository)
def sr_detach(sr):
    """Release what datapaths still hold; refuse while a volume that they attached has a connection."""
    held = []
    for vdi in sr.vdis():
        ours = [entry["client"] for entry in vdi["attached"] if entry["client"].startswith(CLIENT_PREFIX)]
        if ours and any(entry["kind"] == "nbd" for entry in vdi["attached"]):
            raise Failure(16, "volume %s is attached and has an open NBD connection" % vdi["uuid"])
        held += [(vdi["uuid"], client) for client in ours]
    for key, client in held:
        sr.daemon.call("POST", "/v1/vdis/%s/detach" % key, {"client": client})


@method("SR.destroy", sr=repository)
def sr_destroy(sr):
    """Remove the SR. One that is not there counts as removed."""
    if any(found["uuid"] == sr.uuid for found in sr.daemon.call("GET", "/v1/srs")):
        sr.daemon.call("DELETE", "/v1/srs/" + sr.uuid)


@method("SR.stat", sr=repository)
def sr_stat(sr):
    return sr.stat()


@method("SR.ls", sr=repository)
def sr_ls(sr):
    return [sr.volume(vdi) for vdi in sorted(sr.vdis(), key=lambda vdi: vdi["uuid"])]


@method("SR.set_name", sr=repository, new_name=string)
def sr_set_name(sr, new_name):
    sr.show()
    sr.name_for(new_name, lambda name: sr.daemon.call("PATCH", "/v1/srs/" + sr.uuid, {"name": name}))


@method("SR.set_description", sr=repository, new_description=string)
def sr_set_description(sr, new_description):
    sr.show()
    sr.daemon.call("PATCH", "/v1/srs/" + sr.uuid, {"description": new_description})


# --- Volume --------------------------------------------------------------------------------------------------------

@method("Volume.create", sr=repository, name=string, description=string, size=size_bytes, sharable=boolean)
def volume_create(sr, name, description, size, sharable):
    sr.show()
    return sr.volume(sr.daemon.call("POST", "/v1/vdis", {
        "sr": sr.uuid, "name": name, "description": description, "size_bytes": size, "sharable": sharable}))


@method("Volume.snapshot", sr=repository, key=string)
def volume_snapshot(sr, key):
    return sr.volume(sr.act(key, "snapshot", {"sm_config": inherited(sr.vdi(key))}))


@method("Volume.clone", sr=repository, key=string)
def volume_clone(sr, key):
    return sr.volume(sr.act(key, "clone", {"sm_config": inherited(sr.vdi(key))}))


def remove_quietly(sr, key, what):
    """Delete a volume that nobody needs any more. That it cannot be is no failure of what has just been done."""
    try:
        sr.daemon.call("DELETE", "/v1/vdis/" + key)
    except Failure as failure:
        log("%s, %s, is left behind: %s" % (key, what, failure))


@method("Volume.destroy", sr=repository, key=string)
def volume_destroy(sr, key):
    """Remove a volume, and the temporary clone that it was booted from. One that is not there counts as removed."""
    vdi = sr.find(key)
    if vdi is None:
        return
    sr.daemon.call("DELETE", "/v1/vdis/" + vdi["uuid"])
    temporary = stored_keys(vdi).get(CLONE_ON_BOOT)
    if temporary and sr.find(temporary):
        remove_quietly(sr, temporary.lower(), "the temporary clone of %s" % vdi["uuid"])


@method("Volume.revert", sr=repository, snapshot=string, key=string)
def volume_revert(sr, snapshot, key):
    target = sr.vdi(key)["uuid"]
    sr.act(snapshot, "revert", {"target": target})


@method("Volume.stat", sr=repository, key=string)
def volume_stat(sr, key):
    return sr.volume(sr.vdi(key))


@method("Volume.set", sr=repository, key=string, k=string, v=string)
def volume_set(sr, key, k, v):
    sr.patch(key, sm_config_merge={KEY_PREFIX + k: v})


@method("Volume.unset", sr=repository, key=string, k=string)
def volume_unset(sr, key, k):
    sr.patch(key, sm_config_merge={KEY_PREFIX + k: None})


@method("Volume.set_name", sr=repository, key=string, new_name=string)
def volume_set_name(sr, key, new_name):
    sr.patch(key, name=new_name)


@method("Volume.set_description", sr=repository, key=string, new_description=string)
def volume_set_description(sr, key, new_description):
    sr.patch(key, description=new_description)


@method("Volume.resize", sr=repository, key=string, new_size=size_bytes)
def volume_resize(sr, key, new_size):
    sr.act(key, "resize", {"size_bytes": new_size})


@method("Volume.compare", sr=repository, key=string, key2=string)
def volume_compare(sr, key, key2):
    """Where the two volumes differ. Without a second volume everything counts as different."""
    vdi, other = sr.vdi(key), sr.find(key2)
    if other is None:
        return {"blocksize": SECTOR_BYTES, "ranges": [[0, vdi["size_bytes"] // SECTOR_BYTES]]}
    ranges, start = [], 0
    while start is not None:
        answer = sr.daemon.call("GET", "/v1/vdis/%s/diff/%s?start=%d" % (vdi["uuid"], other["uuid"], start))
        for found in answer["ranges"]:
            first, count = found["offset"] // SECTOR_BYTES, found["length"] // SECTOR_BYTES
            if ranges and sum(ranges[-1]) == first:
                ranges[-1][1] += count
            else:
                ranges.append([first, count])
        start = answer["next_offset"]
    return {"blocksize": SECTOR_BYTES, "ranges": ranges}


@method("Volume.similar_content", sr=repository, key=string)
def volume_similar_content(sr, key):
    """Keys of volumes that share content: what descends from the same disk, snapshots and their disk first."""
    vdi = sr.vdi(key)
    family = [other for other in sr.vdis() if other["family"] == vdi["family"] and other["uuid"] != vdi["uuid"]]
    direct = {vdi["uuid"], vdi["snapshot_of"]} - {None}
    family.sort(key=lambda other: (not direct & {other["uuid"], other["snapshot_of"]}, other["uuid"]))
    return [other["uuid"] for other in family]


@method("Volume.enable_cbt", sr=repository, key=string)
def volume_enable_cbt(sr, key):
    sr.act(key, "cbt", {"enabled": True})


@method("Volume.disable_cbt", sr=repository, key=string)
def volume_disable_cbt(sr, key):
    sr.act(key, "cbt", {"enabled": False})


@method("Volume.data_destroy", sr=repository, key=string)
def volume_data_destroy(sr, key):
    sr.act(key, "data_destroy")


@method("Volume.list_changed_blocks", sr=repository, key=string, key2=string, offset=integer, length=integer)
def volume_list_changed_blocks(sr, key, key2, offset, length):
    """What has changed from `key` to `key2`, a bit for each 64 KiB from the one that holds byte `offset`; to the end if
    `length` is -1."""
    import base64
    old, new = sr.vdi(key), sr.vdi(key2)
    if offset < 0 or length < -1:
        raise Failure(1, "%d bytes from byte %d on are no range of volume %s" % (length, offset, key2))
    answer = sr.daemon.call("GET", "/v1/vdis/%s/changed_blocks/%s" % (old["uuid"], new["uuid"]))
    granularity, bitmap = answer["granularity_bytes"], answer["bitmap"]
    if (offset, length) != (0, -1):
        raw = base64.b64decode(bitmap)
        end_bytes = answer["size_bytes"] if length == -1 else min(offset + length, answer["size_bytes"])
        first, end = offset // granularity, -(-end_bytes // granularity)
        count = max(0, end - first)
        bits = int.from_bytes(raw, "big") >> (len(raw) * 8 - end) & (1 << count) - 1
        bitmap = base64.b64encode((bits << -count % 8).to_bytes(-(-count // 8), "big")).decode("ascii")
    return {"granularity": granularity, "bitmap": bitmap}


@method("Volume.compose", sr=repository, key=string, key2=string)
def volume_compose(sr, key, key2):
    """Lay the child `key` over the parent `key2`, which goes: it is not valid any more, and xapi may not ask for it again."""
    parent = sr.vdi(key2)["uuid"]
    sr.act(key, "compose", {"parent": parent})
    remove_quietly(sr, parent, "the parent that %s was laid over" % key)


# --- Datapath ------------------------------------------------------------------------------------------------------

def forget_epoch(uri, vdi):
    """End an epoch whose writes were not to last: take the volume back to what it was when it was opened."""
    if vdi["on_boot"] == "reset":
        uri.repository.act(uri.key, "epoch", {"phase": "begin"})
        uri.repository.patch(uri.key, on_boot="persist")


@method("Datapath.open", uri=Disk, persistent=boolean)
def datapath_open(uri, persistent):
    """Before the VM starts; if not `persistent`, what it writes is dropped in the end, also after a crash."""
    vdi = uri.repository.vdi(uri.key)
    forget_epoch(uri, vdi)
    if not persistent and not vdi["read_only"]:
        uri.repository.patch(uri.key, on_boot="reset")


@method("Datapath.attach", uri=Disk, domain=domain_name)
def datapath_attach(uri, domain):
    """Name the NBD server to the two kinds of consumers: guests (qdisk) want a XenDisk, dom0 and qemu want a URI."""
    vdi = uri.repository.vdi(uri.key)
    path = vdi["nbd_socket"]
    if ":" in path or " " in path:
        raise Failure(46, "the socket path %s has a colon or a space, which xapi cannot read; give simsrd another --root"
                      % path)
    return {"implementations": [
        ["XenDisk", {"params": "%s %s" % (path, vdi["uuid"]), "extra": {}, "backend_type": "qdisk"}],
        ["Nbd", {"uri": "nbd:unix:%s:exportname=%s" % (path, vdi["uuid"])}],
    ]}


@method("Datapath.activate", uri=Disk, domain=domain_name)
def datapath_activate(uri, domain):
    uri.attach(domain, True)


@method("Datapath.activate_readonly", uri=Disk, domain=domain_name)
def datapath_activate_readonly(uri, domain):
    uri.attach(domain, False)


@method("Datapath.deactivate", uri=Disk, domain=domain_name)
def datapath_deactivate(uri, domain):
    uri.detach(domain)


@method("Datapath.detach", uri=Disk, domain=domain_name)
def datapath_detach(uri, domain):
    """End everything. It should never fail: attachments end with simsrd, so without simsrd there is none to end."""
    try:
        uri.detach(domain)
    except Failure as failure:
        log("Datapath.detach of %s: %s" % (uri.key, failure))


@method("Datapath.close", uri=Disk)
def datapath_close(uri):
    vdi = uri.repository.find(uri.key)
    if vdi:
        forget_epoch(uri, vdi)
