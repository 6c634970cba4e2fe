"use strict";
// Text of data and models is inserted as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const COLORS = {
  light: ["#000000", "#0072b2", "#c04a00", "#007a5a", "#a8447f", "#8a6100", "#3b7ea8"],
  dark: ["#f2f2f2", "#56b4e9", "#ff8a3d", "#2fc79a", "#e59ac4", "#e6b422", "#9ad0f5"],
};
const DASHES = ["solid", "dash", "dot", "dashdot"];
const MARKERS = ["circle", "square", "diamond", "triangle-up"];

// ---- selected runs

const boxes = [...document.querySelectorAll("#runs input")];
const selectedRuns = () => new Set(boxes.filter((box) => box.checked).map((box) => Number(box.value)));

// ---- light and dark

const dark = matchMedia("(prefers-color-scheme: dark)");
function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : dark.matches;
}
const color = (run) => {
  const palette = COLORS[isDark() ? "dark" : "light"];
  return palette[run % palette.length];
};
const style = (run) => Math.floor(run / COLORS.light.length) % DASHES.length;

function paintSwatches() {
  for (const swatch of document.querySelectorAll(".swatch")) {
    swatch.style.background = color(Number(swatch.dataset.run));
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
// Plotly takes tags in names for markup.
const plotlyText = (text) => text.replace(/[&<>]/g, (c) => `&#${c.charCodeAt(0)};`);
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };

function drawCurves() {
  const selected = selectedRuns();
  for (const chart of document.querySelectorAll("[data-curve]")) {
    const key = chart.dataset.curve;
    const traces = data.runs.flatMap((run, i) => {
      const line = run.curves[key];
      if (!line) return [];
      return [{
        x: line[0], y: line[1], name: plotlyText(run.name), mode: "lines+markers", visible: selected.has(i),
        line: { color: color(i), dash: DASHES[style(i)] }, marker: { symbol: MARKERS[style(i)], size: 5 },
        hovertemplate: "%{fullData.name}<br>epoch %{x}: %{y:.4g}<extra></extra>",
      }];
    });
    Plotly.react(chart, traces, layout("epoch", data.labels[key]), CONFIG);
  }
}

function drawScatter() {
  if (!$("scatter")) return;
  const selected = selectedRuns();
  const [x, y] = [$("metric-x").value, $("metric-y").value];
  const error = (estimate) => ({
    type: "data", symmetric: false, thickness: 1,
    array: [estimate[2] - estimate[0]], arrayminus: [estimate[0] - estimate[1]],
  });
  const traces = data.runs.flatMap((run, i) => {
    const [a, b] = [run.metrics[x], run.metrics[y]];
    if (!a || !b) return [];
    return [{
      x: [a[0]], y: [b[0]], error_x: error(a), error_y: error(b), name: plotlyText(run.name), mode: "markers",
      visible: selected.has(i), marker: { color: color(i), symbol: MARKERS[style(i)], size: 11 },
      hovertemplate: "%{fullData.name}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    }];
  });
  Plotly.react($("scatter"), traces, layout(data.labels[x], data.labels[y]), CONFIG);
}

// ---- texts

function element(kind, content, className) {
  const node = document.createElement(kind);
  if (content !== undefined) node.textContent = content;
  if (className) node.className = className;
  return node;
}

function highlighted(spans) {
  const paragraph = element("p", undefined, "text");
  for (const [text, shade, overlaps] of spans) {
    const classes = [shade ? `r${shade}` : "", overlaps ? "o" : ""].join(" ").trim();
    paragraph.append(classes ? element("span", text, classes) : text);
  }
  return paragraph;
}

function picture(source, description) {
  const image = element("img", undefined, "picture");
  image.src = source;
  image.alt = description;
  return image;
}

function card({ name, metrics, spans, image }) {
  const article = element("article", undefined, "continuation");
  article.append(element("h3", name));
  const numbers = metrics.map(([label, value]) => `${label} ${value}`).join(" · ");
  if (numbers) article.append(element("p", numbers, "note"));
  article.append(image ? picture(image, `the image as completed by ${name}`) : highlighted(spans));
  return article;
}

// A continuation without a run is a base model's.
function isShown(continuation, selected) {
  return continuation.run === null ? $("base-models").checked : selected.has(continuation.run);
}

function showContext() {
  const index = $("contexts").value;
  $("continuations").replaceChildren();
  $("context").replaceChildren();
  if (index === "") return;
  const texts = JSON.parse($(`text-${index}`).textContent);
  const selected = selectedRuns();
  $("context").replaceChildren(
    texts.context_image ? picture(texts.context_image, "the pixels that are given") : texts.context);
  const cards = texts.continuations.filter((continuation) => isShown(continuation, selected)).map(card);
  if (texts.reference || texts.reference_image) {
    const name = texts.reference_image ? "real image" : "reference";
    cards.push(card({ name, metrics: [], spans: [[texts.reference, 0, 0]], image: texts.reference_image }));
  }
  $("continuations").replaceChildren(...cards);
  history.replaceState(null, "", `#text-${Number(index) + 1}`);
}

// Values of a metric for a context, of the selected runs that have one.
function values(key, context, selected) {
  return [...selected].map((run) => data.runs[run].texts[key]?.[context])
    .filter((value) => value !== null && value !== undefined);
}
const highest = (key, context, selected) => Math.max(-Infinity, ...values(key, context, selected));
const SORT_KEYS = {
  "gen/rep_2": (context, selected) => -highest("gen/rep_2", context, selected),
  "gen/row_repeat": (context, selected) => -highest("gen/row_repeat", context, selected),
  "gen/dataset_overlap": (context, selected) => -highest("gen/dataset_overlap", context, selected),
  "gen/ttr": (context, selected) => Math.min(Infinity, ...values("gen/ttr", context, selected)),
};

function listContexts() {
  if (!$("contexts")) return;
  const dataset = $("dataset").value;
  const [minRep, minOverlap] = [Number($("min-rep").value), Number($("min-overlap").value)];
  const [selected, current, sortKey] = [selectedRuns(), $("contexts").value, SORT_KEYS[$("order").value]];
  let listed = data.contexts.map((_, i) => i).filter((i) =>
    (!dataset || data.contexts[i][0] === dataset) &&
    (!minRep || highest("gen/rep_2", i, selected) >= minRep) &&
    (!minOverlap || highest("gen/dataset_overlap", i, selected) >= minOverlap));
  if (sortKey) {
    const keys = new Map(listed.map((i) => [i, sortKey(i, selected)]));
    listed = listed.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
  }
  $("contexts").replaceChildren(...listed.map((i) => {
    const option = element("option", `${i + 1} · ${data.contexts[i][0]} · ${data.contexts[i][1]}`);
    option.value = String(i);
    return option;
  }));
  $("count").textContent = `${listed.length} of ${data.contexts.length}`;
  if (listed.includes(Number(current)) && current !== "") $("contexts").value = current;
  else $("contexts").selectedIndex = listed.length ? 0 : -1;
  showContext();
}

function step(by) {
  const list = $("contexts");
  const next = Math.min(list.options.length - 1, Math.max(0, list.selectedIndex + by));
  if (next !== list.selectedIndex) {
    list.selectedIndex = next;
    showContext();
  }
}

// ---- events

function draw() {
  paintSwatches();
  drawCurves();
  drawScatter();
}
function selectionChanged() {
  drawCurves();
  drawScatter();
  listContexts();
}
for (const box of boxes) box.addEventListener("change", selectionChanged);
for (const button of document.querySelectorAll("[data-runs]")) {
  button.addEventListener("click", () => {
    for (const box of boxes) if (!box.disabled) box.checked = button.dataset.runs === "all";
    selectionChanged();
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
  $("contexts").addEventListener("change", showContext);
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
}
const linked = /^#text-(\d+)$/.exec(location.hash);
draw();
listContexts();
if (linked && $("contexts")) {
  $("contexts").value = String(Number(linked[1]) - 1);
  showContext();
}
