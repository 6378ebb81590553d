"""The hierarchy of errors: every class makes a sentence, and says the right thing to each face of simsr."""

import errno
import re
from string import Formatter

import pytest

from simsr import errors
from simsr.errors import BadRequest, BadSize, SimsrError, StoreError, TooLarge, Unsupported

CLASSES = [getattr(errors, name) for name in errors.__all__]
NAMES = [cls.__name__ for cls in CLASSES]

FAMILIES = {(BadRequest, BadSize), (BadRequest, TooLarge), (BadSize, TooLarge)}
"""Pairs of a class and one below it that share an exit status: a bad size is a usage error like any other."""

XAPI_KNOWS = {38: "SR_OPERATION_NOT_SUPPORTED", 39: "SR_NOT_EMPTY", 24: "VDI_IN_USE", 16: "SR_DEVICE_IN_USE", 144: "VDI_MISSING"}
"""What xapi makes of the fault numbers that mean something to it; of any other n it makes SR_BACKEND_FAILURE_n."""

OWN_XENAPI_CODE = {
    "NotASnapshot": "REVERT_ONLY_ALLOWED_ON_SNAPSHOT",
    "WrongKind": "VDI_INCOMPATIBLE_TYPE",
    "NoCbt": "VDI_NO_CBT_METADATA",
}
"""xapi finds these out itself, and then has a code of its own for them."""



def fields(cls):
    return {name for _, name, _, _ in Formatter().parse(cls.__doc__) if name is not None}


def make(cls, value="VALUE"):
    return cls(**{field: value for field in fields(cls)})


def test_all_is_complete():
    here = {name for name, thing in vars(errors).items() if isinstance(thing, type) and thing.__module__ == errors.__name__}
    assert here == set(NAMES) and len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("cls", CLASSES, ids=NAMES)
class TestEach:
    def test_the_docstring_is_filled(self, cls):
        error = make(cls)
        message = str(error)
        assert error.code == cls.__name__
        assert error.details == {field: "VALUE" for field in fields(cls)}
        assert message.count("VALUE") == len(re.findall(r"{\w+(?:!r)?}", cls.__doc__)) >= 1
        assert "{" not in message and "\n" not in message and "  " not in message
        assert not message.endswith(".") and not message[0].isspace()

    @pytest.mark.parametrize("value", ["{}", "{reason}", "{0}", "%s", "a\nb", "ä\ud800", "", None, 10**30, {"a": "b"}])
    def test_values_are_never_taken_for_templates(self, cls, value):
        assert str(value) in str(make(cls, value)) or repr(value) in str(make(cls, value))

    def test_a_missing_detail_is_a_bug_of_ours(self, cls):
        with pytest.raises(KeyError):
            cls()

    def test_attributes(self, cls):
        assert isinstance(cls.exit_code, int) and 1 <= cls.exit_code < 64, "others belong to shells and to BSD's sysexits"
        assert cls.nbd_errno in errno.errorcode
        assert 400 <= cls.http_status < 600
        assert isinstance(cls.sm_fault, int) and cls.sm_fault > 0
        assert isinstance(cls.hint, str) and (not cls.hint or cls.hint.endswith("."))

    def test_the_xenapi_code_is_what_xapi_makes_of_the_fault(self, cls, request):
        expected = XAPI_KNOWS.get(cls.sm_fault, f"SR_BACKEND_FAILURE_{cls.sm_fault}")
        assert cls.xenapi_code == OWN_XENAPI_CODE.get(cls.__name__, expected)

    def test_fault_38_is_for_unsupported_only(self, cls):
        assert (cls.sm_fault == 38) == issubclass(cls, Unsupported)
        assert (cls.http_status == 501) == issubclass(cls, Unsupported)

    def test_mistakes_of_the_caller_are_4xx(self, cls):
        ours = issubclass(cls, StoreError) and cls is not errors.StoreLocked
        ours |= cls in (SimsrError, Unsupported, errors.NoSpace, errors.DaemonUnreachable, errors.DaemonStopping)
        assert (cls.http_status >= 500) == ours

    def test_everything_is_a_simsr_error(self, cls):
        assert issubclass(cls, SimsrError) and not issubclass(cls, OSError)
        with pytest.raises(SimsrError):
            raise make(cls)


def test_exit_codes_are_unique():
    for first in CLASSES:
        for second in CLASSES:
            if first is not second and first.exit_code == second.exit_code:
                assert (first, second) in FAMILIES or (second, first) in FAMILIES, f"{first} and {second}"


def test_the_numbers_that_revert_depends_on():
    """xapi's VM.revert goes on, stops or clones by these."""
    faults = {"VdiInUse": 24, "NotFound": 144, "NoSpace": 44, "DaemonUnreachable": 47, "StoreError": 200}
    assert {name: getattr(errors, name).sm_fault for name in faults} == faults
    assert errors.ShrinkRefused.sm_fault == errors.BadSize.sm_fault == 79
    assert errors.SrNotEmpty.sm_fault == 39
