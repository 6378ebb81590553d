"""The parts of the plug-in that no request shows: what goes to the log, texts that XML cannot carry, the doc page."""

import re
from pathlib import Path

import pytest

from smapi_kit import PLUGIN, SR_UUID

DOC = Path(__file__).parents[2] / "docs" / "smapi.md"


@pytest.fixture
def log_lines(monkeypatch):
    """What the script writes to syslog, with the options that it opened it with."""
    import syslog
    lines = []
    monkeypatch.setattr(syslog, "openlog", lambda ident, option, facility: lines.append((ident, facility)))
    monkeypatch.setattr(syslog, "syslog", lambda priority, text: lines.append(text))
    return lines


def test_log_lines_have_the_shape_of_smlog(script, log_lines):
    import syslog
    script.log("one\ntwo\x00\ud800")
    assert log_lines[0] == ("SM", syslog.LOG_LOCAL2)
    assert [bool(re.match(r"\[\d+\] ", line)) for line in log_lines[1:]] == [True, True]
    assert log_lines[1].endswith("] one") and log_lines[2].endswith("] two??")


def test_log_failure_fails_nothing(script, monkeypatch):
    import syslog

    def fail(*_):
        raise OSError("no syslog")

    monkeypatch.setattr(syslog, "openlog", fail)
    script.log("text")
    monkeypatch.setitem(__import__("sys").modules, "syslog", None)
    script.log("text")


def test_command_is_logged_with_its_time_and_without_secrets(script, log_lines, alone):
    alone.device_config.update(password_secret="s3cret1", chappassword="s3cret2", auth_token="s3cret3")
    document = alone.document("vdi_create", ["x"], session_ref="OpaqueRef:s3cret4",
                              vdi_sm_config={"my_secret": "s3cret5"})
    answer = script.answer(["SimSR", document.decode()])
    text = "\n".join(line for line in log_lines if isinstance(line, str))
    assert b"<int>1</int>" in answer
    assert "vdi_create" in text and SR_UUID in text and "fault 1:" in text
    assert re.search(r", \d+\.\d{3} s$", text)
    assert "s3cret" not in text and script.MASK in text


def test_unexpected_error_is_fault_1200_and_logged_in_full(script, log_lines, alone, monkeypatch):
    monkeypatch.setitem(script.COMMANDS, "sr_scan", lambda call: 1 / 0)
    assert b"<int>1200</int>" in script.answer(["SimSR", alone.document("sr_scan").decode()])
    assert any("Traceback" in line for line in log_lines if isinstance(line, str))
    monkeypatch.setitem(script.COMMANDS, "sr_scan", lambda call: exec("raise SystemExit(3)"))
    assert b"<int>1200</int>" in script.answer(["SimSR", alone.document("sr_scan").decode()])


@pytest.mark.parametrize("text", ["\x00", "a\x0b", "\x1f", "\ufffe", "\uffff", "\ud800"])
def test_text_that_xml_cannot_carry(script, text):
    with pytest.raises(script.SmFault) as caught:
        script.check_xml_text(text, "the name")
    assert caught.value.number == 447
    assert script.encode(text).endswith(b"?")


def test_text_that_xml_can_carry(script):
    text = "\t\n\r ~\x7f\x85é\ud7ff\ue000\ufffd\U00010000\U0010ffff"
    assert script.check_xml_text(text, "the name") == text


@pytest.mark.parametrize("text, expected", [
    ("2026-11-21T03:40:20Z", "20261121T03:40:20Z"), ("2026-11-21T03:40:20.123Z", "20261121T03:40:20Z"),
    ("20261121T03:40:20Z", "20261121T03:40:20Z"), (None, "19700101T00:00:00Z"), ("", "19700101T00:00:00Z")])
def test_times(script, text, expected):
    assert script.xenapi_time(text) == expected


def test_every_fault_number_has_a_text(script):
    raised = {int(number) for number in re.findall(r"SmFault\((\d+)", PLUGIN.read_text())}
    assert raised | set(script.XENAPI_FAULTS.values()) <= set(script.FAULTS)


def test_master_commands_and_faults_name_commands_that_exist(script):
    assert script.MASTER_ONLY <= set(script.COMMANDS)
    assert set(script.XENAPI_FAULTS) <= set(script.COMMANDS)


def test_doc_page_names_every_command_key_and_fault(script):
    text = DOC.read_text()
    for name in [*script.COMMANDS, *(key for key, _ in script.CONFIGURATION), script.NO_REVERT_SUFFIX]:
        assert f"`{name}`" in text or f"SimSR{name}" in text, name
    for number in sorted({int(number) for number in re.findall(r"SmFault\((\d+)", PLUGIN.read_text())}):
        assert re.search(rf"^\| {number}\b", text, re.MULTILINE), number


def test_doc_page_names_tests_that_exist():
    table = DOC.read_text().partition("## The contract, point by point")[2]
    named = set(re.findall(r"`(test_\w+)`", table))
    there = {name for path in Path(__file__).parent.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    assert len(named) > 30 and not named - there
