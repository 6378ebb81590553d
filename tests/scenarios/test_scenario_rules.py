"""When rules fire: every match and every trigger, what is counted for whom, and that the order of tasks changes nothing."""

import random

import pytest
from scenario_kit import GIB, KIB, MIB, S, ask, disk, engine, fired

RULE = "[[rule]]\n"
ACT = 'action = { error = "EIO" }\n'


def rule(match="", trigger="", action='error = "EIO"'):
    return f"[[rule]]\nmatch = {{ {match} }}\ntrigger = {{ {trigger} }}\naction = {{ {action} }}\n"


class TestMatch:
    def test_everything_by_default(self):
        one = disk(rule())
        for op in ("read", "write", "flush", "trim", "zero", "extents", "open", "close"):
            assert ask(one, op).rules == ("rule-1",)
        assert not ask(one, "snapshot").rules, "the control plane only when it is named"

    def test_op(self):
        one = disk(rule('op = ["write", "snapshot"]'))
        assert ask(one, "write").rules and ask(one, "snapshot").rules and not ask(one, "read").rules

    @pytest.mark.parametrize(
        "match, names, yes",
        [
            ("d1", (), True),
            ("d?", (), True),
            ("web-*", ("web-1",), True),
            ("web-*", (), False),
            ("d", (), False),
            ('["x", "d1"]', (), True),
        ],
    )
    def test_vdi(self, match, names, yes):
        value = match if match.startswith("[") else f'"{match}"'
        one = engine(rule(f"vdi = {value}")).disk("d1", GIB, names)
        assert one.applies is yes and bool(ask(one).rules) is yes

    @pytest.mark.parametrize(
        "offset, length, yes",
        [
            (0, 4096, False),
            (MIB - 4096, 4096, False),
            (MIB - 4095, 4096, True),
            (MIB, 1, True),
            (2 * MIB - 1, 1, True),
            (2 * MIB, 1, False),
            (0, GIB, True),
        ],
    )
    def test_range(self, offset, length, yes):
        one = disk(rule('op = "read", range = "1MiB..2MiB"'))
        assert bool(ask(one, "read", offset, length).rules) is yes

    def test_range_in_shares_follows_the_size(self):
        one = disk(rule('op = "read", range = "50%.."'), MIB)
        assert ask(one, "read", 512 * KIB).rules and not ask(one, "read", 508 * KIB).rules
        one.resize(2 * MIB)
        assert not ask(one, "read", 512 * KIB).rules and ask(one, "read", MIB).rules

    @pytest.mark.parametrize(
        "size, yes", [("4KiB..8KiB", (4096, 8192)), ("4KiB", (4096,)), ("8KiB..", (8192, 16384)), ("0..1", (1,))]
    )
    def test_size(self, size, yes):
        one = disk(rule(f'op = "read", size = "{size}"'))
        assert tuple(length for length in (1, 512, 4096, 8192, 16384) if ask(one, "read", 0, length).rules) == yes

    def test_fua(self):
        one = disk(rule('op = "write", fua = true'))
        assert ask(one, "write", fua=True).rules and not ask(one, "write").rules
        one = disk(rule('op = "write", fua = false'))
        assert not ask(one, "write", fua=True).rules and ask(one, "write").rules

    def test_client(self):
        one = disk(rule('client = ["tapdisk", "qemu"]'))
        assert ask(one, client="qemu").rules and not ask(one, client="fuse").rules and not ask(one).rules

    def test_path(self):
        one = disk('[profile.p]\npaths = { A = "optimized", B = "non-optimized" }\n' + rule('path = "B"'))
        assert not ask(one).rules and ask(one, path="B").rules


class TestTrigger:
    @pytest.mark.parametrize(
        "trigger, numbers",
        [
            ("", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
            ("every = 4", [4, 8, 12]),
            ("nth = 3", [3]),
            ("nth = [1, 5, 2]", [1, 2, 5]),
            ("times = 2", [1, 2]),
            ("skip = 10", [11, 12]),
            ("skip = 2, every = 3", [5, 8, 11]),
            ("skip = 5, nth = 2", [7]),
            ("every = 2, times = 3", [2, 4, 6]),
            ('skip = "10KiB"', [4, 5, 6, 7, 8, 9, 10, 11, 12]),
            ('skip = "8KiB", nth = 1', [3]),
            ("p = 1", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        ],
    )
    def test_counting(self, trigger, numbers):
        assert fired(disk(rule(trigger=trigger)), 12) == numbers

    @pytest.mark.parametrize("p", ["0.01", '"1%"', "0.5", '"99.9%"'])
    def test_p_is_the_share(self, p):
        share = float(p.strip('"%')) / (100 if "%" in p else 1)
        count = 20000
        found = len(fired(disk(rule(trigger=f"p = {p}")), count))
        assert abs(found - share * count) < 4.5 * (count * share * (1 - share)) ** 0.5

    def test_p_goes_with_the_seed_and_the_key_and_nothing_else(self):
        text = rule(trigger="p = 0.1")
        first = fired(disk(text), 500)
        assert fired(disk(text), 500) == first != fired(disk(text, seed=1), 500)
        assert fired(engine(text).disk("uuid", GIB, key="disk"), 500) == first != fired(engine(text).disk("other", GIB), 500)

    def test_all_parts_must_hold(self):
        both = fired(disk(rule(trigger="p = 0.3, every = 2")), 1000)
        assert set(both) < set(fired(disk(rule(trigger="p = 0.3")), 1000)) and all(number % 2 == 0 for number in both)

    def test_times_counts_what_fired(self):
        assert fired(disk(rule(trigger="p = 0.3, times = 3")), 1000) == fired(disk(rule(trigger="p = 0.3")), 1000)[:3]

    def test_when_an_event_has_happened(self):
        both = engine(rule("", 'when = "event:now"') + rule('op = "open"', "", 'event = "now"'))
        one = both.disk("d", GIB)
        assert fired(one, 3) == []
        assert ask(one, "open").rules == ("rule-2",)
        assert fired(one, 3) == [1, 2, 3]

    def test_after_counts_the_nth_request_in(self):
        one = disk(rule(trigger='after = { op = "write", nth = 3 }'))
        assert [bool(ask(one, op).rules) for op in ("read", "write", "write", "read", "write", "read")] == [False] * 4 + [
            True,
            True,
        ]

    def test_after_of_other_disks(self):
        both = engine(rule('vdi = "a"', 'after = { op = "write", nth = 2, vdi = "b*" }'))
        a, b, c = (both.disk(name, GIB) for name in "abc")
        for one in (a, b, c, a):
            ask(one, "write")
        assert not ask(a).rules
        ask(b, "write")
        assert ask(a).rules

    def test_after_an_event(self):
        both = engine(rule(trigger='after = { event = "event:pool-full" }') + '[profile.p]\ncapacity = "1GiB"\n')
        one = both.disk("d", GIB)
        assert not ask(one).rules
        both.event("pool-full", 0)
        assert ask(one).rules

    def test_state_and_goto(self):
        """blkdebug's example: the second write after a flush."""
        one = disk(
            rule('op = "flush"', 'goto = "flushed"', 'delay = "1ms"')
            + rule('op = "write"', 'state = "flushed", goto = "one"', 'delay = "1ms"')
            + rule('op = "write"', 'state = "one", goto = "start"')
        )
        ops = ["write", "flush", "read", "write", "write", "write", "flush", "write"]
        assert [ask(one, op).error for op in ops] == [0, 0, 0, 0, 5, 0, 0, 0]
        assert one.state == "one"

    def test_states_are_each_disks_own(self):
        both = engine(rule('op = "flush"', 'goto = "bad"', 'delay = "1ms"') + rule('op = "read"', 'state = ["bad"]'))
        a, b = both.disk("a", GIB), both.disk("b", GIB)
        ask(a, "flush")
        assert ask(a).error and not ask(b).error


class TestWhoCounts:
    def test_data_requests_count_for_each_disk(self):
        both = engine(rule(trigger="nth = 2"))
        a, b = both.disk("a", GIB), both.disk("b", GIB)
        assert [bool(ask(one).rules) for one in (a, b, a, b)] == [False, False, True, True]

    def test_control_requests_count_over_all_disks(self):
        both = engine(rule('op = "snapshot"', "nth = 2"))
        a, b = both.disk("a", GIB), both.disk("b", GIB)
        assert [bool(ask(one, "snapshot").rules) for one in (a, b, a)] == [False, True, False]

    def test_ops_of_one_rule_count_together(self):
        one = disk(rule('op = ["read", "write"]', "nth = 3"))
        assert [bool(ask(one, op).rules) for op in ("read", "write", "read", "write")] == [False, False, True, False]

    def test_a_phase_that_comes_again_counts_anew(self):
        one = disk('[[phase]]\nfor = "1s"\nrepeat = 2\n[[phase.rule]]\ntrigger = { nth = 2 }\naction = { error = "EIO" }\n')
        assert [bool(ask(one, at=at * S // 4).rules) for at in range(10)] == [False, True, False, False, False, True] + [
            False
        ] * 4

    def test_hits_and_matches_are_counted_over_repeats(self):
        many = engine(
            '[[phase]]\nfor = "1s"\nrepeat = 3\n[[phase.rule]]\nname = "r"\nmatch = { op = "read" }\ntrigger = { every = 2 }\naction = { error = "EIO" }\n'
        )
        one = many.disk("d", GIB)
        for at in range(12):
            ask(one, at=at * S // 4)
            ask(one, "write", at=at * S // 4)
        assert many.statistics()["rules"] == [{"rule": "r", "action": "error", "in_force": True, "matched": 12, "hits": 6}]


BUSY = (
    '[profile.p]\nlatency.all = "lognormal(p50=1ms, p99=9ms)"\n'
    + rule('op = "read"', "p = 0.1")
    + rule('op = ["read", "write"]', "p = 0.2", 'delay = "+ exp(mean=3ms)"')
    + rule('op = "write"', "every = 7", "flip = 2")
    + rule('op = "write"', "p = 0.3", 'torn = "512B"')
    + rule('op = "write"', "p = 0.05", 'misdirect = { by = "uniform(4KiB, 1MiB)" }')
    + rule('op = "read", range = "0..256MiB"', "bad_blocks = 0.1", 'delay = "1s", error = "EIO"')
)


def test_the_order_of_tasks_changes_nothing(seeds):
    """Each disk and operation is a stream of its own: however streams are interleaved, each gets the same plans."""

    def plans(order):
        many = engine(BUSY)
        disks = {name: many.disk(name, GIB) for name in "abc"}
        found = {}
        positions = dict.fromkeys(order, 0)
        for stream in order:
            positions[stream] += 1
            name, op = stream
            number = positions[stream]
            plan = ask(disks[name], op, (number * 7919 % 1000) * MIB // 2, 8192, at=0)
            found[stream, number] = plan
        return found

    streams = [(name, op) for name in "abc" for op in ("read", "write", "flush") for _ in range(60)]
    first = plans(streams)
    assert sum(bool(plan.effects) for plan in first.values()) > 30 and sum(bool(plan.error) for plan in first.values()) > 10
    for seed in seeds(5):
        shuffled = streams[:]
        random.Random(seed).shuffle(shuffled)
        assert plans(shuffled) == first


def test_a_disk_without_rules_is_not_asked():
    many = engine(
        '[[phase]]\nfor = "1s"\n[[phase]]\nfor = "1s"\n[[phase.rule]]\nmatch = { vdi = "a" }\naction = { error = "EIO" }\n'
    )
    a, b = many.disk("a", GIB), many.disk("b", GIB)
    assert not a.applies and not b.applies
    many.advance(S)
    assert a.applies and not b.applies
    many.advance(2 * S)
    assert not a.applies and many.is_over
    assert [(order.details, order.at_ns) for order in many.take_orders() if order.kind == "applies"] == [
        ({"vdi": "a", "applies": True}, S),
        ({"vdi": "a", "applies": False}, 2 * S),
    ]
