"""``simsr`` with a daemon elsewhere: https-setup makes what both sides need, and nothing is told to a daemon that is not the one meant."""

import json
import os
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_tools import running_simsrd


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What `simsr https-setup` made, as it says."""
    folder = tmp_path_factory.mktemp("https") / "new"
    command = [sys.executable, "-m", "simsr.cli.main", "https-setup", str(folder), "--json", "--name", "127.0.0.1", "--name", "laptop.example"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def url(made):
    options = ["--https", "127.0.0.1:0", "--https-cert", made["cert_pem"], "--https-key", made["key_pem"], "--token-file", made["token"]]
    with running_simsrd(*options) as simsrd:
        simsrd.create_sr()
        yield simsrd.get("/v1/daemon")["https"]


@pytest.fixture
def afar(monkeypatch, url, made):
    monkeypatch.setenv("SIMSR_SOCKET", url)
    monkeypatch.setenv("SIMSR_TOKEN_FILE", made["token"])
    monkeypatch.setenv("SIMSR_FINGERPRINT", made["fingerprint"])
    return monkeypatch


def test_what_is_made(made):
    for path, mode in ((made["cert_pem"], 0o600), (made["key_pem"], 0o600), (made["token"], 0o600)):
        assert stat.S_IMODE(os.stat(path).st_mode) == mode
    assert len(Path(made["token"]).read_text().strip()) >= 43
    shown = subprocess.run(
        ["openssl", "x509", "-in", made["cert_pem"], "-noout", "-fingerprint", "-sha256", "-text"], check=True, capture_output=True, text=True
    ).stdout
    assert made["fingerprint"] in shown and "IP Address:127.0.0.1, DNS:laptop.example" in shown
    ssl.create_default_context(cafile=made["cert_pem"])


def test_the_daemon_is_reached(afar, simsr, made):
    outcome = simsr("vdi", "create", "--size", "1MiB", "--name", "afar")
    assert (outcome.status, outcome.err) == (0, "")
    assert simsr("vdi", "show", "afar").status == 0
    afar.setenv("SIMSR_FINGERPRINT", made["fingerprint"].replace(":", "").lower())
    assert "afar" in simsr("vdi", "list").out
    assert simsr("vdi", "delete", "afar").status == 0


def test_another_certificate_is_told_nothing(afar, simsr, made):
    afar.setenv("SIMSR_FINGERPRINT", "00" * 32)
    outcome = simsr("vdi", "list")
    assert outcome.status == 4 and made["fingerprint"] in outcome.err and "Hint: Compare it" in outcome.err


def test_without_a_fingerprint_the_certificate_must_be_trusted(afar, simsr):
    afar.delenv("SIMSR_FINGERPRINT")
    outcome = simsr("vdi", "list")
    assert outcome.status == 4 and "certificate" in outcome.err.lower()
    assert "Hint: Name its certificate in SIMSR_FINGERPRINT" in outcome.err


def test_a_wrong_token(afar, simsr, tmp_path):
    wrong = tmp_path / "token"
    wrong.touch(0o600)
    wrong.write_text("wrong-wrong-wrong")
    afar.setenv("SIMSR_TOKEN_FILE", str(wrong))
    outcome = simsr("vdi", "list")
    assert outcome.status == 54 and "not allowed" in outcome.err


@pytest.mark.parametrize("variable, value, reason", [
    ("SIMSR_FINGERPRINT", "12", "SHA-256"), ("SIMSR_FINGERPRINT", "zz" * 32, "SHA-256"), ("SIMSR_TOKEN_FILE", "/nonexistent", "no such file"),
    ("SIMSR_TOKEN_FILE", "/etc/passwd", "chmod 600"), ("SIMSR_TOKEN_FILE", "", "must name"), ("SIMSR_SOCKET", "https://", "of the form"),
    ("SIMSR_SOCKET", "https://h:port", "https://h:port"), ("SIMSR_SOCKET", "https://h/path", "of the form"),
])  # fmt: skip
def test_bad_settings(afar, simsr, variable, value, reason):
    afar.setenv(variable, value)
    outcome = simsr("vdi", "list")
    assert outcome.status == 2 and reason in outcome.err and "Traceback" not in outcome.err


def test_nobody_there(afar, simsr):
    afar.setenv("SIMSR_SOCKET", "https://127.0.0.1:1")
    outcome = simsr("vdi", "list")
    assert outcome.status == 4 and "refused" in outcome.err


def test_setup_for_people_and_twice(simsr, tmp_path):
    outcome = simsr("https-setup", str(tmp_path / "x"), "--name", "localhost")
    assert outcome.status == 0 and outcome.lines[0].count(":") == 31
    assert "--https localhost:8443" in outcome.out and f"SIMSR_FINGERPRINT={outcome.lines[0]}" in outcome.out
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    again = simsr("https-setup", str(tmp_path / "x"))
    assert again.status == 1 and "exists already" in again.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before


@pytest.mark.parametrize("name", ["", "a,b", "a b", "-x", "x/y"])
def test_bad_names(simsr, tmp_path, name):
    outcome = simsr("https-setup", str(tmp_path / "x"), f"--name={name}")
    assert outcome.status == 2 and "neither a host name" in outcome.err and not (tmp_path / "x").exists()


def test_a_full_disk_leaves_nothing_that_the_next_run_would_find(simsr, tmp_path, monkeypatch):
    """openssl then ends with 0 and an empty certificate."""
    (tmp_path / "openssl").write_text('#!/bin/sh\nfor word; do case $last in -keyout|-out) : > "$word";; esac; last=$word; done\n')
    (tmp_path / "openssl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    outcome = simsr("https-setup", str(tmp_path / "made"))
    assert outcome.status == 1 and "cert.pem: openssl has not written all of it" in outcome.err
    assert os.listdir(tmp_path / "made") == []


def test_without_openssl(simsr, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = simsr("https-setup", str(tmp_path / "x"))
    assert outcome.status == 1 and "apt-get install openssl" in outcome.err


