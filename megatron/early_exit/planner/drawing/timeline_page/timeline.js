"use strict";

// --- what is drawn, by draw.js: see `page_data` in page.py -------------------------------------

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const [chart, span, canvas, tip] = ["chart", "span", "canvas", "tip"].map(byId);
const context = canvas.getContext("2d");

const actions = data.ranks.map((rank, row) =>
  rank.map(([text, kind, stage, microbatch, start, end, source, critical, exits], index) => (
    { text, kind: data.kinds[kind], stage, microbatch, start, end, source, critical, exits, row, index }
  )),
);
const criticalPath = actions.flat().filter((one) => one.critical).sort((a, b) => a.start - b.start);

const MEMORY = data.memory.length ? 18 : 0;
const GUTTER = 64, RULER = 26, BOX = 26, GAP = 4, ROW = BOX + GAP + MEMORY, LONGEST = 4e6;
const peaks = data.memory.map((rank) => rank.reduce((most, [, bytes]) => Math.max(most, bytes), 0));
const mostBytes = Math.max(...peaks);
const wholeSeconds = data.stepSeconds + data.updateSeconds;
let zoom = 1;
let selected = null;
let hovered = null;

// --- texts -------------------------------------------------------------------------------------

function seconds(value) {
  for (const [unit, factor] of [["s", 1], ["ms", 1e3], ["µs", 1e6]]) {
    if (Math.abs(value) * factor >= 1) return `${Number((value * factor).toPrecision(4))} ${unit}`;
  }
  return value ? `${Number((value * 1e9).toPrecision(4))} ns` : "0";
}

function microbatchText(name) {
  if (name.startsWith("w")) return `fill ${name} of the warm-up bubble`;
  if (name.startsWith("c")) return `fill ${name} of the cool-down bubble`;
  return `microbatch ${name}`;
}

function waitText(one) {
  const before = actions[one.row][one.index - 1];
  const waited = one.start - (before ? before.end : 0);
  const source = one.source && actions[one.source[0]][one.source[1]];
  if (source && source.row !== one.row) {
    return `Its rank waited ${seconds(waited)} for ${source.text} of rank ${source.row}.`;
  }
  return before ? `Ran as soon as ${before.text} on its rank had ended.` : "The first: it waited for nothing.";
}

function gigabytes(bytes) {
  return `${(bytes / 1e9).toFixed(1)} GB`;
}

function bytesAt(row, time) {
  const changes = data.memory[row];
  return changes[Math.max(firstAfter(changes, ([at]) => at > time) - 1, 0)][1];
}

function lines(one) {
  const critical = one.critical ? " On the critical path." : "";
  const exits = one.exits ? ` Exits take ${seconds(one.exits)} of it.` : "";
  const memory = MEMORY ? ` Its rank has ${gigabytes(bytesAt(one.row, (one.start + one.end) / 2))}.` : "";
  return [
    `${one.text}: ${one.kind.name}, ${microbatchText(one.microbatch)}`,
    `Stage ${one.stage} on rank ${one.row}. From ${seconds(one.start)} to ${seconds(one.end)}, ` +
      `${seconds(one.end - one.start)} long.${critical}${exits}${memory}`,
    waitText(one),
  ];
}

function show(element, one) {
  element.replaceChildren(...lines(one).map((line) => {
    const paragraph = document.createElement("p");
    paragraph.textContent = line;
    return paragraph;
  }));
}

// --- places ------------------------------------------------------------------------------------

const width = () => chart.clientWidth - GUTTER;
const perSecond = () => (width() * zoom) / wholeSeconds;
const place = (time) => GUTTER + time * perSecond() - chart.scrollLeft;
const timeAt = (x) => (x - GUTTER + chart.scrollLeft) / perSecond();

function zoomTo(factor, x = GUTTER + width() / 2) {
  const time = timeAt(x);
  zoom = Math.min(Math.max(factor, 1), Math.max(LONGEST / width(), 1));
  span.style.width = `${GUTTER + width() * zoom}px`;
  chart.scrollLeft = time * perSecond() - (x - GUTTER);
  chart.dataset.zoom = zoom.toFixed(3);
  requestDraw();
}

function actionAt(x, y) {
  const row = Math.floor((y - RULER) / ROW);
  if (x < GUTTER || !actions[row]) return null;
  const time = timeAt(x);
  const index = firstEndingAfter(actions[row], time);
  const one = actions[row][index];
  return one && one.start <= time ? one : null;
}

function firstAfter(list, isAfter) {
  let [low, high] = [0, list.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (isAfter(list[middle])) high = middle;
    else low = middle + 1;
  }
  return low;
}

const firstEndingAfter = (rank, time) => firstAfter(rank, (one) => one.end >= time);

function select(one) {
  if (!one) return;
  selected = one;
  show(byId("detail"), one);
  const [left, right] = [place(one.start), place(one.end)];
  if (left < GUTTER || right > chart.clientWidth) {
    chart.scrollLeft += (left + right) / 2 - (GUTTER + chart.clientWidth) / 2;
  }
  requestDraw();
}

// --- pointers ----------------------------------------------------------------------------------

let pressed = null;
let pinch = null;

function inside(event) {
  const box = chart.getBoundingClientRect();
  return [event.clientX - box.left - chart.clientLeft, event.clientY - box.top - chart.clientTop];
}

chart.addEventListener("pointerdown", (event) => {
  const at = inside(event);
  // Below the rows is the scroll bar.
  if (event.isPrimary && at[1] <= RULER + ROW * actions.length) {
    pressed = { at, scroll: chart.scrollLeft, isDrag: false };
  }
});

// A finger scrolls by itself; what the browser takes for scrolling it cancels here.
chart.addEventListener("pointermove", (event) => {
  if (event.pointerType !== "mouse") return;
  const at = inside(event);
  const way = pressed ? at[0] - pressed.at[0] : 0;
  if (Math.abs(way) > 3 && !pressed.isDrag) {
    pressed.isDrag = true;
    chart.setPointerCapture(event.pointerId);
    chart.classList.add("dragged");
  }
  if (pressed && pressed.isDrag) chart.scrollLeft = pressed.scroll - way;
  hover(pressed ? null : actionAt(...at), event);
});

function release(event) {
  if (event.type === "pointerup" && pressed && !pressed.isDrag) select(actionAt(...inside(event)));
  pressed = null;
  chart.classList.remove("dragged");
}

for (const type of ["pointerup", "pointercancel"]) chart.addEventListener(type, release);
chart.addEventListener("pointerleave", () => hover(null));

function spread(touches) {
  const [[left], [right]] = [inside(touches[0]), inside(touches[1])];
  return { distance: Math.max(Math.abs(left - right), 1), middle: (left + right) / 2 };
}

chart.addEventListener("touchstart", (event) => {
  pinch = event.touches.length === 2 ? { ...spread(event.touches), zoom } : null;
  if (pinch) pressed = null;
});

chart.addEventListener("touchmove", (event) => {
  if (!pinch || event.touches.length !== 2) return;
  event.preventDefault();
  const now = spread(event.touches);
  zoomTo((pinch.zoom * now.distance) / pinch.distance, now.middle);
}, { passive: false });

function hover(one, event) {
  if (one !== hovered) {
    hovered = one;
    tip.hidden = !one;
    if (one) show(tip, one);
    requestDraw();
  }
  if (!one) return;
  const [x, y] = [event.clientX + 14, event.clientY + 14];
  tip.style.left = `${Math.max(Math.min(x, window.innerWidth - tip.offsetWidth - 8), 8)}px`;
  const isLow = y + tip.offsetHeight > window.innerHeight;
  tip.style.top = `${isLow ? y - tip.offsetHeight - 28 : y}px`;
}

chart.addEventListener("wheel", (event) => {
  if (!event.ctrlKey && !event.metaKey) return;
  event.preventDefault();
  zoomTo(zoom * Math.exp(-event.deltaY / 300), inside(event)[0]);
}, { passive: false });

// --- keys and buttons --------------------------------------------------------------------------

function neighbour(rows) {
  if (!selected) return actions.flat()[0];
  const rank = actions[selected.row + rows];
  if (!rank || !rank.length) return selected;
  const middle = (selected.start + selected.end) / 2;
  return rank[Math.min(firstEndingAfter(rank, middle), rank.length - 1)];
}

function beside(steps) {
  return selected ? actions[selected.row][selected.index + steps] : actions.flat()[0];
}

function nextCritical() {
  const after = criticalPath.find((one) => selected && one.start > selected.start);
  return after || criticalPath[0];
}

const selectedPlace = () => (selected ? place((selected.start + selected.end) / 2) : undefined);
const keys = {
  ArrowLeft: () => select(beside(-1)),
  ArrowRight: () => select(beside(1)),
  ArrowUp: () => select(neighbour(-1)),
  ArrowDown: () => select(neighbour(1)),
  Home: () => select(actions[selected ? selected.row : 0][0]),
  End: () => select(actions[selected ? selected.row : 0].at(-1)),
  Enter: () => selected && selected.source && select(actions[selected.source[0]][selected.source[1]]),
  c: () => select(nextCritical()),
  "+": () => zoomTo(zoom * 1.5, selectedPlace()),
  "=": () => zoomTo(zoom * 1.5, selectedPlace()),
  "-": () => zoomTo(zoom / 1.5, selectedPlace()),
  0: () => zoomTo(1),
};

chart.addEventListener("keydown", (event) => {
  const act = keys[event.key] || keys[event.key.toLowerCase()];
  if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  act();
});

byId("zoom-in").addEventListener("click", () => zoomTo(zoom * 1.5));
byId("zoom-out").addEventListener("click", () => zoomTo(zoom / 1.5));
byId("fit").addEventListener("click", () => zoomTo(1));

// --- start -------------------------------------------------------------------------------------

function legendItem(name, style, color) {
  const swatch = Object.assign(document.createElement("span"), { className: `swatch ${style}` });
  if (color) swatch.style.backgroundColor = color;
  const item = document.createElement("li");
  item.append(swatch, name);
  return item;
}

document.title = data.title;
byId("title").textContent = data.title;
byId("summary").textContent = data.summary;
byId("legend").append(
  ...data.kinds.map((kind) => legendItem(kind.name, kind.isFill ? "fill" : "", kind.color)),
  ...(actions.flat().some((one) => one.exits) ? [legendItem("exits in a backward", "", data.colors.exit)] : []),
  ...(data.updateSeconds ? [legendItem("update", "", data.colors.update)] : []),
  ...(MEMORY ? [legendItem("memory, and its peak", "", data.colors.memory)] : []),
  legendItem("critical path", "critical"),
);
if (actions.flat().some((one) => one.stage >= actions.length)) {
  byId("legend").append(Object.assign(document.createElement("li"), { textContent: "paler: later chunks of a rank" }));
}
chart.addEventListener("scroll", requestDraw);
new ResizeObserver(() => zoomTo(zoom)).observe(chart);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readColors);
readColors();
