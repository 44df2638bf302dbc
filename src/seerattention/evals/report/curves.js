// Quality against measured density, one chart per length, and the tables behind it.

const SHAPES = [
  (s) => svg("circle", { r: s }),
  (s) => svg("rect", { x: -s, y: -s, width: 2 * s, height: 2 * s }),
  (s) => svg("path", { d: `M0 ${-1.25 * s}L${1.15 * s} ${s}H${-1.15 * s}Z` }),
  (s) => svg("path", { d: `M0 ${-1.4 * s}L${1.4 * s} 0L0 ${1.4 * s}L${-1.4 * s} 0Z` }),
  (s) => svg("path", { d: `M0 ${1.25 * s}L${1.15 * s} ${-s}H${-1.15 * s}Z` }),
];
const DASHES = ["", "7 3", "2 3"];
const TITLES = ["method", "asked", "density", "n", "", "95 %", "minus dense", "prefill s", "s", "faults"];

const shapeOf = (style, size) => fill(SHAPES[style % SHAPES.length](size), { fill: `var(--m${style % 8})` }, []);
const lineStyle = (style) => ({
  stroke: `var(--m${style % 8})`, fill: "none", "stroke-width": style ? 1.75 : 3,
  "stroke-dasharray": DASHES[Math.floor(style / 5) % 3] || null,
});

const valueText = (row, x) => (row.metric === "share" ? percent(x) : x.toFixed(3));

function pointText(row) {
  const interval = row.interval ? `, 95 % interval ${row.interval.map((x) => valueText(row, x)).join(" to ")}` : "";
  const name = row.metric === "share" ? "found" : "perplexity";
  return `${row.method}: density ${percent(row.density)}, ${name} ${valueText(row, row.score)}${interval}, ` +
    `${row.samples} samples`;
}

function showQuality(results) {
  const rows = results.rows;
  const tasks = [...new Set(rows.map((row) => row.task))];
  const isDense = (row) => row.policy === "";
  const names = [...new Set(rows.filter((row) => !isDense(row)).map((row) => row.method))];
  const styles = new Map(names.map((name, at) => [name, at]));
  const shown = new Set(names);
  const v = results.versions;
  byId("quality-about").textContent = `${results.model}, ${results.dtype}; text: ${results.text}; ${results.date}, ` +
    `${v.device}, torch ${v.torch}, transformers ${v.transformers}. Dense attention is the reference in every picture.`;
  byId("quality-note").textContent = results.note;
  byId("task").append(...tasks.map((task) => el("option", { value: task }, task)));
  byId("task").addEventListener("change", draw);
  for (const name of names) {
    const box = el("input", { type: "checkbox", checked: "" });
    box.addEventListener("change", () => {
      if (box.checked) shown.add(name);
      else shown.delete(name);
      draw();
    });
    const line = svg("line", { x1: 0, y1: 8, x2: 32, y2: 8, ...lineStyle(styles.get(name)) });
    const mark = svg("g", { transform: "translate(16 8)" }, shapeOf(styles.get(name), 4.5));
    byId("methods").append(el("label", {}, box, svg("svg", { viewBox: "0 0 32 16", "aria-hidden": "true" }, line, mark), name));
  }
  function draw() {
    const task = byId("task").value;
    const ofTask = rows.filter((row) => row.task === task);
    const lengths = [...new Set(ofTask.map((row) => row.length))];
    byId("charts").replaceChildren(...lengths.map((length) => {
      const part = ofTask.filter((row) => row.length === length && row.score !== null);
      return chart(task, length, part.find(isDense), part.filter((row) => !isDense(row) && shown.has(row.method)), styles);
    }));
    byId("tables").replaceChildren(...lengths.map((length, at) => table(task, length, ofTask.filter((row) => row.length === length), !at)));
  }
  draw();
}

function table(task, length, rows, open) {
  const columns = TITLES.length - (rows.some((row) => row.cells[9]) ? 0 : 1);
  const name = `${task}, ${whole(length)} tokens`;
  const head = TITLES.slice(0, columns).map((title, at) => el("th", { scope: "col" }, at === 4 ? rows[0].metric : title));
  const body = rows.map((row) => el("tr", row.policy === "" ? { class: "dense-row" } : {},
    ...row.cells.slice(0, columns).map((text, at) => (at ? el("td", {}, text) : el("th", { scope: "row" }, text)))));
  return el("details", { open: open ? "" : null, "aria-label": name }, el("summary", {}, name),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name },
      el("table", {}, el("caption", { class: "hidden" }, name), el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body))));
}

function niceTicks(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
  const ticks = [];
  for (let at = Math.ceil(low / step); at * step <= high + 1e-9 * step; at++) ticks.push(at * step);
  return { ticks, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

function valueRange(share, dense, rows) {
  if (share) return [0, 1];
  // What a random choice loses, and intervals of few samples, would flatten all else.
  const values = rows.filter((row) => row.method !== "random").map((row) => row.score);
  if (dense) values.push(dense.score);
  if (!values.length) values.push(...rows.map((row) => row.score));
  if (!values.length) return [0, 1];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = Math.max((high - low) * 0.12, low * 1e-3);
  return [low - room, high + room];
}

function chart(task, length, dense, rows, styles) {
  const share = (dense || rows[0] || {}).metric === "share";
  const [W, H, left, right, top, bottom] = [440, 290, 46, 14, 12, 40];
  const [low, high] = valueRange(share, dense, rows);
  const least = Math.min(0.05, ...rows.map((row) => row.density)) * 0.85;
  const x = (d) => left + (Math.log(d / least) / Math.log(1 / least)) * (W - left - right);
  const y = (v) => H - bottom - ((Math.min(Math.max(v, low), high) - low) / (high - low)) * (H - top - bottom);
  const title = `${task} at ${whole(length)} tokens`;
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": `${title}, chart; its numbers are in the table below` });
  const { ticks, digits } = share ? { ticks: [0, 0.25, 0.5, 0.75, 1], digits: 0 } : niceTicks(low, high);
  for (const tick of ticks) {
    picture.append(svg("line", { class: "grid", x1: left, x2: W - right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, share ? percent(tick, 0) : tick.toFixed(digits)));
  }
  for (const tick of [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].filter((t) => t >= least)) {
    picture.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: top, y2: H - bottom }),
      svg("text", { x: x(tick), y: H - bottom + 15, "text-anchor": "middle" }, percent(tick, 0)));
  }
  picture.append(svg("text", { x: (left + W - right) / 2, y: H - 6, "text-anchor": "middle" }, "density, measured"));
  if (dense) {
    if (dense.interval) {
      const [from, to] = dense.interval;
      picture.append(svg("rect", { class: "band", x: left, width: W - left - right, y: y(to), height: Math.max(0, y(from) - y(to)) }));
    }
    const above = y(dense.score) > top + 24;
    picture.append(svg("line", { class: "dense", x1: left, x2: W - right, y1: y(dense.score), y2: y(dense.score) }),
      svg("text", { class: "dense-label", x: left + 6, y: y(dense.score) + (above ? -6 : 15) },
        `dense ${valueText(dense, dense.score)}`));
  }
  const tip = el("div", { class: "tip", hidden: "" });
  // The first method, the gates as a rule, is drawn above the others.
  const methods = [...new Set(rows.map((row) => row.method))];
  const series = methods.map((name) => rows.filter((row) => row.method === name).sort((a, b) => a.density - b.density));
  const points = series.map(() => []);
  const inside = (v) => v >= low && v <= high;
  for (let s = series.length - 1; s >= 0; s--) {
    const style = styles.get(methods[s]);
    picture.append(svg("polyline", { points: series[s].map((row) => `${x(row.density)},${y(row.score)}`).join(" "), ...lineStyle(style) }));
    for (const row of series[s]) {
      const place = [x(row.density), y(row.score)];
      const marks = [];
      if (row.interval && inside(row.score)) {
        marks.push(svg("line", { x1: 0, x2: 0, y1: y(row.interval[0]) - place[1], y2: y(row.interval[1]) - place[1],
          stroke: `var(--m${style % 8})`, "stroke-width": 1.25, opacity: 0.55 }));
      }
      const off = row.score > high ? "M0 -3L6 7H-6Z" : "M0 3L6 -7H-6Z";
      marks.push(inside(row.score) ? shapeOf(style, style ? 4.5 : 5.5) : svg("path", { d: off, fill: `var(--m${style % 8})` }));
      marks.push(svg("circle", { class: "halo", r: 10 }), svg("circle", { r: 12, fill: "transparent" }));
      const point = svg("g", { class: "point", role: "img", tabindex: "-1", transform: `translate(${place.join(" ")})`, "aria-label": pointText(row) }, ...marks);
      const show = () => {
        tip.textContent = pointText(row);
        tip.hidden = false;
        tip.style.left = place[0] < W / 2 ? `${(100 * (place[0] + 14)) / W}%` : "auto";
        tip.style.right = place[0] < W / 2 ? "auto" : `${(100 * (W - place[0] + 14)) / W}%`;
        tip.style.top = `${Math.round((100 * place[1]) / H)}%`;
      };
      const hide = () => { tip.hidden = true; };
      point.addEventListener("pointerenter", show);
      point.addEventListener("focus", show);
      point.addEventListener("pointerleave", hide);
      point.addEventListener("blur", hide);
      points[s].push(point);
      picture.append(point);
    }
  }
  rove(picture, points);
  return el("figure", { class: "chart" }, el("figcaption", {}, title), picture, tip);
}

// One tab stop per grid of nodes; arrow keys move within it.
function rove(around, grid, moved) {
  if (!grid.length || !grid[0].length) return;
  grid[0][0].setAttribute("tabindex", "0");
  around.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const row = grid.findIndex((nodes) => nodes.includes(document.activeElement));
    if (row < 0 || !(step || event.key === "Home" || event.key === "End")) return;
    event.preventDefault();
    const column = grid[row].indexOf(document.activeElement);
    const next = grid[Math.min(Math.max(row + (step ? step[0] : 0), 0), grid.length - 1)];
    const at = { Home: 0, End: next.length - 1 }[event.key] ?? column + step[1];
    const node = next[Math.min(Math.max(at, 0), next.length - 1)];
    grid.flat().forEach((other) => other.setAttribute("tabindex", other === node ? "0" : "-1"));
    node.focus();
    if (moved) moved(node);
  });
}
