"""What rules do: every action, alone and together, and the commands that change more than one request."""

import errno
import random

import pytest
from scenario_kit import GIB, KIB, MIB, MS, S, ask, disk, engine, orders

from scenarios.pool import Pool
from scenarios.request import Effect, Hang

PROFILE = '[profile.p]\nlatency.all = "10ms"\n'


def rule(match="", trigger="", action="", rest=""):
    return f"[[rule]]\nmatch = {{ {match} }}\ntrigger = {{ {trigger} }}\naction = {{ {action} }}\n{rest}\n"


class TestLatency:
    def test_profile(self):
        one = disk('[profile.p]\nlatency.all = "10ms"\nlatency.write = "3ms"\ncontrol.scan = "per_vdi(80ms)"\n')
        assert [ask(one, op).delay_ns // MS for op in ("read", "write", "flush", "scan", "snapshot")] == [10, 3, 10, 80, 0]

    @pytest.mark.parametrize("delay, expected", [("3ms", 3), ("+ 3ms", 13), ("* 3", 30), ("* (1 + depth)", 10)])
    def test_delay(self, delay, expected):
        assert ask(disk(PROFILE + rule(action=f'delay = "{delay}"'))).delay_ns == expected * MS

    def test_delays_in_the_order_of_the_rules(self):
        text = PROFILE + rule(action='delay = "* 2"') + rule(action='delay = "+ 5ms"') + rule(action='delay = "* 2"')
        assert ask(disk(text)).delay_ns == 50 * MS
        assert ask(disk(text + rule(action='delay = "1ms"'))).delay_ns == MS

    def test_profiles_choose_disks(self):
        many = engine('[profile.slow]\nvdi = "s*"\nlatency.all = "1s"\n[profile.rest]\nlatency.all = "1ms"\n')
        assert [ask(many.disk(name, GIB)).delay_ns for name in ("s1", "x")] == [S, MS]

    def test_a_phase_chooses_the_profile(self):
        one = disk(
            '[profile.good]\nlatency.all = "1ms"\n[profile.bad]\nlatency.all = "1s"\n[[phase]]\nfor = "1s"\n[[phase]]\nprofile = "bad"\nfor = "1s"\n'
        )
        assert [ask(one, at=at * S).delay_ns for at in range(3)] == [MS, S, MS]

    def test_a_rule_with_an_arm_sees_where_the_last_request_ended(self):
        one = disk('[[rule]]\naction = { delay = "seek(min=1ms, half=6ms, max=10ms)" }\n')
        assert [ask(one, "read", at, 4096).delay_ns for at in (0, 4096)] == [0, 0]
        assert ask(one, "read", 8192 + GIB // 2, 4096).delay_ns == 6 * MS

    def test_drain(self):
        one = disk(PROFILE + rule(action='drain = "5s"'))
        assert [ask(one, op).delay_ns // MS for op in ("close", "detach", "read")] == [5010, 5000, 10]

    def test_latency_does_not_depend_on_rules_of_others(self):
        text = '[profile.p]\nlatency.all = "exp(mean=1ms)"\n'
        plain = disk(text)
        ruled = disk(text + rule('op = "read"', "p = 0.5", 'error = "EIO"'))
        assert [ask(plain).delay_ns for _ in range(50)] == [ask(ruled).delay_ns for _ in range(50)]


class TestEnds:
    @pytest.mark.parametrize("name", ["EIO", "ENOSPC", "ESHUTDOWN", "ETIMEDOUT", "EROFS"])
    def test_error(self, name):
        plan = ask(disk(PROFILE + rule(action=f'error = "{name}"')))
        assert plan.error == getattr(errno, name) and plan.delay_ns == 10 * MS

    @pytest.mark.parametrize("where", ["rule", "scenario"])
    def test_error_as(self, where):
        def plan(way):
            top, inner = (f'error_as = "{way}"\n', "") if where == "scenario" else ("", f', error_as = "{way}"')
            return ask(disk(top + rule(action=f'error = "EIO"{inner}')))

        assert plan("error").error == errno.EIO
        assert plan("hang") == (0, 0, Hang("rule-1"), False, (), ("rule-1",), 0)
        assert plan("disconnect") == (0, 0, None, True, (), ("rule-1",), 0)

    @pytest.mark.parametrize("action, error", [("readonly = true", errno.EPERM), ("full = true", errno.ENOSPC)])
    def test_refused_writes(self, action, error):
        one = disk(rule(action=action))
        assert [ask(one, op).error for op in ("write", "zero", "read", "flush")] == [error, error, 0, 0]
        assert ask(one, "trim").error == (error if "readonly" in action else 0), "trimming needs no room"

    def test_hang_for_a_time(self):
        assert ask(disk(rule(action='hang = "70s"')), at=S).hang == Hang("rule-1", 71 * S)

    def test_hang_until_released(self):
        many = engine(rule(action="hang = true"))
        assert ask(many.disk("d", GIB)).hang == Hang("rule-1")
        many.remove_rule("rule-1", S)
        assert ("release", 1.0, {"rule": "rule-1", "error": 0}) in orders(many)

    def test_hang_until_the_phase_ends(self):
        many = engine('[[phase]]\nfor = "2s"\n[[phase.rule]]\nname = "h"\naction = { hang = "until-phase-end" }\n')
        one = many.disk("d", GIB)
        assert ask(one, at=S).hang == Hang("h")
        assert ask(one, at=2 * S).hang is None
        assert [order[:3] for order in orders(many)][1:] == [("release", 2.0, {"rule": "h", "error": 0}), ("over", 2.0, {})]

    def test_hung_requests_take_no_place_in_the_queue(self):
        one = disk('[profile.p]\ndepth = 1\nlatency.all = "10ms"\n' + rule(trigger="nth = 1", action="hang = true"))
        assert ask(one).hang and ask(one).delay_ns == 10 * MS

    def test_disconnect_with_an_error(self):
        plan = ask(disk(rule(action='error = "ESHUTDOWN", disconnect = true')))
        assert plan.disconnect and plan.error == errno.ESHUTDOWN

    def test_the_first_error_wins(self):
        plan = ask(disk(rule(action='error = "EIO"') + rule(action='error = "ENOSPC"')))
        assert plan.error == errno.EIO and plan.rules == ("rule-1", "rule-2")

    def test_an_error_leaves_the_data_alone(self):
        assert ask(disk(rule('op = "write"', "", "lose = true") + rule(action='error = "EIO"')), "write").effects == ()


def effect(action, op, offset=0, length=4096, trigger="", rest="", size_bytes=GIB, at=0):
    one = disk(rule(f'op = "{op}"', trigger, action, rest), size_bytes)
    effects = ask(one, op, offset, length, at=at).effects
    return effects[0] if effects else None


class TestDamage:
    def test_lose(self):
        assert effect("lose = true", "write") == Effect("lose", "rule-1", "data", None)
        assert effect('lose = "5s"', "write", at=S) == Effect("lose", "rule-1", "data", 6 * S)
        assert effect("lose = true", "flush", length=0).kind == "lose"
        assert effect("lose = true", "zero", length=GIB) is None, "too large to keep what was there"

    def test_sticks_to(self):
        assert effect("lose = true", "write", rest='sticks_to = "device"').sticks_to == "device"

    @pytest.mark.parametrize("keep", ["prefix", "suffix", "any"])
    @pytest.mark.parametrize("offset, length", [(0, 4096), (1000, 9000), (512, 1024), (300, 500)])
    def test_torn(self, keep, offset, length):
        one = disk(rule('op = "write"', "", f'torn = {{ sector = "512B", keep = "{keep}" }}'))
        seen = set()
        for _ in range(200):
            (found,) = ask(one, "write", offset, length).effects
            seen.add(found.value)
            covered = 0
            for start, end in found.value:
                assert covered <= start < end <= length
                assert start == 0 or (offset + start) % 512 == 0
                assert end == length or (offset + end) % 512 == 0
                covered = end
            assert 0 < sum(end - start for start, end in found.value) < length, "neither nothing nor all"
            if keep == "prefix":
                assert [start for start, _ in found.value] == [0]
            if keep == "suffix":
                assert [end for _, end in found.value] == [length]
        sectors = -(-(offset + length) // 512) - offset // 512
        assert len(seen) == sectors - 1 if keep != "any" or sectors == 2 else len(seen) > 2

    def test_torn_in_any_way(self):
        """Each sector is there or not, but some one is and the one behind it is not."""
        one, seen = disk(rule('op = "write"', "", 'torn = { sector = "512B", keep = "any" }')), set()
        for _ in range(400):
            (found,) = ask(one, "write", 0, 2048).effects
            there = {at // 512 for start, end in found.value for at in range(start, end, 512)}
            seen.add("".join("10"[sector not in there] for sector in range(4)))
        assert seen == {f"{number:04b}" for number in range(16) if "10" in f"{number:04b}"}

    def test_a_write_in_one_sector_cannot_tear(self):
        assert effect('torn = "4KiB"', "write") is None and effect("torn = true", "write", 100, 400) is None

    @pytest.mark.parametrize("op", ["read", "write"])
    def test_flip(self, op):
        one = disk(rule(f'op = "{op}"', "", "flip = 20"))
        bits = [ask(one, op, MIB, 512).effects[0].value for _ in range(300)]
        assert all(len(set(value)) == 20 and all(0 <= bit < 4096 for bit in value) for value in bits)
        counts = [sum(low <= bit < low + 512 for value in bits for bit in value) for low in range(0, 4096, 512)]
        assert max(counts) < 900 and min(counts) > 600, "everywhere alike: 750 each"
        assert len(effect("flip = 100", op, length=1).value) == 8, "a byte has no more"

    @pytest.mark.parametrize("op", ["read", "write"])
    def test_misdirect(self, op):
        one = disk(rule(f'op = "{op}"', "", 'misdirect = { by = "uniform(4KiB, 64KiB)" }'))
        away = [ask(one, op, 512 * MIB, 8192).effects[0].value - 512 * MIB for _ in range(300)]
        assert {abs(way) % 512 for way in away} == {0} and min(map(abs, away)) >= 4096 and max(map(abs, away)) <= 64 * KIB
        assert 100 < sum(way > 0 for way in away) < 200 and len(set(away)) > 150

    def test_misdirect_stays_on_the_disk(self):
        by = 'misdirect = { by = "64KiB" }'
        assert effect(by, "write", 0).value == 64 * KIB and effect(by, "write", GIB - 4096).value == GIB - 4096 - 64 * KIB
        assert effect(by, "write", 0, size_bytes=64 * KIB) is None, "nowhere to go"
        assert effect(by, "write", 0, length=4096, size_bytes=68 * KIB).value == 64 * KIB, "the very end is a place"

    def test_stale(self):
        assert effect("stale = true", "read") == Effect("stale", "rule-1", "data")

    def test_kill_daemon(self):
        many = engine('[[rule]]\naction = { kill_daemon = "at-step", group = ["disk0", "vm1"] }\n')
        meant, grouped, other = many.disk("disk0", GIB), many.disk("x", GIB, groups=["vm1"]), many.disk("disk2", GIB)
        for disk in (meant, grouped):
            (found,) = ask(disk, "revert").effects
            assert found.kind == "kill_daemon" and found.value == "at-step"
        assert not ask(other, "revert").effects, "its group is another one"


class TestPaths:
    TEXT = '[profile.p]\npaths = { A = "optimized", B = "standby" }\nlatency.all = "1ms"\n'

    def test_down_hangs_until_another_takes_over(self):
        many = engine(
            self.TEXT
            + '[[phase]]\nfor = "10s"\n[[phase]]\nfor = "10s"\n[[phase.rule]]\nmatch = { path = "A" }\naction = { path = "down", inflight = "hang" }\n'
            + '[[phase]]\nfor = "10s"\n[[phase.rule]]\naction = { path = "B", state = "optimized", release = "hang" }\n'
        )
        one = many.disk("d", GIB)
        assert ask(one).hang is None
        assert ask(one, at=10 * S).hang == Hang("path:p")
        assert ask(one, at=20 * S).hang is None
        kinds = [(kind, at) for kind, at, _ in orders(many) if kind != "phase"]
        assert kinds == [("inflight", 10.0), ("release", 20.0), ("release", 20.0)]

    def test_a_request_that_chose_its_path(self):
        one = disk(self.TEXT)
        assert ask(one, path="A").hang is None and ask(one, path="B").hang == Hang("path:p"), "standby carries nothing"

    def test_flap(self):
        many = engine(
            self.TEXT
            + '[[phase]]\nfor = "20s"\n[[phase.rule]]\nmatch = { path = "A" }\naction = { path = "flap", up = "2s", down = "3s" }\n'
        )
        one = many.disk("d", GIB)
        hangs = [ask(one, at=at * S).hang for at in range(10)]
        assert [bool(hang) for hang in hangs] == [False, False, True, True, True] * 2
        assert {hang.until_ns // S for hang in hangs if hang} == {5, 10}

    def test_a_command_at_the_beginning_with_a_fate_for_all_that_follows(self):
        many = engine(
            self.TEXT
            + '[[phase]]\nfor = "9s"\n[[phase.rule]]\nmatch = { path = "A" }\naction = { path = "up", delay = "+ 5ms" }\n'
        )
        one = many.disk("d", GIB)
        assert [ask(one).delay_ns // MS for _ in range(4)] == [6, 6, 6, 6]
        assert many.statistics()["rules"][0]["hits"] == 5

    def test_a_command_that_requests_fire_comes_once(self):
        many = engine(rule('op = "open"', "", 'event = "opened", delay = "1ms"'))
        one = many.disk("d", GIB)
        assert [ask(one, "open").delay_ns // MS for _ in range(3)] == [1, 0, 0]
        assert [kind for kind, _, _ in orders(many)] == ["event"]

    def test_only_the_profile_that_has_the_path(self):
        text = self.TEXT.replace("[profile.p]", '[profile.p]\nvdi = "a"')
        text += '[profile.q]\npaths = { X = "optimized" }\n[[rule]]\nmatch = { path = "X" }\naction = { path = "down" }\n'
        many = engine(text)
        assert ask(many.disk("a", GIB)).hang is None and ask(many.disk("b", GIB)).hang == Hang("path:q")

    def test_up_again(self):
        text = self.TEXT + '[[phase]]\nfor = "1s"\n[[phase.rule]]\nmatch = { path = "A" }\naction = { path = "down" }\n'
        many = engine(text + '[[phase]]\nfor = "1s"\n[[phase.rule]]\nmatch = { path = "A" }\naction = { path = "up" }\n')
        one = many.disk("d", GIB)
        assert ask(one).hang and not ask(one, at=S).hang
        assert many.statistics()["paths"] == {"p": {"A": "optimized", "B": "standby"}}

    def test_the_slower_path_is_taken_when_the_best_is_down(self):
        text = '[profile.p]\npaths = { A = "optimized", B = "non-optimized" }\n[[rule]]\nmatch = { path = "B" }\naction = { delay = "1s" }\n'
        one = disk(
            text
            + '[[phase]]\nfor = "1s"\n[[phase]]\nfor = "1s"\n[[phase.rule]]\nmatch = { path = "A" }\naction = { path = "down" }\n'
        )
        assert ask(one).delay_ns == 0 and ask(one, at=S).delay_ns == S


class TestPool:
    def pool(self, more="", rules="", capacity="1MiB"):
        return engine(f'[profile.p]\ncapacity = "{capacity}"\n{more}\n{rules}')

    def test_queue_then_fail(self):
        many = self.pool('when_full = { mode = "queue", timeout = "60s", then = "ENOSPC" }')
        one = many.disk("d", GIB)
        assert ask(one, "write", 0, MIB).hang is None
        assert ask(one, "write", MIB, at=S).hang == Hang("pool:p", 61 * S, errno.ENOSPC)
        assert ask(one, "write", 0, at=S).hang is None, "what it has already it may write"
        assert ask(one, "read", MIB).hang is None
        assert orders(many) == [("event", 0.0, {"name": "pool-full"})]

    def test_fail_at_once(self):
        one = self.pool('when_full = { mode = "error" }').disk("d", GIB)
        assert ask(one, "write", 0, 2 * MIB).error == errno.ENOSPC

    def test_events_come_once_for_each_edge(self):
        many = self.pool('low_water = "512KiB"')
        one = many.disk("d", GIB)
        for number in range(16):
            ask(one, "write", number * 64 * KIB, at=number)
        ask(one, "write", 2 * MIB, at=20)
        assert [(kind, round(at * S), more["name"]) for kind, at, more in orders(many)] == [
            ("event", 8, "pool-low"),
            ("event", 15, "pool-full"),
        ]
        ask(one, "trim", 0, MIB)
        ask(one, "write", 0, MIB, at=30)
        assert [more["name"] for _, _, more in orders(many)] == ["pool-low", "pool-full"]

    def test_snapshots_share_and_writes_take_new_room(self):
        many = self.pool(capacity="2MiB")
        one = many.disk("d", GIB)
        ask(one, "write", 0, MIB)
        assert ask(one, "snapshot").error == 0
        ask(one, "write", 0, MIB)
        assert many.pools["p"].free_bytes == 0
        assert ask(one, "snapshot").error == errno.ENOSPC and ask(one, "clone").error == errno.ENOSPC
        ask(one, "delete")
        assert many.pools["p"].free_bytes == MIB

    def test_room_that_disks_have_already(self):
        many = self.pool()
        many.pools["p"].adopt("d", [(0, 512 * KIB)])
        one = many.disk("d", GIB)
        ask(one, "write", 0, 512 * KIB)
        assert many.statistics()["pools"] == [{"pool": "p", "capacity_bytes": MIB, "used_bytes": 512 * KIB, "read_only": False}]

    def test_full_now_and_grow(self):
        rules = rule('op = "snapshot"', "nth = 2", 'full = "now"') + rule('op = "open"', "", 'grow = "1MiB"')
        many = self.pool("", rules)
        a, b = many.disk("a", GIB), many.disk("b", GIB)
        assert ask(a, "snapshot").error == 0
        assert ask(b, "snapshot").error == errno.ENOSPC, "the pool is full before the second disk's snapshot"
        assert ask(a, "write").hang
        ask(a, "open", at=S)
        assert ("release", 1.0, {"rule": "pool:p", "error": 0}) in orders(many)
        assert ask(a, "write").hang is None

    def test_any_history_against_books(self, seeds):
        """``owned``: the chunks that each disk has to itself; ``used``: those and what only snapshots have."""
        chunk = 64 * KIB
        for seed in seeds(60):
            rng, owned = random.Random(seed), {"a": set(range(3, 3 + 6)), "b": set()}
            pool, chunks, used = Pool("p", 24 * chunk, lambda event: None, queues=False), 24, 6
            pool.adopt("a", [(3 * chunk + 512, 5 * chunk), (3 * chunk, 512)])
            for _ in range(40):
                disk, op = rng.choice("ab"), rng.choice(("write", "write", "write", "trim", "trim", "snapshot", "delete", "grow"))
                offset, length = rng.randrange(12 * chunk), rng.randrange(1, 16 * chunk)
                error = pool.grow(chunk) if op == "grow" else pool.fate(op, disk, offset, length, 0)
                mine, end = owned[disk], offset + length
                if op == "grow":
                    chunks += 1
                elif op == "write":
                    fresh = set(range(offset // chunk, -(-end // chunk))) - mine
                    fits = used + len(fresh) <= chunks
                    assert error == (None if fits else errno.ENOSPC), f"seed {seed}"
                    mine |= fresh if fits else set()
                    used += len(fresh) * fits
                elif op == "snapshot":
                    assert error == (None if used < chunks else errno.ENOSPC), f"seed {seed}"
                    owned[disk] = mine if error else set()
                else:  # a trim frees whole chunks
                    gone = mine & set(range(-(-offset // chunk), end // chunk)) if op == "trim" else mine
                    owned[disk] = mine - gone
                    used -= len(gone)
                assert (pool.used_bytes, pool.free_bytes) == (used * chunk, (chunks - used) * chunk), f"seed {seed}"

    def test_each_edge_is_told_of_again(self):
        events = []
        pool = Pool("p", 4 * 64 * KIB, events.append, low_water_bytes=128 * KIB, queues=False)
        pool.fate("write", "a", 0, 256 * KIB, 0)
        assert events == ["pool-low", "pool-full"]
        pool.grow(256 * KIB)
        pool.fate("write", "a", 256 * KIB, 256 * KIB, 0)
        assert events == ["pool-low", "pool-full"] * 2
        pool.fill_metadata()
        pool.fill_metadata()
        assert events[4:] == ["pool-metadata-full"] and pool.fate("trim", "a", 0, 256 * KIB, 0) is None and not pool.free_bytes

    def test_what_disks_have_already_may_fill_it(self):
        events = []
        Pool("p", 128 * KIB, events.append).adopt("a", [(64 * KIB, 128 * KIB)])
        assert events == ["pool-full"]

    @pytest.mark.parametrize("needs_check", [True, False])
    def test_metadata_full(self, needs_check):
        rules = rule('op = "snapshot"', "", 'full = "metadata"') + rule('op = "open"', "", 'grow = "1MiB"')
        many = self.pool(f"metadata_full = {{ needs_check = {str(needs_check).lower()} }}", rules)
        one = many.disk("d", GIB)
        assert ask(one, "snapshot").error == errno.ENOSPC
        assert ask(one, "write").error == errno.EIO and ask(one, "read").error == 0
        ask(one, "open")
        assert ask(one, "write").error == (errno.EIO if needs_check else 0)


class TestPowerAndEvents:
    CUT = 'power_cut = { keep = "p=0.5", torn = "512B", scope = "SCOPE", order = "any" }'

    def cut(self, scope):
        text = rule("", 'after = { op = "write", nth = 2 }', self.CUT.replace("SCOPE", scope)) + rule(
            'op = "open"', "times = 9", 'power = "on"'
        )
        many = engine(text, seed=7)
        return many, many.disk("a", GIB, groups=["vm1"]), many.disk("b", GIB, groups=["vm1"]), many.disk("c", GIB)

    def test_a_cut_comes_once_with_all_that_is_needed_to_carry_it_out(self):
        many, a, b, c = self.cut("group:vm1")
        assert not ask(a, "write").disconnect
        assert ask(b, "write", at=S).disconnect
        assert ask(a).disconnect and ask(a, "flush").disconnect and not ask(c, "write").disconnect
        cut, event = orders(many)
        assert cut[:2] == ("power_cut", 1.0) and event == ("event", 1.0, {"name": "power-cut"})
        expected = {
            "rule": "rule-1",
            "vdi": "b",
            "number": 1,
            "seed": 7,
            "keep": 0.5,
            "torn": 512,
            "scope": "group:vm1",
            "order": "any",
        }
        assert cut[2] == expected

    @pytest.mark.parametrize("scope, off", [("disk", [False, True, False]), ("host", [True, True, True])])
    def test_scope(self, scope, off):
        many, a, b, c = self.cut(scope)
        ask(a, "write"), ask(b, "write")
        assert [ask(one).disconnect for one in (a, b, c)] == off

    @pytest.mark.parametrize("match, off", [("", [True, True]), ('vdi = "a"', [True, False])])
    def test_a_cut_when_a_phase_begins_is_of_the_disks_it_names(self, match, off):
        many = engine(f'[[phase]]\nfor = "1s"\n[[phase.rule]]\nmatch = {{ {match} }}\naction = {{ power_cut = "none" }}\n')
        assert [ask(many.disk(name, GIB)).disconnect for name in ("a", "b")] == off

    def test_power_back(self):
        many, a, b, c = self.cut("host")
        ask(a, "write"), ask(b, "write")
        assert ask(a, "open").disconnect is False
        assert not ask(a).disconnect and orders(many)[-1] == ("power_on", 0.0, {})

    def test_events_are_told_and_end_phases(self):
        many = engine('[[phase]]\nuntil = "event:go"\n[[phase]]\nname = "b"\n' + rule('op = "open"', "", 'event = "go"'))
        ask(many.disk("d", GIB), "open", at=S)
        assert many.phase == "b"
        assert [kind for kind, at, _ in orders(many) if at == 1] == ["event", "phase"]

    def test_replay_as_a_workload_is_the_hosts_work(self):
        replay = 'replay = { trace = "t.csv", format = "msr", as = "workload", speed = 2.0, start = "3h", loop = true }'
        many = engine(f'[[phase]]\nfor = "1s"\n[[phase.rule]]\nname = "n"\naction = {{ {replay} }}\n')
        many.advance(S)
        found = orders(many)
        assert [kind for kind, _, _ in found] == ["phase", "replay", "replay_stop", "over"]
        assert found[1][2]["spec"].trace == "t.csv" and found[1][2]["spec"].speed == 2.0

    def test_replay_as_latency(self):
        class Times:
            def __init__(self):
                self.asked = []

            def next(self, op, length, depth):
                self.asked.append((op, length, depth))
                return 5 * MS if len(self.asked) < 3 else None

        opened = {}

        def replays(spec, disk):
            return opened.setdefault((spec.name, disk.name), Times())

        many = engine(
            '[profile.p]\nlatency.all = "1ms"\n'
            + rule('vdi = "g*"', "", 'replay = { trace = "t", as = "latency", bucket = ["op", "depth"] }'),
            replays=replays,
        )
        one = many.disk("g1", GIB)
        many.disk("other", GIB)
        assert [ask(one).delay_ns // MS for _ in range(3)] == [5, 5, 1], "the disk's own latency when the trace has ended"
        assert list(opened) == [("rule-1", "g1")]
        assert opened["rule-1", "g1"].asked == [("read", 4096, 0), ("read", 4096, 1), ("read", 4096, 2)]
