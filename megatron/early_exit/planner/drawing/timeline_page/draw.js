"use strict";

// Draws what timeline.js, which follows it in the page, has read and placed.

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
  data.memory.forEach((_, row) => drawMemory(row, RULER + row * ROW, w));
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
  context.fillRect(place(0), top + GAP / 2, wholeSeconds * perSecond(), BOX);
  context.fillStyle = data.colors.update;
  context.fillRect(place(data.stepSeconds), top + GAP / 2, data.updateSeconds * perSecond(), BOX);
  const end = timeAt(w);
  for (let index = firstEndingAfter(rank, timeAt(GUTTER)); index < rank.length; index += 1) {
    if (rank[index].start > end) break;
    drawAction(rank[index], top + GAP / 2);
  }
}

function drawMemory(row, top, w) {
  const changes = data.memory[row];
  const [bottom, height] = [top + ROW - 1, MEMORY - 2];
  const heightOf = (bytes) => (height * bytes) / mostBytes;
  const [begin, end] = [timeAt(GUTTER), timeAt(w)];
  context.fillStyle = data.colors.memory;
  for (let index = Math.max(firstAfter(changes, ([at]) => at > begin) - 1, 0); index < changes.length; index += 1) {
    const [at, bytes] = changes[index];
    if (at > end) break;
    const next = index + 1 < changes.length ? changes[index + 1][0] : wholeSeconds;
    // Steps that share a pixel must not be drawn over each other half transparent.
    const [left, right] = [Math.floor(place(at)), Math.ceil(place(next))];
    context.fillRect(left, bottom - heightOf(bytes), right - left, heightOf(bytes));
  }
}

function drawAction(one, top) {
  const [left, length] = [place(one.start), (one.end - one.start) * perSecond()];
  // Boxes too narrow for a gap between them show as one block.
  const [shown, height] = [length < 3 ? Math.max(length, 0.5) : length - 0.5, BOX];
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
  if (one.exits) {
    // Low, where a box is too narrow to show anything else then.
    const part = length < 7 ? 5 : height;
    context.fillStyle = data.colors.exit;
    context.fillRect(left, top + height - part, Math.min(Math.max(one.exits * perSecond(), 1.5), shown), part);
  }
  if (one.critical && length < 7) {
    // An outline would be all that is seen.
    context.fillStyle = colors.critical;
    context.fillRect(left, top, Math.max(length, 1), 3);
  } else if (one.critical) {
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
  context.strokeRect(place(one.start), RULER + one.row * ROW + 1, length, BOX + GAP - 2);
  const source = isSelected && one.source && actions[one.source[0]][one.source[1]];
  if (source && source.row !== one.row) {
    context.setLineDash([4, 3]);
    context.beginPath();
    context.moveTo(place(source.end), RULER + source.row * ROW + (BOX + GAP) / 2);
    context.lineTo(place(one.start), RULER + one.row * ROW + (BOX + GAP) / 2);
    context.stroke();
    context.setLineDash([]);
  }
}

function drawNames(h) {
  context.fillStyle = colors.surface;
  context.fillRect(0, 0, GUTTER, h);
  context.textAlign = "left";
  context.textBaseline = "middle";
  actions.forEach((_, row) => {
    const top = RULER + row * ROW;
    context.fillStyle = colors.ink;
    context.font = `12px ${colors.font}`;
    context.fillText(`rank ${row}`, 8, top + (BOX + GAP) / 2 + 1);
    if (!MEMORY) return;
    context.fillStyle = colors.soft;
    context.font = `11px ${colors.font}`;
    context.fillText(gigabytes(peaks[row]), 8, top + BOX + GAP + MEMORY / 2 - 1);
  });
}
