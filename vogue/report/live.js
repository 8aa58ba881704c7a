// Keeps a live page up to date: asks its server for the page as it is now, and puts what is new into this one. Filters,
// scroll position, the page of completions and what is focused stay as the reader left them.
"use strict";

const EVERY = 3000; // milliseconds
const state = document.getElementById("state");
const follow = document.getElementById("follow");
let version = null;

async function refresh() {
  try {
    const response = await fetch(location.pathname, version ? { headers: { "If-None-Match": version } } : {});
    if (response.ok) {
      const text = await response.text();
      version = response.headers.get("ETag");
      renew(new DOMParser().parseFromString(text, "text/html"));
    } else if (response.status !== 304) {
      state.textContent = `can't be read: ${await response.text()}`;
    }
  } catch {
    state.textContent = "its server has ended or can't be reached; this is what was known then";
    version = null;
  }
  setTimeout(refresh, EVERY);
}

function renew(fresh) {
  const { records, images, tops, ...rest } = JSON.parse(fresh.getElementById("data").textContent);
  const newest = JSON.stringify(records.at(0)) !== JSON.stringify(data.records.at(0));
  data = { ...data, ...rest };
  hideTip();
  state.textContent = fresh.getElementById("state").textContent;
  replace("header .facts", fresh);
  replace("header nav", fresh);
  for (const section of fresh.querySelectorAll("main > section")) {
    const mine = document.getElementById(section.id);
    if (section.id === "completions") continue;
    if (!mine) add(section);
    else if (mine.isEqualNode(section)) continue;
    else if (samePanels(mine, section)) renewPanels(mine, section);
    else mine.replaceWith(taken(section));
  }
  if (newest && follow.checked) {
    Object.assign(data, { records, images, tops });
    chooseSignal();
    show();
  }
}

// A part of the fresh page as one of this page, with its charts and tips at work.
function taken(section) {
  const mine = document.importNode(section, true);
  tipsOf(mine);
  mine.querySelectorAll("figure[data-panel]").forEach((figure) => resized.observe(figure));
  return mine;
}

function add(section) {
  const after = section.nextElementSibling && document.getElementById(section.nextElementSibling.id);
  document.querySelector("main").insertBefore(taken(section), after);
}

function replace(selector, fresh) {
  const [mine, theirs] = [document.querySelector(selector), fresh.querySelector(selector)];
  if (mine.innerHTML !== theirs.innerHTML) mine.replaceWith(document.importNode(theirs, true));
}

const panels = (section) => [...section.querySelectorAll("figure[data-panel]")];
const titles = (section) => panels(section).map((figure) => figure.querySelector("figcaption").textContent).join("\n");

function samePanels(mine, section) {
  return panels(mine).length > 0 && titles(mine) === titles(section);
}

// Charts are drawn again in their places; what else the section has is replaced where it has changed.
function renewPanels(mine, section) {
  panels(section).forEach((figure, i) => {
    const place = panels(mine)[i];
    place.dataset.panel = figure.dataset.panel;
    const focused = place.contains(document.activeElement);
    drawPanel(place);
    if (focused) place.querySelector("svg").focus({ preventScroll: true });
  });
  [...section.children].forEach((part, i) => {
    const old = mine.children[i];
    if (part.classList.contains("panels") || old?.isEqualNode(part)) return;
    const renewed = document.importNode(part, true);
    tipsOf(renewed);
    if (old) old.replaceWith(renewed);
    else mine.append(renewed);
  });
}

setTimeout(refresh, EVERY);
