// The page: what is shown, the tables, a run's panel. The view is kept in the address after the #.

const summary = JSON.parse(byId("data").textContent);
const families = Object.keys(summary.families).filter((family) => family !== "base");
const familyIndex = (family) => families.indexOf(family);
const familyTitle = (family) => (family === "base" ? "reference" : summary.families[family] ?? family);
const isBase = (row) => row.method === "base";
const rowOf = (task, method) => summary.rows.find((row) => row.task === task && row.method === method);
const failuresOf = (task, method) => summary.failures.filter((fail) => fail.task === task && fail.method === method);
const methods = [...new Set([...summary.rows, ...summary.failures].map((entry) => entry.method))]
  .sort((a, b) => (b === "base") - (a === "base"));
const familyOf = (method) => summary.rows.find((row) => row.method === method)?.family;

// Fields: whatever can be a column of the table or an axis, by key, for one task.

function metricField(key, title, name, task) {
  const value = (row) => row.metrics[name]?.mean ?? null;
  const interval = (row) => {
    const { low, high } = row.metrics[name] ?? {};
    return isNumber(low) && isNumber(high) ? [low, high] : null;
  };
  return {
    key, title, name, value, interval, format: "score",
    better: task.lower_is_better?.includes(name) ? "lower" : "higher",
  };
}

function columnField(column) {
  return { ...column, value: (row) => row.values[column.key] ?? null, interval: () => null };
}

function changeField(main) {
  const value = (row) => {
    const before = row.metrics[main.name]?.before;
    return !isBase(row) && isNumber(main.value(row)) && isNumber(before) ? main.value(row) - before : null;
  };
  return { key: "change", title: "Change", help: "Main metric against the untrained base model.", format: "change", better: null, value, interval: () => null };
}

function fieldText(field, row) {
  const interval = field.interval(row);
  return show(field.value(row), field.format) + (interval ? ` \u00b1 ${oneDecimal((interval[1] - interval[0]) / 2)}` : "");
}

const fields = new Map(summary.tasks.map((task) => {
  const main = metricField("main", task.main_metric, task.main_metric, task);
  const metrics = task.metrics.map((name) => metricField(`metric:${name}`, name, name, task));
  const all = [main, changeField(main), ...summary.columns.map(columnField), ...metrics];
  return [task.name, new Map(all.map((field) => [field.key, field]))];
}));

const rowsOf = (task) => summary.rows.filter((row) => row.task === task);
const contestants = (task) => rowsOf(task).filter((row) => !isBase(row));

function isBest(field, row) {
  if (!field.better || isBase(row) || !isNumber(field.value(row))) return false;
  const values = contestants(row.task).map(field.value).filter(isNumber);
  const best = field.better === "lower" ? Math.min(...values) : Math.max(...values);
  return field.value(row) === best && values.some((value) => value !== best);
}

// State.

const TEXTS = ["task", "x", "y", "sort", "order", "method"];
const state = { hidden: new Set() };

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
  method === "base" || (!state.hidden.has(`family:${familyOf(method)}`) && method.includes(state.method.trim()));
const chartTask = () => shownTasks().find((task) => task.name === state.task) ?? shownTasks()[0] ?? summary.tasks[0];

// Head and filters.

function drawHead() {
  byId("title").textContent = summary.title;
  const facts = [
    ["Model", summary.model],
    [summary.machines.length > 1 ? "Machines" : "Machine", summary.machines.join("\n")],
    [summary.seeds.length > 1 ? "Seeds" : "Seed", summary.seeds.join(", ")],
    ["Command", summary.command && h("code", { title: "One click selects all of it" }, summary.command)],
  ];
  byId("facts").append(...facts.filter(([, fact]) => fact).map(([name, fact]) => h("div", {}, h("dt", {}, name), h("dd", {}, fact))));
  const several = summary.rows.some((row) => row.seeds.length > 1);
  byId("reading").textContent =
    `Each cell is the task's main metric after training${several ? ", mean over seeds \u00b1 half the width of its 95 % interval," : ""} `
    + "with the change against the untrained base model; \u2605 is the best of its task, the bar the share of the way from base to best. Choose a cell for the run's figures and samples.";
  const meaning = (column) => [column.help, column.better && `${column.better} is better`].filter(Boolean).join("; ");
  byId("meanings").append(...summary.columns.map((column) => h("div", {}, h("dt", {}, column.title), h("dd", {}, meaning(column)))));
}

function drawFilters() {
  const toggle = (event) => {
    const { key } = event.target.dataset;
    if (event.target.checked) state.hidden.delete(key);
    else state.hidden.add(key);
    update({});
  };
  const chip = (key, ...content) => h("label", { class: "chip" }, h("input", { type: "checkbox", "data-key": key, onchange: toggle }), content);
  const group = (name, chips) => h("fieldset", {}, h("legend", {}, name), chips);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").append(
    group("Families", families.map((family) => chip(`family:${family}`, swatch(familyIndex(family)), familyTitle(family)))),
    group("Tasks", summary.tasks.map((task) => chip(`task:${task.name}`, task.name))),
    h("label", { class: "search" }, "Method", h("input", { type: "search", id: "method", placeholder: "all", autocomplete: "off", oninput: (event) => update({ method: event.target.value }) })));
  const select = (id, name) => h("label", {}, name, h("select", { id, onchange: (event) => update({ [id]: event.target.value }) }));
  byId("axes").append(select("task", "Task"), select("x", "Horizontal"), select("y", "Vertical"));
}

function syncControls() {
  document.querySelectorAll("#filters [data-key]").forEach((input) => (input.checked = !state.hidden.has(input.dataset.key)));
  byId("method").value = state.method;
}

function setOptions(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
}

// Tables.

const methodLabel = (method) => h("span", { class: "method" }, swatch(familyIndex(familyOf(method))), method);
const hint = (field) => (field.better ? h("small", {}, `${field.better} is better`) : null);

function drawMatrix() {
  const tasks = shownTasks();
  const head = h("tr", {}, h("th", { scope: "col" }, "Method"), tasks.map((task) =>
    h("th", { scope: "col", title: task.summary }, task.name,
      h("small", {}, `${task.main_metric}, ${fields.get(task.name).get("main").better} is better`))));
  const body = methods.filter(isShown).map((method) => h("tr", { class: method === "base" ? "base" : null },
    h("th", { scope: "row" }, methodLabel(method)), tasks.map((task) => h("td", {}, matrixCell(task, method)))));
  redraw(byId("matrix"), h("thead", {}, head), h("tbody", {}, body));
}

function matrixCell(task, method) {
  const row = rowOf(task.name, method);
  const failed = failuresOf(task.name, method).length > 0;
  if (!row && failed) return h("button", { class: "cell failed", onclick: () => byId("failures-title").focus() }, "failed");
  if (!row) return h("span", { class: "cell missing" }, "not run");
  const main = fields.get(task.name).get("main");
  const change = fields.get(task.name).get("change");
  const best = isBest(main, row);
  const worse = change.value(row) * (main.better === "lower" ? -1 : 1) <= -0.05;
  return h("button", { class: best ? "cell best" : "cell", "data-key": row.id, onclick: () => openRun(row) },
    h("span", { class: "value" }, best ? star() : null, figure(main, row)),
    h("small", { class: worse && "worse" }, isBase(row) ? "untrained" : show(change.value(row), "change")),
    failed ? h("small", { class: "worse" }, "some seeds failed") : null,
    bar(main, row));
}

/** A figure with its interval in small type. */
function figure(field, row) {
  const [value, half] = fieldText(field, row).split(/(?= \u00b1)/);
  return [value, half ? h("small", {}, half) : null];
}

/** How far a run came from the base model towards the best run of its task. */
function bar(main, row) {
  const base = rowOf(row.task, "base");
  const best = contestants(row.task).find((other) => isBest(main, other));
  const share = base && best ? (main.value(row) - main.value(base)) / (main.value(best) - main.value(base)) : 0;
  const fill = h("span");
  fill.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  return h("span", { class: "bar", "aria-hidden": "true" }, fill);
}

function tableKeys(tasks) {
  const secondary = tasks.flatMap((task) => task.metrics.filter((name) => name !== task.main_metric));
  return ["main", "change", ...summary.columns.map(({ key }) => key), ...new Set(secondary.map((name) => `metric:${name}`))];
}

function sortedRows(task) {
  const rows = contestants(task.name).filter((row) => isShown(row.method));
  const field = fields.get(task.name).get(state.sort);
  const base = summary.rows.filter((row) => row.task === task.name && isBase(row));
  if (!field && state.sort !== "method") return [...base, ...rows];
  const value = (row) => (field ? field.value(row) : row.method);
  const sign = state.order === "descending" ? -1 : 1;
  const compare = (a, b) => (isNumber(a) && isNumber(b) ? a - b : String(a).localeCompare(String(b), "en"));
  const isMissing = (row) => value(row) === null;
  rows.sort((a, b) => isMissing(a) - isMissing(b) || (isMissing(a) ? 0 : sign * compare(value(a), value(b))));
  return [...base, ...rows];
}

function sortBy(key, first) {
  const second = first === "ascending" ? "descending" : "ascending";
  if (state.sort !== key) update({ sort: key, order: first });
  else if (state.order === first) update({ order: second });
  else update({ sort: "", order: "" });
}

function headerCell(key, field, title) {
  const sorted = state.sort === key ? state.order : null;
  const first = field?.better === "higher" ? "descending" : "ascending";
  return h("th", { scope: "col", "aria-sort": sorted ?? "none", title: field?.help },
    h("button", { "data-key": key, onclick: () => sortBy(key, first) }, title,
      h("span", { class: "arrow", "aria-hidden": "true" }, sorted ? (sorted === "ascending" ? " \u25b2" : " \u25bc") : ""), field ? hint(field) : null));
}

function drawFigures() {
  const tasks = shownTasks();
  const keys = tableKeys(tasks);
  const anyField = (key) => tasks.map((task) => fields.get(task.name).get(key)).find(Boolean);
  const title = (key, field) => (key === "main" ? "Main metric" : field.title);
  redraw(byId("figures"),
    h("thead", {}, h("tr", {}, headerCell("method", null, "Method"), keys.map((key) => [key, anyField(key)]).filter(([, field]) => field)
      .map(([key, field]) => headerCell(key, field, title(key, field))))),
    tasks.map((task) => h("tbody", { "data-task": task.name },
      h("tr", { class: "group" }, h("th", { scope: "rowgroup", colspan: keys.length + 1 },
        h("span", {}, task.name, h("small", {}, `${task.summary}; main metric ${task.main_metric}`)))),
      sortedRows(task).map((row) => figuresRow(row, keys)))));
}

function figuresRow(row, keys) {
  return h("tr", { class: isBase(row) ? "base" : null, "data-row": row.id },
    h("th", { scope: "row" }, h("button", { class: "link", "data-key": row.id, onclick: () => openRun(row) }, methodLabel(row.method))),
    keys.map((key) => {
      const field = fields.get(row.task).get(key);
      if (!field) return h("td");
      const best = isBest(field, row);
      return h("td", { "data-field": key, class: [best && "best", field.format === "text" && "text"].filter(Boolean).join(" ") || null }, best ? star() : null, figure(field, row));
    }));
}

function drawFailures() {
  byId("failures").hidden = !summary.failures.length;
  byId("failed").append(...summary.failures.map((fail) => h("div", {},
    h("dt", {}, methodLabel(fail.method), ` on ${fail.task}, seed ${fail.seed}`), h("dd", {}, fail.reason))));
}

// Charts.

function drawCharts() {
  const task = chartTask();
  const rows = contestants(task.name).filter((row) => isShown(row.method));
  const ofTask = fields.get(task.name);
  const axes = [...ofTask.values()].filter((field) => field.key !== `metric:${task.main_metric}` && rows.some((row) => isNumber(field.value(row))));
  const axis = (...keys) => keys.map((key) => axes.find((field) => field.key === key)).find(Boolean) ?? ofTask.get("main");
  const xField = axis(state.x, "peak_memory_train_bytes", summary.columns.find(({ better }) => better === "lower")?.key);
  const yField = axis(state.y, "main");
  const options = axes.map((field) => [field.key, field.key === "main" ? `${field.title} (main metric)` : field.title]);
  setOptions(byId("task"), shownTasks().map(({ name }) => [name, name]), task.name);
  setOptions(byId("x"), options, xField.key);
  setOptions(byId("y"), options, yField.key);
  const hasBoth = (row) => isNumber(xField.value(row)) && isNumber(yField.value(row));
  const points = rows.filter(hasBoth).map((row) => ({
    row, x: xField.value(row), y: yField.value(row), xInterval: xField.interval(row), yInterval: yField.interval(row),
  }));
  const base = rowOf(task.name, "base");
  byId("scatter-title").textContent = `${task.name}: ${yField.title} against ${xField.title}`;
  byId("curves-title").textContent = `${task.name}: training loss`;
  byId("scatter-note").textContent = scatterNote(xField, yField, rows.filter((row) => !hasBoth(row)));
  drawScatter(byId("scatter"), points, xField, yField, (base && yField.value(base)) ?? null, openRun);
  drawCurves(byId("curves"), rows.map((row) => ({
    name: row.method, family: familyIndex(row.family), dash: dashOf(row.method), points: meanCurve(row.curves),
  })), 400);
  byId("curves-note").textContent = rows.some((row) => row.curves.length > 1) ? "Mean over seeds." : "";
}

function scatterNote(xField, yField, missing) {
  const front = xField.better && yField.better
    ? `The line is the Pareto front of ${xField.better} \u201c${xField.title}\u201d and ${yField.better} \u201c${yField.title}\u201d; methods off it are fainter.`
    : "No Pareto front: for one of the axes neither lower nor higher is better.";
  return front + (missing.length ? ` Without a value: ${missing.map((row) => row.method).join(", ")}.` : "");
}

const DASHES = [null, "7 4", "2 3", "9 3 2 3", "4 2"];
const dashOf = (method) => DASHES[methods.filter((other) => familyOf(other) === familyOf(method)).indexOf(method) % DASHES.length];

function meanCurve(curves) {
  const byStep = new Map();
  for (const [step, loss] of curves.flat()) {
    if (isNumber(loss)) byStep.set(step, [...(byStep.get(step) ?? []), loss]);
  }
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  return [...byStep].sort(([a], [b]) => a - b).map(([step, losses]) => [step, mean(losses)]);
}

// A run's panel.

function openRun(row) {
  const dialog = byId("run");
  const curve = h("div", { class: "chart" });
  redraw(dialog,
    h("header", {}, h("h2", { id: "run-title" }, methodLabel(row.method), ` on ${row.task}`),
      h("button", { class: "close", onclick: () => dialog.close() }, "Close")),
    h("p", { class: "note" }, `${familyTitle(row.family)}${row.seeds.length ? `; seeds ${row.seeds.join(", ")}` : ""}`),
    row.notes ? h("p", {}, row.notes) : [],
    failuresOf(row.task, row.method).map((fail) => h("p", { class: "worse" }, `Seed ${fail.seed} failed: ${fail.reason}`)),
    h("div", { class: "scroll" }, runMetrics(row)),
    h("dl", { class: "values" }, summary.columns.map(columnField).filter((field) => field.value(row) !== null)
      .map((field) => h("div", { title: field.help }, h("dt", {}, field.title), h("dd", {}, fieldText(field, row))))),
    row.curves.length ? [h("h3", {}, "Training loss"), curve] : [],
    row.samples.length ? h("h3", {}, "Samples") : [],
    row.samples.map((sample) => drawSample(row, sample)));
  dialog.showModal();
  dialog.scrollTop = 0;
  if (row.curves.length) {
    drawCurves(curve, row.curves.map((points, i) => ({
      name: `seed ${row.seeds[i]}`, family: familyIndex(row.family), dash: DASHES[i % DASHES.length], points: points.filter(([, loss]) => isNumber(loss)),
    })), 260);
  }
}

function runMetrics(row) {
  const task = summary.tasks.find(({ name }) => name === row.task);
  const names = isBase(row) ? ["Metric", "Untrained"] : ["Metric", "Before", "After", "95 % interval"];
  return h("table", {}, h("thead", {}, h("tr", {}, names.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, task.metrics.filter((name) => row.metrics[name]).map((name) => {
      const { before, mean, low, high } = row.metrics[name];
      const interval = isNumber(low) && isNumber(high) ? `${oneDecimal(low)} to ${oneDecimal(high)}` : show(null);
      const cells = [show(before, "score"), show(mean, "score"), interval].slice(0, names.length - 1);
      return h("tr", {}, h("th", { scope: "row" }, name), cells.map((text) => h("td", {}, text)));
    })));
}

function drawSample(row, sample) {
  const block = (name, text, content) =>
    isNumber(text?.length) ? h("div", {}, h("h4", {}, name), h("p", { dir: "auto" }, text ? content ?? text : "(empty)")) : null;
  const marked = (text) => markShared(text ?? "", sample.reference ?? "");
  return h("article", { class: "sample" },
    block("Source", sample.source),
    block("Reference", sample.reference),
    block(isBase(row) ? "Prediction" : "Prediction before", sample.before, marked(sample.before)),
    isBase(row) ? null : block("Prediction after", sample.after, marked(sample.after)));
}

function render() {
  syncControls();
  drawMatrix();
  drawCharts();
  drawFigures();
}

readState();
drawHead();
drawFilters();
drawFailures();
render();
byId("run").addEventListener("click", (event) => event.target === event.currentTarget && event.currentTarget.close());
window.addEventListener("hashchange", () => (readState(), render()));
window.addEventListener("resize", drawCharts);
