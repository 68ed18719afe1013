"use strict";
// Fills the page once a second from data.json. Whatever comes from there is set as text, never as markup.
const NAMES = {original: "original", pruned: "pruned"};
const $ = id => document.getElementById(id);
const shown = new Map(); // element -> what it shows, so that nothing is redrawn in vain
let latest = null, seconds = 60, headlineAt = -Infinity;

function changed(key, value) {
  const text = JSON.stringify(value);
  if (shown.get(key) === text) return false;
  shown.set(key, text);
  return true;
}

function node(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function shape(svg, tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  svg.append(made);
  return made;
}

function write(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

function cell(text) {
  const [value, ...notes] = text.split("\n");
  const made = node("td", value);
  if (!/\d/.test(value)) made.className = "words";
  for (const note of notes) made.append(node("small", note));
  return made;
}

function fillTable(id, rows) {
  if (!changed(id, rows)) return;
  $(id).replaceChildren(...rows.map(([label, ...cells]) => {
    const row = node("tr");
    row.append(node("th", label, {scope: "row"}), ...cells.map(cell));
    return row;
  }));
}

// About `wanted` round numbers that cover low..high.
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= rough * 0.999);
  const found = [];
  for (let i = Math.floor(low / step + 1e-9); i * step < high + step * 0.999; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

function ago(span) {
  const s = Math.round(-span);
  if (s < 1) return "now";
  return s < 60 ? `${s} s ago` : s % 60 ? `${Math.floor(s / 60)} min ${s % 60} s ago` : `${s / 60} min ago`;
}

function timeTicks(from) {
  const step = [10, 15, 30, 60, 120, 180, 300].find(s => -from / s <= 5) || 300, found = [];
  for (let t = 0; t >= from - 1e-6; t -= step) found.push(t);
  return found;
}

const exact = value => +value.toPrecision(3) + "";

function drawCurve(figure) {
  const svg = figure.querySelector("svg"), data = latest.curves[figure.dataset.curve], at = latest.curves.seconds;
  const width = svg.clientWidth, height = +svg.getAttribute("height"), unit = figure.dataset.unit, rule = +figure.dataset.rule || 0;
  if (!width) return;
  svg.replaceChildren();
  const series = Object.keys(data), values = series.flatMap(name => data[name]).filter(v => v !== null);
  if (!values.some(v => v > 0)) {
    const words = unit === "%" ? "idle so far" : "no traffic yet";
    shape(svg, "text", {x: width / 2, y: height / 2, "text-anchor": "middle", class: "empty"}, words);
    svg.setAttribute("aria-label", words);
    return;
  }
  const top = Math.max(...values), floor = rule ? Math.min(rule * 0.8, ...values) : 0;
  const steps = ticks(floor, Math.max(top, rule * 1.2), height > 150 ? 4 : 3), low = steps[0], high = steps[steps.length - 1];
  const labels = steps.map(exact), left = 8 + 6.8 * Math.max(...labels.map(t => t.length)), right = width - 10, bottom = height - 22;
  const from = Math.min(at[0], -60), x = t => left + (right - left) * (t - from) / -from, y = v => bottom - (bottom - 8) * (v - low) / (high - low);
  steps.forEach((step, i) => {
    shape(svg, "line", {x1: left, x2: right, y1: y(step), y2: y(step), class: i ? "rule" : "axis"});
    shape(svg, "text", {x: left - 7, y: y(step) + 4, "text-anchor": "end"}, labels[i]);
  });
  for (const t of timeTicks(from)) {
    const anchor = t === 0 ? "end" : x(t) < left + 16 ? "start" : "middle", label = t === 0 ? "now" : -t < 60 ? `${t} s` : `${t / 60} min`;
    shape(svg, "line", {x1: x(t), x2: x(t), y1: bottom, y2: bottom + 4, class: "axis"});
    shape(svg, "text", {x: x(t), y: height - 4, "text-anchor": anchor}, label.replace("-", "\u2212"));
  }
  if (rule) {
    shape(svg, "line", {x1: left, x2: right, y1: y(rule), y2: y(rule), class: "equal"});
    shape(svg, "text", {x: left + 6, y: y(rule) + 14}, "as fast as the original");
  }
  // The dashed line goes over the solid one, so that both show where they meet.
  for (const name of [...series].reverse()) drawLine(svg, name, at, data[name], x, y, bottom);
  const now = series.map(name => `${NAMES[name]} ${last(data[name], unit)}`).join(", ");
  svg.setAttribute("aria-label", `${figure.querySelector("b").textContent}, now: ${now}`);
  figure.geometry = {from, left, right, bottom, x};
  readOut(figure);
}

function last(values, unit) {
  const value = values[values.length - 1];
  if (!value) return unit === "%" ? "idle" : "no traffic";
  return `${exact(value)} ${unit}`;
}

function drawLine(svg, name, at, values, x, y, bottom) {
  let path = "", area = "", start = null;
  values.forEach((value, i) => {
    if (value === null) return;
    const begins = i === 0 || values[i - 1] === null, ends = i === values.length - 1 || values[i + 1] === null;
    const point = `${x(at[i]).toFixed(1)} ${y(value).toFixed(1)}`;
    if (begins) start = x(at[i]).toFixed(1);
    path += begins ? `M${point}` : `L${point}`;
    area += begins ? `M${start} ${bottom}L${point}` : `L${point}`;
    if (ends) area += `L${x(at[i]).toFixed(1)} ${bottom}Z`;
    if (begins && ends) shape(svg, "circle", {cx: x(at[i]), cy: y(value), r: 2, class: `fill ${name}`});
  });
  if (name === "pruned") shape(svg, "path", {d: area, class: `area ${name}`});
  shape(svg, "path", {d: path, class: `line ${name}`});
  const end = values.length - 1;
  if (values[end] !== null) shape(svg, "circle", {cx: x(at[end]), cy: y(values[end]), r: 5, class: `dot fill ${name}`});
}

// The values under the pointer, in the place of the unit.
function readOut(figure) {
  const place = figure.querySelector(".unit"), svg = figure.querySelector("svg"), found = figure.geometry;
  figure.unit ??= place.textContent;
  svg.querySelector(".hover")?.remove();
  if (figure.pointer === undefined || !found) return void (place.textContent = figure.unit);
  const at = latest.curves.seconds, wanted = found.from * (1 - (figure.pointer - found.left) / (found.right - found.left));
  const i = at.reduce((best, t, k) => Math.abs(t - wanted) < Math.abs(at[best] - wanted) ? k : best, 0);
  shape(svg, "line", {x1: found.x(at[i]), x2: found.x(at[i]), y1: 8, y2: found.bottom, class: "hover"});
  const data = latest.curves[figure.dataset.curve];
  const parts = Object.keys(data).map(name => `${NAMES[name]} ${last(data[name].slice(0, i + 1), figure.dataset.unit)}`);
  place.textContent = `${ago(at[i])}: ${parts.join(", ")}`;
}

// Two bars for each label: percent of the original and of the pruned model.
function drawPairs(id, {labels, original, pruned}) {
  const svg = $(id), width = svg.clientWidth, row = 38;
  if (!width) return;
  svg.replaceChildren();
  svg.setAttribute("height", Math.max(labels.length * row, 1));
  const left = 16 + 6.6 * Math.max(0, ...labels.map(t => t.length)), full = width - left - 58;
  labels.forEach((label, i) => {
    shape(svg, "text", {x: left - 10, y: i * row + 22, "text-anchor": "end", class: "value"}, label);
    [["original", original], ["pruned", pruned]].forEach(([name, shares], k) => {
      const share = shares[i], y = i * row + 4 + k * 15;
      shape(svg, "rect", {x: left, y, width: full, height: 11, rx: 3, class: "track"});
      if (share) shape(svg, "rect", {x: left, y, width: Math.max(full * share / 100, 2), height: 11, rx: 3, class: `fill ${name}`});
      shape(svg, "text", {x: width, y: y + 10, "text-anchor": "end"}, share === null ? "no traffic" : `${share.toFixed(1)} %`);
    });
  });
  const words = labels.map((label, i) => `${label}: original ${original[i] ?? "none"} %, pruned ${pruned[i] ?? "none"} %`);
  svg.setAttribute("aria-label", words.join("; ") || "no traffic");
}

function drawShares(shares) {
  const svg = $("ab-share"), width = svg.clientWidth;
  if (!width) return;
  svg.replaceChildren();
  let x = 0;
  shares.forEach(({arm, share, text}, k) => {
    if (share > 0) shape(svg, "rect", {x: x + (k && x ? 1 : 0), y: 2, width: Math.max(width * share - 2, 2), height: 18, rx: 4, class: `fill ${arm}`});
    shape(svg, "text", {x: k ? width : 0, y: 40, "text-anchor": k ? "end" : "start", class: "value"}, text);
    x += width * share;
  });
  svg.setAttribute("aria-label", shares.map(each => each.text).join(", "));
}

function drawIntervals(intervals) {
  const svg = $("ab-intervals"), width = svg.clientWidth, row = 46, bottom = intervals.length * row + 6;
  if (!width) return;
  svg.replaceChildren();
  svg.setAttribute("aria-label", intervals.map(each => `${each.label}: ${each.text}`).join("; ") || "no interval yet");
  svg.setAttribute("height", intervals.length ? bottom + 24 : 40);
  if (!intervals.length) return void shape(svg, "text", {x: 0, y: 22, class: "empty"}, "no interval yet: too few requests");
  const ends = intervals.flatMap(each => [each.low, each.high]);
  const steps = ticks(Math.min(0.9, ...ends), Math.max(1.1, ...ends), width > 360 ? 6 : 4), low = steps[0], high = steps[steps.length - 1];
  const x = v => 12 + (width - 24) * (v - low) / (high - low);
  for (const step of steps) {
    shape(svg, "line", {x1: x(step), x2: x(step), y1: 4, y2: bottom, class: "rule"});
    shape(svg, "text", {x: x(step), y: bottom + 16, "text-anchor": "middle"}, exact(step));
  }
  shape(svg, "line", {x1: 12, x2: width - 12, y1: bottom, y2: bottom, class: "axis"});
  shape(svg, "line", {x1: x(1), x2: x(1), y1: 4, y2: bottom, class: "axis"});
  intervals.forEach((each, i) => {
    const y = i * row + 34;
    shape(svg, "text", {x: 12, y: i * row + 16, class: "value halo"}, `${each.label}: ${each.text}`);
    shape(svg, "line", {x1: x(each.low), x2: x(each.high), y1: y, y2: y, class: "whisker"});
    for (const end of [each.low, each.high]) shape(svg, "line", {x1: x(end), x2: x(end), y1: y - 6, y2: y + 6, class: "whisker"});
    shape(svg, "circle", {cx: x(each.mean), cy: y, r: 6, class: "dot fill pruned"});
  });
}

function showHeadline({text, detail, state}, now) {
  // A reader's voice must not chase digits: the same kind of sentence changes every five seconds at most.
  if (state === $("hero").dataset.state && now - headlineAt < 4500) return;
  headlineAt = now;
  $("hero").dataset.state = state;
  write("headline", text);
  write("detail", detail);
}

function showStatus(up, text) {
  $("status").dataset.up = up;
  const place = $("status").querySelector("span");
  if (place.textContent !== text) place.textContent = text;
}

function draw() {
  if (!latest) return;
  for (const figure of document.querySelectorAll("[data-curve]")) drawCurve(figure);
  drawPairs("batches", latest.batches);
  drawPairs("left", latest.left);
  if (latest.experiment) {
    drawShares(latest.experiment.shares);
    drawIntervals(latest.experiment.intervals);
  }
}

function show(data) {
  latest = data;
  write("model", data.model);
  document.title = /\d/.test(data.speedups[0].value) ? `${data.speedups[0].value} ${data.model}` : `${data.model}: dashboard`;
  showHeadline(data.headline, performance.now());
  const down = data.sources.filter(source => !source.up).length;
  showStatus(down ? "no" : "yes", !down ? "live" : down < data.sources.length ? `${down} of ${data.sources.length} sources down` : "server down");
  if (changed("speedups", data.speedups)) $("speedups").replaceChildren(...data.speedups.map(({label, value, note}) => {
    const item = node("li");
    item.append(node("span", label), node("b", value, /\d/.test(value) ? {} : {class: "words"}), node("small", note));
    return item;
  }));
  for (const id of ["latency", "traffic", "workers", "network"]) fillTable(id, data[id]);
  $("batches-empty").hidden = data.batches.labels.length > 0;
  write("compare-text", data.compare.text);
  write("compare-note", data.compare.note);
  $("compare-table").hidden = !data.compare.rows.length;
  fillTable("compare", data.compare.rows);
  const test = data.experiment;
  $("experiment").hidden = !test;
  if (test) {
    write("ab-verdict", test.verdict);
    write("ab-advice", test.advice);
    $("ab-advice").dataset.kind = test.advice_kind;
    fillTable("ab-rows", test.rows);
  }
  if (changed("sources", data.sources)) $("sources").replaceChildren(...data.sources.map(({url, up, text}) => {
    const item = node("li", undefined, {"data-up": up ? "yes" : "no"});
    item.append(node("code", url), ` ${text}`);
    return item;
  }));
  if (changed("windows", [data.windows, seconds])) showWindows(data.windows);
  draw();
}

function showWindows(windows) {
  if (!$("windows").children.length) for (const each of windows) {
    const button = node("button", each < 60 || each === 60 ? `${each} s` : `${each / 60} min`, {type: "button"});
    button.addEventListener("click", () => { seconds = each; headlineAt = -Infinity; ask(); });
    $("windows").append(button);
  }
  [...$("windows").children].forEach((button, i) => button.setAttribute("aria-pressed", windows[i] === seconds));
}

async function ask() {
  const wanted = seconds;
  try {
    const reply = await fetch(`data.json?window=${wanted}`, {cache: "no-store"});
    const data = await reply.json();
    if (wanted === seconds) show(data);
  } catch (error) {
    showStatus("no", "the dashboard has ended");
    headlineAt = -Infinity;
    showHeadline({text: "The dashboard itself has ended", state: "down",
      detail: "Start it again with redpp-serve dashboard. The numbers below are the last ones."}, performance.now());
  }
}

async function forever() {
  await ask();
  setTimeout(forever, 1000);
}

for (const place of document.querySelectorAll(".legend")) for (const name of Object.keys(NAMES)) {
  const item = node("span");
  item.append(node("i", undefined, {class: name}), NAMES[name]);
  place.append(item);
}
for (const svg of document.querySelectorAll("svg")) svg.setAttribute("role", "img");
for (const figure of document.querySelectorAll("[data-curve]")) {
  const svg = figure.querySelector("svg");
  svg.addEventListener("pointermove", event => { figure.pointer = event.clientX - svg.getBoundingClientRect().left; readOut(figure); });
  svg.addEventListener("pointerleave", () => { figure.pointer = undefined; readOut(figure); });
}
new ResizeObserver(draw).observe(document.body); // also the first layout
forever();
