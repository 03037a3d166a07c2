// The page: what is shown, its tables and charts. The view is kept in the address after the #.

const summary = JSON.parse(byId("data").textContent);
const families = Object.keys(summary.families).filter((family) => family !== "base");
const familyIndex = (family) => families.indexOf(family);
const familyTitle = (family) => (family === "base" ? "reference" : summary.families[family]);
const isBase = (row) => row.family === "base"; // the untrained model, and baselines beside it
const isUntrained = (row) => isBase(row) && /^base( \(|$)/.test(row.method); // one for each model
const untrainedName = (row) => row.method.replace(/^base/, "untrained");
const rowsOf = (task) => summary.rows.filter((row) => row.task === task);
const rowOf = (task, method) => rowsOf(task).find((row) => row.method === method);
const contestants = (task) => rowsOf(task).filter((row) => !isBase(row));
const failuresOf = (task, method) => summary.failures.filter((fail) => fail.task === task && fail.method === method);
const familyOf = (method) => summary.rows.find((row) => row.method === method)?.family;
const methodLabel = (method) => h("span", { class: "method" }, swatch(familyIndex(familyOf(method))), method);

// Fields: whatever can be a column of the table or an axis, by task and key.

function metricField(key, name, task) {
  const value = (row) => row.metrics[name]?.mean ?? null;
  const interval = (row) => {
    const { low, high } = row.metrics[name] ?? {};
    return isNumber(low) && isNumber(high) ? [low, high] : null;
  };
  const better = task.lower_is_better.includes(name) ? "lower" : "higher";
  const over = (row) => row.metrics[name]?.interval;
  return { key, title: name, format: "score", better, value, interval, over };
}

function changeField(main) {
  const value = (row) => {
    const before = row.metrics[main.title]?.before;
    return !isBase(row) && isNumber(main.value(row)) && isNumber(before) ? main.value(row) - before : null;
  };
  const help = "Main metric, change against the untrained base model.";
  return { key: "change", title: "Change", help, format: "change", better: null, value, interval: () => null };
}

const columnFields = summary.columns.map((column) =>
  ({ ...column, value: (row) => row.values[column.key] ?? null, interval: () => null }));

const fields = new Map(summary.tasks.map((task) => {
  const main = metricField("main", task.main_metric, task);
  const metrics = task.metrics.map((name) => metricField(`metric:${name}`, name, task));
  const all = [main, changeField(main), ...columnFields, ...metrics];
  return [task.name, new Map(all.map((field) => [field.key, field]))];
}));

function halfWidth(field, row) {
  const interval = field.interval(row);
  return interval ? ` \u00b1 ${oneDecimal((interval[1] - interval[0]) / 2)}` : "";
}

const INTERVALS = {
  seeds: "95 % interval over seeds, Student\u2019s t",
  rows: "95 % interval over the rows of the test split: percentile bootstrap, 1,000 resamples; one seed, so it says "
    + "nothing about how much trainings differ",
};
function intervalText(field, row) {
  const interval = field.interval(row);
  return interval && `${oneDecimal(interval[0])} to ${oneDecimal(interval[1])}. ${INTERVALS[field.over(row)] ?? ""}`;
}

const fieldText = (field, row) => show(field.value(row), field.format) + halfWidth(field, row);

function isBest(field, row) {
  if (!field.better || isBase(row) || !isNumber(field.value(row))) return false;
  const values = contestants(row.task).map(field.value).filter(isNumber);
  const best = field.better === "lower" ? Math.min(...values) : Math.max(...values);
  return field.value(row) === best && values.some((value) => value !== best);
}

// State.

const TEXTS = ["task", "x", "y", "sort", "order", "method", "by"];
const state = {};

function readState() {
  const stored = new URLSearchParams(location.hash.slice(1));
  for (const key of TEXTS) state[key] = stored.get(key) ?? "";
  state.hidden = new Set(stored.getAll("hide"));
}

function update(changes) {
  Object.assign(state, changes);
  const stored = new URLSearchParams(TEXTS.filter((key) => state[key]).map((key) => [key, state[key]]));
  state.hidden.forEach((key) => stored.append("hide", key));
  history.replaceState(null, "", `#${stored}`);
  render();
}

const shownTasks = () => summary.tasks.filter((task) => !state.hidden.has(`task:${task.name}`));
const isShown = (method) =>
  familyOf(method) === "base" || (!state.hidden.has(`family:${familyOf(method)}`) && method.includes(state.method.trim()));

// Head, filters, failures: drawn once.

function drawHead() {
  const { title, model, machines, seeds, command, run_seconds: runSeconds } = summary;
  byId("title").textContent = title;
  byId("facts").append(...descriptions([
    ["Model", model], [plural("Machine", machines), machines.join("\n")], [plural("Seed", seeds), seeds.join(", ")],
    ...summary.tasks.map(({ name, settings }) => [name, describeSettings(settings)]),
    ...(isNumber(runSeconds) ? [["Run time", `${show(runSeconds, "seconds")} for all runs together`]] : []),
    ...(command ? [["Command", h("code", { title: "One click selects all of it" }, command)]] : []),
  ]));
  for (const over of ["seeds", "rows"]) {
    byId(`over-${over}`).hidden = !summary.rows.some((row) =>
      Object.values(row.metrics).some(({ interval }) => interval === over));
  }
  byId("meanings").append(...descriptions(summary.columns.map((column) =>
    [column.title, [column.help, column.better && `${column.better} is better`].filter(Boolean).join(" ")])));
  byId("failures").hidden = !summary.failures.length;
  byId("failed").append(...descriptions(summary.failures.map(({ method, task, seed, reason }) =>
    [[methodLabel(method), ` on ${task}, seed ${seed}`], reason])));
}

const describeSettings = (settings) => Object.entries(settings).map(([key, value]) => `${key}: ${value}`).join("; ");

function drawFilters() {
  const toggle = ({ target }) => {
    state.hidden[target.checked ? "delete" : "add"](target.dataset.key);
    update({});
  };
  const chip = (key, ...content) =>
    h("label", { class: "chip" }, h("input", { type: "checkbox", "data-key": key, onchange: toggle }), content);
  byId("families").append(...families.map((family) =>
    chip(`family:${family}`, swatch(familyIndex(family)), familyTitle(family))));
  byId("tasks").append(...summary.tasks.map(({ name }) => chip(`task:${name}`, name)));
  for (const [id, event] of [["task", "change"], ["x", "change"], ["y", "change"], ["method", "input"]]) {
    byId(id).addEventListener(event, ({ target }) => update({ [id]: target.value }));
  }
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
}

function syncFilters() {
  for (const input of document.querySelectorAll(".chip input")) input.checked = !state.hidden.has(input.dataset.key);
  byId("method").value = state.method;
}

// Methods and tasks.

function drawMatrix() {
  const tasks = shownTasks();
  const head = (key, title, ...content) => {
    const sorted = state.by === key;
    return h("th", { scope: "col", "aria-sort": sorted ? "other" : "none", title },
      h("button", { "data-key": `by:${key}`, onclick: () => update({ by: sorted ? "" : key }) }, content,
        h("span", { class: "arrow", "aria-hidden": "true" }, sorted ? " \u25bc" : "")));
  };
  const titles = tasks.map(({ name, summary: title, main_metric: metric }) =>
    head(name, title, name, h("small", {}, `${metric}, ${fields.get(name).get("main").better} is better`)));
  const rows = matrixMethods().filter(isShown).map((method) => h("tr", { class: familyOf(method) === "base" && "base" },
    h("th", { scope: "row" }, methodLabel(method)),
    tasks.map((task) => h("td", {}, matrixCell(task.name, method)))));
  redraw(byId("matrix"),
    h("thead", {}, h("tr", {}, head("method", "By name", "Method"), titles)), h("tbody", {}, rows));
}

/** Methods in the order of the matrix: by mean place over the tasks, or by what a title was chosen for. */
function matrixMethods() {
  const [references, others] = [true, false].map((wanted) =>
    summary.methods.filter((method) => (familyOf(method) === "base") === wanted));
  const main = fields.get(state.by)?.get("main");
  if (state.by === "method") others.sort((a, b) => a.localeCompare(b, "en"));
  if (main) {
    const value = (method) => (rowOf(state.by, method) ? main.value(rowOf(state.by, method)) : null);
    const quality = (method) => (value(method) === null ? -Infinity : value(method) * (main.better === "lower" ? -1 : 1));
    const qualities = new Map(others.map((method) => [method, quality(method)]));
    others.sort((a, b) => (qualities.get(a) === qualities.get(b) ? 0 : qualities.get(b) - qualities.get(a)));
  }
  return [...references, ...others];
}

function matrixCell(task, method) {
  const row = rowOf(task, method);
  const failed = failuresOf(task, method).length > 0;
  const toFailures = () => byId("failures-title").focus();
  if (!row && failed) return h("button", { class: "cell failed", onclick: toFailures }, "failed");
  if (!row) return h("span", { class: "cell missing" }, familyOf(method) === "base" ? show(null) : "not run");
  const main = fields.get(task).get("main");
  const change = fields.get(task).get("change").value(row);
  const worse = change * (main.better === "lower" ? -1 : 1) <= -0.05;
  return h("button", { class: "cell", "data-key": row.id, onclick: () => openRun(row) },
    figure(main, row),
    h("small", { class: worse && "worse" }, isBase(row) ? referenceText(row) : show(change, "change")),
    failed ? h("small", { class: "worse" }, "some seeds failed") : null,
    bar(main, row));
}

const referenceText = (row) => (isUntrained(row) ? "untrained" : "one answer to all");

/** A figure, starred where it is the best, its interval in small type. */
function figure(field, row) {
  const best = isBest(field, row);
  return h("span", { class: best ? "figure best" : "figure" }, best ? star() : null,
    show(field.value(row), field.format),
    h("small", { title: intervalText(field, row) }, halfWidth(field, row)));
}

/** How far a run came from the base model towards the best run of its task. */
function bar(main, row) {
  const before = row.metrics[main.title]?.before;
  const best = contestants(row.task).find((other) => isBest(main, other));
  const share = isNumber(before) && best ? (main.value(row) - before) / (main.value(best) - before) : 0;
  const fill = h("span");
  fill.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  return h("span", { class: "bar", "aria-hidden": "true" }, fill);
}

// All figures.

function tableColumns(tasks) {
  const secondary = tasks.flatMap((task) => task.metrics.filter((name) => name !== task.main_metric));
  const keys = ["main", "change", ...columnFields.map(({ key }) => key), ...secondary.map((name) => `metric:${name}`)];
  const find = (key) => tasks.map((task) => fields.get(task.name).get(key)).find(Boolean);
  return tasks.length ? [...new Set(keys)].map(find) : [];
}

function sortedRows(task) {
  const base = rowsOf(task.name).filter(isBase);
  const rows = contestants(task.name).filter((row) => isShown(row.method));
  const value = state.sort === "method" ? (row) => row.method : fields.get(task.name).get(state.sort)?.value;
  if (!value) return [...base, ...rows];
  const compare = (a, b) => (isNumber(a) ? a - b : a.localeCompare(b, "en")) * (state.order === "descending" ? -1 : 1);
  const [missing, present] = [true, false].map((wanted) => rows.filter((row) => (value(row) === null) === wanted));
  return [...base, ...present.sort((a, b) => compare(value(a), value(b))), ...missing];
}

function sortBy(key, first) {
  const second = first === "ascending" ? "descending" : "ascending";
  if (state.sort !== key) update({ sort: key, order: first });
  else if (state.order === first) update({ order: second });
  else update({ sort: "", order: "" });
}

function headerCell({ key, title, help, better }) {
  const sorted = state.sort === key ? state.order : "none";
  const arrow = { none: "", ascending: " \u25b2", descending: " \u25bc" }[sorted];
  const onclick = () => sortBy(key, better === "higher" ? "descending" : "ascending");
  return h("th", { scope: "col", "aria-sort": sorted, title: help }, h("button", { "data-key": key, onclick },
    key === "main" ? "Main metric" : title, h("span", { class: "arrow", "aria-hidden": "true" }, arrow),
    better ? h("small", {}, `${better} is better`) : null));
}

function drawFigures() {
  const tasks = shownTasks();
  const columns = tableColumns(tasks);
  redraw(byId("figures"),
    h("thead", {}, h("tr", {}, [{ key: "method", title: "Method" }, ...columns].map(headerCell))),
    tasks.map((task) => h("tbody", { "data-task": task.name },
      h("tr", { class: "group" }, h("th", { scope: "rowgroup", colspan: columns.length + 1 },
        h("span", {}, task.name, h("small", {}, groupText(task))))),
      sortedRows(task).map((row) => figuresRow(row, columns)))));
}

const groupText = ({ summary: text, main_metric: metric, settings }) =>
  [text, `main metric ${metric}`, ...(settings["test rows"] ? [`${settings["test rows"]} test rows`] : [])].join("; ");

function figuresRow(row, columns) {
  const open = h("button", { class: "link", "data-key": row.id, onclick: () => openRun(row) }, methodLabel(row.method));
  return h("tr", { class: isBase(row) && "base", "data-row": row.id }, h("th", { scope: "row" }, open),
    columns.map(({ key, format }) => {
      const field = fields.get(row.task).get(key);
      return h("td", { "data-field": key, class: format === "text" && "text" }, field ? figure(field, row) : null);
    }));
}

// Charts.

function drawCharts() {
  const task = shownTasks().find(({ name }) => name === state.task) ?? shownTasks()[0] ?? summary.tasks[0];
  const rows = contestants(task.name).filter((row) => isShown(row.method));
  const [xField, yField] = chooseAxes(task, rows);
  const hasBoth = (row) => isNumber(xField.value(row)) && isNumber(yField.value(row));
  const points = rows.filter(hasBoth).map((row) => ({
    row, x: xField.value(row), y: yField.value(row), xInterval: xField.interval(row), yInterval: yField.interval(row),
  }));
  const references = rowsOf(task.name).filter(isBase).map((row) => ({
    name: isUntrained(row) ? untrainedName(row) : row.method, value: yField.value(row),
  })).filter(({ value }) => isNumber(value));
  byId("scatter-title").textContent = `${task.name}: ${yField.title} against ${xField.title}`;
  byId("scatter-note").textContent = scatterNote(xField, yField, rows.filter((row) => !hasBoth(row)));
  drawScatter(byId("scatter"), points, xField, yField, references, openRun);
  byId("curves-title").textContent = `${task.name}: training loss`;
  byId("curves-note").hidden = !rows.some((row) => row.curves.length > 1);
  drawCurves(byId("curves"), rows.map((row) => ({
    name: row.method, family: familyIndex(row.family), dash: dashOf(row.method), points: meanCurve(row.curves),
  })), 400);
}

/** The fields of the two axes; fills the selects with what the runs have values for. */
function chooseAxes(task, rows) {
  const all = fields.get(task.name);
  const choices = [...all.values()].filter((field) =>
    field.key !== `metric:${task.main_metric}` && rows.some((row) => isNumber(field.value(row))));
  const first = (...keys) => keys.map((key) => choices.find((field) => field.key === key)).find(Boolean);
  const cost = columnFields.find(({ better }) => better === "lower")?.key;
  const axes = [first(state.x, "base_parameters", "peak_memory_train_bytes", cost), first(state.y)].map((field) => field ?? all.get("main"));
  const options = choices.map(({ key, title }) => [key, key === "main" ? `${title} (main metric)` : title]);
  setOptions(byId("task"), shownTasks().map(({ name }) => [name, name]), task.name);
  setOptions(byId("x"), options, axes[0].key);
  setOptions(byId("y"), options, axes[1].key);
  return axes;
}

function setOptions(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
}

function scatterNote(x, y, missing) {
  const front = x.better && y.better
    ? `The line is the Pareto front of ${x.better} \u201c${x.title}\u201d and ${y.better} \u201c${y.title}\u201d; `
      + "methods off it are fainter."
    : "No Pareto front: for one of the axes neither lower nor higher is better.";
  return front + (missing.length ? ` Without a value: ${missing.map((row) => row.method).join(", ")}.` : "");
}

const DASHES = [null, "7 4", "2 3", "9 3 2 3", "4 2"];
const dashOf = (method) =>
  DASHES[summary.methods.filter((other) => familyOf(other) === familyOf(method)).indexOf(method) % DASHES.length];

function meanCurve(curves) {
  const bySteps = new Map();
  for (const [step, loss] of curves.flat().filter(([, loss]) => isNumber(loss))) {
    bySteps.set(step, [...(bySteps.get(step) ?? []), loss]);
  }
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  return [...bySteps].sort(([a], [b]) => a - b).map(([step, losses]) => [step, mean(losses)]);
}

function render() {
  syncFilters();
  drawMatrix();
  drawCharts();
  drawFigures();
}

drawHead();
drawFilters();
readState();
render();
window.addEventListener("hashchange", () => (readState(), render()));
window.addEventListener("resize", drawCharts);
byId("run").addEventListener("click", ({ target }) => target === byId("run") && target.close());
