"""The loader: what makes no sense is refused with the place, the reason and a way out; what makes sense is taken."""

import re
import tomllib
from unittest import mock

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_kit import HEAD, scenario

from scenarios.checks import client_problems
from scenarios.clients import CLIENTS
from scenarios.loader import library, library_text, load
from scenarios.schema import TABLES, Scenario, json_schema
from simsr.errors import BadScenario

PATHS = '[profile.p]\npaths = { A = "optimized", B = "standby" }\n'
POOL = '[profile.p]\ncapacity = "1GiB"\n'


def refused(text, source="t.toml"):
    with pytest.raises(BadScenario) as caught:
        load(text, source)
    return caught.value


def rule(match="", trigger="", action='error = "EIO"', rest="", kind="[[rule]]"):
    return f"{kind}\nmatch = {{ {match} }}\ntrigger = {{ {trigger} }}\naction = {{ {action} }}\n{rest}\n"


UNKNOWN = [
    ("sed = 7\n", "'sed'", "Did you mean 'seed'?"),
    ("[[rules]]\n", "'rules'", "Did you mean 'rule'?"),
    ('[[rule]]\naction = { dealy = "1ms" }\n', "'dealy'", "Did you mean 'delay'?"),
    ("[[rule]]\naction = { power-cut = {} }\n", "'power-cut'", "Did you mean 'power_cut'?"),
    (
        '[[rule]]\nmatch = { vm = "x" }\naction = { error = "EIO" }\n',
        "'vm'",
        "There are: client, fua, op, path, range, size, vdi.",
    ),
    ('[[rule]]\np = 0.1\naction = { error = "EIO" }\n', "'p'", "'p' belongs into trigger."),
    ('[[rule]]\naction = { error = "EIO", times = 1 }\n', "'times'", "'times' belongs into trigger."),
    ('[[rule]]\ntrigger = { range = "0..1" }\naction = { error = "EIO" }\n', "'range'", "'range' belongs into match."),
    ('[profile.x]\nlatency.raed = "1ms"\n', "'raed'", "Did you mean 'read'?"),
    ('[[phase]]\nfor_ = "1s"\n', "'for_'", "Did you mean 'for'?"),
    ('[[phase]]\nlength = "1s"\n', "'length'", "There are: for, name, profile, repeat, rule, until."),
]


@pytest.mark.parametrize("text, key, hint", UNKNOWN)
def test_unknown_keys(text, key, hint):
    error = refused(HEAD + text)
    assert f"the key {key} is not known" in str(error)
    assert hint in [problem["hint"] for problem in error.details["problems"]]


VALUES = [
    ("simsr", "simsr = 2\nname = 'x'\n", "2 is not 1"),
    ("simsr", "name = 'x'\n", "this is required"),
    ("name", "simsr = 1\nname = 'A B'\n", "should match"),
    ("seed", HEAD + "seed = -1\n", "greater than or equal to 0"),
    ("seed", HEAD + "seed = 1.5\n", "valid integer"),
    ("rule", HEAD + "[rule]\n", "[[...]] with two brackets"),
    ("profile", HEAD + "profile = 3\n", "must be a table"),
    ("action", HEAD + "[[rule]]\nname = 'x'\n", "this is required"),
    ("delay", HEAD + rule(action='delay = "3"'), "write its unit"),
    ("delay", HEAD + rule(action="delay = 3"), "3 is not a text such as '3ms'"),
    ("error", HEAD + rule(action='error = "EWHAT"'), "'EWHAT' is not an error such as EIO"),
    ("error", HEAD + rule(action='error = "E2"'), "not an error"),
    ("hang", HEAD + rule(action='hang = "forever"'), "until-released"),
    ("hang", HEAD + rule(action="hang = false"), "not true"),
    ("hang", HEAD + rule(action='hang = "0s"'), "not true"),
    ("rate", HEAD + rule(action='rate = "30MB"'), "rate such as 30MB/s"),
    ("rate", HEAD + rule(action='rate = "0/s"'), "hang = true"),
    ("iops", HEAD + rule(action="iops = 0"), "greater than or equal to 1"),
    ("op", HEAD + rule('op = "raed"'), "did you mean 'read'?"),
    ("op", HEAD + rule('op = ["read", "read"]'), "twice"),
    ("op", HEAD + rule("op = []"), "leave the key out"),
    ("client", HEAD + rule('client = "tapdsk"'), "did you mean 'tapdisk'?"),
    ("range", HEAD + rule('op = "read", range = "2GiB..1GiB"'), "empty range"),
    ("range", HEAD + rule('op = "read", range = "1GiB"'), "not a range"),
    ("size", HEAD + rule('op = "read", size = "10%..20%"'), "no shares"),
    ("p", HEAD + rule(trigger="p = 2"), "share between 0 and 1"),
    ("nth", HEAD + rule(trigger="nth = 0"), "from 1 on"),
    ("nth", HEAD + rule(trigger="nth = []"), "leave the key out"),
    ("skip", HEAD + rule(trigger="skip = 1.5"), "number of requests"),
    ("when", HEAD + rule(trigger='when = "pool-full"'), "event:pool-full"),
    ("block", HEAD + rule(trigger='bad_blocks = 0.1, block = "3KiB"'), "power of two"),
    ("bad_blocks", HEAD + rule(trigger="bad_blocks = [-1]"), "list of block numbers"),
    ("bad_blocks", HEAD + rule(trigger="bad_blocks = []"), "list of block numbers"),
    ("event", HEAD + rule(action='event = "Two Words"'), "not a name such as"),
    ("kill_daemon", HEAD + rule(action='kill_daemon = "before-lgo"'), "did you mean 'before-log'?"),
    ("full", HEAD + rule(action='full = "later"'), "not true, now or metadata"),
    ("goto", HEAD + rule(trigger="goto = 3"), "valid string"),
    ("state", HEAD + rule(trigger="state = [3]"), "not a name"),
    ("grows", HEAD + rule(trigger='bad_blocks = 0.1, grows = "fast"'), "x1.5 per 60s"),
    ("by", HEAD + rule(action="misdirect = {}"), "this is required"),
    ("by", HEAD + rule(action='misdirect = "100B"'), "sectors of 512"),
    ("by", HEAD + rule(action='misdirect = "uniform(8KiB, 4KiB)"'), "sectors of 512"),
    ("keep", HEAD + rule(action='power_cut = "some"', trigger="nth = 1"), "none, all, prefix"),
    ("torn", HEAD + rule(action='torn = { sector = "100B" }'), "power of two"),
    ("repeat", HEAD + "[[phase]]\nrepeat = 0\n", "each step of"),
    ("repeat", HEAD + '[[phase]]\nrepeat = "each step of rever"\n', "did you mean 'revert'?"),
    ("for", HEAD + '[[phase]]\nfor = "soon"\n', "duration"),
    ("paths.A", HEAD + '[profile.p]\npaths = { A = "on" }\n', "no state of a path"),
    ("read", HEAD + '[profile.p]\nlatency.read = "lognorml(p50=1ms)"\n', "did you mean 'lognormal'?"),
    ("base", HEAD + '[profile.p]\nbase = "nvm"\n', "no profile of the library is called 'nvm'"),
    ("as", HEAD + rule(action='replay = { trace = "t", as = "load" }'), "'load' is not 'workload' or 'latency'"),
]


@pytest.mark.parametrize("where, text, says", VALUES)
def test_values(where, text, says):
    error = refused(text)
    assert says in str(error) and where in error.details["where"]
    assert str(error).startswith("scenario t.toml, ")


NEVER = [
    ("nothing happens", rule(action=""), "Give one of"),
    ("torn cannot happen to read", rule('op = "read"', "", "torn = true"), "It is for write."),
    ("flip cannot happen to flush", rule('op = "flush"', "", "flip = 1"), "read, write"),
    ("stale cannot happen to write", rule('op = "write"', "", "stale = true"), "It is for read."),
    ("kill_daemon cannot happen to read", rule('op = "read"', "", 'kill_daemon = "at-step"'), "snapshot"),
    ("drain cannot happen to read", rule('op = "read"', "", 'drain = "1s"'), "close, detach"),
    ("no operation in common", rule(action='stale = true, drain = "1s"'), "of its own"),
    ("flush has no range", rule('op = "flush", range = "0..1MiB"'), "Leave range out."),
    ("read has no fua", rule('op = "read", fua = true'), "Leave fua out."),
    ("snapshot has no size", rule('op = "snapshot", size = "4KiB.."'), "Leave size out."),
    ("tapdisk never send flush", rule('op = "flush", client = "tapdisk"', "", 'delay = "1s"'), "Leave client out."),
    ("no profile has a path 'A'", rule('path = "A"'), "paths ="),
    ("no profile has a path 'C'", PATHS + rule('path = "C"'), "There are A, B."),
    ("can never fire: p is 0", rule(trigger="p = 0"), "between 0 and 1"),
    ("nth and every exclude", rule(trigger="nth = 1, every = 2"), "repeats"),
    ("times changes nothing", rule(trigger="nth = [1, 2], times = 2"), "Leave times out."),
    ("bad_blocks and bits exclude", rule(trigger="bad_blocks = 0.1, bits = 0.1"), "two rules"),
    ("no block is ever hit", rule(trigger="bad_blocks = 0"), "more than 0"),
    ("no block is ever hit", rule(trigger="bits = 0", action="flip = 1"), "more than 0"),
    ("grows is for a share", rule(trigger='bad_blocks = [1], grows = "x2 per 1s"'), "2e-5"),
    ("grows is for a share", rule(trigger='grows = "x2 per 1s"'), "2e-5"),
    ("per is for bits", rule(trigger='per = "byte-at-rest"'), "Leave it out."),
    ("block is for bad_blocks", rule(trigger='block = "512B"'), "Leave it out."),
    ("blocks are bad for read and write only", rule('op = "flush"', "bad_blocks = 0.1"), "read"),
    ("bits at rest can only be flipped", rule(trigger="bits = 0.1"), "flip = 1"),
    ("after needs either op or event", rule(trigger="after = {}"), "nth = 17"),
    ("after needs either op or event", rule(trigger='after = { op = "read", event = "event:pool-full" }'), "nth = 17"),
    ("nothing raises event:pool-ful", rule(trigger='when = "event:pool-ful"'), "Did you mean 'pool-full'?"),
    ("never happens without a pool", rule(trigger='when = "event:pool-full"'), "capacity"),
    ("no rule goes to state 'b'", rule(trigger='state = "b"'), "There are start."),
    ("no rule is for state 'b'", rule(trigger='goto = "b"'), "There are start."),
    ("heal_on_write is for bad_blocks", rule(action='error = "EIO", heal_on_write = true'), "bad_blocks = 1.0"),
    ("burst and iops_size are for", rule(action='error = "EIO", burst = "1MB"'), "one of these"),
    ("burst is for rate", rule(action='iops = 1, burst = "1MB"'), "rate"),
    ("iops_size is for iops", rule(action='rate = "1MB/s", iops_size = "4KiB"'), "iops"),
    ("group is for", rule(action='error = "EIO", group = "g"'), "Leave it out."),
    ("a limit has one group", rule(action='iops = 1, group = ["a", "b"]'), "Name one."),
    ("cannot hang", rule(action="hang = true, disconnect = true"), "two rules"),
    ("error_as is for", rule(action='delay = "1s", error_as = "hang"'), "Leave it out."),
    ("lose cannot happen to a request that ends with error", rule(action='lose = true, error = "EIO"'), "two rules"),
    ("lose and misdirect cannot happen to one", rule(action='lose = true, misdirect = "4KiB"'), "of its own"),
    ("state, up and down are for path", rule(action='error = "EIO", up = "1s"'), "flap"),
    ("inflight is for path", rule(action='error = "EIO", inflight = "hang"'), "Leave it out."),
    ("which path goes down?", PATHS + rule(action='path = "down"'), "match = { path"),
    ("is a state already", PATHS + rule('path = "A"', "", 'path = "down", state = "standby"'), "Leave state out"),
    ("what becomes of path 'B'?", PATHS + rule(action='path = "B"'), "optimized"),
    ("up and down are for flap", PATHS + rule('path = "A"', "", 'path = "flap", up = "1s"'), "flap"),
    ("no phase to end", rule(action='hang = "until-phase-end"'), "until-released"),
    ("there is no pool", rule(action='grow = "1GiB"'), "capacity"),
    ("there is no pool", rule(action='full = "now"', trigger="nth = 1"), "full = true"),
    ("the power would be cut at once", rule(action="power_cut = true"), "trigger"),
    ("no damage that could stick", rule(rest='sticks_to = "data"'), "bad_blocks"),
    ("2 rules are called 'a'", rule(rest='name = "a"') * 2, "differ"),
    ("never used: profile 'a' is for every disk", '[profile.a]\n[profile.b]\nvdi = "x"\n', "vdi"),
    ("burst is for rate", '[profile.a]\nburst = "1MB"\n', "as well"),
    ("there is no pool", '[profile.a]\nlow_water = "1MB"\n', "capacity"),
    ("above the capacity", '[profile.a]\ncapacity = "1MB"\nlow_water = "1MB"\n', "less"),
    ("no path can be used", '[profile.a]\npaths = { A = "down" }\n', "optimized"),
    ("nothing to share", '[profile.a]\nshare = { group = "g" }\n', "bytes, iops or depth"),
    (
        "has other limits elsewhere",
        '[profile.a]\nvdi = "a"\nshare = { group = "g", iops = 1 }\n[profile.b]\nshare = { group = "g", iops = 2 }\n',
        "same",
    ),
    ("what follows is never reached", "[[phase]]\n[[phase]]\n", "'for' or 'until'"),
    ("it is never repeated", "[[phase]]\nrepeat = 2\n", "'for' or 'until'"),
    ("lasts no time", '[[phase]]\nfor = "0s"\n', "more than 0"),
    ("there is no profile 'x'", '[profile.y]\n[[phase]]\nprofile = "x"\n', "y"),
    ("it needs either op or event", "[[phase]]\nuntil = {}\n", "event:NAME"),
    ("nothing raises event:x", '[[phase]]\nuntil = "event:x"\n', "There are"),
]


@pytest.mark.parametrize("reason, text, hint", NEVER)
def test_what_cannot_be_or_never_fires(reason, text, hint):
    error = refused(HEAD + text)
    found = [(problem["reason"], problem["hint"]) for problem in error.details["problems"]]
    assert any(reason in why and hint in how for why, how in found), found


def test_the_first_problem_is_shown_and_the_others_are_counted():
    error = refused(HEAD + rule(trigger="p = 0") + rule(action=""))
    assert len(error.details["problems"]) == 2 and str(error).endswith("(and 1 more)") and error.hint
    assert error.exit_code == 40 and error.http_status == 400


def test_places_are_named_with_their_line():
    text = (
        HEAD
        + '[[rule]]\naction = { error = "EIO" }\n\n[[phase]]\nname = "good"\nfor = "1s"\n[[phase]]\nname = "bad"\n[[phase.rule]]\nname = "r"\n# comment\ntrigger = { p = 7 }\naction = { error = "EIO" }\n'
    )
    assert refused(text).details["where"] == "phase 2 (bad), rule 1 (r), trigger.p, line 14"
    assert refused(HEAD + '[profile.x]\nlatency.read = "1"\n').details["where"] == "profile.x.latency.read, line 4"
    assert refused(HEAD + 'seed = "x"\n').details["where"] == "seed, line 3"


@pytest.mark.parametrize(
    "text, where",
    [("x = ", "(line 1, column 5|end of document)"), ("[a", "(line 1|end of document)"), ('a = "\n', "line 1"), ("a = 1\na = 2\n", "line 2")],
)
def test_not_toml(text, where):
    error = refused(text)
    assert "not TOML" in str(error) and re.match(where, error.details["where"])


@pytest.mark.parametrize(
    "text",
    ["seed = " + "9" * 5000, "x = " + "[" * 5000, "seed = " + "[" * 300 + "]" * 300, "x = 2024-99-99", "\0", "x = '\ud800'"],
    ids=range(6),
)
def test_texts_made_to_break_the_reader(text):
    assert refused(HEAD + text).details["reason"]


def test_of_several_unknown_keys_the_first_is_named():
    assert "'zz'" in str(refused(HEAD + "zz = 1\naa = 1\nmm = 1\n"))


def test_defaults():
    found = scenario()
    assert found.seed == 0 and found.error_as == "error" and not found.rule and not found.phase


def test_names_are_given():
    found = scenario(
        '[[rule]]\naction = { error = "EIO" }\n[[phase]]\nfor = "1s"\n[[phase.rule]]\naction = { error = "EIO" }\n[[phase]]\nname = "x"\n[[phase.rule]]\nname = "y"\naction = { error = "EIO" }\n'
    )
    assert [rule.name for rule in found.rule] == ["rule-1"]
    assert [(phase.name, phase.rule[0].name) for phase in found.phase] == [("phase-1", "phase-1/rule-1"), ("x", "y")]


def test_a_profile_on_top_of_one_of_the_library():
    found = scenario('[profile.mine]\nbase = "nvme"\ndepth = 7\nlatency.read = "9ms"\n').profile["mine"]
    library_one = load(library_text("nvme")).profile["nvme"]
    assert found.depth == 7 and found.latency.read.text == "9ms" and found.latency.write.text == library_one.latency.write.text


def test_a_scenario_that_is_not_in_the_library():
    with pytest.raises(BadScenario) as caught:
        library_text("nvmee")
    assert caught.value.hint == "Did you mean 'nvme'?"
    with pytest.raises(BadScenario):
        library_text("../loader")


class TestClients:
    def found(self, text, client):
        return [(problem.level, problem.reason) for problem in client_problems(scenario(text), client)]

    def test_tapdisk_dies_of_the_first_error(self):
        assert self.found(rule('op = "read"'), "tapdisk") == [("warning", "the first error costs tapdisk the disk for good")]
        assert self.found(rule('op = "read"', "", 'error = "EIO", error_as = "hang"'), "tapdisk") == []
        assert self.found('error_as = "disconnect"\n' + rule('op = "read"'), "tapdisk") == []
        assert self.found(rule('op = "read", client = "fuse"'), "tapdisk") == []
        assert self.found(rule('op = "snapshot"'), "tapdisk") == []

    @pytest.mark.parametrize("client", CLIENTS)
    def test_errors_that_nbd_cannot_carry(self, client):
        found = self.found(rule('op = "read"', "", 'error = "EAGAIN"'), client)
        assert found == ([] if client == "fuse" else [("error", f"{client} over NBD cannot be told EAGAIN")])

    def test_what_a_client_never_sends(self):
        assert self.found(rule('op = "flush"', "", 'delay = "1s"'), "tapdisk") == [
            ("error", "the rule can never fire: tapdisk never sends flush")
        ]
        assert self.found(rule('op = ["flush", "read"]', "", 'delay = "1s"'), "tapdisk") == []
        assert self.found(PATHS + rule('path = "A"', "", 'path = "down"'), "tapdisk") == []

    def test_patience(self):
        assert self.found(rule(action='hang = "121s"'), "tapdisk") == [("warning", "tapdisk does not wait 121s")]
        assert self.found(rule(action='hang = "119s"'), "tapdisk") == []
        phase = '[[phase]]\nfor = "31s"\n' + rule(action='hang = "until-phase-end"', kind="[[phase.rule]]")
        assert self.found(phase, "kernel") == [("warning", "kernel does not wait 31s")] and self.found(phase, "qemu") == []


@pytest.fixture(scope="module")
def check():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


class TestSchema:
    @pytest.mark.parametrize("name", library())
    def test_the_library_fits(self, check, name):
        check.validate(tomllib.loads(library_text(name)))

    @pytest.mark.parametrize("text, key, hint", UNKNOWN)
    def test_unknown_keys_do_not(self, check, text, key, hint):
        assert not check.is_valid(tomllib.loads(HEAD + text))

    @pytest.mark.parametrize(
        "bad",
        [
            "simsr = 2\nname = 'x'",
            "name = 'x'",
            HEAD + "seed = -1",
            HEAD + "[[rule]]",
            HEAD + "[[phase]]\nfor = 3",
            HEAD + rule('op = "raed"'),
        ],
    )
    def test_wrong_values_do_not(self, check, bad):
        assert not check.is_valid(tomllib.loads(bad))

    def test_every_key_of_every_table_is_there(self):
        schema = json_schema()
        for table in TABLES:
            properties = (schema if table is Scenario else schema["$defs"][table.__name__])["properties"]
            assert set(properties) == {field.alias or name for name, field in table.model_fields.items()}


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1ms", "read", "EIO", "50%", "event:x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["op", "p", "by", "keep", "nth", "read", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = sorted({(table, field.alias or name) for table in TABLES for name, field in table.model_fields.items()}, key=str)


@given(st.sampled_from(KEYS), values)
@settings(derandomize=True, database=None, max_examples=600, deadline=None)
def test_no_value_anywhere_is_anything_but_taken_or_refused(key, value):
    """What TOML can hold in any place either loads or is a BadScenario: never another exception."""
    table, name = key
    whole = {
        "simsr": 1,
        "name": "x",
        "rule": [{"action": {"delay": "1ms"}}],
        "phase": [{"rule": [{"action": {"error": "EIO"}}]}],
        "profile": {"p": {}},
    }
    places = {
        "Scenario": whole, "Rule": whole["rule"][0], "Phase": whole["phase"][0], "Profile": whole["profile"]["p"], "Action": whole["rule"][0]["action"],
    }  # fmt: skip
    inner = {
        "Match": ("Rule", "match"),
        "Trigger": ("Rule", "trigger"),
        "After": ("Phase", "until"),
        "LatencyTable": ("Profile", "latency"),
    }
    inner |= {"ControlTable": ("Profile", "control"), "Share": ("Profile", "share"), "WhenFull": ("Profile", "when_full")}
    inner |= {
        "Torn": ("Action", "torn"),
        "Misdirect": ("Action", "misdirect"),
        "PowerCut": ("Action", "power_cut"),
        "Replay": ("Action", "replay"),
    }
    if table.__name__ in inner:
        outer, key_there = inner[table.__name__]
        places[outer][key_there] = {name: value}
    elif table.__name__ in places:
        places[table.__name__][name] = value
    with mock.patch("tomllib.loads", return_value=whole):
        try:
            load("", "x")
        except BadScenario as error:
            assert error.details["where"] and error.details["reason"]
