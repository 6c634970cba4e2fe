"use strict";
// Without this script the page works too: it adds keys, visible time, and retries.
const $ = (id) => document.getElementById(id);
const answer = $("answer");
const OPEN_AFTER_MS = 400; // so that a double press does not answer the next item unseen
const RETRY_MS = 1000;

// ---- time that the item was visible, in all views of this page

const timer = { key: "", before: 0, since: null };
function visibleMs() {
  return timer.before + (timer.since === null ? 0 : performance.now() - timer.since);
}
function keepTime() {
  if (!timer.key) return;
  timer.before = visibleMs();
  timer.since = document.hidden ? null : performance.now();
  sessionStorage.setItem(timer.key, String(timer.before));
}
if (answer) {
  const { item, version } = answer.elements;
  timer.key = `visible ${location.pathname} ${item.value} ${version.value}`;
  timer.before = Number(sessionStorage.getItem(timer.key)) || 0;
  timer.since = document.hidden ? null : performance.now();
  document.addEventListener("visibilitychange", keepTime);
  addEventListener("pagehide", keepTime);
}

// ---- sending: retried until the server has confirmed it

function show(text) {
  $("status").textContent = text;
  $("status").hidden = !text;
}
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function post(url, body) {
  for (;;) {
    try {
      const response = await fetch(url, { method: "POST", body, redirect: "manual" });
      if (![429, 502, 503, 504].includes(response.status)) return response;
    } catch {
      // no connection: told below
    }
    show("The server does not answer. This is not saved yet; trying again …");
    await wait(RETRY_MS);
  }
}

for (const form of document.querySelectorAll("form")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (form === answer && event.submitter?.name !== "choice") return;
    if (form === answer) form.elements.seconds.value = (visibleMs() / 1000).toFixed(3);
    const body = new URLSearchParams(new FormData(form, event.submitter));
    for (const button of document.querySelectorAll("form button")) button.disabled = true;
    const response = await post(form.action, body);
    const isSaved = response.type === "opaqueredirect";
    if (isSaved && form === answer) {
      sessionStorage.removeItem(timer.key);
      timer.key = "";
    }
    location.replace(isSaved ? "./" : "./?stale");
  });
}

// ---- choices, and their keys

if (answer) {
  const buttons = [...answer.querySelectorAll("button[name=choice]")];
  for (const button of buttons) button.disabled = true;
  setTimeout(() => {
    for (const button of buttons) button.disabled = false;
  }, OPEN_AFTER_MS);

  const toggle = $("shortcuts");
  const setShortcuts = (on) => {
    localStorage.setItem("shortcuts", on ? "on" : "off");
    toggle.setAttribute("aria-pressed", String(on));
    $("hints").hidden = !on;
    for (const kbd of answer.querySelectorAll("kbd")) kbd.hidden = !on;
  };
  setShortcuts(localStorage.getItem("shortcuts") !== "off");
  toggle.hidden = false;
  toggle.addEventListener("click", () => setShortcuts(toggle.getAttribute("aria-pressed") !== "true"));

  const arrows = { ArrowLeft: "left", ArrowRight: "right" };
  document.addEventListener("keydown", (event) => {
    const isModified = event.ctrlKey || event.metaKey || event.altKey || event.shiftKey;
    if (event.repeat || isModified || toggle.getAttribute("aria-pressed") !== "true") return;
    if (event.key in arrows && event.target instanceof HTMLInputElement) return; // moves in a radio group
    const chosen = buttons.find((b) => b.dataset.key === event.key || b.value === arrows[event.key]);
    if (!chosen) return;
    event.preventDefault();
    chosen.click();
  });
}
