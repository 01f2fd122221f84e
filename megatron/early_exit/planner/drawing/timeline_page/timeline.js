"use strict";

// --- what is drawn: see `page_data` in page.py -------------------------------------------------

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const [chart, span, canvas, tip] = ["chart", "span", "canvas", "tip"].map(byId);
const context = canvas.getContext("2d");

const actions = data.ranks.map((rank, row) =>
  rank.map(([text, kind, stage, microbatch, start, end, source, critical], index) => (
    { text, kind: data.kinds[kind], stage, microbatch, start, end, source, critical, row, index }
  )),
);
const criticalPath = actions.flat().filter((one) => one.critical).sort((a, b) => a.start - b.start);

const GUTTER = 64, RULER = 26, ROW = 30, GAP = 4, LONGEST = 4e6;
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

function lines(one) {
  const critical = one.critical ? " On the critical path." : "";
  return [
    `${one.text}: ${one.kind.name}, ${microbatchText(one.microbatch)}`,
    `Stage ${one.stage} on rank ${one.row}. From ${seconds(one.start)} to ${seconds(one.end)}, ` +
      `${seconds(one.end - one.start)} long.${critical}`,
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
const perSecond = () => (width() * zoom) / data.stepSeconds;
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

function firstEndingAfter(rank, time) {
  let [low, high] = [0, rank.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (rank[middle].end < time) low = middle + 1;
    else high = middle;
  }
  return low;
}

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

// --- drawing -----------------------------------------------------------------------------------

let colors, hatch, isDrawRequested = false;

function readColors() {
  const style = getComputedStyle(document.documentElement);
  // light-dark() is only resolved where a property takes the colour.
  const resolve = (name) => {
    const probe = document.createElement("i");
    probe.style.color = style.getPropertyValue(name);
    document.body.append(probe);
    const color = getComputedStyle(probe).color;
    probe.remove();
    return color;
  };
  const names = ["surface", "row", "ink", "soft", "line", "accent", "critical"];
  colors = Object.fromEntries(names.map((name) => [name, resolve(`--${name}`)]));
  colors.font = style.fontFamily;
  const tile = Object.assign(document.createElement("canvas"), { width: 6, height: 6 });
  const pen = tile.getContext("2d");
  pen.strokeStyle = "rgb(0 0 0 / 38%)";
  for (const shift of [-6, 0, 6]) {
    pen.moveTo(shift, 6);
    pen.lineTo(shift + 6, 0);
  }
  pen.stroke();
  hatch = context.createPattern(tile, "repeat");
  requestDraw();
}

function requestDraw() {
  if (isDrawRequested) return;
  isDrawRequested = true;
  requestAnimationFrame(() => {
    isDrawRequested = false;
    draw();
  });
}

function draw() {
  const [w, h] = [chart.clientWidth, RULER + ROW * actions.length];
  const ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(h * ratio);
    canvas.style.width = `${w}px`;
    canvas.style.height = `${h}px`;
  }
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.fillStyle = colors.surface;
  context.fillRect(0, 0, w, h);
  context.save();
  context.beginPath();
  context.rect(GUTTER, 0, w - GUTTER, h);
  context.clip();
  drawRuler(w, h);
  actions.forEach((rank, row) => drawRank(rank, RULER + row * ROW, w));
  [hovered, selected].forEach((one, index) => one && drawOutline(one, index));
  context.restore();
  drawNames(h);
}

function drawRuler(w, h) {
  const wanted = 90 / perSecond();
  const power = 10 ** Math.floor(Math.log10(wanted));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= wanted);
  context.font = `11px ${colors.font}`;
  context.textAlign = "left";
  context.textBaseline = "middle";
  for (let tick = Math.ceil(timeAt(GUTTER) / step); tick * step <= timeAt(w); tick += 1) {
    const x = place(tick * step);
    context.fillStyle = colors.line;
    context.fillRect(x, 0, 1, h);
    context.fillStyle = colors.soft;
    context.fillText(seconds(tick * step), x + 4, RULER / 2);
  }
}

function drawRank(rank, top, w) {
  context.fillStyle = colors.row;
  context.fillRect(place(0), top + GAP / 2, data.stepSeconds * perSecond(), ROW - GAP);
  const end = timeAt(w);
  for (let index = firstEndingAfter(rank, timeAt(GUTTER)); index < rank.length; index += 1) {
    if (rank[index].start > end) break;
    drawAction(rank[index], top + GAP / 2);
  }
}

function drawAction(one, top) {
  const [left, length] = [place(one.start), (one.end - one.start) * perSecond()];
  const [shown, height] = [Math.max(length - 0.5, 0.5), ROW - GAP];
  // Later chunks of a rank are paler.
  const alpha = Math.max(1 - 0.2 * Math.floor(one.stage / actions.length), 0.3);
  context.globalAlpha = alpha;
  context.fillStyle = one.kind.color;
  context.fillRect(left, top, shown, height);
  context.globalAlpha = 1;
  if (one.kind.isFill) {
    context.fillStyle = hatch;
    context.fillRect(left, top, shown, height);
  }
  if (one.critical && length > 1) {
    context.strokeStyle = colors.critical;
    context.lineWidth = 2;
    context.strokeRect(left + 1, top + 1, Math.max(length - 2.5, 0.5), height - 2);
  }
  if (length >= 7 + 7 * one.microbatch.length) {
    context.fillStyle = alpha < 0.7 ? colors.ink : "#16181b";
    context.font = `12px ${colors.font}`;
    context.textAlign = "center";
    // In the middle of what is seen of it.
    const middle = (Math.max(left, GUTTER) + Math.min(left + length, chart.clientWidth)) / 2;
    context.fillText(one.microbatch, middle, top + height / 2 + 1);
  }
}

function drawOutline(one, isSelected) {
  const length = Math.max((one.end - one.start) * perSecond(), 2);
  context.strokeStyle = colors.ink;
  context.lineWidth = isSelected ? 3 : 1.5;
  context.strokeRect(place(one.start), RULER + one.row * ROW + 1, length, ROW - 2);
  const source = isSelected && one.source && actions[one.source[0]][one.source[1]];
  if (source && source.row !== one.row) {
    context.setLineDash([4, 3]);
    context.beginPath();
    context.moveTo(place(source.end), RULER + (source.row + 0.5) * ROW);
    context.lineTo(place(one.start), RULER + (one.row + 0.5) * ROW);
    context.stroke();
    context.setLineDash([]);
  }
}

function drawNames(h) {
  context.fillStyle = colors.surface;
  context.fillRect(0, 0, GUTTER, h);
  context.fillStyle = colors.ink;
  context.font = `12px ${colors.font}`;
  context.textAlign = "left";
  context.textBaseline = "middle";
  actions.forEach((_, row) => context.fillText(`rank ${row}`, 8, RULER + (row + 0.5) * ROW + 1));
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
  legendItem("critical path", "critical"),
);
if (actions.flat().some((one) => one.stage >= actions.length)) {
  byId("legend").append(Object.assign(document.createElement("li"), { textContent: "paler: later chunks of a rank" }));
}
chart.addEventListener("scroll", requestDraw);
new ResizeObserver(() => zoomTo(zoom)).observe(chart);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readColors);
readColors();
