"""How pages look: the demo's, and the report's on top of it."""

STYLE = """
:root { --page: #fbfaf8; --card: #fff; --ink: #1d1b18; --soft: #6b665e; --line: #e4e0d8; --new: #b4450c;
  --old: #1f5fa8; --good: #1a7f4b; --bad: #c0252d; --bar: #f0d9c8; --inside: #f6ddcc; --track: #e9e6df; }
@media (prefers-color-scheme: dark) { :root { --page: #161513; --card: #201e1b; --ink: #ece8e1; --soft:
  #a39d92;
  --line: #37332d; --new: #ff9a5c; --old: #7fb4f2; --good: #5ecb92; --bad: #ff7b7b; --bar: #4a3324;
  --inside: #5a3a26; --track: #322f2a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.25rem 1rem 4rem; }
h1 { font-size: clamp(1.6rem, 5vw, 2.1rem); line-height: 1.15; margin: 0 0 .9rem; letter-spacing: -.02em; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .25rem; letter-spacing: -.01em; }
p { margin: .3rem 0; }
.eyebrow { color: var(--soft); margin: 0 0 .25rem; font-weight: 600; }
.soft, .why, .kind, small { color: var(--soft); }
.question { font-weight: 600; }
.old { color: var(--old); } .new { color: var(--new); }
.picture { display: block; width: 4.5rem; height: 4.5rem; border-radius: .5rem; border: 1px solid
  var(--line); }
.picture.drawn { image-rendering: pixelated; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: .6rem 0 0; list-style: none;
  font-size: .88rem; color: var(--soft); }
.legend li { margin: 0; display: flex; gap: .4rem; align-items: center; }
.legend i { width: .75rem; height: .75rem; border-radius: 50%; background: var(--old); flex: none; }
.legend i.in { background: var(--new); }
.headline { display: grid; gap: .75rem; margin: 0 0 .9rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); }
.headline p { background: var(--card); border: 1px solid var(--line); border-radius: .9rem; margin: 0;
  padding: .6rem .9rem; font-size: .88rem; color: var(--soft); }
.headline b { color: var(--ink); } .headline b { font-size: 1.5rem; display: block; line-height: 1.25; }
.picture + .picture { margin-top: .4rem; }
.picture.large { width: 9rem; height: 9rem; flex: none; } .picture.small { width: 2.75rem; height: 2.75rem;
  flex: none; }
.picture.none { display: grid; place-items: center; font-size: .75rem; color: var(--soft); border-style:
  dashed; }
.edit { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; background: var(--card); border: 1px solid
  var(--line);
  border-radius: 1rem; padding: 1.1rem; }
.edit > div { flex: 1 1 16rem; } .edit .question { font-size: 1.2rem; margin-top: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: .75rem;
  margin-top: .75rem; }
article { display: flex; gap: .9rem; background: var(--card); border: 1px solid var(--line); border-radius:
  .9rem;
  padding: .9rem; }
.body { flex: 1; min-width: 0; overflow-wrap: anywhere; } .body > p:first-child { margin-top: 0; }
.kind { font-size: .8rem; font-weight: 600; }
.answer { border-top: 1px solid var(--line); margin-top: .5rem; padding-top: .35rem; }
.method { font-size: .85rem; color: var(--soft); margin-right: .25rem; }
.mark { font-size: .78rem; font-weight: 600; margin-left: .25rem; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); }
.gate { position: relative; height: .5rem; margin: .45rem 0 .2rem; border-radius: .25rem;
  background: linear-gradient(90deg, var(--inside) 50%, var(--track) 50%); border-right: 0; }
.gate::after { content: ""; position: absolute; left: 50%; top: -.15rem; bottom: -.15rem; width: 2px;
  background: var(--soft); }
.gate i { position: absolute; top: 50%; width: .75rem; height: .75rem; margin: -.375rem 0 0 -.375rem;
  border-radius: 50%; border: 2px solid var(--card); background: var(--old); z-index: 1; }
.gate i.in { background: var(--new); }
.why { font-size: .8rem; margin: 0; }
table { width: 100%; max-width: 44rem; border-collapse: collapse; margin: .75rem 0 1rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .5rem .4rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th[scope=row] { text-align: left; font-weight: 600; }
th small { display: block; font-weight: 400; line-height: 1.35; }
td small { display: block; }
td { position: relative; width: 6.5rem; white-space: nowrap; }
.bar { position: absolute; right: 0; bottom: 0; height: 3px; width: calc((100% - .75rem) * var(--share));
  background: var(--new);
  opacity: .55; }
details { background: var(--card); border: 1px solid var(--line); border-radius: .9rem; margin-top: .6rem;
  padding: .6rem .9rem; }
details article { background: var(--page); }
summary { cursor: pointer; display: flex; gap: .8rem; align-items: center; min-height: 2.75rem; }
summary::before { content: "+"; color: var(--soft); font-weight: 600; width: .8rem; }
details[open] > summary::before { content: "\\2013"; }
summary::-webkit-details-marker { display: none; }
summary small { display: block; }
ul { padding-left: 1.2rem; } li { margin: .3rem 0; }
"""

REPORT_STYLE = """
:root { --hard: #7b3fb5; } @media (prefers-color-scheme: dark) { :root { --hard: #c79bf5; } }
h2 { border-top: 1px solid var(--line); padding-top: 1.5rem; font-size: 1.5rem; }
h3 { font-size: 1.1rem; margin: 2rem 0 .1rem; } h4 { font-size: 1rem; margin: 1.4rem 0 .1rem; }
main > header + section h2 { border-top: 0; padding-top: 0; }
p, dd, figcaption { overflow-wrap: anywhere; }
.sees { color: var(--bad); }
.note { border-left: 4px solid var(--new); padding: .2rem .75rem; background: var(--card); }
.wide { overflow-x: auto; margin: .6rem 0 1rem; border: 1px solid var(--line); border-radius: .9rem;
  background: var(--card); }
.wide table { width: 100%; max-width: none; margin: 0; }
.wide th, .wide td { padding: .5rem .75rem; width: auto; white-space: nowrap; }
.wide th[scope=col] { font-size: .85rem; }
.wide th:first-child, .wide td:first-child { position: sticky; left: 0; background: var(--card); z-index: 1;
  border-right: 1px solid var(--line); }
.wide tbody tr:last-child > * { border-bottom: 0; }
.wide small { font-size: .78rem; }
.wide th[scope=row] { min-width: 6.5rem; max-width: 16rem; white-space: normal; overflow-wrap: break-word; }
.wide tr.sums > :is(th, td) { background: var(--page); }
.on-narrow { display: none; }
@media (max-width: 60rem) { .on-wide { display: none; } .on-narrow { display: block; }
  .wide th, .wide td { padding: .45rem .5rem; } .wide th[scope=row] { min-width: 5rem; }
  .wide th[scope=row] small { display: none; } }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
  gap: .75rem; margin-top: .75rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .9rem;
  padding: .8rem .8rem .6rem; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .3rem; } figcaption small { font-weight: 400; }
.drawing { display: block; width: 100%; max-width: 26rem; height: auto; overflow: visible; }
.drawing text { font-size: 12px; fill: var(--ink); } .drawing .end { text-anchor: end; }
.drawing .middle { text-anchor: middle; } .drawing .soft { fill: var(--soft); }
.drawing .related { fill: var(--new); } .drawing .hard { fill: var(--hard); }
.drawing .unrelated { fill: var(--old); } .drawing .track { fill: var(--track); }
.drawing .ground { stroke: var(--line); } .drawing .radius { stroke: var(--ink); stroke-dasharray: 4 3; }
.drawing .error { stroke: var(--ink); stroke-width: 1.5; }
div.picture { background: var(--track) center / contain no-repeat; flex: none; }
div.picture.none { background-image: none; text-align: center; line-height: 1.2; padding: .25rem; }
.fact { border-top: 1px solid var(--line); margin-top: .9rem; padding-top: .9rem; }
.head { display: flex; gap: .9rem; align-items: start; } .head .picture { width: 6rem; height: 6rem; }
.head p:first-child { margin-top: 0; }
.questions { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr));
  gap: .6rem; margin-top: .6rem; }
.questions article .question { font-weight: 500; } .cause-why { color: var(--bad); font-size: .9rem; }
details details { background: none; border: 0; padding: 0; }
details details article { background: none; }
ul.causes { list-style: none; padding: 0; max-width: 34rem; }
.causes li { display: flex; gap: .6rem; align-items: center; }
.count { flex: none; min-width: 2.4rem; text-align: right; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.cause { flex: 1; padding: .15rem .5rem; border-radius: .35rem;
  background: linear-gradient(90deg, var(--bar) calc(100% * var(--share)), transparent 0); }
dl { display: grid; grid-template-columns: auto 1fr; gap: .2rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
:focus-visible { outline: 3px solid var(--old); outline-offset: 2px; }
"""
