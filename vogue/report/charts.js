// Draws each <figure data-panel> as SVG from the page's data: lines, bands, and values at the pointer or arrow keys.
"use strict";

let data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");

// An element with attributes and children; text is always set as text.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "circle", "text"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function showTip(x, y, ...children) {
  tip.replaceChildren(...children);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - width - 12))}px`;
  tip.style.top = `${y + 16 + height > innerHeight ? Math.max(4, y - height - 10) : y + 16}px`;
}

function hideTip() {
  tip.hidden = true;
}

function number(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "%") return `${(100 * value).toFixed(1)}%`;
  const digits = Math.abs(value) < 1000 ? { maximumSignificantDigits: 3 } : { maximumFractionDigits: 0 };
  const text = value && Math.abs(value) < 1e-3 ? value.toExponential(1) : value.toLocaleString("en", digits);
  return unit ? `${text} ${unit}` : text;
}

// Round numbers between low and high, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const found = [];
  for (let i = first; i * step <= high + step * 1e-9; i++) found.push(i * step || 0);
  return { found, step };
}

function tickLabel(value, step, unit) {
  const scaled = unit === "%" ? 100 * value : value;
  const size = unit === "%" ? 100 * step : step;
  if (size < 1e-3 && unit !== "%") return value === 0 ? "0" : value.toExponential(Math.max(0, Math.floor(Math.log10(Math.abs(value)) + 1e-9) - Math.floor(Math.log10(size) + 1e-9)));
  const text = scaled.toLocaleString("en", { maximumFractionDigits: Math.max(0, -Math.floor(Math.log10(size) + 1e-9)) });
  return unit === "%" ? `${text}%` : text;
}

// Low and high of the values, with room around them, also where they differ by rounding alone; from 0 where near it.
function range(values, unit) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (low >= 0 && low < 0.5 * high) low = 0;
  const flat = high - low <= 1e-6 * Math.abs(high);
  const room = flat ? 0.1 * Math.abs(high) || (unit === "%" ? 0.05 : 1) : 0.06 * (high - low);
  const floor = low >= 0 ? 0 : -Infinity;
  const top = unit === "%" && high <= 1 ? 1 : Infinity;
  return [low === 0 ? 0 : Math.max(floor, low - room), Math.min(top, high + room)];
}

function path(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

function drawPanel(figure) {
  const panel = data.panels[figure.dataset.panel];
  const { unit, doubling, lines } = panel;
  const width = figure.clientWidth, height = 230, top = 8, bottom = 40, right = 18;
  const all = lines.flatMap((line) => line.points);
  const xs = [...new Set(all.map((point) => point[0]))].sort((a, b) => a - b);
  const [low, high] = range(all.flatMap((point) => point.slice(1)), unit);
  const vertical = ticks(low, high, 5);
  const labels = vertical.found.map((value) => tickLabel(value, vertical.step, unit));
  const left = 14 + 7 * Math.max(...labels.map((label) => label.length));
  const place = doubling ? Math.log2 : (x) => x;
  const [start, end] = xs.length > 1 ? [place(xs[0]), place(xs.at(-1))] : [place(xs[0]) - 0.5, place(xs[0]) + 0.5];
  const atX = (x) => left + ((place(x) - start) / (end - start)) * (width - left - right);
  const atY = (y) => top + ((high - y) / (high - low)) * (height - top - bottom);

  const said = lines.filter((line) => !line.thin).map((line) => `${line.label} ${number(line.points[0][1], unit)} to ${number(line.points.at(-1)[1], unit)}`);
  const svg = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", "aria-label": `${panel.title} over ${panel.x}: ${said.join("; ")}` });

  vertical.found.forEach((value, i) => {
    svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: atY(value), y2: atY(value) }));
    svg.append(make("text", { x: left - 7, y: atY(value) + 4, "text-anchor": "end" }, labels[i]));
  });
  const across = doubling ? xs.filter((x) => Number.isInteger(Math.log2(x))) : ticks(start, end, Math.max(2, Math.min(6, (width - left) / 70))).found.filter(Number.isInteger);
  for (const x of across) {
    svg.append(make("line", { class: "tick", x1: atX(x), x2: atX(x), y1: height - bottom, y2: height - bottom + 4 }));
    svg.append(make("text", { x: atX(x), y: height - bottom + 17, "text-anchor": "middle" }, x.toLocaleString("en")));
  }
  svg.append(make("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  svg.append(make("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, panel.x));

  for (const line of lines) {
    const g = make("g", { class: `line${line.thin ? " thin" : ""}${line.dashed ? " dashed" : ""}${line.method < data.colors ? "" : " again"}`, style: `--color: ${color(line)}` });
    const banded = line.points.filter((point) => point.length === 4);
    if (banded.length > 1) {
      const upper = banded.map(([x, , , h]) => [atX(x), atY(h)]), lower = banded.map(([x, , l]) => [atX(x), atY(l)]);
      g.append(make("path", { class: "band", d: `${path([...upper, ...lower.reverse()])}Z` }));
    }
    g.append(make("path", { class: "curve", d: path(line.points.map(([x, y]) => [atX(x), atY(y)])) }));
    for (const [x, y, l, h] of line.thin || line.points.length > 20 ? [] : line.points) {
      if (banded.length === 1) g.append(make("line", { class: "interval", x1: atX(x), x2: atX(x), y1: atY(l), y2: atY(h) }));
      g.append(make("circle", { cx: atX(x), cy: atY(y), r: 3 }));
    }
    svg.append(g);
  }

  const cursor = make("g", { class: "cursor" });
  svg.append(cursor);
  let at = -1;
  function show(i) {
    at = Math.max(0, Math.min(xs.length - 1, i));
    const x = xs[at];
    const rows = [];
    cursor.replaceChildren(make("line", { x1: atX(x), x2: atX(x), y1: top, y2: height - bottom }));
    for (const line of lines.filter((line) => !line.thin)) {
      const point = line.points.find((point) => point[0] === x);
      if (!point) continue;
      const [, y, l, h] = point;
      cursor.append(make("circle", { cx: atX(x), cy: atY(y), r: 4.5, style: `--color: ${color(line)}` }));
      const between = h === undefined ? "" : ` [${number(l, unit)}, ${number(h, unit)}]`;
      const name = make("span", {}, make("i", { class: "swatch", style: `background: ${color(line)}` }), line.label);
      rows.push(make("div", { class: "row" }, name, make("b", {}, `${number(y, unit)}${between}`)));
    }
    const box = svg.getBoundingClientRect();
    showTip(box.left + atX(x), box.top + height / 3, make("div", {}, `${panel.x} ${x.toLocaleString("en")}`), ...rows);
  }
  function hide() {
    cursor.replaceChildren();
    hideTip();
  }
  svg.addEventListener("pointermove", (event) => {
    const x = event.clientX - svg.getBoundingClientRect().left;
    show(xs.reduce((best, value, i) => (Math.abs(atX(value) - x) < Math.abs(atX(xs[best]) - x) ? i : best), 0));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) {
      show(at + step);
      event.preventDefault();
    } else if (event.key === "Escape") hide();
  });
  figure.querySelector("svg")?.remove();
  figure.append(svg);
}

function color(line) {
  return `var(--method-${line.method % data.colors})`;
}

const resized = new ResizeObserver((entries) => entries.forEach((entry) => drawPanel(entry.target)));
document.querySelectorAll("figure[data-panel]").forEach((figure) => resized.observe(figure));

function tipsOf(part) {
  for (const segment of part.querySelectorAll("[data-tip]")) {
    segment.addEventListener("pointermove", (event) => showTip(event.clientX, event.clientY, segment.dataset.tip));
    segment.addEventListener("pointerleave", hideTip);
  }
}
tipsOf(document);
