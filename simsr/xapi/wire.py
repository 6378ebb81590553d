"""XenAPI on the wire: XML-RPC and JSON-RPC documents to Python values and back. No input or output happens here.

Integers travel as decimal text in XML-RPC and as numbers in JSON, in both directions; references, enums and times in JSON are
strings. What is wrong with a document is a `Malformed`; what is wrong with a value is found later, when its type is known.
"""

from __future__ import annotations

import json
import re
from typing import Any

from simsr.xapi.schema import Time
from simsr.xapi.xml_tree import Element, NotXml, parse

__all__ = [
    "Malformed",
    "I4",
    "escape_markup",
    "read_call",
    "write_success",
    "write_failure",
    "write_fault",
    "xml_value",
    "read_json",
    "json_reply",
]

_ILLEGAL_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKUP = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}
_MARKUP_CHARACTER = re.compile('[&<>"]')


class Malformed(Exception):
    """The request is not a method call; the argument says why."""


class I4(int):
    """An integer that goes out as ``<i4>``, which only the reference counts of events do."""


# XML-RPC in.


def read_call(body: bytes) -> tuple[str, list[Any]]:
    """Return method name and parameters of an XML-RPC request."""
    try:
        root = parse(body)
    except NotXml as error:
        raise Malformed(f"the request is not XML: {error}") from None
    parts = {child.tag: child for child in root.children}
    if root.tag != "methodCall" or "methodName" not in parts or not parts.keys() <= {"methodName", "params"}:
        raise Malformed("the request is not an XML-RPC methodCall")
    values = []
    for parameter in parts["params"].children if "params" in parts else ():
        if parameter.tag != "param" or len(parameter.children) != 1:
            raise Malformed("params must hold param elements with one value each")
        values.append(_read_value(parameter.children[0]))
    return parts["methodName"].text.strip(), values


def _read_value(element: Element) -> Any:
    if element.tag != "value" or len(element.children) > 1:
        raise Malformed(f"<{element.tag}> stands where one value belongs")
    if not element.children:
        return element.text
    [typed] = element.children
    if typed.tag == "array":
        if [child.tag for child in typed.children] != ["data"]:
            raise Malformed("an array must hold one data element")
        return [_read_value(child) for child in typed.children[0].children]
    if typed.tag == "struct":
        return dict(_read_member(member) for member in typed.children)
    if typed.children:
        raise Malformed(f"<{typed.tag}> must hold text only")
    return _read_scalar(typed.tag, typed.text)


def _read_scalar(tag: str, text: str) -> Any:
    try:
        if tag in ("int", "i4", "i8"):
            return int(text)
        if tag == "double":
            return float(text)
    except ValueError:
        raise Malformed(f"{text[:80]!r} is not of type {tag}") from None
    if tag == "boolean":
        return {"1": True, "0": False}.get(text.strip(), text.strip())
    if tag == "string":
        return text
    if tag == "dateTime.iso8601":
        return Time(text.strip())
    if tag == "nil":
        return ""
    raise Malformed(f"<{tag}> is not a type of the XenAPI")


def _read_member(member: Element) -> tuple[str, Any]:
    if [child.tag for child in member.children] != ["name", "value"] or member.tag != "member":
        raise Malformed("a struct must hold members with a name and a value")
    return member.children[0].text, _read_value(member.children[1])


# XML-RPC out.


def escape_markup(text: str) -> str:
    """Return ``text`` with the four characters escaped that xapi escapes."""
    return _MARKUP_CHARACTER.sub(lambda match: _MARKUP[match[0]], text)


def _escape(text: str) -> str:
    # A carriage return written as it is would arrive as a line feed.
    return _ILLEGAL_XML.sub("", escape_markup(text)).replace("\r", "&#13;")


def xml_value(value: Any) -> str:
    """Return ``value`` as an XML-RPC value: strings bare, integers as decimal text."""
    if isinstance(value, bool):
        return f"<value><boolean>{int(value)}</boolean></value>"
    if isinstance(value, I4):
        return f"<value><i4>{int(value)}</i4></value>"
    if isinstance(value, int):
        return f"<value>{value}</value>"
    if isinstance(value, float):
        return f"<value><double>{value!r}</double></value>"
    if isinstance(value, Time):
        return f"<value><dateTime.iso8601>{_escape(value)}</dateTime.iso8601></value>"
    if isinstance(value, str):
        return f"<value>{_escape(value)}</value>" if value else "<value/>"
    if isinstance(value, dict):
        members = "".join(f"<member><name>{_escape(str(name))}</name>{xml_value(item)}</member>" for name, item in value.items())
        return f"<value><struct>{members}</struct></value>"
    if isinstance(value, list | tuple):
        return f"<value><array><data>{''.join(map(xml_value, value))}</data></array></value>"
    raise TypeError(f"{type(value).__name__} has no form in XML-RPC")


def _response(content: str) -> bytes:
    return f'<?xml version="1.0"?><methodResponse>{content}</methodResponse>'.encode()


def write_success(value: Any) -> bytes:
    """Return the answer to a call that succeeded."""
    return _response(f"<params><param>{xml_value({'Status': 'Success', 'Value': value})}</param></params>")


def write_failure(description: list[str]) -> bytes:
    """Return the answer to a call that failed."""
    return _response(f"<params><param>{xml_value({'Status': 'Failure', 'ErrorDescription': description})}</param></params>")


def write_fault(code: int, text: str) -> bytes:
    """Return the answer to what was no call at all."""
    return _response(f"<fault>{xml_value({'faultCode': I4(code), 'faultString': text})}</fault>")


# JSON-RPC.


def read_json(body: bytes) -> tuple[str, list[Any], Any, bool]:
    """Return method, parameters, id and whether it is version 2.0 of a JSON-RPC request."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the request is not JSON: {str(error)[:200]}") from None
    if not isinstance(request, dict) or not isinstance(request.get("method"), str):
        raise Malformed("the request is not a JSON-RPC object with a method")
    parameters = request.get("params", [])
    if not isinstance(parameters, list) or "id" not in request:
        raise Malformed("params must be an array and there must be an id; notifications are not supported")
    if request.get("jsonrpc", "1.0") not in ("1.0", "2.0"):
        raise Malformed("jsonrpc must be 1.0 or 2.0")
    return request["method"], parameters, request["id"], request.get("jsonrpc") == "2.0"


def json_reply(request_id: Any, version_2: bool, *, result: Any = None, failure: list[str] | None = None) -> bytes:
    """Return the JSON-RPC answer with ``result`` or ``failure``."""
    reply: dict[str, Any] = {"jsonrpc": "2.0"} if version_2 else {}
    if failure is None:
        reply |= {"result": result} if version_2 else {"result": result, "error": None}
    elif version_2:
        reply["error"] = {"code": 1, "message": failure[0], "data": failure[1:]}
    else:
        reply |= {"result": "", "error": failure}
    return json.dumps(reply | {"id": request_id}).encode()
