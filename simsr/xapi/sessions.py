"""Sessions: who may call. They live in memory only, so they end with the process, and after a day without a call.

Theory. A session of a plug-in is marked in ``other_config`` as xapi marks it, but what authorises the calls for plug-ins is
that the session was made here; no client can mark its own.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

import trio

from simsr.xapi.database import Database
from simsr.xapi.failure import XenError
from simsr.xapi.registry import method
from simsr.xapi.schema import now

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["Sessions", "IDLE_MAX_S"]

IDLE_MAX_S = 24 * 3600.0
SM_USER = "__sm__backend"


class Sessions:
    """All sessions. ``password`` None: whoever reaches the unix socket is trusted, and there is no other way in."""

    def __init__(self, db: Database, user: str, password: str | None) -> None:
        self._db = db
        self._user = user
        self._password = password
        self._last_used: dict[str, float] = {}
        self._of_sr: dict[str, str] = {}

    def login(self, user: str, password: str, originator: str, *, is_local: bool) -> str:
        """Return a new session. On the unix socket, as in dom0, an empty password is enough."""
        expected = self._password
        right_user = hmac.compare_digest(user.encode(), self._user.encode())
        if expected is None:
            right_password = is_local
        else:
            right_password = hmac.compare_digest(password.encode(), expected.encode()) or (is_local and not password)
        if not (right_user and right_password):
            raise XenError("SESSION_AUTHENTICATION_FAILED", user, "Authentication failure")
        return self._create(is_local_superuser=True, auth_user_name=user, originator=originator[:200])

    def _create(self, **values: object) -> str:
        host = next(iter(self._db.all("host")))
        session = self._db.create("session", this_host=host, last_active=now(), validation_time=now(), **values)
        self._last_used[session] = trio.current_time()
        return session

    def check(self, session: object) -> str:
        """Return ``session`` if it is valid and note that it is in use. Raises SESSION_INVALID."""
        if not isinstance(session, str) or session not in self._last_used:
            raise XenError("SESSION_INVALID", session[:200] if isinstance(session, str) else "")
        self._last_used[session] = trio.current_time()
        return session

    def is_sm(self, session: str) -> bool:
        """True if the session was made for a plug-in."""
        return session in self._of_sr.values()

    def for_sr(self, sr: str) -> str:
        """Return the session that plug-ins get when they work on ``sr``; one per SR, made when first needed."""
        if sr not in self._of_sr:
            self._of_sr[sr] = self._create(
                is_local_superuser=True, auth_user_name=SM_USER, originator="SM", other_config={"_sm_session": sr}
            )
        return self._of_sr[sr]

    def logout(self, session: str) -> None:
        """End a session."""
        self._last_used.pop(session, None)
        self._of_sr = {sr: other for sr, other in self._of_sr.items() if other != session}
        if self._db.has("session", session):
            self._db.delete("session", session)

    def forget_sr(self, sr: str) -> None:
        """End the session of an SR that is gone."""
        if sr in self._of_sr:
            self.logout(self._of_sr[sr])

    def expire(self) -> None:
        """End the sessions that nobody used for a day; those of plug-ins stay."""
        oldest = trio.current_time() - IDLE_MAX_S
        for session, used in list(self._last_used.items()):
            if used < oldest and not self.is_sm(session):
                self.logout(session)

    def statistics(self) -> dict[str, int]:
        """Return how many sessions there are."""
        return {"sessions": len(self._last_used), "of_plugins": len(self._of_sr)}


@method(
    "session.login_with_password",
    "uname string; pwd string; version string =; originator string =",
    needs_session=False,
)
def login_with_password(call: Call, user: str, password: str, version: str, originator: str) -> str:
    return call.model.sessions.login(user, password, originator, is_local=call.is_local)


@method("session.slave_local_login_with_password", "uname string; pwd string", needs_session=False)
def slave_local_login_with_password(call: Call, user: str, password: str) -> str:
    """The emergency login, for which xapi needs no master. The only host of a pool is its master, so it is a login like others."""
    return call.model.sessions.login(user, password, "", is_local=call.is_local)


@method("session.logout")
def logout(call: Call) -> None:
    call.model.sessions.logout(call.session)


method("session.local_logout")(logout)
