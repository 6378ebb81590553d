"""How an error is answered: JSON, with everything that each face of simsr needs of it (docs/api.md)."""

from __future__ import annotations

from fastapi.responses import JSONResponse

from simsr.errors import SimsrError

__all__ = ["error_answer"]


def error_answer(error: SimsrError, status: int | None = None) -> JSONResponse:
    """The answer for ``error``; ``status`` is HTTP's, if not the error's own."""
    details = {
        key: value if isinstance(value, str | int | float | bool | None) else str(value)
        for key, value in error.details.items()
    }
    body = {
        "code": error.code, "message": str(error), "hint": error.hint, "exit_code": error.exit_code,
        "sm_fault": error.sm_fault, "xenapi_code": error.xenapi_code, "details": details,
    }  # fmt: skip
    return JSONResponse({"error": body}, status_code=status or error.http_status)
