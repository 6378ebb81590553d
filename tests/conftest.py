"""What all tests share: how much work the randomised ones do, and what they say when they fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

LONGEST = {"test_sigkill.py", "test_soak.py", "test_simulation.py", "test_cli_crash.py", "test_cli_smapi_check.py", "test_demo.py"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that in the end no worker waits for another one's half minute."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--effort", type=float, default=1.0, help="multiplies the number of seeds of the randomised tests (default 1)"
    )
    parser.addoption("--seed", type=int, default=None, help="run the randomised tests with this one seed only")


@pytest.fixture
def seeds(request: pytest.FixtureRequest) -> Callable[[int], Iterator[int]]:
    """``for seed in seeds(100): ...``: the seeds to run; the one that fails is named in the failure."""

    def run(count: int) -> Iterator[int]:
        only = request.config.getoption("--seed")
        wanted = range(max(1, round(count * request.config.getoption("--effort")))) if only is None else [only]
        for seed in wanted:
            request.node.user_properties[:] = [("seed", seed)]
            yield seed

    return run


@pytest.fixture
def note() -> Callable:
    """``with note(...):`` adds what it is given to the message of an exception that passes through."""

    @contextmanager
    def noting(**facts: object) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            error.add_note(", ".join(f"{name} {value}" for name, value in facts.items()))
            raise

    return noting


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed and (seed := dict(item.user_properties).get("seed")) is not None:
        report.sections.append(("seed", f"failed with seed {seed}; to repeat it: pytest {item.nodeid!r} --seed={seed}"))
    return report
