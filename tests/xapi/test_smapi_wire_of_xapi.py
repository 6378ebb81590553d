"""smapiv1.md sections 2 and 4: the documents as xapi writes and reads them, spelt out by hand, without xmlrpc.client."""

from __future__ import annotations

import pytest

from simsr.xapi import smapiv1
from simsr.xapi.failure import Unimplemented, XenError
from simsr.xapi.smapiv1 import read_answer, write_request


def answer(value: str) -> bytes:
    return f"<methodResponse><params><param>{value}</param></params></methodResponse>".encode()


def fault(number: str, text: str = "<value>text</value>") -> bytes:
    return (
        "<?xml version='1.0'?>\n<methodResponse>\n <fault><value><struct>\n"
        f"<member><name>faultCode</name><value>{number}</value></member><member><name>faultString</name>{text}</member>"
        "</struct></value></fault></methodResponse>"
    ).encode()


def code_of(function, *arguments, **more) -> list[str]:
    with pytest.raises(XenError) as caught:
        function(*arguments, **more)
    return caught.value.description


# What xapi sends.


def test_request_is_written_without_blanks_and_type_tags():
    members = {"command": "x", "args": [], "device_config": {}, "name": "", "list": ["a", ""], "map": {"k": "v"}}
    assert write_request("x", members) == (
        "<methodCall><methodName>x</methodName><params><param><value><struct>"
        "<member><name>command</name><value>x</value></member>"
        "<member><name>args</name><value><array><data/></array></value></member>"
        "<member><name>device_config</name><value><struct/></value></member>"
        "<member><name>name</name><value/></member>"
        "<member><name>list</name><value><array><data><value>a</value><value/></data></array></value></member>"
        "<member><name>map</name><value><struct><member><name>k</name><value>v</value></member></struct></value></member>"
        "</struct></value></param></params></methodCall>"
    )


def test_request_escapes_four_characters_and_drops_controls():
    document = write_request("x", {"a": "<&>\" '\x00\x01\x1f\t\n\r Grüße \U0001f600"})
    assert "<value>&lt;&amp;&gt;&quot; '\t\n\r Grüße \U0001f600</value>" in document


# What xapi accepts.


@pytest.mark.parametrize(
    "value", ["<value>x</value>", "<value><string>x</string></value>", "<value>\n <string>x</string>\n</value>"]
)
def test_forms_of_a_string(value):
    assert smapiv1.text(read_answer(answer(value))) == "x"


@pytest.mark.parametrize(
    "value",
    ["<value/>", "<value></value>", "<value><string/></value>", "<value>   </value>", "<value><string> \n</string></value>"],
)
def test_forms_of_the_empty_string(value):
    assert smapiv1.text(read_answer(answer(value))) == ""


def test_declaration_and_indentation_are_harmless():
    document = b"<?xml version='1.0' encoding='utf-8'?>\n<methodResponse>\n  <params>\n <param>\n<value><nil/></value>\n</param></params>\n</methodResponse>\n"
    assert smapiv1.unit(read_answer(document)) is None


@pytest.mark.parametrize("value", ["<value/>", "<value></value>", "<value><string/></value>", "<value>nil</value>"])
def test_unit_must_be_nil(value):
    assert code_of(smapiv1.unit, read_answer(answer(value)))[0] == "INTERNAL_ERROR"


@pytest.mark.parametrize("document", ["<methodResponse><params/></methodResponse>",
                                      "<methodResponse><params><param><value/></param><param><value/></param></params></methodResponse>"])  # fmt: skip
def test_no_param_and_two_params(document):
    assert code_of(read_answer, document.encode()) == ["INTERNAL_ERROR", "Unexpected response from SM plugin"]


@pytest.mark.parametrize("document", [b"", b"Traceback", b"<methodResponse>", b"\xff\xfe", b"<a/><b/>"])
def test_what_is_not_xml_is_shown_whole(document):
    description = code_of(read_answer, document, "it said")
    assert description[0] == "SR_BACKEND_FAILURE" and description[2:] == [document.decode(errors="replace"), "it said"]


def test_attributes_match_nothing():
    for document in (answer("<value><string kind='a'>x</string></value>"), answer("<value a='b'>x</value>")):
        assert code_of(smapiv1.text, read_answer(document))[0] == "INTERNAL_ERROR"
    assert (
        code_of(read_answer, b"<methodResponse a='b'><params><param><value/></param></params></methodResponse>")[0]
        == "INTERNAL_ERROR"
    )


def test_entities_are_not_expanded():
    bomb = b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "xxxxxxxxxx">]><methodResponse><params><param><value>&x;</value></param></params></methodResponse>'
    assert code_of(read_answer, bomb)[0] == "SR_BACKEND_FAILURE"


def test_depth_is_bounded():
    assert code_of(read_answer, b"<a>" * 100_000 + b"</a>" * 100_000)[0] == "SR_BACKEND_FAILURE"


# Faults.


def test_38_is_not_implemented():
    for number in ("<int>38</int>", "<i4>38</i4>"):
        with pytest.raises(Unimplemented, match="text"):
            read_answer(fault(number))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (39, ["SR_NOT_EMPTY"]),
        (24, ["VDI_IN_USE"]),
        (16, ["SR_DEVICE_IN_USE"]),
        (144, ["VDI_MISSING", "OpaqueRef:sr", "OpaqueRef:vdi"]),
        (44, ["SR_BACKEND_FAILURE_44", "", "text", "stderr"]),
        (1200, ["SR_BACKEND_FAILURE_1200", "", "text", "stderr"]),
    ],
)
def test_numbers_with_a_meaning(number, expected):
    assert code_of(read_answer, fault(f"<int>{number}</int>"), "stderr", sr="OpaqueRef:sr", vdi="OpaqueRef:vdi") == expected


def test_vdi_missing_without_a_vdi():
    assert code_of(read_answer, fault("<int>144</int>"), sr="OpaqueRef:sr") == ["VDI_MISSING", "OpaqueRef:sr", ""]


@pytest.mark.parametrize("number", ["<string>44</string>", "44", "<int>four</int>", "<double>44</double>"])
def test_fault_code_must_be_an_int(number):
    assert code_of(read_answer, fault(number))[0] == "INTERNAL_ERROR"


# vdi_info.


def struct(**members: str) -> str:
    inner = "".join(f"<member><name>{name}</name>{value}</member>" for name, value in members.items())
    return f"<value><struct>{inner}</struct></value>"


def test_vdi_info_takes_extra_strings():
    value = struct(uuid="<value>u</value>", location="<value><string>l</string></value>", other="<value/>")
    assert smapiv1.vdi_info(read_answer(answer(value))) == ("u", "l")


@pytest.mark.parametrize("odd", ["<value><int>1</int></value>", "<value><boolean>1</boolean></value>", "<value><nil/></value>"])
def test_one_member_that_is_no_string_spoils_vdi_info(odd):
    value = struct(uuid="<value>u</value>", location="<value>l</value>", other=odd)
    assert code_of(smapiv1.vdi_info, read_answer(answer(value)))[:2] == ["SR_BACKEND_FAILURE", ""]


def test_vdi_info_without_uuid():
    description = code_of(smapiv1.vdi_info, read_answer(answer(struct(location="<value>l</value>"))))
    assert description[:2] == ["SR_BACKEND_FAILURE", ""] and description[2].startswith("XML parse failure: <value>")
    assert description[3] == "<struct> missing field: uuid"


# Attach.


def test_attach_defaults():
    info = smapiv1.attach_info(read_answer(answer(struct(params_nbd="<value/>"))))
    assert (info.params_nbd, info.params, info.o_direct, info.o_direct_reason, info.xenstore_data) == ("", None, True, "", {})


def test_attach_with_everything():
    value = struct(
        params_nbd="<value>nbd:unix:/s:exportname=e</value>", params="<value>/dev/nbd3</value>",
        o_direct="<value><boolean>0</boolean></value>", o_direct_reason="<value>R</value>",
        xenstore_data=struct(key="<value>v</value>"),
    )  # fmt: skip
    info = smapiv1.attach_info(read_answer(answer(value)))
    assert (info.params, info.o_direct, info.o_direct_reason, info.xenstore_data) == ("/dev/nbd3", False, "R", {"key": "v"})


@pytest.mark.parametrize(("text", "expected"), [("0", False), ("1", True), ("false", True), ("", True)])
def test_boolean_is_true_unless_zero(text, expected):
    value = struct(params_nbd="<value/>", o_direct=f"<value><boolean>{text}</boolean></value>")
    assert smapiv1.attach_info(read_answer(answer(value))).o_direct is expected


def test_wrongly_typed_optional_members_count_as_absent():
    value = struct(
        params_nbd="<value/>", params="<value><int>1</int></value>", o_direct="<value>0</value>", xenstore_data="<value>x</value>"
    )
    info = smapiv1.attach_info(read_answer(answer(value)))
    assert (info.params, info.o_direct, info.xenstore_data) == (None, True, {})


@pytest.mark.parametrize(
    "value", [struct(params="<value>/dev/sda</value>"), struct(params_nbd="<value><int>1</int></value>"), "<value>x</value>"]
)
def test_attach_needs_params_nbd(value):
    assert code_of(smapiv1.attach_info, read_answer(answer(value)))[:2] == ["SR_BACKEND_FAILURE", ""]


# Driver info.


def driver(capabilities: str) -> bytes:
    names = "name description vendor copyright driver_version required_api_version"
    members = {name: "<value>t</value>" for name in names.split()}
    configuration = struct(key="<value>socket</value>", description="<value>where</value>")
    return answer(
        struct(
            **members, configuration=f"<value><array><data>{configuration}</data></array></value>",
            capabilities=f"<value><array><data>{capabilities}</data></array></value>",
        )
    )  # fmt: skip


def test_capabilities():
    words = ["VDI_CREATE", "VDI_RESET_ON_BOOT/2", "VDI_CLONE/0", "VDI_REVERT/x", "ATOMIC_PAUSE", "VDI_CREATE"]
    info = smapiv1.driver_info(read_answer(driver("".join(f"<value>{word}</value>" for word in words))))
    assert info.features == {"VDI_CREATE": 1, "VDI_RESET_ON_BOOT": 2, "VDI_CLONE": 1, "VDI_REVERT": 1}
    assert info.configuration == {"socket": "where"}


def test_driver_info_without_a_member():
    assert code_of(smapiv1.driver_info, read_answer(answer(struct(name="<value>x</value>"))))[0] == "INTERNAL_ERROR"


# Processes.


def test_process_that_does_not_end_well():
    assert smapiv1.failed_process(1, "out", "err").description == ["SR_BACKEND_FAILURE", "non-zero exit", "out", "err"]
    assert smapiv1.failed_process(-9, "out", "err").description == [
        "SR_BACKEND_FAILURE",
        "received signal: SIGKILL",
        "out",
        "err",
    ]
