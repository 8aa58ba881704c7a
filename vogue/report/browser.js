// The browser of completions: filters, pages, and tokens coloured by u_per or entropy.
"use strict";

const PAGE = 20; // completions
const form = document.getElementById("filters");
const cards = document.getElementById("cards");
let page = 0;

function matches(record, wanted) {
  const right = record.accuracy === 1;
  return (
    (!wanted.run || record.run === Number(wanted.run)) &&
    (!wanted.result || (wanted.result === "right") === right) &&
    (!wanted.branch || record.branch === wanted.branch) &&
    (wanted.first === "" || record.step >= Number(wanted.first)) &&
    (wanted.last === "" || record.step <= Number(wanted.last)) &&
    (!wanted.text || `${record.problem}\n${record.completion}`.toLowerCase().includes(wanted.text.toLowerCase()))
  );
}

function show() {
  const wanted = Object.fromEntries(new FormData(form));
  const found = data.records.filter((record) => matches(record, wanted));
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  page = Math.max(0, Math.min(page, pages - 1));
  const shown = found.slice(page * PAGE, (page + 1) * PAGE);
  const count = (n) => n.toLocaleString("en");
  document.getElementById("shown").textContent = found.length
    ? `${count(page * PAGE + 1)}–${count(page * PAGE + shown.length)} of ${count(found.length)}${found.length < data.records.length ? ` (of ${count(data.records.length)} in all)` : ""}`
    : `none of ${count(data.records.length)}`;
  for (const button of document.querySelectorAll("[data-turn]")) {
    button.disabled = Number(button.dataset.turn) < 0 ? page === 0 : page === pages - 1;
  }
  cards.replaceChildren(...shown.map(card));
  paint();
}

function card(record) {
  const pictures = [...record.image.map((place) => picture(place, "raw")), ...record.perturbed.map((place) => picture(place, "perturbed"))];
  const right = record.accuracy === 1;
  const judged = right ? "✓ right" : record.accuracy > 0 ? `✗ partly right (${number(record.accuracy)})` : "✗ wrong";
  const parts = Object.entries(record.components ?? {}).map(([name, score]) => `${name} ${number(score)}`);
  const facts = [
    ...(data.runs.length > 1 ? [data.runs[record.run]] : []),
    `step ${record.step}`,
    ...(record.category ? [record.category] : []),
    `${record.branch} image`,
    ...(record.paid ? ["u_per paid"] : []),
    `reward ${number(record.reward)}${parts.length ? ` (${parts.join(", ")})` : ""}`,
    `advantage ${record.advantage > 0 ? "+" : ""}${number(record.advantage).replace("-", "−")}`,
  ];
  return make(
    "article",
    { class: "card" },
    ...(pictures.length ? [make("div", { class: "pictures" }, ...pictures)] : []),
    make(
      "div",
      { class: "told" },
      make("p", { class: "problem" }, record.problem),
      make("p", { class: "chips" }, make("span", { class: right ? "right" : "wrong" }, judged), make("span", {}, "right answer ", make("b", {}, record.answer)), ...facts.map((fact) => make("span", {}, fact))),
      record.tokens ? tokens(record) : make("p", { class: "tokens", "data-missing": "no tokens were logged" }, record.completion),
    ),
  );
}

// Small images are shown at a whole multiple of their size, so that their pixels stay square.
function picture(place, kind) {
  const { uri, size, missing } = data.images[place];
  if (missing) return make("figure", {}, make("p", { class: "missing" }, `cannot be shown: ${missing}`), make("figcaption", {}, kind));
  const scale = Math.floor(224 / Math.max(...size));
  const crisp = scale > 1 ? { class: "crisp", style: `width: ${scale * size[0]}px` } : {};
  const image = make("img", { src: uri, alt: `${kind} image`, ...crisp });
  return make("figure", {}, image, make("figcaption", {}, `${kind}, ${size[0]} × ${size[1]} px`));
}

// One stop of the tab key; arrows go from token to token.
function tokens(record) {
  const missing = "u_per wasn't computed: the draw didn't ask for it, or A is 0";
  const spans = record.tokens.map((text, i) => {
    const span = make("span", { tabindex: i ? -1 : 0 }, text.replaceAll("\n", "↵\n"));
    for (const signal of ["u_per", "entropy"]) if (record[signal]) span.dataset[signal] = record[signal][i];
    return span;
  });
  return make("p", { class: "tokens", role: "group", "aria-label": "Completion, token by token", "data-missing": missing }, ...spans);
}

function paint() {
  const signal = new FormData(form).get("signal");
  if (!signal) return;
  for (const span of cards.querySelectorAll(".tokens > span")) {
    const value = span.dataset[signal];
    if (value === undefined) span.style.removeProperty("--heat");
    else span.style.setProperty("--heat", Math.min(1, value / data.tops[signal]).toFixed(3));
  }
  for (const group of cards.querySelectorAll(".tokens")) {
    group.classList.toggle("unknown", signal === "u_per" && group.firstChild?.dataset?.u_per === undefined);
  }
  const scale = document.getElementById("scale");
  const top = data.tops[signal];
  scale.hidden = !top;
  if (top) scale.querySelector("span").textContent = `${number(top)} nats or more`;
}

function describe(span, x, y) {
  const values = ["u_per", "entropy"].filter((signal) => span.dataset[signal] !== undefined);
  const rows = values.map((signal) => make("div", { class: "row" }, make("span", {}, signal), make("b", {}, `${number(Number(span.dataset[signal]))} nats`)));
  showTip(x, y, make("code", {}, span.textContent.replaceAll(" ", "␣").replaceAll("↵\n", "↵")), ...rows);
}

// What tokens can be coloured by; the reader's choice stays while it can.
function chooseSignal() {
  const known = ["u_per", "entropy"].filter((signal) => data.tops[signal]);
  form.querySelector("#signals").hidden = known.length < 2;
  const chosen = new FormData(form).get("signal");
  if (known.length && !known.includes(chosen)) form.querySelector(`[name=signal][value=${known[0]}]`).checked = true;
}

if (form) {
  chooseSignal();

  form.addEventListener("input", (event) => {
    if (event.target.name === "signal") return paint();
    if (!event.target.name) return;
    page = 0;
    show();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("[data-turn]")) {
    button.addEventListener("click", () => {
      page += Number(button.dataset.turn);
      show();
      document.getElementById("shown").scrollIntoView({ block: "nearest" });
    });
  }

  const isToken = (element) => element.parentElement?.classList.contains("tokens") && element.tagName === "SPAN";
  cards.addEventListener("pointerover", (event) => (isToken(event.target) ? describe(event.target, event.clientX, event.clientY) : hideTip()));
  cards.addEventListener("pointerleave", hideTip);
  cards.addEventListener("focusin", (event) => {
    if (!isToken(event.target)) return;
    const box = event.target.getBoundingClientRect();
    describe(event.target, box.left, box.bottom - 10);
  });
  cards.addEventListener("focusout", hideTip);
  cards.addEventListener("keydown", (event) => {
    const next = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const to = next && isToken(event.target) && event.target[next];
    if (to) {
      event.target.tabIndex = -1;
      to.tabIndex = 0;
      to.focus();
      event.preventDefault();
    } else if (event.key === "Escape") hideTip();
  });
  show();
}
