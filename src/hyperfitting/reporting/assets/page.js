"use strict";
// Everything that came from data or a model is put in as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const COLOURS = {
  light: ["#000000", "#0072b2", "#c04a00", "#007a5a", "#a8447f", "#8a6100", "#3b7ea8"],
  dark: ["#f2f2f2", "#56b4e9", "#ff8a3d", "#2fc79a", "#e59ac4", "#e6b422", "#9ad0f5"],
};
const DASHES = ["solid", "dash", "dot", "dashdot"];
const MARKS = ["circle", "square", "diamond", "triangle-up"];

// ---- which members are shown

const boxes = [...document.querySelectorAll("#members input")];
const shown = () => new Set(boxes.filter((box) => box.checked).map((box) => Number(box.value)));

// ---- light and dark

const dark = matchMedia("(prefers-color-scheme: dark)");
function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : dark.matches;
}
const colour = (member) => {
  const palette = COLOURS[isDark() ? "dark" : "light"];
  return palette[member % palette.length];
};
const style = (member) => Math.floor(member / COLOURS.light.length) % DASHES.length;

function paintSwatches() {
  for (const swatch of document.querySelectorAll(".swatch")) {
    swatch.style.background = colour(Number(swatch.dataset.member));
  }
}

// ---- charts

function layout(x, y) {
  const css = getComputedStyle(document.documentElement);
  const [ink, line] = ["--ink", "--line"].map((name) => css.getPropertyValue(name).trim());
  const axis = (title) => ({
    title: { text: title }, gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true,
  });
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, family: "system-ui" },
    margin: { l: 50, r: 10, t: 10, b: 40 }, showlegend: false, hovermode: "closest",
    xaxis: axis(x), yaxis: axis(y),
  };
}
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };

function drawCurves() {
  const visible = shown();
  for (const place of document.querySelectorAll("[data-series]")) {
    const key = place.dataset.series;
    const traces = data.members.flatMap((member, i) => {
      const line = member.curves[key];
      if (!line) return [];
      return [{
        x: line[0], y: line[1], name: member.name, mode: "lines+markers", visible: visible.has(i),
        line: { color: colour(i), dash: DASHES[style(i)] }, marker: { symbol: MARKS[style(i)], size: 5 },
        hovertemplate: "%{fullData.name}<br>epoch %{x}: %{y:.4g}<extra></extra>",
      }];
    });
    Plotly.react(place, traces, layout("epoch", data.names[key]), CONFIG);
  }
}

function drawScatter() {
  if (!$("scatter")) return;
  const visible = shown();
  const [x, y] = [$("metric-x").value, $("metric-y").value];
  const error = (estimate) => ({
    type: "data", symmetric: false, thickness: 1,
    array: [estimate[2] - estimate[0]], arrayminus: [estimate[0] - estimate[1]],
  });
  const traces = data.members.flatMap((member, i) => {
    const [a, b] = [member.metrics[x], member.metrics[y]];
    if (!a || !b) return [];
    return [{
      x: [a[0]], y: [b[0]], error_x: error(a), error_y: error(b), name: member.name, mode: "markers",
      visible: visible.has(i), marker: { color: colour(i), symbol: MARKS[style(i)], size: 11 },
      hovertemplate: "%{fullData.name}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    }];
  });
  Plotly.react($("scatter"), traces, layout(data.names[x], data.names[y]), CONFIG);
}

// ---- texts

function element(kind, words, className) {
  const made = document.createElement(kind);
  if (words !== undefined) made.textContent = words;
  if (className) made.className = className;
  return made;
}

function text(stretches) {
  const made = element("p", undefined, "text");
  for (const [words, shade, underlined] of stretches) {
    if (!shade && !underlined) {
      made.append(words);
    } else {
      made.append(element("span", words, [shade ? `r${shade}` : "", underlined ? "o" : ""].join(" ").trim()));
    }
  }
  return made;
}

function card(writer) {
  const made = element("article", undefined, "writer");
  made.append(element("h3", writer.name));
  const numbers = writer.numbers.map(([name, value]) => `${name} ${value}`).join(" · ");
  if (numbers) made.append(element("p", numbers, "note"));
  made.append(text(writer.text));
  return made;
}

function isShown(writer, visible) {
  return writer.original ? $("originals").checked : visible.has(writer.member);
}

function showText() {
  const chosen = $("contexts").value;
  $("writers").replaceChildren();
  $("context").textContent = "";
  if (chosen === "") return;
  const block = JSON.parse($(`text-${chosen}`).textContent);
  const visible = shown();
  $("context").textContent = block.context;
  const writers = block.writers.filter((writer) => isShown(writer, visible)).map(card);
  if (block.reference) {
    writers.push(card({ name: "as it really goes on", numbers: [], text: [[block.reference, 0, 0]] }));
  }
  $("writers").replaceChildren(...writers);
  history.replaceState(null, "", `#text-${Number(chosen) + 1}`);
}

function highest(key, context, visible) {
  let found = -Infinity;
  for (const member of visible) {
    const value = data.members[member].texts[key]?.[context];
    if (value !== null && value !== undefined) found = Math.max(found, value);
  }
  return found;
}
const ORDERS = {
  rep: (context, visible) => -highest("rep", context, visible),
  overlap: (context, visible) => -highest("overlap", context, visible),
  ttr: (context, visible) => {
    const values = [...visible].map((member) => data.members[member].texts.ttr?.[context]);
    return Math.min(Infinity, ...values.filter((value) => value !== null && value !== undefined));
  },
};

function listContexts() {
  if (!$("contexts")) return;
  const [set, rep, overlap] = [$("set").value, Number($("rep").value), Number($("overlap").value)];
  const [visible, before, order] = [shown(), $("contexts").value, ORDERS[$("order").value]];
  let found = data.contexts.map((_, i) => i).filter((i) =>
    (!set || data.contexts[i][0] === set) &&
    (!rep || highest("rep", i, visible) >= rep) &&
    (!overlap || highest("overlap", i, visible) >= overlap));
  if (order) {
    const keys = new Map(found.map((i) => [i, order(i, visible)]));
    found = found.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
  }
  $("contexts").replaceChildren(...found.map((i) => {
    const option = element("option", `${i + 1} · ${data.contexts[i][0]} · ${data.contexts[i][1]}`);
    option.value = String(i);
    return option;
  }));
  $("count").textContent = `${found.length} of ${data.contexts.length}`;
  if (found.includes(Number(before)) && before !== "") $("contexts").value = before;
  else $("contexts").selectedIndex = found.length ? 0 : -1;
  showText();
}

function step(by) {
  const list = $("contexts");
  const next = Math.min(list.options.length - 1, Math.max(0, list.selectedIndex + by));
  if (next !== list.selectedIndex) {
    list.selectedIndex = next;
    showText();
  }
}

// ---- what happens when

function draw() {
  paintSwatches();
  drawCurves();
  drawScatter();
}
function membersChanged() {
  drawCurves();
  drawScatter();
  listContexts();
}
for (const box of boxes) box.addEventListener("change", membersChanged);
for (const button of document.querySelectorAll("[data-members]")) {
  button.addEventListener("click", () => {
    for (const box of boxes) if (!box.disabled) box.checked = button.dataset.members === "all";
    membersChanged();
  });
}
$("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  draw();
});
dark.addEventListener("change", draw);
for (const id of ["metric-x", "metric-y"]) $(id)?.addEventListener("change", drawScatter);
if ($("contexts")) {
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("input", listContexts);
  $("contexts").addEventListener("change", showText);
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
}
const asked = /^#text-(\d+)$/.exec(location.hash);
draw();
listContexts();
if (asked && $("contexts")) {
  $("contexts").value = String(Number(asked[1]) - 1);
  showText();
}
