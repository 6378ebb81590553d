"""``simsr vdi libvirt-xml``: a VDI as the disk element of a libvirt domain, which reaches it over NBD."""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

import typer

from simsr.cli.client import Client
from simsr.cli.disks import Vdi
from simsr.errors import BadRequest

__all__ = ["disk_element", "libvirt_xml"]

_BUS = {"vd": "virtio", "sd": "scsi", "hd": "ide", "xvd": "xen"}
_SERIAL_MAX = 20  # what virtio-blk shows of it


def disk_element(vdi: dict[str, Any], target: str) -> ElementTree.Element:
    """The element for ``vdi`` as the API describes it. Raises `BadRequest` if ``target`` is no device name."""
    name = re.fullmatch(r"(vd|sd|hd|xvd)[a-z]{1,2}", target)
    if not name:
        raise BadRequest(what=f"target {target!r}", reason="a disk of a guest has a name such as vda, sdb, hdc or xvdd")
    uri = urlsplit(vdi["nbd_uri"])
    disk = ElementTree.Element("disk", type="network", device="disk")
    ElementTree.SubElement(disk, "driver", name="qemu", type="raw", discard="unmap")
    tls = {"tls": "yes"} if uri.scheme.startswith("nbds") else {}
    source = ElementTree.SubElement(disk, "source", protocol="nbd", name=unquote(uri.path[1:]), **tls)
    if uri.scheme.endswith("+unix"):
        ElementTree.SubElement(source, "host", transport="unix", socket=parse_qs(uri.query)["socket"][0])
    else:
        ElementTree.SubElement(source, "host", name=uri.hostname or "localhost", port=str(uri.port or 10809))
    ElementTree.SubElement(disk, "target", dev=target, bus=_BUS[name[1]])
    ElementTree.SubElement(disk, "serial").text = vdi["uuid"][:_SERIAL_MAX]
    if vdi["read_only"]:
        ElementTree.SubElement(disk, "readonly")
    if vdi["sharable"]:
        ElementTree.SubElement(disk, "shareable")
    return disk


def libvirt_xml(
    context: typer.Context,
    vdi: Vdi,
    target: Annotated[str, typer.Option("--target", metavar="DEV", help="Name in the guest; it decides the bus.")] = "vda",
) -> None:
    """Print a VDI as a disk of a libvirt domain.

    For the devices of a domain's XML, or for virsh attach-device.
    """
    client: Client = context.obj.client
    element = disk_element(client.get(client.vdi_path(vdi)), target)
    ElementTree.indent(element)
    print(ElementTree.tostring(element, encoding="unicode"))
