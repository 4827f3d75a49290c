"use strict";
// What belongs to a trial carries its number; text is only ever set as text.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const byTrial = new Map();
for (const node of all("[data-trial]")) {
  const number = node.dataset.trial;
  if (!byTrial.has(number)) byTrial.set(number, []);
  byTrial.get(number).push(node);
}
const trialOf = (target) => target instanceof Element ? target.closest("[data-trial]")?.dataset.trial : undefined;

// Mark a trial in all charts while the pointer is on it; a click keeps the mark.
const tip = document.getElementById("tip");
const table = document.getElementById("trials");
const titles = table ? all("th", table).map((title) => title.textContent) : [];
let marked, kept;
function mark(number) {
  if (number === marked) return;
  for (const node of byTrial.get(marked) ?? []) node.classList.remove("on");
  for (const node of byTrial.get(number) ?? []) node.classList.add("on");
  document.body.classList.toggle("focus", number !== undefined);
  marked = number;
}
function describe(number, event) {
  const row = byTrial.get(number)?.find((node) => node.tagName === "TR");
  tip.style.display = row && !event.target.closest("tr") ? "block" : "none";
  if (tip.style.display === "none") return;
  tip.textContent = [...row.cells].map((cell, at) => `${titles[at]}  ${cell.textContent}`).join("\n");
  const box = tip.getBoundingClientRect();
  const beside = event.clientX + 16 + box.width > innerWidth ? event.clientX - 16 - box.width : event.clientX + 16;
  tip.style.left = `${Math.max(4, beside)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 12, innerHeight - box.height - 4))}px`;
}
document.addEventListener("pointermove", (event) => {
  const number = trialOf(event.target);
  mark(number ?? kept);
  describe(number, event);
});
document.addEventListener("click", (event) => {
  const number = trialOf(event.target);
  kept = number === kept ? undefined : number;
  mark(kept);
});

// Drag along an axis of the parallel coordinates: trials outside the ranges leave all charts and the table.
const ranges = new Map();
function heights(line) {  // of a line by axis
  return new Map([...line.getAttribute("d").matchAll(/[ML]([\d.-]+),([\d.-]+)/g)].map(([, x, y]) => [x, Number(y)]));
}
function select() {
  for (const line of all(".parallel .line")) {
    const at = heights(line);
    const inside = [...ranges].every(([x, [low, high]]) => low <= at.get(x) && at.get(x) <= high);
    for (const node of byTrial.get(line.dataset.trial)) node.classList.toggle("out", !inside);
  }
}
for (const axis of all(".parallel .axis")) {
  const grip = axis.querySelector(".grip"), brush = axis.querySelector(".brush");
  const svg = axis.closest("svg");
  const height = (event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).y;
  let from;
  grip.addEventListener("pointerdown", (event) => { from = height(event); grip.setPointerCapture(event.pointerId); });
  grip.addEventListener("pointermove", (event) => {
    if (from === undefined) return;
    const [low, high] = [from, height(event)].sort((a, b) => a - b);
    if (high - low < 3) ranges.delete(axis.dataset.x); else ranges.set(axis.dataset.x, [low, high]);
    brush.setAttribute("y", low);
    brush.setAttribute("height", high - low < 3 ? 0 : high - low);
    select();
  });
  grip.addEventListener("pointerup", (event) => {
    if (from !== undefined && Math.abs(height(event) - from) < 3) {
      ranges.delete(axis.dataset.x);
      brush.setAttribute("height", 0);
      select();
    }
    from = undefined;
  });
}

// Sort by a column: numbers before texts, what has no value last.
function sortBy(column, title) {
  const falls = title.getAttribute("aria-sort") !== "descending";
  for (const other of all("th", table)) other.removeAttribute("aria-sort");
  title.setAttribute("aria-sort", falls ? "descending" : "ascending");
  const value = (row) => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
  };
  const compare = (a, b) => {
    const [one, two] = [value(a), value(b)];
    if (typeof one !== typeof two) return typeof one === "number" ? -1 : 1;
    const order = typeof one === "number" ? one - two : one.localeCompare(two);
    return falls ? -order : order;
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}
if (table) all("th", table).forEach((title, column) => title.addEventListener("click", () => sortBy(column, title)));
