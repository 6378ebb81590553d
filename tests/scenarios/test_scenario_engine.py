"""The engine: phases in time, live rules and their acknowledgement, orders, the decision log, and what it costs."""

import errno
import sys
from collections import Counter

import pytest
from scenario_kit import GIB, MIB, MS, S, ask, disk, engine, orders, scenario

from scenarios.engine import Engine
from scenarios.loader import load_rule
from scenarios.request import GO, Hang
from scenarios.timeline import plan_table
from simsr.errors import BadRequest, BadScenario, NotFound

PHASES = (
    '[[phase]]\nname = "one"\nfor = "10s"\n[[phase.rule]]\naction = { error = "EIO" }\n'
    '[[phase]]\nname = "two"\nfor = "5s"\nrepeat = 2\n[[phase.rule]]\naction = { delay = "1ms" }\n'
    '[[phase]]\nname = "three"\nuntil = { op = "flush", nth = 2 }\n[[phase.rule]]\naction = { error = "ENOSPC" }\n'
    '[[phase]]\nname = "four"\n'
)


class TestPhases:
    def test_by_time(self):
        many = engine(PHASES, now=100 * S)
        one = many.disk("d", GIB)
        found = []
        for at in range(100, 121):
            found.append((many.phase, ask(one, at=at * S).rules))
        names = [rules[0].split("/")[0] for _, rules in found]
        assert names == ["one"] * 10 + ["two"] * 10 + ["three"]
        assert [(at, more["name"]) for kind, at, more in orders(many)] == [
            (100, "one"),
            (110, "two"),
            (115, "two"),
            (120, "three"),
        ]

    def test_a_clock_that_looks_late_moves_nothing(self):
        many = engine(PHASES)
        assert many.next_change_ns == 10 * S
        many.advance(19 * S)
        assert many.phase == "two" and many.next_change_ns == 20 * S and many.has_orders
        assert [at for _, at, _ in orders(many)] == [0, 10, 15] and not many.has_orders

    def test_by_count(self):
        many = engine(PHASES)
        one = many.disk("d", GIB)
        many.advance(20 * S)
        assert ask(one, "flush", at=21 * S).error == errno.ENOSPC and many.phase == "three"
        assert ask(one, "flush", at=22 * S).error == errno.ENOSPC, "the request that ends the phase is still in it"
        assert many.phase == "four" and orders(many)[-1] == ("phase", 22.0, {"name": "four"})
        assert ask(one, at=23 * S) == GO and not many.is_over

    def test_for_or_until_whichever_is_first(self):
        text = '[[phase]]\nfor = "10s"\nuntil = { op = "flush", nth = 1 }\n[[phase]]\nname = "b"\n'
        many = engine(text)
        many.advance(10 * S)
        assert many.phase == "b"
        many = engine(text)
        ask(many.disk("d", GIB), "flush", at=S)
        assert many.phase == "b"

    def test_a_count_is_of_the_phase_and_of_its_disks(self):
        many = engine(
            '[[phase]]\nfor = "1s"\n[[phase]]\nuntil = { op = ["write", "zero"], nth = 2, vdi = "a" }\n[[phase]]\nname = "c"\n'
        )
        a, b = many.disk("a", GIB), many.disk("b", GIB)
        for one in (a, a, b):
            ask(one, "write", at=0)
        many.advance(S)
        for one in (b, b, a):
            ask(one, "zero", at=S)
        assert many.phase == "phase-2"
        ask(a, "write", at=S)
        assert many.phase == "c"

    def test_events_from_outside(self):
        many = engine('[[phase]]\nuntil = "event:steps-done"\n[[phase]]\nname = "b"\n')
        many.event("steps-done", 3 * S)
        assert many.phase == "b" and [kind for kind, _, _ in orders(many)] == ["phase", "event", "phase"]

    def test_an_event_before_the_phase_does_not_end_it(self):
        many = engine('[[phase]]\nfor = "1s"\n[[phase]]\nuntil = "event:steps-done"\n[[phase]]\nname = "c"\n')
        many.event("steps-done", 0)
        many.advance(S)
        assert many.phase == "phase-2"

    def test_phases_that_end_as_they_begin(self):
        text = (
            '[[phase]]\nuntil = "event:go"\nrepeat = 3000\n[[phase.rule]]\naction = { event = "go" }\n[[phase]]\nname = "end"\n'
        )
        many = engine(text)
        assert many.phase == "end" and sum(kind == "phase" for kind, _, _ in orders(many)) == 3001

    def test_each_step(self):
        many = engine('[[phase]]\nrepeat = "each step of revert"\n[[phase]]\nname = "b"\n')
        assert many.phase == "phase-1"
        many.event("steps-done", 0)
        assert many.phase == "b"

    def test_without_phases_it_never_ends(self):
        many = engine()
        many.advance(10**18)
        assert not many.is_over and many.phase is None and orders(many) == []

    def test_the_plan_for_people(self):
        assert plan_table(scenario(PHASES).phase) == [
            ("one", "10s", "one/rule-1", 1),
            ("two", "5s", "two/rule-1", 2),
            ("three", "until flush 2", "three/rule-1", 1),
            ("four", "to the end", "", 1),
        ]


class TestLive:
    def test_a_rule_is_in_force_when_the_call_returns(self):
        many = engine('[profile.p]\nlatency.all = "1ms"\n')
        one = many.disk("d", GIB)
        for _ in range(3):
            ask(one)
        assert many.add_rule(load_rule({"action": {"error": "EIO"}}, "live-1"), S) == 3, "the last request that it did not see"
        assert ask(one, at=S).error == errno.EIO
        assert many.statistics()["rules"] == [{"rule": "live-1", "action": "error", "in_force": True, "matched": 1, "hits": 1}]
        assert many.remove_rule("live-1", S) == 4
        assert ask(one, at=S).error == 0

    def test_a_disk_that_nothing_applied_to(self):
        many = engine()
        one = many.disk("d", GIB)
        assert not one.applies and ask(one) is GO
        many.add_rule(load_rule({"action": {"delay": "1ms"}}, "x"), 0)
        assert one.applies and many.take_orders()[-1].details == {"vdi": "d", "applies": True}

    def test_a_rule_of_a_phase_can_be_taken_out_of_force(self):
        many = engine('[[phase]]\nname = "a"\n[[phase.rule]]\nname = "bad"\naction = { error = "EIO" }\n')
        one = many.disk("d", GIB)
        assert ask(one).error == errno.EIO
        many.remove_rule("bad", S)
        assert ask(one, at=S).error == 0 and not many.live_rules

    def test_a_disk_without_rules_is_without_power_as_well(self):
        many = engine('[[rule]]\nmatch = { vdi = "a" }\ntrigger = { nth = 1 }\naction = { power_cut = { scope = "host" } }\n')
        cut, other = many.disk("a", GIB), many.disk("b", GIB)
        assert not other.applies and ask(other) is GO
        ask(cut, "write")
        assert other.applies and ask(other).disconnect
        many.power_on()
        assert not other.applies and ask(other) is GO

    def test_names_are_unique_and_must_be_known(self):
        many = engine(PHASES)
        with pytest.raises(BadRequest, match="another rule"):
            many.add_rule(load_rule({"action": {"error": "EIO"}}, "two/rule-1"), 0)
        with pytest.raises(NotFound, match="'nope'"):
            many.remove_rule("nope", 0)

    def test_live_rules_are_checked(self):
        with pytest.raises(BadScenario, match="acton") as caught:
            load_rule({"acton": {}}, "x")
        assert "Did you mean 'action'?" in [problem["hint"] for problem in caught.value.details["problems"]]
        with pytest.raises(BadScenario, match="no profile has a path 'A'"):
            load_rule({"match": {"path": "A"}, "action": {"path": "down"}}, "x")
        with_paths = scenario('[profile.p]\npaths = { A = "optimized" }\n')
        load_rule({"match": {"path": "A"}, "action": {"path": "down"}}, "x", scenario=with_paths)

    def test_states_can_be_built_up_rule_by_rule(self):
        many = engine()
        first = load_rule({"match": {"op": "flush"}, "trigger": {"goto": "bad"}, "action": {"delay": "1ms"}}, "one")
        many.add_rule(first, 0)
        with_first = many.scenario.model_copy(update={"rule": tuple(rule.spec for rule in many.live_rules)})
        many.add_rule(load_rule({"trigger": {"state": "bad"}, "action": {"error": "EIO"}}, "two", scenario=with_first), 0)
        one = many.disk("d", GIB)
        assert [ask(one, op).error for op in ("read", "flush", "read")] == [0, 0, errno.EIO]

    def test_reset(self):
        many = engine('[profile.p]\nlatency.all = "1ms"\n' + PHASES + '[[rule]]\nname = "h"\naction = { hang = true }\n')
        one = many.disk("d", GIB)
        ask(one, "write")
        one.overlay.data.patches.put(0, b"x", "r")
        many.reset(S)
        assert ask(one, at=S) == GO._replace(delay_ns=MS), "the disk is as its profile says"
        assert one.overlay.is_quiet and many.phase is None
        assert ("release", 1.0, {"rule": None, "error": 0}) in orders(many)

    def test_dead_man(self):
        text = '[[rule]]\nname = "a"\naction = { hang = true }\n[[rule]]\nname = "b"\npersist = true\nmatch = { op = "write" }\naction = { hang = true }\n'
        many = engine(text + '[[rule]]\nname = "c"\nmatch = { op = "read" }\naction = { error = "EIO" }\n')
        one = many.disk("d", GIB)
        assert ask(one).hang == Hang("a")
        many.dead_man(S)
        assert ask(one, at=S).hang is None and ask(one, at=S).error == errno.EIO
        assert ask(one, "write", at=S).hang == Hang("b")
        assert [more["rule"] for kind, _, more in orders(many) if kind == "release"] == ["a"]

    @pytest.mark.parametrize("text", ['error_as = "hang"\n[[rule]]\naction = { error = "EIO" }\n', '[[rule]]\naction = { error = "EIO", error_as = "hang" }\n'])
    def test_dead_man_knows_errors_that_hang(self, text):
        many = engine(text)
        assert ask(many.disk("d", GIB)).hang
        many.dead_man(0)
        assert [kind for kind, _, _ in orders(many)] == ["release"]

    TROUBLE = '[profile.p]\npaths = { A = "optimized" }\ncapacity = "1GiB"\n'

    @pytest.mark.parametrize("end", ["remove", "reset", "dead_man"])
    @pytest.mark.parametrize(
        "rule, released",
        [
            ({"match": {"path": "A"}, "action": {"path": "down"}}, "path:p"),
            ({"trigger": {"nth": 1}, "action": {"power_cut": {"scope": "host"}}}, None),
            ({"trigger": {"nth": 1}, "action": {"full": "now"}}, "pool:p"),
            ({"trigger": {"nth": 1}, "action": {"full": "metadata"}}, "pool:p"),
        ],
    )
    def test_what_commands_did_is_undone(self, rule, released, end):
        many = engine(self.TROUBLE)
        one = many.disk("d", GIB)
        many.add_rule(load_rule(rule, "live", scenario=many.scenario), 0)
        ask(one)
        troubled = ask(one, "write")
        assert troubled.hang or troubled.disconnect or troubled.error
        if end == "dead_man" and "full" in rule["action"]:
            many.dead_man(S)
            assert ask(one, "write", at=S).hang or ask(one, "write", at=S).error, "it does not hang for ever"
            return
        orders(many)
        {"remove": lambda: many.remove_rule("live", S), "reset": lambda: many.reset(S), "dead_man": lambda: many.dead_man(S)}[
            end
        ]()
        assert ask(one, "write", at=S) == GO._replace(rules=()) and not ask(one, at=S).disconnect
        kinds = {(kind, more.get("rule")) for kind, _, more in orders(many)}
        assert ("power_on", None) in kinds if released is None else kinds & {("release", released), ("release", None)}

    def test_forgotten_disks(self):
        many = engine('[profile.p]\ncontrol.scan = "per_vdi(1ms)"\n')
        one = many.disk("a", GIB)
        many.disk("b", GIB)
        one.vdis = 2
        assert many.disk("a", GIB) is one and ask(one, "scan").delay_ns == 2 * MS
        many.forget("b")
        assert [found["vdi"] for found in many.statistics()["disks"]] == ["a"]

    def test_phase_rules_do_not_pile_up(self):
        many = engine('[[phase]]\nfor = "1s"\nrepeat = 500\n[[phase.rule]]\nname = "r"\naction = { iops = 10 }\n')
        one = many.disk("d", GIB)
        for at in range(400):
            ask(one, at=at * S)
        assert len(many._limits) == 1 and len(one._counters) == 1


LOGGED = (
    '[[phase]]\nname = "a"\nfor = "10s"\n'
    '[[phase.rule]]\nmatch = { op = "read" }\ntrigger = { p = 0.2 }\naction = { error = "EIO", delay = "exp(mean=5ms)" }\n'
    '[[phase.rule]]\nmatch = { op = "write" }\ntrigger = { every = 3 }\naction = { flip = 3 }\n'
    '[[phase.rule]]\nmatch = { op = "read" }\ntrigger = { bits = 1e-5 }\naction = { flip = 1 }\n'
    '[[phase]]\nname = "b"\nfor = "10s"\n'
)


class TestDecisions:
    def run(self, many):
        disks = [many.disk(name, MIB) for name in "ab"]
        return [
            ask(one, op, 4096 * (at % 256), at=at * 50 * MS) for at in range(150) for one in disks for op in ("read", "write")
        ]

    def test_every_decision_is_logged(self):
        many = engine(LOGGED)
        plans = self.run(many)
        assert len(many.decisions) == many.decisions.count == sum(len(plan.rules) for plan in plans) > 100
        first = next(iter(many.decisions))
        assert first.rule.startswith("a/rule-") and first.disk in "ab" and first.number > 0
        errors = [found for found in many.decisions if found.rule == "a/rule-1"]
        assert all(found.u < 0.2 and found.op == "read" and found.actions == "delay+error" for found in errors)

    def test_the_log_can_be_run_again(self):
        many = engine(LOGGED)
        plans = self.run(many)
        lines = list(many.decisions.lines())
        again = engine(LOGGED, decisions=lines)
        assert self.run(again) == plans
        hits = [{line["rule"]: line["hits"] for line in one.statistics()["rules"]} for one in (many, again)]
        assert hits[0] == hits[1] and any(hits[0].values())
        without = engine(LOGGED.replace("p = 0.2", "p = 0.9").replace("every = 3", "every = 2"), decisions=lines)
        assert self.run(without) == plans, "the log decides, not the triggers"
        assert not any(plan.rules for plan in self.run(engine(LOGGED, decisions=[])))

    def test_commands_at_the_beginning_are_logged(self):
        many = engine(
            '[profile.p]\npaths = { A = "optimized" }\n[[phase]]\nname = "a"\n[[phase.rule]]\nmatch = { path = "A" }\naction = { path = "down" }\n'
        )
        assert [(found.rule, found.number, found.actions) for found in many.decisions] == [("a/rule-1", 0, "path")]

    @pytest.mark.parametrize("line", ["x", "{}", '{"at_ns": 1}', "[]", '{"places": 3}'])
    def test_logs_that_are_none(self, line):
        with pytest.raises(BadScenario, match="line 2"):
            engine(LOGGED, decisions=["", line])


def test_statistics_name_everything():
    many = engine(PHASES + '[profile.p]\ncapacity = "1GiB"\npaths = { A = "optimized" }\n', seed=5)
    ask(many.disk("d", GIB))
    found = many.statistics()
    assert found["scenario"] == "test" and found["seed"] == 5 and found["decided"] == 1
    assert found["timeline"] == {"phase": "one", "number": 1, "of": 4, "round": 1, "ends_ns": 10 * S}
    assert [rule["hits"] for rule in found["rules"]] == [1, 0, 0]
    assert found["disks"][0]["requests"] == {"read": 1}


def test_replaying_latency_needs_somebody_who_opens_traces():
    many = engine('[[rule]]\naction = { replay = { trace = "t", as = "latency" } }\n')
    with pytest.raises(BadRequest, match="cannot be replayed here"):
        many.disk("d", GIB)


def test_deciding_is_cheap():
    """Counted in calls of Python functions, which take the same number on every machine; a decision takes 2 to 5 us here."""
    text = '[profile.p]\nlatency.all = "lognormal(p50=1ms, p99=5ms)"\ndepth = 64\n'
    text += (
        '[[rule]]\ntrigger = { p = 0.01 }\naction = { error = "EIO" }\n' * 2
        + '[[rule]]\nmatch = { op = "read", range = "10%..20%" }\naction = { delay = "1s" }\n'
    )
    one, calls = disk(text), []
    sys.setprofile(lambda frame, event, argument: event == "call" and calls.append(frame.f_code.co_name))
    try:
        for number in range(2000):
            ask(one, at=number * MS)
    finally:
        sys.setprofile(None)
    assert len(calls) / 2000 < 40, Counter(calls)


def test_the_engine_takes_a_seed():
    text = '[profile.p]\nlatency.all = "exp(mean=1ms)"\n'

    def delays(many):
        one = many.disk("d", GIB)
        return [ask(one).delay_ns for _ in range(9)]

    assert (
        delays(Engine(scenario("seed = 4\n" + text)))
        == delays(Engine(scenario(text), seed=4))
        != delays(Engine(scenario(text)))
    )
