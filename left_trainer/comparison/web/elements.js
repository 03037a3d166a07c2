// Elements and numbers as text. Data enters the page as text nodes only.

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const h = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const byId = (id) => document.getElementById(id);

/** Replace what a container holds and give the focus back to the element with the same data-key. */
function redraw(container, ...children) {
  const key = container.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  container.replaceChildren(...children.flat(2));
  if (key) container.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}

const isNumber = (value) => typeof value === "number";
const number = (options) => {
  const format = new Intl.NumberFormat("en-US", options);
  return (value) => format.format(value).replace("-", "\u2212");
};
const integer = number({ maximumFractionDigits: 0 });
const oneDecimal = number({ minimumFractionDigits: 1, maximumFractionDigits: 1 });
const threeDigits = number({ minimumSignificantDigits: 3, maximumSignificantDigits: 3 });
const compact = number({ notation: "compact", maximumSignificantDigits: 4 });
const significant = (value) => (Math.abs(value) >= 100 ? integer(value) : threeDigits(value));
const exponent = (value) => Number(value.toPrecision(4)).toExponential().replace("e+0", "").replace("e+", "e");

const BYTE_UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const byteUnit = (value) => Math.min(Math.floor(Math.log2(Math.max(Math.abs(value), 1)) / 10), BYTE_UNITS.length - 1);
function bytes(value, format = significant) {
  const unit = byteUnit(value);
  return `${(unit ? format : compact)(value / 1024 ** unit)} ${BYTE_UNITS[unit]}`;
}

function seconds(value) {
  const [hours, minutes] = [Math.floor(value / 3600), Math.floor((value % 3600) / 60)];
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${Math.floor(value % 60)} s` : `${oneDecimal(value)} s`;
}

const FORMATS = {
  integer,
  bytes,
  percent: (value) => `${significant(value)} %`,
  share: (value) => `${oneDecimal(value)} %`,
  rate: significant,
  seconds,
  score: oneDecimal,
  change: number({ minimumFractionDigits: 1, maximumFractionDigits: 1, signDisplay: "exceptZero" }),
  loss: number({ minimumFractionDigits: 3, maximumFractionDigits: 3 }),
  learning_rate: exponent,
};
const TICK_FORMATS = {
  bytes: (value) => bytes(value, compact),
  percent: (value) => `${compact(value)} %`,
  share: (value) => `${compact(value)} %`,
  learning_rate: exponent,
};

function show(value, format) {
  if (value === null || value === undefined) return "\u00b7";
  return isNumber(value) ? (FORMATS[format] ?? String)(value) : String(value);
}

// Families differ by shape as well as by colour.
const SHAPES = [
  "M-4.6 0a4.6 4.6 0 1 0 9.2 0a4.6 4.6 0 1 0 -9.2 0z",
  "M-4.2 -4.2h8.4v8.4h-8.4z",
  "M0 -5.2L5.2 4.2H-5.2z",
  "M0 -5.8L5.8 0L0 5.8L-5.8 0z",
];
const mark = (family, attributes = {}) =>
  svg("path", { d: SHAPES[family % SHAPES.length], class: `mark family-${family % SHAPES.length}`, ...attributes });
const swatch = (family) =>
  svg("svg", { class: "swatch", viewBox: "-7 -7 14 14", "aria-hidden": "true" }, family < 0 ? [] : mark(family));

const hidden = (text) => h("span", { class: "visually-hidden" }, text);
const star = () => h("span", { class: "star" }, h("span", { "aria-hidden": "true" }, "\u2605"), hidden("best "));

const plural = (name, items) => (items.length === 1 ? name : `${name}s`);
/** Terms with their descriptions, for a dl. */
const descriptions = (entries) => entries.map(([term, description, title]) =>
  h("div", { title }, h("dt", {}, term), h("dd", {}, description)));
