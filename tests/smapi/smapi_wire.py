"""The two documents of SMAPIv1, written and read independently of the plug-in and of xmlrpc.client.

`request` writes what xapi writes: no declaration, no blanks between elements, no type tags for strings, ``<value/>``
for the empty string, four characters escaped, control characters dropped. `parse_answer` accepts what xapi's parser
accepts and nothing else: no attributes, text only where a value is, known types only.
"""

import xml.etree.ElementTree as ElementTree

NIL = type("Nil", (), {"__repr__": lambda self: "nil"})()


class Fault(Exception):
    """The plug-in answered with a fault."""

    def __init__(self, number, text):
        super().__init__(number, text)
        self.number = number
        self.text = text


def escape(text):
    text = "".join(character for character in text if character >= " " or character in "\t\n\r")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def value(item):
    if isinstance(item, str):
        return f"<value>{escape(item)}</value>" if item else "<value/>"
    if isinstance(item, dict):
        members = "".join(f"<member><name>{escape(key)}</name>{value(part)}</member>" for key, part in item.items())
        return f"<value><struct>{members}</struct></value>" if members else "<value><struct/></value>"
    if isinstance(item, (list, tuple)):
        parts = "".join(value(part) for part in item)
        return f"<value><array>{f'<data>{parts}</data>' if parts else '<data/>'}</array></value>"
    raise TypeError(f"xapi sends no {type(item).__name__}")


def request(method, members):
    """Return the document for `method` with `members` as the struct, as bytes."""
    return (f"<methodCall><methodName>{escape(method)}</methodName><params><param>{value(members)}</param></params>"
            "</methodCall>").encode("utf-8", "surrogateescape")


def only_child(element, *tags):
    children = list(element)
    assert len(children) == 1 and children[0].tag in tags, f"<{element.tag}> must hold one of {tags}: {children}"
    assert not (element.text or "").strip() and not (children[0].tail or "").strip(), f"text inside <{element.tag}>"
    return children[0]


def parse_value(element):
    assert element.tag == "value", f"<{element.tag}> where a value belongs"
    if not list(element):
        return "" if not (element.text or "").strip() else element.text
    typed = only_child(element, "string", "int", "i4", "boolean", "nil", "array", "struct")
    text = typed.text or ""
    if typed.tag in ("string", "int", "i4", "boolean", "nil"):
        assert not list(typed), f"elements inside <{typed.tag}>"
    if typed.tag == "string":
        return text if text.strip() else ""
    if typed.tag in ("int", "i4"):
        number = int(text)
        assert -(2**31) <= number < 2**31, "an integer of more than 32 bits"
        return number
    if typed.tag == "boolean":
        return text != "0"
    if typed.tag == "nil":
        assert text == ""
        return NIL
    assert not text.strip(), f"text inside <{typed.tag}>"
    if typed.tag == "array":
        return [parse_value(part) for part in only_child(typed, "data")]
    return dict(parse_member(member) for member in typed)


def parse_member(member):
    assert member.tag == "member"
    name, content = list(member)
    assert name.tag == "name" and not list(name)
    return name.text, parse_value(content)


def parse_answer(document):
    """Return the value of the answer `document` (bytes); raise `Fault` if it is one."""
    root = ElementTree.fromstring(document.decode("utf-8"))
    assert not any(element.attrib for element in root.iter()), "an element has attributes"
    assert root.tag == "methodResponse"
    body = only_child(root, "params", "fault")
    if body.tag == "params":
        return parse_value(only_child(only_child(body, "param"), "value"))
    fault = parse_value(only_child(body, "value"))
    assert set(fault) == {"faultCode", "faultString"}
    assert type(fault["faultCode"]) is int and type(fault["faultString"]) is str
    raise Fault(fault["faultCode"], fault["faultString"])


def check_vdi_info(answer):
    """Return the uuid in a vdi_info, which must be one that xapi takes."""
    assert isinstance(answer, dict) and all(type(item) is str for item in answer.values()), answer
    assert answer["uuid"] == answer["location"]
    return answer["uuid"]


def check_attach(answer):
    """Return (socket path, export name) of an attach answer, which must be one that xapi takes."""
    types = {"params_nbd": str, "params": str, "o_direct": bool, "o_direct_reason": str, "xenstore_data": dict}
    assert "params_nbd" in answer and all(type(item) is types[key] for key, item in answer.items()), answer
    scheme, transport, path, export = answer["params_nbd"].split(":")
    assert (scheme, transport) == ("nbd", "unix")
    key, name = export.split("=")
    assert key == "exportname"
    return path, name
