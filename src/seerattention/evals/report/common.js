// What the curves and the explorer share.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

// Viridis (matplotlib, CC0): perceptually uniform, and told apart with every kind of colour vision.
const VIRIDIS = ("440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c " +
  "1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725").split(" ").map(
  (hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));

function colourAt(part) {
  const place = Math.min(Math.max(part, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return [0, 1, 2].map((c) => Math.round(VIRIDIS[low][c] + (place - low) * (VIRIDIS[low + 1][c] - VIRIDIS[low][c])));
}

const css = (rgb) => `rgb(${rgb.join(" ")})`;

// Black or white, whichever is told apart better from a colour: WCAG 2.1, relative luminance.
function inkOn(rgb) {
  const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// Children are nodes or text; text never becomes markup.
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const whole = (n) => n.toLocaleString("en-US");
const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)} %`;

function share(x) {
  return x >= 0.1 ? percent(x, 0) : x >= 0.01 ? percent(x, 1) : percent(x, 2);
}

function ramp(into, ticks, label) {
  const colours = Array.from({ length: 17 }, (_, i) => css(colourAt(i / 16))).join(", ");
  into.replaceChildren(
    el("span", {}, label),
    el("div", { class: "ramp", style: `background: linear-gradient(to right, ${colours})` }),
    el("div", { class: "ticks" }, ...ticks.map((t) => el("span", {}, t))));
}

const theme = {
  system: window.matchMedia("(prefers-color-scheme: dark)"),
  listeners: [],
  apply() {
    const chosen = byId("theme").value;
    const dark = chosen ? chosen === "dark" : this.system.matches;
    const root = document.documentElement;
    root.toggleAttribute("data-dark", dark);
    if (chosen) root.dataset.theme = chosen;
    else delete root.dataset.theme;
    this.listeners.forEach((redraw) => redraw());
  },
  colour: (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim(),
};
