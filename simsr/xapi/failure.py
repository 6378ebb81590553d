"""How a XenAPI call fails: a code and its parameters, all strings, in the order that the error catalogue gives them."""

from __future__ import annotations

from simsr.errors import SimsrError

__all__ = ["XenError", "internal_error", "Unimplemented"]


class XenError(SimsrError):
    """{code}: {parameters}"""

    def __init__(self, code: str, *parameters: str) -> None:
        super().__init__(code=code, parameters=", ".join(parameters) or "no parameters")
        self.xenapi_code = code
        self.parameters = parameters

    @property
    def description(self) -> list[str]:
        """The ErrorDescription on the wire."""
        return [self.xenapi_code, *self.parameters]


class Unimplemented(Exception):
    """A plug-in answered 38: not supported, nothing was touched. What that means is for the caller to say."""


def internal_error(text: str) -> XenError:
    """Return the error for what should not have happened."""
    return XenError("INTERNAL_ERROR", text)
