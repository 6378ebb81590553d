"""What is written beside its place must not take a device, a pipe or a link away."""

from __future__ import annotations

import os
import stat
import threading

import pytest

from simsr.cli.failures import FileFailure
from simsr.cli.report_file import page_file
from simsr.cli.traces import _written

REPORT_WORDS = b"<!doctype html>"


@pytest.fixture(params=["report", "trace"])
def bring(request, monkeypatch):
    """Bring a file to a path in one of the two ways; returns what was written."""

    def page(path: str) -> bytes:
        monkeypatch.setattr("simsr.cli.report_page.report_page", lambda report, version: REPORT_WORDS.decode())
        with page_file(path) as write:
            write({})
        return REPORT_WORDS

    def trace(path: str) -> bytes:
        with _written(path, force=True, keep=False) as out:
            out.write(REPORT_WORDS)
        return REPORT_WORDS

    return {"report": page, "trace": trace}[request.param]


def test_a_device_stays_one(bring, tmp_path):
    null = tmp_path / "null"
    os.mkfifo(null)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(null.read_bytes()), daemon=True)
    reader.start()
    said = bring(str(null))
    reader.join(60)
    assert got == [said] and stat.S_ISFIFO(null.lstat().st_mode)
    assert os.listdir(tmp_path) == ["null"]


def test_a_link_stays_one(bring, tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    said = bring(str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == said
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


@pytest.mark.parametrize(("name", "reason"), [("", "its name is empty"), (".", "it is a directory")])
def test_what_is_no_file_is_refused(bring, tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileFailure, match=reason):
        bring(name)
    assert os.listdir(tmp_path) == []
