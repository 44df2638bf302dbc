// Puts the page together from what its data holds.

function start() {
  byId("theme").addEventListener("change", () => theme.apply());
  theme.system.addEventListener("change", () => theme.apply());
  theme.apply();
  const subjects = new Set();
  if (DATA.results) {
    subjects.add(DATA.results.model);
    byId("contents").append(el("a", { href: "#quality" }, "Quality"));
    byId("quality").hidden = false;
    showQuality(DATA.results);
  }
  if (DATA.explorer) {
    subjects.add(DATA.explorer.model);
    byId("contents").append(el("a", { href: "#explorer" }, "Explorer"));
    byId("explorer").hidden = false;
    showExplorer(DATA.explorer);
  }
  byId("subtitle").textContent = `${[...subjects].join(", ")} · ${DATA.date}`;
  byId("footer").textContent = "This page holds all of its data and loads nothing.";
}

start();
