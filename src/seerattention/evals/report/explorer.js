// The true map, the gate's, and what a policy reads and misses, of one head at a time.

const [NOT_READ, READ_BEST, READ_OTHER, MISSED] = [0, 1, 2, 3];
const STATE_WORDS = ["not read", "read", "read, though others of the row weigh more", "missed"];

const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
// Causal pairs in row order.
const pairAt = (row, column) => (row * (row + 1)) / 2 + column;

function showExplorer(data) {
  const n = data.blocks.length;
  const headCount = data.heads[0].length;
  const state = { policy: 0, layer: 0, head: 0, row: n - 1, column: 0, held: false };
  const canvases = ["true", "gate", "read"].map((name) => ({ name, canvas: byId(`map-${name}`), picture: document.createElement("canvas") }));
  const decoded = new Map();
  const decades = -Math.log10(data.floor);

  const least = () => Number(byId("least").value);
  const shareAt = (bytes, at) => (bytes[at] ? 10 ** (((bytes[at] - 255) / 254) * decades) : 0);
  const shareText = (bytes, at) => (bytes[at] ? share(shareAt(bytes, at)) : `below ${percent(data.floor, 2)}`);

  function current() {
    const key = `${state.layer} ${state.head}`;
    if (!decoded.has(key)) {
      const head = data.heads[state.layer][state.head];
      decoded.set(key, { true: bytesOf(head.true), gate: bytesOf(head.gate), states: head.policies.map((p) => bytesOf(p.states)) });
    }
    const maps = decoded.get(key);
    const read = data.heads[state.layer][state.head].policies[state.policy];
    return { true: maps.true, gate: maps.gate, states: maps.states[state.policy], read };
  }

  function stateAt(maps, at) {
    const value = (maps.states[at >> 2] >> (2 * (at & 3))) & 3;
    return value === MISSED && shareAt(maps.true, at) < least() ? NOT_READ : value;
  }

  // ---- pictures

  function paint() {
    const maps = current();
    for (const { name, canvas, picture } of canvases) {
      const size = Math.max(1, Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)));
      canvas.width = canvas.height = picture.width = picture.height = size;
      const to = picture.getContext("2d");
      to.clearRect(0, 0, size, size);
      if (name === "read") paintRead(to, maps, size);
      else paintShares(to, maps[name], size);
    }
    point();
  }

  function paintShares(to, bytes, size) {
    const small = document.createElement("canvas");
    small.width = small.height = n;
    const image = new ImageData(n, n);
    for (let row = 0; row < n; row++) {
      for (let column = 0; column <= row; column++) {
        image.data.set([...colourAt(bytes[pairAt(row, column)] / 255), 255], 4 * (row * n + column));
      }
    }
    small.getContext("2d").putImageData(image, 0, 0);
    to.imageSmoothingEnabled = false;
    to.drawImage(small, 0, 0, size, size);
  }

  function paintRead(to, maps, size) {
    const cell = size / n;
    const gap = cell > 12 ? Math.max(1, cell * 0.08) : 0;
    const [empty, read, other, missed] = ["--empty", "--read", "--other", "--missed"].map(theme.colour);
    const crosses = [];
    for (let row = 0; row < n; row++) {
      for (let column = 0; column <= row; column++) {
        const what = stateAt(maps, pairAt(row, column));
        const [x, y] = [column * cell, row * cell];
        to.fillStyle = what === READ_BEST ? read : empty;
        to.fillRect(x, y, cell - gap + (gap ? 0 : 0.5), cell - gap + (gap ? 0 : 0.5));
        if (what === READ_OTHER) {
          to.fillStyle = other;
          to.fillRect(x + cell * 0.25, y + cell * 0.25, Math.max(1, cell * 0.5 - gap), Math.max(1, cell * 0.5 - gap));
        } else if (what === MISSED) crosses.push([x, y]);
      }
    }
    // Crosses come last and never get too small to be seen.
    const ratio = window.devicePixelRatio || 1;
    const half = Math.max(cell * 0.38, 2.75 * ratio);
    to.strokeStyle = missed;
    to.lineWidth = Math.max(cell * 0.16, 1.6 * ratio);
    to.beginPath();
    for (const [x, y] of crosses) {
      const [cx, cy] = [x + (cell - gap) / 2, y + (cell - gap) / 2];
      to.moveTo(cx - half, cy - half);
      to.lineTo(cx + half, cy + half);
      to.moveTo(cx + half, cy - half);
      to.lineTo(cx - half, cy + half);
    }
    to.stroke();
  }

  // Copies the pictures and draws where the reader is.
  function point() {
    const colour = theme.colour("--cursor");
    for (const { canvas, picture } of canvases) {
      const to = canvas.getContext("2d");
      const cell = canvas.width / n;
      const line = Math.max(1.5, canvas.width / 220);
      to.clearRect(0, 0, canvas.width, canvas.height);
      to.drawImage(picture, 0, 0);
      to.strokeStyle = colour;
      to.lineWidth = line / 2;
      to.strokeRect(0, state.row * cell, (state.row + 1) * cell, cell);
      to.lineWidth = line * 1.5;
      const room = Math.max(cell, 6);
      to.strokeRect((state.column + 0.5) * cell - room / 2, (state.row + 0.5) * cell - room / 2, room, room);
    }
  }

  // ---- words

  const span = (block) => [block * data.block, Math.min((block + 1) * data.block, data.tokens) - 1].map(whole).join("–");

  function entries(list, pairs) {
    list.replaceChildren(...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  function tell() {
    const maps = current();
    let missed = 0;
    for (let at = 0; at < pairAt(n, 0); at++) missed += stateAt(maps, at) === MISSED;
    const all = data.heads.flat().map((head) => head.policies[state.policy]);
    const mean = (name) => all.reduce((sum, read) => sum + read[name], 0) / all.length;
    byId("head-title").textContent = `Layer ${data.layers[state.layer]}, head ${state.head}`;
    entries(byId("tiles"), [
      ["of the blocks read", percent(maps.read.density)],
      ["of the attention kept", percent(maps.read.recall)],
      [least() ? `blocks missed of at least ${percent(least(), least() < 0.01 ? 1 : 0)}` : "blocks missed", whole(missed)],
      ["read and kept, mean of heads", `${percent(mean("density"))}, ${percent(mean("recall"))}`],
    ]);
  }

  function describe(aloud) {
    const maps = current();
    const { row, column } = state;
    const at = pairAt(row, column);
    const what = stateAt(maps, at);
    let count = 0;
    for (let c = 0; c <= row; c++) count += [READ_BEST, READ_OTHER].includes(stateAt(maps, pairAt(row, c)));
    const kept = percent(maps.read.rows[row] / 1000);
    byId("block-title").textContent = `Query block ${row} and KV block ${column}: ${STATE_WORDS[what]}` + (state.held ? " (held; click to let go)" : "");
    entries(byId("figures"), [
      ["true map, share of the row", shareText(maps.true, at)],
      ["gate’s score, share of the row", shareText(maps.gate, at)],
      ["the row reads", `${count} of ${row + 1} blocks`],
      ["and keeps", `${kept} of its attention`],
    ]);
    byId("query-title").textContent = `Query block ${row}, tokens ${span(row)}`;
    byId("key-title").textContent = `KV block ${column}, tokens ${span(column)}`;
    byId("query-text").textContent = data.blocks[row];
    byId("key-text").textContent = data.blocks[column];
    if (aloud) {
      byId("say").textContent = `Query block ${row}, KV block ${column}: ${STATE_WORDS[what]}. True ${shareText(maps.true, at)}, ` +
        `gate ${shareText(maps.gate, at)}. KV block: ${data.blocks[column]}`;
    }
    rowTable(maps);
  }

  function rowTable(maps) {
    const { row } = state;
    const columns = Array.from({ length: row + 1 }, (_, c) => c);
    columns.sort((a, b) => maps.true[pairAt(row, b)] - maps.true[pairAt(row, a)] || a - b);
    const head = ["KV block", "true", "gate", "", "text"].map((title) => el("th", { scope: "col" }, title));
    const body = columns.slice(0, 12).map((c) => {
      const at = pairAt(row, c);
      return el("tr", {}, el("th", { scope: "row" }, String(c)), el("td", {}, shareText(maps.true, at)), el("td", {}, shareText(maps.gate, at)),
        el("td", {}, STATE_WORDS[stateAt(maps, at)]), el("td", {}, data.blocks[c].trim().slice(0, 90)));
    });
    byId("row-table").replaceChildren(el("caption", {}, `Query block ${row}: its ${body.length} largest blocks by the true map`),
      el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
  }

  // ---- heads

  const buttons = [];

  function overview() {
    const head = el("tr", {}, el("th", { scope: "col" }, "layer"),
      ...Array.from({ length: headCount }, (_, h) => el("th", { scope: "col" }, headCount > 12 && h % 4 ? "" : String(h))));
    const rows = data.layers.map((layer, l) => {
      buttons.push(Array.from({ length: headCount }, (_, h) => {
        const button = el("button", { type: "button", tabindex: "-1" });
        button.addEventListener("click", () => pick(l, h));
        return button;
      }));
      return el("tr", {}, el("th", { scope: "row" }, String(layer)), ...buttons[l].map((button) => el("td", { role: "gridcell" }, button)));
    });
    byId("heads").replaceChildren(el("thead", {}, head), el("tbody", {}, ...rows));
    byId("heads").classList.toggle("wide", headCount > 12);
    rove(byId("heads"), buttons, (button) => button.click());
  }

  function shade() {
    const name = byId("shade").value;
    const values = data.heads.map((layer) => layer.map((head) => head.policies[state.policy][name]));
    // Whole tenths around what there is, so that colours can be compared.
    const low = Math.floor(10 * Math.min(...values.flat())) / 10;
    const high = Math.max(low + 0.1, Math.ceil(10 * Math.max(...values.flat())) / 10);
    const words = name === "recall" ? "of the attention kept" : "of the blocks read";
    buttons.forEach((line, l) => line.forEach((button, h) => {
      const colour = colourAt((values[l][h] - low) / (high - low));
      button.style.background = css(colour);
      button.style.color = inkOn(colour);
      button.textContent = (100 * values[l][h]).toFixed(0);
      const chosen = l === state.layer && h === state.head;
      button.setAttribute("aria-pressed", String(chosen));
      button.setAttribute("tabindex", chosen ? "0" : "-1");
      const label = `Layer ${data.layers[l]}, head ${h}: ${percent(values[l][h])} ${words}`;
      button.setAttribute("aria-label", label);
      button.title = label;
    }));
    ramp(byId("heads-legend"), [low, (low + high) / 2, high].map((x) => percent(x, 0)), words);
  }

  // The head that looks farthest, and there what the last block of queries looks at: where choosing matters.
  function begin() {
    let best = -1;
    data.heads.forEach((layer, l) => layer.forEach((head, h) => {
      const bytes = bytesOf(head.true);
      let [sum, top, at] = [0, 0, 0];
      for (let row = Math.floor(0.75 * n); row < n; row++) {
        for (let column = 1; column < row - n / 8; column++) {
          const value = shareAt(bytes, pairAt(row, column));
          sum += value * value;
          if (row === n - 1 && value > top) [top, at] = [value, column];
        }
      }
      if (sum > best) [best, state.layer, state.head, state.column] = [sum, l, h, at];
    }));
  }

  // ---- what a person does

  function pick(layer, head) {
    [state.layer, state.head] = [layer, head];
    byId("layer").value = String(layer);
    byId("head").value = String(head);
    refresh();
  }

  function refresh() {
    shade();
    tell();
    paint();
    describe(false);
  }

  function go(row, column, aloud) {
    state.row = Math.min(Math.max(row, 0), n - 1);
    state.column = Math.min(Math.max(column, 0), state.row);
    point();
    describe(aloud);
  }

  function nextMissed(step) {
    const maps = current();
    const total = pairAt(n, 0);
    for (let i = 1, at = pairAt(state.row, state.column); i <= total; i++) {
      at = (at + step + total) % total;
      if (stateAt(maps, at) === MISSED) {
        const row = Math.floor((Math.sqrt(8 * at + 1) - 1) / 2);
        go(row, at - pairAt(row, 0), true);
        return;
      }
    }
    byId("say").textContent = "No block of this head is missed.";
  }

  function onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const { row, column } = state;
    const to = {
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      PageUp: [row - 8, column], PageDown: [row + 8, column], Home: [row, 0], End: [row, row],
    }[event.key];
    if (to) go(...to, true);
    else if (event.key.toLowerCase() === "m") nextMissed(event.shiftKey ? -1 : 1);
    else if (event.key === "Escape" && state.held) hold(false);
    else return;
    event.preventDefault();
  }

  function hold(on) {
    state.held = on;
    describe(false);
  }

  function blockUnder(event) {
    const box = event.currentTarget.getBoundingClientRect();
    const place = (at, from, size) => Math.floor(((at - from) / size) * n);
    const [row, column] = [place(event.clientY, box.top, box.height), place(event.clientX, box.left, box.width)];
    return row >= 0 && row < n && column >= 0 && column <= row ? [row, column] : null;
  }

  for (const { canvas } of canvases) {
    canvas.addEventListener("pointermove", (event) => {
      const block = blockUnder(event);
      if (block && !state.held && (block[0] !== state.row || block[1] !== state.column)) go(...block, false);
    });
    canvas.addEventListener("click", (event) => {
      const block = blockUnder(event);
      if (!block) return;
      state.held = event.pointerType === "mouse" && !state.held;
      go(...block, true);
    });
  }
  byId("maps").addEventListener("keydown", onKey);

  const options = (select, names) => byId(select).append(...names.map((name, at) => el("option", { value: at }, name)));
  options("policy", data.policies.map((policy) => policy.label));
  options("layer", data.layers);
  options("head", Array.from({ length: headCount }, (_, h) => h));
  byId("policy").addEventListener("change", () => { state.policy = Number(byId("policy").value); refresh(); });
  for (const name of ["layer", "head"]) byId(name).addEventListener("change", () => pick(Number(byId("layer").value), Number(byId("head").value)));
  byId("least").addEventListener("change", refresh);
  byId("shade").addEventListener("change", shade);

  byId("explorer-about").textContent = `${data.model}, ${data.text}: ${whole(data.tokens)} tokens in ${n} blocks of ${data.block}. ` +
    "The gates predict, for every block of queries, which blocks of keys get attention; a policy reads the best of them.";
  const some = data.layers.length < data.all_layers.length ? ` Layers ${data.layers.join(", ")} of the ${data.all_layers.length} with gates are shown.` : "";
  byId("explorer-note").textContent = "Maps and choices are of the model running densely on this text. True map: the largest attention weight " +
    "of each block, rows divided by their sums, as the gates are taught; gate’s scores: their softmax over the row. Attention kept: the share of all " +
    "attention weights that lies in the blocks read. Missed: among as many blocks of the row as are read, the best by the true map that are " +
    `not read. Shares are rounded to ${percent(10 ** (decades / 254 / 2) - 1, 0)} of their value.${some}`;
  const ticks = Array.from({ length: decades + 1 }, (_, i) => { const x = 10 ** (i - decades); return percent(x, Math.max(0, decades - i - 2)); });
  ramp(byId("map-legend"), ticks, "share of the query block’s row (logarithmic)");
  const square = (size, colour) => svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, svg("rect", { x: 1, y: 1, width: 14, height: 14, fill: "var(--empty)" }),
    svg("rect", { x: 8 - size / 2, y: 8 - size / 2, width: size, height: size, fill: colour }));
  const cross = svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, svg("rect", { x: 1, y: 1, width: 14, height: 14, fill: "var(--empty)" }),
    svg("path", { d: "M3 3L13 13M13 3L3 13", stroke: "var(--missed)", "stroke-width": 3 }));
  byId("key").append(el("li", {}, square(14, "var(--read)"), "read"), el("li", {}, square(7, "var(--other)"), "read, others weigh more"),
    el("li", {}, cross, "missed"), el("li", {}, square(0, "none"), "not read"));
  for (const { canvas } of canvases) {
    canvas.after(el("div", { class: "axis", "aria-hidden": "true" }, el("span", {}, "0"), el("span", {}, "KV block →, query block ↓"), el("span", {}, String(n - 1))));
  }
  overview();
  begin();
  theme.listeners.push(paint);
  new ResizeObserver(paint).observe(byId("maps"));
  pick(state.layer, state.head);
}
