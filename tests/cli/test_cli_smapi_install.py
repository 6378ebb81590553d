"""`simsr smapi install` and `uninstall`: what they put where, that doing it twice is doing it once, and what they refuse to touch."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from simsr.cli.main import main
from simsr.personalities import find_personality
from simsr.smapi import install, placement

SHIPPED = "ext nfs iscsi lvmoiscsi dummy file hba rawhba udev iso lvm lvmohba lvmofcoe shm smb"
PLUGIN = Path(install.__file__).parent / "SimSR"
SM, FRAGMENT = "opt/xensource/sm", "etc/xapi.conf.d/zz-simsr.conf"
NOTHING_CHANGED = "Everything is installed already; nothing was changed.\n"


@pytest.fixture
def dom0(tmp_path) -> Path:
    """A root as a host has it: configuration, real drivers, a fragment of somebody else."""
    root = tmp_path / "dom0"
    (root / SM).mkdir(parents=True)
    (root / "etc/xapi.conf.d").mkdir(parents=True)
    (root / "etc/xapi.conf").write_text(f"# xapi\nlog = syslog:daemon\nsm-plugins={SHIPPED}\n")
    (root / "etc/xapi.conf.d/10-log.conf").write_text('disable-logging-for="http"\n')
    (root / SM / "EXTSR").write_text("#!/usr/bin/python3\n")
    return root


def photo(root: Path) -> dict[str, tuple]:
    """Everything below ``root``: kind, mode, content."""
    seen = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        seen[str(path.relative_to(root))] = (
            ("link", os.readlink(path)) if path.is_symlink() else ("directory", oct(mode)) if path.is_dir() else (oct(mode), path.read_bytes())
        )
    return seen


def plugins(root: Path, fragment: str = FRAGMENT) -> str:
    [line] = [line for line in (root / fragment).read_text().splitlines() if not line.startswith("#")]
    return line


def refused(simsr, root: Path, *words: str, status: int = 46) -> str:
    """The complaint of an installation that must change nothing."""
    before = photo(root)
    done = simsr("smapi", *words, "--root", str(root))
    assert (done.status, done.out) == (status, ""), done
    assert photo(root) == before
    return done.err


def test_install_and_uninstall(simsr, dom0):
    before = photo(dom0)
    done = simsr("smapi", "install", "--root", str(dom0))
    assert done.status == 0 and "xe-toolstack-restart" in done.out and "xe sm-list type=sim params=all" in done.out
    assert plugins(dom0) == f"sm-plugins={SHIPPED} sim"
    assert (dom0 / SM / "SimSR").read_bytes() == PLUGIN.read_bytes() and os.access(dom0 / SM / "SimSR", os.X_OK)
    assert {name: entry for name, entry in photo(dom0).items() if name in before} == before
    installed = photo(dom0)
    done = simsr("smapi", "install", "--root", str(dom0))
    assert (done.status, done.out) == (0, NOTHING_CHANGED) and photo(dom0) == installed
    done = simsr("smapi", "uninstall", "--root", str(dom0))
    assert done.status == 0 and "xe-toolstack-restart" in done.out and photo(dom0) == before
    done = simsr("smapi", "uninstall", "--root", str(dom0))
    assert (done.status, done.out) == (0, "Nothing of simsr is installed there; nothing was changed.\n")


def test_dry_run_says_what_the_run_then_does(simsr, dom0):
    for words in (["install", "--personality", "nfs"], ["uninstall"]):
        before = photo(dom0)
        said = simsr("smapi", *words, "--root", str(dom0), "--dry-run")
        assert said.status == 0 and photo(dom0) == before
        done = simsr("smapi", *words, "--root", str(dom0))
        steps = said.lines[:-1]
        assert said.lines[-1].startswith("Nothing was changed") and done.lines[: len(steps)] == steps and len(steps) >= 4


def test_an_empty_root_becomes_a_dom0_and_empty_again(simsr, tmp_path):
    root = tmp_path / "r"
    root.mkdir()
    done = simsr("smapi", "install", "--root", str(root))
    assert done.status == 0 and "only these drivers are accepted" in done.out and plugins(root) == "sm-plugins=sim"
    assert simsr("smapi", "uninstall", "--root", str(root)).status == 0
    assert photo(root) == {}


def test_what_others_put_beside_ours_stays(simsr, tmp_path):
    root = tmp_path / "r"
    root.mkdir()
    simsr("smapi", "install", "--root", str(root))
    (root / SM / "SimSR.no-revert").touch()
    assert simsr("smapi", "uninstall", "--root", str(root)).status == 0
    assert [name for name, entry in photo(root).items() if entry[0] != "directory"] == [f"{SM}/SimSR.no-revert"]


# The list of plug-ins.


@pytest.mark.parametrize(
    ("conf", "fragments", "expected"),
    [
        ("sm-plugins = ext  nfs # and others\n", {}, "ext nfs sim"),
        ('sm-plugins="ext nfs"\n', {}, "ext nfs sim"),
        ("sm-plugins=ext\nsm-plugins=nfs\n", {}, "nfs sim"),
        ("sm-plugins=ext\n", {"20-more.conf": "sm-plugins=ext linstor\n", "10-more.conf": "sm-plugins=zfs\n"}, "ext linstor sim"),
        ("sm-plugins=ext\n", {"zz-a.conf": "# sm-plugins=nfs\n", "zzz.conf": "log=x\n"}, "ext sim"),
        ("# nothing\n", {}, "sim"),
        ("sm-plugins=\n", {}, "sim"),
        ("sm-plugins=*\n", {}, None),
        ("sm-plugins=ext SIM\n", {}, None),
    ],
)
def test_the_list_in_force_is_copied(simsr, dom0, conf, fragments, expected):
    (dom0 / "etc/xapi.conf").write_text(conf)
    for name, text in fragments.items():
        (dom0 / "etc/xapi.conf.d" / name).write_text(text)
    before = photo(dom0)
    assert simsr("smapi", "install", "--root", str(dom0)).status == 0
    if expected is None:
        assert not (dom0 / FRAGMENT).exists(), "xapi accepts it as it is"
    else:
        assert plugins(dom0) == f"sm-plugins={expected}"
    assert simsr("smapi", "install", "--root", str(dom0)).out == NOTHING_CHANGED
    assert simsr("smapi", "uninstall", "--root", str(dom0)).status == 0 and photo(dom0) == before


def test_the_list_follows_the_distribution(simsr, dom0):
    """An upgrade of xapi brings another list; installing again takes it over."""
    simsr("smapi", "install", "--root", str(dom0))
    (dom0 / "etc/xapi.conf").write_text("sm-plugins=ext nfs newone\n")
    done = simsr("smapi", "install", "--root", str(dom0))
    assert done.status == 0 and f"replace {dom0}/{FRAGMENT}" in done.out and plugins(dom0) == "sm-plugins=ext nfs newone sim"
    (dom0 / "etc/xapi.conf").write_text("sm-plugins=*\n")
    assert f"remove {dom0}/{FRAGMENT}" in simsr("smapi", "install", "--root", str(dom0)).out
    assert not (dom0 / FRAGMENT).exists()


def test_sm_dir_of_the_configuration(simsr, dom0):
    (dom0 / "etc/xapi.conf").write_text("sm-dir = /usr/libexec/drivers\nsm-plugins=ext\n")
    assert simsr("smapi", "install", "--root", str(dom0)).status == 0
    assert (dom0 / "usr/libexec/drivers/SimSR").exists() and not (dom0 / SM / "SimSR").exists()


# Refusals.


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("etc/xapi.conf", b"sm-plugins ext nfs\n", "line 1: there is no '='"),
        ("etc/xapi.conf", b"a=b\nsm-plugins='ext nfs\n", "line 2: sm-plugins has \"'ext\""),
        ("etc/xapi.conf", b"sm-plugins=ext,nfs\n", "which is not the name of a driver"),
        ("etc/xapi.conf", b"sm-plugins=ext *\n", "'*' among other names"),
        ("etc/xapi.conf", b"sm-plugins=e\xff\n", "it is not UTF-8"),
        ("etc/xapi.conf", b"sm-dir=sm\n", "no absolute path"),
        ("etc/xapi.conf", b"#" * (1 << 20) + b"#", "more than 1048576 bytes"),
        ("etc/xapi.conf.d/zz-z.conf", b"sm-plugins=ext\n", "is read after zz-simsr.conf"),
        ("etc/xapi.conf.d/directory/file", b"", "is a directory"),
        ("opt/xensource/sm/SimSR", b"#!/bin/sh\n", "it was not put there by simsr"),
        ("etc/xapi.conf.d/zz-simsr.conf", b"sm-plugins=mine\n", "it was not put there by simsr"),
        ("opt/xensource/sm/SimSR/file", b"", "it was not put there by simsr"),
        ("var/lib/simsr/smapi.json", b"[]", "it is not a record of simsr"),
        ("var/lib/simsr/smapi.json", b'{"version": 2}', "version 2"),
        ("var/lib/simsr/smapi.json",
         b'{"version": 1, "settings": {}, "files": {"../../x": ["a"]}, "directories": []}', "a path that is not absolute"),
        ("var", b"a file", "not a directory"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(simsr, dom0, name, text, reason):
    path = dom0 / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    err = refused(simsr, dom0, "install")
    assert err.startswith("simsr: cannot ") and reason in err and str(dom0) in err


def test_links_do_not_lead_out_of_the_root(simsr, dom0, tmp_path):
    shutil.rmtree(dom0 / SM)
    (tmp_path / "outside").mkdir()
    (dom0 / SM).symlink_to(tmp_path / "outside")
    assert "a link leads out of" in refused(simsr, dom0, "install")
    (dom0 / SM).unlink()
    (dom0 / "usr/sm").mkdir(parents=True)
    (dom0 / SM).symlink_to("../../usr/sm")
    assert simsr("smapi", "install", "--root", str(dom0)).status == 0 and (dom0 / "usr/sm/SimSR").exists()
    assert simsr("smapi", "uninstall", "--root", str(dom0)).status == 0 and not list((dom0 / "usr/sm").iterdir())


def test_a_file_that_was_changed_is_left_alone(simsr, dom0):
    simsr("smapi", "install", "--root", str(dom0))
    with open(dom0 / SM / "SimSR", "a") as file:
        file.write("# mine\n")
    for words in (["install"], ["uninstall"]):
        assert "SimSR: it was changed since simsr put it there" in refused(simsr, dom0, *words)
    (dom0 / SM / "SimSR").unlink()
    assert simsr("smapi", "uninstall", "--root", str(dom0)).status == 0


def test_the_same_file_of_somebody_else_is_not_taken_away(simsr, dom0):
    shutil.copy(PLUGIN, dom0 / SM / "SimSR")
    before = photo(dom0)
    assert simsr("smapi", "install", "--root", str(dom0)).status == 0
    assert simsr("smapi", "uninstall", "--root", str(dom0)).status == 0
    assert photo(dom0) == before


def test_roots_that_cannot_be(simsr, tmp_path, monkeypatch):
    done = simsr("smapi", "install", "--root", str(tmp_path / "none"))
    assert done.status == 46 and "there is no such directory" in done.err
    if not os.path.exists("/etc/xapi.conf") and not os.path.exists("/opt/xensource/sm"):
        done = simsr("smapi", "install")
        assert done.status == 46 and "there is no xapi here" in done.err and "--root" in done.err
    (tmp_path / "r").mkdir()
    held = placement.Placement(str(tmp_path / "r"))
    done = simsr("smapi", "install", "--root", str(tmp_path / "r"))
    assert done.status == 46 and "another installation is under way" in done.err
    del held
    assert simsr("smapi", "install", "--root", str(tmp_path / "r")).status == 0


@pytest.mark.parametrize("name", ["simSR", "SIMSR", "simEXTSR"])
def test_driver_that_xapi_could_not_tell_from_ours(simsr, tmp_path, name):
    place = tmp_path / "opt/xensource/sm"
    place.mkdir(parents=True)
    (place / name).touch()
    before = photo(tmp_path)
    done = simsr("smapi", "install", "--root", str(tmp_path), "--personality", "ext")
    assert done.status == 46 and str(place / name) in done.err and "could not tell it from Sim" in done.err
    assert photo(tmp_path) == before


# Interruptions.


class Stop(BaseException):
    """The process ends here."""


def test_an_installation_that_is_cut_off_can_be_repeated_or_taken_back(simsr, dom0, monkeypatch):
    """Cut in front of every change of the file system."""
    (dom0 / "var/lib/simsr").mkdir(parents=True)  # the record's own directories cannot be in it
    before = photo(dom0)
    for name in ("install", "uninstall"):
        cut, whole = 0, False
        while not whole:
            if name == "uninstall":
                assert simsr("smapi", "install", "--root", str(dom0), "--personality", "ext").status == 0
            left = [cut]
            with monkeypatch.context() as patch:
                for call in ("rename", "mkdir", "unlink", "rmdir"):
                    patch.setattr(placement.os, call, cutting(getattr(os, call), left))
                try:
                    options = ["--personality", "ext"] if name == "install" else []
                    main(["smapi", name, "--root", str(dom0), *options])
                except Stop:
                    pass
                except SystemExit as ended:
                    assert ended.code == 0
                    whole = True
            for leftover in dom0.rglob(".simsr-*"):
                leftover.unlink()
            if cut % 2:
                assert simsr("smapi", "install", "--root", str(dom0), "--personality", "ext").status == 0
                assert plugins(dom0) == f"sm-plugins={SHIPPED} sim simext" and (dom0 / SM / "SimextSR").exists()
            assert simsr("smapi", "uninstall", "--root", str(dom0)).status == 0
            assert photo(dom0) == before, f"{name} cut in front of change {cut}"
            cut += 1
        assert cut >= 6


def cutting(real, left):
    def call(*arguments, **how):
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        return real(*arguments, **how)

    return call


def test_errors_of_the_system_are_told(simsr, dom0, monkeypatch):
    def fail(source, target):
        raise OSError(number, os.strerror(number), target)

    for number, hint in ((errno.EACCES, "Run it as root."), (errno.ENOSPC, "Run it again when that is mended.")):
        monkeypatch.setattr(placement.os, "rename", fail)
        done = simsr("smapi", "install", "--root", str(dom0))
        assert done.status == 46 and hint in done.err and os.strerror(number).lower() in done.err
        assert not list(dom0.rglob(".simsr-*")), "no temporary file is left"


# Personalities.


def test_drivers_for_personalities(simsr, dom0):
    done = simsr("smapi", "install", "--root", str(dom0), "--personality", "ext,nfs+revert, lvmoiscsi")
    assert done.status == 0
    assert plugins(dom0) == f"sm-plugins={SHIPPED} sim simext simnfs simlvmoiscsi"
    for driver, name in (("SimextSR", "ext"), ("SimnfsSR", "nfs+revert"), ("SimlvmoiscsiSR", "lvmoiscsi")):
        assert os.path.samefile(dom0 / SM / driver, dom0 / SM / "SimSR")
        assert json.loads((dom0 / SM / f"{driver}.personality").read_text()) == find_personality(name).describe()
    assert simsr("smapi", "install", "--root", str(dom0)).out == NOTHING_CHANGED, "what was installed stays"
    done = simsr("smapi", "install", "--root", str(dom0), "--personality", "ext+revert,iso")
    assert f"replace {dom0}/{SM}/SimextSR.personality" in done.out and f"link {dom0}/{SM}/SimisoSR -> SimSR" in done.out
    assert plugins(dom0).endswith(" sim simext simnfs simlvmoiscsi simiso")
    assert json.loads((dom0 / SM / "SimextSR.personality").read_text())["name"] == "ext+revert"


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--personality", "exr"], 44, "Did you mean ext?"),
        (["--personality", "ext,"], 44, "there is no personality ''"),
        (["--personality", "ext,ext+revert"], 2, "ext and ext+revert would both be SimextSR"),
        (["--personality", "array", "--real-names"], 2, "there is no real driver of that type"),
        (["--personality", "ext", "--real-names"], 46, "it has real drivers"),
    ],
)
def test_personalities_that_cannot_be(simsr, dom0, words, status, text):
    assert text in refused(simsr, dom0, "install", *words, status=status)


def test_real_names_in_a_root_for_tests(simsr, tmp_path):
    root = tmp_path / "r"
    root.mkdir()
    words = ("smapi", "install", "--root", str(root), "--personality", "ext,nfs,lvmoiscsi+revert", "--real-names")
    assert simsr(*words).status == 0
    assert {path.name for path in (root / SM).glob("*SR")} == {"SimSR", "EXTSR", "NFSSR", "LVMoISCSISR"}
    assert plugins(root) == "sm-plugins=sim ext nfs lvmoiscsi"
    assert simsr(*words).out == NOTHING_CHANGED
    (root / "usr/share/sm").mkdir(parents=True)
    assert "it has real drivers" in refused(simsr, root, "install", "--personality", "file", "--real-names")
    done = simsr("smapi", "install", "--personality", "ext", "--real-names", "--root", "/")
    assert done.status == 46


def test_a_file_that_the_disk_has_no_room_for_leaves_nothing(simsr, dom0, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("simsr.smapi.placement.os.fsync", full)
        done = simsr("smapi", "install", "--root", str(dom0))
        assert done.status == 46 and "no space left" in done.err
    assert not list(dom0.rglob(".simsr-*"))
    assert simsr("smapi", "install", "--root", str(dom0)).status == 0


# SMAPIv3.


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A tree of scripts in the place of simsr's own, and the plug-in beside it."""
    own = tmp_path / "package"
    volume, datapath = own / "v3/volume/org.xen.xapi.storage.simsr", own / "v3/datapath/nbd+sim"
    for directory in (volume, datapath):
        directory.mkdir(parents=True)
        for name in ("Plugin.Query", "module.py"):
            (directory / name).write_text(f"#!/usr/bin/python3\n# {random.Random(name).random()}\n")
        (directory / "Plugin.Query").chmod(0o755)
        (directory / "__pycache__").mkdir()
        (directory / "__pycache__/module.pyc").touch()
    (volume / "Volume.revert").symlink_to("Plugin.Query")
    shutil.copy(PLUGIN, own / "SimSR")
    monkeypatch.setattr(install, "_HERE", str(own))
    return own


@pytest.mark.parametrize("place", ["usr/libexec/xapi-storage-script", "var/lib/xapi/storage-scripts"])
def test_v3(simsr, dom0, tree, place):
    if place.startswith("usr"):
        (dom0 / place).mkdir(parents=True)
    before = photo(dom0)
    done = simsr("smapi", "install", "--v3", "--root", str(dom0))
    scripts = [line for line in done.lines if "storage-script" in line and not line.startswith("make")]
    assert done.status == 0 and len(scripts) == 5 and scripts[-1].endswith("volume/org.xen.xapi.storage.simsr/Plugin.Query")
    parts = [(line.split("/")[-3], line.split("/")[-1]) for line in scripts]
    assert parts.index(("volume", "module.py")) < parts.index(("datapath", "Plugin.Query")), "which runs as soon as it is there, and imports it"
    assert subprocess.run(["diff", "-r", "-x", "__pycache__", tree / "v3", dom0 / place], check=False).returncode == 0
    assert os.access(dom0 / place / "datapath/nbd+sim/Plugin.Query", os.X_OK)
    assert simsr("smapi", "install", "--root", str(dom0)).out == NOTHING_CHANGED
    (tree / "v3/datapath/nbd+sim/module.py").write_text("# newer\n")
    (tree / "v3/volume/org.xen.xapi.storage.simsr/Volume.revert").unlink()
    done = simsr("smapi", "install", "--root", str(dom0))
    assert [line.split()[0] for line in done.lines[:2]] == ["replace", "remove"]
    assert "xe sm-list type=simsr params=all" in done.out
    cache = dom0 / place / "datapath/nbd+sim/__pycache__"
    cache.mkdir()
    (cache / "module.cpython-36.pyc").touch()  # as Python leaves it when a script is run
    assert simsr("smapi", "uninstall", "--root", str(dom0)).status == 0 and photo(dom0) == before


def test_what_is_not_compiled_from_ours_stays(simsr, dom0, tree):
    assert simsr("smapi", "install", "--v3", "--root", str(dom0)).status == 0
    cache = dom0 / "var/lib/xapi/storage-scripts/datapath/nbd+sim/__pycache__"
    cache.mkdir()
    for name in ("module.cpython-36.pyc", "other.cpython-36.pyc"):
        (cache / name).touch()
    assert simsr("smapi", "uninstall", "--root", str(dom0)).status == 0
    assert [path.name for path in cache.iterdir()] == ["other.cpython-36.pyc"]


def test_v3_that_this_simsr_does_not_have(simsr, dom0, tree):
    shutil.rmtree(tree / "v3")
    assert "comes without the SMAPIv3 plug-in" in refused(simsr, dom0, "install", "--v3")
