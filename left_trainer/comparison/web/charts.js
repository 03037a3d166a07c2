// Charts: scales, the scatter plot with its Pareto front, training curves.

/** The points that no other point is at least as good as in both directions and better in one. */
function paretoFront(points, xBetter, yBetter) {
  if (!xBetter || !yBetter) return [];
  const signX = xBetter === "lower" ? -1 : 1;
  const signY = yBetter === "lower" ? -1 : 1;
  const dominates = (a, b) =>
    signX * a.x >= signX * b.x && signY * a.y >= signY * b.y && (a.x !== b.x || a.y !== b.y);
  return points.filter((point) => !points.some((other) => dominates(other, point))).sort((a, b) => a.x - b.x);
}

/** A scale from values to pixels: logarithmic where positive values span more than two decades. */
function makeScale(values, format, start, end) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const log = low > 0 && high / low > 100;
  const to = log ? Math.log10 : (value) => value;
  const pad = (to(high) - to(low)) * 0.08 || Math.abs(high) * 0.1 || 1;
  const first = !log && low >= 0 ? Math.max(low - pad, 0) : to(low) - pad;
  const last = to(high) + pad;
  const at = (value) => start + ((to(value) - first) / (last - first)) * (end - start);
  const ticks = log ? logTicks(10 ** first, 10 ** last, format) : linearTicks(first, last, format);
  return { at, log, ticks, text: TICK_FORMATS[format] ?? compact };
}

function linearTicks(low, high, format) {
  const unit = format === "bytes" ? 1024 ** byteUnit(high) : 1;
  const rough = (high - low) / unit / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = unit * power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough);
  const count = Math.floor(high / step) - Math.ceil(low / step) + 1;
  return Array.from({ length: count }, (_, i) => (Math.ceil(low / step) + i) * step);
}

function logTicks(low, high, format) {
  const base = format === "bytes" ? 4 : 10;
  const power = (value) => Math.log(value) / Math.log(base);
  const stride = Math.ceil((power(high) - power(low)) / 6);
  const ticks = [];
  for (let i = Math.ceil(power(low)); i <= power(high); i += stride) ticks.push(base ** i);
  return ticks;
}

const ruler = document.createElement("canvas").getContext("2d");
ruler.font = `600 12px ${getComputedStyle(document.body).fontFamily}`;
const textWidth = (text) => ruler.measureText(text).width;
const line = (x1, y1, x2, y2, name) => svg("line", { x1, y1, x2, y2, class: name });
const label = (x, y, text, name, anchor = "start") => svg("text", { x, y, class: name, "text-anchor": anchor }, text);

function drawAxes(x, y, box, xTitle, yTitle) {
  return svg("g", { class: "axes" },
    x.ticks.map((tick) => [
      line(x.at(tick), box.top, x.at(tick), box.bottom, "grid"),
      label(x.at(tick), box.bottom + 16, x.text(tick), "tick", "middle"),
    ]).flat(),
    y.ticks.map((tick) => [
      line(box.left, y.at(tick), box.right, y.at(tick), "grid"),
      label(box.left - 6, y.at(tick) + 4, y.text(tick), "tick", "end"),
    ]).flat(),
    line(box.left, box.bottom, box.right, box.bottom, "axis"),
    label(box.right, box.bottom + 34, xTitle + (x.log ? " (log)" : ""), "axis-title", "end"),
    label(4, 12, yTitle + (y.log ? " (log)" : ""), "axis-title"));
}

const chartBox = (width, height, right) => ({ left: 52, top: 26, right: width - right, bottom: height - 42 });
const chart = (width, height, attributes, ...children) =>
  svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, ...attributes }, ...children);

/** Draw one point per run; `references` have a name and a value on the vertical axis, that of the untrained model first. */
function drawScatter(container, points, xField, yField, references, open) {
  if (!points.length) return redraw(container, h("p", { class: "note" }, "No run has a value on both axes."));
  const width = container.clientWidth;
  const height = 400;
  const box = chartBox(width, height, 14);
  const spread = (axis) => points.flatMap((point) => [point[axis], ...(point[`${axis}Interval`] ?? [])]);
  const x = makeScale(spread("x"), xField.format, box.left, box.right);
  const y = makeScale([...spread("y"), ...references.map(({ value }) => value)], yField.format, box.bottom, box.top);
  const front = paretoFront(points, xField.better, yField.better);
  const placed = points.map((point) =>
    ({ ...point, px: x.at(point.x), py: y.at(point.y), front: front.includes(point) }));
  const steps = frontSteps(placed.filter((point) => point.front), xField.better);
  const obstacles = [...steps.flatMap(stepBoxes), ...placed.flatMap((point) => pointBoxes(point, y))];
  const lines = placeReferences(references, y, yField, box);
  obstacles.push(...lines.map(({ at, left, right }) => boxAround(left, at - 17, right, at, 0)));
  const tip = h("div", { class: "tip", hidden: true });
  redraw(container,
    chart(width, height, { role: "group", "aria-label": `${yField.title} against ${xField.title}` },
      drawAxes(x, y, box, xField.title, yField.title),
      lines.flatMap(({ at, right, text }) => [
        line(box.left, at, box.right, at, "base-line"),
        label(right, at - 5, text, "tick", "end"),
      ]),
      steps.map((corners) => svg("polyline", { points: corners.join(" "), class: "front" })),
      placed.map((point) => drawPoint(point, x, y, xField, yField, tip, open)),
      placeLabels(placed, box, obstacles)),
    tip);
}

/** Where the lines of references are and where their names stand: side by side where lines are close. */
function placeReferences(references, y, yField, box) {
  const placed = [];
  for (const { name, value } of references) {
    const text = `${name} ${show(value, yField.format)}`;
    const at = y.at(value);
    const near = placed.filter((other) => Math.abs(other.at - at) < 17);
    const right = near.length ? Math.min(...near.map(({ left }) => left)) - 8 : box.right;
    placed.push({ at, right, left: right - textWidth(text), text });
  }
  return placed;
}

/** The border of what is reached, as steps from point to point: each is only as good as the worse of its two ends. */
function frontSteps(front, xBetter) {
  const points = [...front].sort((a, b) => a.px - b.px);
  return points.slice(1).map(({ px, py }, i) => {
    const last = points[i];
    return [last.px, last.py, ...(xBetter === "lower" ? [px, last.py] : [last.px, py]), px, py];
  });
}

function boxAround(x1, y1, x2, y2, margin) {
  const [left, right] = [Math.min(x1, x2) - margin, Math.max(x1, x2) + margin];
  return { left, right, top: Math.min(y1, y2) - margin, bottom: Math.max(y1, y2) + margin };
}
const stepBoxes = ([x1, y1, x2, y2, x3, y3]) => [boxAround(x1, y1, x2, y2, 1), boxAround(x2, y2, x3, y3, 1)];
function pointBoxes({ px, py, yInterval }, y) {
  const marker = boxAround(px, py, px, py, 6);
  return yInterval ? [marker, boxAround(px, y.at(yInterval[0]), px, y.at(yInterval[1]), 1)] : [marker];
}

function drawPoint(point, x, y, xField, yField, tip, open) {
  const { row, px, py } = point;
  const facts = [xField, yField].map((field) => `${field.title}: ${fieldText(field, row)}`);
  if (point.front) facts.push("on the Pareto front");
  const showTip = () => {
    tip.replaceChildren(h("strong", {}, row.method), ...facts.map((fact) => h("div", {}, fact)));
    tip.hidden = false;
    const rightmost = tip.parentElement.clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(px - tip.offsetWidth / 2, rightmost))}px`;
    tip.style.top = `${py > tip.offsetHeight + 14 ? py - tip.offsetHeight - 12 : py + 14}px`;
  };
  const hideTip = () => (tip.hidden = true);
  const bar = (axis, scale) => point[`${axis}Interval`]?.map(scale.at);
  const [barX, barY] = [bar("x", x), bar("y", y)];
  return svg("g", {
    class: `point ${point.front ? "on-front" : "dominated"}`, tabindex: 0, role: "button",
    "data-key": row.id, "aria-label": [row.method, ...facts].join(", "),
    onpointerenter: showTip, onpointerleave: hideTip, onfocus: showTip, onblur: hideTip,
    onclick: () => open(row),
    onkeydown: (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      open(row);
    },
  },
    svg("circle", { cx: px, cy: py, r: 12, class: "target" }),
    barX ? line(barX[0], py, barX[1], py, "interval") : null,
    barY ? line(px, barY[0], px, barY[1], "interval") : null,
    mark(familyIndex(row.family), { transform: `translate(${px} ${py})` }));
}

const SIDES = [[1, 0], [-1, 0], [0, -1], [0, 1], [1, -1], [-1, -1], [1, 1], [-1, 1]];
const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

/** Labels beside their points where there is room, front first; a label without room is left to the tooltip. */
function placeLabels(points, box, obstacles) {
  const taken = [...obstacles];
  const free = (spot) => spot.left > box.left && spot.right < box.right + 12 && spot.top > box.top - 8
    && spot.bottom < box.bottom && !taken.some((other) => overlap(spot, other));
  return [...points].sort((a, b) => b.front - a.front).map((point) => {
    const spot = [9, 20, 34].flatMap((gap) => SIDES.map((side) => labelSpot(point, side, gap))).find(free);
    if (!spot) return null;
    taken.push(spot);
    const towards = (length) => [point.px + spot.dx * length, point.py + spot.dy * length];
    return svg("g", { class: point.front ? "label on-front" : "label" },
      spot.gap > 9 ? line(...towards(7), ...towards(spot.gap), "leader") : null,
      label(spot.left, spot.bottom - 4, point.row.method));
  });
}

function labelSpot({ px, py, row }, [dx, dy], gap) {
  const width = textWidth(row.method);
  const left = dx ? (dx > 0 ? px + gap : px - gap - width) : px - width / 2;
  const top = py + dy * (gap + (dx ? 0 : 5)) - 8;
  return { left, right: left + width, top, bottom: top + 16, gap, dx, dy };
}

/** Draw a line per entry of `lines` (name, family, dash, points as [step, loss]) with its name at its end. */
function drawCurves(container, lines, least) {
  const drawn = lines.filter(({ points }) => points.length);
  if (!drawn.length) return redraw(container, h("p", { class: "note" }, "No training loss was logged."));
  const width = container.clientWidth;
  const height = Math.max(least, drawn.length * 15 + 80);
  const box = chartBox(width, height, Math.max(...drawn.map(({ name }) => textWidth(name))) + 18);
  const all = drawn.flatMap(({ points }) => points);
  const x = makeScale(all.map(([step]) => step), "integer", box.left, box.right);
  const y = makeScale(all.map(([, loss]) => loss), "loss", box.bottom, box.top);
  const ends = spreadOut(drawn.map(({ points }) => y.at(points.at(-1)[1])), 15, box.bottom);
  const finals = drawn.map(({ name, points }) => `${name} ${show(points.at(-1)[1], "loss")}`).join(", ");
  redraw(container, chart(width, height, { role: "img", "aria-label": `Training loss at the last step: ${finals}` },
    drawAxes(x, y, box, "step", "loss"),
    drawn.map(({ name, family, dash, points }, i) => {
      const corners = points.map(([step, loss]) => [x.at(step), y.at(loss)]);
      const [lastX, lastY] = corners.at(-1);
      return svg("g", { class: `curve family-${family % SHAPES.length}` },
        svg("polyline", { points: corners.join(" "), "stroke-dasharray": dash }),
        line(lastX + 2, lastY, box.right + 12, ends[i], "leader"),
        label(box.right + 15, ends[i] + 4, name));
    })));
}

/** Positions near the wanted ones, at least `gap` apart and above `bottom`. */
function spreadOut(wanted, gap, bottom) {
  const order = wanted.map((_, i) => i).sort((a, b) => wanted[a] - wanted[b]);
  const positions = [...wanted];
  order.forEach((index, i) => {
    if (i) positions[index] = Math.max(positions[index], positions[order[i - 1]] + gap);
  });
  order.reverse().forEach((index, i) => {
    positions[index] = Math.min(positions[index], i ? positions[order[i - 1]] - gap : bottom);
  });
  return positions;
}
