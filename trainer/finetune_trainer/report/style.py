"""How the page looks: light and dark by what the reader's system prefers, and readable on a phone."""

STYLE = """
:root{--ink:#1c2430;--soft:#5b6675;--paper:#fff;--card:#f6f7f9;--line:#dde2e8;--a:#1f6feb;--b:#d97706;
--c:#0f9d6b;--d:#a03bbf;
--bad:#c2410c}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa6b5;--paper:#12161c;--card:#1a2028;
--line:#2c3540;--a:#6ea8fe;
--b:#f0a94a;--c:#4fd1a1;--d:#d18be8;--bad:#ff9066}
}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.7rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:0 0 .6rem}
h3{font-size:1rem;margin:1rem 0 .3rem}
header p{color:var(--soft);margin:.3rem 0 1rem;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(10rem,1fr));gap:.6rem;margin:0}
dl div{background:var(--card);border-radius:.5rem;padding:.5rem .7rem}
dt{font-size:.8rem;color:var(--soft)}
dd{margin:0;font-weight:600;overflow-wrap:anywhere}
section{margin-top:2rem;padding-top:1.2rem;border-top:1px solid var(--line)}
p{margin:.4rem 0}
.warning{border-left:4px solid var(--bad);background:var(--card);padding:.5rem .8rem;
border-radius:0 .4rem .4rem 0}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
th{font-weight:600;color:var(--soft)}
.confusion td{border:1px solid var(--line);text-align:center;min-width:2.2rem}
.confusion .hit{background:color-mix(in srgb,var(--c) calc(var(--share)*70%),transparent)}
.confusion .miss{background:color-mix(in srgb,var(--bad) calc(var(--share)*90%),transparent)}
.confusion .up{height:6rem;vertical-align:bottom}
.up span{writing-mode:vertical-rl;transform:rotate(180deg)}
figure{margin:.5rem 0;overflow-x:auto}
svg{width:100%;min-width:26rem;height:auto;display:block}
svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
svg .end{text-anchor:end}
.grid{stroke:var(--line)}
polyline{fill:none;stroke-width:2}
polyline.c0{stroke:var(--a)}
polyline.c1{stroke:var(--b)}
polyline.c2{stroke:var(--c)}
polyline.c3{stroke:var(--d)}
circle.c0{fill:var(--a)}
circle.c1{fill:var(--b)}
circle.c2{fill:var(--c)}
circle.c3{fill:var(--d)}
.tuned{fill:var(--a)}
.rival{fill:var(--soft);opacity:.55}
.whisker{stroke:var(--ink);stroke-width:1.5;fill:none}
.key{margin-right:1rem;font-size:.85rem}
.key::before{content:"";display:inline-block;width:.8rem;height:.25rem;margin-right:.4rem;
vertical-align:middle}
.key.c0::before{background:var(--a)}
.key.c1::before{background:var(--b)}
.key.c2::before{background:var(--c)}
.key.c3::before{background:var(--d)}
article{background:var(--card);border-radius:.5rem;padding:.5rem .8rem;margin:.5rem 0}
article img{float:left;margin-right:.8rem;max-height:4rem}
article::after{content:"";display:block;clear:both}
article p{margin:0;overflow-wrap:anywhere;white-space:pre-wrap}
small{color:var(--soft);overflow-wrap:anywhere}
pre{background:var(--card);border-radius:.5rem;padding:.8rem;overflow-x:auto;font-size:.85rem}
"""
