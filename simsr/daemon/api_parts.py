"""What all parts of the control API share: bodies that are strict, references in paths, and the time that the store took."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import unquote

import trio
from fastapi import Response
from pydantic import AfterValidator, BaseModel, ConfigDict

__all__ = ["Body", "Reference", "timed"]

Reference = Annotated[str, AfterValidator(unquote)]
"""A uuid or name in a path. It comes as it was sent, so that a slash (%2F) in a name divides nothing, and is decoded here."""


class Body(BaseModel):
    """Fields that are not known are refused, so that a misspelling does not pass for a default."""

    model_config = ConfigDict(extra="forbid", strict=True)


def timed(response: Response, began: float) -> Response:
    """Say in ``response`` how long it took since ``began`` (trio's clock): from the decoded request until the change is durable."""
    response.headers["Server-Timing"] = f"store;dur={(trio.current_time() - began) * 1000:.3f}"
    return response
