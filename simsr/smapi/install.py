"""Installing the plug-ins for xapi: which files go where, and the line of configuration that makes xapi use them.

    SM_DIR/SimSR                     the SMAPIv1 plug-in (type sim)
    SM_DIR/SimextSR -> SimSR         the same for SRs that are like ext (type simext)
    SM_DIR/SimextSR.personality      what it is like, for the plug-in to read: JSON, as `Personality.describe`
    /etc/xapi.conf.d/zz-simsr.conf   sm-plugins: the list that was in force, and our names behind it
    SCRIPTS/volume, SCRIPTS/datapath the SMAPIv3 plug-in, the tree of simsr/smapi/v3 as it is

SM_DIR is what xapi.conf calls sm-dir. SCRIPTS is where xapi-storage-script looks: /usr/libexec/xapi-storage-script where a distribution has made it, else
the default that is compiled in. The key sm-plugins replaces the list, hence the copy; xapi reads the fragment last, hence its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from simsr.errors import BadRequest, InstallRefused
from simsr.personalities import Personality, find_personality
from simsr.smapi.placement import Placement, Step, Wanted
from simsr.smapi.xapi_conf import CONF_DIRECTORY, CONF_FILE, XapiConf, read_xapi_conf

__all__ = ["Installation", "Options", "FRAGMENT", "driver_name"]

FRAGMENT = "zz-simsr.conf"
PLUGIN = "SimSR"
STORAGE_SCRIPTS = ("/usr/libexec/xapi-storage-script", "/var/lib/xapi/storage-scripts")
_HERE = os.path.dirname(os.path.abspath(__file__))
_REAL_SM = ("/usr/libexec/sm", "/usr/share/sm", "/opt/xensource/sm/SR.py", "/opt/xensource/sm/FileSR.py")


@dataclass(frozen=True)
class Options:
    """What is to be installed besides what is there: ``personalities`` by name, under the ``real_names`` of their drivers or not."""

    personalities: tuple[str, ...] = ()
    real_names: bool = False
    v3: bool = False


def driver_name(personality: Personality, real: bool) -> str:
    """Return the name of the executable for SRs like ``personality``. Raises `BadRequest` if there is no real one."""
    base = personality.name.partition("+")[0]
    if not real:
        return f"Sim{base}SR" if base != "sim" else PLUGIN
    if personality.driver is None:
        raise BadRequest(what=f"--real-names with {personality.name}", reason="there is no real driver of that type")
    return personality.driver


class Installation:
    """What simsr has in the dom0 below ``root``. `plan_install` or `plan_uninstall`, then `apply`; `advice` says what is left to do."""

    def __init__(self, root: str) -> None:
        if not os.path.isdir(root):
            raise InstallRefused(action="use", path=root or "''", reason="there is no such directory", hint="Make it first.")
        self._placement = Placement(root)
        self.root = self._placement.root
        self._conf: XapiConf | None = None
        self.types: list[str] = []
        self._v3_types: list[str] = []
        self.steps: list[Step] = []

    @property
    def is_host(self) -> bool:
        return self.root == "/"

    @property
    def is_there(self) -> bool:
        return self._placement.is_there

    def _exists(self, path: str) -> bool:
        return os.path.lexists(os.path.join(self.root, path.lstrip("/")))

    # Planning.

    def plan_install(self, options: Options) -> list[Step]:
        """Return what is to be changed so that everything in ``options``, and what was installed before, is there as this simsr has it.

        Nothing is changed yet. Raises `InstallRefused`, `UnknownPersonality`, `BadRequest`.
        """
        conf = read_xapi_conf(self.root, FRAGMENT)
        if self.is_host and not conf.exists and not self._exists(conf.sm_directory):
            raise InstallRefused(
                action="install into", path="/", reason=f"there is no xapi here (no {CONF_FILE}, no {conf.sm_directory})",
                hint="Name the root of a dom0 or of a test with --root.",
            )  # fmt: skip
        drivers = self._drivers(options)
        v3 = options.v3 or bool(self._placement.settings.get("v3"))
        wanted = list(self._files(conf.sm_directory, drivers))
        if v3:
            scripts = _v3_files(self._scripts_root())
            queues = {os.path.basename(os.path.dirname(one.path)) for one in scripts if "/volume/" in one.path}
            self._v3_types = sorted(queue.rpartition(".")[2] for queue in queues)
            wanted += scripts
        self.types = [name.removesuffix("SR").lower() for name in drivers]
        self._refuse_namesakes(conf.sm_directory, drivers)
        if not all(conf.accepts(name) for name in self.types):
            wanted.append(self._fragment(conf))
        self._conf = conf
        self.steps = self._placement.plan(wanted, {"drivers": drivers, "v3": v3})
        return self.steps

    def plan_uninstall(self) -> list[Step]:
        """Return what is to be removed. Nothing is changed yet. Raises `InstallRefused`."""
        self.steps = self._placement.plan_removal()
        return self.steps

    def apply(self) -> None:
        """Do what was planned. Raises `InstallRefused`."""
        self._placement.apply(self.steps)

    def _drivers(self, options: Options) -> dict[str, str]:
        """{executable: personality}: SimSR, those that are there, those that are wanted."""
        wanted: dict[str, str] = {}
        for name in options.personalities:
            personality = find_personality(name)
            driver = driver_name(personality, options.real_names)
            if wanted.setdefault(driver, personality.name) != personality.name:
                reason = f"{wanted[driver]} and {personality.name} would both be {driver}"
                raise BadRequest(what="--personality", reason=reason)
        before = self._placement.settings.get("drivers", {})
        try:
            known = {str(driver): find_personality(str(name)).name for driver, name in before.items()}
        except AttributeError:
            raise InstallRefused(action="use", path=self.root, reason="the record of the installation there is damaged") from None
        if options.real_names:
            self._refuse_real_sm()
        return {PLUGIN: "sim"} | known | wanted

    def _driver_names(self, sm_directory: str) -> list[str]:
        """The drivers that xapi finds there."""
        directory = os.path.join(self.root, sm_directory.lstrip("/"))
        return sorted(name for name in os.listdir(directory) if name.endswith("SR")) if os.path.isdir(directory) else []

    def _refuse_namesakes(self, sm_directory: str, drivers: dict[str, str]) -> None:
        """xapi calls a driver by its name in lower case: of two that differ in case only it would run one or the other."""
        types = {name.lower(): name for name in drivers}
        for name in self._driver_names(sm_directory):
            if name not in drivers and name.lower() in types:
                reason = f"xapi could not tell it from {types[name.lower()]}"
                raise InstallRefused(action="install beside", path=f"{self.root.rstrip('/')}{sm_directory}/{name}", reason=reason, hint="Move it away.")

    def _refuse_real_sm(self) -> None:
        """The real names are for tests only: nothing may be there that a real SR could be using."""
        found = [path for path in _REAL_SM if self._exists(path)]
        sm_directory = read_xapi_conf(self.root, FRAGMENT).sm_directory
        for name in self._driver_names(sm_directory):
            if name != PLUGIN and not self._placement.is_ours(f"{sm_directory}/{name}"):
                found.append(f"{sm_directory}/{name}")
        if self.is_host or found:
            reason = f"it has real drivers ({found[0]})" if found else "it is this host"
            raise InstallRefused(
                action="install real names into", path=self.root, reason=reason,
                hint="Leave --real-names out, or name a root for tests with --root.",
            )  # fmt: skip

    def _files(self, sm_directory: str, drivers: dict[str, str]) -> Iterator[Wanted]:
        with open(os.path.join(_HERE, PLUGIN), "rb") as file:
            yield Wanted(f"{sm_directory}/{PLUGIN}", file.read(), executable=True)
        for driver, name in drivers.items():
            if driver == PLUGIN:
                continue
            text = json.dumps(find_personality(name).describe(), indent=1) + "\n"
            # First what it is like: without that it would be a driver like sim.
            yield Wanted(f"{sm_directory}/{driver}.personality", text.encode())
            yield Wanted(f"{sm_directory}/{driver}", link=PLUGIN)

    def _fragment(self, conf: XapiConf) -> Wanted:
        names = [*(conf.sm_plugins or ()), *(name for name in self.types if not conf.accepts(name))]
        source = f"the list in {conf.set_in.removeprefix(self.root.rstrip('/'))}" if conf.set_in else "no list was set"
        text = f"# Written by simsr smapi install: {source}, with simsr's drivers behind it.\nsm-plugins={' '.join(names)}\n"
        return Wanted(f"{CONF_DIRECTORY}/{FRAGMENT}", text.encode(), temporary_beside=False)

    def _scripts_root(self) -> str:
        return next((path for path in STORAGE_SCRIPTS if self._exists(path)), STORAGE_SCRIPTS[-1])

    # What is left to do.

    def advice(self) -> list[str]:
        """What whoever has installed or uninstalled has to do now, in sentences."""
        lines = [] if self.is_host else [f"This is for a dom0 whose root is {self.root}:"]
        lines.append("Restart the toolstack of that host, so that xapi looks at its drivers again: xe-toolstack-restart")
        lines += [f"Then this shows the driver: xe sm-list type={name} params=all" for name in [*self.types, *self._v3_types]]
        if self._conf and not self._conf.exists:
            lines.append(f"There is no {CONF_FILE}, so only these drivers are accepted.")
        return lines


def _v3_files(scripts_root: str) -> list[Wanted]:
    """The SMAPIv3 plug-in, file by file. Plugin.Query comes last, because a directory that answers it is in use; that of the
    datapath is asked as soon as it is there, and needs the modules beside the volume scripts.
    """
    tree = os.path.join(_HERE, "v3")
    found = []
    for part in ("datapath", "volume"):
        for directory, folders, names in os.walk(os.path.join(tree, part)):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            for name in names:
                path = os.path.join(directory, name)
                target = f"{scripts_root}/{os.path.relpath(path, tree)}"
                if os.path.islink(path):
                    found.append(Wanted(target, link=os.readlink(path)))
                else:
                    with open(path, "rb") as file:
                        found.append(Wanted(target, file.read(), executable=os.access(path, os.X_OK)))
    if not found:
        raise InstallRefused(action="install", path=tree, reason="this simsr comes without the SMAPIv3 plug-in", hint="Leave --v3 out.")

    def turn(one: Wanted) -> tuple[bool, bool, str]:
        is_query = one.path.endswith("/Plugin.Query")
        return is_query, ("/volume/" in one.path) == is_query, one.path

    return sorted(found, key=turn)
