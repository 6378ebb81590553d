"""How the page of a report looks: one style sheet, light and dark, with colours that the colour-blind tell apart (Okabe and Ito's)."""

__all__ = ["STYLE", "HEAT_LEVELS"]

HEAT_LEVELS = 8

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --dim: #5b6570; --line: #d9dee4; --grid: #e7eaee; --band: #eef1f5; --band2: #dde3ea;
  --good: #00714f; --good-back: #def3ea; --bad: #b3261e; --bad-back: #fbe4e2; --open: #6b5500; --open-back: #faf0cc;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b5539a; --c4: #b58900; --c5: #3a9bd1; --c6: #5b6570; --c7: #7a5195;
  --mark: #d55e00; --mark2: #1b1f24;
  --h0: #d3e4f3; --h1: #b9d5ea; --h2: #9ecae1; --h3: #6baed6; --h4: #4292c6; --h5: #2171b5; --h6: #08519c; --h7: #08306b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1317; --card: #171c22; --ink: #e6eaee; --dim: #9aa5b1; --line: #2d353e; --grid: #252c34; --band: #1f262e; --band2: #2a333d;
    --good: #6fdcb4; --good-back: #10342a; --bad: #ff9c92; --bad-back: #43191a; --open: #f1d678; --open-back: #3a3112;
    --c0: #56b4e9; --c1: #f08a3c; --c2: #2cc79b; --c3: #df8fc6; --c4: #e6c229; --c5: #8ccff0; --c6: #9aa5b1; --c7: #b79adb;
    --mark: #ffa04d; --mark2: #ffffff;
    --h0: #14283b; --h1: #17395a; --h2: #1b4b79; --h3: #23629b; --h4: #3a80bd; --h5: #65a3d9; --h6: #9cc7ee; --h7: #dcefff;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 28px 20px 60px; }
header, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px; margin: 0 0 18px; }
h1 { font-size: 26px; margin: 0; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 2px; }
h3 { font-size: 14px; margin: 18px 0 4px; }
p { margin: 4px 0; } .about, .note { color: var(--dim); } .note { font-size: 13px; max-width: 92ch; }
.top { display: flex; gap: 16px; justify-content: space-between; align-items: flex-start; flex-wrap: wrap; }
.badge { border-radius: 999px; padding: 5px 14px; font-weight: 600; white-space: nowrap; }
.met { color: var(--good); background: var(--good-back); } .broken { color: var(--bad); background: var(--bad-back); }
.open { color: var(--open); background: var(--open-back); } .none { color: var(--dim); background: var(--band); }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 12px 20px; margin: 18px 0 0; }
dl.facts dt { color: var(--dim); font-size: 12px; } dl.facts .wide { grid-column: span 2; } dl.facts dd { margin: 0; font-size: 17px; overflow-wrap: anywhere; }
ul.expect { list-style: none; margin: 10px 0 0; padding: 0; }
ul.expect li { display: grid; grid-template-columns: 130px 1fr; gap: 12px; padding: 8px 0; border-top: 1px solid var(--grid); }
ul.expect .badge { justify-self: start; font-size: 13px; padding: 1px 10px; align-self: start; }
code { font: 13.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin-top: 8px; font-variant-numeric: tabular-nums; font-size: 14px; }
th { font-weight: 600; color: var(--dim); font-size: 12.5px; text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--line); }
td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child, td:first-child, .words { text-align: left; } td:first-child { white-space: normal; min-width: 9em; }
tr.part td { color: var(--dim); border-bottom-color: transparent; padding-top: 1px; padding-bottom: 1px; }
tr.part td:first-child { padding-left: 30px; }
.some { color: var(--bad); font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--dim); margin: 2px 0; align-items: center; }
.legend svg { width: auto; height: 12px; flex: none; }
svg { display: block; width: 100%; height: auto; }
.figure svg { min-width: 820px; }
svg text { fill: var(--dim); font-size: 12px; font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
svg .ink { fill: var(--ink); } svg .strong { fill: var(--ink); font-weight: 600; }
.grid { stroke: var(--grid); stroke-width: 1; } .frame { stroke: var(--line); stroke-width: 1; fill: none; }
.border { stroke: var(--dim); stroke-width: 1; stroke-dasharray: 2 4; opacity: .65; }
.band { fill: var(--band); } .band2 { fill: var(--band2); }
.event { stroke: var(--mark); stroke-width: 1.5; } .flag { fill: var(--mark); }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; } .dash { stroke-dasharray: 5 3; }
.thin { stroke-width: 1.4; } .area { opacity: .16; }
@media (max-width: 640px) {
  main { padding: 12px 8px 40px; } header, section { padding: 14px 12px; }
  ul.expect li { grid-template-columns: 1fr; gap: 2px; } dl.facts { grid-template-columns: repeat(2, 1fr); } dl.facts .wide { grid-column: span 2; }
}
.mark { stroke: var(--mark); } .mark2 { stroke: var(--mark2); }
""" + "".join(
    f".s{n} {{ stroke: var(--c{n}); }} .f{n} {{ fill: var(--c{n}); }}\n" for n in range(8)
) + "".join(f".h{n} {{ fill: var(--h{n}); }}\n" for n in range(HEAT_LEVELS))
