"""The frame of the report: one HTML document without scripts or outside resources, light and dark."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>@TITLE@</title>
<style>
:root {
  --ground: #f6f7f9; --card: #ffffff; --ink: #1d2026; --soft: #5b616b; --line: #e3e6eb;
  --accent: #0072b2; --code: #f0f2f5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14161a; --card: #1c1f25; --ink: #e8eaee; --soft: #a0a7b3; --line: #30343c;
    --accent: #6db8e8; --code: #262a31;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 40px 20px 80px; }
header { margin-bottom: 28px; }
h1 { margin: 0 0 10px; font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; }
h2 { margin: 0 0 14px; font-size: 19px; letter-spacing: -0.01em; }
.chips { display: flex; flex-wrap: wrap; gap: 8px; }
.chips span {
  padding: 3px 12px; border: 1px solid var(--line); border-radius: 999px; background: var(--card);
  color: var(--soft); font-size: 14px;
}
.chips b { color: var(--ink); }
header p { max-width: 75ch; color: var(--soft); }
section {
  margin: 0 0 20px; padding: 24px; border: 1px solid var(--line); border-radius: 14px; background: var(--card);
}
section.failed { border-left: 5px solid #d55e00; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; padding: 10px; border-radius: 10px; background: #ffffff; }
figcaption, .note { margin: 10px 0 0; color: var(--soft); font-size: 14px; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th { padding: 6px 12px; border-bottom: 2px solid var(--line); color: var(--soft); font-weight: 600; text-align: left; }
td { padding: 6px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.n, td.n { text-align: right; }
tr.first td { border-top: 2px solid var(--line); }
td b { color: var(--accent); }
code, pre {
  border-radius: 6px; background: var(--code);
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, monospace;
}
code { padding: 1px 6px; }
pre { margin: 6px 0 14px; padding: 12px 16px; overflow-x: auto; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); }
@media print { section { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<header>
<h1>@TITLE@</h1>
<div class="chips">@LEAD@</div>
@DESCRIPTION@
</header>
@BODY@
</main>
</body>
</html>
"""
