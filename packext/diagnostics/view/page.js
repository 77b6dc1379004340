"use strict";
// Draws what content.py says of one run or two. What an instrument looks like comes with the data (panels.py).
const START = JSON.parse(document.getElementById("start").textContent);
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]; // told apart by colour-blind people (Okabe & Ito)
const DASHES = ["solid", "dash", "dot", "dashdot"];
const runs = Array.from({ length: START.live || START.runs.length }, () => ({ lines: {}, maps: {}, opened: -1, revision: -1 }));
const boxes = new Map(); // panels on the page, by key
let columns = false;

// -- small things -----------------------------------------------------------------------------------
function make(tag, parent, text, kind) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  if (parent) parent.append(node);
  return node;
}
const count = (n) => n.toLocaleString("en");
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
const number = (x) => (x === null ? "none" : String(Number(x.toPrecision(3))));
const tint = (colour, share) => colour + Math.round(share * 255).toString(16).padStart(2, "0");
const short = (name, most) => (name.length > most ? `${name.slice(0, most / 2 - 1)}\u2026${name.slice(-most / 2)}` : name);
const several = (names, most) => names.slice(0, most).join(", ") + (names.length > most ? ` and ${names.length - most} more` : "");
const here = () => runs.filter((run) => run.panels);
const colourOf = (run, k) => COLOURS[here().length > 1 && !columns ? runs.indexOf(run) : k % COLOURS.length];

// -- data -------------------------------------------------------------------------------------------
function floats(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}
// Bins from the first that has changed on replace those that were there.
function joined(old, piece, keys) {
  if (!old || old.width !== piece.width) return piece;
  let cut = old.at.length;
  while (cut && piece.at.length && old.at[cut - 1] >= piece.at[0]) cut--;
  const whole = { ...piece, at: old.at.slice(0, cut).concat(piece.at) };
  for (const key of keys) whole[key] = old[key].slice(0, cut).concat(piece[key]);
  return whole;
}
function take(run, message) {
  const { lines = {}, maps = {}, ...rest } = message;
  const changed = message.opened !== run.opened || message.revision !== run.revision;
  if (message.opened !== run.opened) Object.assign(run, { lines: {}, maps: {}, panels: undefined });
  Object.assign(run, rest);
  if (run.revision === undefined) run.revision = -1;
  for (const [name, piece] of Object.entries(lines)) run.lines[name] = joined(run.lines[name], piece, ["mean", "low", "high"]);
  for (const [name, piece] of Object.entries(maps)) {
    const values = floats(piece.values), size = piece.layers.length;
    const rows = piece.at.map((_, k) => values.subarray(k * size, (k + 1) * size));
    run.maps[name] = joined(run.maps[name], { ...piece, rows, values: undefined }, ["rows"]);
  }
  return changed;
}

// -- plots ------------------------------------------------------------------------------------------
const axis = (title, more) => ({
  title: { text: title, standoff: 6, font: { size: 11 } }, automargin: true, gridcolor: "#e8eaed", zerolinecolor: "#c4c8cd",
  linecolor: "#9aa0a6", ticks: "outside", ticklen: 3, exponentformat: "power", ...more,
});
const stepAxis = (more) => axis("step", { exponentformat: "SI", rangemode: "tozero", nticks: 6, zeroline: false, ...more });
function draw(div, traces, layout) {
  Plotly.react(div, traces, {
    margin: { l: 48, r: 12, t: 8, b: 34 }, height: 230, font: { size: 11, color: "#222" }, uirevision: "keep", hovermode: "closest",
    // Of the container: relative to the plot, it may lie on the lines once the page has become wider.
    legend: { orientation: "h", x: 0, y: 1, yanchor: "top", yref: "container" }, ...layout,
  }, { displayModeBar: false });
}
// Whether a logarithmic axis is possible, and its ticks.
function scale(log, values) {
  let low = Infinity, high = -Infinity, below = false;
  for (const v of values) {
    if (v === null || v === undefined) continue;
    if (v < 0) below = true;
    if (v > 0) { low = Math.min(low, v); high = Math.max(high, v); }
  }
  if (!log || below || high < 0) return { type: "linear", nticks: 6 };
  const decades = Math.log10(high / low);
  if (decades > 0 && decades < 0.6) return { type: "log", nticks: 5 };
  if (decades > 2) return { type: "log", dtick: Math.ceil(decades / 6) };
  const tickvals = [], around = decades ? 0 : 1; // plotly's own have no power of ten on them; it shows a decade around a constant
  for (let power = Math.floor(Math.log10(low)) - around; power <= Math.log10(high) + around; power++) tickvals.push(...[1, 2, 5].map((digit) => Number(`${digit}e${power}`)));
  return { type: "log", tickvals, ticktext: tickvals.map(String) };
}
// Two runs side by side share the vertical axis; each has a horizontal one, and they move together.
const sideOf = (run) => (columns && run === here()[1] ? { xaxis: "x2" } : {});
function sides(layout, first) {
  if (!columns || here().length < 2) return { ...layout, xaxis: first };
  const two = ["xaxis", "xaxis2"].map((key, k) => [key, { ...first, domain: k ? [0.53, 1] : [0, 0.47], ...(k ? { matches: "x" } : {}) }]);
  const names = here().map((run, k) => ({ text: `<b>${short(run.name, 24)}</b>`, x: k ? 1 : 0.47, xanchor: "right", xref: "paper", y: 1, yanchor: "top", yref: "paper", showarrow: false, bgcolor: "#ffffffcc" }));
  return { ...layout, ...Object.fromEntries(two), annotations: names.concat(layout.annotations || []) };
}
function drawLines(box, panel) {
  const names = Object.keys(panel.names), traces = [], shown = [], over = here().length > 1 && !columns;
  const many = names.filter((name) => here().some((run) => run.lines[name])).length > 1;
  let end = 1;
  for (const run of here()) for (const [k, name] of names.entries()) {
    const line = run.lines[name];
    if (!line) continue;
    const colour = colourOf(run, k), x = line.at, side = sideOf(run), group = many ? name : run.path;
    end = Math.max(end, x[x.length - 1] || 0);
    shown.push(...line.low, ...line.high);
    if (line.width > 1) {
      const band = { x, mode: "lines", line: { width: 0.7, color: tint(colour, 0.5) }, hoverinfo: "skip", showlegend: false, legendgroup: group, ...side };
      traces.push({ ...band, y: line.low }, { ...band, y: line.high, fill: "tonexty", fillcolor: tint(colour, 0.22) });
    }
    traces.push({
      x, y: line.mean, name: many ? panel.names[name] : short(run.name, 24), legendgroup: group, showlegend: many ? !over && run === here().find((one) => one.lines[name]) : over,
      mode: x.length < 40 ? "lines+markers" : "lines", line: { color: colour, width: 1.5, dash: over ? DASHES[k] : "solid" },
      marker: { size: 4 }, ...side, hovertemplate: `step %{x}: %{y:.4~g}<extra>${line.width > 1 ? `mean of ${line.width} steps` : ""}</extra>`,
    });
  }
  // Two runs one over the other: colour says which run, dashes say which line.
  if (over && many) for (const [k, name] of names.entries()) if (here().some((run) => run.lines[name])) {
    traces.push({ x: [null], y: [null], mode: "lines", line: { color: "#5a5f66", width: 1.5, dash: DASHES[k] }, name: panel.names[name], legendgroup: name });
  }
  const ticks = scale(panel.log, shown);
  for (const trace of traces) if (ticks.type === "log") trace.y = trace.y.map((y) => (y > 0 ? y : null));
  const annotations = [], heights = panel.marks.map(([height]) => height), [low, high] = extremes([[shown, heights]]);
  const crowded = heights.length > 1 && (heights[1] - heights[0]) / (high - low) < 0.12;
  for (const [height, text] of panel.marks) for (const run of columns ? here() : here().slice(0, 1)) {
    const side = sideOf(run);
    traces.push({ ...side, x: [0, end], y: [height, height], mode: "lines", line: { color: "#8a9097", width: 1, dash: "dot" }, showlegend: false, hoverinfo: "skip" });
    if (!crowded) annotations.push({
      text, x: 1, xref: `${side.xaxis || "x"} domain`, xanchor: "right", y: ticks.type === "log" ? Math.log10(height) : height, yanchor: "bottom",
      showarrow: false, bgcolor: "#ffffffb0", borderpad: 0, font: { size: 10, color: "#5a5f66" },
    });
  }
  const odd = here().flatMap((run) => names.filter((name) => run.lines[name]?.odd).map((name) => {
    const { odd: [steps, first] } = run.lines[name];
    return `${here().length > 1 ? `${short(run.name, 24)}: ` : ""}${many ? `${panel.names[name]} ` : ""}not finite in ${plural(steps, "step")}, first in step ${count(first)}.`;
  }));
  box.note.textContent = [panel.says, ...odd].filter(Boolean).join(" ");
  draw(box.plots[0], traces, sides({ yaxis: axis(panel.axis, ticks), annotations }, stepAxis()));
}

function drawAlpha(box, panel) {
  const traces = [], x = Array.from({ length: 41 }, (_, k) => k / 10 - 2);
  let top = 0;
  for (const run of here()) {
    if (!run.alpha) continue;
    const { edges } = run.alpha, middles = edges.slice(1).map((edge, k) => (edge + edges[k]) / 2), side = sideOf(run);
    const colour = columns ? COLOURS[0] : colourOf(run, 0), who = here().length > 1 ? `${short(run.name, 18)}: ` : "";
    for (const [part, text] of [["all", "all steps"], ["end", "last tenth"]]) {
      const { shares, median } = run.alpha[part], all = part === "all";
      top = Math.max(top, ...shares);
      traces.push({
        x: [edges[0], ...middles, edges.at(-1)], y: [shares[0], ...shares, shares.at(-1)], ...side, name: `${who}${text}, median ${number(median)}`, mode: "lines", fill: all ? "tozeroy" : "none",
        fillcolor: here().length > 1 && !columns ? tint(colour, 0.2) : "#c9cdd2aa", hovertemplate: "alpha %{x:.2f}: %{y:.1%}<extra></extra>",
        line: { shape: "hvh", color: all ? "#9aa0a6" : colour, width: all ? 1 : 2 },
      });
    }
    traces.push({ x, y: x.map((v) => v * v), yaxis: columns && run === here()[1] ? "y3" : "y2", ...side, mode: "lines", line: { color: "#5a5f66", width: 1, dash: "dot" }, hoverinfo: "skip", showlegend: false });
  }
  const hidden = { overlaying: "y", visible: false, range: [0, 4.4], fixedrange: true };
  const ends = columns ? ["", ""] : ["\u2264 \u22122", "\u2265 2"]; // which would touch
  const ticks = { range: [-2.05, 2.05], tickvals: [-2, -1, 0, 1, 2], ticktext: [ends[0], "\u22121", "0", "1", ends[1]] };
  const layout = { yaxis: axis(panel.axis, { tickformat: ".0%", range: [0, top * 1.08], nticks: 5 }), yaxis2: hidden, yaxis3: { ...hidden, anchor: "x2" } };
  draw(box.plots[0], traces, sides({ ...layout, height: here().length > 1 ? 270 : 230 }, axis("alpha", ticks)));
}

// Edges at equal distances, as middles.
const middles = (limit, n) => Array.from({ length: n }, (_, k) => limit * ((2 * k + 1) / n - 1));

function drawBars(box, panel, found) {
  const traces = [], shown = [];
  for (const { run, histogram } of found) {
    const { shares, limit, step } = histogram, colour = colourOf(run, 0);
    shown.push(...shares);
    traces.push({
      type: "bar", x: middles(limit, shares.length), y: shares.map((s) => s || null), width: (2 * limit) / shares.length, ...sideOf(run),
      marker: { color: tint(colour, found.length > 1 && !columns ? 0.5 : 1) }, name: `${short(run.name, 24)}, step ${step}`, showlegend: found.length > 1,
      hovertemplate: `%{x:.3~g}: %{y:.3~g}<extra>step ${step}</extra>`,
    });
  }
  draw(box.plots[0], traces, sides({ barmode: "overlay", yaxis: axis("share of entries", scale(true, shown)) }, axis(panel.axis, { nticks: 6 })));
}

// Colour by the logarithm of positive numbers; the bar has ticks in the numbers themselves.
function coloured(low, high, title) {
  if (low > high) [low, high] = [0, 0]; // nothing to show
  if (low === high) { low -= 0.5; high += 0.5; }
  const pace = high - low > 5 ? Math.ceil((high - low) / 5) : high - low > 1.5 ? 1 : (high - low) / 3;
  const first = pace >= 1 ? Math.ceil(low) : low, ticks = [];
  for (let t = first; t <= high + 1e-9; t += pace) ticks.push(t);
  const text = ticks.map((t) => (pace >= 1 ? `10<sup>${t}</sup>` : String(Number((10 ** t).toPrecision(2)))));
  return { zmin: low, zmax: high, colorscale: "Viridis", colorbar: { tickvals: ticks, ticktext: text, thickness: 10, outlinewidth: 0, title: { text: title, side: "right", font: { size: 11 } } } };
}
// Shares as they are: 0 is the best of them, and not absent.
const SHARES = { zmin: 0, zmax: 1, colorscale: "Viridis", colorbar: { tickformat: ".0%", nticks: 5, thickness: 10, outlinewidth: 0 } };
const plain = (v) => (Number.isFinite(v) ? v : null);
const logarithm = (v) => (v > 0 && v < Infinity ? Math.log10(v) : null);
function extremes(tables) {
  let low = Infinity, high = -Infinity;
  for (const table of tables) for (const row of table) for (const z of row) if (z !== null) { low = Math.min(low, z); high = Math.max(high, z); }
  return [low, high];
}

function drawImage(box, panel, found) {
  const tables = found.map(({ histogram }) => histogram.shares.map((row) => row.map(logarithm)));
  const colours = coloured(...extremes(tables), "share of entries");
  found.forEach(({ run, histogram }, k) => {
    const { limit, param_limit, shares, step } = histogram, last = k === found.length - 1;
    const trace = {
      type: "heatmap", x: middles(limit, shares[0].length), y: middles(param_limit, shares.length), z: tables[k], customdata: shares, ...colours, showscale: last,
      hovertemplate: `gradient %{x:.3~g}, parameter %{y:.3~g}: %{customdata:.3~g}<extra>step ${step}</extra>`,
    };
    const title = found.length > 1 ? { title: { text: `${short(run.name, 24)}, step ${step}`, font: { size: 11 }, y: 0.97 } } : {};
    draw(box.plots[k], [trace], { ...title, margin: { l: 48, r: 12, t: found.length > 1 ? 24 : 8, b: 34 }, xaxis: axis(panel.axis, { nticks: 5, zeroline: false }), yaxis: axis(k ? "" : "parameter", { nticks: 6, zeroline: false }) });
  });
}

function drawSamples(box, panel, found) {
  found.forEach(({ run, histogram }, k) => {
    const { norms, shares, samples, step } = histogram, percent = norms.map((_, l) => (shares && shares[l] !== null ? `${(100 * shares[l]).toPrecision(2)} %` : ""));
    const trace = {
      type: "bar", orientation: "h", x: norms, y: norms.map((_, l) => l), text: percent, textposition: "auto", cliponaxis: false,
      customdata: samples, marker: { color: colourOf(run, 0) }, hovertemplate: `sample %{customdata}: %{x:.3~g}<extra>step ${step}</extra>`,
    };
    const title = found.length > 1 ? { title: { text: `${short(run.name, 24)}, step ${step}`, font: { size: 11 }, y: 0.97 } } : {};
    const rows = { range: [norms.length - 0.5, -0.5], tickvals: norms.map((_, l) => l), ticktext: samples.map((l) => `sample ${l}`), showgrid: false, zeroline: false, tickfont: { size: 10 } };
    draw(box.plots[k], [trace], { ...title, margin: { l: 84, r: 12, t: found.length > 1 ? 24 : 8, b: 34 }, xaxis: axis(panel.axis, { nticks: 6 }), yaxis: axis("", rows) });
  });
}

// Where columns begin, and where the last one ends: each reaches to the next, and the last is as wide as the one before it.
const edgesOf = ({ at, width }) => [...at, at.at(-1) + Math.max(width, at.at(-1) - (at.at(-2) ?? at.at(-1)))];
function drawMap(box, heat, name) {
  const found = here().filter((run) => run.maps[name]);
  const tables = found.map((run) => run.maps[name].layers.map((_, layer) => run.maps[name].rows.map((row) => (heat.log ? logarithm : plain)(row[layer]))));
  const colours = heat.log ? coloured(...extremes(tables), heat.axis) : SHARES;
  box.plots.forEach((div, k) => { div.hidden = k >= found.length; });
  const edges = found.map((run) => edgesOf(run.maps[name])), range = [Math.min(...edges.flat()), Math.max(...edges.flat())];
  found.forEach((run, k) => {
    const { at, layers, labels, rows, width } = run.maps[name], last = k === found.length - 1;
    const height = Math.max(150, Math.min(560, 17 * layers.length + 70)), pace = Math.ceil((13 * layers.length) / (height - 60));
    const labelled = layers.map((_, l) => l).filter((l) => l % pace === 0);
    const trace = {
      type: "heatmap", x: edges[k], y: layers.map((_, layer) => layer), z: tables[k], ...colours, showscale: last, hoverongaps: false,
      customdata: layers.map((layer, l) => rows.map((row, step) => [layer, row[l], at[step]])),
      hovertemplate: `%{customdata[0]}<br>${width > 1 ? `mean of up to ${width} steps from` : "step"} %{customdata[2]}: %{customdata[1]:.3~g}<extra></extra>`,
    };
    const title = found.length > 1 ? { title: { text: short(run.name, 30), font: { size: 11 }, y: 0.98 } } : {};
    draw(box.plots[k], [trace], {
      ...title, height, plot_bgcolor: "#d4d7db", margin: { l: 60, r: 8, t: found.length > 1 ? 24 : 8, b: 34 }, xaxis: stepAxis({ showgrid: false, range }),
      yaxis: axis("", { range: [layers.length - 0.5, -0.5], tickvals: labelled, ticktext: labelled.map((l) => labels[l]), showgrid: false, zeroline: false, tickfont: { size: 10 } }),
    });
  });
}

// -- histograms with a slider -------------------------------------------------------------------------
const nearest = (steps, step) => steps.reduce((best, s) => (Math.abs(s - step) < Math.abs(best - step) ? s : best), steps[0]);
async function fetched(run, name, step) {
  if (!START.live) return START.histograms[runs.indexOf(run)][name]?.[step];
  const answer = await fetch(`histogram?run=${runs.indexOf(run)}&name=${encodeURIComponent(name)}&step=${step}`);
  return answer.ok ? answer.json() : null;
}
function slider(box, panel, name) {
  const controls = make("div", box.controls, undefined, "controls"), layer = make("select", controls), input = make("input", controls);
  const own = { layer, input, output: make("output", controls), stops: [], step: null, asked: 0, shown: "" };
  layer.setAttribute("aria-label", "layer");
  Object.assign(input, { type: "range", min: 0, step: 1, value: 0 });
  input.setAttribute("aria-label", "step");
  own.show = async () => {
    const part = layer.value ? `${name}/${layer.value}` : name, asked = ++own.asked, found = [];
    own.step = own.stops[input.value];
    for (const run of here()) {
      const steps = run.histograms[name]?.steps || [];
      const histogram = steps.length ? await fetched(run, part, nearest(steps, own.step)) : null;
      if (histogram) found.push({ run, histogram });
    }
    if (asked !== own.asked) return; // another one was asked for meanwhile
    own.output.textContent = `step ${count(own.step)}`;
    own.shown = JSON.stringify([part, columns, found.map(({ histogram }) => histogram.step), here().length]);
    box.plots[1].hidden = panel.kind === "bars" || found.length < 2;
    if (!found.length) Plotly.purge(box.plots[0]);
    else ({ bars: drawBars, image: drawImage, samples: drawSamples })[panel.kind](box, panel, found);
  };
  input.addEventListener("input", own.show);
  layer.addEventListener("change", own.show);
  return own;
}
function drawHistogram(box, panel) {
  const name = Object.keys(panel.names)[0];
  box.slider ??= slider(box, panel, name);
  const own = box.slider, all = here().map((run) => run.histograms[name]).filter(Boolean);
  const follows = own.step === null || Number(own.input.value) === own.stops.length - 1; // the newest, until it is moved
  own.stops = [...new Set(all.flatMap((h) => h.steps))].sort((a, b) => a - b);
  own.input.max = own.stops.length - 1;
  own.input.value = follows ? own.stops.length - 1 : own.stops.indexOf(nearest(own.stops, own.step));
  const layers = [...new Set(all.flatMap((h) => h.layers))];
  if (own.layer.options.length !== layers.length + 1) {
    const chosen = own.layer.value;
    own.layer.replaceChildren();
    for (const value of ["", ...layers]) Object.assign(make("option", own.layer, value ? short(value, 40) : "all parameters"), { value, title: value });
    own.layer.value = chosen;
  }
  box.note.textContent = `${panel.says} The slider has ${all.map((h) => `${count(h.steps.length)} of ${plural(h.of, "step")}`).join(" and ")}.`;
  const key = [own.layer.value ? `${name}/${own.layer.value}` : name, columns, here().map((run) => run.histograms[name]).filter(Boolean).map((h) => nearest(h.steps, own.stops[own.input.value])), here().length];
  if (own.shown !== JSON.stringify(key)) own.show();
}

// -- the page -----------------------------------------------------------------------------------------
const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) if (target.data && target.clientWidth) Plotly.Plots.resize(target);
});
function boxOf(key, parent, title) {
  if (!boxes.has(key)) {
    const root = make("section", parent, undefined, "panel");
    make("h3", root, title);
    const note = make("p", root, "", "says"), controls = make("div", root), plots = make("div", root, undefined, "plots");
    boxes.set(key, { root, note, controls, plots: [make("div", plots), make("div", plots)] });
    boxes.get(key).plots[1].hidden = true;
    root.dataset.key = key;
    for (const div of boxes.get(key).plots) resized.observe(div);
  }
  return boxes.get(key);
}
function columnOf(name) {
  const id = `column ${name}`;
  let found = document.getElementById(id);
  if (!found) {
    found = make("div", document.getElementById("panels"), undefined, "column");
    found.id = id;
    found.classList.toggle("wide", name === "Other");
    make("h2", found, name);
  }
  return found;
}
const DRAWERS = { lines: drawLines, alpha: drawAlpha, bars: drawHistogram, image: drawHistogram, samples: drawHistogram };
function drawPanels() {
  const panels = new Map(here().flatMap((run) => run.panels).map((panel) => [panel.title, panel]));
  const heats = Object.assign({}, ...here().map((run) => run.heats)), maps = document.getElementById("maps");
  maps.hidden = !Object.keys(heats).length;
  // All boxes first: plots take their width from the page as it will be.
  for (const panel of panels.values()) boxOf(panel.title, columnOf(panel.column), panel.title).note.textContent = panel.says;
  for (const [name, heat] of Object.entries(heats)) boxOf(`map ${name}`, maps.querySelector(".grid"), heat.title);
  for (const panel of panels.values()) DRAWERS[panel.kind](boxOf(panel.title), panel);
  for (const [name, heat] of Object.entries(heats)) drawMap(boxOf(`map ${name}`), heat, name);
  const widths = here().flatMap((run) => Object.values(run.maps).map((map) => map.width)), width = Math.max(1, ...widths);
  maps.querySelector(".says").textContent = `Logarithmic colour (of shares from 0 to 1), layers in the order of the model. ${width > 1 ? `A column is the mean of up to ${count(width)} steps.` : "A column is one step."} Grey: absent, or a logarithm of what is not positive.`;
  for (const [key, box] of boxes) {
    if (panels.has(key) || (key.startsWith("map ") && key.slice(4) in heats)) continue;
    box.root.remove();
    boxes.delete(key);
  }
}

function drawRuns() {
  const root = document.getElementById("runs");
  root.replaceChildren();
  runs.forEach((run, k) => {
    const row = make("div", root, undefined, "run");
    if (runs.length > 1 && !columns) make("span", row, undefined, "dash").style.background = COLOURS[k];
    make("b", row, run.name || "");
    if (run.panels) make("span", row, `${plural(run.steps, "step")} looked at${run.last === null ? "" : `, the last is ${count(run.last)}`}`);
    if (run.more) make("span", row, `reading the record, ${Math.floor(100 * run.progress)} %`, "reading");
    make("span", row, `${run.path || ""}${run.header?.began ? `, begun ${run.header.began.replace("T", " ").replace("+00:00", " UTC")}` : ""}`, "quiet");
    const problem = run.lost ? "The server does not answer: it was stopped, or this machine cannot reach it." : run.error;
    if (problem) make("span", row, problem, "error").setAttribute("role", "alert");
  });
  document.getElementById("sides").hidden = here().length < 2;
}

function drawVerdict(parent, run, verdict) {
  const card = make("article", parent, undefined, `verdict${verdict.until === null ? "" : " withdrawn"}`);
  const line = make("div", card);
  make("b", line, verdict.name);
  if (verdict.where.length) make("span", line, ` in ${several(verdict.where, 6)}`).title = verdict.where.join(", ");
  const when = verdict.until === null ? `since step ${count(verdict.step)}` : `steps ${count(verdict.step)} to ${count(verdict.until)}, withdrawn`;
  make("span", line, ` \u00b7 ${when}${runs.length > 1 ? ` \u00b7 ${run.name}` : ""}`, "quiet");
  make("div", card, verdict.evidence);
  make("div", card, verdict.advice, "advice");
}
function drawVerdicts() {
  const root = document.getElementById("verdicts"), open = root.querySelector("details")?.open;
  root.replaceChildren();
  const all = here().flatMap((run) => run.verdicts.map((verdict) => [run, verdict]));
  const standing = all.filter(([, verdict]) => verdict.until === null), past = all.filter(([, verdict]) => verdict.until !== null);
  const said = here().some((run) => run.steps) ? "No verdict stands: no rule that listens has found a failure." : "No step was looked at yet.";
  if (here().length && !standing.length) make("div", root, said, "verdict none");
  for (const [run, verdict] of standing) drawVerdict(root, run, verdict);
  if (!past.length) return;
  const more = make("details", root);
  more.open = open;
  make("summary", more, `${plural(past.length, "verdict")} withdrawn`);
  for (const [run, verdict] of past) drawVerdict(more, run, verdict);
}

function drawAbsent() {
  const rows = here().flatMap((run) => run.absent.map((row) => [run, row])), root = document.getElementById("absent");
  root.hidden = !rows.length;
  const table = make("table"), head = make("tr", make("thead", table)), body = make("tbody", table);
  for (const text of [...(runs.length > 1 ? ["run"] : []), "instrument", "why", "steps", "from, to", "layers"]) make("th", head, text);
  for (const [run, row] of rows) {
    const line = make("tr", body);
    if (runs.length > 1) make("td", line, run.name);
    make("td", line, row.name);
    make("td", line, row.why);
    make("td", line, count(row.count), "number");
    make("td", line, `${count(row.first)}, ${count(row.last)}`, "number");
    make("td", line, row.layers.length ? several(row.layers, 3) : "").title = row.layers.join(", ");
  }
  root.querySelector(".scroll").replaceChildren(table);
}

function drawAll() {
  drawRuns();
  drawVerdicts();
  drawPanels();
  drawAbsent();
  const width = Math.max(1, ...here().flatMap((run) => Object.values(run.lines).map((line) => line.width)));
  document.querySelector("footer").textContent = (width > 1
    ? `Lines are means of up to ${count(width)} steps, in a band from the smallest to the largest of them: no extreme is left out.`
    : "Lines have every step that was looked at.") + " Drag to zoom in, double-click to zoom out.";
  document.body.dataset.drawn = Number(document.body.dataset.drawn || 0) + 1;
}

for (const name of ["overlay", "columns"]) {
  document.getElementById(name).addEventListener("click", () => {
    columns = name === "columns";
    for (const other of ["overlay", "columns"]) document.getElementById(other).setAttribute("aria-pressed", other === name);
    drawAll();
  });
}

let drawn = -Infinity, spent = 0; // when all was drawn last, and how long it took
async function poll(k) {
  const run = runs[k];
  let wait = 1000, changed = false;
  try {
    const answer = await fetch(`data?run=${k}&opened=${run.opened}&since=${run.revision}`);
    if (!answer.ok) throw new Error(answer.statusText);
    const state = JSON.stringify([run.error, run.lost]), message = await answer.json();
    changed = take(run, message) || state !== JSON.stringify([run.error, false]);
    run.lost = false;
    if (message.more) wait = 0;
  } catch (problem) {
    console.warn(problem);
    changed = !run.lost;
    run.lost = true;
    wait = 3000;
  }
  run.stale = run.stale || changed;
  // While a long record is read, most of the time is for reading.
  if (run.stale && !document.hidden && (!run.more || performance.now() - drawn > Math.max(2000, 4 * spent))) {
    run.stale = false;
    const began = performance.now();
    drawAll();
    drawn = performance.now();
    spent = drawn - began;
  } else if (run.more) drawRuns();
  setTimeout(() => poll(k), run.more ? wait : Math.max(wait, 4 * spent));
}
if (START.live) runs.forEach((_, k) => poll(k));
else {
  START.runs.forEach((message, k) => take(runs[k], message));
  drawAll();
}
